//! What the index says of one block: sixteen bytes, the same in index pages and in copy records.

use cairn_proto::block::{BlockState, Content};
use cairn_proto::checksum::Checksum;
use cairn_proto::codec::{DecodeError, Put, Reader};
use cairn_proto::ids::Version;

use super::superblock::SPACE_START;

/// What a block is and where it stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Entry {
    pub(super) version: Version,
    /// Zero unless there is data.
    pub(super) checksum: u32,
    /// A device block, or one of the reserved values below.
    pub(super) place: u32,
}

/// Absent: never written with version zero, else a tombstone.
const ABSENT: u32 = 0;
/// Acknowledged, and found unreadable.
const DAMAGED: u32 = 0xffff_fffe;
/// Zeroes.
const ZERO: u32 = 0xffff_ffff;

const _: () = assert!(super::limits::DEVICE_BLOCKS_MAX <= DAMAGED as u64);

impl Entry {
    pub(super) const ABSENT: Entry = Entry {
        version: Version::ZERO,
        checksum: 0,
        place: ABSENT,
    };

    pub(super) fn data(version: Version, checksum: Checksum, place: u32) -> Entry {
        debug_assert!(
            u64::from(place) >= SPACE_START && place < DAMAGED,
            "data at block {place}"
        );
        Entry {
            version,
            checksum: checksum.0,
            place,
        }
    }

    #[cfg(test)]
    pub(super) fn damaged(version: Version) -> Entry {
        Entry {
            version,
            checksum: 0,
            place: DAMAGED,
        }
    }

    /// Where its data is, if it has any.
    pub(super) fn data_place(&self) -> Option<u32> {
        (!matches!(self.place, ABSENT | ZERO | DAMAGED)).then_some(self.place)
    }

    /// Whether it is known to be lost.
    pub(super) fn is_damaged(&self) -> bool {
        self.place == DAMAGED
    }

    pub(super) fn is_absent(&self) -> bool {
        self.place == ABSENT
    }

    pub(super) fn state(&self) -> BlockState {
        let content = match self.place {
            ABSENT => Content::Absent,
            ZERO => Content::Zero,
            DAMAGED => Content::Damaged,
            _ => Content::Data(Checksum(self.checksum)),
        };
        BlockState {
            content,
            version: self.version,
        }
    }

    pub(super) fn encode(&self, out: &mut impl Put) {
        out.put_u64(self.version.to_bits());
        out.put_u32(self.checksum);
        out.put_u32(self.place);
    }

    /// Reads an entry. `end` is the first block after the space.
    pub(super) fn decode(reader: &mut Reader<'_>, end: u32) -> Result<Entry, DecodeError> {
        let entry = Entry {
            version: Version::from_bits(reader.u64()?),
            checksum: reader.u32()?,
            place: reader.u32()?,
        };
        match entry.data_place() {
            Some(place) => check_place(place, end)?,
            None if entry.checksum != 0 => return Err(DecodeError::Invalid("checksum")),
            None => {}
        }
        Ok(entry)
    }
}

/// A place of data or metadata must lie in the space.
pub(super) fn check_place(place: u32, end: u32) -> Result<(), DecodeError> {
    if u64::from(place) >= SPACE_START && place < end {
        Ok(())
    } else {
        Err(DecodeError::Invalid("place"))
    }
}

/// What takes no space and so can be run-length.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Hole {
    Absent,
    Zero,
}

/// Blocks that are all the same hole with the same version.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Uniform {
    pub(super) hole: Hole,
    pub(super) version: Version,
}

impl Uniform {
    pub(super) const NEVER: Uniform = Uniform {
        hole: Hole::Absent,
        version: Version::ZERO,
    };

    pub(super) fn entry(self) -> Entry {
        Entry {
            version: self.version,
            checksum: 0,
            place: match self.hole {
                Hole::Absent => ABSENT,
                Hole::Zero => ZERO,
            },
        }
    }

    /// The hole that an entry is, if it is one.
    pub(super) fn of(entry: &Entry) -> Option<Uniform> {
        let hole = match entry.place {
            ABSENT => Hole::Absent,
            ZERO => Hole::Zero,
            _ => return None,
        };
        Some(Uniform {
            hole,
            version: entry.version,
        })
    }

    /// Kind (`u8`: 0 absent, 1 zero), three zero bytes, version.
    pub(super) fn encode(self, out: &mut impl Put) {
        out.put_u8(self.hole as u8);
        out.put_bytes(&[0; 3]);
        out.put_u64(self.version.to_bits());
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Uniform, DecodeError> {
        let hole = match reader.u8()? {
            0 => Hole::Absent,
            1 => Hole::Zero,
            _ => return Err(DecodeError::Invalid("hole")),
        };
        reader.zeroes(3)?;
        Ok(Uniform {
            hole,
            version: Version::from_bits(reader.u64()?),
        })
    }
}
