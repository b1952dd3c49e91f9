//! How far the scrub of a device is: kept by the device, so that a pass goes on after a restart.

use cairn_proto::block::Cursor;
use cairn_proto::codec::{DecodeError, Put, Reader};
use cairn_proto::ids::{ChunkIndex, GroupId, GroupIndex, Layer, VolumeId};

use super::record::{get_group, put_group};

/// A place in the walk over all that a device holds: groups in order, in each (chunk, layer, block).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ScrubCursor {
    /// First by group.
    pub group: GroupId,
    /// Then by place in the group.
    pub at: Cursor,
}

impl ScrubCursor {
    /// Before everything: superblocks and checkpoints are looked at first.
    pub const START: ScrubCursor = ScrubCursor {
        group: GroupId {
            volume: VolumeId(0),
            index: GroupIndex(0),
        },
        at: Cursor {
            chunk: ChunkIndex(0),
            layer: Layer(0),
            block: 0,
        },
    };
}

/// Which pass there is, how far it is, and how the one before it ended. All zero on a device that was never scrubbed.
///
/// Times are seconds since 1970 by the clock of whoever drives the scrub; zero where that was not known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ScrubState {
    /// Number of the pass, from 1; it is under way if `cursor` is there, else over.
    pub pass: u64,
    /// Where the pass goes on.
    pub cursor: Option<ScrubCursor>,
    /// When the pass began.
    pub begun_s: u64,
    /// Blocks of data that the pass has checked.
    pub checked: u64,
    /// Of these, how many were damaged.
    pub damaged: u64,
    /// When the last pass that was finished ended; zero if none was, or its time was not known.
    pub finished_s: u64,
    /// Number of that pass; zero if none was finished.
    pub finished_pass: u64,
    /// Blocks that it checked.
    pub finished_checked: u64,
    /// Of these, how many were damaged.
    pub finished_damaged: u64,
}

impl ScrubState {
    pub(super) const BYTES: usize = 96;

    /// Pass `u64`, kind (`u8`: 1 under way, else 0), three zero bytes, group, cursor (three `u32`), four zero bytes, then
    /// `u64` each: begun, checked, damaged, finished, its pass, its blocks, its damaged blocks. Group and cursor are zero
    /// between passes.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let cursor = self.cursor.unwrap_or(ScrubCursor::START);
        out.put_u64(self.pass);
        out.put_u8(u8::from(self.cursor.is_some()));
        out.put_bytes(&[0; 3]);
        put_group(out, cursor.group);
        cursor.at.encode(out);
        out.put_u32(0);
        for number in [
            self.begun_s,
            self.checked,
            self.damaged,
            self.finished_s,
            self.finished_pass,
            self.finished_checked,
            self.finished_damaged,
        ] {
            out.put_u64(number);
        }
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<ScrubState, DecodeError> {
        let pass = reader.u64()?;
        let kind = reader.u8()?;
        reader.zeroes(3)?;
        let cursor = ScrubCursor {
            group: get_group(reader)?,
            at: Cursor::decode(reader)?,
        };
        reader.zeroes(4)?;
        let cursor = match kind {
            0 if cursor == ScrubCursor::START => None,
            1 => Some(cursor),
            _ => return Err(DecodeError::Invalid("scrub cursor")),
        };
        Ok(ScrubState {
            pass,
            cursor,
            begun_s: reader.u64()?,
            checked: reader.u64()?,
            damaged: reader.u64()?,
            finished_s: reader.u64()?,
            finished_pass: reader.u64()?,
            finished_checked: reader.u64()?,
            finished_damaged: reader.u64()?,
        })
    }
}
