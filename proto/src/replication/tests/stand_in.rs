//! A device outside `I` stands in for a member that is missing at attach.

use std::time::Duration;

use super::stories::{range, with_a_joiner};
use super::world::World;
use crate::block::BlockState;
use crate::ids::DeviceId;
use crate::replication::{MemberRole, MemberStatus};

fn state(world: &World, d: usize, block: usize) -> BlockState {
    world.devices[d]
        .blocks
        .values()
        .nth(block)
        .expect("it has so many")
        .state
}

fn in_sync(world: &World, devices: &[usize]) -> bool {
    let devices: Vec<DeviceId> = devices.iter().map(|d| world.devices[*d].id).collect();
    let mut configs = world.meta.configs.iter();
    configs.all(|config| config.in_sync.len() == devices.len() && devices.iter().all(|id| config.in_sync.contains(id)))
}

fn go_on(world: &mut World, steps: u32) {
    for _ in 0..steps {
        while world.deliver_any() {}
        world.pass(Duration::from_millis(100));
    }
}

/// Member 2 joins, and nobody can admit it. Then another block is written, which only members 0 and 1 are told of.
fn with_a_joiner_that_lacks_a_block() -> World {
    let mut world = with_a_joiner();
    world.disconnect(0, 2);
    world.submit(0, range(1, 1), true);
    world.run_until("written", |world| world.is_idle(0));
    (0..2).for_each(|d| world.disconnect(0, d));
    world.meta.down = false;
    world
}

#[test]
fn who_was_ejected_and_is_back_stands_in_for_a_member_that_is_lost() {
    let mut world = with_a_joiner_that_lacks_a_block();
    world.crash(1);
    let h = world.attach();
    [0, 2].into_iter().for_each(|d| world.connect(h, d));
    world.submit(h, range(1, 1), false);
    world.submit(h, range(0, 1), true);
    world.run_until("served", |world| world.is_idle(h));
    assert!(in_sync(&world, &[0, 2]), "{:?}", world.meta.configs);
    world.history.check().unwrap();
    world.restart(1);
    world.connect(h, 1);
    world.run_until("all are members again", |world| in_sync(world, &[0, 1, 2]));
    world.run_until("equal", |world| world.is_complete(h));
}

#[test]
fn a_stale_device_is_taken_in_to_stand_in() {
    let mut world = with_a_joiner_that_lacks_a_block();
    world.crash(2);
    // Its joining ends, as it is away.
    let second = world.attach();
    (0..2).for_each(|d| world.connect(second, d));
    let out = |world: &World| world.meta.configs.iter().all(|config| config.joining.is_empty());
    world.run_until("it is stale", out);
    (0..2).for_each(|d| world.disconnect(second, d));
    world.crash(0);
    world.restart(2);
    let h = world.attach();
    (1..3).for_each(|d| world.connect(h, d));
    world.submit(h, range(1, 1), false);
    world.run_until("served", |world| world.is_idle(h));
    assert!(in_sync(&world, &[1, 2]), "{:?}", world.meta.configs);
    world.history.check().unwrap();
}

/// What a joiner gets while the base may rise can never undo what a late member brings.
#[test]
fn a_member_that_comes_late_is_compared_though_another_stands_in_for_it() {
    let mut world = with_a_joiner_that_lacks_a_block();
    // A write that nobody is told of is on member 1 alone.
    world.connect(0, 1);
    world.submit(0, range(1, 1), true);
    while world.deliver_any() {}
    world.disconnect(0, 1);
    let (newest, older) = (state(&world, 1, 1), state(&world, 0, 1));
    assert!(newest.version > older.version);
    let h = world.attach();
    // The joiner is made equal to member 0, and before it is admitted member 1 is there.
    world.meta.down = true;
    [0, 2].into_iter().for_each(|d| world.connect(h, d));
    world.run_until("it has what member 0 has", |world| {
        world.devices[2].blocks.len() == 2 && state(world, 2, 1) == older
    });
    world.meta.down = false;
    world.connect(h, 1);
    world.submit(h, range(1, 1), false);
    world.run_until("equal", |world| world.is_idle(h) && world.is_complete(h));
    assert!((0..3).all(|d| state(&world, d, 1) == newest), "the base has risen");
    world.history.check().unwrap();
}

/// The other way round: who stands in has something that nobody was told of, which has to give way. Once it does, who is missing has
/// no say any more, and is made equal as a joiner.
#[test]
fn what_nobody_was_told_of_gives_way_on_who_stands_in() {
    let mut world = with_a_joiner();
    // A write that nobody is told of reaches members 1 and 2.
    world.disconnect(0, 0);
    world.submit(0, range(0, 1), true);
    go_on(&mut world, 4);
    assert!(!world.is_idle(0));
    (1..3).for_each(|d| world.disconnect(0, d));
    let (newest, base) = (state(&world, 2, 0), state(&world, 0, 0));
    assert!(newest == state(&world, 1, 0) && newest.version > base.version);
    // The next holder hears member 0 alone, which is enough to complete the attachment of two, and member 2. As long as nobody can
    // be admitted, member 1 may bring it back.
    let h = world.attach();
    [0, 2].into_iter().for_each(|d| world.connect(h, d));
    go_on(&mut world, 30);
    assert_eq!(
        state(&world, 2, 0),
        newest,
        "a copy of the base as it was without member 1"
    );
    world.meta.down = false;
    world.run_until("it has given way", |world| state(world, 2, 0) == base);
    world.connect(h, 1);
    world.submit(h, range(0, 1), false);
    world.run_until("served", |world| world.is_idle(h));
    world.run_until("equal", |world| world.is_complete(h) && in_sync(world, &[0, 1, 2]));
    assert!((0..3).all(|d| state(&world, d, 0) == base));
    let joiner = |member: &MemberStatus| member.role == MemberRole::Joining;
    assert!(!world.status(h)[0].members.iter().any(joiner));
    world.history.check().unwrap();
}
