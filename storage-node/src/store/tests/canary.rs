//! Each planted bug is caught by the tests that the store passes without it.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::basic::discarded_blocks_stay_discarded;
use super::crash::crash_run;
use super::mover::{move_limits, move_run};
use crate::store::{Canary, StoreLimits};

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
        let run = catch_unwind(AssertUnwindSafe(|| move_run(&limits, seed, 350)));
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
