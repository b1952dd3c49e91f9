//! What a proxy can be told to do, as values and as words.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::super::limits::PROXY_DELAY_MAX;

/// From whom to whom.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Direction {
    /// From who has connected to the target.
    ToTarget,
    /// From the target to who has connected.
    ToClient,
}

/// One fault. Each lasts until [`Proxy::heal`](super::Proxy::heal), but for those of one moment, `Drop` and `Silence`. Several
/// work together; one that is set again replaces its older self.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Bytes arrive so much later, in order.
    Delay {
        /// This long, each way.
        fixed: Duration,
        /// And a random time up to this.
        jitter: Duration,
    },
    /// So many bytes a second in each direction of each connection.
    Bandwidth {
        /// At least 1.
        bytes_per_s: u64,
    },
    /// All connections are reset now; new ones are made as ever.
    Drop,
    /// New connections are accepted, and nothing is forwarded; not even a connection to the target is made.
    HalfOpen,
    /// On all connections nothing is forwarded, and neither end is told; it goes on where it was when healed.
    BlackHole,
    /// What is connected now falls silent for good, also when healed, and neither end is told, as when a router has
    /// forgotten a connection. New ones are made as ever.
    Silence,
    /// On all connections only this direction is forwarded.
    OneWay(Direction),
    /// Each connection, new ones too, is reset after so many more bytes, in whatever direction.
    ResetAfter {
        /// Bytes.
        bytes: u64,
    },
    /// Of so many bytes one has a bit flipped, on average.
    Corrupt {
        /// At least 1.
        one_in: u64,
    },
    /// New connections are refused, as if nobody listened.
    Refuse,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Delay { fixed, jitter } => write!(f, "delay {} {}", fixed.as_millis(), jitter.as_millis()),
            Fault::Bandwidth { bytes_per_s } => write!(f, "bandwidth {bytes_per_s}"),
            Fault::Drop => f.write_str("drop"),
            Fault::HalfOpen => f.write_str("half-open"),
            Fault::BlackHole => f.write_str("black-hole"),
            Fault::Silence => f.write_str("silence"),
            Fault::OneWay(Direction::ToTarget) => f.write_str("one-way to-target"),
            Fault::OneWay(Direction::ToClient) => f.write_str("one-way to-client"),
            Fault::ResetAfter { bytes } => write!(f, "reset-after {bytes}"),
            Fault::Corrupt { one_in } => write!(f, "corrupt {one_in}"),
            Fault::Refuse => f.write_str("refuse"),
        }
    }
}

/// The commands, for a person.
pub const COMMANDS: &str = "delay MS [JITTER_MS], bandwidth BYTES_PER_S, drop, half-open, black-hole, silence, \
                            one-way to-target|to-client, reset-after BYTES, corrupt ONE_IN_BYTES, refuse, heal, status";

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Fault, String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let fault = match words[..] {
            ["delay", fixed] => delay(fixed, "0")?,
            ["delay", fixed, jitter] => delay(fixed, jitter)?,
            ["bandwidth", rate] => Fault::Bandwidth {
                bytes_per_s: at_least_one(rate)?,
            },
            ["drop"] => Fault::Drop,
            ["half-open"] => Fault::HalfOpen,
            ["black-hole"] => Fault::BlackHole,
            ["silence"] => Fault::Silence,
            ["one-way", "to-target"] => Fault::OneWay(Direction::ToTarget),
            ["one-way", "to-client"] => Fault::OneWay(Direction::ToClient),
            ["reset-after", bytes] => Fault::ResetAfter { bytes: number(bytes)? },
            ["corrupt", one_in] => Fault::Corrupt {
                one_in: at_least_one(one_in)?,
            },
            ["refuse"] => Fault::Refuse,
            _ => return Err(format!("no fault is called `{text}`: there are {COMMANDS}")),
        };
        Ok(fault)
    }
}

fn number(word: &str) -> Result<u64, String> {
    word.parse().map_err(|_| format!("`{word}` is no number"))
}

fn at_least_one(word: &str) -> Result<u64, String> {
    match number(word)? {
        0 => Err("that is at least 1".to_string()),
        number => Ok(number),
    }
}

fn delay(fixed: &str, jitter: &str) -> Result<Fault, String> {
    let span = |word| {
        let span = Duration::from_millis(number(word)?);
        if span > PROXY_DELAY_MAX {
            return Err(format!("a delay is at most {} s", PROXY_DELAY_MAX.as_secs()));
        }
        Ok(span)
    };
    Ok(Fault::Delay {
        fixed: span(fixed)?,
        jitter: span(jitter)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_is_read_as_it_is_written() {
        for text in [
            "delay 100 20",
            "bandwidth 4096",
            "drop",
            "half-open",
            "black-hole",
            "silence",
            "one-way to-target",
            "one-way to-client",
            "reset-after 0",
            "corrupt 1000",
            "refuse",
        ] {
            assert_eq!(text.parse::<Fault>().unwrap().to_string(), text);
        }
        assert_eq!("delay 5".parse::<Fault>().unwrap().to_string(), "delay 5 0");
    }

    #[test]
    fn what_is_no_fault_is_refused_in_words() {
        for (text, words) in [
            ("", "no fault is called ``: there are delay MS"),
            ("delay", "no fault is called `delay`"),
            ("delay x", "`x` is no number"),
            ("delay 999999999", "a delay is at most 600 s"),
            ("corrupt 0", "at least 1"),
            ("drop now", "no fault is called `drop now`"),
        ] {
            let error = text.parse::<Fault>().unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}
