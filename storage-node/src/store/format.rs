//! Writing a fresh device.

use cairn_proto::disk::{DiskDone, DiskOp};

use super::status::OpenError;
use super::superblock::Identity;

/// Writes a fresh device: hand it completions, take operations, until it is done. The caller has probed the device
/// first: everything on it is lost.
#[derive(Debug)]
pub struct Formatter {
    _identity: Identity,
}

impl Formatter {
    /// An operation of it has completed.
    pub fn handle_disk(&mut self, _done: DiskDone) {
        unimplemented!()
    }

    /// The next operation for the device.
    pub fn poll_op(&mut self) -> Option<DiskOp> {
        unimplemented!()
    }

    /// `None` while it works; then how it ended.
    pub fn result(&self) -> Option<Result<Identity, OpenError>> {
        unimplemented!()
    }
}
