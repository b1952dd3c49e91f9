//! The faults that are on.

use std::time::Duration;

use super::fault::{Direction, Fault};

/// See the module.
#[derive(Clone, Default, Debug)]
pub(super) struct Switches {
    pub(super) delay: Option<(Duration, Duration)>,
    pub(super) bytes_per_s: Option<u64>,
    pub(super) half_open: bool,
    pub(super) black_hole: bool,
    /// The direction that alone is forwarded.
    pub(super) only: Option<Direction>,
    pub(super) reset_after: Option<u64>,
    pub(super) corrupt_one_in: Option<u64>,
    pub(super) refuse: bool,
}

impl Switches {
    /// Those that last; what `Drop` and `Silence` do is done to the connections.
    pub(super) fn switch_on(&mut self, fault: Fault) {
        match fault {
            Fault::Delay { fixed, jitter } => self.delay = Some((fixed, jitter)),
            Fault::Bandwidth { bytes_per_s } => self.bytes_per_s = Some(bytes_per_s.max(1)),
            Fault::HalfOpen => self.half_open = true,
            Fault::BlackHole => self.black_hole = true,
            Fault::OneWay(direction) => self.only = Some(direction),
            Fault::ResetAfter { bytes } => self.reset_after = Some(bytes),
            Fault::Corrupt { one_in } => self.corrupt_one_in = Some(one_in.max(1)),
            Fault::Refuse => self.refuse = true,
            Fault::Drop | Fault::Silence => {}
        }
    }

    /// Whether bytes go that way at all.
    pub(super) fn passes(&self, direction: Direction) -> bool {
        !self.black_hole && self.only.is_none_or(|only| only == direction)
    }
}
