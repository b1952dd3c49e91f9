//! What guests feel when something fails: the longest time that any I/O takes, over NBD, on a cluster of real processes.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use cairn_chaos::live::cluster::{Cluster, ClusterOptions, Part};
use cairn_chaos::live::fio::{self, Report, Target};
use cairn_chaos::live::inject::proxy::{self, Proxy};
use cairn_chaos::live::inject::shim::{Effect, Rule, Shim};
use cairn_chaos::live::nbd::Command;
use cairn_chaos::live::process;
use cairn_chaos::live::tools;
use cairn_proto::limits::CHUNK_BYTES;
use cairn_proto::units::ByteSize;

use crate::ceph::Ceph;
use crate::rebuild::hold;
use crate::targets::build_cairn;

/// The volume.
const VOLUME: &str = "demo";
/// Bytes of it that I/O is spread over, and of it.
const SIZE: &str = "256M";
/// Bytes of each node's device.
const DEVICE_BYTES: u64 = 2 << 30;
/// The node that faults hit, behind a proxy.
const HIT: Part = Part::Node(2);
/// The node whose disk can be made to stick. Another one: what a file system of a process costs is not to be felt elsewhere.
const DISK: u8 = 3;
/// From the beginning of a run to its fault.
const BEFORE: Duration = Duration::from_secs(3);
/// How long a part that comes back is away.
const AWAY: Duration = Duration::from_secs(4);
/// How long a run may take beyond its time: I/O that never ends must not hold this up.
const LATE_MAX: Duration = Duration::from_secs(60);
/// Seconds of the run in which an OSD of Ceph is frozen, at the least: it is waited for some 50 of them.
const CEPH_FROZEN_S: u32 = 75;
/// How often what the shim keeps is written to the disk.
const WRITE_BACK_EVERY: Duration = Duration::from_millis(500);
/// How long the cluster may take to be well before the next fault.
const WELL_BOUND: Duration = Duration::from_secs(120);

/// What to measure.
#[derive(Clone, Debug)]
pub struct StallOptions {
    /// Seconds of each run.
    pub runtime_s: u32,
    /// Only faults whose name contains one of these.
    pub only: Vec<String>,
    /// Where the files lie.
    pub dir: Option<PathBuf>,
    /// Ceph too: one of its OSDs frozen, then killed.
    pub ceph: bool,
    /// The `cairn` program; built when not given.
    pub cairn: Option<PathBuf>,
}

/// What fails, in this order.
const FAULTS: [(&str, Act); 9] = [
    ("nothing", |_| Ok(())),
    ("node killed", |world| {
        world.cluster.kill(&[HIT]);
        Ok(())
    }),
    ("node killed and back", |world| {
        world.cluster.kill(&[HIT]);
        std::thread::sleep(AWAY);
        start(&mut world.cluster, HIT)
    }),
    ("node away until it is ejected, and back", |world| {
        world.cluster.kill(&[HIT]);
        // Longer than a member is waited for.
        std::thread::sleep(Duration::from_secs(12));
        start(&mut world.cluster, HIT)
    }),
    ("node frozen", |world| {
        process::freeze(world.cluster.pid(HIT));
        Ok(())
    }),
    ("node cut off", |world| {
        world.proxy.set(proxy::Fault::BlackHole).map_err(words)
    }),
    ("disk stuck", |world| world.shim.add(Rule::always(None, Effect::Stick))),
    ("meta leader killed", |world| {
        let leader = world.cluster.leader().ok_or("the metadata servers have no leader")?;
        world.cluster.kill(&[leader]);
        Ok(())
    }),
    ("all of meta killed", |world| {
        let metas: Vec<Part> = world.cluster.metas().collect();
        world.cluster.kill(&metas);
        Ok(())
    }),
];

type Act = fn(&mut World) -> Result<(), String>;

/// Has what a shim keeps written to the disk evenly. The shim does not flush it, so that the kernel would write all of it when it is 30 s
/// old, hundreds of MiB at once: everybody on the same disk then waits for as long as 300 ms, which is not what is measured here.
struct WrittenBack {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl WrittenBack {
    fn start(backing: &Path) -> Result<WrittenBack, String> {
        let file = fs::File::open(backing).map_err(words)?;
        let (stop, stopped) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            while stopped.recv_timeout(WRITE_BACK_EVERY) == Err(RecvTimeoutError::Timeout) {
                if let Err(error) = file.sync_data() {
                    eprintln!("the file behind the shim can't be written back: {error}");
                    return;
                }
            }
        });
        Ok(WrittenBack {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for WrittenBack {
    fn drop(&mut self) {
        drop(self.stop.take());
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

struct World {
    // In this order: the processes go before what stands between them and their devices.
    cluster: Cluster,
    proxy: Proxy,
    shim: Shim,
    _written_back: WrittenBack,
    target: Target,
    /// Where fio logs.
    logs: PathBuf,
    _dir: tempfile::TempDir,
}

/// Runs all faults, and prints the longest I/O of each.
pub fn run(options: &StallOptions) -> Result<(), String> {
    if tools::find("fio").is_none() {
        return Err("fio is not installed (package fio)".to_string());
    }
    let wanted = |name: &str| options.only.is_empty() || options.only.iter().any(|part| name.contains(part.as_str()));
    let cairn = match &options.cairn {
        // Processes are started in a directory of their own.
        Some(program) => program.canonicalize().map_err(words)?,
        None => build_cairn()?,
    };
    let default_dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench");
    let dir = options.dir.clone().unwrap_or(default_dir);
    fs::create_dir_all(&dir).map_err(words)?;
    let mut world = World::start(&cairn, &dir)?;
    println!(
        "{:40} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "fault", "read ms", "write ms", "at s", "p99 us", "I/O a s"
    );
    for (name, act) in FAULTS.into_iter().filter(|(name, _)| wanted(name)) {
        let report = world
            .measure(options.runtime_s, act)
            .map_err(|why| format!("{name}: {why}"))?;
        line(name, &report, longest_at(&world.logs));
        world.heal()?;
    }
    drop(world);
    if options.ceph {
        beside(&dir, options.runtime_s)
    } else {
        Ok(())
    }
}

/// The same load on Ceph, with one of its three OSDs frozen and then killed.
fn beside(dir: &Path, runtime_s: u32) -> Result<(), String> {
    let size: ByteSize = SIZE.parse().expect("a size");
    let ceph = Ceph::start(dir, size)?;
    let target = ceph.target();
    let span = format!("--size={}", size.0);
    let fill = ["--rw=write", "--bs=1M", "--iodepth=8", &span];
    fio::run("fill", &target, &fill, WELL_BOUND).map_err(words)?;
    let pid = ceph.osd_pid(2).ok_or("Ceph has no third OSD")?;
    let logs = tempfile::Builder::new()
        .prefix("stall-")
        .tempdir_in(dir)
        .map_err(words)?;
    let measure = |name: &str, runtime_s: u32, act: &dyn Fn()| {
        let running = fio::start(
            "stall",
            &target,
            &load(&format!("--runtime={runtime_s}"), &span, &log(logs.path())),
        );
        std::thread::sleep(BEFORE);
        act();
        let bound = Duration::from_secs(runtime_s.into()) + LATE_MAX;
        let report = running.finish(bound).map_err(|why| format!("{name}: {why}"))?;
        line(name, &report, longest_at(logs.path()));
        Ok::<(), String>(())
    };
    measure("ceph: nothing", runtime_s, &|| {})?;
    measure("ceph: OSD frozen", runtime_s.max(CEPH_FROZEN_S), &|| {
        process::freeze(pid)
    })?;
    process::resume(pid);
    ceph.wait_well()?;
    measure("ceph: OSD killed", runtime_s, &|| process::kill(pid))
}

fn load<'a>(runtime: &'a str, size: &'a str, log: &'a str) -> [&'a str; 8] {
    [
        "--rw=randrw",
        "--rwmixread=30",
        "--bs=4k",
        "--iodepth=4",
        "--time_based",
        runtime,
        size,
        log,
    ]
}

/// Has fio log when each operation ended and what it took.
fn log(dir: &Path) -> String {
    format!("--write_lat_log={}", dir.join("stall").display())
}

/// When the longest write of the last run ended, in seconds from its fault.
fn longest_at(logs: &Path) -> Option<f64> {
    let text = fs::read_to_string(logs.join("stall_clat.1.log")).ok()?;
    longest_write_ms(&text).map(|at| at / 1e3 - BEFORE.as_secs_f64())
}

/// Of fio's log, a line for each operation: milliseconds, what it took, 1 for a write, and more.
fn longest_write_ms(log: &str) -> Option<f64> {
    let writes = log.lines().filter_map(|line| {
        let mut words = line.split(',').map(str::trim);
        let (at, took) = (words.next()?.parse::<f64>().ok()?, words.next()?.parse::<u64>().ok()?);
        (words.next()? == "1").then_some((took, at))
    });
    writes.max_by_key(|(took, _)| *took).map(|(_, at)| at)
}

fn line(name: &str, report: &Report, at: Option<f64>) {
    println!(
        "{name:40} {:>9.0} {:>9.0} {:>9} {:>9.0} {:>9.0}",
        report.read.max_us / 1e3,
        report.write.max_us / 1e3,
        at.map_or("-".to_string(), |at| format!("{at:+.1}")),
        report.write.p99_us,
        report.read.iops + report.write.iops
    );
}

impl World {
    fn start(cairn: &Path, dir: &Path) -> Result<World, String> {
        let dir = tempfile::Builder::new()
            .prefix("stall-")
            .tempdir_in(dir)
            .map_err(words)?;
        let path = dir.path().canonicalize().map_err(words)?;
        let mut cluster = Cluster::new(ClusterOptions {
            program: cairn.to_path_buf(),
            dir: path.clone(),
            metas: 3,
            nodes: 3,
            device_bytes: DEVICE_BYTES,
            rebuild_after: Duration::from_secs(600),
            env: Vec::new(),
        })
        .map_err(words)?;
        let (backing, mount) = (path.join("backing"), path.join("shim"));
        fs::File::create(&backing)
            .and_then(|file| file.set_len(DEVICE_BYTES))
            .map_err(words)?;
        fs::create_dir_all(&mount).map_err(words)?;
        let shim = Shim::start(&backing, &mount, 1).map_err(words)?;
        let written_back = WrittenBack::start(&backing)?;
        cluster.use_device(DISK, shim.device());
        let parse = |address: String| address.parse::<SocketAddr>().map_err(words);
        let (before, behind) = (parse(cluster.address_before(HIT))?, parse(cluster.address(HIT))?);
        let proxy = Proxy::start(before, behind, 1).map_err(words)?;
        cluster.advertise(HIT, proxy.address());
        cluster.begin().map_err(words)?;
        cluster.create_volume(VOLUME, SIZE).map_err(words)?;
        start(&mut cluster, Part::Export(1))?;
        let socket = cluster.socket(1);
        let target = Target::Nbd(format!("nbd+unix:///{VOLUME}?socket={}", socket.display()));
        let mut world = World {
            cluster,
            proxy,
            shim,
            _written_back: written_back,
            target,
            logs: path,
            _dir: dir,
        };
        world.well()?;
        let size = format!("--size={SIZE}");
        let fill = ["--rw=write", "--bs=1M", "--iodepth=8", &size];
        fio::run("fill", &world.target, &fill, WELL_BOUND).map_err(words)?;
        Ok(world)
    }

    /// Reads and writes at depth 4, with the fault in the middle.
    fn measure(&mut self, runtime_s: u32, act: Act) -> Result<Report, String> {
        let (runtime, size) = (format!("--runtime={runtime_s}"), format!("--size={SIZE}"));
        // The attachment itself is not what is measured, and groups are attached one by one.
        let mut held = hold(&self.cluster.socket(1))?;
        let bytes = SIZE.parse::<ByteSize>().expect("a size").0;
        for offset in (0..bytes).step_by(CHUNK_BYTES as usize) {
            held.ask(Command::Read, offset, 4096, &[], WELL_BOUND).map_err(words)?;
        }
        let running = fio::start("stall", &self.target, &load(&runtime, &size, &log(&self.logs)));
        std::thread::sleep(BEFORE);
        act(self)?;
        let bound = Duration::from_secs(runtime_s.into()) + LATE_MAX;
        running.finish(bound).map_err(words)
    }

    /// Undoes what was done, and waits until all is well.
    fn heal(&mut self) -> Result<(), String> {
        self.shim.heal();
        self.proxy.heal().map_err(words)?;
        for part in self.cluster.servers() {
            if self.cluster.is_running(part) {
                process::resume(self.cluster.pid(part));
            } else {
                start(&mut self.cluster, part)?;
            }
        }
        self.well()
    }

    fn well(&mut self) -> Result<(), String> {
        let well = self.cluster.wait_well(WELL_BOUND);
        well.map(drop)
            .map_err(|problems| format!("not well within {WELL_BOUND:?}: {}", problems.join("; ")))
    }
}

fn start(cluster: &mut Cluster, part: Part) -> Result<(), String> {
    cluster.start(part).map_err(words)
}

fn words(error: impl std::fmt::Display) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_write_is_found_in_the_log_of_fio() {
        let log =
            "12, 500, 1, 4096, 0, 0\n3400, 90000, 0, 4096, 0, 0\n3600, 7000, 1, 4096, 0, 0\n3601, 600, 1, 4096, 0, 0\n";
        assert_eq!(longest_write_ms(log), Some(3600.0));
        assert_eq!(longest_write_ms(""), None);
    }
}
