//! Every bound of the store in one place. Tests and the simulator make them tiny.

use std::time::Duration;

use cairn_proto::ids::DeviceUuid;
use cairn_proto::limits::{BLOCK_BYTES, BLOCKS_PER_CHUNK, FRAME_BLOCKS_MAX};

use super::canary::Canary;
use super::chunk::PAGE_MEMORY;

/// Blocks of data in one write, copy or read at the most.
pub const REQUEST_BLOCKS_MAX: u32 = FRAME_BLOCKS_MAX;
/// Entries of an index page.
pub const PAGE_ENTRIES: u32 = 256;
/// Damaged blocks that a store remembers it has found at the most. Beyond it forgets them all: the next read of one finds it
/// again.
pub const DAMAGED_KNOWN_MAX: usize = 4096;
/// Index pages that one request of the scrub or of the mover looks at, at the most.
pub const WALK_WINDOWS_MAX: usize = 64;
/// Chunks without index pages that it passes by at the most.
pub const WALK_CHUNKS_MAX: usize = 4096;
/// Data is fragmented if it has more than one extent for so many blocks…
pub const MOVE_EXTENT_BLOCKS: u32 = 32;
/// … and at least so many extents.
pub const MOVE_EXTENTS_MIN: u32 = 4;
/// Extents that the data of an index page is moved into at the most.
pub const MOVE_RUNS_MAX: u32 = 4;
/// Of a region that is emptied, at least one block in so many is free: emptying fuller ones costs more than it brings.
pub const EVACUATE_FREE_PART: u32 = 16;
/// Regions that one request of the mover counts, or closes, at the most.
pub const SURVEY_REGIONS_MAX: usize = 4096;
/// Batches that go without a move that waits, before it is given up.
pub const MOVE_BATCHES_MAX: u32 = 64;
/// Index pages of a chunk.
pub const PAGES_PER_CHUNK: u32 = BLOCKS_PER_CHUNK / PAGE_ENTRIES;
/// Bytes of an index entry.
pub const ENTRY_BYTES: usize = 16;
/// Pages of one batch's record at the most.
pub const RECORD_PAGES_MAX: usize = 16;
/// Blocks of data of one batch at the most, whatever the limits say: recovery looks that far for a record after a damaged
/// one.
pub const BATCH_BLOCKS_MAX: u32 = 1024;
/// Blocks of one read of opening at the most, and how far it reads the log ahead.
pub const RECOVERY_READ_BLOCKS_MAX: u32 = 64;
/// Leaves, and index pages, that opening reads together when it looks for blocks that nobody needs.
pub const SWEEP_LEAVES: usize = 32;
/// See [`SWEEP_LEAVES`].
pub const SWEEP_PAGES: usize = 512;
/// Such blocks that one opening gives back at the most: it keeps a list of them. The next one goes on.
pub const SWEEP_BLOCKS_MAX: usize = 1 << 20;
/// Pauses after which opening tries again to read a part of the index that replay needs; after the last one in vain the part is
/// lost.
pub const REPLAY_READ_PAUSES: [Duration; 5] = [
    Duration::from_millis(50),
    Duration::from_millis(250),
    Duration::from_secs(1),
    Duration::from_secs(4),
    Duration::from_secs(10),
];
/// Parts of the index that opening has lost, of which it is noted where they stand, at the most.
pub const LOST_PARTS_NOTED_MAX: usize = 16;
/// Batches that opening applies at a time at the most, with the index pages that they need read together.
pub const REPLAY_BATCHES_MAX: usize = 64;
/// Device blocks that one page of the free-space map describes.
pub const MAP_PAGE_BLOCKS: u64 = BLOCK_BYTES as u64 * 8;
/// The shortest device that can be formatted, in blocks (1 MiB).
pub const DEVICE_BLOCKS_MIN: u64 = 256;
/// The longest part of a device that is used, in blocks (just under 16 TiB): places are 32 bits, the last of which are
/// reserved.
pub const DEVICE_BLOCKS_MAX: u64 = 0xffff_ff00;

/// Changed index pages that there may be however little memory the index has.
const DIRTY_PAGES_MIN: usize = 64;

/// What one store may use and how it paces itself.
#[derive(Clone, Debug)]
pub struct StoreLimits {
    /// Requests that wait for a batch or for index pages at the most; more are a bug of the caller, who admits them.
    pub queued_requests_max: usize,
    /// Requests looked at for one batch at the most.
    pub batch_requests_max: usize,
    /// Blocks of data in one batch at the most, `REQUEST_BLOCKS_MAX ..= BATCH_BLOCKS_MAX`.
    pub batch_blocks_max: u32,
    /// Record pages of one batch at the most, `1 ..= RECORD_PAGES_MAX`. At least 2, so that the largest copy fits.
    pub batch_record_pages_max: usize,
    /// Blocks that the log takes at a time from free space.
    pub run_blocks: u32,
    /// Blocks of a region of the device, `1 ..= 65535`: free space is looked for, and emptied by the mover, region by region.
    pub region_blocks: u32,
    /// A checkpoint starts when this many record pages were written since the last one.
    pub checkpoint_log_pages: u64,
    /// A checkpoint starts when this many index pages, or leaves of the directory, were changed, or fewer if those fill
    /// half of the index's memory: the other half is left for what they become while the checkpoint is written. The more
    /// there may be, the more writes share a page that a checkpoint writes, and the more pages opening reads.
    pub checkpoint_dirty_pages: usize,
    /// Bytes of chunks above which a leaf of the directory is split; at most what fits a block. One chunk is never split.
    pub leaf_bytes_max: usize,
    /// Blocks of a checkpoint that are encoded at a time.
    pub checkpoint_step_blocks: usize,
    /// Writes of a checkpoint in flight at the most.
    pub checkpoint_writes_in_flight: usize,
    /// Reads in flight at the most while recovering.
    pub recovery_reads_in_flight: usize,
    /// Reads in flight at the most of the scrub, and as many of the mover.
    pub walk_reads_in_flight: usize,
    /// Bytes of memory that the index may take before what the device has as well is evicted: index pages (4 KiB and 200
    /// bytes each), leaves of the directory, and the table of the leaves.
    pub index_memory_max: usize,
    /// Index pages of dropped replicas and layers that one batch gives back at the most; an eighth of it beside requests.
    pub reclaim_pages_max: usize,
    /// Free blocks that only overwrites may use, so that a full device can still be overwritten; at least
    /// [`REQUEST_BLOCKS_MAX`].
    pub overwrite_reserve_blocks: u64,
    /// How long the log must be idle before the last batch is confirmed by an empty one.
    pub confirm_after: Duration,
    /// Write zeroes ahead of the allocator: for files, whose unwritten extents are slow to write first.
    pub zero_ahead: bool,
    /// Blocks of one write of zeroes ahead.
    pub zero_ahead_blocks: u32,
    /// How many such writes the zeroed part may be ahead of the used part. The log's run and the one reserved after it are taken before
    /// they are used: the zeroed part must reach well beyond both, or the log never sees it.
    pub zero_ahead_runs: u32,
    /// Planted bugs, for tests only: all off in every build without the feature `canary`.
    pub canary: Canary,
}

impl Default for StoreLimits {
    fn default() -> StoreLimits {
        StoreLimits {
            queued_requests_max: 16 << 10,
            batch_requests_max: 512,
            batch_blocks_max: BATCH_BLOCKS_MAX,
            batch_record_pages_max: RECORD_PAGES_MAX,
            run_blocks: 2048,
            region_blocks: 1024,
            checkpoint_log_pages: 4096,
            checkpoint_dirty_pages: 8192,
            leaf_bytes_max: super::leaf::LEAF_CAPACITY,
            checkpoint_step_blocks: 32,
            checkpoint_writes_in_flight: 8,
            recovery_reads_in_flight: 32,
            walk_reads_in_flight: 4,
            index_memory_max: 64 << 20,
            reclaim_pages_max: 64,
            overwrite_reserve_blocks: 1024,
            confirm_after: Duration::from_millis(100),
            zero_ahead: false,
            zero_ahead_blocks: 256,
            zero_ahead_runs: 32,
            canary: Canary::default(),
        }
    }
}

impl StoreLimits {
    /// Changed index pages, or leaves, at which a checkpoint starts.
    pub(super) fn dirty_pages_max(&self) -> usize {
        let half = self.index_memory_max / 2 / PAGE_MEMORY;
        self.checkpoint_dirty_pages.min(half.max(DIRTY_PAGES_MIN))
    }

    /// The same, with checkpoints up to a quarter more often, by a measure of the device's own. The copies of a group get the same writes: they
    /// would begin their checkpoints at the same moment, and a write that waits for two of three would feel each of them.
    pub fn staggered(self, device: DeviceUuid) -> StoreLimits {
        let (low, high) = device.0.split_at(8);
        let share = |bytes: &[u8]| bytes.iter().fold(0, |sum, byte| (sum << 8 | u64::from(*byte)) % 1024);
        let less = |limit: u64, share: u64| limit - limit * share / 4096;
        StoreLimits {
            checkpoint_log_pages: less(self.checkpoint_log_pages, share(low)),
            checkpoint_dirty_pages: less(self.checkpoint_dirty_pages as u64, share(high)) as usize,
            ..self
        }
    }

    /// Limits so small that logs wrap and checkpoints happen within a few requests, and small devices fill up: for tests
    /// and the simulator.
    pub fn tiny() -> StoreLimits {
        StoreLimits {
            batch_requests_max: 16,
            batch_record_pages_max: 4,
            run_blocks: 16,
            region_blocks: 32,
            checkpoint_log_pages: 12,
            checkpoint_dirty_pages: 4,
            leaf_bytes_max: 200,
            checkpoint_step_blocks: 2,
            checkpoint_writes_in_flight: 2,
            recovery_reads_in_flight: 4,
            walk_reads_in_flight: 2,
            index_memory_max: 40 << 10,
            reclaim_pages_max: 3,
            overwrite_reserve_blocks: 256,
            zero_ahead_blocks: 16,
            zero_ahead_runs: 4,
            ..StoreLimits::default()
        }
    }
}

const _: () = assert!(PAGE_ENTRIES as usize * ENTRY_BYTES == BLOCK_BYTES);
const _: () = assert!(PAGES_PER_CHUNK <= 64);
const _: () = assert!(REQUEST_BLOCKS_MAX <= BATCH_BLOCKS_MAX);
const _: () = assert!(
    MOVE_RUNS_MAX <= PAGE_ENTRIES / MOVE_EXTENT_BLOCKS,
    "what was moved is not fragmented"
);
const _: () = assert!(DEVICE_BLOCKS_MAX < u32::MAX as u64 - 16);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_begin_their_checkpoints_at_different_times_and_never_late() {
        let limits = StoreLimits::default();
        let of = |byte| limits.clone().staggered(DeviceUuid([byte; 16]));
        let logs: std::collections::BTreeSet<u64> = (0..=255).map(|byte| of(byte).checkpoint_log_pages).collect();
        assert!(logs.len() > 200, "{logs:?}");
        let (first, last) = (logs.first().expect("some"), logs.last().expect("some"));
        assert!(*first >= limits.checkpoint_log_pages * 3 / 4 && *last <= limits.checkpoint_log_pages);
        let dirty: Vec<usize> = (0..=255).map(|byte| of(byte).checkpoint_dirty_pages).collect();
        let least = limits.checkpoint_dirty_pages * 3 / 4;
        assert!(
            dirty
                .iter()
                .all(|pages| (least..=limits.checkpoint_dirty_pages).contains(pages))
        );
    }
}
