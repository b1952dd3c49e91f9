//! What is fuzzed.

use bytes::Bytes;
use cairn_client::nbd::{ExportInfo, Refusal};
use cairn_client::nbd::{Handshake, HandshakeAction, Input, Negotiated, Transmission, TransmissionLimits};
use cairn_client::volume::api::{VolumeError, VolumeOp};
use cairn_proto::block::{BlockState, Content, Cursor, Run};
use cairn_proto::capability::{Capability, ClusterKey, Rights};
use cairn_proto::checksum::Checksum;
use cairn_proto::frame::FrameHeader;
use cairn_proto::ids::*;
use cairn_proto::limits::{BLOCK_BYTES, FRAME_HEADER_BYTES};
use cairn_proto::message::*;
use cairn_proto::units::{BlockRange, ByteSize};

use super::Target;

/// What is said on connections and command lines.
pub(super) const TARGETS: &[Target] = &[
    Target {
        name: "frame",
        what: "frames of the data plane: header, control part and data",
        cost: 1,
        corpus: frames,
        mend: mend_frame,
        run: run_frame,
    },
    Target {
        name: "nbd-handshake",
        what: "what an NBD client says before transmission",
        cost: 1,
        corpus: handshakes,
        mend: |_| (),
        run: run_handshake,
    },
    Target {
        name: "nbd-transmission",
        what: "what an NBD client says in transmission",
        cost: 1,
        corpus: transmissions,
        mend: |_| (),
        run: run_transmission,
    },
    Target {
        name: "size",
        what: "sizes as people write them",
        cost: 1,
        corpus: || {
            ["10GiB", "512M", "4096", "1 TiB", "0"]
                .map(|text| text.as_bytes().to_vec())
                .to_vec()
        },
        mend: |_| (),
        run: |input| {
            let text = String::from_utf8_lossy(input);
            if let Ok(size) = text.parse::<ByteSize>() {
                assert!(text.contains(|c: char| c.is_ascii_digit()), "{size:?} of `{text}`");
            }
        },
    },
];

fn frames() -> Vec<Vec<u8>> {
    let generation = Generation::new(3).expect("a small number");
    let holder = Holder {
        volume: VolumeId(7),
        generation,
    };
    let range = BlockRange::new(ChunkIndex(1), 16, 2).expect("within a chunk");
    let version = Version::new(generation, Seq::new(5).expect("a small number"));
    let data = BlockState {
        content: Content::Data(Checksum(9)),
        version,
    };
    let zero = BlockState {
        content: Content::Zero,
        version,
    };
    let blocks = |count: usize| Bytes::from(vec![1; count * BLOCK_BYTES]);
    let capability = Capability::grant(
        &ClusterKey([1; 32]),
        ClusterId([2; 16]),
        VolumeId(7),
        generation,
        Rights::Write,
    );
    let (group, layer) = (GroupIndex(2), Layer(0));
    let write = |data| {
        Message::Write(Write {
            holder,
            group,
            layer,
            range,
            version,
            stable: Version::ZERO,
            data,
        })
    };
    let messages = [
        Message::Hello(Hello {
            version_min: 1,
            version_max: 1,
            purpose: Purpose::Guest,
            features: features::NONE,
            cluster: ClusterId([2; 16]),
            device: DeviceId::default(),
            recovered: CommitSeq(1),
            commit: CommitSeq(2),
            client: ClientId([3; 16]),
            limits: PeerLimits::default(),
            capability: Some(capability),
        }),
        Message::Seal(Seal { capability }),
        Message::Join(Join {
            holder,
            group,
            role: ReplicaRole::InSync,
            epoch: Epoch(1),
        }),
        Message::Joined(Joined {
            holder,
            group,
            created: true,
            stable: version,
        }),
        Message::Confirm(Confirm { holder }),
        write(WriteData::Data {
            bytes: blocks(2),
            checksums: vec![Checksum(1), Checksum(2)],
        }),
        write(WriteData::Zero),
        Message::Durable(Durable::default()),
        Message::Copy(Copy {
            holder,
            group,
            layer,
            range,
            source: CopySource::Resync,
            blocks: vec![data, zero],
            bytes: blocks(1),
        }),
        Message::CopyHole(CopyHole {
            holder,
            group,
            layer,
            range,
            source: CopySource::Repair,
            state: zero,
        }),
        Message::Fetch(Fetch {
            holder,
            group,
            layer,
            range,
            why: CopySource::Resync,
            from: DeviceId::default(),
            recovered: CommitSeq(1),
            commit: CommitSeq(2),
            capability,
            address: "127.0.0.1:7700".to_string(),
        }),
        Message::Read(Read {
            holder,
            group,
            layer,
            range,
        }),
        Message::ReadAnswer(ReadAnswer {
            blocks: vec![zero, data],
            bytes: vec![blocks(1)],
            ..ReadAnswer::default()
        }),
        Message::Collect(Collect {
            holder,
            group,
            from: Cursor::default(),
            to: Cursor::END,
            above: version,
        }),
        Message::Collected(Collected {
            runs: vec![
                Run {
                    layer,
                    range,
                    state: data
                };
                3
            ],
            ..Collected::default()
        }),
        Message::Damaged(Damaged {
            holder,
            group,
            runs: vec![(layer, range); 2],
        }),
        Message::Failed(Failed::fenced(generation)),
        Message::Failed(Failed::new(FailureKind::PeerUnreachable, "nobody is there")),
    ];
    let frame = |message| {
        let frame = Envelope::new(Correlation(1), message).encode();
        [&frame.head[..], &frame.data.concat()].concat()
    };
    messages.into_iter().map(frame).collect()
}

/// The length of the control part that a frame's header claims, if that much is there.
fn control_bytes(frame: &[u8]) -> Option<usize> {
    let length = u32::from_le_bytes(*frame.get(8..)?.first_chunk()?) as usize;
    (frame.len() >= FRAME_HEADER_BYTES.checked_add(length)?).then_some(length)
}

fn mend_frame(frame: &mut [u8]) {
    if let Some(control) = control_bytes(frame) {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&frame[..60]);
        hasher.update(&frame[FRAME_HEADER_BYTES..FRAME_HEADER_BYTES + control]);
        let crc = hasher.finalize();
        frame[60..64].copy_from_slice(&crc.to_le_bytes());
    }
}

fn run_frame(input: &[u8]) {
    let Some(start) = input.first_chunk::<FRAME_HEADER_BYTES>() else {
        return;
    };
    let Ok(header) = FrameHeader::decode(start) else { return };
    let head_bytes = FRAME_HEADER_BYTES + header.control_bytes as usize;
    let Some((head, rest)) = input.split_at_checked(head_bytes) else {
        return;
    };
    let Some(data) = rest.get(..header.data_bytes as usize) else {
        return;
    };
    let data = Bytes::copy_from_slice(data);
    if let Ok(envelope) = Envelope::decode(&header, head, data.clone()) {
        let again = envelope.encode();
        assert_eq!(&again.head[..], head, "a message has one encoding");
        assert_eq!(again.data.concat(), data, "data goes through as it is");
    }
}

/// An option of the handshake.
fn option(number: u32, content: &[u8]) -> Vec<u8> {
    let mut out = b"IHAVEOPT".to_vec();
    out.extend(number.to_be_bytes());
    out.extend((content.len() as u32).to_be_bytes());
    out.extend(content);
    out
}

fn handshakes() -> Vec<Vec<u8>> {
    let name = |name: &str, more: &[u8]| [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), more].concat();
    let context = name(
        "demo",
        &[&1u32.to_be_bytes()[..], &name("base:allocation", &[])].concat(),
    );
    let session = |options: &[Vec<u8>]| [&3u32.to_be_bytes()[..], &options.concat()].concat();
    vec![
        session(&[option(1, b"demo")]),
        session(&[option(3, b""), option(2, b"")]),
        session(&[
            option(8, b""),
            option(9, &context),
            option(10, &context),
            option(7, &name("demo", &[0, 0])),
        ]),
        session(&[
            option(6, &name("demo", &[0, 2, 0, 0, 0, 3])),
            option(5, b""),
            option(99, b"what?"),
        ]),
    ]
}

fn run_handshake(input: &[u8]) {
    let mut handshake = Handshake::new();
    // In pieces, as a socket gives them; the driver stops reading while a question is open.
    for piece in input.chunks(100) {
        handshake.receive(piece);
        while let Some(action) = handshake.poll_action() {
            match action {
                HandshakeAction::ListExports => handshake.catalogue(Ok(vec!["demo".to_string()])),
                HandshakeAction::Describe(name) if name == "demo" => {
                    handshake.description(Ok(ExportInfo {
                        size: 1 << 30,
                        read_only: false,
                    }));
                }
                HandshakeAction::Describe(_) => {
                    handshake.description(Err(Refusal::Unknown));
                }
                HandshakeAction::Send(bytes) => assert!(bytes.len() < 1 << 20, "{} bytes to send", bytes.len()),
                HandshakeAction::Close(_) | HandshakeAction::Transmission(_) => return,
            }
        }
    }
}

/// A request of the transmission.
fn request(flags: u16, command: u16, offset: u64, length: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = 0x2560_9513_u32.to_be_bytes().to_vec();
    out.extend(flags.to_be_bytes());
    out.extend(command.to_be_bytes());
    out.extend(0x0102_0304_0506_0708_u64.to_be_bytes());
    out.extend(offset.to_be_bytes());
    out.extend(length.to_be_bytes());
    out.extend(payload);
    out
}

fn transmissions() -> Vec<Vec<u8>> {
    vec![
        [
            request(0, 0, 0, 4096, &[]),
            request(0, 1, 4096, 512, &[7; 512]),
            request(0, 3, 0, 0, &[]),
        ]
        .concat(),
        [
            request(0, 4, 0, u32::MAX, &[]),
            request(2, 6, 8192, 4096, &[]),
            request(16, 6, 8192, 4096, &[]),
        ]
        .concat(),
        [
            request(8, 7, 0, 1 << 20, &[]),
            request(1, 1, 0, 4096, &[9; 4096]),
            request(0, 2, 0, 0, &[]),
        ]
        .concat(),
    ]
}

fn run_transmission(input: &[u8]) {
    let size = 1 << 30;
    let negotiated = Negotiated {
        export: "demo".to_string(),
        info: ExportInfo { size, read_only: false },
        structured: true,
        base_allocation: true,
    };
    let mut transmission = Transmission::new(negotiated, &[], TransmissionLimits::default());
    let mut rest = input;
    loop {
        while let Some(given) = transmission.next_input() {
            match given {
                Input::Request { token, op } => {
                    if let VolumeOp::Write { offset, data } = &op {
                        assert!(offset + data.len() as u64 <= size, "a write past the end");
                    }
                    transmission.complete(token, Err(VolumeError::Shutdown));
                }
                Input::End(_) => return,
            }
        }
        let Some((first, second)) = transmission.read_target() else {
            return;
        };
        let count = rest.len().min(first.len() + second.len());
        if count == 0 {
            return;
        }
        let (now, later) = rest.split_at(count);
        let direct = count.min(first.len());
        first[..direct].copy_from_slice(&now[..direct]);
        second[..count - direct].copy_from_slice(&now[direct..]);
        transmission.received(count);
        rest = later;
        // The client takes what was answered at once.
        let outbox = transmission.outbox();
        outbox.advance(outbox.bytes() as usize);
    }
}
