//! The device of a node: a device in memory, whose operations take their time.

use std::time::Duration;

use cairn_proto::disk::{DiskDone, DiskGeometry, DiskOp, DiskToken};
use cairn_proto::limits::BLOCK_BYTES;
use cairn_storage_node::testing::{MemoryDevice, Prng};

use super::options::DiskOptions;
use crate::rng::Rng;

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
        }
    }

    /// Takes an operation; how long it will take.
    pub fn submit(&mut self, op: DiskOp) -> (DiskToken, Duration) {
        let (token, mean) = match &op {
            DiskOp::Read { token, .. } | DiskOp::Write { token, .. } => (*token, self.options.latency),
            DiskOp::Flush { token } => (*token, self.options.flush_latency),
        };
        self.device.submit(op);
        let mean = mean * if self.slow > 0 { 40 } else { 1 };
        (token, self.rng.spread(mean))
    }

    /// An operation has taken its time. `None` while the device is stuck.
    pub fn complete(&mut self, token: DiskToken) -> Option<DiskDone> {
        if self.stuck > 0 {
            self.held.push(token);
            return None;
        }
        Some(self.device.complete(token))
    }

    /// Its process was killed.
    pub fn process_killed(&mut self) {
        self.held.clear();
        self.device.process_killed(&mut self.prng);
    }

    /// Its power was cut.
    pub fn power_cut(&mut self) {
        self.held.clear();
        self.device.power_cut(&mut self.prng);
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
        std::mem::take(&mut self.held)
    }
}
