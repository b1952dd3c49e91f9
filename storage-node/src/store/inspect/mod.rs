//! Looking at a device without changing it: who it is, what it holds, and whether all of it can be read.
//!
//! The device is opened as [`Store::open`](super::Store::open) opens it, by the same recovery, up to the point where that
//! would write; then its index is walked, and with `verify` every block of data is read. Reads are the only operations
//! there are: [`BlockReader`] has no other.
//!
//! Reading order: `report` (what comes out), this file (ends of the device, opening), `walk` (index), `verify` (data), `owners` (all blocks).

mod owners;
mod report;
mod verify;
mod walk;

use bytes::Bytes;
use cairn_proto::disk::{DeviceBlock, DiskDone, DiskError, DiskGeometry, DiskOp};
use cairn_proto::ids::VolumeId;
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::time::Time;

pub use report::{
    CheckpointContent, CheckpointSlot, CheckpointSummary, Contents, Damage, DamageKind, DamageList, DamagedBlocks,
    Inspection, LayerSummary, LogSummary, ReplicaSummary, SuperblockCopy, Verified,
};

use super::api::StoreAction;
use super::checkpoint_header::CheckpointHeader;
use super::engine::Engine;
use super::limits::{DEVICE_BLOCKS_MAX, DEVICE_BLOCKS_MIN, StoreLimits};
use super::recovery::{Outcome, Recovery};
use super::status::{OpenError, OpenExpectation};
use super::superblock::{
    CHECKPOINT_PLACES, EDGE_BLOCKS, Identity, PROBE_BLOCKS, Probe, Superblock, SuperblockError, probe, probe_edges,
};
use walk::Walk;

/// Damage that is listed one by one at the most; beyond it, it is counted.
pub const DAMAGE_LISTED_MAX: usize = 10_000;

/// A device that can be read, and nothing else.
pub trait BlockReader {
    /// The device.
    fn geometry(&self) -> DiskGeometry;

    /// Reads all of these (a place and a number of blocks each), in any order or at the same time; answers in their order.
    /// What is returned is as long as was asked for.
    fn read(&mut self, wanted: &[(DeviceBlock, u32)]) -> Vec<Result<Bytes, DiskError>>;
}

/// What to look at.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct InspectOptions {
    /// Read every block of data too, and compare it with its checksum; and account for every block that is taken.
    pub verify: bool,
    /// Only the replicas of this volume. Whether space is counted right can't be told then.
    pub volume: Option<VolumeId>,
}

/// How far an inspection is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InspectProgress {
    /// It reads the checkpoint and the log.
    Opening,
    /// Index pages read, and those there are.
    Index(u64, u64),
    /// Blocks of data verified, and those there are (of all volumes), with the damage found so far.
    Data(u64, u64, u64),
}

/// Looks at a device. `progress` is called now and then. Nothing that stands on the device can make it fail: what it finds
/// is in the report.
pub fn inspect(
    reader: &mut dyn BlockReader,
    options: InspectOptions,
    progress: &mut dyn FnMut(InspectProgress),
) -> Inspection {
    let geometry = reader.geometry();
    let mut inspection = Inspection {
        geometry,
        probe: Probe::Blank,
        identity: None,
        superblocks: Vec::new(),
        checkpoints: Vec::new(),
        contents: Err(OpenError::Length {
            blocks: geometry.blocks,
        }),
        damage: DamageList::default(),
    };
    if geometry.blocks < DEVICE_BLOCKS_MIN {
        return inspection;
    }
    progress(InspectProgress::Opening);
    let ends = Ends::read(reader, geometry);
    inspection.probe = ends.probe.clone();
    inspection.superblocks = ends.superblocks(&mut inspection.damage);
    inspection.identity = ends.identity;
    if let Probe::Foreign { words } = &ends.probe {
        let words = words.clone();
        inspection.contents = Err(OpenError::Foreign { words });
        return inspection;
    }
    let mut engine = match open(reader, geometry) {
        Ok(engine) => engine,
        Err(error) => {
            inspection.checkpoints = ends.checkpoints(None, &mut inspection.damage);
            inspection.contents = Err(error);
            return inspection;
        }
    };
    inspection.checkpoints = ends.checkpoints(Some(engine.checkpoints.sequence), &mut inspection.damage);
    let map_copies = engine.io.counters.map_copies_damaged;
    if map_copies > 0 {
        let words = format!(
            "{map_copies} copies of pages of the free-space map are not what was written; the other ones are good, and the \
             pages are written anew when the device is used"
        );
        inspection.damage.add_own(DamageKind::MapPage, None, words);
    }
    let mut walk = Walk::new(&mut engine, reader, options, &mut inspection.damage, progress);
    let replicas = walk.replicas();
    let verified = walk.finish(&replicas);
    inspection.contents = Ok(contents(&engine, replicas, options.verify.then_some(verified)));
    inspection
}

/// Opens it as far as that needs no writing.
fn open(reader: &mut dyn BlockReader, geometry: DiskGeometry) -> Result<Box<Engine>, OpenError> {
    let mut recovery = Recovery::new(OpenExpectation::default(), geometry, StoreLimits::default()).for_a_look();
    if let Some(error) = recovery.refused_at_once() {
        return Err(error);
    }
    loop {
        let mut wanted = Vec::new();
        let mut tokens = Vec::new();
        while let Some(action) = recovery.io.pop() {
            match action {
                StoreAction::Disk(DiskOp::Read { token, at, blocks }) => {
                    wanted.push((at, blocks));
                    tokens.push(token);
                }
                other => unreachable!("recovery only reads, and wants {other:?}"),
            }
        }
        assert!(!tokens.is_empty(), "recovery ends or goes on");
        for (token, result) in tokens.into_iter().zip(reader.read(&wanted)) {
            match recovery.handle_disk(Time::ZERO, DiskDone { token, result }) {
                Outcome::Working => {}
                Outcome::Refused(error) => return Err(error),
                Outcome::Ready(engine, _) => return Ok(engine),
            }
        }
    }
}

fn contents(engine: &Engine, replicas: Vec<ReplicaSummary>, verified: Option<Verified>) -> Contents {
    let checkpoint_commit = engine.checkpoints.covered;
    Contents {
        log: LogSummary {
            checkpoint_commit,
            last_commit: engine.recovered_seq,
            batches: engine.recovered_seq - checkpoint_commit,
            record_pages: engine.checkpoints.log_page_count,
            discarded: engine.io.counters.discarded_at_open > 0,
        },
        space: super::space_of(engine),
        scrub: engine.catalog.scrub,
        seals: engine.catalog.seals.iter().map(|(volume, at)| (*volume, *at)).collect(),
        replicas,
        verified,
    }
}

/// The blocks at both ends of a device, which say whose it is.
struct Ends {
    probe: Probe,
    /// The superblock copies, with their places.
    copies: Vec<(DeviceBlock, Result<Bytes, DiskError>)>,
    headers: Vec<Result<Bytes, DiskError>>,
    identity: Option<Identity>,
}

impl Ends {
    fn read(reader: &mut dyn BlockReader, geometry: DiskGeometry) -> Ends {
        let last = DeviceBlock(geometry.blocks.min(DEVICE_BLOCKS_MAX) - 1);
        let first = (0..u64::from(PROBE_BLOCKS)).map(DeviceBlock);
        let places: Vec<DeviceBlock> = first.chain([last]).collect();
        let wanted: Vec<(DeviceBlock, u32)> = places.iter().map(|place| (*place, 1)).collect();
        let blocks = reader.read(&wanted);
        let unreadable = Bytes::from(vec![0xff; BLOCK_BYTES]);
        let content: Vec<Bytes> = blocks
            .iter()
            .map(|block| block.clone().unwrap_or(unreadable.clone()))
            .collect();
        let (first, end) = content.split_at(PROBE_BLOCKS as usize);
        let probe = match probe(&first.concat(), &end[0], geometry) {
            Probe::Blank => edges(reader, geometry),
            found => found,
        };
        let superblocks = [0, 1, PROBE_BLOCKS as usize];
        let decoded = superblocks
            .iter()
            .filter_map(|at| Superblock::decode(&content[*at]).ok());
        let best = decoded.max_by_key(|superblock| superblock.sequence);
        let mut copies: Vec<_> = superblocks
            .iter()
            .map(|at| (places[*at], blocks[*at].clone()))
            .collect();
        // A device that was copied to a larger one has its last copy where it was.
        if let Some(best) = best {
            let expected = Superblock::copies(best.identity.blocks)[2];
            if expected.0 < last.0 {
                let block = reader.read(&[(expected, 1)]).pop().expect("one read");
                copies[2] = (expected, block);
            }
        }
        Ends {
            probe,
            copies,
            headers: CHECKPOINT_PLACES.map(|place| blocks[place.0 as usize].clone()).to_vec(),
            identity: best.map(|superblock| superblock.identity),
        }
    }

    fn superblocks(&self, damage: &mut DamageList) -> Vec<SuperblockCopy> {
        if matches!(self.probe, Probe::Blank | Probe::Unfinished | Probe::Foreign { .. }) {
            return Vec::new();
        }
        let copy = |(number, (place, block)): (usize, &(DeviceBlock, Result<Bytes, DiskError>))| {
            let content = match block {
                Err(error) => Err(error.to_string()),
                Ok(block) if is_zero(block) => Err("it is erased".to_string()),
                Ok(block) => Superblock::decode(block).map_err(|error: SuperblockError| error.to_string()),
            };
            let content = content.and_then(|superblock| match self.identity {
                Some(identity) if superblock.identity != identity => {
                    Err(format!("it is of another device, {}", superblock.identity.device))
                }
                _ if usize::from(superblock.copy) != number => Err(format!("it is copy {}", superblock.copy)),
                _ => Ok(superblock),
            });
            SuperblockCopy { place: *place, content }
        };
        let copies: Vec<SuperblockCopy> = self.copies.iter().enumerate().map(copy).collect();
        for (number, copy) in copies.iter().enumerate() {
            if let Err(words) = &copy.content {
                let words = format!("superblock copy {number}: {words}");
                damage.add_own(DamageKind::Superblock, Some(copy.place), words);
            }
        }
        copies
    }

    /// `used` is the sequence of the checkpoint that the contents were read from.
    fn checkpoints(&self, used: Option<u64>, damage: &mut DamageList) -> Vec<CheckpointSlot> {
        let Some(identity) = self.identity else {
            return Vec::new();
        };
        let mut slots = Vec::new();
        for (slot, (place, block)) in CHECKPOINT_PLACES.into_iter().zip(&self.headers).enumerate() {
            let content = match block {
                Err(error) => CheckpointContent::Damaged(error.to_string()),
                Ok(block) if is_zero(block) => CheckpointContent::Empty,
                Ok(block) => match CheckpointHeader::decode(block, slot, identity.device, (identity.blocks - 1) as u32)
                {
                    Some(header) => CheckpointContent::Valid(summary(&header, used)),
                    None => CheckpointContent::Damaged("it is not a valid header of this device".to_string()),
                },
            };
            match &content {
                CheckpointContent::Damaged(words) => {
                    let words = format!("checkpoint slot {slot}: {words}");
                    damage.add_own(DamageKind::Checkpoint, Some(place), words);
                }
                CheckpointContent::Valid(found) if used.is_some_and(|used| found.sequence > used) => {
                    let words = format!("checkpoint {} can't be read, an older one was used", found.sequence);
                    damage.add_own(DamageKind::Checkpoint, Some(place), words);
                }
                _ => {}
            }
            slots.push(CheckpointSlot { place, content });
        }
        slots
    }
}

/// What was blank at its very ends.
fn edges(reader: &mut dyn BlockReader, geometry: DiskGeometry) -> Probe {
    let blocks = EDGE_BLOCKS.min(geometry.blocks);
    let ends = [0, geometry.blocks - blocks].map(|start| (DeviceBlock(start), blocks as u32));
    let mut read = reader.read(&ends).into_iter();
    match (read.next(), read.next()) {
        (Some(Ok(first)), Some(Ok(last))) => probe_edges(&first, &last),
        // The opening says what can't be read.
        _ => Probe::Blank,
    }
}

fn summary(header: &CheckpointHeader, used: Option<u64>) -> CheckpointSummary {
    CheckpointSummary {
        sequence: header.sequence,
        commit: header.covered,
        directory_blocks: header.directory_blocks.into(),
        seals: header.seals,
        replicas: header.replicas,
        leaves: header.leaves,
        data_blocks: header.data_blocks,
        used: used == Some(header.sequence),
    }
}

fn is_zero(block: &[u8]) -> bool {
    block.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests;
