//! Every message survives the wire as it is; nothing that comes from the wire panics or allocates beyond its bounds.

use proptest::prelude::*;

use super::*;
use crate::block::{BlockState, Content, Cursor, Run};
use crate::capability::{Capability, ClusterKey, Rights};
use crate::checksum::Checksum;
use crate::ids::*;
use crate::limits::{BLOCKS_PER_CHUNK, COLLECT_RUNS_MAX, DAMAGED_RUNS_MAX, GROUPS_PER_VOLUME_MAX};

fn holder() -> impl Strategy<Value = Holder> {
    (any::<u64>(), 1..=Generation::MAX.get()).prop_map(|(volume, g)| Holder {
        volume: VolumeId(volume),
        generation: Generation::new(g).unwrap(),
    })
}

fn version() -> impl Strategy<Value = Version> {
    any::<u64>().prop_map(Version::from_bits)
}

fn group() -> impl Strategy<Value = GroupIndex> {
    (0..GROUPS_PER_VOLUME_MAX).prop_map(GroupIndex)
}

fn range(count_max: u32) -> impl Strategy<Value = BlockRange> {
    (any::<u32>(), 0..BLOCKS_PER_CHUNK, 1..=count_max).prop_map(|(chunk, start, count)| {
        let count = count.min(BLOCKS_PER_CHUNK - start);
        BlockRange::new(ChunkIndex(chunk), start, count).unwrap()
    })
}

fn content() -> impl Strategy<Value = Content> {
    prop_oneof![
        Just(Content::Absent),
        Just(Content::Zero),
        any::<u32>().prop_map(|c| Content::Data(Checksum(c))),
        Just(Content::Damaged),
    ]
}

fn state() -> impl Strategy<Value = BlockState> {
    (content(), version()).prop_map(|(content, version)| BlockState { content, version })
}

fn cursor() -> impl Strategy<Value = Cursor> {
    (any::<u32>(), any::<u32>(), 0..BLOCKS_PER_CHUNK).prop_map(|(chunk, layer, block)| Cursor {
        chunk: ChunkIndex(chunk),
        layer: Layer(layer),
        block,
    })
}

fn blocks(count: usize) -> Bytes {
    vec![0x5a; count * BLOCK_BYTES].into()
}

fn data_count(blocks: &[BlockState]) -> usize {
    blocks
        .iter()
        .filter(|block| matches!(block.content, Content::Data(_)))
        .count()
}

fn capability() -> impl Strategy<Value = Capability> {
    (holder(), any::<[u8; 32]>(), any::<bool>()).prop_map(|(holder, key, write)| {
        let rights = if write { Rights::Write } else { Rights::Read };
        Capability::grant(
            &ClusterKey(key),
            ClusterId(*b"0123456789abcdef"),
            holder.volume,
            holder.generation,
            rights,
        )
    })
}

fn hello() -> impl Strategy<Value = Message> {
    let ids = (any::<[u8; 16]>(), any::<[u8; 16]>(), any::<[u8; 16]>(), any::<u64>());
    let purpose = prop_oneof![Just(Purpose::Guest), Just(Purpose::Repair), Just(Purpose::Scrub)];
    (
        ids,
        (1..9u16, 0..9u16),
        purpose,
        any::<(u64, u64, u64)>(),
        proptest::option::of(capability()),
    )
        .prop_map(
            |(
                (cluster, uuid, client, incarnation),
                (version_min, more),
                purpose,
                (features, recovered, commit),
                capability,
            )| {
                Message::Hello(Hello {
                    version_min,
                    version_max: version_min + more,
                    purpose,
                    features,
                    cluster: ClusterId(cluster),
                    device: DeviceId {
                        uuid: DeviceUuid(uuid),
                        incarnation: Incarnation(incarnation),
                    },
                    recovered: CommitSeq(recovered),
                    commit: CommitSeq(commit),
                    client: ClientId(client),
                    limits: PeerLimits::default(),
                    capability,
                })
            },
        )
}

fn write() -> impl Strategy<Value = Message> {
    let place = (holder(), group(), any::<u32>(), 0..=Seq::MAX.get(), version());
    let what = prop_oneof![
        (range(4), any::<u32>()).prop_map(|(range, c)| {
            let checksums = (0..range.count()).map(|i| Checksum(c.wrapping_add(i))).collect();
            (
                range,
                WriteData::Data {
                    bytes: blocks(range.count() as usize),
                    checksums,
                },
            )
        }),
        range(BLOCKS_PER_CHUNK).prop_map(|range| (range, WriteData::Zero)),
        range(BLOCKS_PER_CHUNK).prop_map(|range| (range, WriteData::Discard)),
    ];
    (place, what).prop_map(|((holder, group, layer, seq, stable), (range, data))| {
        let version = Version::new(holder.generation, Seq::new(seq).unwrap());
        Message::Write(Write {
            holder,
            group,
            layer: Layer(layer),
            range,
            version,
            stable,
            data,
        })
    })
}

fn copy() -> impl Strategy<Value = Message> {
    let source = prop_oneof![Just(CopySource::Repair), Just(CopySource::Resync)];
    (
        holder(),
        group(),
        any::<u32>(),
        range(8),
        source,
        proptest::collection::vec(state(), 8),
    )
        .prop_map(|(holder, group, layer, range, source, mut states)| {
            states.truncate(range.count() as usize);
            for state in &mut states {
                if state.content == Content::Damaged {
                    state.content = Content::Absent;
                }
            }
            let bytes = blocks(data_count(&states));
            Message::Copy(Copy {
                holder,
                group,
                layer: Layer(layer),
                range,
                source,
                blocks: states,
                bytes,
            })
        })
}

fn copy_hole() -> impl Strategy<Value = Message> {
    let source = prop_oneof![Just(CopySource::Repair), Just(CopySource::Resync)];
    let place = (holder(), group(), any::<u32>(), range(BLOCKS_PER_CHUNK));
    (place, source, any::<bool>(), version()).prop_map(|((holder, group, layer, range), source, zero, version)| {
        let content = if zero { Content::Zero } else { Content::Absent };
        Message::CopyHole(CopyHole {
            holder,
            group,
            layer: Layer(layer),
            range,
            source,
            state: BlockState { content, version },
        })
    })
}

fn fetch() -> impl Strategy<Value = Message> {
    let ids = (any::<[u8; 16]>(), any::<(u64, u64, u64)>());
    let why = prop_oneof![Just(CopySource::Repair), Just(CopySource::Resync)];
    let place = (holder(), group(), any::<u32>(), range(256));
    (place, why, ids, capability(), "[a-z0-9.:\\[\\]-]{1,255}").prop_map(
        |((holder, group, layer, range), why, (uuid, (incarnation, recovered, commit)), capability, address)| {
            Message::Fetch(Fetch {
                holder,
                group,
                layer: Layer(layer),
                range,
                why,
                from: DeviceId {
                    uuid: DeviceUuid(uuid),
                    incarnation: Incarnation(incarnation),
                },
                recovered: CommitSeq(recovered),
                commit: CommitSeq(commit),
                capability,
                address,
            })
        },
    )
}

fn damaged() -> impl Strategy<Value = Message> {
    let run = (any::<u32>(), range(BLOCKS_PER_CHUNK)).prop_map(|(layer, range)| (Layer(layer), range));
    (holder(), group(), proptest::collection::vec(run, 1..9))
        .prop_map(|(holder, group, runs)| Message::Damaged(Damaged { holder, group, runs }))
}

fn read_answer() -> impl Strategy<Value = Message> {
    (any::<(u64, u32, u32)>(), proptest::collection::vec(state(), 0..8)).prop_map(
        |((commit, queue_us, read_us), states)| {
            let bytes = if data_count(&states) == 0 {
                Vec::new()
            } else {
                vec![blocks(data_count(&states))]
            };
            Message::ReadAnswer(ReadAnswer {
                commit: CommitSeq(commit),
                queue_us,
                read_us,
                blocks: states,
                bytes,
            })
        },
    )
}

fn collected() -> impl Strategy<Value = Message> {
    let run = (any::<u32>(), range(BLOCKS_PER_CHUNK), state()).prop_map(|(layer, range, state)| Run {
        layer: Layer(layer),
        range,
        state,
    });
    (
        any::<u64>(),
        proptest::collection::vec(run, 0..9),
        proptest::option::of(cursor()),
    )
        .prop_map(|(commit, runs, next)| {
            Message::Collected(Collected {
                commit: CommitSeq(commit),
                runs,
                next,
            })
        })
}

fn failed() -> impl Strategy<Value = Message> {
    let kind = prop_oneof![
        Just(FailureKind::Fenced),
        Just(FailureKind::Starting),
        Just(FailureKind::PeerUnreachable),
        Just(FailureKind::NotFetched),
        Just(FailureKind::NoSpace)
    ];
    (kind, ".{0,700}").prop_map(|(kind, words)| Message::Failed(Failed::new(kind, words)))
}

fn membership() -> impl Strategy<Value = Message> {
    let role = prop_oneof![Just(ReplicaRole::InSync), Just(ReplicaRole::Joining)];
    (holder(), group(), role, any::<(u64, bool)>(), version(), 0..6u8).prop_map(
        |(holder, group, role, (epoch, created), stable, which)| match which {
            0 => Message::Sealed(Sealed { holder }),
            1 => Message::Join(Join {
                holder,
                group,
                role,
                epoch: Epoch(epoch),
            }),
            2 => Message::Joined(Joined {
                holder,
                group,
                created,
                stable,
            }),
            3 => Message::Confirm(Confirm { holder }),
            4 => Message::Confirmed(Confirm { holder }),
            _ => Message::Release(Release { holder }),
        },
    )
}

fn other() -> impl Strategy<Value = Message> {
    let read = (holder(), group(), any::<u32>(), range(256)).prop_map(|(holder, group, layer, range)| {
        Message::Read(Read {
            holder,
            group,
            layer: Layer(layer),
            range,
        })
    });
    let collect = (holder(), group(), cursor(), cursor(), version()).prop_map(|(holder, group, from, to, above)| {
        Message::Collect(Collect {
            holder,
            group,
            from,
            to,
            above,
        })
    });
    let durable = any::<(u64, u32, u32, u32)>().prop_map(|(commit, queue_us, write_us, flush_us)| {
        Message::Durable(Durable {
            commit: CommitSeq(commit),
            queue_us,
            write_us,
            flush_us,
        })
    });
    let seal = capability().prop_map(|capability| Message::Seal(Seal { capability }));
    prop_oneof![
        read,
        collect,
        durable,
        seal,
        Just(Message::Ping(Empty)),
        Just(Message::Pong(Empty))
    ]
}

fn envelope() -> impl Strategy<Value = Envelope> {
    let message = prop_oneof![
        hello(),
        write(),
        copy(),
        copy_hole(),
        fetch(),
        damaged(),
        read_answer(),
        collected(),
        failed(),
        membership(),
        other()
    ];
    let class = prop_oneof![Just(Class::Guest), Just(Class::Repair), Just(Class::Scrub)];
    (any::<u64>(), class, any::<(bool, bool, u64)>(), message).prop_map(
        |(correlation, class, (trace, grant, trace_id), message)| Envelope {
            correlation: Correlation(correlation),
            class,
            flags: Flags { trace, grant },
            trace_id,
            message,
        },
    )
}

/// Decodes as a driver does.
fn receive(head: &[u8], data: Bytes) -> Result<Envelope, FrameError> {
    let header = FrameHeader::decode(head.first_chunk().expect("a whole header"))?;
    Envelope::decode(&header, head, data)
}

proptest! {
    #[test]
    fn every_message_survives_the_wire(envelope in envelope()) {
        let frame = envelope.encode();
        let data: Bytes = frame.data.concat().into();
        prop_assert_eq!(frame.len(), frame.head.len() + data.len());
        prop_assert_eq!(receive(&frame.head, data), Ok(envelope));
    }

    #[test]
    fn a_flipped_bit_in_header_or_control_is_caught(envelope in envelope(), place in any::<prop::sample::Index>()) {
        let frame = envelope.encode();
        let mut head = frame.head.to_vec();
        let bit = place.index(head.len() * 8);
        head[bit / 8] ^= 1 << (bit % 8);
        let header = FrameHeader::decode(head.first_chunk().unwrap());
        // A changed length makes the receiver wait for another amount of bytes; everything else must be an error.
        if let Ok(header) = header
            && header.control_bytes as usize == head.len() - FRAME_HEADER_BYTES
        {
            let data = blocks(header.data_bytes as usize / BLOCK_BYTES);
            prop_assert!(Envelope::decode(&header, &head, data).is_err());
        }
    }

    /// The CRC keeps damage out; this keeps out a peer that computes the right CRC over nonsense.
    #[test]
    fn nonsense_with_a_right_crc_is_an_error_or_a_message_but_never_a_panic(
        kind in prop_oneof![1..0x40u8, any::<u8>()],
        control in proptest::collection::vec(prop_oneof![3 => Just(0u8), 1 => any::<u8>()], 0..300),
        data_blocks in 0..3usize,
    ) {
        let header = FrameHeader {
            kind,
            class: Class::Guest,
            flags: Flags::default(),
            control_bytes: 0,
            data_bytes: (data_blocks * BLOCK_BYTES) as u32,
            correlation: Correlation(1),
            trace_id: 0,
            crc: 0,
        };
        let head = header.encode_with_control(&control);
        if let Ok(envelope) = receive(&head, blocks(data_blocks)) {
            // What decodes must encode to the same bytes: there is one form of each message.
            let frame = envelope.encode();
            prop_assert_eq!(&frame.head[..], &head[..]);
        }
    }

    #[test]
    fn a_truncated_control_part_is_an_error(envelope in envelope(), cut in any::<prop::sample::Index>()) {
        let mut control = Vec::new();
        let data: Bytes = envelope.message.encode(&mut control).concat().into();
        prop_assume!(!control.is_empty());
        control.truncate(cut.index(control.len()));
        let mut reader = Reader::new(&control);
        let decoded = Message::decode(envelope.message.kind(), &mut reader, data).map(|message| (message, reader));
        prop_assert!(!matches!(decoded, Ok((Some(message), _)) if message == envelope.message));
    }
}

#[test]
fn the_largest_messages_fit_the_frame() {
    let holder = Holder {
        volume: VolumeId(1),
        generation: Generation::MAX,
    };
    let range = BlockRange::new(ChunkIndex(0), 0, FRAME_BLOCKS_MAX).unwrap();
    let state = BlockState {
        content: Content::Data(Checksum(1)),
        version: Version::from_bits(1),
    };
    let copy = Copy {
        holder,
        group: GroupIndex(0),
        layer: Layer(0),
        range,
        source: CopySource::Repair,
        blocks: vec![state; FRAME_BLOCKS_MAX as usize],
        bytes: blocks(FRAME_BLOCKS_MAX as usize),
    };
    let hole = CopyHole {
        holder,
        group: GroupIndex(0),
        layer: Layer(0),
        range: BlockRange::whole(ChunkIndex(u32::MAX)),
        source: CopySource::Resync,
        state: BlockState::ABSENT,
    };
    let runs = vec![
        Run {
            layer: Layer(0),
            range,
            state
        };
        COLLECT_RUNS_MAX
    ];
    for message in [
        Message::Copy(copy),
        Message::CopyHole(hole),
        Message::Collected(Collected {
            commit: CommitSeq(0),
            runs,
            next: None,
        }),
        Message::Damaged(Damaged {
            holder,
            group: GroupIndex(0),
            runs: vec![(Layer(0), range); DAMAGED_RUNS_MAX],
        }),
        Message::Failed(Failed::new(FailureKind::Invalid, "ä".repeat(4000))),
    ] {
        let envelope = Envelope::new(Correlation(1), message);
        let frame = envelope.encode();
        assert_eq!(receive(&frame.head, frame.data.concat().into()), Ok(envelope));
    }
}

#[test]
fn a_header_that_asks_for_too_much_is_refused_before_anything_is_read() {
    let good = Envelope::new(Correlation(1), Message::Ping(Empty)).encode().head;
    let with = |place: usize, value: u32| {
        let mut head: [u8; FRAME_HEADER_BYTES] = *good.first_chunk().unwrap();
        head[place..place + 4].copy_from_slice(&value.to_le_bytes());
        FrameHeader::decode(&head)
    };
    assert!(matches!(with(0, 0x1234_5678), Err(FrameError::Magic(_))));
    assert!(matches!(
        with(8, 65_537),
        Err(FrameError::TooLong { part: "control", .. })
    ));
    assert!(matches!(
        with(12, 1 << 21),
        Err(FrameError::TooLong { part: "data", .. })
    ));
    assert!(matches!(with(12, 100), Err(FrameError::DataLength(100))));
    assert!(matches!(with(4, 9), Err(FrameError::Version(9))));
    assert!(matches!(
        with(32, 1),
        Err(FrameError::Header(DecodeError::Invalid("reserved")))
    ));
}

/// The layout is final: these bytes may never change.
#[test]
fn the_layout_on_the_wire_is_final() {
    let holder = Holder {
        volume: VolumeId(0x0102_0304_0506_0708),
        generation: Generation::new(0x0a0b).unwrap(),
    };
    let range = BlockRange::new(ChunkIndex(7), 5, 1).unwrap();
    let write = Write {
        holder,
        group: GroupIndex(3),
        layer: Layer(2),
        range,
        version: Version::new(holder.generation, Seq::new(9).unwrap()),
        stable: Version::ZERO,
        data: WriteData::Data {
            bytes: blocks(1),
            checksums: vec![Checksum(0xdead_beef)],
        },
    };
    let envelope = Envelope {
        correlation: Correlation(0x1122),
        ..Envelope::new(Correlation(0), Message::Write(write))
    };
    let head = envelope.encode().head;
    let hex: String = head.iter().map(|byte| format!("{byte:02x}")).collect();
    let header = "43524e46012000003c00000000100000221100000000000000000000000000000000000000000000000000000000000000000000000000000000";
    let control = "08070605040302010b0a00000300000002000000070000000500000001000000\
                   0900000000 0b0a00 0000000000000000 0100000000000000 efbeadde";
    assert_eq!(hex[..112], header[..112]);
    assert_eq!(hex[128..], control.replace(' ', ""));
}

#[test]
fn the_layout_of_a_copied_hole_is_final_and_it_is_a_hole() {
    let holder = Holder {
        volume: VolumeId(7),
        generation: Generation::new(3).unwrap(),
    };
    let hole = CopyHole {
        holder,
        group: GroupIndex(1),
        layer: Layer(2),
        range: BlockRange::whole(ChunkIndex(9)),
        source: CopySource::Resync,
        state: BlockState {
            content: Content::Zero,
            version: Version::new(holder.generation, Seq::new(5).unwrap()),
        },
    };
    let mut control = Vec::new();
    assert!(hole.encode(&mut control).is_empty());
    let hex: String = control.iter().map(|byte| format!("{byte:02x}")).collect();
    let expected = "070000000000000003000000 01000000020000000900000000000000004 00000 0200000000000000 \
                    0500000000030000 00000000 01000000";
    assert_eq!(hex, expected.replace(' ', ""));
    let decode = |control: &[u8], data: Bytes| {
        let mut reader = Reader::new(control);
        let hole = CopyHole::decode(&mut reader, data)?;
        reader.finish().map(|()| hole)
    };
    assert_eq!(decode(&control, Bytes::new()), Ok(hole));
    assert_eq!(
        decode(&control, blocks(1)),
        Err(DecodeError::Invalid("data length")),
        "a hole brings no data"
    );
    let with = |at: usize, value: u8| {
        let mut control = control.clone();
        control[at] = value;
        decode(&control, Bytes::new())
    };
    for kind in [2, 3, 4] {
        assert_eq!(with(52, kind), Err(DecodeError::Invalid("block kind")), "kind {kind}");
    }
    assert_eq!(with(24, 1), Err(DecodeError::Invalid("range")), "beyond its chunk");
    assert_eq!(with(28, 1), Err(DecodeError::Invalid("range")), "longer than a chunk");
    assert_eq!(with(32, 3), Err(DecodeError::Invalid("copy source")));
    assert!(with(33, 1).is_err() && with(53, 1).is_err(), "reserved bytes are zero");
    assert!(decode(&control[..55], Bytes::new()).is_err());
}

#[test]
fn the_layout_of_a_fetch_is_final_and_its_address_is_bounded() {
    let holder = Holder {
        volume: VolumeId(7),
        generation: Generation::new(3).unwrap(),
    };
    let key = ClusterKey([1; 32]);
    let fetch = Fetch {
        holder,
        group: GroupIndex(1),
        layer: Layer(2),
        range: BlockRange::new(ChunkIndex(9), 5, 4).unwrap(),
        why: CopySource::Resync,
        from: DeviceId {
            uuid: DeviceUuid([0xab; 16]),
            incarnation: Incarnation(6),
        },
        recovered: CommitSeq(0x11),
        commit: CommitSeq(0x22),
        capability: Capability::grant(
            &key,
            ClusterId([2; 16]),
            holder.volume,
            holder.generation,
            Rights::Write,
        ),
        address: "b:1".to_string(),
    };
    let mut control = Vec::new();
    assert!(fetch.encode(&mut control).is_empty());
    let hex: String = control.iter().map(|byte| format!("{byte:02x}")).collect();
    let expected = "070000000000000003000000 01000000 02000000 09000000 05000000 04000000 0200000000000000 \
                    abababababababababababababababab 0600000000000000 1100000000000000 2200000000000000";
    let expected = expected.replace(' ', "");
    assert_eq!(hex[..expected.len()], expected);
    let mut capability = Vec::new();
    fetch.capability.encode(&mut capability);
    assert_eq!(control[80..128], capability);
    assert_eq!(control[128..], [3, 0, 0, 0, b'b', b':', b'1']);
    let decode = |control: &[u8], data: Bytes| {
        let mut reader = Reader::new(control);
        let fetch = Fetch::decode(&mut reader, data)?;
        reader.finish().map(|()| fetch)
    };
    assert_eq!(decode(&control, Bytes::new()), Ok(fetch));
    assert_eq!(decode(&control, blocks(1)), Err(DecodeError::Invalid("data length")));
    let with = |at: usize, bytes: &[u8]| {
        let mut control = control.clone();
        control[at..at + bytes.len()].copy_from_slice(bytes);
        decode(&control, Bytes::new())
    };
    assert!(matches!(
        with(128, &[0, 1]),
        Err(DecodeError::TooLarge { field: "address", .. })
    ));
    assert_eq!(with(132, &[0xff]), Err(DecodeError::Invalid("address")));
    assert!(matches!(
        with(28, &[1, 1]),
        Err(DecodeError::TooLarge { field: "blocks", .. })
    ));
    assert_eq!(with(32, &[3]), Err(DecodeError::Invalid("copy source")));
    let mut nowhere = control[..132].to_vec();
    nowhere[128] = 0;
    assert_eq!(decode(&nowhere, Bytes::new()), Err(DecodeError::Invalid("address")));
}

#[test]
fn the_layout_of_told_damage_is_final_and_says_where() {
    let damaged = Damaged {
        holder: Holder {
            volume: VolumeId(7),
            generation: Generation::new(3).unwrap(),
        },
        group: GroupIndex(1),
        runs: vec![(Layer(2), BlockRange::new(ChunkIndex(9), 5, 4).unwrap())],
    };
    let mut control = Vec::new();
    assert!(damaged.encode(&mut control).is_empty());
    let hex: String = control.iter().map(|byte| format!("{byte:02x}")).collect();
    let expected = "070000000000000003000000 01000000 0100000000000000 02000000 09000000 05000000 04000000";
    assert_eq!(hex, expected.replace(' ', ""));
    let decode = |control: &[u8]| {
        let mut reader = Reader::new(control);
        let damaged = Damaged::decode(&mut reader, Bytes::new())?;
        reader.finish().map(|()| damaged)
    };
    assert_eq!(decode(&control), Ok(damaged));
    let with = |at: usize, value: u8| {
        let mut control = control.clone();
        control[at] = value;
        decode(&control)
    };
    assert_eq!(with(16, 0), Err(DecodeError::Invalid("count")), "nothing is not told");
    assert!(matches!(with(17, 2), Err(DecodeError::TooLarge { field: "runs", .. })));
    assert_eq!(with(37, 0x40), Err(DecodeError::Invalid("range")), "beyond its chunk");
    assert!(with(13, 1).is_err() && with(20, 1).is_err(), "reserved bytes are zero");
    assert!(decode(&control[..39]).is_err(), "less than it says");
}
