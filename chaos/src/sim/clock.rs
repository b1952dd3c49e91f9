//! The clock of one process: it never stops, not in a freeze either, but runs a little fast or slow, and may jump forward.

use std::time::Duration;

use cairn_proto::time::Time;

/// How a process sees virtual time.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    origin_nanos: u64,
    drift_ppm: i64,
}

impl Clock {
    /// Starts at `origin_nanos` when the world starts, and is `drift_ppm` millionths too fast.
    pub fn new(origin_nanos: u64, drift_ppm: i64) -> Clock {
        assert!(drift_ppm.abs() < 100_000, "drift of {drift_ppm} ppm");
        Clock {
            origin_nanos,
            drift_ppm,
        }
    }

    /// From now on it shows so much more.
    pub fn jump(&mut self, span: Duration) {
        self.origin_nanos += u64::try_from(span.as_nanos()).expect("jumps are short");
    }

    /// What it shows at a world time.
    pub fn local(&self, world: Time) -> Time {
        let nanos = i128::from(world.as_nanos());
        let drifted = nanos + (nanos * i128::from(self.drift_ppm)).div_euclid(1_000_000);
        let drifted = u64::try_from(drifted).expect("clocks run forward");
        Time::from_nanos(self.origin_nanos + drifted)
    }

    /// The first world time at which it shows at least `local`.
    pub fn world(&self, local: Time) -> Time {
        let since = i128::from(local.as_nanos().saturating_sub(self.origin_nanos));
        let rate = i128::from(1_000_000 + self.drift_ppm);
        let nanos = (since * 1_000_000 + rate - 1) / rate;
        let mut world = Time::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        // Rounding may leave it a nanosecond short.
        while self.local_saturating(world) < local && world < Time::MAX {
            world = Time::from_nanos(world.as_nanos() + 1);
        }
        world
    }

    fn local_saturating(&self, world: Time) -> Time {
        if world.as_nanos() > 1 << 62 {
            Time::MAX
        } else {
            self.local(world)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_is_due_when_its_process_thinks_so() {
        for drift in [-200, 0, 7, 500] {
            let clock = Clock::new(123_456_789, drift);
            for nanos in [0, 1, 999, 1_000_000_007, 77_777_777_777] {
                let local = Time::from_nanos(123_456_789 + nanos);
                let world = clock.world(local);
                assert!(clock.local(world) >= local);
                if world > Time::ZERO {
                    assert!(
                        clock.local(Time::from_nanos(world.as_nanos() - 1)) < local,
                        "{drift} {nanos}"
                    );
                }
            }
        }
    }
}
