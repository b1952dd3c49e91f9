//! Write and its answer.

use bytes::Bytes;

use super::{Holder, check_blocks_bounded, data_of_blocks, get_place, no_data, put_place};
use crate::checksum::Checksum;
use crate::codec::{DecodeError, Put, Reader};
use crate::ids::{CommitSeq, GroupIndex, Layer, Version};
use crate::units::BlockRange;

/// What a write puts into its range.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum WriteData {
    /// Bytes as long as the range, at most 256 blocks, and the checksum of each block.
    Data {
        /// The bytes.
        bytes: Bytes,
        /// One per block.
        checksums: Vec<Checksum>,
    },
    /// Zeroes, run-length.
    Zero,
    /// Absence, run-length.
    Discard,
}

/// Write a range under one version (rule 12). Its version's generation is the holder's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Write {
    /// Who writes.
    pub holder: Holder,
    /// Into which group.
    pub group: GroupIndex,
    /// Into which layer.
    pub layer: Layer,
    /// Where.
    pub range: BlockRange,
    /// The version of every block of it.
    pub version: Version,
    /// Every version of the group up to this one is durable on all its members (rule 11).
    pub stable: Version,
    /// What.
    pub data: WriteData,
}

impl Write {
    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Vec<Bytes> {
        self.holder.encode(out);
        put_place(out, self.group, self.layer, self.range);
        out.put_u64(self.version.to_bits());
        out.put_u64(self.stable.to_bits());
        let (kind, data) = match &self.data {
            WriteData::Data { bytes, .. } => (1, vec![bytes.clone()]),
            WriteData::Zero => (2, Vec::new()),
            WriteData::Discard => (3, Vec::new()),
        };
        out.put_u8(kind);
        out.put_bytes(&[0; 7]);
        if let WriteData::Data { bytes, checksums } = &self.data {
            assert_eq!(bytes.len(), self.range.bytes(), "content of {}", self.range);
            assert_eq!(
                checksums.len(),
                self.range.count() as usize,
                "checksums of {}",
                self.range
            );
            checksums.iter().for_each(|checksum| out.put_u32(checksum.0));
        }
        data
    }

    pub(super) fn decode(reader: &mut Reader<'_>, data: Bytes) -> Result<Write, DecodeError> {
        let holder = Holder::decode(reader)?;
        let (group, layer, range) = get_place(reader)?;
        let (version, stable) = (Version::from_bits(reader.u64()?), Version::from_bits(reader.u64()?));
        if version.generation() != holder.generation {
            return Err(DecodeError::Invalid("version"));
        }
        let kind = reader.u8()?;
        reader.zeroes(7)?;
        let data = match kind {
            1 => {
                check_blocks_bounded(range)?;
                data_of_blocks(&data, range.count() as usize)?;
                let checksums = (0..range.count())
                    .map(|_| reader.u32().map(Checksum))
                    .collect::<Result<_, _>>()?;
                WriteData::Data { bytes: data, checksums }
            }
            2 => no_data(&data).map(|()| WriteData::Zero)?,
            3 => no_data(&data).map(|()| WriteData::Discard)?,
            _ => return Err(DecodeError::Invalid("write kind")),
        };
        Ok(Write {
            holder,
            group,
            layer,
            range,
            version,
            stable,
            data,
        })
    }
}

/// A write or copy is durable, or what superseded it is (rule 13).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Durable {
    /// The device's commit sequence.
    pub commit: CommitSeq,
    /// Microseconds in the device's queue.
    pub queue_us: u32,
    /// Microseconds of writing.
    pub write_us: u32,
    /// Microseconds of flushing.
    pub flush_us: u32,
}

impl Durable {
    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Vec<Bytes> {
        out.put_u64(self.commit.0);
        out.put_u32(self.queue_us);
        out.put_u32(self.write_us);
        out.put_u32(self.flush_us);
        out.put_u32(0);
        Vec::new()
    }

    pub(super) fn decode(reader: &mut Reader<'_>, data: Bytes) -> Result<Durable, DecodeError> {
        no_data(&data)?;
        let commit = CommitSeq(reader.u64()?);
        let (queue_us, write_us, flush_us) = (reader.u32()?, reader.u32()?, reader.u32()?);
        reader.zeroes(4)?;
        Ok(Durable {
            commit,
            queue_us,
            write_us,
            flush_us,
        })
    }
}
