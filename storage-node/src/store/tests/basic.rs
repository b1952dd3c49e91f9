//! What each request does.

use cairn_proto::block::{BlockState, Content, Cursor};
use cairn_proto::ids::{Epoch, Generation};
use cairn_proto::limits::BLOCK_BYTES;

use super::rig::*;
use crate::store::api::{StoreError, StoreReply, StoreRequest, WriteContent};
use crate::store::{StoreLimits, StoreState};

fn read_back(rig: &mut Rig, chunk: u32, start: u32, blocks: u32) -> (Vec<BlockState>, Vec<u8>) {
    match rig.read(chunk, start, blocks) {
        StoreReply::Read { blocks, bytes } => (blocks, bytes.concat()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_written_is_read_back_also_after_it_is_opened_anew() {
    let mut rig = Rig::new(2048, StoreLimits::tiny(), 1);
    rig.create();
    assert!(matches!(rig.write(0, 3, 5, 1), StoreReply::Durable { .. }));
    assert!(matches!(rig.write(2, 300, 256, 2), StoreReply::Durable { .. }));
    let seal = StoreRequest::Seal {
        volume: GROUP.volume,
        generation: Generation::new(5).unwrap(),
    };
    rig.call(seal);
    for reopened in [false, true] {
        if reopened {
            rig = rig.reopen(true);
            rig.settle();
            assert_eq!(rig.store.state(), StoreState::Open);
        }
        let (blocks, bytes) = read_back(&mut rig, 0, 2, 7);
        assert_eq!(blocks[0], BlockState::ABSENT);
        assert_eq!(blocks[6], BlockState::ABSENT);
        assert_eq!(bytes, contents(range(0, 3, 5), version(1)));
        let (_, bytes) = read_back(&mut rig, 2, 300, 256);
        assert_eq!(bytes, contents(range(2, 300, 256), version(2)));
        assert_eq!(rig.store.seal_of(GROUP.volume).get(), 5);
        let replica = rig.store.replica_of(GROUP).unwrap();
        assert_eq!((replica.role, replica.blocks_used), (1, 261));
        rig.store.check_invariants();
    }
}

#[test]
fn an_older_write_and_a_duplicate_are_answered_and_not_applied() {
    let mut rig = Rig::new(1024, StoreLimits::tiny(), 1);
    rig.create();
    rig.write(0, 0, 4, 5);
    assert!(matches!(rig.write(0, 2, 4, 3), StoreReply::Durable { .. }));
    assert!(matches!(rig.write(0, 0, 4, 5), StoreReply::Durable { .. }));
    let (blocks, bytes) = read_back(&mut rig, 0, 0, 6);
    assert_eq!(blocks[3].version, version(5));
    assert_eq!(blocks[4].version, version(3));
    assert_eq!(bytes[..4 * BLOCK_BYTES], contents(range(0, 0, 4), version(5)));
    assert_eq!(rig.store.space().data, 6);
    assert_eq!(rig.store.counters().superseded, 1);
}

#[test]
fn discards_and_zeroes_give_space_back_and_keep_their_versions() {
    let mut rig = Rig::new(1024, StoreLimits::tiny(), 1);
    rig.create();
    rig.write(0, 0, 64, 5);
    rig.call(hole_request(0, 8, 8, 7, WriteContent::Discard));
    rig.call(hole_request(0, 0, 16384, 6, WriteContent::Zero));
    rig.write(0, 8, 1, 4);
    let (blocks, bytes) = read_back(&mut rig, 0, 7, 10);
    assert!(bytes.is_empty());
    assert_eq!((blocks[0].content, blocks[0].version), (Content::Zero, version(6)));
    assert_eq!((blocks[1].content, blocks[1].version), (Content::Absent, version(7)));
    assert_eq!((blocks[9].content, blocks[9].version), (Content::Zero, version(6)));
    assert_eq!(rig.store.space().data, 0);
    rig.store.check_invariants();
}

#[test]
fn without_a_replica_nothing_is_written_or_read() {
    let mut rig = Rig::new(1024, StoreLimits::tiny(), 1);
    let refused = |reply| matches!(reply, StoreReply::Failed(StoreError::NoReplica));
    assert!(refused(rig.write(0, 0, 1, 1)));
    assert!(refused(rig.read(0, 0, 1)));
    rig.create();
    rig.write(0, 0, 9, 1);
    rig.call(StoreRequest::DropReplica {
        group: GROUP,
        epoch: Epoch(1),
    });
    assert!(refused(rig.read(0, 0, 1)));
    assert_eq!(rig.store.space().data, 0);
}

#[test]
fn an_idle_log_confirms_its_last_batch_once() {
    let mut rig = Rig::new(1024, StoreLimits::tiny(), 1);
    rig.create();
    let before = rig.store.commit_seq().0;
    rig.pass_time();
    rig.pass_time();
    assert_eq!(rig.store.commit_seq().0, before + 1);
    assert_eq!(rig.store.counters().confirmations, 1);
    assert_eq!(rig.store.poll_timeout(), None);
}

/// A write that arrives after a newer discard is answered and not applied.
pub(super) fn discarded_blocks_stay_discarded(limits: StoreLimits) {
    let mut rig = Rig::new(1024, limits, 1);
    rig.create();
    rig.write(0, 0, 8, 1);
    rig.call(hole_request(0, 0, 4, 3, WriteContent::Discard));
    rig.write(0, 2, 4, 2);
    for _ in 0..2 {
        let (blocks, _) = read_back(&mut rig, 0, 0, 8);
        let versions: Vec<_> = blocks.iter().map(|block| block.version).collect();
        assert_eq!(versions, [3, 3, 3, 3, 2, 2, 1, 1].map(version));
        assert!(blocks[..4].iter().all(|block| block.content == Content::Absent));
        rig = rig.reopen(true);
        rig.settle();
    }
}

#[test]
fn a_late_write_does_not_bring_back_what_was_discarded() {
    discarded_blocks_stay_discarded(StoreLimits::tiny());
}

/// More index pages than there is memory for are looked at, and none of them has anything to list.
#[test]
fn a_listing_that_finds_nothing_for_long_comes_to_its_end() {
    let mut rig = Rig::new(4096, StoreLimits::tiny(), 1);
    rig.create();
    for page in 0..64 {
        rig.write(0, page * 256, 1, u64::from(page) + 1);
    }
    rig = rig.reopen(true);
    rig.settle();
    let reply = rig.call(StoreRequest::Collect {
        group: GROUP,
        from: Cursor::default(),
        to: Cursor::END,
        above: version(1000),
        runs_max: 10,
    });
    let StoreReply::Collected { runs, next } = reply else {
        panic!("{reply:?}")
    };
    assert_eq!((runs.len(), next), (0, None));
}
