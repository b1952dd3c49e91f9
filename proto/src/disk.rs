//! The seam to a device: what storage logic asks of it, and what it answers.
//!
//! A [`DiskOp`] maps one to one to a submission queue entry of io_uring, and in the simulator to an entry of a heap
//! ordered by time. The driver owns the buffers of an operation from the moment it takes it until it completes it.
//! Operations may complete in any order; a write is durable only when a flush that was *submitted after the write had
//! completed* has completed (or, if it was asked to be durable itself, or on a device without volatile cache, when it has completed).

use std::fmt;

use bytes::Bytes;

/// A place on a device, in blocks from its start.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct DeviceBlock(pub u64);

impl fmt::Display for DeviceBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "@{}", self.0)
    }
}

/// Pairs a completion with its operation. Chosen by the storage logic, unique among its operations in flight.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DiskToken(pub u64);

/// One operation for a device.
#[derive(Clone, Debug)]
pub enum DiskOp {
    /// Read `blocks` blocks.
    Read {
        /// Comes back with the completion.
        token: DiskToken,
        /// From where.
        at: DeviceBlock,
        /// How many; at least one.
        blocks: u32,
    },
    /// Write the buffers one after the other from `at` on, in one operation.
    Write {
        /// Comes back with the completion.
        token: DiskToken,
        /// To where.
        at: DeviceBlock,
        /// Whole, block-aligned blocks; at least one, at most [`WRITE_BUFFERS_MAX`].
        buffers: Vec<Bytes>,
        /// Whether what it writes is durable when it completes. It says nothing of any other write.
        durable: bool,
    },
    /// Make every write that has completed durable.
    Flush {
        /// Comes back with the completion.
        token: DiskToken,
    },
}

/// Buffers of one write at the most (the kernel's `IOV_MAX` is 1024).
pub const WRITE_BUFFERS_MAX: usize = 512;

/// The end of a [`DiskOp`].
#[derive(Clone, Debug)]
pub struct DiskDone {
    /// Of which operation.
    pub token: DiskToken,
    /// The content for a read (block-aligned, as long as asked), empty for the others.
    pub result: Result<Bytes, DiskError>,
}

/// The device refused an operation. After a failed write or flush nothing is known about what it holds of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DiskError {
    /// The operating system's error number (`EIO` where there is none better).
    pub errno: i32,
}

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "device error: {}", std::io::Error::from_raw_os_error(self.errno))
    }
}

impl std::error::Error for DiskError {}

/// What the storage logic must know of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DiskGeometry {
    /// Its length in whole blocks.
    pub blocks: u64,
    /// Whether completed writes are lost when power fails before a flush.
    pub volatile_cache: bool,
}
