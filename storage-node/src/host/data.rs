//! Writes, copies, reads and collects: what waits for its turn at the store.

use bytes::Bytes;
use cairn_proto::capability::Rights;
use cairn_proto::checksum::{Checksum, block_checksum};
use cairn_proto::ids::VolumeId;
use cairn_proto::limits::{BLOCK_BYTES, COLLECT_RUNS_MAX};
use cairn_proto::message::{Collect, Copy, CopyHole, Failed, FailureKind, Message, Read, Write, WriteData};
use cairn_proto::units::BlockRange;

use super::{DeviceHost, Queued, ReplicaStore, Request, Task};
use crate::store::api::{Content, CopiedBlock, StoreRequest, WriteContent};

/// What a collect costs in the queues, in blocks: about the index pages that it reads.
const COLLECT_COST_BLOCKS: u32 = 16;

impl<S: ReplicaStore> DeviceHost<S> {
    pub(super) fn write(&mut self, request: &Request, write: Write) {
        let (volume, range) = (write.holder.volume, write.range);
        let checked = self.authorize_change(request).and_then(|()| match &write.data {
            WriteData::Data { bytes, checksums } => {
                let blocks = (0..range.count()).zip(checksums.iter().copied());
                self.verify(volume, range, blocks, bytes)
            }
            WriteData::Zero | WriteData::Discard => Ok(()),
        });
        if let Err(failed) = checked {
            return self.answer(request, Message::Failed(failed));
        }
        let group = write.holder.group(write.group);
        let stable = write.stable;
        let (cost, content) = match write.data {
            WriteData::Data { bytes, checksums } => (range.count(), WriteContent::Data { bytes, checksums }),
            WriteData::Zero => (1, WriteContent::Zero),
            WriteData::Discard => (1, WriteContent::Discard),
        };
        let work = StoreRequest::Write {
            group,
            layer: write.layer,
            range,
            version: write.version,
            content,
        };
        self.enqueue(request, cost, Task::Write { group, stable }, work);
    }

    pub(super) fn copy(&mut self, request: &Request, copy: Copy) {
        let checked = self.authorize_change(request).and_then(|()| self.verify_copy(&copy));
        match checked {
            Ok(()) => self.enqueue_copy(request, copy),
            Err(failed) => self.answer(request, Message::Failed(failed)),
        }
    }

    /// A copy whose content was fetched, and verified. Meanwhile a higher generation may have been sealed: then it is not
    /// written.
    pub(super) fn write_fetched(&mut self, request: &Request, copy: Copy, is_planted: bool) {
        match self.authorize_change(request) {
            Err(failed) if !is_planted => self.answer(request, Message::Failed(failed)),
            _ => self.enqueue_copy(request, copy),
        }
    }

    /// The planted bug: its holder takes it for durable, and nobody waits for it.
    #[cfg(feature = "canary")]
    pub(super) fn write_acked(&mut self, request: &Request, copy: Copy) {
        let commit = self.store.commit();
        self.answer(
            request,
            Message::Durable(cairn_proto::message::Durable {
                commit,
                ..Default::default()
            }),
        );
        let (key, cost) = ((request.holder.volume, request.class), copy.range.count());
        let (task, work) = (Task::Copy, copy_request(copy));
        let request = None;
        self.queues.push(key, cost, Queued { request, task, work });
    }

    pub(super) fn verify_copy(&self, copy: &Copy) -> Result<(), Failed> {
        let with_data = (0..copy.range.count())
            .zip(&copy.blocks)
            .filter_map(|(i, block)| match block.content {
                Content::Data(checksum) => Some((i, checksum)),
                _ => None,
            });
        self.verify(copy.holder.volume, copy.range, with_data, &copy.bytes)
    }

    fn enqueue_copy(&mut self, request: &Request, copy: Copy) {
        let cost = copy.range.count();
        self.enqueue(request, cost, Task::Copy, copy_request(copy));
    }

    pub(super) fn copy_hole(&mut self, request: &Request, copy: CopyHole) {
        if let Err(failed) = self.authorize_change(request) {
            return self.answer(request, Message::Failed(failed));
        }
        let work = StoreRequest::CopyHole {
            group: copy.holder.group(copy.group),
            layer: copy.layer,
            range: copy.range,
            block: CopiedBlock {
                content: copy.state.content,
                version: copy.state.version,
            },
            apply: copy.apply(),
        };
        self.enqueue(request, 1, Task::Copy, work);
    }

    pub(super) fn read(&mut self, request: &Request, read: &Read) {
        if let Err(failed) = self.authorize(request, Rights::Read) {
            return self.answer(request, Message::Failed(failed));
        }
        let work = StoreRequest::Read {
            group: read.holder.group(read.group),
            layer: read.layer,
            range: read.range,
        };
        let blocks = read.range.count();
        self.enqueue(request, blocks, Task::Read { blocks }, work);
    }

    pub(super) fn collect(&mut self, request: &Request, collect: &Collect) {
        if let Err(failed) = self.authorize(request, Rights::Write) {
            return self.answer(request, Message::Failed(failed));
        }
        let work = StoreRequest::Collect {
            group: collect.holder.group(collect.group),
            from: collect.from,
            to: collect.to,
            above: collect.above,
            runs_max: COLLECT_RUNS_MAX,
        };
        self.enqueue(request, COLLECT_COST_BLOCKS, Task::Collect, work);
    }

    fn enqueue(&mut self, request: &Request, cost: u32, task: Task, work: StoreRequest) {
        let key = (request.holder.volume, request.class);
        let request = Some(*request);
        self.queues.push(key, cost, Queued { request, task, work });
    }

    pub(super) fn authorize_change(&self, request: &Request) -> Result<(), Failed> {
        match self.authorize(request, Rights::Write) {
            Err(failed) if failed.kind == FailureKind::Fenced && self.ignores_generation() => Ok(()),
            checked => checked,
        }
    }

    /// The blocks are what their sender computed the checksums of, and are where they belong. `blocks` names those that
    /// `bytes` has, in order.
    fn verify(
        &self,
        volume: VolumeId,
        range: BlockRange,
        blocks: impl Iterator<Item = (u32, Checksum)>,
        bytes: &Bytes,
    ) -> Result<(), Failed> {
        if self.trusts_checksums() {
            return Ok(());
        }
        for ((index, stated), content) in blocks.zip(bytes.chunks_exact(BLOCK_BYTES)) {
            let block = range.volume_block(index);
            let computed = block_checksum(volume, block, content);
            if computed != stated {
                let words = format!(
                    "block {block} of volume {volume} came with checksum {:08x} and content of {:08x}: it was damaged \
                     on the way, send it again",
                    stated.0, computed.0
                );
                return Err(Failed::new(FailureKind::ChecksumMismatch, words));
            }
        }
        Ok(())
    }

    #[cfg(feature = "canary")]
    fn trusts_checksums(&self) -> bool {
        self.config.canary == super::Canary::ChecksumUnverified
    }

    #[cfg(not(feature = "canary"))]
    fn trusts_checksums(&self) -> bool {
        false
    }
}

fn copy_request(copy: Copy) -> StoreRequest {
    let apply = copy.apply();
    let blocks = copy.blocks.iter().map(|block| CopiedBlock {
        content: block.content,
        version: block.version,
    });
    StoreRequest::Copy {
        group: copy.holder.group(copy.group),
        layer: copy.layer,
        range: copy.range,
        blocks: blocks.collect(),
        bytes: copy.bytes,
        apply,
    }
}
