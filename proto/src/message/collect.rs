//! Collect and its answer: what a replica holds, page by page, so that replicas can be compared (rules 9 and 21).

use bytes::Bytes;

use super::{Holder, get_group_index, no_data};
use crate::block::{Cursor, Run};
use crate::codec::{DecodeError, Put, Reader};
use crate::ids::{CommitSeq, GroupIndex, Version};
use crate::limits::COLLECT_RUNS_MAX;

/// List the blocks of a group from one place to another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Collect {
    /// Who asks.
    pub holder: Holder,
    /// Which group.
    pub group: GroupIndex,
    /// From where on.
    pub from: Cursor,
    /// Up to where, exclusive. An answer may go on a little further.
    pub to: Cursor,
    /// Only versions above this one.
    pub above: Version,
}

impl Collect {
    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Vec<Bytes> {
        self.holder.encode(out);
        out.put_u8(self.group.0);
        out.put_bytes(&[0; 3]);
        out.put_u64(self.above.to_bits());
        self.from.encode(out);
        self.to.encode(out);
        Vec::new()
    }

    pub(super) fn decode(reader: &mut Reader<'_>, data: Bytes) -> Result<Collect, DecodeError> {
        no_data(&data)?;
        let holder = Holder::decode(reader)?;
        let group = get_group_index(reader)?;
        let above = Version::from_bits(reader.u64()?);
        Ok(Collect {
            holder,
            group,
            from: Cursor::decode(reader)?,
            to: Cursor::decode(reader)?,
            above,
        })
    }
}

/// What the replica held when it was asked: durable blocks only.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Collected {
    /// The device's commit sequence.
    pub commit: CommitSeq,
    /// In order of the cursor.
    pub runs: Vec<Run>,
    /// Where to go on; `None` at the end.
    pub next: Option<Cursor>,
}

impl Collected {
    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Vec<Bytes> {
        out.put_u64(self.commit.0);
        out.put_u32(u32::try_from(self.runs.len()).expect("an answer is bounded"));
        out.put_u8(u8::from(self.next.is_some()));
        out.put_bytes(&[0; 3]);
        self.next.unwrap_or_default().encode(out);
        out.put_u32(0);
        self.runs.iter().for_each(|run| run.encode(out));
        Vec::new()
    }

    pub(super) fn decode(reader: &mut Reader<'_>, data: Bytes) -> Result<Collected, DecodeError> {
        no_data(&data)?;
        let commit = CommitSeq(reader.u64()?);
        let count = reader.count("runs", COLLECT_RUNS_MAX)?;
        let more = reader.bool("more")?;
        reader.zeroes(3)?;
        let next = Cursor::decode(reader)?;
        if !more && next != Cursor::default() {
            return Err(DecodeError::Invalid("cursor"));
        }
        reader.zeroes(4)?;
        let runs = (0..count).map(|_| Run::decode(reader)).collect::<Result<Vec<_>, _>>()?;
        Ok(Collected {
            commit,
            runs,
            next: more.then_some(next),
        })
    }
}
