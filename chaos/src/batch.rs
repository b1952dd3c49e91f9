//! Many seeds, on as many threads as the machine has processors. What one seed does stays within its thread.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// Failing seeds after which a batch ends.
pub const FAILURES_MAX: usize = 10;

/// How often somebody is told how far a batch is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(2);

/// What seeds to run.
#[derive(Clone, Copy, Debug)]
pub struct Seeds {
    /// The first.
    pub first: u64,
    /// How many; without a bound if `None`.
    pub count: Option<u64>,
    /// For how long at the most; a seed that has begun ends.
    pub span: Option<Duration>,
    /// On how many threads; as many as there are processors if `None`.
    pub threads: Option<usize>,
}

/// What comes of a batch: the outcomes of its seeds taken together.
pub trait Tally: Default {
    /// What comes of one seed.
    type Outcome: Send;

    /// Takes the outcome of one more seed.
    fn add(&mut self, outcome: Self::Outcome);

    /// How many seeds have failed.
    fn failures(&self) -> usize;
}

/// Runs each of the seeds with `run`; `progress` is told how far the batch is, now and then. Outcomes are taken in the
/// order in which seeds end, which is not that of their numbers.
#[expect(clippy::disallowed_methods, reason = "how long seeds take is measured in real time")]
pub fn run_seeds<T: Tally>(
    seeds: Seeds,
    run: impl Fn(u64) -> T::Outcome + Sync,
    mut progress: impl FnMut(&T, Duration),
) -> T {
    let began = Instant::now();
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let (next, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut tally = T::default();
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..seeds.threads.unwrap_or(processors) {
            let sender = sender.clone();
            let (next, stop, run) = (&next, &stop, &run);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let late = seeds.span.is_some_and(|span| began.elapsed() >= span);
                    if seeds.count.is_some_and(|count| index >= count) || late {
                        return;
                    }
                    if sender.send(run(seeds.first.wrapping_add(index))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let mut told = began;
        loop {
            match receiver.recv_timeout(Duration::from_millis(500)) {
                Ok(outcome) => tally.add(outcome),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if tally.failures() >= FAILURES_MAX {
                stop.store(true, Ordering::Relaxed);
            }
            if told.elapsed() >= PROGRESS_INTERVAL {
                told = Instant::now();
                progress(&tally, began.elapsed());
            }
        }
    });
    tally
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Odd {
        seen: Vec<u64>,
        odd: usize,
    }

    impl Tally for Odd {
        type Outcome = u64;

        fn add(&mut self, seed: u64) {
            self.seen.push(seed);
            self.odd += (seed % 2) as usize;
        }

        fn failures(&self) -> usize {
            self.odd
        }
    }

    fn seeds(first: u64, count: Option<u64>) -> Seeds {
        Seeds {
            first,
            count,
            span: None,
            threads: Some(3),
        }
    }

    #[test]
    fn each_seed_of_a_batch_runs_once() {
        let mut tally: Odd = run_seeds(seeds(5, Some(12)), |seed| seed, |_, _| {});
        tally.seen.sort_unstable();
        assert_eq!(tally.seen, (5..17).collect::<Vec<_>>());
    }

    #[test]
    fn a_batch_without_a_bound_ends_after_enough_failures() {
        let tally: Odd = run_seeds(seeds(1, None), |seed| seed, |_, _| {});
        assert!(tally.odd >= FAILURES_MAX);
    }
}
