//! Actions on their way out.

use std::collections::VecDeque;

use bytes::Bytes;
use cairn_proto::disk::{DeviceBlock, DiskOp, DiskToken, WRITE_BUFFERS_MAX};
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::time::Time;

use super::api::{StoreAction, StoreReply, Ticket};
use super::status::Counters;
use super::unflushed::Unflushed;

/// The queue of actions, and the numbers of operations.
#[derive(Debug, Default)]
pub(super) struct Io {
    next_token: u64,
    actions: VecDeque<StoreAction>,
    /// When something last came in, if what could begin was not looked for since.
    pub(super) stirred: Option<Time>,
    pub(super) counters: Counters,
    pub(super) unflushed: Unflushed,
}

impl Io {
    pub(super) fn pop(&mut self) -> Option<StoreAction> {
        self.actions.pop_front()
    }

    pub(super) fn stir(&mut self, now: Time) {
        self.stirred = Some(now);
    }

    pub(super) fn reply(&mut self, ticket: Ticket, reply: StoreReply) {
        self.actions.push_back(StoreAction::Reply(ticket, reply));
    }

    fn token(&mut self) -> DiskToken {
        self.next_token += 1;
        DiskToken(self.next_token)
    }

    pub(super) fn read(&mut self, place: u32, blocks: u32) -> u64 {
        self.read_at(DeviceBlock(place.into()), blocks)
    }

    pub(super) fn read_at(&mut self, at: DeviceBlock, blocks: u32) -> u64 {
        let token = self.token();
        self.counters.device_reads += 1;
        self.actions
            .push_back(StoreAction::Disk(DiskOp::Read { token, at, blocks }));
        token.0
    }

    /// A write; with `durable` it is durable when it ends, without a flush.
    pub(super) fn write(&mut self, place: u32, buffers: Vec<Bytes>, durable: bool) -> u64 {
        let token = self.token();
        debug_assert!(buffers.iter().all(|buffer| cairn_proto::buffer::is_aligned(buffer)));
        self.counters.device_writes += 1;
        self.actions.push_back(StoreAction::Disk(DiskOp::Write {
            token,
            at: DeviceBlock(place.into()),
            buffers,
            durable,
        }));
        if !durable {
            self.unflushed.write_begun();
        }
        token.0
    }

    pub(super) fn flush(&mut self) -> u64 {
        let token = self.token();
        self.counters.device_flushes += 1;
        self.actions.push_back(StoreAction::Disk(DiskOp::Flush { token }));
        self.unflushed.flush_begun(token.0);
        token.0
    }
}

/// Buffers that go to the device, put together into as few writes as possible.
#[derive(Debug, Default)]
pub(super) struct WriteList {
    writes: Vec<(u32, Vec<Bytes>)>,
    end: u32,
}

impl WriteList {
    pub(super) fn push(&mut self, place: u32, buffer: Bytes) {
        let blocks = (buffer.len() / BLOCK_BYTES) as u32;
        match self.writes.last_mut() {
            Some((_, buffers)) if self.end == place && buffers.len() < WRITE_BUFFERS_MAX => buffers.push(buffer),
            _ => self.writes.push((place, vec![buffer])),
        }
        self.end = place + blocks;
    }

    pub(super) fn into_writes(self) -> Vec<(u32, Vec<Bytes>)> {
        self.writes
    }
}
