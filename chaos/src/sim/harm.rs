//! Devices that lie: what was acknowledged is not there, or not what was written. On one device only, the same for the whole
//! run: nobody may ever read anything wrong, and what the others hold is copied there again.

use cairn_proto::disk::DeviceBlock;
use cairn_proto::ids::{ChunkIndex, GroupId, VolumeId};
use cairn_proto::limits::{BLOCK_BYTES, BLOCKS_PER_CHUNK, SECTOR_BYTES};

use super::disk::Lie;
use super::world::World;
use crate::checker::history::{Op, OpNumber};
use crate::checker::pattern::{Content, SECTORS_PER_BLOCK, content_of};

/// How many places are tried for one of a guest's blocks.
const TRIES: u32 = 400;

impl World {
    /// Bits of a few blocks of guests flip, on the victim's device only: nobody may read what they say now.
    pub(super) fn rot(&mut self) {
        let node = usize::from(self.victim());
        let wanted = self.faulting.rng.within(1, 8);
        for _ in 0..wanted {
            let Some((at, content)) = self.block_of_guest(node) else {
                return;
            };
            let bit = self.faulting.rng.index(BLOCK_BYTES * 8);
            self.note(format_args!("node-{node}: bit {bit} of {at} flips"));
            self.disks[node].device.rot(at, bit);
            self.disks[node].harmed.push(content);
        }
    }

    /// The victim's device lies about a write.
    pub(super) fn lie(&mut self, is_lost: bool) {
        let node = usize::from(self.victim());
        let blocks = self.disks[node].device.geometry().blocks;
        let lie = match is_lost {
            true => Lie::Lost,
            false => Lie::Misdirected(self.faulting.rng.within(1, blocks - 1)),
        };
        self.note(format_args!("node-{node} lies: {lie:?}"));
        self.disks[node].lie(lie);
    }

    /// A sector of a guest's block is again what it was before it was written last.
    pub(super) fn make_stale(&mut self) {
        let node = usize::from(self.victim());
        let Some((at, content)) = self.block_of_guest(node) else {
            return;
        };
        let sector = self.faulting.rng.index(SECTORS_PER_BLOCK) * SECTOR_BYTES;
        let device = &mut self.disks[node].device;
        let Some((_, before)) = device.last_write(at) else {
            return;
        };
        let mut mixed = *device.peek(at);
        mixed[sector..sector + SECTOR_BYTES].copy_from_slice(&before[sector..sector + SECTOR_BYTES]);
        device.poke(at, &mixed);
        self.disks[node].harmed.push(content);
        self.note(format_args!("node-{node}: a sector of {at} is as it was before"));
    }

    /// A random block of a device that a guest wrote.
    fn block_of_guest(&mut self, node: usize) -> Option<(DeviceBlock, Content)> {
        let blocks = self.options.disk.bytes / BLOCK_BYTES as u64;
        let drawn = (0..TRIES).map(|_| DeviceBlock(self.faulting.rng.below(blocks)));
        let device = &self.disks[node].device;
        let mut found = drawn.filter_map(|at| Some((at, content_of(device.peek(at))?)));
        found.find(|(_, content)| self.volumes.iter().any(|volume| volume.created.id == content.volume))
    }

    /// Whether an operation may be told that a block is damaged. Only where all that is left of the newest content may be on the
    /// device that lies: a write that nobody was ever told of may have reached that device and no other. Whether anybody was
    /// told is not known there, so an older copy must not take its place. And where one copy is enough, and there is one: it can't
    /// be read on a device that fails, or lies.
    pub(super) fn may_be_damaged(&self, number: OpNumber) -> bool {
        let op = self.history.op(number);
        let blocks = op.blocks();
        let here = |content: &&Content| content.volume == op.volume && blocks.contains(&content.block);
        let victim = &self.disks[usize::from(self.victim())];
        let is_open = victim.harmed.iter().filter(here).any(|content| {
            let mut writers = content.writers.iter();
            writers.any(|writer| self.history.is_open_and_newest(*writer, content.block, number))
        });
        (self.options.rot && is_open) || self.has_one_bad_copy(op)
    }

    /// Whether what the device that lies has damaged of a block may be a write that nobody was ever told of: then the others have something
    /// older, and the block stays damaged until it is written anew.
    pub(super) fn nobody_was_told_of(&self, volume: VolumeId, chunk: u32, block: u32) -> bool {
        let block = u64::from(chunk) * u64::from(BLOCKS_PER_CHUNK) + u64::from(block);
        let mut harmed = self.disks[usize::from(self.victim())].harmed.iter();
        harmed.any(|content| {
            let mut writers = content.writers.iter();
            content.volume == volume
                && content.block == block
                && writers.any(|writer| self.history.is_open_at_the_end(*writer, block))
        })
    }

    /// Whether a volume for which one copy is enough has a group with no more than one in sync, on a device that fails or lies, among those
    /// of this operation.
    fn has_one_bad_copy(&self, op: &Op) -> bool {
        let Some(volume) = self.volumes.iter().find(|volume| volume.created.id == op.volume) else {
            return false;
        };
        if !volume.created.volume.min_copies_one {
            return false;
        }
        let is_bad = |node: u8| {
            let disk = &self.disks[usize::from(node)];
            disk.is_hurt() || disk.has_errors() || (self.options.rot && node == self.victim())
        };
        op.blocks().any(|block| {
            let chunk = ChunkIndex((block / u64::from(BLOCKS_PER_CHUNK)) as u32);
            let index = volume.created.volume.group_count.group_of(chunk);
            let id = GroupId {
                volume: op.volume,
                index,
            };
            let known = self.meta_states().filter_map(|(_, state)| state.groups().get(&id));
            let newest = known.max_by_key(|group| group.epoch);
            newest.is_some_and(|group| match &group.in_sync[..] {
                [only] => self.setup.node_of(only).is_none_or(is_bad),
                _ => false,
            })
        })
    }
}
