//! The transmission: requests in, operations out; results in, replies out.

use cairn_proto::buffer::BlockBuf;
use cairn_proto::limits::BLOCK_BYTES;
use slab::Slab;

use super::handshake::{CloseReason, Negotiated};
use super::limits::{
    BYTES_IN_FLIGHT_MAX, DRAIN_BYTES_MAX, PAYLOAD_BYTES_MAX, QUEUED_PIECES_MAX, READ_AHEAD_BYTES,
    REQUESTS_IN_FLIGHT_MAX, STATUS_WINDOW_BYTES_MAX, STATUS_WINDOW_BYTES_MIN,
};
use super::reply::{Replier, ReplyShape};
use super::request::RequestHeader;
use super::wire::{REQUEST_BYTES, REQUEST_MAGIC, command, command_flag};
use crate::outbox::Outbox;
use crate::volume::api::{StatusExtent, VolumeError, VolumeOp, VolumeReply};

/// Pairs a result with its request: unique among the requests in flight of one connection, whatever the client's cookies
/// are.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RequestToken(pub usize);

/// What the input holds next.
#[derive(Clone, Debug)]
pub enum Input {
    /// An operation; give its result to [`Transmission::complete`].
    Request {
        /// Which.
        token: RequestToken,
        /// What.
        op: VolumeOp,
    },
    /// There is no more input: finish what is in flight, write what is queued if the client is still there, and close.
    End(CloseReason),
}

/// How much one connection may have in flight.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TransmissionLimits {
    /// Requests without an answer.
    pub requests: usize,
    /// Bytes of payload of requests without an answer and of answers not yet written. One request is always let in.
    pub bytes: u64,
    /// Pieces of answers not yet written.
    pub queued_pieces: usize,
}

impl Default for TransmissionLimits {
    fn default() -> TransmissionLimits {
        TransmissionLimits {
            requests: REQUESTS_IN_FLIGHT_MAX,
            bytes: BYTES_IN_FLIGHT_MAX,
            queued_pieces: QUEUED_PIECES_MAX,
        }
    }
}

enum State {
    Header,
    Payload {
        header: RequestHeader,
        data: BlockBuf,
        filled: usize,
    },
    Drain {
        remaining: usize,
    },
    Ended,
}

struct Pending {
    shape: ReplyShape,
    /// Its share of the bytes in flight.
    cost: u64,
}

/// One connection after its handshake.
///
/// Its input is read into [`read_target`](Transmission::read_target) and taken out with
/// [`next_input`](Transmission::next_input); its output waits in [`outbox`](Transmission::outbox).
pub struct Transmission {
    negotiated: Negotiated,
    limits: TransmissionLimits,
    state: State,
    ahead: ReadAhead,
    pending: Slab<Pending>,
    bytes_in_flight: u64,
    replier: Replier,
    outbox: Outbox,
    /// How far a block status looks ahead that wants a single extent.
    status_window: u32,
}

impl Transmission {
    /// Starts after a handshake; `rest` is what came behind it.
    pub fn new(negotiated: Negotiated, rest: &[u8], limits: TransmissionLimits) -> Transmission {
        let replier = Replier {
            structured: negotiated.structured,
        };
        Transmission {
            negotiated,
            limits,
            state: State::Header,
            ahead: ReadAhead::new(rest),
            pending: Slab::new(),
            bytes_in_flight: 0,
            replier,
            outbox: Outbox::default(),
            status_window: STATUS_WINDOW_BYTES_MIN,
        }
    }

    /// What was agreed in the handshake.
    pub fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }

    /// Where to read to: first the rest of a payload, straight into its aligned buffer (possibly empty), then what comes
    /// behind it. `None` while nothing more may be read: that is the back-pressure.
    pub fn read_target(&mut self) -> Option<(&mut [u8], &mut [u8])> {
        match &mut self.state {
            State::Header if self.ahead.filled().len() >= REQUEST_BYTES => None,
            State::Header | State::Drain { .. } => Some((&mut [], self.ahead.free())),
            State::Payload { header, data, filled } => {
                let length = header.length as usize;
                (*filled < length).then(|| (&mut data[*filled..length], self.ahead.free()))
            }
            State::Ended => None,
        }
    }

    /// That `count` bytes were read into the [`read_target`](Transmission::read_target), in its order.
    pub fn received(&mut self, count: usize) {
        let mut behind = count;
        if let State::Payload { header, filled, .. } = &mut self.state {
            let direct = count.min(header.length as usize - *filled);
            *filled += direct;
            behind -= direct;
        }
        self.ahead.extend(behind);
    }

    /// Takes the next thing out of the input. `None`: read more, or, when that is not allowed, wait for results to be
    /// given and written.
    pub fn next_input(&mut self) -> Option<Input> {
        loop {
            match &mut self.state {
                State::Header => {
                    let bytes = self.ahead.filled().first_chunk::<REQUEST_BYTES>()?;
                    let header = RequestHeader::parse(bytes);
                    if !self.admits(&header) {
                        return None;
                    }
                    self.ahead.take(REQUEST_BYTES);
                    if let Some(input) = self.start(header) {
                        return Some(input);
                    }
                }
                State::Payload { header, data, filled } => {
                    let length = header.length as usize;
                    let count = self.ahead.filled().len().min(length - *filled);
                    data[*filled..*filled + count].copy_from_slice(&self.ahead.filled()[..count]);
                    *filled += count;
                    self.ahead.take(count);
                    if *filled < length {
                        return None;
                    }
                    let State::Payload { header, data, .. } = std::mem::replace(&mut self.state, State::Header) else {
                        unreachable!("the state was just matched");
                    };
                    let data = data.freeze().slice(..length);
                    return Some(self.admit(
                        &header,
                        VolumeOp::Write {
                            offset: header.offset,
                            data,
                        },
                    ));
                }
                State::Drain { remaining } => {
                    let count = self.ahead.filled().len().min(*remaining);
                    *remaining -= count;
                    let rest = *remaining;
                    self.ahead.take(count);
                    if rest > 0 {
                        return None;
                    }
                    self.state = State::Header;
                }
                State::Ended => return None,
            }
        }
    }

    /// Queues the reply to a request.
    pub fn complete(&mut self, token: RequestToken, result: Result<VolumeReply, VolumeError>) {
        let pending = self.pending.remove(token.0);
        self.bytes_in_flight -= pending.cost;
        if let (ReplyShape::BlockStatus { one: true, .. }, Ok(VolumeReply::BlockStatus(extents))) =
            (pending.shape, &result)
        {
            self.learn_window(extents);
        }
        self.replier.reply(&mut self.outbox, pending.shape, result);
    }

    /// The client sends no more: what came of a request that is not whole is dropped.
    pub fn close_input(&mut self) {
        self.state = State::Ended;
    }

    /// Bytes of payload that this connection holds in memory.
    pub fn held_bytes(&self) -> u64 {
        let arriving = match &self.state {
            State::Payload { data, .. } => data.len() as u64,
            State::Header | State::Drain { .. } | State::Ended => 0,
        };
        self.bytes_in_flight + self.outbox.bytes() + arriving
    }

    /// How many requests have no result yet.
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// The requests that have no result yet.
    pub fn tokens(&self) -> impl Iterator<Item = RequestToken> {
        self.pending.iter().map(|(index, _)| RequestToken(index))
    }

    /// What is to be written.
    pub fn outbox(&mut self) -> &mut Outbox {
        &mut self.outbox
    }

    /// Whether the input has ended and everything that it asked for is answered and written.
    pub fn is_finished(&self) -> bool {
        matches!(self.state, State::Ended) && self.pending.is_empty() && self.outbox.is_empty()
    }

    /// Whether there is room for it. What it needs is taken before its payload is read.
    fn admits(&self, header: &RequestHeader) -> bool {
        let used = self.bytes_in_flight + self.outbox.bytes();
        self.pending.len() < self.limits.requests
            && self.outbox.pieces() < self.limits.queued_pieces
            && (used == 0 || used + cost(header) <= self.limits.bytes)
    }

    fn start(&mut self, header: RequestHeader) -> Option<Input> {
        if header.magic != REQUEST_MAGIC {
            return Some(self.end(CloseReason::BadMagic {
                place: "request",
                found: header.magic.into(),
            }));
        }
        if header.command == command::DISC {
            return Some(self.end(CloseReason::Finished));
        }
        let payload = if header.command == command::WRITE {
            header.length
        } else {
            0
        };
        if payload > DRAIN_BYTES_MAX {
            return Some(self.end(CloseReason::TooLong {
                what: "a write",
                length: payload,
            }));
        }
        let shape = self.shape(&header);
        match header.plan(&self.negotiated) {
            Err(refused) => {
                self.replier
                    .error(&mut self.outbox, shape.cookie(), refused.errno, refused.words);
                self.state = State::Drain {
                    remaining: payload as usize,
                };
                None
            }
            Ok(None) => {
                self.replier.done(&mut self.outbox, shape.cookie());
                None
            }
            Ok(Some(VolumeOp::Write { .. })) => {
                let data = BlockBuf::to_be_filled((payload as usize).div_ceil(BLOCK_BYTES));
                self.state = State::Payload {
                    header,
                    data,
                    filled: 0,
                };
                None
            }
            Ok(Some(op)) => Some(self.admit(&header, op)),
        }
    }

    fn admit(&mut self, header: &RequestHeader, mut op: VolumeOp) -> Input {
        let (shape, cost) = (self.shape(header), cost(header));
        if let (ReplyShape::BlockStatus { one: true, .. }, VolumeOp::BlockStatus { length, .. }) = (shape, &mut op) {
            *length = (*length).min(self.status_window.into());
        }
        self.bytes_in_flight += cost;
        let token = RequestToken(self.pending.insert(Pending { shape, cost }));
        Input::Request { token, op }
    }

    /// A client that wants one extent at a time, as QEMU does, always asks up to the end of what it copies. To look there
    /// each time would cost the square of the number of extents; so the look ahead follows the lengths that are found.
    fn learn_window(&mut self, extents: &[StatusExtent]) {
        let first = extents.first().map(|extent| extent.data);
        let run = extents.iter().take_while(|extent| Some(extent.data) == first);
        let found: u64 = run.map(|extent| extent.length).sum();
        let window = found
            .saturating_mul(4)
            .next_multiple_of(u64::from(STATUS_WINDOW_BYTES_MIN));
        self.status_window = u32::try_from(window).unwrap_or(STATUS_WINDOW_BYTES_MAX);
    }

    fn shape(&self, header: &RequestHeader) -> ReplyShape {
        let RequestHeader {
            cookie, offset, length, ..
        } = *header;
        match header.command {
            command::READ => {
                let whole = header.has(command_flag::DF);
                ReplyShape::Read {
                    cookie,
                    offset,
                    length,
                    whole,
                }
            }
            command::BLOCK_STATUS => {
                let one = header.has(command_flag::REQ_ONE);
                ReplyShape::BlockStatus { cookie, length, one }
            }
            _ => ReplyShape::Done { cookie },
        }
    }

    fn end(&mut self, reason: CloseReason) -> Input {
        self.state = State::Ended;
        Input::End(reason)
    }
}

/// The bytes of payload that a request holds in memory until its answer is written.
fn cost(header: &RequestHeader) -> u64 {
    match header.command {
        // One that is longer is refused, and holds nothing.
        command::READ | command::WRITE if header.length <= PAYLOAD_BYTES_MAX => header.length.into(),
        _ => 0,
    }
}

/// Bytes read ahead of the request that is being taken apart.
struct ReadAhead {
    buf: Box<[u8]>,
    start: usize,
    end: usize,
}

impl ReadAhead {
    fn new(rest: &[u8]) -> ReadAhead {
        let mut buf = vec![0; READ_AHEAD_BYTES.max(rest.len())].into_boxed_slice();
        buf[..rest.len()].copy_from_slice(rest);
        ReadAhead {
            buf,
            start: 0,
            end: rest.len(),
        }
    }

    fn filled(&self) -> &[u8] {
        &self.buf[self.start..self.end]
    }

    fn take(&mut self, count: usize) {
        assert!(
            count <= self.end - self.start,
            "{count} bytes taken of {}",
            self.end - self.start
        );
        self.start += count;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Room for more. It is only asked for while less than a header is left, so moving that to the front is cheap.
    fn free(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.buf.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.buf[self.end..]
    }

    fn extend(&mut self, count: usize) {
        assert!(
            count <= self.buf.len() - self.end,
            "{count} bytes read into {}",
            self.buf.len() - self.end
        );
        self.end += count;
    }
}

impl std::fmt::Debug for Transmission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transmission")
            .field("export", &self.negotiated.export)
            .field("in_flight", &self.pending.len())
            .field("bytes_in_flight", &self.bytes_in_flight)
            .field("queued_bytes", &self.outbox.bytes())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "transmission_tests.rs"]
mod tests;
