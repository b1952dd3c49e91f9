//! The clock of the driver, which goes on while the machine sleeps, as leases do; and its randomness.

use std::io;
use std::time::Duration;

use cairn_proto::time::Time;
use rustix::time::{ClockId, clock_gettime};

/// `CLOCK_BOOTTIME`: never goes back, counts suspended time too.
pub(super) fn now() -> Time {
    let time = clock_gettime(ClockId::Boottime);
    Time::from_nanos(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

/// Pauses that differ from process to process (xorshift64*, seeded by the system).
pub(super) struct Jitter(u64);

impl Jitter {
    pub(super) fn new() -> io::Result<Jitter> {
        let mut seed = [0; 8];
        #[expect(clippy::disallowed_methods, reason = "the edge is where randomness comes in")]
        getrandom::fill(&mut seed).map_err(io::Error::from)?;
        Ok(Jitter(u64::from_le_bytes(seed) | 1))
    }

    /// Between nothing and `most`.
    pub(super) fn up_to(&mut self, most: Duration) -> Duration {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let drawn = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        most.mul_f64(drawn as f64 / f64::from(u32::MAX))
    }
}
