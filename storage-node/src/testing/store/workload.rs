//! Random requests, with versions that mostly grow.

use bytes::BytesMut;
use cairn_proto::block::{Apply, Content};
use cairn_proto::buffer::align;
use cairn_proto::checksum::block_checksum;
use cairn_proto::ids::{Epoch, Generation, Layer, Seq, Version, VolumeId};
use cairn_proto::units::BlockRange;

use super::content::{GROUP, content, data, range, write};
use crate::store::api::{CopiedBlock, StoreRequest, WriteContent};
use crate::testing::Prng;

/// A source of requests to [`GROUP`].
#[derive(Clone, Debug)]
pub struct Workload {
    /// Counts versions.
    pub seq: u64,
    generation: u32,
    /// Blocks of each chunk that data is written to.
    pub span: u32,
    /// Blocks of one request of data at the most.
    pub largest: u64,
}

impl Workload {
    /// Requests of at most `largest` blocks of data, within the first `span` blocks of two chunks, in two layers.
    pub fn new(span: u32, largest: u64) -> Workload {
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
        let seq = Seq::new(self.seq.saturating_sub(late) * 16 + self.seq % 16).expect("small numbers");
        Version::new(Generation::new(self.generation).expect("small numbers"), seq)
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

    /// The next request. `alone` says that none is in flight: then it may be one that others must not overtake.
    pub fn request(&mut self, prng: &mut Prng, alone: bool) -> StoreRequest {
        let (chunk, start, count) = self.place(prng);
        let layer = Layer(u32::from(prng.chance(1, 6)));
        let version = self.version(prng);
        let at = range(chunk, start, count);
        match prng.below(if alone { 28 } else { 20 }) {
            0..=11 => write(layer, at, version, data(at, version)),
            12..=14 => {
                let content = if prng.chance(1, 2) {
                    WriteContent::Zero
                } else {
                    WriteContent::Discard
                };
                write(layer, long(prng, at), version, content)
            }
            15 if prng.chance(1, 2) => self.copy_hole(prng, layer, at, Apply::IfNewer),
            15..=17 => self.copy(prng, layer, at, Apply::IfNewer),
            18 => {
                self.generation += u32::from(prng.chance(1, 8));
                StoreRequest::Seal {
                    volume: GROUP.volume,
                    generation: Generation::new(self.generation).expect("small numbers"),
                }
            }
            19 => StoreRequest::Seal {
                volume: VolumeId(99),
                generation: Generation::new(self.generation).expect("small numbers"),
            },
            20..=22 => {
                let apply = Apply::Resync(Generation::new(self.generation).expect("small numbers"));
                self.copy(prng, layer, at, apply)
            }
            23 => StoreRequest::RaiseFloor {
                group: GROUP,
                layer,
                chunk: at.chunk(),
                version,
            },
            24..=25 => {
                let apply = Apply::Resync(Generation::new(self.generation).expect("small numbers"));
                self.copy_hole(prng, layer, at, apply)
            }
            26 => StoreRequest::DeleteLayer { group: GROUP, layer },
            _ if prng.chance(1, 6) => StoreRequest::DropReplica {
                group: GROUP,
                epoch: Epoch(1),
            },
            _ => StoreRequest::CreateReplica {
                group: GROUP,
                role: prng.between(1, 2) as u8,
                epoch: Epoch(prng.between(1, 3)),
            },
        }
    }

    fn copy_hole(&mut self, prng: &mut Prng, layer: Layer, at: BlockRange, apply: Apply) -> StoreRequest {
        let (content, version) = match prng.below(4) {
            0..=1 => (Content::Absent, self.version(prng)),
            2 => (Content::Zero, self.version(prng)),
            _ => (Content::Absent, Version::ZERO),
        };
        StoreRequest::CopyHole {
            group: GROUP,
            layer,
            range: long(prng, at),
            block: CopiedBlock { content, version },
            apply,
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

/// Where a hole goes: now and then a whole chunk, or whole index pages.
fn long(prng: &mut Prng, at: BlockRange) -> BlockRange {
    match prng.below(4) {
        0 => BlockRange::whole(at.chunk()),
        1 => range(at.chunk().0, at.start() / 256 * 256, 256 * prng.between(1, 3) as u32),
        _ => at,
    }
}
