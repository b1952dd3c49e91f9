//! Volumes: what an export asks is split into pieces that lie in one chunk and fit one message, put in order where pieces
//! overlap, and merged where blocks are written in part (rule 15).
//!
//! Reading order: [`api`] (the seam to exports), `piece` (splitting), `order` (overlaps), then this file.

pub mod api;
pub mod limits;
mod order;
mod piece;

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use cairn_proto::block::Content;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::checksum::range_checksums;
use cairn_proto::ids::VolumeId;
use cairn_proto::limits::{BLOCK_BYTES, CHUNK_BYTES, SECTOR_BYTES};
use cairn_proto::replication::{OpError, OpToken, Operation, Outcome, ReadOutcome};
use cairn_proto::units::BlockRange;

use self::api::{OP_BYTES_MAX, OpId, STATUS_EXTENTS_MAX, StatusExtent, VolumeError, VolumeOp, VolumeReply};
use self::limits::{STATUS_CHUNKS_MAX, VolumeLimits};
use self::order::Order;
use self::piece::{Span, Work};

/// The page that all holes share.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// What the layer wants done.
#[derive(Clone, Debug)]
pub enum Output {
    /// Give this to the coordinator.
    Start(OpToken, Operation),
    /// Give this to the export.
    Reply(OpId, Result<VolumeReply, VolumeError>),
}

/// The data path of one volume above replication.
pub struct VolumeLayer {
    volume: VolumeId,
    size: u64,
    limits: VolumeLimits,
    /// Operations without a permit, in order.
    waiting: VecDeque<(OpId, VolumeOp)>,
    ops: BTreeMap<u64, Op>,
    /// Operations with pieces that are not made yet, in order.
    unsplit: VecDeque<u64>,
    pieces: BTreeMap<u64, Piece>,
    tokens: BTreeMap<OpToken, Part>,
    order: Order,
    op_bytes: u64,
    next: u64,
    output: VecDeque<Output>,
    /// Why nothing is served any more.
    closed: Option<VolumeError>,
}

/// An operation that has its permit.
struct Op {
    id: OpId,
    work: Work,
    start: u64,
    end: u64,
    /// What is not made into pieces yet starts here.
    at: u64,
    permit_bytes: u64,
    /// Pieces made so far, and those that have not ended.
    made: usize,
    active: usize,
    error: Option<VolumeError>,
    /// Results of reads, by piece.
    read: Vec<Vec<Bytes>>,
    /// Results of block status, by piece.
    status: Vec<Vec<(u32, bool)>>,
}

/// A piece of an operation.
struct Piece {
    op: u64,
    /// Which of the operation's pieces.
    index: usize,
    span: Span,
    /// Partial blocks that are being read: how many, and what they held.
    reading: usize,
    before: Vec<(BlockRange, Option<Bytes>)>,
}

/// What a coordinator's operation is for.
#[derive(Clone, Copy, Debug)]
enum Part {
    /// The piece itself.
    Whole(u64),
    /// The read of one of its partial blocks.
    Before(u64, BlockRange),
}

impl VolumeLayer {
    /// A volume of so many bytes.
    pub fn new(volume: VolumeId, size: u64, limits: VolumeLimits) -> VolumeLayer {
        VolumeLayer {
            volume,
            size,
            limits,
            waiting: VecDeque::new(),
            ops: BTreeMap::new(),
            unsplit: VecDeque::new(),
            pieces: BTreeMap::new(),
            tokens: BTreeMap::new(),
            order: Order::default(),
            op_bytes: 0,
            next: 0,
            output: VecDeque::new(),
            closed: None,
        }
    }

    /// The volume has grown. A smaller size is ignored.
    pub fn grow(&mut self, size: u64) {
        self.size = self.size.max(size);
    }

    /// Operations without a reply.
    pub fn operations(&self) -> usize {
        self.waiting.len() + self.ops.len()
    }

    /// Operations without a permit.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Bytes of permits that are taken.
    pub fn permit_bytes(&self) -> u64 {
        self.op_bytes
    }

    /// Whether an export should go on to submit. One that does not look is served all the same, at the cost of memory.
    pub fn has_room(&self) -> bool {
        self.waiting.len() < self.limits.waiting_max
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<Output> {
        self.output.pop_front()
    }

    /// Takes an operation.
    pub fn submit(&mut self, id: OpId, request: VolumeOp) {
        if let Some(error) = self.closed.clone() {
            return self.reply(id, Err(error));
        }
        if let Err(error) = self.check(&request) {
            return self.reply(id, Err(error));
        }
        match &request {
            // Whatever was answered is durable already.
            VolumeOp::Flush => return self.reply(id, Ok(VolumeReply::Done)),
            VolumeOp::Read { length: 0, .. } => return self.reply(id, Ok(VolumeReply::Read(Vec::new()))),
            VolumeOp::Write { data, .. } if data.is_empty() => return self.reply(id, Ok(VolumeReply::Done)),
            VolumeOp::Discard { length: 0, .. } | VolumeOp::WriteZeroes { length: 0, .. } => {
                return self.reply(id, Ok(VolumeReply::Done));
            }
            _ => {}
        }
        self.waiting.push_back((id, request));
        self.admit();
    }

    /// The coordinator has ended an operation.
    pub fn done(&mut self, token: OpToken, result: Result<Outcome, OpError>) {
        // After the end of everything nobody waits any more.
        let Some(part) = self.tokens.remove(&token) else { return };
        match (part, result) {
            (Part::Whole(piece), Ok(outcome)) => self.piece_done(piece, outcome),
            (Part::Before(piece, block), Ok(Outcome::Read(read))) => self.before_read(piece, block, &read),
            (Part::Before(..), Ok(outcome)) => panic!("a read ended as {outcome:?}"),
            (Part::Whole(piece), Err(error)) => self.end_piece(piece, Some(error)),
            (Part::Before(piece, _), Err(error)) => self.before_failed(piece, error),
        }
        self.pump();
        self.admit();
    }

    /// Ends everything with this error, now and from now on.
    pub fn close(&mut self, error: &VolumeError) {
        self.closed = Some(error.clone());
        self.tokens.clear();
        self.pieces.clear();
        self.unsplit.clear();
        self.order = Order::default();
        self.op_bytes = 0;
        self.output.retain(|output| matches!(output, Output::Reply(..)));
        let ops = std::mem::take(&mut self.ops).into_values().map(|op| op.id);
        let ids: Vec<OpId> = ops.chain(self.waiting.drain(..).map(|(id, _)| id)).collect();
        for id in ids {
            self.reply(id, Err(error.clone()));
        }
    }

    fn reply(&mut self, id: OpId, result: Result<VolumeReply, VolumeError>) {
        self.output.push_back(Output::Reply(id, result));
    }

    fn check(&self, request: &VolumeOp) -> Result<(), VolumeError> {
        let (offset, length) = match request {
            VolumeOp::Flush => return Ok(()),
            VolumeOp::Read { offset, length } => (*offset, u64::from(*length)),
            VolumeOp::Write { offset, data } => (*offset, data.len() as u64),
            VolumeOp::Discard { offset, length }
            | VolumeOp::WriteZeroes { offset, length, .. }
            | VolumeOp::BlockStatus { offset, length } => (*offset, *length),
        };
        let moves_data = matches!(request, VolumeOp::Read { .. } | VolumeOp::Write { .. });
        let sector = SECTOR_BYTES as u64;
        if !offset.is_multiple_of(sector) || !length.is_multiple_of(sector) {
            return Err(VolumeError::Invalid("offset and length must be multiples of 512 bytes"));
        }
        if offset.checked_add(length).is_none_or(|end| end > self.size) {
            return Err(VolumeError::Invalid("it goes past the end of the volume"));
        }
        if moves_data && length > u64::from(OP_BYTES_MAX) {
            return Err(VolumeError::Invalid("more than 32 MiB at once"));
        }
        if length == 0 && matches!(request, VolumeOp::BlockStatus { .. }) {
            return Err(VolumeError::Invalid("the status of no bytes was asked"));
        }
        Ok(())
    }

    /// Gives permits to who waits, in order.
    fn admit(&mut self) {
        while let Some((_, request)) = self.waiting.front() {
            let bytes = match request {
                VolumeOp::Read { length, .. } => u64::from(*length),
                VolumeOp::Write { data, .. } => data.len() as u64,
                _ => 0,
            };
            let room = self.ops.len() < self.limits.ops_max && self.op_bytes + bytes <= self.limits.op_bytes_max;
            if !room && !self.ops.is_empty() {
                return;
            }
            let (id, request) = self.waiting.pop_front().expect("looked at above");
            self.start_op(id, request, bytes);
            self.pump();
        }
    }

    fn start_op(&mut self, id: OpId, request: VolumeOp, permit_bytes: u64) {
        let (work, start, length) = match request {
            VolumeOp::Read { offset, length } => (Work::Read, offset, u64::from(length)),
            VolumeOp::Write { offset, data } => {
                let length = data.len() as u64;
                (Work::Write(data), offset, length)
            }
            VolumeOp::Discard { offset, length } => (Work::Discard, offset, length),
            VolumeOp::WriteZeroes {
                offset,
                length,
                may_discard,
            } => (if may_discard { Work::Discard } else { Work::Zero }, offset, length),
            VolumeOp::BlockStatus { offset, length } => {
                let chunk_start = offset / CHUNK_BYTES * CHUNK_BYTES;
                let most = chunk_start + STATUS_CHUNKS_MAX * CHUNK_BYTES - offset;
                (Work::Status, offset, length.min(most))
            }
            VolumeOp::Flush => unreachable!("answered at once"),
        };
        self.next += 1;
        self.op_bytes += permit_bytes;
        let op = Op {
            id,
            work,
            start,
            end: start + length,
            at: start,
            permit_bytes,
            made: 0,
            active: 0,
            error: None,
            read: Vec::new(),
            status: Vec::new(),
        };
        self.ops.insert(self.next, op);
        self.unsplit.push_back(self.next);
    }

    /// Makes pieces, as many as may be worked on.
    fn pump(&mut self) {
        let mut looks = self.unsplit.len();
        while looks > 0 && self.pieces.len() < self.limits.pieces_max {
            let Some(number) = self.unsplit.front().copied() else {
                return;
            };
            let op = self
                .ops
                .get_mut(&number)
                .expect("an operation with pieces to make has not ended");
            if op.at >= op.end || op.error.is_some() {
                self.unsplit.pop_front();
                looks -= 1;
                self.end_op(number);
                continue;
            }
            if op.active >= self.limits.pieces_of_op_max {
                // Its turn comes again when one of its pieces has ended; the others need not wait for that.
                self.unsplit.rotate_left(1);
                looks -= 1;
                continue;
            }
            let span = op.work.next_span(op.at, op.end);
            op.at = span.end();
            let index = op.made;
            op.made += 1;
            op.active += 1;
            match op.work {
                Work::Read => op.read.push(Vec::new()),
                Work::Status => op.status.push(Vec::new()),
                Work::Write(_) | Work::Zero | Work::Discard => {}
            }
            let exclusive = !matches!(op.work, Work::Read | Work::Status);
            self.next += 1;
            let piece = Piece {
                op: number,
                index,
                span,
                reading: 0,
                before: Vec::new(),
            };
            self.pieces.insert(self.next, piece);
            let piece = self.next;
            if self.order.enter(piece, span.blocks(), exclusive) {
                self.start_piece(piece);
            }
        }
    }

    /// A piece has its blocks for itself.
    fn start_piece(&mut self, number: u64) {
        let piece = self.pieces.get_mut(&number).expect("a piece whose turn it is");
        let (span, blocks) = (piece.span, piece.span.blocks());
        let op = &self.ops[&piece.op];
        match &op.work {
            Work::Read => self.start(Part::Whole(number), Operation::Read { range: blocks }),
            Work::Status => self.start(Part::Whole(number), Operation::Status { range: blocks }),
            Work::Write(_) | Work::Zero | Work::Discard => {
                let partial = span.partial_blocks();
                if partial.is_empty() {
                    return self.write_piece(number);
                }
                piece.reading = partial.len();
                for range in partial {
                    self.start(Part::Before(number, range), Operation::Read { range });
                }
            }
        }
    }

    fn start(&mut self, part: Part, operation: Operation) {
        self.next += 1;
        let token = OpToken(self.next);
        self.tokens.insert(token, part);
        self.output.push_back(Output::Start(token, operation));
    }

    /// Writes a piece, merged with what its partial blocks held.
    fn write_piece(&mut self, number: u64) {
        let piece = &self.pieces[&number];
        let op = &self.ops[&piece.op];
        let (span, range) = (piece.span, piece.span.blocks());
        let is_partial = !piece.before.is_empty();
        let operation = match &op.work {
            Work::Write(data) => {
                let from = (span.offset - op.start) as usize;
                let own = data.slice(from..from + span.length as usize);
                let bytes = if is_partial { merge(piece, Some(&own)) } else { own };
                let checksums = range_checksums(self.volume, range, &bytes);
                Operation::Write {
                    range,
                    bytes,
                    checksums,
                }
            }
            Work::Zero | Work::Discard if is_partial => {
                if piece.before.iter().all(|(_, before)| before.is_none()) {
                    // It reads as zeroes already.
                    return self.end_piece(number, None);
                }
                let bytes = merge(piece, None);
                let checksums = range_checksums(self.volume, range, &bytes);
                Operation::Write {
                    range,
                    bytes,
                    checksums,
                }
            }
            Work::Zero => Operation::Zero { range },
            Work::Discard => Operation::Discard { range },
            Work::Read | Work::Status => unreachable!("not a write"),
        };
        self.start(Part::Whole(number), operation);
    }

    /// What a partial block held is known.
    fn before_read(&mut self, number: u64, block: BlockRange, read: &ReadOutcome) {
        let piece = self.pieces.get_mut(&number).expect("a piece waits for its reads");
        let held = matches!(read.blocks[0].content, Content::Data(_)).then(|| read.bytes[0].slice(..BLOCK_BYTES));
        piece.before.push((block, held));
        self.one_read_less(number, None);
    }

    fn before_failed(&mut self, number: u64, error: OpError) {
        self.one_read_less(number, Some(error));
    }

    fn one_read_less(&mut self, number: u64, error: Option<OpError>) {
        let piece = self.pieces.get_mut(&number).expect("a piece waits for its reads");
        piece.reading -= 1;
        let (left, op) = (piece.reading, piece.op);
        if let Some(error) = error {
            let op = self.ops.get_mut(&op).expect("an operation outlives its pieces");
            op.error.get_or_insert(volume_error(error));
        }
        if left > 0 {
            return;
        }
        if self.ops[&op].error.is_some() {
            return self.end_piece(number, None);
        }
        self.write_piece(number);
    }

    fn piece_done(&mut self, number: u64, outcome: Outcome) {
        let piece = &self.pieces[&number];
        let op = self.ops.get_mut(&piece.op).expect("an operation outlives its pieces");
        match outcome {
            Outcome::Written => {}
            Outcome::Read(read) => op.read[piece.index] = trimmed(piece.span, &read),
            Outcome::Status(runs) => op.status[piece.index] = runs,
        }
        self.end_piece(number, None);
    }

    /// A piece has ended: its blocks go to who waits for them.
    fn end_piece(&mut self, number: u64, error: Option<OpError>) {
        let piece = self.pieces.remove(&number).expect("a piece ends once");
        let mut next = Vec::new();
        self.order.leave(number, piece.span.blocks(), |piece| next.push(piece));
        let op = self.ops.get_mut(&piece.op).expect("an operation outlives its pieces");
        op.active -= 1;
        if let Some(error) = error {
            op.error.get_or_insert(volume_error(error));
        }
        self.end_op(piece.op);
        for piece in next {
            self.start_piece(piece);
        }
    }

    /// Replies, if nothing of the operation is left to do.
    fn end_op(&mut self, number: u64) {
        let op = &self.ops[&number];
        let split = op.at >= op.end || op.error.is_some();
        if op.active > 0 || !split {
            return;
        }
        let op = self.ops.remove(&number).expect("looked at above");
        self.unsplit.retain(|other| *other != number);
        self.op_bytes -= op.permit_bytes;
        let result = match (op.error, &op.work) {
            (Some(error), _) => Err(error),
            (None, Work::Read) => Ok(VolumeReply::Read(op.read.into_iter().flatten().collect())),
            (None, Work::Status) => Ok(VolumeReply::BlockStatus(extents(op.start, op.end, &op.status))),
            (None, _) => Ok(VolumeReply::Done),
        };
        self.reply(op.id, result);
    }
}

fn volume_error(error: OpError) -> VolumeError {
    match error {
        OpError::Fenced => VolumeError::Fenced,
        OpError::NoSpace => VolumeError::NoSpace,
        OpError::Damaged => VolumeError::Damaged,
    }
}

/// The blocks of a piece: what partial blocks held, with the operation's bytes (or zeroes) over it.
fn merge(piece: &Piece, own: Option<&Bytes>) -> Bytes {
    let (span, range) = (piece.span, piece.span.blocks());
    let mut merged = BlockBuf::zeroed(range.count() as usize);
    for (block, before) in &piece.before {
        if let Some(before) = before {
            let at = (block.start() - range.start()) as usize * BLOCK_BYTES;
            merged[at..at + BLOCK_BYTES].copy_from_slice(before);
        }
    }
    let place = &mut merged[span.head()..span.head() + span.length as usize];
    match own {
        Some(own) => place.copy_from_slice(own),
        None => place.fill(0),
    }
    merged.freeze()
}

/// What was read of a piece, without the bytes around it: data as it came, holes from a shared page of zeroes.
fn trimmed(span: Span, read: &ReadOutcome) -> Vec<Bytes> {
    let mut pieces: Vec<Bytes> = Vec::new();
    let mut data = Pieces {
        pieces: &read.bytes,
        index: 0,
        offset: 0,
    };
    let same = |a: &cairn_proto::block::BlockState, b: &cairn_proto::block::BlockState| {
        matches!(a.content, Content::Data(_)) == matches!(b.content, Content::Data(_))
    };
    for run in read.blocks.chunk_by(same) {
        let bytes = run.len() * BLOCK_BYTES;
        if matches!(run[0].content, Content::Data(_)) {
            data.take(bytes, &mut pieces);
        } else {
            let mut left = bytes;
            while left > 0 {
                let count = left.min(ZEROES.len());
                pieces.push(Bytes::from_static(&ZEROES).slice(..count));
                left -= count;
            }
        }
    }
    cut(&mut pieces, span.head(), span.tail());
    pieces
}

/// Bytes that lie in pieces, taken from the front.
struct Pieces<'a> {
    pieces: &'a [Bytes],
    index: usize,
    offset: usize,
}

impl Pieces<'_> {
    fn take(&mut self, mut bytes: usize, out: &mut Vec<Bytes>) {
        while bytes > 0 {
            let piece = &self.pieces[self.index];
            let count = bytes.min(piece.len() - self.offset);
            if count > 0 {
                out.push(piece.slice(self.offset..self.offset + count));
            }
            self.offset += count;
            bytes -= count;
            if self.offset == piece.len() {
                (self.index, self.offset) = (self.index + 1, 0);
            }
        }
    }
}

/// Drops bytes at both ends; both are less than a block, and no piece is smaller than one.
fn cut(pieces: &mut [Bytes], head: usize, tail: usize) {
    if let Some(first) = pieces.first_mut() {
        *first = first.slice(head..);
    }
    if let Some(last) = pieces.last_mut() {
        *last = last.slice(..last.len() - tail);
    }
}

/// Runs of blocks as extents of bytes, within what was asked and as many as fit an answer.
fn extents(start: u64, end: u64, chunks: &[Vec<(u32, bool)>]) -> Vec<StatusExtent> {
    let mut at = start / BLOCK_BYTES as u64 * BLOCK_BYTES as u64;
    let mut extents: Vec<StatusExtent> = Vec::new();
    for (blocks, data) in chunks.iter().flatten().copied() {
        let run_end = at + u64::from(blocks) * BLOCK_BYTES as u64;
        let length = run_end.min(end).saturating_sub(at.max(start));
        at = run_end;
        let full = extents.len() == STATUS_EXTENTS_MAX;
        match extents.last_mut() {
            _ if length == 0 => {}
            Some(last) if last.data == data => last.length += length,
            _ if full => break,
            _ => extents.push(StatusExtent { length, data }),
        }
    }
    extents
}

#[cfg(test)]
mod tests;
