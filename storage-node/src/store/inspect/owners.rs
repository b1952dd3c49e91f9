//! The account of all blocks: each one that is taken has exactly one owner, and each owner's block is taken. What the walk
//! over the index has seen is joined here by what the store keeps for itself.

use cairn_proto::disk::DeviceBlock;

use super::report::{DamageKind, DamageList};
use crate::store::allocator::Bitmap;
use crate::store::engine::Engine;
use crate::store::leaf::{Leaf, LeafState};

/// What a block is for, when it is neither data nor a page of the index.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Owner {
    Leaf,
    Map,
    Directory,
    Log,
    LogAhead,
}

impl Owner {
    fn words(self) -> &'static str {
        match self {
            Owner::Leaf => "a leaf of the directory",
            Owner::Map => "a page of the free-space map",
            Owner::Directory => "a block of the checkpoint's directory",
            Owner::Log => "a record page of the log",
            Owner::LogAhead => "a block that the log goes on in",
        }
    }
}

/// Compares the owners of blocks with what is taken. `seen` has the places of data and index pages, and is used up.
pub(super) fn audit(engine: &Engine, mut seen: Bitmap, damage: &mut DamageList) {
    let allocator = &engine.space.allocator;
    for (owner, place) in owners(engine) {
        let wrong = if seen.set(place, true) {
            Some((DamageKind::Double, "stands where something else does"))
        } else if !allocator.is_taken(place) {
            Some((DamageKind::Unmapped, "is on a block that counts as free"))
        } else if engine.space.data.get(place) {
            Some((DamageKind::Double, "is on a block that counts as data"))
        } else {
            None
        };
        if let Some((kind, words)) = wrong {
            damage.add_own(
                kind,
                Some(DeviceBlock(place.into())),
                format!("{} {words}", owner.words()),
            );
        }
    }
    // Listed more than once perhaps; what the checkpoint needs and its successor will not.
    let mut stale = Bitmap::new(allocator.space().end);
    for place in engine.checkpoints.stale.iter().chain(&engine.checkpoints.held) {
        if seen.get(*place) && !stale.get(*place) {
            let words = "metadata that waits for the next checkpoint stands where something else does".to_string();
            damage.add_own(DamageKind::Double, Some(DeviceBlock((*place).into())), words);
        }
        seen.set(*place, true);
        stale.set(*place, true);
    }
    let mut nobody = 0;
    let mut first = None;
    for place in allocator.space() {
        if allocator.is_taken(place as u32) && !seen.get(place as u32) {
            // Of data that nobody needs there is a word already.
            if !engine.space.data.get(place as u32) {
                first = first.or(Some(place));
                nobody += 1;
            }
        }
    }
    if let Some(first) = first {
        let words = format!("{nobody} blocks are taken and belong to nobody; the first");
        damage.add_own(DamageKind::Leak, Some(DeviceBlock(first)), words);
    }
}

/// What the store keeps for itself beside the pages of the index.
fn owners(engine: &Engine) -> Vec<(Owner, u32)> {
    let leaf = |leaf: &Leaf| match leaf.state {
        LeafState::OnDisk(home) => Some(home.place),
        LeafState::Loaded => leaf.home.map(|home| home.place),
        LeafState::Broken => None,
    };
    let leaves = engine.catalog.leaves.values().filter_map(leaf);
    let map = engine.space.homes.iter().flatten().flat_map(|home| home.places);
    let directory = engine.checkpoints.directory.iter().copied();
    let log = engine
        .checkpoints
        .log_pages
        .iter()
        .flat_map(|(_, pages)| pages.iter().copied());
    let ahead = engine.space.log_runs().into_iter();
    let ahead = ahead.flat_map(|run| run.place..run.place + run.count);
    let leaves = leaves.map(|place| (Owner::Leaf, place));
    leaves
        .chain(map.map(|place| (Owner::Map, place)))
        .chain(directory.map(|place| (Owner::Directory, place)))
        .chain(log.map(|place| (Owner::Log, place)))
        .chain(ahead.map(|place| (Owner::LogAhead, place)))
        .collect()
}
