//! Exports: volumes served to hypervisors and other programs over NBD.

use std::collections::BTreeSet;
use std::fmt;

pub use crate::driver::{Died, Ended, Listen, ListenError};

use crate::core::ClientCore;
use crate::driver::library::{StartError, start_client};
use crate::driver::{Listener, Running, Settings};

/// What is served, where, and from which cluster.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ExportConfig {
    /// Addresses of metadata servers, `host:port`.
    pub meta: Vec<String>,
    /// Where to listen; at least one place.
    pub listen: Vec<Listen>,
    /// Names of the volumes that are served; every volume of the cluster if there is no list.
    pub only: Option<BTreeSet<String>>,
    /// The volume that a client gets that names none.
    pub default_export: Option<String>,
    /// Whether writes are refused.
    pub read_only: bool,
    /// What the server says of itself to people who ask who holds a volume; at most 256 bytes.
    pub words: String,
}

/// Why nothing is served.
#[derive(Debug)]
pub enum ExportError {
    /// It can't listen.
    Listen(ListenError),
    /// It was not told where to listen.
    NowhereToListen,
    /// It can't start.
    Start(StartError),
}

impl fmt::Display for ExportError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExportError::Listen(error) => error.fmt(f),
            ExportError::NowhereToListen => f.write_str("no place to listen at: give a unix socket or a TCP address"),
            ExportError::Start(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for ExportError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ExportError::Listen(error) => Some(error),
            ExportError::NowhereToListen => None,
            ExportError::Start(error) => Some(error),
        }
    }
}

/// A running NBD server.
#[derive(Debug)]
pub struct ExportServer {
    running: Running,
    places: Vec<Listen>,
}

impl ExportServer {
    /// Listens, finds the cluster and serves. A volume's attachment is taken at the first I/O to it, and released when its
    /// last connection ends. Must be called within a tokio runtime, which then speaks to the metadata servers, and after the
    /// process's recorder of metrics is installed.
    ///
    /// # Errors
    /// A place is taken, or no metadata server answers within 15 s.
    pub async fn start(config: ExportConfig) -> Result<ExportServer, ExportError> {
        if config.listen.is_empty() {
            return Err(ExportError::NowhereToListen);
        }
        let bound: Result<Vec<Listener>, ListenError> = config.listen.iter().map(Listener::bind).collect();
        let listeners = bound.map_err(ExportError::Listen)?;
        let places = listeners.iter().map(|listener| listener.place().clone()).collect();
        let settings = Settings {
            only: config.only,
            default_export: config.default_export,
            read_only: config.read_only,
            node_id: 0,
        };
        let running = start_client(config.meta, config.words, settings, listeners, ClientCore::new).await;
        Ok(ExportServer {
            running: running.map_err(ExportError::Start)?,
            places,
        })
    }

    /// Where it listens, with the real port where 0 was asked for.
    pub fn places(&self) -> &[Listen] {
        &self.places
    }

    /// Waits until it has ended, which it does not do by itself unless something is very wrong.
    ///
    /// # Errors
    /// Its thread has died.
    pub async fn ended(&self) -> Result<Ended, Died> {
        self.running.ended().await
    }

    /// Ends in order: takes no more requests, lets what is in flight end (10 s at the most), releases the attachments (5 s
    /// at the most).
    ///
    /// # Errors
    /// Its thread had died before.
    pub async fn shut_down(self) -> Result<Ended, Died> {
        self.running.shut_down().await
    }
}
