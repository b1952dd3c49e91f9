//! The records of a batch: what it changes. One file per type; the layouts are in DESIGN.md.
//!
//! A record is framed by its type (`u8`), a zero byte, and its length in bytes with this head (`u16`).

mod ahead;
mod copy;
mod header;
mod layer;
mod marker;
mod moved;
mod reclaim;
mod replica;
mod scrub;
mod seal;
#[cfg(test)]
mod tests;
mod write;

use cairn_proto::checksum::Checksum;
use cairn_proto::codec::{DecodeError, Put, Reader};
use cairn_proto::ids::{ChunkIndex, Epoch, Generation, GroupId, GroupIndex, Layer, Version, VolumeId};
use cairn_proto::units::BlockRange;

pub(super) use ahead::LogAhead;
pub(super) use header::{BatchHeader, HeaderError, body_capacity};
pub(super) use marker::MarkerKind;
pub(super) use reclaim::DOOMED_BYTES;

use super::chunk::ChunkKey;
use super::doomed::Doomed;
use super::entry::{Entry, Uniform, check_place};
use super::scrub_state::ScrubState;

/// Where a record applies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Target {
    pub(super) group: GroupId,
    pub(super) layer: Layer,
    pub(super) range: BlockRange,
}

/// Device blocks that follow each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Extent {
    pub(super) place: u32,
    pub(super) count: u32,
}

/// A block that was copied to another place on the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Moved {
    pub(super) from: u32,
    pub(super) to: u32,
    pub(super) checksum: Checksum,
}

/// One change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Record {
    /// Blocks of data with one version. Applies whatever is there: only blocks that apply are recorded.
    Data {
        at: Target,
        version: Version,
        checksums: Vec<Checksum>,
        extents: Vec<Extent>,
    },
    /// Zeroes where what is there is older.
    Zero { at: Target, version: Version },
    /// Absence where what is there is older.
    Discard { at: Target, version: Version },
    /// A hole where what is there gives way to a resync copy of this generation.
    ResyncHole {
        at: Target,
        hole: Uniform,
        generation: Generation,
    },
    /// Blocks each with a version of its own. Applies whatever is there.
    Copy { at: Target, entries: Vec<Entry> },
    /// The highest generation seen of a volume.
    Seal { volume: VolumeId, generation: Generation },
    /// A group has a replica here, with this role since this epoch.
    Replica { group: GroupId, role: u8, epoch: Epoch },
    /// A group has no replica here any more.
    DropReplica { group: GroupId },
    /// Blocks that are elsewhere now, where they are still where they were.
    Move { at: Target, moves: Vec<Moved> },
    /// A layer of a group is gone.
    DeleteLayer { group: GroupId, layer: Layer },
    /// Nothing changes: the batch before is confirmed.
    Marker { kind: MarkerKind, recovered: u64 },
    /// Absent blocks of a chunk have at least this version.
    Floor {
        group: GroupId,
        layer: Layer,
        chunk: ChunkIndex,
        version: Version,
    },
    /// How far the scrub of the device is.
    Scrub(ScrubState),
    /// Pages of a chunk that was dropped give their space back.
    Reclaim { key: ChunkKey, first: u8, last: u8 },
    /// All of what was dropped has given its space back.
    Reclaimed { doomed: Doomed },
}

const HEAD_BYTES: usize = 4;
const TARGET_BYTES: usize = 28;

impl Record {
    fn number(&self) -> u8 {
        match self {
            Record::Data { .. } => 1,
            Record::Zero { .. } => 2,
            Record::Discard { .. } => 3,
            Record::Copy { .. } => 4,
            Record::Seal { .. } => 5,
            Record::Replica { .. } => 6,
            Record::DropReplica { .. } => 7,
            Record::Move { .. } => 8,
            Record::DeleteLayer { .. } => 9,
            Record::Marker { .. } => 10,
            Record::Floor { .. } => 11,
            Record::Scrub(_) => 12,
            Record::Reclaim { .. } => 13,
            Record::Reclaimed { .. } => 14,
            Record::ResyncHole { .. } => 15,
        }
    }

    /// Bytes it takes in a batch.
    pub(super) fn encoded_bytes(&self) -> usize {
        HEAD_BYTES
            + match self {
                Record::Data { checksums, extents, .. } => write::data_bytes(checksums.len(), extents.len()),
                Record::Zero { .. } | Record::Discard { .. } => write::HOLE_BYTES,
                Record::ResyncHole { .. } => write::RESYNC_HOLE_BYTES,
                Record::Copy { entries, .. } => copy::bytes(entries.len()),
                Record::Seal { .. } => seal::BYTES,
                Record::Replica { .. } | Record::DropReplica { .. } => replica::BYTES,
                Record::Move { moves, .. } => moved::bytes(moves.len()),
                Record::DeleteLayer { .. } => layer::DELETE_BYTES,
                Record::Marker { .. } => marker::BYTES,
                Record::Floor { .. } => layer::FLOOR_BYTES,
                Record::Scrub(_) => scrub::BYTES,
                Record::Reclaim { .. } => reclaim::RECLAIM_BYTES,
                Record::Reclaimed { .. } => reclaim::DOOMED_BYTES,
            }
    }

    /// What a write of so many blocks in so many extents takes.
    pub(super) fn data_bytes(blocks: usize, extents: usize) -> usize {
        HEAD_BYTES + write::data_bytes(blocks, extents)
    }

    /// What a copy of so many blocks takes.
    pub(super) fn copy_bytes(blocks: usize) -> usize {
        HEAD_BYTES + copy::bytes(blocks)
    }

    /// Appends the record.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let bytes = self.encoded_bytes();
        let start = out.len();
        out.put_u8(self.number());
        out.put_u8(0);
        out.put_u16(u16::try_from(bytes).expect("a record is bounded by its request"));
        match self {
            Record::Data {
                at,
                version,
                checksums,
                extents,
            } => write::encode_data(out, at, *version, checksums, extents),
            Record::Zero { at, version } | Record::Discard { at, version } => write::encode_hole(out, at, *version),
            Record::ResyncHole { at, hole, generation } => write::encode_resync_hole(out, at, *hole, *generation),
            Record::Copy { at, entries } => copy::encode(out, at, entries),
            Record::Seal { volume, generation } => seal::encode(out, *volume, *generation),
            Record::Replica { group, role, epoch } => replica::encode(out, *group, *role, *epoch),
            Record::DropReplica { group } => replica::encode(out, *group, 0, Epoch(0)),
            Record::Move { at, moves } => moved::encode(out, at, moves),
            Record::DeleteLayer { group, layer } => layer::encode_delete(out, *group, *layer),
            Record::Marker { kind, recovered } => marker::encode(out, *kind, *recovered),
            Record::Floor {
                group,
                layer,
                chunk,
                version,
            } => layer::encode_floor(out, *group, *layer, *chunk, *version),
            Record::Scrub(state) => scrub::encode(out, state),
            Record::Reclaim { key, first, last } => reclaim::encode_reclaim(out, *key, *first, *last),
            Record::Reclaimed { doomed } => doomed.encode(out),
        }
        debug_assert_eq!(out.len() - start, bytes, "length of {self:?}");
    }

    /// Reads a record. `end` is the first block after the space.
    pub(super) fn decode(reader: &mut Reader<'_>, end: u32) -> Result<Record, DecodeError> {
        let number = reader.u8()?;
        reader.zeroes(1)?;
        let bytes = usize::from(reader.u16()?);
        let body = bytes.checked_sub(HEAD_BYTES).ok_or(DecodeError::Invalid("length"))?;
        let mut body = Reader::new(reader.bytes(body)?);
        let record = match number {
            1 => write::decode_data(&mut body, end),
            2 => write::decode_hole(&mut body).map(|(at, version)| Record::Zero { at, version }),
            3 => write::decode_hole(&mut body).map(|(at, version)| Record::Discard { at, version }),
            4 => copy::decode(&mut body, end),
            5 => seal::decode(&mut body),
            6 => replica::decode(&mut body).map(|(group, role, epoch)| Record::Replica { group, role, epoch }),
            7 => match replica::decode(&mut body)? {
                (group, 0, Epoch(0)) => Ok(Record::DropReplica { group }),
                _ => Err(DecodeError::Invalid("role or epoch")),
            },
            8 => moved::decode(&mut body, end),
            9 => layer::decode_delete(&mut body),
            10 => marker::decode(&mut body),
            11 => layer::decode_floor(&mut body),
            12 => scrub::decode(&mut body),
            13 => reclaim::decode_reclaim(&mut body),
            14 => Doomed::decode(&mut body).map(|doomed| Record::Reclaimed { doomed }),
            15 => write::decode_resync_hole(&mut body),
            _ => Err(DecodeError::Invalid("record type")),
        }?;
        body.finish()?;
        Ok(record)
    }

    /// The blocks of data that it says stand on the device: volume, block of the volume, place, checksum.
    pub(super) fn data(&self, mut visit: impl FnMut(VolumeId, u64, u32, Checksum)) {
        match self {
            Record::Data {
                at, checksums, extents, ..
            } => {
                let places = extents
                    .iter()
                    .flat_map(|extent| extent.place..extent.place + extent.count);
                for (i, (place, checksum)) in (0..).zip(places.zip(checksums)) {
                    visit(at.group.volume, at.range.volume_block(i), place, *checksum);
                }
            }
            Record::Copy { at, entries } => {
                for (i, entry) in (0..).zip(entries) {
                    if let Some(place) = entry.data_place() {
                        visit(
                            at.group.volume,
                            at.range.volume_block(i),
                            place,
                            Checksum(entry.checksum),
                        );
                    }
                }
            }
            Record::Move { at, moves } => {
                for (i, moved) in (0..).zip(moves) {
                    visit(at.group.volume, at.range.volume_block(i), moved.to, moved.checksum);
                }
            }
            _ => {}
        }
    }
}

/// Volume `u64`, group `u8`, three zero bytes, layer, chunk, first block, count as `u32`.
fn put_target(out: &mut Vec<u8>, at: &Target) {
    put_group(out, at.group);
    out.put_u32(at.layer.0);
    out.put_u32(at.range.chunk().0);
    out.put_u32(at.range.start());
    out.put_u32(at.range.count());
}

fn get_target(reader: &mut Reader<'_>) -> Result<Target, DecodeError> {
    let group = get_group(reader)?;
    let layer = Layer(reader.u32()?);
    let chunk = ChunkIndex(reader.u32()?);
    let range = BlockRange::new(chunk, reader.u32()?, reader.u32()?).ok_or(DecodeError::Invalid("range"))?;
    Ok(Target { group, layer, range })
}

pub(super) fn put_group(out: &mut Vec<u8>, group: GroupId) {
    out.put_u64(group.volume.0);
    out.put_u8(group.index.0);
    out.put_bytes(&[0; 3]);
}

pub(super) fn get_group(reader: &mut Reader<'_>) -> Result<GroupId, DecodeError> {
    let group = GroupId {
        volume: VolumeId(reader.u64()?),
        index: GroupIndex(reader.u8()?),
    };
    reader.zeroes(3)?;
    Ok(group)
}

fn check_extent(extent: Extent, end: u32) -> Result<(), DecodeError> {
    let last = extent
        .count
        .checked_sub(1)
        .and_then(|more| extent.place.checked_add(more));
    check_place(extent.place, end)?;
    check_place(last.ok_or(DecodeError::Invalid("extent"))?, end)
}

/// A count of blocks that a request can have.
fn check_blocks(range: &BlockRange) -> Result<usize, DecodeError> {
    if range.count() > super::limits::REQUEST_BLOCKS_MAX {
        return Err(DecodeError::Invalid("range"));
    }
    Ok(range.count() as usize)
}
