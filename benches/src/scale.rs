//! What an idle cluster costs, and whether the cost of an I/O stays the same as work grows: with a thousand volumes instead of one, and on a
//! volume a hundred times as large.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cairn_chaos::live::dev::{Dev, DevDir, DevOptions};
use cairn_chaos::live::fio::{self, Target};
use cairn_chaos::live::nbd::Connection;
use cairn_chaos::live::process;
use cairn_chaos::live::tools;
use cairn_proto::units::ByteSize;

use crate::cost::Cpu;
use crate::rebuild::hold_of;
use crate::store::stats::Spread;
use crate::targets::{build_cairn, roles_of};

/// The volume that is measured.
const VOLUME: &str = "bench";
/// How much larger the large volume is.
const LARGER: u64 = 100;
/// Volumes of the cluster with many.
const MANY: usize = 1000;
/// So many of them are attached all the time: an export serves 256 connections.
const ATTACHED: usize = 200;
/// How long an idle cluster is left alone before it is looked at.
const SETTLE: Duration = Duration::from_secs(5);
/// How long anything may take.
const BOUND: Duration = Duration::from_secs(1800);

/// What to measure.
#[derive(Clone, Debug)]
pub struct ScaleOptions {
    /// How often each case runs on each cluster.
    pub rounds: u32,
    /// Seconds of each case; also of looking at an idle cluster, for at least ten.
    pub runtime_s: u32,
    /// Bytes of the small volume.
    pub size: ByteSize,
    /// Only the idle cluster.
    pub idle_only: bool,
    /// Where the files lie.
    pub dir: Option<PathBuf>,
    /// The `cairn` program; built when not given.
    pub cairn: Option<PathBuf>,
}

/// A cluster with a volume that is written in full, and connections that hold others.
struct Grown {
    name: &'static str,
    dev: Dev,
    size: ByteSize,
    _held: Vec<Connection>,
}

/// Runs it, and prints two tables.
pub fn run(options: &ScaleOptions) -> Result<(), String> {
    if tools::find("fio").is_none() {
        return Err("fio is not installed (package fio)".to_string());
    }
    let cairn = match &options.cairn {
        Some(program) => program.canonicalize().map_err(|error| error.to_string())?,
        None => build_cairn()?,
    };
    let default_dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench");
    let dir = options.dir.clone().unwrap_or(default_dir);
    let one = Grown::start("1 volume", &cairn, &dir, options.size, 1)?;
    one.idle(options.runtime_s.max(10));
    if options.idle_only {
        return Ok(());
    }
    let many = Grown::start("1,000 volumes", &cairn, &dir, options.size, MANY)?;
    many.idle(options.runtime_s.max(10));
    let large = Grown::start("100 times the size", &cairn, &dir, ByteSize(options.size.0 * LARGER), 1)?;
    let all = [one, many, large];
    for grown in &all {
        eprintln!("{}: written in full with {}", grown.name, grown.size);
        grown.fill()?;
    }

    println!(
        "\n{:<10} {:<20} {:>10} {:>22}  CPU µs per I/O as a part of that with 1 volume",
        "case", "cluster", "I/O a s", "CPU µs per I/O"
    );
    for case in ["randwrite", "randread"] {
        let mut found: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
        for round in 0..options.rounds as usize {
            for index in 0..all.len() {
                let grown = &all[(index + round) % all.len()];
                let sample = grown.measure(case, options.runtime_s)?;
                found.entry(grown.name).or_default().push(sample);
            }
        }
        for grown in &all {
            let (mine, base) = (&found[grown.name], &found[all[0].name]);
            let ratio = Spread::of(mine.iter().zip(base).map(|(mine, base)| mine.1 / base.1));
            println!(
                "{case:<10} {:<20} {:>10.0} {:>22}  {ratio}",
                grown.name,
                Spread::of(mine.iter().map(|sample| sample.0)).median,
                Spread::of(mine.iter().map(|sample| sample.1)).to_string(),
            );
        }
    }
    Ok(())
}

impl Grown {
    fn start(name: &'static str, cairn: &Path, dir: &Path, size: ByteSize, volumes: usize) -> Result<Grown, String> {
        let dir = DevDir::new(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        let device = ByteSize((size.0 * 2).max(1 << 30));
        let options = DevOptions::new(cairn)
            .volumes(&[&format!("{VOLUME}:{}", size.0)])
            .device_size(&device.0.to_string());
        let dev = Dev::start(options, dir).map_err(|error| error.to_string())?;
        eprintln!("{name}: up");
        let mut held = Vec::new();
        for number in 1..volumes {
            let volume = format!("other-{number}");
            let made = dev.cairn(&["volume", "create", &volume, &size.0.to_string()]).output();
            let made = made.map_err(|error| format!("{volume}: {error}"))?;
            if !made.status.success() {
                return Err(format!("{volume}: {}", String::from_utf8_lossy(&made.stderr)));
            }
            if held.len() < ATTACHED {
                held.push(hold_of(&dev.socket(), &volume)?);
            }
        }
        held.push(hold_of(&dev.socket(), VOLUME)?);
        let grown = Grown {
            name,
            dev,
            size,
            _held: held,
        };
        Ok(grown)
    }

    /// Prints what it takes while nobody asks for anything.
    fn idle(&self, seconds: u32) {
        std::thread::sleep(SETTLE);
        let roles = roles_of(&self.dev);
        let before = Cpu::now(&roles);
        std::thread::sleep(Duration::from_secs(seconds.into()));
        let percent = before.percent_of_one(&roles);
        let all: f64 = percent.values().sum();
        print!("{}, attached and idle: {all:.2} % of one processor", self.name);
        for (role, percent) in &percent {
            print!(", {role} {percent:.2}");
        }
        print!("; resident MiB");
        for (part, pid) in self.dev.pids() {
            let resident = process::resident(pid).map_or(0, |resident| resident.now);
            print!(", {part} {}", resident >> 20);
        }
        println!();
    }

    /// Operations a second, and CPU per operation of the cluster's own processes in microseconds.
    fn measure(&self, case: &str, runtime_s: u32) -> Result<(f64, f64), String> {
        let target = Target::Nbd(self.dev.uri(VOLUME));
        let size = format!("--size={}", self.size.0);
        let words = |error: fio::FioError| format!("{}: {error}", self.name);
        let roles = roles_of(&self.dev);
        let (rw, runtime) = (format!("--rw={case}"), format!("--runtime={runtime_s}"));
        let load = [&rw, "--bs=4k", "--iodepth=64", "--time_based", &runtime, &size];
        let cpu = Cpu::now(&roles);
        let report = fio::run(case, &target, &load, BOUND).map_err(words)?;
        let figures = if case == "randread" { report.read } else { report.write };
        let cost: f64 = cpu.per_io(&roles, figures.ios).roles_us.values().sum();
        Ok((figures.iops, cost))
    }

    /// Writes all of the volume.
    fn fill(&self) -> Result<(), String> {
        let size = format!("--size={}", self.size.0);
        let fill = ["--rw=write", "--bs=1M", "--iodepth=8", &size];
        let target = Target::Nbd(self.dev.uri(VOLUME));
        // Twice, as for the fio matrix.
        for _ in 0..2 {
            fio::run("fill", &target, &fill, BOUND).map_err(|error| format!("{}: {error}", self.name))?;
        }
        Ok(())
    }
}
