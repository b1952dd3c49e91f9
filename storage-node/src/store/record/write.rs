//! Types 1 to 3 and 15: data, zeroes, absence with one version.

use cairn_proto::checksum::Checksum;
use cairn_proto::codec::{DecodeError, Put, Reader};
use cairn_proto::ids::{Generation, Version};

use super::{Extent, Record, TARGET_BYTES, Target, check_blocks, check_extent, get_target, put_target};
use crate::store::entry::Uniform;

/// Zeroes and absence: target, version.
pub(super) const HOLE_BYTES: usize = TARGET_BYTES + 8;

/// A hole of a resync copy: target, hole (twelve bytes), generation.
pub(super) const RESYNC_HOLE_BYTES: usize = TARGET_BYTES + 12 + 4;

/// Target, version, number of extents, four zero bytes, checksums, extents (place, count).
pub(super) fn data_bytes(blocks: usize, extents: usize) -> usize {
    TARGET_BYTES + 8 + 8 + blocks * 4 + extents * 8
}

pub(super) fn encode_data(out: &mut Vec<u8>, at: &Target, version: Version, sums: &[Checksum], extents: &[Extent]) {
    assert_eq!(sums.len(), at.range.count() as usize, "checksums of {}", at.range);
    let covered: u32 = extents.iter().map(|extent| extent.count).sum();
    assert_eq!(covered, at.range.count(), "extents of {}", at.range);
    put_target(out, at);
    out.put_u64(version.to_bits());
    out.put_u32(extents.len() as u32);
    out.put_u32(0);
    sums.iter().for_each(|checksum| out.put_u32(checksum.0));
    for extent in extents {
        out.put_u32(extent.place);
        out.put_u32(extent.count);
    }
}

pub(super) fn decode_data(reader: &mut Reader<'_>, end: u32) -> Result<Record, DecodeError> {
    let at = get_target(reader)?;
    let version = Version::from_bits(reader.u64()?);
    let blocks = check_blocks(&at.range)?;
    let extents = reader.count("extents", blocks)?;
    reader.zeroes(4)?;
    let checksums = (0..blocks)
        .map(|_| reader.u32().map(Checksum))
        .collect::<Result<_, _>>()?;
    let extents = (0..extents)
        .map(|_| {
            let extent = Extent {
                place: reader.u32()?,
                count: reader.u32()?,
            };
            check_extent(extent, end).map(|()| extent)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let covered: u64 = extents.iter().map(|extent| u64::from(extent.count)).sum();
    if covered != blocks as u64 {
        return Err(DecodeError::Invalid("extents"));
    }
    Ok(Record::Data {
        at,
        version,
        checksums,
        extents,
    })
}

pub(super) fn encode_hole(out: &mut Vec<u8>, at: &Target, version: Version) {
    put_target(out, at);
    out.put_u64(version.to_bits());
}

pub(super) fn decode_hole(reader: &mut Reader<'_>) -> Result<(Target, Version), DecodeError> {
    Ok((get_target(reader)?, Version::from_bits(reader.u64()?)))
}

pub(super) fn encode_resync_hole(out: &mut Vec<u8>, at: &Target, hole: Uniform, generation: Generation) {
    put_target(out, at);
    hole.encode(out);
    out.put_u32(generation.get());
}

pub(super) fn decode_resync_hole(reader: &mut Reader<'_>) -> Result<Record, DecodeError> {
    let at = get_target(reader)?;
    let hole = Uniform::decode(reader)?;
    let generation = Generation::new(reader.u32()?).ok_or(DecodeError::Invalid("generation"))?;
    Ok(Record::ResyncHole { at, hole, generation })
}
