//! Standing in: with fewer than `W` members of `I` there at attach nobody can be ejected (rule 20), and nothing is served (rule 11). If
//! enough are sealed for the attachment to be complete, they hold all that was acknowledged, so a device outside `I` can be made equal
//! to them and admitted. Then there are enough to go on without who is missing.
//!
//! 1. Those of `I` that are there are compared, as always. They are *level* when they are equal.
//! 2. A joiner is compared with them, and what it lacks goes to it as *repair* copies. These never take a block back, so whoever of `I`
//!    comes meanwhile is compared too, from the beginning, and may raise the base.
//! 3. What the joiner has beyond them, and nobody was told of, has to give way (rule 21). The resync copies that do that would undo
//!    what a late member might bring. So from then on the missing ones are *ignored*: whatever they say, until they are ejected.
//! 4. Equal, it is admitted (rules 19 and 22), all are compared anew, and the missing ones are ejected as ever.

use super::Coordinator;
use super::api::GroupPhase;
use super::group::Role;
use super::mask::Mask;

impl Coordinator {
    /// The members of `I` that were compared and are equal, if they are too few to eject the others. None while there are blocks that
    /// none of them can read: who is missing may have those.
    pub(super) fn level(&self, g: usize) -> Option<Mask> {
        let group = &self.groups[g];
        let reconcile = group.reconcile.as_ref().filter(|reconcile| reconcile.is_merged())?;
        let level = reconcile.participants();
        let few = group.phase == GroupPhase::Reconciling && level.len() < self.compared_min(g);
        let equal = level.iter().all(|place| group.replicas[place].is_complete());
        (few && equal && group.lost.is_empty()).then_some(level)
    }

    /// Whether there is a device that could stand in for a missing member.
    pub(super) fn has_stand_in(&self, g: usize) -> bool {
        let group = &self.groups[g];
        group.joining.iter().any(|place| self.is_at_hand(g, place))
            || (0..group.replicas.len()).any(|place| self.may_rejoin(g, place))
    }

    fn is_at_hand(&self, g: usize, place: usize) -> bool {
        let replica = &self.groups[g].replicas[place];
        replica.joined && !replica.behind && !self.is_refusing(g, place)
    }

    /// Whether a joiner holds all that those it was compared with hold.
    pub(super) fn is_equal_joiner(&self, g: usize, place: usize) -> bool {
        let replica = &self.groups[g].replicas[place];
        replica.role == Role::Joining && replica.is_complete() && self.is_at_hand(g, place)
    }

    /// The `I` and `J` by which a device comes to stand in.
    pub(super) fn wish_for_stand_in(&self, g: usize) -> Option<(Mask, Mask)> {
        self.level(g)?;
        let group = &self.groups[g];
        let (in_sync, joining) = (group.in_sync, group.joining);
        if let Some(place) = joining.iter().find(|place| self.is_equal_joiner(g, *place)) {
            let one = Mask::one(place);
            return Some((in_sync.or(one), joining.minus(one)));
        }
        if let Some(place) = joining.iter().find(|place| self.is_late(g, *place)) {
            return Some((in_sync, joining.minus(Mask::one(place))));
        }
        if joining.iter().any(|place| self.is_at_hand(g, place)) || self.is_full(g) {
            return None;
        }
        let place = (0..group.replicas.len()).find(|place| self.may_rejoin(g, *place))?;
        Some((in_sync, joining.or(Mask::one(place))))
    }

    /// From here on only resync copies can make a joiner equal: those that are missing have no say any more.
    pub(super) fn settle_for_stand_ins(&mut self, g: usize) {
        let Some(level) = self.level(g) else { return };
        if !self.is_meta_fresh() {
            // Nobody can be admitted: then who is missing must keep its say.
            self.look_wanted |= self.groups[g].replicas.iter().any(|replica| replica.higher);
            return;
        }
        for place in self.groups[g].joining.iter() {
            if !self.is_at_hand(g, place) {
                continue;
            }
            let group = &mut self.groups[g];
            let replica = &mut group.replicas[place];
            if replica.higher && !replica.stale && replica.lack.is_empty() && replica.jobs.is_empty() {
                replica.distrust();
                group.ignored = group.in_sync.minus(level);
                self.touch_catch_up(g);
            }
        }
    }
}
