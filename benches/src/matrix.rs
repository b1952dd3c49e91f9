//! The fio matrix: the same cases on every target, in turn within each round, so that what drifts on the machine drifts
//! for all of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cairn_chaos::live::fio::{self, Figures};
use cairn_chaos::live::tools;
use cairn_proto::units::ByteSize;

use crate::aims;
use crate::calls::{self, CallsPerIo, SystemCalls, WakeUps};
use crate::cost::{Counted, Cpu, CpuPerIo, Stages};
use crate::library;
use crate::report;
use crate::store::work::Load;
use crate::targets::{Kind, Up, bring_up, build_cairn};

/// How much longer than its runtime a case may take.
const CASE_GRACE: Duration = Duration::from_secs(60);
/// How long writing the whole span may take.
const FILL_BOUND: Duration = Duration::from_secs(1800);

/// What to run.
#[derive(Clone, Debug)]
pub struct MatrixOptions {
    /// How often every case runs on every target.
    pub rounds: u32,
    /// Seconds per case.
    pub runtime_s: u32,
    /// What to measure; the first is compared with the others.
    pub targets: Vec<Kind>,
    /// Only cases whose name contains one of these; all when empty.
    pub cases: Vec<String>,
    /// Bytes that the I/O is spread over.
    pub size: String,
    /// Where the files lie; `target/bench` when not given.
    pub dir: Option<PathBuf>,
    /// The `cairn` program; built when not given.
    pub cairn: Option<PathBuf>,
    /// Where all figures are written as JSON.
    pub json: Option<PathBuf>,
}

/// One case of the matrix.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Case {
    /// Its name.
    pub name: &'static str,
    rw: &'static str,
    bs: &'static str,
    depth: u32,
}

const fn case(name: &'static str, rw: &'static str, bs: &'static str, depth: u32) -> Case {
    Case { name, rw, bs, depth }
}

/// The cases, in the order in which they run.
pub const CASES: [Case; 7] = [
    case("seqwrite-1m-qd8", "write", "1M", 8),
    case("randwrite-4k-qd1", "randwrite", "4k", 1),
    case("randwrite-4k-qd16", "randwrite", "4k", 16),
    case("randwrite-4k-qd64", "randwrite", "4k", 64),
    case("randread-4k-qd1", "randread", "4k", 1),
    case("randread-4k-qd64", "randread", "4k", 64),
    case("seqread-1m-qd8", "read", "1M", 8),
];

impl Case {
    /// Whether it reads.
    pub fn reads(&self) -> bool {
        matches!(self.rw, "read" | "randread")
    }

    /// The same over all of so many bytes, for what runs without fio.
    fn load(&self, size: ByteSize, time: Duration) -> Result<Load, String> {
        let bytes: ByteSize = self.bs.parse().map_err(|error| format!("{}: {error}", self.name))?;
        let random = self.rw.starts_with("rand");
        Ok(library::load(
            !self.reads(),
            random,
            bytes.0 as u32,
            self.depth as usize,
            size.0,
            time,
        ))
    }
}

/// What one case gave on one target in one round.
#[derive(Clone, PartialEq, Debug)]
pub struct Sample {
    /// Which case.
    pub case: &'static str,
    /// On what.
    pub target: Kind,
    /// In which round, from 1.
    pub round: u32,
    /// What fio reports.
    pub figures: Figures,
    /// Processor time per I/O.
    pub cpu: CpuPerIo,
    /// What the kernel was asked for.
    pub calls: CallsPerIo,
    /// Where the time of an I/O went; of Cairn only.
    pub stages: Option<Stages>,
}

/// Runs the matrix, and prints the table.
pub fn run(options: &MatrixOptions) -> Result<(), String> {
    if tools::find("fio").is_none() {
        return Err("fio is not installed (package fio)".to_string());
    }
    let size: ByteSize = options.size.parse().map_err(|error| format!("--size: {error}"))?;
    let cases: Vec<Case> = CASES
        .into_iter()
        .filter(|case| wanted(&options.cases, case.name))
        .collect();
    if cases.is_empty() {
        let names: Vec<_> = CASES.iter().map(|case| case.name).collect();
        return Err(format!("no case is called like this; there are {}", names.join(", ")));
    }
    let cairn = match &options.cairn {
        Some(program) => program.clone(),
        None if options.targets.iter().any(|kind| kind.is_cairn()) => build_cairn()?,
        None => PathBuf::new(),
    };
    let default_dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench");
    let dir = options.dir.clone().unwrap_or(default_dir);
    let dir = fs::create_dir_all(&dir).and_then(|()| dir.canonicalize());
    let dir = dir.map_err(|error| format!("the directory for the files can't be made: {error}"))?;

    let mut up = Vec::new();
    for kind in &options.targets {
        eprintln!("{}: up and written in full with {size}", kind.name());
        let target = bring_up(*kind, &dir, size, &cairn)?;
        fill(&target, size)?;
        up.push(target);
    }
    let mut samples = Vec::new();
    for round in 1..=options.rounds {
        for case in &cases {
            for target in in_turn(&up, round) {
                let sample = measure(case, target, round, size, options.runtime_s)?;
                eprintln!("round {round}: {}", report::line(&sample));
                samples.push(sample);
            }
        }
    }
    print!("{}", report::table(&samples, &options.targets, &cases));
    print!("{}", report::processors(&samples, &options.targets, &cases));
    print!("{}", report::calls(&samples, &options.targets, &cases));
    print!("{}", report::stages(&samples, &cases));
    print!("{}", aims::table(&samples));
    if let Some(path) = &options.json {
        let text = format!("{:#}\n", report::json(&samples));
        fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(())
}

fn wanted(parts: &[String], name: &str) -> bool {
    parts.is_empty() || parts.iter().any(|part| name.contains(part))
}

/// Each round starts with another target.
fn in_turn(up: &[Up], round: u32) -> impl Iterator<Item = &Up> {
    let first = round as usize % up.len();
    up[first..].iter().chain(&up[..first])
}

/// Writes the whole span, untimed, so that reads never meet holes and overwrites never allocate for the first time. Twice: a target that
/// never writes in place has used all the room that it will use only when each block was overwritten.
fn fill(up: &Up, size: ByteSize) -> Result<(), String> {
    let size = format!("--size={}", size.0);
    let mut args = vec!["--rw=write", "--bs=1M", "--iodepth=8", &size];
    args.extend(&up.args);
    for _ in 0..2 {
        fio::run("fill", &up.target, &args, FILL_BOUND).map_err(|error| error.to_string())?;
    }
    if up.cluster.is_some() {
        calls::settle();
    }
    Ok(())
}

fn measure(case: &Case, up: &Up, round: u32, size: ByteSize, runtime_s: u32) -> Result<Sample, String> {
    let owned = [
        format!("--rw={}", case.rw),
        format!("--bs={}", case.bs),
        format!("--iodepth={}", case.depth),
        format!("--size={}", size.0),
        format!("--runtime={runtime_s}"),
        "--time_based".to_string(),
    ];
    let mut args: Vec<&str> = owned.iter().map(String::as_str).collect();
    args.extend(&up.args);
    let runtime = Duration::from_secs(runtime_s.into());
    if let Some(library) = &up.library {
        library.attach()?;
    }
    let (counted, system_calls) = (counted(up), up.cluster.as_ref().map(SystemCalls::now));
    let (wake_ups, cpu) = (WakeUps::now(&up.roles), Cpu::now(&up.roles));
    let figures = match &up.library {
        Some(library) => library.run(&case.load(size, runtime)?, round.into())?,
        None => {
            let report = fio::run(case.name, &up.target, &args, runtime + CASE_GRACE);
            let report = report.map_err(|error| error.to_string())?;
            if case.reads() { report.read } else { report.write }
        }
    };
    let cpu = cpu.per_io(&up.roles, figures.ios);
    let wake_ups = wake_ups.per_io(&WakeUps::now(&up.roles), figures.ios);
    let system_calls = system_calls.zip(up.cluster.as_ref()).map(|(before, cluster)| {
        calls::settle();
        before.per_io(&SystemCalls::now(cluster), figures.ios)
    });
    let stages = counted.and_then(|before| before.until(&self::counted(up)?, figures.mean_us, case.reads()));
    Ok(Sample {
        case: case.name,
        target: up.kind,
        round,
        figures,
        cpu,
        calls: CallsPerIo {
            wake_ups,
            system_calls: system_calls.unwrap_or_default(),
        },
        stages,
    })
}

/// What the export has measured until now, as late as [`calls::settle`] says; `None` of a target without one, or when it does not say.
fn counted(up: &Up) -> Option<Counted> {
    let metrics = up.cluster.as_ref()?.metrics("export").ok()?;
    Some(Counted::of(&metrics))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_the_same_load_without_fio() {
        let loads = CASES.map(|case| case.load(ByteSize(1 << 30), Duration::from_secs(1)).unwrap());
        for (case, load) in CASES.iter().zip(loads) {
            assert_eq!(load.write, case.name.contains("write"), "{}", case.name);
            assert_eq!(load.random, case.name.starts_with("rand"), "{}", case.name);
            assert_eq!(load.blocks, if load.random { 1 } else { 256 }, "{}", case.name);
            assert!(case.name.ends_with(&format!("qd{}", load.depth)), "{}", case.name);
            assert_eq!(load.span, (1 << 30) / 4096);
        }
    }
}
