//! Devices: a real one behind the production ring, and one that answers at once and keeps nothing, for counting instructions.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::disk::{DiskDone, DiskGeometry, DiskOp};
use cairn_proto::limits::BLOCK_BYTES;
use cairn_storage_node::driver::BareDevice;

/// How long an operation may take before the run is given up.
const PATIENCE: Duration = Duration::from_secs(30);

/// A device.
pub trait Disk {
    /// Takes an operation.
    fn submit(&mut self, op: DiskOp);
    /// Waits until something has ended or `timeout` has passed.
    ///
    /// # Errors
    /// In words.
    fn wait(&mut self, timeout: Duration) -> Result<(), String>;
    /// What has ended next.
    fn completion(&mut self) -> Option<DiskDone>;
    /// Operations that have not ended.
    fn in_flight(&self) -> usize;

    /// Waits until nothing is in flight, and forgets what ends.
    ///
    /// # Errors
    /// In words.
    fn settle(&mut self) -> Result<(), String> {
        while self.in_flight() > 0 {
            if self.completion().is_none() {
                self.wait(PATIENCE)?;
            }
        }
        Ok(())
    }
}

impl Disk for BareDevice {
    fn submit(&mut self, op: DiskOp) {
        BareDevice::submit(self, op);
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), String> {
        BareDevice::wait(self, timeout).map_err(|error| error.to_string())
    }

    fn completion(&mut self) -> Option<DiskDone> {
        BareDevice::completion(self)
    }

    fn in_flight(&self) -> usize {
        BareDevice::in_flight(self)
    }
}

/// A device that does nothing, at once, and reads as zeroes: what is left is the cost of the store itself.
#[derive(Debug)]
pub struct NullDevice {
    geometry: DiskGeometry,
    done: VecDeque<DiskDone>,
    zeroes: Bytes,
}

impl NullDevice {
    /// With so many blocks and a volatile cache.
    pub fn new(blocks: u64) -> NullDevice {
        NullDevice {
            geometry: DiskGeometry {
                blocks,
                volatile_cache: true,
            },
            done: VecDeque::new(),
            zeroes: BlockBuf::zeroed(512).freeze(),
        }
    }

    /// What a store must know of it.
    pub fn geometry(&self) -> DiskGeometry {
        self.geometry
    }
}

impl Disk for NullDevice {
    fn submit(&mut self, op: DiskOp) {
        let (token, content) = match op {
            DiskOp::Read { token, blocks, .. } => (token, self.zeroes.slice(..blocks as usize * BLOCK_BYTES)),
            DiskOp::Write { token, .. } | DiskOp::Flush { token } => (token, Bytes::new()),
        };
        let result = Ok(content);
        self.done.push_back(DiskDone { token, result });
    }

    fn wait(&mut self, _timeout: Duration) -> Result<(), String> {
        Ok(())
    }

    fn completion(&mut self) -> Option<DiskDone> {
        self.done.pop_front()
    }

    fn in_flight(&self) -> usize {
        self.done.len()
    }
}

/// Bytes that an operation writes.
pub fn written(op: &DiskOp) -> u64 {
    match op {
        DiskOp::Write { buffers, .. } => buffers.iter().map(|bytes| bytes.len() as u64).sum(),
        DiskOp::Read { .. } | DiskOp::Flush { .. } => 0,
    }
}
