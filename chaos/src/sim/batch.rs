//! Many seeds, on as many threads as the machine has processors. A world stays within its thread.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::run::{Report, StoreKind, run_seed_on};
use super::trace::Keep;

/// Failing seeds after which a batch ends.
pub const FAILURES_MAX: usize = 10;

/// What seeds to run.
#[derive(Clone, Copy, Debug)]
pub struct Batch {
    /// The first.
    pub first: u64,
    /// How many; without a bound if `None`.
    pub count: Option<u64>,
    /// For how long at the most.
    pub span: Option<Duration>,
    /// On how many threads; as many as there are processors if `None`.
    pub threads: Option<usize>,
    /// On which store; as each seed chooses if `None`.
    pub store: Option<StoreKind>,
}

/// What came of them.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Seeds that ran.
    pub seeds: u64,
    /// Those that failed, in order.
    pub failed: Vec<Report>,
    /// Operations called.
    pub ops: u64,
    /// Operations done.
    pub done: u64,
    /// Events.
    pub events: u64,
    /// Frames.
    pub frames: u64,
    /// Sessions.
    pub sessions: u64,
    /// Acknowledged writes that were looked for on their devices at once.
    pub probes: u64,
    /// Blocks checked.
    pub blocks: u64,
    /// Blocks whose history could not be decided.
    pub undecided: u64,
    /// Faults, by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Errors that guests got, by kind.
    pub errors: BTreeMap<String, u64>,
    /// Virtual time.
    pub virtual_ms: u64,
    /// Processor time of all seeds.
    pub cpu_us: u64,
    /// That of the dearest seed, and which it was.
    pub dearest: (u64, u64),
}

impl Totals {
    fn add(&mut self, report: Report) {
        let stats = &report.stats;
        self.seeds += 1;
        self.ops += stats.ops;
        self.done += stats.done;
        self.events += stats.events;
        self.frames += stats.frames;
        self.sessions += stats.sessions;
        self.probes += stats.probes;
        self.blocks += stats.blocks;
        self.undecided += stats.undecided;
        self.virtual_ms += stats.virtual_ms;
        self.cpu_us += stats.cpu_us;
        self.dearest = self.dearest.max((stats.cpu_us, report.seed));
        for (kind, count) in &stats.faults {
            *self.faults.entry(kind).or_default() += count;
        }
        for (kind, count) in &stats.errors {
            *self.errors.entry(kind.clone()).or_default() += count;
        }
        if report.broken.is_some() {
            self.failed.push(report);
        }
    }
}

/// Runs a batch; `progress` is told how far it is, now and then.
#[expect(clippy::disallowed_methods, reason = "how long seeds take is measured in real time")]
pub fn run_batch(batch: Batch, mut progress: impl FnMut(&Totals, Duration)) -> Totals {
    let began = Instant::now();
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = batch.threads.unwrap_or(processors);
    let next = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let mut totals = Totals::default();
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let sender = sender.clone();
            let (next, stop) = (&next, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let late = batch.span.is_some_and(|span| began.elapsed() >= span);
                    if batch.count.is_some_and(|count| index >= count) || late {
                        return;
                    }
                    let (report, _) = run_seed_on(batch.first.wrapping_add(index), batch.store, Keep::Hash);
                    if sender.send(report).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let mut told = began;
        loop {
            match receiver.recv_timeout(Duration::from_millis(500)) {
                Ok(report) => totals.add(report),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if totals.failed.len() >= FAILURES_MAX {
                stop.store(true, Ordering::Relaxed);
            }
            if told.elapsed() >= Duration::from_secs(2) {
                told = Instant::now();
                progress(&totals, began.elapsed());
            }
        }
    });
    totals.failed.sort_by_key(|report| report.seed);
    totals
}
