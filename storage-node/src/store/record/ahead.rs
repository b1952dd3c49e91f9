//! Where the log goes on after a record, and where a record can stand that was written after a lost one.

use std::ops::Range;

use cairn_proto::codec::DecodeError;

use crate::store::entry::check_place;
use crate::store::limits::{BATCH_BLOCKS_MAX, RECORD_PAGES_MAX};

/// The next record, its data, and the first page of the record after it lie within this many blocks, unless the log goes
/// on in another run.
const LOG_WINDOW_BLOCKS: u32 = RECORD_PAGES_MAX as u32 + BATCH_BLOCKS_MAX;

/// What a record (or a checkpoint) promises of the two records after it. All of these blocks are taken for the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::store) struct LogAhead {
    /// Where the next record stands.
    pub(in crate::store) next: u32,
    /// Blocks of the run after `next`. If the record after the next one stands in this run, it is one of these.
    pub(in crate::store) run_left: u32,
    /// Where the record after the next one stands otherwise.
    pub(in crate::store) next_run: u32,
}

impl LogAhead {
    /// Whether the record after the next one may stand there.
    pub(in crate::store) fn allows(&self, place: u32) -> bool {
        self.window().contains(&place) || place == self.next_run
    }

    /// The places in this run where the record after the next one may stand.
    pub(in crate::store) fn window(&self) -> Range<u32> {
        let first = self.next + 1;
        first..first + self.run_left.min(LOG_WINDOW_BLOCKS)
    }

    /// All places where the record after the next one may stand.
    pub(in crate::store) fn places(&self) -> impl Iterator<Item = u32> {
        self.window().chain([self.next_run])
    }

    /// Whether it lies in the space, which ends before `end`.
    pub(in crate::store) fn check(&self, end: u32) -> Result<(), DecodeError> {
        check_place(self.next, end)?;
        check_place(self.next_run, end)?;
        let run = self.next..=self.next.saturating_add(self.run_left);
        if *run.end() >= end || run.contains(&self.next_run) {
            return Err(DecodeError::Invalid("run of the log"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_after_the_next_is_looked_for_where_it_may_stand_and_nowhere_else() {
        let ahead = LogAhead {
            next: 10,
            run_left: 3,
            next_run: 50,
        };
        let places: Vec<u32> = ahead.places().collect();
        assert_eq!(places, [11, 12, 13, 50]);
        assert!((0..100).all(|place| ahead.allows(place) == places.contains(&place)));
        let long = LogAhead {
            run_left: 100_000,
            next_run: 5,
            ..ahead
        };
        assert_eq!(long.places().count() as u32, LOG_WINDOW_BLOCKS + 1);
    }

    #[test]
    fn what_lies_outside_of_the_space_or_twice_in_it_is_refused() {
        let ahead = LogAhead {
            next: 10,
            run_left: 3,
            next_run: 50,
        };
        assert_eq!(ahead.check(51), Ok(()));
        for end in [4, 10, 50] {
            assert!(ahead.check(end).is_err(), "the space ends before {end}");
        }
        for next_run in 10..=13 {
            assert!(LogAhead { next_run, ..ahead }.check(100).is_err());
        }
        let run_left = u32::MAX;
        assert!(LogAhead { run_left, ..ahead }.check(100).is_err());
    }
}
