//! The clock of the driver: it goes on while the machine sleeps, as leases do.

use cairn_proto::time::Time;
use rustix::time::{ClockId, clock_gettime};

/// `CLOCK_BOOTTIME`: never goes back, counts suspended time too.
pub(super) fn now() -> Time {
    let time = clock_gettime(ClockId::Boottime);
    Time::from_nanos(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}
