//! The store of one device beside the device itself: the same ring, files of the same kind, in alternation.

pub mod cases;
pub mod content;
pub mod disk;
pub mod driven;
pub mod layouts;
pub mod raw;
pub mod report;
pub mod spin;
pub mod stats;
pub mod work;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cairn_proto::units::ByteSize;

use cases::Setup;
use report::{Fact, Outcome};
use spin::SpinOptions;

/// The smallest device on which the cases mean something.
const SIZE_MIN: u64 = 64 << 20;

/// What to run.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// How often every case runs.
    pub rounds: u32,
    /// Seconds per case.
    pub runtime_s: u32,
    /// Bytes of each device.
    pub size: ByteSize,
    /// Where the files lie; `target/bench` when not given.
    pub dir: Option<PathBuf>,
    /// Only cases whose name contains one of these; all when empty.
    pub only: Vec<String>,
    /// Where the figures of all rounds go.
    pub json: Option<PathBuf>,
}

/// Runs the cases, and prints the table.
///
/// # Errors
/// In words; no figure is taken from a run with an I/O error.
pub fn run(options: &StoreOptions) -> Result<(), String> {
    if options.size.0 < SIZE_MIN || !options.size.0.is_multiple_of(2 << 20) {
        return Err(format!("--size: at least {}, in steps of 2M", ByteSize(SIZE_MIN)));
    }
    let setup = Setup {
        dir: bench_dir(options.dir.as_deref())?,
        size: options.size,
        runtime: Duration::from_secs(options.runtime_s.into()),
        only: options.only.clone(),
    };
    let mut outcome = Outcome::default();
    for round in 1..=options.rounds {
        cases::round(&setup, round, &mut outcome)?;
    }
    if options.only.is_empty() || options.only.iter().any(|part| "memory".contains(part.as_str())) {
        memory(options.size, &mut outcome)?;
    }
    print!("{}", outcome.table());
    if let Some(path) = &options.json {
        let text = format!("{:#}\n", outcome.json());
        fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(())
}

/// Where the files lie, made if it is not there.
///
/// # Errors
/// In words.
pub fn bench_dir(dir: Option<&Path>) -> Result<PathBuf, String> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench");
    let dir = dir.map_or(default, Path::to_path_buf);
    fs::create_dir_all(&dir)
        .and_then(|()| dir.canonicalize())
        .map_err(|error| format!("the directory for the files can't be made: {error}"))
}

/// Bytes of memory per block of data, written in order and at random, when all of the index is in memory.
fn memory(size: ByteSize, outcome: &mut Outcome) -> Result<(), String> {
    // An index large beside everything else that the process holds.
    let span = (size.0 / 4096).clamp(1 << 16, 1 << 20);
    for (name, random) in [
        ("memory-bytes-per-block-sequential", false),
        ("memory-bytes-per-block-random", true),
    ] {
        let figures = spin::run_apart(&SpinOptions {
            write: true,
            random,
            depth: 64,
            blocks: 1,
            count: 0,
            span,
            device_blocks: span * 2,
        })?;
        let part = |key: &str| figures[key].as_f64().unwrap_or(f64::NAN);
        let fact = |name, value| Fact { name, round: 1, value };
        outcome
            .facts
            .push(fact(name, part("memory_grown") / part("data_blocks")));
    }
    Ok(())
}
