//! Which blocks of the space are free, in memory. Long runs are given out first, from where the last one was found.
//!
//! A bit for each block says whether it is taken. A tree over regions of equal size knows the longest free run within
//! each, so that a run is found in logarithmic time however scattered free space is.
//!
//! Regions can be *closed*: the mover empties them, to make long runs of scattered free blocks. Their blocks are free like
//! others, but are given out only to who asks for them; or to anybody, when nothing else is free: then all regions are
//! open again. So closing them never makes a device full.

use std::ops::Range;

use super::record::Extent;

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

    /// How many are set.
    pub(super) fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The block after the last one that is set; zero if none is.
    pub(super) fn end(&self) -> u64 {
        let last = self.words.iter().rposition(|word| *word != 0);
        last.map_or(0, |word| {
            word as u64 * 64 + 64 - u64::from(self.words[word].leading_zeros())
        })
    }

    /// Sets bits that must be clear.
    fn take(&mut self, place: u32, count: u32) {
        let (mut at, end) = (u64::from(place), u64::from(place) + u64::from(count));
        while at < end {
            let stop = end.min((at / 64 + 1) * 64);
            let bits = (u64::MAX >> (64 - (stop - at))) << (at % 64);
            let word = &mut self.words[(at / 64) as usize];
            assert_eq!(*word & bits, 0, "blocks of a free run at {place} are taken");
            *word |= bits;
            at = stop;
        }
    }

    /// The bits of a word that are clear and lie in a range.
    fn clear_bits(&self, word: u64, range: &Range<u64>) -> u64 {
        let (first, end) = (word * 64, word * 64 + 64);
        let mut clear = !self.words[word as usize];
        if range.start > first {
            clear &= u64::MAX << (range.start - first);
        }
        if range.end < end {
            clear &= u64::MAX >> (end - range.end);
        }
        clear
    }

    /// How many bits of a range are clear.
    fn count_clear(&self, range: &Range<u64>) -> u32 {
        if range.is_empty() {
            return 0;
        }
        let words = range.start / 64..=(range.end - 1) / 64;
        words.map(|word| self.clear_bits(word, range).count_ones()).sum()
    }

    /// The length of the longest run of clear bits of a range.
    fn longest_clear(&self, range: &Range<u64>) -> u32 {
        if range.is_empty() {
            return 0;
        }
        let (mut longest, mut open) = (0, 0);
        for word in range.start / 64..=(range.end - 1) / 64 {
            let clear = self.clear_bits(word, range);
            longest = longest.max(open + clear.trailing_ones());
            if clear == u64::MAX {
                open += 64;
                continue;
            }
            open = clear.leading_ones();
            // Each step takes one bit of every run.
            let (mut runs, mut length) = (clear, 0);
            while runs != 0 {
                runs &= runs << 1;
                length += 1;
            }
            longest = longest.max(length);
        }
        longest
    }

    /// Where the first run of `count` clear bits of a range begins.
    fn find_clear(&self, range: &Range<u64>, count: u32) -> Option<u64> {
        if range.is_empty() {
            return None;
        }
        if count > 64 {
            return self.find_long_clear(range, count);
        }
        let last = (range.end - 1) / 64;
        for word in range.start / 64..=last {
            let low = self.clear_bits(word, range);
            let high = if word < last {
                self.clear_bits(word + 1, range)
            } else {
                0
            };
            // A bit stays where a run of so many begins.
            let mut begins = u128::from(low) | u128::from(high) << 64;
            let mut length = 1;
            while length < count {
                let step = length.min(count - length);
                begins &= begins >> step;
                length += step;
            }
            if begins as u64 != 0 {
                return Some(word * 64 + u64::from(begins.trailing_zeros()));
            }
        }
        None
    }

    fn find_long_clear(&self, range: &Range<u64>, count: u32) -> Option<u64> {
        let mut at = range.start;
        loop {
            let start = self.find(at, range.end, false)?;
            let limit = start + u64::from(count);
            if limit > range.end {
                return None;
            }
            match self.find(start, limit, true) {
                None => return Some(start),
                Some(taken) => at = taken,
            }
        }
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

/// The longest free run within each region, with the maxima of halves, quarters and so on above: a tree in an array, its
/// root at 1, its leaves from `leaves` on.
#[derive(Clone, Debug)]
struct Longest {
    nodes: Vec<u16>,
    leaves: usize,
    /// Regions whose leaf is out of date, each once.
    stale: Vec<u32>,
    is_stale: Bitmap,
}

impl Longest {
    /// All out of date.
    fn new(regions: usize) -> Longest {
        let leaves = regions.next_power_of_two();
        let mut longest = Longest {
            nodes: vec![0; 2 * leaves],
            leaves,
            stale: Vec::new(),
            is_stale: Bitmap::new(regions as u64),
        };
        (0..regions as u32).for_each(|region| longest.touch(region));
        longest
    }

    fn touch(&mut self, region: u32) {
        if !self.is_stale.set(region, true) {
            self.stale.push(region);
        }
    }

    fn set(&mut self, region: u32, longest: u16) {
        let mut node = self.leaves + region as usize;
        self.nodes[node] = longest;
        while node > 1 {
            let above = self.nodes[node & !1].max(self.nodes[node | 1]);
            node /= 2;
            if self.nodes[node] == above {
                break;
            }
            self.nodes[node] = above;
        }
    }

    /// The first region from `from` on, before `end`, with a run of at least `want`.
    fn first(&self, from: usize, end: usize, want: u16) -> Option<usize> {
        if from >= end {
            return None;
        }
        let mut node = self.leaves + from;
        // Up and to the right, until a subtree has one; then down to its first leaf.
        while self.nodes[node] < want {
            while node & 1 == 1 {
                node /= 2;
            }
            if node == 0 {
                return None;
            }
            node += 1;
        }
        while node < self.leaves {
            node *= 2;
            if self.nodes[node] < want {
                node += 1;
            }
        }
        let found = node - self.leaves;
        (found < end).then_some(found)
    }

    /// The longest run of any region of a range.
    fn max(&self, from: usize, end: usize) -> u16 {
        let (mut left, mut right) = (self.leaves + from, self.leaves + end.max(from));
        let mut max = 0;
        while left < right {
            if left & 1 == 1 {
                max = max.max(self.nodes[left]);
                left += 1;
            }
            if right & 1 == 1 {
                right -= 1;
                max = max.max(self.nodes[right]);
            }
            (left, right) = (left / 2, right / 2);
        }
        max
    }
}

/// Gives out blocks and takes them back.
#[derive(Clone, Debug)]
pub(super) struct Allocator {
    taken: Bitmap,
    longest: Longest,
    space: Range<u64>,
    free: u64,
    hint: u64,
    /// Blocks below it were written before: they are preferred.
    pub(super) frontier: u64,
    region_blocks: u64,
    /// Regions that are closed.
    closed: Bitmap,
    closed_count: u64,
    /// Free blocks in them.
    closed_free: u64,
    /// Where the next run of closed regions is looked for.
    closed_hint: u64,
    /// Where the next hole is looked for.
    hole_hint: u64,
}

impl Allocator {
    /// What is set in `taken` is taken; it must lie in the space. A region has so many blocks: few enough that looking
    /// through one is quick.
    pub(super) fn with_taken(space: Range<u64>, taken: &Bitmap, region_blocks: u32) -> Allocator {
        assert!(
            (1..=u32::from(u16::MAX)).contains(&region_blocks),
            "regions of {region_blocks} blocks"
        );
        let count = taken.count();
        let region_blocks = u64::from(region_blocks);
        let regions = space.end.div_ceil(region_blocks);
        Allocator {
            taken: taken.clone(),
            longest: Longest::new(regions as usize),
            free: space.end - space.start - count,
            hint: space.start,
            frontier: space.end,
            region_blocks,
            closed: Bitmap::new(regions),
            closed_count: 0,
            closed_free: 0,
            closed_hint: 0,
            hole_hint: space.start,
            space,
        }
    }

    pub(super) fn free(&self) -> u64 {
        self.free
    }

    /// Free blocks outside of closed regions.
    pub(super) fn open_free(&self) -> u64 {
        self.free - self.closed_free
    }

    /// How many regions there are.
    pub(super) fn regions(&self) -> usize {
        self.space.end.div_ceil(self.region_blocks) as usize
    }

    /// The region of a block.
    pub(super) fn region_of(&self, block: u64) -> usize {
        (block / self.region_blocks) as usize
    }

    /// Free blocks of a region.
    pub(super) fn region_free(&self, region: usize) -> u32 {
        self.taken.count_clear(&self.region(region))
    }

    /// Closes a region that is open.
    pub(super) fn close(&mut self, region: usize) {
        self.closed_free += u64::from(self.region_free(region));
        assert!(
            !self.closed.set(region as u32, true),
            "region {region} is closed already"
        );
        self.closed_count += 1;
        self.closed_hint = 0;
        self.longest.touch(region as u32);
    }

    /// Opens all regions.
    pub(super) fn open_all(&mut self) {
        let mut from = 0;
        while let Some(region) = self.closed.find(from, self.regions() as u64, true) {
            self.closed.set(region as u32, false);
            self.longest.touch(region as u32);
            from = region + 1;
        }
        (self.closed_count, self.closed_free) = (0, 0);
    }

    /// How many regions are closed.
    pub(super) fn closed(&self) -> u64 {
        self.closed_count
    }

    pub(super) fn is_closed(&self, block: u32) -> bool {
        self.closed_count > 0 && self.closed.get(self.region_of(block.into()) as u32)
    }

    pub(super) fn space(&self) -> Range<u64> {
        self.space.clone()
    }

    /// The first free block of a range with the free ones after it, at most `want`; they may go on beyond the range.
    pub(super) fn first_free(&self, range: Range<u64>, want: u32) -> Option<Extent> {
        let place = self.taken.find(range.start, range.end, false)?;
        let count = self.free_from(place, self.space.end.min(place + u64::from(want)));
        let place = place as u32;
        Some(Extent { place, count })
    }

    pub(super) fn is_taken(&self, block: u32) -> bool {
        self.taken.get(block)
    }

    /// Takes this block; returns whether it was free.
    pub(super) fn take(&mut self, block: u32) -> bool {
        let was_free = !self.taken.set(block, true);
        self.free -= u64::from(was_free);
        self.closed_free -= u64::from(was_free && self.is_closed(block));
        self.longest.touch(self.region_of(block.into()) as u32);
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
        self.closed_free += u64::from(self.is_closed(block));
        self.longest.touch(self.region_of(block.into()) as u32);
    }

    /// Takes a run of `want` blocks, or else one of the longest there are; `None` if nothing is free. Opens all regions if
    /// there is nothing else.
    pub(super) fn take_run(&mut self, want: u32) -> Option<Extent> {
        let run = self.take_open_run(want);
        if run.is_some() || self.closed_count == 0 {
            return run;
        }
        self.open_all();
        self.take_open_run(want)
    }

    /// Takes up to `want` free blocks of closed regions, at least `least` that follow each other; the first ones there are
    /// after those taken last.
    pub(super) fn take_closed(&mut self, want: u32, least: u32) -> Option<Extent> {
        let mut at = self.closed_hint;
        while at < self.space.end {
            let regions = self.regions() as u64;
            let Some(region) = self.closed.find(self.region_of(at) as u64, regions, true) else {
                break;
            };
            let within = self.region(region as usize);
            let Some(start) = self.taken.find(at.max(within.start), within.end, false) else {
                at = within.end;
                continue;
            };
            let end = self.same_until(start, (start + u64::from(want)).min(self.space.end), true);
            let count = self.free_from(start, end);
            self.closed_hint = start + u64::from(count);
            if count >= least {
                let place = start as u32;
                let run = Extent { place, count };
                self.mark(run);
                return Some(run);
            }
            at = self.closed_hint;
        }
        self.closed_hint = self.space.end;
        None
    }

    /// The next run of closed regions is looked for in all of them again.
    pub(super) fn look_again(&mut self) {
        self.closed_hint = 0;
    }

    /// Takes up to `want` free blocks that follow each other: the next ones there are, going round, however few. Leaves
    /// closed regions alone.
    pub(super) fn take_hole(&mut self, want: u32) -> Option<Extent> {
        self.refresh();
        let hint = self.hole_hint.clamp(self.space.start, self.space.end - 1);
        let (from, regions) = (self.region_of(hint), self.regions());
        let here = self.region(from);
        let hole = match self.taken.find(hint, here.end, false) {
            Some(hole) if !self.is_closed(hole as u32) => hole,
            _ => {
                let region = self.longest.first(from + 1, regions, 1);
                let region = region.or_else(|| self.longest.first(0, from + 1, 1))?;
                let within = self.region(region);
                self.taken.find(within.start, within.end, false)?
            }
        };
        let end = self.same_until(hole, (hole + u64::from(want)).min(self.space.end), false);
        let (place, count) = (hole as u32, self.free_from(hole, end));
        let (run, hint) = (Extent { place, count }, self.hint);
        self.mark(run);
        // The log goes on where it was.
        self.hint = hint;
        self.hole_hint = hole + u64::from(count);
        Some(run)
    }

    /// Takes a run of `want` blocks of open regions, or else one of the longest there are.
    pub(super) fn take_open_run(&mut self, want: u32) -> Option<Extent> {
        self.refresh();
        let (start, end, frontier) = (self.space.start, self.space.end, self.frontier);
        let found = self.find_run(start..frontier, want);
        let found = match found {
            Some(found) if found.count == want || frontier >= end => Some(found),
            found => match (found, self.find_run(frontier..end, want)) {
                // Blocks never written before are slower to write: they are taken only when they save a seek that counts.
                (Some(found), Some(other)) if found.count * 4 >= other.count => Some(found),
                (found, other) => other.or(found),
            },
        }?;
        self.mark(found);
        Some(found)
    }

    /// Extends a run that ends at `end` by free blocks after it; returns how many were taken.
    pub(super) fn extend(&mut self, end: u32, want: u32) -> u32 {
        let count = self.free_from(end.into(), (u64::from(end) + u64::from(want)).min(self.space.end));
        self.mark(Extent { place: end, count });
        count
    }

    fn mark(&mut self, run: Extent) {
        let end = u64::from(run.place) + u64::from(run.count);
        self.taken.take(run.place, run.count);
        self.free -= u64::from(run.count);
        if self.is_closed(run.place) {
            self.closed_free -= u64::from(run.count);
        } else {
            self.hint = end;
        }
        let first = self.region_of(run.place.into()) as u64;
        (first..end.div_ceil(self.region_blocks)).for_each(|region| self.longest.touch(region as u32));
    }

    /// Where a run that begins in a region that is closed, or open, must end, at `end` at the latest.
    fn same_until(&self, from: u64, end: u64, closed: bool) -> u64 {
        if self.closed_count == 0 || from >= end {
            return end;
        }
        let regions = end.div_ceil(self.region_blocks);
        let other = self.closed.find(from / self.region_blocks, regions, !closed);
        other.map_or(end, |region| (region * self.region_blocks).clamp(from, end))
    }

    /// Free blocks of open regions from `from` on.
    fn open_from(&self, from: u64, end: u64) -> u32 {
        self.free_from(from, self.same_until(from, end, false))
    }

    /// The first free block of a range that lies in an open region.
    fn find_open(&self, range: &Range<u64>) -> Option<u64> {
        let mut from = range.start;
        loop {
            let found = self.taken.find(from, range.end, false)?;
            if !self.is_closed(found as u32) {
                return Some(found);
            }
            from = self.region(self.region_of(found)).end;
        }
    }

    /// Free blocks from `from` on, before `end`, without one that is taken.
    fn free_from(&self, from: u64, end: u64) -> u32 {
        if from >= end {
            return 0;
        }
        (self.taken.find(from, end, true).unwrap_or(end) - from) as u32
    }

    /// Panics if free blocks are miscounted.
    pub(super) fn check_invariants(&self) {
        let (mut free, mut closed_free, mut closed) = (0, 0, 0);
        for region in 0..self.regions() {
            let count = u64::from(self.region_free(region));
            let is_closed = self.closed.get(region as u32);
            free += count;
            closed += u64::from(is_closed);
            closed_free += if is_closed { count } else { 0 };
        }
        assert_eq!(
            (free, closed_free, closed),
            (self.free, self.closed_free, self.closed_count),
            "free blocks, those of closed regions, and closed regions"
        );
    }

    /// Brings the tree up to date with the blocks taken and given back since.
    fn refresh(&mut self) {
        while let Some(region) = self.longest.stale.pop() {
            self.longest.is_stale.set(region, false);
            // In a closed one none is found.
            let longest = match self.closed.get(region) {
                true => 0,
                false => self.taken.longest_clear(&self.region(region as usize)),
            };
            self.longest.set(region, longest as u16);
        }
    }

    /// The blocks of a region.
    fn region(&self, region: usize) -> Range<u64> {
        let start = region as u64 * self.region_blocks;
        let end = (start + self.region_blocks).min(self.space.end);
        start.max(self.space.start).min(end)..end
    }

    /// A run of `want` blocks in a range, looked for from the hint on, or one of the longest.
    fn find_run(&self, range: Range<u64>, want: u32) -> Option<Extent> {
        if range.is_empty() {
            return None;
        }
        let hint = self.hint.clamp(range.start, range.end - 1);
        // Most often the last run goes on.
        let here = Extent {
            place: hint as u32,
            count: self.open_from(hint, (hint + u64::from(want)).min(range.end)),
        };
        if here.count == want {
            return Some(here);
        }
        let found = self.find_in_regions(range, hint, want);
        found
            .filter(|found| found.count >= here.count)
            .or((here.count > 0).then_some(here))
    }

    fn find_in_regions(&self, range: Range<u64>, hint: u64, want: u32) -> Option<Extent> {
        let region = |block: u64| self.region_of(block);
        let (first, end, from) = (region(range.start), region(range.end - 1) + 1, region(hint));
        let most = self.longest.max(first, end);
        let enough = most.min(want.min(self.region_blocks as u32) as u16);
        if enough == 0 {
            return None;
        }
        // The hint's own region may have it before the hint. A region that the range ends in may have it beyond the end:
        // then anything will do.
        let found = self.longest.first(from, end, enough);
        let found = found.or_else(|| self.longest.first(first, from, enough))?;
        let blocks = self.region(found);
        let within = blocks.start.max(range.start)..blocks.end.min(range.end);
        let ahead = within.start.max(if found == from { hint } else { 0 })..within.end;
        let enough = u32::from(enough);
        let start = self.taken.find_clear(&ahead, enough);
        let start = start.or_else(|| self.taken.find_clear(&within, enough));
        let start = start.or_else(|| self.find_open(&range))?;
        // It may go on in the next region.
        let count = self.open_from(start, (start + u64::from(want)).min(range.end));
        let place = start as u32;
        Some(Extent { place, count })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Prng;

    const START: u64 = 4;

    fn allocator(blocks: u64) -> Allocator {
        Allocator::with_taken(START..blocks, &Bitmap::new(blocks), 1024)
    }

    /// The longest run of free blocks that lies in one region.
    fn longest(allocator: &Allocator) -> u32 {
        let regions = allocator.regions();
        let longest_of = |region| {
            let mut longest = 0;
            let mut run = 0;
            for block in allocator.region(region) {
                run = if allocator.is_taken(block as u32) { 0 } else { run + 1 };
                longest = longest.max(run);
            }
            longest
        };
        (0..regions).map(longest_of).max().unwrap_or(0)
    }

    #[test]
    fn a_fresh_device_is_given_out_in_order_and_in_full() {
        let mut allocator = allocator(10_000);
        let mut at = START as u32;
        while let Some(run) = allocator.take_run(2048) {
            assert_eq!(run.place, at);
            at += run.count;
        }
        assert_eq!((u64::from(at), allocator.free()), (10_000, 0));
    }

    #[test]
    fn runs_are_free_and_as_long_as_wanted_or_as_there_are() {
        for seed in 0..20 {
            let mut prng = Prng::new(seed);
            let mut allocator = allocator(prng.between(300, 9000));
            let mut held: Vec<u32> = Vec::new();
            for _ in 0..600 {
                if prng.chance(1, 2) {
                    let want = prng.between(1, 1500) as u32;
                    let most = longest(&allocator);
                    let free = allocator.free();
                    let Some(run) = allocator.take_run(want) else {
                        assert_eq!(free, 0, "something is free");
                        continue;
                    };
                    assert!(
                        run.count >= most.min(want) && run.count <= want,
                        "{run:?} of {want}, longest {most}"
                    );
                    assert_eq!(allocator.free(), free - u64::from(run.count));
                    held.extend(run.place..run.place + run.count);
                } else {
                    for _ in 0..prng.below(400).min(held.len() as u64) {
                        let at = prng.below(held.len() as u64) as usize;
                        allocator.release(held.swap_remove(at));
                    }
                }
                assert_eq!(allocator.free() + held.len() as u64, allocator.space.end - START);
            }
        }
    }

    #[test]
    fn what_was_written_before_is_preferred_unless_it_is_much_shorter() {
        let mut allocator = allocator(8192);
        allocator.frontier = 2000;
        assert_eq!(allocator.take_run(500).map(|run| run.place), Some(START as u32));
        assert_eq!(
            allocator.take_run(2000).map(|run| run.place),
            Some(504),
            "most of the rest"
        );
        let beyond = allocator.take_run(100).expect("there is space beyond");
        assert!(u64::from(beyond.place) >= allocator.frontier, "{beyond:?}");
        allocator.release(700);
        assert_eq!(allocator.take_run(4), Some(Extent { place: 700, count: 1 }));
    }

    #[test]
    fn closed_regions_are_given_out_to_who_asks_for_them_or_at_the_very_last() {
        for seed in 0..40 {
            let mut prng = Prng::new(seed);
            let blocks = prng.between(200, 3000);
            let region_blocks = prng.between(10, 200) as u32;
            let mut allocator = Allocator::with_taken(START..blocks, &Bitmap::new(blocks), region_blocks);
            let mut held: Vec<u32> = Vec::new();
            for _ in 0..400 {
                let regions = allocator.regions() as u64;
                let want = prng.between(1, 150) as u32;
                let (open, closed) = (allocator.open_free(), allocator.closed());
                let run = match prng.below(8) {
                    0 => {
                        let region = prng.below(regions) as usize;
                        if !allocator.closed.get(region as u32) {
                            allocator.close(region);
                        }
                        None
                    }
                    1 if prng.chance(1, 10) => {
                        allocator.open_all();
                        None
                    }
                    2 => {
                        let least = prng.between(1, want.into()) as u32;
                        let run = allocator.take_closed(want, least);
                        assert!(run.is_none_or(|run| run.count >= least), "{run:?}, least {least}");
                        run.inspect(|run| assert!((run.place..run.place + run.count).all(|b| allocator.is_closed(b))))
                    }
                    3 => {
                        let hole = allocator.take_hole(want);
                        assert_eq!(hole.is_some(), open > 0);
                        hole.inspect(|run| assert!((run.place..run.place + run.count).all(|b| !allocator.is_closed(b))))
                    }
                    4..6 => {
                        let free = allocator.free();
                        let run = allocator.take_run(want);
                        assert_eq!(run.is_some(), free > 0);
                        let opened = closed > 0 && allocator.closed() == 0;
                        assert_eq!(opened, closed > 0 && open == 0, "seed {seed}");
                        run.inspect(|run| assert!((run.place..run.place + run.count).all(|b| !allocator.is_closed(b))))
                    }
                    _ => {
                        for _ in 0..prng.below(200).min(held.len() as u64) {
                            let at = prng.below(held.len() as u64) as usize;
                            allocator.release(held.swap_remove(at));
                        }
                        None
                    }
                };
                held.extend(run.into_iter().flat_map(|run| run.place..run.place + run.count));
                assert_eq!(allocator.free() + held.len() as u64, blocks - START);
                allocator.check_invariants();
            }
        }
    }

    #[test]
    #[should_panic(expected = "freed twice")]
    fn a_block_is_given_back_once() {
        let mut allocator = allocator(1000);
        let run = allocator.take_run(3).expect("all is free");
        allocator.release(run.place);
        allocator.release(run.place);
    }
}
