//! The pace of copies: what is copied to members of groups that are served waits for its turn, so that guests are not slowed
//! down. Who owns several attachments measures what guests feel ([`GuestLoad`]) and sets the pace ([`Pace`]).
//!
//! Copies that a group must have before it can be served wait for nothing: its guests wait for them.

use std::time::Duration;

use super::api::{Action, GroupPhase};
use super::{Coordinator, Timer};
use crate::time::Time;

/// How fast copies may be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Pace {
    /// As fast as the copies in flight allow.
    #[default]
    Free,
    /// So many blocks a second; at least one.
    Blocks(u64),
    /// None begins.
    Paused,
}

/// Operations of one kind that have ended, and how long they took together.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tally {
    /// How many.
    pub ops: u64,
    /// Nanoseconds, from when the members were first asked.
    pub nanos: u64,
}

/// What guests felt since it was last asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct GuestLoad {
    /// By kind: reads and writes, each of up to [`SMALL_BLOCKS_MAX`] blocks and longer.
    pub kinds: [Tally; 4],
    /// Whether copies were on their way, or wanted, at some moment.
    pub copying: bool,
    /// Whether a copy is on its way now.
    pub in_flight: bool,
}

/// Blocks of an operation that is small.
pub const SMALL_BLOCKS_MAX: u32 = 8;
/// For so long the pace may be saved up while nothing is copied.
const SAVED_MAX: Duration = Duration::from_millis(20);

impl GuestLoad {
    /// Adds what other guests felt.
    pub fn add(&mut self, other: &GuestLoad) {
        for (sum, tally) in self.kinds.iter_mut().zip(other.kinds) {
            sum.ops += tally.ops;
            sum.nanos += tally.nanos;
        }
        self.copying |= other.copying;
        self.in_flight |= other.in_flight;
    }

    /// Operations of all kinds.
    pub fn ops(&self) -> u64 {
        self.kinds.iter().map(|tally| tally.ops).sum()
    }

    fn note(&mut self, is_read: bool, blocks: u32, took: Duration) {
        let kind = usize::from(is_read) * 2 + usize::from(blocks > SMALL_BLOCKS_MAX);
        self.kinds[kind].ops += 1;
        self.kinds[kind].nanos += u64::try_from(took.as_nanos()).unwrap_or(u64::MAX >> 16);
    }
}

/// A bucket that fills at the pace: a copy may begin while it is not in debt.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Bucket {
    pace: Pace,
    /// Nanoblocks that may be copied; what began last may have gone beyond.
    credit: i128,
    at: Time,
}

const NANO: i128 = 1_000_000_000;

impl Bucket {
    fn set(&mut self, now: Time, pace: Pace) {
        self.fill(now);
        self.pace = pace;
    }

    fn fill(&mut self, now: Time) {
        let past = now.saturating_since(self.at);
        self.at = now;
        let Pace::Blocks(rate) = self.pace else {
            self.credit = 0;
            return;
        };
        let rate = i128::from(rate.max(1));
        let span = |span: Duration| i128::try_from(span.as_nanos()).unwrap_or(i128::MAX >> 64);
        self.credit = (self.credit + span(past) * rate).min(span(SAVED_MAX) * rate);
    }

    /// Whether something may be copied now; if not, from when on (`Time::MAX` while paused).
    fn may_copy(&mut self, now: Time) -> Result<(), Time> {
        self.fill(now);
        match self.pace {
            Pace::Free => Ok(()),
            Pace::Paused => Err(Time::MAX),
            Pace::Blocks(_) if self.credit >= 0 => Ok(()),
            Pace::Blocks(rate) => {
                let wait = self.credit.unsigned_abs().div_ceil(u128::from(rate.max(1)));
                let wait = u64::try_from(wait).unwrap_or(u64::MAX);
                Err(now + Duration::from_nanos(wait.max(1)))
            }
        }
    }

    fn copied(&mut self, blocks: u32) {
        if let Pace::Blocks(_) = self.pace {
            self.credit -= i128::from(blocks) * NANO;
        }
    }
}

impl Coordinator {
    /// What guests felt since the last call; the count begins anew.
    pub fn take_guest_load(&mut self) -> GuestLoad {
        let is_served = |group: &&super::Group| group.phase == GroupPhase::Serving;
        let served = self.groups.iter().filter(is_served);
        let in_flight = served
            .flat_map(|group| &group.replicas)
            .any(|replica| !replica.jobs.is_empty());
        let mut load = std::mem::take(&mut self.load);
        load.in_flight = in_flight;
        load.copying |= in_flight;
        self.told_copying &= load.copying;
        load
    }

    /// Copies may be so fast from now on.
    pub(super) fn set_pace(&mut self, pace: Pace) {
        self.bucket.set(self.now, pace);
        self.pace_changed();
    }

    /// Whether a copy to a member of a group may begin. If not, it is looked at again when one may.
    pub(super) fn may_copy(&mut self, g: usize) -> bool {
        if self.groups[g].phase != GroupPhase::Serving {
            return true;
        }
        self.load.copying = true;
        if !std::mem::replace(&mut self.told_copying, true) {
            self.actions.push_back(Action::Copying);
        }
        match self.bucket.may_copy(self.now) {
            Ok(()) => true,
            Err(at) => {
                self.paced.insert(g);
                if at < Time::MAX && self.pace_timer.is_none_or(|armed| armed > at) {
                    self.disarm_pace();
                    self.pace_timer = Some(at);
                    self.timers.insert((at, Timer::Pace));
                }
                false
            }
        }
    }

    /// A copy of so many blocks has begun.
    pub(super) fn note_copy(&mut self, g: usize, blocks: u32) {
        if self.groups[g].phase == GroupPhase::Serving {
            self.bucket.copied(blocks);
        }
    }

    /// Copies that waited may begin.
    pub(super) fn pace_changed(&mut self) {
        self.disarm_pace();
        self.touched.append(&mut self.paced);
    }

    fn disarm_pace(&mut self) {
        if let Some(at) = self.pace_timer.take() {
            self.timers.remove(&(at, Timer::Pace));
        }
    }

    /// An operation has ended well that members were first asked for at `since`.
    pub(super) fn note_guest(&mut self, is_read: bool, blocks: u32, since: Time) {
        self.load.note(is_read, blocks, self.now.saturating_since(since));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Time {
        Time::from_nanos(ms * 1_000_000)
    }

    #[test]
    fn over_any_time_no_more_is_copied_than_the_pace_allows() {
        let mut bucket = Bucket::default();
        bucket.set(at(0), Pace::Blocks(6400));
        let (mut now, mut copied) = (at(0), 0u64);
        while now < at(10_000) {
            match bucket.may_copy(now) {
                Ok(()) => {
                    bucket.copied(64);
                    copied += 64;
                }
                Err(next) => {
                    assert!(next > now, "time goes on");
                    now = next;
                }
            }
        }
        assert!((63_900..=64_300).contains(&copied), "{copied} blocks in 10 s");
    }

    #[test]
    fn what_was_saved_up_in_a_long_rest_is_a_short_burst() {
        let mut bucket = Bucket::default();
        bucket.set(at(0), Pace::Blocks(6400));
        let now = at(1_000_000);
        let mut burst = 0;
        while bucket.may_copy(now).is_ok() {
            bucket.copied(64);
            burst += 64;
        }
        assert!(burst <= 256, "{burst} blocks at once");
    }

    #[test]
    fn a_pause_ends_with_the_next_pace_and_leaves_no_debt() {
        let mut bucket = Bucket::default();
        bucket.set(at(0), Pace::Blocks(1));
        bucket.copied(100);
        assert!(bucket.may_copy(at(1)).is_err());
        bucket.set(at(2), Pace::Paused);
        assert_eq!(bucket.may_copy(at(3)), Err(Time::MAX));
        bucket.set(at(4), Pace::Free);
        assert_eq!(bucket.may_copy(at(4)), Ok(()));
    }
}
