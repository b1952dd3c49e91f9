//! Reading blocks of data and comparing them with their checksums, in the order in which they stand on the device.

use cairn_proto::checksum::{Checksum, block_checksum};
use cairn_proto::disk::{DeviceBlock, DiskError};
use cairn_proto::limits::BLOCK_BYTES;

use super::report::{Damage, DamageKind, DamageList, DamagedBlocks};
use super::{BlockReader, InspectProgress};

/// Blocks that are collected, sorted by place, and read together (16 MiB).
const BLOCKS_TOGETHER: usize = 4096;
/// Blocks of one read at the most.
const READ_BLOCKS_MAX: u32 = 64;

/// A block to be read.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockCheck {
    pub(super) at: DamagedBlocks,
    pub(super) place: u32,
    pub(super) checksum: u32,
}

/// What is to be verified, and how far that is.
#[derive(Debug)]
pub(super) struct DataCheck {
    wanted: bool,
    queue: Vec<BlockCheck>,
    done: u64,
    in_all: u64,
}

impl DataCheck {
    pub(super) fn new(wanted: bool, in_all: u64) -> DataCheck {
        DataCheck {
            wanted,
            queue: Vec::new(),
            done: 0,
            in_all,
        }
    }

    pub(super) fn verified(&self) -> u64 {
        self.done
    }

    pub(super) fn add(&mut self, block: BlockCheck) {
        if self.wanted {
            self.queue.push(block);
        }
    }

    /// Verifies what has come together, once that is enough.
    pub(super) fn go_on(
        &mut self,
        reader: &mut dyn BlockReader,
        damage: &mut DamageList,
        progress: &mut dyn FnMut(InspectProgress),
    ) {
        while self.queue.len() >= BLOCKS_TOGETHER {
            let rest = self.queue.split_off(BLOCKS_TOGETHER);
            let blocks = std::mem::replace(&mut self.queue, rest);
            self.check(blocks, reader, damage, progress);
        }
    }

    /// Verifies the rest.
    pub(super) fn finish(
        &mut self,
        reader: &mut dyn BlockReader,
        damage: &mut DamageList,
        progress: &mut dyn FnMut(InspectProgress),
    ) {
        self.go_on(reader, damage, progress);
        let blocks = std::mem::take(&mut self.queue);
        if !blocks.is_empty() {
            self.check(blocks, reader, damage, progress);
        }
    }

    fn check(
        &mut self,
        mut blocks: Vec<BlockCheck>,
        reader: &mut dyn BlockReader,
        damage: &mut DamageList,
        progress: &mut dyn FnMut(InspectProgress),
    ) {
        blocks.sort_by_key(|block| block.place);
        let reads = reads(&blocks);
        let results = reader.read(&reads);
        let mut left = blocks.as_slice();
        for ((start, count), result) in reads.into_iter().zip(results) {
            let (these, rest) =
                left.split_at(left.partition_point(|block| u64::from(block.place) < start.0 + u64::from(count)));
            left = rest;
            match result {
                Ok(content) => these.iter().for_each(|block| {
                    let at = (u64::from(block.place) - start.0) as usize * BLOCK_BYTES;
                    compare(block, &content[at..at + BLOCK_BYTES], damage);
                }),
                // One bad block fails the read of its neighbours too.
                Err(_) => {
                    let single: Vec<_> = these.iter().map(|block| (DeviceBlock(block.place.into()), 1)).collect();
                    for (block, result) in these.iter().zip(reader.read(&single)) {
                        match result {
                            Ok(content) => compare(block, &content, damage),
                            Err(error) => unreadable(block, error, damage),
                        }
                    }
                }
            }
        }
        self.done += blocks.len() as u64;
        progress(InspectProgress::Data(self.done, self.in_all, damage.total));
    }
}

/// Neighbours are read together. Several blocks at the same place are damage that was found before: the read is one.
fn reads(blocks: &[BlockCheck]) -> Vec<(DeviceBlock, u32)> {
    let mut reads: Vec<(DeviceBlock, u32)> = Vec::new();
    for block in blocks {
        let place = u64::from(block.place);
        match reads.last_mut() {
            Some((start, count)) if place < start.0 + u64::from(*count) => {}
            Some((start, count)) if place == start.0 + u64::from(*count) && *count < READ_BLOCKS_MAX => *count += 1,
            _ => reads.push((DeviceBlock(place), 1)),
        }
    }
    reads
}

fn compare(block: &BlockCheck, content: &[u8], damage: &mut DamageList) {
    let found = block_checksum(block.at.group.volume, block.at.volume_block(), content);
    if found != Checksum(block.checksum) {
        damage.add(Damage {
            kind: DamageKind::Checksum,
            blocks: Some(block.at),
            place: Some(DeviceBlock(block.place.into())),
            words: format!("its checksum is {:08x}, it should be {:08x}", found.0, block.checksum),
        });
    }
}

fn unreadable(block: &BlockCheck, error: DiskError, damage: &mut DamageList) {
    damage.add(Damage {
        kind: DamageKind::Unreadable,
        blocks: Some(block.at),
        place: Some(DeviceBlock(block.place.into())),
        words: error.to_string(),
    });
}
