//! Each planted bug is caught by the tests that the store passes without it.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::basic::discarded_blocks_stay_discarded;
use super::crash::crash_run;
use super::mover::{move_limits, move_run};
use crate::store::{Canary, StoreLimits};
use crate::testing::store::crash::CrashRun;

fn limits(canary: Canary) -> StoreLimits {
    StoreLimits {
        canary,
        overwrite_reserve_blocks: 16,
        ..StoreLimits::tiny()
    }
}

/// Whether any of a few crash runs fails: by what it finds, or by an assertion of the store.
fn caught(blocks: u64, limits: &StoreLimits) -> bool {
    (0..20).any(|seed| {
        let run = catch_unwind(AssertUnwindSafe(|| crash_run(blocks, limits, seed, 150)));
        !matches!(run, Ok(Ok(_)))
    })
}

#[test]
fn acknowledging_before_the_flush_is_caught() {
    assert!(caught(
        1100,
        &limits(Canary {
            ack_before_flush: true,
            ..Canary::default()
        })
    ));
}

#[test]
fn believing_the_last_batch_unseen_is_caught() {
    assert!(caught(
        1100,
        &limits(Canary {
            skip_data_checksum_at_recovery: true,
            ..Canary::default()
        })
    ));
}

#[test]
fn reusing_blocks_before_the_batch_is_durable_is_caught() {
    // Small enough that what is freed is taken again at once.
    assert!(caught(
        300,
        &limits(Canary {
            reuse_too_early: true,
            ..Canary::default()
        })
    ));
}

#[test]
fn forgetting_the_versions_of_discards_is_caught() {
    let limits = limits(Canary {
        forget_tombstones: true,
        ..Canary::default()
    });
    assert!(catch_unwind(|| discarded_blocks_stay_discarded(limits)).is_err());
}

#[test]
fn moving_a_block_that_was_written_since_it_was_read_is_caught() {
    let caught = (0..6).any(|seed| {
        let limits = StoreLimits {
            canary: Canary {
                move_unchecked: true,
                ..Canary::default()
            },
            ..move_limits(seed)
        };
        let run = catch_unwind(AssertUnwindSafe(|| move_run(&limits, seed, 350, 0)));
        !matches!(run, Ok(Ok(_)))
    });
    assert!(caught);
}

#[test]
fn relying_on_what_was_moved_and_not_flushed_is_caught() {
    let caught = (0..6).any(|seed| {
        let limits = StoreLimits {
            canary: Canary {
                flush_nothing_else: true,
                ..Canary::default()
            },
            ..move_limits(seed)
        };
        let run = catch_unwind(AssertUnwindSafe(|| move_run(&limits, seed, 350, 0)));
        !matches!(run, Ok(Ok(_)))
    });
    assert!(caught);
}

#[test]
fn without_a_planted_bug_nothing_is_caught() {
    for seed in 0..2 {
        crash_run(300, &limits(Canary::default()), seed, 100).unwrap();
    }
}

/// A run that cuts power at every operation of a workload, but not of recoveries.
fn exhaustive(seed: u64, canary: Canary) -> CrashRun {
    let mut run = CrashRun {
        nested_every: u64::MAX,
        works_on_every: u64::MAX,
        ..CrashRun::of_seed(seed)
    };
    run.limits.canary = canary;
    run
}

#[test]
fn cutting_power_at_every_operation_catches_each_of_them() {
    let canaries = [
        Canary {
            ack_before_flush: true,
            ..Canary::default()
        },
        Canary {
            skip_data_checksum_at_recovery: true,
            ..Canary::default()
        },
        Canary {
            reuse_too_early: true,
            ..Canary::default()
        },
        Canary {
            forget_tombstones: true,
            ..Canary::default()
        },
    ];
    let seeds = 0..6;
    for canary in canaries {
        let caught = seeds.clone().any(|seed| exhaustive(seed, canary).run().is_err());
        assert!(caught, "{canary:?} is not caught");
    }
    // It is the bug that is caught, not the run.
    if let Err(failure) = exhaustive(0, Canary::default()).run() {
        panic!("{failure}");
    }
}
