//! What an idle cluster costs, and whether the cost of an I/O stays the same as work grows: with a thousand volumes instead of one, and on a
//! volume a hundred times as large.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

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
/// Copies of each block that `cairn dev` keeps.
const COPIES: u64 = 3;
/// Overwrites take new space before they give the old back: a device has twice the size of its volume.
const TWICE: u64 = 2;
/// What is left of the disk for the smaller clusters, logs and others.
const SPARE: ByteSize = ByteSize(4 << 30);
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
    /// Volumes of the cluster with many.
    pub volumes: usize,
    /// Only the idle cluster.
    pub idle_only: bool,
    /// Where the files lie.
    pub dir: Option<PathBuf>,
    /// The `cairn` program; built when not given.
    pub cairn: Option<PathBuf>,
}

/// A cluster with a volume that is written in full, and connections that hold others.
struct Grown {
    name: String,
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
    if !options.idle_only {
        check_room(&dir, options.size)?;
    }
    let one = Grown::start("1 volume", &cairn, &dir, options.size, 1)?;
    one.idle(options.runtime_s.max(10));
    if options.idle_only {
        return Ok(());
    }
    let name = format!("{} volumes", options.volumes);
    let many = Grown::start(&name, &cairn, &dir, options.size, options.volumes)?;
    many.idle(options.runtime_s.max(10));
    let size = ByteSize(options.size.0 * LARGER);
    let large = Grown::start("100 times the size", &cairn, &dir, size, 1)?;
    let all = [one, many, large];
    for grown in &all {
        let begun = Instant::now();
        grown.fill()?;
        let seconds = begun.elapsed().as_secs_f64();
        eprintln!(
            "{}: written in full with {} twice in {seconds:.0} s",
            grown.name, grown.size
        );
    }

    println!(
        "\n{:<10} {:<20} {:>10} {:>22} {:>22}  export, nodes, metas",
        "case", "cluster", "I/O a s", "CPU µs per I/O", "/ with 1 volume"
    );
    for case in ["randwrite", "randread"] {
        let mut found: BTreeMap<&str, Vec<Cost>> = BTreeMap::new();
        for round in 0..options.rounds as usize {
            for index in 0..all.len() {
                let grown = &all[(index + round) % all.len()];
                let sample = grown.measure(case, options.runtime_s)?;
                found.entry(&grown.name).or_default().push(sample);
            }
        }
        for grown in &all {
            let (mine, base) = (&found[grown.name.as_str()], &found[all[0].name.as_str()]);
            println!("{case:<10} {:<20} {}", grown.name, line(mine, base));
        }
    }
    Ok(())
}

/// What random I/O gave and took in one round.
#[derive(Clone, PartialEq, Debug)]
struct Cost {
    /// Operations a second.
    iops: f64,
    /// CPU per operation of the cluster's own processes in microseconds, by role.
    roles_us: BTreeMap<&'static str, f64>,
}

impl Cost {
    fn all_us(&self) -> f64 {
        self.roles_us.values().sum()
    }
}

/// The rounds of one cluster beside those of the first.
fn line(mine: &[Cost], base: &[Cost]) -> String {
    let role = |role: &str| {
        let rounds = mine.iter().map(|cost| cost.roles_us.get(role).copied().unwrap_or(0.0));
        format!("{:.1}", Spread::of(rounds).median)
    };
    format!(
        "{:>10.0} {:>22} {:>22}  {}",
        Spread::of(mine.iter().map(|cost| cost.iops)).median,
        Spread::of(mine.iter().map(Cost::all_us)).to_string(),
        Spread::of(mine.iter().zip(base).map(|(mine, base)| mine.all_us() / base.all_us())).to_string(),
        ["export", "nodes", "metas"].map(role).join(", "),
    )
}

/// Refuses to begin what would fill the disk: whoever else uses it would be lost too.
fn check_room(dir: &Path, size: ByteSize) -> Result<(), String> {
    let words = |error: std::io::Error| format!("{}: {error}", dir.display());
    fs::create_dir_all(dir).map_err(words)?;
    let found = rustix::fs::statvfs(dir).map_err(|error| words(error.into()))?;
    let free = ByteSize(found.f_bavail.saturating_mul(found.f_frsize));
    let needed = ByteSize(size.0.saturating_mul(LARGER * COPIES * TWICE).saturating_add(SPARE.0));
    if free < needed {
        return Err(format!(
            "{} has {free} free, and the large volume of {} may take {needed}: choose another --dir, or a smaller --size",
            dir.display(),
            ByteSize(size.0.saturating_mul(LARGER)),
        ));
    }
    Ok(())
}

impl Grown {
    fn start(name: &str, cairn: &Path, dir: &Path, size: ByteSize, volumes: usize) -> Result<Grown, String> {
        let dir = DevDir::new(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        let device = ByteSize((size.0 * TWICE).max(1 << 30));
        let options = DevOptions::new(cairn)
            .volumes(&[&format!("{VOLUME}:{}", size.0)])
            .device_size(&device.0.to_string());
        let dev = Dev::start(options, dir).map_err(|error| error.to_string())?;
        let begun = Instant::now();
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
        eprintln!("{name}: up, made in {:.0} s", begun.elapsed().as_secs_f64());
        let grown = Grown {
            name: name.to_string(),
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

    fn measure(&self, case: &str, runtime_s: u32) -> Result<Cost, String> {
        let target = Target::Nbd(self.dev.uri(VOLUME));
        let size = format!("--size={}", self.size.0);
        let words = |error: fio::FioError| format!("{}: {error}", self.name);
        let roles = roles_of(&self.dev);
        let (rw, runtime) = (format!("--rw={case}"), format!("--runtime={runtime_s}"));
        let load = [&rw, "--bs=4k", "--iodepth=64", "--time_based", &runtime, &size];
        let cpu = Cpu::now(&roles);
        let report = fio::run(case, &target, &load, BOUND).map_err(words)?;
        let figures = if case == "randread" { report.read } else { report.write };
        Ok(Cost {
            iops: figures.iops,
            roles_us: cpu.per_io(&roles, figures.ios).roles_us,
        })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_without_room_is_refused_before_anything_is_started() {
        let dir = tempfile::tempdir().unwrap();
        let why = check_room(dir.path(), ByteSize(1 << 60)).unwrap_err();
        assert!(why.contains("free") && why.contains("--size"), "{why}");
    }

    #[test]
    fn costs_are_compared_round_by_round() {
        let cost = |export: f64, nodes: f64| Cost {
            iops: 1000.0,
            roles_us: BTreeMap::from([("export", export), ("nodes", nodes)]),
        };
        let (base, mine) = (
            [cost(10.0, 30.0), cost(20.0, 60.0)],
            [cost(10.0, 40.0), cost(20.0, 60.0)],
        );
        let line = line(&mine, &base);
        assert!(line.contains("1.12 (1.00–1.25)"), "{line}");
        assert!(line.ends_with("15.0, 50.0, 0.0"), "{line}");
    }
}
