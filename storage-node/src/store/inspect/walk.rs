//! Walking the index: every page of every chunk, against its CRC and against the free-space map.

use cairn_proto::disk::{DeviceBlock, DiskError};
use cairn_proto::ids::{GroupId, Layer};

use super::report::{Damage, DamageKind, DamageList, DamagedBlocks, LayerSummary, ReplicaSummary, Verified};
use super::verify::{BlockCheck, DataCheck};
use super::{BlockReader, InspectOptions, InspectProgress};
use crate::store::allocator::Bitmap;
use crate::store::catalog::Effects;
use crate::store::chunk::{ChunkKey, Home, Page, PageKey, Resident};
use crate::store::engine::Engine;
use crate::store::entry::Entry;
use crate::store::leaf::LeafState;
use crate::store::limits::PAGE_ENTRIES;

/// Index pages that are read together.
const PAGES_TOGETHER: usize = 256;

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
}

/// What is known of a page before it is read.
enum Found {
    Entries(Box<[Entry; PAGE_ENTRIES as usize]>, Option<Home>),
    OnDisk(Home),
    Lost,
}

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
                blocks_counted: replica.blocks,
                layers: Vec::new(),
            })
            .collect();
        replicas
            .into_iter()
            .map(|mut replica| {
                replica.layers = self.group(replica.group);
                replica
            })
            .collect()
    }

    /// Reads the leaves that may have chunks of a group.
    fn load_leaves(&mut self, group: GroupId) {
        let end = (self.engine.identity.blocks - 1) as u32;
        let first = ChunkKey { group, ..ChunkKey::MIN };
        let catalog = &self.engine.catalog;
        let (from, _) = catalog.leaf_of(first);
        let leaves = catalog.leaves.range(from..).take_while(|(key, _)| key.group <= group);
        let leaves: Vec<(ChunkKey, LeafState)> = leaves.map(|(key, leaf)| (*key, leaf.state)).collect();
        for together in leaves.chunks(PAGES_TOGETHER) {
            let homes = together.iter().filter_map(|(key, state)| match state {
                LeafState::OnDisk(home) => Some((*key, *home)),
                _ => None,
            });
            let homes: Vec<(ChunkKey, Home)> = homes.collect();
            let wanted: Vec<(DeviceBlock, u32)> = homes
                .iter()
                .map(|(_, home)| (DeviceBlock(home.place.into()), 1))
                .collect();
            for ((key, home), block) in homes.into_iter().zip(self.reader.read(&wanted)) {
                let mut effects = Effects::default();
                let catalog = &mut self.engine.catalog;
                catalog.loaded_leaf(key, home, &block.unwrap_or_default(), end, &mut effects);
                if catalog.leaves[&key].state == LeafState::Broken {
                    self.lost_leaf(Some(home), "a leaf of the directory can't be read or its CRC is wrong");
                }
            }
            for _ in together.iter().filter(|(_, state)| *state == LeafState::Broken) {
                self.lost_leaf(None, "the device knows that it has lost a leaf of its directory");
            }
        }
    }

    /// Nothing is known of its chunks.
    fn lost_leaf(&mut self, home: Option<Home>, words: &str) {
        self.lost_pages += 1;
        let place = home.map(|home| DeviceBlock(home.place.into()));
        self.damage.add_own(DamageKind::IndexPage, place, words.to_string());
    }

    /// The pages of a group, in order, each with its chunk. Chunks without pages come with none.
    fn pages_of(&self, group: GroupId) -> Vec<(ChunkKey, Option<(u8, Found)>)> {
        let mut pages = Vec::new();
        for (key, chunk) in self.engine.catalog.chunks_of(group) {
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
        self.load_leaves(group);
        let mut layers: Vec<LayerSummary> = Vec::new();
        let mut extents = Extents::default();
        let mut pages = self.pages_of(group).into_iter().peekable();
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
                let layer = layer_of(&mut layers, chunk.layer);
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
                    Ok((entries, home)) => self.page(key, &entries, home, layer, &mut extents),
                    Err(words) => self.lost(key, words),
                }
            }
            (self.progress)(InspectProgress::Index(self.pages_read, self.pages_in_all));
            self.data.go_on(self.reader, self.damage, self.progress);
        }
        layers
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
        if self.lost_pages == 0 {
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
            let words = format!("{leaked} blocks are counted as data and nobody needs them; the first");
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
