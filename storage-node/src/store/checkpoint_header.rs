//! The header of a checkpoint: where its directory is, and where the log goes on after it. The layout is in DESIGN.md.

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::codec::{DecodeError, Put, Reader};
use cairn_proto::ids::{DeviceId, DeviceUuid, Incarnation};
use cairn_proto::limits::BLOCK_BYTES;

use super::crc;
use super::directory::RootOf;
use super::entry::check_place;
use super::record::LogAhead;

const MAGIC: [u8; 8] = *b"CAIRNCKP";
const FORMAT: u16 = 1;
const CRC_FIELD: usize = 12;
/// Checkpoints and commits never count that far; so their numbers can be added to.
const SEQUENCE_END: u64 = 1 << 62;

/// What stands in a checkpoint's slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct CheckpointHeader {
    /// The device that wrote it.
    pub(super) device: DeviceId,
    /// Counts checkpoints; its parity is the slot.
    pub(super) sequence: u64,
    /// The last commit that it has.
    pub(super) covered: u64,
    /// The CRC of that commit's record; zero if there is none.
    pub(super) covered_crc: u32,
    /// Where the log goes on.
    pub(super) ahead: LogAhead,
    /// The first directory block; zero if there is none.
    pub(super) directory: u32,
    pub(super) directory_blocks: u32,
    /// Entries of the directory, by kind.
    pub(super) seals: u64,
    pub(super) replicas: u64,
    pub(super) leaves: u64,
    pub(super) map_pages: u64,
    /// Blocks that hold data.
    pub(super) data_blocks: u64,
    /// Blocks that are index pages.
    pub(super) index_blocks: u64,
    /// The block after the highest one ever used.
    pub(super) used_end: u64,
}

impl CheckpointHeader {
    /// The slot in which it stands.
    pub(super) fn slot(&self) -> usize {
        (self.sequence % 2) as usize
    }

    /// What the blocks of its directory say that they belong to.
    pub(super) fn root_of(&self) -> RootOf {
        RootOf {
            device: self.device,
            sequence: self.sequence,
            covered: self.covered,
        }
    }

    pub(super) fn encode(&self) -> Bytes {
        let mut out = Vec::with_capacity(128);
        out.put_bytes(&MAGIC);
        out.put_u16(FORMAT);
        out.put_u8(self.slot() as u8);
        out.put_u8(0);
        out.put_u32(0);
        out.put_bytes(&self.device.uuid.0);
        out.put_u64(self.device.incarnation.0);
        out.put_u64(self.sequence);
        out.put_u64(self.covered);
        out.put_u32(self.covered_crc);
        out.put_u32(self.ahead.next);
        out.put_u32(self.directory);
        out.put_u32(self.directory_blocks);
        out.put_u64(self.seals);
        out.put_u64(self.replicas);
        out.put_u64(self.leaves);
        out.put_u64(self.map_pages);
        out.put_u64(self.data_blocks);
        out.put_u64(self.index_blocks);
        out.put_u64(self.used_end);
        out.put_u32(self.ahead.next_run);
        out.put_u32(self.ahead.run_left);
        let mut block = BlockBuf::copied_from(&out);
        crc::put(&mut block, CRC_FIELD);
        block.freeze()
    }

    /// Reads the header in a slot; `None` if it is not a valid one of this device.
    pub(super) fn decode(block: &[u8], slot: usize, device: DeviceId, end: u32) -> Option<CheckpointHeader> {
        if block.len() != BLOCK_BYTES || !block.starts_with(&MAGIC) || !crc::matches(block, CRC_FIELD) {
            return None;
        }
        let header = CheckpointHeader::decode_fields(block, slot, end).ok()?;
        (header.device == device).then_some(header)
    }

    fn decode_fields(block: &[u8], slot: usize, end: u32) -> Result<CheckpointHeader, DecodeError> {
        let mut reader = Reader::new(block);
        reader.array::<8>()?;
        if reader.u16()? != FORMAT {
            return Err(DecodeError::Invalid("format"));
        }
        if usize::from(reader.u8()?) != slot {
            return Err(DecodeError::Invalid("slot"));
        }
        reader.zeroes(1)?;
        reader.u32()?;
        let mut header = CheckpointHeader {
            device: DeviceId {
                uuid: DeviceUuid(reader.array()?),
                incarnation: Incarnation(reader.u64()?),
            },
            sequence: reader.u64()?,
            covered: reader.u64()?,
            covered_crc: reader.u32()?,
            ahead: LogAhead {
                next: reader.u32()?,
                run_left: 0,
                next_run: 0,
            },
            directory: reader.u32()?,
            directory_blocks: reader.u32()?,
            seals: reader.u64()?,
            replicas: reader.u64()?,
            leaves: reader.u64()?,
            map_pages: reader.u64()?,
            data_blocks: reader.u64()?,
            index_blocks: reader.u64()?,
            used_end: reader.u64()?,
        };
        (header.ahead.next_run, header.ahead.run_left) = (reader.u32()?, reader.u32()?);
        reader.zeroes(reader.remaining())?;
        header.ahead.check(end)?;
        if header.directory_blocks > 0 {
            check_place(header.directory, end)?;
        }
        let counted = 1..SEQUENCE_END;
        if !counted.contains(&header.sequence) || header.covered >= SEQUENCE_END {
            return Err(DecodeError::Invalid("sequence"));
        }
        if header.slot() != slot || header.directory_blocks > end || header.used_end > end.into() {
            return Err(DecodeError::Invalid("count"));
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_comes_back_as_it_was_written_and_no_flipped_bit_passes() {
        let device = DeviceId {
            uuid: DeviceUuid([7; 16]),
            incarnation: Incarnation(2),
        };
        let header = CheckpointHeader {
            device,
            sequence: 5,
            covered: 77,
            covered_crc: 0x1234,
            ahead: LogAhead {
                next: 9,
                run_left: 1,
                next_run: 12,
            },
            directory: 11,
            directory_blocks: 3,
            seals: 1,
            replicas: 2,
            leaves: 3,
            map_pages: 4,
            data_blocks: 5,
            index_blocks: 6,
            used_end: 20,
        };
        let block = header.encode();
        assert_eq!(CheckpointHeader::decode(&block, 1, device, 100), Some(header));
        assert_eq!(CheckpointHeader::decode(&block, 0, device, 100), None, "the other slot");
        assert_eq!(
            CheckpointHeader::decode(&block, 1, device, 10),
            None,
            "a place after the end"
        );
        let other = DeviceId {
            incarnation: Incarnation(3),
            ..device
        };
        assert_eq!(
            CheckpointHeader::decode(&block, 1, other, 100),
            None,
            "an older format of the device"
        );
        for byte in 0..BLOCK_BYTES {
            let mut bad = block.to_vec();
            bad[byte] ^= 1 << (byte % 8);
            assert_eq!(CheckpointHeader::decode(&bad, 1, device, 100), None, "byte {byte}");
        }
    }
}
