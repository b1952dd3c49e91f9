//! Proving the store alone: power is cut at every operation of many workloads, and of the recoveries from those cuts.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use cairn_storage_node::testing::store::crash::{CrashFailure, CrashRun, CrashTotals};

/// Failing seeds after which it ends.
pub const FAILURES_MAX: usize = 10;

/// Which seeds to run.
#[derive(Clone, Copy, Debug)]
pub struct StoreBatch {
    /// The first.
    pub first: u64,
    /// How many; without a bound if `None`.
    pub count: Option<u64>,
    /// For how long at the most; a seed that has begun ends.
    pub span: Option<Duration>,
    /// On how many threads; as many as there are processors if `None`.
    pub threads: Option<usize>,
    /// Only the cut at this moment of each, to replay a failure.
    pub moment: Option<u64>,
}

/// What came of them.
#[derive(Clone, Debug, Default)]
pub struct StoreTotals {
    /// Seeds that ran.
    pub seeds: u64,
    /// What they did, of those that passed.
    pub done: CrashTotals,
    /// Those that failed, in order.
    pub failed: Vec<CrashFailure>,
}

impl StoreTotals {
    fn add(&mut self, outcome: Result<CrashTotals, Box<CrashFailure>>) {
        self.seeds += 1;
        match outcome {
            Ok(totals) => self.done += totals,
            Err(failure) => self.failed.push(*failure),
        }
    }

    /// For machines.
    pub fn json(&self) -> serde_json::Value {
        let failed: Vec<_> = self
            .failed
            .iter()
            .map(|failure| {
                serde_json::json!({
                    "seed": failure.seed,
                    "moment": failure.moment,
                    "words": failure.words,
                    "replay": failure.replay(),
                })
            })
            .collect();
        serde_json::json!({
            "seeds": self.seeds,
            "failed": failed,
            "operations": self.done.operations,
            "commits": self.done.commits,
            "checkpoints": self.done.checkpoints,
            "no_space": self.done.no_space,
            "blocks_moved": self.done.moved,
            "blocks_written": self.done.blocks_written,
            "moments": self.done.moments,
            "recoveries": self.done.recoveries,
            "nested_recoveries": self.done.nested,
        })
    }
}

impl std::fmt::Display for StoreTotals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let done = &self.done;
        write!(
            f,
            "{} seeds, {} failed; {} operations, {} commits, {} checkpoints, {} blocks moved, {} requests refused for space; power cut at \
             {} moments, {} recoveries, {} more from cuts during recovery",
            self.seeds,
            self.failed.len(),
            done.operations,
            done.commits,
            done.checkpoints,
            done.moved,
            done.no_space,
            done.moments,
            done.recoveries,
            done.nested
        )
    }
}

/// Runs seeds; `progress` is told how far it is, now and then.
#[expect(clippy::disallowed_methods, reason = "how long seeds take is measured in real time")]
pub fn run(batch: StoreBatch, mut progress: impl FnMut(&StoreTotals)) -> StoreTotals {
    let began = Instant::now();
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let (next, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut totals = StoreTotals::default();
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..batch.threads.unwrap_or(processors) {
            let sender = sender.clone();
            let (next, stop) = (&next, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let late = batch.span.is_some_and(|span| began.elapsed() >= span);
                    if batch.count.is_some_and(|count| index >= count) || late {
                        return;
                    }
                    let run = CrashRun {
                        only: batch.moment,
                        ..CrashRun::of_seed(batch.first.wrapping_add(index))
                    };
                    if sender.send(run.run()).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let mut told = began;
        loop {
            match receiver.recv_timeout(Duration::from_millis(500)) {
                Ok(outcome) => totals.add(outcome),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if totals.failed.len() >= FAILURES_MAX {
                stop.store(true, Ordering::Relaxed);
            }
            if told.elapsed() >= Duration::from_secs(2) {
                told = Instant::now();
                progress(&totals);
            }
        }
    });
    totals.failed.sort_by_key(|failure| failure.seed);
    totals
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_passes_and_says_what_it_did() {
        let batch = StoreBatch {
            first: 3,
            count: Some(1),
            span: None,
            threads: Some(1),
            moment: Some(30),
        };
        let totals = run(batch, |_| {});
        assert!(totals.failed.is_empty(), "{:?}", totals.failed);
        assert!(totals.seeds == 1 && totals.done.recoveries > 0, "{totals}");
        assert_eq!(totals.json()["seeds"], 1);
    }
}
