//! The device of a node: a device in memory, whose operations take their time.

use std::time::Duration;

use cairn_proto::disk::{DeviceBlock, DiskDone, DiskGeometry, DiskOp, DiskToken};
use cairn_proto::limits::BLOCK_BYTES;
use cairn_storage_node::testing::{Fault, MemoryDevice, Prng};

use super::options::DiskOptions;
use crate::checker::pattern::{Content, content_of};
use crate::rng::Rng;

/// How often operations fail: per thousand.
#[derive(Clone, Copy, Default, Debug)]
pub struct DiskErrors {
    /// Reads.
    pub reads: u32,
    /// Writes and flushes.
    pub writes: u32,
}

/// How a device lies about a write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lie {
    /// It writes nothing.
    Lost,
    /// It writes elsewhere: so many blocks further on.
    Misdirected(u64),
}

/// A device, its timing, and what is wrong with it now. It outlives the processes that use it.
pub struct Disk {
    /// What is stored.
    pub device: MemoryDevice,
    options: DiskOptions,
    rng: Rng,
    prng: Prng,
    slow: u32,
    stuck: u32,
    /// Completions that came while it was stuck.
    held: Vec<DiskToken>,
    /// Operations that the device does not end before it is told to, though it ends later ones.
    kept_back: Vec<DiskToken>,
    /// Those of them that have taken their time.
    overdue: Vec<DiskToken>,
    errors: DiskErrors,
    /// How it lies about the next write with a guest's content.
    lie: Option<Lie>,
    /// Whether it ever has lied about one.
    lied: bool,
    /// Contents of guests that it was made to lose.
    pub harmed: Vec<Content>,
    /// Whether an operation of the process that uses it now has failed.
    hurt: bool,
}

impl Disk {
    /// An empty device.
    pub fn new(options: DiskOptions, mut rng: Rng) -> Disk {
        let geometry = DiskGeometry {
            blocks: options.bytes / BLOCK_BYTES as u64,
            volatile_cache: options.volatile_cache,
        };
        Disk {
            device: MemoryDevice::new(geometry),
            options,
            prng: Prng::new(rng.word()),
            rng,
            slow: 0,
            stuck: 0,
            held: Vec::new(),
            kept_back: Vec::new(),
            overdue: Vec::new(),
            errors: DiskErrors::default(),
            lie: None,
            lied: false,
            harmed: Vec::new(),
            hurt: false,
        }
    }

    /// Takes an operation; how long it will take.
    pub fn submit(&mut self, op: DiskOp) -> (DiskToken, Duration) {
        let token = token_of(&op);
        let mean = match &op {
            DiskOp::Write { durable: true, .. } => self.options.latency + self.options.flush_latency,
            DiskOp::Read { .. } | DiskOp::Write { .. } => self.options.latency,
            DiskOp::Flush { .. } => self.options.flush_latency,
        };
        self.device.submit(op);
        let mean = mean * if self.slow > 0 { 40 } else { 1 };
        (token, self.rng.spread(mean))
    }

    /// An operation has taken its time. `None` while the device is stuck, or keeps this one back.
    pub fn complete(&mut self, token: DiskToken) -> Option<DiskDone> {
        if self.kept_back.contains(&token) {
            self.overdue.push(token);
            return None;
        }
        if self.stuck > 0 {
            self.held.push(token);
            return None;
        }
        if self.fails(token) {
            self.hurt = true;
            return Some(self.device.complete_with(token, Fault::default(), &mut self.prng));
        }
        if let Some(fault) = self.lie_about(token) {
            return Some(self.device.complete_with(token, fault, &mut self.prng));
        }
        Some(self.device.complete(token))
    }

    /// It lies about the next write with a guest's content.
    pub fn lie(&mut self, lie: Lie) {
        self.lie = Some(lie);
    }

    /// Whether it has ever lied about a write: a part of its log may be missing, so that it is refused when it is opened, or has forgotten
    /// the last of it.
    pub fn has_lied(&self) -> bool {
        self.lied
    }

    fn lie_about(&mut self, token: DiskToken) -> Option<Fault> {
        let lie = self.lie?;
        let op = self.device.in_flight().find(|op| token_of(op) == token)?;
        let DiskOp::Write { at, buffers, .. } = op else {
            return None;
        };
        let blocks: Vec<&[u8; BLOCK_BYTES]> = buffers
            .iter()
            .flat_map(|buffer| buffer.chunks_exact(BLOCK_BYTES))
            .map(|block| block.try_into().expect("whole blocks"))
            .collect();
        let written: Vec<Content> = blocks.iter().filter_map(|block| content_of(block)).collect();
        if written.is_empty() {
            return None;
        }
        let (at, count) = (at.0, blocks.len() as u64);
        let (fault, lost) = match lie {
            Lie::Lost => (Fault::LostWrite, Vec::new()),
            Lie::Misdirected(by) => {
                // Onto blocks of guests and empty ones only: the store's own are another story, told by its tests.
                let to = (at + by) % (self.device.geometry().blocks - count + 1);
                let there = (to..to + count).map(|at| self.device.peek(DeviceBlock(at)));
                let lost: Option<Vec<Option<Content>>> = there
                    .map(|block| match content_of(block) {
                        None if *block != [0; BLOCK_BYTES] => None,
                        content => Some(content),
                    })
                    .collect();
                (Fault::MisdirectedBy(by), lost?.into_iter().flatten().collect())
            }
        };
        self.lie = None;
        self.lied = true;
        self.harmed.extend(written.into_iter().chain(lost));
        Some(fault)
    }

    fn fails(&mut self, token: DiskToken) -> bool {
        let DiskErrors { reads, writes } = self.errors;
        if (reads, writes) == (0, 0) {
            return false;
        }
        let odds = match self.device.in_flight().find(|op| token_of(op) == token) {
            Some(DiskOp::Read { .. }) => reads,
            _ => writes,
        };
        self.rng.permille(odds)
    }

    /// Whether an operation under way is a read.
    pub fn is_read(&self, token: DiskToken) -> bool {
        let op = self.device.in_flight().find(|op| token_of(op) == token);
        matches!(op, Some(DiskOp::Read { .. }))
    }

    /// Operations fail so often from now on.
    pub fn set_errors(&mut self, errors: DiskErrors) {
        self.errors = errors;
    }

    /// Whether operations fail now.
    pub fn has_errors(&self) -> bool {
        self.errors.reads > 0 || self.errors.writes > 0
    }

    /// Whether an operation of the process that uses it now has failed.
    pub fn is_hurt(&self) -> bool {
        self.hurt
    }

    /// Its process was killed.
    pub fn process_killed(&mut self) {
        self.forget_late();
        self.device.process_killed(&mut self.prng);
    }

    /// Its power was cut.
    pub fn power_cut(&mut self) {
        self.forget_late();
        self.device.power_cut(&mut self.prng);
    }

    fn forget_late(&mut self) {
        self.hurt = false;
        self.held.clear();
        self.kept_back.clear();
        self.overdue.clear();
    }

    /// What is under way now does not end until it is let go; what comes later does.
    pub fn hold_in_flight(&mut self) {
        self.kept_back = self.device.in_flight().map(token_of).collect();
    }

    /// What was kept back ends; those that would have ended by now are given back, to end at once.
    pub fn let_go(&mut self) -> Vec<DiskToken> {
        self.kept_back.clear();
        std::mem::take(&mut self.overdue)
    }

    /// Begins or ends being slow.
    pub fn slow(&mut self, begin: bool) {
        self.slow = if begin {
            self.slow + 1
        } else {
            self.slow.saturating_sub(1)
        };
    }

    /// Begins or ends being stuck; what was held back completes now.
    pub fn stuck(&mut self, begin: bool) -> Vec<DiskToken> {
        self.stuck = if begin {
            self.stuck + 1
        } else {
            self.stuck.saturating_sub(1)
        };
        if self.stuck > 0 {
            Vec::new()
        } else {
            std::mem::take(&mut self.held)
        }
    }

    /// Nothing is wrong with it any more.
    pub fn heal(&mut self) -> Vec<DiskToken> {
        (self.slow, self.stuck) = (0, 0);
        self.lie = None;
        self.errors = DiskErrors::default();
        let mut late = std::mem::take(&mut self.held);
        late.extend(self.let_go());
        late
    }
}

/// The token of an operation.
pub fn token_of(op: &DiskOp) -> DiskToken {
    match op {
        DiskOp::Read { token, .. } | DiskOp::Write { token, .. } | DiskOp::Flush { token } => *token,
    }
}
