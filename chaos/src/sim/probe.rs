//! Right after a write was acknowledged: would enough devices still have it if all power failed now?

use std::collections::BTreeMap;

use bytes::Bytes;
use cairn_proto::ids::{ChunkIndex, Generation, GroupId};
use cairn_proto::limits::{BLOCKS_PER_CHUNK, SECTOR_BYTES};
use cairn_proto::units::BlockRange;
use cairn_storage_node::testing::Prng;

use super::inspect::Inspected;
use super::world::World;
use crate::checker::history::{Broken, Op, OpKind, OpNumber};
use crate::checker::pattern::{SECTORS_PER_BLOCK, ZEROES, writer_of};

impl World {
    /// After the first operation of an attachment: enough devices would remember its generation if all power failed now,
    /// or an older holder could go on.
    pub(super) fn probe_seal(&mut self, session: usize, generation: Generation) -> Result<(), Broken> {
        let session = &mut self.sessions[session];
        if generation == Generation::NONE || session.seal_probed == Some(generation) {
            return Ok(());
        }
        session.seal_probed = Some(generation);
        let created = &self.volumes[session.volume].created;
        let (id, volume) = (created.id, &created.volume);
        let quorum = if volume.min_copies_one {
            1
        } else {
            usize::from(volume.replicas - volume.write_quorum + 1)
        };
        let quorum = quorum - self.copies_lost(id);
        let mut sealed = 0;
        for node in 0..self.options.nodes {
            let opened = self.after_power_cut(node)?;
            sealed += usize::from(opened.is_some_and(|opened| opened.seal_of(id) >= generation));
        }
        if sealed >= quorum {
            return Ok(());
        }
        let words = format!(
            "generation {generation} of volume {id} is served, and {sealed} devices would remember it if all power failed \
             now, not {quorum}"
        );
        Err(self.broken("a generation that is served is durable", words))
    }

    /// What a node's device would be after a power cut now; `None` for one that has lied so that it may be refused.
    fn after_power_cut(&mut self, node: u8) -> Result<Option<Inspected>, Broken> {
        let mut device = self.disks[usize::from(node)].device.clone();
        device.power_cut(&mut Prng::new(self.probe_rng.word()));
        let opened = self.setup.inspect_device(node, device);
        if opened.is_err() && self.disks[usize::from(node)].has_lied() {
            return Ok(None);
        }
        opened.map(Some).map_err(|words| {
            let words = format!("node-{node} after a power cut: {words}");
            self.broken("a device can be opened again", words)
        })
    }

    /// Looks at the first block of an acknowledged write on every member of its group.
    pub(super) fn probe(&mut self, number: OpNumber, volume: usize) -> Result<(), Broken> {
        self.probes += 1;
        let created = &self.volumes[volume].created;
        let op = self.history.op(number);
        let block = op.sector / SECTORS_PER_BLOCK as u64;
        let chunk = ChunkIndex((block / u64::from(BLOCKS_PER_CHUNK)) as u32);
        let group = GroupId {
            volume: created.id,
            index: created.volume.group_count.group_of(chunk),
        };
        let at = (block % u64::from(BLOCKS_PER_CHUNK)) as u32;
        let range = BlockRange::new(chunk, at, 1).expect("one block of a chunk");
        let (quorum, alone) = (usize::from(created.volume.write_quorum), created.volume.min_copies_one);
        let layer = created.volume.layer;
        let known = self.in_sync_nodes(group);
        let quorum = match &known {
            Some(in_sync) if alone => quorum.min(in_sync.len()),
            None if alone => 1,
            _ => quorum,
        };
        let quorum = quorum - self.copies_lost(group.volume);
        let in_sync = known.unwrap_or_else(|| (0..self.options.nodes).collect());
        let mut has = 0;
        let mut seen: BTreeMap<u8, String> = BTreeMap::new();
        for node in 0..self.options.nodes {
            let Some(mut opened) = self.after_power_cut(node)? else {
                continue;
            };
            let Ok((state, content)) = opened.block(group, layer, range) else {
                continue;
            };
            let op = self.history.op(number);
            let words = self.covers(op, block, &content);
            has += usize::from(words.is_ok() && in_sync.contains(&node));
            let words = words.err().unwrap_or_else(|| "has it".to_string());
            seen.insert(node, format!("{state:?} {words}"));
        }
        if has >= quorum {
            return Ok(());
        }
        let words = format!(
            "operation {number} (volume {} block {block}) was acknowledged, and {has} devices would still have it if all \
             power failed now, not {quorum}: {seen:?}",
            group.volume
        );
        Err(self.broken("what is acknowledged is durable on a quorum", words))
    }

    /// The nodes in sync by the newest configuration of a group that any metadata server has applied: while that is not
    /// known to the holder, writes have the quorum of both. `None` while some of the servers can't be looked at, or all have
    /// just started and know of no group yet.
    pub(super) fn in_sync_nodes(&self, group: GroupId) -> Option<Vec<u8>> {
        if self.meta_states().count() < usize::from(self.options.metas) {
            return None;
        }
        let groups = self.meta_states().filter_map(|(_, state)| state.groups().get(&group));
        let newest = groups.max_by_key(|group| group.epoch)?;
        Some(
            newest
                .in_sync
                .iter()
                .filter_map(|member| self.setup.node_of(member))
                .collect(),
        )
    }

    /// Whether a block has the operation's content, or what may have replaced it: something that was not answered before
    /// the operation was called.
    pub(super) fn covers(&self, op: &Op, block: u64, content: &Bytes) -> Result<(), String> {
        let first = block * SECTORS_PER_BLOCK as u64;
        for (i, number) in (first..).take(SECTORS_PER_BLOCK).enumerate() {
            if !(op.sector..op.sector + op.sectors).contains(&number) {
                continue;
            }
            let zeroes = [0; SECTOR_BYTES];
            let sector = content.get(i * SECTOR_BYTES..(i + 1) * SECTOR_BYTES).unwrap_or(&zeroes);
            let writer = writer_of(op.volume, number, sector)?;
            let later = |other: &Op| other.ended.as_ref().is_none_or(|(at, ..)| *at > op.called.0);
            let replaced = if writer == ZEROES {
                self.history.ops().iter().any(|other| {
                    let covers = (other.sector..other.sector + other.sectors).contains(&number);
                    other.kind == OpKind::Zero && other.volume == op.volume && covers && later(other)
                })
            } else {
                writer == op.number || later(self.history.op(writer))
            };
            if !replaced {
                return Err(format!("sector {number} is still of operation {writer}"));
            }
        }
        Ok(())
    }
}
