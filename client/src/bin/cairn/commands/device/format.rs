//! `cairn node format`.

use std::io::{self, IsTerminal as _};

use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::units::ByteSize;
use cairn_storage_node::driver::DeviceError;
use cairn_storage_node::process::NodeError;
use cairn_storage_node::process::format::{FormatPlan, Formatted, Loss};
use cairn_storage_node::store::Identity;
use serde::Serialize;

use super::{failure_of, patiently};
use crate::args::{FormatDevice, Global};
use crate::failure::{Failure, Kind};
use crate::output;

pub(crate) fn run(global: &Global, args: &FormatDevice) -> Result<(), Failure> {
    refuse_cluster(global)?;
    let in_use = |error: &NodeError| {
        matches!(
            error,
            NodeError::Device {
                error: DeviceError::InUse,
                ..
            }
        )
    };
    let plan = patiently(|| FormatPlan::open(&args.path, args.size), in_use).map_err(failure)?;
    let bytes = plan.geometry().blocks * BLOCK_BYTES as u64;
    if let Some(size) = args
        .size
        .filter(|size| size.0 / BLOCK_BYTES as u64 != bytes / BLOCK_BYTES as u64)
    {
        let (path, found) = (args.path.display(), ByteSize(bytes));
        return Err(Failure::usage(format!("{path} exists and has {found}, not {size}"))
            .hint("Leave --size out, or remove the file first. A block device has the size that it has."));
    }
    consent(args, plan.loss(), |question| {
        (!args.yes).then(|| ask(question)).flatten()
    })?;
    let cluster = match plan.loss() {
        _ if args.blank => None,
        Loss::Device(former) => Some(args.cluster.unwrap_or(former.cluster)),
        Loss::Nothing | Loss::Other { .. } => args.cluster,
    };
    let formatted = match cluster {
        Some(cluster) => plan.format(cluster),
        None => plan.clear(),
    };
    let record = Record::new(args, bytes, formatted.map_err(failure)?);
    output::show(global.json, &record, || record.words())
}

/// It works on the device alone. Whoever names a configuration means a cluster, and would have it formatted for another.
fn refuse_cluster(global: &Global) -> Result<(), Failure> {
    let given = [
        ("--config", global.config.is_some()),
        ("--meta", !global.meta.is_empty()),
    ];
    match given.into_iter().find(|(_, is_given)| *is_given) {
        None => Ok(()),
        Some((option, _)) => Err(Failure::usage(format!("`cairn node format` does not use {option}: nothing was changed"))
            .hint("Say --cluster ID, as `cairn status` tells it; or leave the device blank: a node formats it for its cluster.")),
    }
}

fn failure(error: NodeError) -> Failure {
    match error {
        NodeError::Device { path, error } => failure_of(&path, &error),
        error => Failure::failed(error.to_string()),
    }
}

/// Whether what would be lost was named: by a flag, or now. `ask` puts a question to a person; `None` if nobody is there.
fn consent(args: &FormatDevice, loss: &Loss, ask: impl Fn(&str) -> Option<String>) -> Result<(), Failure> {
    let path = args.path.display();
    let refuse = |words: String| Err(Failure::new(Kind::Refused, words));
    match (loss, args.wipe, &args.wipe_foreign) {
        (Loss::Nothing, None, _) => Ok(()),
        (Loss::Nothing, Some(uuid), _) => {
            refuse(format!("{path} is blank, it is not the device {uuid}: check the path"))
        }
        (Loss::Device(found), Some(uuid), _) if found.device.uuid == uuid => Ok(()),
        (Loss::Device(found), Some(uuid), _) => {
            let found = found.device.uuid;
            refuse(format!(
                "{path} is the device {found}, not {uuid}: nothing was changed; check the path"
            ))
        }
        (Loss::Device(found), None, None) => {
            let uuid = found.device.uuid.to_string();
            let what = format!("{path} is the device {uuid} of the cluster {}", found.cluster);
            typed(&what, "its UUID", &uuid, &format!("--wipe {uuid}"), ask)
        }
        (Loss::Device(found), None, Some(_)) => {
            let uuid = found.device.uuid;
            let failure = Failure::new(
                Kind::Refused,
                format!("{path} is a device of Cairn, {uuid}: nothing was changed"),
            );
            Err(failure.hint(format!("If its data is to be erased, say --wipe {uuid}.")))
        }
        (Loss::Other { .. }, _, Some(again)) if *again == args.path => Ok(()),
        (Loss::Other { words }, None, None) => {
            let what = format!("{path} holds {words}");
            let again = args.path.to_string_lossy();
            typed(&what, "its path", &again, &format!("--wipe-foreign {again}"), ask)
        }
        (Loss::Other { words }, ..) => {
            let failure = Failure::new(Kind::Refused, format!("{path} holds {words}: nothing was changed"));
            Err(failure.hint(format!("If it is to be erased, say --wipe-foreign {path}.")))
        }
    }
}

/// What is destroyed is typed, not nodded at.
fn typed(
    what: &str,
    name: &str,
    expected: &str,
    flag: &str,
    ask: impl Fn(&str) -> Option<String>,
) -> Result<(), Failure> {
    match ask(&format!("{what}. To erase all that is on it, type {name}: ")) {
        None => Err(Failure::new(Kind::Refused, format!("{what}: nothing was changed"))
            .hint(format!("If all that is on it is to be erased, say {flag}."))),
        Some(answer) if answer.trim() == expected => Ok(()),
        Some(_) => Err(Failure::new(
            Kind::Refused,
            format!("that is not {name}: nothing was changed"),
        )),
    }
}

fn ask(question: &str) -> Option<String> {
    if !io::stdin().is_terminal() {
        return None;
    }
    eprint!("{question}");
    let mut answer = String::new();
    // What can't be read is no consent.
    io::stdin().read_line(&mut answer).ok()?;
    Some(answer)
}

/// What became of it, for programs.
#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
struct Record {
    path: String,
    bytes: u64,
    blank: bool,
    cluster_id: Option<String>,
    uuid: Option<String>,
    incarnation: Option<String>,
}

impl Record {
    fn new(args: &FormatDevice, bytes: u64, formatted: Formatted) -> Record {
        let identity = match formatted {
            Formatted::Device(identity) => Some(identity),
            Formatted::Blank => None,
        };
        let text = |of: fn(&Identity) -> String| identity.as_ref().map(of);
        Record {
            path: args.path.display().to_string(),
            bytes,
            blank: identity.is_none(),
            cluster_id: text(|identity| identity.cluster.to_string()),
            uuid: text(|identity| identity.device.uuid.to_string()),
            incarnation: text(|identity| identity.device.incarnation.to_string()),
        }
    }

    fn words(&self) -> String {
        let (path, size) = (&self.path, ByteSize(self.bytes));
        match (&self.uuid, &self.cluster_id) {
            (Some(uuid), Some(cluster)) => {
                format!("{path} ({size}) is the device {uuid} of the cluster {cluster}, and holds nothing\n")
            }
            _ => format!(
                "{path} ({size}) is blank: the storage node that is started with it formats it for its cluster\n"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use cairn_proto::checksum::ChecksumAlgorithm;
    use cairn_proto::ids::{ClusterId, DeviceId, DeviceUuid, Incarnation};
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command, NodeCommand};

    const UUID: &str = "02020202-0202-0202-0202-020202020202";

    fn args(line: &str) -> FormatDevice {
        let line = format!("cairn node format /dev/x {line}");
        let Command::Node(node) = Cli::try_parse_from(line.split_whitespace()).unwrap().command else {
            panic!("not node")
        };
        match node.command {
            Some(NodeCommand::Format(format)) => format,
            other => panic!("{other:?}"),
        }
    }

    fn device() -> Loss {
        Loss::Device(Identity {
            cluster: ClusterId([1; 16]),
            device: DeviceId {
                uuid: DeviceUuid([2; 16]),
                incarnation: Incarnation(3),
            },
            checksum: ChecksumAlgorithm::Crc32,
            blocks: 4096,
        })
    }

    fn other() -> Loss {
        let words = "a partition table (GPT)".to_string();
        Loss::Other { words }
    }

    #[test]
    fn only_what_was_named_is_destroyed() {
        let wipe = format!("--wipe {UUID}");
        let nobody = |_: &str| None;
        let allowed = |line: &str, loss: &Loss| consent(&args(line), loss, nobody);
        assert!(allowed("", &Loss::Nothing).is_ok());
        assert!(allowed("--wipe-foreign /dev/x", &Loss::Nothing).is_ok());
        assert!(allowed(&wipe, &device()).is_ok());
        assert!(allowed("--wipe-foreign /dev/x", &other()).is_ok());
        let wrong = "--wipe 03030303-0303-0303-0303-030303030303";
        for (line, loss, word) in [
            ("", device(), UUID),
            (wrong, device(), UUID),
            ("--wipe-foreign /dev/x", device(), UUID),
            (wrong, Loss::Nothing, "blank"),
            ("", other(), "--wipe-foreign /dev/x"),
            ("--wipe-foreign /dev/y", other(), "partition table"),
            (wrong, other(), "--wipe-foreign /dev/x"),
        ] {
            let failure = allowed(line, &loss).unwrap_err();
            assert_eq!(failure.kind, Kind::Refused, "{line}: {failure}");
            assert!(failure.to_string().contains(word), "{line}: {failure}");
        }
    }

    #[test]
    fn yes_is_accepted_and_names_nothing() {
        let silent =
            |args: &FormatDevice, loss: &Loss| consent(args, loss, |_: &str| (!args.yes).then(|| format!("{UUID}\n")));
        assert!(silent(&args("--yes"), &Loss::Nothing).is_ok());
        assert!(silent(&args(&format!("-y --wipe {UUID}")), &device()).is_ok());
        for loss in [device(), other()] {
            let failure = silent(&args("--yes"), &loss).unwrap_err();
            assert!(failure.to_string().contains("nothing was changed"), "{failure}");
        }
    }

    #[test]
    fn a_configuration_is_refused() {
        let path = std::path::PathBuf::from("cairn.toml");
        let config = Global {
            config: Some(path),
            ..Global::default()
        };
        let meta = Global {
            meta: vec!["a:1".to_string()],
            ..Global::default()
        };
        for (global, option) in [(config, "--config"), (meta, "--meta")] {
            let failure = refuse_cluster(&global).unwrap_err();
            assert!(failure.to_string().contains(option), "{failure}");
        }
        assert!(refuse_cluster(&Global::default()).is_ok());
    }

    #[test]
    fn on_a_terminal_the_name_is_typed() {
        let answer = |answer: &'static str| move |_: &str| Some(answer.to_string());
        let typed = format!("{UUID}\n");
        assert!(consent(&args(""), &device(), |_: &str| Some(typed.clone())).is_ok());
        assert!(consent(&args(""), &other(), answer("/dev/x\n")).is_ok());
        for loss in [device(), other()] {
            let failure = consent(&args(""), &loss, answer("yes\n")).unwrap_err();
            assert!(failure.to_string().contains("nothing was changed"), "{failure}");
        }
    }
}
