//! What a store can be asked, and what it answers.

use std::fmt;

use bytes::Bytes;
pub use cairn_proto::block::{Apply, BlockState, Content, Cursor, Run};
use cairn_proto::checksum::Checksum;
use cairn_proto::disk::{DiskError, DiskOp};
use cairn_proto::ids::{ChunkIndex, CommitSeq, Epoch, Generation, GroupId, Layer, Version, VolumeId};
use cairn_proto::units::BlockRange;

pub use super::scrub::{DamagedBlock, DamagedMetadata, MetadataKind};
pub use super::scrub_state::{ScrubCursor, ScrubState};
pub use super::window::Why;

/// Pairs an answer with its request. Chosen by the caller, unique among the requests in flight.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Ticket(pub u64);

/// One block of a [`StoreRequest::Copy`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CopiedBlock {
    /// What it is to become; never `Damaged`. `Data` takes the next block of the request's content.
    pub content: Content,
    /// The version it had at its source.
    pub version: Version,
}

/// What a write puts into its range.
#[derive(Clone, Debug)]
pub enum WriteContent {
    /// Bytes, block-aligned, as long as the range, and the checksum of each block.
    Data {
        /// The bytes.
        bytes: Bytes,
        /// One per block. The caller has verified them.
        checksums: Vec<Checksum>,
    },
    /// Zeroes, run-length.
    Zero,
    /// Absence, run-length; the version is kept as a tombstone.
    Discard,
}

/// Something to do. All but reads are answered when they are durable.
#[derive(Clone, Debug)]
pub enum StoreRequest {
    /// Make this the highest generation seen of the volume, unless a higher one is held already.
    Seal {
        /// Which volume; it need not have data here.
        volume: VolumeId,
        /// The generation.
        generation: Generation,
    },
    /// Create the replica of a group, if it is not there yet, and set its role. A write never creates one.
    CreateReplica {
        /// Which group.
        group: GroupId,
        /// What the store keeps of it, opaque here.
        role: u8,
        /// The configuration that says so. What an older one says changes nothing.
        epoch: Epoch,
    },
    /// Forget a group's replica. It is gone when this is durable; its space is given back in the background, and a new
    /// replica of the group waits for that. Seals stay. Nothing is done if a later configuration has named it meanwhile.
    DropReplica {
        /// Which group.
        group: GroupId,
        /// The last configuration that may have named it.
        epoch: Epoch,
    },
    /// Delete a layer of a group's replica. It is gone when this is durable; its space is given back in the background, and
    /// a write to a layer of that number waits for that.
    DeleteLayer {
        /// Which group; its replica must exist.
        group: GroupId,
        /// Which layer. It need not have anything.
        layer: Layer,
    },
    /// Absent blocks of a chunk get at least this version: tombstones below it need not be kept one by one.
    RaiseFloor {
        /// Which group; its replica must exist.
        group: GroupId,
        /// Which layer.
        layer: Layer,
        /// Which chunk.
        chunk: ChunkIndex,
        /// The version.
        version: Version,
    },
    /// Write a range under one version.
    Write {
        /// Which group; its replica must exist.
        group: GroupId,
        /// Into which layer.
        layer: Layer,
        /// Where; all of one chunk is allowed for zeroes and discards, 256 blocks for data.
        range: BlockRange,
        /// The version of every block of it.
        version: Version,
        /// What.
        content: WriteContent,
    },
    /// Write blocks as another replica has them, each with a version of its own.
    Copy {
        /// Which group; its replica must exist.
        group: GroupId,
        /// Into which layer.
        layer: Layer,
        /// Where; at most 256 blocks.
        range: BlockRange,
        /// One per block of the range.
        blocks: Vec<CopiedBlock>,
        /// The content of the blocks that are `Data`, in order, block-aligned.
        bytes: Bytes,
        /// When it applies.
        apply: Apply,
    },
    /// Make a range the hole that it is on another replica, run-length.
    CopyHole {
        /// Which group; its replica must exist.
        group: GroupId,
        /// Into which layer.
        layer: Layer,
        /// Where; all of one chunk is allowed.
        range: BlockRange,
        /// What each block is to become: `Absent` or `Zero`. The version may be zero: never written.
        block: CopiedBlock,
        /// To which blocks it applies.
        apply: Apply,
    },
    /// Read a range; at most 256 blocks.
    Read {
        /// Which group.
        group: GroupId,
        /// From which layer.
        layer: Layer,
        /// Where.
        range: BlockRange,
    },
    /// List what the group's replica holds, in order of (chunk, layer, block), from one place to another.
    Collect {
        /// Which group.
        group: GroupId,
        /// From where on.
        from: Cursor,
        /// Up to where, exclusive.
        to: Cursor,
        /// Only versions above this one.
        above: Version,
        /// Runs at the most.
        runs_max: usize,
    },
    /// Verify what the device holds, a part of it: superblocks, checkpoints and free-space map first, then the index page
    /// and the data of each block, in order. One at a time.
    Scrub {
        /// Where to begin; [`ScrubCursor::START`], or where the last one says.
        from: ScrubCursor,
        /// It ends when so many blocks of data were checked; up to 255 more, to the end of an index page.
        blocks_max: u32,
    },
    /// Move data together that is fragmented: of at most one index page (256 blocks), the first one found. One at a time.
    /// Where free space has no long runs, requests make some between two walks over the device.
    Defragment {
        /// Where to begin; [`ScrubCursor::START`], or where the last one says: that may be the start again.
        from: ScrubCursor,
    },
    /// Keep how far the scrub is, so that it is known after a restart.
    SaveScrub {
        /// What [`Store::scrub_state`](super::Store::scrub_state) says from then on.
        state: ScrubState,
    },
}

/// The end of a request.
#[derive(Clone, Debug)]
pub enum StoreReply {
    /// A seal, replica record, write or copy is durable, or what superseded it is.
    Durable {
        /// The commit that made it so.
        commit: CommitSeq,
        /// Microseconds it waited before its batch was written.
        queue_us: u32,
        /// Microseconds the device took to write the batch.
        write_us: u32,
        /// Microseconds the flush took; zero without volatile cache.
        flush_us: u32,
    },
    /// What was read.
    Read {
        /// One per block of the range. A block whose checksum did not match, or that the device can't read, is
        /// `Damaged` here.
        blocks: Vec<BlockState>,
        /// The content of the blocks that are `Data`, in order; every buffer is whole blocks.
        bytes: Vec<Bytes>,
    },
    /// What was listed.
    Collected {
        /// In order.
        runs: Vec<Run>,
        /// Where to go on; `None` at the end of the group.
        next: Option<Cursor>,
    },
    /// What was moved.
    Defragmented {
        /// Index pages looked at.
        windows: u32,
        /// Blocks that stand elsewhere now.
        moved: u32,
        /// Runs of places that the data of the page was in.
        extents_before: u32,
        /// Runs that it is in now, if nothing of it was written meanwhile.
        extents_after: u32,
        /// Whether there is too little free space to move anything.
        is_full: bool,
        /// Blocks that were found damaged, and not moved. A copy of the same version mends them from now on.
        damaged: Vec<DamagedBlock>,
        /// Where to go on; `None` when all was looked at and nothing more is gained.
        next: Option<ScrubCursor>,
    },
    /// What was verified.
    Scrubbed {
        /// Blocks of data that were read and compared.
        checked: u32,
        /// Those that are damaged. A copy of the same version mends them from now on.
        damaged: Vec<DamagedBlock>,
        /// What is damaged of what the store keeps for itself.
        metadata: Vec<DamagedMetadata>,
        /// Where to go on; `None` when all was verified.
        next: Option<ScrubCursor>,
    },
    /// It was not done. Nothing of it will show, now or after a restart, except after [`StoreError::Poisoned`]: what was
    /// being written when the device failed may show or not after it is opened anew, as a whole.
    Failed(StoreError),
}

/// Why a request was not done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StoreError {
    /// The store is not open (yet): see `Store::state`.
    Opening,
    /// The group has no replica here.
    NoReplica,
    /// The device is full.
    NoSpace,
    /// The store has stopped acknowledging after a failed write or flush, until it is reopened.
    Poisoned(DiskError),
    /// What the store needs to know about these blocks can't be read from the device. Others may be readable.
    Unreadable(DiskError),
    /// What the store knows about these blocks is damaged at the device: they can be neither read nor written until the
    /// replica is dropped and made anew.
    IndexDamaged,
    /// More requests are queued than the limits allow.
    Busy,
    /// The request is outside what the store allows (the caller's bug or a peer's).
    Invalid(&'static str),
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreError::Opening => f.write_str("the store is not open yet"),
            StoreError::NoReplica => f.write_str("the device has no replica of the group"),
            StoreError::NoSpace => f.write_str("the device is full: free space on it, or add devices"),
            StoreError::Poisoned(error) => write!(f, "the store stopped after a failed write: {error}"),
            StoreError::Unreadable(error) => write!(f, "the blocks can't be read: {error}"),
            StoreError::IndexDamaged => f.write_str("the index of these blocks is damaged: rebuild this replica"),
            StoreError::Busy => f.write_str("too many requests are queued"),
            StoreError::Invalid(what) => write!(f, "the request is not valid: {what}"),
        }
    }
}

impl std::error::Error for StoreError {}

/// What the store wants done.
#[derive(Clone, Debug)]
pub enum StoreAction {
    /// Give this to the device.
    Disk(DiskOp),
    /// Give this to whoever asked.
    Reply(Ticket, StoreReply),
}
