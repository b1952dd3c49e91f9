//! Ending with the process that started this one.

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

use crate::failure::Failure;

/// Holds the process id of the `cairn dev` that started this process. When that one dies without having been able to
/// stop its processes, they must not stay behind unnoticed.
pub(crate) const PARENT_VARIABLE: &str = "CAIRN_DEV_PROCESS";

/// Asks the kernel to kill this process when its parent dies, if the parent is the `cairn dev` of the environment. One
/// that somebody has started again by hand, with the same environment, belongs to nobody and goes on.
pub(crate) fn follow() -> Result<(), Failure> {
    let wanted = std::env::var(PARENT_VARIABLE).ok();
    let Some(wanted) = wanted.and_then(|text| Pid::from_raw(text.parse().ok()?)) else {
        return Ok(());
    };
    if getppid() != Some(wanted) {
        return Ok(());
    }
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| Failure::failed(format!("can't follow the parent process: {error}")))?;
    // It may have died just before the kernel was asked.
    if getppid() != Some(wanted) {
        return Err(Failure::failed("the `cairn dev` that started this process has died"));
    }
    Ok(())
}
