//! The superblock: who a device is and where things are on it. Three copies; the layout is in DESIGN.md.

use std::fmt;

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::checksum::ChecksumAlgorithm;
use cairn_proto::codec::{DecodeError, Put, Reader};
use cairn_proto::disk::{DeviceBlock, DiskGeometry};
use cairn_proto::ids::{ClusterId, DeviceId, DeviceUuid, Incarnation};
use cairn_proto::limits::BLOCK_BYTES;

use super::crc;
use super::limits::{DEVICE_BLOCKS_MAX, DEVICE_BLOCKS_MIN};

/// The first eight bytes of every copy.
pub const MAGIC: [u8; 8] = *b"CAIRNDEV";
/// The format this version writes, and the newest it reads.
pub const FORMAT: u16 = 1;
/// Blocks at the start of a device that [`probe`] wants to see.
pub const PROBE_BLOCKS: u32 = 4;
/// Blocks at either end of a device that must be zero for it to be blank (1 MiB): file systems and RAID keep what they are
/// known by in there.
pub const EDGE_BLOCKS: u64 = 256;
/// The two checkpoint headers, by slot.
pub const CHECKPOINT_PLACES: [DeviceBlock; 2] = [DeviceBlock(2), DeviceBlock(3)];
/// The first block that is allocated.
pub const SPACE_START: u64 = 4;

const CRC_FIELD: usize = 12;

/// The first eight bytes of a mark.
const MARK_MAGIC: [u8; 8] = *b"CAIRNFMT";
/// Bytes of a mark that count: one sector, so that it is there or not, whatever stood in the block.
const MARK_BYTES: usize = 512;
/// Incompatible features that this version knows: none yet.
const INCOMPAT_KNOWN: u64 = 0;
/// Read-only-compatible features that this version knows: none yet.
const RO_COMPAT_KNOWN: u64 = 0;

/// Who a device is: written when it is formatted, the same until it is formatted again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// The cluster it belongs to.
    pub cluster: ClusterId,
    /// Its UUID and incarnation.
    pub device: DeviceId,
    /// How the checksums of its blocks are computed.
    pub checksum: ChecksumAlgorithm,
    /// The blocks it uses, from its start.
    pub blocks: u64,
}

/// One copy of the superblock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// Who the device is.
    pub identity: Identity,
    /// Which copy: 0 at block 0, 1 at block 1, 2 at the last block.
    pub copy: u8,
    /// Grows each time the copies are rewritten; the highest valid one counts.
    pub sequence: u64,
    /// Features that older versions may ignore.
    pub compat: u64,
    /// Features that older versions may ignore when they only read.
    pub ro_compat: u64,
    /// Features without which the device can't be understood.
    pub incompat: u64,
}

impl Superblock {
    /// Where the copies are on a device of this length.
    pub fn copies(blocks: u64) -> [DeviceBlock; 3] {
        [DeviceBlock(0), DeviceBlock(1), DeviceBlock(blocks - 1)]
    }

    /// The block as it stands on the device.
    pub fn encode(&self) -> Bytes {
        let blocks = self.identity.blocks;
        let mut out = Vec::with_capacity(256);
        out.put_bytes(&MAGIC);
        out.put_u16(FORMAT);
        out.put_u8(self.copy);
        out.put_u8(self.identity.checksum as u8);
        out.put_u32(0);
        out.put_bytes(&self.identity.cluster.0);
        out.put_bytes(&self.identity.device.uuid.0);
        out.put_u64(self.identity.device.incarnation.0);
        out.put_u64(self.compat);
        out.put_u64(self.ro_compat);
        out.put_u64(self.incompat);
        out.put_u64(blocks);
        out.put_u64(self.sequence);
        out.put_u32(BLOCK_BYTES as u32);
        out.put_u32(0);
        Superblock::copies(blocks).iter().for_each(|place| out.put_u64(place.0));
        CHECKPOINT_PLACES.iter().for_each(|place| out.put_u64(place.0));
        out.put_u64(SPACE_START);
        out.put_u64(blocks - 1);
        let mut block = BlockBuf::copied_from(&out);
        crc::put(&mut block, CRC_FIELD);
        block.freeze()
    }

    /// Reads one copy.
    pub fn decode(block: &[u8]) -> Result<Superblock, SuperblockError> {
        let mut reader = Reader::new(block);
        if block.len() != BLOCK_BYTES || reader.array::<8>()? != MAGIC {
            return Err(SuperblockError::NoMagic);
        }
        let format = reader.u16()?;
        if !crc::matches(block, CRC_FIELD) {
            return Err(SuperblockError::Crc);
        }
        if format != FORMAT {
            return Err(SuperblockError::Format(format));
        }
        let copy = reader.u8()?;
        let algorithm = reader.u8()?;
        let checksum = ChecksumAlgorithm::from_u8(algorithm).ok_or(SuperblockError::Checksum(algorithm))?;
        reader.u32()?;
        let cluster = ClusterId(reader.array()?);
        let device = DeviceId {
            uuid: DeviceUuid(reader.array()?),
            incarnation: Incarnation(reader.u64()?),
        };
        let (compat, ro_compat, incompat) = (reader.u64()?, reader.u64()?, reader.u64()?);
        if incompat & !INCOMPAT_KNOWN != 0 || ro_compat & !RO_COMPAT_KNOWN != 0 {
            return Err(SuperblockError::Features(
                (incompat & !INCOMPAT_KNOWN) | (ro_compat & !RO_COMPAT_KNOWN),
            ));
        }
        let (blocks, sequence) = (reader.u64()?, reader.u64()?);
        if !(DEVICE_BLOCKS_MIN..=DEVICE_BLOCKS_MAX).contains(&blocks) {
            return Err(DecodeError::Invalid("length").into());
        }
        check_places(&mut reader, blocks)?;
        if usize::from(copy) >= Superblock::copies(blocks).len() {
            return Err(DecodeError::Invalid("copy").into());
        }
        Ok(Superblock {
            identity: Identity {
                cluster,
                device,
                checksum,
                blocks,
            },
            copy,
            sequence,
            compat,
            ro_compat,
            incompat,
        })
    }
}

/// This format has everything in one place; a later one may not, so the places are written down and checked.
fn check_places(reader: &mut Reader<'_>, blocks: u64) -> Result<(), DecodeError> {
    if reader.u32()? as usize != BLOCK_BYTES {
        return Err(DecodeError::Invalid("block bytes"));
    }
    reader.zeroes(4)?;
    for place in Superblock::copies(blocks).iter().chain(&CHECKPOINT_PLACES) {
        if reader.u64()? != place.0 {
            return Err(DecodeError::Invalid("place"));
        }
    }
    if (reader.u64()?, reader.u64()?) != (SPACE_START, blocks - 1) {
        return Err(DecodeError::Invalid("space"));
    }
    reader.zeroes(reader.remaining())
}

/// Why a block is not a superblock that can be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SuperblockError {
    /// It does not begin as one.
    NoMagic,
    /// Its CRC is wrong.
    Crc,
    /// It is of a format that this version does not know.
    Format(u16),
    /// The checksum algorithm is not known.
    Checksum(u8),
    /// It has features that this version does not know.
    Features(u64),
    /// A field has a value that is not allowed.
    Field(DecodeError),
}

impl From<DecodeError> for SuperblockError {
    fn from(error: DecodeError) -> SuperblockError {
        SuperblockError::Field(error)
    }
}

impl fmt::Display for SuperblockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SuperblockError::NoMagic => f.write_str("it does not begin as a superblock"),
            SuperblockError::Crc => f.write_str("its CRC is wrong"),
            SuperblockError::Format(number) => write!(f, "it is of format {number}, this version reads {FORMAT}"),
            SuperblockError::Checksum(number) => write!(f, "checksum algorithm {number} is not known"),
            SuperblockError::Features(bits) => write!(f, "it has features {bits:#x} that this version does not know"),
            SuperblockError::Field(error) => write!(f, "{error}"),
        }
    }
}

impl std::error::Error for SuperblockError {}

/// Whether what stands in the place of a copy is to be written anew as `expected`. What a later version may have written
/// is left alone.
pub(super) fn is_damaged(block: &[u8], expected: &Superblock) -> bool {
    match Superblock::decode(block) {
        Ok(found) => found != *expected,
        Err(SuperblockError::Format(_) | SuperblockError::Checksum(_) | SuperblockError::Features(_)) => false,
        Err(SuperblockError::NoMagic | SuperblockError::Crc | SuperblockError::Field(_)) => true,
    }
}

/// What stands in the places of all superblocks while a device is being formatted.
pub(super) fn mark() -> Bytes {
    let mut block = BlockBuf::zeroed(1);
    block[..8].copy_from_slice(&MARK_MAGIC);
    block[8..10].copy_from_slice(&FORMAT.to_le_bytes());
    let crc = crc32fast::hash(&block[..MARK_BYTES]);
    block[CRC_FIELD..CRC_FIELD + 4].copy_from_slice(&crc.to_le_bytes());
    block.freeze()
}

/// Whether a block begins as a mark, of whatever format.
fn is_mark(block: &[u8]) -> bool {
    let mut sector = [0; MARK_BYTES];
    sector.copy_from_slice(&block[..MARK_BYTES]);
    sector[CRC_FIELD..CRC_FIELD + 4].fill(0);
    sector.starts_with(&MARK_MAGIC) && crc32fast::hash(&sector).to_le_bytes() == block[CRC_FIELD..CRC_FIELD + 4]
}

/// What stands on a device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Probe {
    /// A device of Cairn.
    Cairn(Superblock),
    /// Nothing but zeroes where superblocks would be: it can be formatted.
    Blank,
    /// Its formatting began and did not end. Nothing is on it that anybody has agreed to keep: it can be formatted.
    Unfinished,
    /// Something else's data. Formatting would destroy it.
    Foreign {
        /// What it looks like, for a person.
        words: String,
    },
    /// A device of Cairn that has lost its end.
    Truncated {
        /// Blocks it was formatted with.
        expected: u64,
        /// Blocks it has now.
        found: u64,
    },
    /// A device of Cairn whose superblocks can't be used.
    Damaged {
        /// What is wrong, for a person.
        words: String,
    },
}

/// Says what stands on a device, from its first [`PROBE_BLOCKS`] blocks and its last one. Panics unless both are given
/// in full.
pub fn probe(first: &[u8], last: &[u8], geometry: DiskGeometry) -> Probe {
    assert!(first.len() >= PROBE_BLOCKS as usize * BLOCK_BYTES && last.len() == BLOCK_BYTES);
    let copies = [&first[..BLOCK_BYTES], &first[BLOCK_BYTES..2 * BLOCK_BYTES], last];
    let decoded = copies.map(Superblock::decode);
    let valid = || decoded.iter().flatten();
    let Some(best) = valid().max_by_key(|superblock| superblock.sequence) else {
        return probe_unusable(first, last, &decoded);
    };
    if valid().any(|superblock| superblock.identity != best.identity && superblock.sequence == best.sequence) {
        return Probe::Damaged {
            words: "its superblocks name different devices: two devices were mixed, or one was copied over another"
                .to_string(),
        };
    }
    if best.identity.blocks > geometry.blocks {
        return Probe::Truncated {
            expected: best.identity.blocks,
            found: geometry.blocks,
        };
    }
    Probe::Cairn(*best)
}

fn probe_unusable(first: &[u8], last: &[u8], decoded: &[Result<Superblock, SuperblockError>; 3]) -> Probe {
    let ours = decoded.iter().filter_map(|copy| copy.as_ref().err());
    let errors: Vec<_> = ours.filter(|error| **error != SuperblockError::NoMagic).collect();
    if let Some(error) = errors.first() {
        return Probe::Damaged {
            words: format!("no usable superblock is left; of the first one found, {error}"),
        };
    }
    if first.iter().chain(last).all(|byte| *byte == 0) {
        return Probe::Blank;
    }
    if [&first[..BLOCK_BYTES], &first[BLOCK_BYTES..], last]
        .into_iter()
        .any(is_mark)
    {
        return Probe::Unfinished;
    }
    Probe::Foreign {
        words: foreign_words(first).to_string(),
    }
}

/// Says whether a device that [`probe`] takes for blank is so at both ends, from its first and last [`EDGE_BLOCKS`] blocks:
/// [`Probe::Blank`], or [`Probe::Foreign`].
pub fn probe_edges(first: &[u8], last: &[u8]) -> Probe {
    if first.iter().chain(last).all(|byte| *byte == 0) {
        return Probe::Blank;
    }
    let has = |at: usize, magic: &[u8]| first.get(at..).is_some_and(|rest| rest.starts_with(magic));
    let words = if has(0x1_0040, b"_BHRfS_M") {
        "a Btrfs file system"
    } else if has(0x8001, b"CD001") {
        "an ISO 9660 image"
    } else {
        "data of something else in the MiB at its start or its end"
    };
    Probe::Foreign {
        words: words.to_string(),
    }
}

/// Names what people keep on disks, so that the refusal says what would have been lost.
fn foreign_words(first: &[u8]) -> &'static str {
    let has = |at: usize, magic: &[u8]| first[at..].starts_with(magic);
    if has(512, b"EFI PART") || has(4096, b"EFI PART") {
        "a partition table (GPT)"
    } else if has(1080, &[0x53, 0xef]) {
        "an ext2, ext3 or ext4 file system"
    } else if CHECKPOINT_PLACES
        .iter()
        .any(|place| has(place.0 as usize * BLOCK_BYTES, b"CAIRNCKP"))
    {
        "what is left of a Cairn device whose formatting did not end"
    } else if has(0, b"XFSB") {
        "an XFS file system"
    } else if has(512, b"LABELONE") {
        "an LVM physical volume"
    } else if has(0, b"LUKS\xba\xbe") {
        "a LUKS encrypted volume"
    } else if has(0, b"QFI\xfb") {
        "a QCOW2 image"
    } else if has(4096 - 10, b"SWAPSPACE2") {
        "swap space"
    } else if has(510, &[0x55, 0xaa]) {
        "a boot sector or partition table"
    } else {
        "data of something else"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCKS: u64 = 1024;
    const GEOMETRY: DiskGeometry = DiskGeometry {
        blocks: BLOCKS,
        volatile_cache: true,
    };

    fn superblock(copy: u8) -> Superblock {
        Superblock {
            identity: Identity {
                cluster: ClusterId([1; 16]),
                device: DeviceId {
                    uuid: DeviceUuid([2; 16]),
                    incarnation: Incarnation(3),
                },
                checksum: ChecksumAlgorithm::Crc32,
                blocks: BLOCKS,
            },
            copy,
            sequence: 1,
            compat: 0,
            ro_compat: 0,
            incompat: 0,
        }
    }

    fn device() -> (Vec<u8>, Vec<u8>) {
        let mut first = superblock(0).encode().to_vec();
        first.extend_from_slice(&superblock(1).encode());
        first.resize(PROBE_BLOCKS as usize * BLOCK_BYTES, 0);
        (first, superblock(2).encode().to_vec())
    }

    #[test]
    fn it_comes_back_as_it_was_written_and_no_flipped_bit_passes() {
        let block = superblock(1).encode();
        assert_eq!(Superblock::decode(&block), Ok(superblock(1)));
        for byte in 0..BLOCK_BYTES {
            let mut bad = block.to_vec();
            bad[byte] ^= 1 << (byte % 8);
            assert!(Superblock::decode(&bad).is_err(), "byte {byte}");
        }
        for len in [0, 7, 8, 511, 4095] {
            assert!(Superblock::decode(&block[..len]).is_err());
        }
    }

    #[test]
    fn any_one_copy_is_enough() {
        let (first, last) = device();
        for keep in 0..3 {
            let (mut first, mut last) = (first.clone(), last.clone());
            (0..3).filter(|copy| *copy != keep).for_each(|copy| match copy {
                2 => last.fill(0),
                copy => first[copy * BLOCK_BYTES..(copy + 1) * BLOCK_BYTES].fill(0xee),
            });
            let expected = Probe::Cairn(superblock(keep as u8));
            assert_eq!(probe(&first, &last, GEOMETRY), expected);
        }
    }

    #[test]
    fn what_is_not_ours_is_named() {
        let zero = vec![0; PROBE_BLOCKS as usize * BLOCK_BYTES];
        let last = vec![0; BLOCK_BYTES];
        assert_eq!(probe(&zero, &last, GEOMETRY), Probe::Blank);
        let mut ext4 = zero.clone();
        ext4[1080..1082].copy_from_slice(&[0x53, 0xef]);
        let Probe::Foreign { words } = probe(&ext4, &last, GEOMETRY) else {
            panic!("an ext4 file system is foreign")
        };
        assert!(words.contains("ext4"));
        let mut begun = zero.clone();
        begun[..BLOCK_BYTES].copy_from_slice(&mark());
        begun[600..700].fill(7);
        assert_eq!(probe(&begun, &last, GEOMETRY), Probe::Unfinished);
        begun[30] ^= 1;
        assert!(matches!(probe(&begun, &last, GEOMETRY), Probe::Foreign { .. }));
        let mut half = zero.clone();
        half[3 * BLOCK_BYTES..3 * BLOCK_BYTES + 8].copy_from_slice(b"CAIRNCKP");
        let Probe::Foreign { words } = probe(&half, &last, GEOMETRY) else {
            panic!("it may have held data before")
        };
        assert!(words.contains("formatting did not end"), "{words}");
        let short = DiskGeometry {
            blocks: BLOCKS - 1,
            ..GEOMETRY
        };
        let (first, _) = device();
        let truncated = Probe::Truncated {
            expected: BLOCKS,
            found: BLOCKS - 1,
        };
        assert_eq!(probe(&first, &last, short), truncated);
        let mut damaged = first.clone();
        damaged[20] ^= 1;
        damaged[BLOCK_BYTES + 20] ^= 1;
        assert!(matches!(probe(&damaged, &last, GEOMETRY), Probe::Damaged { .. }));
    }

    #[test]
    fn a_copy_is_damaged_unless_it_is_what_belongs_there() {
        let damaged = |block: &[u8]| is_damaged(block, &superblock(1));
        assert!(!damaged(&superblock(1).encode()));
        assert!(damaged(&[0; BLOCK_BYTES]));
        assert!(damaged(&superblock(2).encode()), "another copy landed here");
        let older = Superblock {
            sequence: 0,
            ..superblock(1)
        };
        assert!(damaged(&older.encode()));
        let mut later = superblock(1);
        later.incompat = 4;
        assert!(!damaged(&later.encode()), "a later version may need it");
    }

    #[test]
    fn two_devices_mixed_are_refused() {
        let (mut first, last) = device();
        let mut other = superblock(1);
        other.identity.device.uuid = DeviceUuid([9; 16]);
        first[BLOCK_BYTES..2 * BLOCK_BYTES].copy_from_slice(&other.encode());
        assert!(matches!(probe(&first, &last, GEOMETRY), Probe::Damaged { .. }));
    }

    #[test]
    fn features_of_a_later_version_are_refused_with_words() {
        let mut later = superblock(0);
        later.incompat = 4;
        let error = Superblock::decode(&later.encode()).unwrap_err();
        assert_eq!(error, SuperblockError::Features(4));
        assert!(error.to_string().contains("0x4"));
        later.incompat = 0;
        later.compat = 4;
        assert!(Superblock::decode(&later.encode()).is_ok());
    }
}
