//! Who holds what, and who is told of damage.

use cairn_proto::ids::{ChunkIndex, GroupId, GroupIndex, Layer, VolumeId};
use cairn_proto::message::{Damaged, Message};
use cairn_proto::units::BlockRange;

use super::support::*;

const GROUP: GroupId = GroupId {
    volume: VOLUME,
    index: GroupIndex(0),
};

fn run(start: u32) -> (GroupId, Layer, BlockRange) {
    (GROUP, Layer(0), BlockRange::new(ChunkIndex(0), start, 1).unwrap())
}

fn told(world: &mut World, conn: crate::host::ConnId) -> Option<Damaged> {
    match world.answer(conn) {
        Some((Message::Damaged(damaged), false)) => Some(damaged),
        None => None,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_holder_is_told_of_damage_again_and_again_until_there_is_none() {
    let mut world = World::new();
    let conn = world.take(3);
    world.pass(10_000);
    assert_eq!(told(&mut world, conn), None);
    world.host.store.damaged = (0..300).map(|block| run(block * 2)).collect();
    assert!(world.host.poll_timeout().is_some_and(|at| at <= world.now));
    for _ in 0..2 {
        world.pass(0);
        let (first, rest) = (told(&mut world, conn).unwrap(), told(&mut world, conn).unwrap());
        assert_eq!(
            (first.runs.len(), rest.runs.len()),
            (256, 44),
            "in messages of a bounded length"
        );
        assert_eq!((first.holder, first.group), (holder(3), GroupIndex(0)));
        assert_eq!(first.runs[1], (run(2).1, run(2).2));
        world.pass(1_000);
        assert_eq!(told(&mut world, conn), None, "not so soon");
        world.pass(1_000);
        while told(&mut world, conn).is_some() {}
        world.pass(2_000);
    }
    while told(&mut world, conn).is_some() {}
    world.host.store.damaged.clear();
    world.pass(10_000);
    assert_eq!(told(&mut world, conn), None);
}

#[test]
fn nobody_is_told_but_who_holds_the_volume_now() {
    let mut world = World::new();
    let stranger = world.peer();
    let older = world.take(3);
    let newer = world.peer();
    world.send(newer, seal(4));
    world.host.store.damaged = vec![run(5)];
    world.pass(2_000);
    assert_eq!(told(&mut world, older), None, "it is being fenced");
    world.store_ends();
    world.pass(2_000);
    assert!(matches!(world.answer(newer), Some((Message::Sealed(_), _))));
    assert!(told(&mut world, newer).is_some());
    assert_eq!((told(&mut world, older), told(&mut world, stranger)), (None, None));
    // One that has a capability of another volume only is not told either.
    world.host.store.damaged = vec![(
        GroupId {
            volume: VolumeId(8),
            ..GROUP
        },
        Layer(0),
        run(1).2,
    )];
    world.pass(2_000);
    while told(&mut world, newer).is_some_and(|damaged| damaged.holder.volume == VOLUME) {}
    assert_eq!(told(&mut world, newer), None);
    assert_eq!(world.host.status().damaged_volumes, [VolumeId(8)]);
}

#[test]
fn who_holds_a_volume_is_who_is_connected_with_its_newest_generation_and_has_not_released_it() {
    let mut world = World::new();
    let _stranger = world.peer();
    assert!(world.host.status().held.is_empty());
    let older = world.take(3);
    assert_eq!(world.host.status().held, [holder(3)]);
    let newer = world.peer();
    world.send(newer, seal(4));
    world.store_ends();
    world.pass(1_500);
    assert!(matches!(world.answer(newer), Some((Message::Sealed(_), _))));
    assert_eq!(
        world.host.status().held,
        [holder(4)],
        "the older one is fenced, though connected"
    );
    world.send(newer, release(4));
    assert!(world.host.status().held.is_empty());
    world.event(crate::host::HostEvent::Disconnected { conn: older });
    let back = world.take(5);
    assert_eq!(world.host.status().held, [holder(5)]);
    world.event(crate::host::HostEvent::Disconnected { conn: back });
    assert!(world.host.status().held.is_empty());
}
