//! Where logs go.

use std::fs::OpenOptions;
use std::io::{self, IsTerminal as _};
use std::path::Path;
use std::sync::Mutex;

use tracing_subscriber::EnvFilter;

use crate::failure::Failure;

/// Logs what the filter lets pass, to the end of a file or to standard error. Panics are logged too.
pub(crate) fn init(filter: &str, file: Option<&Path>) -> Result<(), Failure> {
    let filter = EnvFilter::builder().parse(filter).map_err(|error| {
        Failure::usage(format!("`{filter}` is no filter for logs: {error}"))
            .hint("Write a level (off, error, warn, info, debug, trace), or targets as `info,cairn_meta=debug`.")
    })?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter);
    let installed = match file {
        Some(path) => {
            let file = OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .map_err(|error| {
                    Failure::failed(format!("can't write logs to {}: {error}", path.display()))
                        .hint("Does its directory exist, and may this user write there?")
                })?;
            builder.with_ansi(false).with_writer(Mutex::new(file)).try_init()
        }
        None => builder
            .with_ansi(io::stderr().is_terminal())
            .with_writer(io::stderr)
            .try_init(),
    };
    installed.map_err(|error| Failure::failed(format!("can't start logging: {error}")))?;
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tracing::error!("a bug: {panic}");
        print(panic);
    }));
    Ok(())
}
