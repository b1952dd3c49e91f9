//! Commands about one device, on the machine that has it.

use std::path::PathBuf;

use cairn_proto::ids::{ClusterId, DeviceUuid, VolumeId};
use cairn_proto::units::ByteSize;
use clap::Args;

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cairn node inspect /dev/nvme0n1
  cairn node inspect /dev/nvme0n1 --verify
  cairn node inspect disk.img --verify --json | jq '.damage[]'

Nothing is written, and no node can serve the device meanwhile. It ends with code 9 when something is damaged, 3 when there
is no device of Cairn, and 7 while a node serves it.")]
pub(crate) struct InspectDevice {
    /// A block device or a file, also a copy of one
    #[arg(value_name = "DEVICE")]
    pub(crate) path: PathBuf,
    /// Read every block of data and compare it with its checksum
    #[arg(long)]
    pub(crate) verify: bool,
    /// Look at the replicas of this volume only
    #[arg(long, value_name = "ID", value_parser = volume_id)]
    pub(crate) volume: Option<VolumeId>,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cairn node format disk.img --size 100GiB
  cairn node format /dev/nvme0n1 --wipe 0f3b5a52-7f3e-4a63-9e0c-0d4c9f7f3a11
  cairn node format /dev/sdb --wipe-foreign /dev/sdb

A device that holds anything is refused unless that is named. A blank device needs no formatting: the node that is started
with it formats it for its cluster. Other devices are made blank, but a device of Cairn, which is formatted for the cluster
that it belonged to, with its UUID and a new incarnation: what it held is gone, and the cluster knows. --cluster and --blank
say otherwise.")]
pub(crate) struct FormatDevice {
    /// A block device or a file
    #[arg(value_name = "DEVICE")]
    pub(crate) path: PathBuf,
    /// Make a file of this size, where there is none
    #[arg(long, value_name = "SIZE")]
    pub(crate) size: Option<ByteSize>,
    /// Format it for this cluster
    #[arg(long, value_name = "ID", conflicts_with = "blank")]
    pub(crate) cluster: Option<ClusterId>,
    /// Only make it blank: it becomes a new device of the cluster whose node is started with it
    #[arg(long)]
    pub(crate) blank: bool,
    /// Erase the device of Cairn with this UUID, and all its data
    #[arg(long, value_name = "UUID", conflicts_with = "wipe_foreign")]
    pub(crate) wipe: Option<DeviceUuid>,
    /// Erase what is on it although it is not Cairn's (or too damaged to tell); DEVICE written once more
    #[arg(long, value_name = "DEVICE")]
    pub(crate) wipe_foreign: Option<PathBuf>,
    /// Do not ask. What a device holds must be named all the same: --wipe, --wipe-foreign
    #[arg(long, short)]
    pub(crate) yes: bool,
}

fn volume_id(text: &str) -> Result<VolumeId, String> {
    let id = text
        .parse()
        .map_err(|_| "write the number of a volume, as `cairn volume show` tells it")?;
    Ok(VolumeId(id))
}
