//! Stories of blocks that members can't read any more.

use std::time::Duration;

use super::stories::{attached, range};
use super::world::World;
use super::{GROUPS, usual};
use crate::block::Content;
use crate::ids::GroupCount;
use crate::message::Message;
use crate::replication::{GroupPhase, Notice};

/// Attached, with eight blocks on all members.
fn written() -> World {
    let mut world = attached(usual());
    world.submit(0, range(0, 8), true);
    world.run_until("written on all", |world| {
        world.is_idle(0) && world.devices.iter().all(|device| device.blocks.len() == 8)
    });
    while world.deliver_any() {}
    world
}

fn is_damaged(world: &World, d: usize) -> bool {
    let mut held = world.devices[d].blocks.values();
    held.any(|held| held.state.content == Content::Damaged)
}

/// Everything reads well, and as it was written.
fn reads_well(world: &mut World, h: usize) {
    for block in 0..8 {
        world.submit(h, range(block, 1), false);
        world.run_until("read", |world| world.is_idle(h));
    }
    world.history.check().unwrap();
    assert!(!world.results.contains_key("damaged"), "{:?}", world.results);
}

/// Reads block 3 (rather than its status); says how many reads have found damage so far.
fn read_in_vain(world: &mut World) -> u64 {
    let reads = |world: &World| {
        let count = |name: &str| world.results.get(name).copied().unwrap_or(0);
        (count("read") + count("damaged"), count("damaged"))
    };
    let (before, _) = reads(world);
    while reads(world).0 == before {
        world.submit(0, range(3, 1), false);
        world.run_until("the read has ended", |world| world.is_idle(0));
    }
    reads(world).1
}

fn found_and_repaired(world: &World) -> (u64, u64) {
    let status = world.status(0);
    let sum = |count: fn(&crate::replication::GroupStatus) -> u64| status.iter().map(count).sum();
    (sum(|group| group.damage_found), sum(|group| group.damage_repaired))
}

#[test]
fn what_a_member_says_is_damaged_is_copied_from_another_one_and_counted_once() {
    let mut world = written();
    [2, 3, 6].into_iter().for_each(|block| world.rot(1, block));
    // It is said again before it can be repaired.
    world.tell_damage(0, 1);
    world.tell_damage(0, 1);
    world.run_until("repaired", |world| !is_damaged(world, 1) && world.is_complete(0));
    assert_eq!(found_and_repaired(&world), (3, 3));
    let told = |notice: &&Notice| matches!(notice, Notice::Damage { device, .. } if *device == world.devices[1].id);
    assert_eq!(world.notices.iter().filter(told).count(), 3);
    reads_well(&mut world, 0);
}

#[test]
fn until_it_is_repaired_a_damaged_block_is_not_read_from_its_member() {
    let mut world = written();
    world.rot(1, 2);
    world.tell_damage(0, 1);
    while world.deliver_back(0, 1) {}
    let lacking = |world: &World| {
        let device = world.devices[1].id;
        let groups = world.status(0);
        let mut members = groups.iter().flat_map(|group| &group.members);
        members.any(|member| member.device == device && member.lacking_blocks == 1 && !member.complete)
    };
    assert!(lacking(&world), "{:?}", world.status(0));
    for _ in 0..20 {
        world.submit(0, range(2, 1), false);
        world.run_until("read", |world| world.is_idle(0));
    }
    assert!(!world.results.contains_key("damaged"));
    assert_eq!(found_and_repaired(&world), (1, 1), "found by no read");
}

#[test]
fn two_members_that_have_lost_different_blocks_repair_each_other() {
    let mut world = written();
    world.crash(2);
    [1, 4].into_iter().for_each(|block| world.rot(0, block));
    [2, 5].into_iter().for_each(|block| world.rot(1, block));
    (0..2).for_each(|d| world.tell_damage(0, d));
    world.run_until("repaired", |world| !is_damaged(world, 0) && !is_damaged(world, 1));
    while world.deliver_any() {}
    assert_eq!(found_and_repaired(&world), (4, 4));
    reads_well(&mut world, 0);
}

#[test]
fn the_last_good_copy_repairs_both_others_also_when_it_was_away_for_a_moment() {
    let mut world = written();
    world.disconnect(0, 2);
    (0..2).for_each(|d| world.rot(d, 3));
    (0..2).for_each(|d| world.tell_damage(0, d));
    world.submit(0, range(3, 1), false);
    for _ in 0..5 {
        while world.deliver_any() {}
        world.pass(Duration::from_millis(20));
    }
    assert!(!world.is_idle(0), "the read waits for the good copy");
    assert!(world.meta.configs.iter().all(|config| config.in_sync.len() == 3));
    world.connect(0, 2);
    world.run_until("repaired", |world| {
        !is_damaged(world, 0) && !is_damaged(world, 1) && world.is_idle(0)
    });
    reads_well(&mut world, 0);
}

#[test]
fn what_is_damaged_on_all_in_sync_members_stays_damaged_and_an_older_copy_never_takes_its_place() {
    let mut world = written();
    let older = world.devices[2].blocks.values().nth(3).unwrap().state;
    world.crash(2);
    let ejected = |world: &World| world.meta.configs.iter().all(|config| config.in_sync.len() == 2);
    world.run_until("member 2 is ejected", |world| ejected(world));
    world.submit(0, range(3, 1), true);
    world.run_until("written anew", |world| world.is_idle(0));
    let newest = world.devices[0].blocks.values().nth(3).unwrap().state.version;
    assert!(newest > older.version);
    (0..2).for_each(|d| world.rot(d, 3));
    (0..2).for_each(|d| world.tell_damage(0, d));
    world.may_be_lost = true;
    for _ in 0..20 {
        while world.deliver_any() {}
        world.pass(Duration::from_millis(50));
        (0..2).for_each(|d| world.tell_damage(0, d));
    }
    assert_eq!(read_in_vain(&mut world), 1);
    // The member that has an older copy comes back, is admitted, and its copy is not taken for the newest.
    world.restart(2);
    world.connect(0, 2);
    world.run_until("member 2 is back", |world| world.is_complete(0));
    for _ in 0..10 {
        (0..2).for_each(|d| world.tell_damage(0, d));
        while world.deliver_any() {}
        world.pass(Duration::from_millis(100));
    }
    let phases = world.status(0);
    assert!(
        phases.iter().all(|group| group.phase == GroupPhase::Serving),
        "{phases:?}"
    );
    for d in 0..2 {
        let held = world.devices[d].blocks.values().nth(3).unwrap().state;
        assert_eq!((held.content, held.version), (Content::Damaged, newest));
    }
    assert_eq!(read_in_vain(&mut world), 2, "not the older content");
    assert_eq!(found_and_repaired(&world).1, 0);
    // Written anew it is good again.
    world.submit(0, range(3, 1), true);
    world.run_until("written", |world| world.is_idle(0) && world.is_complete(0));
    world.results.remove("damaged");
    reads_well(&mut world, 0);
    assert!((0..3).all(|d| !is_damaged(&world, d)));
}

#[test]
fn a_write_beside_the_repair_wins_whichever_comes_first() {
    for steps in 0..12 {
        let mut world = written();
        world.rot(1, 3);
        world.tell_damage(0, 1);
        for _ in 0..steps {
            world.deliver_any();
        }
        world.submit(0, range(2, 3), true);
        world.run_until("written", |world| world.is_idle(0) && world.is_complete(0));
        assert!(!is_damaged(&world, 1), "after {steps} steps");
        while world.deliver_any() {}
        let state = |d: usize| world.devices[d].blocks.values().nth(3).unwrap().state;
        assert!(state(0) == state(1) && state(1) == state(2));
        reads_well(&mut world, 0);
    }
}

#[test]
fn damage_that_nobody_has_told_is_found_by_the_next_attachment() {
    let mut world = written();
    world.rot(1, 3);
    assert!(world.release(0));
    let h = world.attach();
    (0..3).for_each(|d| world.connect(h, d));
    world.run_until("served", |world| world.is_complete(h));
    assert!(
        !is_damaged(&world, 1),
        "members list their damage when they are compared"
    );
    let found: u64 = world.status(h).iter().map(|group| group.damage_repaired).sum();
    assert_eq!(found, 1);
    reads_well(&mut world, h);
}

/// The next attachment, of which member 2 can't say what it holds.
fn attached_unlisted(meta_down: bool) -> (World, usize) {
    let mut world = written();
    world.devices[2].unlisted = true;
    assert!(world.release(0));
    let h = world.attach();
    world.meta.down = meta_down;
    (0..3).for_each(|d| world.connect(h, d));
    (world, h)
}

#[test]
fn a_member_that_can_not_say_what_it_holds_is_passed_over_and_comes_back_when_it_can() {
    let (mut world, h) = attached_unlisted(false);
    let began = world.now;
    world.submit(h, range(2, 4), true);
    world.run_until("the write is done", |world| world.is_idle(h));
    assert!(world.now.saturating_since(began) < Duration::from_secs(2));
    let damaged = world.devices[2].id;
    assert!(world.meta.configs.iter().all(|config| config.stale == [damaged]));
    let told = |notice: &Notice| matches!(notice, Notice::PassedOver { device, .. } if *device == damaged);
    assert!(world.notices.iter().any(told), "{:?}", world.notices);
    // It joins, leaves again, and does not keep the others from anything meanwhile.
    for _ in 0..200 {
        while world.deliver_any() {}
        world.pass(Duration::from_millis(100));
    }
    assert!(
        world
            .meta
            .configs
            .iter()
            .all(|config| !config.in_sync.contains(&damaged))
    );
    reads_well(&mut world, h);
    world.devices[2].unlisted = false;
    world.run_until("it is in sync again", |world| world.is_complete(h));
    assert!(world.meta.configs.iter().all(|config| config.in_sync.len() == 3));
    reads_well(&mut world, h);
}

#[test]
fn with_meta_away_a_member_that_can_not_say_what_it_holds_is_asked_again() {
    let (mut world, h) = attached_unlisted(true);
    world.submit(h, range(2, 4), true);
    for _ in 0..100 {
        while world.deliver_any() {}
        world.pass(Duration::from_millis(100));
    }
    assert!(!world.is_idle(h), "it can't be ejected");
    world.devices[2].unlisted = false;
    world.run_until("all three are compared", |world| world.is_idle(h));
    assert!(world.meta.configs.iter().all(|config| config.in_sync.len() == 3));
    reads_well(&mut world, h);
}

#[test]
fn a_member_that_takes_no_copies_any_more_is_ejected_after_a_while() {
    let mut world = written();
    world.rot(1, 3);
    world.devices[1].unlisted = true;
    world.tell_damage(0, 1);
    let damaged = world.devices[1].id;
    let groups = GroupCount::new(GROUPS).unwrap();
    let at = usize::from(groups.group_of(range(3, 1).chunk()).0);
    let began = world.now;
    world.run_until("it is ejected", |world| {
        !world.meta.configs[at].in_sync.contains(&damaged)
    });
    let waited = world.now.saturating_since(began);
    assert!(
        waited >= usual().eject_after && waited < usual().eject_after * 2,
        "{waited:?}"
    );
    let elsewhere = world.meta.configs.iter().enumerate().filter(|(g, _)| *g != at);
    assert!(elsewhere.into_iter().all(|(_, config)| config.in_sync.len() == 3));
    world.devices[1].unlisted = false;
    world.run_until("it is in sync again", |world| world.is_complete(0));
    assert!(!is_damaged(&world, 1));
    reads_well(&mut world, 0);
}

/// Whatever comes back from device `d` to the holder, with the bytes of reads spoilt; how many answers that were.
fn give_spoilt(world: &mut World, d: usize) -> usize {
    while world.deliver_to(0, d) {}
    let mut answers = world.hold_answers(0, d);
    let mut spoilt = 0;
    for (_, message, _) in &mut answers {
        if let Message::ReadAnswer(answer) = message
            && let Some(bytes) = answer.bytes.first_mut()
        {
            *bytes = vec![0xee; bytes.len()].into();
            spoilt += 1;
        }
    }
    world.give_answers(0, d, answers);
    while world.deliver_back(0, d) {}
    spoilt
}

#[test]
fn what_is_spoilt_on_the_way_is_asked_for_again_and_not_taken_for_damage() {
    let mut world = written();
    world.submit(0, range(3, 1), false);
    let spoilt: usize = (0..world.devices.len()).map(|d| give_spoilt(&mut world, d)).sum();
    assert_eq!(spoilt, 1, "it is asked of one member");
    world.run_until("read", |world| world.is_idle(0));
    world.history.check().unwrap();
    assert!(!world.results.contains_key("damaged"), "{:?}", world.results);
    assert_eq!(found_and_repaired(&world), (0, 0));
}

/// Bits flip on the ways from all members, again and again: nothing that they hold may be given up for that.
#[test]
fn copies_and_reads_that_are_spoilt_on_the_way_never_make_a_block_lost() {
    let mut world = written();
    world.rot(1, 3);
    world.tell_damage(0, 1);
    let mut spoilt = 0;
    for round in 0..60 {
        if round % 10 == 0 {
            world.submit(0, range(3, 1), false);
        }
        for d in 0..world.devices.len() {
            spoilt += give_spoilt(&mut world, d);
        }
        world.pass(Duration::from_millis(50));
    }
    assert!(spoilt > 20, "{spoilt} answers were spoilt");
    assert!(is_damaged(&world, 1), "no copy came through");
    world.run_until("repaired", |world| {
        world.is_idle(0) && !is_damaged(world, 1) && world.is_complete(0)
    });
    assert_eq!(found_and_repaired(&world), (1, 1));
    reads_well(&mut world, 0);
}
