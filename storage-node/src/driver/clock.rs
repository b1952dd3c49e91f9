//! The clock of a device: it goes on while the machine is suspended, so that a read grant runs out then too.

use std::time::Duration;

use cairn_proto::time::Time;
use rustix::time::{ClockId, clock_gettime};

/// Now, since the machine was started.
pub fn now() -> Time {
    let time = clock_gettime(ClockId::Boottime);
    Time::from_nanos(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

/// What the wall clock says, since 1970; `None` if it was never set.
pub fn since_1970() -> Option<Duration> {
    const YEAR: u64 = 365 * 24 * 3600;
    let seconds = u64::try_from(clock_gettime(ClockId::Realtime).tv_sec).ok()?;
    (seconds > YEAR).then(|| Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_does_not_go_back() {
        let first = now();
        assert!(first > Time::ZERO);
        assert!(now() >= first);
    }
}
