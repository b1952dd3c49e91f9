//! How members are doing (rule 14): who is away, too slow or too far behind for long is proposed for ejection; who was
//! ejected and is well again joins anew. Spells of being well that are short don't count, and each ejection makes the next
//! return later, so that nobody flaps.

use super::api::GroupPhase;
use super::group::{Health, Role};
use super::mask::Mask;
use super::{Coordinator, ReleaseState, Timer};
use crate::time::Time;

impl Coordinator {
    /// There may be something to watch.
    pub(super) fn arm_health(&mut self) {
        if self.health_armed || self.fenced.is_some() || self.release != ReleaseState::No || !self.is_watching() {
            return;
        }
        self.health_armed = true;
        self.timers
            .insert((self.now + self.limits.health_interval, Timer::Health));
    }

    fn is_watching(&self) -> bool {
        self.groups.iter().any(|group| {
            let writers = group.writers();
            let few = writers.len() < usize::from(self.settings.replicas) && writers.len() < group.replicas.len();
            let lagging = |place: usize| {
                let replica = &group.replicas[place];
                let health = &replica.health;
                !replica.joined
                    || replica.behind
                    || replica.lag_ops > 0
                    || health.troubled_since.is_some()
                    || health.refuses.is_some()
            };
            few || group.config.moving.is_some() || !group.joining.is_empty() || writers.iter().any(lagging)
        })
    }

    /// Looks at all members.
    pub(super) fn health_tick(&mut self) {
        self.health_armed = false;
        for g in 0..self.groups.len() {
            for place in self.groups[g].writers().iter() {
                let troubled = self.is_troubled(g, place);
                let refuses = self.is_refusing(g, place);
                let (now, well_after) = (self.now, self.limits.well_after);
                let health = &mut self.groups[g].replicas[place].health;
                health.note(now, troubled, well_after);
                health.refuses.take_if(|_| !refuses);
            }
            self.reconsider(g);
            if self.groups[g].phase == GroupPhase::Waiting {
                // Somebody may be well enough by now to stand in.
                self.update_phase(g);
            }
        }
        self.arm_health();
    }

    fn is_troubled(&self, g: usize, place: usize) -> bool {
        let replica = &self.groups[g].replicas[place];
        !replica.joined || replica.behind || self.is_refusing(g, place) || self.is_slow(g, place)
    }

    /// Whether a member could not say what it holds, or not take a copy, when it was last asked.
    pub(super) fn is_refusing(&self, g: usize, place: usize) -> bool {
        let refuses = self.groups[g].replicas[place].health.refuses;
        refuses.is_some_and(|refuses| self.now.saturating_since(refuses.last) <= self.limits.retry_pause * 2)
    }

    /// Whether a member's writes take much longer than those of a quorum: a grey failure.
    fn is_slow(&self, g: usize, place: usize) -> bool {
        let group = &self.groups[g];
        let mut usual: Vec<u64> = group
            .in_sync
            .iter()
            .map(|place| self.members[group.replicas[place].member].write_latency)
            .filter(|latency| latency.is_known())
            .map(|latency| latency.expected_ns())
            .collect();
        usual.sort_unstable();
        let quorum = self.settings.write_quorum(group.in_sync.len());
        let Some(usual) = quorum.checked_sub(1).and_then(|i| usual.get(i)) else {
            return false;
        };
        let least = u64::try_from(self.limits.slow_min.as_nanos()).unwrap_or(u64::MAX);
        let bound = least.max(usual.saturating_mul(u64::from(self.limits.slow_factor)));
        // Once slow it must be a good deal faster to be well again.
        let bound = match group.replicas[place].health.troubled_since {
            Some(_) => bound / 2,
            None => bound,
        };
        let member = &self.members[group.replicas[place].member];
        let lately = |at: Time| self.now.saturating_since(at) < self.limits.well_after * 2;
        let measured = match member.write_sampled {
            Some(at) if lately(at) => member.write_latency.expected_ns(),
            _ => 0,
        };
        let late = group.writes.values().filter(|write| write.pending.contains(place));
        let late = late.map(|write| self.now.saturating_since(write.began)).max();
        let late = late.map_or(0, |late| u64::try_from(late.as_nanos()).unwrap_or(u64::MAX));
        measured.max(late) > bound
    }

    /// The `I` and `J` that would be better for a group that is served, one step at a time: first who is in trouble
    /// leaves, then who is equal is admitted, then who is well again joins.
    pub(super) fn wish_while_serving(&self, g: usize) -> Option<(Mask, Mask)> {
        let group = &self.groups[g];
        let (in_sync, joining) = (group.in_sync, group.joining);
        if let Some(left) = self.without_troubled(g) {
            return Some((left, joining));
        }
        if let Some(place) = joining.iter().find(|place| self.is_late(g, *place)) {
            return Some((in_sync, joining.minus(Mask::one(place))));
        }
        let equal = |place: &usize| {
            let replica = &group.replicas[*place];
            replica.joined && replica.is_complete() && !replica.behind && !self.is_troubled(g, *place)
        };
        if let Some(place) = joining.iter().find(equal) {
            let one = Mask::one(place);
            return Some((in_sync.or(one).minus(self.gives_place_to(g, place)), joining.minus(one)));
        }
        // Beyond the copies that there should be only who takes the place of one of them.
        let full = self.is_full(g);
        let wanted = |place: &usize| !full || !self.gives_place_to(g, *place).is_empty();
        let place = (0..group.replicas.len()).find(|place| wanted(place) && self.may_rejoin(g, *place))?;
        Some((in_sync, joining.or(Mask::one(place))))
    }

    /// Whether a joiner has been in trouble for too long.
    pub(super) fn is_late(&self, g: usize, place: usize) -> bool {
        let health = &self.groups[g].replicas[place].health;
        health.is_troubled_for(self.now, self.limits.eject_after)
    }

    /// Whether there are as many copies as there should be, those in the making too.
    pub(super) fn is_full(&self, g: usize) -> bool {
        self.groups[g].writers().len() >= usize::from(self.settings.replicas)
    }

    /// The member of `I` that gives its place to this one, if meta wants that.
    fn gives_place_to(&self, g: usize, place: usize) -> Mask {
        let group = &self.groups[g];
        let device = |place: usize| self.members[group.replicas[place].member].device;
        let Some(moving) = group.config.moving.filter(|moving| moving.to == device(place)) else {
            return Mask::NONE;
        };
        group
            .in_sync
            .iter()
            .filter(|place| device(*place) == moving.from)
            .collect()
    }

    /// `I` without members that have been in trouble for too long, if it is large enough without them and can go on.
    fn without_troubled(&self, g: usize) -> Option<Mask> {
        let group = &self.groups[g];
        let mut troubled: Vec<(Time, usize)> = Vec::new();
        for place in group.in_sync.iter() {
            let replica = &group.replicas[place];
            let inexact = replica.lack.exact_chunks() >= self.limits.lack_chunks_exact_max;
            let patience = if inexact {
                self.limits.eject_inexact_after
            } else {
                self.limits.eject_after
            };
            if replica.health.is_troubled_for(self.now, patience) {
                troubled.push((replica.health.troubled_since.unwrap_or_default(), place));
            }
        }
        troubled.sort_unstable();
        let mut left = group.in_sync;
        for (_, place) in troubled {
            if left.len() > self.settings.in_sync_min() {
                left.remove(place);
            }
        }
        let there = group.joined().and(left);
        (left != group.in_sync && there.len() >= self.settings.write_quorum(left.len())).then_some(left)
    }

    pub(super) fn may_rejoin(&self, g: usize, place: usize) -> bool {
        let group = &self.groups[g];
        let replica = &group.replicas[place];
        let member = &self.members[replica.member];
        if replica.role != Role::Out || group.writers().contains(place) || !member.sealed {
            return false;
        }
        if !group.config.stale.contains(&member.device) {
            // Another device has taken its place.
            return false;
        }
        let well = self.now.saturating_since(member.since) >= self.limits.well_after;
        let joining = member.groups.iter();
        let joining = joining.filter(|(g, place)| self.groups[*g].joining.contains(*place));
        well && self.now >= replica.health.rejoin_at && joining.count() < self.limits.joining_groups_max
    }
}

impl Health {
    /// Takes in how the member is now.
    fn note(&mut self, now: Time, troubled: bool, well_after: std::time::Duration) {
        if troubled {
            self.troubled_since.get_or_insert(now);
            self.well_since = None;
            return;
        }
        let since = *self.well_since.get_or_insert(now);
        if now.saturating_since(since) >= well_after {
            self.troubled_since = None;
        }
    }

    /// Whether it is in trouble now, and has been for so long.
    fn is_troubled_for(&self, now: Time, span: std::time::Duration) -> bool {
        let long = |since: Time| now.saturating_since(since) >= span;
        self.well_since.is_none() && self.troubled_since.is_some_and(long)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_member_that_flaps_is_in_trouble_all_the_time() {
        let at = |ms: u64| Time::from_nanos(ms * 1_000_000);
        let (well_after, patience) = (Duration::from_secs(1), Duration::from_secs(10));
        let mut health = Health::default();
        for ms in (0..=10_000).step_by(250) {
            health.note(at(ms), ms % 1000 != 250, well_after);
        }
        assert!(health.is_troubled_for(at(10_000), patience));
        health.note(at(10_250), false, well_after);
        assert!(!health.is_troubled_for(at(10_250), patience), "not while it is well");
        health.note(at(11_250), false, well_after);
        assert_eq!(health.troubled_since, None);
    }
}
