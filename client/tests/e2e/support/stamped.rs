//! A part of a volume of which it is known what each block may hold: every block says its own number and the number of
//! the write that it is from, so that a lost, stale, torn or misplaced block shows.

use std::io;

use super::Random;
use super::nbd::Nbd;

/// Bytes of a block.
pub(crate) const BLOCK: u64 = 4096;
/// Blocks that one write or trim covers at the most.
const SPAN_MAX: u64 = 16;
/// The stamp of a block that reads as zeroes.
const ZERO: u64 = 0;

/// Consecutive blocks, and what they may hold.
pub(crate) struct Stamped {
    first: u64,
    blocks: Vec<Known>,
    next_stamp: u64,
    random: Random,
}

/// What is known of one block.
#[derive(Clone)]
struct Known {
    /// The last write that was acknowledged, or seen.
    held: u64,
    /// Writes that were issued after it, and never answered.
    possible: Vec<u64>,
}

impl Stamped {
    /// Blocks `first .. first + count`, which were never written. Every seed gives other writes.
    pub(crate) fn new(first: u64, count: u64, seed: u64) -> Stamped {
        let never_written = Known {
            held: ZERO,
            possible: Vec::new(),
        };
        Stamped {
            first,
            blocks: vec![never_written; count as usize],
            next_stamp: seed << 32 | 1,
            random: Random::new(seed),
        }
    }

    /// Writes a few consecutive blocks anew, or now and then trims them. When the connection breaks before the answer,
    /// both the old and the new content are possible from then on. An error that the server reports is one of the test.
    pub(crate) fn step(&mut self, nbd: &mut Nbd) -> io::Result<()> {
        let count = 1 + self.random.below(SPAN_MAX.min(self.blocks.len() as u64));
        let from = self.random.below(self.blocks.len() as u64 - count + 1);
        let trim = self.random.below(8) == 0;
        self.put(nbd, from, count, trim)
    }

    /// Writes every block anew.
    pub(crate) fn write_all(&mut self, nbd: &mut Nbd) -> io::Result<()> {
        let mut from = 0;
        while from < self.blocks.len() as u64 {
            let count = SPAN_MAX.min(self.blocks.len() as u64 - from);
            self.put(nbd, from, count, false)?;
            from += count;
        }
        Ok(())
    }

    fn put(&mut self, nbd: &mut Nbd, from: u64, count: u64, trim: bool) -> io::Result<()> {
        let stamp = if trim { ZERO } else { self.next_stamp };
        self.next_stamp += 1;
        let touched = from as usize..(from + count) as usize;
        for known in &mut self.blocks[touched.clone()] {
            known.possible.push(stamp);
        }
        let at = (self.first + from) * BLOCK;
        let answer = if trim {
            nbd.try_trim(at, (count * BLOCK) as u32)?
        } else {
            let mut data = Vec::with_capacity((count * BLOCK) as usize);
            for block in self.first + from..self.first + from + count {
                data.extend(content(block, stamp));
            }
            nbd.try_write(at, &data)?
        };
        assert_eq!(answer, Ok(()), "NBD error of a write or trim of {count} blocks at {at}");
        for known in &mut self.blocks[touched] {
            known.held = stamp;
            known.possible.clear();
        }
        Ok(())
    }

    /// Reads every block: it must hold what it may hold. What was seen must be seen from then on.
    pub(crate) fn check(&mut self, nbd: &mut Nbd) {
        for (index, known) in self.blocks.iter_mut().enumerate() {
            let block = self.first + index as u64;
            let data = nbd.read(block * BLOCK, BLOCK as u32);
            let stamp = stamp_of(block, &data);
            let expected = stamp.is_some_and(|stamp| stamp == known.held || known.possible.contains(&stamp));
            assert!(
                expected,
                "block {block} holds {stamp:x?}; acknowledged is {:x}, unanswered are {:x?}",
                known.held, known.possible
            );
            known.held = stamp.unwrap_or(ZERO);
            known.possible.clear();
        }
    }
}

/// What a block holds after the write with this stamp.
fn content(block: u64, stamp: u64) -> Vec<u8> {
    let mut data = vec![0; BLOCK as usize];
    if stamp != ZERO {
        Random::new(block ^ stamp.rotate_left(32)).fill(&mut data);
        data[..8].copy_from_slice(&block.to_le_bytes());
        data[8..16].copy_from_slice(&stamp.to_le_bytes());
    }
    data
}

/// The write that a block is from; `None` when it is that of no write to this block.
fn stamp_of(block: u64, data: &[u8]) -> Option<u64> {
    let stamp = u64::from_le_bytes(data[8..16].try_into().expect("eight bytes"));
    (data == content(block, stamp)).then_some(stamp)
}

#[test]
fn a_misplaced_torn_or_mixed_block_is_no_ones() {
    let mut data = content(7, 9);
    assert_eq!(stamp_of(7, &data), Some(9));
    assert_eq!(stamp_of(8, &data), None);
    data[512..1024].copy_from_slice(&content(7, 8)[512..1024]);
    assert_eq!(stamp_of(7, &data), None);
    assert_eq!(stamp_of(7, &[0; BLOCK as usize]), Some(ZERO));
}
