//! What one storage node must be told.

use std::net::SocketAddr;
use std::path::PathBuf;

use cairn_proto::capability::ClusterKey;
use cairn_proto::units::ByteSize;

use crate::driver::DriverLimits;
use crate::host::BackgroundConfig;
use crate::host::limits::HostLimits;
use crate::store::StoreLimits;

/// Devices of one node at the most.
pub const DEVICES_MAX: usize = 64;
/// Bytes of index that the stores of all devices of a node keep in memory at the most, unless told otherwise.
const INDEX_BYTES: usize = 64 << 20;

/// One storage node.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// As the operator names hosts apart; 1 to 128 of letters, digits, `-`, `_`, `.`. No two nodes have the same.
    pub name: String,
    /// Its devices: 1 to 64.
    pub devices: Vec<DeviceConfig>,
    /// Where clients connect to the first device. The second device listens at the next port, and so on. With port 0 the
    /// system chooses, and it may choose another one at the next start.
    pub listen: SocketAddr,
    /// `host:port` where clients reach the first device, counted up for the others in the same way; empty for where it
    /// listens.
    pub advertise: String,
    /// `host:port` of the metadata servers; one that lives is enough.
    pub meta: Vec<String>,
    /// The secret that metadata servers and nodes share.
    pub cluster_key: ClusterKey,
    /// Where it stands.
    pub domain: FailureDomain,
    /// Where Prometheus metrics are served; `None` for nowhere.
    pub metrics_listen: Option<SocketAddr>,
    /// What its devices do when nobody asks. The wall clock is the machine's, whatever it says here.
    pub background: BackgroundConfig,
    /// Bounds, for tests and unusual machines.
    pub limits: NodeLimits,
}

/// One device of a node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceConfig {
    /// A block device or a file.
    pub path: PathBuf,
    /// A file that does not exist yet is made with this size; without it a missing file is an error.
    pub create_size: Option<ByteSize>,
    /// Whether completed writes are lost when power fails before a flush; `None` to find out. To say no to a device that
    /// has a volatile cache loses data.
    pub volatile_cache: Option<bool>,
}

impl DeviceConfig {
    /// A device at this path, that must exist.
    pub fn new(path: impl Into<PathBuf>) -> DeviceConfig {
        DeviceConfig {
            path: path.into(),
            create_size: None,
            volatile_cache: None,
        }
    }
}

/// Where a node stands, from the outside in. Empty means not told apart.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct FailureDomain {
    /// The room.
    pub room: String,
    /// The rack within the room.
    pub rack: String,
    /// The host within the rack.
    pub host: String,
}

/// Bounds of a node.
#[derive(Clone, Debug, Default)]
pub struct NodeLimits {
    /// Of each device's host.
    pub host: HostLimits,
    /// Of each device's store. `index_memory_max` is lowered so that all devices together keep a bounded part of
    /// their index in memory, and `zero_ahead` is set for files and cleared for block devices.
    pub store: StoreLimits,
    /// Of each device's driver.
    pub driver: DriverLimits,
    /// A planted bug of each device's host; one of its store is in the limits of that.
    #[cfg(feature = "canary")]
    pub planted: crate::host::Canary,
}

impl NodeLimits {
    /// For one of so many devices.
    pub(crate) fn store_of(&self, devices: usize, is_block_device: bool) -> StoreLimits {
        StoreLimits {
            index_memory_max: self.store.index_memory_max.min(INDEX_BYTES / devices.max(1)),
            zero_ahead: !is_block_device,
            ..self.store.clone()
        }
    }
}
