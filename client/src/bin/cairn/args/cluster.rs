//! Commands that ask the cluster, or change it.

use cairn_proto::limits::REPLICAS_MAX;
use cairn_proto::units::ByteSize;
use clap::{Args, Subcommand, ValueEnum};

use super::{FormatDevice, InspectDevice, Key};
use crate::limits::EVENTS_SHOWN;

#[derive(Subcommand, Debug)]
pub(crate) enum VolumeCommand {
    /// Create a volume
    Create(CreateVolume),
    /// List all volumes
    #[command(visible_alias = "ls", after_help = "Example:\n  cairn volume list --json")]
    List,
    /// Show one volume and where its copies are
    Show(ShowVolume),
    /// Make a volume larger
    Grow(GrowVolume),
    /// Delete a volume and all its data
    #[command(visible_alias = "rm")]
    Delete(DeleteVolume),
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  cairn volume create demo 10GiB\n  cairn volume create scratch 512M --copies 1")]
pub(crate) struct CreateVolume {
    /// Its name: letters, digits, `-`, `_` and `.`, up to 128
    pub(crate) name: String,
    /// Its size, as 10GiB or 512M (powers of 1024; a multiple of 4096 bytes)
    pub(crate) size: ByteSize,
    /// Copies of each block
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=REPLICAS_MAX as i64))]
    pub(crate) copies: u32,
    /// Durable copies that acknowledge a write; a majority unless told otherwise
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=REPLICAS_MAX as i64))]
    pub(crate) write_quorum: Option<u32>,
    /// Go on writing when a single copy is left: no wait, and no second copy of what is written then
    #[arg(long)]
    pub(crate) allow_single_copy: bool,
    /// How far apart the copies must stand at least
    #[arg(long, value_enum, default_value_t = SpreadArg::Host)]
    pub(crate) spread: SpreadArg,
}

/// How far apart copies stand.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum SpreadArg {
    /// On distinct devices, perhaps of one host: for trials
    Device,
    /// On distinct hosts
    Host,
    /// In distinct racks
    Rack,
    /// In distinct rooms
    Room,
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  cairn volume show demo")]
pub(crate) struct ShowVolume {
    /// Which
    pub(crate) name: String,
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  cairn volume grow demo 20GiB")]
pub(crate) struct GrowVolume {
    /// Which
    pub(crate) name: String,
    /// Its new size, as 20GiB; it can't become smaller
    pub(crate) size: ByteSize,
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  cairn volume delete demo\n  cairn volume delete demo --yes")]
pub(crate) struct DeleteVolume {
    /// Which
    pub(crate) name: String,
    /// Do not ask. Needed where there is no terminal to ask on
    #[arg(long, short)]
    pub(crate) yes: bool,
    /// Even when a client holds it; its I/O fails from then on
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Subcommand, Debug)]
pub(crate) enum NodeCommand {
    /// List all storage nodes
    #[command(visible_alias = "ls", after_help = "Example:\n  cairn node list")]
    List,
    /// Show one storage node and its devices
    Show(ShowNode),
    /// Have a node verify all that its devices hold, now
    Scrub(ScrubNode),
    /// Empty a node while it serves on: its copies are made elsewhere, and it gets no new ones
    Drain(DrainNode),
    /// Let a node hold copies again
    Undrain(UndrainNode),
    /// Look at a device that no node serves: what it holds, and whether all of it can be read
    Inspect(InspectDevice),
    /// Format a device, or make it blank
    Format(FormatDevice),
}

#[derive(Subcommand, Debug)]
pub(crate) enum MetaCommand {
    /// List all metadata servers
    #[command(visible_alias = "ls", after_help = "Example:\n  cairn meta list")]
    List,
    /// Remove a metadata server for good: its process ends, and its number is never used again
    Remove(RemoveMeta),
}

#[derive(Args, Debug)]
#[command(
    after_help = "It may lead, or be gone. It is refused when too few of those that are left would answer. Before it is removed a successor is added:\n`cairn meta --join` starts one.\n\nExample:\n  cairn meta remove 2 --yes --cluster-key /etc/cairn/cluster.key"
)]
pub(crate) struct RemoveMeta {
    /// Its number
    pub(crate) id: u64,
    /// Do not ask. Needed where there is no terminal to ask on
    #[arg(long, short)]
    pub(crate) yes: bool,
    #[command(flatten)]
    pub(crate) key: Key,
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  cairn node show node-1")]
pub(crate) struct ShowNode {
    /// Its name or number
    pub(crate) node: String,
}

#[derive(Args, Debug)]
#[command(
    after_help = "No volume has a copy less at any time. It is refused when some copy has no place elsewhere. When `cairn status` says that the\nnode holds nothing it may be stopped for good.\n\nExample:\n  cairn node drain node-1 --yes"
)]
pub(crate) struct DrainNode {
    /// Its name or number
    pub(crate) node: String,
    /// Do not ask. Needed where there is no terminal to ask on
    #[arg(long, short)]
    pub(crate) yes: bool,
}

#[derive(Args, Debug)]
#[command(after_help = "What was made elsewhere stays there.\n\nExample:\n  cairn node undrain node-1")]
pub(crate) struct UndrainNode {
    /// Its name or number
    pub(crate) node: String,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Every device is verified now and then anyway. This begins at once, at the usual rate.\n\nExample:\n  cairn node scrub node-1\n  cairn node scrub node-1 --device 3f2a"
)]
pub(crate) struct ScrubNode {
    /// Its name or number
    pub(crate) node: String,
    /// Only this device: the begin of its UUID; may be given more than once
    #[arg(long = "device", value_name = "UUID")]
    pub(crate) devices: Vec<String>,
}

/// Show how the cluster is.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  cairn status\n  cairn --config DIR/cairn.toml status --check && echo all is well")]
pub(crate) struct Status {
    /// Exit with code 8 when something is wrong
    #[arg(long)]
    pub(crate) check: bool,
}

/// Show what has happened in the cluster, and why.
#[derive(Args, Debug)]
#[command(after_help = "\
The metadata servers keep the last 4096 events. Times are UTC, by the clock of the server that led. With --json and --follow
each line is a document of its own.

Example:
  cairn events
  cairn events --follow --volume demo")]
pub(crate) struct Events {
    /// Go on with what happens from now on, until it is interrupted
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Only what is about this volume
    #[arg(long, value_name = "NAME")]
    pub(crate) volume: Option<String>,
    /// The newest so many
    #[arg(long, value_name = "N", default_value_t = EVENTS_SHOWN, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) limit: u32,
}
