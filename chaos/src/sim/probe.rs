//! Right after a write was acknowledged: would enough devices still have it if all power failed now?

use std::collections::BTreeMap;

use bytes::Bytes;
use cairn_proto::ids::{ChunkIndex, GroupId};
use cairn_proto::limits::{BLOCKS_PER_CHUNK, SECTOR_BYTES};
use cairn_proto::units::BlockRange;

use super::world::World;
use crate::checker::history::{Broken, Op, OpKind, OpNumber};
use crate::checker::pattern::{SECTORS_PER_BLOCK, ZEROES, writer_of};

impl World {
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
        let quorum = usize::from(created.volume.write_quorum);
        let layer = created.volume.layer;
        let mut has = 0;
        let mut seen: BTreeMap<u8, String> = BTreeMap::new();
        for node in 0..self.options.nodes {
            let mut disk = self.disks[usize::from(node)].device.clone();
            disk.power_cut(&mut cairn_storage_node::testing::Prng::new(self.probe_rng.word()));
            let opened = self.setup.inspect_device(node, disk);
            let mut opened = match opened {
                Ok(opened) => opened,
                Err(words) => {
                    let words = format!("node-{node} after a power cut: {words}");
                    return Err(self.broken("a device can be opened again", words));
                }
            };
            let Ok((state, content)) = opened.block(group, layer, range) else {
                continue;
            };
            let op = self.history.op(number);
            let words = self.covers(op, block, &content);
            has += usize::from(words.is_ok());
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

    /// Whether a block has the operation's content, or what may have replaced it: something that was not answered before
    /// the operation was called.
    fn covers(&self, op: &Op, block: u64, content: &Bytes) -> Result<(), String> {
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
