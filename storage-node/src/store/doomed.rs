//! What was dropped and still takes space: replicas and layers that nobody sees any more.

use std::ops::Bound;

use cairn_proto::ids::{GroupId, GroupIndex, Layer, VolumeId};

use super::catalog::{Catalog, Effects, Unknown, unknown_page};
use super::chunk::{ChunkKey, Home};
use super::entry::Uniform;
use super::leaf::{Leaf, LeafState};
use super::limits::PAGES_PER_CHUNK;

/// A replica, or one of its layers, whose space is being given back.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Doomed {
    pub(super) group: GroupId,
    /// `None`: all of the replica.
    pub(super) layer: Option<Layer>,
}

/// A chunk and a page of it: where giving back goes on.
pub(super) type At = (ChunkKey, u8);

/// What comes next of what was dropped.
pub(super) enum Next {
    /// The leaf that begins here must be loaded first.
    Leaf(ChunkKey, Home),
    /// Pages of a chunk, those among them that must be loaded first, and what comes after them.
    Pages {
        key: ChunkKey,
        first: u8,
        last: u8,
        count: usize,
        unknown: Vec<Unknown>,
        then: At,
    },
    End,
}

impl Doomed {
    fn has(&self, key: &ChunkKey) -> bool {
        key.group == self.group && self.layer.is_none_or(|layer| layer == key.layer)
    }

    /// Where giving back begins.
    pub(super) fn start(&self) -> At {
        (group_start(self.group), 0)
    }
}

fn group_start(group: GroupId) -> ChunkKey {
    ChunkKey { group, ..ChunkKey::MIN }
}

/// Where the keys of the next group begin; `None` after the last.
fn group_end(group: GroupId) -> Option<ChunkKey> {
    let next = match group.index.0.checked_add(1) {
        Some(index) => GroupId {
            index: GroupIndex(index),
            ..group
        },
        None => GroupId {
            volume: VolumeId(group.volume.0.checked_add(1)?),
            index: GroupIndex(0),
        },
    };
    Some(group_start(next))
}

impl Catalog {
    /// Whether a chunk is there for nobody.
    pub(super) fn is_doomed(&self, key: &ChunkKey) -> bool {
        if self.doomed.is_empty() {
            return false;
        }
        let layer = Some(key.layer);
        [None, layer].into_iter().any(|layer| {
            let group = key.group;
            self.doomed.contains(&Doomed { group, layer })
        })
    }

    /// A replica is gone: nobody sees it any more.
    pub(super) fn drop_replica(&mut self, group: GroupId) {
        if self.replicas.remove(&group).is_some() {
            let layers = (group, Layer(0))..=(group, Layer(u32::MAX));
            let layers: Vec<_> = self.layers.range(layers).map(|(key, _)| *key).collect();
            layers.iter().for_each(|key| {
                self.layers.remove(key);
            });
            self.doomed.retain(|doomed| doomed.group != group);
            self.doomed.insert(Doomed { group, layer: None });
        }
    }

    /// A layer is gone.
    pub(super) fn delete_layer(&mut self, group: GroupId, layer: Layer) {
        if let Some(replica) = self.replicas.get_mut(&group) {
            replica.blocks -= self.layers.remove(&(group, layer)).unwrap_or(0);
            let layer = Some(layer);
            self.doomed.insert(Doomed { group, layer });
        }
    }

    /// Looks for at most `pages_max` pages of what was dropped. What lies in a leaf that is lost is passed over.
    pub(super) fn next_doomed(&self, doomed: Doomed, (from, first): At, pages_max: usize) -> Next {
        let (leaf, _) = self.leaf_of(from);
        for (leaf_key, leaf) in self.leaves.range(leaf..) {
            if leaf_key.group > doomed.group {
                break;
            }
            match leaf.state {
                LeafState::OnDisk(home) => return Next::Leaf(*leaf_key, home),
                LeafState::Broken => continue,
                LeafState::Loaded => {}
            }
            let chunks = self.chunks_in(*leaf_key).skip_while(|(key, _)| **key < from);
            let Some((key, chunk)) = chunks.into_iter().find(|(key, _)| doomed.has(key)) else {
                continue;
            };
            let first = if *key == from { first } else { 0 };
            let end = PAGES_PER_CHUNK as u8 - 1;
            let listed: Vec<_> = chunk.pages.range(first..=end).take(pages_max.max(1) + 1).collect();
            let (last, then) = match listed.get(pages_max.max(1)) {
                Some((next, _)) => (next - 1, (*key, *next)),
                None => (end, (key.next(), 0)),
            };
            let now = listed.iter().filter(|(page, _)| *page <= last);
            let unknown = now
                .clone()
                .filter_map(|(page, state)| unknown_page(key.page(*page), state));
            return Next::Pages {
                key: *key,
                first,
                last,
                count: now.clone().count(),
                unknown: unknown.filter(|unknown| *unknown != Unknown::Broken).collect(),
                then,
            };
        }
        Next::End
    }

    /// Pages of a dropped chunk give their space back; with the last of them the chunk goes.
    pub(super) fn reclaim(&mut self, key: ChunkKey, (first, last): (u8, u8), effects: &mut Effects) {
        self.change(key, effects, |chunk, pages| {
            for page in chunk.pages.keys().filter(|page| (first..=last).contains(page)) {
                pages.forget(chunk, page);
            }
            if u32::from(last) + 1 == PAGES_PER_CHUNK {
                chunk.floor = Uniform::NEVER;
            }
            0
        });
    }

    /// The leaves that a group's keys lie in and that are not in memory.
    pub(super) fn unknown_leaves(&self, group: GroupId) -> Vec<Unknown> {
        let (from, _) = self.leaf_of(group_start(group));
        let leaves = self.leaves.range(from..).take_while(|(key, _)| key.group <= group);
        leaves.filter_map(|(key, leaf)| self.unknown_leaf(*key, leaf)).collect()
    }

    /// Whether some replica, or what was dropped, may have chunks in a range of keys.
    fn is_anybody_in(&self, from: ChunkKey, end: Option<ChunkKey>) -> bool {
        let doomed = self.doomed.iter().map(|doomed| &doomed.group);
        let mut groups = self.replicas.keys().chain(doomed);
        groups.any(|group| {
            group_end(*group).is_none_or(|after| after > from) && end.is_none_or(|end| group_start(*group) < end)
        })
    }

    /// All that can be given back was. What remains of a replica is in leaves that are lost, or comes from one that could
    /// not be read when its chunks were looked for: it must not come back with the next replica of the group.
    pub(super) fn reclaimed(&mut self, doomed: Doomed, effects: &mut Effects) {
        self.doomed.remove(&doomed);
        if doomed.layer.is_some() {
            return;
        }
        let keys: Vec<ChunkKey> = self.chunks_of(doomed.group).map(|(key, _)| *key).collect();
        for key in keys {
            self.change(key, effects, |chunk, pages| {
                for page in chunk.pages.keys() {
                    pages.abandon(chunk, page);
                }
                chunk.floor = Uniform::NEVER;
                0
            });
        }
        self.carve(doomed.group);
    }

    /// Takes the range of a group out of leaves that are lost, so that it can be written again; and what is beside it in
    /// them, if nobody has anything there.
    fn carve(&mut self, group: GroupId) {
        let (start, end) = (group_start(group), group_end(group));
        let (from, _) = self.leaf_of(start);
        let last = end.map_or(Bound::Unbounded, Bound::Excluded);
        let leaves = self.leaves.range((Bound::Included(from), last));
        let lost = leaves.filter(|(_, leaf)| leaf.state == LeafState::Broken);
        let lost: Vec<ChunkKey> = lost.map(|(key, _)| *key).collect();
        self.orphans |= !lost.is_empty();
        for from in lost {
            let lost = self.leaves[&from];
            let leaf_end = self.leaf_end(from);
            let beyond = end.filter(|end| leaf_end.is_none_or(|after| after > *end));
            if let Some(end) = beyond.filter(|end| self.is_anybody_in(*end, leaf_end)) {
                self.leaves.insert(end, lost);
            }
            let empty = Leaf {
                epoch: self.epoch,
                ..Leaf::empty()
            };
            let from = match from < start && self.is_anybody_in(from, Some(start)) {
                true => start,
                false => from,
            };
            self.leaves.insert(from, empty);
            self.loaded.insert(from);
            self.dirty_leaves.insert(from);
        }
    }
}
