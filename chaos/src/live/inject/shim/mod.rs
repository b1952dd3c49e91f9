//! A device that loses power, fails, sticks and lies on demand: one file, `device`, in a FUSE file system of its own, between a
//! process and a backing file. Direct I/O and io_uring work on it.
//!
//! # What it models
//!
//! 1. A write is in memory when it is answered. A flush (`fsync`, `fdatasync`) makes all writes that were answered before it
//!    durable, which means: written to the backing file.
//! 2. A power cut leaves of each unflushed sector of 512 bytes the last flushed content or one of the newest four that were
//!    written since, chosen by seed, each sector for itself: so writes are lost, torn and reordered. Writes under way count as unflushed.
//! 3. Above 64 MiB of unflushed content it writes some back by itself, as devices do.
//! 4. The backing file itself is not flushed: the shim survives its own power cuts, not those of the machine.
//! 5. A write that is answered with an error changed nothing. Real devices may have written part of it: a power cut shows that.
//!
//! To cut the power of a machine, kill its processes first (or freeze them, cut, and kill them): a process that lives on sees
//! EIO, which is another fault, a dead disk.
//!
//! A process with I/O stuck here does not end by SIGKILL before the shim is healed, its power cut, or it is dropped: as with
//! a disk that hangs. The kernel holds writes back while a flush is under way: a stuck or slow flush stops writes, but not reads.
//!
//! Mounting needs root, or the program `fusermount3`.
//!
//! Reading order: [`cache`] and [`rules`], which [`disk`] puts together; then `fs`, which serves it, and [`Shim`].

pub mod cache;
pub mod disk;
mod fs;
pub mod media;
pub mod rules;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use fuser::{BackgroundSession, Config, MountOption, Session};
use rustix::mount::{UnmountFlags, unmount};

pub use self::cache::Cut;
use self::disk::Disk;
pub use self::disk::{Counters, CutBy};
use self::fs::{Shared, ShimFs};
use self::media::Backing;
pub use self::rules::{Effect, Kind, RULE_WORDS, Rule, When};

/// The one file's name, unless told otherwise.
pub const DEVICE: &str = "device";
/// What stands in the table of mounts.
const SOURCE: &str = "cairn-shim";

/// The commands, for a person.
pub const COMMANDS: &str =
    "on RULE, heal, power-cut [SEED|lose-all], power-on, rot BITS [FIRST_BYTE..END], wipe, swap FILE, settle, status";

/// A running shim. Dropping it is an orderly end: what was written is in the backing file, what waited fails with EIO, and the
/// mount is gone.
#[derive(Debug)]
pub struct Shim {
    device: PathBuf,
    mount: PathBuf,
    shared: Arc<Shared>,
    served: Mutex<Option<(BackgroundSession, JoinHandle<()>)>>,
}

impl Shim {
    /// Serves `backing`, a file of whole sectors that exists, as the file `device` in `mount`, a directory that exists.
    ///
    /// # Errors
    /// In words: the backing file, the mount.
    pub fn start(backing: &Path, mount: &Path, seed: u64) -> io::Result<Shim> {
        Shim::start_as(DEVICE, backing, mount, seed)
    }

    /// The same, with another name for the file: `device-1` in the directory of a node of `cairn dev`.
    ///
    /// # Errors
    /// As [`Shim::start`].
    pub fn start_as(name: &str, backing: &Path, mount: &Path, seed: u64) -> io::Result<Shim> {
        let context = |doing: String| move |error: io::Error| io::Error::new(error.kind(), format!("{doing}: {error}"));
        let media = Backing::open(backing).map_err(context(format!("opening {}", backing.display())))?;
        let shared = Arc::new(Shared::new(Disk::new(media, seed)));
        let fs = ShimFs {
            shared: Arc::clone(&shared),
            name: name.into(),
        };
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName(SOURCE.to_string()), MountOption::NoAtime];
        let mount = mount
            .canonicalize()
            .map_err(context(format!("looking at {}", mount.display())))?;
        let mounting = format!(
            "mounting at {} (it needs root, or fusermount3 of package fuse3)",
            mount.display()
        );
        let session = Session::new(fs, &mount, &config)
            .and_then(Session::spawn)
            .map_err(context(mounting))?;
        let working = Arc::clone(&shared);
        let worker = std::thread::Builder::new()
            .name("shim".into())
            .spawn(move || working.work())?;
        Ok(Shim {
            device: mount.join(name),
            mount,
            shared,
            served: Mutex::new(Some((session, worker))),
        })
    }

    /// Where processes find the device.
    pub fn device(&self) -> PathBuf {
        self.device.clone()
    }

    /// What it did so far.
    pub fn counters(&self) -> Counters {
        self.shared.look(Disk::counters)
    }

    /// Requests that are delayed or stuck now.
    pub fn waiting(&self) -> usize {
        self.shared.look(Disk::waiting)
    }

    /// Sectors that were written and not flushed.
    pub fn unflushed(&self) -> u64 {
        self.shared.look(Disk::unflushed)
    }

    /// Adds a rule; it strikes from the next request on.
    ///
    /// # Errors
    /// There are too many rules.
    pub fn add(&self, rule: Rule) -> Result<(), String> {
        self.shared.with(|disk| (disk.add(rule), Vec::new()))
    }

    /// Takes all rules away; what waited is done. Power stays off, and harm done stays.
    pub fn heal(&self) {
        self.shared.with(|disk| ((), disk.heal()));
    }

    /// Cuts the power; see the module. All I/O fails with EIO until [`Shim::power_on`].
    ///
    /// # Errors
    /// The backing file failed, in words.
    pub fn power_cut(&self, by: impl Into<CutBy>) -> Result<Cut, String> {
        let by = by.into();
        self.shared.with(|disk| match disk.power_cut(by) {
            Ok((cut, answers)) => (Ok(cut), answers),
            Err(words) => (Err(words), Vec::new()),
        })
    }

    /// Gives it power again.
    pub fn power_on(&self) {
        self.shared.with(|disk| (disk.power_on(), Vec::new()));
    }

    /// Flips bits of stored data, see [`Disk::rot`].
    ///
    /// # Errors
    /// Of the backing file.
    pub fn rot(&self, bits: u64, range: Option<Range<u64>>) -> io::Result<u64> {
        self.shared.with(|disk| (disk.rot(bits, range), Vec::new()))
    }

    /// An empty device from now on.
    ///
    /// # Errors
    /// Of the backing file.
    pub fn wipe(&self) -> io::Result<()> {
        self.shared.with(|disk| (disk.wipe(), Vec::new()))
    }

    /// Serves another backing file from now on. Two shims whose devices are to be swapped are each given the other's file.
    ///
    /// # Errors
    /// Of the backing files; then nothing was swapped.
    pub fn swap(&self, backing: &Path) -> io::Result<()> {
        let media = Backing::open(backing)?;
        self.shared.with(|disk| (disk.swap(media).map(drop), Vec::new()))
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// Of the backing file.
    pub fn settle(&self) -> io::Result<()> {
        self.shared.with(|disk| (disk.settle(), Vec::new()))
    }

    /// Ends it, as dropping it does; a second time it does nothing.
    pub fn end(&self) {
        let Some((session, worker)) = self.served.lock().expect("no holder of the lock panics").take() else {
            return;
        };
        // Whoever still has the file open gets errors from now on, not silence: nobody hangs on a shim that is gone. What
        // waits fails as well; a cut of what is settled loses nothing.
        let settled = self.settle().map_err(|error| error.to_string());
        if let Err(words) = settled.and_then(|()| self.power_cut(CutBy::LoseAll)) {
            eprintln!("shim at {}: the backing file failed: {words}", self.mount.display());
        }
        self.shared.end();
        // It fails only if the worker panicked, which was told then.
        let _ = worker.join();
        // Lazily: it may still be open somewhere. Where this is not allowed, the session asks fusermount3.
        let _ = unmount(&self.mount, UnmountFlags::DETACH);
        drop(session);
    }

    /// Does what a line says, see [`COMMANDS`]. `power-cut` is answered by what it kept and lost, `rot` by how many bits it
    /// flipped, `status` by the state and the counters.
    ///
    /// # Errors
    /// In words: it is no command, or it could not be done.
    pub fn obey(&self, line: &str) -> Result<String, String> {
        let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
        let words: Vec<&str> = rest.split_whitespace().collect();
        let nothing = |()| String::new();
        let of_io = |result: io::Result<()>| result.map(nothing).map_err(|error| error.to_string());
        match (verb, &words[..]) {
            ("on", [_, ..]) => self.add(rest.parse()?).map(nothing),
            ("heal", []) => {
                self.heal();
                Ok(String::new())
            }
            ("power-cut", []) => self.power_cut(CutBy::Shim).map(tell_cut),
            ("power-cut", ["lose-all"]) => self.power_cut(CutBy::LoseAll).map(tell_cut),
            ("power-cut", [seed]) => self.power_cut(CutBy::Seed(rules::number(seed)?)).map(tell_cut),
            ("power-on", []) => {
                self.power_on();
                Ok(String::new())
            }
            ("rot", [bits, range @ ..]) if range.len() <= 1 => {
                let range = range.first().map(|word| rules::range(word)).transpose()?;
                let flipped = self
                    .rot(rules::number(bits)?, range)
                    .map_err(|error| error.to_string())?;
                Ok(format!("rotten {flipped}"))
            }
            ("wipe", []) => of_io(self.wipe()),
            ("swap", [_, ..]) => of_io(self.swap(Path::new(rest.trim()))),
            ("settle", []) => of_io(self.settle()),
            ("status", []) => Ok(self.status()),
            _ => Err(format!(
                "`{line}` is no command: there are {COMMANDS}; a rule is {RULE_WORDS}"
            )),
        }
    }

    fn status(&self) -> String {
        self.shared.look(|disk| {
            let power = if disk.is_powered() { "on" } else { "off" };
            let rules: Vec<String> = disk.rules().iter().map(|rule| format!("[{rule}]")).collect();
            format!(
                "power {power} waiting {} unflushed {} {} rules {}",
                disk.waiting(),
                disk.unflushed(),
                disk.counters(),
                rules.concat()
            )
        })
    }
}

fn tell_cut(cut: Cut) -> String {
    format!("kept {} lost {}", cut.kept, cut.lost)
}

impl Drop for Shim {
    fn drop(&mut self) {
        self.end();
    }
}

/// Unmounts what shims of processes that died left below `dir`. Gives how many.
pub fn sweep(dir: &Path) -> usize {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let below = |line: &str| -> Option<PathBuf> {
        let mut fields = line.split(' ');
        let (source, target) = (fields.next()?, fields.next()?);
        let target = PathBuf::from(target.replace("\\040", " "));
        (source == SOURCE && target.starts_with(dir)).then_some(target)
    };
    let dead = |target: &PathBuf| {
        let looked_at = std::fs::metadata(target);
        matches!(looked_at, Err(error) if error.kind() == io::ErrorKind::NotConnected)
    };
    let stale = mounts.lines().filter_map(below).filter(dead);
    stale
        .filter(|target| unmount(target, UnmountFlags::DETACH).is_ok())
        .count()
}
