//! What all guests of a run asked and were told, in one order, and what is counted of it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use cairn_proto::ids::{ChunkIndex, Generation, GroupCount, VolumeId};
use cairn_proto::limits::BLOCKS_PER_CHUNK;
use cairn_proto::time::Time;

use crate::checker::history::{Broken, Checked, History, OpKind, OpNumber};
use crate::checker::linear::BlockContent;
use crate::checker::pattern::SECTORS_PER_BLOCK;

/// Operations that may be under way on one block: the check of a history takes time exponential in this.
const OVERLAP_MAX: u32 = 4;
/// Errors of which the words are kept.
const WORDS_MAX: usize = 20;

/// What is counted of a part of a run.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Operations that were called.
    pub ops: u64,
    /// Operations that were done.
    pub done: u64,
    /// Operations whose connection broke before the answer.
    pub unanswered: u64,
    /// Operations that the guest was told an error for, though it had to be told none.
    pub errors: u64,
    /// Errors that had to come: of who was fenced.
    pub fenced: u64,
    /// The words of the first of the errors.
    pub words: Vec<String>,
    /// The longest time that a guest with something to do got no answer at all.
    pub longest_stall: Duration,
}

impl Tally {
    /// Adds what was counted elsewhere.
    pub fn add(&mut self, other: &Tally) {
        self.ops += other.ops;
        self.done += other.done;
        self.unanswered += other.unanswered;
        self.errors += other.errors;
        self.fenced += other.fenced;
        let room = WORDS_MAX.saturating_sub(self.words.len());
        self.words.extend(other.words.iter().take(room).cloned());
        self.longest_stall = self.longest_stall.max(other.longest_stall);
    }
}

#[derive(Default)]
struct Inner {
    history: History,
    groups: BTreeMap<VolumeId, GroupCount>,
    /// Operations under way, by block.
    busy: BTreeMap<(VolumeId, u64), u32>,
    broken: Option<Broken>,
    tally: Tally,
}

/// The one order of all calls and answers.
pub struct Ledger {
    origin: Instant,
    inner: Mutex<Inner>,
}

/// Where an operation is: the first sector, and how many.
pub type Sectors = (u64, u64);

fn blocks((sector, sectors): Sectors) -> std::ops::Range<u64> {
    let per_block = SECTORS_PER_BLOCK as u64;
    sector / per_block..(sector + sectors).div_ceil(per_block)
}

impl Default for Ledger {
    fn default() -> Ledger {
        Ledger {
            origin: Instant::now(),
            inner: Mutex::default(),
        }
    }
}

impl Ledger {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Time {
        Time::ZERO + self.origin.elapsed()
    }

    /// Time since the ledger was opened.
    pub fn elapsed(&self) -> Duration {
        self.origin.elapsed()
    }

    /// A volume has so many groups.
    pub fn add_volume(&self, volume: VolumeId, groups: GroupCount) {
        self.lock().groups.insert(volume, groups);
    }

    /// Operations of this session count as those of one attachment, younger than all of lower numbers.
    pub fn attached(&self, session: u32) {
        self.lock().history.attached(session, generation(session));
    }

    /// A guest asks; `None` when so much is under way on one of the blocks that it should choose another.
    pub fn call(&self, session: u32, volume: VolumeId, kind: OpKind, place: Sectors) -> Option<OpNumber> {
        let now = self.now();
        let mut inner = self.lock();
        if kind != OpKind::Other {
            let range = blocks(place);
            let crowded = inner.busy.range((volume, range.start)..(volume, range.end));
            if crowded.into_iter().any(|(_, count)| *count >= OVERLAP_MAX) {
                return None;
            }
            for block in range {
                *inner.busy.entry((volume, block)).or_default() += 1;
            }
        }
        inner.tally.ops += 1;
        Some(inner.history.call(now, session, volume, kind, place))
    }

    /// It was done; `stalled` is for how long the guest had no answer before.
    pub fn done(&self, number: OpNumber, read: Vec<u8>, stalled: Duration) {
        let now = self.now();
        let mut inner = self.lock();
        let session = inner.end(number);
        inner.tally.done += 1;
        inner.tally.longest_stall = inner.tally.longest_stall.max(stalled);
        let content = [Bytes::from(read)];
        let read: &[Bytes] = if content[0].is_empty() { &[] } else { &content };
        if let Err(broken) = inner.history.done(now, number, generation(session), read)
            && inner.broken.is_none()
        {
            let op = inner.history.op(number);
            let (volume, block) = (op.volume, blocks((op.sector, op.sectors)).start);
            let story = inner.history.story(volume, block);
            inner.broken = Some(Broken { story, ..broken });
        }
    }

    /// The connection broke before the answer.
    pub fn unanswered(&self, number: OpNumber) {
        let now = self.now();
        let mut inner = self.lock();
        inner.end(number);
        inner.tally.unanswered += 1;
        inner.history.failed(now, number, "the connection broke".to_string());
    }

    /// The answer was an error; whether it had to be one.
    pub fn failed(&self, number: OpNumber, error: u32, is_fenced: bool) {
        let now = self.now();
        let mut inner = self.lock();
        inner.end(number);
        inner.history.failed(now, number, format!("NBD error {error}"));
        if is_fenced {
            inner.tally.fenced += 1;
            return;
        }
        inner.tally.errors += 1;
        if inner.tally.words.len() < WORDS_MAX {
            let words = inner.history.op(number).to_string();
            inner.tally.words.push(words);
        }
    }

    /// What was counted since the last call.
    pub fn take_tally(&self) -> Tally {
        std::mem::take(&mut self.lock().tally)
    }

    /// What a guest read that nobody wrote, if one did.
    pub fn broken(&self) -> Option<Broken> {
        self.lock().broken.clone()
    }

    /// Checks everything since it was settled last.
    pub fn check(&self) -> Result<Checked, Broken> {
        let inner = self.lock();
        if let Some(broken) = &inner.broken {
            return Err(broken.clone());
        }
        let group_of = |volume: VolumeId, block: u64| {
            let chunk = ChunkIndex((block / u64::from(BLOCKS_PER_CHUNK)) as u32);
            inner.groups.get(&volume).map_or(0, |groups| groups.group_of(chunk).0)
        };
        inner.history.check(&group_of)
    }

    /// What has been checked is forgotten; blocks hold what all of them were just read to hold. Nothing is under way, and what
    /// was never answered belongs to sessions that another followed.
    pub fn settle(&self, held: BTreeMap<(VolumeId, u64), BlockContent>) {
        let mut inner = self.lock();
        assert!(inner.busy.is_empty(), "operations are under way");
        inner.history.settle(held);
    }

    /// What a read that was done saw, block by block. It covers whole blocks.
    pub fn seen(&self, number: OpNumber) -> Vec<(u64, BlockContent)> {
        let inner = self.lock();
        let op = inner.history.op(number);
        let range = blocks((op.sector, op.sectors));
        let contents = op.seen.chunks_exact(SECTORS_PER_BLOCK);
        let contents = contents.map(|seen| seen.try_into().expect("as many sectors as a block has"));
        range.zip(contents).collect()
    }

    /// All operations since it was settled last, one per line.
    pub fn lines(&self) -> Vec<String> {
        let inner = self.lock();
        inner.history.ops().iter().map(ToString::to_string).collect()
    }
}

impl Inner {
    /// An operation is no longer under way; its session.
    fn end(&mut self, number: OpNumber) -> u32 {
        let op = self.history.op(number);
        let (session, volume, kind) = (op.session, op.volume, op.kind);
        let range = blocks((op.sector, op.sectors));
        if kind != OpKind::Other {
            for block in range {
                let count = self.busy.get_mut(&(volume, block)).expect("counted when it was called");
                *count -= 1;
                if *count == 0 {
                    self.busy.remove(&(volume, block));
                }
            }
        }
        session
    }
}

fn generation(session: u32) -> Generation {
    Generation::new(session).expect("sessions are counted from one")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checker::pattern::fill;

    const V: VolumeId = VolumeId(1);

    #[test]
    fn a_lost_write_is_found_before_and_after_settling() {
        let ledger = Ledger::default();
        let write = ledger.call(1, V, OpKind::Write, (0, 8)).unwrap();
        ledger.done(write, Vec::new(), Duration::ZERO);
        let read = |writer: Option<OpNumber>| {
            let number = ledger.call(1, V, OpKind::Read, (0, 8)).unwrap();
            let content = writer.map_or(vec![0; 4096], |writer| fill(V, 0, 8, writer).to_vec());
            ledger.done(number, content, Duration::ZERO);
            number
        };
        let seen = ledger.seen(read(Some(write)));
        assert_eq!(seen, [(0, [write; SECTORS_PER_BLOCK])]);
        assert!(ledger.check().is_ok());
        ledger.settle(seen.into_iter().map(|(block, held)| ((V, block), held)).collect());
        read(Some(write));
        assert!(ledger.check().is_ok());
        read(None);
        assert!(ledger.check().is_err());
    }

    #[test]
    fn what_nobody_wrote_is_told_with_its_story_and_errors_are_counted() {
        let ledger = Ledger::default();
        let write = ledger.call(1, V, OpKind::Write, (0, 8)).unwrap();
        ledger.failed(write, 5, false);
        let other = ledger.call(1, V, OpKind::Write, (0, 8)).unwrap();
        ledger.unanswered(other);
        let read = ledger.call(1, V, OpKind::Read, (0, 8)).unwrap();
        ledger.done(read, vec![7; 4096], Duration::from_secs(2));
        let broken = ledger.check().unwrap_err();
        assert_eq!(broken.story.len(), 3);
        let tally = ledger.take_tally();
        assert_eq!((tally.ops, tally.done, tally.errors, tally.unanswered), (3, 1, 1, 1));
        assert_eq!((tally.words.len(), tally.longest_stall.as_secs()), (1, 2));
    }

    #[test]
    fn a_crowded_block_is_left_alone() {
        let ledger = Ledger::default();
        for _ in 0..OVERLAP_MAX {
            assert!(ledger.call(1, V, OpKind::Read, (3, 9)).is_some());
        }
        assert_eq!(ledger.call(1, V, OpKind::Read, (8, 1)), None);
        assert!(ledger.call(1, V, OpKind::Read, (16, 8)).is_some());
        assert!(ledger.call(1, V, OpKind::Other, (0, 0)).is_some());
    }
}
