//! Who vouches for a read (rules 8 and 17): members whose read grant is valid, or that have answered, after the read
//! began, as who is exactly at our generation.

use super::api::RequestId;
use super::{Coordinator, What};
use crate::message::{Confirm, Message};

impl Coordinator {
    /// Whether enough members vouch for a read that began with this request number.
    pub(super) fn is_vouched(&self, g: usize, began: RequestId) -> bool {
        let group = &self.groups[g];
        let vouching = group
            .replicas
            .iter()
            .filter(|r| self.members[r.member].vouches(self.now, began));
        vouching.count() >= group.config.confirm_quorum(&self.settings)
    }

    /// Asks who does not vouch for such a read and can be asked. `spare` will answer something else anyway.
    pub(super) fn ask_to_vouch(&mut self, g: usize, began: RequestId, spare: Option<usize>) {
        for place in 0..self.groups[g].replicas.len() {
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
    fn confirm(&mut self, m: usize) {
        let message = Message::Confirm(Confirm { holder: self.holder });
        let request = self.send_to_member(m, message, What::Confirm { member: m });
        self.members[m].confirming = Some(request);
    }

    /// Before a read is sent: asks for what it will need at its end, so that it does not wait for it then.
    pub(super) fn prepare_to_vouch(&mut self, g: usize, began: RequestId, asked: usize) {
        let group = &self.groups[g];
        let vouching = group
            .replicas
            .iter()
            .enumerate()
            .filter(|(place, replica)| *place == asked || self.members[replica.member].has_grant(self.now));
        if vouching.count() < group.config.confirm_quorum(&self.settings) {
            self.ask_to_vouch(g, began, Some(asked));
        }
    }

    /// After a read: renews grants that are about to run out, while there is reading.
    pub(super) fn renew_grants(&mut self, g: usize) {
        let soon = self.now + self.limits.grant_trusted / 4;
        let needed = self.groups[g].config.confirm_quorum(&self.settings);
        let lasting = self.groups[g]
            .replicas
            .iter()
            .filter(|r| self.members[r.member].has_grant(soon));
        if lasting.count() >= needed {
            return;
        }
        for place in 0..self.groups[g].replicas.len() {
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
