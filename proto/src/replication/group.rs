//! One group of the volume as its coordinator sees it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::api::{GroupPhase, OpToken, Operation};
use super::bitmap::Lack;
use super::catch_up::{Compare, Job};
use super::config::GroupConfig;
use super::limits::{LOST_CHUNKS_EXACT_MAX, ReplicationLimits};
use super::mask::Mask;
use super::read::ReadState;
use super::reconcile::Reconcile;
use super::write::WriteState;
use crate::ids::{GroupIndex, Layer, Version};
use crate::units::BlockRange;

/// A member's part in a group.
pub(super) struct Replica {
    /// Which of the coordinator's members.
    pub(super) member: usize,
    /// Whether it has answered our Join on the connection that stands.
    pub(super) joined: bool,
    /// Blocks of which it may hold an older version than the newest acknowledged one.
    pub(super) lack: Lack,
    /// Whether nothing it holds can be relied on until it was compared with a complete member.
    pub(super) stale: bool,
    /// The comparison, while `stale`.
    pub(super) compare: Option<Compare>,
    /// Copies on their way to it. Their blocks are no longer in `lack`, and still lacking.
    pub(super) jobs: BTreeMap<u64, Job>,
    /// No copies to it before then: one was refused.
    pub(super) copy_paused: Option<crate::time::Time>,
    /// Where in `lack` the next copy is looked for.
    pub(super) copy_from: (crate::ids::ChunkIndex, Layer, u32),
    /// Acknowledged writes that it has not answered.
    pub(super) lag_ops: usize,
    /// Their bytes.
    pub(super) lag_bytes: u64,
    /// Write requests that it has not answered, wanted or not any more.
    pub(super) unanswered: usize,
    /// Whether it gets no payloads, because it left too many unanswered.
    pub(super) behind: bool,
    /// Whether a log knows that it is full.
    pub(super) told_full: bool,
    /// Whether a log knows that it lacks something.
    pub(super) told_behind: bool,
}

impl Replica {
    fn new(member: usize, limits: &ReplicationLimits) -> Replica {
        Replica {
            member,
            joined: false,
            lack: Lack::new(limits.lack_chunks_exact_max),
            stale: false,
            compare: None,
            jobs: BTreeMap::new(),
            copy_paused: None,
            copy_from: Default::default(),
            lag_ops: 0,
            lag_bytes: 0,
            unanswered: 0,
            behind: false,
            told_full: false,
            told_behind: false,
        }
    }

    /// Whether it is known to hold every block in its newest acknowledged version, writes on their way apart.
    pub(super) fn is_complete(&self) -> bool {
        !self.stale && self.lack.is_empty() && self.jobs.is_empty()
    }

    /// The same for one range.
    pub(super) fn holds(&self, layer: Layer, range: BlockRange) -> bool {
        !self.stale
            && !self.lack.intersects(layer, range)
            && !self
                .jobs
                .values()
                .any(|job| job.layer == layer && job.range.overlaps(&range))
    }
}

/// One group.
pub(super) struct Group {
    pub(super) index: GroupIndex,
    pub(super) config: GroupConfig,
    pub(super) phase: GroupPhase,
    /// In order of `config.in_sync`.
    pub(super) replicas: Vec<Replica>,
    /// Operations that wait until the group is served.
    pub(super) queued: VecDeque<(OpToken, Operation)>,
    /// The write number of the next write.
    pub(super) next_seq: u64,
    /// Writes that are not acknowledged, or not answered by a member that was asked, by write number.
    pub(super) writes: BTreeMap<u64, WriteState>,
    /// How many of them are not acknowledged.
    pub(super) open_writes: usize,
    pub(super) next_read: u64,
    pub(super) reads: BTreeMap<u64, ReadState>,
    /// Reads that have their result and wait until enough members vouch for it.
    pub(super) held_reads: BTreeSet<u64>,
    pub(super) reconcile: Option<Reconcile>,
    /// Whether some read found nobody to ask.
    pub(super) reads_wait: bool,
    /// Blocks whose newest version is damaged on every member that has it.
    pub(super) lost: Lack,
    /// Serving is to stop, to compare the members again.
    pub(super) draining: bool,
    /// Every version up to here is durable on every member.
    pub(super) stable: Version,
    /// A timer for what was refused or could not be copied.
    pub(super) retry_armed: bool,
    pub(super) next_job: u64,
    /// What logs know of the phase.
    pub(super) told: Option<(GroupPhase, Mask)>,
}

impl Group {
    pub(super) fn new(
        index: GroupIndex,
        config: GroupConfig,
        members: impl Iterator<Item = usize>,
        limits: &ReplicationLimits,
    ) -> Group {
        Group {
            index,
            replicas: members.map(|member| Replica::new(member, limits)).collect(),
            config,
            phase: GroupPhase::Sealing,
            queued: VecDeque::new(),
            next_seq: 1,
            writes: BTreeMap::new(),
            open_writes: 0,
            next_read: 0,
            reads: BTreeMap::new(),
            held_reads: BTreeSet::new(),
            reconcile: None,
            reads_wait: false,
            lost: Lack::new(LOST_CHUNKS_EXACT_MAX),
            draining: false,
            stable: Version::ZERO,
            retry_armed: false,
            next_job: 0,
            told: None,
        }
    }

    /// Members that have answered our Join on the connection that stands.
    pub(super) fn joined(&self) -> Mask {
        self.places(|replica| replica.joined)
    }

    pub(super) fn all(&self) -> Mask {
        self.places(|_| true)
    }

    pub(super) fn places(&self, mut pick: impl FnMut(&Replica) -> bool) -> Mask {
        let replicas = self.replicas.iter().enumerate();
        replicas
            .filter(|(_, replica)| pick(replica))
            .map(|(place, _)| place)
            .collect()
    }

    /// Members from which a write that overlaps the range is still awaited.
    pub(super) fn awaited(&self, range: BlockRange) -> Mask {
        let writes = self.writes.values().filter(|write| write.range.overlaps(&range));
        writes.fold(Mask::NONE, |mask, write| mask.or(write.awaited()))
    }

    /// Members that can be spoken to and are known to hold the newest acknowledged version of every block of the range
    /// (rule 16).
    pub(super) fn holders(&self, layer: Layer, range: BlockRange) -> Mask {
        let hold = self.places(|replica| replica.joined && replica.holds(layer, range));
        if self.writes.is_empty() {
            hold
        } else {
            hold.minus(self.awaited(range))
        }
    }

    /// A member may hold an older version of these blocks than the others. Writes of them that it has not answered are
    /// not waited for any more: their answers would say nothing of the newer ones.
    pub(super) fn miss(&mut self, place: usize, layer: Layer, range: BlockRange) {
        let replica = &mut self.replicas[place];
        replica.lack.insert(layer, range);
        if replica.lag_ops == 0 {
            return;
        }
        for write in self.writes.values_mut() {
            if write.acknowledged && write.range.overlaps(&range) && write.pending.remove(place) {
                replica.lag_ops -= 1;
                replica.lag_bytes -= write.bytes;
                replica.lack.insert(layer, write.range);
            }
        }
        self.writes.retain(|_, write| !write.is_over());
    }

    /// What was said about a member's blocks is now known to be on it.
    pub(super) fn has_now(&mut self, place: usize, layer: Layer, range: BlockRange) {
        let replica = &mut self.replicas[place];
        if !replica.lack.is_empty() {
            replica.lack.remove(layer, range);
        }
        for job in replica.jobs.values_mut() {
            job.supersede(layer, range);
        }
    }

    /// Moves the stable watermark up: every version below the first one that a member still owes is on all of them.
    pub(super) fn advance_stable(&mut self, generation: crate::ids::Generation) {
        let all_in_sync = self.phase == GroupPhase::Serving
            && self.config.joining.is_empty()
            && self
                .replicas
                .iter()
                .all(|replica| replica.is_complete() && !replica.behind);
        if !all_in_sync {
            return;
        }
        let first_open = self.writes.keys().next().copied().unwrap_or(self.next_seq);
        let seq = crate::ids::Seq::new(first_open - 1).expect("write numbers are bounded");
        let stable = Version::new(generation, seq);
        assert!(
            stable >= self.stable,
            "stable went back from {} to {stable}",
            self.stable
        );
        self.stable = stable;
    }
}
