//! What a guest does with its disk: the load on one volume, as one client runs it.

use std::collections::BTreeMap;

use cairn_client::volume::api::{OpId, VolumeOp};
use cairn_proto::ids::VolumeId;
use cairn_proto::limits::{CHUNK_BYTES, SECTOR_BYTES};

use super::options::VolumeOptions;
use crate::checker::history::{OpKind, OpNumber};
use crate::checker::pattern::{SECTORS_PER_BLOCK, fill};
use crate::rng::Rng;

/// Operations that may be under way on one block: the check of a history takes time exponential in this.
const OVERLAP_MAX: u32 = 4;

/// One operation to do.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// For the history.
    pub kind: OpKind,
    /// From which sector on.
    pub sector: u64,
    /// How many.
    pub sectors: u64,
    /// How.
    how: How,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum How {
    Read,
    Write,
    Discard,
    WriteZeroes { may_discard: bool },
    Flush,
    Status,
}

impl Plan {
    /// Reads a run of blocks.
    pub fn read(first_block: u64, blocks: u64) -> Plan {
        let per_block = SECTORS_PER_BLOCK as u64;
        Plan {
            kind: OpKind::Read,
            sector: first_block * per_block,
            sectors: blocks * per_block,
            how: How::Read,
        }
    }

    /// As the volume takes it.
    pub fn request(&self, volume: VolumeId, number: OpNumber) -> VolumeOp {
        let offset = self.sector * SECTOR_BYTES as u64;
        let length = self.sectors * SECTOR_BYTES as u64;
        let short = u32::try_from(length).expect("reads are short");
        match self.how {
            How::Read => VolumeOp::Read { offset, length: short },
            How::Write => VolumeOp::Write {
                offset,
                data: fill(volume, self.sector, self.sectors as usize, number),
            },
            How::Discard => VolumeOp::Discard { offset, length },
            How::WriteZeroes { may_discard } => VolumeOp::WriteZeroes {
                offset,
                length,
                may_discard,
            },
            How::Flush => VolumeOp::Flush,
            How::Status => VolumeOp::BlockStatus { offset, length },
        }
    }

    fn blocks(&self) -> std::ops::Range<u64> {
        let per_block = SECTORS_PER_BLOCK as u64;
        self.sector / per_block..(self.sector + self.sectors).div_ceil(per_block)
    }
}

/// What a play about few blocks lets a guest do, in place of what its volume's load says.
#[derive(Clone, Copy, Debug)]
pub struct Aim {
    /// First block and count.
    pub focus: (u64, u64),
    /// How often each kind of operation comes.
    pub mix: [u32; 7],
}

/// A client's use of one volume, from opening it to closing it or to the client's end.
pub struct Guest {
    /// Told apart in the history.
    pub session: u32,
    /// Operations without an answer.
    pub in_flight: BTreeMap<OpId, (OpNumber, Plan)>,
    /// How many operations are under way on each block.
    busy: BTreeMap<u64, u32>,
    /// What it does in place of its usual load.
    pub aim: Option<Aim>,
    next_op: u64,
    rng: Rng,
}

impl Guest {
    /// One that has done nothing yet.
    pub fn new(session: u32, rng: Rng) -> Guest {
        Guest {
            session,
            in_flight: BTreeMap::new(),
            busy: BTreeMap::new(),
            aim: None,
            next_op: 0,
            rng,
        }
    }

    /// What it does next; `None` when all places are busy.
    pub fn plan(&mut self, options: &VolumeOptions) -> Option<Plan> {
        for _ in 0..4 {
            let plan = self.draw(options);
            let crowded =
                plan.kind != OpKind::Other && self.busy.range(plan.blocks()).any(|(_, count)| *count >= OVERLAP_MAX);
            if !crowded {
                return Some(plan);
            }
        }
        None
    }

    fn draw(&mut self, options: &VolumeOptions) -> Plan {
        let rng = &mut self.rng;
        let per_block = SECTORS_PER_BLOCK as u64;
        let (first, count) = match self.aim {
            Some(aim) => aim.focus,
            None => *rng.pick(&options.regions),
        };
        let mix = self.aim.map_or(options.mix, |aim| aim.mix);
        let blocks = rng.within(1, options.blocks_max.min(count));
        let block = first + rng.below(count - blocks + 1);
        let (mut sector, mut sectors) = (block * per_block, blocks * per_block);
        let (kind, how) = match rng.weighted(&mix) {
            0 => (OpKind::Read, How::Read),
            1 => (OpKind::Write, How::Write),
            2 => {
                (sector, sectors) = part(rng, sector, sectors);
                match rng.permille(200) {
                    true => (OpKind::Read, How::Read),
                    false => (OpKind::Write, How::Write),
                }
            }
            3 => {
                if rng.permille(300) {
                    (sector, sectors) = part(rng, sector, sectors);
                } else if rng.permille(50) {
                    (sector, sectors) = chunk_around(sector, options.bytes);
                }
                (OpKind::Zero, How::Discard)
            }
            4 => {
                if rng.permille(300) {
                    (sector, sectors) = part(rng, sector, sectors);
                }
                let may_discard = rng.permille(500);
                (OpKind::Zero, How::WriteZeroes { may_discard })
            }
            5 => (OpKind::Other, How::Flush),
            _ => (OpKind::Other, How::Status),
        };
        Plan {
            kind,
            sector,
            sectors,
            how,
        }
    }

    /// The operation is under way.
    pub fn begin(&mut self, number: OpNumber, plan: Plan) -> OpId {
        self.next_op += 1;
        let op = OpId(self.next_op);
        self.in_flight.insert(op, (number, plan));
        self.count(&plan, true);
        op
    }

    /// It has ended.
    pub fn end(&mut self, op: OpId) -> Option<(OpNumber, Plan)> {
        let (number, plan) = self.in_flight.remove(&op)?;
        self.count(&plan, false);
        Some((number, plan))
    }

    fn count(&mut self, plan: &Plan, begin: bool) {
        let blocks = plan.blocks();
        // A discard of everything would fill the map; it meets whatever else goes on by chance.
        if plan.kind == OpKind::Other || blocks.end - blocks.start > 1024 {
            return;
        }
        for block in blocks {
            let count = self.busy.entry(block).or_default();
            *count = if begin { *count + 1 } else { *count - 1 };
            if *count == 0 {
                self.busy.remove(&block);
            }
        }
    }
}

/// The whole chunk that a sector lies in, or what there is of it.
fn chunk_around(sector: u64, volume_bytes: u64) -> (u64, u64) {
    let per_chunk = CHUNK_BYTES / SECTOR_BYTES as u64;
    let first = sector / per_chunk * per_chunk;
    let end = volume_bytes / SECTOR_BYTES as u64;
    (first, per_chunk.min(end - first))
}

/// Some of the sectors of a run, never none.
fn part(rng: &mut Rng, sector: u64, sectors: u64) -> (u64, u64) {
    let from = rng.below(sectors);
    let count = rng.within(1, sectors - from);
    (sector + from, count)
}
