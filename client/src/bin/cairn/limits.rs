//! Every bound of the command, in one place.

use std::time::Duration;

/// How long a command waits for the metadata servers in all.
pub(crate) const META_DEADLINE: Duration = Duration::from_secs(5);
/// Entries that are asked for in one page of a list.
pub(crate) const LIST_PAGE: u32 = 1000;
/// Storage nodes that `cairn dev` starts at the most.
pub(crate) const DEV_NODES_MAX: i64 = 32;
/// Metadata servers that `cairn dev` starts at the most.
pub(crate) const DEV_METAS_MAX: u32 = 5;
/// How long a process may take to stop in good order. `cairn dev` waits longer than this before it kills.
pub(crate) const SHUTDOWN_BOUND: Duration = Duration::from_secs(8);
/// Threads of a process's control plane. The data paths have threads of their own.
pub(crate) const WORKER_THREADS: usize = 2;
