//! The index beside its memory: leaves that come and go, checkpoints in small steps, long discards.

use cairn_proto::disk::{DeviceBlock, DiskOp};
use cairn_proto::ids::Epoch;
use cairn_proto::limits::BLOCK_BYTES;

use super::rig::*;
use crate::store::api::{StoreError, StoreReply, WriteContent};
use crate::store::{StoreLimits, StoreState};

/// Blocks of a tebibyte.
const TEBIBYTE: u64 = 1 << 28;
/// Chunks of a tebibyte.
const CHUNKS: u32 = 1 << 14;

#[test]
fn trimming_a_volume_as_large_as_a_tebibyte_device_leaves_memory_flat() {
    let limits = StoreLimits {
        index_memory_max: 256 << 10,
        ..StoreLimits::default()
    };
    let mut rig = Rig::new(TEBIBYTE, limits.clone(), 1);
    rig.create();
    let free = rig.store.space().free;
    let (mut memory, mut dirty) = (0, 0);
    for (seq, step) in [(1, 1), (2, 16)] {
        for chunk in (0..CHUNKS).step_by(step) {
            rig.submit(hole_request(chunk, 0, 16384, seq, WriteContent::Discard));
            if chunk % 512 >= 512 - step as u32 {
                rig.settle();
                let counters = rig.store.counters();
                memory = memory.max(counters.index_bytes_resident);
                dirty = dirty.max(counters.leaves_dirty);
            }
        }
    }
    assert!(
        rig.replies
            .values()
            .all(|reply| matches!(reply, StoreReply::Durable { .. }))
    );
    let counters = rig.store.counters();
    assert_eq!(counters.index_pages_resident, 0, "no block is listed one by one");
    let most = 2 * limits.index_memory_max as u64;
    assert!(memory < most, "{memory} bytes of index in memory");
    assert!(dirty < 40, "{dirty} leaves were changed at a time");
    // A chunk takes 40 bytes of a leaf.
    assert!((160..200).contains(&counters.leaves), "{} leaves", counters.leaves);
    assert!(counters.leaf_evictions > 100, "{counters:?}");
    let used = free - rig.store.space().free;
    assert!(used < 2000, "{used} blocks of log and directory");
    let mut rig = rig.reopen(true);
    rig.settle();
    assert_eq!(rig.store.state(), StoreState::Open);
    for (chunk, seq) in [(CHUNKS - 16, 2), (CHUNKS - 1, 1)] {
        let StoreReply::Read { blocks, .. } = rig.read(chunk, 0, 1) else {
            panic!("it can be read")
        };
        assert_eq!(blocks[0].version, version(seq));
    }
}

/// Blocks that an operation writes.
fn written(op: &DiskOp) -> u64 {
    match op {
        DiskOp::Write { buffers, .. } => buffers.iter().map(|buffer| (buffer.len() / BLOCK_BYTES) as u64).sum(),
        _ => 0,
    }
}

#[test]
fn a_checkpoint_is_written_a_few_blocks_at_a_time_while_batches_go_on() {
    let limits = StoreLimits {
        checkpoint_dirty_pages: 1000,
        checkpoint_step_blocks: 8,
        checkpoint_writes_in_flight: 2,
        ..StoreLimits::default()
    };
    let mut rig = Rig::new(16384, limits, 1);
    rig.create();
    let place = |page: u32| (page / 60, page % 60 * 256);
    for page in 0..1000 {
        let (chunk, block) = place(page);
        rig.submit(write_request(chunk, block, 1, 1));
        if page % 100 == 99 && page < 999 {
            rig.settle();
        }
    }
    let before = rig.store.counters();
    // The checkpoint begins with the batch that makes the last page dirty; each event sends a step and a batch at most.
    let (mut events, mut late, mut known) = (0u64, 0u64, 0u64);
    let mut in_flight = 0;
    while rig.store.counters().checkpoints == before.checkpoints {
        if events % 16 == 5 && late < 1000 {
            let (chunk, block) = place(late as u32);
            rig.submit(write_request(chunk, block + 1, 1, 2));
            late += 7;
        }
        let before: u64 = rig.device.in_flight().map(written).sum();
        assert!(rig.step(), "it goes on by itself");
        let after: u64 = rig.device.in_flight().map(written).sum();
        known = known.max(after.saturating_sub(before));
        in_flight = in_flight.max(after);
        events += 1;
    }
    assert!(rig.store.counters().checkpoint_blocks - before.checkpoint_blocks > 1000);
    assert!(events > 1000 / 8, "{events} events");
    assert!(late > 50, "batches went on meanwhile: {late}");
    assert!(known < 130, "an event sent {known} blocks");
    rig.settle();
    rig.store.check_invariants();
    let mut rig = rig.reopen(true);
    rig.settle();
    for page in (0..late as u32).step_by(7) {
        let (chunk, block) = place(page);
        let StoreReply::Read { blocks, .. } = rig.read(chunk, block, 2) else {
            panic!("page {page}")
        };
        assert_eq!(
            [blocks[0].version, blocks[1].version],
            [version(1), version(2)],
            "page {page}"
        );
    }
}

/// A device with several leaves, all of them on the device.
fn leaves() -> Rig {
    let limits = StoreLimits {
        index_memory_max: 2 << 10,
        leaf_bytes_max: 120,
        ..StoreLimits::tiny()
    };
    let mut rig = Rig::new(2048, limits, 1);
    rig.create();
    for chunk in 0..12 {
        rig.write(chunk, 0, 2, u64::from(chunk) + 1);
    }
    for block in 0..40 {
        rig.write(99, block, 1, 100);
    }
    rig.settle();
    assert!(rig.store.counters().leaves > 5);
    rig
}

/// The leaves on the device, those that older checkpoints had as well.
fn leaf_blocks(rig: &Rig) -> Vec<DeviceBlock> {
    let blocks = (0..rig.device.geometry().blocks).map(DeviceBlock);
    blocks.filter(|at| rig.device.peek(*at)[..8] == *b"CAIRNLEF").collect()
}

#[test]
fn a_rotten_leaf_makes_its_chunks_damaged_until_the_replica_is_dropped_and_no_others() {
    let mut in_all = 0;
    for leaf in leaf_blocks(&leaves()) {
        let mut rig = leaves();
        rig.device.rot(leaf, 200);
        rig = rig.reopen(true);
        let mut damaged = Vec::new();
        for round in 0..3 {
            rig.settle();
            assert_eq!(rig.store.state(), StoreState::Open);
            let mut now = Vec::new();
            for chunk in 0..12 {
                match rig.read(chunk, 0, 2) {
                    StoreReply::Read { bytes, .. } => {
                        let written = version(u64::from(chunk) + 1);
                        assert_eq!(bytes.concat(), contents(range(chunk, 0, 2), written));
                    }
                    StoreReply::Failed(StoreError::IndexDamaged) => {
                        let reply = rig.write(chunk, 5, 1, 999);
                        assert!(matches!(reply, StoreReply::Failed(StoreError::IndexDamaged)));
                        now.push(chunk);
                    }
                    other => panic!("{other:?}"),
                }
            }
            assert!(round == 0 || now == damaged, "it stays known: {now:?}, {damaged:?}");
            assert!(now.len() < 12);
            damaged = now;
            in_all += damaged.len();
            for block in 0..20 {
                // Others go on, through checkpoints too. Perhaps this is the chunk that is lost.
                rig.write(99, 100 + block, 1, 200 + round);
            }
            rig = rig.reopen(true);
        }
        rig.settle();
        rig.call(crate::store::StoreRequest::DropReplica {
            group: GROUP,
            epoch: Epoch(1),
        });
        rig.create();
        for chunk in 0..12 {
            let reply = rig.write(chunk, 0, 1, 1);
            assert!(matches!(reply, StoreReply::Durable { .. }), "chunk {chunk}: {reply:?}");
        }
        rig.store.check_invariants();
    }
    assert!(in_all > 10, "{in_all} chunks were found damaged");
}
