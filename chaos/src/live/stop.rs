//! The signals that ask a run to stop: it ends all that it has started, unmounts, removes its namespaces, and says so.
//!
//! Children are in process groups of their own, so that a terminal's Ctrl-C reaches this program alone: what it has started must not
//! end before it knows why.

use std::sync::OnceLock;

use tokio::signal::unix::{SignalKind, signal};

use super::report::{Failure, FailureKind};

/// The signal that came first.
static ASKED: OnceLock<&str> = OnceLock::new();

/// From now on SIGINT, SIGTERM and SIGHUP end no process at once, but are what [`asked`] says. A second one does: who sends it does not
/// want to wait. Calling it again changes nothing.
///
/// # Errors
/// Signals can't be listened for, in words.
pub fn listen() -> Result<(), String> {
    static LISTENS: OnceLock<Result<(), String>> = OnceLock::new();
    LISTENS.get_or_init(begin).clone()
}

fn begin() -> Result<(), String> {
    let failed = |error: std::io::Error| format!("can't listen for signals: {error}");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed)?;
    let mut listening = {
        let _within = runtime.enter();
        let listen = |kind| signal(kind).map_err(failed);
        (
            listen(SignalKind::interrupt())?,
            listen(SignalKind::terminate())?,
            listen(SignalKind::hangup())?,
        )
    };
    let wait = move || {
        let mut next = || {
            runtime.block_on(async {
                tokio::select! {
                    _ = listening.0.recv() => "SIGINT",
                    _ = listening.1.recv() => "SIGTERM",
                    _ = listening.2.recv() => "SIGHUP",
                }
            })
        };
        let name = *ASKED.get_or_init(&mut next);
        eprintln!("{name}: ending everything; once more ends this program at once");
        next();
        std::process::exit(FailureKind::Stopped.exit_code().into());
    };
    let spawned = std::thread::Builder::new().name("signals".to_string()).spawn(wait);
    spawned.map(drop).map_err(failed)
}

/// The signal that has asked this program to stop, if one has.
pub fn asked() -> Option<&'static str> {
    ASKED.get().copied()
}

/// Fails once a signal has asked to stop.
///
/// # Errors
/// It has.
pub fn check() -> Result<(), Failure> {
    match asked() {
        None => Ok(()),
        Some(name) => Err(stopped(name)),
    }
}

fn stopped(name: &str) -> Failure {
    Failure::new(
        FailureKind::Stopped,
        format!("it was asked to stop ({name}); nothing had gone wrong until then"),
    )
}

/// What failed because everything was ending is no failure of the cluster. What guests read, or were told, stays one.
pub fn judged(failure: Failure) -> Failure {
    match asked() {
        Some(name) if !matches!(failure.kind, FailureKind::Data | FailureKind::GuestError) => stopped(name),
        _ => failure,
    }
}
