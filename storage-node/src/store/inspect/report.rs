//! What an inspection finds.

use std::fmt;

use cairn_proto::disk::{DeviceBlock, DiskGeometry};
use cairn_proto::ids::{ChunkIndex, Epoch, Generation, GroupId, Layer, Version, VolumeId};
use cairn_proto::limits::BLOCKS_PER_CHUNK;

use crate::store::scrub_state::ScrubState;
use crate::store::status::{OpenError, Space};
use crate::store::superblock::{Identity, Probe, Superblock};

/// What is on a device, as far as it was looked at.
#[derive(Clone, Debug)]
pub struct Inspection {
    /// The device.
    pub geometry: DiskGeometry,
    /// What its ends look like.
    pub probe: Probe,
    /// The superblock that counts; `None` when none can be used.
    pub identity: Option<Identity>,
    /// Each copy of the superblock. Empty for a device that never was Cairn's.
    pub superblocks: Vec<SuperblockCopy>,
    /// The two checkpoint slots. Empty while nobody knows whose they should be.
    pub checkpoints: Vec<CheckpointSlot>,
    /// What it holds, or why that can't be told.
    pub contents: Result<Contents, OpenError>,
    /// All damage that was found, superblocks and checkpoint headers included.
    pub damage: DamageList,
}

/// One copy of the superblock.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SuperblockCopy {
    /// Where it stands.
    pub place: DeviceBlock,
    /// What it says, or why it can't be used.
    pub content: Result<Superblock, String>,
}

/// One checkpoint slot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CheckpointSlot {
    /// Where it stands.
    pub place: DeviceBlock,
    /// What it says.
    pub content: CheckpointContent,
}

/// What stands in a checkpoint slot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CheckpointContent {
    /// Zeroes: no checkpoint yet, or erased when the device was opened from the other.
    Empty,
    /// A valid header.
    Valid(CheckpointSummary),
    /// It can't be used.
    Damaged(String),
}

/// What a checkpoint header says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CheckpointSummary {
    /// Counts checkpoints.
    pub sequence: u64,
    /// The last commit that it has.
    pub commit: u64,
    /// Blocks of its directory.
    pub directory_blocks: u64,
    /// Seals in it.
    pub seals: u64,
    /// Replicas in it.
    pub replicas: u64,
    /// Leaves of the directory in it.
    pub leaves: u64,
    /// Blocks of data as of it.
    pub data_blocks: u64,
    /// Whether the contents were read from it.
    pub used: bool,
}

/// What a device holds.
#[derive(Clone, Debug)]
pub struct Contents {
    /// The log.
    pub log: LogSummary,
    /// Space.
    pub space: Space,
    /// How far its scrub is; `None` if there never was one.
    pub scrub: Option<ScrubState>,
    /// The highest generation sealed, per volume.
    pub seals: Vec<(VolumeId, Generation)>,
    /// The replicas, in order of the groups; only those of the volume that was asked for.
    pub replicas: Vec<ReplicaSummary>,
    /// How far the verification came; `None` if none was asked for.
    pub verified: Option<Verified>,
}

/// The log after the checkpoint that was used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogSummary {
    /// The last commit that the checkpoint has: the log begins after it.
    pub checkpoint_commit: u64,
    /// The last commit that is believed.
    pub last_commit: u64,
    /// Batches replayed.
    pub batches: u64,
    /// Pages of their records.
    pub record_pages: u64,
    /// Whether a further batch was there that was not believed, because not all of its data had reached the device: it was
    /// never acknowledged.
    pub discarded: bool,
}

/// A group's replica.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReplicaSummary {
    /// Of which group.
    pub group: GroupId,
    /// As the host wrote it down.
    pub role: u8,
    /// The configuration that last named it.
    pub epoch: Epoch,
    /// Blocks of data that it counts.
    pub blocks_counted: u64,
    /// What its index says, by layer.
    pub layers: Vec<LayerSummary>,
}

/// One layer of a replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LayerSummary {
    /// Which.
    pub layer: Layer,
    /// Chunks of which something is known.
    pub chunks: u64,
    /// Of those, chunks with data.
    pub data_chunks: u64,
    /// Index pages that are more than one hole: on the device, or to be written by the next checkpoint.
    pub index_pages: u64,
    /// Blocks of data.
    pub data_blocks: u64,
    /// Runs in which their data stands on the device, each within a chunk: equal to `data_chunks` at best.
    pub extents: u64,
}

/// What was verified.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Verified {
    /// Blocks of data read and compared with their checksums.
    pub blocks: u64,
    /// Index pages read and compared with their CRCs, or found in the log.
    pub index_pages: u64,
}

/// A kind of damage.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum DamageKind {
    /// A copy of the superblock.
    Superblock,
    /// A checkpoint header, or the checkpoint behind it.
    Checkpoint,
    /// A copy of a page of the free-space map; the other is good.
    MapPage,
    /// A page of the index: nothing is known of its blocks.
    IndexPage,
    /// The content of a block does not match its checksum.
    Checksum,
    /// A block can't be read.
    Unreadable,
    /// The device knows that it has lost the content of a block.
    Lost,
    /// Two blocks of volumes are said to stand at the same place.
    Double,
    /// A block holds data and is counted as free: it may be overwritten.
    Unmapped,
    /// Blocks are counted as data and nobody needs them.
    Leak,
    /// A replica counts other blocks than it has.
    Count,
}

impl DamageKind {
    /// Its name for programs; stable.
    pub fn name(self) -> &'static str {
        match self {
            DamageKind::Superblock => "superblock",
            DamageKind::Checkpoint => "checkpoint",
            DamageKind::MapPage => "map_page",
            DamageKind::IndexPage => "index_page",
            DamageKind::Checksum => "checksum",
            DamageKind::Unreadable => "unreadable",
            DamageKind::Lost => "lost",
            DamageKind::Double => "double",
            DamageKind::Unmapped => "unmapped",
            DamageKind::Leak => "leak",
            DamageKind::Count => "count",
        }
    }
}

/// Blocks of a volume that damage is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DamagedBlocks {
    /// Of which group.
    pub group: GroupId,
    /// In which layer.
    pub layer: Layer,
    /// In which chunk of the volume.
    pub chunk: ChunkIndex,
    /// The first of them, counted from the start of the chunk.
    pub block: u32,
    /// How many.
    pub count: u32,
    /// The version that was acknowledged; `None` where it is not known.
    pub version: Option<Version>,
}

impl DamagedBlocks {
    /// The first of them, counted from the start of the volume.
    pub fn volume_block(&self) -> u64 {
        u64::from(self.chunk.0) * u64::from(BLOCKS_PER_CHUNK) + u64::from(self.block)
    }
}

/// Something is damaged.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Damage {
    /// What kind.
    pub kind: DamageKind,
    /// Which blocks of which volume; `None` for the device's own.
    pub blocks: Option<DamagedBlocks>,
    /// The place on the device; `None` where there is none.
    pub place: Option<DeviceBlock>,
    /// For a person.
    pub words: String,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(blocks) = &self.blocks {
            write!(
                f,
                "volume {} group {} layer {} chunk {} block {}",
                blocks.group.volume, blocks.group.index, blocks.layer, blocks.chunk, blocks.block
            )?;
            if blocks.count > 1 {
                write!(f, " to {}", blocks.block + blocks.count - 1)?;
            }
            if let Some(version) = blocks.version {
                write!(f, " version {version}")?;
            }
            f.write_str(": ")?;
        }
        f.write_str(&self.words)?;
        match self.place {
            Some(place) => write!(f, " (device block {})", place.0),
            None => Ok(()),
        }
    }
}

/// Damage, listed up to a bound and counted beyond it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DamageList {
    /// The first of it.
    pub listed: Vec<Damage>,
    /// All of it.
    pub total: u64,
}

impl DamageList {
    pub(super) fn add(&mut self, damage: Damage) {
        self.total += 1;
        if self.listed.len() < super::DAMAGE_LISTED_MAX {
            self.listed.push(damage);
        }
    }

    /// Of the device, not of a volume.
    pub(super) fn add_own(&mut self, kind: DamageKind, place: Option<DeviceBlock>, words: impl Into<String>) {
        self.add(Damage {
            kind,
            blocks: None,
            place,
            words: words.into(),
        });
    }
}
