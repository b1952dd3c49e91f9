//! Formatting a device by hand: what stands on it is looked at first, and only what was named is destroyed.

use std::path::{Path, PathBuf};

use cairn_proto::checksum::ChecksumAlgorithm;
use cairn_proto::disk::DiskGeometry;
use cairn_proto::ids::{ClusterId, DeviceUuid, Incarnation};
use cairn_proto::units::ByteSize;

use super::NodeError;
use super::device::random;
use crate::driver::{self, DeviceFile, DevicePath, DriverError};
use crate::store::{FormatParams, Identity, OpenError, Probe};

/// What formatting a device would destroy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Loss {
    /// Nothing: it is blank.
    Nothing,
    /// A device of Cairn.
    Device(Identity),
    /// Something else, or a device of Cairn that does not say which one it is any more.
    Other {
        /// What it looks like, for a person: `a partition table (GPT)`.
        words: String,
    },
}

/// What became of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Formatted {
    /// It is a device of this cluster.
    Device(Identity),
    /// It is blank: the node that gets it formats it for its cluster.
    Blank,
}

/// A device that is about to be formatted: open, locked against everybody else, and looked at.
#[derive(Debug)]
pub struct FormatPlan {
    device: DeviceFile,
    path: PathBuf,
    loss: Loss,
    /// What an earlier formatting has left stands on it.
    is_unfinished: bool,
}

impl FormatPlan {
    /// Opens the device and looks at it. A file that does not exist is made with the size. Nothing that exists is changed.
    ///
    /// # Errors
    /// It can't be used, or a process uses it.
    pub fn open(path: &Path, create_size: Option<ByteSize>) -> Result<FormatPlan, NodeError> {
        let of_device = |error| NodeError::Device {
            path: path.to_path_buf(),
            error,
        };
        let device = DeviceFile::open(&DevicePath {
            path: path.to_path_buf(),
            create_size,
            volatile_cache: None,
        })
        .map_err(of_device)?;
        let found = device.probe().map_err(of_device)?;
        let is_unfinished = found == Probe::Unfinished;
        let loss = match found {
            Probe::Blank | Probe::Unfinished => Loss::Nothing,
            Probe::Cairn(superblock) => Loss::Device(superblock.identity),
            Probe::Foreign { words } => Loss::Other { words },
            Probe::Truncated { .. } => Loss::Other {
                words: "a device of Cairn that has lost its end".to_string(),
            },
            Probe::Damaged { words } => Loss::Other {
                words: format!("a device of Cairn that is damaged ({words})"),
            },
        };
        Ok(FormatPlan {
            device,
            path: path.to_path_buf(),
            loss,
            is_unfinished,
        })
    }

    /// What would be destroyed.
    pub fn loss(&self) -> &Loss {
        &self.loss
    }

    /// How large it is.
    pub fn geometry(&self) -> DiskGeometry {
        self.device.geometry()
    }

    /// Formats it for a cluster. A device of Cairn keeps its UUID and gets a new incarnation, so that the metadata servers
    /// know that what it held is gone; any other gets a new UUID. The caller has agreed to the [`loss`](Self::loss).
    ///
    /// # Errors
    /// The device or the system refuses; then it may be half written.
    pub fn format(self, cluster: ClusterId) -> Result<Formatted, NodeError> {
        let mut incarnation = Incarnation(u64::from_le_bytes(random()?).max(1));
        let mut device = DeviceUuid(random()?);
        if let Loss::Device(former) = &self.loss {
            device = former.device.uuid;
            if incarnation == former.device.incarnation {
                incarnation = Incarnation((incarnation.0 ^ 1).max(2));
            }
        }
        let params = FormatParams {
            cluster,
            device,
            incarnation,
            checksum: ChecksumAlgorithm::Crc32,
        };
        let path = self.path;
        let formatted = driver::format(self.device, params).map_err(|error| match error {
            DriverError::Store(error) => NodeError::Store { path, error },
            DriverError::Io { doing, error } => NodeError::Device {
                path,
                error: driver::DeviceError::Io { doing, error },
            },
            error => NodeError::Ended { path, error },
        });
        formatted.map(Formatted::Device)
    }

    /// Makes it blank. The caller has agreed to the [`loss`](Self::loss).
    ///
    /// # Errors
    /// The device refuses; then it may be half cleared.
    pub fn clear(self) -> Result<Formatted, NodeError> {
        let path = self.path;
        if self.loss != Loss::Nothing || self.is_unfinished {
            self.device.clear().map_err(|error| NodeError::Device {
                path: path.clone(),
                error,
            })?;
        }
        match self.device.probe() {
            Ok(Probe::Blank) => Ok(Formatted::Blank),
            Ok(_) => Err(NodeError::Store {
                path,
                error: OpenError::Damaged {
                    words: "it does not keep what is written to it".to_string(),
                },
            }),
            Err(error) => Err(NodeError::Device { path, error }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::{DeviceError, DeviceReader};
    use crate::store::inspect::{InspectOptions, inspect};

    const ONE: ClusterId = ClusterId([1; 16]);
    const SIZE: Option<ByteSize> = Some(ByteSize(8 << 20));

    fn formatted(path: &Path, cluster: ClusterId) -> Identity {
        match FormatPlan::open(path, SIZE).unwrap().format(cluster).unwrap() {
            Formatted::Device(identity) => identity,
            Formatted::Blank => panic!("it was formatted"),
        }
    }

    #[test]
    fn a_blank_file_becomes_a_device_and_the_device_another_format_of_itself() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("device");
        let first = formatted(&path, ONE);
        let plan = FormatPlan::open(&path, None).unwrap();
        assert_eq!(plan.loss(), &Loss::Device(first));
        let locked = FormatPlan::open(&path, None);
        assert!(matches!(
            locked,
            Err(NodeError::Device {
                error: DeviceError::InUse,
                ..
            })
        ));
        drop(plan);
        let second = formatted(&path, ClusterId([2; 16]));
        assert_eq!(
            (second.device.uuid, second.cluster),
            (first.device.uuid, ClusterId([2; 16]))
        );
        assert_ne!(second.device.incarnation, first.device.incarnation);
        let mut reader = DeviceReader::open(&path).unwrap();
        let found = inspect(&mut reader, InspectOptions::default(), &mut |_| {});
        assert_eq!((found.identity, found.damage.total), (Some(second), 0));
        assert!(found.contents.is_ok());
    }

    #[test]
    fn a_device_can_be_made_blank_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("device");
        formatted(&path, ONE);
        assert_eq!(
            FormatPlan::open(&path, None).unwrap().clear().unwrap(),
            Formatted::Blank
        );
        assert_eq!(FormatPlan::open(&path, None).unwrap().loss(), &Loss::Nothing);
        std::fs::write(&path, vec![7; 2 << 20]).unwrap();
        let plan = FormatPlan::open(&path, None).unwrap();
        assert!(matches!(plan.loss(), Loss::Other { .. }));
        plan.clear().unwrap();
        assert_eq!(FormatPlan::open(&path, None).unwrap().loss(), &Loss::Nothing);
    }
}
