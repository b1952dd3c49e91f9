//! What a coordinator tells of itself, and what must hold after each event.

use super::Coordinator;
use super::api::{GroupPhase, GroupStatus, MemberRole, MemberStatus};
use super::group::{Group, Role};
use crate::time::Time;

impl Coordinator {
    /// Each group as metrics and logs see it.
    pub fn status(&self) -> Vec<GroupStatus> {
        self.groups.iter().map(|group| self.group_status(group)).collect()
    }

    fn group_status(&self, group: &Group) -> GroupStatus {
        let is_named = |place: &usize| {
            let replica = &group.replicas[*place];
            replica.role != Role::Out || group.config.stale.contains(&self.members[replica.member].device)
        };
        let members = (0..group.replicas.len()).filter(is_named).map(|place| {
            let replica = &group.replicas[place];
            let member = &self.members[replica.member];
            let copying: u64 = replica.jobs.values().map(|job| u64::from(job.range.count())).sum();
            let pending = group.writes.values().filter(|write| write.pending.contains(place));
            MemberStatus {
                device: member.device,
                role: match replica.role {
                    Role::InSync => MemberRole::InSync,
                    Role::Joining => MemberRole::Joining,
                    Role::Out => MemberRole::Stale,
                },
                connected: member.connected,
                joined: replica.joined,
                complete: group.phase == GroupPhase::Serving && replica.role != Role::Out && replica.is_complete(),
                lacking_blocks: replica.lack.blocks() + copying,
                copied_blocks: replica.copied_blocks,
                comparing: replica.stale,
                damaged_blocks: replica.damaged.len() as u64,
                outstanding: pending.count(),
            }
        });
        GroupStatus {
            group: group.index,
            phase: group.phase,
            members: members.collect(),
            writes: group.open_writes,
            reads: group.reads.len(),
            queued: group.queued.len(),
            stable: group.stable,
            epoch: group.config.epoch,
            changing: group.change.is_some(),
            moving: group.config.moving.is_some(),
            damage_found: group.damage_found,
            damage_repaired: group.damage_repaired,
        }
    }

    /// What must hold between two events; cheap enough to be looked at after each of them.
    pub(super) fn check_invariants(&self) {
        if let Some(seen) = self.fenced {
            assert!(
                seen >= self.holder.generation || seen == crate::ids::Generation::NONE,
                "fenced by {seen}"
            );
            assert!(
                self.sent.is_empty() && self.timers.is_empty(),
                "a fenced attachment waits for nothing"
            );
            assert!(
                self.members.iter().all(|member| member.grant_until == Time::ZERO),
                "nor reads by grants"
            );
        }
        for group in &self.groups {
            match group.phase {
                GroupPhase::Serving => {
                    assert!(group.reconcile.is_none(), "group {} serves and compares", group.index);
                    assert!(
                        group.queued.is_empty() || group.draining,
                        "group {} leaves I/O waiting",
                        group.index
                    );
                }
                GroupPhase::Sealing | GroupPhase::Waiting | GroupPhase::Reconciling | GroupPhase::Fenced => {
                    assert!(
                        group.writes.is_empty() && group.reads.is_empty(),
                        "group {} has I/O in flight while it is {:?}",
                        group.index,
                        group.phase
                    );
                }
            }
            assert!(group.open_writes <= group.writes.len(), "open writes are counted");
            assert!(group.in_sync.and(group.joining).is_empty(), "in sync and joining");
            assert!(
                group.readable().minus(group.in_sync).is_empty(),
                "only who is in sync is read"
            );
            assert!(group.held_reads.len() <= group.reads.len(), "held reads are reads");
            assert!(
                group.stable.seq().get() < group.next_seq,
                "what is not written is not stable"
            );
            for replica in &group.replicas {
                assert!(replica.lag_ops <= self.limits.lag_ops_max, "a member's lag is bounded");
                assert!(replica.jobs.len() <= self.limits.copies_in_flight, "copies are bounded");
                assert!(
                    !replica.joined || self.members[replica.member].sealed,
                    "joined before sealed"
                );
                assert!(
                    replica.role != Role::Out || (!replica.joined && replica.lag_ops == 0 && replica.jobs.is_empty()),
                    "nothing is asked of who is no member"
                );
            }
        }
    }
}
