//! Who vouches for a read (rules 8 and 17): members whose read grant is valid, or that have answered, after the read
//! began, as who is exactly at our generation.

use super::api::RequestId;
use super::member::Member;
use super::{Coordinator, What};
use crate::message::{Confirm, Message};

impl Coordinator {
    /// Whether enough members vouch for a read that began with this request number.
    pub(super) fn is_vouched(&self, g: usize, began: RequestId) -> bool {
        let vouches = |member: &Member, _: usize| member.vouches(self.now, began);
        self.limits.unvouched_read() || self.is_confirmed(g, vouches)
    }

    /// Whether the members of which something holds are enough to vouch for a read (rule 17).
    fn is_confirmed(&self, g: usize, holds: impl Fn(&Member, usize) -> bool) -> bool {
        let group = &self.groups[g];
        let member = |place: usize| &self.members[group.replicas[place].member];
        let vouching = group.vouchers().iter().filter(|place| holds(member(*place), *place));
        group.is_confirm_quorum(&self.settings, vouching.collect())
    }

    /// Asks who does not vouch for such a read and can be asked. `spare` will answer something else anyway.
    pub(super) fn ask_to_vouch(&mut self, g: usize, began: RequestId, spare: Option<usize>) {
        for place in self.groups[g].vouchers().iter() {
            let m = self.groups[g].replicas[place].member;
            let member = &self.members[m];
            if Some(place) == spare || !member.sealed || member.confirming.is_some() || member.vouches(self.now, began)
            {
                continue;
            }
            self.confirm(m);
        }
    }

    /// Asks one member whether it is still at our generation.
    pub(super) fn confirm(&mut self, m: usize) {
        let message = Message::Confirm(Confirm { holder: self.holder });
        let request = self.send_to_member(m, message, What::Confirm { member: m });
        self.members[m].confirming = Some(request);
    }

    /// Before a read is sent: asks for what it will need at its end, so that it does not wait for it then.
    pub(super) fn prepare_to_vouch(&mut self, g: usize, began: RequestId, asked: usize) {
        let vouches = |member: &Member, place: usize| place == asked || member.has_grant(self.now);
        if !self.is_confirmed(g, vouches) {
            self.ask_to_vouch(g, began, Some(asked));
        }
    }

    /// After a read: renews grants that are about to run out, while there is reading.
    pub(super) fn renew_grants(&mut self, g: usize) {
        let soon = self.now + self.limits.grant_trusted / 4;
        if self.is_confirmed(g, |member, _| member.has_grant(soon)) {
            return;
        }
        for place in self.groups[g].vouchers().iter() {
            let m = self.groups[g].replicas[place].member;
            let member = &self.members[m];
            if member.sealed && member.confirming.is_none() && !member.has_grant(soon) {
                self.confirm(m);
            }
        }
    }

    /// A member has answered as one who is at our generation: reads may have waited for that.
    pub(super) fn member_vouched(&mut self, m: usize) {
        for i in 0..self.members[m].groups.len() {
            let (g, _) = self.members[m].groups[i];
            if self.groups[g].held_reads.is_empty() {
                continue;
            }
            let held: Vec<u64> = self.groups[g].held_reads.iter().copied().collect();
            for read in held {
                self.finish_read(g, read);
            }
        }
    }
}
