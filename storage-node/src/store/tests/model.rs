//! What a store must hold, kept as plainly as can be, and random requests.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use cairn_proto::block::{Apply, BlockState, Content, Cursor};
use cairn_proto::buffer::align;
use cairn_proto::checksum::block_checksum;
use cairn_proto::ids::{Generation, Layer, Seq, Version, VolumeId};
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::units::BlockRange;

use super::rig::*;
use crate::store::api::{CopiedBlock, StoreReply, StoreRequest, WriteContent};
use crate::testing::Prng;

/// A block's name: chunk, layer, block.
type Key = (u32, u32, u32);

/// What a group's replica holds.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Model {
    pub(crate) replica: Option<u8>,
    pub(crate) seal: u32,
    /// All blocks but those never written. The checksum stands for the content.
    pub(crate) blocks: BTreeMap<Key, BlockState>,
}

impl Model {
    pub(crate) fn apply(&mut self, request: &StoreRequest) {
        match request {
            StoreRequest::Seal { volume, .. } if *volume != GROUP.volume => {}
            StoreRequest::Seal { generation, .. } => self.seal = self.seal.max(generation.get()),
            StoreRequest::CreateReplica { role, .. } => self.replica = Some(*role),
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
                for i in 0..range.count() {
                    let content = match content {
                        WriteContent::Data { checksums, .. } => Content::Data(checksums[i as usize]),
                        WriteContent::Zero => Content::Zero,
                        WriteContent::Discard => Content::Absent,
                    };
                    self.set(*layer, range, i, content, *version, Apply::IfNewer);
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
                    self.set(*layer, range, i, block.content, block.version, *apply);
                }
            }
            StoreRequest::Read { .. } | StoreRequest::Collect { .. } | StoreRequest::SaveScrub { .. } => {}
        }
    }

    fn set(&mut self, layer: Layer, range: &BlockRange, i: u32, content: Content, version: Version, apply: Apply) {
        let key = (range.chunk().0, layer.0, range.start() + i);
        let held = self.blocks.get(&key).map_or(Version::ZERO, |state| state.version);
        if apply.applies(held, version) {
            self.blocks.insert(key, BlockState { content, version });
        }
    }

    pub(crate) fn data_blocks(&self) -> u64 {
        let data = self
            .blocks
            .values()
            .filter(|state| matches!(state.content, Content::Data(_)));
        data.count() as u64
    }

    /// What a store holds, by its own account; fails if it returns content that is not what it says.
    pub(crate) fn observe(rig: &mut Rig) -> Result<Model, String> {
        let mut model = Model {
            replica: rig.store.replica_of(GROUP).map(|replica| replica.role),
            seal: rig.store.seal_of(GROUP.volume).get(),
            blocks: BTreeMap::new(),
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
        let key = |block: u32| (range.chunk().0, layer.0, block);
        if !matches!(state.content, Content::Data(_)) {
            self.blocks
                .extend((range.start()..range.end()).map(|block| (key(block), state)));
            return Ok(());
        }
        let mut start = range.start();
        while start < range.end() {
            let piece = BlockRange::new(range.chunk(), start, (range.end() - start).min(256)).unwrap();
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
            for (block, read) in (piece.start()..).zip(blocks) {
                if read.version != state.version || !matches!(read.content, Content::Data(_)) {
                    return Err(format!("block {block} is listed as {state:?} and read as {read:?}"));
                }
                self.blocks.insert(key(block), read);
            }
            start = piece.end();
        }
        Ok(())
    }
}

/// The content of each block must be what the model says was written under its version.
fn check_read(range: BlockRange, blocks: &[BlockState], bytes: &[Bytes]) -> Result<(), String> {
    let bytes = bytes.concat();
    let mut content = bytes.chunks_exact(BLOCK_BYTES);
    for (i, state) in (0..).zip(blocks) {
        let Content::Data(checksum) = state.content else {
            continue;
        };
        let block = content.next().ok_or_else(|| format!("too few bytes for {range}"))?;
        let name = range.volume_block(i);
        if block_checksum(GROUP.volume, name, block) != checksum || block != super::rig::content(name, state.version) {
            return Err(format!(
                "block {i} of {range} does not hold what {} wrote",
                state.version
            ));
        }
    }
    if content.next().is_some() {
        Err(format!("too many bytes for {range}"))
    } else {
        Ok(())
    }
}

/// Random requests, with versions that mostly grow.
#[derive(Clone, Debug)]
pub(crate) struct Workload {
    pub(crate) seq: u64,
    generation: u32,
    /// Blocks that data is written to.
    pub(crate) span: u32,
    pub(crate) largest: u64,
}

impl Workload {
    pub(crate) fn new(span: u32, largest: u64) -> Workload {
        Workload {
            seq: 0,
            generation: 1,
            span,
            largest,
        }
    }

    fn version(&mut self, prng: &mut Prng) -> Version {
        self.seq += 1;
        let late = if prng.chance(1, 8) { prng.below(6) } else { 0 };
        // No version is used twice, as in life.
        let seq = Seq::new(self.seq.saturating_sub(late) * 16 + self.seq % 16).unwrap();
        Version::new(Generation::new(self.generation).unwrap(), seq)
    }

    fn place(&self, prng: &mut Prng) -> (u32, u32, u32) {
        let chunk = prng.below(2) as u32 * 3;
        let count = if prng.chance(1, 4) {
            prng.between(1, self.largest)
        } else {
            prng.between(1, 4)
        } as u32;
        let start = prng.below(u64::from(self.span - count.min(self.span - 1))) as u32;
        (chunk, start, count.min(self.span - start))
    }

    pub(crate) fn request(&mut self, prng: &mut Prng, alone: bool) -> StoreRequest {
        let (chunk, start, count) = self.place(prng);
        let layer = Layer(u32::from(prng.chance(1, 6)));
        let version = self.version(prng);
        let at = range(chunk, start, count);
        match prng.below(if alone { 24 } else { 20 }) {
            0..=11 => {
                let bytes = contents(at, version);
                let checksums = cairn_proto::checksum::range_checksums(GROUP.volume, at, &bytes);
                write(layer, at, version, WriteContent::Data { bytes, checksums })
            }
            12..=14 => {
                let content = if prng.chance(1, 2) {
                    WriteContent::Zero
                } else {
                    WriteContent::Discard
                };
                let at = match prng.below(4) {
                    0 => BlockRange::whole(at.chunk()),
                    1 => range(chunk, start / 256 * 256, 256 * prng.between(1, 3) as u32),
                    _ => at,
                };
                write(layer, at, version, content)
            }
            15..=17 => self.copy(prng, layer, at, Apply::IfNewer),
            18 => {
                self.generation += u32::from(prng.chance(1, 8));
                StoreRequest::Seal {
                    volume: GROUP.volume,
                    generation: Generation::new(self.generation).unwrap(),
                }
            }
            19 => StoreRequest::Seal {
                volume: VolumeId(99),
                generation: Generation::new(self.generation).unwrap(),
            },
            20..=22 => {
                let apply = Apply::Resync(Generation::new(self.generation).unwrap());
                self.copy(prng, layer, at, apply)
            }
            _ if prng.chance(1, 6) => StoreRequest::DropReplica { group: GROUP },
            _ => StoreRequest::CreateReplica {
                group: GROUP,
                role: prng.between(1, 2) as u8,
            },
        }
    }

    fn copy(&mut self, prng: &mut Prng, layer: Layer, at: BlockRange, apply: Apply) -> StoreRequest {
        let mut blocks = Vec::new();
        let mut bytes = BytesMut::new();
        for i in 0..at.count() {
            let version = self.version(prng);
            let content = match prng.below(4) {
                0 => Content::Zero,
                1 => Content::Absent,
                _ => {
                    let block = content(at.volume_block(i), version);
                    bytes.extend_from_slice(&block);
                    Content::Data(block_checksum(GROUP.volume, at.volume_block(i), &block))
                }
            };
            blocks.push(CopiedBlock { content, version });
        }
        StoreRequest::Copy {
            group: GROUP,
            layer,
            range: at,
            blocks,
            bytes: align(bytes.freeze()),
            apply,
        }
    }
}

fn write(layer: Layer, range: BlockRange, version: Version, content: WriteContent) -> StoreRequest {
    StoreRequest::Write {
        group: GROUP,
        layer,
        range,
        version,
        content,
    }
}

/// Where the two differ first, for people.
pub(crate) fn difference(expected: &Model, found: &Model) -> String {
    if (expected.replica, expected.seal) != (found.replica, found.seal) {
        let (e, f) = ((expected.replica, expected.seal), (found.replica, found.seal));
        return format!("replica and seal are {f:?}, expected {e:?}");
    }
    let keys: std::collections::BTreeSet<&Key> = expected.blocks.keys().chain(found.blocks.keys()).collect();
    let differ = keys
        .into_iter()
        .find(|key| expected.blocks.get(key) != found.blocks.get(key));
    differ.map_or("nothing".to_string(), |key| {
        let (expected, found) = (expected.blocks.get(key), found.blocks.get(key));
        format!("block {key:?} (chunk, layer, block) is {found:?}, expected {expected:?}")
    })
}
