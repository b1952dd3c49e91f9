//! The promises, judged by an onlooker who sees everything.

use std::fmt;

use super::state::{Cell, Device, Op, Phase, Set, State, Version, WRITE_QUORUM};

/// A promise that was broken.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Broken {
    /// Promise 1: an acknowledged write is not on a quorum of the members.
    Lost {
        /// Of which block.
        block: u8,
        /// Which one.
        version: Version,
    },
    /// Promise 2: a read has returned something older than what was completed before it began.
    Stale {
        /// Of which block.
        block: u8,
        /// What it has returned.
        found: Version,
        /// What had been completed.
        seen: Version,
    },
    /// Promise 2: a write that an older attachment had left open took effect after a newer one had completed something.
    Surfaced {
        /// Of which block.
        block: u8,
        /// What the read has returned.
        found: Version,
        /// What had been completed.
        seen: Version,
    },
    /// Promise 3: a write that was issued after a newer attachment had completed something was acknowledged.
    AcknowledgedLate {
        /// To which holder.
        holder: u8,
        /// Which one.
        version: Version,
    },
    /// Promise 4: with one member dead, a holder that serves could not go on.
    Stuck {
        /// Which holder.
        holder: u8,
        /// Without which device.
        dead: u8,
    },
    /// Promise 4: with one member dead at most, and all else well, a holder could not complete its operations.
    Stalled {
        /// Which holder.
        holder: u8,
        /// Who is dead.
        dead: Option<u8>,
    },
    /// Sanity: the admission of a member was proposed that lacks something that was acknowledged.
    Incomplete {
        /// Which one.
        device: u8,
        /// What it lacks.
        version: Version,
    },
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Version::ZERO {
            return f.write_str("nothing");
        }
        write!(f, "({},{})", self.generation(), self.number())
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The name of a device.
pub fn device_name(device: u8) -> char {
    char::from(b'a' + device)
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Broken::Lost { block, version } => write!(
                f,
                "promise 1: {version} of block {block} was acknowledged, and fewer than a quorum of the in-sync members hold it"
            ),
            Broken::Stale { block, found, seen } => write!(
                f,
                "promise 2: a read of block {block} returned {found} although {seen} was completed before it began"
            ),
            Broken::Surfaced { block, found, seen } => write!(
                f,
                "promise 2: a read of block {block} returned {found}, which an older attachment had left open, although a newer \
                 one had completed an operation on {seen}"
            ),
            Broken::AcknowledgedLate { holder, version } => write!(
                f,
                "promise 3: {version} was acknowledged to h{holder}, who issued it after a newer attachment had completed an \
                 operation"
            ),
            Broken::Stuck { holder, dead } => write!(
                f,
                "promise 4: with {} dead, h{holder} could not read what it has acknowledged, or not write",
                device_name(dead)
            ),
            Broken::Stalled { holder, dead } => write!(
                f,
                "promise 4: {}all else well, h{holder} could not complete its operations",
                dead.map_or(String::new(), |dead| format!("with {} dead and ", device_name(dead)))
            ),
            Broken::Incomplete { device, version } => write!(
                f,
                "the admission of {} was proposed, and it lacks {version}, which was acknowledged",
                device_name(device)
            ),
        }
    }
}

impl State {
    /// What a cell is worth: the write that made its content. Absence may be reported as old as a floor, which is another
    /// block's version: then it is the newest discard up to there that made it.
    pub fn worth(&self, block: u8, cell: Cell) -> Version {
        if !cell.is_absent() {
            return cell.version();
        }
        let up_to = (2_u64 << cell.version().0) - 1;
        let made = u64::from(self.watch.discards[block as usize]) & up_to;
        Version(made.checked_ilog2().unwrap_or(0) as u8)
    }

    /// What a device durably has of a block.
    pub fn durable_on(&self, device: &Device, block: u8) -> Version {
        match device.cells_on_disk[block as usize] {
            Cell::EMPTY => self.worth(block, Cell::absent(device.floor)),
            cell => self.worth(block, cell),
        }
    }

    /// Whether a device durably has what that write made, or something newer. Absence is absence, whoever made it.
    fn has(&self, device: u8, block: u8, version: Version) -> bool {
        let device = self.device(device);
        let absent = device.cells_on_disk[block as usize].is_absent();
        self.durable_on(device, block) >= version || absent && self.is_discard(block, version)
    }

    fn is_discard(&self, block: u8, version: Version) -> bool {
        self.watch.discards[block as usize] & 1 << version.0 != 0
    }

    /// An operation of a holder on a block has completed, with this version.
    fn completed(&mut self, g: u8, block: u8, version: Version) {
        let (seen, top) = (
            &mut self.watch.seen[block as usize],
            &mut self.watch.top[block as usize],
        );
        *seen = (*seen).max(version);
        *top = (*top).max(g);
    }

    /// The highest generation that has completed anything.
    pub fn top(&self) -> u8 {
        self.watch.top.iter().copied().max().unwrap_or(0)
    }

    /// A write was acknowledged.
    pub fn acknowledged(&mut self, g: u8, block: u8, version: Version, late: bool) -> Option<Broken> {
        let newest = &mut self.watch.acknowledged[block as usize];
        *newest = (*newest).max(version);
        self.completed(g, block, version);
        late.then_some(Broken::AcknowledgedLate { holder: g, version })
    }

    /// A read was answered; `seen` and `top` are those of its beginning.
    pub fn returned(&mut self, g: u8, block: u8, cell: Cell, seen: Version, top: u8) -> Option<Broken> {
        let mut found = self.worth(block, cell);
        if cell.is_absent() && (seen == Version::ZERO || self.is_discard(block, seen)) {
            // Absence, as before: whose it is can't be told, and a floor doesn't say.
            found = seen;
        }
        self.completed(g, block, found);
        if found < seen {
            Some(Broken::Stale { block, found, seen })
        } else if found > seen && found.generation() < top {
            Some(Broken::Surfaced { block, found, seen })
        } else {
            None
        }
    }

    /// What must be true in every state.
    pub fn check(&self) -> Option<Broken> {
        for block in 0..super::state::BLOCKS as u8 {
            let version = self.watch.acknowledged[block as usize];
            let insync = self.meta.config.insync;
            let on = insync.filter(|d| self.has(d, block, version)).len();
            if on < WRITE_QUORUM.min(insync.len()) {
                return Some(Broken::Lost { block, version });
            }
        }
        self.check_progress()
    }

    /// Promise 4 for the newest holder: whichever member of three dies, who is left can take writes, and has what reads need.
    fn check_progress(&self) -> Option<Broken> {
        let g = self.meta.granted;
        let holder = self.holder(g);
        let insync = holder.config.insync;
        if holder.phase != Phase::Serving || holder.proposed.is_some() || insync.len() <= WRITE_QUORUM {
            return None;
        }
        for dead in insync.iter() {
            let left = insync.without(dead);
            for (block, newest) in holder.newest.iter().enumerate() {
                let readable = left.filter(|d| holder.known[d as usize][block].holds(newest.version()));
                let idle = holder.ops[block] == Op::Idle;
                if idle && (readable == Set::NONE || left.len() < WRITE_QUORUM) {
                    return Some(Broken::Stuck { holder: g, dead });
                }
            }
        }
        None
    }

    /// Who is proposed to be admitted holds everything that was acknowledged. What is acknowledged later it may lack, like
    /// any member: from the proposal on the quorums of both configurations are needed.
    pub fn check_admitted(&self, device: u8) -> Option<Broken> {
        let lacks = |block: &u8| !self.has(device, *block, self.watch.acknowledged[*block as usize]);
        let block = (0..super::state::BLOCKS as u8).find(lacks)?;
        let version = self.watch.acknowledged[block as usize];
        Some(Broken::Incomplete { device, version })
    }
}
