//! Everything that does not belong on a socket, on every socket that the cluster listens on, while guests work. Memory of every
//! process is watched, and nobody may notice.

use std::time::{Duration, Instant};

use super::cluster::Part;
use super::inject::garbage::{self, Door, Manner, Memory};
use super::process;
use super::report::{Failure, FailureKind};
use super::run::Run;

/// How long one injection lasts.
const SPAN: Duration = Duration::from_secs(8);
/// How much the resident memory of a process may grow meanwhile: what its own load needs, caches too, and some for
/// connections with bounded buffers.
const GROWTH_MAX: u64 = 96 << 20;
/// For how long strangers must come before growth in the second half of the time counts.
const LATE_AFTER: Duration = Duration::from_secs(60);
/// How much more the most of the second half may be than that of the first half.
const LATE_GROWTH_MAX: u64 = 16 << 20;
/// Connections that say nothing or little, at a time, of each stranger.
const LINGERING: usize = 120;
/// Strangers at a time; each makes one connection after another.
const STRANGERS: u64 = 2;

/// The step.
pub(super) fn foreign(run: &mut Run) -> Result<(), Failure> {
    strangers(run, SPAN)
}

/// All sockets on which the processes of the cluster listen.
fn doors(run: &Run) -> Vec<Door> {
    let running = run.cluster.running();
    let tcp = running
        .iter()
        .flat_map(|part| process::listening(run.cluster.pid(*part)));
    let exports = running.iter().filter_map(|part| match part {
        Part::Export(k) => Some(Door::Unix(run.cluster.socket(*k))),
        _ => None,
    });
    tcp.map(Door::Tcp).chain(exports).collect()
}

/// A volume for strangers who know the words: who reads it takes it over, which guests of the others must not suffer from.
const VOLUME: &str = "s";
const VOLUME_BYTES: &str = "32M";

/// Right beginnings of what the doors speak: NBD's greeting and the choice of an export, a frame's header, HTTP/2 as gRPC has it.
fn beginnings() -> Vec<Vec<u8>> {
    let mut go = b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x07\0\0\0\x01s\0\0".to_vec();
    let read = b"\x25\x60\x95\x13\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\x10\0";
    let chosen = go.clone();
    go.extend(read);
    let http = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
    vec![chosen, go, http, b"CRNF".to_vec()]
}

/// For so long.
pub(super) fn strangers(run: &mut Run, span: Duration) -> Result<(), Failure> {
    run.load(Duration::from_secs(1))?;
    if !run.cluster.ask(&["volume", "show", VOLUME]).is_success() {
        run.cluster.create_volume(VOLUME, VOLUME_BYTES)?;
    }
    let running = run.cluster.running();
    let seed = run.rng.word();
    let plan = |seed: u64| garbage::Plan {
        doors: doors(run),
        pids: running.iter().map(|part| run.cluster.pid(*part)).collect(),
        span,
        seed,
        lingering: LINGERING,
        beginnings: beginnings(),
    };
    let doors = doors(run).len();
    let plans: Vec<garbage::Plan> = (0..STRANGERS).map(|k| plan(seed.wrapping_add(k))).collect();
    let threads: Vec<_> = plans
        .into_iter()
        .map(|plan| std::thread::spawn(move || garbage::run(&plan)))
        .collect();
    let end = Instant::now() + span;
    let mut result = Ok(());
    while Instant::now() < end && result.is_ok() {
        result = run.load(Duration::from_millis(500));
    }
    let outcomes: Vec<garbage::Outcome> = threads.into_iter().filter_map(|thread| thread.join().ok()).collect();
    result?;
    if outcomes.len() as u64 != STRANGERS {
        return Err(Failure::new(FailureKind::Setup, "a stranger has panicked"));
    }
    let count = |manner: &Manner| -> u64 {
        let of = |outcome: &garbage::Outcome| outcome.connections.get(manner).copied().unwrap_or(0);
        outcomes.iter().map(of).sum()
    };
    let told: Vec<String> = Manner::ALL
        .iter()
        .map(|manner| format!("{manner} {}", count(manner)))
        .collect();
    let sent: u64 = outcomes.iter().map(|outcome| outcome.bytes_sent).sum();
    run.timeline.note(format!(
        "foreign connections to {doors} sockets, {} MiB sent: {}",
        sent >> 20,
        told.join(", ")
    ));
    let refused: u64 = outcomes.iter().flat_map(|outcome| outcome.refused.values()).sum();
    if refused > 0 {
        run.timeline.note(format!("{refused} of them were refused at once"));
    }
    let memory = &outcomes[0].memory;
    running
        .iter()
        .zip(memory)
        .try_for_each(|(part, memory)| judge(run, *part, memory, span))
}

/// What a process's memory has done.
fn judge(run: &mut Run, part: Part, memory: &Memory, span: Duration) -> Result<(), Failure> {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let words = format!(
        "memory of {part}: {:.1} MiB before, {:.1} at the most, {:.1} after, grown by {:.1} in the second half of the time",
        mib(memory.before),
        mib(memory.most()),
        mib(memory.after.unwrap_or(0)),
        mib(memory.late_growth())
    );
    run.timeline.note(&words);
    let has_grown = memory.most().saturating_sub(memory.before) > GROWTH_MAX;
    let is_growing = span >= LATE_AFTER && memory.late_growth() > LATE_GROWTH_MAX;
    if has_grown || is_growing {
        return Err(Failure::new(FailureKind::Memory, words));
    }
    Ok(())
}
