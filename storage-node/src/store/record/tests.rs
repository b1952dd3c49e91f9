//! Every record comes back as it was written; nothing that is not one is taken for one.

use cairn_proto::block::Cursor;
use cairn_proto::ids::{DeviceUuid, Incarnation};
use cairn_proto::limits::BLOCK_BYTES;
use proptest::collection::vec;
use proptest::prelude::*;

use super::header::{HEADER_BYTES, Peek};
use super::*;
use crate::store::entry::{Hole, Uniform};
use crate::store::scrub_state::{ScrubCursor, ScrubState};
use cairn_proto::ids::DeviceId;

const END: u32 = 10_000;

fn group() -> impl Strategy<Value = GroupId> {
    (any::<u64>(), any::<u8>()).prop_map(|(volume, index)| GroupId {
        volume: VolumeId(volume),
        index: GroupIndex(index),
    })
}

fn target(blocks: u32) -> impl Strategy<Value = Target> {
    (group(), any::<u32>(), any::<u32>(), 0..16384 - blocks).prop_map(move |(group, layer, chunk, start)| Target {
        group,
        layer: Layer(layer),
        range: BlockRange::new(ChunkIndex(chunk), start, blocks).unwrap(),
    })
}

fn version() -> impl Strategy<Value = Version> {
    any::<u64>().prop_map(Version::from_bits)
}

fn place() -> impl Strategy<Value = u32> {
    4..END
}

/// Extents that cover so many blocks, in pieces of random length.
fn extents(blocks: u32) -> impl Strategy<Value = Vec<Extent>> {
    vec((4..END - 256, 1..=blocks), 1..=blocks as usize).prop_map(move |pieces| {
        let mut left = blocks;
        let mut extents = Vec::new();
        for (place, count) in pieces {
            let count = count.min(left);
            if count > 0 {
                extents.push(Extent { place, count });
            }
            left -= count;
        }
        if left > 0 {
            extents.push(Extent { place: 4, count: left });
        }
        extents
    })
}

fn entry() -> impl Strategy<Value = Entry> {
    (version(), any::<u32>(), place(), 0..3u8).prop_map(|(version, checksum, place, kind)| match kind {
        0 => Entry::data(version, Checksum(checksum), place),
        1 => Uniform {
            hole: Hole::Zero,
            version,
        }
        .entry(),
        _ => Uniform {
            hole: Hole::Absent,
            version,
        }
        .entry(),
    })
}

fn data() -> impl Strategy<Value = Record> {
    (1..=256u32).prop_flat_map(|blocks| {
        let checksums = vec(any::<u32>().prop_map(Checksum), blocks as usize);
        (target(blocks), version(), checksums, extents(blocks)).prop_map(|(at, version, checksums, extents)| {
            Record::Data {
                at,
                version,
                checksums,
                extents,
            }
        })
    })
}

fn copied() -> impl Strategy<Value = Record> {
    (1..=256u32).prop_flat_map(|blocks| {
        let entries = vec(entry(), blocks as usize);
        (target(blocks), entries).prop_map(|(at, entries)| Record::Copy { at, entries })
    })
}

fn moved() -> impl Strategy<Value = Record> {
    (1..=256u32).prop_flat_map(|blocks| {
        let one = (place(), place(), any::<u32>()).prop_map(|(from, to, checksum)| Moved {
            from,
            to,
            checksum: Checksum(checksum),
        });
        (target(blocks), vec(one, blocks as usize)).prop_map(|(at, moves)| Record::Move { at, moves })
    })
}

fn hole() -> impl Strategy<Value = Record> {
    (1..=16383u32, any::<bool>()).prop_flat_map(|(blocks, zero)| {
        (target(blocks), version()).prop_map(move |(at, version)| match zero {
            true => Record::Zero { at, version },
            false => Record::Discard { at, version },
        })
    })
}

fn resync_hole() -> impl Strategy<Value = Record> {
    (1..=16383u32, any::<bool>(), 0..1u32 << 24).prop_flat_map(|(blocks, zero, generation)| {
        (target(blocks), version()).prop_map(move |(at, version)| Record::ResyncHole {
            at,
            hole: Uniform {
                hole: if zero { Hole::Zero } else { Hole::Absent },
                version,
            },
            generation: Generation::new(generation).unwrap(),
        })
    })
}

fn scrub() -> impl Strategy<Value = Record> {
    (any::<[u64; 8]>(), group(), any::<bool>(), 0..16384u32).prop_map(|(n, group, under_way, block)| {
        let at = Cursor {
            chunk: ChunkIndex(n[0] as u32),
            layer: Layer(n[1] as u32),
            block,
        };
        Record::Scrub(ScrubState {
            pass: n[0],
            cursor: under_way.then_some(ScrubCursor { group, at }),
            begun_s: n[1],
            checked: n[2],
            damaged: n[3],
            finished_s: n[4],
            finished_pass: n[5],
            finished_checked: n[6],
            finished_damaged: n[7],
        })
    })
}

fn record() -> impl Strategy<Value = Record> {
    prop_oneof![
        data(),
        copied(),
        moved(),
        hole(),
        resync_hole(),
        scrub(),
        (any::<u64>(), 0..1u32 << 24).prop_map(|(volume, generation)| Record::Seal {
            volume: VolumeId(volume),
            generation: Generation::new(generation).unwrap(),
        }),
        (group(), any::<u8>(), any::<u64>()).prop_map(|(group, role, epoch)| Record::Replica {
            group,
            role,
            epoch: Epoch(epoch)
        }),
        group().prop_map(|group| Record::DropReplica { group }),
        (group(), any::<u32>()).prop_map(|(group, layer)| Record::DeleteLayer {
            group,
            layer: Layer(layer)
        }),
        (group(), any::<u32>(), any::<u32>(), 0..64u8, 0..64u8).prop_map(|(group, layer, chunk, one, other)| {
            Record::Reclaim {
                key: ChunkKey {
                    group,
                    layer: Layer(layer),
                    chunk: ChunkIndex(chunk),
                },
                first: one.min(other),
                last: one.max(other),
            }
        }),
        (group(), any::<Option<u32>>()).prop_map(|(group, layer)| Record::Reclaimed {
            doomed: Doomed {
                group,
                layer: layer.map(Layer),
            },
        }),
        (any::<bool>(), any::<u64>()).prop_map(|(idle, recovered)| Record::Marker {
            kind: if idle { MarkerKind::Idle } else { MarkerKind::Recovered },
            recovered,
        }),
        (group(), any::<u32>(), any::<u32>(), version()).prop_map(|(group, layer, chunk, version)| Record::Floor {
            group,
            layer: Layer(layer),
            chunk: ChunkIndex(chunk),
            version,
        }),
    ]
}

fn encoded(record: &Record) -> Vec<u8> {
    let mut out = Vec::new();
    record.encode(&mut out);
    assert_eq!(out.len(), record.encoded_bytes());
    out
}

fn decoded(bytes: &[u8]) -> Result<Record, DecodeError> {
    let mut reader = Reader::new(bytes);
    let record = Record::decode(&mut reader, END)?;
    reader.finish()?;
    Ok(record)
}

fn header(places: Vec<u32>) -> BatchHeader {
    BatchHeader {
        device: DeviceId {
            uuid: DeviceUuid([5; 16]),
            incarnation: Incarnation(2),
        },
        seq: 77,
        checkpoint: 3,
        previous_crc: 0xabcd,
        ahead: LogAhead {
            next: 99,
            run_left: 7,
            next_run: 200,
        },
        places,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn records_come_back_as_they_were_written(record in record()) {
        prop_assert_eq!(decoded(&encoded(&record)), Ok(record));
    }

    #[test]
    fn a_record_cut_short_is_refused(record in record(), part in 0.0..1.0f64) {
        let bytes = encoded(&record);
        let cut = (bytes.len() as f64 * part) as usize;
        prop_assert!(decoded(&bytes[..cut]).is_err());
    }

    #[test]
    fn a_changed_record_is_refused_or_means_something_else(record in record(), at in any::<prop::sample::Index>(), bit in 0..8u8) {
        let mut bytes = encoded(&record);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        if let Ok(other) = decoded(&bytes) {
            prop_assert_ne!(&other, &record);
            prop_assert_eq!(encoded(&other), bytes, "one meaning has one form");
        }
    }

    #[test]
    fn garbage_is_refused_without_panic(number in 0..16u8, mut bytes in vec(any::<u8>(), 4..600)) {
        let len = bytes.len() as u16;
        bytes[0] = number;
        bytes[1] = 0;
        bytes[2..4].copy_from_slice(&len.to_le_bytes());
        if let Ok(record) = decoded(&bytes) {
            prop_assert_eq!(encoded(&record), bytes);
        }
    }

    #[test]
    fn batches_come_back_and_no_flipped_bit_passes(
        records in vec(record(), 1..6),
        spare in 0..2usize,
        at in any::<prop::sample::Index>(),
        bit in 0..8u8,
    ) {
        let mut body = Vec::new();
        records.iter().for_each(|record| record.encode(&mut body));
        let mut pages = 1 + spare;
        while body_capacity(pages) < body.len() {
            pages += 1;
        }
        let header = header((0..pages as u32).map(|i| 1000 - 3 * i).collect());
        let (bytes, crc) = header.encode(&body, records.len());
        prop_assert_eq!(bytes.len(), pages * BLOCK_BYTES);
        let peek = BatchHeader::peek(&bytes[..BLOCK_BYTES], header.device, END).unwrap();
        prop_assert_eq!((peek.seq, peek.places), (77, header.places.clone()));
        prop_assert_eq!(BatchHeader::decode(&bytes, END), Ok((header, crc, records)));
        let mut bad = bytes.to_vec();
        bad[at.index(bytes.len())] ^= 1 << bit;
        prop_assert_eq!(BatchHeader::decode(&bad, END), Err(HeaderError::NotARecord));
    }

    #[test]
    fn pages_of_garbage_are_no_batch(bytes in vec(any::<u8>(), 0..3 * BLOCK_BYTES)) {
        prop_assert!(BatchHeader::decode(&bytes, END).is_err());
        prop_assert_eq!(BatchHeader::peek(&bytes, header(vec![9]).device, END), None);
    }
}

#[test]
fn a_first_page_tells_whose_it_is_where_it_belongs_and_which_commit_it_is() {
    let header = header(vec![50, 60]);
    let (bytes, _) = header.encode(&[], 0);
    let first = &bytes[..BLOCK_BYTES];
    let peek = |device| BatchHeader::peek(first, device, END);
    let places = vec![50, 60];
    assert_eq!(peek(header.device), Some(Peek { seq: 77, places }));
    let other = DeviceId {
        incarnation: Incarnation(1),
        ..header.device
    };
    assert_eq!(peek(other), None, "one from before the device was formatted");
    for bit in 0..HEADER_BYTES * 8 {
        let mut bad = first.to_vec();
        bad[bit / 8] ^= 1 << (bit % 8);
        let found = BatchHeader::peek(&bad, header.device, END);
        let crc_of_all_pages = (12..16).contains(&(bit / 8));
        assert_eq!(found.is_some(), crc_of_all_pages, "bit {bit} of the header");
    }
}

#[test]
fn the_largest_requests_fit_two_pages_however_they_are_scattered() {
    for blocks in [1, 2, 255, 256usize] {
        assert!(Record::data_bytes(blocks, blocks) <= body_capacity(1));
    }
    assert!(128 * Record::data_bytes(1, 1) <= body_capacity(2));
    assert!(128 * Record::copy_bytes(1) <= body_capacity(2));
    assert!(Record::copy_bytes(256) <= body_capacity(2));
}
