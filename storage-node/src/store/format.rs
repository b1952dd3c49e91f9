//! Writing a fresh device.
//!
//! 1. Where superblocks stand, marks are written: what is half written is never taken for a store, and can be formatted
//!    again without being asked for again.
//! 2. An empty checkpoint is written, and the place of the first record is cleared.
//! 3. The superblocks are written, over the marks.

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::disk::{DiskDone, DiskGeometry, DiskOp};
use cairn_proto::ids::DeviceId;

use super::api::StoreAction;
use super::checkpoint_header::CheckpointHeader;
use super::io::Io;
use super::limits::{DEVICE_BLOCKS_MAX, DEVICE_BLOCKS_MIN};
use super::record::LogAhead;
use super::status::{FormatParams, OpenError};
use super::superblock::{CHECKPOINT_PLACES, Identity, SPACE_START, Superblock, mark};

/// Writes a fresh device: hand it completions, take operations, until it is done. The caller has probed the device
/// first: everything on it is lost.
#[derive(Debug)]
pub struct Formatter {
    identity: Identity,
    volatile_cache: bool,
    io: Io,
    in_flight: usize,
    stage: Stage,
    flushed: bool,
    failed: Option<OpenError>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Mark,
    Content,
    Superblocks,
    Done,
}

impl Formatter {
    pub(super) fn new(params: FormatParams, geometry: DiskGeometry) -> Result<Formatter, OpenError> {
        if geometry.blocks < DEVICE_BLOCKS_MIN {
            return Err(OpenError::Length {
                blocks: geometry.blocks,
            });
        }
        let mut formatter = Formatter {
            identity: Identity {
                cluster: params.cluster,
                device: DeviceId {
                    uuid: params.device,
                    incarnation: params.incarnation,
                },
                checksum: params.checksum,
                blocks: geometry.blocks.min(DEVICE_BLOCKS_MAX),
            },
            volatile_cache: geometry.volatile_cache,
            io: Io::default(),
            in_flight: 0,
            stage: Stage::Mark,
            flushed: false,
            failed: None,
        };
        formatter.write_stage();
        Ok(formatter)
    }

    fn write_stage(&mut self) {
        let zero = BlockBuf::zeroed(1).freeze();
        let copies = Superblock::copies(self.identity.blocks).map(|place| place.0);
        let writes: Vec<(u64, Bytes)> = match self.stage {
            Stage::Mark => copies.into_iter().map(|place| (place, mark())).collect(),
            Stage::Content => {
                let header = self.empty_checkpoint();
                let other = CHECKPOINT_PLACES[1 - header.slot()].0;
                let place = CHECKPOINT_PLACES[header.slot()].0;
                vec![(place, header.encode()), (other, zero.clone()), (SPACE_START, zero)]
            }
            Stage::Superblocks => {
                let superblock = |copy| Superblock {
                    identity: self.identity,
                    copy,
                    sequence: 1,
                    compat: 0,
                    ro_compat: 0,
                    incompat: 0,
                };
                (0..)
                    .zip(copies)
                    .map(|(copy, place)| (place, superblock(copy).encode()))
                    .collect()
            }
            Stage::Done => Vec::new(),
        };
        for (place, block) in writes {
            self.in_flight += 1;
            self.io.write(place as u32, vec![block], false);
        }
    }

    fn empty_checkpoint(&self) -> CheckpointHeader {
        CheckpointHeader {
            device: self.identity.device,
            sequence: 1,
            covered: 0,
            covered_crc: 0,
            ahead: LogAhead {
                next: SPACE_START as u32,
                run_left: 0,
                next_run: SPACE_START as u32 + 1,
            },
            directory: 0,
            directory_blocks: 0,
            seals: 0,
            replicas: 0,
            leaves: 0,
            map_pages: 0,
            data_blocks: 0,
            index_blocks: 0,
            used_end: SPACE_START + 2,
        }
    }

    /// An operation of it has completed.
    pub fn handle_disk(&mut self, done: DiskDone) {
        self.in_flight -= 1;
        if let Err(error) = done.result {
            let doing = "formatting it";
            self.failed.get_or_insert(OpenError::Device { doing, error });
        }
        if self.in_flight > 0 || self.failed.is_some() || self.stage == Stage::Done {
            return;
        }
        // Each stage is two rounds on a device with a volatile cache: writes, then a flush.
        if self.volatile_cache && !std::mem::replace(&mut self.flushed, true) {
            self.in_flight += 1;
            self.io.flush();
            return;
        }
        self.flushed = false;
        self.stage = match self.stage {
            Stage::Mark => Stage::Content,
            Stage::Content => Stage::Superblocks,
            Stage::Superblocks | Stage::Done => Stage::Done,
        };
        self.write_stage();
    }

    /// The next operation for the device.
    pub fn poll_op(&mut self) -> Option<DiskOp> {
        match self.io.pop()? {
            StoreAction::Disk(op) => Some(op),
            StoreAction::Reply(..) => unreachable!("formatting answers nobody"),
        }
    }

    /// `None` while it works; then how it ended.
    pub fn result(&self) -> Option<Result<Identity, OpenError>> {
        match &self.failed {
            Some(error) => Some(Err(error.clone())),
            None => (self.stage == Stage::Done).then_some(Ok(self.identity)),
        }
    }
}
