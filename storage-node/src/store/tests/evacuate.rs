//! Making long runs where free space is scattered: data is in order afterwards, nothing else changes, and nobody finds the
//! device full because of it.

use super::model::*;
use super::mover::round;
use super::rig::*;
use crate::store::api::{StoreError, StoreReply, StoreRequest};
use crate::store::chunk::ChunkKey;
use crate::store::{ScrubCursor, StoreLimits, StoreState};
use crate::testing::{Cut, Prng};
use cairn_proto::ids::{ChunkIndex, Layer};

fn limits() -> StoreLimits {
    StoreLimits {
        region_blocks: 64,
        overwrite_reserve_blocks: 32,
        // All of the index stays in memory, so that it can be looked at.
        index_memory_max: 1 << 20,
        ..StoreLimits::tiny()
    }
}

/// The runs of places that the first blocks of the volume stand in.
fn extents(rig: &Rig, blocks: u32) -> usize {
    let engine = rig.store.engine().expect("it is open");
    let key = ChunkKey {
        group: GROUP,
        chunk: ChunkIndex(0),
        layer: Layer(0),
    };
    let places: Vec<u32> = engine
        .catalog
        .entries(key, range(0, 0, blocks))
        .map(|entry| entry.data_place().expect("it holds data"))
        .collect();
    1 + places.windows(2).filter(|pair| pair[0] + 1 != pair[1]).count()
}

/// Blocks written over at random so often that free space is as scattered as data.
fn scattered(rig: &mut Rig, blocks: u32) {
    rig.create();
    for start in (0..blocks).step_by(256) {
        rig.write(0, start, 256.min(blocks - start), 1);
    }
    for seq in 2..2 + u64::from(blocks) * 5 {
        let block = rig.prng.below(blocks.into()) as u32;
        rig.write(0, block, 1, seq);
    }
    rig.pass_time();
}

#[test]
fn room_is_made_where_free_space_is_scattered() {
    for (blocks, data, seed) in [(1200, 512, 2), (3000, 1800, 2)] {
        let mut rig = Rig::new(blocks, limits(), seed);
        scattered(&mut rig, data);
        let before = (extents(&rig, data), Model::observe(&mut rig).unwrap());
        let moved = round(&mut rig);
        let counters = rig.store.counters();
        let after = extents(&rig, data);
        let words = format!("{} extents before, {after} after, {moved:?}, {counters:?}", before.0);
        assert!(before.0 > data as usize / 2, "{words}");
        assert!(counters.blocks_evacuated > 0 && !moved.is_full, "{words}");
        assert!(after < data as usize / 16, "{words}");
        rig.store.check_invariants();
        assert_eq!(rig.store.space().data, u64::from(data));
        assert_eq!(Model::observe(&mut rig).unwrap(), before.1);
        assert_eq!(round(&mut rig).moved, 0, "it is in order now");
        rig = rig.reopen(true);
        rig.settle();
        assert_eq!(Model::observe(&mut rig).unwrap(), before.1);
        rig.store.check_invariants();
    }
}

#[test]
fn a_device_is_not_full_any_earlier_while_room_is_made() {
    let fill = |moves: u32| {
        let mut rig = Rig::new(1200, limits(), 7);
        scattered(&mut rig, 500);
        for _ in 0..moves {
            rig.call(StoreRequest::Defragment {
                from: ScrubCursor::START,
            });
        }
        let evacuated = rig.store.counters().blocks_evacuated;
        let mut block = 500;
        loop {
            match rig.write(0, block, 1, 100_000) {
                StoreReply::Durable { .. } => block += 1,
                StoreReply::Failed(StoreError::NoSpace) => break,
                other => panic!("{other:?}"),
            }
        }
        // It goes on and finds that there is no space; overwrites do find some.
        let moved = round(&mut rig);
        assert!(moved.is_full, "{moved:?}");
        for seq in 0..50 {
            let reply = rig.write(0, seq as u32, 1, 200_000 + seq);
            assert!(matches!(reply, StoreReply::Durable { .. }), "{reply:?}");
        }
        rig.store.check_invariants();
        (block, evacuated)
    };
    let (without, none) = fill(0);
    let (with, evacuated) = fill(5);
    assert!(
        none == 0 && evacuated > 0,
        "{evacuated} blocks were moved out of regions"
    );
    assert!(
        with + 32 > without,
        "{with} blocks fit while room is made, else {without}"
    );
}

#[test]
fn what_does_not_pay_is_given_up() {
    // The regions that may be emptied together have no room for a whole window.
    let mut rig = Rig::new(1200, limits(), 3);
    scattered(&mut rig, 600);
    let moved: Vec<u32> = (0..5).map(|_| round(&mut rig).moved).collect();
    assert!(moved[0] > 0 && extents(&rig, 600) > 400, "{moved:?}");
    assert_eq!(moved[2..], [0; 3], "{moved:?}");
    for seq in 10_000..10_700 {
        let block = rig.prng.below(600) as u32;
        rig.write(0, block, 1, seq);
    }
    assert!(round(&mut rig).moved > 0, "much was written: it is tried again");
}

/// Power is cut all through a round that makes room, with unflushed writes lost, kept or torn: what is held never changes.
#[test]
fn power_cuts_while_room_is_made_change_nothing() {
    let mut rig = Rig::new(1200, limits(), 2);
    scattered(&mut rig, 512);
    let before = Model::observe(&mut rig).unwrap();
    let mut rig = Rig::opening_watched(rig.device, limits(), 1);
    rig.settle();
    let mut prng = Prng::new(1);
    let mut cuts = 0;
    let mut from = ScrubCursor::START;
    loop {
        let ticket = rig.submit(StoreRequest::Defragment { from });
        rig.settle();
        for moment in rig.take_moments() {
            cuts += 1;
            let mut device = moment.device;
            let cut = [Cut::AllLost, Cut::AllKept, Cut::Torn, Cut::Torn][cuts % 4];
            device.power_cut_as(cut, &mut prng);
            let mut again = Rig::opening(device, limits(), 1);
            again.settle();
            assert_eq!(again.store.state(), StoreState::Open, "cut {cuts}, {cut:?}");
            assert_eq!(Model::observe(&mut again).unwrap(), before, "cut {cuts}, {cut:?}");
            again.store.check_invariants();
        }
        let replies = rig.take_replies();
        let Some((_, StoreReply::Defragmented { next, .. })) = replies.into_iter().find(|(of, _)| *of == ticket) else {
            panic!("it was not answered")
        };
        let Some(next) = next else { break };
        from = next;
    }
    let evacuated = rig.store.counters().blocks_evacuated;
    assert!(evacuated > 0 && cuts > 200, "{evacuated} blocks, {cuts} cuts");
}
