//! Writes (rules 12 to 14): to all members at once, acknowledged when a quorum has them durably; what a member lacks
//! afterwards is noted as bits.

use bytes::Bytes;

use super::api::{Action, GroupPhase, Notice, OpError, OpToken, Operation, Outcome};
use super::group::Role;
use super::no_space::Undo;
use super::{Coordinator, What, mask::Mask};
use crate::frame::Class;
use crate::ids::{Layer, Seq, Version};
use crate::message::{Message, Write, WriteData};
use crate::time::Time;
use crate::units::BlockRange;

/// Who is told how a write ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Waiter {
    /// The volume layer.
    Op(OpToken),
    /// The write that this one undoes a part of.
    Undo(u64),
}

/// A write that some member has not answered.
pub(super) struct WriteState {
    pub(super) waiter: Waiter,
    pub(super) layer: Layer,
    pub(super) range: BlockRange,
    pub(super) bytes: u64,
    /// When it was first sent.
    pub(super) began: Time,
    /// What is sent, byte-identical each time (rule 1). Gone once acknowledged: what a member lacks then is copied.
    pub(super) message: Option<Write>,
    pub(super) acknowledged: bool,
    /// Sent, on the connection that stands, and not answered.
    pub(super) pending: Mask,
    /// Not sent, or sent on a connection that is over.
    pub(super) owed: Mask,
    pub(super) durable: Mask,
    /// Answered that there is no space.
    pub(super) refused: Mask,
    /// Sent on a connection that is over: it may be applied, or still be.
    pub(super) doubtful: Mask,
    /// Whether a member that has left since took it, or may have: when that joins again, it may show what no other has.
    pub(super) left_with: bool,
    pub(super) undo: Option<Undo>,
}

impl WriteState {
    /// Members that may not have it yet.
    pub(super) fn awaited(&self) -> Mask {
        if self.acknowledged {
            self.pending
        } else {
            self.pending.or(self.owed).or(self.refused)
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.acknowledged && self.pending.is_empty()
    }
}

impl Coordinator {
    /// Starts a write of the volume layer.
    pub(super) fn start_operation_write(&mut self, g: usize, op: OpToken, operation: Operation) {
        let (range, data) = match operation {
            Operation::Write {
                range,
                bytes,
                checksums,
            } => (range, WriteData::Data { bytes, checksums }),
            Operation::Zero { range } => (range, WriteData::Zero),
            Operation::Discard { range } => (range, WriteData::Discard),
            Operation::Read { .. } | Operation::Status { .. } => unreachable!("not a write"),
        };
        let group = &self.groups[g];
        assert!(
            !group
                .writes
                .values()
                .any(|w| !w.acknowledged && w.range.overlaps(&range)),
            "a write to {range} was submitted while another one to it was in flight"
        );
        self.start_write(g, Waiter::Op(op), self.settings.layer, range, data);
    }

    /// Gives a write its version and sends it to whoever should have it.
    pub(super) fn start_write(&mut self, g: usize, waiter: Waiter, layer: Layer, range: BlockRange, data: WriteData) {
        let generation = self.holder.generation;
        let group = &mut self.groups[g];
        assert_eq!(group.phase, GroupPhase::Serving, "writes start in a served group only");
        let seq = group.next_seq;
        group.next_seq += 1;
        let number = Seq::new(seq).expect("an attachment ends long before 2^40 writes of a group");
        let bytes = match &data {
            WriteData::Data { bytes, .. } => bytes.len() as u64,
            WriteData::Zero | WriteData::Discard => 0,
        };
        let message = Write {
            holder: self.holder,
            group: group.index,
            layer,
            range,
            version: Version::new(generation, number),
            stable: group.stable,
            data,
        };
        let state = WriteState {
            waiter,
            layer,
            range,
            bytes,
            began: self.now,
            message: Some(message),
            acknowledged: false,
            pending: Mask::NONE,
            owed: group.writers(),
            durable: Mask::NONE,
            refused: Mask::NONE,
            doubtful: Mask::NONE,
            left_with: false,
            undo: None,
        };
        group.writes.insert(seq, state);
        group.open_writes += 1;
        self.send_write(g, seq);
    }

    /// Sends a write to the members that are owed it. One that is behind gets it only where the others make no quorum.
    pub(super) fn send_write(&mut self, g: usize, seq: u64) {
        let group = &self.groups[g];
        let Some(write) = group.writes.get(&seq) else { return };
        let Some(message) = write.message.as_ref().filter(|_| write.undo.is_none()) else {
            return;
        };
        let joined = group.joined();
        let behind = group.places(|replica| replica.behind);
        let mut to = write.owed.and(joined).minus(behind);
        if !group.is_write_quorum(&self.settings, to.or(write.pending).or(write.durable)) {
            to = write.owed.and(joined);
        }
        if to.is_empty() {
            return;
        }
        let (message, bytes) = (Message::Write(message.clone()), write.bytes);
        self.send(g, to, Class::Guest, message, What::Write { group: g, seq, bytes });
        let group = &mut self.groups[g];
        let write = group.writes.get_mut(&seq).expect("it was there");
        write.owed = write.owed.minus(to);
        write.pending = write.pending.or(to);
        for place in to.iter() {
            group.replicas[place].unanswered += 1;
        }
    }

    /// Sends what members are owed, after one came back or was lost.
    pub(super) fn send_open_writes(&mut self, g: usize) {
        let open: Vec<u64> = {
            let writes = self.groups[g].writes.iter();
            let open = writes.filter(|(_, write)| !write.acknowledged && !write.owed.is_empty());
            open.map(|(seq, _)| *seq).collect()
        };
        for seq in open {
            self.send_write(g, seq);
        }
    }

    /// A member has a write durably, or what superseded it.
    pub(super) fn write_durable(&mut self, g: usize, seq: u64, place: usize) {
        self.write_answered(g, place);
        let group = &mut self.groups[g];
        let Some(write) = group.writes.get_mut(&seq) else {
            return;
        };
        if !write.pending.remove(place) {
            return;
        }
        write.durable.insert(place);
        let (layer, range, bytes, acknowledged) = (write.layer, write.range, write.bytes, write.acknowledged);
        if acknowledged {
            let replica = &mut group.replicas[place];
            replica.lag_ops -= 1;
            replica.lag_bytes -= bytes;
        }
        group.has_now(place, layer, range);
        let complete = |place: usize| group.replicas[place].is_complete();
        if group.reads_wait || !group.writers().iter().all(complete) {
            // The member may be the one to copy from, or to read from.
            self.touch_catch_up(g);
        }
        self.settle_write(g, seq);
    }

    /// A member has answered a write request, however. One that was behind gets payloads again when it has answered
    /// nearly everything.
    pub(super) fn write_answered(&mut self, g: usize, place: usize) {
        let resume_at = self.limits.lag_ops_max / 8;
        let replica = &mut self.groups[g].replicas[place];
        replica.unanswered -= 1;
        if replica.behind && replica.unanswered <= resume_at {
            replica.behind = false;
            self.touch_catch_up(g);
        }
    }

    /// The connection on which a write was sent is over.
    pub(super) fn write_lost(&mut self, g: usize, seq: u64, place: usize) {
        let group = &mut self.groups[g];
        group.replicas[place].unanswered -= 1;
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
        } else {
            write.owed.insert(place);
            write.doubtful.insert(place);
        }
        self.touch_catch_up(g);
        self.settle_write(g, seq);
    }

    /// Looks whether a write has come to its end.
    pub(super) fn settle_write(&mut self, g: usize, seq: u64) {
        let group = &self.groups[g];
        let Some(write) = group.writes.get(&seq) else {
            return;
        };
        if !write.acknowledged {
            // What is being written over again ends when that is done, even if a smaller quorum has it by now.
            let undone = matches!(write.undo, Some(Undo::Writing { .. }));
            if self.is_durable(g, write.durable) && !undone {
                self.acknowledge(g, seq);
            } else if !write.refused.is_empty() {
                self.settle_refused(g, seq);
            }
            return;
        }
        if write.is_over() {
            let group = &mut self.groups[g];
            group.writes.remove(&seq);
            group.advance_stable(self.holder.generation);
            self.touch_catch_up(g);
        }
    }

    /// Whether a write that these members have durably is to be acknowledged (rule 12).
    fn is_durable(&self, g: usize, durable: Mask) -> bool {
        let group = &self.groups[g];
        if self.limits.ack_at_one_copy() {
            return !durable.is_empty();
        }
        if self.limits.joiner_counted() {
            return durable.len() >= self.settings.write_quorum(group.in_sync.len());
        }
        group.is_write_quorum(&self.settings, durable)
    }

    fn acknowledge(&mut self, g: usize, seq: u64) {
        let group = &mut self.groups[g];
        let write = group.writes.get_mut(&seq).expect("the caller has it");
        assert!(
            self.fenced.is_none(),
            "nothing is acknowledged after a newer attachment was seen"
        );
        let (waiter, layer, range, bytes) = (write.waiter, write.layer, write.range, write.bytes);
        let began = write.began;
        write.acknowledged = true;
        write.message = None;
        write.undo = None;
        let (missed, pending) = (write.owed.or(write.refused), write.pending);
        group.open_writes -= 1;
        group.lost.remove(layer, range);
        for place in missed.iter() {
            group.miss(place, layer, range);
        }
        for place in pending.iter() {
            let replica = &mut self.groups[g].replicas[place];
            replica.lag_ops += 1;
            replica.lag_bytes += bytes;
            if replica.lag_ops > self.limits.lag_ops_max || replica.lag_bytes > self.limits.lag_bytes_max {
                self.fall_behind(g, place);
            }
        }
        if !pending.is_empty() {
            self.arm_health();
        }
        self.note_guest(false, range.count(), began);
        self.end_write(g, waiter, Ok(()));
        self.settle_write(g, seq);
        if !missed.is_empty() {
            self.touch_catch_up(g);
        }
    }

    /// Tells whoever waits for a write how it ended.
    pub(super) fn end_write(&mut self, g: usize, waiter: Waiter, result: Result<(), OpError>) {
        match waiter {
            Waiter::Op(op) => self.done(op, result.map(|()| Outcome::Written)),
            Waiter::Undo(of) => self.undone_part(g, of),
        }
        self.after_drain(g);
    }

    /// A member leaves too much unanswered: it gets no more payloads, and what it lacks is copied later.
    fn fall_behind(&mut self, g: usize, place: usize) {
        let group = &mut self.groups[g];
        let pending: Vec<(Layer, BlockRange)> = {
            let writes = group.writes.values();
            let late = writes.filter(|write| write.acknowledged && write.pending.contains(place));
            late.map(|write| (write.layer, write.range)).collect()
        };
        for (layer, range) in pending {
            group.miss(place, layer, range);
        }
        let replica = &mut group.replicas[place];
        assert_eq!(
            (replica.lag_ops, replica.lag_bytes),
            (0, 0),
            "everything late was turned into bits"
        );
        replica.behind = true;
        self.touch_catch_up(g);
        self.tell_behind(g, place);
    }

    /// Tells the log once that a member lacks something.
    pub(super) fn tell_behind(&mut self, g: usize, place: usize) {
        let group = &mut self.groups[g];
        let replica = &mut group.replicas[place];
        let told = replica.told_behind || replica.role != Role::InSync;
        if group.phase == GroupPhase::Serving && !told {
            replica.told_behind = true;
            let (group, device) = (group.index, self.members[replica.member].device);
            self.actions.push_back(Action::Notice(Notice::Behind { group, device }));
        }
    }
}

/// The content of one block of an answer's pieces.
pub(super) fn block_of(pieces: &[Bytes], index: usize) -> Option<Bytes> {
    let mut offset = index * crate::limits::BLOCK_BYTES;
    for piece in pieces {
        if offset < piece.len() {
            return Some(piece.slice(offset..offset + crate::limits::BLOCK_BYTES));
        }
        offset -= piece.len();
    }
    None
}
