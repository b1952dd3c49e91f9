//! The bytes of one connection: frames out of what comes in, and pieces of memory to be sent.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use bytes::Bytes;
use cairn_proto::codec::DecodeError;
use cairn_proto::frame::{EncodedFrame, FrameError, FrameHeader};
use cairn_proto::limits::FRAME_HEADER_BYTES;
use cairn_proto::message::Envelope;
use cairn_proto::time::Time;

use super::budget::{Budget, BudgetBuf};
use super::limits::{DriverLimits, SEND_PIECES_MAX, STAGE_BYTES_PEER, STAGE_BYTES_STRANGER};
use super::ring::ReceiveBufs;
use crate::host::PeerId;

/// Type number of a hello, the only frame that a stranger may send.
const HELLO_KIND: u8 = 0x01;

/// What comes next out of what came in.
#[derive(Debug)]
pub(super) enum Parsed {
    /// A whole frame.
    Frame(Envelope),
    /// Bytes that are no frame. Nothing more is to be parsed.
    Bad(FrameError),
    /// More must come in.
    More,
    /// There is no memory for the data part of the next frame: try again later.
    NoMemory,
}

/// A frame whose data part has begun.
#[derive(Debug)]
struct Begun {
    header: FrameHeader,
    head: Vec<u8>,
}

/// The receiving side of a connection.
#[derive(Debug)]
pub(super) struct Inbox {
    /// `None` while they are in flight.
    bufs: Option<ReceiveBufs>,
    /// The stage is parsed up to here.
    parsed: usize,
    begun: Option<Begun>,
    /// Whether the peer has said hello and been accepted.
    is_peer: bool,
    /// When the first byte of the frame that is not complete yet came.
    since: Option<Time>,
}

impl Inbox {
    pub(super) fn new() -> Inbox {
        Inbox {
            bufs: Some(ReceiveBufs {
                data: None,
                stage: vec![0; STAGE_BYTES_STRANGER].into(),
                filled: 0,
            }),
            parsed: 0,
            begun: None,
            is_peer: false,
            since: None,
        }
    }

    /// The peer has said hello and was accepted: it may send everything, and gets room for it.
    pub(super) fn greeted(&mut self) {
        self.is_peer = true;
    }

    /// Whether nothing is being received.
    pub(super) fn is_idle(&self) -> bool {
        self.bufs.is_some()
    }

    /// Takes what came in, so many bytes.
    pub(super) fn received(&mut self, now: Time, mut bufs: ReceiveBufs, mut count: usize) {
        self.since = self.since.or(Some(now));
        if let Some((buf, filled)) = &mut bufs.data {
            let for_data = count.min(buf.len() - *filled);
            *filled += for_data;
            count -= for_data;
        }
        bufs.filled += count;
        assert!(bufs.filled <= bufs.stage.len(), "more came in than there was room");
        self.bufs = Some(bufs);
    }

    /// The buffers to receive into, with room in them.
    pub(super) fn take_bufs(&mut self) -> ReceiveBufs {
        let mut bufs = self.bufs.take().expect("nothing is being received");
        let rest = self.parsed..bufs.filled;
        let wanted = if self.is_peer {
            STAGE_BYTES_PEER
        } else {
            STAGE_BYTES_STRANGER
        };
        if bufs.stage.len() < wanted {
            let mut stage = vec![0; wanted].into_boxed_slice();
            stage[..rest.len()].copy_from_slice(&bufs.stage[rest.clone()]);
            bufs.stage = stage;
        } else {
            bufs.stage.copy_within(rest.clone(), 0);
        }
        bufs.filled = rest.len();
        self.parsed = 0;
        bufs
    }

    /// What comes next. To be called until it needs more.
    pub(super) fn parse(&mut self, now: Time, budget: &Budget) -> Parsed {
        let Some(bufs) = &mut self.bufs else {
            return Parsed::More;
        };
        if self.begun.is_none() {
            let waiting = &bufs.stage[self.parsed..bufs.filled];
            if waiting.is_empty() {
                self.since = None;
            }
            let (header, head_bytes) = match complete_head(waiting, self.is_peer) {
                Ok(Some(complete)) => complete,
                Ok(None) => return Parsed::More,
                Err(error) => return Parsed::Bad(error),
            };
            let (head, rest) = waiting.split_at(head_bytes);
            let data_bytes = header.data_bytes as usize;
            if data_bytes == 0 {
                let parsed = envelope(&header, head, Bytes::new());
                self.parsed += head_bytes;
                self.since = Some(now);
                return parsed;
            }
            let Some(mut buf) = budget.take(data_bytes) else {
                // The wait is not the peer's fault.
                self.since = None;
                return Parsed::NoMemory;
            };
            let here = rest.len().min(data_bytes);
            buf[..here].copy_from_slice(&rest[..here]);
            let head = head.to_vec();
            self.begun = Some(Begun { header, head });
            bufs.data = Some((buf, here));
            self.parsed += head_bytes + here;
        }
        let complete = |(buf, filled): &mut (BudgetBuf, usize)| *filled == buf.len();
        let Some((buf, _)) = bufs.data.take_if(complete) else {
            return Parsed::More;
        };
        let begun = self.begun.take().expect("its head came first");
        self.since = Some(now);
        envelope(&begun.header, &begun.head, buf.freeze())
    }

    /// Whether a frame has begun and takes too long.
    pub(super) fn is_late(&self, now: Time, limits: &DriverLimits) -> bool {
        let timeout = if self.begun.is_some() {
            limits.frame_timeout
        } else {
            limits.head_timeout
        };
        self.since.is_some_and(|since| now.saturating_since(since) >= timeout)
    }
}

/// The header at the front and the length of the whole head, if it is complete.
fn complete_head(bytes: &[u8], is_peer: bool) -> Result<Option<(FrameHeader, usize)>, FrameError> {
    let Some(start) = bytes.first_chunk::<FRAME_HEADER_BYTES>() else {
        return Ok(None);
    };
    let header = FrameHeader::decode(start)?;
    let head_bytes = FRAME_HEADER_BYTES + header.control_bytes as usize;
    // Strangers get no memory: a hello is short and has no data.
    if !is_peer && (header.kind != HELLO_KIND || header.data_bytes > 0 || head_bytes > STAGE_BYTES_STRANGER) {
        return Err(FrameError::Header(DecodeError::Invalid(
            "type: the first frame is a hello",
        )));
    }
    Ok((bytes.len() >= head_bytes).then_some((header, head_bytes)))
}

fn envelope(header: &FrameHeader, head: &[u8], data: Bytes) -> Parsed {
    match Envelope::decode(header, head, data) {
        Ok(envelope) => Parsed::Frame(envelope),
        Err(error) => Parsed::Bad(error),
    }
}

/// The sending side of a connection.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    pieces: VecDeque<Bytes>,
    bytes: usize,
    in_flight: bool,
    discarded: bool,
    /// When something was sent last, or the first piece came.
    progress: Time,
}

impl Outbox {
    /// Queues a frame.
    pub(super) fn push(&mut self, now: Time, frame: EncodedFrame) {
        if self.bytes == 0 {
            self.progress = now;
        }
        self.bytes += frame.len();
        self.pieces.push_back(frame.head);
        self.pieces
            .extend(frame.data.into_iter().filter(|piece| !piece.is_empty()));
    }

    /// Bytes that are not sent yet.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// What to send next, if something is to be sent and nothing is being sent.
    pub(super) fn next(&mut self) -> Option<Vec<Bytes>> {
        if self.in_flight || self.pieces.is_empty() {
            return None;
        }
        self.in_flight = true;
        Some(self.pieces.iter().take(SEND_PIECES_MAX).cloned().collect())
    }

    /// The same, to be sent at once or not at all: as many pieces as there is room for in `slices`. Returns how many those are.
    pub(super) fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        if self.in_flight {
            return 0;
        }
        let used = slices.len().min(self.pieces.len());
        for (slot, piece) in slices.iter_mut().zip(&self.pieces) {
            *slot = IoSlice::new(piece);
        }
        used
    }

    /// So many bytes of it are sent. Returns how many of those were still waited for.
    pub(super) fn sent(&mut self, now: Time, mut count: usize) -> usize {
        self.in_flight = false;
        self.progress = now;
        if self.discarded {
            return 0;
        }
        let sent = count;
        assert!(count <= self.bytes, "{count} bytes were sent of {}", self.bytes);
        self.bytes -= count;
        while count > 0 {
            let first = self.pieces.front_mut().expect("there are as many bytes");
            if first.len() <= count {
                count -= first.len();
                self.pieces.pop_front();
            } else {
                let _ = first.split_to(count);
                count = 0;
            }
        }
        sent
    }

    /// Whether nothing is being sent.
    pub(super) fn is_idle(&self) -> bool {
        !self.in_flight
    }

    /// Whether the peer takes nothing of it any more.
    pub(super) fn is_stuck(&self, now: Time, limits: &DriverLimits) -> bool {
        self.bytes > 0 && now.saturating_since(self.progress) >= limits.send_timeout
    }

    /// The connection is over: forgets what is not sent, also what is being sent, and says how many bytes that was.
    pub(super) fn discard(&mut self) -> usize {
        self.discarded = true;
        self.pieces.clear();
        std::mem::take(&mut self.bytes)
    }
}

/// One connection of the driver.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) socket: Rc<OwnedFd>,
    /// Who it is, for logs.
    pub(super) address: String,
    /// What the host calls it, if it was made to another device.
    pub(super) peer: Option<PeerId>,
    pub(super) inbox: Inbox,
    pub(super) outbox: Outbox,
    /// The host holds back its requests, because its answers do not get out.
    pub(super) congested: bool,
    /// What came in waits for memory.
    pub(super) starved: bool,
    /// The host has closed it (or it is broken): what is to be sent is sent until then, then it is closed.
    pub(super) closing: Option<Time>,
    /// Its socket was shut down: it goes when nothing is in flight.
    pub(super) shut: bool,
}

impl Connection {
    pub(super) fn new(socket: OwnedFd, address: String) -> Connection {
        Connection {
            socket: Rc::new(socket),
            address,
            peer: None,
            inbox: Inbox::new(),
            outbox: Outbox::default(),
            congested: false,
            starved: false,
            closing: None,
            shut: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use cairn_proto::buffer::BlockBuf;
    use cairn_proto::checksum::range_checksums;
    use cairn_proto::frame::Class;
    use cairn_proto::ids::*;
    use cairn_proto::limits::BLOCK_BYTES;
    use cairn_proto::message::*;
    use cairn_proto::units::BlockRange;
    use proptest::prelude::*;

    use super::*;

    fn write(correlation: u64, blocks: u32) -> Envelope {
        let holder = Holder {
            volume: VolumeId(1),
            generation: Generation::new(1).unwrap(),
        };
        let range = BlockRange::new(ChunkIndex(0), 0, blocks.max(1)).unwrap();
        let data = if blocks == 0 {
            WriteData::Zero
        } else {
            let bytes = BlockBuf::copied_from(&vec![correlation as u8; range.bytes()]).freeze();
            let checksums = range_checksums(holder.volume, range, &bytes);
            WriteData::Data { bytes, checksums }
        };
        let write = Write {
            holder,
            group: GroupIndex(0),
            layer: Layer(0),
            range,
            version: Version::new(holder.generation, Seq::new(correlation).unwrap()),
            stable: Version::ZERO,
            data,
        };
        Envelope {
            class: Class::Repair,
            ..Envelope::new(Correlation(correlation), Message::Write(write))
        }
    }

    fn bytes_of(frame: EncodedFrame) -> Vec<u8> {
        let mut bytes = frame.head.to_vec();
        frame.data.iter().for_each(|piece| bytes.extend_from_slice(piece));
        bytes
    }

    /// Feeds as many bytes at a time as `chunks` says, as a socket would.
    fn feed(inbox: &mut Inbox, budget: &Budget, mut bytes: &[u8], chunks: &[usize]) -> Vec<Envelope> {
        let now = Time::from_nanos(1);
        let mut frames = Vec::new();
        let mut chunks = chunks.iter().cycle();
        while !bytes.is_empty() {
            let mut bufs = inbox.take_bufs();
            let mut into = *chunks.next().expect("it goes round");
            let mut count = 0;
            if let Some((buf, filled)) = &mut bufs.data {
                let part = into.min(buf.len() - *filled).min(bytes.len());
                buf[*filled..*filled + part].copy_from_slice(&bytes[..part]);
                (bytes, into, count) = (&bytes[part..], into - part, part);
            }
            let room = bufs.stage.len() - bufs.filled;
            assert!(room > 0, "there is always room");
            let part = into.min(room).min(bytes.len());
            bufs.stage[bufs.filled..bufs.filled + part].copy_from_slice(&bytes[..part]);
            bytes = &bytes[part..];
            inbox.received(now, bufs, count + part);
            loop {
                match inbox.parse(now, budget) {
                    Parsed::Frame(envelope) => frames.push(envelope),
                    Parsed::More => break,
                    other => panic!("{other:?}"),
                }
            }
        }
        frames
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn frames_come_out_as_they_went_in_however_they_are_cut(
            sizes in prop::collection::vec(0u32..20, 1..12),
            chunks in prop::collection::vec(1usize..30_000, 1..6),
        ) {
            let sent: Vec<_> = sizes.iter().zip(1..).map(|(blocks, i)| write(i, *blocks)).collect();
            let stream: Vec<u8> = sent.iter().flat_map(|envelope| bytes_of(envelope.encode())).collect();
            let budget = Budget::new(1 << 20);
            let mut inbox = Inbox::new();
            inbox.greeted();
            let got = feed(&mut inbox, &budget, &stream, &chunks);
            for envelope in &got {
                if let Message::Write(Write { data: WriteData::Data { bytes, .. }, .. }) = &envelope.message {
                    prop_assert!(cairn_proto::buffer::is_aligned(bytes));
                }
            }
            prop_assert_eq!(got, sent);
            prop_assert_eq!(budget.used(), 0);
            prop_assert!(!inbox.is_late(Time::MAX, &DriverLimits::default()));
        }

        #[test]
        fn pieces_go_out_in_order_however_they_are_taken(
            sizes in prop::collection::vec(0u32..3, 1..8),
            counts in prop::collection::vec(1usize..5000, 1..5),
        ) {
            let mut outbox = Outbox::default();
            let mut expected = Vec::new();
            for (blocks, i) in sizes.iter().zip(1..) {
                let frame = write(i, *blocks).encode();
                expected.extend(bytes_of(frame.clone()));
                outbox.push(Time::ZERO, frame);
            }
            let mut got = Vec::new();
            for count in counts.iter().cycle() {
                let Some(pieces) = outbox.next() else { break };
                prop_assert!(outbox.next().is_none(), "one send at a time");
                let pieces: Vec<u8> = pieces.concat();
                let count = (*count).min(pieces.len());
                got.extend_from_slice(&pieces[..count]);
                outbox.sent(Time::ZERO, count);
            }
            prop_assert_eq!(got, expected);
            prop_assert_eq!(outbox.bytes(), 0);
        }

        #[test]
        fn garbage_is_refused_and_never_panics(garbage in prop::collection::vec(any::<u8>(), 0..5000)) {
            let budget = Budget::new(1 << 20);
            for is_peer in [false, true] {
                let mut inbox = Inbox::new();
                inbox.is_peer = is_peer;
                let mut bufs = inbox.take_bufs();
                let count = garbage.len().min(bufs.stage.len());
                bufs.stage[..count].copy_from_slice(&garbage[..count]);
                inbox.received(Time::ZERO, bufs, count);
                let parsed = inbox.parse(Time::ZERO, &budget);
                prop_assert!(matches!(parsed, Parsed::Bad(_) | Parsed::More), "{:?}", parsed);
            }
        }
    }

    fn stage(inbox: &mut Inbox, now: Time, bytes: &[u8]) {
        let mut bufs = inbox.take_bufs();
        let filled = bufs.filled;
        bufs.stage[filled..filled + bytes.len()].copy_from_slice(bytes);
        inbox.received(now, bufs, bytes.len());
    }

    #[test]
    fn what_is_being_sent_when_the_connection_ends_is_forgotten() {
        let mut outbox = Outbox::default();
        outbox.push(Time::ZERO, write(1, 1).encode());
        let (waiting, pieces) = (outbox.bytes(), outbox.next().unwrap());
        assert_eq!(outbox.discard(), waiting);
        assert!(!outbox.is_idle());
        assert_eq!(outbox.sent(Time::ZERO, pieces.concat().len()), 0);
        assert!(outbox.is_idle());
        assert!(outbox.next().is_none());
    }

    #[test]
    fn a_stranger_gets_no_memory_for_anything_but_a_hello() {
        let mut inbox = Inbox::new();
        stage(&mut inbox, Time::ZERO, &write(1, 1).encode().head);
        let budget = Budget::new(1 << 20);
        let parsed = inbox.parse(Time::ZERO, &budget);
        assert!(matches!(parsed, Parsed::Bad(FrameError::Header(_))), "{parsed:?}");
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn without_memory_a_frame_waits_and_is_not_late() {
        let mut inbox = Inbox::new();
        inbox.greeted();
        let budget = Budget::new(BLOCK_BYTES);
        let held = budget.take(BLOCK_BYTES);
        stage(&mut inbox, Time::ZERO, &bytes_of(write(1, 1).encode()));
        assert!(matches!(inbox.parse(Time::ZERO, &budget), Parsed::NoMemory));
        assert!(!inbox.is_late(Time::MAX, &DriverLimits::default()));
        drop(held);
        assert!(matches!(inbox.parse(Time::ZERO, &budget), Parsed::Frame(_)));
    }

    #[test]
    fn a_head_that_does_not_end_is_late() {
        let mut inbox = Inbox::new();
        let budget = Budget::new(BLOCK_BYTES);
        assert!(!inbox.is_late(Time::MAX, &DriverLimits::default()), "nothing has begun");
        stage(&mut inbox, Time::ZERO, &write(1, 0).encode().head[..20]);
        assert!(matches!(inbox.parse(Time::ZERO, &budget), Parsed::More));
        let limits = DriverLimits::default();
        assert!(!inbox.is_late(Time::ZERO, &limits));
        stage(&mut inbox, Time::ZERO + limits.head_timeout / 2, &[0; 1]);
        let end = Time::ZERO + limits.head_timeout;
        assert!(inbox.is_late(end, &limits), "a byte now and then does not help");
    }
}
