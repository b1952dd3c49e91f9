//! What can be written on the command line.

mod cluster;
mod device;
mod process;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

pub(crate) use cluster::{
    CreateVolume, DeleteVolume, DrainNode, Events, GrowVolume, MetaCommand, NodeCommand, RemoveMeta, ScrubNode,
    ShowNode, ShowVolume, SpreadArg, Status, UndrainNode, VolumeCommand,
};
pub(crate) use device::{FormatDevice, InspectDevice};
pub(crate) use process::{Dev, Export, Key, Meta, Node, Process, VolumeSpec};

const AFTER_HELP: &str = "\
Which cluster, in this order: --meta, --config, CAIRN_META, CAIRN_CONFIG, ./cairn-data/cairn.toml (which `cairn dev` makes),
/etc/cairn/cairn.toml.

Exit codes:
  0  done
  1  failed
  2  the command line or the configuration file is wrong
  3  not found: no such volume, node or device
  4  exists already
  5  unreachable: no metadata server, or no majority of them, answered in time
  6  refused as things are now: in use, too few devices, not confirmed, another cluster
  7  occupied: a port, a socket or a directory is in use by another process
  8  unhealthy: `cairn status --check` found problems
  9  damaged: `cairn node inspect` found damage on a device

Start a cluster on this machine with `cairn dev`.";

/// Cairn: replicated block storage for virtual machines.
#[derive(Parser, Debug)]
#[command(name = "cairn", version = crate::VERSION, after_help = AFTER_HELP, infer_long_args = true)]
#[command(disable_help_subcommand = true, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What every command takes.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Configuration file, see `cairn --help`
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) config: Option<PathBuf>,
    /// Metadata servers, HOST:PORT separated by commas; one that is alive is enough
    #[arg(long, value_name = "ADDRESSES", global = true, value_delimiter = ',', value_parser = host_port)]
    pub(crate) meta: Vec<String>,
    /// Print JSON for programs instead of tables for people
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// What to log: a level from off to trace, or a filter as `info,cairn_meta=debug`
    #[arg(
        long,
        value_name = "FILTER",
        env = "CAIRN_LOG",
        global = true,
        hide_env_values = true
    )]
    pub(crate) log: Option<String>,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    Dev(Dev),
    /// Create, list, show, grow and delete volumes
    #[command(subcommand)]
    Volume(VolumeCommand),
    Node(Node),
    Status(Status),
    Events(Events),
    Meta(Meta),
    Export(Export),
    Completion(Completion),
}

/// Print a completion script for a shell.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  source <(cairn completion bash)")]
pub(crate) struct Completion {
    /// For which shell
    #[arg(value_enum)]
    pub(crate) shell: clap_complete::Shell,
}

/// `HOST:PORT`, as other processes are named.
pub(crate) fn host_port(text: &str) -> Result<String, String> {
    let parts = text.trim().rsplit_once(':');
    match parts {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => Ok(text.trim().to_string()),
        _ => Err("write HOST:PORT, as 127.0.0.1:7401".to_string()),
    }
}

#[cfg(test)]
mod tests {
    use cairn_proto::units::ByteSize;
    use clap::CommandFactory as _;

    use super::*;

    fn parse(line: &str) -> Cli {
        Cli::try_parse_from(line.split_whitespace()).unwrap_or_else(|error| panic!("{line}: {error}"))
    }

    fn refused(line: &str) -> String {
        Cli::try_parse_from(line.split_whitespace()).unwrap_err().to_string()
    }

    #[test]
    fn the_argument_tree_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_a_line_about_it_and_an_example() {
        fn check(command: &clap::Command, path: &str) {
            assert!(command.get_about().is_some(), "{path} has no description");
            if !command.has_subcommands() {
                let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(help.contains("Example"), "{path} --help has no example");
            }
            for sub in command.get_subcommands() {
                check(sub, &format!("{path} {}", sub.get_name()));
            }
        }
        check(&Cli::command(), "cairn");
    }

    #[test]
    fn global_options_stand_before_or_after_the_command() {
        for line in [
            "cairn --config a/cairn.toml --json status",
            "cairn status --config a/cairn.toml --json",
        ] {
            let cli = parse(line);
            assert_eq!(cli.global.config, Some(PathBuf::from("a/cairn.toml")));
            assert!(cli.global.json && matches!(cli.command, Command::Status(_)));
        }
        let cli = parse("cairn --meta 127.0.0.1:1,host:2 status");
        assert_eq!(cli.global.meta, ["127.0.0.1:1", "host:2"]);
        assert!(refused("cairn --meta nonsense status").contains("write HOST:PORT"));
    }

    #[test]
    fn dev_takes_what_its_contract_says() {
        let line = "cairn dev --dir d --volume a:1GiB --volume b:512M --nodes 4 --metas 5 --device-size 2G \
                    --foreground-logs --supervise --nbd-tcp 127.0.0.1:10809";
        let Command::Dev(dev) = parse(line).command else {
            panic!("not dev")
        };
        assert_eq!(dev.dir, Some(PathBuf::from("d")));
        assert_eq!(dev.volumes.len(), 2);
        assert_eq!(
            (dev.volumes[1].name.as_str(), dev.volumes[1].size),
            ("b", ByteSize(512 << 20))
        );
        assert_eq!((dev.nodes, dev.metas), (Some(4), Some(5)));
        assert!(dev.foreground_logs && dev.supervise && dev.nbd_tcp.is_some());
        assert!(refused("cairn dev --volume a").contains("NAME:SIZE"));
        assert!(refused("cairn dev --volume a:1Z").contains("is not a size"));
        assert!(refused("cairn dev --nodes 0").contains("--nodes"));
        assert!(refused("cairn dev --metas 2").contains("an odd number"));
    }

    #[test]
    fn node_runs_one_or_asks_about_them() {
        let Command::Node(node) = parse("cairn node --listen 127.0.0.1:1 --device a --device b").command else {
            panic!("not node")
        };
        assert!(node.command.is_none());
        assert_eq!(node.devices, [PathBuf::from("a"), PathBuf::from("b")]);
        let Command::Node(node) = parse("cairn node list --json").command else {
            panic!("not node")
        };
        assert!(matches!(node.command, Some(NodeCommand::List)));
        refused("cairn node --device a list");
    }

    #[test]
    fn a_device_is_inspected_and_formatted_by_path() {
        let Command::Node(node) = parse("cairn node inspect /dev/x --verify --volume 7").command else {
            panic!("not node")
        };
        let Some(NodeCommand::Inspect(inspect)) = node.command else {
            panic!("not inspect")
        };
        assert_eq!((inspect.path, inspect.verify), (PathBuf::from("/dev/x"), true));
        assert_eq!(inspect.volume.map(|volume| volume.0), Some(7));
        assert!(refused("cairn node inspect /dev/x --volume demo").contains("number of a volume"));
        refused("cairn node format");
        refused("cairn node format /dev/x --wipe nonsense");
        refused("cairn node format /dev/x --blank --cluster 01010101-0101-0101-0101-010101010101");
    }

    #[test]
    fn volumes_are_created_with_a_size() {
        let Command::Volume(VolumeCommand::Create(create)) = parse("cairn volume create demo 10GiB").command else {
            panic!("not create")
        };
        assert_eq!((create.name.as_str(), create.size), ("demo", ByteSize(10 << 30)));
        assert!(refused("cairn volume create demo ten").contains("is not a size"));
        assert!(refused("cairn volume create demo 1G --copies 6").contains("1..=5"));
    }
}
