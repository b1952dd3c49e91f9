//! Commands about one device, on the machine that has it. They ask no cluster.

pub(crate) mod format;
pub(crate) mod inspect;
mod progress;
mod record;
mod text;

use std::path::Path;

use cairn_storage_node::driver::DeviceError;

use crate::failure::{Failure, Kind};

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
