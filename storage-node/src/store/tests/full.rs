//! Devices that are full, large, or files.

use std::collections::BTreeSet;

use cairn_proto::disk::DiskOp;
use cairn_proto::limits::BLOCK_BYTES;

use super::rig::*;
use crate::store::api::{StoreError, StoreReply, WriteContent};
use crate::store::{StoreLimits, StoreState};

/// Writes from a block on until the device is full; returns the first block that did not fit.
fn fill(rig: &mut Rig, from: u32, seq: u64) -> u32 {
    for block in from.. {
        match rig.write(block / 16384, block % 16384, 1, seq) {
            StoreReply::Durable { .. } => {}
            StoreReply::Failed(StoreError::NoSpace) => return block,
            other => panic!("{other:?}"),
        }
    }
    unreachable!("the device is finite")
}

#[test]
fn a_full_device_reads_overwrites_and_discards_and_then_has_space_again() {
    let limits = StoreLimits {
        overwrite_reserve_blocks: 64,
        ..StoreLimits::tiny()
    };
    let mut rig = Rig::new(600, limits, 1);
    rig.create();
    let blocks = fill(&mut rig, 0, 1);
    assert!(blocks > 300, "{blocks} of 600 blocks were usable");
    for round in 0..300u64 {
        let block = (round * 7 % u64::from(blocks)) as u32;
        let reply = rig.write(0, block, 1, 2 + round);
        assert!(
            matches!(reply, StoreReply::Durable { .. }),
            "overwrite {round}: {reply:?}"
        );
    }
    // What checkpoints need differs from time to time, and with it how much data fits; not by much.
    let more = fill(&mut rig, blocks, 999);
    assert!(more < blocks + 64, "{blocks} blocks fitted, then {more}");
    assert!(matches!(rig.read(0, 0, 256), StoreReply::Read { .. }));
    rig = rig.reopen(true);
    rig.settle();
    let blocks = fill(&mut rig, more, 999);
    assert!(blocks < more + 64, "{more} blocks fitted, then {blocks}");
    let reply = rig.call(hole_request(0, 0, 100, 1000, WriteContent::Discard));
    assert!(matches!(reply, StoreReply::Durable { .. }), "{reply:?}");
    assert_eq!(rig.store.space().data, u64::from(blocks) - 100);
    for block in 0..80 {
        let reply = rig.write(0, blocks + 1 + block, 1, 1001);
        assert!(
            matches!(reply, StoreReply::Durable { .. }),
            "write {block} after the discard: {reply:?}"
        );
    }
    rig.store.check_invariants();
}

#[test]
fn trimming_a_fresh_tebibyte_takes_no_space_and_little_memory() {
    let mut rig = Rig::new(8192, StoreLimits::default(), 1);
    rig.create();
    let free = rig.store.space().free;
    for chunk in 0..16384 {
        rig.submit(hole_request(chunk, 0, 16384, 1, WriteContent::Discard));
        if chunk % 512 == 511 {
            rig.settle();
        }
    }
    rig.settle();
    assert_eq!(rig.replies.len(), 16384);
    assert!(
        rig.replies
            .values()
            .all(|reply| matches!(reply, StoreReply::Durable { .. }))
    );
    assert_eq!(rig.store.counters().index_pages_resident, 0);
    let used = free - rig.store.space().free;
    assert!(used < 1000, "{used} blocks of log and directory");
    let mut rig = rig.reopen(true);
    rig.settle();
    assert_eq!(rig.store.state(), StoreState::Open);
}

#[test]
fn index_pages_leave_memory_and_come_back() {
    let limits = StoreLimits {
        index_memory_max: 20 << 10,
        ..StoreLimits::tiny()
    };
    let mut rig = Rig::new(4096, limits, 1);
    rig.create();
    for page in 0..40 {
        rig.write(page % 2, page / 2 * 256, 1, u64::from(page) + 1);
    }
    for page in 0..40 {
        let StoreReply::Read { bytes, .. } = rig.read(page % 2, page / 2 * 256, 1) else {
            panic!("{page}")
        };
        assert_eq!(
            bytes.concat(),
            contents(range(page % 2, page / 2 * 256, 1), version(u64::from(page) + 1))
        );
    }
    let counters = rig.store.counters();
    assert!(
        counters.index_evictions > 20 && counters.index_loads > 20,
        "{counters:?}"
    );
    // More pages than may stay in memory, wanted by one request.
    let reply = rig.call(hole_request(0, 0, 16384, 99, WriteContent::Zero));
    assert!(matches!(reply, StoreReply::Durable { .. }));
    assert_eq!(rig.store.space().data, 20);
    rig.store.check_invariants();
}

#[test]
fn zeroes_are_written_ahead_of_the_data_and_never_over_it() {
    let limits = StoreLimits {
        zero_ahead: true,
        ..StoreLimits::tiny()
    };
    let mut rig = Rig::new(1024, limits, 1);
    rig.create();
    for block in 0..200 {
        rig.submit(write_request(0, block, 1, 1));
        rig.step();
    }
    rig.settle();
    for reopened in [false, true] {
        if reopened {
            rig = rig.reopen(true);
            rig.settle();
        }
        let StoreReply::Read { bytes, .. } = rig.read(0, 0, 200) else {
            panic!("it can be read")
        };
        assert_eq!(bytes.concat(), contents(range(0, 0, 200), version(1)));
    }
    let counters = rig.store.counters();
    assert!(counters.zeroed_ahead > 0, "{counters:?}");
    rig.store.check_invariants();
}

#[test]
fn small_writes_meet_blocks_that_were_written_before() {
    let limits = StoreLimits {
        zero_ahead: true,
        ..StoreLimits::default()
    };
    let runs = u64::from(limits.run_blocks);
    let mut rig = Rig::new(runs * 16, limits.clone(), 1);
    rig.create();
    let (mut written, mut first_writes) = (BTreeSet::new(), 0);
    // Zeroed while the replica was made, before anybody looks here.
    let zeroed = rig.store.counters().zeroed_ahead + 2 * runs + 64;
    // Each write takes two blocks, its record's page and its data: in all as many as eight runs.
    for i in 0..runs * 4 {
        rig.submit(write_request(0, (i % 4096) as u32, 1, i + 1));
        loop {
            for op in rig.device.in_flight() {
                let DiskOp::Write { at, buffers, .. } = op else {
                    continue;
                };
                let blocks = buffers.iter().map(|buffer| buffer.len() / BLOCK_BYTES).sum::<usize>() as u64;
                let is_zero = buffers.iter().all(|buffer| buffer.iter().all(|byte| *byte == 0));
                assert!(
                    !is_zero || blocks == u64::from(limits.zero_ahead_blocks) || at.0 < zeroed,
                    "{blocks} zeroes"
                );
                for block in (at.0..at.0 + blocks).filter(|block| *block > zeroed) {
                    first_writes += u64::from(written.insert(block) && !is_zero);
                }
            }
            if !rig.step() {
                break;
            }
        }
    }
    assert!(written.len() as u64 > 2 * runs);
    assert_eq!(
        first_writes, 0,
        "blocks that were not zeroed before something was written there"
    );
    rig.store.check_invariants();
}

#[test]
fn a_small_write_is_one_durable_device_write_of_two_blocks() {
    let mut rig = Rig::new(4096, StoreLimits::default(), 1);
    rig.create();
    rig.write(0, 0, 1, 1);
    let before = rig.store.counters();
    rig.submit(write_request(0, 9, 1, 2));
    let writes: Vec<(usize, bool)> = rig.device.in_flight().map(written).collect();
    assert_eq!(writes, [(2 * BLOCK_BYTES, true)]);
    rig.settle();
    let after = rig.store.counters();
    assert_eq!(after.device_writes - before.device_writes, 1);
    assert_eq!(after.device_flushes, before.device_flushes);
    // What waits meanwhile shares the next batch.
    for block in 0..65 {
        rig.submit(write_request(1, block * 2, 1, 3));
    }
    rig.settle();
    assert_eq!(rig.store.counters().batches - after.batches, 2);
}

fn written(op: &DiskOp) -> (usize, bool) {
    match op {
        DiskOp::Write { buffers, durable, .. } => (buffers.iter().map(|buffer| buffer.len()).sum(), *durable),
        other => panic!("{other:?}"),
    }
}
