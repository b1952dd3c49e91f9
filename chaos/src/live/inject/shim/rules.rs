//! What a shim does to I/O that matches, as values and as words.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::time::Duration;

use super::super::limits::SHIM_DELAY_MAX;
use crate::rng::Rng;

/// Which I/O.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
}

/// What happens to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    /// It fails with EIO. A write that fails changes nothing, a flush that fails flushes nothing.
    Eio,
    /// A write fails with ENOSPC.
    Enospc,
    /// It takes so much longer.
    Delay {
        /// This long.
        fixed: Duration,
        /// And a random time up to this.
        jitter: Duration,
    },
    /// It does not end until the shim is healed or its power is cut.
    Stick,
    /// It succeeds and does nothing: a write leaves what was there, a flush leaves it unflushed.
    Lose,
    /// A write lands somewhere else, at a multiple of its own length, and succeeds.
    Misdirect,
    /// Of a write one sector of 512 bytes stays as it was, and it succeeds.
    Stale,
    /// Of what is read a bit flips before, and stays so.
    Rot,
}

/// How often.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum When {
    /// Every time.
    Always,
    /// The next so many times.
    Times(u64),
    /// One time of so many, at random.
    OneIn(u64),
}

/// One rule. It lasts until the shim is healed, or as often as it says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rule {
    /// Which I/O; `None` for all of it.
    pub kind: Option<Kind>,
    /// What happens.
    pub effect: Effect,
    /// How often.
    pub when: When,
    /// Only I/O that touches these bytes of the device; `None` for all of it. A flush touches nothing.
    pub range: Option<Range<u64>>,
}

impl Rule {
    /// Every time, wherever.
    pub fn always(kind: Option<Kind>, effect: Effect) -> Rule {
        Rule {
            kind,
            effect,
            when: When::Always,
            range: None,
        }
    }

    /// The next time, wherever.
    pub fn once(kind: Option<Kind>, effect: Effect) -> Rule {
        Rule {
            when: When::Times(1),
            ..Rule::always(kind, effect)
        }
    }

    /// Whether it strikes this one; counts it if so.
    pub(super) fn strikes(&mut self, kind: Kind, touched: &Range<u64>, rng: &mut Rng) -> bool {
        let of_kind = match self.effect {
            Effect::Enospc | Effect::Misdirect | Effect::Stale => kind == Kind::Write,
            Effect::Rot => kind == Kind::Read,
            Effect::Lose => kind != Kind::Read,
            Effect::Eio | Effect::Delay { .. } | Effect::Stick => true,
        };
        let overlaps = |range: &Range<u64>| range.start < touched.end && touched.start < range.end;
        if !of_kind || self.kind.is_some_and(|only| only != kind) || !self.range.as_ref().is_none_or(overlaps) {
            return false;
        }
        match &mut self.when {
            When::Always => true,
            When::Times(0) => false,
            When::Times(left) => {
                *left -= 1;
                true
            }
            When::OneIn(one_in) => rng.below((*one_in).max(1)) == 0,
        }
    }

    /// Whether it may strike again.
    pub(super) fn lives(&self) -> bool {
        self.when != When::Times(0)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            None => "any ",
            Some(Kind::Read) => "read ",
            Some(Kind::Write) => "write ",
            Some(Kind::Flush) => "flush ",
        })?;
        match self.effect {
            Effect::Eio => f.write_str("eio")?,
            Effect::Enospc => f.write_str("enospc")?,
            Effect::Delay { fixed, jitter } => write!(f, "delay {} {}", fixed.as_millis(), jitter.as_millis())?,
            Effect::Stick => f.write_str("stick")?,
            Effect::Lose => f.write_str("lose")?,
            Effect::Misdirect => f.write_str("misdirect")?,
            Effect::Stale => f.write_str("stale")?,
            Effect::Rot => f.write_str("rot")?,
        }
        match self.when {
            When::Always => f.write_str(" always")?,
            When::Times(times) => write!(f, " times {times}")?,
            When::OneIn(one_in) => write!(f, " one-in {one_in}")?,
        }
        match &self.range {
            None => Ok(()),
            Some(range) => write!(f, " {}..{}", range.start, range.end),
        }
    }
}

/// How a rule is written, for a person.
pub const RULE_WORDS: &str = "read|write|flush|any eio|enospc|delay MS [JITTER_MS]|stick|lose|misdirect|stale|rot \
                              [always|once|times N|one-in N] [FIRST_BYTE..END]";

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Rule, String> {
        let mut words = text.split_whitespace().peekable();
        let unknown = || format!("`{text}` is no rule: write {RULE_WORDS}");
        let kind = match words.next() {
            Some("any") => None,
            Some("read") => Some(Kind::Read),
            Some("write") => Some(Kind::Write),
            Some("flush") => Some(Kind::Flush),
            _ => return Err(unknown()),
        };
        let effect = match words.next() {
            Some("eio") => Effect::Eio,
            Some("enospc") => Effect::Enospc,
            Some("stick") => Effect::Stick,
            Some("lose") => Effect::Lose,
            Some("misdirect") => Effect::Misdirect,
            Some("stale") => Effect::Stale,
            Some("rot") => Effect::Rot,
            Some("delay") => Effect::Delay {
                fixed: span(words.next().ok_or_else(unknown)?)?,
                jitter: match words.peek().and_then(|word| span(word).ok()) {
                    Some(jitter) => {
                        words.next();
                        jitter
                    }
                    None => Duration::ZERO,
                },
            },
            _ => return Err(unknown()),
        };
        let mut rule = Rule::always(kind, effect);
        if let Some(&word) = words.peek()
            && !word.contains("..")
        {
            words.next();
            rule.when = match word {
                "always" => When::Always,
                "once" => When::Times(1),
                "times" => When::Times(number(words.next().ok_or_else(unknown)?)?),
                "one-in" => When::OneIn(number(words.next().ok_or_else(unknown)?)?.max(1)),
                _ => return Err(unknown()),
            };
        }
        if let Some(word) = words.next() {
            rule.range = Some(range(word)?);
        }
        if words.next().is_some() {
            return Err(unknown());
        }
        Ok(rule)
    }
}

pub(super) fn number(word: &str) -> Result<u64, String> {
    word.parse().map_err(|_| format!("`{word}` is no number"))
}

/// `FIRST..END`, in bytes.
pub(super) fn range(word: &str) -> Result<Range<u64>, String> {
    let (start, end) = word
        .split_once("..")
        .ok_or_else(|| format!("`{word}` is no range: write FIRST_BYTE..END"))?;
    let range = number(start)?..number(end)?;
    if range.is_empty() {
        return Err(format!("`{word}` is empty"));
    }
    Ok(range)
}

fn span(word: &str) -> Result<Duration, String> {
    let span = Duration::from_millis(number(word)?);
    if span > SHIM_DELAY_MAX {
        return Err(format!("a delay is at most {} s", SHIM_DELAY_MAX.as_secs()));
    }
    Ok(span)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_read_as_it_is_written() {
        for text in [
            "any eio always",
            "write enospc times 3",
            "read delay 50 20 one-in 7",
            "flush stick times 1",
            "write lose always 0..4096",
            "write misdirect one-in 100 4096..8192",
            "write stale one-in 9",
            "read rot times 1",
        ] {
            assert_eq!(text.parse::<Rule>().unwrap().to_string(), text);
        }
        for (short, long) in [
            ("read eio", "read eio always"),
            ("read eio once", "read eio times 1"),
            ("read eio 0..512", "read eio always 0..512"),
            ("any delay 5", "any delay 5 0 always"),
            ("any delay 5 once", "any delay 5 0 times 1"),
        ] {
            assert_eq!(short.parse::<Rule>().unwrap().to_string(), long);
        }
        for text in [
            "",
            "read",
            "read explode",
            "read eio never",
            "read eio once 5..5",
            "read eio once 0..9 x",
            "any delay",
        ] {
            assert!(text.parse::<Rule>().is_err(), "{text}");
        }
    }
}
