//! `cairn meta`: flags and configuration become a metadata server.

use cairn_client::config::{Config, Span};
use cairn_meta::MetaError;
use cairn_meta::config::{MetaConfig, MetaStart};
use cairn_meta::heal::HealSettings;
use cairn_meta::metrics::MetricsError;

use super::{Settings, key, required};
use crate::args::{Global, Meta};
use crate::context::{named_config, process_meta_addresses};
use crate::failure::{Failure, Kind};

pub(crate) fn run(global: &Global, args: &Meta) -> Result<(), Failure> {
    let config = named_config(global)?;
    let settings = Settings::new(global.log.as_deref(), &args.process, &config.process);
    let meta = meta_config(global, args, &config, &settings)?;
    super::run("meta", &settings, |shutdown| async move {
        cairn_meta::run(meta, super::shutdown_requested(shutdown))
            .await
            .map_err(failure)
    })
}

fn failure(error: MetaError) -> Failure {
    let kind = match &error {
        MetaError::Config(_) => Kind::Usage,
        MetaError::Listen(_, source) if source.kind() == std::io::ErrorKind::AddrInUse => Kind::Occupied,
        MetaError::Metrics(MetricsError::Listen(..)) => Kind::Occupied,
        MetaError::Removed(_) | MetaError::Rejected(_) => Kind::Refused,
        _ => Kind::Failed,
    };
    Failure::new(kind, error.to_string())
}

/// How the cluster heals while this server leads.
fn heal(rebuild_after: Option<Span>) -> HealSettings {
    match rebuild_after {
        Some(Span(rebuild_after)) => HealSettings { rebuild_after },
        None => HealSettings::default(),
    }
}

fn meta_config(global: &Global, args: &Meta, config: &Config, settings: &Settings) -> Result<MetaConfig, Failure> {
    let section = config.meta.clone().unwrap_or_default();
    let members = if args.members.is_empty() {
        section.members
    } else {
        args.members.clone()
    };
    let id = required(args.id.or(section.id), "the server's number", "--id N", "id = N")?;
    let start = if args.join || (section.join && members.is_empty()) {
        MetaStart::Join(process_meta_addresses(global, config)?)
    } else if members.is_empty() {
        return Err(Failure::usage("how a new metadata server begins is not given").hint(
            "Name all first servers of a new cluster with --member ID=HOST:PORT (or `members` in the file), or say --join \
             to become a further one of the cluster at --meta.",
        ));
    } else if members.iter().all(|member| member.id != id) {
        return Err(
            Failure::usage(format!("server {id} is not among the first servers that are named"))
                .hint("Name it too: every first server is told the same list."),
        );
    } else {
        MetaStart::Bootstrap(members.into_iter().map(|member| (member.id, member.address)).collect())
    };
    let listen = args.listen.or(section.listen);
    Ok(MetaConfig {
        id,
        dir: required(
            args.dir.clone().or(section.dir),
            "the directory",
            "--dir DIR",
            "dir = \"DIR\"",
        )?,
        listen: required(listen, "where to listen", "--listen ADDR", "listen = \"ADDR\"")?,
        advertise: args.advertise.clone().or(section.advertise).unwrap_or_default(),
        start,
        cluster_key: key::of(&args.key, config)?,
        metrics_listen: settings.metrics,
        heal: heal(args.rebuild_after.or(section.rebuild_after)),
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    fn parse(line: &str, config: &str) -> Result<MetaConfig, Failure> {
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        let Command::Meta(args) = &cli.command else {
            panic!("not meta")
        };
        let config = Config::parse(std::path::Path::new("c.toml"), config).unwrap();
        let settings = Settings::new(None, &args.process, &config.process);
        meta_config(&cli.global, args, &config, &settings)
    }

    #[test]
    fn flags_complete_and_override_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("k");
        key::create(&key).unwrap();
        let file = format!(
            "version = 1\n[cluster]\nmeta = ['h:1']\nkey_file = '{}'\n\
             [meta]\nid = 2\ndir = '/d'\nlisten = '127.0.0.1:1'\nmembers = ['2=h:1']\n",
            key.display()
        );
        let config = parse("cairn meta --listen 127.0.0.1:9", &file).unwrap();
        assert_eq!((config.id, config.listen.port()), (2, 9));
        assert_eq!(config.start, MetaStart::Bootstrap(vec![(2, "h:1".to_string())]));
        assert_eq!(config.heal, HealSettings::default());
        let healing = format!("{file}rebuild_after = '90s'\n");
        let rebuild_after = |line| parse(line, &healing).unwrap().heal.rebuild_after.as_secs();
        assert_eq!(rebuild_after("cairn meta"), 90);
        assert_eq!(rebuild_after("cairn meta --rebuild-after 2h"), 7200);
        let config = parse("cairn meta --join", &file).unwrap();
        assert_eq!(config.start, MetaStart::Join(vec!["h:1".to_string()]));
        let failure = parse("cairn meta --id 3", &file).unwrap_err();
        assert!(failure.what.contains("server 3 is not among"), "{failure}");
    }

    #[test]
    fn what_is_missing_is_named() {
        let failure = parse("cairn meta", "version = 1\n").unwrap_err();
        assert!(failure.to_string().contains("--id N"), "{failure}");
        let failure = parse("cairn meta --id 1", "version = 1\n").unwrap_err();
        assert!(failure.to_string().contains("--member ID=HOST:PORT"), "{failure}");
        let failure = parse("cairn meta --id 1 --member 1=h:1", "version = 1\n").unwrap_err();
        assert!(failure.to_string().contains("--dir DIR"), "{failure}");
        let line = "cairn meta --id 1 --member 1=h:1 --dir /d --listen 127.0.0.1:1";
        let failure = parse(line, "version = 1\n").unwrap_err();
        assert!(failure.to_string().contains("--cluster-key FILE"), "{failure}");
    }
}
