//! What a damaged, failing or foreign device does.

use std::time::Duration;

use cairn_proto::block::{Apply, Content};
use cairn_proto::buffer::BlockBuf;
use cairn_proto::checksum::range_checksums;
use cairn_proto::disk::{DeviceBlock, DiskGeometry, DiskOp};
use cairn_proto::ids::{ClusterId, DeviceUuid, Epoch, GroupId, GroupIndex, Layer};
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::time::Time;

use super::model::{Model, Workload, difference};
use super::rig::*;
use crate::store::api::{CopiedBlock, StoreError, StoreReply, StoreRequest};
use crate::store::superblock::CHECKPOINT_PLACES;
use crate::store::{OpenError, OpenExpectation, Store, StoreLimits, StoreState};
use crate::testing::{Fault, MemoryDevice, Prng};

fn place_of(rig: &Rig, chunk: u32, block: u32, seq: u64) -> DeviceBlock {
    let content = content(range(chunk, block, 1).volume_block(0), version(seq));
    rig.find(&content).expect("it was written")
}

#[test]
fn a_rotten_block_is_reported_and_its_neighbours_are_read() {
    let mut rig = Rig::new(1024, StoreLimits::tiny(), 1);
    rig.create();
    rig.write(0, 0, 5, 1);
    let at = place_of(&rig, 0, 2, 1);
    rig.device.rot(at, 77);
    let StoreReply::Read { blocks, bytes } = rig.read(0, 0, 5) else {
        panic!("the others can be read")
    };
    let damaged: Vec<bool> = blocks.iter().map(|block| block.content == Content::Damaged).collect();
    assert_eq!(damaged, [false, false, true, false, false]);
    assert_eq!(blocks[2].version, version(1));
    let expected = contents(range(0, 0, 5), version(1));
    assert_eq!(
        bytes.concat(),
        [&expected[..2 * BLOCK_BYTES], &expected[3 * BLOCK_BYTES..]].concat()
    );
    assert_eq!(rig.store.counters().blocks_damaged, 1);
}

#[test]
fn a_copy_of_the_same_version_mends_what_was_found_damaged_and_nothing_else() {
    let mut rig = Rig::new(1024, StoreLimits::tiny(), 1);
    rig.create();
    rig.write(0, 0, 3, 1);
    let at = place_of(&rig, 0, 1, 1);
    rig.device.rot(at, 77);
    let copy = |rig: &mut Rig| {
        let bytes = contents(range(0, 0, 3), version(1));
        let checksums = range_checksums(GROUP.volume, range(0, 0, 3), &bytes);
        let state = |checksum| CopiedBlock {
            content: Content::Data(checksum),
            version: version(1),
        };
        rig.call(StoreRequest::Copy {
            group: GROUP,
            layer: Layer(0),
            range: range(0, 0, 3),
            blocks: checksums.into_iter().map(state).collect(),
            bytes: BlockBuf::copied_from(&bytes).freeze(),
            apply: Apply::IfNewer,
        })
    };
    let written = rig.store.counters().blocks_written;
    assert!(matches!(copy(&mut rig), StoreReply::Durable { .. }));
    assert_eq!(
        rig.store.counters().blocks_written,
        written,
        "nothing is known to be damaged yet"
    );
    rig.read(0, 0, 3);
    assert!(matches!(copy(&mut rig), StoreReply::Durable { .. }));
    assert_eq!(
        rig.store.counters().blocks_written,
        written + 1,
        "one block was damaged"
    );
    for _ in 0..2 {
        let StoreReply::Read { bytes, .. } = rig.read(0, 0, 3) else {
            panic!("it can be read")
        };
        assert_eq!(bytes.concat(), contents(range(0, 0, 3), version(1)));
        rig = rig.reopen(true);
        rig.settle();
    }
}

#[test]
fn a_bad_sector_takes_no_other_block_with_it() {
    let mut rig = Rig::new(1024, StoreLimits::tiny(), 1);
    rig.create();
    rig.write(0, 0, 6, 1);
    let bad = place_of(&rig, 0, 2, 1);
    let read_with_bad_sector = |rig: &mut Rig, start, count| {
        let ticket = rig.submit(read_request(0, start, count));
        let hits = |op: &DiskOp| matches!(op, DiskOp::Read { at, blocks, .. } if (at.0..at.0 + u64::from(*blocks)).contains(&bad.0));
        while rig.step_with(|op| hits(op).then(Fault::default)) {}
        match rig.replies.remove(&ticket).unwrap() {
            StoreReply::Read { blocks, bytes } => (blocks, bytes.concat()),
            other => panic!("the others can be read: {other:?}"),
        }
    };
    let expected = contents(range(0, 0, 6), version(1));
    let (blocks, bytes) = read_with_bad_sector(&mut rig, 0, 6);
    let damaged: Vec<bool> = blocks.iter().map(|block| block.content == Content::Damaged).collect();
    assert_eq!(damaged, [false, false, true, false, false, false]);
    assert_eq!(blocks[2].version, version(1));
    assert_eq!(
        bytes,
        [&expected[..2 * BLOCK_BYTES], &expected[3 * BLOCK_BYTES..]].concat()
    );
    let (blocks, bytes) = read_with_bad_sector(&mut rig, 2, 1);
    assert_eq!((blocks[0].content, bytes.len()), (Content::Damaged, 0));
    // The sector can be read again: so can the block.
    let StoreReply::Read { bytes, .. } = rig.read(0, 0, 6) else {
        panic!("it can be read")
    };
    assert_eq!(bytes.concat(), expected);
    assert_eq!(rig.store.state(), StoreState::Open);
    rig.store.check_invariants();
}

#[test]
fn a_read_that_fails_once_is_tried_again() {
    let mut rig = Rig::new(1024, StoreLimits::tiny(), 1);
    rig.create();
    rig.write(0, 0, 6, 1);
    let ticket = rig.submit(read_request(0, 0, 6));
    rig.step_with(|op| matches!(op, DiskOp::Read { .. }).then(Fault::default));
    rig.settle();
    let Some(StoreReply::Read { bytes, .. }) = rig.replies.remove(&ticket) else {
        panic!("it can be read")
    };
    assert_eq!(bytes.concat(), contents(range(0, 0, 6), version(1)));
    assert_eq!(rig.store.counters().blocks_damaged, 0);
}

#[test]
fn after_a_failed_write_or_flush_nothing_is_acknowledged_until_it_is_opened_anew() {
    for flush in [false, true] {
        let mut rig = Rig::new(1024, StoreLimits::tiny(), 1);
        rig.create();
        rig.write(0, 0, 4, 1);
        let fails = |op: &DiskOp| match op {
            DiskOp::Write { .. } => !flush,
            DiskOp::Flush { .. } => flush,
            DiskOp::Read { .. } => false,
        };
        let poisoned = |reply| matches!(reply, StoreReply::Failed(StoreError::Poisoned(_)));
        let mut acknowledged = 1;
        // A batch that is a single write needs no flush: the first one is that of a checkpoint.
        for seq in (2..200).step_by(2) {
            let first = rig.submit(write_request(0, 0, 4, seq));
            let second = rig.submit(write_request(0, 2, 4, seq + 1));
            while rig.step_with(|op| fails(op).then(Fault::default)) {}
            let (first, second) = (rig.replies.remove(&first), rig.replies.remove(&second));
            if !poisoned(first.clone().unwrap()) {
                assert!(flush && matches!(first, Some(StoreReply::Durable { .. })), "{first:?}");
                acknowledged = seq;
            }
            if poisoned(second.unwrap()) {
                break;
            }
        }
        assert!(matches!(rig.store.state(), StoreState::Poisoned(_)), "flush {flush}");
        assert!(poisoned(rig.write(1, 0, 1, 999)));
        let StoreReply::Read { bytes, .. } = rig.read(0, 0, 2) else {
            panic!("reads go on")
        };
        assert_eq!(bytes.concat(), contents(range(0, 0, 2), version(acknowledged)));
        rig = rig.reopen(true);
        rig.settle();
        assert!(matches!(rig.write(0, 0, 4, 999), StoreReply::Durable { .. }));
    }
}

#[test]
fn rot_in_a_confirmed_batch_is_reported_and_nothing_older_comes_back() {
    let mut rig = Rig::new(1024, StoreLimits::tiny(), 1);
    rig.create();
    rig.write(0, 0, 2, 1);
    rig.write(0, 0, 2, 2);
    rig.pass_time();
    let at = place_of(&rig, 0, 1, 2);
    rig.device.rot(at, 5);
    rig = rig.reopen(true);
    rig.settle();
    let StoreReply::Read { blocks, .. } = rig.read(0, 0, 2) else {
        panic!("it can be read")
    };
    assert_eq!((blocks[1].content, blocks[1].version), (Content::Damaged, version(2)));
    assert!(matches!(blocks[0].content, Content::Data(_)));
}

#[test]
fn a_last_batch_that_can_not_be_read_is_kept_and_its_damage_reported() {
    let mut rig = Rig::new(1024, StoreLimits::tiny(), 1);
    rig.create();
    rig.write(0, 0, 3, 1);
    let commit = rig.write(0, 0, 3, 2);
    let StoreReply::Durable { commit, .. } = commit else {
        panic!("{commit:?}")
    };
    let bad = place_of(&rig, 0, 1, 2);
    rig = rig.reopen(true);
    let fails = |op: &DiskOp| matches!(op, DiskOp::Read { at, .. } if *at == bad);
    while rig.step_with(|op| fails(op).then(Fault::default)) {}
    assert_eq!(rig.store.recovered_seq(), commit, "it may have been acknowledged");
    rig.store.check_invariants();
    // The sector comes back with something else, as sectors do.
    rig.device.rot(bad, 9);
    for _ in 0..2 {
        let StoreReply::Read { blocks, bytes } = rig.read(0, 0, 3) else {
            panic!("the others can be read")
        };
        assert_eq!((blocks[1].content, blocks[1].version), (Content::Damaged, version(2)));
        assert_eq!(bytes.concat().len(), 2 * BLOCK_BYTES);
        rig = rig.reopen(true);
        rig.settle();
    }
}

#[test]
fn damage_to_any_one_block_of_the_newest_checkpoint_loses_nothing() {
    let mut damaged = 0;
    for seed in 0..6 {
        let mut prng = Prng::new(seed);
        let mut rig = Rig::new(1100, StoreLimits::tiny(), seed);
        rig.create();
        let mut model = Model {
            replica: Some((Epoch(1), 1)),
            ..Model::default()
        };
        let mut workload = Workload::new(330, 24);
        let wanted = rig.store.counters().checkpoints + prng.between(2, 5);
        while rig.store.counters().checkpoints < wanted {
            let request = workload.request(&mut prng, false);
            let reply = rig.call(request.clone());
            assert!(matches!(reply, StoreReply::Durable { .. }), "{reply:?}");
            model.apply(&request);
        }
        rig.pass_time();
        for bad in newest_checkpoint(&rig.device) {
            let mut device = rig.device.clone();
            device.rot(bad, prng.below(32768) as usize);
            let mut other = Rig::opening(device, StoreLimits::tiny(), seed);
            other.settle();
            assert_eq!(other.store.state(), StoreState::Open, "{bad}");
            let found = Model::observe(&mut other).unwrap();
            assert_eq!(found, model, "{bad} of seed {seed}: {}", difference(&model, &found));
            damaged += 1;
        }
    }
    assert!(damaged >= 12, "{damaged} blocks were damaged");
}

/// The header of the newest checkpoint, and the blocks of its directory.
fn newest_checkpoint(device: &MemoryDevice) -> Vec<DeviceBlock> {
    let number = |at: usize, block: &[u8], bytes: usize| {
        let mut number = [0; 8];
        number[..bytes].copy_from_slice(&block[at..at + bytes]);
        u64::from_le_bytes(number)
    };
    let newest = CHECKPOINT_PLACES
        .into_iter()
        .max_by_key(|at| number(40, device.peek(*at), 8))
        .unwrap();
    let mut blocks = vec![newest];
    let mut next = number(64, device.peek(newest), 4);
    while next != 0 {
        blocks.push(DeviceBlock(next));
        next = number(52, device.peek(DeviceBlock(next)), 4);
    }
    blocks
}

fn refusal(device: MemoryDevice, expect: OpenExpectation, geometry: DiskGeometry) -> OpenError {
    let mut rig = Rig::opening(device, StoreLimits::tiny(), 1);
    rig.store = Store::open(expect, geometry, StoreLimits::tiny(), Time::ZERO);
    rig.device.power_cut(&mut Prng::new(1));
    rig.take_actions();
    rig.settle();
    match rig.store.state() {
        StoreState::Refused(error) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_device_that_is_not_the_expected_one_is_refused_with_words() {
    let geometry = DiskGeometry {
        blocks: 1024,
        volatile_cache: true,
    };
    let any = OpenExpectation::default();
    assert_eq!(refusal(MemoryDevice::new(geometry), any, geometry), OpenError::Blank);
    let mut foreign = MemoryDevice::new(geometry);
    foreign.poke(DeviceBlock(1), &[7; BLOCK_BYTES]);
    assert!(matches!(refusal(foreign, any, geometry), OpenError::Foreign { .. }));
    let device = formatted(geometry);
    let cluster = OpenExpectation {
        cluster: Some(ClusterId([9; 16])),
        device: None,
    };
    let error = refusal(device.clone(), cluster, geometry);
    assert!(matches!(error, OpenError::OtherCluster { .. }));
    assert!(error.to_string().contains("09090909"));
    let uuid = OpenExpectation {
        cluster: Some(params().cluster),
        device: Some(DeviceUuid([8; 16])),
    };
    assert!(matches!(
        refusal(device.clone(), uuid, geometry),
        OpenError::OtherDevice { .. }
    ));
    let short = DiskGeometry {
        blocks: 700,
        ..geometry
    };
    let truncated = refusal(device.clone(), any, short);
    assert!(matches!(
        truncated,
        OpenError::Truncated {
            expected: 1024,
            found: 700
        }
    ));
    let mut headless = device;
    CHECKPOINT_PLACES
        .iter()
        .for_each(|at| headless.poke(*at, &[7; BLOCK_BYTES]));
    assert!(matches!(refusal(headless, any, geometry), OpenError::Damaged { .. }));
}

#[test]
fn nothing_is_served_before_it_is_open() {
    let geometry = DiskGeometry {
        blocks: 1024,
        volatile_cache: true,
    };
    let mut rig = Rig::opening(formatted(geometry), StoreLimits::tiny(), 1);
    let ticket = rig.submit(read_request(0, 0, 1));
    let reply = rig.replies.remove(&ticket).unwrap();
    assert!(matches!(reply, StoreReply::Failed(StoreError::Opening)));
}

#[test]
fn an_index_page_that_can_not_be_read_fails_who_needs_it_and_may_come_back() {
    let limits = StoreLimits {
        index_memory_max: 5 << 10,
        ..StoreLimits::tiny()
    };
    let mut rig = Rig::new(1024, limits, 1);
    rig.create();
    for page in 0..8 {
        rig.write(0, page * 256, 1, u64::from(page) + 1);
    }
    let read = rig.submit(read_request(0, 0, 1));
    let write = rig.submit(write_request(0, 256, 1, 99));
    while rig.step_with(|op| matches!(op, DiskOp::Read { .. }).then(Fault::default)) {}
    for ticket in [read, write] {
        let reply = rig.replies.remove(&ticket).unwrap();
        assert!(
            matches!(reply, StoreReply::Failed(StoreError::Unreadable(_))),
            "{reply:?}"
        );
    }
    let StoreReply::Read { bytes, .. } = rig.read(0, 0, 1) else {
        panic!("it can be read again")
    };
    assert_eq!(bytes.concat(), contents(range(0, 0, 1), version(1)));
    assert!(matches!(rig.write(0, 256, 1, 99), StoreReply::Durable { .. }));
}

/// A device whose log, when it is replayed, needs the first two index pages that a checkpoint has written; with their places.
fn replay_needs_two_pages() -> (Rig, [DeviceBlock; 2]) {
    let mut rig = Rig::new(1024, StoreLimits::tiny(), 1);
    rig.create();
    for page in 0..8 {
        rig.write(0, page * 256, 1, u64::from(page) + 1);
    }
    let place_of = |rig: &Rig, seq| {
        let is_page = |block: &[u8; BLOCK_BYTES]| {
            block[..8] == version(seq).to_bits().to_le_bytes() && block[16..].iter().all(|byte| *byte == 0)
        };
        let mut places = (4..1023).map(DeviceBlock);
        places
            .find(|at| is_page(rig.device.peek(*at)))
            .expect("it was written by a checkpoint")
    };
    let pages = [1, 2].map(|seq| place_of(&rig, seq));
    for page in 0..2 {
        assert!(matches!(
            rig.write(0, page * 256 + 1, 1, 20),
            StoreReply::Durable { .. }
        ));
    }
    (rig.reopen(true), pages)
}

/// Goes on with reads of any of these places failing.
fn step_without(rig: &mut Rig, unreadable: &[DeviceBlock]) -> bool {
    let covers = |op: &DiskOp| match op {
        DiskOp::Read { at, blocks, .. } => {
            let read = at.0..at.0 + u64::from(*blocks);
            unreadable.iter().any(|place| read.contains(&place.0))
        }
        _ => false,
    };
    rig.step_with(|op| covers(op).then(Fault::default))
}

#[test]
fn an_index_page_that_can_not_be_read_for_seconds_while_the_log_is_replayed_is_not_lost() {
    let (mut rig, [page, _]) = replay_needs_two_pages();
    let mut waited_for = 0;
    while rig.now < Time::ZERO + Duration::from_secs(3) && step_without(&mut rig, &[page]) {
        if let StoreState::Opening(progress) = rig.store.state() {
            waited_for = progress.waits_for.map_or(waited_for, |(place, _)| place);
        }
    }
    assert!(
        matches!(rig.store.state(), StoreState::Opening(_)),
        "{:?}",
        rig.store.state()
    );
    assert_eq!(waited_for, page.0, "it says what it waits for");
    rig.settle();
    assert_eq!(rig.store.lost_parts().map(|lost| lost.count), Some(0));
    rig.store.check_invariants();
    for (block, seq) in [(0, 1), (1, 20)] {
        let StoreReply::Read { bytes, .. } = rig.read(0, block, 1) else {
            panic!("it is there")
        };
        assert_eq!(bytes.concat(), contents(range(0, block, 1), version(seq)));
    }
}

#[test]
fn an_index_page_that_can_not_be_read_for_good_is_lost_and_named() {
    let (mut rig, [page, _]) = replay_needs_two_pages();
    while step_without(&mut rig, &[page]) {}
    assert_eq!(rig.store.state(), StoreState::Open);
    let lost = rig.store.lost_parts().expect("it is open").clone();
    assert_eq!((lost.count, lost.noted.len()), (1, 1), "{lost}");
    assert_eq!(u64::from(lost.noted[0].0), page.0);
    assert!(lost.to_string().contains("can't be read"), "{lost}");
    let reply = rig.read(0, 0, 1);
    assert!(
        matches!(reply, StoreReply::Failed(StoreError::IndexDamaged)),
        "{reply:?}"
    );
    assert!(matches!(rig.read(0, 256, 1), StoreReply::Read { .. }));
    let other = GroupId {
        index: GroupIndex(GROUP.index.0 + 1),
        ..GROUP
    };
    assert_eq!(
        [GROUP, other].map(|group| rig.store.is_index_lost(group)),
        [true, false]
    );
    // It is dropped and made anew, as if both were asked for at once.
    let epoch = Epoch(1);
    let drop = rig.submit(StoreRequest::DropReplica { group: GROUP, epoch });
    let (role, epoch) = (2, Epoch(2));
    let create = rig.submit(StoreRequest::CreateReplica {
        group: GROUP,
        role,
        epoch,
    });
    rig.settle();
    for ticket in [drop, create] {
        let reply = rig.replies.remove(&ticket);
        assert!(matches!(reply, Some(StoreReply::Durable { .. })), "{reply:?}");
    }
    assert!(!rig.store.is_index_lost(GROUP));
    assert!(matches!(rig.write(0, 0, 1, 30), StoreReply::Durable { .. }));
    rig.store.check_invariants();
}

#[test]
fn two_index_pages_that_can_not_be_read_for_good_are_given_up_after_as_many_tries_as_one() {
    let took = |unreadable: &dyn Fn([DeviceBlock; 2]) -> Vec<DeviceBlock>| {
        let (mut rig, pages) = replay_needs_two_pages();
        let begun = rig.now;
        while rig.now < begun + Duration::from_secs(60) && step_without(&mut rig, &unreadable(pages)) {}
        assert_eq!(rig.store.state(), StoreState::Open);
        (rig.now - begun, rig.store.lost_parts().expect("it is open").count)
    };
    let (one, lost) = took(&|[page, _]| vec![page]);
    assert_eq!(lost, 1);
    let (two, lost) = took(&|pages| pages.to_vec());
    assert_eq!(lost, 2);
    assert!(two < one + Duration::from_secs(1), "{two:?}, and one alone {one:?}");
}

#[test]
fn blocks_whose_index_page_is_rotten_are_neither_read_nor_written_and_the_others_are() {
    let limits = StoreLimits {
        index_memory_max: 5 << 10,
        ..StoreLimits::tiny()
    };
    let mut rig = Rig::new(1024, limits, 1);
    rig.create();
    for page in 0..8 {
        rig.write(0, page * 256, 1, u64::from(page) + 1);
    }
    // An index page is recognised by its first entry: the version that was written.
    let page = (4..1023).map(DeviceBlock).find(|at| {
        let block = rig.device.peek(*at);
        block[..8] == version(1).to_bits().to_le_bytes() && block[16..].iter().all(|byte| *byte == 0)
    });
    rig.device.rot(page.expect("it was written by a checkpoint"), 3);
    for round in 0..2 {
        let damaged = |reply| matches!(reply, StoreReply::Failed(StoreError::IndexDamaged));
        assert!(damaged(rig.read(0, 0, 1)), "round {round}");
        assert!(damaged(rig.write(0, 5, 1, 99)), "round {round}");
        assert!(matches!(rig.read(0, 256, 256), StoreReply::Read { .. }));
        for block in 0..30 {
            let reply = rig.write(1, block, 1, 100 + round);
            assert!(matches!(reply, StoreReply::Durable { .. }), "{reply:?}");
        }
        rig = rig.reopen(true);
        rig.settle();
        assert_eq!(rig.store.state(), StoreState::Open);
    }
    rig.call(StoreRequest::DropReplica {
        group: GROUP,
        epoch: Epoch(1),
    });
    rig.create();
    assert!(matches!(rig.write(0, 0, 1, 1), StoreReply::Durable { .. }));
}
