//! The device as a state machine: requests in, answers out; time is an argument.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::super::limits::SHIM_RULES_MAX;
use super::cache::{Cache, Cut, SECTOR, Taste};
use super::media::Media;
use super::rules::{Effect, Kind, Rule};
use crate::rng::Rng;

/// One request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// Of so many bytes.
    Read {
        /// Where.
        offset: u64,
        /// How many.
        length: usize,
    },
    /// Of these bytes.
    Write {
        /// Where.
        offset: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// Of all writes that were answered before.
    Flush,
}

/// Why a request fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trouble {
    /// EIO.
    Eio,
    /// ENOSPC.
    Enospc,
    /// EINVAL: it is not within the device.
    Outside,
}

/// What a request gets: what was read (nothing for others), or why it fails.
pub type Answer = Result<Vec<u8>, Trouble>;

/// Who chooses what a power cut loses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CutBy {
    /// The shim, by its own seed and what it did before.
    Shim,
    /// This seed, and nothing else.
    Seed(u64),
    /// All that is not flushed is lost: the worst that a device may do.
    LoseAll,
}

/// A seed, or the shim's own.
impl From<Option<u64>> for CutBy {
    fn from(seed: Option<u64>) -> CutBy {
        seed.map_or(CutBy::Shim, CutBy::Seed)
    }
}

/// What a shim did since its start.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Counters {
    /// Reads that were answered with data.
    pub reads: u64,
    /// Writes that were answered as done.
    pub writes: u64,
    /// Flushes that were answered as done.
    pub flushes: u64,
    /// Requests that failed with EIO by a rule.
    pub eio: u64,
    /// Requests that failed with ENOSPC.
    pub enospc: u64,
    /// Requests that failed because the power is off.
    pub powerless: u64,
    /// Requests that were delayed.
    pub delayed: u64,
    /// Requests that got stuck.
    pub stuck: u64,
    /// Writes and flushes that were answered as done and were not.
    pub lost: u64,
    /// Writes that landed elsewhere.
    pub misdirected: u64,
    /// Writes of which one sector stayed as it was.
    pub stale: u64,
    /// Bits that rotted.
    pub rotten: u64,
    /// Power cuts.
    pub cuts: u64,
    /// Sectors that power cuts left as they were written last, though unflushed.
    pub cut_kept: u64,
    /// Sectors that power cuts left as something older.
    pub cut_lost: u64,
    /// Times that the device was wiped or swapped.
    pub replaced: u64,
    /// Requests that failed because the backing file did.
    pub broken: u64,
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "reads {} writes {} flushes {} eio {} enospc {} powerless {} delayed {} stuck {} lost {} misdirected {} stale {} rotten {} \
             cuts {} cut-kept {} cut-lost {} replaced {} broken {}",
            self.reads,
            self.writes,
            self.flushes,
            self.eio,
            self.enospc,
            self.powerless,
            self.delayed,
            self.stuck,
            self.lost,
            self.misdirected,
            self.stale,
            self.rotten,
            self.cuts,
            self.cut_kept,
            self.cut_lost,
            self.replaced,
            self.broken
        )
    }
}

/// What the rules make of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Outcome {
    Normal,
    Fail(Trouble),
    Lose,
    Misdirect,
    Stale,
    Rot,
}

/// When a request that waits goes on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Due {
    At(Instant),
    /// Not before the shim is healed.
    Healed,
}

struct Waiting<T> {
    request: Request,
    outcome: Outcome,
    ticket: T,
}

/// See the module. `T` is what the caller knows a request again by.
pub struct Disk<M, T> {
    cache: Cache<M>,
    powered: bool,
    rules: Vec<Rule>,
    waiting: BTreeMap<(Due, u64), Waiting<T>>,
    submitted: u64,
    rng: Rng,
    counters: Counters,
}

impl<M, T> fmt::Debug for Disk<M, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk")
            .field("powered", &self.powered)
            .field("rules", &self.rules)
            .field("waiting", &self.waiting.len())
            .finish_non_exhaustive()
    }
}

impl<M: Media, T> Disk<M, T> {
    /// A device with its power on.
    pub fn new(media: M, seed: u64) -> Disk<M, T> {
        Disk {
            cache: Cache::new(media),
            powered: true,
            rules: Vec::new(),
            waiting: BTreeMap::new(),
            submitted: 0,
            rng: Rng::stream(seed, "shim"),
            counters: Counters::default(),
        }
    }

    /// How large it is, in bytes.
    pub fn bytes(&self) -> u64 {
        self.cache.media().bytes()
    }

    /// Whether its power is on.
    pub fn is_powered(&self) -> bool {
        self.powered
    }

    /// What it did so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Sectors that were written and not flushed.
    pub fn unflushed(&self) -> u64 {
        self.cache.unflushed()
    }

    /// Requests that are not answered yet.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The rules there are.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// Takes a request; the answer if it has one at once, otherwise it comes from [`Disk::due`], [`Disk::heal`] or
    /// [`Disk::power_cut`].
    pub fn submit(&mut self, now: Instant, request: Request, ticket: T) -> Option<(T, Answer)> {
        self.submit_after(now, Duration::ZERO, request, ticket)
    }

    /// The same with a request that takes so long at the least.
    pub fn submit_after(&mut self, now: Instant, least: Duration, request: Request, ticket: T) -> Option<(T, Answer)> {
        if !self.powered {
            self.counters.powerless += 1;
            return Some((ticket, Err(Trouble::Eio)));
        }
        let Some(touched) = self.touched(&request) else {
            return Some((ticket, Err(Trouble::Outside)));
        };
        let (wait, stuck, outcome) = self.judge(&request, &touched);
        let delayed = !wait.is_zero();
        let wait = wait.max(least);
        if !stuck && wait.is_zero() {
            return Some((ticket, self.carry_out(request, outcome)));
        }
        let due = if stuck {
            self.counters.stuck += 1;
            Due::Healed
        } else {
            self.counters.delayed += u64::from(delayed);
            Due::At(now + wait)
        };
        self.submitted += 1;
        let waiting = Waiting {
            request,
            outcome,
            ticket,
        };
        self.waiting.insert((due, self.submitted), waiting);
        None
    }

    /// The bytes that a request touches; `None` when they are not within the device.
    fn touched(&self, request: &Request) -> Option<Range<u64>> {
        let (offset, length) = match request {
            Request::Read { offset, length } => (*offset, *length as u64),
            Request::Write { offset, bytes } => (*offset, bytes.len() as u64),
            Request::Flush => return Some(0..0),
        };
        let end = offset.checked_add(length).filter(|end| *end <= self.bytes())?;
        Some(offset..end)
    }

    fn judge(&mut self, request: &Request, touched: &Range<u64>) -> (Duration, bool, Outcome) {
        let kind = match request {
            Request::Read { .. } => Kind::Read,
            Request::Write { .. } => Kind::Write,
            Request::Flush => Kind::Flush,
        };
        let (mut wait, mut stuck, mut outcome) = (Duration::ZERO, false, Outcome::Normal);
        for rule in &mut self.rules {
            let decided = outcome != Outcome::Normal;
            let makes = match rule.effect {
                Effect::Delay { .. } | Effect::Stick => None,
                Effect::Eio => Some(Outcome::Fail(Trouble::Eio)),
                Effect::Enospc => Some(Outcome::Fail(Trouble::Enospc)),
                Effect::Lose => Some(Outcome::Lose),
                Effect::Misdirect => Some(Outcome::Misdirect),
                Effect::Stale => Some(Outcome::Stale),
                Effect::Rot => Some(Outcome::Rot),
            };
            // The first rule that decides what becomes of it does; a rule that strikes in vain is not used up.
            if (decided && makes.is_some()) || !rule.strikes(kind, touched, &mut self.rng) {
                continue;
            }
            match rule.effect {
                Effect::Delay { fixed, jitter } => wait += fixed + self.rng.span(Duration::ZERO, jitter),
                Effect::Stick => stuck = true,
                _ => outcome = makes.expect("all others decide"),
            }
        }
        self.rules.retain(Rule::lives);
        (wait, stuck, outcome)
    }

    fn carry_out(&mut self, request: Request, outcome: Outcome) -> Answer {
        match outcome {
            Outcome::Fail(trouble) => {
                match trouble {
                    Trouble::Enospc => self.counters.enospc += 1,
                    Trouble::Eio | Trouble::Outside => self.counters.eio += 1,
                }
                return Err(trouble);
            }
            Outcome::Lose => {
                self.counters.lost += 1;
                return Ok(Vec::new());
            }
            Outcome::Normal | Outcome::Misdirect | Outcome::Stale | Outcome::Rot => {}
        }
        self.do_it(request, outcome).map_err(|_| {
            self.counters.broken += 1;
            Trouble::Eio
        })
    }

    fn do_it(&mut self, request: Request, outcome: Outcome) -> io::Result<Vec<u8>> {
        match request {
            Request::Read { offset, length } => {
                if outcome == Outcome::Rot && length > 0 {
                    let at = offset + self.rng.below(length as u64);
                    self.rot_at(at)?;
                }
                let mut bytes = vec![0; length];
                self.cache.read(offset, &mut bytes)?;
                self.counters.reads += 1;
                Ok(bytes)
            }
            Request::Write { offset, bytes } => {
                let at = match outcome {
                    Outcome::Misdirect => self.elsewhere(offset, bytes.len() as u64),
                    _ => offset,
                };
                match outcome {
                    Outcome::Stale => self.write_but_one_sector(at, &bytes)?,
                    _ => self.cache.write(at, &bytes)?,
                }
                self.counters.writes += 1;
                Ok(Vec::new())
            }
            Request::Flush => {
                self.cache.flush()?;
                self.counters.flushes += 1;
                Ok(Vec::new())
            }
        }
    }

    /// Another place for a write; the same one where there is no other.
    fn elsewhere(&mut self, offset: u64, length: u64) -> u64 {
        let places = self.bytes() / length.max(1);
        if length == 0 || places < 2 {
            return offset;
        }
        self.counters.misdirected += 1;
        let own = offset / length;
        (own + 1 + self.rng.below(places - 1)) % places * length
    }

    /// Writes all but one of the sectors that it touches.
    fn write_but_one_sector(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let sector = SECTOR as u64;
        let (first, end) = (offset / sector, (offset + bytes.len() as u64).div_ceil(sector));
        if first == end {
            return Ok(());
        }
        let start = (first + self.rng.below(end - first)) * sector;
        let within = |at: u64| at.saturating_sub(offset).min(bytes.len() as u64) as usize;
        let (before, after) = (within(start), within(start + sector));
        self.cache.write(offset, &bytes[..before])?;
        self.cache.write(offset + after as u64, &bytes[after..])?;
        self.counters.stale += 1;
        Ok(())
    }

    /// Flips a bit of this byte, in the cache or below.
    fn rot_at(&mut self, at: u64) -> io::Result<()> {
        let start = at / SECTOR as u64 * SECTOR as u64;
        let mut sector = [0; SECTOR];
        self.cache.read(start, &mut sector)?;
        sector[(at - start) as usize] ^= 1 << self.rng.below(8);
        self.cache.media_mut().write(start, &sector)?;
        self.cache.drop_sector(start / SECTOR as u64);
        self.counters.rotten += 1;
        Ok(())
    }

    /// Answers of requests whose time has come.
    pub fn due(&mut self, now: Instant) -> Vec<(T, Answer)> {
        let later = self.waiting.split_off(&(Due::At(now), u64::MAX));
        let due = std::mem::replace(&mut self.waiting, later);
        self.finish(due)
    }

    /// When the next waiting request's time comes.
    pub fn next_due(&self) -> Option<Instant> {
        match self.waiting.first_key_value() {
            Some(((Due::At(at), _), _)) => Some(*at),
            _ => None,
        }
    }

    /// Adds a rule. It strikes from the next request on.
    ///
    /// # Errors
    /// There are too many, in words.
    pub fn add(&mut self, rule: Rule) -> Result<(), String> {
        if self.rules.len() >= SHIM_RULES_MAX {
            return Err(format!("there are {SHIM_RULES_MAX} rules: heal first"));
        }
        self.rules.push(rule);
        Ok(())
    }

    /// Takes all rules away; what waited is done now, in its order. The power stays as it is, and so does harm that was done.
    pub fn heal(&mut self) -> Vec<(T, Answer)> {
        self.rules.clear();
        let waiting = std::mem::take(&mut self.waiting);
        self.finish(waiting)
    }

    fn finish(&mut self, waiting: BTreeMap<(Due, u64), Waiting<T>>) -> Vec<(T, Answer)> {
        let done = waiting.into_values().map(|one| {
            let answer = self.carry_out(one.request, one.outcome);
            (one.ticket, answer)
        });
        done.collect()
    }

    /// Cuts the power: what is not flushed is kept, lost or torn; writes under way too.
    /// All requests fail with EIO until [`Disk::power_on`]. Says what it did, and answers what waited.
    ///
    /// # Errors
    /// The backing file failed, in words.
    pub fn power_cut(&mut self, by: CutBy) -> Result<(Cut, Vec<(T, Answer)>), String> {
        let mut of_seed = match by {
            CutBy::Seed(seed) => Some(Rng::stream(seed, "power cut")),
            CutBy::Shim | CutBy::LoseAll => None,
        };
        let waiting = std::mem::take(&mut self.waiting);
        let mut answers = Vec::new();
        let mut failed = Ok(());
        for one in waiting.into_values() {
            // On its way to the medium: as much of it may arrive as of what is in the cache.
            if let (Request::Write { offset, bytes }, Outcome::Normal) = (&one.request, one.outcome) {
                failed = failed.and(self.cache.write(*offset, bytes));
            }
            answers.push((one.ticket, Err(Trouble::Eio)));
        }
        let rng = of_seed.as_mut().unwrap_or(&mut self.rng);
        let taste = match by {
            CutBy::LoseAll => Taste::LoseAll,
            CutBy::Shim | CutBy::Seed(_) => Taste::draw(rng),
        };
        let cut = failed.and_then(|()| self.cache.cut(taste, rng));
        self.powered = false;
        self.counters.cuts += 1;
        let cut = cut.map_err(|error| format!("the backing file failed in the middle of a power cut: {error}"))?;
        self.counters.cut_kept += cut.kept;
        self.counters.cut_lost += cut.lost;
        Ok((cut, answers))
    }

    /// Gives it power again.
    pub fn power_on(&mut self) {
        self.powered = true;
    }

    /// Makes all that was written durable, whatever the rules say.
    ///
    /// # Errors
    /// Of the backing file.
    pub fn settle(&mut self) -> io::Result<()> {
        self.cache.flush()
    }

    /// Flips so many bits where there is data, within `range` if there is one. Gives how many: none where there is no data.
    ///
    /// # Errors
    /// Of the backing file.
    pub fn rot(&mut self, bits: u64, range: Option<Range<u64>>) -> io::Result<u64> {
        self.cache.flush()?;
        let range = range.unwrap_or(0..self.bytes());
        let all = self.cache.media().data()?;
        let extents = all
            .into_iter()
            .map(|extent| extent.start.max(range.start)..extent.end.min(range.end));
        let extents: Vec<Range<u64>> = extents.filter(|extent| !extent.is_empty()).collect();
        let total: u64 = extents.iter().map(|extent| extent.end - extent.start).sum();
        if total == 0 {
            return Ok(0);
        }
        for _ in 0..bits {
            let mut left = self.rng.below(total);
            for extent in &extents {
                let length = extent.end - extent.start;
                if left < length {
                    self.rot_at(extent.start + left)?;
                    break;
                }
                left -= length;
            }
        }
        Ok(bits)
    }

    /// An empty device from now on.
    ///
    /// # Errors
    /// Of the backing file.
    pub fn wipe(&mut self) -> io::Result<()> {
        self.cache.forget();
        self.counters.replaced += 1;
        self.cache.media_mut().wipe()
    }

    /// Another device in its place from now on; what was written is durable on the old one, which is given back.
    ///
    /// # Errors
    /// Of the backing file; then nothing was swapped.
    pub fn swap(&mut self, media: M) -> io::Result<M> {
        self.cache.flush()?;
        self.counters.replaced += 1;
        Ok(std::mem::replace(self.cache.media_mut(), media))
    }
}

#[cfg(test)]
mod tests;
