//! All that clients asked of volumes, with the answers, and what must be true of it as a whole.

use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;
use cairn_proto::ids::{Generation, VolumeId};
use cairn_proto::limits::SECTOR_BYTES;
use cairn_proto::time::Time;

use super::linear::{self, BlockContent, BlockOp, Effect, Instant, Sectors, Verdict};
use super::pattern::{SECTORS_PER_BLOCK, Writer, ZEROES, writer_of};

/// The number of an operation, from one on.
pub type OpNumber = Writer;

/// Longer operations count only for blocks that shorter ones touch too.
const LONG_BLOCKS: u64 = 1024;

/// What an operation asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpKind {
    /// Read.
    Read,
    /// Write content that names the operation.
    Write,
    /// Make it zeroes, by a discard or by writing zeroes.
    Zero,
    /// Nothing that a block could show: a flush, or a question about holes.
    Other,
}

/// How an operation ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum End {
    /// As asked, under this generation.
    Done(Generation),
    /// With an error: what it asked for may have happened or not.
    Error(String),
}

/// One operation.
#[derive(Clone, Debug)]
pub struct Op {
    /// Its number.
    pub number: OpNumber,
    /// Which attachment of which client: told apart by the caller.
    pub session: u32,
    /// On which volume.
    pub volume: VolumeId,
    /// What.
    pub kind: OpKind,
    /// From which sector on.
    pub sector: u64,
    /// How many.
    pub sectors: u64,
    /// When it was called, in the order of all calls and answers, and in virtual time.
    pub called: (Instant, Time),
    /// When it ended, and how.
    pub ended: Option<(Instant, Time, End)>,
    /// For a read that is done: who wrote each sector.
    pub seen: Vec<Writer>,
}

impl Op {
    /// The blocks that it touches, wholly or in part.
    pub fn blocks(&self) -> std::ops::Range<u64> {
        let per_block = SECTORS_PER_BLOCK as u64;
        self.sector / per_block..(self.sector + self.sectors).div_ceil(per_block)
    }

    /// The part of a block that it covers, and where in the operation that part begins.
    fn part(&self, block: u64) -> (Sectors, impl Iterator<Item = (usize, usize)> + use<>) {
        let start = block * SECTORS_PER_BLOCK as u64;
        let (from, to) = (self.sector, self.sector + self.sectors);
        let covered = (0..SECTORS_PER_BLOCK).filter_map(move |s| {
            let sector = start + s as u64;
            (from..to).contains(&sector).then(|| (s, (sector - from) as usize))
        });
        let bits = covered.clone().fold(0, |bits, (s, _)| bits | 1 << s);
        (bits, covered)
    }

    fn done(&self) -> Option<(Instant, Generation)> {
        match self.ended {
            Some((at, _, End::Done(generation))) => Some((at, generation)),
            _ => None,
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Op {
            number,
            session,
            volume,
            kind,
            sector,
            sectors,
            ..
        } = self;
        write!(
            f,
            "op {number} session {session} volume {volume} {kind:?} sectors {sector}+{sectors}"
        )?;
        write!(f, " called #{} {:?}", self.called.0, self.called.1)?;
        match &self.ended {
            None => write!(f, ", no answer")?,
            Some((at, time, End::Done(generation))) => {
                write!(f, ", done #{at} {time:?} under generation {generation}")?
            }
            Some((at, time, End::Error(words))) => write!(f, ", failed #{at} {time:?}: {words}")?,
        }
        if !self.seen.is_empty() {
            write!(f, ", saw {:?}", self.seen)?;
        }
        Ok(())
    }
}

/// Something that must not be.
#[derive(Clone, Debug)]
pub struct Broken {
    /// Which promise: stable words.
    pub promise: &'static str,
    /// What was seen.
    pub words: String,
    /// When.
    pub at: Time,
    /// The history that shows it.
    pub story: Vec<String>,
}

/// The history of one world.
#[derive(Default)]
pub struct History {
    /// Operations that were settled before: numbers up to this one are of an earlier part.
    settled: OpNumber,
    /// What blocks held then, where that is not zeroes.
    held: BTreeMap<(VolumeId, u64), BlockContent>,
    ops: Vec<Op>,
    instant: Instant,
    sessions: BTreeMap<u32, Generation>,
}

impl History {
    /// The operations since the last [`settle`](Self::settle), by number.
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// Whether this write may be the newest content of a block without anybody having been told of it: it was never
    /// acknowledged, and no later attachment has completed anything on the block. (Who has read or written it has found all
    /// members equal before, or made them so.) `asker` is the operation that wants to know: of another attachment.
    pub fn is_open_and_newest(&self, writer: OpNumber, block: u64, asker: OpNumber) -> bool {
        let asker = self.op(asker);
        let is_other = |write: &Op| (write.volume, write.session) != (asker.volume, asker.session);
        self.is_open_at_the_end(writer, block) && is_other(self.op(writer))
    }

    /// The same when nobody asks any more, and all attachments are over.
    pub fn is_open_at_the_end(&self, writer: OpNumber, block: u64) -> bool {
        if writer <= self.settled || (writer - self.settled) as usize > self.ops.len() {
            return false;
        }
        let write = self.op(writer);
        if matches!(write.ended, Some((_, _, End::Done(_)))) {
            return false;
        }
        let Some(generation) = self.sessions.get(&write.session) else {
            return false;
        };
        let mut later = self.ops.iter().filter(|op| op.volume == write.volume);
        !later.any(|op| {
            let newer = op.done().is_some_and(|(_, by)| by > *generation);
            newer && op.kind != OpKind::Other && op.blocks().contains(&block)
        })
    }

    /// The operation of a number, which is not settled.
    pub fn op(&self, number: OpNumber) -> &Op {
        &self.ops[(number - self.settled) as usize - 1]
    }

    fn op_mut(&mut self, number: OpNumber) -> &mut Op {
        &mut self.ops[(number - self.settled) as usize - 1]
    }

    /// Forgets all operations, after they have been checked: from here on blocks hold `held`, and zeroes where that says
    /// nothing. Every operation must have ended, or belong to an attachment that was followed by another, so that
    /// none takes effect from now on.
    pub fn settle(&mut self, held: BTreeMap<(VolumeId, u64), BlockContent>) {
        self.settled += OpNumber::try_from(self.ops.len()).expect("histories are short");
        self.ops.clear();
        self.held = held;
    }

    fn tick(&mut self) -> Instant {
        self.instant += 1;
        self.instant
    }

    /// A client asks; the operation's number.
    pub fn call(&mut self, now: Time, session: u32, volume: VolumeId, kind: OpKind, place: (u64, u64)) -> OpNumber {
        let called = (self.tick(), now);
        let count = OpNumber::try_from(self.ops.len() + 1).expect("histories are short");
        let number = self.settled.checked_add(count).expect("fewer operations than numbers");
        let (sector, sectors) = place;
        self.ops.push(Op {
            number,
            session,
            volume,
            kind,
            sector,
            sectors,
            called,
            ended: None,
            seen: Vec::new(),
        });
        number
    }

    /// The attachment of a session is of this generation.
    pub fn attached(&mut self, session: u32, generation: Generation) {
        self.sessions.insert(session, generation);
    }

    /// It was done. Fails when a read shows what nobody wrote there.
    pub fn done(&mut self, now: Time, number: OpNumber, generation: Generation, read: &[Bytes]) -> Result<(), Broken> {
        let at = self.tick();
        let op = self.op_mut(number);
        assert!(op.ended.is_none(), "operation {number} was answered twice");
        op.ended = Some((at, now, End::Done(generation)));
        let session = op.session;
        self.sessions.insert(session, generation);
        let op = self.op_mut(number);
        if op.kind != OpKind::Read {
            return Ok(());
        }
        let broken = |words| {
            Err(Broken {
                promise: "reads return what was written",
                words,
                at: now,
                story: vec![],
            })
        };
        let length: usize = read.iter().map(Bytes::len).sum();
        if length as u64 != op.sectors * SECTOR_BYTES as u64 {
            return broken(format!(
                "operation {number} asked for {} sectors and got {length} bytes",
                op.sectors
            ));
        }
        let joined;
        let content: &[u8] = match read {
            [one] => one,
            many => {
                joined = many.concat();
                &joined
            }
        };
        for (sector, number) in content.chunks_exact(SECTOR_BYTES).zip(op.sector..) {
            match writer_of(op.volume, number, sector) {
                Ok(writer) => op.seen.push(writer),
                Err(words) => return broken(format!("operation {}: {words}", op.number)),
            }
        }
        Ok(())
    }

    /// It ended with an error.
    pub fn failed(&mut self, now: Time, number: OpNumber, words: String) {
        let at = self.tick();
        let op = self.op_mut(number);
        assert!(op.ended.is_none(), "operation {number} was answered twice");
        op.ended = Some((at, now, End::Error(words)));
    }

    /// What must be true of all of it: each block is a register, and no older holder is acknowledged after a newer one.
    /// `group_of` tells which group a block belongs to.
    pub fn check(&self, group_of: &dyn Fn(VolumeId, u64) -> u8) -> Result<Checked, Broken> {
        let first = self.first_completions(group_of);
        self.one_writer_at_a_time(&first, group_of)?;
        let blocks = self.by_block(&first, group_of);
        let mut checked = Checked {
            blocks: blocks.len(),
            undecided: 0,
        };
        for ((volume, block), ops) in &blocks {
            match linear::check(ops) {
                Verdict::Linearizable => {}
                Verdict::Undecided => checked.undecided += 1,
                Verdict::Violated(violation) => {
                    let time = self
                        .op(violation.op)
                        .ended
                        .as_ref()
                        .map_or(Time::ZERO, |(_, time, _)| *time);
                    return Err(Broken {
                        promise: "reads are linearizable, and what was acknowledged stays",
                        words: format!("volume {volume} block {block}: {}", violation.words),
                        at: time,
                        story: self.story(*volume, *block),
                    });
                }
            }
        }
        Ok(checked)
    }

    /// Per group, when each generation first completed something.
    fn first_completions(&self, group_of: &dyn Fn(VolumeId, u64) -> u8) -> Completions {
        let mut first = Completions::new();
        for op in self.ops.iter().filter(|op| op.kind != OpKind::Other) {
            let Some((at, generation)) = op.done() else { continue };
            for group in groups_of(op, group_of) {
                let entry = first.entry((op.volume, group)).or_default();
                let instant = entry.entry(generation).or_insert(at);
                *instant = at.min(*instant);
            }
        }
        first
    }

    fn one_writer_at_a_time(&self, first: &Completions, group_of: &dyn Fn(VolumeId, u64) -> u8) -> Result<(), Broken> {
        for op in &self.ops {
            let Some((_, generation)) = op.done() else { continue };
            if !matches!(op.kind, OpKind::Write | OpKind::Zero) {
                continue;
            }
            for group in groups_of(op, group_of) {
                let newer = newer_completion(first, op.volume, group, generation);
                if let Some((by, at)) = newer.filter(|(_, at)| *at < op.called.0) {
                    return Err(Broken {
                        promise: "one writer at a time",
                        words: format!(
                            "generation {by} had completed an operation at #{at} before this was called: {op}"
                        ),
                        at: op.ended.as_ref().map_or(Time::ZERO, |(_, time, _)| *time),
                        story: vec![],
                    });
                }
            }
        }
        Ok(())
    }

    fn by_block(
        &self,
        first: &Completions,
        group_of: &dyn Fn(VolumeId, u64) -> u8,
    ) -> BTreeMap<(VolumeId, u64), Vec<BlockOp>> {
        let mut blocks: BTreeMap<(VolumeId, u64), Vec<BlockOp>> = BTreeMap::new();
        let is_long = |op: &&Op| op.blocks().end - op.blocks().start > LONG_BLOCKS;
        let of_blocks = || self.ops.iter().filter(|op| op.kind != OpKind::Other);
        for op in of_blocks().filter(|op| !is_long(op)) {
            for block in op.blocks() {
                let entry = blocks.entry((op.volume, block)).or_default();
                entry.push(self.block_op(op, block, first, group_of));
            }
        }
        for op in of_blocks().filter(is_long) {
            let range = op.blocks();
            for ((_, block), ops) in blocks.range_mut((op.volume, range.start)..(op.volume, range.end)) {
                ops.push(self.block_op(op, *block, first, group_of));
            }
        }
        for (place, ops) in &mut blocks {
            let Some(held) = self.held.get(place) else { continue };
            let mut writers = held.to_vec();
            writers.sort_unstable();
            writers.dedup();
            ops.extend(writers.into_iter().map(|writer| written_before(held, writer)));
        }
        blocks
    }

    fn block_op(&self, op: &Op, block: u64, first: &Completions, group_of: &dyn Fn(VolumeId, u64) -> u8) -> BlockOp {
        let (sectors, places) = op.part(block);
        let effect = match op.kind {
            OpKind::Read => {
                let mut seen: BlockContent = [ZEROES; SECTORS_PER_BLOCK];
                for (in_block, in_op) in places {
                    seen[in_block] = op.seen.get(in_op).copied().unwrap_or(ZEROES);
                }
                Effect::Read { sectors, seen }
            }
            OpKind::Write => Effect::Write {
                sectors,
                writer: op.number,
            },
            OpKind::Zero | OpKind::Other => Effect::Write {
                sectors,
                writer: ZEROES,
            },
        };
        let answered = op.done().map(|(at, _)| at);
        // Once a newer attachment has completed something in the group, what an older one left open is decided.
        let generation = op.done().map(|(_, generation)| generation);
        let generation = generation.or(self.sessions.get(&op.session).copied());
        let closes = generation.and_then(|generation| {
            let newer = newer_completion(first, op.volume, group_of(op.volume, block), generation);
            newer.map(|(_, at)| at)
        });
        // What it was acknowledged has taken effect by then, too, however late the answer came.
        let bound = closes.filter(|at| *at > op.called.0 && matches!(effect, Effect::Write { .. }));
        let answered = answered.map(|at| bound.map_or(at, |bound| at.min(bound)));
        BlockOp {
            op: op.number,
            effect,
            called: op.called.0,
            answered,
            closes: closes.filter(|_| answered.is_none()),
            generation: generation.map_or(0, Generation::get),
        }
    }

    /// All operations that touch a block, for people.
    pub fn story(&self, volume: VolumeId, block: u64) -> Vec<String> {
        let ops = self
            .ops
            .iter()
            .filter(|op| op.volume == volume && op.kind != OpKind::Other);
        ops.filter(|op| op.blocks().contains(&block))
            .map(Op::to_string)
            .collect()
    }
}

/// What a block held before everything that is known of it, as far as it was this writer's.
fn written_before(held: &BlockContent, writer: Writer) -> BlockOp {
    let own = (0..SECTORS_PER_BLOCK).filter(|s| held[*s] == writer);
    BlockOp {
        op: writer,
        effect: Effect::Write {
            sectors: own.fold(0, |bits, s| bits | 1 << s),
            writer,
        },
        called: 0,
        answered: Some(0),
        closes: None,
        generation: 0,
    }
}

type Completions = BTreeMap<(VolumeId, u8), BTreeMap<Generation, Instant>>;

/// The newer generation that completed something first.
fn newer_completion(
    first: &Completions,
    volume: VolumeId,
    group: u8,
    generation: Generation,
) -> Option<(Generation, Instant)> {
    let of_group = first.get(&(volume, group))?;
    let newer = of_group.iter().filter(|(by, _)| **by > generation);
    newer.map(|(by, at)| (*by, *at)).min_by_key(|(_, at)| *at)
}

/// The groups that an operation lies in; of a long one, those of its ends.
fn groups_of(op: &Op, group_of: &dyn Fn(VolumeId, u64) -> u8) -> Vec<u8> {
    let range = op.blocks();
    let mut groups = vec![
        group_of(op.volume, range.start),
        group_of(op.volume, range.end.saturating_sub(1)),
    ];
    groups.dedup();
    groups
}

/// What was looked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Checked {
    /// Blocks with a history.
    pub blocks: usize,
    /// Blocks whose history was too entangled to tell.
    pub undecided: usize,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checker::pattern::fill;

    const VOLUME: VolumeId = VolumeId(1);

    fn g(number: u32) -> Generation {
        Generation::new(number).unwrap()
    }

    fn check(history: &History) -> Result<Checked, &'static str> {
        history.check(&|_, _| 0).map_err(|broken| broken.promise)
    }

    fn write(history: &mut History, session: u32, place: (u64, u64)) -> OpNumber {
        history.call(Time::ZERO, session, VOLUME, OpKind::Write, place)
    }

    fn read(history: &mut History, place: (u64, u64), writers: &[OpNumber]) {
        let number = history.call(Time::ZERO, 9, VOLUME, OpKind::Read, place);
        let content: Vec<Bytes> = writers
            .iter()
            .zip(place.0..)
            .map(|(writer, sector)| match *writer {
                ZEROES => Bytes::from_static(&[0; SECTOR_BYTES]),
                writer => fill(VOLUME, sector, 1, writer),
            })
            .collect();
        history.done(Time::ZERO, number, g(9), &content).unwrap();
    }

    #[test]
    fn only_what_was_never_acknowledged_and_not_followed_by_a_later_attachment_may_be_the_newest_unnoticed() {
        let mut history = History::default();
        history.attached(1, g(1));
        let acknowledged = write(&mut history, 1, (0, 8));
        history.done(Time::ZERO, acknowledged, g(1), &[]).unwrap();
        let open = write(&mut history, 1, (0, 8));
        let failed = write(&mut history, 1, (8, 8));
        history.failed(Time::ZERO, failed, "it is over".to_string());
        let same = history.call(Time::ZERO, 1, VOLUME, OpKind::Read, (0, 8));
        history.attached(2, g(2));
        let asker = history.call(Time::ZERO, 2, VOLUME, OpKind::Read, (0, 16));
        let is = |history: &History, writer, block| history.is_open_and_newest(writer, block, asker);
        assert!(is(&history, open, 0) && is(&history, failed, 1));
        assert!(!is(&history, acknowledged, 0), "a quorum has it");
        assert!(
            !history.is_open_and_newest(open, 0, same),
            "its own attachment knows of it"
        );
        assert!(!is(&history, 999, 0), "nobody wrote that");
        read(&mut history, (8, 8), &[0; 8]);
        assert!(
            !is(&history, failed, 1),
            "a later attachment has read the block: all members were equal"
        );
        assert!(is(&history, open, 0), "another block");
        let over = write(&mut history, 9, (0, 8));
        history.done(Time::ZERO, over, g(9), &[]).unwrap();
        assert!(!is(&history, open, 0), "overwritten");
    }

    #[test]
    fn operations_of_many_blocks_are_seen_block_by_block() {
        let mut history = History::default();
        let first = write(&mut history, 1, (4, 8));
        history.done(Time::ZERO, first, g(1), &[]).unwrap();
        read(&mut history, (3, 10), &[0, 1, 1, 1, 1, 1, 1, 1, 1, 0]);
        assert_eq!(
            check(&history),
            Ok(Checked {
                blocks: 2,
                undecided: 0
            })
        );
        read(&mut history, (10, 2), &[1, 0]);
        assert!(check(&history).is_err(), "the last sector of the write is lost");
    }

    #[test]
    fn an_older_holder_is_not_acknowledged_after_a_newer_one() {
        let mut history = History::default();
        let early = write(&mut history, 1, (0, 8));
        let newer = write(&mut history, 2, (8, 8));
        history.done(Time::ZERO, newer, g(2), &[]).unwrap();
        history.done(Time::ZERO, early, g(1), &[]).unwrap();
        assert!(check(&history).is_ok(), "it was called before");
        let late = write(&mut history, 1, (0, 8));
        history.done(Time::ZERO, late, g(1), &[]).unwrap();
        assert_eq!(check(&history), Err("one writer at a time"));
    }

    #[test]
    fn what_an_older_holder_left_open_does_not_come_up_after_a_newer_one_has_begun() {
        let mut history = History::default();
        let open = write(&mut history, 1, (0, 8));
        history.attached(1, g(1));
        read(&mut history, (0, 8), &[0; 8]);
        read(&mut history, (0, 8), &[open; 8]);
        assert!(check(&history).is_err());
    }

    #[test]
    fn what_an_older_holder_is_acknowledged_late_is_there_when_a_newer_one_begins() {
        let mut history = History::default();
        let late = write(&mut history, 1, (0, 8));
        history.attached(1, g(1));
        let other = write(&mut history, 2, (8, 8));
        history.done(Time::ZERO, other, g(9), &[]).unwrap();
        history.done(Time::ZERO, late, g(1), &[]).unwrap();
        read(&mut history, (0, 8), &[late; 8]);
        assert!(check(&history).is_ok());
        read(&mut history, (0, 8), &[0; 8]);
        assert!(check(&history).is_err());
    }

    #[test]
    fn a_discard_of_everything_counts_for_the_blocks_that_are_known() {
        let mut history = History::default();
        let first = write(&mut history, 1, (0, 8));
        history.done(Time::ZERO, first, g(1), &[]).unwrap();
        let all = history.call(Time::ZERO, 1, VOLUME, OpKind::Zero, (0, 1 << 30));
        history.done(Time::ZERO, all, g(1), &[]).unwrap();
        read(&mut history, (0, 8), &[0; 8]);
        assert_eq!(
            check(&history),
            Ok(Checked {
                blocks: 1,
                undecided: 0
            })
        );
        read(&mut history, (0, 8), &[first; 8]);
        assert!(check(&history).is_err());
    }

    #[test]
    fn what_was_held_when_a_history_was_settled_is_expected_from_then_on() {
        let mut history = History::default();
        let (first, second) = (write(&mut history, 1, (0, 4)), write(&mut history, 1, (4, 4)));
        history.done(Time::ZERO, first, g(1), &[]).unwrap();
        history.done(Time::ZERO, second, g(1), &[]).unwrap();
        assert!(check(&history).is_ok());
        let held = [first, first, first, first, second, second, second, second];
        history.settle(BTreeMap::from([((VOLUME, 0), held)]));
        read(&mut history, (0, 8), &held);
        let third = write(&mut history, 9, (0, 1));
        assert_eq!(third, 4, "numbers go on");
        history.done(Time::ZERO, third, g(9), &[]).unwrap();
        read(&mut history, (0, 5), &[third, first, first, first, second]);
        assert!(check(&history).is_ok());
        read(&mut history, (7, 1), &[first]);
        assert!(check(&history).is_err());
    }

    #[test]
    fn foreign_content_is_refused_at_once() {
        let mut history = History::default();
        let number = history.call(Time::ZERO, 1, VOLUME, OpKind::Read, (5, 1));
        let broken = history
            .done(Time::ZERO, number, g(1), &[fill(VOLUME, 6, 1, 1)])
            .unwrap_err();
        assert!(broken.words.contains("sector 6"), "{}", broken.words);
    }
}
