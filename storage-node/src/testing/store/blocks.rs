//! The blocks of a replica, run-length: a discarded chunk is one run, as it is in the store.

use std::collections::BTreeMap;

use cairn_proto::block::{BlockState, Content};
use cairn_proto::units::BlockRange;

/// A block's name: chunk, layer, block.
pub type Key = (u32, u32, u32);

/// Blocks `start .. end` that are all the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Piece {
    start: u32,
    end: u32,
    state: BlockState,
}

/// All blocks but those never written. Two of the same content are equal.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Blocks {
    /// By chunk and layer; in order, apart, and as long as they can be.
    pieces: BTreeMap<(u32, u32), Vec<Piece>>,
}

impl Blocks {
    /// No block.
    pub const NONE: Blocks = Blocks {
        pieces: BTreeMap::new(),
    };

    /// A block; `None` if it was never written.
    pub fn get(&self, key: &Key) -> Option<&BlockState> {
        let (chunk, layer, block) = *key;
        let pieces = self.pieces.get(&(chunk, layer))?;
        let piece = pieces.get(pieces.partition_point(|piece| piece.end <= block))?;
        (piece.start <= block).then_some(&piece.state)
    }

    /// Makes all blocks of the range the same.
    pub fn set(&mut self, layer: u32, range: BlockRange, state: BlockState) {
        self.update(layer, range, |_| Some(state));
    }

    /// Changes blocks of the range: `new` is told what a block is and says what it becomes, if anything else.
    pub fn update(&mut self, layer: u32, range: BlockRange, new: impl Fn(BlockState) -> Option<BlockState>) {
        let pieces = self.pieces.entry((range.chunk().0, layer)).or_default();
        let (start, end) = (range.start(), range.end());
        let never = new(BlockState::ABSENT).unwrap_or(BlockState::ABSENT);
        let first = pieces.partition_point(|piece| piece.end <= start);
        let last = pieces.partition_point(|piece| piece.start < end);
        let mut changed = Vec::with_capacity(last - first + 2);
        let mut push = |start: u32, end: u32, state: BlockState| {
            if start < end && state != BlockState::ABSENT {
                changed.push(Piece { start, end, state });
            }
        };
        let mut at = start;
        for piece in &pieces[first..last] {
            push(piece.start, start, piece.state);
            push(at, piece.start, never);
            at = piece.end.min(end);
            push(piece.start.max(start), at, new(piece.state).unwrap_or(piece.state));
            push(end, piece.end, piece.state);
        }
        push(at, end, never);
        let to = first + changed.len() + 1;
        pieces.splice(first..last, changed);
        merge(pieces, first.saturating_sub(1), to);
        if pieces.is_empty() {
            self.pieces.remove(&(range.chunk().0, layer));
        }
    }

    /// Forgets all blocks.
    pub fn clear(&mut self) {
        self.pieces.clear();
    }

    /// Forgets a layer.
    pub fn remove_layer(&mut self, layer: u32) {
        self.pieces.retain(|(_, of), _| *of != layer);
    }

    /// Blocks that hold data.
    pub fn data(&self) -> u64 {
        let data = self
            .pieces
            .values()
            .flatten()
            .filter(|piece| matches!(piece.state.content, Content::Data(_)));
        data.map(|piece| u64::from(piece.end - piece.start)).sum()
    }

    /// The first block in which two differ.
    pub fn difference(&self, other: &Blocks) -> Option<Key> {
        let keys = self.pieces.keys().chain(other.pieces.keys());
        let differs = |key: &&(u32, u32)| self.pieces.get(key) != other.pieces.get(key);
        let (chunk, layer) = *keys.filter(differs).min()?;
        let bounds = [self, other]
            .into_iter()
            .filter_map(|blocks| blocks.pieces.get(&(chunk, layer)))
            .flatten()
            .flat_map(|piece| [piece.start, piece.end]);
        let keys = bounds.map(|block| (chunk, layer, block));
        keys.filter(|key| self.get(key) != other.get(key)).min()
    }
}

/// Makes one piece of those from one place to another that follow each other and are the same.
fn merge(pieces: &mut Vec<Piece>, from: usize, to: usize) {
    for i in (from + 1..to.min(pieces.len())).rev() {
        let (before, piece) = (pieces[i - 1], pieces[i]);
        if before.end == piece.start && before.state == piece.state {
            pieces[i - 1].end = piece.end;
            pieces.remove(i);
        }
    }
}

#[cfg(test)]
mod tests {
    use cairn_proto::checksum::Checksum;
    use cairn_proto::ids::Version;

    use super::super::content::range;
    use super::*;
    use crate::testing::Prng;

    /// Against a map of single blocks.
    #[test]
    fn runs_say_what_single_blocks_say() {
        for seed in 0..50 {
            let mut prng = Prng::new(seed);
            let mut blocks = Blocks::default();
            let mut plain: BTreeMap<Key, BlockState> = BTreeMap::new();
            for _ in 0..60 {
                let start = prng.below(40) as u32;
                let at = range(prng.below(2) as u32, start, prng.between(1, 40) as u32);
                let state = BlockState {
                    content: match prng.below(3) {
                        0 => Content::Zero,
                        1 => Content::Absent,
                        _ => Content::Data(Checksum(prng.below(2) as u32)),
                    },
                    version: Version::from_bits(prng.below(4)),
                };
                let newer = |old: BlockState| (state.version > old.version).then_some(state);
                blocks.update(0, at, newer);
                for block in at.start()..at.end() {
                    let key = (at.chunk().0, 0, block);
                    let old = plain.get(&key).copied().unwrap_or(BlockState::ABSENT);
                    plain.extend(newer(old).map(|state| (key, state)));
                }
                let mut again = Blocks::default();
                for chunk in 0..2 {
                    for block in 0..90 {
                        let key = (chunk, 0, block);
                        assert_eq!(blocks.get(&key), plain.get(&key), "block {key:?} of seed {seed}");
                    }
                }
                for ((chunk, layer, block), state) in &plain {
                    again.set(*layer, range(*chunk, *block, 1), *state);
                }
                assert_eq!(again, blocks, "the same blocks have one form");
                assert_eq!(again.difference(&blocks), None);
            }
        }
    }
}
