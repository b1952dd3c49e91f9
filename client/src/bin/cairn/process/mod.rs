//! Running one part of a cluster in this process: what all three parts have in common.
//!
//! One file per part translates flags and configuration into what the part's library wants. The rest (logs, metrics, the
//! process id file, signals) is here.

pub(crate) mod export;
pub(crate) mod key;
mod logging;
pub(crate) mod meta;
pub(crate) mod node;
mod parent;
mod pid_file;
mod signals;

use std::future::Future;
use std::path::PathBuf;

use cairn_client::config::ProcessSection;
use cairn_meta::metrics::MetricsError;
use tokio::sync::watch;

use crate::args::Process;
use crate::failure::{Failure, Kind};
use crate::limits::{SHUTDOWN_BOUND, WORKER_THREADS};

pub(crate) use parent::PARENT_VARIABLE;
pub(crate) use signals::StopSignals;

/// What is logged unless told otherwise.
const DEFAULT_LOG: &str = "info";

/// Becomes `true` when the process is to end. It never goes back.
pub(crate) type Shutdown = watch::Receiver<bool>;

/// Waits until the process is to end.
pub(crate) async fn shutdown_requested(mut shutdown: Shutdown) {
    // An error means that whoever could ask has gone: then the process ends as well.
    let _ = shutdown.wait_for(|stop| *stop).await;
}

/// What flags and configuration say about the process, the flags first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Settings {
    pub(crate) log: String,
    pub(crate) log_file: Option<PathBuf>,
    pub(crate) metrics: Option<std::net::SocketAddr>,
    pub(crate) pid_file: Option<PathBuf>,
}

impl Settings {
    pub(crate) fn new(log: Option<&str>, flags: &Process, section: &ProcessSection) -> Settings {
        Settings {
            log: log.or(section.log.as_deref()).unwrap_or(DEFAULT_LOG).to_string(),
            log_file: flags.log_file.clone().or_else(|| section.log_file.clone()),
            metrics: flags.metrics.or(section.metrics),
            pid_file: flags.pid_file.clone().or_else(|| section.pid_file.clone()),
        }
    }
}

/// Runs a part until it ends, or until SIGINT or SIGTERM has asked it to and it has. A second signal, or the bound on a
/// shutdown, ends it at once.
pub(crate) fn run<F, T>(name: &'static str, settings: &Settings, part: F) -> Result<(), Failure>
where
    F: FnOnce(Shutdown) -> T,
    T: Future<Output = Result<(), Failure>>,
{
    refuse_canary()?;
    parent::follow()?;
    logging::init(&settings.log, settings.log_file.as_deref())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKER_THREADS)
        .thread_name(name)
        .enable_all()
        .build()
        .map_err(|error| Failure::failed(format!("can't start the threads of the {name}: {error}")))?;
    let result = runtime.block_on(async {
        let mut signals = StopSignals::listen()?;
        let _pid_file = settings
            .pid_file
            .as_deref()
            .map(pid_file::PidFile::create)
            .transpose()?;
        tracing::info!(
            version = crate::VERSION,
            process = std::process::id(),
            "cairn {name} starts"
        );
        #[cfg(feature = "canary")]
        if let Some(planted) = cairn_client::planted::chosen() {
            tracing::warn!(
                "THIS PROCESS HAS THE PLANTED BUG {planted}: it is there to be found by a test, and what is stored will be lost"
            );
        }
        let (sender, shutdown) = watch::channel(false);
        let part = part(shutdown);
        tokio::pin!(part);
        tokio::select! {
            result = &mut part => return result,
            signal = signals.next() => tracing::info!("{signal} received, stopping"),
        }
        sender.send_replace(true);
        tokio::select! {
            result = &mut part => result,
            signal = signals.next() => Err(Failure::failed(format!("{name} was ended at once by a second {signal}"))),
            () = tokio::time::sleep(SHUTDOWN_BOUND) => Err(Failure::failed(format!(
                "{name} has not stopped within {} s and was ended", SHUTDOWN_BOUND.as_secs()
            ))),
        }
    });
    // Tasks that still hang on something do not hold the process up.
    runtime.shutdown_background();
    match &result {
        Ok(()) => tracing::info!("cairn {name} has ended"),
        Err(failure) => tracing::error!("cairn {name} has failed: {}", failure.what),
    }
    result
}

/// A setting that a process can't do without.
pub(crate) fn required<T>(value: Option<T>, what: &str, flag: &str, key: &str) -> Result<T, Failure> {
    value.ok_or_else(|| {
        Failure::usage(format!("{what} is not given"))
            .hint(format!("Say {flag}, or write `{key}` in the file of --config."))
    })
}

/// The name of this host; `localhost` where the system does not tell.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "localhost".to_string(),
        name => name.to_string(),
    }
}

fn metrics_failure(error: MetricsError) -> Failure {
    match error {
        MetricsError::Listen(..) => Failure::new(Kind::Occupied, error.to_string()),
        MetricsError::Recorder(_) => Failure::failed(error.to_string()),
    }
}

/// A build with planted bugs serves only with exactly one of them, which the environment names.
#[cfg(feature = "canary")]
pub(crate) fn refuse_canary() -> Result<(), Failure> {
    cairn_client::planted::choose().map(drop).map_err(|words| {
        Failure::new(Kind::Refused, words).hint("Build without the feature `canary` to serve volumes.")
    })
}

#[cfg(not(feature = "canary"))]
#[expect(clippy::unnecessary_wraps, reason = "builds with planted bugs may be refused")]
pub(crate) fn refuse_canary() -> Result<(), Failure> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_go_before_the_file_and_the_file_before_defaults() {
        let flags = |log_file: Option<&str>| Process {
            metrics: None,
            log_file: log_file.map(PathBuf::from),
            pid_file: None,
        };
        let section = ProcessSection {
            log: Some("debug".to_string()),
            log_file: Some(PathBuf::from("file.log")),
            ..ProcessSection::default()
        };
        let settings = Settings::new(Some("trace"), &flags(Some("flag.log")), &section);
        assert_eq!(
            (settings.log.as_str(), settings.log_file),
            ("trace", Some(PathBuf::from("flag.log")))
        );
        let settings = Settings::new(None, &flags(None), &section);
        assert_eq!(
            (settings.log.as_str(), settings.log_file),
            ("debug", Some(PathBuf::from("file.log")))
        );
        let settings = Settings::new(None, &flags(None), &ProcessSection::default());
        assert_eq!((settings.log.as_str(), settings.log_file), ("info", None));
    }
}
