//! Seal and join (rules 3, 4, 6), the phases of a group, and the release.

use super::api::{Action, GroupPhase, Notice};
use super::mask::Mask;
use super::{Coordinator, ReleaseState, What};
use crate::frame::Class;
use crate::ids::{CommitSeq, DeviceId};
use crate::message::{Join, Message, Release, ReplicaRole, Seal};

impl Coordinator {
    /// A connection to a device stands.
    pub(super) fn connected(&mut self, device: DeviceId, commit: CommitSeq, recovered: CommitSeq) {
        let Some(m) = self.member_of.get(&device).copied() else {
            return;
        };
        assert!(!self.members[m].connected, "{device} is connected twice");
        self.members[m].connected = true;
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
    }

    fn join(&mut self, g: usize, place: usize) {
        let group = &self.groups[g];
        let join = Message::Join(Join {
            holder: self.holder,
            group: group.index,
            role: ReplicaRole::InSync,
            epoch: group.config.epoch,
        });
        self.send(g, Mask::one(place), Class::Guest, join, What::Join { group: g });
    }

    /// A device is a member of a group.
    pub(super) fn joined(&mut self, g: usize, place: usize, created: bool) {
        let group = &mut self.groups[g];
        if group.phase == GroupPhase::Fenced {
            return;
        }
        let replica = &mut group.replicas[place];
        assert_eq!(replica.unanswered, 0, "a connection begins with nothing on its way");
        (replica.joined, replica.behind) = (true, false);
        if group.phase == GroupPhase::Serving {
            if created {
                group.replicas[place].stale = true;
                self.tell_behind(g, place);
            }
            self.send_open_writes(g);
            self.ask_idle_reads(g);
            self.touch_catch_up(g);
        }
        self.update_phase(g);
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
            if self.groups[g].replicas[place].joined {
                continue;
            }
            let mut joins = self.sent.values().filter(|sent| sent.what == What::Join { group: g });
            if !joins.any(|sent| sent.to.contains(place)) {
                self.join(g, place);
            }
        }
    }

    /// A device holds less than it had acknowledged: nothing it has is relied on until it was compared, and what it said
    /// about writes that are still open counts no more.
    pub(super) fn forgot(&mut self, m: usize) {
        for i in 0..self.members[m].groups.len() {
            let (g, place) = self.members[m].groups[i];
            let group = &mut self.groups[g];
            if group.phase != GroupPhase::Serving {
                continue;
            }
            let replica = &mut group.replicas[place];
            replica.stale = true;
            replica.compare = None;
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
        let phase = match group.phase {
            GroupPhase::Fenced | GroupPhase::Serving | GroupPhase::Reconciling => group.phase,
            GroupPhase::Sealing | GroupPhase::Waiting => {
                let sealed = group.replicas.iter().filter(|r| self.members[r.member].sealed).count();
                if sealed < group.config.seal_quorum(&self.settings) {
                    GroupPhase::Sealing
                } else {
                    GroupPhase::Waiting
                }
            }
        };
        self.groups[g].phase = phase;
        if phase == GroupPhase::Waiting && self.groups[g].joined() == self.groups[g].all() {
            if self.limits.skip_reconcile() {
                self.serve(g);
            } else {
                self.start_reconcile(g);
            }
        }
        self.tell_phase(g);
    }

    /// Every member is known to be equal to the base: from now on I/O is served (rule 11).
    pub(super) fn serve(&mut self, g: usize) {
        let skip = self.limits.skip_reconcile();
        let group = &mut self.groups[g];
        assert!(self.fenced.is_none(), "a fenced attachment serves nothing");
        for replica in &group.replicas {
            let equal = replica.joined && replica.is_complete() && self.members[replica.member].sealed;
            assert!(equal || skip, "a group is served before all its members are equal");
        }
        group.phase = GroupPhase::Serving;
        group.draining = false;
        group.advance_stable(self.holder.generation);
        self.tell_phase(g);
        let queued = std::mem::take(&mut self.groups[g].queued);
        for (op, operation) in queued {
            self.start(g, op, operation);
        }
    }

    /// Tells the log, when the phase or who is waited for has changed.
    pub(super) fn tell_phase(&mut self, g: usize) {
        let group = &mut self.groups[g];
        let missing = match group.phase {
            GroupPhase::Sealing | GroupPhase::Waiting => group.all().minus(group.joined()),
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
