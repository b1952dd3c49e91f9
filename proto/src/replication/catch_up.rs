//! Catch-up (rule 14): a member that lacks blocks gets copies of them from one that holds them, while writes go on. One
//! that has forgotten what it acknowledged is compared with a complete member first.

use super::api::{Action, GroupPhase, Notice};
use super::group::Role;
use super::mask::Mask;
use super::read::bad_blocks;
use super::reconcile::{Stream, is_ended, next_segment};
use super::{Coordinator, What};
use crate::block::{Content, Cursor};
use crate::buffer::joined;
use crate::frame::Class;
use crate::ids::{ChunkIndex, Layer};
use crate::message::{Collected, Copy, CopySource, Message, Read, ReadAnswer};
use crate::time::Time;
use crate::units::BlockRange;

/// Runs without a member to copy them from that are skipped in one go.
const SKIPS_MAX: usize = 32;

/// A copy on its way to a member, or the survey of a range that it lacks.
pub(super) struct Job {
    pub(super) layer: Layer,
    pub(super) range: BlockRange,
    pub(super) source: usize,
    /// Whether it only asks what of the range is a hole.
    pub(super) is_survey: bool,
    /// Whether the member itself reads it from the source.
    pub(super) is_fetch: bool,
    /// A fetch whose source can't be relied on any more: whatever comes of it, the blocks are lacking.
    pub(super) given_up: bool,
    /// Blocks of it that have come to the member by writes meanwhile, one bit each.
    superseded: Vec<u64>,
}

impl Job {
    pub(super) fn new(layer: Layer, range: BlockRange, source: usize) -> Job {
        Job {
            layer,
            range,
            source,
            is_survey: false,
            is_fetch: false,
            given_up: false,
            superseded: vec![0; range.count().div_ceil(64) as usize],
        }
    }

    /// A write of these blocks is durable on the member: should the copy fail, they are not lacking.
    pub(super) fn supersede(&mut self, layer: Layer, range: BlockRange) {
        if layer != self.layer {
            return;
        }
        if let Some(part) = self.range.intersection(&range) {
            for block in part.start() - self.range.start()..part.end() - self.range.start() {
                self.superseded[(block / 64) as usize] |= 1 << (block % 64);
            }
        }
    }

    fn is_superseded(&self, block: u32) -> bool {
        let block = block - self.range.start();
        self.superseded[(block / 64) as usize] >> (block % 64) & 1 != 0
    }

    /// The runs of blocks of a part of it that are lacking should it fail.
    pub(super) fn lacking(&self, part: BlockRange) -> Vec<BlockRange> {
        self.runs(part, false)
    }

    /// The runs of blocks of a part of it that have come by writes.
    pub(super) fn written(&self, part: BlockRange) -> Vec<BlockRange> {
        self.runs(part, true)
    }

    fn runs(&self, part: BlockRange, superseded: bool) -> Vec<BlockRange> {
        let mut runs = Vec::new();
        let mut start = part.start();
        for block in part.start()..=part.end() {
            if block == part.end() || self.is_superseded(block) != superseded {
                runs.extend(BlockRange::new(part.chunk(), start, block - start));
                start = block + 1;
            }
        }
        runs
    }
}

/// The comparison of a member that has forgotten something with a complete one.
pub(super) struct Compare {
    id: u64,
    source: usize,
    /// What the source holds, and what the member holds.
    streams: [Stream; 2],
}

impl Compare {
    /// The place of the member that is complete.
    pub(super) fn source(&self) -> usize {
        self.source
    }
}

impl Coordinator {
    /// Something happened that may let a catch-up go on.
    pub(super) fn touch_catch_up(&mut self, g: usize) {
        self.touched.insert(g);
    }

    /// Goes on with what the members of a group lack.
    pub(super) fn catch_up(&mut self, g: usize) {
        if self.groups[g].reads_wait {
            self.ask_idle_reads(g);
        }
        let group = &mut self.groups[g];
        match group.phase {
            GroupPhase::Serving if group.draining => self.after_drain(g),
            GroupPhase::Serving if group.joining.is_empty() && group.is_caught_up() => {
                return group.advance_stable(self.holder.generation);
            }
            GroupPhase::Serving => {}
            GroupPhase::Reconciling => self.go_on_reconcile(g),
            GroupPhase::Sealing | GroupPhase::Waiting | GroupPhase::Fenced => return,
        }
        let mut stalled = false;
        for target in self.groups[g].writers().iter() {
            let group = &self.groups[g];
            let replica = &group.replicas[target];
            let early = replica.role == Role::Joining && group.phase != GroupPhase::Serving && self.level(g).is_none();
            if !replica.joined || replica.behind || early {
                continue;
            }
            let in_sync = replica.role == Role::InSync;
            if replica.stale {
                stalled |= !self.go_on_compare(g, target) && in_sync;
            }
            if !self.groups[g].replicas[target].lack.is_empty() {
                stalled |= !self.start_copies(g, target) && in_sync;
            }
            self.check_caught_up(g, target);
        }
        if stalled {
            self.drain_if_stalled(g);
        }
    }

    fn check_caught_up(&mut self, g: usize, target: usize) {
        let group = &mut self.groups[g];
        let replica = &mut group.replicas[target];
        if !replica.is_complete() || !replica.joined {
            return;
        }
        if replica.role == Role::Joining {
            return self.reconsider(g);
        }
        if group.phase != GroupPhase::Serving {
            return;
        }
        replica.resync = false;
        if std::mem::take(&mut replica.told_behind) {
            let (group, device) = (group.index, self.members[replica.member].device);
            self.actions
                .push_back(Action::Notice(Notice::CaughtUp { group, device }));
        }
        self.groups[g].advance_stable(self.holder.generation);
    }

    /// Starts copies to a member. False if there is something to copy and nobody has it.
    fn start_copies(&mut self, g: usize, target: usize) -> bool {
        if self.groups[g].replicas[target]
            .copy_paused
            .is_some_and(|until| self.now < until)
        {
            self.arm_retry(g);
            return true;
        }
        let mut wrapped = false;
        let mut found_source = false;
        for _ in 0..SKIPS_MAX {
            let replica = &mut self.groups[g].replicas[target];
            if replica.jobs.len() >= self.limits.copies_in_flight || replica.lack.is_empty() || !self.may_copy(g) {
                return true;
            }
            let replica = &mut self.groups[g].replicas[target];
            let Some((layer, mut range)) = replica.next_run(self.limits.copy_blocks) else {
                replica.copy_from = (ChunkIndex(0), Layer(0), 0);
                replica.surveyed = None;
                if wrapped {
                    break;
                }
                wrapped = true;
                continue;
            };
            if range.count() > self.limits.copy_blocks {
                if replica.jobs.values().any(|job| job.is_survey) {
                    return true;
                }
                if let Some(source) = self.fastest_source(g, target, layer, range) {
                    self.start_survey(g, target, source, layer, range);
                    continue;
                }
                let start = BlockRange::new(range.chunk(), range.start(), self.limits.copy_blocks);
                range = start.expect("a part of the run");
            }
            let group = &mut self.groups[g];
            group.replicas[target].copy_from = (range.chunk(), layer, range.end());
            found_source |= !group.keepers(layer, range).minus(Mask::one(target)).is_empty();
            if let Some(source) = self.fastest_source(g, target, layer, range) {
                self.start_copy(g, target, source, layer, range);
            }
        }
        found_source || !self.groups[g].replicas[target].jobs.is_empty()
    }

    /// Who is to give a copy.
    pub(super) fn fastest_source(&self, g: usize, target: usize, layer: Layer, range: BlockRange) -> Option<usize> {
        let group = &self.groups[g];
        let sources = group.holders(layer, range).minus(Mask::one(target));
        sources.iter().min_by_key(|place| {
            let member = &self.members[group.replicas[*place].member];
            let spoilt = group.replicas[*place].spoilt;
            (
                self.is_refusing(g, *place),
                spoilt,
                member.latency.expected_ns(),
                *place,
            )
        })
    }

    fn start_copy(&mut self, g: usize, target: usize, source: usize, layer: Layer, range: BlockRange) {
        self.note_copy(g, range.count());
        let group = &mut self.groups[g];
        let job = group.next_job;
        group.next_job += 1;
        let replica = &mut group.replicas[target];
        replica.lack.remove(layer, range);
        replica.jobs.insert(job, Job::new(layer, range, source));
        if !self.start_fetch(g, target, job) {
            self.read_for_copy(g, target, job);
        }
    }

    /// Reads from its source what is to be copied.
    pub(super) fn read_for_copy(&mut self, g: usize, target: usize, job: u64) {
        let group = &self.groups[g];
        let state = &group.replicas[target].jobs[&job];
        let source = state.source;
        let read = Message::Read(Read {
            holder: self.holder,
            group: group.index,
            layer: state.layer,
            range: state.range,
        });
        let what = What::CopyRead { group: g, target, job };
        self.send(g, Mask::one(source), Class::Repair, read, what);
    }

    /// What is to be copied was read.
    pub(super) fn copy_read(&mut self, g: usize, target: usize, job: u64, answer: ReadAnswer) {
        let volume = self.settings.id;
        let group = &self.groups[g];
        let Some(state) = group.replicas[target].jobs.get(&job) else {
            return;
        };
        let (layer, range, source) = (state.layer, state.range, state.source);
        if !group.replicas[target].joined || answer.blocks.len() != range.count() as usize {
            return self.copy_lost(g, target, job);
        }
        let bad = bad_blocks(volume, range, &answer);
        if !bad.is_empty() {
            // What the source takes for good was spoilt on the way: it is asked again, after others.
            let (damaged, spoilt): (Vec<u32>, Vec<u32>) = bad
                .into_iter()
                .partition(|block| answer.blocks[*block as usize].content == Content::Damaged);
            self.source_is_damaged(g, target, source, layer, range, &damaged);
            let source = &mut self.groups[g].replicas[source];
            source.spoilt += u64::from(!spoilt.is_empty());
            return self.copy_lost(g, target, job);
        }
        self.groups[g].replicas[source].spoilt = 0;
        let copy = Message::Copy(Copy {
            holder: self.holder,
            group: self.groups[g].index,
            layer,
            range,
            source: self.copy_source(g, target),
            blocks: answer.blocks,
            bytes: joined(answer.bytes),
        });
        let what = What::CopyWrite { group: g, target, job };
        self.send(g, Mask::one(target), Class::Repair, copy, what);
    }

    /// By what rule copies to a member apply. A resync copy that arrives late could undo a repair that was made meanwhile
    /// with a higher version of an older generation; there must be none while members are compared that may raise the base.
    pub(super) fn copy_source(&self, g: usize, target: usize) -> CopySource {
        let group = &self.groups[g];
        if group.is_settled() && group.replicas[target].resync && !self.limits.resync_by_highest() {
            CopySource::Resync
        } else {
            CopySource::Repair
        }
    }

    /// The member that was to give a copy has damaged blocks: it lacks them too. If a comparison of all members has shown
    /// that no other holds them they are lost, until they are written anew.
    fn source_is_damaged(
        &mut self,
        g: usize,
        target: usize,
        source: usize,
        layer: Layer,
        range: BlockRange,
        bad: &[u32],
    ) {
        for block in bad {
            let block = BlockRange::new(range.chunk(), range.start() + block, 1).expect("within the range");
            let group = &mut self.groups[g];
            let others = group
                .places(|replica| replica.holds(layer, block))
                .and(group.sources())
                .minus(Mask::one(source));
            let compared = group.phase == GroupPhase::Reconciling && others.minus(Mask::one(target)).is_empty();
            let alone = group.in_sync == Mask::one(source);
            if compared || alone || group.lost.intersects(layer, block) {
                group.lost.insert(layer, block);
                if let Some(job) = group.replicas[target].jobs.values_mut().find(|job| job.range == range) {
                    job.supersede(layer, block);
                }
            } else {
                group.miss(source, layer, block);
            }
            self.tell_damage(g, source, layer, block);
        }
    }

    /// A copy is durable.
    pub(super) fn copy_done(&mut self, g: usize, target: usize, job: u64) {
        let replica = &mut self.groups[g].replicas[target];
        if let Some(job) = replica.jobs.remove(&job) {
            replica.copied_blocks += u64::from(job.range.count());
            self.damage_copied(g, target, job.layer, job.range);
            self.touch_catch_up(g);
        }
    }

    /// A copy was not done: its blocks are lacking again.
    pub(super) fn copy_lost(&mut self, g: usize, target: usize, job: u64) {
        let pause: Time = self.now + self.limits.retry_pause;
        let replica = &mut self.groups[g].replicas[target];
        let Some(job) = replica.jobs.remove(&job) else { return };
        for run in job.lacking(job.range) {
            replica.lack.put_back(job.layer, run);
        }
        replica.surveyed = None;
        replica.copy_paused = Some(pause);
        self.arm_retry(g);
    }

    /// Goes on comparing a member that has forgotten something. False if nobody is complete to compare it with.
    fn go_on_compare(&mut self, g: usize, target: usize) -> bool {
        let refusing = self.groups[g].places(|replica| replica.health.refuses.is_some());
        let group = &mut self.groups[g];
        let usable = |replica: &super::group::Replica| replica.joined && replica.is_complete() && !replica.behind;
        let settled = group.is_settled();
        let sources = group.places(usable).and(group.readable()).and(group.sources());
        if let Some(compare) = &group.replicas[target].compare
            && !sources.contains(compare.source)
        {
            group.replicas[target].compare = None;
        }
        if group.replicas[target].compare.is_none() {
            let willing = sources.minus(refusing);
            let Some(source) = willing.iter().chain(sources.iter()).next() else {
                // Somebody may become complete by copies that are on their way.
                return group.replicas.iter().any(|replica| !replica.jobs.is_empty());
            };
            let id = group.next_job;
            group.next_job += 1;
            // What was acknowledged and is not everywhere yet may not be listed by the source, and be there later.
            for write in group.writes.values() {
                if write.acknowledged && !write.pending.contains(target) {
                    group.replicas[target].lack.insert(write.layer, write.range);
                }
            }
            group.replicas[target].compare = Some(Compare {
                id,
                source,
                streams: [Stream::new(), Stream::new()],
            });
        }
        let replica = &mut group.replicas[target];
        let compare = replica.compare.as_mut().expect("made above");
        let mut rotten = Vec::new();
        let (generation, by_highest) = (self.holder.generation, self.limits.resync_by_highest());
        while replica.lack.exact_chunks() < self.limits.lack_chunks_exact_max.max(2) - 1
            && let Some(segment) = next_segment(&mut compare.streams)
        {
            let (source, own) = (segment.states[0], segment.states[1]);
            // A higher version of this attachment is a write that came since the source was asked. Any other is one that
            // nobody was told of, and gives way (rule 21).
            if source.content == Content::Damaged && group.lost.intersects(segment.layer, segment.range) {
                // Nobody has it.
                continue;
            }
            let live = own.version.generation() == generation;
            let higher = own.version > source.version && !live && !by_highest;
            if higher && group.lost.intersects(segment.layer, segment.range) {
                // The source has an older version of what is lost, and this may be the newest: it is kept for the
                // comparison of all members that follows.
                let kept = &group.lost;
                replica.lack.insert_without(segment.layer, segment.range, kept);
            } else if higher && !settled {
                replica.higher = true;
            } else if own.version < source.version || higher || own.content == Content::Damaged {
                replica.lack.insert(segment.layer, segment.range);
                if own.content == Content::Damaged {
                    rotten.push((segment.layer, segment.range));
                }
            }
        }
        let (id, source) = (compare.id, compare.source);
        let ended = is_ended(&compare.streams);
        let asks = [(source, compare.streams[0].ask()), (target, compare.streams[1].ask())];
        if ended {
            replica.compare = None;
            replica.stale = false;
            self.touch_catch_up(g);
        }
        self.tell_damages(g, target, &rotten);
        for (place, from) in asks {
            if let Some(from) = from {
                self.collect(g, place, (from, Cursor::END), What::Compare { group: g, target, id });
            }
        }
        true
    }

    /// A page of what one of the two holds.
    pub(super) fn compare_page(&mut self, g: usize, target: usize, id: u64, place: usize, page: Collected) {
        let compare = self.groups[g].replicas[target].compare.as_mut();
        let Some(compare) = compare.filter(|compare| compare.id == id) else {
            return;
        };
        let stream = usize::from(place != compare.source);
        if !compare.streams[stream].take(page) {
            let m = self.groups[g].replicas[place].member;
            self.refused(m, "it listed its blocks out of order".to_string());
            return self.compare_lost(g, target);
        }
        self.touch_catch_up(g);
    }

    /// The comparison can't go on: it starts anew.
    pub(super) fn compare_lost(&mut self, g: usize, target: usize) {
        self.groups[g].replicas[target].compare = None;
        self.arm_retry(g);
    }

    /// All members are there, and yet nobody holds what another lacks, as far as is known: what is known is coarser than
    /// what is. Comparing them all settles it; for that, what is in flight comes to its end first.
    fn drain_if_stalled(&mut self, g: usize) {
        let group = &self.groups[g];
        let idle = group.in_sync.and(group.joined()).iter().all(|place| {
            let replica = &group.replicas[place];
            let paused = replica.copy_paused.is_some_and(|until| self.now < until);
            !replica.behind && !paused && replica.jobs.is_empty() && replica.compare.is_none()
        });
        let enough = self.settings.seal_quorum(group.in_sync.len());
        let idle = idle && group.in_sync.and(group.joined()).len() >= enough.max(2);
        if idle && self.may_be_repaired_soon(g) {
            return self.arm_retry(g);
        }
        let group = &mut self.groups[g];
        if idle && group.phase == GroupPhase::Serving && !group.draining {
            group.draining = true;
            self.after_drain(g);
        }
    }

    /// Compares the members of a group that was to stop serving, once nothing is in flight.
    pub(super) fn after_drain(&mut self, g: usize) {
        if !self.groups[g].draining {
            return;
        }
        self.queue_idle_reads(g);
        let group = &self.groups[g];
        if !group.reads.is_empty() || !group.writes.is_empty() {
            return;
        }
        let group = &mut self.groups[g];
        (group.phase, group.draining, group.enough_since) = (GroupPhase::Waiting, false, None);
        self.update_phase(g);
    }
}
