//! Many worlds: what came of them, taken together.

use std::collections::BTreeMap;
use std::time::Duration;

use super::run::{Report, StoreKind, run_seed_on};
use super::trace::Keep;
use crate::batch::{Seeds, Tally, run_seeds};

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
    /// Copies that went through a coordinator.
    pub copies: u64,
    /// Copies that went from node to node.
    pub fetched: u64,
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
        self.copies += stats.copies;
        self.fetched += stats.fetched;
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

impl Tally for Totals {
    type Outcome = Report;

    fn add(&mut self, report: Report) {
        Totals::add(self, report);
    }

    fn failures(&self) -> usize {
        self.failed.len()
    }
}

/// Runs a batch of seeds, on the store that each chooses unless one is given; `progress` is told how far it is, now and
/// then.
pub fn run_batch(seeds: Seeds, store: Option<StoreKind>, progress: impl FnMut(&Totals, Duration)) -> Totals {
    let mut totals: Totals = run_seeds(seeds, |seed| run_seed_on(seed, store, Keep::Hash).0, progress);
    totals.failed.sort_by_key(|report| report.seed);
    totals
}
