//! What a store must hold, kept as plainly as can be.

use bytes::Bytes;
use cairn_proto::block::{Apply, BlockState, Content, Cursor};
use cairn_proto::ids::{Epoch, Layer, Version};
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::units::BlockRange;

use super::blocks::Blocks;
use super::content::{GROUP, content};
use super::rig::Rig;
use crate::store::api::{StoreReply, StoreRequest, WriteContent};

/// What a group's replica holds.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Model {
    /// The replica's epoch and role, if there is one.
    pub replica: Option<(Epoch, u8)>,
    /// The highest generation sealed; zero if none.
    pub seal: u32,
    /// All blocks but those never written. The checksum stands for the content.
    pub blocks: Blocks,
}

impl Model {
    /// A device that was just formatted.
    pub const NOTHING: Model = Model {
        replica: None,
        seal: 0,
        blocks: Blocks::NONE,
    };

    /// Does what a request asks for, as the store must if it answers that it is durable.
    pub fn apply(&mut self, request: &StoreRequest) {
        match request {
            StoreRequest::Seal { volume, .. } if *volume != GROUP.volume => {}
            StoreRequest::Seal { generation, .. } => self.seal = self.seal.max(generation.get()),
            StoreRequest::CreateReplica { role, epoch, .. } => {
                if self.replica.is_none_or(|(held, _)| held <= *epoch) {
                    self.replica = Some((*epoch, *role));
                }
            }
            StoreRequest::DropReplica { epoch, .. } if self.replica.is_some_and(|(held, _)| held > *epoch) => {}
            StoreRequest::DropReplica { .. } => {
                self.replica = None;
                self.blocks.clear();
            }
            StoreRequest::Write {
                layer,
                range,
                version,
                content,
                ..
            } => {
                let mut set = |range, content| self.set(*layer, range, content, *version, Apply::IfNewer);
                match content {
                    WriteContent::Data { checksums, .. } => {
                        for (i, checksum) in (0..).zip(checksums) {
                            set(one_of(range, i), Content::Data(*checksum));
                        }
                    }
                    WriteContent::Zero => set(*range, Content::Zero),
                    WriteContent::Discard => set(*range, Content::Absent),
                }
            }
            StoreRequest::Copy {
                layer,
                range,
                blocks,
                apply,
                ..
            } => {
                for (i, block) in (0..).zip(blocks) {
                    self.set(*layer, one_of(range, i), block.content, block.version, *apply);
                }
            }
            StoreRequest::CopyHole {
                layer,
                range,
                block,
                apply,
                ..
            } => self.set(*layer, *range, block.content, block.version, *apply),
            StoreRequest::DeleteLayer { layer, .. } => self.blocks.remove_layer(layer.0),
            StoreRequest::RaiseFloor {
                layer, chunk, version, ..
            } => {
                let lower = |held: BlockState| held.content == Content::Absent && held.version < *version;
                let raised = |held: BlockState| {
                    let version = *version;
                    lower(held).then_some(BlockState { version, ..held })
                };
                self.blocks.update(layer.0, BlockRange::whole(*chunk), raised);
            }
            StoreRequest::Read { .. }
            | StoreRequest::Collect { .. }
            | StoreRequest::Scrub { .. }
            | StoreRequest::Defragment { .. }
            | StoreRequest::SaveScrub { .. } => {}
        }
    }

    fn set(&mut self, layer: Layer, range: BlockRange, content: Content, version: Version, apply: Apply) {
        let new = |held: BlockState| {
            let applies = apply.applies(held.version, version);
            applies.then_some(BlockState { content, version })
        };
        self.blocks.update(layer.0, range, new);
    }

    /// Blocks that hold data.
    pub fn data_blocks(&self) -> u64 {
        self.blocks.data()
    }

    /// What a store holds, by its own account; blocks that it finds damaged are `Damaged`. Fails if it returns content
    /// that is not what it says.
    pub fn observe(rig: &mut Rig) -> Result<Model, String> {
        let mut model = Model {
            replica: rig.store.replica_of(GROUP).map(|replica| (replica.epoch, replica.role)),
            seal: rig.store.seal_of(GROUP.volume).get(),
            blocks: Blocks::NONE,
        };
        if model.replica.is_none() {
            return Ok(model);
        }
        let mut from = Some(Cursor::default());
        while let Some(cursor) = from {
            let request = StoreRequest::Collect {
                group: GROUP,
                from: cursor,
                to: Cursor::END,
                above: Version::ZERO,
                runs_max: 50,
            };
            let StoreReply::Collected { runs, next } = rig.call(request) else {
                return Err(format!("listing from {cursor:?} failed"));
            };
            for run in runs {
                model.observe_run(rig, run.layer, run.range, run.state)?;
            }
            from = next;
        }
        Ok(model)
    }

    fn observe_run(&mut self, rig: &mut Rig, layer: Layer, range: BlockRange, state: BlockState) -> Result<(), String> {
        if !matches!(state.content, Content::Data(_)) {
            self.blocks.set(layer.0, range, state);
            return Ok(());
        }
        let mut start = range.start();
        while start < range.end() {
            let piece =
                BlockRange::new(range.chunk(), start, (range.end() - start).min(256)).expect("a piece of a range");
            let request = StoreRequest::Read {
                group: GROUP,
                layer,
                range: piece,
            };
            let reply = rig.call(request);
            let StoreReply::Read { blocks, bytes } = reply else {
                return Err(format!("a read of {piece} failed: {reply:?}"));
            };
            check_read(piece, &blocks, &bytes)?;
            for (i, read) in (0..).zip(blocks) {
                if read.version != state.version || !matches!(read.content, Content::Data(_) | Content::Damaged) {
                    return Err(format!(
                        "block {i} of {piece} is listed as {state:?} and read as {read:?}"
                    ));
                }
                self.blocks.set(layer.0, one_of(&piece, i), read);
            }
            start = piece.end();
        }
        Ok(())
    }
}

/// The content of each block must be what the model says was written under its version.
fn check_read(range: BlockRange, blocks: &[BlockState], bytes: &[Bytes]) -> Result<(), String> {
    let bytes = bytes.concat();
    let mut left = bytes.chunks_exact(BLOCK_BYTES);
    for (i, state) in (0..).zip(blocks) {
        if !matches!(state.content, Content::Data(_)) {
            continue;
        }
        let block = left.next().ok_or_else(|| format!("too few bytes for {range}"))?;
        let name = range.volume_block(i);
        // The checksum itself is compared with the model's.
        if block != content(name, state.version) {
            return Err(format!(
                "block {i} of {range} does not hold what {} wrote",
                state.version
            ));
        }
    }
    if left.next().is_some() {
        Err(format!("too many bytes for {range}"))
    } else {
        Ok(())
    }
}

/// Where the two differ first, for people.
pub fn difference(expected: &Model, found: &Model) -> String {
    if (expected.replica, expected.seal) != (found.replica, found.seal) {
        let (e, f) = ((expected.replica, expected.seal), (found.replica, found.seal));
        return format!("replica and seal are {f:?}, expected {e:?}");
    }
    expected
        .blocks
        .difference(&found.blocks)
        .map_or("nothing".to_string(), |key| {
            let (expected, found) = (expected.blocks.get(&key), found.blocks.get(&key));
            format!("block {key:?} (chunk, layer, block) is {found:?}, expected {expected:?}")
        })
}

/// A block of a range.
fn one_of(range: &BlockRange, i: u32) -> BlockRange {
    BlockRange::new(range.chunk(), range.start() + i, 1).expect("a block of the range")
}
