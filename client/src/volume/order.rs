//! The order of operations that overlap: who comes later waits, unless both only read. First come, first served, so
//! nobody waits for ever.

use std::collections::BTreeMap;

use cairn_proto::ids::ChunkIndex;
use cairn_proto::units::BlockRange;

/// Who holds or waits for blocks.
#[derive(Default)]
pub(super) struct Order {
    chunks: BTreeMap<ChunkIndex, Vec<Entry>>,
}

struct Entry {
    piece: u64,
    range: BlockRange,
    exclusive: bool,
    /// Earlier entries that it must wait for.
    blockers: usize,
}

impl Entry {
    fn conflicts(&self, other: &Entry) -> bool {
        (self.exclusive || other.exclusive) && self.range.overlaps(&other.range)
    }
}

impl Order {
    /// Queues up for blocks. True if they can be had at once.
    pub(super) fn enter(&mut self, piece: u64, range: BlockRange, exclusive: bool) -> bool {
        let entries = self.chunks.entry(range.chunk()).or_default();
        let mut entry = Entry {
            piece,
            range,
            exclusive,
            blockers: 0,
        };
        entry.blockers = entries.iter().filter(|earlier| earlier.conflicts(&entry)).count();
        let free = entry.blockers == 0;
        entries.push(entry);
        free
    }

    /// Gives blocks back; calls `next` with each piece that can have its blocks now.
    pub(super) fn leave(&mut self, piece: u64, range: BlockRange, mut next: impl FnMut(u64)) {
        let entries = self.chunks.get_mut(&range.chunk()).expect("who leaves has entered");
        let place = entries.iter().position(|entry| entry.piece == piece);
        let left = entries.remove(place.expect("who leaves has entered"));
        assert_eq!(left.blockers, 0, "piece {piece} worked on {range} before its turn");
        let after = place.unwrap_or(0);
        for entry in &mut entries[after..] {
            if left.conflicts(entry) {
                entry.blockers -= 1;
                if entry.blockers == 0 {
                    next(entry.piece);
                }
            }
        }
        if entries.is_empty() {
            self.chunks.remove(&range.chunk());
        }
    }

    /// Whether nobody holds or waits for anything.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u32, count: u32) -> BlockRange {
        BlockRange::new(ChunkIndex(0), start, count).unwrap()
    }

    fn leave(order: &mut Order, piece: u64, range: BlockRange) -> Vec<u64> {
        let mut freed = Vec::new();
        order.leave(piece, range, |piece| freed.push(piece));
        freed
    }

    #[test]
    fn readers_share_and_a_writer_that_waits_is_not_overtaken() {
        let mut order = Order::default();
        assert!(order.enter(1, range(0, 4), false));
        assert!(order.enter(2, range(2, 4), false));
        assert!(!order.enter(3, range(3, 1), true));
        assert!(!order.enter(4, range(3, 1), false), "after the writer");
        assert!(order.enter(5, range(8, 1), true), "elsewhere");
        assert_eq!(leave(&mut order, 1, range(0, 4)), [0; 0]);
        assert_eq!(leave(&mut order, 2, range(2, 4)), [3]);
        assert_eq!(leave(&mut order, 3, range(3, 1)), [4]);
        assert_eq!(leave(&mut order, 5, range(8, 1)), [0; 0]);
        assert_eq!(leave(&mut order, 4, range(3, 1)), [0; 0]);
        assert!(order.is_empty());
    }
}
