//! Formatting or clearing a device that no node serves, on the caller's thread.

use std::os::unix::fs::FileExt;
use std::rc::Rc;

use cairn_proto::buffer::BlockBuf;
use cairn_proto::limits::BLOCK_BYTES;

use super::DeviceError;
use super::device::{DeviceFile, io_error};
use super::open;
use super::ring::Ring;
use super::thread::{DriverError, no_ring};
use crate::store::superblock::EDGE_BLOCKS;
use crate::store::{FormatParams, Identity};

/// Writes a fresh device. Everything on it is lost: the caller has looked at it before.
///
/// # Errors
/// The device or the system refuses; then it may be half written, and is no device of Cairn until it is formatted again.
pub fn format(device: DeviceFile, params: FormatParams) -> Result<Identity, DriverError> {
    let mut ring = Ring::new().map_err(no_ring)?;
    let geometry = device.geometry();
    let file = Rc::new(device.into_fd());
    open::format(&mut ring, &file, params, geometry)
}

impl DeviceFile {
    /// Makes it blank: both its ends are zeroed. Everything on it is lost: the caller has looked at it before.
    ///
    /// The last block goes last, so that a device of Cairn that was cleared by half still says which one it is.
    ///
    /// # Errors
    /// It can't be written.
    pub fn clear(&self) -> Result<(), DeviceError> {
        let (file, blocks) = (self.file(), self.geometry().blocks);
        let edge = EDGE_BLOCKS.min(blocks);
        let zero = |start: u64, count: u64| {
            let zeroes = BlockBuf::zeroed(count as usize);
            file.write_all_at(&zeroes, start * BLOCK_BYTES as u64)
                .and_then(|()| file.sync_all())
                .map_err(io_error("clearing it"))
        };
        zero(0, edge.min(blocks - 1))?;
        zero(blocks - edge, edge - 1)?;
        zero(blocks - 1, 1)
    }
}
