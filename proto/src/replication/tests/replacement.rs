//! Members that are lost for good, and the copies to those that take their places.

use std::time::Duration;

use super::stories::{attached, range};
use super::usual;
use super::world::World;
use crate::replication::limits::PLACES_MAX;
use crate::replication::{MemberRole, Pace};

/// Kills a device and lets it be ejected from all groups.
pub(super) fn eject(world: &mut World, h: usize, d: usize) {
    world.crash(d);
    world.run_until("ejected", |world| {
        world
            .meta
            .configs
            .iter()
            .all(|config| config.in_sync.len() == 2 && !config.stale.is_empty())
    });
    // A write that it will miss.
    world.submit(h, range(0, 1), true);
    world.run_until("written", |world| world.is_idle(h));
}

/// An empty device takes its place, and the holder has heard of that.
pub(super) fn replace(world: &mut World, h: usize, d: usize) {
    world.replace(d);
    world.run_until("looked", |world| {
        let status = world.status(h);
        let epochs = status.iter().map(|group| group.epoch);
        epochs.eq(world.meta.configs.iter().map(|config| config.epoch))
    });
}

/// Writes blocks one by one.
fn write(world: &mut World, h: usize, blocks: std::ops::Range<u32>) {
    for block in blocks {
        world.submit(h, range(block, 1), true);
        world.run_until("written", |world| world.is_idle(h));
    }
}

fn copies(world: &World) -> u64 {
    world.arrived.get("Copy").copied().unwrap_or_default()
}

fn lacking(world: &World, h: usize) -> u64 {
    let status = world.status(h);
    let joining = status.iter().flat_map(|group| &group.members);
    joining
        .filter(|member| member.role == MemberRole::Joining)
        .map(|member| member.lacking_blocks)
        .sum()
}

#[test]
fn an_attachment_outlives_any_number_of_replacements() {
    let mut world = attached(usual());
    write(&mut world, 0, 0..8);
    for round in 0..2 * PLACES_MAX {
        let d = round % 3;
        eject(&mut world, 0, d);
        replace(&mut world, 0, d);
        world.connect(0, d);
        world.run_until("the new one is in sync", |world| world.is_complete(0));
        assert_eq!(world.devices[d].blocks.len(), 8, "round {round}");
    }
    world.check_convergence();
}

#[test]
fn copies_keep_the_pace_that_they_are_given_and_a_pause_stops_them() {
    let mut limits = usual();
    limits.copy_blocks = 1;
    let mut world = attached(limits);
    write(&mut world, 0, 0..40);
    eject(&mut world, 0, 2);
    replace(&mut world, 0, 2);
    world.pace(0, Pace::Paused);
    world.connect(0, 2);
    world.run_until("it is compared", |world| lacking(world, 0) == 40);
    for _ in 0..200 {
        while world.deliver_any() {}
        world.pass(Duration::from_millis(100));
    }
    assert_eq!(
        (copies(&world), lacking(&world, 0)),
        (0, 40),
        "nothing is copied in a pause"
    );
    world.pace(0, Pace::Blocks(2));
    let began = world.now;
    world.run_until("half of it is copied", |world| lacking(world, 0) == 20);
    let took = world.now.saturating_since(began);
    assert!(
        (8..=12).contains(&took.as_secs()),
        "20 blocks at 2 a second took {took:?}"
    );
    world.pace(0, Pace::Free);
    let began = world.now;
    world.run_until("all is copied", |world| world.is_complete(0));
    assert!(world.now.saturating_since(began) < Duration::from_secs(5));
    world.check_convergence();
}

#[test]
fn a_rebuild_that_is_taken_over_goes_on_with_what_was_copied() {
    let mut limits = usual();
    limits.copy_blocks = 1;
    let mut world = attached(limits);
    write(&mut world, 0, 0..40);
    eject(&mut world, 0, 2);
    replace(&mut world, 0, 2);
    world.pace(0, Pace::Blocks(2));
    world.connect(0, 2);
    world.run_until("half of it is copied", |world| {
        copies(world) >= 20 && lacking(world, 0) <= 20
    });
    // The holder dies in the middle of it; the next one takes over.
    world.abandon(0);
    let before = copies(&world);
    let h = world.attach();
    for d in 0..3 {
        world.connect(h, d);
    }
    world.run_until("the rebuild is done", |world| world.is_complete(h));
    let after = copies(&world) - before;
    assert!(
        after <= 24,
        "{before} blocks were copied before the take-over, and {after} after it"
    );
    world.check_convergence();
}
