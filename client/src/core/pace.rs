//! How fast copies may be, so that guests don't feel them: a governor for all volumes of a client.
//!
//! While there are copies it looks at what guests felt every `interval`. With no guest about, copies are free. Otherwise it
//! sets a rate, and compares what operations take with what they take without copies, kind by kind: too slow, and the rate
//! goes down by a part; else it goes up by a little. What operations take without copies changes with what guests do, so
//! copies pause now and then to measure it anew. The rate never goes below `rate_min`: repair always goes on.

use std::time::Duration;

use cairn_proto::replication::pace::Tally;
use cairn_proto::replication::{Event, GuestLoad, Pace};
use cairn_proto::time::Time;

use super::ClientCore;
use super::api::VolumeHandle;

/// Bounds of a governor. They can be set tiny for tests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PaceLimits {
    /// How often it decides.
    pub interval: Duration,
    /// Blocks a second at the least, over all volumes.
    pub rate_min: u64,
    /// What it begins with.
    pub rate_start: u64,
    /// Blocks a second at the most while guests are about.
    pub rate_max: u64,
    /// Operations may take so much longer with copies, in percent of what they take without.
    pub slowdown_percent: u64,
    /// Fewer operations than that in an interval count as none.
    pub ops_min: u64,
    /// After so many intervals without guests copies are free.
    pub idle_intervals: u32,
    /// After so many intervals with copies they pause, to measure what operations take without.
    pub run_intervals: u32,
    /// Intervals that one pause may take until nothing is on its way any more.
    pub settle_intervals: u32,
}

impl PaceLimits {
    /// What production uses.
    pub const DEFAULT: PaceLimits = PaceLimits {
        interval: Duration::from_millis(100),
        rate_min: 2048,
        rate_start: 8192,
        rate_max: 512 * 1024,
        slowdown_percent: 25,
        ops_min: 5,
        idle_intervals: 2,
        run_intervals: 30,
        settle_intervals: 3,
    };
}

const _: () =
    assert!(PaceLimits::DEFAULT.rate_min > 0 && PaceLimits::DEFAULT.rate_min <= PaceLimits::DEFAULT.rate_start);
const _: () = assert!(PaceLimits::DEFAULT.rate_start <= PaceLimits::DEFAULT.rate_max);

/// What a governor is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    /// No guest is about.
    Free,
    /// Copies pause, and some were on their way: so many intervals already.
    Settle(u32),
    /// Copies pause, and nothing is on its way: what guests feel now is the measure.
    Measure,
    /// Copies go on, for so many intervals already.
    Run(u32),
}

/// Sets the pace of copies by what guests feel.
#[derive(Clone, Debug)]
pub struct Governor {
    limits: PaceLimits,
    step: Step,
    rate: u64,
    idle: u32,
    /// Nanoseconds that an operation of each kind takes without copies; zero when that is not known.
    baseline: [u64; 4],
}

impl Governor {
    /// One that knows nothing of its guests.
    pub fn new(limits: PaceLimits) -> Governor {
        Governor {
            limits,
            step: Step::Free,
            rate: limits.rate_start,
            idle: 0,
            baseline: [0; 4],
        }
    }

    /// Copies begin: their pace until the first interval is over. What is copied within it, nobody waits for.
    pub fn begin(&mut self) -> Pace {
        (self.step, self.idle) = (Step::Free, 0);
        Pace::Blocks(self.rate)
    }

    /// An interval is over, in which guests felt this. The pace of the next, over all volumes.
    pub fn tick(&mut self, load: &GuestLoad) -> Pace {
        if load.ops() < self.limits.ops_min {
            self.idle += 1;
        } else {
            self.idle = 0;
        }
        if self.idle >= self.limits.idle_intervals {
            self.step = Step::Free;
        } else if self.idle == 0 {
            self.step = self.step_with_guests(load);
        }
        match self.step {
            Step::Free => Pace::Free,
            Step::Settle(_) | Step::Measure => Pace::Paused,
            Step::Run(_) => Pace::Blocks(self.rate),
        }
    }

    fn step_with_guests(&mut self, load: &GuestLoad) -> Step {
        match self.step {
            Step::Free => Step::Settle(0),
            Step::Settle(count) if load.in_flight && count < self.limits.settle_intervals => Step::Settle(count + 1),
            // What was measured until now may have been felt from copies.
            Step::Settle(_) => Step::Measure,
            Step::Measure => {
                self.learn(load);
                Step::Run(0)
            }
            Step::Run(count) if count >= self.limits.run_intervals => Step::Settle(0),
            Step::Run(count) => match self.slowdown(load) {
                Some(percent) => {
                    self.adjust(percent);
                    Step::Run(count + 1)
                }
                // Guests do something that they did not do before.
                None => Step::Settle(0),
            },
        }
    }

    fn learn(&mut self, load: &GuestLoad) {
        for (known, tally) in self.baseline.iter_mut().zip(load.kinds) {
            if let Some(mean) = tally.nanos.checked_div(tally.ops) {
                let mean = mean.max(1);
                // A single interval may be a lucky or an unlucky one.
                *known = if *known == 0 { mean } else { (*known + mean) / 2 };
            }
        }
    }

    /// By how many percent operations took longer than without copies; `None` if too little is known.
    fn slowdown(&self, load: &GuestLoad) -> Option<u64> {
        let is_known = |(known, tally): &(&u64, &Tally)| **known > 0 && tally.ops > 0;
        let known = || self.baseline.iter().zip(&load.kinds).filter(is_known);
        let ops: u64 = known().map(|(_, tally)| tally.ops).sum();
        if ops * 2 < load.ops() {
            return None;
        }
        let usual: u128 = known()
            .map(|(known, tally)| u128::from(*known) * u128::from(tally.ops))
            .sum();
        let took: u128 = known().map(|(_, tally)| u128::from(tally.nanos)).sum();
        let percent = took.saturating_sub(usual) * 100 / usual.max(1);
        Some(u64::try_from(percent).unwrap_or(u64::MAX))
    }

    fn adjust(&mut self, percent: u64) {
        let limits = &self.limits;
        let rate = if percent > limits.slowdown_percent {
            self.rate - self.rate / 4
        } else {
            self.rate + (limits.rate_min / 2).max(1)
        };
        self.rate = rate.clamp(limits.rate_min, limits.rate_max);
    }
}

/// The governor of a client, and when it is asked next.
pub(super) struct Pacing {
    governor: Governor,
    /// None while there are no copies.
    pub(super) tick_at: Option<Time>,
    /// What all volumes together may copy.
    pace: Pace,
    /// Volumes with copies.
    copying: u64,
}

impl Pacing {
    pub(super) fn new(limits: PaceLimits) -> Pacing {
        Pacing {
            governor: Governor::new(limits),
            tick_at: None,
            pace: Pace::Free,
            copying: 0,
        }
    }

    /// Of one volume with copies.
    fn share(&self) -> Pace {
        match self.pace {
            Pace::Blocks(rate) => Pace::Blocks((rate / self.copying.max(1)).max(1)),
            pace => pace,
        }
    }
}

impl ClientCore {
    /// There are copies of a volume.
    pub(super) fn copying(&mut self, handle: VolumeHandle) {
        let now = self.now;
        if self.pacing.tick_at.is_none() {
            self.pacing.tick_at = Some(now + self.config.limits.pace.interval);
            self.pacing.pace = self.pacing.governor.begin();
            self.pacing.copying = 0;
            // What guests felt until now was felt without copies, but a long time ago perhaps.
            for volume in self.volumes.values_mut() {
                if let Some(coordinator) = volume.coordinator() {
                    let _ = coordinator.take_guest_load();
                }
            }
        }
        self.pacing.copying += 1;
        let share = self.pacing.share();
        let volume = self.volumes.get_mut(&handle).expect("the caller has it");
        if let Some(coordinator) = volume.coordinator() {
            coordinator.handle(now, Event::Pace(share));
            self.touched.insert(handle);
        }
    }

    /// Sets the pace of copies anew, if it is time for that.
    pub(super) fn pace_due(&mut self) {
        let now = self.now;
        if self.pacing.tick_at.is_none_or(|at| at > now) {
            return;
        }
        let mut felt = GuestLoad::default();
        let mut copying = Vec::new();
        for (handle, volume) in &mut self.volumes {
            let Some(coordinator) = volume.coordinator() else {
                continue;
            };
            let load = coordinator.take_guest_load();
            felt.add(&load);
            if load.copying {
                copying.push(*handle);
            }
        }
        if copying.is_empty() {
            self.pacing.tick_at = None;
            return;
        }
        self.pacing.tick_at = Some(now + self.config.limits.pace.interval);
        self.pacing.copying = copying.len() as u64;
        self.pacing.pace = self.pacing.governor.tick(&felt);
        let share = self.pacing.share();
        for handle in copying {
            let volume = self.volumes.get_mut(&handle).expect("it was just looked at");
            if let Some(coordinator) = volume.coordinator() {
                coordinator.handle(now, Event::Pace(share));
                self.touched.insert(handle);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: PaceLimits = PaceLimits::DEFAULT;

    /// A guest that writes, whose operations take `base_us`, and longer by what copies there are.
    struct World {
        governor: Governor,
        pace: Pace,
        base_us: u64,
        /// Blocks a second that make operations twice as slow.
        doubles_at: u64,
        ops: u64,
        copied: u64,
    }

    impl World {
        fn new(base_us: u64, doubles_at: u64) -> World {
            let mut governor = Governor::new(LIMITS);
            let pace = governor.begin();
            World {
                governor,
                pace,
                base_us,
                doubles_at,
                ops: 500,
                copied: 0,
            }
        }

        /// What is copied a second when nothing holds it back.
        const FREE: u64 = 100_000;

        fn rate(&self) -> u64 {
            match self.pace {
                Pace::Free => Self::FREE,
                Pace::Blocks(rate) => rate.min(Self::FREE),
                Pace::Paused => 0,
            }
        }

        /// One interval. By how many percent operations took longer in it.
        fn interval(&mut self) -> u64 {
            let rate = self.rate();
            let slow = rate * 100 / self.doubles_at;
            self.copied += rate / 10;
            let mut load = GuestLoad {
                copying: true,
                in_flight: rate > 0,
                ..GuestLoad::default()
            };
            load.kinds[0] = Tally {
                ops: self.ops,
                nanos: self.ops * self.base_us * (100 + slow) * 10,
            };
            self.pace = self.governor.tick(&load);
            slow
        }

        fn intervals(&mut self, count: usize) {
            for _ in 0..count {
                self.interval();
            }
        }
    }

    #[test]
    fn without_guests_copies_are_free_and_a_guest_that_comes_is_noticed_at_once() {
        let mut world = World::new(200, 20_000);
        world.ops = 0;
        world.intervals(5);
        assert_eq!(world.pace, Pace::Free);
        world.ops = 500;
        world.interval();
        assert_eq!(
            world.pace,
            Pace::Paused,
            "what operations take without copies is measured first"
        );
        world.intervals(3);
        assert!(matches!(world.pace, Pace::Blocks(_)), "{:?}", world.pace);
    }

    #[test]
    fn guests_are_slowed_down_by_little_and_copies_use_what_is_left() {
        let mut world = World::new(200, 40_000);
        world.intervals(300);
        let (before, mut slow) = (world.copied, 0);
        for _ in 0..600 {
            slow += world.interval();
        }
        let mean = slow / 600;
        assert!(mean <= LIMITS.slowdown_percent, "slowed down by {mean} percent");
        // A quarter slower is ten thousand blocks a second.
        let rate = (world.copied - before) / 60;
        assert!((6_000..=10_500).contains(&rate), "{rate} blocks a second");
    }

    #[test]
    fn guests_that_change_what_they_do_are_measured_anew() {
        let mut world = World::new(200, 40_000);
        world.intervals(300);
        // Ten times as slow by themselves: not the copies' fault.
        world.base_us = 2000;
        world.intervals(300);
        let before = world.copied;
        world.intervals(600);
        let rate = (world.copied - before) / 60;
        assert!(rate > 6_000, "{rate} blocks a second");
    }

    proptest! {
        /// Whatever guests feel and however that changes, copies go on at the floor at least, apart from pauses, and
        /// never beyond the bound while guests are about.
        #[test]
        fn repair_always_goes_on(felt in proptest::collection::vec(
            (0u64..2000, 0u64..10_000_000, any::<bool>(), 0usize..4), 200..400,
        )) {
            let mut governor = Governor::new(LIMITS);
            let mut pace = governor.begin();
            let (mut copied, mut paused_for) = (0u64, 0u32);
            let intervals = felt.len() as u64;
            for (ops, nanos, in_flight, kind) in felt {
                match pace {
                    Pace::Free => copied += LIMITS.rate_max,
                    Pace::Blocks(rate) => {
                        prop_assert!((LIMITS.rate_min..=LIMITS.rate_max).contains(&rate));
                        copied += rate;
                    }
                    Pace::Paused => {}
                }
                paused_for = if pace == Pace::Paused { paused_for + 1 } else { 0 };
                prop_assert!(paused_for <= LIMITS.settle_intervals * 2 + 4, "a pause of {} intervals", paused_for);
                let mut load = GuestLoad { copying: true, in_flight, ..GuestLoad::default() };
                load.kinds[kind] = Tally { ops, nanos: ops * nanos };
                pace = governor.tick(&load);
            }
            // Of any few intervals at least one copies.
            let least = intervals / u64::from(LIMITS.settle_intervals * 2 + 5) * LIMITS.rate_min;
            prop_assert!(copied >= least, "{} of {} blocks", copied, least);
        }
    }
}
