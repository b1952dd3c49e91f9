//! The directory of a checkpoint: a chain of blocks with whole entries in each. The layout is in DESIGN.md.

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::codec::{DecodeError, Put, Reader};
use cairn_proto::ids::{DeviceId, DeviceUuid, Generation, GroupId, Incarnation, VolumeId};
use cairn_proto::limits::BLOCK_BYTES;

use super::catalog::{Catalog, Replica};
use super::chunk::{Chunk, ChunkKey, Home};
use super::crc;
use super::entry::check_place;
use super::record::{get_group, put_group};
use super::scrub_state::ScrubState;

const MAGIC: [u8; 8] = *b"CAIRNDIR";
const FORMAT: u16 = 1;
const CRC_FIELD: usize = 12;
const HEADER_BYTES: usize = 64;
const PAYLOAD_BYTES: usize = BLOCK_BYTES - HEADER_BYTES;
/// Type, a zero byte, length with this head.
const HEAD_BYTES: usize = 4;

/// One entry.
#[derive(Clone, Debug)]
pub(super) enum DirectoryEntry {
    Seal(VolumeId, Generation),
    Replica(GroupId, Replica),
    Chunk(ChunkKey, Chunk),
    MapPage(u32, Home),
    Scrub(ScrubState),
}

/// Entries packed into blocks, before the blocks have places.
#[derive(Debug, Default)]
pub(super) struct DirectoryWriter {
    payloads: Vec<(Vec<u8>, u32)>,
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
                out.put_u64(replica.blocks);
            });
        }
        if let Some(state) = &catalog.scrub {
            self.add(5, |out| state.encode(out));
        }
        for (key, chunk) in &catalog.chunks {
            self.add(3, |out| chunk.encode(*key, out));
        }
    }

    pub(super) fn map_page(&mut self, page: u32, home: Home) {
        self.add(4, |out| {
            out.put_u32(page);
            out.put_u32(home.place);
            out.put_u32(home.crc);
        });
    }

    fn add(&mut self, number: u8, encode: impl FnOnce(&mut Vec<u8>)) {
        self.scratch.clear();
        self.scratch.put_bytes(&[number, 0, 0, 0]);
        encode(&mut self.scratch);
        let bytes = u16::try_from(self.scratch.len()).expect("an entry fits a block");
        self.scratch[2..4].copy_from_slice(&bytes.to_le_bytes());
        match self.payloads.last_mut() {
            Some((payload, count)) if payload.len() + self.scratch.len() <= PAYLOAD_BYTES => {
                payload.extend_from_slice(&self.scratch);
                *count += 1;
            }
            _ => {
                let mut payload = Vec::with_capacity(PAYLOAD_BYTES);
                payload.extend_from_slice(&self.scratch);
                self.payloads.push((payload, 1));
            }
        }
    }

    pub(super) fn blocks(&self) -> usize {
        self.payloads.len()
    }

    /// The blocks, for these places.
    pub(super) fn finish(self, device: DeviceId, sequence: u64, places: &[u32]) -> Vec<Bytes> {
        assert_eq!(places.len(), self.payloads.len(), "places for the directory");
        let blocks = self.payloads.iter().enumerate().map(|(index, (payload, count))| {
            let next = places.get(index + 1).copied().unwrap_or(0);
            encode_block(device, sequence, index as u32, next, payload, *count)
        });
        blocks.collect()
    }
}

fn encode_block(device: DeviceId, sequence: u64, index: u32, next: u32, payload: &[u8], entries: u32) -> Bytes {
    let mut out = Vec::with_capacity(BLOCK_BYTES);
    out.put_bytes(&MAGIC);
    out.put_u16(FORMAT);
    out.put_u16(0);
    out.put_u32(0);
    out.put_bytes(&device.uuid.0);
    out.put_u64(device.incarnation.0);
    out.put_u64(sequence);
    out.put_u32(index);
    out.put_u32(next);
    out.put_u32(payload.len() as u32);
    out.put_u32(entries);
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
pub(super) fn decode_block(
    block: &[u8],
    device: DeviceId,
    sequence: u64,
    index: u32,
    end: u32,
) -> Result<DirectoryBlock, DecodeError> {
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
    if written_by != device || (reader.u64()?, reader.u32()?) != (sequence, index) {
        return Err(DecodeError::Invalid("place in the chain"));
    }
    let next = reader.u32()?;
    if next != 0 {
        check_place(next, end)?;
    }
    let bytes = reader.count("payload", PAYLOAD_BYTES)?;
    let count = reader.u32()?;
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
            let blocks = body.u64()?;
            DirectoryEntry::Replica(group, Replica { role, blocks })
        }
        3 => {
            let (key, chunk) = Chunk::decode(&mut body, end)?;
            DirectoryEntry::Chunk(key, chunk)
        }
        4 => {
            let page = body.u32()?;
            let (place, crc) = (body.u32()?, body.u32()?);
            check_place(place, end)?;
            DirectoryEntry::MapPage(page, Home { place, crc })
        }
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
        + catalog.chunks.len() * (HEAD_BYTES + 36)
        + catalog.pages * 12
        + map_pages * 16
        + HEAD_BYTES
        + ScrubState::BYTES;
    // A block is left once the next entry does not fit: at least this much of it is used.
    let used = PAYLOAD_BYTES - CHUNK_ENTRY_BYTES_MAX;
    (bytes / used + 1) as u64
}

/// The largest entry.
const CHUNK_ENTRY_BYTES_MAX: usize = HEAD_BYTES + 36 + super::limits::PAGES_PER_CHUNK as usize * 12;

const _: () = assert!(CHUNK_ENTRY_BYTES_MAX * 2 < PAYLOAD_BYTES);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::chunk::Page;
    use super::super::entry::{Hole, Uniform};
    use super::super::limits::PAGES_PER_CHUNK;
    use super::*;
    use cairn_proto::ids::{ChunkIndex, GroupIndex, Layer, Version};

    const END: u32 = 10_000;

    fn device() -> DeviceId {
        DeviceId {
            uuid: DeviceUuid([5; 16]),
            incarnation: Incarnation(2),
        }
    }

    fn group(index: u8) -> GroupId {
        GroupId {
            volume: VolumeId(9),
            index: GroupIndex(index),
        }
    }

    /// A catalog with all kinds of pages, larger than one block of directory.
    fn catalog(seed: u64, chunks: u32) -> Catalog {
        let mut prng = crate::testing::Prng::new(seed);
        let mut catalog = Catalog::default();
        catalog.seals.insert(VolumeId(9), Generation::new(77).unwrap());
        let replica = Replica { role: 2, blocks: 12345 };
        catalog.replicas.insert(group(1), replica);
        catalog.scrub = Some(ScrubState {
            pass: 3,
            ..ScrubState::default()
        });
        for chunk in 0..chunks {
            let mut content = Chunk::NEVER;
            content.floor.version = Version::from_bits(prng.next_u64());
            for page in 0..PAGES_PER_CHUNK as u8 {
                let state = match prng.below(5) {
                    0 => continue,
                    1 => Page::Broken,
                    2 => Page::Uniform(Uniform {
                        hole: Hole::Zero,
                        version: Version::from_bits(prng.next_u64()),
                    }),
                    _ => Page::OnDisk(Home {
                        place: prng.between(4, u64::from(END) - 1) as u32,
                        crc: prng.next_u64() as u32,
                    }),
                };
                content.pages.insert(page, state);
            }
            catalog.pages += content.pages.len();
            let key = ChunkKey {
                group: group(1),
                chunk: ChunkIndex(chunk),
                layer: Layer(3),
            };
            catalog.chunks.insert(key, content);
        }
        catalog
    }

    fn blocks(catalog: &Catalog) -> Vec<Bytes> {
        let mut writer = DirectoryWriter::default();
        writer.catalog(catalog);
        writer.map_page(2, Home { place: 55, crc: 66 });
        assert!(
            writer.blocks() as u64 <= blocks_max(catalog, 1),
            "{} blocks",
            writer.blocks()
        );
        let places: Vec<u32> = (0..writer.blocks() as u32).map(|i| 100 + i).collect();
        writer.finish(device(), 4, &places)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn a_directory_comes_back_as_it_was_written(seed in any::<u64>(), chunks in 0..30u32) {
            let catalog = catalog(seed, chunks);
            let blocks = blocks(&catalog);
            let mut found = Catalog::default();
            let mut map_pages = 0;
            for (i, block) in blocks.iter().enumerate() {
                let read = decode_block(block, device(), 4, i as u32, END).unwrap();
                prop_assert_eq!(read.next, if i + 1 < blocks.len() { 101 + i as u32 } else { 0 });
                for entry in read.entries {
                    match entry {
                        DirectoryEntry::Seal(volume, generation) => drop(found.seals.insert(volume, generation)),
                        DirectoryEntry::Replica(group, replica) => drop(found.replicas.insert(group, replica)),
                        DirectoryEntry::Chunk(key, chunk) => drop(found.chunks.insert(key, chunk)),
                        DirectoryEntry::MapPage(..) => map_pages += 1,
                        DirectoryEntry::Scrub(state) => found.scrub = Some(state),
                    }
                }
            }
            prop_assert_eq!(map_pages, 1);
            prop_assert_eq!(format!("{:?}", found.chunks), format!("{:?}", catalog.chunks));
            prop_assert_eq!(found.scrub, catalog.scrub);
            prop_assert_eq!((found.seals, found.replicas), (catalog.seals, catalog.replicas));
        }

        #[test]
        fn no_flipped_bit_passes(at in 0..BLOCK_BYTES, bit in 0..8u8) {
            let mut block = blocks(&catalog(1, 2))[0].to_vec();
            block[at] ^= 1 << bit;
            prop_assert!(decode_block(&block, device(), 4, 0, END).is_err());
        }

        #[test]
        fn nonsense_with_a_right_crc_is_refused_without_panic(at in HEADER_BYTES..BLOCK_BYTES, value in any::<u32>()) {
            let mut block = blocks(&catalog(1, 2))[0].to_vec();
            let at = at.min(BLOCK_BYTES - 4);
            block[at..at + 4].copy_from_slice(&value.to_le_bytes());
            crc::put(&mut block, CRC_FIELD);
            if let Ok(read) = decode_block(&block, device(), 4, 0, END) {
                prop_assert!(read.entries.len() <= PAYLOAD_BYTES / HEAD_BYTES);
            }
        }
    }

    #[test]
    fn a_block_of_another_checkpoint_or_place_is_refused() {
        let blocks = blocks(&catalog(1, 9));
        assert!(blocks.len() > 1);
        assert!(decode_block(&blocks[0], device(), 5, 0, END).is_err());
        assert!(decode_block(&blocks[0], device(), 4, 1, END).is_err());
        assert!(decode_block(&blocks[0][..512], device(), 4, 0, END).is_err());
    }
}
