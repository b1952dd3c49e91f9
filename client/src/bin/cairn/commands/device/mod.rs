//! Commands about one device, on the machine that has it. They ask no cluster.

pub(crate) mod format;
pub(crate) mod inspect;
mod progress;
mod record;
mod text;

use std::path::Path;
use std::time::Instant;

use cairn_storage_node::driver::DeviceError;

use crate::failure::{Failure, Kind};
use crate::limits::{IN_USE_PATIENCE, POLL_INTERVAL};

/// Opens a device. A node that was just stopped or killed may have it for a moment longer: that is waited for.
fn patiently<T, E>(mut open: impl FnMut() -> Result<T, E>, in_use: impl Fn(&E) -> bool) -> Result<T, E> {
    let end = Instant::now() + IN_USE_PATIENCE;
    loop {
        match open() {
            Err(error) if in_use(&error) && Instant::now() < end => std::thread::sleep(POLL_INTERVAL),
            result => return result,
        }
    }
}

/// A device that can't be opened.
fn failure_of(path: &Path, error: &DeviceError) -> Failure {
    let kind = match error {
        DeviceError::Missing | DeviceError::Kind(_) => Kind::NotFound,
        DeviceError::InUse => Kind::Occupied,
        DeviceError::TooSmall { .. } | DeviceError::NoDirectIo | DeviceError::Sectors(_) => Kind::Refused,
        DeviceError::Io { .. } => Kind::Failed,
    };
    Failure::new(kind, format!("can't use the device {}: {error}", path.display()))
}
