//! Which blocks a member lacks (rule 14): a bitmap with bounded memory, never a queue of payloads.

use std::collections::BTreeMap;

use crate::ids::{ChunkIndex, Layer};
use crate::limits::BLOCKS_PER_CHUNK;
use crate::units::BlockRange;

const WORDS: usize = (BLOCKS_PER_CHUNK / 64) as usize;

/// A set of blocks. Never smaller than what was put in; larger when it runs out of room for exact chunks.
#[derive(Clone, Debug)]
pub(super) struct Lack {
    chunks: BTreeMap<(ChunkIndex, Layer), Blocks>,
    exact: usize,
    exact_max: usize,
    blocks: u64,
}

#[derive(Clone, Debug)]
enum Blocks {
    Exact(Box<Bits>),
    All,
}

#[derive(Clone, Debug)]
struct Bits {
    words: [u64; WORDS],
    count: u32,
}

impl Bits {
    fn new(value: u64) -> Box<Bits> {
        Box::new(Bits {
            words: [value; WORDS],
            count: if value == 0 { 0 } else { BLOCKS_PER_CHUNK },
        })
    }

    /// Calls `f` with each word that the range touches and the mask of its bits.
    fn for_words(range: BlockRange, mut f: impl FnMut(usize, u64)) {
        let (mut block, end) = (range.start(), range.end());
        while block < end {
            let bit = block % 64;
            let bits = (64 - bit).min(end - block);
            let mask = (u64::MAX >> (64 - bits)) << bit;
            f((block / 64) as usize, mask);
            block += bits;
        }
    }

    fn set(&mut self, range: BlockRange) {
        let (words, mut count) = (&mut self.words, self.count);
        Bits::for_words(range, |word, mask| {
            count += (mask & !words[word]).count_ones();
            words[word] |= mask;
        });
        self.count = count;
    }

    fn clear(&mut self, range: BlockRange) {
        let (words, mut count) = (&mut self.words, self.count);
        Bits::for_words(range, |word, mask| {
            count -= (mask & words[word]).count_ones();
            words[word] &= !mask;
        });
        self.count = count;
    }

    fn intersects(&self, range: BlockRange) -> bool {
        let mut any = false;
        Bits::for_words(range, |word, mask| any |= self.words[word] & mask != 0);
        any
    }

    fn get(&self, block: u32) -> bool {
        self.words[(block / 64) as usize] >> (block % 64) & 1 != 0
    }

    /// The first run from a block on, of at most `max` blocks.
    fn run_from(&self, from: u32, max: u32) -> Option<(u32, u32)> {
        let mut start = from;
        while start < BLOCKS_PER_CHUNK && !self.get(start) {
            // Whole words without a bit are skipped at once.
            start = if start.is_multiple_of(64) && self.words[(start / 64) as usize] == 0 {
                start + 64
            } else {
                start + 1
            };
        }
        let mut end = start;
        while end < BLOCKS_PER_CHUNK && end - start < max && self.get(end) {
            end += 1;
        }
        (end > start).then_some((start, end - start))
    }
}

impl Lack {
    pub(super) fn new(exact_max: usize) -> Lack {
        Lack {
            chunks: BTreeMap::new(),
            exact: 0,
            exact_max,
            blocks: 0,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// How many blocks are in it.
    pub(super) fn blocks(&self) -> u64 {
        self.blocks
    }

    /// How many chunks are noted block by block.
    pub(super) fn exact_chunks(&self) -> usize {
        self.exact
    }

    pub(super) fn clear(&mut self) {
        self.chunks.clear();
        self.exact = 0;
        self.blocks = 0;
    }

    pub(super) fn insert(&mut self, layer: Layer, range: BlockRange) {
        self.insert_within(layer, range, self.exact_max);
    }

    /// Puts back what was taken out of a chunk that was noted exactly, and notes it exactly again: were the whole chunk
    /// lacking instead, taking out and putting back might never end. Who uses it bounds how much is out at a time.
    pub(super) fn put_back(&mut self, layer: Layer, range: BlockRange) {
        self.insert_within(layer, range, usize::MAX);
    }

    fn insert_within(&mut self, layer: Layer, range: BlockRange, exact_max: usize) {
        let key = (range.chunk(), layer);
        if !self.chunks.contains_key(&key) {
            let whole = range == BlockRange::whole(range.chunk());
            if whole || self.exact >= exact_max {
                self.chunks.insert(key, Blocks::All);
                self.blocks += u64::from(BLOCKS_PER_CHUNK);
                return;
            }
            self.exact += 1;
            self.chunks.insert(key, Blocks::Exact(Bits::new(0)));
        }
        if let Some(Blocks::Exact(bits)) = self.chunks.get_mut(&key) {
            let before = bits.count;
            bits.set(range);
            self.blocks += u64::from(bits.count - before);
        }
    }

    /// Puts a range in, but for the blocks that are in another set.
    pub(super) fn insert_without(&mut self, layer: Layer, range: BlockRange, left_out: &Lack) {
        for start in range.start()..range.end() {
            let block = BlockRange::new(range.chunk(), start, 1).expect("within the range");
            if !left_out.intersects(layer, block) {
                self.insert(layer, block);
            }
        }
    }

    /// Takes blocks out. Of a chunk that is not noted exactly nothing is taken out when there is no room to note it.
    pub(super) fn remove(&mut self, layer: Layer, range: BlockRange) {
        let key = (range.chunk(), layer);
        let Some(blocks) = self.chunks.get_mut(&key) else {
            return;
        };
        if let Blocks::All = blocks {
            if range == BlockRange::whole(range.chunk()) {
                self.chunks.remove(&key);
                self.blocks -= u64::from(BLOCKS_PER_CHUNK);
                return;
            }
            if self.exact >= self.exact_max {
                return;
            }
            self.exact += 1;
            *blocks = Blocks::Exact(Bits::new(u64::MAX));
        }
        if let Blocks::Exact(bits) = blocks {
            let before = bits.count;
            bits.clear(range);
            self.blocks -= u64::from(before - bits.count);
            if bits.count == 0 {
                self.chunks.remove(&key);
                self.exact -= 1;
            }
        }
    }

    pub(super) fn intersects(&self, layer: Layer, range: BlockRange) -> bool {
        match self.chunks.get(&(range.chunk(), layer)) {
            None => false,
            Some(Blocks::All) => true,
            Some(Blocks::Exact(bits)) => bits.intersects(range),
        }
    }

    /// The first run of at most `max` blocks at or after a place. The chunk it is in is noted exactly from then on, so
    /// that it can be taken out.
    pub(super) fn run_from(
        &mut self,
        chunk: ChunkIndex,
        layer: Layer,
        block: u32,
        max: u32,
    ) -> Option<(Layer, BlockRange)> {
        for ((c, l), blocks) in self.chunks.range_mut((chunk, layer)..) {
            let start = if (*c, *l) == (chunk, layer) { block } else { 0 };
            if let Blocks::All = blocks {
                self.exact += 1;
                *blocks = Blocks::Exact(Bits::new(u64::MAX));
            }
            let Blocks::Exact(bits) = blocks else { continue };
            if let Some((start, count)) = bits.run_from(start, max) {
                return BlockRange::new(*c, start, count).map(|range| (*l, range));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn range(chunk: u32, start: u32, count: u32) -> BlockRange {
        BlockRange::new(ChunkIndex(chunk), start, count).unwrap()
    }

    #[test]
    fn without_room_a_chunk_is_lacking_as_a_whole_until_all_of_it_is_taken_out() {
        let mut lack = Lack::new(1);
        lack.insert(Layer(0), range(0, 5, 1));
        lack.insert(Layer(0), range(1, 5, 1));
        assert!(!lack.intersects(Layer(0), range(0, 6, 1)));
        assert!(lack.intersects(Layer(0), range(1, 6, 1)), "not noted exactly");
        lack.remove(Layer(0), range(1, 5, 1));
        assert!(
            lack.intersects(Layer(0), range(1, 5, 1)),
            "no room to note what is left"
        );
        assert_eq!(
            lack.run_from(ChunkIndex(1), Layer(0), 100, 64),
            Some((Layer(0), range(1, 100, 64)))
        );
        lack.remove(Layer(0), BlockRange::whole(ChunkIndex(1)));
        lack.put_back(Layer(0), range(1, 100, 64));
        assert_eq!(lack.blocks(), 65, "what is put back is noted exactly");
        lack.remove(Layer(0), range(0, 5, 1));
        lack.remove(Layer(0), BlockRange::whole(ChunkIndex(1)));
        assert!(lack.is_empty());
        assert_eq!((lack.exact_chunks(), lack.blocks()), (0, 0));
    }

    proptest! {
        #[test]
        fn with_room_it_is_the_set_that_was_put_in(
            steps in prop::collection::vec((any::<bool>(), 0u32..3, 0u32..200, 1u32..130), 1..40)
        ) {
            let mut lack = Lack::new(8);
            let mut model = BTreeSet::new();
            for (insert, chunk, start, count) in steps {
                let range = range(chunk, start, count);
                for block in start..start + count {
                    if insert { model.insert((chunk, block)); } else { model.remove(&(chunk, block)); }
                }
                if insert { lack.insert(Layer(1), range) } else { lack.remove(Layer(1), range) }
            }
            prop_assert_eq!(lack.blocks(), model.len() as u64);
            prop_assert_eq!(lack.is_empty(), model.is_empty());
            let mut found = BTreeSet::new();
            let (mut chunk, mut block) = (ChunkIndex(0), 0);
            while let Some((_, run)) = lack.run_from(chunk, Layer(1), block, 7) {
                prop_assert!(lack.intersects(Layer(1), run));
                found.extend((run.start()..run.end()).map(|block| (run.chunk().0, block)));
                (chunk, block) = (run.chunk(), run.end());
                if block == BLOCKS_PER_CHUNK {
                    break;
                }
            }
            prop_assert_eq!(found, model);
        }
    }
}
