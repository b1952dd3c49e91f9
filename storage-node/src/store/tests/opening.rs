//! What opening a device costs.

use cairn_proto::disk::{DeviceBlock, DiskOp};
use cairn_proto::ids::{CommitSeq, Epoch, GroupId, Layer, Version, VolumeId};
use cairn_proto::limits::{BLOCK_BYTES, SECTOR_BYTES};

use super::rig::*;
use crate::store::api::{StoreReply, StoreRequest, WriteContent};
use crate::store::limits::RECOVERY_READ_BLOCKS_MAX;
use crate::store::{StoreLimits, StoreState};
use crate::testing::MemoryDevice;

#[test]
fn a_long_log_is_read_ahead_and_index_pages_for_many_batches_together() {
    let limits = StoreLimits::default();
    let mut rig = Rig::new(20_000, limits, 1);
    rig.create();
    let writes = 2500;
    for i in 0..writes {
        // All over some chunks, one block a batch.
        rig.write(i % 4, i * 37 % 16384, 1, u64::from(i) + 1);
    }
    rig.pass_time();
    let log_blocks = u64::from(writes) * 2;
    assert!(rig.store.counters().batches > u64::from(writes));
    let mut rig = rig.reopen(true);
    rig.settle();
    assert_eq!(rig.store.state(), StoreState::Open);
    let counters = rig.store.counters();
    assert!(counters.replayed > u64::from(writes) - 1, "{counters:?}");
    // Beside the log itself: superblocks, what lies beyond the log's end, and a little at each new run.
    let reads = log_blocks / u64::from(RECOVERY_READ_BLOCKS_MAX) + 60;
    assert!(
        counters.device_reads <= reads,
        "{} reads, {reads} would do",
        counters.device_reads
    );
}

/// A group's replica goes and comes back while its leaf is the only one in memory: the leaf that takes its range over has to
/// be read in the middle of what is applied together.
#[test]
fn a_leaf_that_takes_over_the_range_of_another_is_read_when_it_is_needed() {
    let limits = StoreLimits {
        leaf_bytes_max: 256,
        checkpoint_log_pages: 12,
        ..StoreLimits::default()
    };
    let mut rig = Rig::new(4096, limits, 1);
    let other = GroupId {
        volume: VolumeId(GROUP.volume.0 + 1),
        ..GROUP
    };
    let at = |group, chunk, seq| StoreRequest::Write {
        group,
        layer: Layer(0),
        range: range(chunk, 0, 1),
        version: version(seq),
        content: WriteContent::Discard,
    };
    for group in [GROUP, other] {
        rig.call(StoreRequest::CreateReplica {
            group,
            role: 1,
            epoch: Epoch(1),
        });
        for chunk in 0..20 {
            rig.call(at(group, chunk, 1));
        }
    }
    let before = rig.store.counters().checkpoints;
    for seq in 2.. {
        if rig.store.counters().checkpoints > before {
            break;
        }
        rig.call(at(GROUP, 0, seq));
    }
    rig = rig.reopen(false);
    rig.settle();
    let checkpoints = rig.store.counters().checkpoints;
    for request in [
        StoreRequest::DropReplica {
            group: other,
            epoch: Epoch(1),
        },
        StoreRequest::CreateReplica {
            group: other,
            role: 2,
            epoch: Epoch(1),
        },
        at(other, 0, 9),
        at(other, 19, 9),
    ] {
        let reply = rig.call(request);
        assert!(matches!(reply, StoreReply::Durable { .. }), "{reply:?}");
    }
    assert_eq!(rig.store.counters().checkpoints, checkpoints, "the log has it all");
    let mut rig = rig.reopen(true);
    rig.settle();
    assert_eq!(rig.store.state(), StoreState::Open);
    assert!(rig.store.counters().replayed >= 4);
    rig.store.check_invariants();
    for (group, chunk, expected) in [(GROUP, 19, 1), (other, 0, 9), (other, 1, 0), (other, 19, 9)] {
        let reply = rig.call(StoreRequest::Read {
            group,
            layer: Layer(0),
            range: range(chunk, 0, 1),
        });
        let StoreReply::Read { blocks, .. } = reply else {
            panic!("{reply:?}")
        };
        let expected = if expected == 0 {
            Version::ZERO
        } else {
            version(expected)
        };
        assert_eq!(blocks[0].version, expected, "chunk {chunk} of {group}");
    }
}

/// The write in flight of a record: where it goes, and its first block.
fn record_in_flight(rig: &Rig) -> (DeviceBlock, [u8; BLOCK_BYTES]) {
    let write = rig.device.in_flight().find_map(|op| match op {
        DiskOp::Write { at, buffers, .. } if buffers[0].starts_with(b"CAIRNREC") => Some((*at, &buffers[0])),
        _ => None,
    });
    let (at, content) = write.expect("a record is being written");
    (at, content[..BLOCK_BYTES].try_into().expect("a block"))
}

/// Power is cut, and leaves this of the block.
fn left(rig: &Rig, at: DeviceBlock, content: &[u8; BLOCK_BYTES]) -> MemoryDevice {
    let mut device = rig.device.clone();
    device.power_cut_as(crate::testing::Cut::AllLost, &mut crate::testing::Prng::new(1));
    device.poke(at, content);
    device
}

/// The batch that ends recovery ends in zeroes as the record does whose place it takes: of both writes together the first may
/// become whole. It was never acknowledged, and the recovery that did not believe it had not told anybody yet.
#[test]
fn a_torn_record_that_the_end_of_recovery_has_made_whole_is_a_batch_in_flight_as_before() {
    let mut rig = Rig::new(20_000, StoreLimits::default(), 1);
    rig.create();
    let reply = rig.write(0, 0, 1, 1);
    assert!(matches!(reply, StoreReply::Durable { .. }), "{reply:?}");
    rig.pass_time();
    let acknowledged = rig.store.commit_seq();
    rig.submit(hole_request(0, 0, 1, 2, WriteContent::Zero));
    let (at, record) = record_in_flight(&rig);
    // What stood there before shows behind its first sector.
    let mut torn = [0xab; BLOCK_BYTES];
    torn[..SECTOR_BYTES].copy_from_slice(&record[..SECTOR_BYTES]);
    let device = left(&rig, at, &torn);

    let mut rig = Rig::opening(device, StoreLimits::default(), 1);
    while rig.device.in_flight().all(|op| !matches!(op, DiskOp::Write { .. })) {
        assert!(rig.step(), "recovery writes something");
    }
    assert_ne!(rig.store.state(), StoreState::Open);
    let (end, marker) = record_in_flight(&rig);
    assert_eq!(end, at);
    let mut whole = marker;
    whole[..SECTOR_BYTES].copy_from_slice(&torn[..SECTOR_BYTES]);
    assert_eq!(whole, record, "a short record is zero beyond its first sector");
    let device = left(&rig, at, &whole);
    let mut again = Rig::opening(device, StoreLimits::default(), 1);
    again.settle();
    assert_eq!(again.store.state(), StoreState::Open);
    assert_eq!(again.store.recovered_seq(), CommitSeq(acknowledged.0 + 1));
    again.store.check_invariants();

    // Once the marker is durable the store is open, and the batch is gone.
    rig.settle();
    assert_eq!(rig.store.state(), StoreState::Open);
    let mut rig = rig.reopen(true);
    rig.settle();
    let reply = rig.read(0, 0, 1);
    let StoreReply::Read { blocks, .. } = &reply else {
        panic!("a read of a block that was written was answered {reply:?}")
    };
    assert_eq!(blocks[0].version, version(1));
}
