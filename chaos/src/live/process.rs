//! Any process, by its id: kill, freeze, look at its memory, start it again as it was started.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::net::SocketAddr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::wait::{wait_for, wait_until};

/// How long a process may take to be gone after SIGKILL.
const KILL_BOUND: Duration = Duration::from_secs(20);

/// How a process was started: enough to start it again.
#[derive(Clone, Debug)]
pub struct CommandLine {
    /// The program and its arguments.
    pub args: Vec<OsString>,
    /// Its working directory.
    pub cwd: PathBuf,
    /// Its environment, each as `NAME=value`.
    env: Vec<OsString>,
}

impl CommandLine {
    /// Of a running process; `None` when there is none with this id, or it has ended.
    pub fn of(pid: i32) -> Option<CommandLine> {
        let list = |name: &str| -> Option<Vec<OsString>> {
            let bytes = fs::read(format!("/proc/{pid}/{name}")).ok()?;
            let items = bytes.split(|byte| *byte == 0).filter(|item| !item.is_empty());
            Some(items.map(|item| OsString::from_vec(item.to_vec())).collect())
        };
        let args = list("cmdline")?;
        if args.is_empty() {
            return None;
        }
        Some(CommandLine {
            args,
            cwd: fs::read_link(format!("/proc/{pid}/cwd")).ok()?,
            env: list("environ")?,
        })
    }

    /// Starts the same again, with the same environment; its output goes to the end of `log`.
    pub fn start(&self, log: &Path) -> std::io::Result<Child> {
        let output = fs::OpenOptions::new().create(true).append(true).open(log)?;
        let mut command = Command::new(&self.args[0]);
        command.args(&self.args[1..]).current_dir(&self.cwd).env_clear();
        for pair in &self.env {
            let pair = pair.as_bytes();
            if let Some(equals) = pair.iter().position(|byte| *byte == b'=') {
                command.env(
                    OsStr::from_bytes(&pair[..equals]),
                    OsStr::from_bytes(&pair[equals + 1..]),
                );
            }
        }
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
    }
}

/// Sends a signal. Whether there was a process to take it.
pub fn signal(pid: i32, signal: Signal) -> bool {
    Pid::from_raw(pid).is_some_and(|pid| kill_process(pid, signal).is_ok())
}

/// Whether the process exists and has not ended (a process that its parent has not waited for has ended).
pub fn is_running(pid: i32) -> bool {
    matches!(state(pid), Some(state) if state != 'Z' && state != 'X')
}

/// The state letter of `/proc/PID/stat`: `R`unning, `S`leeping, s`T`opped, `Z`ombie.
pub fn state(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may itself hold spaces and parentheses.
    stat.rsplit_once(") ")?.1.chars().next()
}

/// SIGKILL, and waits until it is gone.
///
/// Panics if it is still there after 20 seconds.
pub fn kill(pid: i32) {
    signal(pid, Signal::KILL);
    assert!(
        wait_until(KILL_BOUND, || !is_running(pid)),
        "process {pid} is still there {KILL_BOUND:?} after SIGKILL, in state {:?}",
        state(pid)
    );
}

/// SIGSTOP: it keeps its connections open and answers nothing until [`resume`].
pub fn freeze(pid: i32) {
    assert!(signal(pid, Signal::STOP), "no process {pid} to freeze");
    assert!(
        wait_until(KILL_BOUND, || state(pid) == Some('T')),
        "process {pid} did not stop"
    );
}

/// SIGCONT.
pub fn resume(pid: i32) {
    assert!(signal(pid, Signal::CONT), "no process {pid} to resume");
}

/// What a process has in memory, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resident {
    /// Now.
    pub now: u64,
    /// At the most since its start.
    pub peak: u64,
}

/// Resident memory, from `/proc/PID/status`; `None` when it has ended.
pub fn resident(pid: i32) -> Option<Resident> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib << 10)
    };
    Some(Resident {
        now: field("VmRSS:")?,
        peak: field("VmHWM:")?,
    })
}

/// The TCP addresses (IPv4) on which a process listens.
pub fn listening(pid: i32) -> Vec<SocketAddr> {
    let links = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let sockets: BTreeSet<String> = links
        .filter_map(|entry| fs::read_link(entry.path()).ok()?.into_os_string().into_string().ok())
        .filter_map(|link| Some(link.strip_prefix("socket:[")?.strip_suffix("]")?.to_string()))
        .collect();
    let table = fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap_or_default();
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // Fields: number, local address, remote address, state (0A is LISTEN), …, inode.
            let (local, state, inode) = (fields.get(1)?, fields.get(3)?, fields.get(9)?);
            (*state == "0A" && sockets.contains(*inode)).then_some(())?;
            let (address, port) = local.split_once(':')?;
            let address = u32::from_str_radix(address, 16).ok()?.to_ne_bytes();
            Some(SocketAddr::from((address, u16::from_str_radix(port, 16).ok()?)))
        })
        .collect()
}

/// The ids of all running processes whose command line names something in `dir`, this one excepted.
pub fn of_dir(dir: &Path) -> Vec<i32> {
    let needle = dir.as_os_str().as_encoded_bytes();
    let own = std::process::id() as i32;
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != own && is_running(*pid))
        .filter(|pid| {
            let cmdline = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            cmdline.windows(needle.len()).any(|window| window == needle)
        })
        .collect()
}

/// A child that does not outlive its owner.
#[derive(Debug)]
pub struct Guarded(Child);

impl Guarded {
    /// Takes it over.
    pub fn new(child: Child) -> Guarded {
        Guarded(child)
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    /// Its exit status; `None` when it has not ended within `bound`.
    pub fn wait(&mut self, bound: Duration) -> Option<ExitStatus> {
        wait_for(bound, || self.0.try_wait().ok().flatten())
    }

    /// The child itself.
    pub fn child(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_sockets_are_found_until_they_are_closed() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let own = std::process::id() as i32;
        assert!(listening(own).contains(&address));
        drop(listener);
        assert!(!listening(own).contains(&address));
    }

    #[test]
    fn a_process_is_frozen_resumed_killed_and_started_again_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let marker = dir.path().join("a name with spaces");
        let shell = |line: &str| {
            Command::new("sh")
                .args(["-c", line])
                .arg(&marker)
                .env("CAIRN_TEST_MARK", "a=b")
                .stdin(Stdio::piped())
                .spawn()
                .unwrap()
        };
        let mut child = Guarded::new(shell("echo \"$0 $CAIRN_TEST_MARK\"; read line; exit 3"));
        let pid = child.pid();
        let line = wait_for(KILL_BOUND, || CommandLine::of(pid).filter(|line| line.args.len() == 4)).unwrap();
        assert_eq!(of_dir(dir.path()), [pid]);
        assert!(resident(pid).unwrap().peak >= resident(pid).unwrap().now);
        freeze(pid);
        assert!(is_running(pid));
        resume(pid);
        kill(pid);
        assert!(child.wait(KILL_BOUND).is_some());
        assert_eq!(of_dir(dir.path()), [] as [i32; 0]);

        let log = dir.path().join("log");
        let mut again = Guarded::new(line.start(&log).unwrap());
        assert_eq!(
            again.wait(KILL_BOUND).unwrap().code(),
            Some(3),
            "standard input is empty"
        );
        assert_eq!(fs::read_to_string(log).unwrap(), format!("{} a=b\n", marker.display()));
    }
}
