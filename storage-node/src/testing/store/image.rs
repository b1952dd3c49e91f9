//! Devices whose metadata says nonsense that is well-formed: a structure of a real device is replaced, its CRC is made
//! right again, and so is every CRC of it that other structures keep. What opens such a device must not panic, must not
//! go on for ever, and must not return data that its checksum does not match.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use cairn_proto::block::{Content, Cursor};
use cairn_proto::checksum::block_checksum;
use cairn_proto::disk::{DeviceBlock, DiskGeometry};
use cairn_proto::ids::{Epoch, Version};
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::units::BlockRange;

use super::content::GROUP;
use super::rig::{Rig, formatted};
use super::workload::Workload;
#[cfg(test)]
use crate::store::OpenError;
use crate::store::api::{StoreReply, StoreRequest};
use crate::store::inspect::{InspectOptions, inspect};
use crate::store::{ScrubCursor, StoreLimits, StoreState};
use crate::testing::{MemoryDevice, Prng};

/// What a structure is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// A copy of the superblock.
    Superblock,
    /// The header of a checkpoint.
    Checkpoint,
    /// All pages of a batch's record.
    Record,
    /// A block of a checkpoint's directory.
    Directory,
    /// A page that others refer to by its CRC: of the index, or of the free-space map.
    Page,
}

/// A structure on the device.
#[derive(Clone, Debug)]
struct Structure {
    kind: Kind,
    places: Vec<u64>,
    content: Vec<u8>,
}

/// A device with everything on it, to be damaged with care.
#[derive(Clone, Debug)]
pub struct Image {
    device: MemoryDevice,
    structures: Vec<Structure>,
    references: Vec<Vec<(usize, usize)>>,
}

/// Where every structure has its own CRC; pages have none.
const CRC_FIELD: usize = 12;
/// Where a record has the CRC of its first bytes, and how many these are.
const HEAD_CRC_FIELD: usize = 188;
const HEAD_BYTES: usize = 192;
/// Where a record has its number of pages, and their places.
const RECORD_PAGES_FIELD: usize = 10;
const RECORD_PLACES_FIELD: usize = 72;
/// Structures whose CRCs are made right for one change at the most: a change to an old record goes through all later ones.
const MENDED_MAX: usize = 400;
/// Steps of opening and reading a device at the most: more is taken for an endless loop.
const STEPS_MAX: u64 = 200_000;

impl Image {
    /// A device that has been in use for a while; different for each seed.
    pub fn new(seed: u64) -> Image {
        let mut prng = Prng::new(seed);
        let limits = StoreLimits {
            overwrite_reserve_blocks: 16,
            checkpoint_log_pages: prng.between(4, 40),
            ..StoreLimits::tiny()
        };
        let geometry = DiskGeometry {
            blocks: prng.between(400, 900),
            volatile_cache: true,
        };
        let mut rig = Rig::opening(formatted(geometry), limits, seed);
        rig.settle();
        rig.call(StoreRequest::CreateReplica {
            group: GROUP,
            role: 1,
            epoch: Epoch(1),
        });
        let mut workload = Workload::new(300, 32);
        for _ in 0..prng.between(20, 120) {
            let request = workload.request(&mut prng, false);
            rig.submit(request);
            if prng.chance(1, 3) {
                rig.settle();
            }
        }
        rig.settle();
        rig.device.power_cut(&mut prng);
        let structures = structures(&rig.device);
        Image {
            device: rig.device,
            references: references(&structures),
            structures,
        }
    }

    /// The numbers of all structures of a kind.
    pub fn all(&self, kind: Kind) -> impl Iterator<Item = usize> {
        let structures = self.structures.iter().enumerate();
        structures.filter_map(move |(number, structure)| (structure.kind == kind).then_some(number))
    }

    /// How many structures there are.
    pub fn structures(&self) -> usize {
        self.structures.len()
    }

    /// What one of them is now.
    pub fn content(&self, number: usize) -> &[u8] {
        &self.structures[number].content
    }

    /// The device with other content in place of a structure: what is missing is as it was, what is too much is left out.
    /// `mend` makes CRCs right, as far as they are its own or say what it is.
    pub fn with(&self, number: usize, content: &[u8], mend: bool) -> MemoryDevice {
        let mut changed = BTreeMap::from([(number, self.structures[number].clone())]);
        let target = changed.get_mut(&number).expect("it was just put there");
        let len = content.len().min(target.content.len());
        target.content[..len].copy_from_slice(&content[..len]);
        let mut waiting = VecDeque::new();
        if mend {
            waiting.push_back((number, self.structures[number].name()));
        }
        let mut mended = 0;
        while let Some((number, old)) = waiting.pop_front() {
            let structure = changed.get_mut(&number).expect("what waits was changed");
            structure.mend();
            let new = structure.name();
            mended += 1;
            if old == new || mended > MENDED_MAX {
                continue;
            }
            for &(other, at) in &self.references[number] {
                let structure = changed.entry(other).or_insert_with(|| self.structures[other].clone());
                let name = structure.name();
                // What was replaced may have held the name too.
                if structure.content[at..at + 4] == old {
                    structure.content[at..at + 4].copy_from_slice(&new);
                    waiting.push_back((other, name));
                }
            }
        }
        let mut device = self.device.clone();
        for Structure { places, content, .. } in changed.into_values() {
            for (place, block) in places.iter().zip(content.chunks_exact(BLOCK_BYTES)) {
                device.poke(DeviceBlock(*place), block.try_into().expect("a whole block"));
            }
        }
        device
    }
}

impl Image {
    /// The device with some numbers of one structure changed, all CRCs being right: blocks are said to stand where others
    /// stand, or nowhere, and counts are wrong by a little. Different for each seed.
    pub fn nonsense(&self, seed: u64) -> MemoryDevice {
        let mut prng = Prng::new(seed);
        let number = self.of_interest(&mut prng);
        let mut content = self.structures[number].content.clone();
        let blocks = self.device.geometry().blocks as u32;
        for _ in 0..prng.between(1, 3) {
            let first = prng.below(content.len() as u64 - 4) as usize;
            let number_at = |at: usize| u32::from_le_bytes(content[at..at + 4].try_into().expect("four bytes"));
            // The next thing that may be a place or a count; from the start if there is none behind.
            let at = (first..content.len() - 4)
                .chain(0..first)
                .find(|at| (1..blocks).contains(&number_at(*at)));
            let Some(at) = at else { continue };
            let old = number_at(at);
            let new = match prng.below(8) {
                0 => 0,
                1 => u32::MAX - prng.below(3) as u32,
                2 => old.wrapping_sub(1),
                3 => old + 1,
                4 => self.structures[prng.below(self.structures.len() as u64) as usize].places[0] as u32,
                _ => prng.below(u64::from(blocks)) as u32,
            };
            content[at..at + 4].copy_from_slice(&new.to_le_bytes());
        }
        self.with(number, &content, true)
    }
}

impl Image {
    /// One of the structures, of every kind equally often, and rather one that was written lately: others may not matter.
    fn of_interest(&self, prng: &mut Prng) -> usize {
        let kinds = [
            Kind::Superblock,
            Kind::Checkpoint,
            Kind::Record,
            Kind::Directory,
            Kind::Page,
        ];
        let kind = kinds[prng.below(5) as usize];
        let mut all: Vec<usize> = self.all(kind).collect();
        if kind != Kind::Page {
            let sequence = |number: &usize| self.structures[*number].content[40..48].iter().rev().copied().collect();
            all.sort_by_key(|number| std::cmp::Reverse::<Vec<u8>>(sequence(number)));
            all.truncate(8);
        }
        all[prng.below(all.len() as u64) as usize]
    }
}

/// Where the name of each structure stands in others: structure and byte.
fn references(structures: &[Structure]) -> Vec<Vec<(usize, usize)>> {
    let mut references = vec![Vec::new(); structures.len()];
    let names: BTreeMap<[u8; 4], usize> = structures.iter().map(Structure::name).zip(0..).collect();
    for (other, structure) in structures.iter().enumerate() {
        for (at, bytes) in structure.content.windows(4).enumerate() {
            let named = (bytes != [0; 4]).then(|| names.get(bytes)).flatten();
            references[*named.unwrap_or(&other)].extend(named.filter(|named| **named != other).map(|_| (other, at)));
        }
    }
    references
}

/// Finds the metadata of a device: what is not zero and not the content that tests write.
fn structures(device: &MemoryDevice) -> Vec<Structure> {
    let mut structures = Vec::new();
    let mut later_pages = BTreeSet::new();
    for place in 0..device.geometry().blocks {
        let block = device.peek(DeviceBlock(place));
        let is_data = block[16..] == block[..BLOCK_BYTES - 16];
        if is_data || later_pages.contains(&place) {
            continue;
        }
        let kind = match &block[..8] {
            b"CAIRNDEV" => Kind::Superblock,
            b"CAIRNCKP" => Kind::Checkpoint,
            b"CAIRNREC" => Kind::Record,
            b"CAIRNDIR" => Kind::Directory,
            _ => Kind::Page,
        };
        let mut places = vec![place];
        if kind == Kind::Record {
            let pages = block[RECORD_PLACES_FIELD..].chunks_exact(4);
            let pages = pages.take(block[RECORD_PAGES_FIELD].into()).skip(1);
            let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes"));
            places.extend(pages.map(|bytes| u64::from(number(bytes))));
            later_pages.extend(places[1..].iter().copied());
        }
        let blocks = places.iter().map(|place| &device.peek(DeviceBlock(*place))[..]);
        let content = blocks.collect::<Vec<_>>().concat();
        structures.push(Structure { kind, places, content });
    }
    // A later page that was met before its record.
    structures.retain(|structure| structure.kind != Kind::Page || !later_pages.contains(&structure.places[0]));
    structures
}

impl Structure {
    /// The CRC by which others know it.
    fn name(&self) -> [u8; 4] {
        match self.kind {
            Kind::Page => crc32fast::hash(&self.content).to_le_bytes(),
            _ => self.content[CRC_FIELD..CRC_FIELD + 4].try_into().expect("four bytes"),
        }
    }

    /// Makes its own CRCs right.
    fn mend(&mut self) {
        if self.kind == Kind::Page {
            return;
        }
        self.content[CRC_FIELD..CRC_FIELD + 4].fill(0);
        if self.kind == Kind::Record {
            put_crc(&mut self.content[..HEAD_BYTES], HEAD_CRC_FIELD);
        }
        put_crc(&mut self.content, CRC_FIELD);
    }
}

fn put_crc(bytes: &mut [u8], field: usize) {
    bytes[field..field + 4].fill(0);
    let crc = crc32fast::hash(bytes);
    bytes[field..field + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Opens a device that may say anything and reads all that it is said to hold. Returns whether it could be opened.
/// Panics if data is returned that does not match its checksum, or if there is no end to it.
pub fn examine(mut device: MemoryDevice, seed: u64) -> bool {
    let options = InspectOptions {
        verify: true,
        volume: None,
    };
    let _ = inspect(&mut device, options, &mut |_| {});
    let mut rig = Rig::opening(device, StoreLimits::tiny(), seed);
    settle(&mut rig);
    if rig.store.state() != StoreState::Open {
        assert!(
            matches!(rig.store.state(), StoreState::Refused(_)),
            "the store is {:?}",
            rig.store.state()
        );
        return false;
    }
    let mut from = Some(Cursor::default());
    while let Some(cursor) = from {
        let request = StoreRequest::Collect {
            group: GROUP,
            from: cursor,
            to: Cursor::END,
            above: Version::ZERO,
            runs_max: 64,
        };
        let StoreReply::Collected { runs, next } = call(&mut rig, request) else {
            break;
        };
        for run in runs {
            if matches!(run.state.content, Content::Data(_)) {
                read_all(&mut rig, run.layer, run.range);
            }
        }
        assert!(
            next.is_none_or(|next| next > cursor),
            "listing goes on at {next:?} after {cursor:?}"
        );
        from = next;
    }
    call(
        &mut rig,
        StoreRequest::Scrub {
            from: ScrubCursor::START,
            blocks_max: 4096,
        },
    );
    true
}

fn read_all(rig: &mut Rig, layer: cairn_proto::ids::Layer, range: BlockRange) {
    let mut start = range.start();
    while start < range.end() {
        let count = (range.end() - start).min(256);
        let piece = BlockRange::new(range.chunk(), start, count).expect("a piece of a range");
        start = piece.end();
        let request = StoreRequest::Read {
            group: GROUP,
            layer,
            range: piece,
        };
        let StoreReply::Read { blocks, bytes } = call(rig, request) else {
            continue;
        };
        let bytes = bytes.concat();
        let mut contents = bytes.chunks_exact(BLOCK_BYTES);
        for (i, state) in (0..).zip(blocks) {
            let Content::Data(checksum) = state.content else {
                continue;
            };
            let content = contents.next().expect("content for each block of data");
            let found = block_checksum(GROUP.volume, piece.volume_block(i), content);
            assert_eq!(found, checksum, "block {i} of {piece} is not what its checksum says");
        }
        assert!(contents.next().is_none(), "more content than blocks of data in {piece}");
    }
}

fn call(rig: &mut Rig, request: StoreRequest) -> StoreReply {
    let ticket = rig.submit(request);
    settle(rig);
    rig.replies.remove(&ticket).expect("an idle store has answered")
}

fn settle(rig: &mut Rig) {
    while rig.step() {
        assert!(rig.completed < STEPS_MAX, "there is no end to it");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_has_every_kind_of_structure_and_opens_as_it_is() {
        let image = Image::new(1);
        for kind in [
            Kind::Superblock,
            Kind::Checkpoint,
            Kind::Record,
            Kind::Directory,
            Kind::Page,
        ] {
            let mut all = image.all(kind).peekable();
            assert!(all.peek().is_some(), "there is no {kind:?}");
            for number in all {
                let content = image.content(number).to_vec();
                assert!(examine(image.with(number, &content, true), 1), "{kind:?} {number}");
            }
        }
    }

    #[test]
    fn well_formed_nonsense_is_refused_or_read_with_care() {
        let mut opened = 0;
        for device in 0..4 {
            let image = Image::new(device);
            opened += (0..60).filter(|seed| examine(image.nonsense(*seed), *seed)).count();
        }
        assert!((40..230).contains(&opened), "{opened} of 240 devices could be opened");
    }

    /// A leaf of the directory says that an index page stands where the free-space map knows of nothing.
    #[test]
    fn an_index_page_that_the_map_does_not_know_is_broken_and_takes_nothing_with_it() {
        let mut changed = 0;
        for seed in 0..4 {
            let image = Image::new(seed);
            let pages: Vec<usize> = image.all(Kind::Page).collect();
            let nowhere = (4..).find(|at| {
                let block = image.device.peek(DeviceBlock(*at));
                block.iter().all(|byte| *byte == 0)
            });
            let nowhere = nowhere.expect("some block was never written");
            for leaf in pages
                .iter()
                .filter(|page| image.content(**page).starts_with(b"CAIRNLEF"))
            {
                for page in &pages {
                    let place = (image.structures[*page].places[0] as u32).to_le_bytes();
                    let content = image.content(*leaf);
                    let Some(at) = content.windows(4).position(|bytes| bytes == place) else {
                        continue;
                    };
                    let mut content = content.to_vec();
                    content[at..at + 4].copy_from_slice(&(nowhere as u32).to_le_bytes());
                    let mut device = image.with(*leaf, &content, true);
                    let page = image.content(*page).try_into().expect("a block");
                    device.poke(DeviceBlock(nowhere), page);
                    examine(device, seed);
                    changed += 1;
                }
            }
        }
        assert!(changed > 4, "{changed} leaves were changed");
    }

    /// Bytes of the head of an entry of the directory: its type comes first.
    const ENTRY_HEAD: usize = 4;

    /// The directory says that a replica and its layers have fewer blocks than the log gives back.
    #[test]
    fn a_replica_that_is_said_to_have_no_blocks_is_not_panicked_on() {
        let (mut changed, mut refused, mut believed) = (0, 0, 0);
        for seed in 0..12 {
            let image = Image::new(seed);
            let entry = [&GROUP.volume.0.to_le_bytes()[..], &[GROUP.index.0, 0, 0, 0]].concat();
            for number in image.all(Kind::Directory) {
                let mut content = image.content(number).to_vec();
                let found = content.windows(entry.len()).enumerate();
                let found: Vec<usize> = found.filter(|(_, bytes)| *bytes == entry).map(|(at, _)| at).collect();
                for at in found {
                    // Of a replica, a role and an epoch come before the count; of a layer, its number.
                    let before = match content[at - ENTRY_HEAD] {
                        2 => 12,
                        6 => 4,
                        _ => continue,
                    };
                    let count = at + entry.len() + before;
                    content[count..count + 8].fill(0);
                }
                if content == image.content(number) {
                    continue;
                }
                changed += 1;
                let device = image.with(number, &content, true);
                let mut rig = Rig::opening(device.clone(), StoreLimits::tiny(), seed);
                settle(&mut rig);
                match rig.store.state() {
                    StoreState::Open => believed += 1,
                    StoreState::Refused(OpenError::Damaged { words }) => {
                        refused += 1;
                        assert!(words.contains("blocks"), "seed {seed}: {words}");
                    }
                    other => panic!("seed {seed}: {other:?}"),
                }
                let opens = examine(device, seed);
                assert_eq!(opens, rig.store.state() == StoreState::Open, "seed {seed}");
            }
        }
        assert!(changed > 12, "{changed} directories were changed");
        // Where the log takes nothing from it, only the inspection can tell.
        assert!(
            refused > 0 && believed > 0,
            "{refused} were refused, {believed} believed"
        );
    }

    /// CRCs are made right so far that the device opens with content that was not there before.
    #[test]
    fn a_change_gets_past_all_checks_of_crcs() {
        let image = Image::new(1);
        for kind in [Kind::Record, Kind::Page] {
            let opened = image.all(kind).filter(|number| {
                let mut content = image.content(*number).to_vec();
                // A block's version, or the checkpoint that a record was written after.
                content[48] ^= 1;
                examine(image.with(*number, &content, true), 1)
            });
            assert!(opened.count() > 0, "no changed {kind:?} is believed");
        }
    }
}
