//! Commands that run a part of the cluster, or all of it.

use std::net::SocketAddr;
use std::path::PathBuf;

use cairn_client::config::{MemberAddress, Span, WriteCache};
use cairn_proto::units::ByteSize;
use clap::Args;

use super::{MetaCommand, NodeCommand, host_port};
use crate::limits::{DEV_METAS_MAX, DEV_NODES_MAX};

/// Start a whole cluster on this machine: metadata servers, storage nodes, an NBD export
///
/// Each is a process of its own. When the volumes can be used it prints a line `ready nbd+unix:///NAME?socket=DIR/nbd.sock` for each, then `cluster
/// ready`, and stays in the foreground; Ctrl-C stops everything. All data stays in DIR: start it again and it is back.
#[derive(Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "\
Examples:
  cairn dev
  cairn dev --dir /tmp/c --volume vm1:10GiB --volume vm2:512M
  qemu-system-x86_64 ... -drive file='nbd+unix:///vm1?socket=/tmp/c/nbd.sock',format=raw,if=virtio
  nbdcopy disk.img 'nbd+unix:///vm1?socket=/tmp/c/nbd.sock'"
)]
pub(crate) struct Dev {
    /// Where everything is kept [default: ./cairn-data]
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// A volume to create unless it exists, as demo:1GiB; may be repeated [default: demo:1GiB in a new cluster]
    #[arg(long = "volume", value_name = "NAME:SIZE")]
    pub(crate) volumes: Vec<VolumeSpec>,
    /// Storage nodes [default: 3, or as many as DIR has]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=DEV_NODES_MAX))]
    pub(crate) nodes: Option<u32>,
    /// Metadata servers: 1, 3 or 5 [default: 3, or as many as DIR has]
    #[arg(long, value_name = "N", value_parser = odd)]
    pub(crate) metas: Option<u32>,
    /// Size of each new device file; it takes space only as it is written [default: 8GiB]
    #[arg(long, value_name = "SIZE")]
    pub(crate) device_size: Option<ByteSize>,
    /// Show the logs of all processes here as well as in DIR/log
    #[arg(long)]
    pub(crate) foreground_logs: bool,
    /// Start a process again when it dies
    #[arg(long)]
    pub(crate) supervise: bool,
    /// How long a node may be gone before its copies are rebuilt on others, as 90s, 10m or 2h [default: 10m]
    #[arg(long, value_name = "TIME")]
    pub(crate) rebuild_after: Option<Span>,
    /// Serve the volumes on this TCP address too
    #[arg(long, value_name = "ADDR")]
    pub(crate) nbd_tcp: Option<SocketAddr>,
}

/// List and remove metadata servers; without a subcommand, run one.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
#[command(after_help = "\
Examples:
  cairn meta list
  cairn meta --id 4 --join --meta 10.0.0.1:7401,10.0.0.2:7401 --dir /var/lib/cairn/meta --listen 10.0.0.4:7401 \\
      --cluster-key /etc/cairn/cluster.key
  cairn meta --id 1 --dir /var/lib/cairn/meta --listen 10.0.0.1:7401 --cluster-key /etc/cairn/cluster.key \\
      --member 1=10.0.0.1:7401 --member 2=10.0.0.2:7401 --member 3=10.0.0.3:7401
  cairn meta --config /etc/cairn/cairn.toml

A new cluster key: (umask 077; tr -dc 0-9a-f < /dev/urandom | head -c 64 > cluster.key)")]
pub(crate) struct Meta {
    #[command(subcommand)]
    pub(crate) command: Option<MetaCommand>,
    /// Its number among the metadata servers, from 1
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) id: Option<u64>,
    /// Where it keeps its log and state
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Where it listens
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: Option<SocketAddr>,
    /// How others reach it, when that is not where it listens
    #[arg(long, value_name = "HOST:PORT", value_parser = host_port)]
    pub(crate) advertise: Option<String>,
    /// A first metadata server of a new cluster, this one included; repeated
    #[arg(long = "member", value_name = "ID=HOST:PORT", conflicts_with = "join")]
    pub(crate) members: Vec<MemberAddress>,
    /// Begin as a further metadata server of the cluster at --meta, under a number above all that were ever used
    #[arg(long)]
    pub(crate) join: bool,
    /// How long a device may be silent before its copies are rebuilt on others, as 90s, 10m or 2h; the same on all
    /// metadata servers [default: 10m]
    #[arg(long, value_name = "TIME")]
    pub(crate) rebuild_after: Option<Span>,
    #[command(flatten)]
    pub(crate) key: Key,
    #[command(flatten)]
    pub(crate) process: Process,
}

/// List and show storage nodes; without a subcommand, run one.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
#[command(after_help = "\
Examples:
  cairn node list
  cairn node --name host-4 --listen 10.0.0.4:7402 --device /dev/nvme0n1 --device /dev/nvme1n1 \\
      --meta 10.0.0.1:7401,10.0.0.2:7401 --cluster-key /etc/cairn/cluster.key
  cairn node --config /etc/cairn/cairn.toml")]
pub(crate) struct Node {
    #[command(subcommand)]
    pub(crate) command: Option<NodeCommand>,
    /// Its name in the cluster [default: the host's name]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Where it listens for clients and other nodes
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: Option<SocketAddr>,
    /// How others reach it, when that is not where it listens
    #[arg(long, value_name = "HOST:PORT", value_parser = host_port)]
    pub(crate) advertise: Option<String>,
    /// A device: a block device or a file; may be repeated
    #[arg(long = "device", value_name = "PATH")]
    pub(crate) devices: Vec<PathBuf>,
    /// Overrule what the kernel says of a device's write cache: `none` where completed writes survive a loss of power (a
    /// battery, capacitors), `volatile` where they do not. With `none` nothing is flushed: IF IT IS WRONG, A POWER FAILURE LOSES
    /// WRITES THAT WERE ACKNOWLEDGED. May be repeated [default: detected; files are always volatile]
    #[arg(long = "write-cache", value_name = "PATH=none|volatile", value_parser = write_cache)]
    pub(crate) write_caches: Vec<(PathBuf, WriteCache)>,
    /// Make device files that do not exist yet, of this size
    #[arg(long, value_name = "SIZE")]
    pub(crate) device_size: Option<ByteSize>,
    /// The host, as a failure domain [default: the node's name]
    #[arg(long, value_name = "NAME")]
    pub(crate) host: Option<String>,
    /// The rack that the host stands in
    #[arg(long, value_name = "NAME")]
    pub(crate) rack: Option<String>,
    /// The room that the rack stands in
    #[arg(long, value_name = "NAME")]
    pub(crate) room: Option<String>,
    #[command(flatten)]
    pub(crate) key: Key,
    #[command(flatten)]
    pub(crate) process: Process,
}

/// Serve volumes over NBD.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cairn export --meta 10.0.0.1:7401 --nbd-unix /run/cairn/nbd.sock
  cairn export --meta 10.0.0.1:7401 --nbd-tcp 127.0.0.1:10809 --volume vm1
  nbdinfo 'nbd+unix:///vm1?socket=/run/cairn/nbd.sock'")]
pub(crate) struct Export {
    /// The Unix socket to serve
    #[arg(long, value_name = "PATH")]
    pub(crate) nbd_unix: Option<PathBuf>,
    /// The TCP address to serve. NBD has no authentication: only where everybody on the network is trusted
    #[arg(long, value_name = "ADDR")]
    pub(crate) nbd_tcp: Option<SocketAddr>,
    /// Refuse writes
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Serve only this volume; may be repeated [default: all]
    #[arg(long = "volume", value_name = "NAME")]
    pub(crate) volumes: Vec<String>,
    #[command(flatten)]
    pub(crate) process: Process,
}

/// The cluster's secret.
#[derive(Args, Debug)]
pub(crate) struct Key {
    /// File with the cluster key: 64 hexadecimal digits, for its owner only, the same on all servers and nodes
    #[arg(long = "cluster-key", value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
}

/// What every process does beside its task.
#[derive(Args, Debug)]
#[command(next_help_heading = "Process options")]
pub(crate) struct Process {
    /// Serve metrics for Prometheus at http://ADDR/metrics
    #[arg(long, value_name = "ADDR")]
    pub(crate) metrics: Option<SocketAddr>,
    /// Append logs to this file instead of standard error
    #[arg(long, value_name = "FILE")]
    pub(crate) log_file: Option<PathBuf>,
    /// Write the process id here while it runs
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
}

/// A volume that `cairn dev` is to have, written `demo:1GiB`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct VolumeSpec {
    /// Its name.
    pub(crate) name: String,
    /// Its size.
    pub(crate) size: ByteSize,
}

impl std::str::FromStr for VolumeSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<VolumeSpec, String> {
        let (name, size) = text
            .rsplit_once(':')
            .filter(|(name, _)| !name.is_empty())
            .ok_or_else(|| format!("`{text}` is not NAME:SIZE: write it as demo:1GiB"))?;
        let size = size
            .parse()
            .map_err(|error: cairn_proto::units::ParseByteSizeError| error.to_string())?;
        Ok(VolumeSpec {
            name: name.to_string(),
            size,
        })
    }
}

fn write_cache(text: &str) -> Result<(PathBuf, WriteCache), String> {
    let parts = text.rsplit_once('=').filter(|(path, _)| !path.is_empty());
    let (path, cache) = parts.ok_or_else(|| format!("`{text}` is not PATH=none or PATH=volatile"))?;
    Ok((PathBuf::from(path), cache.parse()?))
}

/// A majority of an even number is no smaller than that of the next odd one, and fails sooner.
fn odd(text: &str) -> Result<u32, String> {
    let number: u32 = text.parse().map_err(|_| "write a number".to_string())?;
    if number % 2 == 1 && number <= DEV_METAS_MAX {
        Ok(number)
    } else {
        Err(format!("write an odd number up to {DEV_METAS_MAX}: 1, 3 or 5"))
    }
}
