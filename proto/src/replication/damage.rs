//! Damaged blocks (rule 16): a member that holds a block and can't read it is one that lacks it, and gets a copy. DESIGN.md,
//! "Damage", says why it may not count as holding it.

use std::collections::BTreeSet;

use super::api::{Action, GroupPhase, Notice};
use super::group::Role;
use super::limits::DAMAGE_NOTED_MAX;
use super::mask::Mask;
use super::{Coordinator, GroupIndex};
use crate::ids::{ChunkIndex, DeviceId, Layer};
use crate::units::BlockRange;

/// Blocks that are known to be damaged on one member, so that each is told and counted once. A bounded number: what is
/// beyond is copied all the same, and not counted.
#[derive(Default)]
pub(super) struct Noted {
    blocks: BTreeSet<(ChunkIndex, Layer, u32)>,
}

impl Noted {
    /// How many.
    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Adds a block. False if it is known, or there is no room.
    fn insert(&mut self, layer: Layer, block: BlockRange) -> bool {
        self.blocks.len() < DAMAGE_NOTED_MAX && self.blocks.insert((block.chunk(), layer, block.start()))
    }

    /// Takes out what lies in a range; says how much it was.
    pub(super) fn take(&mut self, layer: Layer, range: BlockRange) -> u64 {
        if self.blocks.is_empty() {
            return 0;
        }
        let within = (range.chunk(), layer, range.start())..(range.chunk(), layer, range.end());
        let before = self.blocks.len();
        self.blocks.retain(|block| !within.contains(block));
        (before - self.blocks.len()) as u64
    }
}

impl Coordinator {
    /// A device says which blocks of a group it can't read. It may say so again, and of blocks that are being copied.
    pub(super) fn told_damaged(&mut self, device: DeviceId, index: GroupIndex, runs: &[(Layer, BlockRange)]) {
        let g = usize::from(index.0);
        let Some(m) = self.member_of.get(&device).copied().filter(|_| g < self.groups.len()) else {
            return;
        };
        let group = &self.groups[g];
        let Some(place) = group.replicas.iter().position(|replica| replica.member == m) else {
            return;
        };
        let replica = &group.replicas[place];
        if group.phase != GroupPhase::Serving || !replica.joined || replica.role == Role::Out {
            // Members that are compared list their damage. Else it is said again.
            return;
        }
        for (layer, range) in runs {
            if self.settings.groups.group_of(range.chunk()) != index {
                return self.refused(
                    m,
                    format!("it says that {range} is damaged, which is not of group {index}"),
                );
            }
            self.note_damage(g, place, *layer, *range);
        }
        self.touch_catch_up(g);
    }

    /// Blocks are damaged on a member of a group that is served: from now on it counts as one that lacks them.
    pub(super) fn note_damage(&mut self, g: usize, place: usize, layer: Layer, range: BlockRange) {
        let alone = self.groups[g].in_sync == Mask::one(place);
        for block in blocks_of(range) {
            let group = &mut self.groups[g];
            if group.lost.intersects(layer, block) {
                continue;
            }
            if !alone {
                group.miss(place, layer, block);
            }
            self.tell_damage(g, place, layer, block);
        }
    }

    /// Counts a damaged block, and tells the log, once.
    pub(super) fn tell_damage(&mut self, g: usize, place: usize, layer: Layer, block: BlockRange) {
        let group = &mut self.groups[g];
        if !group.replicas[place].damaged.insert(layer, block) {
            return;
        }
        group.damage_found += 1;
        let device = self.members[group.replicas[place].member].device;
        self.actions.push_back(Action::Notice(Notice::Damage {
            group: group.index,
            device,
            range: block,
        }));
    }

    /// The same for what a comparison has shown.
    pub(super) fn tell_damages(&mut self, g: usize, place: usize, found: &[(Layer, BlockRange)]) {
        for (layer, range) in found {
            blocks_of(*range).for_each(|block| self.tell_damage(g, place, *layer, block));
        }
    }

    /// A copy of these blocks is durable on a member: what of them was damaged is not any more.
    pub(super) fn damage_copied(&mut self, g: usize, place: usize, layer: Layer, range: BlockRange) {
        let group = &mut self.groups[g];
        let blocks = group.replicas[place].damaged.take(layer, range);
        if blocks == 0 {
            return;
        }
        group.damage_repaired += blocks;
        let device = self.members[group.replicas[place].member].device;
        self.actions.push_back(Action::Notice(Notice::Repaired {
            group: group.index,
            device,
            blocks,
        }));
    }

    /// Whether a member that has damaged blocks waits for one that is away for a short time only, and may have them.
    pub(super) fn may_be_repaired_soon(&self, g: usize) -> bool {
        let group = &self.groups[g];
        let has_damage = |place: usize| group.replicas[place].damaged.len() > 0;
        let away = |place: usize| {
            let replica = &group.replicas[place];
            let since = self.members[replica.member].since;
            !replica.joined && self.now.saturating_since(since) < self.limits.eject_after
        };
        group.in_sync.iter().any(has_damage) && group.in_sync.iter().any(away)
    }
}

/// Its blocks, one by one.
pub(super) fn blocks_of(range: BlockRange) -> impl Iterator<Item = BlockRange> {
    (range.start()..range.end())
        .map(move |start| BlockRange::new(range.chunk(), start, 1).expect("it lies within the range"))
}
