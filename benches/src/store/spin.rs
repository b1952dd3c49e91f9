//! The store on a device that does nothing: what it costs itself, in processor time, instructions and memory.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Instant;

use cairn_storage_node::store::StoreLimits;
use serde_json::{Value, json};

use super::driven;
use super::work::{self, Load, Stop};

/// What to do.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct SpinOptions {
    /// Write, or write all of the span once and then read.
    pub write: bool,
    /// In random order.
    pub random: bool,
    /// Operations in flight.
    pub depth: usize,
    /// Blocks of one operation.
    pub blocks: u32,
    /// How many operations; as many as touch all of the span once if zero.
    pub count: u64,
    /// Blocks that they are spread over.
    pub span: u64,
    /// Blocks of the device.
    pub device_blocks: u64,
}

/// Runs it.
///
/// # Errors
/// The store refused an operation, in words.
pub fn run(options: &SpinOptions) -> Result<Value, String> {
    let limits = StoreLimits {
        // Nothing can be read back from a device that keeps nothing.
        index_memory_max: usize::MAX,
        ..StoreLimits::default()
    };
    let mut driven = driven::on_null_device(options.device_blocks, limits)?;
    let load = Load {
        write: options.write,
        random: options.random,
        blocks: options.blocks,
        depth: options.depth,
        span: options.span,
        stop: match options.count {
            0 => Stop::Once,
            count => Stop::Operations(count),
        },
    };
    if !options.write {
        let fill = Load {
            write: true,
            random: false,
            blocks: 256,
            depth: 8,
            stop: Stop::Once,
            ..load
        };
        work::run(&mut driven, &fill, 0)?;
    }
    let before = driven.store.counters();
    let memory = resident_bytes();
    let begun = Instant::now();
    let figures = work::run(&mut driven, &load, 1)?;
    let seconds = begun.elapsed().as_secs_f64();
    let after = driven.store.counters();
    Ok(json!({
        "ops": figures.ops,
        "seconds": seconds,
        "cpu_us_per_op": figures.cpu_us_per_op,
        "write_amplification": figures.amplification,
        "requests_per_batch": (after.batch_requests - before.batch_requests) as f64 / (after.batches - before.batches).max(1) as f64,
        "checkpoints": after.checkpoints - before.checkpoints,
        "checkpoint_blocks": after.checkpoint_blocks - before.checkpoint_blocks,
        "record_pages": after.record_pages - before.record_pages,
        "index_pages": after.index_pages_resident,
        "data_blocks": driven.store.space().data,
        "memory_grown": resident_bytes().saturating_sub(memory),
    }))
}

/// Bytes of memory that this process holds.
fn resident_bytes() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm
        .split_whitespace()
        .nth(1)
        .and_then(|word| word.parse::<u64>().ok());
    pages.unwrap_or(0) * 4096
}

/// Runs it in a process of its own, so that memory is counted from nothing.
///
/// # Errors
/// In words.
pub fn run_apart(options: &SpinOptions) -> Result<Value, String> {
    let own = std::env::current_exe().map_err(|error| format!("the path of this program is not known: {error}"))?;
    let mut command = Command::new(own);
    command
        .arg("spin")
        .arg(if options.write { "--write" } else { "--read" });
    if options.random {
        command.arg("--random");
    }
    for (name, value) in [
        ("--depth", options.depth as u64),
        ("--blocks", options.blocks.into()),
        ("--count", options.count),
        ("--span", options.span),
        ("--device-blocks", options.device_blocks),
    ] {
        command.arg(name).arg(value.to_string());
    }
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.map_err(|error| format!("this program can't be run again: {error}"))?;
    if !output.status.success() {
        return Err("measuring memory failed".to_string());
    }
    serde_json::from_slice(&output.stdout).map_err(|error| format!("measuring memory gave nonsense: {error}"))
}
