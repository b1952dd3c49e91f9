//! Single cases, told in order.

use std::time::Duration;

use super::world::{Faults, World};
use super::{ReplicationLimits, tiny, usual};
use crate::block::Content;
use crate::ids::{ChunkIndex, Epoch, GroupIndex};
use crate::replication::{ConfigChange, GroupPhase, MemberRole, MemberStatus, MetaAsk, Notice};
use crate::units::BlockRange;

pub(super) fn range(start: u32, count: u32) -> BlockRange {
    BlockRange::new(ChunkIndex(0), start, count).unwrap()
}

pub(super) fn attached(limits: ReplicationLimits) -> World {
    attached_with(Faults::default(), limits)
}

pub(super) fn attached_with(faults: Faults, limits: ReplicationLimits) -> World {
    let mut world = World::new(1, faults, limits);
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
fn without_a_quorum_a_fresh_attachment_waits_and_says_for_whom() {
    let mut world = World::new(1, Faults::default(), tiny());
    let h = world.attach();
    world.connect(h, 0);
    world.submit(h, range(0, 1), true);
    for _ in 0..100 {
        while world.deliver_any() {}
        world.pass(Duration::from_secs(1));
    }
    assert!(!world.is_idle(h));
    let missing = [world.devices[1].id, world.devices[2].id];
    let told = world.notices.iter().any(
        |notice| matches!(notice, Notice::Phase { phase: GroupPhase::Sealing, waits_for, .. } if *waits_for == missing),
    );
    assert!(told, "{:?}", world.notices);
    world.connect(h, 2);
    world.run_until("the write is done", |world| world.is_idle(h));
}

#[test]
fn with_one_member_away_a_fresh_attachment_serves_within_half_a_second_and_fills_it_up_when_it_is_back() {
    let mut world = attached(usual());
    world.submit(0, range(0, 4), true);
    world.run_until("written", |world| world.is_idle(0));
    assert!(world.release(0));
    world.crash(2);
    let began = world.now;
    let h = world.attach();
    (0..3).for_each(|d| world.connect(h, d));
    world.submit(h, range(2, 4), true);
    world.run_until("the write is done", |world| world.is_idle(h));
    assert!(world.now.saturating_since(began) < Duration::from_millis(500));
    assert!(
        world
            .meta
            .configs
            .iter()
            .all(|config| config.stale == [world.devices[2].id])
    );
    world.restart(2);
    world.connect(h, 2);
    world.run_until("it is in sync again", |world| world.is_complete(h));
    assert!(world.meta.configs.iter().all(|config| config.in_sync.len() == 3));
    assert_eq!(world.devices[2].blocks.len(), 6);
}

/// Everybody has joined, and then this member takes nothing in any more, while its connection stands.
fn frozen_in_mid_comparison(d: usize) -> (World, usize) {
    let mut world = attached(usual());
    world.submit(0, range(0, 4), true);
    world.run_until("written", |world| world.is_idle(0));
    assert!(world.release(0));
    let h = world.attach();
    (0..3).for_each(|d| world.connect(h, d));
    world.run_until("compared", |world| {
        world
            .status(h)
            .iter()
            .all(|group| group.phase == GroupPhase::Reconciling)
    });
    world.frozen = Some(d);
    (world, h)
}

#[test]
fn a_member_that_falls_silent_in_mid_comparison_does_not_hold_up_the_others() {
    let (mut world, h) = frozen_in_mid_comparison(2);
    let began = world.now;
    world.submit(h, range(2, 4), true);
    world.run_until("the write is done", |world| world.is_idle(h));
    assert!(world.now.saturating_since(began) < Duration::from_secs(1));
    let silent = world.devices[2].id;
    assert!(world.meta.configs.iter().all(|config| config.stale == [silent]));
    let told = |notice: &Notice| matches!(notice, Notice::PassedOver { device, .. } if *device == silent);
    assert!(world.notices.iter().any(told), "{:?}", world.notices);
    world.frozen = None;
    world.run_until("it is in sync again", |world| world.is_complete(h));
    assert!(world.meta.configs.iter().all(|config| config.in_sync.len() == 3));
}

#[test]
fn with_meta_away_a_member_that_falls_silent_in_mid_comparison_is_waited_for() {
    let (mut world, h) = frozen_in_mid_comparison(2);
    world.meta.down = true;
    world.submit(h, range(2, 4), true);
    for _ in 0..100 {
        while world.deliver_any() {}
        world.pass(Duration::from_millis(100));
    }
    assert!(!world.is_idle(h), "it can't be ejected");
    world.frozen = None;
    let began = world.now;
    world.run_until("all three are compared", |world| world.is_idle(h));
    assert!(world.now.saturating_since(began) < Duration::from_secs(1));
    assert!(world.meta.configs.iter().all(|config| config.in_sync.len() == 3));
}

#[test]
fn with_meta_away_nobody_is_ejected_and_whoever_is_there_in_full_is_served() {
    let mut world = World::new(1, Faults::default(), usual());
    let h = world.attach();
    world.meta.down = true;
    world.connect(h, 0);
    world.connect(h, 1);
    world.submit(h, range(0, 1), true);
    for _ in 0..50 {
        while world.deliver_any() {}
        world.pass(Duration::from_secs(1));
    }
    assert!(!world.is_idle(h), "two of three are equal, and meta does not know it");
    world.connect(h, 2);
    world.run_until("all three are compared", |world| world.is_idle(h));
    assert!(world.meta.configs.iter().all(|config| config.epoch.0 == 1));
}

#[test]
fn a_write_that_nobody_was_told_of_gives_way_when_its_member_joins_again() {
    let mut world = attached(usual());
    world.submit(0, range(0, 1), true);
    world.run_until("written", |world| world.is_idle(0));
    // The second write reaches member 2 alone, with a higher version than any other.
    world.disconnect(0, 0);
    world.disconnect(0, 1);
    world.submit(0, range(0, 1), true);
    while world.deliver_any() {}
    let lonely = world.devices[2].blocks.values().next().unwrap().state;
    world.crash(2);
    let h = world.attach();
    (0..2).for_each(|d| world.connect(h, d));
    world.connect(h, 2);
    world.submit(h, range(0, 1), false);
    world.run_until("read", |world| world.is_idle(h));
    world.restart(2);
    world.connect(h, 2);
    world.run_until("it is in sync again", |world| world.is_complete(h));
    let held: Vec<_> = world
        .devices
        .iter()
        .map(|d| d.blocks.values().next().unwrap().state)
        .collect();
    assert!(
        held[0] == held[2] && held[0].version < lonely.version,
        "{held:?}, not {lonely:?}"
    );
}

pub(super) fn who_was_ejected_has_no_say_for_the_next_holder(limits: ReplicationLimits) {
    let mut world = attached(limits);
    world.submit(0, range(0, 1), true);
    world.run_until("written", |world| world.is_idle(0));
    (0..2).for_each(|d| world.disconnect(0, d));
    world.submit(0, range(0, 1), true);
    while world.deliver_any() {}
    world.crash(2);
    let second = world.attach();
    (0..3).for_each(|d| world.connect(second, d));
    for _ in 0..2 {
        world.submit(second, range(0, 1), false);
        world.run_until("the first write is read", |world| world.is_idle(second));
    }
    (0..2).for_each(|d| world.disconnect(second, d));
    world.restart(2);
    // Member 2 has the second write, which is not to be seen any more.
    let third = world.attach();
    (1..3).for_each(|d| world.connect(third, d));
    world.submit(third, range(0, 1), false);
    for _ in 0..20 {
        while world.deliver_any() {}
        world.pass(Duration::from_millis(100));
    }
    world.connect(third, 0);
    world.run_until("read again", |world| world.is_idle(third));
    world.history.check().unwrap();
}

#[test]
fn who_was_ejected_has_no_say() {
    who_was_ejected_has_no_say_for_the_next_holder(usual());
}

pub(super) fn a_holder_that_is_cut_off_from_a_quorum_reads_nothing_stale(limits: ReplicationLimits) {
    let mut world = attached(limits);
    world.submit(0, range(0, 1), true);
    world.run_until("written", |world| world.is_idle(0));
    world.pass(Duration::from_secs(5));
    // The first holder sees member 2 only, the second one all but that.
    (0..2).for_each(|d| world.disconnect(0, d));
    let h = world.attach();
    (0..3).for_each(|d| world.connect(h, d));
    world.disconnect(h, 2);
    world.submit(h, range(0, 1), true);
    world.run_until("written anew", |world| world.is_idle(h));
    world.submit(0, range(0, 1), false);
    for _ in 0..20 {
        while world.deliver_any() {}
        world.pass(Duration::from_millis(100));
    }
    assert!(!world.is_idle(0), "nobody but member 2 says that it may read");
    (0..2).for_each(|d| world.connect(0, d));
    world.run_until("fenced", |world| world.is_idle(0));
    assert_eq!(world.results["fenced"], 1);
    world.history.check().unwrap();
}

#[test]
fn a_holder_that_is_cut_off_from_a_quorum_reads_nothing() {
    a_holder_that_is_cut_off_from_a_quorum_reads_nothing_stale(usual());
}

#[test]
fn a_member_that_stays_away_is_ejected_while_writes_go_on() {
    let mut world = attached(usual());
    world.crash(2);
    for block in 0..40 {
        world.submit(0, range(block % 8, 1), true);
        world.run_until("written", |world| world.is_idle(0));
        world.pass(Duration::from_millis(50));
    }
    world.run_until("ejected", |world| {
        world.meta.configs.iter().all(|config| config.in_sync.len() == 2)
    });
    world.restart(2);
    world.connect(0, 2);
    for block in 0..400 {
        world.submit(0, range(block % 8, 1), true);
        world.run_until("written", |world| world.is_idle(0));
        world.pass(Duration::from_millis(10));
    }
    assert!(world.is_complete(0), "it has joined under load: {:#?}", world.status(0));
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

/// Member 2 was ejected and has just begun to join group 0, which both others serve; meta is away from then on.
pub(super) fn with_a_joiner() -> World {
    let mut world = attached(usual());
    world.submit(0, range(0, 1), true);
    world.run_until("written", |world| world.is_idle(0));
    world.crash(2);
    let is_out = |world: &World| world.meta.configs.iter().all(|config| config.in_sync.len() == 2);
    world.run_until("ejected", is_out);
    world.restart(2);
    world.connect(0, 2);
    world.run_until("it joins", |world| {
        let joiner = |member: &MemberStatus| member.role == MemberRole::Joining && member.joined;
        world.status(0)[0].members.iter().any(joiner)
    });
    world.meta.down = true;
    world
}

#[test]
fn what_a_member_answered_before_it_left_counts_for_nothing_when_it_joins_again() {
    let mut world = attached(usual());
    world.submit(0, range(0, 1), true);
    // Member 2 does both writes, and says so late. Of the second, member 1 says nothing either.
    let mut late = std::collections::VecDeque::new();
    while world.deliver_to(0, 2) {}
    late.extend(world.hold_answers(0, 2));
    world.pass(Duration::from_millis(1));
    world.run_until("written", |world| world.is_idle(0));
    world.pass(Duration::from_millis(700));
    world.submit(0, range(1, 1), true);
    while world.deliver_to(0, 2) || world.deliver_to(0, 1) {}
    late.extend(world.hold_answers(0, 2));
    let other = world.hold_answers(0, 1);
    assert!(late.len() >= 2 && !other.is_empty());
    world.run_until("ejected", |world| world.meta.configs[0].in_sync.len() == 2);
    // Out of the group it need not keep anything.
    world.devices[2].blocks.clear();
    world.run_until("it joins", |world| world.meta.configs[0].joining.len() == 1);
    world.give_answers(0, 2, late);
    let joiner = |world: &World| {
        world.status(0)[0]
            .members
            .iter()
            .find(|m| m.role == MemberRole::Joining)
            .cloned()
    };
    assert!(
        joiner(&world).is_some_and(|member| !member.complete),
        "nothing is known of it"
    );
    assert!(!world.is_idle(0), "what is under way was acknowledged by nobody since");
    world.give_answers(0, 1, other);
    assert!(world.is_idle(0), "with member 1 it is on a quorum");
    world.run_until("it is in sync again", |world| world.is_complete(0));
    assert_eq!(world.devices[2].blocks.len(), 2);
    world.history.check().unwrap();
}

#[test]
fn a_write_under_way_when_a_member_joins_goes_to_it_as_well() {
    let mut world = attached(usual());
    world.crash(2);
    let is_out = |world: &World| world.meta.configs.iter().all(|config| config.in_sync.len() == 2);
    world.run_until("ejected", is_out);
    // From here on member 1 is silent: the write can be acknowledged only when another member has it.
    world.submit(0, range(0, 1), true);
    world.disconnect(0, 1);
    world.restart(2);
    world.connect(0, 2);
    world.run_until("it has joined, been admitted, and has the write", |world| {
        world.is_idle(0)
    });
    assert!(world.meta.configs[0].in_sync.contains(&world.devices[2].id));
    world.history.check().unwrap();
}

#[test]
fn the_newest_copy_of_a_lost_block_is_not_overwritten_when_its_member_joins_again() {
    let damage = Faults {
        damage: true,
        ..Faults::default()
    };
    let mut world = attached_with(damage, usual());
    world.submit(0, range(0, 2), true);
    world.run_until("written", |world| world.is_idle(0));
    world.disconnect(0, 0);
    world.submit(0, range(0, 1), true);
    world.run_until("written anew on members 1 and 2", |world| world.is_idle(0));
    (0..3).for_each(|d| world.disconnect(0, d));
    let newest = world.devices[2].blocks.values().next().unwrap().state;
    let rotten = world.devices[1].blocks.values_mut().next().unwrap();
    assert_eq!(rotten.state, newest);
    rotten.state.content = Content::Damaged;
    world.crash(2);
    let h = world.attach();
    (0..2).for_each(|d| world.connect(h, d));
    world.run_until("two of three serve", |world| {
        world.status(h)[0].phase == GroupPhase::Serving
    });
    assert!(world.devices[0].blocks.values().next().unwrap().state.version < newest.version);
    world.restart(2);
    world.connect(h, 2);
    world.run_until("all are equal", |world| {
        let newest = |d: usize| world.devices[d].blocks.values().next().unwrap().state == newest;
        world.is_complete(h) && (0..3).all(newest)
    });
    world.submit(h, range(0, 2), false);
    world.run_until("read", |world| world.is_idle(h));
    world.history.check().unwrap();
}

#[test]
fn a_change_that_a_newer_holder_has_made_is_not_taken_for_ones_own() {
    let mut world = attached(usual());
    world.crash(2);
    let wanted = |world: &World| world.status(0).iter().any(|group| group.changing);
    world.run_until("meta has answered, and the ejection is wanted", wanted);
    // The same change, by who was granted the volume meanwhile.
    world.attach();
    let devices = [0, 1].map(|d| world.devices[d].id).to_vec();
    let change = |index: u8| ConfigChange {
        group: GroupIndex(index),
        epoch: Epoch(1),
        in_sync: devices.clone(),
        joining: Vec::new(),
    };
    let ask = MetaAsk::Change(vec![change(0), change(1)]);
    world.meta.answer(world.meta.generation, &ask);
    assert!(world.meta.configs.iter().all(|config| config.epoch == Epoch(2)));
    let is_over = |world: &World| world.status(0).iter().all(|group| group.phase == GroupPhase::Fenced);
    world.run_until("the older holder is over", is_over);
    assert!(world.status(0).iter().all(|group| group.epoch == Epoch(1)));
}

/// All devices hold the same of every block, and the whole chunk was not listed block by block to get there.
fn equal_by_few_copies(world: &World) {
    let states = |d: usize| {
        let blocks = world.devices[d].blocks.iter();
        blocks
            .map(|(key, held)| (*key, held.state))
            .collect::<std::collections::BTreeMap<_, _>>()
    };
    assert_eq!(states(0), states(1));
    assert_eq!(states(0), states(2));
    let arrived = |name| world.arrived.get(name).copied().unwrap_or_default();
    let (copies, holes) = (arrived("Copy"), arrived("CopyHole"));
    assert!(
        (1..10).contains(&holes) && copies < 10 && arrived("Read") < 20,
        "{holes} holes, {copies} copies: {:?}",
        world.arrived
    );
}

#[test]
fn a_chunk_discarded_while_a_member_was_away_is_caught_up_with_as_one_hole() {
    for limits in [tiny(), usual()] {
        let mut world = attached(limits);
        world.submit(0, range(0, 4), true);
        world.run_until("written", |world| world.is_idle(0));
        world.disconnect(0, 2);
        world.discard(0, BlockRange::whole(ChunkIndex(0)));
        world.run_until("discarded", |world| world.is_idle(0));
        world.submit(0, range(700, 2), true);
        world.run_until("written", |world| world.is_idle(0));
        world.connect(0, 2);
        world.run_until("it has caught up", |world| world.is_complete(0));
        equal_by_few_copies(&world);
    }
}

#[test]
fn members_that_differ_by_a_discarded_chunk_are_repaired_by_one_hole_before_they_are_served() {
    for limits in [tiny(), usual()] {
        let mut world = attached(limits);
        world.submit(0, range(0, 4), true);
        world.run_until("written", |world| world.is_idle(0));
        world.disconnect(0, 2);
        world.discard(0, BlockRange::whole(ChunkIndex(0)));
        world.run_until("discarded", |world| world.is_idle(0));
        assert!(world.release(0));
        let h = world.attach();
        (0..3).for_each(|d| world.connect(h, d));
        world.submit(h, range(3, 1), false);
        world.run_until("read", |world| world.is_idle(h));
        world.run_until("they are equal", |world| world.is_complete(h));
        equal_by_few_copies(&world);
    }
}

#[test]
fn a_discard_of_a_chunk_that_nobody_was_told_of_gives_way_as_a_hole_when_its_member_joins_again() {
    for limits in [tiny(), usual()] {
        let mut world = attached(limits);
        world.submit(0, range(0, 2), true);
        world.run_until("written", |world| world.is_idle(0));
        world.disconnect(0, 0);
        world.disconnect(0, 1);
        world.discard(0, BlockRange::whole(ChunkIndex(0)));
        while world.deliver_any() {}
        assert_eq!(world.devices[2].blocks.len(), 16384, "it has the discard alone");
        world.crash(2);
        let h = world.attach();
        (0..2).for_each(|d| world.connect(h, d));
        world.submit(h, range(0, 1), false);
        world.run_until("read", |world| world.is_idle(h));
        world.restart(2);
        world.connect(h, 2);
        world.run_until("it is in sync again", |world| world.is_complete(h));
        assert_eq!(
            world.devices[2].blocks.len(),
            2,
            "what was never written elsewhere is gone"
        );
        equal_by_few_copies(&world);
    }
}

/// A member is lost, and nobody knows yet, when another one has been away for long enough to be ejected. With `I` made of the
/// lost one and the last nobody could serve the group, though the one that was away comes back.
#[test]
fn nobody_is_ejected_while_those_that_would_be_left_do_not_answer() {
    let mut world = attached(usual());
    world.submit(0, range(0, 4), true);
    world.run_until("written", |world| world.is_idle(0));
    while world.deliver_any() {}
    world.crash(2);
    // Until just before it would be ejected, the others answer.
    let eject_after = usual().eject_after;
    for _ in 0..9 {
        world.pass(eject_after / 10);
        while world.deliver_any() {}
    }
    // From now on member 0 is silent. Member 1 alone is heard.
    let all = |world: &World| world.meta.configs.iter().all(|config| config.in_sync.len() == 3);
    assert!(all(&world));
    for _ in 0..20 {
        world.pass(eject_after / 10);
        while world.deliver_to(0, 1) || world.deliver_back(0, 1) || world.deliver_meta(0) {}
        assert!(all(&world), "{:?}", world.meta.configs);
    }
    // It is gone for good; the one that was away comes back, and the group is served.
    world.crash(0);
    world.restart(2);
    world.connect(0, 2);
    world.submit(0, range(1, 1), true);
    world.run_until("served by the two that are left", |world| world.is_idle(0));
    world.history.check().unwrap();
}
