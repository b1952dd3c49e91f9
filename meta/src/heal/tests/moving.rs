//! Copies that are to be elsewhere: nodes that are emptied, and devices that have moved.

use super::*;
use crate::state::Refusal;

fn drain(story: &mut Story, number: u8, drain: bool) -> Result<(), Refusal> {
    let command = DrainNode {
        node: NodeId(number.into()),
        drain,
        silent: vec![],
    };
    story.fixture.apply(command).map(drop)
}

/// The holder lets who is to take a place join, and then exchanges the two.
fn exchange(story: &mut Story) {
    let number = |device: &DeviceId| device.uuid.0[0];
    let group = story.group();
    let moving = group.moving.expect("a copy moves");
    let before: Vec<u8> = group.in_sync.iter().map(number).collect();
    story.configure(&before, &[number(&moving.to)]);
    assert!(story.group().moving.is_some(), "it is not done yet");
    let mut after: Vec<u8> = before.into_iter().filter(|n| *n != number(&moving.from)).collect();
    after.push(number(&moving.to));
    story.configure(&after, &[]);
}

fn left_on(story: &Story, number: u8) -> usize {
    story.fixture.0.copies_on(NodeId(number.into())).count()
}

#[test]
fn a_node_that_is_drained_loses_its_copies_one_by_one_and_gets_no_new_ones() {
    let mut story = Story::new();
    story.attach(1, false);
    drain(&mut story, 2, true).unwrap();
    drain(&mut story, 2, true).unwrap();
    assert_eq!(story.count(EventKind::NodeDraining), 1, "once is enough");
    story.pass_with(None, 2);
    let group = story.group();
    let moving = group.moving.clone().expect("its copy moves");
    assert_eq!((moving.from, moving.to), (device(2), device(4)));
    assert_eq!((group.in_sync.len(), group.stale), (3, vec![device(4)]));
    story.pass_with(None, 100);
    assert_eq!(story.group().epoch, group.epoch, "the rest is the holder's business");
    exchange(&mut story);
    assert_eq!(story.group().in_sync, [device(1), device(3), device(4)]);
    assert_eq!(
        (story.group().moving, left_on(&story, 2)),
        (None, 1),
        "stale, and named still"
    );
    story.pass_with(None, 2);
    assert_eq!((left_on(&story, 2), story.group().stale.len()), (0, 0));
    // The device is registered anew; the node stays as it is.
    let again = node("n2", [""; 3], vec![registration(device(2))]);
    story.fixture.apply(again).unwrap();
    for number in 0..8 {
        story.fixture.apply(create(&format!("w{number}"), GIB)).unwrap();
    }
    assert_eq!(left_on(&story, 2), 0, "nothing new is put there");
    drain(&mut story, 2, false).unwrap();
    story.fixture.apply(create("x", GIB)).unwrap();
    assert_eq!(left_on(&story, 2), 1);
}

#[test]
fn a_node_is_not_drained_where_its_copies_have_no_place() {
    let mut story = Story::new();
    for number in [4, 5] {
        drain(&mut story, number, true).unwrap();
    }
    let before = story.fixture.0.clone();
    let refusal = drain(&mut story, 2, true).unwrap_err();
    assert_eq!(refusal.code, cairn_proto::control::Code::NotEnoughDevices);
    assert!(
        refusal.message.contains("`v`") && refusal.message.contains("add a node"),
        "{refusal}"
    );
    assert!(story.fixture.0 == before, "nothing was changed");
    drain(&mut story, 4, false).unwrap();
    drain(&mut story, 2, true).unwrap();
}

#[test]
fn a_drain_that_is_ended_leaves_copies_where_they_are() {
    let mut story = Story::new();
    story.attach(1, false);
    drain(&mut story, 2, true).unwrap();
    story.pass_with(None, 2);
    assert!(story.group().moving.is_some());
    drain(&mut story, 2, false).unwrap();
    story.pass_with(None, 2);
    let group = story.group();
    assert_eq!(
        (group.moving, group.stale.len(), group.in_sync.contains(&device(2))),
        (None, 0, true)
    );
    assert_eq!(story.count(EventKind::Released), 1);
}

#[test]
fn who_takes_a_place_is_replaced_when_it_is_lost_and_nobody_moves_while_a_copy_is_missing() {
    let mut story = Story::new();
    story.attach(1, false);
    drain(&mut story, 2, true).unwrap();
    story.pass_with(None, 2);
    story.dies(4);
    story.pass_with(None, 70);
    let moving = story.group().moving.expect("it goes on");
    assert_eq!((moving.from, moving.to), (device(2), device(5)));
    exchange(&mut story);
    story.pass_with(None, 2);

    let mut story = Story::new();
    story.attach(1, false);
    story.dies(3);
    story.pass_with(None, 10);
    story.configure(&[1, 2], &[]);
    drain(&mut story, 2, true).unwrap();
    story.pass_with(None, 20);
    assert_eq!(story.group().moving, None, "the third copy comes first");
    story.pass_with(None, 50);
    assert_eq!((story.group().moving, story.group().stale), (None, vec![device(4)]));
    story.configure(&[1, 2], &[4]);
    story.configure(&[1, 2, 4], &[]);
    story.pass_with(None, 2);
    assert!(story.group().moving.is_some());
}

#[test]
fn a_volume_that_nobody_holds_is_moved_by_a_caretaker() {
    let mut story = Story::new();
    drain(&mut story, 2, true).unwrap();
    story.pass(3);
    assert!(story.group().moving.is_some() && story.keeper().is_some());
    let keeper = story.keeper().unwrap().0 as u8;
    story.attach(8, true);
    exchange(&mut story);
    story.detach(true);
    story.pass_with(Some(keeper), 3);
    assert_eq!((story.keeper(), left_on(&story, 2)), (None, 0));
}

/// Racks a, b and c.
fn in_racks(story: &mut Story) {
    for (number, rack) in [(1, "a"), (2, "b"), (3, "c"), (4, "c"), (5, "b")] {
        let domain = ["", rack, ""];
        let registered = node(&format!("n{number}"), domain, vec![registration(device(number))]);
        story.fixture.apply(registered).unwrap();
    }
}

#[test]
fn a_copy_that_stands_too_close_to_another_moves_to_where_there_is_room_and_stays_there() {
    let mut story = Story::new();
    in_racks(&mut story);
    story.attach(1, false);
    story.pass_with(None, 100);
    assert_eq!(story.group().moving, None, "a, b and c: as far apart as can be");
    // The device of rack c is put into a host of rack b, and there is still another one in c.
    let moved = node("n3", ["", "b", ""], vec![registration(device(3))]);
    story.fixture.apply(moved).unwrap();
    story.pass_with(None, SPREAD_LOOK_MS / 1000 + 1);
    let moving = story.group().moving.expect("rack c has room");
    assert!([device(2), device(3)].contains(&moving.from), "{moving:?}");
    assert_eq!(moving.to, device(4));
    exchange(&mut story);
    let epoch = story.group().epoch;
    story.pass_with(None, 200);
    assert_eq!(story.group().moving, None);
    assert_eq!(
        story.group().epoch.0,
        epoch.0 + 1,
        "the former one is let go, and that is all"
    );
    assert_eq!(story.count(EventKind::Moving), 1);
}

#[test]
fn copies_do_not_follow_a_device_that_goes_to_and_fro_and_wait_for_all_repairs() {
    let mut story = Story::new();
    in_racks(&mut story);
    story.attach(1, false);
    for round in 0..20 {
        let rack = if round % 2 == 0 { "b" } else { "c" };
        story.dies(3);
        story.pass_with(None, 8);
        let moved = node("n3", ["", rack, ""], vec![registration(device(3))]);
        story.fixture.apply(moved).unwrap();
        story.alive.push(3);
        story.pass_with(None, 20);
    }
    assert_eq!(story.count(EventKind::Moving), 0);
}

#[test]
fn copies_are_spread_while_a_node_stays_empty_for_as_long_as_its_operator_likes() {
    let mut story = Story::new();
    in_racks(&mut story);
    story.attach(1, false);
    story.pass_with(None, 100);
    drain(&mut story, 5, true).unwrap();
    let moved = node("n3", ["", "b", ""], vec![registration(device(3))]);
    story.fixture.apply(moved).unwrap();
    story.pass_with(None, SPREAD_LOOK_MS / 1000 + 1);
    assert_eq!(story.group().moving.map(|moving| moving.to), Some(device(4)));
}

#[test]
fn a_copy_that_is_to_move_when_the_caretaker_takes_all_for_done_gets_it_once_more() {
    let mut story = Story::new();
    drain(&mut story, 2, true).unwrap();
    story.pass(3);
    let keeper = story.keeper().expect("its copy moves").0 as u8;
    story.attach(8, true);
    exchange(&mut story);
    // Another copy is to move now; the caretaker has not looked since, and gives the volume back.
    drain(&mut story, 3, true).unwrap();
    story.pass_with(Some(keeper), 3);
    assert!(story.group().moving.is_some());
    story.detach(true);
    let given_back = story.fixture.0.volumes()[&VolumeId(1)].generation;
    story.pass(UNSETTLED_PAUSE_MS / 1000 + 1);
    let task = story.view.tasks.get(&VolumeId(1)).copied();
    assert_eq!(
        task.map(|task| task.generation_seen),
        Some(given_back),
        "it is told anew"
    );
}
