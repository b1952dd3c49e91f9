//! What a volume can be asked, and what it answers: the seam between exports and the data path.

use std::fmt;

use bytes::Bytes;

/// Pairs an answer with its request. Chosen by the caller, unique among its requests in flight.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OpId(pub u64);

/// One operation on a volume. Offsets and lengths are in bytes, multiples of 512, within the volume; anything else is
/// answered with [`VolumeError::Invalid`]. Reads and writes are at most [`OP_BYTES_MAX`]; the others at most the volume.
#[derive(Clone, Debug)]
pub enum VolumeOp {
    /// Read.
    Read {
        /// From where.
        offset: u64,
        /// How much.
        length: u32,
    },
    /// Write. Durable when answered, so a flush has nothing left to do.
    Write {
        /// To where.
        offset: u64,
        /// What. Block-aligned memory at a block-aligned offset goes to the wire without a copy.
        data: Bytes,
    },
    /// Everything answered before is durable when this is answered.
    Flush,
    /// Give the space back; whole blocks within read as zeroes afterwards, partial blocks at the ends are zeroed too.
    Discard {
        /// From where.
        offset: u64,
        /// How much.
        length: u64,
    },
    /// Make it read as zeroes.
    WriteZeroes {
        /// From where.
        offset: u64,
        /// How much.
        length: u64,
        /// Whether space may be given back (else blocks stay recorded as zero).
        may_discard: bool,
    },
    /// Tell data from holes.
    BlockStatus {
        /// From where.
        offset: u64,
        /// How much.
        length: u64,
    },
}

/// Bytes of one read or write at the most: NBD's maximum block size here.
pub const OP_BYTES_MAX: u32 = 32 << 20;

/// What an operation gave.
#[derive(Clone, Debug)]
pub enum VolumeReply {
    /// Done: write, flush, discard, write-zeroes.
    Done,
    /// What was read, as pieces that follow each other.
    Read(Vec<Bytes>),
    /// Runs of data and holes that follow each other from the offset on; at least one, at most
    /// [`STATUS_EXTENTS_MAX`], and then possibly less than was asked.
    BlockStatus(Vec<StatusExtent>),
}

/// A run of bytes that are all data or all hole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StatusExtent {
    /// How long.
    pub length: u64,
    /// Whether there is data. A hole reads as zeroes.
    pub data: bool,
}

/// Runs in one block-status answer at the most.
pub const STATUS_EXTENTS_MAX: usize = 1024;

/// Why an operation was not done. Nothing else ever ends one: while a quorum is out of reach it waits.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum VolumeError {
    /// It is outside the volume, or not a multiple of a sector.
    Invalid(&'static str),
    /// The devices of its group are full.
    NoSpace,
    /// A newer attachment has taken the volume over; every operation from now on ends like this.
    Fenced,
    /// The volume was deleted, or the client was refused it.
    Gone(String),
    /// Every copy of a block is damaged.
    Damaged,
    /// The client is shutting down.
    Shutdown,
}

impl fmt::Display for VolumeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VolumeError::Invalid(what) => write!(f, "invalid request: {what}"),
            VolumeError::NoSpace => f.write_str("the devices that hold this part of the volume are full: add devices"),
            VolumeError::Fenced => f.write_str("another client has taken the volume over; attach again to use it here"),
            VolumeError::Gone(why) => write!(f, "the volume can't be used: {why}"),
            VolumeError::Damaged => f.write_str("every copy of the block is damaged"),
            VolumeError::Shutdown => f.write_str("the client is shutting down"),
        }
    }
}

impl std::error::Error for VolumeError {}
