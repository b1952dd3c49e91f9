//! Is the history of one block one that a register could have? A block is eight sectors; an operation reads or writes
//! some of them at one instant between its call and its answer.
//!
//! The method is just-in-time linearization (Lowe, "Testing for linearizability", 2017): walk over calls and answers in
//! order and keep every state the register may be in, with the operations that have taken effect in it. At an answer,
//! only those states survive that can be brought to one in which its operation has taken effect. A read takes effect as
//! soon as a state fits it, where that restricts nothing.
//!
//! A write without an answer may take effect at any time or never; a bound on when (its `closes`) makes the check
//! stricter. Since contents are unique, one that nobody has read is as good as never done, and is left out.
//!
//! Stricter than a register, too: attachments follow each other. Once an operation of a newer generation has taken
//! effect, no write of an older one does.

use std::collections::BTreeSet;

use super::pattern::{SECTORS_PER_BLOCK, Writer, ZEROES};

/// A point in the order of all calls and answers of one world.
pub type Instant = u64;

/// The sectors of a block, bit by bit.
pub type Sectors = u8;

/// Who wrote each sector of a block.
pub type BlockContent = [Writer; SECTORS_PER_BLOCK];

/// States that the check keeps at the most before it gives up.
const STATES_MAX: usize = 200_000;

/// Operations in flight on one block at the most.
const SLOTS_MAX: usize = 64;

/// What an operation does to a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    /// These sectors become this writer's (or zeroes).
    Write {
        /// Which sectors.
        sectors: Sectors,
        /// Whose content they get.
        writer: Writer,
    },
    /// These sectors were read, and had these writers' content.
    Read {
        /// Which sectors.
        sectors: Sectors,
        /// What was seen; zero where nothing was read.
        seen: BlockContent,
    },
}

/// One operation on one block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockOp {
    /// The operation's number.
    pub op: u32,
    /// What it does.
    pub effect: Effect,
    /// When it was called.
    pub called: Instant,
    /// When it was answered; `None` if it never was (or with an error that leaves open whether it took effect).
    pub answered: Option<Instant>,
    /// For one without an answer: when it can't take effect any more.
    pub closes: Option<Instant>,
    /// The attachment that it belongs to; zero if none was ever made.
    pub generation: u32,
}

/// Why a history is none of a register.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Violation {
    /// The operation whose answer no order explains.
    pub op: u32,
    /// When it was answered.
    pub at: Instant,
    /// In words, with the states that were possible.
    pub words: String,
}

/// What the check found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// An order exists.
    Linearizable,
    /// None exists.
    Violated(Violation),
    /// Too many operations at once to tell.
    Undecided,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct State {
    content: BlockContent,
    /// The highest generation of an operation that has taken effect.
    newest: u32,
    /// Which pending operations have taken effect, by slot.
    done: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Call,
    Answer,
    Close,
}

struct Check<'a> {
    ops: &'a [BlockOp],
    /// The pending operation of each slot.
    slots: Vec<Option<usize>>,
    states: BTreeSet<State>,
}

/// Checks the history of one block, given in any order, from a block of zeroes on.
pub fn check(ops: &[BlockOp]) -> Verdict {
    let kept: Vec<BlockOp> = ops.iter().filter(|op| matters(op, ops)).copied().collect();
    let mut check = Check {
        ops: &kept,
        slots: Vec::new(),
        states: BTreeSet::from([State {
            content: [ZEROES; SECTORS_PER_BLOCK],
            newest: 0,
            done: 0,
        }]),
    };
    for (at, kind, index) in events_in_order(&kept) {
        let before = if kind == Kind::Call {
            BTreeSet::new()
        } else {
            check.contents()
        };
        let decided = match kind {
            Kind::Call => check.call(index),
            Kind::Answer => check.end(index, false),
            Kind::Close => check.end(index, true),
        };
        if !decided {
            return Verdict::Undecided;
        }
        if check.states.is_empty() {
            return Verdict::Violated(explain(&kept[index], at, &before));
        }
    }
    Verdict::Linearizable
}

fn events_in_order(ops: &[BlockOp]) -> Vec<(Instant, Kind, usize)> {
    let mut events = Vec::with_capacity(ops.len() * 2);
    for (i, op) in ops.iter().enumerate() {
        events.push((op.called, Kind::Call, i));
        match (op.answered, op.closes) {
            (Some(at), _) => events.push((at, Kind::Answer, i)),
            (None, Some(at)) => events.push((at.max(op.called), Kind::Close, i)),
            (None, None) => {}
        }
    }
    events.sort_unstable();
    events
}

/// A read without an answer says nothing. A write without one says nothing unless somebody may have read it.
fn matters(op: &BlockOp, ops: &[BlockOp]) -> bool {
    match op.effect {
        Effect::Read { .. } => op.answered.is_some(),
        Effect::Write { .. } if op.answered.is_some() => true,
        Effect::Write { sectors, writer } => ops.iter().any(|read| match read.effect {
            Effect::Read {
                sectors: read_sectors,
                seen,
            } if read.answered.is_some_and(|at| at > op.called) => {
                (0..SECTORS_PER_BLOCK).any(|s| sectors & read_sectors & (1 << s) != 0 && seen[s] == writer)
            }
            _ => false,
        }),
    }
}

fn explain(op: &BlockOp, at: Instant, before: &BTreeSet<BlockContent>) -> Violation {
    let possible: Vec<String> = before.iter().take(8).map(|content| format!("{content:?}")).collect();
    let did = match op.effect {
        Effect::Read { sectors, seen } => format!("read {seen:?} from sectors {sectors:08b}"),
        Effect::Write { sectors, writer } => format!("wrote {writer} to sectors {sectors:08b}"),
    };
    Violation {
        op: op.op,
        at,
        words: format!(
            "operation {} {did} between {} and {at}, but the block can have held only {} (and what was in flight)",
            op.op,
            op.called,
            possible.join(" or ")
        ),
    }
}

impl Check<'_> {
    fn contents(&self) -> BTreeSet<BlockContent> {
        self.states.iter().map(|state| state.content).collect()
    }

    fn call(&mut self, index: usize) -> bool {
        let free = self.slots.iter().position(Option::is_none);
        let slot = free.unwrap_or(self.slots.len());
        if slot >= SLOTS_MAX {
            return false;
        }
        if slot == self.slots.len() {
            self.slots.push(None);
        }
        self.slots[slot] = Some(index);
        let states = std::mem::take(&mut self.states);
        self.states = states.into_iter().map(|state| self.with_reads(state)).collect();
        true
    }

    /// Lets every pending read take effect that the state fits and that is of no newer attachment: that restricts nothing.
    fn with_reads(&self, mut state: State) -> State {
        for (slot, op) in self.pending() {
            if let Effect::Read { sectors, seen } = op.effect
                && fits(&state.content, sectors, &seen)
                && op.generation <= state.newest
            {
                state.done |= 1 << slot;
            }
        }
        state
    }

    fn pending(&self) -> impl Iterator<Item = (usize, &BlockOp)> + '_ {
        let slots = self.slots.iter().enumerate();
        slots.filter_map(|(slot, index)| Some((slot, &self.ops[(*index)?])))
    }

    /// An operation ends: at its answer it must have taken effect; at its close it may have, or never will.
    fn end(&mut self, index: usize, optional: bool) -> bool {
        let slot = self
            .slots
            .iter()
            .position(|pending| *pending == Some(index))
            .expect("called before it ends");
        let bit = 1 << slot;
        let mut seen: BTreeSet<State> = BTreeSet::new();
        let mut work: Vec<State> = std::mem::take(&mut self.states).into_iter().collect();
        let mut after = BTreeSet::new();
        while let Some(state) = work.pop() {
            let done = state.done & bit != 0;
            if done || optional {
                let done = state.done & !bit;
                after.insert(State { done, ..state });
            }
            if done || !seen.insert(state) {
                continue;
            }
            if seen.len() > STATES_MAX {
                return false;
            }
            work.extend(self.steps(state));
        }
        self.slots[slot] = None;
        self.states = self.without_dominated(after);
        true
    }

    /// The states that one more pending operation leads to.
    fn steps(&self, state: State) -> impl Iterator<Item = State> + '_ {
        self.pending().filter_map(move |(slot, op)| {
            if state.done & (1 << slot) != 0 {
                return None;
            }
            let mut next = state;
            match op.effect {
                Effect::Write { .. } if op.generation != 0 && op.generation < state.newest => return None,
                Effect::Write { sectors, writer } => {
                    for (s, content) in next.content.iter_mut().enumerate() {
                        if sectors & (1 << s) != 0 {
                            *content = writer;
                        }
                    }
                }
                Effect::Read { sectors, seen } if fits(&state.content, sectors, &seen) => {}
                Effect::Read { .. } => return None,
            }
            next.newest = next.newest.max(op.generation);
            next.done |= 1 << slot;
            Some(self.with_reads(next))
        })
    }

    /// A write that need never take effect is better left undone: of two states that differ in such writes alone, the one
    /// with fewer of them done allows all that the other does.
    fn without_dominated(&self, states: BTreeSet<State>) -> BTreeSet<State> {
        let open = self
            .slots
            .iter()
            .enumerate()
            .fold(0u64, |bits, (slot, index)| match index {
                Some(index) if self.ops[*index].answered.is_none() => bits | 1 << slot,
                _ => bits,
            });
        if open == 0 || states.len() < 2 {
            return states;
        }
        let dominated = |state: &State| {
            states.iter().any(|other| {
                other != state
                    && (other.content, other.newest) == (state.content, state.newest)
                    && other.done & !open == state.done & !open
                    && other.done & open & !state.done == 0
            })
        };
        states.iter().filter(|state| !dominated(state)).copied().collect()
    }
}

fn fits(content: &BlockContent, sectors: Sectors, seen: &BlockContent) -> bool {
    (0..SECTORS_PER_BLOCK).all(|s| sectors & (1 << s) == 0 || content[s] == seen[s])
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Sectors = 0xff;

    fn op(op: u32, effect: Effect, called: Instant, answered: Option<Instant>) -> BlockOp {
        BlockOp {
            op,
            effect,
            called,
            answered,
            closes: None,
            generation: 0,
        }
    }

    fn write(writer: u32, called: Instant, answered: impl Into<Option<Instant>>) -> BlockOp {
        let effect = Effect::Write { sectors: ALL, writer };
        op(writer, effect, called, answered.into())
    }

    fn read(writer: u32, called: Instant, answered: Instant) -> BlockOp {
        read_mixed([writer; SECTORS_PER_BLOCK], called, answered)
    }

    fn read_mixed(seen: BlockContent, called: Instant, answered: Instant) -> BlockOp {
        let effect = Effect::Read { sectors: ALL, seen };
        op(1000 + called as u32, effect, called, Some(answered))
    }

    fn violated(ops: &[BlockOp]) -> Option<u32> {
        match check(ops) {
            Verdict::Violated(violation) => Some(violation.op),
            Verdict::Linearizable => None,
            Verdict::Undecided => panic!("undecided"),
        }
    }

    #[test]
    fn what_was_acknowledged_is_read() {
        assert_eq!(violated(&[write(1, 0, 1), read(1, 2, 3)]), None);
        assert_eq!(violated(&[write(1, 0, 1), read(0, 2, 3)]), Some(1002), "lost");
        let stale = [write(1, 0, 1), write(2, 2, 3), read(1, 4, 5)];
        assert_eq!(violated(&stale), Some(1004), "stale");
        assert_eq!(
            violated(&[read(7, 0, 1), write(7, 2, 3)]),
            Some(1000),
            "from the future"
        );
    }

    #[test]
    fn what_overlaps_may_be_in_any_order_but_one() {
        let writes = [write(1, 0, 10), write(2, 1, 9)];
        let with = |reads: &[BlockOp]| violated(&[&writes, reads].concat());
        assert_eq!(with(&[read(1, 11, 12)]), None);
        assert_eq!(with(&[read(2, 11, 12)]), None);
        assert_eq!(with(&[read(1, 2, 3), read(2, 4, 5), read(2, 11, 12)]), None);
        let back_and_forth = [read(1, 2, 3), read(2, 4, 5), read(1, 6, 7)];
        assert_eq!(with(&back_and_forth), Some(1006));
        assert_eq!(with(&[read(2, 11, 12), read(1, 13, 14)]), Some(1013));
        let early = [read(0, 2, 8), read(1, 3, 4), read(2, 5, 6)];
        assert_eq!(with(&early), None, "a long read may be early");
    }

    #[test]
    fn a_read_never_takes_back_what_an_earlier_one_has_returned() {
        let lost = write(1, 0, None);
        assert_eq!(violated(&[lost, read(0, 1, 2), read(1, 3, 4), read(1, 5, 6)]), None);
        assert_eq!(violated(&[lost, read(1, 1, 2), read(0, 3, 4)]), Some(1003));
        let overwritten = [lost, read(1, 1, 2), write(2, 3, 4), read(2, 5, 6), read(1, 7, 8)];
        assert_eq!(violated(&overwritten), Some(1007));
        let late = [lost, write(2, 3, 4), read(2, 5, 6), read(1, 7, 8)];
        assert_eq!(violated(&late), None, "late, but possible");
    }

    #[test]
    fn a_write_that_is_closed_does_not_come_up_later() {
        let lost = BlockOp {
            closes: Some(5),
            ..write(1, 0, None)
        };
        assert_eq!(violated(&[lost, read(0, 6, 7), read(1, 8, 9)]), Some(1008));
        assert_eq!(violated(&[lost, read(1, 6, 7)]), None);
        let overlapping = [lost, read(0, 3, 7), read(1, 8, 9)];
        assert_eq!(violated(&overlapping), None, "the first may have read before the close");
    }

    #[test]
    fn writes_of_an_older_attachment_come_before_all_that_a_newer_one_does() {
        let of = |generation, op| BlockOp { generation, ..op };
        let open = of(1, write(1, 0, None));
        let (before, after) = (of(2, read(0, 1, 2)), of(2, read(1, 3, 4)));
        assert_eq!(violated(&[open, before, after]), Some(1003));
        assert_eq!(violated(&[open, after]), None);
        let old = of(1, write(1, 0, 9));
        assert_eq!(violated(&[old, of(2, write(2, 1, 2)), of(2, read(2, 10, 11))]), None);
        assert_eq!(
            violated(&[old, of(2, write(2, 1, 2)), of(2, read(1, 10, 11))]),
            Some(1010)
        );
        assert_eq!(
            violated(&[of(2, write(2, 0, 1)), of(1, write(1, 2, 3))]),
            Some(1),
            "fenced"
        );
    }

    #[test]
    fn zeroes_of_several_writers_look_the_same() {
        let zero = |op: u32, called, answered: Option<Instant>| BlockOp {
            op,
            ..write(ZEROES, called, answered)
        };
        assert_eq!(violated(&[write(1, 0, 1), zero(2, 2, Some(3)), read(0, 4, 5)]), None);
        let open = [write(1, 0, 1), zero(2, 2, None), read(1, 4, 5), read(0, 6, 7)];
        assert_eq!(violated(&open), None);
        let later = [write(1, 0, 1), read(0, 2, 3), zero(2, 4, Some(5))];
        assert_eq!(violated(&later), Some(1002));
    }

    #[test]
    fn parts_of_a_block_are_written_apart_and_read_together() {
        let part = |writer, sectors| op(writer, Effect::Write { sectors, writer }, 0, Some(1));
        let both = [part(1, 0x0f), part(2, 0xf0)];
        let seen = [1, 1, 1, 1, 2, 2, 2, 2];
        assert_eq!(violated(&[&both[..], &[read_mixed(seen, 2, 3)]].concat()), None);
        let undone = [1, 1, 1, 1, 0, 0, 0, 0];
        assert_eq!(violated(&[&both[..], &[read_mixed(undone, 2, 3)]].concat()), Some(1002));
        let torn = [write(1, 0, 9), write(2, 0, 9), read_mixed(seen, 2, 3)];
        assert_eq!(violated(&torn), Some(1002));
    }

    /// Whether some order of the operations explains a history, by trying all of them.
    fn brute_force(ops: &[BlockOp]) -> bool {
        fn go(ops: &[BlockOp], done: u32, content: BlockContent, newest: u32) -> bool {
            let open = |i: usize| done & (1 << i) == 0;
            if (0..ops.len()).all(|i| !open(i) || ops[i].answered.is_none()) {
                return true;
            }
            (0..ops.len()).filter(|i| open(*i)).any(|i| {
                let op = &ops[i];
                // Whoever was answered before this was called has taken effect before, or never.
                let end = |other: &BlockOp| other.answered.or(other.closes);
                let overtakes =
                    (0..ops.len()).any(|other| open(other) && ops[other].answered.is_some_and(|at| at < op.called));
                let closed = op.answered.is_none()
                    && (0..ops.len()).any(|other| !open(other) && end(op).is_some_and(|at| at < ops[other].called));
                if overtakes || closed {
                    return false;
                }
                let mut content = content;
                match op.effect {
                    Effect::Write { sectors, writer } if op.generation == 0 || op.generation >= newest => {
                        (0..SECTORS_PER_BLOCK)
                            .filter(|s| sectors & (1 << s) != 0)
                            .for_each(|s| content[s] = writer);
                    }
                    Effect::Read { sectors, seen } if fits(&content, sectors, &seen) => {}
                    _ => return false,
                }
                go(ops, done | 1 << i, content, newest.max(op.generation))
            })
        }
        go(ops, 0, [ZEROES; SECTORS_PER_BLOCK], 0)
    }

    #[test]
    fn the_check_agrees_with_trying_all_orders() {
        let mut rng = crate::rng::Rng::new(1);
        let mut verdicts = [0; 2];
        for _ in 0..20_000 {
            let count = rng.within(2, 6) as u32;
            let generations = rng.permille(300);
            let ops: Vec<BlockOp> = (1..=count)
                .map(|number| {
                    let called = rng.below(12) * 2;
                    let answered = called + 1 + rng.below(6) * 2;
                    let sectors = *rng.pick(&[0b11, 0b11, 0b01, 0b10]);
                    let mut writer = || match rng.below(u64::from(count) + 1) as u32 {
                        writer if writer % 2 == 0 => ZEROES,
                        writer => writer,
                    };
                    let effect = if number % 2 == 1 {
                        Effect::Write {
                            sectors,
                            writer: if number == 5 { ZEROES } else { number },
                        }
                    } else {
                        let mut seen = [ZEROES; SECTORS_PER_BLOCK];
                        for (s, seen) in seen.iter_mut().enumerate().take(2) {
                            *seen = if sectors & (1 << s) != 0 { writer() } else { ZEROES };
                        }
                        Effect::Read { sectors, seen }
                    };
                    let lost = number % 2 == 1 && rng.permille(300);
                    BlockOp {
                        op: number,
                        effect,
                        called,
                        answered: (!lost).then_some(answered),
                        closes: (lost && rng.permille(500)).then_some(answered),
                        generation: if generations { rng.within(1, 2) as u32 } else { 0 },
                    }
                })
                .collect();
            let expected = brute_force(&ops);
            verdicts[usize::from(expected)] += 1;
            assert_eq!(check(&ops) == Verdict::Linearizable, expected, "{ops:#?}");
        }
        assert!(
            verdicts.iter().all(|count| *count > 1000),
            "both verdicts are common: {verdicts:?}"
        );
    }
}
