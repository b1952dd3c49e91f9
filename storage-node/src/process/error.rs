//! Why a storage node can't start or go on.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use cairn_meta::metrics::MetricsError;

use crate::driver::{DeviceError, DriverError};
use crate::store::OpenError;

/// Why a storage node can't start or go on.
#[derive(Debug)]
pub enum NodeError {
    /// The configuration makes no sense.
    Config(String),
    /// A device can't be opened.
    Device {
        /// Which one.
        path: PathBuf,
        /// Why.
        error: DeviceError,
    },
    /// What is on a device can't be used.
    Store {
        /// Which one.
        path: PathBuf,
        /// Why.
        error: OpenError,
    },
    /// Two of the devices can't be served together.
    Together(String),
    /// An address can't be listened on.
    Listen {
        /// Which one.
        address: SocketAddr,
        /// Why.
        error: io::Error,
    },
    /// Metrics can't be served.
    Metrics(MetricsError),
    /// A device's thread has ended, and no other is left.
    Ended {
        /// Which one.
        path: PathBuf,
        /// Why.
        error: DriverError,
    },
    /// Meta does not let the device be served, and no other is left.
    Refused {
        /// Which one.
        path: PathBuf,
        /// What meta said.
        words: String,
    },
    /// The operating system gives no randomness or no thread.
    System(io::Error),
}

impl fmt::Display for NodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NodeError::Config(words) | NodeError::Together(words) => f.write_str(words),
            NodeError::Device { path, error } => write!(f, "can't use the device {}: {error}", path.display()),
            NodeError::Store { path, error } => write!(f, "can't use the device {}: {error}", path.display()),
            NodeError::Listen { address, error } => write!(
                f,
                "can't listen on {address} ({error}): choose another address, or end what uses it"
            ),
            NodeError::Metrics(error) => error.fmt(f),
            NodeError::Ended { path, error } => {
                write!(f, "the device {} is not served any more: {error}", path.display())
            }
            NodeError::Refused { path, words } => {
                write!(f, "the metadata servers refuse the device {}: {words}", path.display())
            }
            NodeError::System(error) => write!(f, "the operating system refuses what a node needs: {error}"),
        }
    }
}

impl std::error::Error for NodeError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            NodeError::Device { error, .. } => Some(error),
            NodeError::Store { error, .. } => Some(error),
            NodeError::Listen { error, .. } | NodeError::System(error) => Some(error),
            NodeError::Metrics(error) => Some(error),
            NodeError::Ended { error, .. } => Some(error),
            NodeError::Config(_) | NodeError::Together(_) | NodeError::Refused { .. } => None,
        }
    }
}
