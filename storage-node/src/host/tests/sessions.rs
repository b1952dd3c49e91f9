use cairn_proto::block::{BlockState, Content};
use cairn_proto::buffer::BlockBuf;
use cairn_proto::checksum::{Checksum, range_checksums};
use cairn_proto::frame::FrameError;
use cairn_proto::ids::*;
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::message::*;

use super::support::*;
use crate::host::*;
use crate::store::api::StoreRequest;

/// The replica that a join makes, as it is reported.
fn held() -> HeldReplica {
    HeldReplica {
        group: GroupId {
            volume: VOLUME,
            index: GroupIndex(0),
        },
        epoch: Epoch(1),
    }
}

#[test]
fn a_hello_is_answered_with_the_device_s_own() {
    let mut world = World::new();
    let conn = world.connect();
    let Some(Message::Hello(mine)) = world.ask(conn, Message::Hello(hello())) else {
        panic!("no hello came back");
    };
    assert_eq!(
        (mine.cluster, mine.device, mine.recovered),
        (CLUSTER, DEVICE, CommitSeq(1))
    );
    assert_eq!(world.host.status().peers, 1);
}

#[test]
fn who_wants_another_cluster_device_or_version_is_told_and_closed() {
    let another_incarnation = DeviceId {
        incarnation: Incarnation(5),
        ..DEVICE
    };
    let cases = [
        (
            Hello {
                cluster: ClusterId([4; 16]),
                ..hello()
            },
            FailureKind::WrongCluster,
        ),
        (
            Hello {
                device: another_incarnation,
                ..hello()
            },
            FailureKind::WrongDevice,
        ),
        (
            Hello {
                version_min: 2,
                version_max: 3,
                ..hello()
            },
            FailureKind::VersionUnsupported,
        ),
    ];
    for (hello, expected) in cases {
        let mut world = World::new();
        let conn = world.connect();
        assert_eq!(kind(world.ask(conn, Message::Hello(hello))), Some(expected));
        assert!(matches!(world.closed[&conn], CloseReason::Refused(_)), "{expected:?}");
    }
}

#[test]
fn nothing_is_answered_before_the_hello() {
    let mut world = World::new();
    let conn = world.connect();
    assert_eq!(world.ask(conn, seal(1)), None);
    assert!(matches!(world.closed[&conn], CloseReason::Unexpected(_)));
    assert!(world.host.store.asked.is_empty());
}

#[test]
fn who_says_no_hello_or_nothing_any_more_is_closed() {
    let mut world = World::new();
    let silent = world.connect();
    let idle = world.peer();
    let holder = world.take(1);
    for _ in 0..6 {
        world.pass(1000);
    }
    assert!(matches!(world.closed[&silent], CloseReason::NoHello(_)));
    assert!(!world.closed.contains_key(&idle));
    for _ in 0..30 {
        world.pass(1000);
    }
    assert!(matches!(world.closed[&idle], CloseReason::Idle(_)));
    assert!(!world.closed.contains_key(&holder), "its guest may be idle");
    world.event(HostEvent::Disconnected { conn: holder });
    assert_eq!(world.host.poll_timeout(), None, "nobody is left to be looked after");
}

#[test]
fn strangers_and_connections_are_limited_in_count() {
    let mut config = config();
    config.limits.strangers = 2;
    let mut world = World::with(config, Default::default());
    let conns = [world.connect(), world.connect(), world.connect()];
    assert_eq!(world.closed.keys().collect::<Vec<_>>(), [&conns[2]]);
    assert!(matches!(
        world.ask(conns[0], Message::Hello(hello())),
        Some(Message::Hello(_))
    ));
    let fourth = world.connect();
    assert!(!world.closed.contains_key(&fourth), "who has said hello is no stranger");
}

#[test]
fn what_a_client_never_sends_closes_the_connection() {
    let mut world = World::new();
    for message in [Message::Pong(Empty), Message::Hello(hello())] {
        let conn = world.peer();
        assert_eq!(world.ask(conn, message), None);
        assert!(matches!(world.closed[&conn], CloseReason::Unexpected(_)));
    }
    let conn = world.peer();
    let error = FrameError::Kind(0x77);
    world.event(HostEvent::BadFrame { conn, error });
    assert_eq!(world.closed[&conn], CloseReason::BadFrame(error));
}

#[test]
fn only_a_join_makes_a_replica_and_it_says_so_once() {
    let mut world = World::new();
    let conn = world.peer();
    world.send(conn, seal(1));
    world.store_ends();
    world.answer(conn);
    for created in [true, false] {
        world.send(conn, join(1));
        world.store_ends();
        let (answer, grant) = world.answer(conn).expect("it is answered");
        assert!(
            matches!(answer, Message::Joined(joined) if joined.created == created),
            "{answer:?}"
        );
        assert!(grant);
    }
    let replicas = vec![held()];
    let digest = world.host.status().inventory_digest;
    assert_eq!(world.host.inventory(), replicas);
    world.event(HostEvent::Drop { replicas });
    world.store_ends();
    assert!(world.host.inventory().is_empty());
    assert_ne!(world.host.status().inventory_digest, digest);
}

#[test]
fn a_join_that_waits_for_another_one_is_told_too_that_the_replica_is_new() {
    let mut world = World::new();
    let (first, second) = (world.take(1), world.peer());
    world.send(second, seal(1));
    world.answer(second);
    let replicas = vec![held()];
    world.event(HostEvent::Drop { replicas });
    world.store_ends();
    // The answer to the first may be lost with its connection.
    world.send(first, join(1));
    world.send(second, join(1));
    world.store_ends();
    for conn in [first, second] {
        let answer = world.answer(conn);
        assert!(
            matches!(&answer, Some((Message::Joined(joined), _)) if joined.created),
            "{answer:?}"
        );
    }
}

#[test]
fn a_join_that_comes_after_the_drop_makes_an_empty_replica_that_meta_is_told_of() {
    let mut world = World::new();
    let conn = world.take(1);
    let replicas = vec![held()];
    for _ in 0..2 {
        let digest = world.host.status().inventory_digest;
        world.event(HostEvent::Drop {
            replicas: replicas.clone(),
        });
        world.store_ends();
        assert_ne!(world.host.status().inventory_digest, digest);
        world.send(conn, join(1));
        world.store_ends();
        assert!(matches!(world.answer(conn), Some((Message::Joined(joined), _)) if joined.created));
        // The digest that it reports is another one again, so it is asked what it holds, and told to drop it.
        assert_eq!(world.host.status().inventory_digest, digest);
        assert_eq!(world.host.inventory(), replicas);
    }
    // The generation that it has seen is kept through all that.
    let refused = world.peer();
    world.send(refused, seal(2));
    world.store_ends();
    world.event(HostEvent::Drop { replicas });
    world.store_ends();
    assert!(matches!(world.ask(conn, join(1)), Some(Message::Failed(failed)) if failed.kind == FailureKind::Fenced));
}

#[test]
fn the_stable_watermark_is_told_to_who_joins() {
    let mut world = World::new();
    let conn = world.take(1);
    let stable = Version::new(holder(1).generation, Seq::new(3).unwrap());
    let Message::Write(told) = write(1, 4, WriteData::Zero) else {
        unreachable!()
    };
    world.send(conn, Message::Write(Write { stable, ..told }));
    world.store_ends();
    assert!(matches!(world.answer(conn), Some((Message::Durable(_), true))));
    let answer = world.ask(conn, join(1));
    assert!(matches!(answer, Some(Message::Joined(joined)) if joined.stable == stable));
}

#[test]
fn a_block_that_is_not_what_its_checksum_says_is_not_stored() {
    let mut world = World::new();
    let conn = world.take(1);
    let bytes = BlockBuf::copied_from(&[1; 2 * BLOCK_BYTES]).freeze();
    let mut checksums = range_checksums(VOLUME, range(5, 2), &bytes);
    let data = WriteData::Data {
        bytes: bytes.clone(),
        checksums: checksums.clone(),
    };
    world.send(conn, write(1, 1, data));
    assert_eq!(world.host.store.asked.len(), 1);
    world.store_ends();
    assert!(matches!(world.answer(conn), Some((Message::Durable(_), true))));

    checksums[1] = Checksum(checksums[1].0 ^ 1);
    let data = WriteData::Data {
        bytes: bytes.clone(),
        checksums: checksums.clone(),
    };
    let answer = world.ask(conn, write(1, 2, data));
    assert_eq!(kind(answer), Some(FailureKind::ChecksumMismatch));

    let version = Version::new(holder(1).generation, Seq::new(2).unwrap());
    let state = |content| BlockState { content, version };
    let copy = Message::Copy(Copy {
        holder: holder(1),
        group: GroupIndex(0),
        layer: Layer(0),
        range: range(4, 3),
        source: CopySource::Repair,
        blocks: vec![
            state(Content::Zero),
            state(Content::Data(checksums[0])),
            state(Content::Data(checksums[1])),
        ],
        bytes,
    });
    assert_eq!(kind(world.ask(conn, copy)), Some(FailureKind::ChecksumMismatch));
    assert!(world.host.store.asked.is_empty());
}

#[test]
fn too_many_in_flight_are_refused_and_a_flood_is_cut_off() {
    let mut config = config();
    config.limits.requests_in_flight = 4;
    let mut world = World::with(config, Default::default());
    let conn = world.take(1);
    for _ in 0..4 {
        assert_eq!(world.ask(conn, read(1)), None);
    }
    for _ in 0..4 {
        assert_eq!(kind(world.ask(conn, read(1))), Some(FailureKind::TooManyInFlight));
    }
    world.store_ends();
    while world.answer(conn).is_some() {}
    assert_eq!(world.ask(conn, read(1)), None, "there is room again");
    for _ in 0..3 + 4 {
        world.send(conn, read(1));
    }
    assert!(!world.closed.contains_key(&conn));
    world.send(conn, read(1));
    assert_eq!(world.closed[&conn], CloseReason::Flood);
    world.store_ends();
}

#[test]
fn bytes_in_flight_are_limited_too() {
    let mut config = config();
    config.limits.request_bytes_in_flight = 3 * BLOCK_BYTES as u64;
    let mut world = World::with(config, Default::default());
    let conn = world.take(1);
    let bytes = BlockBuf::zeroed(2).freeze();
    let checksums = range_checksums(VOLUME, range(5, 2), &bytes);
    let data = WriteData::Data { bytes, checksums };
    assert_eq!(world.ask(conn, write(1, 1, data.clone())), None);
    let answer = world.ask(conn, write(1, 2, data.clone()));
    assert_eq!(kind(answer), Some(FailureKind::TooManyInFlight));
    world.store_ends();
    assert!(matches!(world.answer(conn), Some((Message::Durable(_), true))));
    assert_eq!(world.ask(conn, write(1, 2, data)), None);
}

#[test]
fn a_congested_connection_waits_and_the_others_do_not() {
    let mut world = World::new();
    let slow = world.take(1);
    world.host.set_congested(slow, true);
    world.send(slow, read(1));
    assert!(world.host.store.asked.is_empty());
    assert_eq!(world.host.status().queued, 1);
    world.host.set_congested(slow, false);
    world.pass(0);
    world.store_ends();
    assert!(matches!(world.answer(slow), Some((Message::ReadAnswer(_), true))));
}

#[test]
fn answers_to_a_connection_that_is_gone_are_dropped() {
    let mut config = config();
    config.limits.store_requests = 1;
    let mut world = World::with(config, Default::default());
    let conn = world.take(1);
    world.send(conn, read(1));
    world.send(conn, read(1));
    world.send(conn, seal(1));
    world.event(HostEvent::Disconnected { conn });
    assert_eq!(world.host.store.asked.len(), 1, "what waited is forgotten");
    assert!(matches!(
        world.host.store.asked.values().next(),
        Some(StoreRequest::Read { .. })
    ));
    world.store_ends();
    assert_eq!(world.host.status().requests, 0);
}

/// Meta sees a replica that no configuration names and says to drop it. It becomes a member again, and is filled. Then what
/// meta said arrives.
#[test]
fn a_replica_that_was_named_again_meanwhile_is_not_dropped() {
    let mut world = World::new();
    let conn = world.take(1);
    assert_eq!(world.host.inventory(), [held()]);
    let rejoin = Message::Join(Join {
        epoch: Epoch(2),
        ..join_of(1)
    });
    world.send(conn, rejoin);
    world.store_ends();
    assert!(matches!(world.answer(conn), Some((Message::Joined(joined), _)) if !joined.created));
    let replicas = vec![held()];
    world.event(HostEvent::Drop { replicas });
    world.store_ends();
    let epoch = Epoch(2);
    assert_eq!(world.host.inventory(), [HeldReplica { epoch, ..held() }]);
    // What an older configuration says comes late, and changes nothing.
    world.send(conn, join(1));
    world.store_ends();
    assert_eq!(world.host.inventory(), [HeldReplica { epoch, ..held() }]);
}

/// A device has lost a part of its index, so nobody can compare it, and it was ejected. To be filled again it begins anew; but
/// only when a later configuration says that it joins, and once.
#[test]
fn a_replica_whose_index_is_lost_begins_anew_when_it_joins_again() {
    let mut world = World::new();
    let conn = world.take(1);
    world.host.store.index_lost = true;
    let named = |role, epoch| {
        let epoch = Epoch(epoch);
        Message::Join(Join {
            role,
            epoch,
            ..join_of(1)
        })
    };
    let without_loss = [join(1), named(ReplicaRole::InSync, 2), named(ReplicaRole::Joining, 2)];
    for message in without_loss {
        world.send(conn, message);
        world.store_ends();
        assert!(matches!(world.answer(conn), Some((Message::Joined(joined), _)) if !joined.created));
    }
    world.send(conn, named(ReplicaRole::Joining, 3));
    let asked: Vec<&StoreRequest> = world.host.store.asked.values().collect();
    assert!(
        matches!(asked[0], StoreRequest::DropReplica { epoch, .. } if *epoch == Epoch(2)),
        "{asked:?}"
    );
    world.store_ends();
    assert!(matches!(world.answer(conn), Some((Message::Joined(joined), _)) if joined.created));
    let epoch = Epoch(3);
    assert_eq!(world.host.inventory(), [HeldReplica { epoch, ..held() }]);
    // The same again, late: it changes nothing.
    world.send(conn, named(ReplicaRole::Joining, 3));
    assert!(world.host.store.asked.is_empty());
}
