//! Content that says of itself where it belongs and who wrote it. The unit is the sector of 512 bytes, so that writes of
//! parts of a block can be told apart:
//!
//! volume `u64`, sector `u64`, operation `u64`, then 61 times a check word made of the three.

use std::collections::BTreeSet;

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::ids::VolumeId;
use cairn_proto::limits::{BLOCK_BYTES, SECTOR_BYTES};

use crate::rng::mix;

/// Sectors of a block.
pub const SECTORS_PER_BLOCK: usize = BLOCK_BYTES / SECTOR_BYTES;

/// Who wrote a sector: the number of an operation, unique in its world. Zero stands for zeroes, however they came about.
pub type Writer = u32;

/// A block of some volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Content {
    /// Which volume.
    pub volume: VolumeId,
    /// Counted from its start.
    pub block: u64,
    /// Who wrote those sectors that are not zeroes.
    pub writers: BTreeSet<Writer>,
}

/// Zeroes.
pub const ZEROES: Writer = 0;

const ZERO_SECTOR: [u8; SECTOR_BYTES] = [0; SECTOR_BYTES];

fn sector_content(volume: VolumeId, sector: u64, writer: Writer) -> [u8; SECTOR_BYTES] {
    let mut content = [0; SECTOR_BYTES];
    let check = mix(volume.0 ^ mix(sector ^ mix(u64::from(writer))));
    let words = [volume.0, sector, u64::from(writer)].into_iter();
    for (place, word) in content.chunks_exact_mut(8).zip(words.chain(std::iter::repeat(check))) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    content
}

/// What an operation writes from `sector` on.
pub fn fill(volume: VolumeId, sector: u64, sectors: usize, writer: Writer) -> Bytes {
    assert_ne!(writer, ZEROES, "operations are counted from one");
    let mut buf = BlockBuf::zeroed(sectors.div_ceil(SECTORS_PER_BLOCK));
    for (place, number) in buf.chunks_exact_mut(SECTOR_BYTES).take(sectors).zip(sector..) {
        place.copy_from_slice(&sector_content(volume, number, writer));
    }
    buf.freeze().slice(..sectors * SECTOR_BYTES)
}

/// Who wrote this sector; in words what is wrong with it when nobody wrote it here.
pub fn writer_of(volume: VolumeId, sector: u64, content: &[u8]) -> Result<Writer, String> {
    assert_eq!(content.len(), SECTOR_BYTES, "a sector");
    if content == ZERO_SECTOR {
        return Ok(ZEROES);
    }
    let word = |i: usize| u64::from_le_bytes(content[i * 8..i * 8 + 8].try_into().expect("eight bytes"));
    let writer = u32::try_from(word(2)).unwrap_or(0);
    if writer != ZEROES && content == sector_content(volume, sector, writer) {
        return Ok(writer);
    }
    Err(format!(
        "sector {sector} of volume {volume} holds what nobody wrote there: it says volume {}, sector {}, operation {}, \
         check {:016x} … {:016x}",
        word(0),
        word(1),
        word(2),
        word(3),
        word(63),
    ))
}

/// What a block is in a volume, and who wrote its sectors, if operations wrote all of it to the same block; `None` where some sector
/// is of no volume, or all are zeroes.
pub fn content_of(block: &[u8; BLOCK_BYTES]) -> Option<Content> {
    let mut content: Option<Content> = None;
    for (i, sector) in block.chunks_exact(SECTOR_BYTES).enumerate() {
        if sector == ZERO_SECTOR {
            continue;
        }
        let word = |i: usize| u64::from_le_bytes(sector[i * 8..i * 8 + 8].try_into().expect("eight bytes"));
        let (volume, number) = (VolumeId(word(0)), word(1));
        let first = number.checked_sub(i as u64)?;
        let writer = writer_of(volume, number, sector).ok()?;
        let known = content.get_or_insert(Content {
            volume,
            block: first / SECTORS_PER_BLOCK as u64,
            writers: BTreeSet::new(),
        });
        if known.volume != volume || known.block * SECTORS_PER_BLOCK as u64 != first {
            return None;
        }
        known.writers.insert(writer);
    }
    content
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_tells_who_wrote_it_and_whether_it_is_in_its_place() {
        let content = fill(VolumeId(3), 17, 9, 5);
        assert_eq!(content.len(), 9 * SECTOR_BYTES);
        for (sector, number) in content.chunks_exact(SECTOR_BYTES).zip(17..) {
            assert_eq!(writer_of(VolumeId(3), number, sector), Ok(5));
        }
        let first = &content[..SECTOR_BYTES];
        assert!(writer_of(VolumeId(3), 18, first).is_err(), "misplaced");
        assert!(writer_of(VolumeId(4), 17, first).is_err(), "of another volume");
        let mut torn = first.to_vec();
        torn[511] ^= 1;
        assert!(writer_of(VolumeId(3), 17, &torn).is_err(), "damaged");
        assert_eq!(writer_of(VolumeId(3), 17, &ZERO_SECTOR), Ok(ZEROES));
        let mut block: [u8; BLOCK_BYTES] = fill(VolumeId(3), 16, 8, 5)[..].try_into().unwrap();
        block[..SECTOR_BYTES].fill(0);
        block[SECTOR_BYTES..2 * SECTOR_BYTES].copy_from_slice(&sector_content(VolumeId(3), 17, 6));
        let content = content_of(&block).unwrap();
        assert_eq!((content.volume, content.block), (VolumeId(3), 2));
        assert_eq!(content.writers, BTreeSet::from([5, 6]));
        block[4000] ^= 1;
        assert_eq!((content_of(&block), content_of(&[0; BLOCK_BYTES])), (None, None));
    }
}
