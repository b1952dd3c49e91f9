//! The device itself, through the same ring as the store's.

use std::time::Duration;

use bytes::Bytes;
use cairn_proto::disk::{DeviceBlock, DiskOp, DiskToken};

use super::content::Content;
use super::disk::{Disk, written};
use super::work::{Target, Work};

/// When a raw write counts as done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Durability {
    /// When it is written: lost if power fails.
    None,
    /// When everything in flight is written and one flush after that has ended: a batch.
    FlushPerBatch,
}

/// A device as a target. Operations go to the place that they name, from `first` on.
pub struct Raw<'a, D> {
    disk: &'a mut D,
    first: u64,
    durability: Durability,
    content: Content,
    /// Written, not flushed.
    written: Vec<usize>,
    writes_in_flight: usize,
    device_bytes: u64,
}

const FLUSH: DiskToken = DiskToken(u64::MAX);
const PATIENCE: Duration = Duration::from_secs(30);

impl<'a, D: Disk> Raw<'a, D> {
    /// Nothing may be in flight on the device.
    pub fn new(disk: &'a mut D, first: u64, durability: Durability) -> Raw<'a, D> {
        Raw {
            disk,
            first,
            durability,
            content: Content::new(),
            written: Vec::new(),
            writes_in_flight: 0,
            device_bytes: 0,
        }
    }

    fn completed(&mut self, token: DiskToken, done: &mut Vec<usize>) {
        if token == FLUSH {
            return done.append(&mut self.written);
        }
        let id = (token.0 >> 1) as usize;
        if token.0 & 1 == 0 {
            return done.push(id);
        }
        self.writes_in_flight -= 1;
        if self.durability == Durability::None {
            return done.push(id);
        }
        self.written.push(id);
        if self.writes_in_flight == 0 {
            self.disk.submit(DiskOp::Flush { token: FLUSH });
        }
    }
}

impl<D: Disk> Target for Raw<'_, D> {
    fn submit(&mut self, id: usize, work: Work) {
        let token = DiskToken((id as u64) << 1 | u64::from(work.write));
        let at = DeviceBlock(self.first + work.block);
        let op = if work.write {
            self.writes_in_flight += 1;
            let buffers: Vec<Bytes> = vec![self.content.next(work.blocks)];
            DiskOp::Write {
                token,
                at,
                buffers,
                durable: false,
            }
        } else {
            let blocks = work.blocks;
            DiskOp::Read { token, at, blocks }
        };
        self.device_bytes += written(&op);
        self.disk.submit(op);
    }

    fn wait(&mut self, done: &mut Vec<usize>) -> Result<(), String> {
        while done.is_empty() {
            self.disk.wait(PATIENCE)?;
            while let Some(ended) = self.disk.completion() {
                ended.result.map_err(|error| error.to_string())?;
                self.completed(ended.token, done);
            }
        }
        Ok(())
    }

    fn device_bytes(&self) -> u64 {
        self.device_bytes
    }
}
