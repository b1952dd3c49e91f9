//! The log from a checkpoint on: reading it, telling its end from damage, and replaying it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use cairn_proto::checksum::{Checksum, block_checksum};
use cairn_proto::ids::VolumeId;
use cairn_proto::limits::BLOCK_BYTES;

use super::reads::BlockRead;
use super::{Outcome, Phase, Recovery};
use crate::store::catalog::{Effects, Unknown};
use crate::store::chunk::{ChunkKey, Home, PageKey, Resident};
use crate::store::engine::LogPosition;
use crate::store::limits::{RECOVERY_READ_BLOCKS_MAX, REPLAY_BATCHES_MAX};
use crate::store::record::{BatchHeader, HeaderError, LogAhead, Record};
use crate::store::status::OpenError;

/// Where reading the log is: behind the record of a commit.
#[derive(Clone, Copy, Debug)]
pub(super) struct LogPlace {
    pub(super) position: LogPosition,
    /// Where the log goes on.
    pub(super) ahead: LogAhead,
}

/// What was read of the log and is not applied yet.
#[derive(Debug, Default)]
pub(super) struct LogRead {
    /// Records that have a successor, oldest first.
    confirmed: VecDeque<ReadRecord>,
    /// The last record read.
    last: Option<ReadRecord>,
    /// Blocks read ahead.
    cache: BTreeMap<u32, Bytes>,
    /// The block after those that were last read ahead.
    read_to: Option<u32>,
}

#[derive(Clone, Debug)]
pub(super) struct ReadRecord {
    pub(super) header: BatchHeader,
    pub(super) records: Vec<Record>,
    /// The place before it.
    before: LogPlace,
}

/// A block of the last record's data.
#[derive(Clone, Copy, Debug)]
pub(super) struct DataBlock {
    volume: VolumeId,
    volume_block: u64,
    place: u32,
    checksum: Checksum,
}

/// What of the index is being read.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wanted {
    Leaf(ChunkKey, Home),
    Page(PageKey, Home),
}

/// What follows when records are applied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum After {
    /// The next record is read.
    Next,
    /// The log seems to end.
    EndOfLog,
    /// All is done.
    Finish,
}

/// Blocks read when the log goes on far from where it was read last: its batches may be long.
const READ_AHEAD_AFTER_JUMP: u32 = 4;

type Step = Result<Option<Outcome>, OpenError>;

impl Recovery {
    /// Goes on with the next record.
    pub(super) fn read_record(&mut self) {
        self.phase = Phase::RecordFirst;
        let next = self.loaded.place.ahead.next;
        let log = &mut self.loaded.log;
        if log.cache.contains_key(&next) {
            return self.read(Vec::new());
        }
        let near = log
            .read_to
            .is_some_and(|end| (end..end + RECOVERY_READ_BLOCKS_MAX).contains(&next));
        let ahead = if near {
            RECOVERY_READ_BLOCKS_MAX
        } else {
            READ_AHEAD_AFTER_JUMP
        };
        let end = next.saturating_add(ahead).min(self.end());
        let log = &mut self.loaded.log;
        log.cache.clear();
        log.read_to = Some(end);
        self.read((next..end).map(u64::from).collect());
    }

    pub(super) fn record_first(&mut self, results: Vec<BlockRead>) -> Step {
        let LogPlace { position, ahead } = self.loaded.place;
        let next = ahead.next;
        let mut first_error = None;
        for (place, result) in (next..).zip(results) {
            match result {
                Ok(block) => drop(self.loaded.log.cache.insert(place, block)),
                Err(error) if place == next => first_error = Some(error),
                // It is read again when it is needed.
                Err(_) => {}
            }
        }
        if let Some(error) = first_error {
            return Err(OpenError::LogUnreadable { place: next, error });
        }
        let cache = &self.loaded.log.cache;
        let first = cache.get(&next).expect("it was just read").clone();
        let peek = BatchHeader::peek(&first, self.header().device, self.end());
        let Some(peek) = peek.filter(|peek| (peek.seq, peek.places[0]) == (position.seq + 1, next)) else {
            return self.apply_confirmed(After::EndOfLog);
        };
        let rest = &peek.places[1..];
        let cached: Option<Vec<&[u8]>> = rest.iter().map(|place| Some(&cache.get(place)?[..])).collect();
        if let Some(cached) = cached {
            let pages = [&[&first[..]][..], &cached].concat().concat();
            return self.record_read(&pages);
        }
        let wanted = rest.iter().map(|place| u64::from(*place)).collect();
        self.phase = Phase::RecordRest(peek.places, first);
        self.read(wanted);
        Ok(None)
    }

    pub(super) fn record_rest(&mut self, places: &[u32], first: &Bytes, results: Vec<BlockRead>) -> Step {
        let mut pages = Vec::with_capacity(places.len() * BLOCK_BYTES);
        pages.extend_from_slice(first);
        for (place, result) in places[1..].iter().zip(results) {
            let page = result.map_err(|error| OpenError::LogUnreadable { place: *place, error })?;
            pages.extend_from_slice(&page);
        }
        self.record_read(&pages)
    }

    fn record_read(&mut self, pages: &[u8]) -> Step {
        let before = self.loaded.place;
        let (header, crc, records) = match BatchHeader::decode(pages, self.end()) {
            Ok(decoded) => decoded,
            Err(HeaderError::NotARecord) => return self.apply_confirmed(After::EndOfLog),
            Err(error) => {
                return Err(OpenError::Damaged {
                    words: format!("commit {} of its log: {error}", before.position.seq + 1),
                });
            }
        };
        if header.previous_crc != before.position.crc {
            // It is whole, and was written after another record than the one that stands before it now.
            let last = self.loaded.log.last.as_ref();
            let place = last.map_or(header.places[0], |last| last.header.places[0]);
            return Err(self.log_damaged(before.position.seq, place, header.seq));
        }
        self.check_checkpoint(&header)?;
        self.loaded.place = LogPlace {
            position: LogPosition { seq: header.seq, crc },
            ahead: header.ahead,
        };
        let record = ReadRecord {
            header,
            records,
            before,
        };
        let log = &mut self.loaded.log;
        log.confirmed.extend(log.last.replace(record));
        if log.confirmed.len() >= REPLAY_BATCHES_MAX || !log.cache.contains_key(&self.loaded.place.ahead.next) {
            return self.apply_confirmed(After::Next);
        }
        self.read_record();
        Ok(None)
    }

    /// A record after a checkpoint was written while that one, the one before it, or the one after it was the last. Else
    /// what this checkpoint needs may have been written over.
    fn check_checkpoint(&self, header: &BatchHeader) -> Result<(), OpenError> {
        let chosen = self.header().sequence;
        if (chosen - 1..=chosen + 1).contains(&header.checkpoint) {
            return Ok(());
        }
        Err(OpenError::Damaged {
            words: format!(
                "commit {} of its log was written after checkpoint {}, and the newest that can be read is {chosen}",
                header.seq, header.checkpoint
            ),
        })
    }

    /// Applies the records that are confirmed; first come the index pages that they need.
    fn apply_confirmed(&mut self, after: After) -> Step {
        let records = std::mem::take(&mut self.loaded.log.confirmed);
        self.load_pages(records, after);
        Ok(None)
    }

    /// What of the index is not in memory and a record needs: leaves, then pages.
    fn wanted_by<'a>(&self, records: impl IntoIterator<Item = &'a ReadRecord>) -> BTreeMap<u32, Wanted> {
        let records = records.into_iter().flat_map(|record| &record.records);
        let unknown = records.flat_map(|record| self.loaded.catalog.unknown_of(record));
        let wanted = unknown.filter_map(|unknown| match unknown {
            Unknown::Leaf(key, home) => Some((home.place, Wanted::Leaf(key, home))),
            Unknown::OnDisk(key, home) => Some((home.place, Wanted::Page(key, home))),
            Unknown::Broken => None,
        });
        wanted.collect()
    }

    fn load_pages(&mut self, records: VecDeque<ReadRecord>, after: After) {
        let wanted = self.wanted_by(&records);
        let places = wanted.keys().map(|place| u64::from(*place)).collect();
        self.phase = Phase::Pages(wanted.into_values().collect(), records, after);
        self.read(places);
    }

    pub(super) fn pages(
        &mut self,
        wanted: Vec<Wanted>,
        mut records: VecDeque<ReadRecord>,
        after: After,
        results: Vec<BlockRead>,
    ) -> Step {
        let end = self.end();
        self.progress.waits_for = None;
        let mut effects = Effects::default();
        for (wanted, result) in wanted.into_iter().zip(results) {
            match wanted {
                Wanted::Leaf(key, home) => {
                    let error = result.as_ref().err().copied();
                    let block = result.unwrap_or_default();
                    let lost = effects.stale_leaves.len();
                    self.loaded.catalog.loaded_leaf(key, home, &block, end, &mut effects);
                    if effects.stale_leaves.len() > lost {
                        self.loaded.lost_parts.note(home.place, error);
                    }
                }
                Wanted::Page(key, home) => {
                    let error = result.as_ref().err().copied();
                    let page = result.ok().and_then(|block| Resident::decode(&block, home, end));
                    let page = page.filter(|page| page.agrees_with(&self.loaded.data));
                    if page.is_none() {
                        self.loaded.index_lost = true;
                        self.loaded.lost_parts.note(home.place, error);
                    }
                    self.loaded.catalog.loaded_page(key, home, page, &mut effects);
                }
            }
        }
        self.loaded.index_lost |= !effects.stale_leaves.is_empty();
        self.loaded.account(effects).map_err(|place| OpenError::Damaged {
            words: format!("its free-space map does not know the index page at block {place}"),
        })?;
        while let Some(record) = records.front() {
            // A leaf tells which pages there are; and a record before this one may have given its range to another leaf.
            if !self.wanted_by([record]).is_empty() {
                self.load_pages(records, after);
                return Ok(None);
            }
            let record = records.pop_front().expect("it has a front");
            self.loaded.apply(&record.header, &record.records)?;
            self.progress.batches += 1;
        }
        match after {
            After::Next => self.read_record(),
            After::EndOfLog => self.look_beyond(),
            After::Finish => return Ok(self.replayed(false)),
        }
        Ok(None)
    }

    /// The record that was expected is not there. Either it was being written when the log stopped, and then nothing
    /// was written after it, for one batch is in flight at a time; or it is damaged. So the record after it is looked
    /// for, wherever it may stand.
    ///
    /// The same for the last record that is there: it may be a batch that was not believed at an earlier opening, while
    /// the batch that should have been written over it was lost.
    fn look_beyond(&mut self) {
        let before = self.loaded.log.last.as_ref().map(|last| last.before);
        let ahead = before.iter().chain([&self.loaded.place]).map(|from| &from.ahead);
        let places: BTreeSet<u32> = ahead.flat_map(|ahead| ahead.places().chain([ahead.next])).collect();
        self.phase = Phase::Beyond;
        self.read(places.into_iter().map(u64::from).collect());
    }

    pub(super) fn beyond(&mut self, results: Vec<BlockRead>) -> Step {
        let here = self.loaded.place;
        let before = self.loaded.log.last.as_ref().map(|last| last.before);
        let (device, end) = (self.header().device, self.end());
        for result in results {
            // A block that can't be read is no evidence: a sector that was being written when power failed may be one.
            let Ok(block) = result else { continue };
            let Some(peek) = BatchHeader::peek(&block, device, end) else {
                continue;
            };
            // Where it belongs counts, not where it landed: it may have landed on the one that is missed.
            let belongs = peek.places[0];
            let lost = |from: &LogPlace| from.ahead.allows(belongs) && peek.seq >= from.position.seq + 2;
            if lost(&here) {
                return Err(self.log_damaged(here.position.seq + 1, here.ahead.next, peek.seq));
            }
            // What belongs where the log goes on may be the batch that was being written.
            let in_flight = (peek.seq, belongs) == (here.position.seq + 1, here.ahead.next);
            if let Some(before) = before.filter(|before| lost(before) && !in_flight) {
                return Err(self.log_damaged(before.position.seq + 1, before.ahead.next, peek.seq));
            }
        }
        self.look_at_last();
        Ok(None)
    }

    fn log_damaged(&self, commit: u64, place: u32, seen: u64) -> OpenError {
        OpenError::LogDamaged { place, commit, seen }
    }

    /// The last record is believed if its data is there.
    fn look_at_last(&mut self) {
        let mut blocks = Vec::new();
        let last = self.loaded.log.last.iter();
        for record in last.flat_map(|last| &last.records) {
            record.data(|volume, volume_block, place, checksum| {
                blocks.push(DataBlock {
                    volume,
                    volume_block,
                    place,
                    checksum,
                });
            });
        }
        let wanted = blocks.iter().map(|block| block.place.into()).collect();
        self.phase = Phase::LastData(blocks);
        self.read(wanted);
    }

    pub(super) fn last_data(&mut self, blocks: Vec<DataBlock>, results: Vec<BlockRead>) -> Step {
        let here = self.loaded.place;
        let (device, end) = (self.header().device, self.end());
        let mut torn = false;
        let mut confirmed = false;
        for (block, result) in blocks.into_iter().zip(results) {
            // Data that can't be read does not show that the batch was never acknowledged. It is believed, and each read of
            // such a block says that it is damaged.
            let Ok(content) = result else { continue };
            if block_checksum(block.volume, block.volume_block, &content) == block.checksum {
                continue;
            }
            torn = true;
            // The record after it may have landed on its data.
            confirmed |= BatchHeader::peek(&content, device, end)
                .is_some_and(|peek| peek.seq > here.position.seq && peek.places[0] == here.ahead.next);
        }
        let believed = !torn || confirmed;
        let Some(last) = self.loaded.log.last.take() else {
            return Ok(self.replayed(false));
        };
        if believed || self.limits.canary.skip_data_checksum_at_recovery() {
            self.load_pages(VecDeque::from([last]), After::Finish);
            return Ok(None);
        }
        self.loaded.place = last.before;
        Ok(self.replayed(true))
    }
}
