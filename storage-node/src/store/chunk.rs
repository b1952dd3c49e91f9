//! The index of one chunk in one layer: a floor, and pages where it is more than that.

use cairn_proto::codec::{DecodeError, Put, Reader};
use cairn_proto::ids::{ChunkIndex, GroupId, GroupIndex, Layer, VolumeId};
use cairn_proto::limits::BLOCK_BYTES;

use super::allocator::Bitmap;
use super::entry::{Entry, Uniform, check_place};
use super::limits::{PAGE_ENTRIES, PAGES_PER_CHUNK};
use super::page_table::PageTable;
use super::record::{get_group, put_group};

/// Names a chunk; in the order in which blocks are listed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct ChunkKey {
    pub(super) group: GroupId,
    pub(super) chunk: ChunkIndex,
    pub(super) layer: Layer,
}

/// Names an index page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct PageKey {
    pub(super) chunk: ChunkKey,
    pub(super) page: u8,
}

/// Where an index page stands on the device, and the CRC of its content.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Home {
    pub(super) place: u32,
    pub(super) crc: u32,
}

/// An index page in memory.
#[derive(Clone, Debug)]
pub(super) struct Resident {
    pub(super) entries: [Entry; PAGE_ENTRIES as usize],
    /// Where the device has it as it is here; `None` once it differs.
    pub(super) home: Option<Home>,
    /// The epoch in which it was changed last; zero if it was not since it was read.
    pub(super) epoch: u64,
    /// Whether it was used since eviction last looked at it.
    pub(super) used: bool,
}

/// One page of a chunk. A page that is missing from the chunk is uniform at its floor.
#[derive(Clone, Debug)]
pub(super) enum Page {
    Uniform(Uniform),
    Resident(Box<Resident>),
    OnDisk(Home),
    /// It could not be read back, so nothing is known about its blocks.
    Broken,
}

/// All that is known of a chunk in one layer.
#[derive(Clone, Debug)]
pub(super) struct Chunk {
    pub(super) floor: Uniform,
    pub(super) pages: PageTable,
}

impl Chunk {
    pub(super) const NEVER: Chunk = Chunk {
        floor: Uniform::NEVER,
        pages: PageTable::EMPTY,
    };

    /// The entry of a block; `None` if its page is not in memory.
    pub(super) fn entry(&self, block: u32) -> Option<Entry> {
        match self.pages.get(&page_of(block)) {
            None => Some(self.floor.entry()),
            Some(Page::Uniform(uniform)) => Some(uniform.entry()),
            Some(Page::Resident(resident)) => Some(resident.entries[slot_of(block)]),
            Some(Page::OnDisk(_) | Page::Broken) => None,
        }
    }

    /// Whether nothing is known of it: such a chunk is not listed.
    pub(super) fn is_never(&self) -> bool {
        self.pages.is_empty() && self.floor == Uniform::NEVER
    }

    /// Bytes that it takes in a leaf.
    pub(super) fn encoded_bytes(&self) -> usize {
        CHUNK_BYTES + self.pages.len() * PAGE_BYTES
    }

    /// Bytes that it takes in memory, without its resident pages.
    pub(super) fn memory(&self) -> usize {
        CHUNK_MEMORY + self.pages.memory()
    }

    /// Appends its leaf entry: group, chunk, layer, floor, a bit per page that is listed, then each of these: kind (0
    /// absent, 1 zero, 2 page, 3 broken), three zero bytes, and version, or place and CRC, or zero. `unknown` is told
    /// which pages have no home yet, and where in `out` it belongs.
    pub(super) fn encode(&self, key: ChunkKey, out: &mut Vec<u8>, mut unknown: impl FnMut(PageKey, usize)) {
        key.encode(out);
        self.floor.encode(out);
        out.put_u64(self.pages.mask());
        for (number, page) in self.pages.iter() {
            match page {
                Page::Uniform(uniform) => uniform.encode(out),
                Page::OnDisk(home) => put_home(out, *home),
                Page::Broken => {
                    out.put_u8(3);
                    out.put_bytes(&[0; 11]);
                }
                Page::Resident(resident) => {
                    put_home(out, resident.home.unwrap_or(Home { place: 0, crc: 0 }));
                    if resident.home.is_none() {
                        let page = PageKey {
                            chunk: key,
                            page: number,
                        };
                        unknown(page, out.len() - 8);
                    }
                }
            }
        }
    }

    pub(super) fn decode(reader: &mut Reader<'_>, end: u32) -> Result<(ChunkKey, Chunk), DecodeError> {
        let key = ChunkKey::decode(reader)?;
        let floor = Uniform::decode(reader)?;
        let mask = reader.u64()?;
        let pages = (0..mask.count_ones())
            .map(|_| decode_page(reader, end))
            .collect::<Result<Vec<_>, _>>()?;
        let pages = PageTable::of(mask, pages);
        let chunk = Chunk { floor, pages };
        if chunk.is_never() {
            return Err(DecodeError::Invalid("chunk"));
        }
        Ok((key, chunk))
    }
}

/// Bytes of a key.
pub(super) const KEY_BYTES: usize = 20;
/// Bytes of a chunk in a leaf, without its pages.
const CHUNK_BYTES: usize = KEY_BYTES + 12 + 8;
/// Bytes of a page of a chunk in a leaf.
const PAGE_BYTES: usize = 12;
/// The largest chunk in a leaf.
pub(super) const CHUNK_BYTES_MAX: usize = CHUNK_BYTES + PAGES_PER_CHUNK as usize * PAGE_BYTES;
/// Memory of a chunk: it stands in a B-tree, whose nodes are taken to be two thirds full.
const CHUNK_MEMORY: usize = (size_of::<ChunkKey>() + size_of::<Chunk>()) * 3 / 2;
/// Memory of a resident page: it stands in two sets beside itself at the most.
pub(super) const PAGE_MEMORY: usize = size_of::<Resident>() + 2 * size_of::<PageKey>() * 3 / 2;

impl ChunkKey {
    /// Before all others.
    pub(super) const MIN: ChunkKey = ChunkKey {
        group: GroupId {
            volume: VolumeId(0),
            index: GroupIndex(0),
        },
        chunk: ChunkIndex(0),
        layer: Layer(0),
    };

    /// One of its pages.
    pub(super) fn page(self, page: u8) -> PageKey {
        PageKey { chunk: self, page }
    }

    /// The next key after it; itself if it is the last that can be.
    pub(super) fn next(self) -> ChunkKey {
        let ChunkKey { group, chunk, layer } = self;
        match (layer.0.checked_add(1), chunk.0.checked_add(1)) {
            (Some(next), _) => ChunkKey {
                layer: Layer(next),
                ..self
            },
            (None, Some(next)) => ChunkKey {
                group,
                chunk: ChunkIndex(next),
                layer: Layer(0),
            },
            (None, None) => self,
        }
    }

    /// Group, chunk, layer.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        put_group(out, self.group);
        out.put_u32(self.chunk.0);
        out.put_u32(self.layer.0);
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<ChunkKey, DecodeError> {
        Ok(ChunkKey {
            group: get_group(reader)?,
            chunk: ChunkIndex(reader.u32()?),
            layer: Layer(reader.u32()?),
        })
    }
}

fn put_home(out: &mut Vec<u8>, home: Home) {
    out.put_u8(2);
    out.put_bytes(&[0; 3]);
    out.put_u32(home.place);
    out.put_u32(home.crc);
}

fn decode_page(reader: &mut Reader<'_>, end: u32) -> Result<Page, DecodeError> {
    match reader.clone().u8()? {
        0 | 1 => Uniform::decode(reader).map(Page::Uniform),
        2 => {
            reader.u8()?;
            reader.zeroes(3)?;
            let home = Home {
                place: reader.u32()?,
                crc: reader.u32()?,
            };
            check_place(home.place, end)?;
            Ok(Page::OnDisk(home))
        }
        3 => {
            reader.u8()?;
            reader.zeroes(11)?;
            Ok(Page::Broken)
        }
        _ => Err(DecodeError::Invalid("page kind")),
    }
}

impl Resident {
    /// A page that was never on the device.
    pub(super) fn new(uniform: Uniform) -> Resident {
        Resident {
            entries: [uniform.entry(); PAGE_ENTRIES as usize],
            home: None,
            epoch: 0,
            used: true,
        }
    }

    /// The hole that the whole page is, if it is one.
    pub(super) fn uniform(&self) -> Option<Uniform> {
        let first = Uniform::of(&self.entries[0])?;
        self.entries
            .iter()
            .all(|entry| *entry == self.entries[0])
            .then_some(first)
    }

    /// Writes the page as it stands on the device; returns its CRC.
    pub(super) fn encode(&self, block: &mut [u8]) -> u32 {
        let mut out = Vec::with_capacity(BLOCK_BYTES);
        self.entries.iter().for_each(|entry| entry.encode(&mut out));
        block.copy_from_slice(&out);
        crc32fast::hash(block)
    }

    /// Whether the map has the page and all of its data: a page whose CRC is right and that contradicts the map is as
    /// good as broken.
    pub(super) fn agrees_with(&self, map: &Bitmap) -> bool {
        let places = self.entries.iter().filter_map(Entry::data_place);
        places
            .chain(self.home.map(|home| home.place))
            .all(|place| map.get(place))
    }

    /// Reads a page that was at `home`; `None` if it is not what was written there.
    pub(super) fn decode(block: &[u8], home: Home, end: u32) -> Option<Resident> {
        if block.len() != BLOCK_BYTES || crc32fast::hash(block) != home.crc {
            return None;
        }
        let mut reader = Reader::new(block);
        let mut resident = Resident::new(Uniform::NEVER);
        for entry in &mut resident.entries {
            *entry = Entry::decode(&mut reader, end).ok()?;
        }
        resident.home = Some(home);
        Some(resident)
    }
}

/// The page of a block.
pub(super) fn page_of(block: u32) -> u8 {
    (block / PAGE_ENTRIES) as u8
}

/// The block's place in its page.
pub(super) fn slot_of(block: u32) -> usize {
    (block % PAGE_ENTRIES) as usize
}

#[cfg(test)]
mod tests {
    use super::super::entry::Hole;
    use super::*;
    use cairn_proto::checksum::Checksum;
    use cairn_proto::ids::Version;

    const END: u32 = 1000;

    fn page() -> Resident {
        let mut page = Resident::new(Uniform::NEVER);
        page.entries[3] = Entry::data(Version::from_bits(8), Checksum(9), 77);
        page.entries[4] = Entry::damaged(Version::from_bits(7));
        page.entries[5] = Uniform {
            hole: Hole::Zero,
            version: Version::from_bits(6),
        }
        .entry();
        page
    }

    #[test]
    fn a_page_comes_back_as_it_was_written_and_no_flipped_bit_passes() {
        let mut block = vec![0; BLOCK_BYTES];
        let crc = page().encode(&mut block);
        let home = Home { place: 9, crc };
        let read = Resident::decode(&block, home, END).unwrap();
        assert_eq!(read.entries, page().entries);
        assert!(read.epoch == 0 && read.home == Some(home));
        for byte in 0..BLOCK_BYTES {
            let mut bad = block.clone();
            bad[byte] ^= 1 << (byte % 8);
            assert!(Resident::decode(&bad, home, END).is_none(), "byte {byte}");
        }
        assert!(Resident::decode(&block[..512], home, END).is_none());
        assert!(Resident::decode(&block, home, 50).is_none(), "a place after the end");
    }

    #[test]
    fn a_page_of_one_hole_needs_no_page() {
        assert_eq!(page().uniform(), None);
        assert_eq!(Resident::new(Uniform::NEVER).uniform(), Some(Uniform::NEVER));
    }
}
