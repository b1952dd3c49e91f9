//! Stories of copies that go from node to node.

use std::time::Duration;

use super::replacement::{eject, replace};
use super::stories::{attached_with, range};
use super::usual;
use super::world::{Faults, World};
use crate::block::Content;
use crate::ids::Generation;
use crate::replication::{Notice, ReplicationLimits};

fn attached(limits: ReplicationLimits) -> World {
    let faults = Faults {
        fetch: true,
        ..Faults::default()
    };
    attached_with(faults, limits)
}

fn count(world: &World, name: &str) -> u64 {
    world.arrived.get(name).copied().unwrap_or_default()
}

fn write(world: &mut World, blocks: std::ops::Range<u32>) {
    for block in blocks {
        world.submit(0, range(block, 1), true);
        world.run_until("written", |world| world.is_idle(0));
    }
}

/// Three members with eight blocks; then the last is away for a moment, and blocks 2 to 5 are written.
fn behind(limits: ReplicationLimits) -> World {
    let mut world = attached(limits);
    write(&mut world, 0..8);
    while world.deliver_any() {}
    world.disconnect(0, 2);
    write(&mut world, 2..6);
    while world.deliver_any() {}
    world
}

/// The last member is back, and has been asked to read from another one; whom.
fn asked(world: &mut World) -> usize {
    world.connect(0, 2);
    while world.fetches.is_empty() {
        assert!(
            (0..3).any(|d| world.deliver_back(0, d) || world.deliver_to(0, d)),
            "it is asked to read"
        );
    }
    let from = world.fetches[0].fetch.from;
    world.devices.iter().position(|device| device.id == from).unwrap()
}

fn is_equal(world: &World) -> bool {
    let states = |d: usize| world.devices[d].blocks.values().map(|held| held.state);
    states(0).eq(states(1)) && states(1).eq(states(2))
}

fn reads_well(world: &mut World) {
    for block in 0..8 {
        world.submit(0, range(block, 1), false);
        world.run_until("read", |world| world.is_idle(0));
    }
    world.history.check().unwrap();
}

fn caught_up(world: &mut World) {
    world.run_until("it has caught up", |world| {
        world.is_complete(0) && world.fetches.is_empty()
    });
    assert!(is_equal(world));
    reads_well(world);
}

#[test]
fn a_member_that_was_away_reads_what_it_lacks_from_another_one() {
    let mut world = behind(usual());
    asked(&mut world);
    caught_up(&mut world);
    assert!(count(&world, "fetched") > 0);
    assert_eq!(count(&world, "Copy"), 0, "nothing goes through the coordinator");
}

#[test]
fn a_new_member_is_filled_from_node_to_node_while_others_write() {
    let mut world = attached(ReplicationLimits {
        copy_blocks: 2,
        ..usual()
    });
    write(&mut world, 0..40);
    eject(&mut world, 0, 2);
    replace(&mut world, 0, 2);
    world.connect(0, 2);
    let mut written = 0;
    world.run_until("it is in sync", |world| {
        world.is_complete(0) || !world.fetches.is_empty()
    });
    while !world.is_complete(0) {
        if world.is_idle(0) {
            world.submit(0, range(written % 40, 3), true);
            written += 7;
        }
        for _ in 0..4 {
            world.deliver_any();
        }
        world.pass(Duration::from_millis(1));
    }
    world.run_until("all has ended", |world| world.is_idle(0) && world.is_complete(0));
    assert!(count(&world, "fetched") >= 10 && written > 7, "{:?}", world.arrived);
    assert_eq!(count(&world, "Copy"), 0);
    world.check_convergence();
    world.history.check().unwrap();
}

#[test]
fn damage_at_the_source_is_seen_by_the_coordinator_itself_and_repaired_on_both() {
    let mut world = behind(usual());
    let source = asked(&mut world);
    world.rot(source, 3);
    caught_up(&mut world);
    let repaired: u64 = world.status(0).iter().map(|group| group.damage_repaired).sum();
    assert_eq!(repaired, 1);
    assert!(world.devices.iter().all(|device| {
        let mut held = device.blocks.values();
        held.all(|held| held.state.content != Content::Damaged)
    }));
}

#[test]
fn where_one_member_can_not_reach_the_other_copies_go_through_the_coordinator_and_it_is_tried_again_later() {
    let limits = ReplicationLimits {
        copy_blocks: 1,
        ..usual()
    };
    let mut world = behind(limits);
    (0..2).for_each(|d| {
        world.cut.insert((d, 2));
    });
    asked(&mut world);
    caught_up(&mut world);
    assert_eq!((count(&world, "Copy"), count(&world, "fetched")), (4, 0));
    let told = |notice: &&Notice| matches!(notice, Notice::NotFetched { .. });
    assert_eq!(world.notices.iter().filter(told).count(), 1, "once, not for each copy");
    // It is remembered for a while.
    let before = count(&world, "Fetch");
    world.disconnect(0, 2);
    write(&mut world, 2..6);
    world.connect(0, 2);
    caught_up(&mut world);
    let later = count(&world, "Fetch");
    assert!(
        later <= before + 1,
        "{later} and {before}: the other source may be tried"
    );
    world.cut.clear();
    world.pass(limits.fetch_pause * 2);
    world.disconnect(0, 2);
    write(&mut world, 2..6);
    world.connect(0, 2);
    caught_up(&mut world);
    assert!(count(&world, "fetched") > 0);
}

#[test]
fn a_source_that_is_frozen_holds_nothing_for_ever() {
    let mut world = behind(usual());
    let source = asked(&mut world);
    world.frozen = Some(source);
    for _ in 0..600 {
        while world.deliver_any() {}
        world.pass(Duration::from_millis(10));
    }
    assert!(world.fetches.is_empty());
    world.frozen = None;
    caught_up(&mut world);
}

/// The source goes and comes back between the question and the answer: what was read there may be older than what was
/// acknowledged, so it counts for nothing, and nothing else is begun before the answer has come.
#[test]
fn what_was_read_from_a_source_that_was_lost_meanwhile_does_not_count() {
    let mut world = behind(usual());
    let source = asked(&mut world);
    let lacking = |world: &World| {
        let groups = world.status(0);
        let members = groups.iter().flat_map(|group| &group.members);
        members.map(|member| member.lacking_blocks).sum::<u64>()
    };
    // It has read and written, and its answer is on its way.
    while !world.fetches.is_empty() {
        world.go_on_fetching(0);
    }
    let answers = world.hold_answers(0, 2);
    assert!(!answers.is_empty());
    world.disconnect(0, source);
    world.give_answers(0, 2, answers);
    assert_eq!(lacking(&world), 4, "as if nothing had come");
    world.connect(0, source);
    caught_up(&mut world);
}

#[test]
fn a_source_that_was_started_anew_gives_nothing_that_counts() {
    let mut world = behind(usual());
    let source = asked(&mut world);
    world.devices[source].restart(world.now);
    world.devices[source].commit += 1;
    let failed = count(&world, "Copy");
    world.run_until("the rest goes through the coordinator", |world| {
        count(world, "Copy") > failed
    });
    assert_eq!(count(&world, "fetched"), 0);
    world.disconnect(0, source);
    world.connect(0, source);
    caught_up(&mut world);
}

#[test]
fn nothing_is_written_for_a_holder_that_was_superseded_while_it_was_fetched() {
    let mut world = behind(usual());
    let source = asked(&mut world);
    let before: Vec<_> = world.devices[2].blocks.values().map(|held| held.state).collect();
    world.go_on_fetching(0);
    assert!(world.fetches[0].copy.is_some(), "it has been read from {source}");
    world.devices[2].seal = Generation::new(2).unwrap();
    world.go_on_fetching(0);
    let after: Vec<_> = world.devices[2].blocks.values().map(|held| held.state).collect();
    assert_eq!(before, after);
    while world.deliver_back(0, 2) {}
    assert!(
        world
            .notices
            .iter()
            .any(|notice| matches!(notice, Notice::Fenced { .. })),
        "the holder hears of it"
    );
}

/// Until a group is served its members are waited for, and who holds it up must be seen at once: no copy of that time is a
/// matter between two members.
#[test]
fn before_a_group_is_served_the_coordinator_copies_itself() {
    let mut world = behind(usual());
    world.connect(0, 2);
    world.abandon(0);
    world.fetches.clear();
    let h = world.attach();
    (0..3).for_each(|d| world.connect(h, d));
    world.run_until("served", |world| world.is_complete(h));
    assert!(is_equal(&world));
    assert_eq!(count(&world, "Fetch"), 0);
    assert!(count(&world, "Copy") > 0);
}
