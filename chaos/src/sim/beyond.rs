//! Groups that nobody can serve any more: of the `I` that meta knows fewer than `W` devices are left, for good, and no other device of the
//! group could stand in. A write quorum is out of reach, so I/O waits for an operator (rule 20). That is found by counting devices, and
//! excuses nothing but waiting: what was acknowledged must be on whoever is left.

use std::collections::BTreeMap;

use cairn_proto::ids::{ChunkIndex, GroupId};
use cairn_proto::limits::BLOCKS_PER_CHUNK;
use cairn_proto::units::BlockRange;

use super::inspect::Inspected;
use super::process::Process;
use super::world::World;
use crate::checker::history::{Broken, End, Op, OpKind};

impl World {
    /// Such groups, with the nodes of `I` that are left. Empty while some metadata server can't be looked at.
    pub(super) fn beyond_help(&self) -> BTreeMap<GroupId, Vec<u8>> {
        let gone = |node: u8| self.losses.gone.contains(&node);
        self.groups_short_of(gone)
    }

    fn groups_short_of(&self, is_missing: impl Fn(u8) -> bool) -> BTreeMap<GroupId, Vec<u8>> {
        let mut short = BTreeMap::new();
        if !self.options.race {
            return short;
        }
        for (id, group) in self.newest_groups().unwrap_or_default() {
            let volume = self.volumes.iter().find(|known| known.created.id == id.volume);
            let Some(volume) = volume.map(|known| &known.created.volume) else {
                continue;
            };
            let on = group.in_sync.iter().filter_map(|member| self.setup.node_of(member));
            let left: Vec<u8> = on.filter(|node| !is_missing(*node)).collect();
            let needed = if volume.min_copies_one { 1 } else { volume.write_quorum };
            let others = group.joining.iter().chain(&group.stale);
            let mut others = others.filter_map(|member| self.setup.node_of(member));
            let helped = !left.is_empty() && others.any(|node| !is_missing(node));
            if left.len() < usize::from(needed) && !helped {
                short.insert(id, left);
            }
        }
        short
    }

    /// Who was to come back when all is well without it comes back now, if a group can't do without.
    pub(super) fn call_back_who_is_needed(&mut self) {
        let short = self.groups_short_of(|node| self.losses.holds(Process::Node(node)));
        if !short.is_empty() {
            for node in self.losses.away.clone() {
                self.come_back(node);
            }
        }
    }

    /// The group of a block of a volume.
    pub(super) fn group_at(&self, volume: usize, block: u64) -> GroupId {
        let created = &self.volumes[volume].created;
        let chunk = ChunkIndex((block / u64::from(BLOCKS_PER_CHUNK)) as u32);
        GroupId {
            volume: created.id,
            index: created.volume.group_count.group_of(chunk),
        }
    }

    /// Whether an operation needs such a group.
    pub(super) fn can_not_end(&self, beyond: &BTreeMap<GroupId, Vec<u8>>, volume: usize, op: &Op) -> bool {
        !beyond.is_empty()
            && op
                .blocks()
                .any(|block| beyond.contains_key(&self.group_at(volume, block)))
    }

    /// Whatever was acknowledged in these groups is on a device of `I` that is left, if there is one.
    pub(super) fn check_survivors(&mut self) -> Result<(), Broken> {
        let beyond = self.beyond_help();
        if beyond.is_empty() {
            return Ok(());
        }
        *self.faulting.counts.entry("beyond-help").or_default() += beyond.len() as u64;
        let mut opened = BTreeMap::new();
        for node in beyond.values().flatten() {
            let found = self.setup.inspect(*node, &self.disks[usize::from(*node)]);
            let found =
                found.map_err(|words| self.broken("a device can be opened again", format!("node-{node}: {words}")))?;
            opened.insert(*node, found);
        }
        for volume in 0..self.volumes.len() {
            for (first, count) in self.options.volumes[volume].regions.clone() {
                for block in first..first + count {
                    let group = self.group_at(volume, block);
                    if let Some(left) = beyond.get(&group).filter(|left| !left.is_empty()) {
                        self.check_survivor(&mut opened, (volume, block, group), left)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn check_survivor(
        &self,
        opened: &mut BTreeMap<u8, Inspected>,
        (volume, block, group): (usize, u64, GroupId),
        left: &[u8],
    ) -> Result<(), Broken> {
        let created = &self.volumes[volume].created;
        let chunk = ChunkIndex((block / u64::from(BLOCKS_PER_CHUNK)) as u32);
        let at = (block % u64::from(BLOCKS_PER_CHUNK)) as u32;
        let range = BlockRange::new(chunk, at, 1).expect("one block of a chunk");
        let mut contents = Vec::new();
        for node in left {
            let opened = opened.get_mut(node).expect("all that are left are open");
            contents.extend(opened.block(group, created.volume.layer, range));
        }
        let acknowledged = |op: &&Op| {
            let is_write = matches!(op.kind, OpKind::Write | OpKind::Zero);
            let is_done = matches!(&op.ended, Some((.., End::Done(_))));
            is_write && is_done && op.volume == created.id && op.blocks().contains(&block)
        };
        for op in self.history.ops().iter().filter(acknowledged) {
            let mut held = contents.iter();
            if !held.any(|(_, content)| self.covers(op, block, content).is_ok()) {
                let words = format!(
                    "operation {} (volume {} block {block}) was acknowledged; of I nodes {left:?} are left, and none of them has it",
                    op.number, created.id
                );
                return Err(self.broken("what is acknowledged survives", words));
            }
        }
        Ok(())
    }
}
