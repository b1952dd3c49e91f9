//! Proving the store alone: power is cut at every operation of many workloads, and of the recoveries from those cuts.

use cairn_storage_node::testing::store::crash::{CrashFailure, CrashRun, CrashTotals};

use crate::batch::{Seeds, Tally, run_seeds};

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

impl Tally for StoreTotals {
    type Outcome = Result<CrashTotals, Box<CrashFailure>>;

    fn add(&mut self, outcome: Result<CrashTotals, Box<CrashFailure>>) {
        self.seeds += 1;
        match outcome {
            Ok(totals) => self.done += totals,
            Err(failure) => self.failed.push(*failure),
        }
    }

    fn failures(&self) -> usize {
        self.failed.len()
    }
}

impl StoreTotals {
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
            "blocks_moved_for_room": self.done.evacuated,
            "cuts_while_formatting": self.done.formatted,
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
            "{} seeds, {} failed; {} operations, {} commits, {} checkpoints, {} blocks moved, {} of them to make room, {} requests refused \
             for space; power cut at {} moments, {} recoveries, {} more from cuts during recovery, {} while formatting",
            self.seeds,
            self.failed.len(),
            done.operations,
            done.commits,
            done.checkpoints,
            done.moved,
            done.evacuated,
            done.no_space,
            done.moments,
            done.recoveries,
            done.nested,
            done.formatted
        )
    }
}

/// Runs seeds, each with all its cuts, or only the cut at one moment of each, to replay a failure; `progress` is told how
/// far it is, now and then.
pub fn run(seeds: Seeds, moment: Option<u64>, mut progress: impl FnMut(&StoreTotals)) -> StoreTotals {
    let run = |seed| {
        let run = CrashRun {
            only: moment,
            ..CrashRun::of_seed(seed)
        };
        run.run()
    };
    let mut totals: StoreTotals = run_seeds(seeds, run, |totals, _| progress(totals));
    totals.failed.sort_by_key(|failure| failure.seed);
    totals
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_passes_and_says_what_it_did() {
        let seeds = Seeds {
            first: 3,
            count: Some(1),
            span: None,
            threads: Some(1),
        };
        let totals = run(seeds, Some(30), |_| {});
        assert!(totals.failed.is_empty(), "{:?}", totals.failed);
        assert!(totals.seeds == 1 && totals.done.recoveries > 0, "{totals}");
        assert_eq!(totals.json()["seeds"], 1);
    }
}
