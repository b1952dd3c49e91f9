//! What guests feel of a rebuild: random writes at depth 4 before a node is lost, and while its copies are made anew.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cairn_chaos::live::dev::{Dev, DevDir, DevOptions};
use cairn_chaos::live::fio::{self, Figures, Target};
use cairn_chaos::live::nbd::{Command, Connection};
use cairn_chaos::live::tools;
use cairn_chaos::live::wait::wait_for;
use cairn_proto::units::ByteSize;
use serde_json::Value;

use crate::targets::build_cairn;

/// The volume.
const VOLUME: &str = "demo";
/// After what silence copies are made anew. A member is ejected after 10 s of it.
const REBUILD_AFTER: &str = "5s";
/// How long anything but the rebuild may take.
const BOUND: Duration = Duration::from_secs(120);
/// How long a rebuild may take.
const REBUILD_BOUND: Duration = Duration::from_secs(480);

/// What to measure.
#[derive(Clone, Debug)]
pub struct RebuildOptions {
    /// Bytes of the volume, written in full before.
    pub size: ByteSize,
    /// Seconds of a run of fio.
    pub runtime_s: u32,
    /// Without guests while the copies are made anew.
    pub idle: bool,
    /// Where the files lie.
    pub dir: Option<PathBuf>,
    /// The `cairn` program; built when not given.
    pub cairn: Option<PathBuf>,
}

/// Loses a node of four, and prints what random writes take before and while its copies are made anew on the fourth.
pub fn run(options: &RebuildOptions) -> Result<(), String> {
    if tools::find("fio").is_none() {
        return Err("fio is not installed (package fio)".to_string());
    }
    let cairn = match &options.cairn {
        Some(program) => program.clone(),
        None => build_cairn()?,
    };
    let default_dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench");
    let dir = options.dir.clone().unwrap_or(default_dir);
    let dir = DevDir::new(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let device = ByteSize(options.size.0 * 2);
    let dev = DevOptions::new(cairn)
        .volumes(&[&format!("{VOLUME}:{}", options.size.0)])
        .device_size(&device.0.to_string())
        .args(&["--nodes", "4", "--rebuild-after", REBUILD_AFTER]);
    let mut dev = Dev::start(dev, dir).map_err(|error| error.to_string())?;
    let target = Target::Nbd(dev.uri(VOLUME));
    let size = format!("--size={}", options.size.0);
    let fill = ["--rw=write", "--bs=1M", "--iodepth=8", &size];
    fio::run("fill", &target, &fill, BOUND).map_err(|error| error.to_string())?;

    // What nobody holds is repaired by a caretaker; here it is to be its guest who does.
    let held = hold(&dev.socket())?;
    line("before", write(&target, options)?);
    let node = wait_for(BOUND, || host_of(&dev)).ok_or("the volume is on no node")?;
    dev.kill(&node);
    line("node lost", write(&target, options)?);
    let begun = wait_for(BOUND, || repair(&dev).map(|_| Instant::now())).ok_or("no copy is made anew")?;
    let mut rounds = 0;
    let ended = wait_for(REBUILD_BOUND, || {
        if !options.idle && repair(&dev).is_some_and(|(_, left)| left > options.size.0 / 16) {
            match write(&target, options) {
                Ok(figures) => line("while it is rebuilt", figures),
                Err(why) => return Some(Err(why)),
            }
            rounds += 1;
        }
        repair(&dev).is_none().then(|| Ok(begun.elapsed()))
    });
    drop(held);
    let took = ended.ok_or("the rebuild does not end")??;
    if rounds == 0 && !options.idle {
        return Err("the rebuild was over before anything was measured: take a larger volume".to_string());
    }
    let rate = options.size.0 as f64 / took.as_secs_f64() / f64::from(1 << 20);
    println!(
        "rebuilt {} in {:.1} s, {rate:.0} MiB/s",
        options.size,
        took.as_secs_f64()
    );
    line("after", write(&target, options)?);
    Ok(())
}

fn write(target: &Target, options: &RebuildOptions) -> Result<Figures, String> {
    let (runtime, size) = (
        format!("--runtime={}", options.runtime_s),
        format!("--size={}", options.size.0),
    );
    let load = [
        "--rw=randwrite",
        "--bs=4k",
        "--iodepth=4",
        "--time_based",
        &runtime,
        &size,
    ];
    let report = fio::run("write", target, &load, BOUND).map_err(|error| error.to_string())?;
    Ok(report.write)
}

/// Attaches the volume, and keeps it.
pub(crate) fn hold(socket: &Path) -> Result<Connection, String> {
    hold_of(socket, VOLUME)
}

/// Attaches this volume, and keeps it.
pub(crate) fn hold_of(socket: &Path, volume: &str) -> Result<Connection, String> {
    let words = |error: std::io::Error| format!("{volume} can't be attached: {error}");
    let mut connection = Connection::open(socket, volume).map_err(words)?;
    connection.ask(Command::Read, 0, 4096, &[], BOUND).map_err(words)?;
    Ok(connection)
}

fn line(what: &str, figures: Figures) {
    println!(
        "{what:22} {:>7.0} I/O a s, mean {:>6.0} us, p50 {:>6.0} us, p99 {:>6.0} us, p99.9 {:>6.0} us, longest {:>6.1} ms",
        figures.iops,
        figures.mean_us,
        figures.p50_us,
        figures.p99_us,
        figures.p999_us,
        figures.max_us / 1e3
    );
}

fn shown(dev: &Dev) -> Option<Value> {
    let output = dev.cairn(&["volume", "show", VOLUME, "--json"]).output().ok()?;
    serde_json::from_slice(&output.stdout).ok()
}

/// A node that has a copy.
fn host_of(dev: &Dev) -> Option<String> {
    let copy = &shown(dev)?["group_list"][0]["in_sync"][0];
    copy["host"].as_str().map(str::to_string)
}

/// Bytes that are copied, and that are lacking, of the copy that is made anew.
fn repair(dev: &Dev) -> Option<(u64, u64)> {
    let shown = shown(dev)?;
    let repairs = shown["health"]["repairs"].as_array()?.clone();
    let is_open = |repair: &&Value| repair["state"] == "copying" || repair["state"] == "comparing";
    let open: Vec<&Value> = repairs.iter().filter(is_open).collect();
    let sum = |key: &str| open.iter().filter_map(|repair| repair[key].as_u64()).sum();
    (!open.is_empty()).then(|| (sum("copied_bytes"), sum("lacking_bytes")))
}
