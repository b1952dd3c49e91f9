//! Pauses between attempts.

use std::time::Duration;

use cairn_proto::time::Time;

use super::limits::CoreLimits;

/// Pauses that double up to a bound, and start over after a success.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Backoff {
    pause: Duration,
}

impl Backoff {
    /// When to try again after a failure now.
    pub(super) fn next(&mut self, now: Time, limits: &CoreLimits) -> Time {
        self.pause = (self.pause * 2).clamp(limits.retry_min, limits.retry_max);
        now + self.pause
    }

    pub(super) fn reset(&mut self) {
        self.pause = Duration::ZERO;
    }
}
