//! `cairn node` without a subcommand: flags and configuration become a storage node.

use std::time::Duration;

use cairn_client::caretaker::{self, Task, Tasks};
use cairn_client::config::{Config, DeviceSection, WriteCache};
use cairn_meta::metrics::MetricsError;
use cairn_proto::ids::{Generation, VolumeId};
use cairn_proto::units::ByteSize;
use cairn_storage_node::config::{DeviceConfig, FailureDomain, NodeConfig, NodeLimits};
use cairn_storage_node::host::BackgroundConfig;
use cairn_storage_node::process::{Care, Node, NodeError};
use tokio::sync::watch;

use super::{Settings, Shutdown, host_name, key, required};
use crate::args::{self, Global};
use crate::context::{named_config, process_meta_addresses};
use crate::failure::{Failure, Kind};
use crate::limits::{RATE_MIN, SCRUB_INTERVAL_DAYS_MAX};

pub(crate) fn run(global: &Global, args: &args::Node) -> Result<(), Failure> {
    let config = named_config(global)?;
    let settings = Settings::new(global.log.as_deref(), &args.process, &config.process);
    let node = node_config(global, args, &config, &settings)?;
    super::run("node", &settings, |shutdown| serve(node, shutdown))
}

/// Serves the devices, and takes care of what meta says. What serves data does not depend on the latter.
async fn serve(
    #[cfg_attr(not(feature = "canary"), allow(unused_mut))] mut config: NodeConfig,
    shutdown: Shutdown,
) -> Result<(), Failure> {
    #[cfg(feature = "canary")]
    plant(&mut config.limits);
    let (meta, name) = (config.meta.clone(), config.name.clone());
    let node = Node::start(config).await.map_err(|error| failure(&error))?;
    let mut care = node.care();
    let (tell, tasks) = watch::channel(Tasks::default());
    let tell_all = async move {
        while care.changed().await.is_ok() {
            tell.send_replace(tasks_of(&care.borrow_and_update()));
        }
    };
    let stop = super::shutdown_requested(shutdown.clone());
    let caretaker = tokio::spawn(caretaker::run(meta, name, tasks, stop));
    let told = tokio::spawn(tell_all);
    let outcome = node.run(super::shutdown_requested(shutdown)).await;
    told.abort();
    if outcome.is_ok() && caretaker.await.is_err() {
        tracing::warn!("the caretaker has ended unexpectedly");
    }
    outcome.map_err(|error| failure(&error))
}

fn tasks_of(care: &Care) -> Tasks {
    let task = |(volume, generation_seen): &(VolumeId, Generation)| Task {
        volume: *volume,
        generation_seen: *generation_seen,
    };
    Tasks {
        node_id: care.node_id,
        tasks: care.volumes.iter().map(task).collect(),
    }
}

fn failure(error: &NodeError) -> Failure {
    let kind = match error {
        NodeError::Config(_) => Kind::Usage,
        NodeError::Metrics(MetricsError::Listen(..)) | NodeError::Listen { .. } => Kind::Occupied,
        NodeError::Refused { .. } => Kind::Refused,
        _ => Kind::Failed,
    };
    Failure::new(kind, error.to_string())
}

fn node_config(
    global: &Global,
    args: &args::Node,
    config: &Config,
    settings: &Settings,
) -> Result<NodeConfig, Failure> {
    let section = config.node.clone().unwrap_or_default();
    let background = BackgroundConfig::default();
    let name = args.name.clone().or(section.name).unwrap_or_else(host_name);
    let create_size = args.device_size.or(section.device_size);
    let mut devices = if args.devices.is_empty() {
        section.devices
    } else {
        args.devices.iter().cloned().map(DeviceSection::from).collect()
    };
    if devices.is_empty() {
        return Err(Failure::usage("no device is given")
            .hint("Say --device PATH, or write `devices = [\"PATH\"]` under [node] in the file of --config."));
    }
    for (path, write_cache) in &args.write_caches {
        let Some(device) = devices.iter_mut().find(|device| device.path == *path) else {
            let failure = Failure::usage(format!(
                "--write-cache names {}, which is none of the devices",
                path.display()
            ));
            return Err(failure.hint("Write the path as --device or the configuration file has it."));
        };
        device.write_cache = Some(*write_cache);
    }
    let device = |device: DeviceSection| DeviceConfig {
        create_size,
        volatile_cache: device.write_cache.map(WriteCache::is_volatile),
        ..DeviceConfig::new(device.path)
    };
    let listen = required(
        args.listen.or(section.listen),
        "where to listen",
        "--listen ADDR",
        "listen = \"ADDR\"",
    )?;
    Ok(NodeConfig {
        devices: devices.into_iter().map(device).collect(),
        listen,
        advertise: args.advertise.clone().or(section.advertise).unwrap_or_default(),
        meta: process_meta_addresses(global, config)?,
        cluster_key: key::of(&args.key, config)?,
        domain: FailureDomain {
            room: args.room.clone().or(section.room).unwrap_or_default(),
            rack: args.rack.clone().or(section.rack).unwrap_or_default(),
            host: args.host.clone().or(section.host).unwrap_or_else(|| name.clone()),
        },
        metrics_listen: settings.metrics,
        background: BackgroundConfig {
            scrub_rate: rate("scrub_rate", section.scrub_rate, background.scrub_rate)?,
            scrub_interval: interval(section.scrub_interval_days)?.unwrap_or(background.scrub_interval),
            move_rate: rate("move_rate", section.move_rate, background.move_rate)?,
            ..background
        },
        limits: NodeLimits::default(),
        name,
    })
}

/// The planted bug that the environment names.
#[cfg(feature = "canary")]
fn plant(limits: &mut NodeLimits) {
    if let Some(planted) = cairn_client::planted::chosen() {
        limits.store.canary = planted.store();
        limits.planted = planted.host();
    }
}

/// A rate in bytes a second, as the file says it.
fn rate(key: &str, told: Option<ByteSize>, usual: u64) -> Result<u64, Failure> {
    match told {
        Some(ByteSize(rate)) if rate > 0 && rate < RATE_MIN.0 => Err(Failure::usage(format!(
            "`{key}` under [node] is {rate} bytes a second, at which it would never get anywhere: write at least \
             {RATE_MIN}, or 0 for none"
        ))),
        Some(ByteSize(rate)) => Ok(rate),
        None => Ok(usual),
    }
}

fn interval(days: Option<u32>) -> Result<Option<Duration>, Failure> {
    match days {
        Some(days) if days > SCRUB_INTERVAL_DAYS_MAX => Err(Failure::usage(format!(
            "`scrub_interval_days` under [node] is {days}: write at most {SCRUB_INTERVAL_DAYS_MAX}, or `scrub_rate = \"0\"` for \
             no verification"
        ))),
        days => Ok(days.map(|days| Duration::from_secs(u64::from(days) * 24 * 3600))),
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    fn parse(line: &str, config: &str) -> Result<NodeConfig, Failure> {
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        let Command::Node(args) = &cli.command else {
            panic!("not node")
        };
        let config = Config::parse(Path::new("c.toml"), config).unwrap();
        let settings = Settings::new(None, &args.process, &config.process);
        node_config(&cli.global, args, &config, &settings)
    }

    #[test]
    fn flags_complete_and_override_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("k");
        key::create(&key).unwrap();
        let file = format!(
            "version = 1\n[cluster]\nmeta = ['h:1']\nkey_file = '{}'\n\
             [node]\nname = 'a'\nlisten = '127.0.0.1:1'\ndevices = ['/x', '/y']\ndevice_size = '1G'\nrack = 'r'\n",
            key.display()
        );
        let config = parse("cairn node", &file).unwrap();
        assert_eq!((config.name.as_str(), config.devices.len()), ("a", 2));
        assert_eq!(config.devices[1].create_size, Some(ByteSize(1 << 30)));
        assert_eq!((config.domain.host.as_str(), config.domain.rack.as_str()), ("a", "r"));
        let config = parse(
            "cairn node --device /z --name b --host c --listen 127.0.0.1:9 --meta x:2",
            &file,
        )
        .unwrap();
        assert_eq!(config.devices[0].path, PathBuf::from("/z"));
        assert_eq!((config.name.as_str(), config.domain.host.as_str()), ("b", "c"));
        assert_eq!((config.listen.port(), config.meta), (9, vec!["x:2".to_string()]));
    }

    #[test]
    fn the_operator_may_know_a_write_cache_better() {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("k");
        key::create(&key).unwrap();
        let file = format!(
            "version = 1\n[cluster]\nmeta = ['h:1']\nkey_file = '{}'\n[node]\nname = 'a'\nlisten = '127.0.0.1:1'\n\
             devices = ['/x', {{ path = '/y', write_cache = 'none' }}, '/z']\n",
            key.display()
        );
        let told = |line: &str| {
            let devices = parse(line, &file).unwrap().devices;
            devices.iter().map(|device| device.volatile_cache).collect::<Vec<_>>()
        };
        assert_eq!(told("cairn node"), [None, Some(false), None]);
        let line = "cairn node --write-cache /y=volatile --write-cache /z=none";
        assert_eq!(told(line), [None, Some(true), Some(false)]);
        let failure = parse("cairn node --write-cache /w=none", &file).unwrap_err();
        assert!(
            failure.to_string().contains("/w, which is none of the devices"),
            "{failure}"
        );
    }

    #[test]
    fn background_work_has_rates_that_can_be_told() {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("k");
        key::create(&key).unwrap();
        let told = |lines: &str| {
            let file = format!(
                "version = 1\n[cluster]\nmeta = ['h:1']\nkey_file = '{}'\n[node]\nname = 'a'\nlisten = '127.0.0.1:1'\n\
                 devices = ['/x']\n{lines}",
                key.display()
            );
            parse("cairn node", &file).map(|config| config.background)
        };
        let usual = told("").unwrap();
        assert_eq!((usual.scrub_rate, usual.move_rate), (16 << 20, 8 << 20));
        assert_eq!(usual.scrub_interval, Duration::from_secs(7 * 24 * 3600));
        let config = told("scrub_rate = '100MiB'\nscrub_interval_days = 30\nmove_rate = '0'\n").unwrap();
        assert_eq!((config.scrub_rate, config.move_rate), (100 << 20, 0));
        assert_eq!(config.scrub_interval, Duration::from_secs(30 * 24 * 3600));
        let failure = told("scrub_rate = '100'\n").unwrap_err().to_string();
        assert!(
            failure.contains("`scrub_rate`") && failure.contains("at least 64 KiB"),
            "{failure}"
        );
        let failure = told("scrub_interval_days = 5000\n").unwrap_err().to_string();
        assert!(failure.contains("at most 3650"), "{failure}");
    }

    #[test]
    fn what_is_missing_is_named() {
        let failure = parse("cairn node", "version = 1\n").unwrap_err();
        assert!(failure.to_string().contains("--device PATH"), "{failure}");
        let failure = parse("cairn node --device /x", "version = 1\n").unwrap_err();
        assert!(failure.to_string().contains("--listen ADDR"), "{failure}");
        let line = "cairn node --device /x --listen 127.0.0.1:1 --meta h:1";
        let failure = parse(line, "version = 1\n").unwrap_err();
        assert!(failure.to_string().contains("--cluster-key FILE"), "{failure}");
    }
}
