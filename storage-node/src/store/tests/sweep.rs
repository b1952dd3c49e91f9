//! Space behind a lost part of the index comes back at the next opening once that part is forgotten, and nothing else does.

use std::collections::BTreeSet;

use cairn_proto::block::Content;
use cairn_proto::disk::{DeviceBlock, DiskOp};
use cairn_proto::ids::{Epoch, GroupId, GroupIndex, Layer};

use super::rig::*;
use crate::store::api::{StoreError, StoreReply, StoreRequest};
use crate::store::chunk::Page;
use crate::store::inspect::{DamageKind, InspectOptions, inspect};
use crate::store::leaf::{LeafState, decode_leaf};
use crate::store::{StoreLimits, StoreState};
use crate::testing::{Fault, MemoryDevice, Prng};

const BLOCKS: u64 = 620;
/// The group whose blocks must stay; its keys follow those of [`GROUP`].
const OTHER: GroupId = GroupId {
    volume: GROUP.volume,
    index: GroupIndex(GROUP.index.0 + 1),
};
const CHUNKS: u32 = 6;
/// Where each chunk has data: some blocks of three index pages.
const STARTS: [u32; 3] = [0, 300, 600];
/// Blocks of one more page of [`GROUP`]: the longest run there is, which is used first when it is free.
const LONG: u32 = 160;
/// The chunk of [`OTHER`] that is written again and again.
const BUSY: u32 = 50;

fn limits() -> StoreLimits {
    StoreLimits {
        index_memory_max: 2 << 10,
        leaf_bytes_max: 120,
        overwrite_reserve_blocks: 64,
        ..StoreLimits::tiny()
    }
}

fn request(group: GroupId, chunk: u32, start: u32, blocks: u32, seq: u64) -> StoreRequest {
    let StoreRequest::Write {
        layer,
        range,
        version,
        content,
        ..
    } = write_request(chunk, start, blocks, seq)
    else {
        unreachable!("it is a write")
    };
    StoreRequest::Write {
        group,
        layer,
        range,
        version,
        content,
    }
}

fn durable(rig: &mut Rig, request: StoreRequest) {
    let reply = rig.call(request);
    assert!(matches!(reply, StoreReply::Durable { .. }), "{reply:?}");
}

/// A device with two replicas, all of its index on the device.
fn device() -> MemoryDevice {
    let mut rig = Rig::new(BLOCKS, limits(), 1);
    for group in [GROUP, OTHER] {
        durable(
            &mut rig,
            StoreRequest::CreateReplica {
                group,
                role: 1,
                epoch: Epoch(1),
            },
        );
        for chunk in 0..CHUNKS {
            for start in STARTS {
                durable(&mut rig, request(group, chunk, start, 5, 1));
            }
        }
        if group == GROUP {
            durable(&mut rig, request(group, 2, 1024, LONG, 1));
        }
    }
    keep_busy(&mut rig, 1, 2);
    rig.settle();
    rig.device
}

/// Writes until so many checkpoints were made since.
fn keep_busy(rig: &mut Rig, seq: u64, checkpoints: u64) {
    let until = rig.store.counters().checkpoints + checkpoints;
    for seq in seq.. {
        durable(rig, request(OTHER, BUSY, 0, 3, seq));
        assert!(seq < 10_000, "checkpoints are made now and then");
        if rig.store.counters().checkpoints >= until {
            break;
        }
    }
    rig.settle();
}

/// Leaves that lie within the range of [`GROUP`], and the index pages that they list.
fn parts(device: &MemoryDevice) -> (Vec<u32>, Vec<u32>) {
    let mut rig = Rig::opening(device.clone(), limits(), 1);
    rig.settle();
    let catalog = &rig.store.engine().expect("it is open").catalog;
    let (mut leaves, mut pages) = (Vec::new(), Vec::new());
    for (from, leaf) in &catalog.leaves {
        let LeafState::OnDisk(home) = leaf.state else { continue };
        let end = catalog.leaf_end(*from);
        if end.is_none_or(|end| end.group > GROUP) {
            continue;
        }
        leaves.push(home.place);
        let block = device.peek(DeviceBlock(home.place.into()));
        for (key, chunk) in decode_leaf(block, home, (*from, end), BLOCKS as u32 - 1).expect("it is whole") {
            let homes = chunk.pages.values().filter_map(|page| match page {
                Page::OnDisk(home) => Some(home.place),
                _ => None,
            });
            assert_eq!(key.group, GROUP);
            pages.extend(homes);
        }
    }
    assert!(leaves.len() >= 3 && pages.len() >= 6, "{leaves:?}, {pages:?}");
    (leaves, pages)
}

/// Opens the device and drops the replica; `fails` says which reads do.
fn drop_group(device: MemoryDevice, fails: impl Fn(&DiskOp) -> bool) -> Rig {
    let mut rig = Rig::opening(device, limits(), 2);
    rig.settle();
    let ticket = rig.submit(StoreRequest::DropReplica {
        group: GROUP,
        epoch: Epoch(1),
    });
    while rig.step_with(|op| fails(op).then(Fault::default)) {}
    assert!(matches!(rig.replies.remove(&ticket), Some(StoreReply::Durable { .. })));
    assert_eq!(rig.store.reclaiming().count(), 0);
    rig.store.check_invariants();
    rig
}

fn reopen(rig: Rig) -> Rig {
    let mut rig = rig.reopen(true);
    rig.settle();
    assert_eq!(rig.store.state(), StoreState::Open);
    rig.store.check_invariants();
    rig
}

fn orphans(rig: &Rig) -> bool {
    rig.store.engine().expect("it is open").catalog.orphans
}

/// Blocks of data, and of index pages.
fn marked(rig: &Rig) -> (u64, u64) {
    let space = &rig.store.engine().expect("it is open").space;
    (space.data_blocks, space.index_blocks)
}

/// Each block that is not free is taken for something that is known.
fn check_nothing_leaks(rig: &Rig) {
    let engine = rig.store.engine().expect("it is open");
    assert!(engine.checkpoint.is_none() && engine.batch.is_none(), "it is idle");
    let mut known: BTreeSet<u32> = BTreeSet::new();
    let words = (0u32..).zip(engine.space.data.words());
    known.extend(words.flat_map(|(at, word)| {
        (0..64)
            .filter(move |bit| word >> bit & 1 == 1)
            .map(move |bit| at * 64 + bit)
    }));
    known.extend(
        engine
            .catalog
            .leaves
            .values()
            .filter_map(|leaf| leaf.home)
            .map(|home| home.place),
    );
    known.extend(engine.space.homes.iter().flatten().flat_map(|home| home.places));
    let checkpoints = &engine.checkpoints;
    known.extend(
        checkpoints
            .directory
            .iter()
            .chain(&checkpoints.stale)
            .chain(&checkpoints.held),
    );
    known.extend(checkpoints.log_pages.iter().flat_map(|(_, pages)| pages));
    let ahead = engine.space.ahead();
    known.extend([ahead.next, ahead.next_run]);
    let space = super::super::space_of(engine);
    assert_eq!(
        space.capacity - space.free,
        known.len() as u64,
        "blocks that are not free"
    );
}

/// All that was written to the other replica and is not written again is there. Returns what the busy blocks hold.
fn check_content(rig: &mut Rig) -> u64 {
    let mut busy = 0;
    let starts = (0..CHUNKS).flat_map(|chunk| STARTS.map(|start| (chunk, start, 5)));
    for (chunk, start, blocks) in starts.chain([(BUSY, 0, 3)]) {
        let at = range(chunk, start, blocks);
        let layer = Layer(0);
        let reply = rig.call(StoreRequest::Read {
            group: OTHER,
            layer,
            range: at,
        });
        let StoreReply::Read { blocks, bytes } = reply else {
            panic!("{at}: {reply:?}")
        };
        let found = blocks[0].version;
        assert!(
            blocks
                .iter()
                .all(|block| block.version == found && matches!(block.content, Content::Data(_)))
        );
        assert_eq!(bytes.concat(), contents(at, found), "{at}");
        match chunk {
            BUSY => busy = found.to_bits(),
            _ => assert_eq!(found, version(1)),
        }
    }
    busy
}

/// After two checkpoints all is as if nothing had been lost.
fn check_swept(mut rig: Rig, expected: (u64, u64)) {
    check_content(&mut rig);
    keep_busy(&mut rig, 1000, 3);
    rig.store.check_invariants();
    assert!(!orphans(&rig));
    check_nothing_leaks(&rig);
    let found = marked(&rig);
    assert_eq!(found, expected);
    // It stays so.
    let mut rig = reopen(rig);
    assert_eq!((rig.store.counters().blocks_swept, marked(&rig)), (0, expected));
    check_nothing_leaks(&rig);
    check_content(&mut rig);
    let inspection = inspect(&mut rig.device, InspectOptions::default(), &mut |_| {});
    assert_eq!(inspection.damage.total, 0);
}

/// What a device without damage has after the same.
fn expected() -> (u64, u64) {
    let mut rig = reopen(drop_group(device(), |_| false));
    assert!(!orphans(&rig));
    keep_busy(&mut rig, 1000, 3);
    check_nothing_leaks(&rig);
    assert_eq!(rig.store.counters().blocks_swept, 0);
    marked(&rig)
}

#[test]
fn what_a_rotten_leaf_or_index_page_had_is_free_after_the_next_opening() {
    let (whole, expected) = (device(), expected());
    let (leaves, pages) = parts(&whole);
    for place in leaves.into_iter().chain(pages) {
        let mut device = whole.clone();
        device.rot(DeviceBlock(place.into()), 77);
        let mut rig = drop_group(device, |_| false);
        assert!(orphans(&rig), "block {place} was lost");
        check_content(&mut rig);
        let found = inspect(&mut rig.device, InspectOptions::default(), &mut |_| {});
        let leak = found
            .damage
            .listed
            .iter()
            .find(|damage| damage.kind == DamageKind::Leak);
        assert!(leak.is_some_and(|leak| leak.words.contains("given back")), "{leak:?}");
        let rig = reopen(rig);
        assert!(rig.store.counters().blocks_swept >= 5);
        check_swept(rig, expected);
    }
}

fn reads(op: &DiskOp, place: u32) -> bool {
    let place = u64::from(place);
    matches!(op, DiskOp::Read { at, blocks, .. } if (at.0..at.0 + u64::from(*blocks)).contains(&place))
}

#[test]
fn what_an_index_page_had_that_could_not_be_read_when_it_was_given_back_is_free_after_the_next_opening() {
    let (whole, expected) = (device(), expected());
    for place in parts(&whole).1 {
        let rig = drop_group(whole.clone(), |op| reads(op, place));
        assert!(orphans(&rig), "the page at block {place} was given up");
        // The sector stays bad: what replay can't read, the sweep finds.
        let mut bad = Rig::opening(rig.device.clone(), limits(), 3);
        while bad.step_with(|op| reads(op, place).then(Fault::default)) {}
        assert_eq!(bad.store.state(), StoreState::Open);
        bad.store.check_invariants();
        check_swept(bad, expected);
        // It reads well again: replay or the sweep gives its blocks back.
        check_swept(reopen(rig), expected);
    }
}

#[test]
fn nothing_is_swept_while_a_part_of_the_index_can_not_be_read() {
    let whole = device();
    let (_, pages) = parts(&whole);
    let mut device = whole;
    device.rot(DeviceBlock(pages[0].into()), 77);
    let mut rig = drop_group(device, |_| false);
    assert!(orphans(&rig));
    keep_busy(&mut rig, 500, 2);
    let before = marked(&rig);
    // Each page and leaf that is left, in turn.
    let catalog = &rig.store.engine().expect("it is open").catalog;
    let homes = catalog.leaves.values().filter_map(|leaf| leaf.home);
    let leaves: Vec<u32> = homes.map(|home| home.place).collect();
    let map = rig.store.engine().expect("it is open").space.data.clone();
    for place in (0..BLOCKS as u32).filter(|place| leaves.contains(place) || map.get(*place)) {
        let mut rig = Rig::opening(rig.device.clone(), limits(), 4);
        while rig.step_with(|op| reads(op, place).then(Fault::default)) {}
        assert_eq!(rig.store.state(), StoreState::Open);
        rig.store.check_invariants();
        let swept = rig.store.counters().blocks_swept > 0;
        assert_eq!(orphans(&rig), !swept, "block {place}");
        if !swept {
            assert_eq!(marked(&rig), before, "block {place}");
        }
        // What was a bad sector then reads well at the next opening.
        let rig = reopen(rig);
        assert!(!orphans(&rig));
    }
}

/// Opens a device and writes to it again and again, for so many operations; returns it with the last write that was
/// acknowledged. `None` if there were fewer operations.
fn use_for(device: MemoryDevice, seed: u64, operations: u32) -> Option<(Rig, u64)> {
    let mut rig = Rig::opening(device, limits(), seed);
    let mut acknowledged = version(1).to_bits();
    let mut waiting = None;
    let mut seq = 2000;
    for _ in 0..operations {
        if rig.store.state() == StoreState::Open && waiting.is_none() && seq < 2014 {
            seq += 1;
            // Ever more blocks: what becomes free is used at once.
            rig.submit(request(OTHER, BUSY + 1, (seq as u32 - 2000) * 8, 8, seq));
            waiting = Some((rig.submit(request(OTHER, BUSY, 0, 3, seq)), seq));
        }
        if !rig.step() {
            return None;
        }
        if let Some((ticket, seq)) = waiting
            && let Some(reply) = rig.replies.remove(&ticket)
        {
            assert!(matches!(reply, StoreReply::Durable { .. }), "{reply:?}");
            acknowledged = version(seq).to_bits();
            waiting = None;
        }
    }
    Some((rig, acknowledged))
}

#[test]
fn power_may_fail_at_any_operation_of_the_opening_that_sweeps_and_after_it() {
    let whole = device();
    let (leaves, pages) = parts(&whole);
    let mut long = 0;
    for (seed, place) in (5..).zip(leaves.into_iter().chain(pages)) {
        let mut device = whole.clone();
        device.rot(DeviceBlock(place.into()), 77);
        let before = drop_group(device, |_| false);
        let opened = reopen(Rig::opening(before.device.clone(), limits(), 1));
        let swept = opened.store.counters().blocks_swept;
        if swept < u64::from(LONG) {
            continue;
        }
        long += 1;
        let (mut operations, mut again) = (0, 0);
        while let Some((rig, acknowledged)) = use_for(before.device.clone(), seed, operations) {
            let mut rig = reopen(rig);
            assert!(!orphans(&rig), "it was swept, now or before");
            again += u64::from(rig.store.counters().blocks_swept == swept);
            let found = check_content(&mut rig);
            assert!(found >= acknowledged, "after {operations} operations");
            rig.store.check_invariants();
            check_nothing_leaks(&rig);
            if operations % 8 == 0 {
                keep_busy(&mut rig, 5000, 3);
                rig.store.check_invariants();
                check_nothing_leaks(&rig);
            }
            operations += 1;
        }
        assert!(
            operations > 60 && again > 20,
            "{operations} operations, {again} of them before a checkpoint"
        );
    }
    assert_eq!(long, 2, "a page, and the leaf that lists it");
}

#[test]
fn what_is_swept_is_not_used_before_a_checkpoint_does_without_it() {
    let whole = device();
    let (_, pages) = parts(&whole);
    let mut long = 0;
    for place in pages {
        let mut device = whole.clone();
        device.rot(DeviceBlock(place.into()), 77);
        let before = drop_group(device, |_| false);
        let mut rig = Rig::opening(before.device, limits(), 7);
        while rig.store.state() != StoreState::Open {
            assert!(rig.step(), "it opens");
        }
        if rig.store.counters().blocks_swept < u64::from(LONG) {
            continue;
        }
        long += 1;
        // No checkpoint comes to its end meanwhile, and batches take all the space that there is.
        let root = |op: &DiskOp| match op {
            DiskOp::Write { buffers, .. } => buffers.iter().any(|block| block.starts_with(b"CAIRNDIR")),
            _ => false,
        };
        let mut acknowledged = version(1).to_bits();
        for seq in 2000..2060 {
            let busy = rig.submit(request(OTHER, BUSY, 0, 3, seq));
            rig.submit(request(OTHER, BUSY + 1, (seq as u32 - 2000) * 8, 8, seq));
            while rig.step_among(|op| !root(op), |_| None) {}
            match rig.replies.remove(&busy) {
                Some(StoreReply::Durable { .. }) => acknowledged = version(seq).to_bits(),
                Some(StoreReply::Failed(StoreError::NoSpace)) | None => {}
                other => panic!("{other:?}"),
            }
            let mut device = rig.device.clone();
            device.power_cut(&mut Prng::new(seq));
            let mut cut = Rig::opening(device, limits(), seq);
            cut.settle();
            assert_eq!(cut.store.state(), StoreState::Open);
            cut.store.check_invariants();
            assert!(
                cut.store.counters().blocks_swept >= u64::from(LONG),
                "it is swept again"
            );
            assert!(check_content(&mut cut) >= acknowledged);
            check_nothing_leaks(&cut);
        }
        assert!(acknowledged > version(2004).to_bits(), "batches went on");
        assert_eq!(rig.store.counters().checkpoints, 0);
    }
    assert_eq!(long, 1);
}

/// A batch gives back what stood at a place, the log goes on there, and when it is replayed the page that says so is lost.
#[test]
fn a_block_given_back_under_a_lost_page_belongs_to_the_log_that_took_it() {
    let mut met = 0;
    for seed in 0..12 {
        let limits = StoreLimits {
            checkpoint_log_pages: 100 + 10 * (seed % 4),
            checkpoint_dirty_pages: 64,
            overwrite_reserve_blocks: 16,
            run_blocks: 4 + seed as u32,
            index_memory_max: 1 << 20,
            ..StoreLimits::tiny()
        };
        let mut rig = Rig::new(256 + 4 * seed, limits, seed);
        rig.create();
        rig.write(0, 0, 64, 1);
        let checkpoints = rig.store.counters().checkpoints + 2;
        let mut seq = 2;
        while rig.store.counters().checkpoints < checkpoints {
            rig.write(3, 0, 1, seq);
            seq += 1;
        }
        rig.settle();
        let key = chunk_key(0);
        let places: Vec<u32> = rig
            .store
            .engine()
            .expect("it is open")
            .catalog
            .places(key, range(0, 0, 64))
            .collect();
        // All of it at once, so that long runs are free.
        rig.write(0, 0, 64, seq);
        let (home, checkpoints) = (home_of(&rig), rig.store.counters().checkpoints);
        let mut taken = 0;
        while taken == 0 && rig.store.counters().checkpoints == checkpoints {
            seq += 1;
            rig.write(3, 0, 1, seq);
            let engine = rig.store.engine().expect("it is open");
            let log = engine.checkpoints.log_pages.iter().flat_map(|(_, pages)| pages);
            taken = log
                .chain([&engine.space.next()])
                .filter(|place| places.contains(place))
                .count();
        }
        if taken == 0 || rig.store.counters().checkpoints != checkpoints {
            continue;
        }
        met += 1;
        rig.device.rot(DeviceBlock(home.into()), 77);
        let mut rig = rig.reopen(true);
        rig.settle();
        assert_eq!(rig.store.state(), StoreState::Open, "seed {seed}");
        rig.store.check_invariants();
        let reply = rig.read(0, 0, 1);
        assert!(
            matches!(reply, StoreReply::Failed(StoreError::IndexDamaged)),
            "{reply:?}"
        );
        for _ in 0..300 {
            seq += 1;
            let reply = rig.write(3, 0, 2, seq);
            assert!(matches!(reply, StoreReply::Durable { .. }), "seed {seed}: {reply:?}");
            rig.store.check_invariants();
        }
    }
    assert!(met > 2, "the log came to {met} such blocks");
}

fn chunk_key(chunk: u32) -> crate::store::chunk::ChunkKey {
    crate::store::chunk::ChunkKey {
        group: GROUP,
        chunk: cairn_proto::ids::ChunkIndex(chunk),
        layer: Layer(0),
    }
}

/// Where the last checkpoint has the first page of chunk 0: its place in the list of metadata that is to be given back.
fn home_of(rig: &Rig) -> u32 {
    let engine = rig.store.engine().expect("it is open");
    let page = |place: &&u32| {
        let block = rig.device.peek(DeviceBlock(u64::from(**place)));
        let entries = block
            .chunks_exact(16)
            .filter(|entry| entry.iter().any(|byte| *byte != 0))
            .count();
        entries == 64
    };
    *engine
        .checkpoints
        .stale
        .iter()
        .rfind(page)
        .expect("its page was stored")
}
