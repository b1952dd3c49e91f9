//! Zeroes written ahead of the allocator: the first write to an unwritten extent of a file costs a commit of the file
//! system's journal, so it is made in the background. The allocator prefers blocks that were written before.

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::limits::BLOCK_BYTES;

use super::engine::{Engine, Purpose};

/// How far the device was written.
#[derive(Debug, Default)]
pub(super) struct ZeroAhead {
    /// The block after the highest one used.
    pub(super) used_end: u64,
    /// Blocks of the write in flight.
    in_flight: Option<u32>,
    zeroes: Bytes,
}

impl ZeroAhead {
    pub(super) fn new(used_end: u64) -> ZeroAhead {
        ZeroAhead {
            used_end,
            ..ZeroAhead::default()
        }
    }

    /// Blocks that are taken only while zeroes are written to them.
    pub(super) fn blocks(&self) -> u64 {
        u64::from(self.in_flight.unwrap_or(0))
    }

    pub(super) fn note_used(&mut self, writes: &[(u32, Vec<Bytes>)]) {
        for (place, buffers) in writes {
            let bytes: usize = buffers.iter().map(Bytes::len).sum();
            self.used_end = self.used_end.max(u64::from(*place) + (bytes / BLOCK_BYTES) as u64);
        }
    }
}

impl Engine {
    /// Where zeroes are written next: beyond everything used and taken.
    fn zero_from(&self) -> u64 {
        self.space.allocator.frontier
    }

    pub(super) fn pump_zero_ahead(&mut self) {
        if !self.limits.zero_ahead || self.zero_ahead.in_flight.is_some() || self.poisoned.is_some() {
            return;
        }
        let want = self.limits.zero_ahead_blocks;
        // Large writes take new space as fast as zeroes could be written there, and do not mind: each is as much as one of zeroes.
        if self.batch.as_ref().is_some_and(|batch| batch.blocks() >= want) {
            return;
        }
        let ahead = u64::from(want) * u64::from(self.limits.zero_ahead_runs);
        let end = self.space.allocator.space().end.min(self.zero_ahead.used_end + ahead);
        let from = self.zero_from().max(self.zero_ahead.used_end);
        // Not a few blocks for every few that are used.
        if from + u64::from(want) > end {
            return;
        }
        // What is taken beyond the frontier is written by whoever took it, and a gap between two such is not worth a write.
        let run = self.space.allocator.first_free(from..end, want);
        let Some(run) = run.filter(|run| run.count == want) else {
            self.space.allocator.frontier = run.map_or(end, |run| u64::from(run.place) + u64::from(run.count));
            return;
        };
        let (from, free) = (u64::from(run.place), run.count as usize);
        for block in from..from + free as u64 {
            self.space.allocator.take(block as u32);
        }
        self.space.allocator.frontier = from;
        if self.zero_ahead.zeroes.is_empty() {
            self.zero_ahead.zeroes = BlockBuf::zeroed(self.limits.zero_ahead_blocks as usize).freeze();
        }
        self.zero_ahead.in_flight = Some(free as u32);
        let zeroes = self.zero_ahead.zeroes.slice(..free * BLOCK_BYTES);
        self.write(Purpose::ZeroAhead, from as u32, vec![zeroes]);
    }

    pub(super) fn zero_ahead_done(&mut self) {
        let blocks = self.zero_ahead.in_flight.take().expect("zeroes were being written");
        let from = self.space.allocator.frontier;
        for block in from..from + u64::from(blocks) {
            self.space.allocator.release(block as u32);
        }
        self.space.allocator.frontier = from + u64::from(blocks);
        self.io.counters.zeroed_ahead += u64::from(blocks);
    }
}
