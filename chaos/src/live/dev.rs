//! A `cairn dev` cluster as a child process, in a directory of its own, of which nothing stays behind.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::process::{self, CommandLine, Guarded};
use super::scrape::scrape;
use super::wait::wait_until;

/// How long a cluster may take to say that it is ready, on a busy machine and a slow build.
pub const READY_BOUND: Duration = Duration::from_secs(90);
/// How long a cluster may take to stop when it is asked to.
pub const STOP_BOUND: Duration = Duration::from_secs(30);
/// A Unix socket's path has at most 107 bytes; this many are left for `/nbd.sock` and the like.
const DIR_BYTES_MAX: usize = 80;
/// Lines of each log that are shown when a test fails.
const LOG_TAIL_LINES: usize = 40;

/// What to start.
#[derive(Clone, Debug)]
pub struct DevOptions {
    /// The `cairn` program.
    pub program: PathBuf,
    /// Volumes, each as `NAME:SIZE`.
    pub volumes: Vec<String>,
    /// How large each node's device is.
    pub device_size: String,
    /// Whatever else stands on its command line.
    pub args: Vec<String>,
}

impl DevOptions {
    /// One volume `demo` of 256 MiB on devices of 1 GiB.
    pub fn new(program: impl Into<PathBuf>) -> DevOptions {
        DevOptions {
            program: program.into(),
            volumes: vec!["demo:256M".to_string()],
            device_size: "1G".to_string(),
            args: Vec::new(),
        }
    }

    /// These volumes instead.
    pub fn volumes(mut self, volumes: &[&str]) -> DevOptions {
        self.volumes = volumes.iter().map(ToString::to_string).collect();
        self
    }

    /// Devices of this size instead.
    pub fn device_size(mut self, size: &str) -> DevOptions {
        self.device_size = size.to_string();
        self
    }

    /// More arguments.
    pub fn args(mut self, args: &[&str]) -> DevOptions {
        self.args.extend(args.iter().map(ToString::to_string));
        self
    }
}

/// A cluster did not come up.
#[derive(Debug)]
pub struct StartError {
    /// What went wrong.
    pub what: String,
    /// Its exit status, when it has ended.
    pub status: Option<ExitStatus>,
    /// What it had printed, and the end of each log.
    pub output: String,
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cairn dev {}", self.what)?;
        if let Some(status) = self.status {
            write!(f, " ({status})")?;
        }
        write!(f, "; it had printed:\n{}", self.output)
    }
}

impl std::error::Error for StartError {}

/// A directory for one cluster, removed with all processes that run in it. When the owner panics, the logs are shown.
#[derive(Debug)]
pub struct DevDir {
    path: PathBuf,
}

impl DevDir {
    /// A new directory below `preferred`, or below the system's temporary directory where the path of a Unix socket
    /// would become too long.
    pub fn new(preferred: &Path) -> std::io::Result<DevDir> {
        let short = preferred.as_os_str().len() <= DIR_BYTES_MAX - 16;
        let base = if short {
            preferred.to_path_buf()
        } else {
            std::env::temp_dir()
        };
        fs::create_dir_all(&base)?;
        let path = tempfile::Builder::new().prefix("cairn-").tempdir_in(base)?.keep();
        Ok(DevDir { path })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// SIGKILL to every process that names the directory on its command line, until there is none.
    pub fn kill_all(&self) {
        let gone = wait_until(STOP_BOUND, || {
            let pids = process::of_dir(&self.path);
            for pid in &pids {
                process::signal(*pid, Signal::KILL);
            }
            pids.is_empty()
        });
        assert!(
            gone || std::thread::panicking(),
            "processes of {} can't be killed",
            self.path.display()
        );
    }

    /// The end of each log.
    fn logs(&self) -> String {
        let entries = fs::read_dir(self.path.join("log")).into_iter().flatten();
        let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        files.sort();
        let mut out = String::new();
        for file in files {
            let text = String::from_utf8_lossy(&fs::read(&file).unwrap_or_default()).into_owned();
            let lines: Vec<_> = text.lines().collect();
            let end = &lines[lines.len().saturating_sub(LOG_TAIL_LINES)..];
            out.push_str(&format!("--- {} (its end)\n{}\n", file.display(), end.join("\n")));
        }
        out
    }
}

impl Drop for DevDir {
    fn drop(&mut self) {
        self.kill_all();
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        // What can't be removed lies in a directory for temporary files anyway.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// The `cairn` program, told nothing by the environment that tests run in.
fn program(options: &DevOptions) -> Command {
    let mut command = Command::new(&options.program);
    for variable in ["CAIRN_CONFIG", "CAIRN_META", "CAIRN_LOG"] {
        command.env_remove(variable);
    }
    command.stdin(Stdio::null());
    command
}

/// A running cluster. Dropping it kills everything.
#[derive(Debug)]
pub struct Dev {
    options: DevOptions,
    // In this order: `cairn dev` and what was started by hand end before the directory goes.
    main: Guarded,
    restarted: BTreeMap<String, Guarded>,
    lines: Receiver<String>,
    printed: Vec<String>,
    dir: DevDir,
}

impl Dev {
    /// Starts it in `dir` and waits for `cluster ready`.
    pub fn start(options: DevOptions, dir: DevDir) -> Result<Dev, StartError> {
        let begun = |error: std::io::Error| StartError {
            what: format!("can't be started from {}: {error}", options.program.display()),
            status: None,
            output: String::new(),
        };
        let mut command = program(&options);
        command.arg("dev").arg("--dir").arg(dir.path());
        for volume in &options.volumes {
            command.args(["--volume", volume]);
        }
        command
            .args(["--device-size", &options.device_size])
            .args(&options.args);
        let errors = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(dir.path().join("stderr"));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors.map_err(begun)?);
        let mut main = Guarded::new(command.spawn().map_err(begun)?);
        let stdout = main.child().stdout.take().expect("standard output was piped above");
        let (sender, lines) = channel();
        // It ends with the pipe.
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut dev = Dev {
            options,
            main,
            restarted: BTreeMap::new(),
            lines,
            printed: Vec::new(),
            dir,
        };
        match dev.wait_line("cluster ready", READY_BOUND) {
            Ok(()) => Ok(dev),
            Err(what) => Err(StartError {
                status: dev.main.wait(Duration::from_secs(1)),
                output: dev.output() + "\n" + &dev.dir.logs(),
                what,
            }),
        }
    }

    /// Reads lines of its output until this one.
    fn wait_line(&mut self, wanted: &str, bound: Duration) -> Result<(), String> {
        let end = Instant::now() + bound;
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.printed.push(line);
                    if self.printed.last().is_some_and(|line| line == wanted) {
                        return Ok(());
                    }
                }
                Err(RecvTimeoutError::Timeout) => return Err(format!("did not print `{wanted}` within {bound:?}")),
                Err(RecvTimeoutError::Disconnected) => return Err(format!("ended before it printed `{wanted}`")),
            }
        }
    }

    /// The lines it printed up to `cluster ready`.
    pub fn printed(&self) -> &[String] {
        &self.printed
    }

    /// What it has printed, and said on standard error.
    pub fn output(&mut self) -> String {
        self.printed.extend(self.lines.try_iter());
        let errors = fs::read(self.path().join("stderr")).unwrap_or_default();
        format!("{}\n{}", self.printed.join("\n"), String::from_utf8_lossy(&errors))
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The NBD socket.
    pub fn socket(&self) -> PathBuf {
        self.path().join("nbd.sock")
    }

    /// Where a volume is.
    pub fn uri(&self, volume: &str) -> String {
        format!("nbd+unix:///{volume}?socket={}", self.socket().display())
    }

    /// A `cairn` command against this cluster.
    pub fn cairn(&self, args: &[&str]) -> Command {
        let mut command = program(&self.options);
        command.arg("--config").arg(self.path().join("cairn.toml")).args(args);
        command
    }

    /// The metrics of a part, as it shows them now.
    pub fn metrics(&self, part: &str) -> std::io::Result<String> {
        let config = fs::read_to_string(self.path().join("conf").join(format!("{part}.toml")))?;
        let address = config.lines().find_map(|line| line.strip_prefix("metrics = "));
        scrape(address.unwrap_or_default().trim_matches('"'))
    }

    /// The process id of a part: `meta-1`, `node-2`, `export`. Panics when it has no readable pid file.
    pub fn pid(&self, part: &str) -> i32 {
        let pid = self.read_pid(part);
        pid.unwrap_or_else(|| panic!("{} holds no process id", self.pid_file(part).display()))
    }

    fn read_pid(&self, part: &str) -> Option<i32> {
        fs::read_to_string(self.pid_file(part)).ok()?.trim().parse().ok()
    }

    /// The process id of `cairn dev` itself.
    pub fn main_pid(&self) -> i32 {
        self.main.pid()
    }

    /// All parts that have a pid file, and their process ids.
    pub fn pids(&self) -> BTreeMap<String, i32> {
        let entries = fs::read_dir(self.path().join("run")).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let parts = names.filter_map(|name| name.strip_suffix(".pid").map(str::to_string));
        parts
            .filter_map(|part| Some((part.clone(), self.read_pid(&part)?)))
            .collect()
    }

    fn pid_file(&self, part: &str) -> PathBuf {
        self.path().join("run").join(format!("{part}.pid"))
    }

    /// SIGKILL to one part. Gives the command line that [`Dev::restart`] takes.
    pub fn kill(&mut self, part: &str) -> CommandLine {
        let pid = self.pid(part);
        let line = CommandLine::of(pid).unwrap_or_else(|| panic!("{part}, process {pid}, does not run"));
        process::kill(pid);
        self.restarted.remove(part);
        line
    }

    /// Starts a part again as it was started before, and waits until it has written its pid file.
    pub fn restart(&mut self, part: &str, line: &CommandLine) {
        let log = self.path().join("log").join(format!("{part}.log"));
        let child = line
            .start(&log)
            .unwrap_or_else(|error| panic!("{part} can't be started again: {error}"));
        let child = Guarded::new(child);
        let is_up = || self.read_pid(part) == Some(child.pid()) || !process::is_running(child.pid());
        assert!(
            wait_until(READY_BOUND, is_up),
            "{part} was started again and wrote no pid file"
        );
        self.restarted.insert(part.to_string(), child);
    }

    /// SIGKILL to everything at once, `cairn dev` too.
    pub fn kill_all(self) -> DevDir {
        let mut pids: Vec<i32> = self.pids().into_values().collect();
        pids.push(self.main.pid());
        for pid in &pids {
            process::signal(*pid, Signal::KILL);
        }
        for pid in pids {
            process::kill(pid);
        }
        self.take_dir()
    }

    /// SIGKILL to everything at once, then `cairn dev` again on the same directory.
    pub fn kill_all_and_start_again(self) -> Result<Dev, StartError> {
        let options = self.options.clone();
        let dir = self.kill_all();
        dir.kill_all();
        Dev::start(options, dir)
    }

    /// Sends a signal to `cairn dev` and waits until it has ended.
    pub fn stop(mut self, signal: Signal) -> (ExitStatus, DevDir) {
        process::signal(self.main.pid(), signal);
        let status = self.main.wait(STOP_BOUND);
        let status = status.unwrap_or_else(|| panic!("cairn dev did not end within {STOP_BOUND:?} of {signal:?}"));
        (status, self.take_dir())
    }

    fn take_dir(self) -> DevDir {
        // The children are dropped with the rest of `self`; the directory goes on.
        self.dir
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program that stands in for `cairn`, and a directory for it.
    fn stand_in() -> (tempfile::TempDir, DevOptions, DevDir) {
        let base = tempfile::tempdir().unwrap();
        let dir = DevDir::new(base.path()).unwrap();
        let program = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/stand-in/cairn");
        (base, DevOptions::new(program), dir)
    }

    #[test]
    fn parts_are_killed_and_restarted_and_nothing_stays_behind() {
        let (_base, options, dir) = stand_in();
        let mut dev = Dev::start(options, dir).unwrap();
        let path = dev.path().to_path_buf();
        assert_eq!(dev.printed()[0], format!("ready {}", dev.uri("demo")));
        assert_eq!(dev.pids().keys().collect::<Vec<_>>(), ["meta-1", "node-1"]);

        let before = dev.pid("node-1");
        let line = dev.kill("node-1");
        assert!(!process::is_running(before));
        dev.restart("node-1", &line);
        let after = dev.pid("node-1");
        assert!(after != before && process::is_running(after));

        let dev = dev.kill_all_and_start_again().unwrap();
        assert!(!process::is_running(after));
        let (status, dir) = dev.stop(Signal::TERM);
        assert!(status.success());
        assert!(wait_until(STOP_BOUND, || process::of_dir(dir.path()).is_empty()));
        drop(dir);
        assert!(!path.exists());
    }

    #[test]
    fn a_test_that_panics_leaves_no_process() {
        let (_base, options, dir) = stand_in();
        let path = dir.path().to_path_buf();
        let test = std::thread::spawn(move || {
            let dev = Dev::start(options, dir).unwrap();
            let pids = dev.pids();
            assert!(pids.is_empty(), "this test fails on purpose, with {pids:?}");
        });
        assert!(test.join().is_err());
        assert!(process::of_dir(&path).is_empty());
        assert!(!path.exists());
    }

    #[test]
    fn a_cluster_that_does_not_come_up_says_why() {
        let (_base, options, dir) = stand_in();
        fs::write(dir.path().join("refuse"), "").unwrap();
        let error = Dev::start(options, dir).unwrap_err();
        assert_eq!(error.status.and_then(|status| status.code()), Some(4));
        assert!(error.to_string().contains("refused: there is a reason"), "{error}");
    }
}
