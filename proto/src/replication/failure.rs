//! Requests that were not done, connections that are over, and the end of an attachment (rule 5).

use super::api::{Action, GroupPhase, Notice, OpError};
use super::group::{Refuses, Role};
use super::mask::Mask;
use super::read::ReadFailure;
use super::write::Waiter;
use super::{Coordinator, RequestId, Timer, What};
use crate::ids::{DeviceId, Generation};
use crate::message::{Failed, FailureKind};

impl Coordinator {
    /// A member refused a request.
    pub(super) fn request_failed(&mut self, m: usize, place: usize, what: What, failed: &Failed) {
        match failed.kind {
            #[cfg(feature = "canary")]
            FailureKind::Fenced if self.limits.ignore_fenced() => self.fail_alone(m, place, what),
            FailureKind::Fenced => {
                self.request_lost(m, place, what, ReadFailure::Later);
                self.become_fenced(failed.seen);
            }
            FailureKind::NoSpace => match what {
                What::Write { group, seq, .. } => self.write_refused(group, seq, place),
                _ => {
                    if let Some(g) = what.group() {
                        self.tell_full(g, place);
                    }
                    self.request_lost(m, place, what, ReadFailure::Later);
                }
            },
            FailureKind::Unreadable => {
                if let Some(g) = what.group() {
                    self.could_not(g, place, what);
                }
                self.request_lost(m, place, what, ReadFailure::Unreadable);
            }
            FailureKind::NotSealed | FailureKind::NoReplica => {
                // It has forgotten what it answered before: it is made a member again, and then compared.
                self.request_lost(m, place, what, ReadFailure::Lost);
                if !matches!(what, What::Seal { .. }) && self.members[m].sealed {
                    self.refused(m, failed.to_string());
                    self.forgot(m);
                    self.unjoin(m);
                }
                self.arm_member(m);
            }
            FailureKind::DeviceFailed => {
                self.request_lost(m, place, what, ReadFailure::Lost);
                if self.members[m].sealed {
                    self.refused(m, failed.to_string());
                    self.unjoin(m);
                }
                self.arm_member(m);
            }
            FailureKind::Starting | FailureKind::TooManyInFlight => {
                self.request_lost(m, place, what, ReadFailure::Later);
                self.arm_member(m);
            }
            FailureKind::PeerUnreachable | FailureKind::NotFetched if matches!(what, What::CopyFetch { .. }) => {
                if let What::CopyFetch { group, target, job } = what {
                    self.fetch_failed(group, target, job, failed);
                }
            }
            FailureKind::Unauthorized
            | FailureKind::PeerUnreachable
            | FailureKind::NotFetched
            | FailureKind::Invalid
            | FailureKind::ChecksumMismatch
            | FailureKind::WrongDevice
            | FailureKind::WrongCluster
            | FailureKind::VersionUnsupported => {
                self.refused(m, failed.to_string());
                self.request_lost(m, place, what, ReadFailure::Later);
                self.arm_member(m);
            }
        }
    }

    /// The planted bug: a refusal for a newer generation ends the write that met it, and nothing else.
    #[cfg(feature = "canary")]
    fn fail_alone(&mut self, m: usize, place: usize, what: What) {
        if let What::Write { group: g, seq, .. } = what {
            self.write_answered(g, place);
            let open = self.groups[g].writes.get(&seq).filter(|write| !write.acknowledged);
            if let Some(waiter) = open.map(|write| write.waiter) {
                self.groups[g].writes.remove(&seq);
                self.groups[g].open_writes -= 1;
                return self.end_write(g, waiter, Err(OpError::Fenced));
            }
            return;
        }
        self.request_lost(m, place, what, ReadFailure::Later);
    }

    /// A member can't say what it holds, can't give it, or can't take a copy: a part of its index is lost, or its device fails to
    /// read it. That may pass, so it is asked again; but nobody waits for it any longer than for one that is silent. While
    /// members are compared the others go on without it, and it is ejected; later it counts as in trouble.
    fn could_not(&mut self, g: usize, place: usize, what: What) {
        if matches!(what, What::Read { .. } | What::Write { .. } | What::UndoRead { .. }) {
            return;
        }
        let (now, patience) = (self.now, self.limits.reconcile_patience);
        let asked_again = self.limits.retry_pause * 2 + patience;
        let health = &mut self.groups[g].replicas[place].health;
        let since = match health.refuses {
            Some(refuses) if now.saturating_since(refuses.last) <= asked_again => refuses.since,
            _ => now,
        };
        health.refuses = Some(Refuses { since, last: now });
        self.arm_health();
        if now.saturating_since(since) >= patience {
            self.pass_over_refusing(g, place);
        }
    }

    /// Goes on comparing without a member that refuses to take part, if there are enough others and meta can be asked to eject it.
    fn pass_over_refusing(&mut self, g: usize, place: usize) {
        let fresh = self.is_meta_fresh();
        let group = &self.groups[g];
        let Some(reconcile) = group.reconcile.as_ref() else {
            return;
        };
        self.look_wanted |= !fresh;
        let rest = reconcile.participants().minus(Mask::one(place));
        let is_compared = rest != reconcile.participants();
        if is_compared && fresh && rest.len() >= self.compared_min(g) {
            let since = group.enough_since;
            self.pass_over(g, place);
            self.reconcile_lost(g);
            self.groups[g].enough_since = since;
        }
    }

    /// A request will not be answered any more, or was not done. Whatever waits for it goes another way or again.
    pub(super) fn request_lost(&mut self, m: usize, place: usize, what: What, failure: ReadFailure) {
        match what {
            What::Seal { .. } | What::Join { .. } => self.arm_member(m),
            What::Release { .. } => {}
            What::Confirm { member } => self.members[member].confirming = None,
            What::Write { group, seq, .. } => {
                self.write_lost(group, seq, place);
                if self.members[m].connected {
                    self.arm_retry(group);
                }
            }
            What::UndoRead { group, seq } => self.undo_read(group, seq, None),
            What::Read { group, read } => self.read_failed(group, read, place, failure),
            What::Reconcile { group, .. } => self.reconcile_lost(group),
            What::Compare { group, target, .. } => self.compare_lost(group, target),
            What::Survey { group, target, job }
            | What::CopyRead { group, target, job }
            | What::CopyFetch { group, target, job }
            | What::CopyWrite { group, target, job } => {
                self.copy_lost(group, target, job);
            }
        }
    }

    /// The connection to a device is over.
    pub(super) fn disconnected(&mut self, device: DeviceId) {
        let Some(m) = self.member_of.get(&device).copied() else {
            return;
        };
        self.members[m].connected = false;
        self.members[m].since = self.now;
        self.members[m].grant_until = self.members[m].grant_until.min(self.now);
        self.unjoin(m);
    }

    /// A device can't be used until it is sealed and joined again.
    pub(super) fn unjoin(&mut self, m: usize) {
        self.members[m].sealed = false;
        for i in 0..self.members[m].groups.len() {
            let (g, place) = self.members[m].groups[i];
            self.groups[g].replicas[place].joined = false;
            self.give_up_fetches_from(g, place);
        }
        self.forget_requests(m);
        self.members[m].confirming = None;
        for i in 0..self.members[m].groups.len() {
            let (g, place) = self.members[m].groups[i];
            self.member_left(g, place);
        }
    }

    /// No answer will come to what this device was asked.
    fn forget_requests(&mut self, m: usize) {
        let mut lost: Vec<(RequestId, usize)> = Vec::new();
        for (request, sent) in &self.sent {
            let mine = match sent.what {
                What::Seal { member } | What::Confirm { member } | What::Release { member } => member == m,
                _ => true,
            };
            if let Some(place) = self
                .place_of(sent.what, m)
                .filter(|place| mine && sent.to.contains(*place))
            {
                lost.push((*request, place));
            }
        }
        lost.sort_unstable();
        for (request, place) in lost {
            // What is lost first may have ended what would be lost next.
            let Some(sent) = self.sent.get_mut(&request) else {
                continue;
            };
            let what = sent.what;
            sent.to.remove(place);
            if sent.to.is_empty() {
                self.sent.remove(&request);
            }
            self.request_lost(m, place, what, ReadFailure::Lost);
        }
    }

    /// A member of a group can't be spoken to any more.
    fn member_left(&mut self, g: usize, place: usize) {
        if self.fenced.is_some() {
            return;
        }
        let group = &self.groups[g];
        if group.replicas[place].role == Role::Out {
            return;
        }
        match group.phase {
            GroupPhase::Serving => {
                self.tell_behind(g, place);
                self.reconsider(g);
                self.send_open_writes(g);
                self.ask_idle_reads(g);
                self.touch_catch_up(g);
                self.arm_health();
            }
            GroupPhase::Reconciling => {
                let compared = group.reconcile.as_ref().map(super::reconcile::Reconcile::participants);
                if compared.is_some_and(|compared| compared.contains(place)) {
                    self.reconcile_lost(g);
                }
            }
            GroupPhase::Sealing | GroupPhase::Waiting | GroupPhase::Fenced => {}
        }
        self.update_phase(g);
    }

    /// What a member refused is tried again after a while.
    pub(super) fn arm_member(&mut self, m: usize) {
        let member = &mut self.members[m];
        if member.connected && member.retry_at.is_none() {
            let at = self.now + self.limits.retry_pause;
            member.retry_at = Some(at);
            self.timers.insert((at, Timer::Member(m)));
        }
    }

    /// A newer attachment exists: this one is over, as a whole and for good (rule 5).
    pub(super) fn become_fenced(&mut self, seen: Generation) {
        if self.fenced.is_some() || self.limits.ignore_fenced() {
            return;
        }
        self.fenced = Some(seen);
        self.actions.push_back(Action::Notice(Notice::Fenced { seen }));
        self.sent.clear();
        self.timers.clear();
        for g in 0..self.groups.len() {
            let group = &mut self.groups[g];
            group.phase = GroupPhase::Fenced;
            group.reconcile = None;
            group.held_reads.clear();
            let reads = std::mem::take(&mut group.reads);
            let writes = std::mem::take(&mut group.writes);
            let queued = std::mem::take(&mut group.queued);
            group.open_writes = 0;
            group.change = None;
            for replica in &mut group.replicas {
                replica.jobs.clear();
                replica.compare = None;
                (replica.lag_ops, replica.lag_bytes, replica.unanswered) = (0, 0, 0);
            }
            let reads = reads.into_values().map(|read| read.op);
            let writes = writes.into_values().filter(|write| !write.acknowledged);
            let writes = writes.filter_map(|write| match write.waiter {
                Waiter::Op(op) => Some(op),
                Waiter::Undo(_) => None,
            });
            let ops: Vec<_> = reads
                .chain(writes)
                .chain(queued.into_iter().map(|(op, _)| op))
                .collect();
            for op in ops {
                self.done(op, Err(OpError::Fenced));
            }
        }
        for member in &mut self.members {
            member.grant_until = crate::time::Time::ZERO;
            member.retry_at = None;
        }
    }
}
