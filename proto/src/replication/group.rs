//! One group of the volume as its coordinator sees it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use super::api::{GroupPhase, OpToken, Operation, RequestId};
use super::bitmap::Lack;
use super::catch_up::{Compare, Job};
use super::config::{GroupConfig, VolumeSettings};
use super::damage::Noted;
use super::limits::{LOST_CHUNKS_EXACT_MAX, ReplicationLimits};
use super::mask::Mask;
use super::read::ReadState;
use super::reconcile::Reconcile;
use super::write::WriteState;
use crate::ids::{GroupIndex, Layer, Version};
use crate::limits::BLOCKS_PER_CHUNK;
use crate::time::Time;
use crate::units::BlockRange;

/// What a device is in a group, as committed by meta.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    /// In `I`.
    InSync,
    /// In `J`.
    Joining,
    /// It was a member, and may be one again.
    Out,
}

/// A device's part in a group.
pub(super) struct Replica {
    /// Which of the coordinator's members.
    pub(super) member: usize,
    /// As committed.
    pub(super) role: Role,
    /// Whether it has answered our Join on the connection that stands.
    pub(super) joined: bool,
    /// It held up the comparison at attach, which goes on without it until it answers.
    pub(super) passed_over: bool,
    /// Blocks of which it may hold an older version than the newest acknowledged one.
    pub(super) lack: Lack,
    /// Whether nothing it holds can be relied on until it was compared with a complete member.
    pub(super) stale: bool,
    /// Whether what it lacks is sent as resync copies: its past is not known.
    pub(super) resync: bool,
    /// A joiner that stands in has blocks that nobody was told of, and that have to give way.
    pub(super) higher: bool,
    /// The comparison, while `stale`.
    pub(super) compare: Option<Compare>,
    /// Copies on their way to it. Their blocks are no longer in `lack`, and still lacking.
    pub(super) jobs: BTreeMap<u64, Job>,
    /// No copies to it before then: one was refused.
    pub(super) copy_paused: Option<Time>,
    /// Where in `lack` the next copy is looked for.
    pub(super) copy_from: (crate::ids::ChunkIndex, Layer, u32),
    /// Up to which block of a chunk what it lacks is copied block by block: the long holes there are known, and on their way.
    pub(super) surveyed: Option<(crate::ids::ChunkIndex, Layer, u32)>,
    /// Blocks that were copied to it since it was last compared.
    pub(super) copied_blocks: u64,
    /// Blocks that it holds and can't read; they are lacking too.
    pub(super) damaged: Noted,
    /// Answers to copies that were spoilt on the way from it.
    pub(super) spoilt: u64,
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
    /// How it was of late.
    pub(super) health: Health,
}

/// Whether a device can be relied on to be a member.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Health {
    /// Since when it is in trouble; short spells of being well don't count.
    pub(super) troubled_since: Option<Time>,
    /// Since when it is well.
    pub(super) well_since: Option<Time>,
    /// Since when it has been in sync, if it joined under this attachment.
    pub(super) admitted_at: Option<Time>,
    /// It may join again from then on.
    pub(super) rejoin_at: Time,
    /// How long it was made to wait for that.
    pub(super) rejoin_pause: Duration,
    /// It can't say what it holds, or can't take copies.
    pub(super) refuses: Option<Refuses>,
}

/// A spell of refusals because of what a device can't read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Refuses {
    pub(super) since: Time,
    pub(super) last: Time,
}

impl Replica {
    fn new(member: usize, role: Role, limits: &ReplicationLimits) -> Replica {
        Replica {
            member,
            role,
            joined: false,
            passed_over: false,
            lack: Lack::new(limits.lack_chunks_exact_max),
            stale: role == Role::Joining,
            resync: role == Role::Joining,
            higher: false,
            compare: None,
            jobs: BTreeMap::new(),
            copy_paused: None,
            copy_from: Default::default(),
            surveyed: None,
            copied_blocks: 0,
            damaged: Noted::default(),
            spoilt: 0,
            lag_ops: 0,
            lag_bytes: 0,
            unanswered: 0,
            behind: false,
            told_full: false,
            told_behind: false,
            health: Health::default(),
        }
    }

    /// Forgets what was known of it (rule 23).
    pub(super) fn reset(&mut self, role: Role, limits: &ReplicationLimits) {
        let health = self.health;
        *self = Replica::new(self.member, role, limits);
        self.health = health;
    }

    /// Nothing is known of its content but that it is to be compared.
    pub(super) fn distrust(&mut self) {
        (self.stale, self.resync, self.higher) = (true, true, false);
        self.compare = None;
        self.copied_blocks = 0;
    }

    /// The next run of blocks to be copied to it: of at most `max` blocks where it is known what they are, else as long as
    /// it is.
    pub(super) fn next_run(&mut self, max: u32) -> Option<(Layer, BlockRange)> {
        let (chunk, layer, block) = self.copy_from;
        let (layer, range) = self.lack.run_from(chunk, layer, block, max)?;
        let surveyed = |(chunk, of, end): (_, Layer, u32)| (chunk, of) == (range.chunk(), layer) && range.start() < end;
        if range.count() < max || self.surveyed.is_some_and(surveyed) {
            return Some((layer, range));
        }
        self.lack
            .run_from(range.chunk(), layer, range.start(), BLOCKS_PER_CHUNK)
    }

    /// Whether it is known to hold every block in its newest acknowledged version, writes on their way apart.
    pub(super) fn is_complete(&self) -> bool {
        !self.stale && !self.higher && self.lack.is_empty() && self.jobs.is_empty()
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

/// A configuration that is to follow the committed one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Change {
    /// `I′`.
    pub(super) in_sync: Mask,
    /// `J′`.
    pub(super) joining: Mask,
    pub(super) step: Step,
    /// The number of the first request that was sent after it was wished for.
    pub(super) since: RequestId,
}

/// How far a change is. Its quorum applies from the first step on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// Not proposed yet, because what is acknowledged is not known to be durable on enough of `I′`. Can be given up.
    Wanted,
    /// Meta was asked for it.
    Asked,
    /// Meta was asked, and nobody knows what became of it: it is asked for again until that is known.
    Unknown,
}

/// One group.
pub(super) struct Group {
    pub(super) index: GroupIndex,
    pub(super) config: GroupConfig,
    pub(super) phase: GroupPhase,
    /// Every device that is a member, and devices that were or may be one. A place is given to another device only when there is
    /// no other left, and nothing refers to it: its device is no member and not named.
    pub(super) replicas: Vec<Replica>,
    /// `I`.
    pub(super) in_sync: Mask,
    /// `J`.
    pub(super) joining: Mask,
    /// Members of `I` that are listened to no more, until they are ejected: a joiner has been made equal to the others by copies that
    /// would undo what these might bring.
    pub(super) ignored: Mask,
    pub(super) change: Option<Change>,
    /// No change is wanted before then: one was refused.
    pub(super) change_paused: Time,
    /// Since when enough members of `I` are there to go on without the others.
    pub(super) enough_since: Option<Time>,
    /// How often the comparison began anew for the sake of a member that came late.
    pub(super) restarts: u32,
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
    /// Blocks that were found damaged on a member.
    pub(super) damage_found: u64,
    /// Those of them that were written anew.
    pub(super) damage_repaired: u64,
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
    pub(super) fn new(index: GroupIndex, config: GroupConfig) -> Group {
        Group {
            index,
            replicas: Vec::new(),
            config,
            in_sync: Mask::NONE,
            joining: Mask::NONE,
            ignored: Mask::NONE,
            change: None,
            change_paused: Time::ZERO,
            enough_since: None,
            restarts: 0,
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
            damage_found: 0,
            damage_repaired: 0,
            draining: false,
            stable: Version::ZERO,
            retry_armed: false,
            next_job: 0,
            told: None,
        }
    }

    /// Gives a device a place; that of an earlier time if it had one.
    pub(super) fn place(&mut self, member: usize, role: Role, limits: &ReplicationLimits) -> usize {
        if let Some(place) = self.replicas.iter().position(|replica| replica.member == member) {
            return place;
        }
        self.replicas.push(Replica::new(member, role, limits));
        self.replicas.len() - 1
    }

    /// Gives the place of a device that is no member to another one. Whose it was.
    pub(super) fn give_place(&mut self, place: usize, member: usize, limits: &ReplicationLimits) -> usize {
        let former = &self.replicas[place];
        assert!(
            former.role == Role::Out && !self.writers().contains(place) && !self.vouchers().contains(place),
            "the place of a member is its own"
        );
        let open = |write: &WriteState| {
            let parts = [write.pending, write.owed, write.durable, write.refused, write.doubtful];
            parts.iter().any(|part| part.contains(place))
        };
        assert!(!self.writes.values().any(open), "nothing is known of who left");
        let former = former.member;
        self.replicas[place] = Replica::new(member, Role::Out, limits);
        former
    }

    /// Members that have answered our Join on the connection that stands.
    pub(super) fn joined(&self) -> Mask {
        self.places(|replica| replica.joined)
    }

    /// Members of `I` to compare at attach: those that have joined, but for who held up a comparison or has no say any more.
    pub(super) fn present(&self) -> Mask {
        self.in_sync
            .minus(self.ignored)
            .and(self.places(|replica| replica.joined && !replica.passed_over))
    }

    /// Whether nobody can raise the base any more.
    pub(super) fn is_settled(&self) -> bool {
        self.phase == GroupPhase::Serving || !self.ignored.is_empty()
    }

    /// `I ∪ J`: who gets every write.
    pub(super) fn writers(&self) -> Mask {
        self.in_sync.or(self.joining)
    }

    /// Who may be read: `I`, and `I ∩ I′` while a change is under way (rule 16).
    pub(super) fn readable(&self) -> Mask {
        self.change
            .map_or(self.in_sync, |change| self.in_sync.and(change.in_sync))
    }

    /// Whoever vouches for reads: `I` and `I′`.
    pub(super) fn vouchers(&self) -> Mask {
        self.change
            .map_or(self.in_sync, |change| self.in_sync.or(change.in_sync))
    }

    /// Whether these members are a quorum of `I`, and of `I′` while a change is under way.
    fn is_quorum(&self, mask: Mask, quorum: impl Fn(usize) -> usize) -> bool {
        let of = |set: Mask| mask.and(set).len() >= quorum(set.len());
        of(self.in_sync) && self.change.is_none_or(|change| of(change.in_sync))
    }

    /// Whether a write that is durable on these members may be acknowledged (rule 12).
    pub(super) fn is_write_quorum(&self, settings: &VolumeSettings, mask: Mask) -> bool {
        self.is_quorum(mask, |members| settings.write_quorum(members))
    }

    /// Whether a read for which these members vouch may be returned (rule 17).
    pub(super) fn is_confirm_quorum(&self, settings: &VolumeSettings, mask: Mask) -> bool {
        self.is_quorum(mask, |members| settings.confirm_quorum(members))
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
        let hold = self.keepers(layer, range);
        if self.writes.is_empty() {
            hold
        } else {
            hold.minus(self.awaited(range))
        }
    }

    /// Whether nobody lacks anything, and logs know it.
    pub(super) fn is_caught_up(&self) -> bool {
        let mut writers = self.writers().iter().map(|place| &self.replicas[place]);
        writers.all(|replica| replica.is_complete() && !replica.told_behind)
    }

    /// Members that can be spoken to and will hold these blocks when the writes on their way have ended.
    pub(super) fn keepers(&self, layer: Layer, range: BlockRange) -> Mask {
        let hold = self.places(|replica| replica.joined && replica.holds(layer, range));
        hold.and(self.sources())
    }

    /// Whose content may be used: while members are compared, of those that are compared only (rule 10).
    pub(super) fn sources(&self) -> Mask {
        match &self.reconcile {
            Some(reconcile) => reconcile.participants(),
            None => self.readable(),
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
        replica.damaged.take(layer, range);
        for job in replica.jobs.values_mut() {
            job.supersede(layer, range);
        }
    }

    /// Moves the stable watermark up: every version below the first one that a member still owes is on all of them.
    pub(super) fn advance_stable(&mut self, generation: crate::ids::Generation) {
        let all_in_sync = self.phase == GroupPhase::Serving
            && self
                .writers()
                .iter()
                .all(|place| self.replicas[place].is_complete() && !self.replicas[place].behind);
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
