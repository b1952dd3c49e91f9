//! The clock of a device: it goes on while the machine is suspended, so that a read grant runs out then too.

use cairn_proto::time::Time;
use rustix::time::{ClockId, clock_gettime};

/// Now, since the machine was started.
pub fn now() -> Time {
    let time = clock_gettime(ClockId::Boottime);
    Time::from_nanos(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
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
