//! Leaves of the directory: the chunks of a key range, one block each. The layout is in DESIGN.md.

use cairn_proto::buffer::BlockBuf;
use cairn_proto::codec::{DecodeError, Put, Reader};
use cairn_proto::limits::BLOCK_BYTES;

use super::chunk::{CHUNK_BYTES_MAX, Chunk, ChunkKey, Home, PageKey};

const MAGIC: [u8; 8] = *b"CAIRNLEF";
const FORMAT: u16 = 1;
const HEADER_BYTES: usize = 16;
/// Bytes of chunks that fit a leaf.
pub(super) const LEAF_CAPACITY: usize = BLOCK_BYTES - HEADER_BYTES;

/// A leaf's memory beside its chunks: it stands in the table of leaves and in two sets at the most.
pub(super) const LEAF_MEMORY: usize = (size_of::<Leaf>() + 3 * size_of::<ChunkKey>()) * 3 / 2;

const _: () = assert!(CHUNK_BYTES_MAX * 2 <= LEAF_CAPACITY);

/// Where the chunks of a leaf are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum LeafState {
    /// In memory.
    Loaded,
    /// At its home only.
    OnDisk(Home),
    /// What was written can't be read back: nothing is known of its chunks.
    Broken,
}

/// One leaf. Its range goes from the key under which it is listed to that of the next.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leaf {
    pub(super) state: LeafState,
    /// Where the device has it as it is here; `None` once it differs, and while it is empty.
    pub(super) home: Option<Home>,
    /// The epoch in which it was changed last; zero if it was not since it was read.
    pub(super) epoch: u64,
    /// Whether it was used since eviction last looked at it.
    pub(super) used: bool,
    /// Chunks, their bytes in a block, and their bytes in memory; of a loaded leaf.
    pub(super) size: LeafSize,
}

/// How large a loaded leaf is.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct LeafSize {
    pub(super) chunks: usize,
    pub(super) bytes: usize,
    pub(super) memory: usize,
}

impl Leaf {
    /// A leaf without chunks that no device has.
    pub(super) fn empty() -> Leaf {
        Leaf {
            state: LeafState::Loaded,
            home: None,
            epoch: 0,
            used: true,
            size: LeafSize::default(),
        }
    }

    /// A leaf as the root lists it: `None` is an empty one.
    pub(super) fn listed(state: Option<LeafState>) -> Leaf {
        let mut leaf = Leaf::empty();
        leaf.used = false;
        leaf.state = state.unwrap_or(LeafState::Loaded);
        if let LeafState::OnDisk(home) = leaf.state {
            leaf.home = Some(home);
        }
        leaf
    }
}

impl LeafSize {
    pub(super) fn add(&mut self, chunk: &Chunk) {
        self.chunks += 1;
        self.bytes += chunk.encoded_bytes();
        self.memory += chunk.memory();
    }

    pub(super) fn subtract(&mut self, chunk: &Chunk) {
        self.chunks -= 1;
        self.bytes -= chunk.encoded_bytes();
        self.memory -= chunk.memory();
    }
}

/// A leaf's block as of one moment. Homes of pages that were not encoded yet are filled in later.
#[derive(Debug)]
pub(super) struct Skeleton {
    content: Vec<u8>,
    missing: Vec<(PageKey, usize)>,
}

impl Skeleton {
    pub(super) fn new<'a>(chunks: impl Iterator<Item = (&'a ChunkKey, &'a Chunk)>) -> Skeleton {
        let mut content = Vec::with_capacity(BLOCK_BYTES);
        let mut missing = Vec::new();
        content.put_bytes(&MAGIC);
        content.put_u16(FORMAT);
        content.put_bytes(&[0; 6]);
        let mut count = 0u16;
        for (key, chunk) in chunks {
            count += 1;
            chunk.encode(*key, &mut content, |page, at| missing.push((page, at)));
        }
        assert!(content.len() <= BLOCK_BYTES, "a leaf of {} bytes", content.len());
        let bytes = (content.len() - HEADER_BYTES) as u16;
        content[10..12].copy_from_slice(&count.to_le_bytes());
        content[12..14].copy_from_slice(&bytes.to_le_bytes());
        Skeleton { content, missing }
    }

    /// The block and its CRC. `home` knows the homes of pages that were missing.
    pub(super) fn finish(mut self, home: impl Fn(&PageKey) -> Home) -> (BlockBuf, u32) {
        for (page, at) in self.missing {
            let home = home(&page);
            self.content[at..at + 4].copy_from_slice(&home.place.to_le_bytes());
            self.content[at + 4..at + 8].copy_from_slice(&home.crc.to_le_bytes());
        }
        let block = BlockBuf::copied_from(&self.content);
        let crc = crc32fast::hash(&block);
        (block, crc)
    }
}

/// Reads a leaf that was at `home`; `None` if it is not what was written there. Keys must be ascending, from `from` on and
/// before `to`. `end` is the first block after the space.
pub(super) fn decode_leaf(
    block: &[u8],
    home: Home,
    (from, to): (ChunkKey, Option<ChunkKey>),
    end: u32,
) -> Option<Vec<(ChunkKey, Chunk)>> {
    if block.len() != BLOCK_BYTES || crc32fast::hash(block) != home.crc {
        return None;
    }
    let chunks = decode_chunks(block, end).ok()?;
    let ascending = chunks.windows(2).all(|pair| pair[0].0 < pair[1].0);
    let inside = |key: &ChunkKey| *key >= from && to.is_none_or(|to| *key < to);
    (ascending && chunks.iter().all(|(key, _)| inside(key))).then_some(chunks)
}

fn decode_chunks(block: &[u8], end: u32) -> Result<Vec<(ChunkKey, Chunk)>, DecodeError> {
    let mut reader = Reader::new(block);
    if reader.array::<8>()? != MAGIC || reader.u16()? != FORMAT {
        return Err(DecodeError::Invalid("leaf"));
    }
    let (count, bytes) = (reader.u16()?, usize::from(reader.u16()?));
    reader.zeroes(2)?;
    let mut body = Reader::new(reader.bytes(bytes)?);
    let mut chunks = Vec::new();
    while body.remaining() > 0 {
        chunks.push(Chunk::decode(&mut body, end)?);
    }
    reader.zeroes(reader.remaining())?;
    if chunks.len() != usize::from(count) {
        return Err(DecodeError::Invalid("number of chunks"));
    }
    Ok(chunks)
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::super::chunk::{Page, Resident};
    use super::super::entry::{Hole, Uniform};
    use super::super::limits::PAGES_PER_CHUNK;
    use super::*;
    use crate::testing::Prng;
    use cairn_proto::ids::{ChunkIndex, GroupId, GroupIndex, Layer, Version, VolumeId};

    const END: u32 = 10_000;

    fn key(chunk: u32) -> ChunkKey {
        ChunkKey {
            group: GroupId {
                volume: VolumeId(9),
                index: GroupIndex(1),
            },
            chunk: ChunkIndex(chunk),
            layer: Layer(3),
        }
    }

    /// Chunks with all kinds of pages, as many as fit.
    fn chunks(seed: u64) -> Vec<(ChunkKey, Chunk)> {
        let mut prng = Prng::new(seed);
        let sparse = prng.between(1, 40);
        let mut chunks = Vec::new();
        let mut bytes = 0;
        loop {
            let mut chunk = Chunk::NEVER;
            chunk.floor.version = Version::from_bits(prng.next_u64() | 1);
            for page in 0..PAGES_PER_CHUNK as u8 {
                let state = match prng.below(3 + sparse) {
                    0 => Page::Broken,
                    1 => Page::Uniform(Uniform {
                        hole: Hole::Zero,
                        version: Version::from_bits(prng.next_u64()),
                    }),
                    2 => Page::OnDisk(Home {
                        place: prng.between(4, u64::from(END) - 1) as u32,
                        crc: prng.next_u64() as u32,
                    }),
                    _ => continue,
                };
                chunk.pages.get_or_insert(page, state);
            }
            bytes += chunk.encoded_bytes();
            if bytes > LEAF_CAPACITY {
                return chunks;
            }
            chunks.push((key(chunks.len() as u32), chunk));
        }
    }

    fn block(chunks: &[(ChunkKey, Chunk)]) -> (BlockBuf, Home) {
        let skeleton = Skeleton::new(chunks.iter().map(|(key, chunk)| (key, chunk)));
        let (block, crc) = skeleton.finish(|page| panic!("{page:?} is missing"));
        (block, Home { place: 7, crc })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn a_leaf_comes_back_as_it_was_written(seed in any::<u64>()) {
            let chunks = chunks(seed);
            let (block, home) = block(&chunks);
            let read = decode_leaf(&block, home, (ChunkKey::MIN, None), END).unwrap();
            prop_assert_eq!(format!("{read:?}"), format!("{chunks:?}"));
            prop_assert!(decode_leaf(&block, home, (key(1), None), END).is_none(), "a key before the range");
            prop_assert!(decode_leaf(&block, home, (key(0), Some(key(chunks.len() as u32 - 1))), END).is_none());
            prop_assert!(decode_leaf(&block[..512], home, (ChunkKey::MIN, None), END).is_none());
        }

        #[test]
        fn no_flipped_bit_passes(seed in any::<u64>(), at in 0..BLOCK_BYTES, bit in 0..8u8) {
            let (block, home) = block(&chunks(seed));
            let mut block = block.to_vec();
            block[at] ^= 1 << bit;
            prop_assert!(decode_leaf(&block, home, (ChunkKey::MIN, None), END).is_none());
        }

        #[test]
        fn nonsense_with_a_right_crc_is_refused_without_panic(seed in any::<u64>(), at in 0..BLOCK_BYTES - 4, value in any::<u32>()) {
            let (block, home) = block(&chunks(seed));
            let mut block = block.to_vec();
            block[at..at + 4].copy_from_slice(&value.to_le_bytes());
            let home = Home { crc: crc32fast::hash(&block), ..home };
            if let Some(read) = decode_leaf(&block, home, (ChunkKey::MIN, None), END) {
                prop_assert!(read.len() <= LEAF_CAPACITY / 40);
            }
        }
    }

    #[test]
    fn homes_that_are_known_later_are_filled_in() {
        let mut chunk = Chunk::NEVER;
        chunk
            .pages
            .get_or_insert(5, Page::Resident(Box::new(Resident::new(Uniform::NEVER))));
        let skeleton = Skeleton::new([(&key(1), &chunk)].into_iter());
        let later = Home { place: 77, crc: 88 };
        let (block, crc) = skeleton.finish(|page| {
            assert_eq!((page.chunk, page.page), (key(1), 5));
            later
        });
        let read = decode_leaf(&block, Home { place: 7, crc }, (ChunkKey::MIN, None), END).unwrap();
        assert!(matches!(read[0].1.pages.get(&5), Some(Page::OnDisk(home)) if *home == later));
    }
}
