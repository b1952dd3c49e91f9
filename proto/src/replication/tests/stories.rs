//! Single cases, told in order.

use std::time::Duration;

use super::world::{Faults, World};
use super::{ReplicationLimits, tiny};
use crate::ids::ChunkIndex;
use crate::replication::{GroupPhase, Notice};
use crate::units::BlockRange;

fn range(start: u32, count: u32) -> BlockRange {
    BlockRange::new(ChunkIndex(0), start, count).unwrap()
}

fn attached(limits: ReplicationLimits) -> World {
    let mut world = World::new(1, Faults::default(), limits);
    let h = world.attach();
    for d in 0..3 {
        world.connect(h, d);
    }
    world.run_until("served", |world| {
        world.status(h).iter().all(|group| group.phase == GroupPhase::Serving)
    });
    world
}

#[test]
fn without_every_member_a_fresh_attachment_waits_and_says_for_whom() {
    let mut world = World::new(1, Faults::default(), tiny());
    let h = world.attach();
    world.connect(h, 0);
    world.connect(h, 1);
    world.submit(h, range(0, 1), true);
    let missing = world.devices[2].id;
    world.run_until("it says for whom it waits", |world| {
        world.notices.iter().any(|notice| {
            matches!(notice, Notice::Phase { phase: GroupPhase::Waiting, waits_for, .. } if *waits_for == [missing])
        })
    });
    world.pass(Duration::from_secs(60));
    assert!(!world.is_idle(h));
    world.connect(h, 2);
    world.run_until("the write is done", |world| world.is_idle(h));
}

#[test]
fn with_one_member_lost_no_write_waits_and_it_catches_up_when_it_is_back() {
    for limits in [tiny(), ReplicationLimits::DEFAULT] {
        let mut world = attached(limits);
        world.crash(2);
        for block in 0..6 {
            world.submit(0, range(block, 1), true);
            world.run_until("written", |world| world.is_idle(0));
        }
        assert!(!world.is_complete(0));
        world.restart(2);
        world.connect(0, 2);
        world.run_until("caught up", |world| world.is_complete(0));
        assert_eq!(world.devices[2].blocks.len(), 6);
        assert!(
            world
                .notices
                .iter()
                .any(|notice| matches!(notice, Notice::CaughtUp { .. }))
        );
        let status = &world.status(0)[0];
        assert_eq!(status.stable.seq().get(), 6, "everything is on all members again");
    }
}

#[test]
fn a_read_by_grant_asks_one_member_and_one_without_grants_asks_a_second() {
    let mut world = attached(ReplicationLimits::DEFAULT);
    world.submit(0, range(0, 1), true);
    world.run_until("written", |world| world.is_idle(0));
    world.pass(Duration::from_secs(5));
    world.submit(0, range(0, 1), false);
    world.run_until("read without grants", |world| world.is_idle(0));
    // Now both grants stand, and one answer is enough.
    world.disconnect(0, 2);
    world.submit(0, range(0, 1), false);
    world.run_until("read by grants", |world| world.is_idle(0));
}

#[test]
fn with_two_members_cut_off_a_read_waits_until_a_second_vouches() {
    let mut world = attached(ReplicationLimits::DEFAULT);
    world.disconnect(0, 1);
    world.disconnect(0, 2);
    world.pass(Duration::from_secs(5));
    world.submit(0, range(0, 1), false);
    for _ in 0..100 {
        world.pass(Duration::from_millis(100));
    }
    assert!(!world.is_idle(0), "one member alone proves nothing");
    world.connect(0, 1);
    world.run_until("vouched", |world| world.is_idle(0));
}

#[test]
fn a_released_volume_is_taken_over_without_waiting_for_grants() {
    let mut world = attached(ReplicationLimits::DEFAULT);
    world.submit(0, range(0, 2), true);
    world.run_until("written", |world| world.is_idle(0));
    assert!(world.release(0));
    let before = world.now;
    let h = world.attach();
    for d in 0..3 {
        world.connect(h, d);
    }
    world.run_until("served", |world| world.status(h)[0].phase == GroupPhase::Serving);
    assert!(world.now.saturating_since(before) < Duration::from_millis(100));
}
