//! `cairn export`: flags and configuration become an NBD server.

use cairn_client::config::Config;
use cairn_client::export::{ExportConfig, ExportError, ExportServer, Listen, ListenError};
use cairn_meta::metrics::serve_metrics;

use super::{Settings, Shutdown, shutdown_requested};
use crate::args::{Export, Global};
use crate::context::{named_config, process_meta_addresses};
use crate::failure::{Failure, Kind};

pub(crate) fn run(global: &Global, args: &Export) -> Result<(), Failure> {
    let config = named_config(global)?;
    let settings = Settings::new(global.log.as_deref(), &args.process, &config.process);
    let export = export_config(global, args, &config)?;
    super::run("export", &settings, |shutdown| {
        serve(export, settings.metrics, shutdown)
    })
}

async fn serve(config: ExportConfig, metrics: Option<std::net::SocketAddr>, shutdown: Shutdown) -> Result<(), Failure> {
    let _metrics = match metrics {
        Some(address) => Some(serve_metrics(address).await.map_err(super::metrics_failure)?),
        None => None,
    };
    let server = tokio::select! {
        server = ExportServer::start(config) => server.map_err(start_failure)?,
        () = shutdown_requested(shutdown.clone()) => return Ok(()),
    };
    for place in server.places() {
        tracing::info!("serving NBD on {place}");
    }
    let died = |error| Failure::failed(format!("the export has ended by itself: {error}"));
    tokio::select! {
        ended = server.ended() => {
            let ended = ended.map_err(died)?;
            return Err(Failure::failed(format!("the export has ended by itself: {ended:?}")));
        }
        () = shutdown_requested(shutdown) => (),
    }
    let ended = server.shut_down().await.map_err(died)?;
    tracing::info!("stopped: {ended:?}");
    Ok(())
}

fn start_failure(error: ExportError) -> Failure {
    let kind = match &error {
        ExportError::Listen(ListenError::InUse(_)) => Kind::Occupied,
        ExportError::Listen(ListenError::PathTooLong(_)) | ExportError::NowhereToListen => Kind::Usage,
        ExportError::Listen(_) => Kind::Failed,
        ExportError::Start(_) => Kind::Unreachable,
    };
    Failure::new(kind, error.to_string())
}

fn export_config(global: &Global, args: &Export, config: &Config) -> Result<ExportConfig, Failure> {
    let section = config.export.clone().unwrap_or_default();
    let unix = args.nbd_unix.clone().or(section.nbd_unix).map(Listen::Unix);
    let tcp = args.nbd_tcp.or(section.nbd_tcp).map(Listen::Tcp);
    let listen: Vec<Listen> = unix.into_iter().chain(tcp).collect();
    if listen.is_empty() {
        return Err(Failure::usage("where to serve NBD is not given").hint(
            "Say --nbd-unix PATH or --nbd-tcp ADDR, or write `nbd_unix` or `nbd_tcp` under [export] in the file of \
             --config.",
        ));
    }
    let volumes = if args.volumes.is_empty() {
        section.volumes
    } else {
        args.volumes.clone()
    };
    let only = (!volumes.is_empty()).then(|| volumes.iter().cloned().collect());
    // A single volume need not be named by its clients.
    let default_export = volumes.first().filter(|_| volumes.len() == 1).cloned();
    Ok(ExportConfig {
        meta: process_meta_addresses(global, config)?,
        listen,
        only,
        default_export,
        read_only: args.read_only || section.read_only,
        words: format!(
            "cairn export on {} (process {})",
            super::host_name(),
            std::process::id()
        ),
    })
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    fn parse(line: &str, config: &str) -> Result<ExportConfig, Failure> {
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        let Command::Export(args) = &cli.command else {
            panic!("not export")
        };
        export_config(&cli.global, args, &Config::parse(Path::new("c.toml"), config).unwrap())
    }

    #[test]
    fn flags_complete_and_override_the_file() {
        let file = "version = 1\n[cluster]\nmeta = ['h:1']\n[export]\nnbd_unix = '/s'\nvolumes = ['a', 'b']\n";
        let config = parse("cairn export --nbd-tcp 127.0.0.1:10809", file).unwrap();
        assert_eq!(config.meta, ["h:1"]);
        assert_eq!(
            config.listen,
            [
                Listen::Unix(PathBuf::from("/s")),
                Listen::Tcp("127.0.0.1:10809".parse().unwrap())
            ]
        );
        assert_eq!(config.only.unwrap().len(), 2);
        assert_eq!(config.default_export, None);
        let config = parse("cairn export --volume c --meta x:2", file).unwrap();
        assert_eq!(
            (config.meta, config.default_export),
            (vec!["x:2".to_string()], Some("c".to_string()))
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        let failure = parse("cairn export --meta h:1", "version = 1\n").unwrap_err();
        assert!(failure.to_string().contains("--nbd-unix PATH"), "{failure}");
        if std::env::var_os("CAIRN_META").is_none() {
            let failure = parse("cairn export --nbd-unix /s", "version = 1\n").unwrap_err();
            assert!(failure.to_string().contains("--meta HOST:PORT"), "{failure}");
        }
    }
}
