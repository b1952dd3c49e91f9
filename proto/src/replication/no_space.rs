//! Writes that full members refuse.
//!
//! A write is never acknowledged below its quorum, and an error must not leave its blocks hanging between two contents: a
//! later read could return the new one from the member that took it, and then the old one. So the error is given only
//! when the write provably shows nowhere: nobody took it, or what it replaced was written over it again, durable on a
//! quorum, before anyone could read. Argument in DESIGN.md, "Full devices".

use super::api::{Action, Notice, OpError};
use super::mask::Mask;
use super::read::bad_blocks;
use super::write::{Waiter, block_of};
use super::{Coordinator, Timer, What};
use crate::block::{BlockState, Content};
use crate::buffer::BlockBuf;
use crate::checksum::Checksum;
use crate::frame::Class;
use crate::limits::BLOCK_BYTES;
use crate::message::{Message, Read, ReadAnswer, WriteData};
use crate::units::BlockRange;

/// Putting back what a write had replaced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Undo {
    /// What it had replaced is read from a member that refused it.
    Reading,
    /// It is written over it; so many parts are not durable yet.
    Writing {
        /// How many.
        left: usize,
    },
}

impl Coordinator {
    /// A member has no space for a write.
    pub(super) fn write_refused(&mut self, g: usize, seq: u64, place: usize) {
        self.write_answered(g, place);
        self.tell_full(g, place);
        let group = &mut self.groups[g];
        let Some(write) = group.writes.get_mut(&seq) else {
            return;
        };
        if !write.pending.remove(place) {
            return;
        }
        if write.acknowledged {
            let (layer, range, bytes) = (write.layer, write.range, write.bytes);
            let replica = &mut group.replicas[place];
            replica.lag_ops -= 1;
            replica.lag_bytes -= bytes;
            group.miss(place, layer, range);
            self.tell_behind(g, place);
            self.arm_retry(g);
        } else {
            write.refused.insert(place);
        }
        self.settle_write(g, seq);
    }

    /// Decides about a write that some member refused.
    pub(super) fn settle_refused(&mut self, g: usize, seq: u64) {
        let group = &self.groups[g];
        let write = &group.writes[&seq];
        let others = group.vouchers().minus(write.refused);
        if group.is_write_quorum(&self.settings, others) || !write.pending.is_empty() || write.undo.is_some() {
            // It may still get its quorum, or who may have it is about to be known.
            return;
        }
        let Waiter::Op(op) = write.waiter else {
            return self.arm_retry(g);
        };
        if write.durable.is_empty() && write.doubtful.is_empty() && !write.left_with {
            return self.give_up_write(g, seq, op);
        }
        let (layer, range) = (write.layer, write.range);
        let is_data = matches!(write.message.as_ref().map(|m| &m.data), Some(WriteData::Data { .. }));
        let others = group.writes.iter().filter(|(other, _)| **other != seq);
        let awaited = others
            .filter(|(_, write)| write.range.overlaps(&range))
            .fold(Mask::NONE, |mask, (_, write)| mask.or(write.awaited()));
        let untouched = write.refused.minus(write.doubtful).minus(awaited).and(group.readable());
        let holds = group.places(|replica| replica.joined && replica.holds(layer, range));
        let source = untouched.and(holds).iter().next();
        let Some(source) = source.filter(|_| is_data) else {
            // Nobody can say for sure what it had replaced: it goes on as a write that waits for its quorum.
            return self.arm_retry(g);
        };
        let read = Message::Read(Read {
            holder: self.holder,
            group: group.index,
            layer,
            range,
        });
        self.groups[g].writes.get_mut(&seq).expect("it was there").undo = Some(Undo::Reading);
        let what = What::UndoRead { group: g, seq };
        self.send(g, Mask::one(source), Class::Guest, read, what);
    }

    fn give_up_write(&mut self, g: usize, seq: u64, op: super::OpToken) {
        let group = &mut self.groups[g];
        group.writes.remove(&seq);
        group.open_writes -= 1;
        self.end_write(g, Waiter::Op(op), Err(OpError::NoSpace));
        self.touch_catch_up(g);
    }

    /// What a refused write had replaced was read: write it again, as newer than that write.
    pub(super) fn undo_read(&mut self, g: usize, seq: u64, answer: Option<ReadAnswer>) {
        let volume = self.settings.id;
        let Some(write) = self.groups[g].writes.get_mut(&seq) else {
            return;
        };
        if write.undo != Some(Undo::Reading) {
            return;
        }
        write.undo = None;
        let (layer, range) = (write.layer, write.range);
        let version = write.message.as_ref().expect("it is not acknowledged").version;
        let good = answer.filter(|answer| {
            bad_blocks(volume, range, answer).is_empty()
                && answer.blocks.len() == range.count() as usize
                && answer.blocks.iter().all(|block| block.version < version)
        });
        let Some(answer) = good else { return self.arm_retry(g) };
        let parts = parts_of(range, &answer);
        write.undo = Some(Undo::Writing { left: parts.len() });
        for (part, data) in parts {
            self.start_write(g, Waiter::Undo(seq), layer, part, data);
        }
    }

    /// A part of what a refused write had replaced is durable on a quorum again.
    pub(super) fn undone_part(&mut self, g: usize, seq: u64) {
        let write = self.groups[g].writes.get_mut(&seq).expect("it waits for its undoing");
        let Some(Undo::Writing { left }) = &mut write.undo else {
            panic!("write {seq} is not being undone: {:?}", write.undo);
        };
        *left -= 1;
        if *left > 0 {
            return;
        }
        let Waiter::Op(op) = write.waiter else {
            panic!("what puts back is never undone itself");
        };
        self.give_up_write(g, seq, op);
    }

    /// Refused writes and copies are tried again.
    pub(super) fn retry_group(&mut self, g: usize) {
        self.groups[g].retry_armed = false;
        for replica in &mut self.groups[g].replicas {
            replica.told_full = false;
        }
        for write in self.groups[g].writes.values_mut() {
            if !write.acknowledged && write.undo.is_none() {
                write.owed = write.owed.or(write.refused);
                write.refused = Mask::NONE;
            }
        }
        self.send_open_writes(g);
        self.retry_reads(g);
        self.update_phase(g);
        self.touch_catch_up(g);
    }

    pub(super) fn arm_retry(&mut self, g: usize) {
        if !self.groups[g].retry_armed {
            self.groups[g].retry_armed = true;
            self.timers
                .insert((self.now + self.limits.retry_pause, Timer::Group(g)));
        }
    }

    pub(super) fn tell_full(&mut self, g: usize, place: usize) {
        let replica = &mut self.groups[g].replicas[place];
        if !replica.told_full {
            replica.told_full = true;
            let device = self.members[replica.member].device;
            let group = self.groups[g].index;
            self.actions.push_back(Action::Notice(Notice::Full { group, device }));
        }
    }
}

/// Runs of one kind, as writes.
fn parts_of(range: BlockRange, answer: &ReadAnswer) -> Vec<(BlockRange, WriteData)> {
    let kind = |block: &BlockState| match block.content {
        Content::Absent => 0,
        Content::Zero => 1,
        Content::Data(_) => 2,
        Content::Damaged => unreachable!("checked before"),
    };
    let (mut parts, mut start, mut data_before) = (Vec::new(), 0, 0);
    for run in answer.blocks.chunk_by(|a, b| kind(a) == kind(b)) {
        let count = run.len();
        let part = BlockRange::new(range.chunk(), range.start() + start as u32, count as u32);
        let data = match run[0].content {
            Content::Absent => WriteData::Discard,
            Content::Zero => WriteData::Zero,
            _ => {
                let mut buffer = BlockBuf::zeroed(count);
                for i in 0..count {
                    let block = block_of(&answer.bytes, data_before + i).expect("as many as the states say");
                    buffer[i * BLOCK_BYTES..][..BLOCK_BYTES].copy_from_slice(&block);
                }
                data_before += count;
                WriteData::Data {
                    bytes: buffer.freeze(),
                    checksums: run.iter().map(checksum_of).collect(),
                }
            }
        };
        parts.push((part.expect("a part of a range"), data));
        start += count;
    }
    parts
}

fn checksum_of(block: &BlockState) -> Checksum {
    match block.content {
        Content::Data(checksum) => checksum,
        _ => unreachable!("only data has a checksum"),
    }
}
