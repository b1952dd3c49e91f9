//! Whole attachments against devices that obey the rules of a replica, with a checker outside the code.

mod checker;
mod damage;
mod fetch;
mod fetching;
mod meta;
mod model;
mod random;
mod replacement;
mod stand_in;
mod stories;
mod world;

use std::time::Duration;

use world::{Faults, World};

use super::ReplicationLimits;
use crate::ids::VolumeId;

const VOLUME: VolumeId = VolumeId(7);
const GROUPS: u8 = 2;

/// Bounds so small that every one of them is met.
fn tiny() -> ReplicationLimits {
    ReplicationLimits {
        lag_bytes_max: 8 * 4096,
        lag_ops_max: 3,
        lack_chunks_exact_max: 1,
        copy_blocks: 2,
        copies_in_flight: 2,
        ..usual()
    }
}

/// Patience so short that it runs out in a run.
fn usual() -> ReplicationLimits {
    ReplicationLimits {
        eject_after: Duration::from_millis(800),
        eject_inexact_after: Duration::from_millis(300),
        well_after: Duration::from_millis(200),
        rejoin_min: Duration::from_millis(200),
        rejoin_max: Duration::from_secs(2),
        fetch_pause: Duration::from_millis(500),
        ..ReplicationLimits::DEFAULT
    }
}

/// Nobody is ejected: for runs in which a device forgets what it has acknowledged, or the only good copy of a block may be
/// on a member that is away.
fn all_members(limits: ReplicationLimits) -> ReplicationLimits {
    let long = Duration::from_secs(1_000_000);
    ReplicationLimits {
        refused_patience: long,
        silent_patience_min: long,
        silent_patience_max: long,
        seal_patience: long,
        ..limits
    }
}

fn run(seed: u64, faults: Faults, limits: ReplicationLimits) -> World {
    // With and without, and with bounds of either kind.
    let faults = Faults {
        fetch: !seed.is_multiple_of(3),
        ..faults
    };
    let mut world = World::new(seed, faults, limits);
    world.attach();
    for _ in 0..1500 {
        world.fault_step();
    }
    world.heal();

    world.check_convergence();
    if let Err(why) = world.history.check() {
        panic!("seed {seed}: {why}");
    }
    world
}

fn sweep(seeds: std::ops::Range<u64>, faults: Faults, expected: &[&str]) {
    let mut seen = std::collections::BTreeMap::new();
    // More seeds, for who changes something here: CAIRN_SEEDS=1000.
    let more = std::env::var("CAIRN_SEEDS")
        .ok()
        .and_then(|text| text.parse::<u64>().ok());
    for seed in more.map_or(seeds, |more| 0..more) {
        let limits = if seed.is_multiple_of(2) { tiny() } else { usual() };
        let limits = if faults.forget || faults.damage {
            all_members(limits)
        } else {
            limits
        };
        let world = run(seed, faults, limits);
        for (name, count) in world.results {
            *seen.entry(name).or_insert(0) += count;
        }
    }
    for name in expected {
        assert!(seen.contains_key(name), "no operation ended as {name}: {seen:?}");
    }
}

#[test]
fn reads_and_writes_are_linearizable_without_faults() {
    sweep(0..4, Faults::default(), &["written", "read", "status"]);
}

#[test]
fn losing_connections_and_members_shows_nothing_stale() {
    let faults = Faults {
        disconnects: true,
        crashes: true,
        ..Faults::default()
    };
    sweep(0..24, faults, &["written", "read", "status"]);
}

#[test]
fn members_are_ejected_and_join_again_while_meta_loses_answers() {
    let faults = Faults {
        disconnects: true,
        crashes: true,
        takeovers: true,
        meta: true,
        ..Faults::default()
    };
    sweep(0..40, faults, &["written", "read", "fenced"]);
}

#[test]
fn a_holder_that_was_superseded_neither_writes_nor_reads() {
    let faults = Faults {
        disconnects: true,
        crashes: true,
        takeovers: true,
        ..Faults::default()
    };
    sweep(0..24, faults, &["written", "read", "fenced"]);
}

#[test]
fn one_device_that_forgets_and_rots_is_never_believed() {
    let faults = Faults {
        disconnects: true,
        crashes: true,
        takeovers: true,
        damage: true,
        forget: true,
        ..Faults::default()
    };
    sweep(0..24, faults, &["written", "read", "fenced"]);
}

#[test]
fn what_failed_for_lack_of_space_is_never_read() {
    let faults = Faults {
        disconnects: true,
        crashes: true,
        takeovers: true,
        full: true,
        ..Faults::default()
    };
    sweep(0..40, faults, &["written", "read", "no space"]);
}

/// Each planted bug must be found by the checker or by an assertion, in a few runs.
#[cfg(feature = "canary")]
mod canaries {
    use super::*;
    use crate::replication::limits::Canary;

    fn is_found(canary: Canary) -> bool {
        is_found_within(200, canary)
    }

    fn is_found_within(seeds: u64, canary: Canary) -> bool {
        let faults = Faults {
            disconnects: true,
            crashes: true,
            takeovers: true,
            rushed: true,
            ..Faults::default()
        };
        let limits = ReplicationLimits { canary, ..usual() };
        (0..seeds).any(|seed| std::panic::catch_unwind(|| run(seed, faults, limits)).is_err())
    }

    #[test]
    fn nothing_is_found_where_no_bug_is() {
        assert!(!is_found_within(20, Canary::NONE));
    }

    #[test]
    fn an_acknowledgement_of_one_copy_is_found() {
        assert!(is_found(Canary {
            ack_at_one_copy: true,
            ..Canary::NONE
        }));
    }

    #[test]
    fn reading_from_a_lagging_member_is_found() {
        assert!(is_found(Canary {
            read_from_lagging: true,
            ..Canary::NONE
        }));
    }

    #[test]
    fn serving_without_a_comparison_is_found() {
        assert!(is_found(Canary {
            skip_reconcile: true,
            ..Canary::NONE
        }));
    }

    #[test]
    fn ejecting_without_asking_meta_is_found() {
        let canary = Canary {
            eject_without_commit: true,
            ..Canary::NONE
        };
        let limits = ReplicationLimits { canary, ..usual() };
        let story = || stories::who_was_ejected_has_no_say_for_the_next_holder(limits);
        assert!(std::panic::catch_unwind(story).is_err());
    }

    #[test]
    fn a_resync_that_keeps_what_is_highest_is_found() {
        assert!(is_found(Canary {
            resync_by_highest: true,
            ..Canary::NONE
        }));
    }

    #[test]
    fn counting_joining_members_for_the_quorum_is_found() {
        assert!(is_found(Canary {
            joiner_counted: true,
            ..Canary::NONE
        }));
    }

    #[test]
    fn proposing_before_the_repairs_are_durable_is_found() {
        assert!(is_found(Canary {
            propose_before_repair: true,
            ..Canary::NONE
        }));
    }

    #[test]
    fn returning_reads_that_nobody_vouches_for_is_found() {
        let canary = Canary {
            unvouched_read: true,
            ..Canary::NONE
        };
        let limits = ReplicationLimits { canary, ..usual() };
        let story = || stories::a_holder_that_is_cut_off_from_a_quorum_reads_nothing_stale(limits);
        assert!(std::panic::catch_unwind(story).is_err());
    }

    #[test]
    fn going_on_when_fenced_is_found() {
        assert!(is_found(Canary {
            ignore_fenced: true,
            ..Canary::NONE
        }));
    }
}
