//! The root of a checkpoint's directory: a chain of blocks with whole entries in each. The layout is in DESIGN.md.

use std::collections::VecDeque;

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::codec::{DecodeError, Put, Reader};
use cairn_proto::ids::{DeviceId, DeviceUuid, Epoch, Generation, GroupId, Incarnation, Layer, VolumeId};
use cairn_proto::limits::BLOCK_BYTES;

use super::catalog::{Catalog, Replica};
use super::chunk::{ChunkKey, Home, KEY_BYTES};
use super::crc;
use super::doomed::Doomed;
use super::entry::check_place;
use super::freeze::LeafRef;
use super::leaf::LeafState;
use super::record::{DOOMED_BYTES, get_group, put_group};
use super::scrub_state::ScrubState;
use super::space::MapHome;

const MAGIC: [u8; 8] = *b"CAIRNDIR";
const FORMAT: u16 = 1;
const CRC_FIELD: usize = 12;
const HEADER_BYTES: usize = 72;
const PAYLOAD_BYTES: usize = BLOCK_BYTES - HEADER_BYTES;
/// Type, a zero byte, length with this head.
const HEAD_BYTES: usize = 4;

/// One entry.
#[derive(Clone, Debug)]
pub(super) enum DirectoryEntry {
    Seal(VolumeId, Generation),
    Replica(GroupId, Replica),
    /// A leaf, under the lowest key that it may have; `None` is an empty one.
    Leaf(ChunkKey, Option<LeafState>),
    MapPage(u32, MapHome),
    Scrub(ScrubState),
    /// Blocks of data of a layer.
    Layer(GroupId, Layer, u64),
    /// What was dropped and still takes space.
    Doomed(Doomed),
    /// The free-space map may have blocks that nobody needs.
    Orphans,
}

/// Entries packed into blocks, before the blocks have places.
#[derive(Debug, Default)]
pub(super) struct DirectoryWriter {
    payloads: VecDeque<(Vec<u8>, u32)>,
    scratch: Vec<u8>,
}

impl DirectoryWriter {
    pub(super) fn catalog(&mut self, catalog: &Catalog) {
        for (volume, generation) in &catalog.seals {
            self.add(1, |out| {
                out.put_u64(volume.0);
                out.put_u32(generation.get());
            });
        }
        for (group, replica) in &catalog.replicas {
            self.add(2, |out| {
                put_group(out, *group);
                out.put_u8(replica.role);
                out.put_bytes(&[0; 3]);
                out.put_u64(replica.epoch.0);
                out.put_u64(replica.blocks);
            });
        }
        for ((group, layer), blocks) in &catalog.layers {
            self.add(6, |out| {
                put_group(out, *group);
                out.put_u32(layer.0);
                out.put_u64(*blocks);
            });
        }
        for doomed in &catalog.doomed {
            self.add(7, |out| doomed.encode(out));
        }
        if catalog.orphans {
            self.add(8, |_| {});
        }
        if let Some(state) = &catalog.scrub {
            self.add(5, |out| state.encode(out));
        }
    }

    /// `listed` is not `Frozen`.
    pub(super) fn leaf(&mut self, key: ChunkKey, listed: LeafRef) {
        let (kind, home) = match listed {
            LeafRef::Empty => (0, Home { place: 0, crc: 0 }),
            LeafRef::Stored(home) => (1, home),
            LeafRef::Broken => (2, Home { place: 0, crc: 0 }),
            LeafRef::Frozen => panic!("leaf {key:?} has no home yet"),
        };
        self.add(3, |out| {
            key.encode(out);
            out.put_u8(kind);
            out.put_bytes(&[0; 3]);
            out.put_u32(home.place);
            out.put_u32(home.crc);
        });
    }

    pub(super) fn map_page(&mut self, page: u32, home: MapHome) {
        self.add(4, |out| {
            out.put_u32(page);
            home.places.iter().for_each(|place| out.put_u32(*place));
            out.put_u32(home.crc);
        });
    }

    fn add(&mut self, number: u8, encode: impl FnOnce(&mut Vec<u8>)) {
        self.scratch.clear();
        self.scratch.put_bytes(&[number, 0, 0, 0]);
        encode(&mut self.scratch);
        let bytes = u16::try_from(self.scratch.len()).expect("an entry fits a block");
        self.scratch[2..4].copy_from_slice(&bytes.to_le_bytes());
        match self.payloads.back_mut() {
            Some((payload, count)) if payload.len() + self.scratch.len() <= PAYLOAD_BYTES => {
                payload.extend_from_slice(&self.scratch);
                *count += 1;
            }
            _ => {
                let mut payload = Vec::with_capacity(PAYLOAD_BYTES);
                payload.extend_from_slice(&self.scratch);
                self.payloads.push_back((payload, 1));
            }
        }
    }

    /// Blocks that were not taken yet. The last of them may not be complete.
    pub(super) fn blocks(&self) -> usize {
        self.payloads.len()
    }

    /// Takes the first of them, for its place in the chain.
    pub(super) fn encode_first(&mut self, of: RootOf, index: u32, next: u32) -> Bytes {
        let (payload, count) = self.payloads.pop_front().expect("a block is left");
        encode_block(of, index, next, &payload, count)
    }
}

/// The attempt at a checkpoint that a block of the directory belongs to. One that power cut off and the one after the next
/// opening have the same sequence, but not the same last commit: opening commits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct RootOf {
    pub(super) device: DeviceId,
    /// Of the checkpoint.
    pub(super) sequence: u64,
    /// The last commit that it has.
    pub(super) covered: u64,
}

fn encode_block(of: RootOf, index: u32, next: u32, payload: &[u8], entries: u32) -> Bytes {
    let mut out = Vec::with_capacity(BLOCK_BYTES);
    out.put_bytes(&MAGIC);
    out.put_u16(FORMAT);
    out.put_u16(0);
    out.put_u32(0);
    out.put_bytes(&of.device.uuid.0);
    out.put_u64(of.device.incarnation.0);
    out.put_u64(of.sequence);
    out.put_u32(index);
    out.put_u32(next);
    out.put_u32(payload.len() as u32);
    out.put_u32(entries);
    out.put_u64(of.covered);
    out.put_bytes(payload);
    let mut block = BlockBuf::copied_from(&out);
    crc::put(&mut block, CRC_FIELD);
    block.freeze()
}

/// A block of the directory, read.
#[derive(Clone, Debug)]
pub(super) struct DirectoryBlock {
    /// Zero at the end.
    pub(super) next: u32,
    pub(super) entries: Vec<DirectoryEntry>,
}

/// Reads block `index` of the directory of a checkpoint. `end` is the first block after the space.
pub(super) fn decode_block(block: &[u8], of: RootOf, index: u32, end: u32) -> Result<DirectoryBlock, DecodeError> {
    if block.len() != BLOCK_BYTES || !block.starts_with(&MAGIC) {
        return Err(DecodeError::Invalid("magic"));
    }
    if !crc::matches(block, CRC_FIELD) {
        return Err(DecodeError::Invalid("crc"));
    }
    let mut reader = Reader::new(block);
    reader.array::<8>()?;
    if reader.u16()? != FORMAT {
        return Err(DecodeError::Invalid("format"));
    }
    reader.zeroes(2)?;
    reader.u32()?;
    let written_by = DeviceId {
        uuid: DeviceUuid(reader.array()?),
        incarnation: Incarnation(reader.u64()?),
    };
    if written_by != of.device || (reader.u64()?, reader.u32()?) != (of.sequence, index) {
        return Err(DecodeError::Invalid("place in the chain"));
    }
    let next = reader.u32()?;
    if next != 0 {
        check_place(next, end)?;
    }
    let bytes = reader.count("payload", PAYLOAD_BYTES)?;
    let count = reader.u32()?;
    if reader.u64()? != of.covered {
        return Err(DecodeError::Invalid("commit of the checkpoint"));
    }
    let mut payload = Reader::new(reader.bytes(bytes)?);
    let mut entries = Vec::new();
    while payload.remaining() > 0 {
        entries.push(decode_entry(&mut payload, end)?);
    }
    reader.zeroes(reader.remaining())?;
    if entries.len() != count as usize {
        return Err(DecodeError::Invalid("number of entries"));
    }
    Ok(DirectoryBlock { next, entries })
}

fn decode_entry(reader: &mut Reader<'_>, end: u32) -> Result<DirectoryEntry, DecodeError> {
    let number = reader.u8()?;
    reader.zeroes(1)?;
    let bytes = usize::from(reader.u16()?);
    let body = bytes.checked_sub(HEAD_BYTES).ok_or(DecodeError::Invalid("length"))?;
    let mut body = Reader::new(reader.bytes(body)?);
    let entry = match number {
        1 => {
            let volume = VolumeId(body.u64()?);
            let generation = Generation::new(body.u32()?).ok_or(DecodeError::Invalid("generation"))?;
            DirectoryEntry::Seal(volume, generation)
        }
        2 => {
            let group = get_group(&mut body)?;
            let role = body.u8()?;
            body.zeroes(3)?;
            let (epoch, blocks) = (Epoch(body.u64()?), body.u64()?);
            DirectoryEntry::Replica(group, Replica { role, epoch, blocks })
        }
        3 => {
            let key = ChunkKey::decode(&mut body)?;
            let kind = body.u8()?;
            body.zeroes(3)?;
            let (place, crc) = (body.u32()?, body.u32()?);
            let state = match kind {
                1 => {
                    check_place(place, end)?;
                    Some(LeafState::OnDisk(Home { place, crc }))
                }
                0 | 2 if (place, crc) == (0, 0) => (kind == 2).then_some(LeafState::Broken),
                _ => return Err(DecodeError::Invalid("leaf kind")),
            };
            DirectoryEntry::Leaf(key, state)
        }
        4 => {
            let page = body.u32()?;
            let places = [body.u32()?, body.u32()?];
            places.iter().try_for_each(|place| check_place(*place, end))?;
            if places[0] == places[1] {
                return Err(DecodeError::Invalid("both copies of a page at one place"));
            }
            DirectoryEntry::MapPage(
                page,
                MapHome {
                    places,
                    crc: body.u32()?,
                },
            )
        }
        6 => {
            let group = get_group(&mut body)?;
            let layer = Layer(body.u32()?);
            DirectoryEntry::Layer(group, layer, body.u64()?)
        }
        7 => DirectoryEntry::Doomed(Doomed::decode(&mut body)?),
        8 => DirectoryEntry::Orphans,
        5 => DirectoryEntry::Scrub(ScrubState::decode(&mut body)?),
        _ => return Err(DecodeError::Invalid("entry type")),
    };
    body.finish()?;
    Ok(entry)
}

/// Blocks that the directory of a catalog takes at the most.
pub(super) fn blocks_max(catalog: &Catalog, map_pages: usize) -> u64 {
    let bytes = catalog.seals.len() * 16
        + catalog.replicas.len() * 28
        + catalog.layers.len() * 28
        + catalog.doomed.len() * (HEAD_BYTES + DOOMED_BYTES)
        + catalog.leaves.len() * LEAF_ENTRY_BYTES
        + map_pages * MAP_ENTRY_BYTES
        + HEAD_BYTES
        + ScrubState::BYTES
        + HEAD_BYTES;
    // A block is left once the next entry does not fit: at least this much of it is used.
    let used = PAYLOAD_BYTES - ENTRY_BYTES_MAX;
    (bytes / used + 1) as u64
}

const LEAF_ENTRY_BYTES: usize = HEAD_BYTES + KEY_BYTES + 12;
const MAP_ENTRY_BYTES: usize = HEAD_BYTES + 16;
/// The largest entry.
const ENTRY_BYTES_MAX: usize = LEAF_ENTRY_BYTES;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::leaf::Leaf;
    use super::super::limits::StoreLimits;
    use super::*;
    use cairn_proto::ids::{ChunkIndex, GroupIndex};

    const END: u32 = 10_000;

    fn device() -> DeviceId {
        DeviceId {
            uuid: DeviceUuid([5; 16]),
            incarnation: Incarnation(2),
        }
    }

    fn root() -> RootOf {
        RootOf {
            device: device(),
            sequence: 4,
            covered: 77,
        }
    }

    fn group(index: u8) -> GroupId {
        GroupId {
            volume: VolumeId(9),
            index: GroupIndex(index),
        }
    }

    /// A catalog with leaves of all kinds, larger than one block of directory.
    fn catalog(seed: u64, leaves: u32) -> Catalog {
        let mut prng = crate::testing::Prng::new(seed);
        let mut catalog = Catalog::new(&StoreLimits::tiny());
        catalog.orphans = prng.chance(1, 2);
        catalog.seals.insert(VolumeId(9), Generation::new(77).unwrap());
        let replica = Replica {
            role: 2,
            epoch: Epoch(6),
            blocks: 12345,
        };
        catalog.replicas.insert(group(1), replica);
        catalog.layers.insert((group(1), Layer(3)), 12345);
        for layer in [None, Some(Layer(3))] {
            let group = group(2);
            catalog.doomed.insert(Doomed { group, layer });
        }
        catalog.scrub = Some(ScrubState {
            pass: 3,
            ..ScrubState::default()
        });
        catalog.leaves.clear();
        for chunk in 0..leaves {
            let state = match prng.below(5) {
                0 => None,
                1 => Some(LeafState::Broken),
                _ => Some(LeafState::OnDisk(Home {
                    place: prng.between(4, u64::from(END) - 1) as u32,
                    crc: prng.next_u64() as u32,
                })),
            };
            let key = ChunkKey {
                group: group(1),
                chunk: ChunkIndex(chunk),
                layer: Layer(3),
            };
            catalog.leaves.insert(key, Leaf::listed(state));
        }
        catalog
    }

    fn blocks(catalog: &Catalog) -> Vec<Bytes> {
        let mut writer = DirectoryWriter::default();
        writer.catalog(catalog);
        for (key, leaf) in &catalog.leaves {
            let listed = match (leaf.state, leaf.home) {
                (LeafState::Broken, _) => LeafRef::Broken,
                (_, Some(home)) => LeafRef::Stored(home),
                (_, None) => LeafRef::Empty,
            };
            writer.leaf(*key, listed);
        }
        let places = [55, 77];
        writer.map_page(2, MapHome { places, crc: 66 });
        assert!(
            writer.blocks() as u64 <= blocks_max(catalog, 1),
            "{} blocks",
            writer.blocks()
        );
        let count = writer.blocks() as u32;
        let next = |i| if i + 1 < count { 101 + i } else { 0 };
        (0..count).map(|i| writer.encode_first(root(), i, next(i))).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn a_directory_comes_back_as_it_was_written(seed in any::<u64>(), leaves in 0..300u32) {
            let catalog = catalog(seed, leaves);
            let blocks = blocks(&catalog);
            let mut found = Catalog::new(&StoreLimits::tiny());
            found.leaves.clear();
            let mut map_pages = 0;
            for (i, block) in blocks.iter().enumerate() {
                let read = decode_block(block, root(), i as u32, END).unwrap();
                prop_assert_eq!(read.next, if i + 1 < blocks.len() { 101 + i as u32 } else { 0 });
                for entry in read.entries {
                    match entry {
                        DirectoryEntry::Seal(volume, generation) => drop(found.seals.insert(volume, generation)),
                        DirectoryEntry::Replica(group, replica) => drop(found.replicas.insert(group, replica)),
                        DirectoryEntry::Leaf(key, state) => drop(found.leaves.insert(key, Leaf::listed(state))),
                        DirectoryEntry::MapPage(page, home) => {
                            map_pages += 1;
                            prop_assert_eq!((page, home.places, home.crc), (2, [55, 77], 66));
                        }
                        DirectoryEntry::Orphans => found.orphans = true,
                        DirectoryEntry::Scrub(state) => found.scrub = Some(state),
                        DirectoryEntry::Layer(group, layer, blocks) => {
                            found.layers.insert((group, layer), blocks);
                        }
                        DirectoryEntry::Doomed(doomed) => drop(found.doomed.insert(doomed)),
                    }
                }
            }
            prop_assert_eq!(map_pages, 1);
            prop_assert_eq!(format!("{:?}", found.leaves), format!("{:?}", catalog.leaves));
            prop_assert_eq!(found.scrub, catalog.scrub);
            prop_assert_eq!(found.orphans, catalog.orphans);
            prop_assert_eq!((found.layers, found.doomed), (catalog.layers, catalog.doomed));
            prop_assert_eq!((found.seals, found.replicas), (catalog.seals, catalog.replicas));
        }

        #[test]
        fn no_flipped_bit_passes(at in 0..BLOCK_BYTES, bit in 0..8u8) {
            let mut block = blocks(&catalog(1, 2))[0].to_vec();
            block[at] ^= 1 << bit;
            prop_assert!(decode_block(&block, root(), 0, END).is_err());
        }

        #[test]
        fn nonsense_with_a_right_crc_is_refused_without_panic(at in HEADER_BYTES..BLOCK_BYTES, value in any::<u32>()) {
            let mut block = blocks(&catalog(1, 2))[0].to_vec();
            let at = at.min(BLOCK_BYTES - 4);
            block[at..at + 4].copy_from_slice(&value.to_le_bytes());
            crc::put(&mut block, CRC_FIELD);
            if let Ok(read) = decode_block(&block, root(), 0, END) {
                prop_assert!(read.entries.len() <= PAYLOAD_BYTES / HEAD_BYTES);
            }
        }
    }

    #[test]
    fn a_block_of_another_checkpoint_or_place_is_refused() {
        let blocks = blocks(&catalog(1, 200));
        assert!(blocks.len() > 1);
        let refused = |of: RootOf, index| decode_block(&blocks[0], of, index, END).is_err();
        assert!(!refused(root(), 0));
        assert!(refused(RootOf { sequence: 5, ..root() }, 0));
        assert!(refused(RootOf { covered: 78, ..root() }, 0));
        assert!(refused(root(), 1));
        assert!(decode_block(&blocks[0][..512], root(), 0, END).is_err());
    }
}
