//! Which blocks of the space are free, in memory. Runs are searched from where the last one was found.

use std::ops::Range;

use super::record::Extent;

/// Words looked at for a long run before the longest found so far will do (2 million blocks).
const SEARCH_WORDS_MAX: u64 = 1 << 15;

/// A bit for each block of the device: set when it is taken.
#[derive(Clone, Debug)]
pub(super) struct Bitmap {
    words: Vec<u64>,
}

impl Bitmap {
    /// All clear.
    pub(super) fn new(blocks: u64) -> Bitmap {
        Bitmap {
            words: vec![0; blocks.div_ceil(64) as usize],
        }
    }

    pub(super) fn get(&self, block: u32) -> bool {
        self.words[block as usize / 64] >> (block % 64) & 1 == 1
    }

    /// Sets a bit; returns what it was.
    pub(super) fn set(&mut self, block: u32, value: bool) -> bool {
        let word = &mut self.words[block as usize / 64];
        let bit = 1 << (block % 64);
        let old = *word & bit != 0;
        *word = if value { *word | bit } else { *word & !bit };
        old
    }

    /// The words, 64 blocks each, lowest block in the lowest bit.
    pub(super) fn words(&self) -> &[u64] {
        &self.words
    }

    pub(super) fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words
    }

    /// The block after the last one that is set; zero if none is.
    pub(super) fn end(&self) -> u64 {
        let last = self.words.iter().rposition(|word| *word != 0);
        last.map_or(0, |word| {
            word as u64 * 64 + 64 - u64::from(self.words[word].leading_zeros())
        })
    }

    /// The first block from `from` on, before `end`, whose bit is `value`.
    fn find(&self, from: u64, end: u64, value: bool) -> Option<u64> {
        let mut at = from;
        while at < end {
            let word = self.words[(at / 64) as usize];
            let candidates = if value { word } else { !word } >> (at % 64);
            if candidates != 0 {
                let found = at + u64::from(candidates.trailing_zeros());
                return (found < end).then_some(found);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }
}

/// Gives out blocks and takes them back.
#[derive(Clone, Debug)]
pub(super) struct Allocator {
    taken: Bitmap,
    space: Range<u64>,
    free: u64,
    hint: u64,
    /// Blocks below it were written before: they are preferred.
    pub(super) frontier: u64,
}

impl Allocator {
    /// What is set in `taken` is taken; it must lie in the space.
    pub(super) fn with_taken(space: Range<u64>, taken: &Bitmap) -> Allocator {
        let count: u64 = taken.words.iter().map(|word| u64::from(word.count_ones())).sum();
        Allocator {
            taken: taken.clone(),
            free: space.end - space.start - count,
            hint: space.start,
            frontier: space.end,
            space,
        }
    }

    pub(super) fn free(&self) -> u64 {
        self.free
    }

    pub(super) fn space(&self) -> Range<u64> {
        self.space.clone()
    }

    pub(super) fn is_taken(&self, block: u32) -> bool {
        self.taken.get(block)
    }

    /// Takes this block; returns whether it was free.
    pub(super) fn take(&mut self, block: u32) -> bool {
        let was_free = !self.taken.set(block, true);
        self.free -= u64::from(was_free);
        was_free
    }

    /// Gives a block back. Panics if it is free already: something counted it twice.
    pub(super) fn release(&mut self, block: u32) {
        assert!(
            self.space.contains(&u64::from(block)),
            "block {block} is not in the space"
        );
        assert!(self.taken.set(block, false), "block {block} was freed twice");
        self.free += 1;
    }

    /// Takes a run of `want` blocks, or the longest one that a bounded search finds; `None` if nothing is free.
    pub(super) fn take_run(&mut self, want: u32) -> Option<Extent> {
        let (start, end, frontier) = (self.space.start, self.space.end, self.frontier);
        let hint = self.hint.clamp(start, end);
        let below = self.hint.min(frontier).max(start);
        let found = self.longest([below..frontier, start..below], want);
        let found = match found {
            Some(found) if found.count == want || frontier >= end => Some(found),
            found => {
                let beyond = hint.max(frontier);
                let other = self.longest([beyond..end, frontier..beyond], want);
                // Blocks never written before are slower to write: they are taken only when they save a seek that counts.
                match (found, other) {
                    (Some(found), Some(other)) if found.count * 4 >= other.count => Some(found),
                    (found, other) => other.or(found),
                }
            }
        }?;
        for block in found.place..found.place + found.count {
            assert!(self.take(block), "block {block} of a free run is taken");
        }
        self.hint = u64::from(found.place + found.count);
        Some(found)
    }

    /// Extends a run that ends at `end` by free blocks after it; returns how many were taken.
    pub(super) fn extend(&mut self, end: u32, want: u32) -> u32 {
        let limit = (u64::from(end) + u64::from(want)).min(self.space.end);
        let count = self
            .taken
            .find(end.into(), limit, true)
            .unwrap_or(limit)
            .saturating_sub(end.into()) as u32;
        (end..end + count).for_each(|block| {
            self.take(block);
        });
        self.hint = u64::from(end + count);
        count
    }

    fn longest(&self, ranges: [Range<u64>; 2], want: u32) -> Option<Extent> {
        let mut longest: Option<Extent> = None;
        let mut budget = SEARCH_WORDS_MAX * 64;
        for range in ranges {
            let mut at = range.start;
            while let Some(start) = self.taken.find(at, range.end, false) {
                let limit = (start + u64::from(want)).min(range.end);
                let end = self.taken.find(start, limit, true).unwrap_or(limit);
                let count = (end - start) as u32;
                if longest.is_none_or(|longest| longest.count < count) {
                    longest = Some(Extent {
                        place: start as u32,
                        count,
                    });
                }
                budget = budget.saturating_sub(end - at);
                if count == want || budget == 0 {
                    return longest;
                }
                at = end;
            }
        }
        longest
    }
}
