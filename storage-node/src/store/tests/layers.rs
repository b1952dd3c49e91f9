//! Dropped replicas and layers, and floors under tombstones.

use cairn_proto::block::{BlockState, Content};
use cairn_proto::checksum::range_checksums;
use cairn_proto::disk::DiskOp;
use cairn_proto::ids::{ChunkIndex, Epoch, GroupId, GroupIndex, Layer};

use super::rig::*;
use crate::store::api::{StoreError, StoreReply, StoreRequest, WriteContent};
use crate::store::{StoreLimits, StoreState};
use crate::testing::Fault;

fn is_durable(reply: &StoreReply) -> bool {
    matches!(reply, StoreReply::Durable { .. })
}

fn write_to(group: GroupId, layer: u32, chunk: u32, start: u32, blocks: u32, seq: u64) -> StoreRequest {
    let range = range(chunk, start, blocks);
    let bytes = contents(range, version(seq));
    StoreRequest::Write {
        group,
        layer: Layer(layer),
        range,
        version: version(seq),
        content: WriteContent::Data {
            checksums: range_checksums(group.volume, range, &bytes),
            bytes,
        },
    }
}

fn read_of(layer: u32, chunk: u32, start: u32, blocks: u32) -> StoreRequest {
    StoreRequest::Read {
        group: GROUP,
        layer: Layer(layer),
        range: range(chunk, start, blocks),
    }
}

fn states(reply: StoreReply) -> Vec<BlockState> {
    match reply {
        StoreReply::Read { blocks, .. } => blocks,
        other => panic!("{other:?}"),
    }
}

const OTHER: GroupId = GroupId {
    volume: GROUP.volume,
    index: GroupIndex(2),
};

/// Two replicas with blocks on many pages, most of which are not in memory.
fn two_replicas(blocks: u64) -> Rig {
    let mut rig = Rig::new(blocks, StoreLimits::tiny(), 1);
    rig.create();
    rig.call(StoreRequest::CreateReplica {
        group: OTHER,
        role: 1,
        epoch: Epoch(1),
    });
    for page in 0..24 {
        for group in [GROUP, OTHER] {
            let reply = rig.call(write_to(group, page % 2, page / 6, page * 256, 3, 1));
            assert!(is_durable(&reply), "{reply:?}");
        }
    }
    assert_eq!(rig.store.space().data, 2 * 72);
    rig
}

#[test]
fn a_dropped_replica_is_gone_at_once_and_its_space_comes_back_in_the_background() {
    let mut rig = two_replicas(2048);
    let loads = rig.store.counters().index_loads;
    let drop = rig.submit(StoreRequest::DropReplica {
        group: GROUP,
        epoch: Epoch(1),
    });
    while !rig.replies.contains_key(&drop) {
        assert!(rig.step());
    }
    assert_eq!(rig.store.counters().index_loads, loads, "nothing was loaded for it");
    assert_eq!(rig.store.replica_of(GROUP), None);
    assert_eq!(rig.store.reclaiming().collect::<Vec<_>>(), [(GROUP, None)]);
    let read = rig.submit(read_of(0, 0, 0, 1));
    let reply = rig.replies.remove(&read).unwrap();
    assert!(matches!(reply, StoreReply::Failed(StoreError::NoReplica)));
    assert!(rig.store.space().data > 72, "most of it is there yet");
    rig.settle();
    assert_eq!(rig.store.reclaiming().count(), 0);
    assert_eq!(rig.store.space().data, 72);
    rig.store.check_invariants();
}

#[test]
fn a_new_replica_waits_for_the_space_of_the_old_one_and_has_nothing_of_it() {
    let mut rig = two_replicas(2048);
    rig.submit(StoreRequest::DropReplica {
        group: GROUP,
        epoch: Epoch(1),
    });
    let create = rig.submit(StoreRequest::CreateReplica {
        group: GROUP,
        role: 2,
        epoch: Epoch(1),
    });
    let other = rig.submit(write_to(OTHER, 0, 9, 0, 1, 1));
    while !rig.replies.contains_key(&other) {
        assert!(rig.step());
    }
    assert!(!rig.replies.contains_key(&create), "others do not wait for it");
    rig.settle();
    assert!(is_durable(&rig.replies[&create]));
    assert_eq!(rig.store.space().data, 73);
    assert_eq!(rig.store.layers_of(GROUP).count(), 0);
    let states = states(rig.call(read_request(0, 0, 256)));
    assert!(states.iter().all(|state| *state == BlockState::ABSENT));
    rig.store.check_invariants();
}

#[test]
fn wherever_the_power_fails_what_was_dropped_is_given_back_in_the_end() {
    let steps = {
        let mut rig = two_replicas(1024);
        rig.submit(StoreRequest::DropReplica {
            group: GROUP,
            epoch: Epoch(1),
        });
        (0..).take_while(|_| rig.step()).count()
    };
    assert!(steps > 30, "{steps} operations");
    let before = two_replicas(1024);
    for cut in 0..steps {
        let mut rig = Rig::opening(before.device.clone(), StoreLimits::tiny(), cut as u64);
        rig.settle();
        let drop = rig.submit(StoreRequest::DropReplica {
            group: GROUP,
            epoch: Epoch(1),
        });
        for _ in 0..cut {
            rig.step();
        }
        let durable = rig.replies.contains_key(&drop);
        let mut rig = rig.reopen(true);
        rig.settle();
        assert_eq!(rig.store.state(), StoreState::Open, "cut {cut}");
        if rig.store.replica_of(GROUP).is_none() {
            assert_eq!(rig.store.space().data, 72, "cut {cut}");
            assert_eq!(rig.store.reclaiming().count(), 0, "cut {cut}");
        } else {
            assert!(!durable, "cut {cut}: it was acknowledged");
            assert_eq!(rig.store.space().data, 144, "cut {cut}");
        }
        rig.store.check_invariants();
        assert_eq!(rig.store.replica_of(OTHER).unwrap().blocks_used, 72, "cut {cut}");
    }
}

#[test]
fn layers_are_counted_and_deleted_one_by_one() {
    let mut rig = two_replicas(2048);
    let layers = |rig: &Rig| rig.store.layers_of(GROUP).collect::<Vec<_>>();
    assert_eq!(layers(&rig), [(Layer(0), 36), (Layer(1), 36)]);
    // A layer is made by its first write.
    rig.call(write_to(GROUP, 7, 0, 0, 5, 1));
    assert_eq!(layers(&rig), [(Layer(0), 36), (Layer(1), 36), (Layer(7), 5)]);
    let delete = rig.submit(StoreRequest::DeleteLayer {
        group: GROUP,
        layer: Layer(1),
    });
    while !rig.replies.contains_key(&delete) {
        assert!(rig.step());
    }
    assert_eq!(layers(&rig), [(Layer(0), 36), (Layer(7), 5)]);
    assert_eq!(rig.store.replica_of(GROUP).unwrap().blocks_used, 41);
    let read = rig.submit(read_of(1, 0, 256, 3));
    let reply = rig.replies.remove(&read).expect("there is nothing to wait for");
    assert!(states(reply).iter().all(|state| *state == BlockState::ABSENT));
    // It is written again once all of it is gone.
    let again = rig.submit(write_to(GROUP, 1, 0, 256, 1, 1));
    rig.settle();
    assert!(is_durable(&rig.replies[&again]));
    assert_eq!(layers(&rig), [(Layer(0), 36), (Layer(1), 1), (Layer(7), 5)]);
    assert_eq!(rig.store.space().data, 72 + 42);
    // Deleted a second time it is gone again.
    rig.call(StoreRequest::DeleteLayer {
        group: GROUP,
        layer: Layer(1),
    });
    let reply = rig.call(read_of(1, 0, 256, 1));
    assert_eq!(states(reply), [BlockState::ABSENT]);
    assert_eq!(rig.store.space().data, 72 + 41);
    rig.call(write_to(GROUP, 1, 0, 256, 1, 1));
    let mut rig = rig.reopen(true);
    rig.settle();
    assert_eq!(layers(&rig), [(Layer(0), 36), (Layer(1), 1), (Layer(7), 5)]);
    rig.store.check_invariants();
    let missing = rig.call(StoreRequest::DeleteLayer {
        group: GroupId {
            index: GroupIndex(9),
            ..GROUP
        },
        layer: Layer(0),
    });
    assert!(matches!(missing, StoreReply::Failed(StoreError::NoReplica)));
}

#[test]
fn a_page_that_can_not_be_read_does_not_stop_a_drop() {
    let mut rig = two_replicas(2048);
    rig.submit(StoreRequest::DropReplica {
        group: GROUP,
        epoch: Epoch(1),
    });
    let create = rig.submit(StoreRequest::CreateReplica {
        group: GROUP,
        role: 1,
        epoch: Epoch(1),
    });
    let home_of_a_page = |op: &DiskOp| matches!(op, DiskOp::Read { at, .. } if at.0 % 3 == 0);
    while rig.step_with(|op| home_of_a_page(op).then(Fault::default)) {}
    // A leaf that can't be read may be readable later; a new replica is refused until then.
    if !is_durable(&rig.replies[&create]) {
        rig.create();
    }
    assert!(rig.store.replica_of(GROUP).is_some());
    assert_eq!(rig.store.reclaiming().count(), 0);
    let states = states(rig.call(read_request(0, 0, 256)));
    assert!(states.iter().all(|state| *state == BlockState::ABSENT));
}

#[test]
fn a_floor_raises_tombstones_and_lets_their_pages_go() {
    let mut rig = Rig::new(1024, StoreLimits::tiny(), 1);
    rig.create();
    rig.write(0, 0, 4, 5);
    for block in 0..100 {
        rig.call(hole_request(
            0,
            300 + block * 2,
            1,
            10 + u64::from(block),
            WriteContent::Discard,
        ));
    }
    let raise = |seq| StoreRequest::RaiseFloor {
        group: GROUP,
        layer: Layer(0),
        chunk: ChunkIndex(0),
        version: version(seq),
    };
    assert!(is_durable(&rig.call(raise(200))));
    let superseded = rig.store.counters().superseded;
    assert!(is_durable(&rig.call(raise(150))), "nothing is lower");
    assert_eq!(rig.store.counters().superseded, superseded + 1);
    for reopened in [false, true] {
        if reopened {
            rig = rig.reopen(true);
            rig.settle();
        }
        let blocks = states(rig.read(0, 0, 256));
        assert!(matches!(blocks[3].content, Content::Data(_)));
        assert_eq!(blocks[3].version, version(5));
        let raised = BlockState {
            content: Content::Absent,
            version: version(200),
        };
        assert_eq!(blocks[4], raised);
        assert!(states(rig.read(0, 256, 256)).iter().all(|state| *state == raised));
        assert!(states(rig.read(0, 16000, 256)).iter().all(|state| *state == raised));
        rig.store.check_invariants();
        // One page is left, that with data.
        assert_eq!(rig.store.counters().index_pages_resident, 1);
    }
    rig.write(0, 310, 1, 199);
    assert_eq!(
        states(rig.read(0, 310, 1))[0].version,
        version(200),
        "it comes too late"
    );
}
