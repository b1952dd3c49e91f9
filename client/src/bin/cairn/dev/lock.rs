//! One `cairn dev` per directory, and none of an earlier one's processes.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};

use super::layout::{Layout, Part};
use crate::failure::{Failure, Kind};
use crate::limits::{KILL_BOUND, STOP_BOUND};

/// How often it is looked whether a process has ended.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Held while the directory is in use; the kernel lets go of it when this process ends, however it ends.
#[derive(Debug)]
pub(crate) struct DirLock {
    _file: File,
}

impl DirLock {
    /// Refuses while another `cairn dev` has the directory.
    pub(crate) fn acquire(layout: &Layout) -> Result<DirLock, Failure> {
        let path = layout.lock();
        let what = |error| Failure::failed(format!("can't lock {}: {error}", path.display()));
        let mut options = OpenOptions::new();
        let mut file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(what)?;
        if let Err(error) = flock(&file, FlockOperation::NonBlockingLockExclusive) {
            if error != rustix::io::Errno::WOULDBLOCK {
                return Err(what(error.into()));
            }
            let mut owner = String::new();
            // Whose it is, is told only if it can be read.
            let _ = file.read_to_string(&mut owner);
            let owner = match owner.trim() {
                "" => String::new(),
                pid => format!(" (process {pid})"),
            };
            return Err(Failure::new(
                Kind::Occupied,
                format!("another cairn dev{owner} runs in {}", layout.dir().display()),
            )
            .hint("Use the cluster that it runs, stop it with Ctrl-C, or choose another directory with --dir."));
        }
        file.set_len(0).and_then(|()| file.rewind()).map_err(what)?;
        writeln!(file, "{}", std::process::id()).map_err(what)?;
        Ok(DirLock { _file: file })
    }
}

/// Running processes of this directory, by whomever they were started.
pub(crate) fn running(layout: &Layout) -> Vec<(Part, u32)> {
    let own = std::process::id();
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let mut running: Vec<_> = pids
        .filter(|pid| *pid != own)
        .filter_map(|pid| Some((part_of(layout, pid)?, pid)))
        .collect();
    running.sort();
    running
}

/// Which part of this cluster a process is: one whose command line is `cairn ROLE --config DIR/conf/PART.toml`.
fn part_of(layout: &Layout, pid: u32) -> Option<Part> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let args: Vec<&str> = line
        .split(|byte| *byte == 0)
        .filter_map(|arg| std::str::from_utf8(arg).ok())
        .collect();
    let file = Path::new(args.iter().skip_while(|arg| **arg != "--config").nth(1)?);
    let part: Part = file.file_stem()?.to_str()?.parse().ok()?;
    let is_ours = args.get(1) == Some(&part.command())
        && file.file_name() == layout.part_config(part).file_name()
        // The same directory, also by another path.
        && fs::canonicalize(file.parent()?).ok()? == fs::canonicalize(layout.part_configs()).ok()?;
    is_ours.then_some(part)
}

/// Sends a signal; that the process has ended already is no failure.
pub(crate) fn send(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// Stops what an earlier `cairn dev` has left running: asks first, then kills. Gives what there was.
pub(crate) fn stop_leftovers(layout: &Layout) -> Result<Vec<(Part, u32)>, Failure> {
    let found = running(layout);
    for (_, pid) in &found {
        send(*pid, Signal::TERM);
    }
    if !wait_until_gone(layout, STOP_BOUND) {
        for (_, pid) in running(layout) {
            send(pid, Signal::KILL);
        }
        if !wait_until_gone(layout, KILL_BOUND) {
            let (part, pid) = running(layout).into_iter().next().unwrap_or((Part::Export, 0));
            return Err(Failure::new(
                Kind::Occupied,
                format!("{part} of an earlier start (process {pid}) can't be killed"),
            )
            .hint("It may hang in the kernel: look at its disk, and start again."));
        }
    }
    Ok(found)
}

fn wait_until_gone(layout: &Layout, bound: Duration) -> bool {
    let end = Instant::now() + bound;
    loop {
        if running(layout).is_empty() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_directory_in_use_is_refused_and_names_who_uses_it() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(Some(dir.path())).unwrap();
        layout.create().unwrap();
        let lock = DirLock::acquire(&layout).unwrap();
        let failure = DirLock::acquire(&layout).unwrap_err();
        assert_eq!(failure.kind, Kind::Occupied);
        let own = format!("(process {})", std::process::id());
        assert!(failure.what.contains(&own), "{failure}");
        drop(lock);
        // A process that another test starts at this moment holds the file too, until it runs its program.
        let end = Instant::now() + Duration::from_secs(10);
        while DirLock::acquire(&layout).is_err() {
            assert!(Instant::now() < end, "the lock was not given back");
            std::thread::sleep(LOOK_INTERVAL);
        }
    }

    /// Runs `sh ROLE --config FILE`, where ROLE is a script: from outside it looks as a part of the cluster does.
    fn stand_in(layout: &Layout, role: &str, config: &Path) -> std::process::Child {
        // It waits for input without another process: that would look the same for a moment.
        fs::write(layout.dir().join(role), "read line\n").unwrap();
        let mut command = Command::new("sh");
        command.arg(role).arg("--config").arg(config).current_dir(layout.dir());
        command.stdin(Stdio::piped()).spawn().unwrap()
    }

    #[test]
    fn leftovers_are_found_by_their_command_line_and_stopped_and_others_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(Some(dir.path())).unwrap();
        layout.create().unwrap();
        let mut ours = stand_in(&layout, "node", &layout.part_config(Part::Node(2)));
        let mut other = stand_in(&layout, "node", Path::new("/elsewhere/conf/node-2.toml"));
        let mut role = stand_in(&layout, "meta", &layout.part_config(Part::Node(2)));
        let end = Instant::now() + Duration::from_secs(10);
        while running(&layout).is_empty() && Instant::now() < end {
            std::thread::sleep(LOOK_INTERVAL);
        }
        assert_eq!(running(&layout), [(Part::Node(2), ours.id())]);
        // Whoever is stopped is waited for here, as the one that started it would.
        let pid = ours.id();
        let waiter = std::thread::spawn(move || {
            // Waiting closes its input, which would end it.
            let _input = ours.stdin.take();
            ours.wait()
        });
        assert_eq!(stop_leftovers(&layout).unwrap(), [(Part::Node(2), pid)]);
        assert!(!waiter.join().unwrap().unwrap().success());
        for child in [&mut other, &mut role] {
            assert!(
                child.try_wait().unwrap().is_none(),
                "it is none of this directory's processes"
            );
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
