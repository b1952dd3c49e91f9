//! Fetch: read blocks from another device and write them as it has them, like a [`Copy`] whose content takes the short way,
//! from node to node. Answered with `Durable`, or with what went wrong.

use bytes::Bytes;

use super::{Copy, CopySource, Holder, ReadAnswer, check_blocks_bounded, get_place, no_data, put_place};
use crate::block::Content;
use crate::buffer::joined;
use crate::capability::Capability;
use crate::codec::{DecodeError, Put, Reader};
use crate::ids::{CommitSeq, DeviceId, DeviceUuid, GroupIndex, Incarnation, Layer};
use crate::limits::ADDRESS_BYTES_MAX;
use crate::units::BlockRange;

/// Read blocks from another device, and write them as it has them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fetch {
    /// Who coordinates. The other device must be sealed for exactly this holder too.
    pub holder: Holder,
    /// Into which group, and from which.
    pub group: GroupIndex,
    /// Into which layer.
    pub layer: Layer,
    /// Where; at most 256 blocks.
    pub range: BlockRange,
    /// Why, and so when it applies.
    pub why: CopySource,
    /// Who has the blocks.
    pub from: DeviceId,
    /// The commit sequence that device has recovered at its start, as its hello has told the coordinator: it names the
    /// run of its process.
    pub recovered: CommitSeq,
    /// The highest commit sequence that the coordinator has seen of it: who shows a lower one has forgotten something.
    pub commit: CommitSeq,
    /// The proof that the holder may read there.
    pub capability: Capability,
    /// Where that device is, as `host:port`: 1 to 255 bytes.
    pub address: String,
}

impl Fetch {
    /// The copy that it comes to, with what the other device has answered. Block checksums are not looked at here.
    ///
    /// # Errors
    /// In words, when the answer can't be copied.
    pub fn copy(&self, answer: ReadAnswer) -> Result<Copy, &'static str> {
        if answer.blocks.len() != self.range.count() as usize {
            return Err("it answered with another number of blocks");
        }
        if answer.commit < self.commit {
            return Err("it has forgotten something that it had acknowledged");
        }
        if answer.blocks.iter().any(|block| block.content == Content::Damaged) {
            return Err("it has damaged blocks there");
        }
        let newer = |version: crate::ids::Version| version.generation() > self.holder.generation;
        if answer.blocks.iter().any(|block| newer(block.version)) {
            return Err("it holds blocks of a newer attachment");
        }
        Ok(Copy {
            holder: self.holder,
            group: self.group,
            layer: self.layer,
            range: self.range,
            source: self.why,
            blocks: answer.blocks,
            bytes: joined(answer.bytes),
        })
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Vec<Bytes> {
        assert!(
            (1..=ADDRESS_BYTES_MAX).contains(&self.address.len()),
            "an address of {} bytes",
            self.address.len()
        );
        self.holder.encode(out);
        put_place(out, self.group, self.layer, self.range);
        self.why.encode(out);
        out.put_bytes(&self.from.uuid.0);
        out.put_u64(self.from.incarnation.0);
        out.put_u64(self.recovered.0);
        out.put_u64(self.commit.0);
        self.capability.encode(out);
        out.put_u32(self.address.len() as u32);
        out.put_bytes(self.address.as_bytes());
        Vec::new()
    }

    pub(super) fn decode(reader: &mut Reader<'_>, data: Bytes) -> Result<Fetch, DecodeError> {
        no_data(&data)?;
        let holder = Holder::decode(reader)?;
        let (group, layer, range) = get_place(reader)?;
        check_blocks_bounded(range)?;
        let why = CopySource::decode(reader)?;
        let from = DeviceId {
            uuid: DeviceUuid(reader.array()?),
            incarnation: Incarnation(reader.u64()?),
        };
        let (recovered, commit) = (CommitSeq(reader.u64()?), CommitSeq(reader.u64()?));
        let capability = Capability::decode(reader)?;
        let length = reader.count("address", ADDRESS_BYTES_MAX)?;
        let address = std::str::from_utf8(reader.bytes(length)?).map_err(|_| DecodeError::Invalid("address"))?;
        if address.is_empty() {
            return Err(DecodeError::Invalid("address"));
        }
        Ok(Fetch {
            holder,
            group,
            layer,
            range,
            why,
            from,
            recovered,
            commit,
            capability,
            address: address.to_string(),
        })
    }
}
