//! Reads (rules 16 and 17): from a member that holds the newest acknowledged version of every block, the fastest first;
//! hedged; verified; and returned only while enough members vouch that nobody else writes.

use std::time::Duration;

use bytes::Bytes;

use super::api::{GroupPhase, OpError, OpToken, Operation, Outcome, ReadOutcome, RequestId};
use super::mask::Mask;
use super::write::block_of;
use super::{Coordinator, Timer, What};
use crate::block::{BlockState, Content, Cursor};
use crate::checksum::block_checksum;
use crate::frame::Class;
use crate::ids::VolumeId;
use crate::limits::BLOCK_BYTES;
use crate::message::{Collect, Collected, Message, Read, ReadAnswer};
use crate::time::Time;
use crate::units::BlockRange;

/// A read that has not ended.
pub(super) struct ReadState {
    pub(super) op: OpToken,
    pub(super) range: BlockRange,
    /// The number of the first request that was sent after it began.
    pub(super) began: RequestId,
    /// Members that were asked and have not answered.
    pub(super) asked: Mask,
    /// Members that were asked and gave no good answer for all of it.
    pub(super) tried: Mask,
    /// Those of them on which some block of it is damaged; the others are asked again later.
    pub(super) damaged: Mask,
    /// When it was submitted to a group that is served.
    pub(super) submitted_at: Time,
    /// Answers that were not what their checksums say, from members that take the blocks for good.
    doubts: u8,
    pub(super) asked_at: Time,
    pub(super) hedge_at: Option<Time>,
    /// Block by block, once an answer had damaged blocks.
    good: Option<Vec<Option<(BlockState, Bytes)>>>,
    /// For a status: where to go on, and what is known so far.
    status: Option<StatusSoFar>,
    pub(super) result: Option<Result<Outcome, OpError>>,
}

/// Answers with a wrong checksum that a read asks the same member again for, before it asks others.
const DOUBTS_MAX: u8 = 3;

/// Why a member gave no answer to a read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ReadFailure {
    /// Its connection is over.
    Lost,
    /// It can't now.
    Later,
    /// Its device can't.
    Unreadable,
}

struct StatusSoFar {
    from: Cursor,
    runs: Vec<(u32, bool)>,
    /// The first block that is not in `runs`.
    next: u32,
}

impl StatusSoFar {
    fn new(range: BlockRange, layer: crate::ids::Layer) -> StatusSoFar {
        StatusSoFar {
            from: Cursor {
                chunk: range.chunk(),
                layer,
                block: range.start(),
            },
            runs: Vec::new(),
            next: range.start(),
        }
    }

    fn push(&mut self, until: u32, data: bool) {
        let count = until.saturating_sub(self.next);
        if count == 0 {
            return;
        }
        self.next = until;
        match self.runs.last_mut() {
            Some((last, kind)) if *kind == data => *last += count,
            _ => self.runs.push((count, data)),
        }
    }
}

impl Coordinator {
    pub(super) fn start_read(&mut self, g: usize, op: OpToken, operation: &Operation) {
        let range = operation.range();
        let layer = self.settings.layer;
        let group = &mut self.groups[g];
        assert_eq!(group.phase, GroupPhase::Serving, "reads start in a served group only");
        assert!(
            !group
                .writes
                .values()
                .any(|w| !w.acknowledged && w.range.overlaps(&range)),
            "a read of {range} was submitted while a write to it was in flight"
        );
        let status = matches!(operation, Operation::Status { .. }).then(|| StatusSoFar::new(range, layer));
        let read = group.next_read;
        group.next_read += 1;
        let lost = group.lost.intersects(layer, range);
        let state = ReadState {
            op,
            range,
            began: RequestId(self.next_request),
            asked: Mask::NONE,
            tried: Mask::NONE,
            damaged: Mask::NONE,
            doubts: 0,
            submitted_at: self.now,
            asked_at: self.now,
            hedge_at: None,
            good: None,
            status,
            result: (lost && matches!(operation, Operation::Read { .. })).then_some(Err(OpError::Damaged)),
        };
        group.reads.insert(read, state);
        if lost {
            self.finish_read(g, read);
        }
        self.ask_read(g, read);
    }

    /// Asks the fastest member that may answer and was not asked yet.
    pub(super) fn ask_read(&mut self, g: usize, read: u64) {
        let layer = self.settings.layer;
        let group = &self.groups[g];
        let Some(state) = group.reads.get(&read) else { return };
        if state.result.is_some() {
            return;
        }
        let mut holders = group.holders(layer, state.range);
        if self.limits.read_from_lagging() {
            let lagging = group.joined().and(group.in_sync).minus(holders);
            holders = if lagging.is_empty() { holders } else { lagging };
        }
        let candidates = holders.minus(state.tried).minus(state.asked);
        let fastest = candidates.iter().min_by_key(|place| {
            let member = &self.members[group.replicas[*place].member];
            (member.latency.expected_ns(), *place)
        });
        let Some(place) = fastest else {
            return self.read_out_of_members(g, read);
        };
        let first = state.asked.is_empty() && state.tried.is_empty();
        let (range, began) = (state.range, state.began);
        let from = state.status.as_ref().map(|status| status.from);
        if first {
            self.prepare_to_vouch(g, began, place);
        }
        let (holder, index) = (self.holder, self.groups[g].index);
        let message = match from {
            None => Message::Read(Read {
                holder,
                group: index,
                layer,
                range,
            }),
            Some(from) => Message::Collect(Collect {
                holder,
                group: index,
                from,
                to: Cursor::behind(layer, &range),
                above: crate::ids::Version::ZERO,
            }),
        };
        self.send(
            g,
            Mask::one(place),
            Class::Guest,
            message,
            What::Read { group: g, read },
        );
        let hedge_after = {
            let member = &self.members[self.groups[g].replicas[place].member];
            member.latency.hedge_after(&self.limits)
        };
        let state = self.groups[g].reads.get_mut(&read).expect("it was there");
        state.asked.insert(place);
        state.asked_at = self.now;
        if state.status.is_some() {
            // Pages of two members don't fit together, so a status is asked of one at a time.
            return;
        }
        if let Some(at) = state.hedge_at.replace(self.now + hedge_after) {
            self.timers.remove(&(at, Timer::Hedge(g, read)));
        }
        self.timers.insert((self.now + hedge_after, Timer::Hedge(g, read)));
    }

    /// Nobody is left to ask: if every member was, no good copy of some block exists.
    fn read_out_of_members(&mut self, g: usize, read: u64) {
        let group = &mut self.groups[g];
        let all = group.in_sync;
        let state = group.reads.get_mut(&read).expect("the caller has it");
        if all.minus(state.damaged).is_empty() && state.asked.is_empty() {
            state.result = Some(Err(OpError::Damaged));
            return self.finish_read(g, read);
        }
        group.reads_wait |= state.asked.is_empty();
    }

    /// The one that was asked takes unusually long.
    pub(super) fn hedge_read(&mut self, g: usize, read: u64) {
        let Some(state) = self.groups[g].reads.get_mut(&read) else {
            return;
        };
        state.hedge_at = None;
        if state.result.is_some() {
            return;
        }
        let (asked, since) = (state.asked, state.asked_at);
        let silent: Duration = self.now.saturating_since(since);
        for place in asked.iter() {
            let member = self.groups[g].replicas[place].member;
            self.members[member].latency.silent_for(silent);
        }
        self.ask_read(g, read);
    }

    /// Puts reads that nobody can answer back into the queue of operations that wait for the group.
    pub(super) fn queue_idle_reads(&mut self, g: usize) {
        let group = &mut self.groups[g];
        let idle = group
            .reads
            .iter()
            .filter(|(_, state)| state.asked.is_empty() && state.result.is_none());
        let idle: Vec<u64> = idle.map(|(read, _)| *read).collect();
        for read in idle {
            let state = group.reads.remove(&read).expect("it was there");
            if let Some(at) = state.hedge_at {
                self.timers.remove(&(at, Timer::Hedge(g, read)));
            }
            let range = state.range;
            let operation = match state.status {
                None => Operation::Read { range },
                Some(_) => Operation::Status { range },
            };
            group.queued.push_back((state.op, operation));
        }
    }

    /// Asks again for every read that nobody is asked for.
    pub(super) fn ask_idle_reads(&mut self, g: usize) {
        self.groups[g].reads_wait = false;
        let idle: Vec<u64> = {
            let reads = self.groups[g].reads.iter();
            let idle = reads.filter(|(_, state)| state.asked.is_empty() && state.result.is_none());
            idle.map(|(read, _)| *read).collect()
        };
        for read in idle {
            self.ask_read(g, read);
        }
        let held: Vec<u64> = self.groups[g].held_reads.iter().copied().collect();
        for read in held {
            self.finish_read(g, read);
        }
    }

    /// A member's answer to a read.
    pub(super) fn read_answered(&mut self, g: usize, read: u64, place: usize, answer: ReadAnswer) {
        let volume = self.settings.id;
        let Some(state) = self.groups[g].reads.get_mut(&read) else {
            return;
        };
        state.asked.remove(place);
        if state.result.is_some() {
            return;
        }
        if answer.blocks.len() != state.range.count() as usize {
            return self.read_failed(g, read, place, ReadFailure::Later);
        }
        let mut bad = bad_blocks(volume, state.range, &answer);
        if self.limits.answer_unverified() {
            bad.retain(|i| answer.blocks[*i as usize].content == Content::Damaged);
        }
        // The member has verified what it sent, so the way is to blame: it is asked again, and then others are. What a member
        // takes for good is never damaged because of what came of it here.
        let denied = |block: &u32| answer.blocks[*block as usize].content != Content::Damaged;
        if bad.iter().any(denied) && state.doubts < DOUBTS_MAX {
            state.doubts += 1;
            return self.ask_read(g, read);
        }
        if !bad.is_empty() && bad.iter().all(denied) {
            return self.read_failed(g, read, place, ReadFailure::Later);
        }
        if bad.is_empty() && state.good.is_none() {
            let (blocks, bytes) = (answer.blocks, answer.bytes);
            state.result = Some(Ok(Outcome::Read(ReadOutcome { blocks, bytes })));
            return self.finish_read(g, read);
        }
        self.merge_damaged(g, read, place, answer, &bad);
    }

    /// Puts the good blocks of several members together.
    fn merge_damaged(&mut self, g: usize, read: u64, place: usize, answer: ReadAnswer, bad: &[u32]) {
        let (layer, range) = (self.settings.layer, self.groups[g].reads[&read].range);
        for block in bad
            .iter()
            .filter(|block| answer.blocks[**block as usize].content == Content::Damaged)
        {
            let block = BlockRange::new(range.chunk(), range.start() + block, 1).expect("within the range");
            self.note_damage(g, place, layer, block);
        }
        self.touch_catch_up(g);
        let state = self.groups[g].reads.get_mut(&read).expect("the caller has it");
        let count = state.range.count() as usize;
        let good = state.good.get_or_insert_with(|| vec![None; count]);
        let mut data = 0;
        for (i, block) in answer.blocks.iter().enumerate() {
            let content = if let Content::Data(_) = block.content {
                data += 1;
                block_of(&answer.bytes, data - 1).unwrap_or_default()
            } else {
                Bytes::new()
            };
            if !bad.contains(&(i as u32)) && good[i].is_none() {
                good[i] = Some((*block, content));
            }
        }
        state.tried.insert(place);
        state.damaged.insert(place);
        if good.iter().any(Option::is_none) {
            return self.ask_read(g, read);
        }
        let blocks = good.iter().flatten().map(|(block, _)| *block).collect();
        let bytes = good.iter().flatten().map(|(_, bytes)| bytes.clone());
        let bytes = bytes.filter(|bytes| !bytes.is_empty()).collect();
        state.result = Some(Ok(Outcome::Read(ReadOutcome { blocks, bytes })));
        self.finish_read(g, read);
    }

    /// A page of states.
    pub(super) fn status_answered(&mut self, g: usize, read: u64, place: usize, page: &Collected) {
        let layer = self.settings.layer;
        let Some(state) = self.groups[g].reads.get_mut(&read) else {
            return;
        };
        state.asked.remove(place);
        if state.result.is_some() {
            return;
        }
        let (range, Some(status)) = (state.range, &mut state.status) else {
            return;
        };
        let from = status.from;
        for run in &page.runs {
            let Some(part) = run.range.intersection(&range).filter(|_| run.layer == layer) else {
                continue;
            };
            status.push(part.start(), false);
            status.push(
                part.end(),
                matches!(run.state.content, Content::Data(_) | Content::Damaged),
            );
        }
        let more = page.next.filter(|next| {
            (next.chunk, next.layer) == (range.chunk(), layer) && next.block < range.end() && *next > from
        });
        if let Some(next) = more {
            status.from = next;
            return self.ask_read(g, read);
        }
        status.push(range.end(), false);
        let runs = std::mem::take(&mut status.runs);
        state.result = Some(Ok(Outcome::Status(runs)));
        self.finish_read(g, read);
    }

    /// A member could not answer a read.
    pub(super) fn read_failed(&mut self, g: usize, read: u64, place: usize, failure: ReadFailure) {
        let layer = self.settings.layer;
        let Some(state) = self.groups[g].reads.get_mut(&read) else {
            return;
        };
        state.asked.remove(place);
        match failure {
            ReadFailure::Lost => {}
            ReadFailure::Later => state.tried.insert(place),
            ReadFailure::Unreadable => {
                state.tried.insert(place);
                state.damaged.insert(place);
            }
        }
        if let Some(status) = &mut state.status {
            // Pages of different members don't fit together.
            *status = StatusSoFar::new(state.range, layer);
        }
        if state.asked.is_empty() {
            self.ask_read(g, read);
        }
        if failure == ReadFailure::Later {
            self.arm_retry(g);
        }
    }

    /// Members that could not answer a while ago are asked again.
    pub(super) fn retry_reads(&mut self, g: usize) {
        for state in self.groups[g].reads.values_mut() {
            if state.asked.is_empty() {
                state.tried = state.damaged;
            }
        }
        self.ask_idle_reads(g);
    }

    /// Ends a read that has its result, if enough members vouch for it; asks them otherwise.
    pub(super) fn finish_read(&mut self, g: usize, read: u64) {
        let Some(state) = self.groups[g].reads.get(&read) else {
            return;
        };
        if state.result.is_none() {
            return;
        }
        let began = state.began;
        if !self.is_vouched(g, began) {
            self.groups[g].held_reads.insert(read);
            return self.ask_to_vouch(g, began, None);
        }
        assert!(
            self.fenced.is_none(),
            "nothing is read after a newer attachment was seen"
        );
        let group = &mut self.groups[g];
        group.held_reads.remove(&read);
        let state = group.reads.remove(&read).expect("it was there");
        if let Some(at) = state.hedge_at {
            self.timers.remove(&(at, Timer::Hedge(g, read)));
        }
        if state.status.is_none() {
            self.note_guest(true, state.range.count(), state.submitted_at);
        }
        self.done(state.op, state.result.expect("checked above"));
        self.renew_grants(g);
        self.after_drain(g);
    }
}

/// The blocks of an answer that can't be used: damaged at the member, or not what their checksum says.
pub(super) fn bad_blocks(volume: VolumeId, range: BlockRange, answer: &ReadAnswer) -> Vec<u32> {
    let mut bad = Vec::new();
    let mut data = answer.bytes.iter().flat_map(|piece| piece.chunks_exact(BLOCK_BYTES));
    for (block, i) in answer.blocks.iter().zip(0..range.count()) {
        let good = match block.content {
            Content::Absent | Content::Zero => true,
            Content::Damaged => false,
            Content::Data(checksum) => data
                .next()
                .is_some_and(|content| block_checksum(volume, range.volume_block(i), content) == checksum),
        };
        if !good {
            bad.push(i);
        }
    }
    bad
}
