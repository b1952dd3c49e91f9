//! Walking the index: every page of every chunk, against its CRC and against the free-space map.

use std::collections::BTreeSet;

use cairn_proto::disk::{DeviceBlock, DiskError};
use cairn_proto::ids::{GroupId, Layer};

use super::owners::audit;
use super::report::{Damage, DamageKind, DamageList, DamagedBlocks, LayerSummary, ReplicaSummary, Verified};
use super::verify::{BlockCheck, DataCheck};
use super::{BlockReader, InspectOptions, InspectProgress};
use crate::store::allocator::Bitmap;
use crate::store::catalog::Effects;
use crate::store::chunk::{ChunkKey, Home, Page, PageKey, Resident};
use crate::store::doomed::Doomed;
use crate::store::engine::Engine;
use crate::store::entry::Entry;
use crate::store::leaf::LeafState;
use crate::store::limits::PAGE_ENTRIES;

/// Index pages that are read together.
const PAGES_TOGETHER: usize = 256;
/// Leaves of the directory that are in memory together.
const LEAVES_TOGETHER: usize = 256;

/// A walk over a device that was opened for reading.
pub(super) struct Walk<'a> {
    engine: &'a mut Engine,
    reader: &'a mut dyn BlockReader,
    options: InspectOptions,
    damage: &'a mut DamageList,
    progress: &'a mut dyn FnMut(InspectProgress),
    /// Places that an entry, or the index itself, was found to need.
    seen: Bitmap,
    data: DataCheck,
    pages_read: u64,
    pages_in_all: u64,
    lost_pages: u64,
    lost_leaves: BTreeSet<ChunkKey>,
}

/// What is known of a page before it is read.
enum Found {
    Entries(Box<[Entry; PAGE_ENTRIES as usize]>, Option<Home>),
    OnDisk(Home),
    Lost,
}

/// A chunk, or one of its pages.
type ChunkPage = (ChunkKey, Option<(u8, Found)>);

/// A run of data within a chunk, while it grows.
#[derive(Default)]
struct Extents {
    chunk: Option<ChunkKey>,
    /// The place after the last one.
    end: u32,
}

impl<'a> Walk<'a> {
    pub(super) fn new(
        engine: &'a mut Engine,
        reader: &'a mut dyn BlockReader,
        options: InspectOptions,
        damage: &'a mut DamageList,
        progress: &'a mut dyn FnMut(InspectProgress),
    ) -> Walk<'a> {
        let pages_in_all = engine.space.index_blocks;
        Walk {
            seen: Bitmap::new(engine.identity.blocks),
            data: DataCheck::new(options.verify, engine.space.data_blocks),
            engine,
            reader,
            options,
            damage,
            progress,
            pages_read: 0,
            pages_in_all,
            lost_pages: 0,
            lost_leaves: BTreeSet::new(),
        }
    }

    /// Walks all replicas that were asked for.
    pub(super) fn replicas(&mut self) -> Vec<ReplicaSummary> {
        let wanted = self.options.volume;
        let replicas = self.engine.catalog.replicas.iter();
        let replicas: Vec<ReplicaSummary> = replicas
            .filter(|(group, _)| wanted.is_none_or(|volume| volume == group.volume))
            .map(|(group, replica)| ReplicaSummary {
                group: *group,
                role: replica.role,
                epoch: replica.epoch,
                blocks_counted: replica.blocks,
                layers: Vec::new(),
            })
            .collect();
        // What was dropped takes space until that is given back.
        let doomed = self.engine.catalog.doomed.clone();
        for dropped in doomed.iter().filter(|doomed| doomed.layer.is_none()) {
            if wanted.is_none_or(|volume| volume == dropped.group.volume) {
                self.group(dropped.group);
            }
        }
        replicas
            .into_iter()
            .map(|mut replica| {
                let group = replica.group;
                replica.layers = self.group(group);
                replica.layers.retain(|found| {
                    let layer = Some(found.layer);
                    !doomed.contains(&Doomed { group, layer })
                });
                replica
            })
            .collect()
    }

    /// The leaves that may have chunks of a group.
    fn leaves_of(&self, group: GroupId) -> Vec<ChunkKey> {
        let first = ChunkKey { group, ..ChunkKey::MIN };
        let catalog = &self.engine.catalog;
        let (from, _) = catalog.leaf_of(first);
        let leaves = catalog.leaves.range(from..).take_while(|(key, _)| key.group <= group);
        leaves.map(|(key, _)| *key).collect()
    }

    /// Reads leaves that are not in memory. Returns those.
    fn load(&mut self, leaves: &[ChunkKey]) -> Vec<ChunkKey> {
        let end = (self.engine.identity.blocks - 1) as u32;
        let mut homes: Vec<(ChunkKey, Home)> = Vec::new();
        for key in leaves {
            match self.engine.catalog.leaves[key].state {
                LeafState::OnDisk(home) => homes.push((*key, home)),
                LeafState::Broken => {
                    self.lost_leaf(*key, None, "the device knows that it has lost a leaf of its directory")
                }
                LeafState::Loaded => {}
            }
        }
        let wanted = homes.iter().map(|(_, home)| (DeviceBlock(home.place.into()), 1));
        let wanted: Vec<(DeviceBlock, u32)> = wanted.collect();
        let mut loaded = Vec::new();
        for ((key, home), block) in homes.into_iter().zip(self.reader.read(&wanted)) {
            let catalog = &mut self.engine.catalog;
            catalog.loaded_leaf(key, home, &block.unwrap_or_default(), end, &mut Effects::default());
            if catalog.leaves[&key].state == LeafState::Broken {
                self.lost_leaf(
                    key,
                    Some(home),
                    "a leaf of the directory can't be read or its CRC is wrong",
                );
            } else {
                loaded.push(key);
            }
        }
        loaded
    }

    /// Forgets leaves again, so that memory does not grow with the device.
    fn unload(&mut self, leaves: &[ChunkKey]) {
        for key in leaves {
            // The first attempt finds that it was used, the second that it was not used since.
            let catalog = &mut self.engine.catalog;
            let _ = catalog.evict_leaf(*key) || catalog.evict_leaf(*key);
        }
    }

    /// Nothing is known of its chunks. A leaf may have chunks of several groups: it is reported once.
    fn lost_leaf(&mut self, key: ChunkKey, home: Option<Home>, words: &str) {
        if self.lost_leaves.insert(key) {
            let place = home.map(|home| DeviceBlock(home.place.into()));
            self.damage.add_own(DamageKind::IndexPage, place, words.to_string());
        }
    }

    /// The pages that a group has in some leaves, in order, each with its chunk. Each chunk comes once without a page first.
    fn pages_of(&self, group: GroupId, leaves: &[ChunkKey]) -> Vec<ChunkPage> {
        let mut pages = Vec::new();
        let chunks = leaves.iter().flat_map(|leaf| self.engine.catalog.chunks_in(*leaf));
        for (key, chunk) in chunks.filter(|(key, _)| key.group == group) {
            pages.push((*key, None));
            for (number, page) in chunk.pages.iter() {
                let found = match page {
                    Page::Uniform(_) => continue,
                    Page::Resident(resident) => Found::Entries(Box::new(resident.entries), resident.home),
                    Page::OnDisk(home) => Found::OnDisk(*home),
                    Page::Broken => Found::Lost,
                };
                pages.push((*key, Some((number, found))));
            }
        }
        pages
    }

    fn group(&mut self, group: GroupId) -> Vec<LayerSummary> {
        let mut layers: Vec<LayerSummary> = Vec::new();
        let mut extents = Extents::default();
        for leaves in self.leaves_of(group).chunks(LEAVES_TOGETHER) {
            let loaded = self.load(leaves);
            let pages = self.pages_of(group, leaves);
            self.pages(pages, &mut layers, &mut extents);
            self.unload(&loaded);
        }
        layers
    }

    fn pages(&mut self, pages: Vec<ChunkPage>, layers: &mut Vec<LayerSummary>, extents: &mut Extents) {
        let mut pages = pages.into_iter().peekable();
        while pages.peek().is_some() {
            let together: Vec<_> = pages.by_ref().take(PAGES_TOGETHER).collect();
            let wanted: Vec<(DeviceBlock, u32)> = together
                .iter()
                .filter_map(|(_, page)| match page {
                    Some((_, Found::OnDisk(home))) => Some((DeviceBlock(home.place.into()), 1)),
                    _ => None,
                })
                .collect();
            let mut blocks = self.reader.read(&wanted).into_iter();
            for (chunk, page) in together {
                let layer = layer_of(layers, chunk.layer);
                let Some((number, found)) = page else {
                    layer.chunks += 1;
                    continue;
                };
                let key = PageKey { chunk, page: number };
                let content = match found {
                    Found::Lost => Err("the device knows that it has lost this part of its index".to_string()),
                    Found::Entries(entries, home) => Ok((entries, home)),
                    Found::OnDisk(home) => self.decode(home, blocks.next().expect("one per page that is read")),
                };
                layer.index_pages += 1;
                self.pages_read += 1;
                match content {
                    Ok((entries, home)) => self.page(key, &entries, home, layer, extents),
                    Err(words) => self.lost(key, words),
                }
            }
            (self.progress)(InspectProgress::Index(self.pages_read, self.pages_in_all));
            self.data.go_on(self.reader, self.damage, self.progress);
        }
    }

    fn decode(
        &self,
        home: Home,
        block: Result<bytes::Bytes, DiskError>,
    ) -> Result<(Box<[Entry; PAGE_ENTRIES as usize]>, Option<Home>), String> {
        let end = (self.engine.identity.blocks - 1) as u32;
        match block.map(|block| Resident::decode(&block, home, end)) {
            Ok(Some(resident)) => Ok((Box::new(resident.entries), Some(home))),
            Ok(None) => Err(format!("index page at device block {}: its CRC is wrong", home.place)),
            Err(error) => Err(format!("index page at device block {}: {error}", home.place)),
        }
    }

    /// An index page: nothing is known of its blocks.
    fn lost(&mut self, key: PageKey, words: String) {
        self.lost_pages += 1;
        self.damage.add(Damage {
            kind: DamageKind::IndexPage,
            blocks: Some(DamagedBlocks {
                count: PAGE_ENTRIES,
                ..blocks_at(key, 0, None)
            }),
            place: None,
            words,
        });
    }

    fn page(
        &mut self,
        key: PageKey,
        entries: &[Entry; PAGE_ENTRIES as usize],
        home: Option<Home>,
        layer: &mut LayerSummary,
        extents: &mut Extents,
    ) {
        if let Some(home) = home {
            self.own(key, home.place);
        }
        for (slot, entry) in (0..).zip(entries) {
            let at = blocks_at(key, slot, Some(entry));
            match entry.data_place() {
                Some(place) => {
                    layer.data_blocks += 1;
                    extents.add(key.chunk, place, layer);
                    self.block(at, place);
                    self.data.add(BlockCheck {
                        at,
                        place,
                        checksum: entry.checksum,
                    });
                }
                None if entry.state().content == cairn_proto::block::Content::Damaged => self.damage.add(Damage {
                    kind: DamageKind::Lost,
                    blocks: Some(at),
                    place: None,
                    words: "the device knows that it has lost this block".to_string(),
                }),
                None => {}
            }
        }
    }

    /// A place of the index itself.
    fn own(&mut self, key: PageKey, place: u32) {
        let (kind, words) = if self.seen.set(place, true) {
            (DamageKind::Double, "its index page stands where something else does")
        } else if !self.engine.space.data.get(place) {
            (DamageKind::Unmapped, "the free-space map does not know its index page")
        } else {
            return;
        };
        self.damage.add(Damage {
            kind,
            blocks: Some(DamagedBlocks {
                count: PAGE_ENTRIES,
                ..blocks_at(key, 0, None)
            }),
            place: Some(DeviceBlock(place.into())),
            words: words.to_string(),
        });
    }

    /// A place of data.
    fn block(&mut self, at: DamagedBlocks, place: u32) {
        let (kind, words) = if self.seen.set(place, true) {
            (DamageKind::Double, "its data stands where something else does")
        } else if !self.engine.space.data.get(place) {
            (DamageKind::Unmapped, "the free-space map does not know its data")
        } else {
            return;
        };
        self.damage.add(Damage {
            kind,
            blocks: Some(at),
            place: Some(DeviceBlock(place.into())),
            words: words.to_string(),
        });
    }

    /// Verifies what is left, and compares what was seen with what is counted.
    pub(super) fn finish(mut self, replicas: &[ReplicaSummary]) -> Verified {
        self.data.finish(self.reader, self.damage, self.progress);
        // What lost pages say is not known: nothing can be concluded from what was not seen.
        if self.lost_pages == 0 && self.lost_leaves.is_empty() {
            for replica in replicas {
                let found: u64 = replica.layers.iter().map(|layer| layer.data_blocks).sum();
                if found != replica.blocks_counted {
                    let words = format!(
                        "the replica of group {} counts {} blocks of data and has {found}",
                        replica.group, replica.blocks_counted
                    );
                    self.damage.add_own(DamageKind::Count, None, words);
                }
            }
            if self.options.volume.is_none() {
                self.leaks();
                if self.options.verify {
                    audit(self.engine, self.seen, self.damage);
                }
            }
        }
        Verified {
            blocks: self.data.verified(),
            index_pages: self.pages_read,
        }
    }

    /// Blocks that are counted as data, and that no entry of the index needs.
    fn leaks(&mut self) {
        let mapped = self.engine.space.data.words().iter().zip(self.seen.words());
        let mut leaked = 0;
        let mut first = None;
        for (word, (mapped, seen)) in (0u64..).zip(mapped) {
            let only_mapped = mapped & !seen;
            if only_mapped != 0 {
                first = first.or(Some(word * 64 + u64::from(only_mapped.trailing_zeros())));
                leaked += only_mapped.count_ones();
            }
        }
        if let Some(first) = first {
            let swept = match self.engine.catalog.orphans {
                true => " (left by a lost part of the index; they are given back when the node starts)",
                false => "",
            };
            let words = format!("{leaked} blocks are counted as data and nobody needs them{swept}; the first");
            self.damage.add_own(DamageKind::Leak, Some(DeviceBlock(first)), words);
        }
    }
}

impl Extents {
    fn add(&mut self, chunk: ChunkKey, place: u32, layer: &mut LayerSummary) {
        if self.chunk != Some(chunk) {
            layer.data_chunks += 1;
            layer.extents += 1;
        } else if self.end != place {
            layer.extents += 1;
        }
        self.chunk = Some(chunk);
        self.end = place + 1;
    }
}

fn layer_of(layers: &mut Vec<LayerSummary>, layer: Layer) -> &mut LayerSummary {
    let at = match layers.binary_search_by_key(&layer, |found| found.layer) {
        Ok(at) => at,
        Err(at) => {
            let summary = LayerSummary {
                layer,
                ..LayerSummary::default()
            };
            layers.insert(at, summary);
            at
        }
    };
    &mut layers[at]
}

fn blocks_at(key: PageKey, slot: u32, entry: Option<&Entry>) -> DamagedBlocks {
    DamagedBlocks {
        group: key.chunk.group,
        layer: key.chunk.layer,
        chunk: key.chunk.chunk,
        block: u32::from(key.page) * PAGE_ENTRIES + slot,
        count: 1,
        version: entry.map(|entry| entry.version),
    }
}
