//! What is read from another device and written as a copy: stories of the device that fetches, and of the one that is read.

use bytes::Bytes;
use cairn_proto::block::{BlockState, Content};
use cairn_proto::buffer::BlockBuf;
use cairn_proto::checksum::range_checksums;
use cairn_proto::ids::*;
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::message::*;

use super::support::*;
use crate::host::limits::HostLimits;
use crate::host::*;
use crate::store::api::StoreRequest;

const OTHER: DeviceId = DeviceId {
    uuid: DeviceUuid([8; 16]),
    incarnation: Incarnation(2),
};

fn fetch_of(generation: u32, start: u32) -> Fetch {
    Fetch {
        holder: holder(generation),
        group: GroupIndex(0),
        layer: Layer(0),
        range: range(start, 2),
        why: CopySource::Resync,
        from: OTHER,
        recovered: CommitSeq(40),
        commit: CommitSeq(50),
        capability: capability(generation),
        address: "other:1".to_string(),
    }
}

fn fetch(generation: u32) -> Message {
    Message::Fetch(fetch_of(generation, 4))
}

fn version(generation: u32, seq: u64) -> Version {
    Version::new(holder(generation).generation, Seq::new(seq).unwrap())
}

/// What the other device answers of blocks 4 and 5: data, and a hole.
fn answer_of() -> ReadAnswer {
    let bytes = BlockBuf::copied_from(&[7; BLOCK_BYTES]).freeze();
    let checksum = range_checksums(VOLUME, range(4, 1), &bytes)[0];
    let state = |content| BlockState {
        content,
        version: version(1, 3),
    };
    ReadAnswer {
        commit: CommitSeq(60),
        blocks: vec![state(Content::Data(checksum)), state(Content::Zero)],
        bytes: vec![bytes],
        ..ReadAnswer::default()
    }
}

fn their_hello() -> Hello {
    Hello {
        device: OTHER,
        recovered: CommitSeq(40),
        commit: CommitSeq(55),
        ..hello()
    }
}

impl World {
    fn peer_says(&mut self, peer: PeerId, correlation: Correlation, message: Message) {
        let envelope = Envelope::new(correlation, message);
        self.event(HostEvent::PeerFrame { peer, envelope });
    }

    fn last_reached(&self) -> PeerId {
        self.reached.last().expect("somebody was to be connected to").0
    }

    fn sent_to(&mut self, peer: PeerId) -> Option<Envelope> {
        self.to_peers.get_mut(&peer)?.pop_front()
    }

    /// The connection that was asked for last stands and is greeted.
    fn other_is_there(&mut self) -> PeerId {
        let peer = self.last_reached();
        self.event(HostEvent::PeerConnected { peer });
        let said = self.sent_to(peer).expect("a hello").message;
        let Message::Hello(said) = said else { panic!("{said:?}") };
        assert_eq!((said.device, said.purpose), (OTHER, Purpose::Repair));
        assert!(said.capability.is_some_and(|shown| shown.volume == VOLUME));
        self.peer_says(peer, Correlation(0), Message::Hello(their_hello()));
        peer
    }

    /// The next read that the other device is asked for.
    fn asked(&mut self, peer: PeerId) -> Correlation {
        let envelope = self.sent_to(peer).expect("a read");
        assert!(matches!(envelope.message, Message::Read(_)), "{envelope:?}");
        envelope.correlation
    }

    /// A fetch of generation 1 whose read is on its way.
    fn fetching(&mut self, conn: ConnId) -> (PeerId, Correlation) {
        self.send(conn, fetch(1));
        let peer = self.other_is_there();
        let correlation = self.asked(peer);
        (peer, correlation)
    }

    fn copies(&self) -> usize {
        let asked = self.host.store().asked.values();
        asked.filter(|r| matches!(r, StoreRequest::Copy { .. })).count()
    }

    fn failure(&mut self, conn: ConnId) -> Option<FailureKind> {
        kind(self.answer(conn).map(|(message, _)| message))
    }
}

#[test]
fn what_another_device_has_is_read_there_and_written_here_as_a_copy() {
    let mut world = World::new();
    let conn = world.take(1);
    let (peer, correlation) = world.fetching(conn);
    assert_eq!(world.reached, [(peer, "other:1".to_string())]);
    world.peer_says(peer, correlation, Message::ReadAnswer(answer_of()));
    let asked: Vec<_> = world.host.store().asked.values().collect();
    let [
        StoreRequest::Copy {
            range: at,
            blocks,
            bytes,
            apply,
            ..
        },
    ] = asked[..]
    else {
        panic!("{asked:?}");
    };
    assert_eq!((*at, blocks.len(), &bytes[..]), (range(4, 2), 2, &[7; BLOCK_BYTES][..]));
    assert_eq!(*apply, cairn_proto::block::Apply::Resync(holder(1).generation));
    assert_eq!(world.answer(conn), None, "it is not durable");
    world.store_ends();
    assert!(matches!(world.answer(conn), Some((Message::Durable(_), true))));
    let status = world.host.status();
    assert_eq!((status.fetching, status.fetching_bytes), (0, 0));
    assert_eq!(status.fetched_bytes, BLOCK_BYTES as u64);
    // The next one uses the same connection.
    world.send(conn, Message::Fetch(fetch_of(1, 8)));
    assert_eq!(world.reached.len(), 1);
    world.asked(peer);
}

#[test]
fn an_answer_that_can_not_be_copied_is_not_and_the_holder_is_told() {
    type Spoil = fn(&mut ReadAnswer);
    let spoil: [(&str, Spoil); 5] = [
        ("damaged", |answer| {
            answer.blocks[1].content = Content::Damaged;
        }),
        ("spoilt on the way", |answer| {
            answer.bytes = vec![BlockBuf::zeroed(1).freeze()];
        }),
        ("of a newer attachment", |answer| {
            answer.blocks[1].version = version(2, 1);
        }),
        ("of one that has forgotten", |answer| answer.commit = CommitSeq(49)),
        ("of another length", |answer| {
            answer.blocks.pop();
        }),
    ];
    for (what, spoil) in spoil {
        let mut world = World::new();
        let conn = world.take(1);
        let (peer, correlation) = world.fetching(conn);
        let mut answer = answer_of();
        spoil(&mut answer);
        world.peer_says(peer, correlation, Message::ReadAnswer(answer));
        assert_eq!(world.copies(), 0, "{what}");
        assert_eq!(world.failure(conn), Some(FailureKind::NotFetched), "{what}");
    }
}

#[test]
fn what_the_other_device_refuses_is_told_and_says_nothing_of_the_next() {
    let mut world = World::new();
    let conn = world.take(1);
    let (peer, correlation) = world.fetching(conn);
    world.peer_says(peer, correlation, Message::Failed(Failed::fenced(holder(2).generation)));
    assert_eq!(world.failure(conn), Some(FailureKind::NotFetched));
    assert!(!world.closed_peers.contains(&peer));
}

#[test]
fn nothing_is_written_for_a_holder_that_was_fenced_while_it_was_fetched() {
    let mut world = World::new();
    let old = world.take(1);
    let (peer, correlation) = world.fetching(old);
    let new = world.peer();
    world.send(new, seal(2));
    let fenced = Message::Failed(Failed::fenced(holder(2).generation));
    assert_eq!(
        world.answer(old),
        Some((fenced, false)),
        "at once, also before it is durable"
    );
    world.peer_says(peer, correlation, Message::ReadAnswer(answer_of()));
    assert_eq!(world.copies(), 0);
    assert_eq!(world.host.status().fetching_bytes, 0);
    assert_eq!(world.answer(old), None, "it is answered once");
}

#[cfg(feature = "canary")]
#[test]
fn the_planted_bug_writes_for_a_holder_that_was_fenced() {
    let config = HostConfig {
        canary: Canary::FetchIgnoresGeneration,
        ..config()
    };
    let mut world = World::with(config, HeldStore::default());
    let old = world.take(1);
    let (peer, correlation) = world.fetching(old);
    let new = world.peer();
    world.send(new, seal(2));
    world.peer_says(peer, correlation, Message::ReadAnswer(answer_of()));
    assert_eq!(world.copies(), 1);
}

#[test]
fn what_was_fetched_for_a_connection_that_is_over_or_that_began_anew_is_not_written() {
    type Over = fn(&mut World, ConnId);
    let over: [(&str, Over); 3] = [
        ("closed", |world, conn| world.event(HostEvent::Disconnected { conn })),
        ("its holder has connected again, and sealed", |world, _| {
            let again = world.peer();
            world.send(again, seal(1));
        }),
        ("it has joined the group again", |world, conn| world.send(conn, join(1))),
    ];
    for (what, over) in over {
        let mut world = World::new();
        let conn = world.take(1);
        let (peer, correlation) = world.fetching(conn);
        world.send(conn, Message::Fetch(fetch_of(1, 8)));
        over(&mut world, conn);
        assert_eq!(world.host.status().fetching, 0, "{what}");
        world.peer_says(peer, correlation, Message::ReadAnswer(answer_of()));
        assert_eq!(world.copies(), 0, "{what}");
    }
}

#[test]
fn a_device_that_can_not_be_reached_or_is_another_one_is_named_to_the_holder() {
    let mut world = World::new();
    let conn = world.take(1);
    world.send(conn, fetch(1));
    let peer = world.last_reached();
    world.event(HostEvent::PeerEnded { peer });
    assert_eq!(world.failure(conn), Some(FailureKind::PeerUnreachable));
    world.send(conn, fetch(1));
    world.pass(2000);
    assert_eq!(
        world.failure(conn),
        Some(FailureKind::PeerUnreachable),
        "nobody answers"
    );

    let wrong: [(FailureKind, Hello); 4] = [
        (
            FailureKind::PeerUnreachable,
            Hello {
                cluster: ClusterId([1; 16]),
                ..their_hello()
            },
        ),
        (
            FailureKind::PeerUnreachable,
            Hello {
                device: DEVICE,
                ..their_hello()
            },
        ),
        (
            FailureKind::NotFetched,
            Hello {
                recovered: CommitSeq(55),
                ..their_hello()
            },
        ),
        (
            FailureKind::NotFetched,
            Hello {
                commit: CommitSeq(49),
                ..their_hello()
            },
        ),
    ];
    for (expected, wrong) in wrong {
        world.send(conn, fetch(1));
        let peer = world.last_reached();
        world.event(HostEvent::PeerConnected { peer });
        world.peer_says(peer, Correlation(0), Message::Hello(wrong));
        assert_eq!(world.failure(conn), Some(expected));
        assert!(world.closed_peers.contains(&peer));
    }
    world.send(conn, fetch(1));
    let peer = world.last_reached();
    world.event(HostEvent::PeerConnected { peer });
    let refusal = Failed::new(FailureKind::WrongCluster, "not here");
    world.peer_says(peer, Correlation(0), Message::Failed(refusal));
    assert_eq!(world.failure(conn), Some(FailureKind::PeerUnreachable));
    assert_eq!(world.host.status().fetch_peers, 0);
}

#[test]
fn a_device_that_does_not_answer_holds_no_fetch_for_ever_and_its_late_answer_is_dropped() {
    let mut world = World::new();
    let conn = world.take(1);
    let (peer, correlation) = world.fetching(conn);
    world.pass(4999);
    assert_eq!(world.answer(conn), None);
    world.pass(1);
    assert_eq!(world.failure(conn), Some(FailureKind::PeerUnreachable));
    assert!(world.closed_peers.contains(&peer));
    world.peer_says(peer, correlation, Message::ReadAnswer(answer_of()));
    assert_eq!(world.copies(), 0);
    let status = world.host.status();
    assert_eq!((status.fetching, status.fetching_bytes, status.fetch_peers), (0, 0, 0));
}

#[test]
fn reads_connections_and_bytes_are_bounded_and_idle_connections_go() {
    let limits = HostLimits {
        fetches: 5,
        fetches_per_peer: 2,
        fetch_bytes: 3 * 2 * BLOCK_BYTES as u64,
        fetch_peers: 2,
        ..HostLimits::default()
    };
    let mut world = World::with(HostConfig { limits, ..config() }, HeldStore::default());
    let conn = world.take(1);
    let of = |start: u32, run: u64| {
        Message::Fetch(Fetch {
            recovered: CommitSeq(run),
            ..fetch_of(1, start)
        })
    };
    let greeted = |world: &mut World, run: u64| {
        let peer = world.last_reached();
        world.event(HostEvent::PeerConnected { peer });
        world.sent_to(peer).expect("a hello");
        let hello = Hello {
            recovered: CommitSeq(run),
            ..their_hello()
        };
        world.peer_says(peer, Correlation(0), Message::Hello(hello));
        peer
    };
    (0..3).for_each(|start| world.send(conn, of(start * 2, 40)));
    let first = greeted(&mut world, 40);
    let asked = [world.asked(first), world.asked(first)];
    assert!(world.sent_to(first).is_none(), "two at a time");
    (3..5).for_each(|start| world.send(conn, of(start * 2, 41)));
    let second = greeted(&mut world, 41);
    world.asked(second);
    assert!(world.sent_to(second).is_none(), "three altogether, by their bytes");
    world.send(conn, of(0, 40));
    assert_eq!(world.failure(conn), Some(FailureKind::NotFetched), "five wait");
    // One that comes makes room for the next.
    let nothing = ReadAnswer {
        commit: CommitSeq(60),
        blocks: vec![BlockState::ABSENT; 2],
        ..ReadAnswer::default()
    };
    world.peer_says(first, asked[0], Message::ReadAnswer(nothing));
    world.asked(first);
    world.send(conn, of(0, 42));
    assert_eq!(
        world.failure(conn),
        Some(FailureKind::NotFetched),
        "both connections are in use"
    );
    world.event(HostEvent::PeerEnded { peer: first });
    world.event(HostEvent::PeerEnded { peer: second });
    assert_eq!(world.host.status().fetching, 0);
    let (peer, correlation) = world.fetching(conn);
    world.peer_says(peer, correlation, Message::ReadAnswer(answer_of()));
    world.pass(9_999);
    assert!(!world.closed_peers.contains(&peer));
    world.pass(1);
    assert!(world.closed_peers.contains(&peer), "nobody uses it");
}

#[test]
fn a_fetch_needs_the_right_to_write_and_the_capability_of_its_holder() {
    let mut world = World::new();
    let conn = world.take(1);
    let stranger = world.peer();
    assert_eq!(kind(world.ask(stranger, fetch(1))), Some(FailureKind::NotSealed));
    let other = Fetch {
        capability: capability(2),
        ..fetch_of(1, 4)
    };
    assert_eq!(
        kind(world.ask(conn, Message::Fetch(other))),
        Some(FailureKind::Unauthorized)
    );
    let own = Fetch {
        from: DEVICE,
        ..fetch_of(1, 4)
    };
    assert_eq!(kind(world.ask(conn, Message::Fetch(own))), Some(FailureKind::Invalid));
    assert!(world.reached.is_empty());
}

#[test]
fn who_reads_for_a_holder_is_not_the_holder() {
    let mut world = World::new();
    let holds = world.take(1);
    let reads = world.connect();
    let hello = Hello {
        purpose: Purpose::Repair,
        capability: Some(capability(1)),
        ..hello()
    };
    assert!(matches!(
        world.ask(reads, Message::Hello(hello)),
        Some(Message::Hello(_))
    ));
    world.send(reads, read(1));
    world.store_ends();
    let (message, grant) = world.answer(reads).expect("an answer");
    assert!(matches!(message, Message::ReadAnswer(_)), "{message:?}");
    assert!(!grant, "a time to read would be of no use to the holder");
    world.event(HostEvent::Disconnected { conn: holds });
    assert!(world.host.status().held.is_empty());
    // A newer holder makes an end of it, and so does silence.
    let new = world.peer();
    world.send(new, seal(2));
    assert_eq!(kind(world.ask(reads, read(1))), Some(FailureKind::Fenced));
    world.pass(29_999);
    assert!(!world.closed.contains_key(&reads));
    world.pass(2_000);
    assert!(matches!(world.closed.get(&reads), Some(CloseReason::Idle(_))));
}

#[test]
fn nothing_of_a_fetch_without_data_is_missing() {
    let mut world = World::new();
    let conn = world.take(1);
    let (peer, correlation) = world.fetching(conn);
    let hole = ReadAnswer {
        commit: CommitSeq(60),
        blocks: vec![BlockState::ABSENT; 2],
        ..ReadAnswer::default()
    };
    world.peer_says(peer, correlation, Message::ReadAnswer(hole));
    let asked: Vec<_> = world.host.store().asked.values().collect();
    assert!(matches!(asked[..], [StoreRequest::Copy { bytes, .. }] if *bytes == Bytes::new()));
}
