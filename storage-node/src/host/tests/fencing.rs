use cairn_proto::capability::{Capability, ClusterKey, Rights};
use cairn_proto::disk::DiskError;
use cairn_proto::ids::*;
use cairn_proto::message::*;

use super::support::*;
use crate::host::*;
use crate::store::api::{StoreError, StoreRequest};

fn is_seal(request: &StoreRequest) -> bool {
    matches!(request, StoreRequest::Seal { .. })
}

#[test]
fn a_seal_is_answered_when_it_is_durable_and_not_before() {
    let mut world = World::new();
    let conn = world.peer();
    assert_eq!(world.ask(conn, seal(1)), None);
    assert_eq!(kind(world.ask(conn, read(1))), Some(FailureKind::NotSealed));
    world.store_ends();
    let sealed = Message::Sealed(Sealed { holder: holder(1) });
    assert_eq!(world.answer(conn), Some((sealed, true)));
}

#[test]
fn a_seal_without_a_valid_capability_is_refused_and_fences_nobody() {
    let mut world = World::new();
    let owner = world.take(1);
    let stranger = world.peer();
    let other_key = ClusterKey([8; 32]);
    let capability = Capability::grant(&other_key, CLUSTER, VOLUME, holder(9).generation, Rights::Write);
    let answer = world.ask(stranger, Message::Seal(Seal { capability }));
    assert_eq!(kind(answer), Some(FailureKind::Unauthorized));
    assert!(matches!(world.ask(owner, confirm(1)), Some(Message::Confirmed(_))));
    let zero = Capability::grant(&KEY, CLUSTER, VOLUME, Generation::NONE, Rights::Write);
    let answer = world.ask(stranger, Message::Seal(Seal { capability: zero }));
    assert_eq!(kind(answer), Some(FailureKind::Unauthorized));
}

#[test]
fn a_connection_that_has_shown_no_capability_reaches_nothing() {
    let mut world = World::new();
    world.take(1);
    let stranger = world.peer();
    for message in [read(1), write(1, 1, WriteData::Zero), join(1), confirm(1), release(1)] {
        let name = message.name();
        assert_eq!(
            kind(world.ask(stranger, message)),
            Some(FailureKind::NotSealed),
            "{name}"
        );
    }
}

#[test]
fn a_capability_to_read_is_none_to_write() {
    let mut world = World::new();
    let conn = world.peer();
    let capability = Capability::grant(&KEY, CLUSTER, VOLUME, holder(1).generation, Rights::Read);
    world.send(conn, Message::Seal(Seal { capability }));
    world.store_ends();
    assert!(matches!(world.answer(conn), Some((Message::Sealed(_), _))));
    assert!(matches!(world.ask(conn, confirm(1)), Some(Message::Confirmed(_))));
    let answer = world.ask(conn, write(1, 1, WriteData::Zero));
    assert_eq!(kind(answer), Some(FailureKind::Unauthorized));
    assert_eq!(kind(world.ask(conn, join(1))), Some(FailureKind::Unauthorized));
}

#[test]
fn every_request_of_a_lower_generation_is_refused() {
    let mut world = World::new();
    let old = world.take(1);
    assert!(matches!(world.ask(old, release(1)), Some(Message::Released(_))));
    let new = world.take(2);
    let collect = Message::Collect(Collect {
        holder: holder(1),
        group: GroupIndex(0),
        from: Default::default(),
        to: cairn_proto::block::Cursor::END,
        above: Version::ZERO,
    });
    let copy = Message::Copy(Copy {
        holder: holder(1),
        group: GroupIndex(0),
        layer: Layer(0),
        range: range(0, 1),
        source: CopySource::Resync,
        blocks: vec![cairn_proto::block::BlockState::ABSENT],
        bytes: Default::default(),
    });
    let write = write(1, 1, WriteData::Zero);
    for message in [read(1), write, join(1), confirm(1), seal(1), collect, copy] {
        let name = message.name();
        let answer = world.ask(old, message);
        let fenced = Message::Failed(Failed::fenced(holder(2).generation));
        assert_eq!(answer, Some(fenced), "{name}");
    }
    assert!(matches!(world.ask(new, confirm(2)), Some(Message::Confirmed(_))));
    assert_eq!(kind(world.ask(new, confirm(3))), Some(FailureKind::NotSealed));
}

#[test]
fn a_seal_waits_until_the_grant_of_the_older_holder_has_run_out() {
    let mut world = World::new();
    let old = world.take(1);
    world.pass(400);
    assert!(matches!(world.ask(old, confirm(1)), Some(Message::Confirmed(_))));
    let new = world.peer();
    world.send(new, seal(2));
    world.store_ends();
    assert_eq!(
        world.answer(new),
        None,
        "it is durable, and the old holder may still read"
    );
    assert_eq!(kind(world.ask(old, read(1))), Some(FailureKind::Fenced));
    world.pass(999);
    assert_eq!(world.answer(new), None);
    assert_eq!(world.host.poll_timeout(), Some(world.now + Duration::from_millis(1)));
    world.pass(1);
    assert!(matches!(world.answer(new), Some((Message::Sealed(_), true))));
}

#[test]
fn a_release_lets_the_next_holder_in_at_once_also_when_it_waits_already() {
    let mut world = World::new();
    let old = world.take(1);
    let new = world.peer();
    world.send(new, seal(2));
    world.store_ends();
    assert_eq!(world.answer(new), None);
    assert!(matches!(world.ask(old, release(1)), Some(Message::Released(_))));
    assert!(matches!(world.answer(new), Some((Message::Sealed(_), true))));
}

#[test]
fn a_connection_that_breaks_without_a_release_still_has_its_grant() {
    let mut world = World::new();
    let old = world.take(1);
    world.event(HostEvent::Disconnected { conn: old });
    let new = world.peer();
    world.send(new, seal(2));
    world.store_ends();
    assert_eq!(world.answer(new), None);
    world.pass(1000);
    assert!(matches!(world.answer(new), Some((Message::Sealed(_), true))));
}

#[test]
fn a_write_that_was_accepted_ends_before_the_next_seal_is_answered() {
    let mut world = World::new();
    let old = world.take(1);
    world.send(old, write(1, 1, WriteData::Zero));
    world.pass(2000);
    let new = world.peer();
    world.send(new, seal(2));
    world.store_ends_only(is_seal);
    assert_eq!(world.answer(new), None, "the write may still show");
    world.store_ends();
    assert!(matches!(world.answer(old), Some((Message::Durable(_), false))));
    assert!(matches!(world.answer(new), Some((Message::Sealed(_), true))));
}

#[test]
fn what_still_waits_for_the_store_when_a_seal_comes_is_refused() {
    let mut config = config();
    config.limits.store_requests = 1;
    let mut world = World::with(config, Default::default());
    let old = world.take(1);
    world.send(old, write(1, 1, WriteData::Zero));
    world.send(old, write(1, 2, WriteData::Zero));
    world.send(old, read(1));
    let new = world.peer();
    world.send(new, seal(2));
    for _ in 0..2 {
        let answer = world.answer(old).map(|(message, _)| message);
        assert_eq!(kind(answer), Some(FailureKind::Fenced));
    }
    world.store_ends();
    assert!(matches!(world.answer(old), Some((Message::Durable(_), false))));
    assert_eq!(world.answer(old), None);
}

#[test]
fn a_read_that_is_fenced_while_the_store_is_at_it_returns_nothing() {
    let mut world = World::new();
    let old = world.take(1);
    world.send(old, read(1));
    let new = world.peer();
    world.send(new, seal(2));
    world.store_ends();
    let answer = world.answer(old).map(|(message, _)| message);
    assert_eq!(kind(answer), Some(FailureKind::Fenced));
}

#[test]
fn of_two_seals_that_wait_only_the_higher_one_is_let_in() {
    let mut world = World::new();
    world.take(1);
    let (second, third) = (world.peer(), world.peer());
    world.send(second, seal(2));
    world.send(third, seal(3));
    let answer = world.answer(second).map(|(message, _)| message);
    assert_eq!(kind(answer), Some(FailureKind::Fenced));
    world.store_ends();
    world.pass(1000);
    assert!(matches!(world.answer(third), Some((Message::Sealed(_), true))));
}

#[test]
fn after_a_restart_a_known_volume_waits_for_a_grant_and_a_new_one_does_not() {
    let mut store = HeldStore::default();
    store.seals.insert(VOLUME, holder(2).generation);
    let mut world = World::with(config(), store);
    let conn = world.peer();
    assert_eq!(kind(world.ask(conn, seal(1))), Some(FailureKind::Fenced));
    world.send(conn, seal(2));
    assert!(world.host.store.asked.is_empty(), "it is durable already");
    assert_eq!(world.answer(conn), None);
    let capability = Capability::grant(&KEY, CLUSTER, VolumeId(8), holder(1).generation, Rights::Write);
    world.send(conn, Message::Seal(Seal { capability }));
    world.store_ends();
    assert!(matches!(world.answer(conn), Some((Message::Sealed(sealed), _)) if sealed.holder.volume == VolumeId(8)));
    world.pass(1000);
    assert!(matches!(world.answer(conn), Some((Message::Sealed(sealed), _)) if sealed.holder.volume == VOLUME));
}

#[test]
fn a_seal_that_cannot_be_made_durable_is_refused_and_can_be_asked_again() {
    let mut world = World::new();
    let conn = world.peer();
    world.send(conn, seal(1));
    world.store_fails(StoreError::NoSpace);
    let answer = world.answer(conn).map(|(message, _)| message);
    assert_eq!(kind(answer), Some(FailureKind::NoSpace));
    world.send(conn, seal(1));
    world.store_ends();
    assert!(matches!(world.answer(conn), Some((Message::Sealed(_), true))));
}

#[test]
fn a_device_that_has_failed_answers_no_seal_because_what_was_under_way_may_still_show() {
    let mut world = World::new();
    let old = world.take(1);
    world.send(old, write(1, 1, WriteData::Zero));
    world.pass(2000);
    let new = world.peer();
    world.send(new, seal(2));
    world.store_ends_only(is_seal);
    assert_eq!(world.answer(new), None);
    world.store_fails(StoreError::Poisoned(DiskError { errno: 5 }));
    for conn in [old, new] {
        let answer = world.answer(conn).map(|(message, _)| message);
        assert_eq!(kind(answer), Some(FailureKind::DeviceFailed));
    }
    assert_eq!(kind(world.ask(new, seal(2))), Some(FailureKind::DeviceFailed));
    world.pass(5000);
    assert_eq!(world.answer(new), None);
    assert!(world.host.status().failed.is_some());
}

#[test]
fn a_pong_grants_nothing_because_it_does_not_say_for_which_volume() {
    let mut world = World::new();
    let conn = world.take(1);
    world.send(conn, Message::Ping(Empty));
    assert_eq!(world.answer(conn), Some((Message::Pong(Empty), false)));
}

#[test]
fn a_connection_holds_a_bounded_number_of_volumes_and_those_that_are_over_make_room() {
    let mut config = config();
    config.limits.volumes_per_connection = 1;
    let mut world = World::with(config, Default::default());
    let conn = world.take(1);
    let capability = Capability::grant(&KEY, CLUSTER, VolumeId(8), holder(1).generation, Rights::Write);
    let other = Message::Seal(Seal { capability });
    assert_eq!(kind(world.ask(conn, other.clone())), Some(FailureKind::TooManyInFlight));
    let newer = world.peer();
    world.send(newer, seal(2));
    assert_eq!(world.ask(conn, other), None);
    world.store_ends();
    assert!(matches!(world.answer(conn), Some((Message::Sealed(_), true))));
}

#[cfg(feature = "canary")]
mod canaries {
    use super::*;

    fn planted(canary: Canary) -> World {
        let mut config = config();
        config.canary = canary;
        World::with(config, Default::default())
    }

    #[test]
    fn each_planted_bug_shows() {
        let mut world = planted(Canary::SealNotDurable);
        let conn = world.peer();
        assert!(matches!(world.ask(conn, seal(1)), Some(Message::Sealed(_))));

        let mut world = planted(Canary::GrantIgnored);
        world.take(1);
        world.take(2);

        let mut world = planted(Canary::GenerationIgnored);
        let old = world.take(1);
        world.pass(2000);
        world.take(2);
        world.send(old, write(1, 1, WriteData::Zero));
        world.store_ends();
        assert!(matches!(world.answer(old), Some((Message::Durable(_), _))));

        let mut world = planted(Canary::WritesOvertakeSeal);
        let old = world.take(1);
        world.send(old, write(1, 1, WriteData::Zero));
        world.pass(2000);
        let new = world.peer();
        world.send(new, seal(2));
        world.store_ends_only(is_seal);
        assert!(matches!(world.answer(new), Some((Message::Sealed(_), _))));
    }
}
