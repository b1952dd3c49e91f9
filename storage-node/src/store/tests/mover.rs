//! Moving fragmented data: it becomes sequential, nothing changes for who reads it, and a crash loses nothing.

use cairn_proto::block::Content;
use cairn_proto::disk::{DeviceBlock, DiskOp};
use cairn_proto::ids::Epoch;

use super::model::*;
use super::rig::*;
use crate::store::api::{StoreError, StoreReply, StoreRequest};
use crate::store::{ScrubCursor, StoreLimits, StoreState};
use crate::testing::{Fault, Prng};

const BLOCKS: u32 = 300;

/// What a round has done.
#[derive(Default, Debug)]
pub(super) struct Round {
    pub(super) moved: u32,
    requests: u32,
    windows: u32,
    pub(super) is_full: bool,
    damaged: usize,
}

/// Looks at all that the device holds once, and again while that makes room.
pub(super) fn round(rig: &mut Rig) -> Round {
    let mut round = Round::default();
    let mut from = Some(ScrubCursor::START);
    while let Some(cursor) = from {
        let StoreReply::Defragmented {
            windows,
            moved,
            is_full,
            damaged,
            next,
            ..
        } = rig.call(StoreRequest::Defragment { from: cursor })
        else {
            panic!("it is answered")
        };
        assert!(
            next.is_none_or(|next| next > cursor || next == ScrubCursor::START),
            "{next:?} is not behind {cursor:?}"
        );
        assert!(round.requests < 2000, "it does not end: {round:?}");
        round.moved += moved;
        round.windows += windows;
        round.requests += 1;
        round.is_full |= is_full;
        round.damaged += damaged.len();
        from = next;
    }
    round
}

/// The runs of places that the blocks stand in. `seqs` has the version of each.
pub(super) fn extents(rig: &Rig, seqs: &[u64]) -> usize {
    let mut by_content = std::collections::BTreeMap::new();
    for at in (0..rig.device.geometry().blocks).map(DeviceBlock) {
        by_content.insert(rig.device.peek(at).to_vec(), at.0);
    }
    let places = (0..).zip(seqs).map(|(block, seq)| {
        let content = content(range(0, block, 1).volume_block(0), version(*seq));
        by_content[&content]
    });
    let places: Vec<u64> = places.collect();
    1 + places.windows(2).filter(|pair| pair[0] + 1 != pair[1]).count()
}

/// A sequential area, written over one block at a time in random order. Returns the version of each block.
fn fragmented(rig: &mut Rig) -> Vec<u64> {
    rig.create();
    rig.write(0, 0, 256, 1);
    rig.write(0, 256, BLOCKS - 256, 1);
    let mut order: Vec<u32> = (0..BLOCKS).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, rig.prng.below(i as u64 + 1) as usize);
    }
    let mut seqs = vec![1; BLOCKS as usize];
    for (seq, block) in (2..).zip(order) {
        rig.write(0, block, 1, seq);
        seqs[block as usize] = seq;
    }
    seqs
}

#[test]
fn what_was_overwritten_at_random_is_sequential_again_and_the_same() {
    for volatile_cache in [true, false] {
        let mut rig = Rig::on(4096, volatile_cache, StoreLimits::tiny(), 3);
        let seqs = fragmented(&mut rig);
        let before = (extents(&rig, &seqs), Model::observe(&mut rig).unwrap());
        assert!(before.0 > 200, "{} extents", before.0);
        let moved = round(&mut rig);
        assert_eq!((moved.moved, moved.is_full, moved.damaged), (BLOCKS, false, 0));
        let after = extents(&rig, &seqs);
        assert!(after <= 8, "{after} extents after, {} before", before.0);
        assert_eq!(Model::observe(&mut rig).unwrap(), before.1);
        assert_eq!(rig.store.counters().blocks_moved, u64::from(BLOCKS));
        assert_eq!(round(&mut rig).moved, 0, "it is sequential now");
        rig.store.check_invariants();
        assert_eq!(rig.store.space().data, u64::from(BLOCKS));
        rig = rig.reopen(true);
        rig.settle();
        assert_eq!(Model::observe(&mut rig).unwrap(), before.1);
        rig.store.check_invariants();
    }
}

#[test]
fn what_is_sequential_is_passed_by_without_loading_its_index() {
    let mut rig = Rig::new(4096, StoreLimits::tiny(), 1);
    rig.create();
    for page in 0..20 {
        rig.write(page / 10, page % 10 * 256, 80, 1 + u64::from(page));
    }
    rig.pass_time();
    let before = rig.store.counters();
    let looked = round(&mut rig);
    let after = rig.store.counters();
    assert_eq!((looked.moved, looked.windows, looked.requests), (0, 20, 1));
    assert_eq!(after.index_loads, before.index_loads);
    assert_eq!(after.index_pages_resident, before.index_pages_resident);
    assert_eq!(after.device_writes, before.device_writes);
}

#[test]
fn a_damaged_block_stays_where_it_is_and_is_reported() {
    let mut rig = Rig::new(4096, StoreLimits::tiny(), 5);
    let seqs = fragmented(&mut rig);
    let name = range(0, 40, 1).volume_block(0);
    let at = rig.find(&content(name, version(seqs[40]))).unwrap();
    rig.device.rot(at, 99);
    let moved = round(&mut rig);
    assert_eq!((moved.moved, moved.damaged), (BLOCKS - 1, 1));
    let StoreReply::Read { blocks, bytes } = rig.read(0, 39, 3) else {
        panic!("it can be read")
    };
    let states: Vec<_> = blocks.iter().map(|block| block.version).collect();
    assert_eq!(states, [39, 40, 41].map(|block| version(seqs[block])));
    assert_eq!(blocks[1].content, Content::Damaged);
    assert_eq!(bytes.iter().map(|b| b.len()).sum::<usize>(), 2 * 4096);
    rig.store.check_invariants();
}

#[test]
fn on_a_device_without_space_nothing_is_moved_and_it_goes_on() {
    let limits = StoreLimits {
        overwrite_reserve_blocks: 64,
        ..StoreLimits::tiny()
    };
    let mut rig = Rig::new(480, limits, 1);
    let seqs = fragmented(&mut rig);
    let before = (rig.store.space().free, extents(&rig, &seqs));
    let looked = round(&mut rig);
    assert_eq!((looked.moved, looked.is_full), (0, true));
    assert_eq!((rig.store.space().free, extents(&rig, &seqs)), before);
    for seq in 1000..1100 {
        let reply = rig.write(0, seq as u32 % BLOCKS, 1, seq);
        assert!(matches!(reply, StoreReply::Durable { .. }), "{reply:?}");
    }
    rig.store.check_invariants();
}

#[test]
fn a_failed_write_of_a_move_stops_the_store_and_is_answered() {
    let mut rig = Rig::new(4096, StoreLimits::tiny(), 5);
    fragmented(&mut rig);
    let ticket = rig.submit(StoreRequest::Defragment {
        from: ScrubCursor::START,
    });
    while rig.step_with(|op| matches!(op, DiskOp::Write { .. }).then(Fault::default)) {}
    let reply = rig.replies.remove(&ticket);
    assert!(
        matches!(reply, Some(StoreReply::Failed(StoreError::Poisoned(_)))),
        "{reply:?}"
    );
    let reply = rig.call(StoreRequest::Defragment {
        from: ScrubCursor::START,
    });
    assert!(
        matches!(reply, StoreReply::Failed(StoreError::Poisoned(_))),
        "{reply:?}"
    );
}

/// Moves data while it is written over, and cuts the power after every operation of the device. What is recovered is
/// what was acknowledged, with the write in flight or without. `scattered`: so many blocks are there at the start, and free
/// space has no long runs. Returns how many blocks were moved; then, how many to make room.
pub(super) fn move_run(limits: &StoreLimits, seed: u64, operations: u32, scattered: u32) -> Result<u32, String> {
    let mut prng = Prng::new(seed);
    let mut rig = Rig::on(900, seed % 4 != 3, limits.clone(), seed);
    rig.create();
    let mut acknowledged = Model {
        replica: Some((Epoch(1), 1)),
        ..Model::default()
    };
    let mut seq = 1;
    for _ in 0..scattered * 6 {
        let block = prng.below(scattered.into()) as u32;
        let request = write_request(0, block, 1, seq);
        rig.call(request.clone());
        acknowledged.apply(&request);
        seq += 1;
    }
    let mut from = ScrubCursor::START;
    let (mut moving, mut write): (Option<u64>, Option<(u64, StoreRequest)>) = (None, None);
    let mut moved_blocks = 0;
    for operation in 0..operations {
        let words = |error: String| format!("seed {seed}, operation {operation}: {error}");
        if moving.is_none() && (scattered > 0 || prng.chance(1, 3)) {
            moving = Some(rig.submit(StoreRequest::Defragment { from }));
        }
        if write.is_none() && prng.chance(if scattered > 0 { 1 } else { 6 }, 8) {
            let start = prng.below(40) as u32;
            let request = write_request(0, start, prng.between(1, 2) as u32, seq);
            seq += 1;
            write = Some((rig.submit(request.clone()), request));
        }
        if !rig.step() {
            rig.pass_time();
        }
        if let Some((ticket, request)) = write.take() {
            match rig.replies.remove(&ticket) {
                None => write = Some((ticket, request)),
                Some(StoreReply::Durable { .. }) => acknowledged.apply(&request),
                Some(other) => return Err(words(format!("a write was answered {other:?}"))),
            }
        }
        if let Some(reply) = moving.and_then(|ticket| rig.replies.remove(&ticket)) {
            let StoreReply::Defragmented {
                moved, damaged, next, ..
            } = reply
            else {
                return Err(words(format!("a move was answered {reply:?}")));
            };
            if !damaged.is_empty() {
                return Err(words(format!("{damaged:?} is damaged")));
            }
            moved_blocks += moved;
            (moving, from) = (None, next.unwrap_or(ScrubCursor::START));
        }
        let mut device = rig.device.clone();
        device.power_cut(&mut prng);
        let mut after = Rig::opening(device, limits.clone(), prng.below(u64::MAX));
        after.settle();
        if after.store.state() != StoreState::Open {
            return Err(words(format!("it is {:?}", after.store.state())));
        }
        let found = Model::observe(&mut after).map_err(words)?;
        let mut with_write = acknowledged.clone();
        write.iter().for_each(|(_, request)| with_write.apply(request));
        if found != acknowledged && found != with_write {
            return Err(words(difference(&acknowledged, &found)));
        }
        if after.store.space().data != found.data_blocks() {
            return Err(words(format!("{} blocks hold data", after.store.space().data)));
        }
        after.store.check_invariants();
        rig.store.check_invariants();
    }
    rig.settle();
    let found = Model::observe(&mut rig)?;
    write.iter().for_each(|(_, request)| acknowledged.apply(request));
    if found != acknowledged {
        return Err(difference(&acknowledged, &found));
    }
    let evacuated = rig.store.counters().blocks_evacuated as u32;
    Ok(if scattered > 0 { evacuated } else { moved_blocks })
}

#[test]
fn a_replica_that_is_dropped_during_a_move_leaves_nothing_behind() {
    for steps in (0..60).step_by(3) {
        let mut rig = Rig::new(4096, StoreLimits::tiny(), steps);
        fragmented(&mut rig);
        let ticket = rig.submit(StoreRequest::Defragment {
            from: ScrubCursor::START,
        });
        (0..steps).all(|_| rig.step());
        rig.call(StoreRequest::DropReplica {
            group: GROUP,
            epoch: Epoch(1),
        });
        let reply = rig.replies.remove(&ticket);
        assert!(matches!(reply, Some(StoreReply::Defragmented { .. })), "{reply:?}");
        rig.create();
        rig.pass_time();
        rig.store.check_invariants();
        assert_eq!(rig.store.space().data, 0, "after {steps} steps");
        let free = rig.store.space().free;
        rig = rig.reopen(false);
        rig.settle();
        // Opening finds out anew what is taken: but for a few pages of the log it is the same.
        assert!(rig.store.space().free.abs_diff(free) < 40, "after {steps} steps");
    }
}

pub(super) fn move_limits(seed: u64) -> StoreLimits {
    let mut prng = Prng::new(seed);
    StoreLimits {
        overwrite_reserve_blocks: 32,
        run_blocks: prng.between(1, 20) as u32,
        checkpoint_log_pages: prng.between(2, 20),
        index_memory_max: prng.between(1, 20) as usize * 1024,
        ..StoreLimits::tiny()
    }
}

#[test]
fn a_power_cut_at_any_point_of_a_move_loses_nothing() {
    let moved: u32 = (0..6)
        .map(|seed| move_run(&move_limits(seed), seed, 350, 0).unwrap())
        .sum();
    assert!(moved > 300, "{moved} blocks were moved");
}

#[test]
fn a_power_cut_at_any_point_of_making_room_loses_nothing() {
    let evacuated: u32 = (0..4)
        .map(|seed| move_run(&move_limits(seed), seed, 200, 380).unwrap())
        .sum();
    assert!(evacuated > 200, "{evacuated} blocks were moved out of regions");
}
