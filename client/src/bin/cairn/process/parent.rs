//! Ending with the process that started this one.

use std::io;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat};
use rustix::process::{Signal, set_parent_process_death_signal};

use crate::failure::Failure;

/// Set by `cairn dev` for the processes that it starts. When it dies without having been able to stop them, they must not
/// stay behind unnoticed.
pub(crate) const PARENT_VARIABLE: &str = "CAIRN_DEV_CHILD";

/// Asks the kernel to kill this process when its parent dies, if the parent is a `cairn dev`: it gives its processes a
/// pipe as standard input, and holds the other end. One that somebody has started again by hand, with the same
/// environment, has none; it belongs to nobody and goes on.
pub(crate) fn follow() -> Result<(), Failure> {
    if std::env::var_os(PARENT_VARIABLE).is_none() {
        return Ok(());
    }
    let what = |error: rustix::io::Errno| {
        Failure::failed(format!("can't follow the parent process: {}", io::Error::from(error)))
    };
    let stdin = io::stdin();
    if FileType::from_raw_mode(fstat(&stdin).map_err(what)?.st_mode) != FileType::Fifo {
        return Ok(());
    }
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(what)?;
    // A parent that died before the kernel was asked has closed its end of the pipe before.
    let mut ends = [PollFd::new(&stdin, PollFlags::IN)];
    poll(&mut ends, Some(&Timespec::default())).map_err(what)?;
    if ends[0].revents().contains(PollFlags::HUP) {
        return Err(Failure::failed("the `cairn dev` that started this process has died"));
    }
    Ok(())
}
