//! Reads that opening wants together.

use std::collections::VecDeque;
use std::ops::Range;

use bytes::Bytes;
use cairn_proto::collections::Map;
use cairn_proto::disk::{DeviceBlock, DiskError};
use cairn_proto::limits::BLOCK_BYTES;

use crate::store::io::Io;
use crate::store::limits::RECOVERY_READ_BLOCKS_MAX;

/// What became of one block.
pub(super) type BlockRead = Result<Bytes, DiskError>;

/// Blocks that are wanted together. Those that follow each other are read together; if that fails, each alone.
#[derive(Debug, Default)]
pub(super) struct ReadSet {
    places: Vec<u64>,
    results: Vec<Option<BlockRead>>,
    /// Reads by their index in `places`.
    to_send: VecDeque<Range<usize>>,
    in_flight: Map<u64, Range<usize>>,
}

impl ReadSet {
    pub(super) fn new(places: Vec<u64>) -> ReadSet {
        let mut to_send = VecDeque::new();
        let mut first = 0;
        while first < places.len() {
            let max = (places.len() - first).min(RECOVERY_READ_BLOCKS_MAX as usize);
            let run = (1..max)
                .take_while(|i| places[first + i] == places[first] + *i as u64)
                .count();
            to_send.push_back(first..first + 1 + run);
            first += 1 + run;
        }
        ReadSet {
            results: vec![None; places.len()],
            places,
            to_send,
            in_flight: Map::default(),
        }
    }

    pub(super) fn send(&mut self, io: &mut Io, in_flight_max: usize) {
        while self.in_flight.len() < in_flight_max.max(1) {
            let Some(range) = self.to_send.pop_front() else { return };
            let token = io.read_at(DeviceBlock(self.places[range.start]), range.len() as u32);
            self.in_flight.insert(token, range);
        }
    }

    /// The place of the first block wanted.
    pub(super) fn first_place(&self) -> u64 {
        self.places[0]
    }

    /// A read has completed. Panics if it is not one of these.
    pub(super) fn done(&mut self, token: u64, result: BlockRead) {
        let range = self.in_flight.remove(&token);
        let range = range.unwrap_or_else(|| panic!("read {token} is not in flight"));
        match result {
            Ok(content) => {
                assert_eq!(
                    content.len(),
                    range.len() * BLOCK_BYTES,
                    "a read of {} blocks",
                    range.len()
                );
                for (i, index) in range.enumerate() {
                    self.results[index] = Some(Ok(content.slice(i * BLOCK_BYTES..(i + 1) * BLOCK_BYTES)));
                }
            }
            // One bad block among them is no reason to do without the others.
            Err(_) if range.len() > 1 => self.to_send.extend(range.map(|index| index..index + 1)),
            Err(error) => self.results[range.start] = Some(Err(error)),
        }
    }

    /// Whether none is on its way or waits to be sent.
    pub(super) fn is_over(&self) -> bool {
        self.in_flight.is_empty() && self.to_send.is_empty()
    }

    /// The first block that could not be read.
    pub(super) fn first_failed(&self) -> Option<(u64, DiskError)> {
        let mut results = self.places.iter().zip(&self.results);
        results.find_map(|(place, result)| Some((*place, result.as_ref()?.as_ref().err().copied()?)))
    }

    /// What could not be read is to be read again; what was is kept.
    pub(super) fn again(&mut self) {
        for (index, result) in self.results.iter_mut().enumerate() {
            if matches!(result, Some(Err(_))) {
                *result = None;
                self.to_send.push_back(index..index + 1);
            }
        }
    }

    /// What was read, by block, once all is there.
    pub(super) fn take(&mut self) -> Option<Vec<BlockRead>> {
        if !self.is_over() {
            return None;
        }
        let results = std::mem::take(&mut self.results);
        Some(
            results
                .into_iter()
                .map(|result| result.expect("all are read"))
                .collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use cairn_proto::buffer::BlockBuf;
    use cairn_proto::disk::DiskOp;

    use super::*;
    use crate::store::api::StoreAction;

    fn reads(io: &mut Io) -> Vec<(u64, u64, u32)> {
        let actions = std::iter::from_fn(|| io.pop());
        let reads = actions.map(|action| match action {
            StoreAction::Disk(DiskOp::Read { token, at, blocks }) => (token.0, at.0, blocks),
            other => panic!("{other:?}"),
        });
        reads.collect()
    }

    #[test]
    fn blocks_that_follow_each_other_are_read_together_and_a_bad_one_alone_fails() {
        let mut io = Io::default();
        let mut set = ReadSet::new(vec![7, 8, 9, 3, 4]);
        set.send(&mut io, 8);
        let sent = reads(&mut io);
        assert_eq!(
            sent.iter().map(|read| (read.1, read.2)).collect::<Vec<_>>(),
            [(7, 3), (3, 2)]
        );
        let eio = DiskError { errno: 5 };
        set.done(sent[0].0, Err(eio));
        set.done(sent[1].0, Ok(BlockBuf::zeroed(2).freeze()));
        assert!(set.take().is_none());
        set.send(&mut io, 2);
        let first = reads(&mut io);
        assert_eq!(first.len(), 2, "no more in flight than allowed");
        set.done(first[0].0, Ok(BlockBuf::zeroed(1).freeze()));
        set.done(first[1].0, Err(eio));
        set.send(&mut io, 2);
        set.done(reads(&mut io)[0].0, Ok(BlockBuf::zeroed(1).freeze()));
        let good: Vec<bool> = set.take().unwrap().iter().map(Result::is_ok).collect();
        assert_eq!(good, [true, false, true, true, true]);
    }

    #[test]
    fn only_what_could_not_be_read_is_read_again() {
        let mut io = Io::default();
        let mut set = ReadSet::new(vec![7, 9, 11]);
        set.send(&mut io, 8);
        let sent = reads(&mut io);
        let eio = DiskError { errno: 5 };
        set.done(sent[0].0, Ok(BlockBuf::zeroed(1).freeze()));
        set.done(sent[2].0, Err(eio));
        assert!(!set.is_over(), "one is still being read");
        set.done(sent[1].0, Err(eio));
        assert!(set.is_over());
        assert_eq!(set.first_failed(), Some((9, eio)));
        set.again();
        assert!(set.take().is_none());
        set.send(&mut io, 8);
        let sent = reads(&mut io);
        assert_eq!(sent.iter().map(|read| read.1).collect::<Vec<_>>(), [9, 11]);
        for (token, ..) in sent {
            set.done(token, Ok(BlockBuf::zeroed(1).freeze()));
        }
        assert!(set.first_failed().is_none() && set.take().unwrap().iter().all(Result::is_ok));
    }

    #[test]
    fn no_read_is_longer_than_allowed() {
        let mut io = Io::default();
        let mut set = ReadSet::new((0..150).collect());
        set.send(&mut io, 100);
        let lengths: Vec<u32> = reads(&mut io).iter().map(|read| read.2).collect();
        assert_eq!(lengths, [64, 64, 22]);
    }
}
