//! Bounds of a caretaker.

use std::time::Duration;

/// Tasks that are taken of one answer of meta at the most.
pub const TASKS_MAX: usize = 4;
/// Volumes that are held at a time.
pub const HELD_MAX: usize = 2;
/// How long a volume that could not be had is not asked for again.
pub const RETRY_PAUSE: Duration = Duration::from_secs(10);
/// How often it is looked whether something is due.
pub const TICK: Duration = Duration::from_secs(1);

const _: () = assert!(HELD_MAX <= crate::driver::limits::CARED_MAX);
