//! What a store tells about itself.

use std::fmt;

use cairn_proto::checksum::ChecksumAlgorithm;
use cairn_proto::disk::DiskError;
use cairn_proto::ids::{ClusterId, DeviceUuid, Epoch, GroupId, Incarnation};

use super::limits::LOST_PARTS_NOTED_MAX;

/// What a device is formatted as.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FormatParams {
    /// The cluster it will belong to.
    pub cluster: ClusterId,
    /// Its UUID, drawn at random.
    pub device: DeviceUuid,
    /// New at each format, drawn at random or counted up.
    pub incarnation: Incarnation,
    /// How block checksums are computed.
    pub checksum: ChecksumAlgorithm,
}

/// Who the device should be. `None` takes any.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OpenExpectation {
    /// The cluster.
    pub cluster: Option<ClusterId>,
    /// The device.
    pub device: Option<DeviceUuid>,
}

/// Why a device can't be opened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum OpenError {
    /// Nothing is on it: it must be formatted first.
    Blank,
    /// Something else is on it.
    Foreign {
        /// What it looks like.
        words: String,
    },
    /// Its end is missing.
    Truncated {
        /// Blocks it was formatted with.
        expected: u64,
        /// Blocks it has now.
        found: u64,
    },
    /// It can't be understood, or what can't be done without is damaged.
    Damaged {
        /// What is wrong.
        words: String,
    },
    /// It belongs to another cluster.
    OtherCluster {
        /// Which was expected.
        expected: ClusterId,
        /// Which it says.
        found: ClusterId,
    },
    /// It is another device.
    OtherDevice {
        /// Which was expected.
        expected: DeviceUuid,
        /// Which it says.
        found: DeviceUuid,
    },
    /// A block of the log can't be read: acknowledged writes may stand there.
    LogUnreadable {
        /// The block of the device.
        place: u32,
        /// What the device said.
        error: DiskError,
    },
    /// A commit of the log is gone that was acknowledged: a later one is there.
    LogDamaged {
        /// The block of the device where it should stand.
        place: u32,
        /// The commit.
        commit: u64,
        /// The later commit that was found.
        seen: u64,
    },
    /// The device failed an operation that opening (or formatting) needs.
    Device {
        /// What was being done.
        doing: &'static str,
        /// What the device said.
        error: DiskError,
    },
    /// It is too short or too long to be formatted.
    Length {
        /// Its length in blocks.
        blocks: u64,
    },
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OpenError::Blank => f.write_str("the device is blank: format it before it is opened"),
            OpenError::Foreign { words } => write!(
                f,
                "the device holds {words}, not a store: check the path; to use it all the same, `cairn node format` can erase it"
            ),
            OpenError::Truncated { expected, found } => write!(
                f,
                "the device has {found} blocks of 4096 bytes, but was formatted with {expected}: its end is missing; \
                 restore its size, or replace the device"
            ),
            OpenError::Damaged { words } => write!(
                f,
                "the device is damaged: {words}; its other copies are on other devices: replace it"
            ),
            OpenError::OtherCluster { expected, found } => write!(
                f,
                "the device belongs to cluster {found}, this is {expected}: check which disk stands at this path"
            ),
            OpenError::OtherDevice { expected, found } => write!(
                f,
                "the device is {found}, expected is {expected}: check which disk stands at this path"
            ),
            OpenError::LogUnreadable { place, error } => write!(
                f,
                "{error}, while reading block {place} of the device, where its log goes on: acknowledged writes may stand \
                 there, so it is not opened without it; check the disk and its cable, or replace it: its other copies are \
                 on other devices"
            ),
            OpenError::LogDamaged { place, commit, seen } => write!(
                f,
                "the device is damaged: commit {commit} of its log should stand at block {place} and does not, though \
                 commit {seen} after it was written: acknowledged writes can't be read here any more; their other copies \
                 are on other devices: format it anew (cairn node format), or replace it, and it is filled from them"
            ),
            OpenError::Device { doing, error } => write!(f, "{error}, while {doing}: check the disk and its cable"),
            OpenError::Length { blocks } => write!(
                f,
                "the device has {blocks} blocks of 4096 bytes: it must have between {} and {}",
                super::limits::DEVICE_BLOCKS_MIN,
                super::limits::DEVICE_BLOCKS_MAX
            ),
        }
    }
}

impl std::error::Error for OpenError {}

/// How far a store is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StoreState {
    /// It reads what it needs to know.
    Opening(Progress),
    /// It serves.
    Open,
    /// A write or flush failed: it still reads, and acknowledges nothing until it is opened anew.
    Poisoned(DiskError),
    /// It can't be opened.
    Refused(OpenError),
}

/// How far opening is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// Directory blocks and pages of the free-space map read.
    pub metadata_blocks: u64,
    /// How many of them the checkpoint has; zero before one is chosen.
    pub metadata_blocks_in_all: u64,
    /// Commit batches replayed. How many there are is known at the end.
    pub batches: u64,
    /// A part of the index that replay needs and the device fails to read: its block, and what the device says. It is tried
    /// again.
    pub waits_for: Option<(u64, DiskError)>,
    /// Index pages read to find blocks that nobody needs. Zero unless a part of the index was lost and given up.
    pub index_pages: u64,
    /// How many index pages there are to be read for that.
    pub index_pages_in_all: u64,
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of {} blocks of its checkpoint read, {} batches of its log replayed",
            self.metadata_blocks, self.metadata_blocks_in_all, self.batches
        )?;
        if let Some((place, error)) = self.waits_for {
            write!(f, ", block {place}, a part of its index, is read again ({error})")?;
        }
        if self.index_pages_in_all > 0 {
            write!(
                f,
                ", {} of {} index pages read to find blocks that nobody needs",
                self.index_pages, self.index_pages_in_all
            )?;
        }
        Ok(())
    }
}

/// Pages and leaves of the index that were lost when a device was opened. A bounded number is noted one by one.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LostParts {
    /// How many.
    pub count: u64,
    /// The blocks of the device where they stand, with what the device says to a read; nothing where what it reads is not what
    /// was written.
    pub noted: Vec<(u32, Option<DiskError>)>,
}

impl LostParts {
    pub(super) fn note(&mut self, place: u32, error: Option<DiskError>) {
        self.count += 1;
        if self.noted.len() < LOST_PARTS_NOTED_MAX {
            self.noted.push((place, error));
        }
    }
}

impl fmt::Display for LostParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages and leaves of the index are lost:", self.count)?;
        for (place, error) in &self.noted {
            match error {
                Some(error) => write!(f, " block {place} can't be read ({error});")?,
                None => write!(f, " block {place} is not what was written;")?,
            }
        }
        f.write_str(" their blocks are refused until the replica was made anew from others")
    }
}

/// A group's replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReplicaInfo {
    /// Of which group.
    pub group: GroupId,
    /// What the caller keeps of it.
    pub role: u8,
    /// The configuration that last named it.
    pub epoch: Epoch,
    /// Blocks of data that it holds.
    pub blocks_used: u64,
}

/// Space of a device, in blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Space {
    /// All that is allocated from: the device less superblocks and checkpoint headers.
    pub capacity: u64,
    /// Not taken by anything, as of now.
    pub free: u64,
    /// Kept back for log, checkpoints and overwrites: new data can take `free - reserved`.
    pub reserved: u64,
    /// Blocks of data.
    pub data: u64,
}

/// What a store has done since it was opened. All only grow, but those that say what is so now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Batches committed.
    pub batches: u64,
    /// Requests in them.
    pub batch_requests: u64,
    /// Blocks of data written in them.
    pub blocks_written: u64,
    /// Record pages written.
    pub record_pages: u64,
    /// Device writes submitted.
    pub device_writes: u64,
    /// Device flushes submitted.
    pub device_flushes: u64,
    /// Device reads submitted.
    pub device_reads: u64,
    /// Blocks read for requests.
    pub blocks_read: u64,
    /// Blocks given back by overwrites, discards and drops.
    pub blocks_freed: u64,
    /// Blocks that a lost part of the index had left behind, and that opening found for them to be given back.
    pub blocks_swept: u64,
    /// Blocks of data moved together.
    pub blocks_moved: u64,
    /// Of these, blocks that only made room for others.
    pub blocks_evacuated: u64,
    /// Blocks of data verified by the scrub.
    pub blocks_scrubbed: u64,
    /// Blocks found damaged by reads and by the scrub.
    pub blocks_damaged: u64,
    /// Blocks known to be damaged that were written anew.
    pub blocks_mended: u64,
    /// Writes and blocks of writes that were superseded or duplicates.
    pub superseded: u64,
    /// Requests refused because the device was full.
    pub no_space: u64,
    /// Checkpoints completed.
    pub checkpoints: u64,
    /// Blocks written by checkpoints.
    pub checkpoint_blocks: u64,
    /// Empty batches that confirmed the one before.
    pub confirmations: u64,
    /// Blocks of zeroes written ahead.
    pub zeroed_ahead: u64,
    /// Index pages loaded.
    pub index_loads: u64,
    /// Index pages evicted.
    pub index_evictions: u64,
    /// Leaves of the directory loaded.
    pub leaf_loads: u64,
    /// Leaves of the directory evicted.
    pub leaf_evictions: u64,
    /// Index pages in memory now.
    pub index_pages_resident: u64,
    /// Index pages in memory now that the next checkpoint writes.
    pub index_pages_dirty: u64,
    /// Leaves of the directory, now.
    pub leaves: u64,
    /// Leaves in memory now.
    pub leaves_resident: u64,
    /// Leaves in memory now that the next checkpoint writes.
    pub leaves_dirty: u64,
    /// Bytes of memory that the index takes now: pages, leaves, and the table of the leaves.
    pub index_bytes_resident: u64,
    /// Batches replayed when it was opened.
    pub replayed: u64,
    /// Whether the last batch was dropped when it was opened, because not all of it had reached the device.
    pub discarded_at_open: u64,
    /// Superblock copies found damaged when it was opened; another was good.
    pub superblocks_damaged: u64,
    /// Of these, how many were written anew since.
    pub superblocks_mended: u64,
    /// Checkpoints found damaged when it was opened; the one before was good.
    pub checkpoints_damaged: u64,
    /// Pages and leaves of the index that were lost when it was opened: not what was written, or not to be read, however often
    /// they were tried.
    pub index_parts_lost: u64,
    /// Copies of pages of the free-space map found damaged when it was opened; the other copy was good. The next checkpoint
    /// writes the page anew.
    pub map_copies_damaged: u64,
}
