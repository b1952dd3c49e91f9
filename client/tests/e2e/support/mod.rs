//! What the tests have in common.

pub(crate) mod cluster;
pub(crate) mod nbd;
pub(crate) mod stamped;

use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cairn_chaos::live::dev::{Dev, DevDir, DevOptions};
use cairn_chaos::live::process::Guarded;

/// How long a program outside this project may take.
pub(crate) const PROGRAM_BOUND: Duration = Duration::from_secs(120);

static HEAVY: Mutex<()> = Mutex::new(());

/// Tests that keep both processors busy take turns.
pub(crate) fn heavy() -> MutexGuard<'static, ()> {
    HEAVY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The `cairn` of this build.
pub(crate) fn cairn() -> &'static str {
    env!("CARGO_BIN_EXE_cairn")
}

/// A directory for a cluster, on the disk that the build is on.
pub(crate) fn cluster_dir() -> DevDir {
    DevDir::new(Path::new(env!("CARGO_TARGET_TMPDIR"))).expect("a directory for a cluster can be made")
}

/// Starts a cluster with these volumes.
#[track_caller]
pub(crate) fn start(volumes: &[&str]) -> Dev {
    start_with(DevOptions::new(cairn()).volumes(volumes))
}

/// Starts a cluster.
#[track_caller]
pub(crate) fn start_with(options: DevOptions) -> Dev {
    Dev::start(options, cluster_dir()).unwrap_or_else(|error| panic!("{error}"))
}

/// What a program gave: its status, and all it printed.
#[derive(Debug)]
pub(crate) struct Ran {
    /// How it ended.
    pub(crate) status: ExitStatus,
    /// Standard output.
    pub(crate) out: String,
    /// Standard error.
    pub(crate) err: String,
}

impl Ran {
    /// Panics, with all it printed, unless it succeeded.
    #[track_caller]
    pub(crate) fn expect_success(self) -> Ran {
        assert!(self.status.success(), "{self:#?}");
        self
    }
}

/// Runs a program to its end, within [`PROGRAM_BOUND`].
#[track_caller]
pub(crate) fn run(command: &mut Command) -> Ran {
    let files = tempfile::tempdir().expect("a temporary directory can be made");
    let file = |name: &str| std::fs::File::create(files.path().join(name)).expect("a file can be made");
    command.stdin(Stdio::null()).stdout(file("out")).stderr(file("err"));
    let mut child = match command.spawn() {
        Ok(child) => Guarded::new(child),
        Err(error) => panic!("{command:?}: {error}"),
    };
    let status = child.wait(PROGRAM_BOUND);
    let text = |name: &str| {
        let bytes = std::fs::read(files.path().join(name)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let (out, err) = (text("out"), text("err"));
    let status = status.unwrap_or_else(|| panic!("{command:?} had not ended after {PROGRAM_BOUND:?}:\n{out}\n{err}"));
    Ran { status, out, err }
}

/// Small numbers that look random: xorshift64*, the same for the same seed.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// In `0 .. bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 16) % bound
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let word = self.next().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}
