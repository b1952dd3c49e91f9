//! What happened, as a hash chain that costs little, and as text where somebody reads it.

use std::collections::VecDeque;
use std::fmt::{self, Write as _};

use cairn_proto::time::Time;

use crate::rng::mix;

/// How much of the trace is kept as text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Keep {
    /// The hash chain alone.
    Hash,
    /// The last so many lines.
    Last(usize),
    /// Every line.
    All,
    /// Every line, printed as it happens.
    Print,
}

/// The trace of one run.
#[derive(Debug)]
pub struct Trace {
    keep: Keep,
    hash: u64,
    events: u64,
    lines: VecDeque<String>,
}

impl Trace {
    /// An empty trace.
    pub fn new(keep: Keep) -> Trace {
        Trace {
            keep,
            hash: 0,
            events: 0,
            lines: VecDeque::new(),
        }
    }

    /// Appends an event: its numbers go into the chain, its words only where text is kept.
    pub fn event(&mut self, now: Time, numbers: &[u64], words: fmt::Arguments<'_>) {
        self.events += 1;
        self.hash = mix(self.hash ^ now.as_nanos());
        for number in numbers {
            self.hash = mix(self.hash ^ number);
        }
        if self.keep != Keep::Hash {
            self.line(now, words);
        }
    }

    /// Appends words alone, where text is kept.
    pub fn note(&mut self, now: Time, words: fmt::Arguments<'_>) {
        if self.keep != Keep::Hash {
            self.line(now, words);
        }
    }

    fn line(&mut self, now: Time, words: fmt::Arguments<'_>) {
        let mut line = String::new();
        write!(line, "{now:?} {words}").expect("a string takes all");
        match self.keep {
            Keep::Print => println!("{line}"),
            Keep::Last(count) if self.lines.len() >= count => {
                self.lines.pop_front();
                self.lines.push_back(line);
            }
            _ => self.lines.push_back(line),
        }
    }

    /// The end of the hash chain.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// How many events.
    pub fn events(&self) -> u64 {
        self.events
    }

    /// The text that was kept.
    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().map(String::as_str)
    }
}

/// The first place where two texts differ: the line number, and both lines.
pub fn first_difference(a: &Trace, b: &Trace) -> Option<(usize, String, String)> {
    let absent = "(the trace ends here)";
    let longest = a.lines.len().max(b.lines.len());
    for i in 0..longest {
        let (left, right) = (a.lines.get(i), b.lines.get(i));
        if left != right {
            let text = |line: Option<&String>| line.map_or(absent.to_string(), String::clone);
            return Some((i, text(left), text(right)));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_depends_on_order_and_time() {
        let run = |events: &[(u64, u64)]| {
            let mut trace = Trace::new(Keep::Last(1));
            for (at, number) in events {
                trace.event(Time::from_nanos(*at), &[*number], format_args!("{number}"));
            }
            (trace.hash(), trace.lines().map(str::to_string).collect::<Vec<_>>())
        };
        assert_eq!(run(&[(1, 2), (3, 4)]), run(&[(1, 2), (3, 4)]));
        assert_ne!(run(&[(1, 2), (3, 4)]).0, run(&[(1, 4), (3, 2)]).0);
        assert_ne!(run(&[(1, 2)]).0, run(&[(2, 2)]).0);
        assert_eq!(run(&[(1, 2), (3, 4)]).1.len(), 1);
    }
}
