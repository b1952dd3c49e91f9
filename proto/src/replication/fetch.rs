//! Copies that go from node to node: the member that lacks blocks is told to read them from one that has them. DESIGN.md,
//! "Fetches", says what each check is for.
//!
//! It is the short way and no more: whatever goes wrong on it, the blocks are copied through here, and what is wrong is
//! seen here then. Nothing is concluded from what one member says of another.

use super::api::{Action, GroupPhase, Notice};
use super::limits::CUT_PAIRS_MAX;
use super::mask::Mask;
use super::{Coordinator, What};
use crate::frame::Class;
use crate::ids::DeviceId;
use crate::limits::ADDRESS_BYTES_MAX;
use crate::message::{Failed, FailureKind, Fetch, Message};
use crate::time::Time;

impl Coordinator {
    /// Where others reach a device, and whether it can read from others.
    pub(super) fn located(&mut self, device: DeviceId, address: String, can_fetch: bool) {
        if let Some(m) = self.member_of.get(&device).copied() {
            let is_sound = (1..=ADDRESS_BYTES_MAX).contains(&address.len());
            self.members[m].address = Some(address).filter(|_| is_sound);
            self.members[m].can_fetch = can_fetch;
        }
    }

    /// Asks a member to read from another one what it lacks. False if it can't, or may not.
    pub(super) fn start_fetch(&mut self, g: usize, target: usize, job: u64) -> bool {
        let group = &self.groups[g];
        let state = &group.replicas[target].jobs[&job];
        let (from, to) = (group.replicas[state.source].member, group.replicas[target].member);
        let (source, member) = (&self.members[from], &self.members[to]);
        // Before a group is served nobody may be waited for, and who holds what up must be seen at once.
        if group.phase != GroupPhase::Serving || !member.can_fetch || from == to {
            return false;
        }
        if self.cut_pairs.get(&(from, to)).is_some_and(|until| self.now < *until) {
            return false;
        }
        let (Some(address), Some(recovered)) = (&source.address, source.recovered) else {
            return false;
        };
        let fetch = Message::Fetch(Fetch {
            holder: self.holder,
            group: group.index,
            layer: state.layer,
            range: state.range,
            why: self.copy_source(g, target),
            from: source.device,
            recovered,
            commit: source.commit,
            capability: self.grant.capability,
            address: address.clone(),
        });
        let state = self.groups[g].replicas[target].jobs.get_mut(&job);
        state.expect("it was just there").is_fetch = true;
        let what = What::CopyFetch { group: g, target, job };
        self.send(g, Mask::one(target), Class::Repair, fetch, what);
        true
    }

    /// What a member was to read from another one is durable on it.
    pub(super) fn fetch_done(&mut self, g: usize, target: usize, job: u64) {
        let given_up = self.groups[g].replicas[target]
            .jobs
            .get(&job)
            .is_some_and(|job| job.given_up);
        if given_up {
            // Nobody knows whom it has read from.
            self.copy_lost(g, target, job);
        } else {
            self.copy_done(g, target, job);
        }
    }

    /// A member could not read from another one: the blocks are copied through here.
    pub(super) fn fetch_failed(&mut self, g: usize, target: usize, job: u64, failed: &Failed) {
        let group = &self.groups[g];
        let Some(state) = group.replicas[target].jobs.get(&job) else {
            return;
        };
        let (layer, range, given_up) = (state.layer, state.range, state.given_up);
        let pair = (group.replicas[state.source].member, group.replicas[target].member);
        if failed.kind == FailureKind::PeerUnreachable && !given_up {
            self.note_cut(pair, failed);
        }
        let source = self.fastest_source(g, target, layer, range);
        let Some(source) = source.filter(|_| !given_up && self.groups[g].replicas[target].joined) else {
            return self.copy_lost(g, target, job);
        };
        let state = self.groups[g].replicas[target].jobs.get_mut(&job);
        let state = state.expect("it was just there");
        (state.source, state.is_fetch) = (source, false);
        self.read_for_copy(g, target, job);
    }

    /// For a while nothing is fetched by this one from that one. A bounded number of pairs: of more, the one that would be
    /// tried again first is.
    fn note_cut(&mut self, pair: (usize, usize), failed: &Failed) {
        let until = self.now + self.limits.fetch_pause;
        let known = self.cut_pairs.insert(pair, until);
        let now = self.now;
        if self.cut_pairs.len() > CUT_PAIRS_MAX {
            let first = self.cut_pairs.iter().min_by_key(|(pair, until)| (**until, **pair));
            let first = *first.expect("there are many").0;
            self.cut_pairs.remove(&first);
        }
        if known.is_none_or(|until: Time| until + self.limits.fetch_pause < now) {
            self.actions.push_back(Action::Notice(Notice::NotFetched {
                device: self.members[pair.1].device,
                from: self.members[pair.0].device,
                words: failed.words.clone(),
            }));
        }
    }

    /// A member can't be relied on as it was: what others read from it counts no more. Their answers are waited for all
    /// the same, because until then it may still be written.
    pub(super) fn give_up_fetches_from(&mut self, g: usize, place: usize) {
        for replica in &mut self.groups[g].replicas {
            for job in replica
                .jobs
                .values_mut()
                .filter(|job| job.is_fetch && job.source == place)
            {
                job.given_up = true;
            }
        }
    }
}
