//! Power is cut at every operation of some workloads: see [`crate::testing::store::crash`]. `chaos store` runs more.

use crate::testing::store::crash::{CrashRun, CrashTotals};

/// A run of a seed within the bounds of a test that everybody runs all the time.
fn short(seed: u64) -> CrashRun {
    CrashRun {
        requests: 120,
        torn: 1,
        nested_every: 60,
        works_on_every: 20,
        ..CrashRun::of_seed(seed)
    }
}

fn passes(run: &CrashRun) -> CrashTotals {
    run.run().unwrap_or_else(|failure| panic!("{failure}"))
}

#[test]
fn power_cut_at_any_operation_loses_nothing_and_brings_nothing_back() {
    let run = short(1);
    assert!(run.volatile_cache);
    let totals = passes(&run);
    assert!(totals.checkpoints >= 3 && totals.nested > 100, "{totals:?}");
    assert!(totals.moved > 0, "{totals:?}");
    // With completion and acknowledgement, there are more moments than operations that change something.
    assert!(totals.moments > totals.commits * 3, "{totals:?}");
}

#[test]
fn the_same_without_a_volatile_cache() {
    let run = short(2);
    assert!(!run.volatile_cache);
    let totals = passes(&run);
    assert!(totals.checkpoints >= 3 && totals.nested > 100, "{totals:?}");
}

#[test]
fn the_same_on_a_device_that_fills_up_and_whose_log_comes_round() {
    let run = short(15);
    let totals = passes(&run);
    assert!(totals.no_space > 0, "{totals:?}");
    assert!(totals.blocks_written > run.blocks, "{totals:?}");
}

/// The same seed and moment is the same cut, so a failure can be replayed alone.
#[test]
fn one_moment_can_be_replayed() {
    let all = short(1);
    let one = CrashRun {
        only: Some(40),
        ..all.clone()
    };
    let totals = passes(&one);
    assert!((1..20).contains(&totals.recoveries), "{totals:?}");
    assert_eq!(passes(&one), totals);
}
