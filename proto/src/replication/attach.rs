//! Seal and join (rules 3, 4, 6), the phases of a group, and the release.

use super::api::{Action, GroupPhase, Notice};
use super::group::{Role, Step};
use super::mask::Mask;
use super::{Coordinator, ReleaseState, Timer, What};
use crate::frame::Class;
use crate::ids::{CommitSeq, DeviceId};
use crate::message::{Join, Message, Release, ReplicaRole, Seal};
use crate::time::Time;

impl Coordinator {
    /// A connection to a device stands.
    pub(super) fn connected(&mut self, device: DeviceId, commit: CommitSeq, recovered: CommitSeq) {
        let Some(m) = self.member_of.get(&device).copied() else {
            return;
        };
        assert!(!self.members[m].connected, "{device} is connected twice");
        self.members[m].connected = true;
        self.members[m].since = self.now;
        self.members[m].refused = false;
        self.members[m].can_fetch = false;
        if self.fenced.is_some() || self.release != ReleaseState::No {
            return;
        }
        if let Some(expected) = self.members[m].hello(commit, recovered) {
            let found = commit.min(recovered);
            self.actions.push_back(Action::Notice(Notice::Forgot {
                device,
                expected,
                found,
            }));
            self.forgot(m);
        }
        self.seal(m);
    }

    fn seal(&mut self, m: usize) {
        let capability = self.grant.capability;
        self.send_to_member(m, Message::Seal(Seal { capability }), What::Seal { member: m });
    }

    /// Our generation is durable on a device. Only now it may be asked to be a member of groups.
    pub(super) fn sealed(&mut self, m: usize) {
        if self.fenced.is_some() {
            return;
        }
        self.members[m].sealed = true;
        for i in 0..self.members[m].groups.len() {
            let (g, place) = self.members[m].groups[i];
            self.join(g, place);
            self.update_phase(g);
        }
        self.arm_health();
    }

    /// Asks a member to have a replica of the group, if its device is ours by now.
    pub(super) fn join(&mut self, g: usize, place: usize) {
        let group = &self.groups[g];
        let replica = &group.replicas[place];
        let role = match replica.role {
            Role::InSync => ReplicaRole::InSync,
            Role::Joining => ReplicaRole::Joining,
            Role::Out => return,
        };
        if replica.joined || !self.members[replica.member].sealed || self.is_asked(g, place) {
            return;
        }
        let join = Message::Join(Join {
            holder: self.holder,
            group: group.index,
            role,
            epoch: group.config.epoch,
        });
        self.send(g, Mask::one(place), Class::Guest, join, What::Join { group: g });
    }

    /// Whether a member was asked to join and has not answered.
    fn is_asked(&self, g: usize, place: usize) -> bool {
        let mut joins = self.sent.values().filter(|sent| sent.what == What::Join { group: g });
        joins.any(|sent| sent.to.contains(place))
    }

    /// A device is a member of a group.
    pub(super) fn joined(&mut self, g: usize, place: usize, created: bool) {
        let group = &mut self.groups[g];
        let replica = &mut group.replicas[place];
        if group.phase == GroupPhase::Fenced || replica.role == Role::Out {
            return;
        }
        (replica.joined, replica.behind, replica.passed_over) = (true, false, false);
        if group.phase == GroupPhase::Serving {
            if created {
                group.replicas[place].distrust();
                self.tell_behind(g, place);
            }
            self.send_open_writes(g);
            self.ask_idle_reads(g);
        }
        self.touch_catch_up(g);
        self.take_late(g, place);
        self.update_phase(g);
    }

    /// A member can be compared now. Where the others are equal, and were about to go on without it, nobody needs to be
    /// ejected any more: all are compared anew.
    pub(super) fn take_late(&mut self, g: usize, place: usize) {
        if self.comes_late(g, place) {
            let group = &mut self.groups[g];
            group.restarts += 1;
            (group.change, group.reconcile) = (None, None);
            group.phase = GroupPhase::Waiting;
        }
    }

    /// Whether a member completes `I` while the others, equal already, wait for an ejection that was not proposed yet.
    fn comes_late(&self, g: usize, place: usize) -> bool {
        let group = &self.groups[g];
        let unasked = group.change.is_none_or(|change| change.step == Step::Wanted);
        let patient = group.restarts < self.limits.reconcile_restarts_max || !self.is_meta_fresh();
        group.phase == GroupPhase::Reconciling
            && self.reconciled_in_sync(g).is_some()
            && unasked
            && patient
            && group.in_sync.contains(place)
            && group.in_sync.minus(group.present()).is_empty()
    }

    /// What a member refused is tried again.
    pub(super) fn retry_member(&mut self, m: usize) {
        self.members[m].retry_at = None;
        if !self.members[m].connected || self.release != ReleaseState::No {
            return;
        }
        if !self.members[m].sealed {
            let asked = self.sent.values().any(|sent| sent.what == What::Seal { member: m });
            if !asked {
                self.seal(m);
            }
            return;
        }
        for i in 0..self.members[m].groups.len() {
            let (g, place) = self.members[m].groups[i];
            self.join(g, place);
        }
    }

    /// A device holds less than it had acknowledged: nothing it has is relied on until it was compared, and what it said
    /// about writes that are still open counts no more.
    pub(super) fn forgot(&mut self, m: usize) {
        for i in 0..self.members[m].groups.len() {
            let (g, place) = self.members[m].groups[i];
            let group = &mut self.groups[g];
            let replica = &mut group.replicas[place];
            if group.phase != GroupPhase::Serving || replica.role == Role::Out {
                continue;
            }
            replica.distrust();
            replica.jobs.clear();
            for write in group.writes.values_mut().filter(|write| !write.acknowledged) {
                if write.durable.remove(place) {
                    write.owed.insert(place);
                    write.doubtful.insert(place);
                }
            }
            self.tell_behind(g, place);
        }
    }

    /// Brings the phase of a group up to date with its members.
    pub(super) fn update_phase(&mut self, g: usize) {
        let group = &self.groups[g];
        if matches!(group.phase, GroupPhase::Sealing | GroupPhase::Waiting) {
            let sealed = |place: &usize| self.members[group.replicas[*place].member].sealed;
            let sealed = group.in_sync.iter().filter(sealed).count();
            let complete = sealed >= self.settings.seal_quorum(group.in_sync.len());
            self.groups[g].phase = if complete {
                GroupPhase::Waiting
            } else {
                GroupPhase::Sealing
            };
            if complete {
                self.go_on_without(g);
            }
        }
        self.tell_phase(g);
    }

    /// The attachment of a group is complete (rule 6): its members are compared when all of them are there, or when those
    /// that are have waited long enough for the others.
    fn go_on_without(&mut self, g: usize) {
        let group = &mut self.groups[g];
        if group.change.is_some_and(|change| change.step == Step::Wanted) {
            group.change = None;
        }
        if group.change.is_some() {
            // What the configuration is must be known first.
            return;
        }
        let enough = match self.has_stand_in(g) {
            true => self.settings.seal_quorum(self.groups[g].in_sync.len()),
            false => self.compared_min(g),
        };
        let group = &mut self.groups[g];
        if group.present().len() < enough {
            // Nobody can be passed over now.
            group
                .replicas
                .iter_mut()
                .for_each(|replica| replica.passed_over = false);
        }
        let present = group.present();
        if present.len() < enough {
            group.enough_since = None;
            return;
        }
        let since = *group.enough_since.get_or_insert(self.now);
        let missing = group.in_sync.minus(group.joined());
        let until = missing.iter().map(|place| self.patience(g, place, since)).max();
        if let Some(until) = until.filter(|until| *until > self.now) {
            self.timers.insert((until, Timer::Patience(g)));
            return;
        }
        if self.limits.skip_reconcile() && missing.is_empty() {
            self.serve(g);
        } else {
            self.start_reconcile(g, present);
        }
    }

    /// Members are waited for no longer: those that are missing at attach, or that hold up the comparison.
    pub(super) fn patience_over(&mut self, g: usize) {
        self.pass_over_stalled(g);
        self.update_phase(g);
    }

    /// Until when a member that is missing at attach is waited for, when enough others are there since `since`.
    fn patience(&self, g: usize, place: usize, since: Time) -> Time {
        let limits = &self.limits;
        let member = &self.members[self.groups[g].replicas[place].member];
        if member.connected {
            return since.max(member.since) + limits.seal_patience;
        }
        if member.refused {
            return since + limits.refused_patience;
        }
        let took = since.saturating_since(self.began.unwrap_or(since));
        since + (took * 4).clamp(limits.silent_patience_min, limits.silent_patience_max)
    }

    /// An attempt to connect to a device failed at once: nobody is there.
    pub(super) fn unreachable(&mut self, device: DeviceId) {
        let Some(m) = self.member_of.get(&device).copied() else {
            return;
        };
        if self.members[m].connected || std::mem::replace(&mut self.members[m].refused, true) {
            return;
        }
        for i in 0..self.members[m].groups.len() {
            let (g, _) = self.members[m].groups[i];
            self.update_phase(g);
        }
    }

    /// Every member is known to be equal to the base: from now on I/O is served (rule 11).
    pub(super) fn serve(&mut self, g: usize) {
        let skip = self.limits.skip_reconcile();
        let group = &mut self.groups[g];
        assert!(self.fenced.is_none(), "a fenced attachment serves nothing");
        for place in group.in_sync.iter() {
            let replica = &group.replicas[place];
            let equal = replica.joined && replica.is_complete() && self.members[replica.member].sealed;
            assert!(equal || skip, "a group is served before all its members are equal");
        }
        assert!(
            group.change.is_none(),
            "a group is served before its configuration is known"
        );
        (group.restarts, group.enough_since) = (0, None);
        group.phase = GroupPhase::Serving;
        group.draining = false;
        group.advance_stable(self.holder.generation);
        self.tell_phase(g);
        let queued = std::mem::take(&mut self.groups[g].queued);
        for (op, operation) in queued {
            self.start(g, op, operation);
        }
        self.touch_catch_up(g);
        self.arm_health();
    }

    /// Tells the log, when the phase or who is waited for has changed.
    pub(super) fn tell_phase(&mut self, g: usize) {
        let group = &mut self.groups[g];
        let missing = match group.phase {
            GroupPhase::Sealing | GroupPhase::Waiting => group.in_sync.minus(group.joined()),
            GroupPhase::Reconciling | GroupPhase::Serving | GroupPhase::Fenced => Mask::NONE,
        };
        if group.told.replace((group.phase, missing)) == Some((group.phase, missing)) {
            return;
        }
        let members = &self.members;
        let waits_for = missing.iter().map(|place| members[group.replicas[place].member].device);
        let notice = Notice::Phase {
            group: group.index,
            phase: group.phase,
            waits_for: waits_for.collect(),
        };
        self.actions.push_back(Action::Notice(notice));
    }

    /// The volume is to be left in order.
    pub(super) fn start_release(&mut self) {
        if self.release == ReleaseState::No {
            self.release = ReleaseState::Draining;
        }
    }

    /// Releases the members once every operation has ended, and says so when they have answered.
    pub(super) fn check_release(&mut self) {
        if self.release == ReleaseState::Draining {
            let busy =
                |group: &super::Group| !group.queued.is_empty() || !group.reads.is_empty() || group.open_writes > 0;
            if self.groups.iter().any(busy) {
                return;
            }
            self.release = ReleaseState::Asked;
            for m in 0..self.members.len() {
                // From here on no grant is used: nothing can be submitted any more.
                self.members[m].grant_until = crate::time::Time::ZERO;
                if self.members[m].sealed && self.fenced.is_none() {
                    let holder = self.holder;
                    self.send_to_member(m, Message::Release(Release { holder }), What::Release { member: m });
                }
            }
        }
        if self.release == ReleaseState::Asked {
            let asked = self.sent.values().any(|sent| matches!(sent.what, What::Release { .. }));
            if !asked {
                self.release = ReleaseState::Done;
                self.timers.clear();
                self.actions.push_back(Action::Released);
            }
        }
    }
}
