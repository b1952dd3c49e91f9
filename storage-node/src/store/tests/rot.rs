//! Rot, lost writes and misdirected writes in every block of a device: each is survived or reported. Never is anything
//! read that was not the last to be acknowledged.

use std::collections::BTreeMap;

use bytes::Bytes;
use cairn_proto::block::{Apply, BlockState, Content};
use cairn_proto::checksum::block_checksum;
use cairn_proto::disk::{DeviceBlock, DiskGeometry, DiskOp};
use cairn_proto::ids::{Epoch, Layer, Version};
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::units::BlockRange;

use super::model::{Model, Workload};
use super::rig::*;
use crate::store::api::{CopiedBlock, StoreError, StoreReply, StoreRequest};
use crate::store::limits::MAP_PAGE_BLOCKS;
use crate::store::superblock::{CHECKPOINT_PLACES, Superblock};
use crate::store::{Inner, OpenError, StoreLimits, StoreState};
use crate::testing::{Cut, Fault, MemoryDevice, Prng};

/// Blocks of the test devices.
const BLOCKS: u64 = 700;

/// A device that was written for a while, and what was acknowledged.
#[derive(Clone)]
struct Image {
    name: &'static str,
    device: MemoryDevice,
    model: Model,
}

/// How a damaged device was found out.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Verdict {
    /// Nothing is missing.
    Whole,
    /// It is open; some blocks are reported as damaged.
    SomeDamaged,
    /// It is not opened.
    Refused,
}

fn limits() -> StoreLimits {
    StoreLimits {
        overwrite_reserve_blocks: 64,
        ..StoreLimits::tiny()
    }
}

/// Runs a workload, several requests at a time, until so many checkpoints and then so many batches are done.
fn work(rig: &mut Rig, model: &mut Model, workload: &mut Workload, prng: &mut Prng, checkpoints: u64, batches: u64) {
    let mut until = None;
    loop {
        let counters = rig.store.counters();
        if until.is_none() && counters.checkpoints >= checkpoints {
            until = Some(counters.batches + batches);
        }
        if until.is_some_and(|until| counters.batches >= until) {
            return;
        }
        // Requests in flight together may be done in any order: these do not overlap, or are alone.
        let mut asked = vec![workload.request(prng, false)];
        let more = prng.below(6);
        for _ in 0..more {
            let next = workload.request(prng, false);
            if asked.iter().all(|other| apart(other, &next)) {
                asked.push(next);
            }
        }
        let tickets: Vec<u64> = asked.iter().map(|request| rig.submit(request.clone())).collect();
        rig.settle();
        for (ticket, request) in tickets.into_iter().zip(asked) {
            match rig.replies.remove(&ticket).expect("an idle store has answered") {
                StoreReply::Durable { .. } => model.apply(&request),
                StoreReply::Failed(StoreError::NoSpace | StoreError::IndexDamaged) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

fn apart(one: &StoreRequest, other: &StoreRequest) -> bool {
    let range = |request: &StoreRequest| match request {
        StoreRequest::Write { layer, range, .. }
        | StoreRequest::Copy { layer, range, .. }
        | StoreRequest::CopyHole { layer, range, .. } => Some((*layer, *range)),
        _ => None,
    };
    match (range(one), range(other)) {
        (Some((one_layer, one)), Some((other_layer, other))) => {
            one_layer != other_layer
                || one.chunk() != other.chunk()
                || one.end() <= other.start()
                || other.end() <= one.start()
        }
        _ => false,
    }
}

/// An idle store's device.
fn image(name: &'static str, rig: &mut Rig, model: &Model) -> Image {
    rig.pass_time();
    Image {
        name,
        device: rig.device.clone(),
        model: model.clone(),
    }
}

/// Goes on until the store is open, and no further.
fn open_only(rig: &mut Rig) {
    while rig.store.state() != StoreState::Open {
        assert!(rig.step(), "{:?}", rig.store.state());
    }
}

fn images() -> Vec<Image> {
    let mut prng = Prng::new(11);
    let mut rig = Rig::new(BLOCKS, limits(), 11);
    rig.create();
    let mut model = Model {
        replica: Some((Epoch(1), 1)),
        ..Model::default()
    };
    let mut workload = Workload::new(200, 24);
    let mut images = Vec::new();
    work(&mut rig, &mut model, &mut workload, &mut prng, 0, 6);
    images.push(image("hardly written", &mut rig, &model));
    work(&mut rig, &mut model, &mut workload, &mut prng, 6, 8);
    images.push(image("two checkpoints and a log", &mut rig, &model));
    rig = rig.reopen(true);
    open_only(&mut rig);
    let mut only_one = rig.device.clone();
    only_one.power_cut(&mut Prng::new(1));
    rig.settle();
    images.push(image("just opened", &mut rig, &model));
    images.push(Image {
        name: "has only one checkpoint",
        device: only_one,
        model: model.clone(),
    });
    work(&mut rig, &mut model, &mut workload, &mut prng, 2, 0);
    images.push(image("a checkpoint since it was opened", &mut rig, &model));
    // Records of several pages: many copies without data in one batch.
    for round in 1..4 {
        let tickets: Vec<u64> = (0..14).map(|i| rig.submit(zero_copy(i, round))).collect();
        rig.settle();
        for (i, ticket) in (0..).zip(tickets) {
            assert!(matches!(rig.replies.remove(&ticket), Some(StoreReply::Durable { .. })));
            model.apply(&zero_copy(i, round));
        }
    }
    images.push(image("records of several pages", &mut rig, &model));
    images
}

/// A copy of zeroes to some blocks of one of 14 ranges that do not overlap.
fn zero_copy(i: u32, round: u64) -> StoreRequest {
    let range = range(3 * (i % 2), i / 2 * 30, 30);
    let version = version(1 << 20 | round);
    let content = Content::Zero;
    StoreRequest::Copy {
        group: GROUP,
        layer: Layer(0),
        range,
        blocks: vec![CopiedBlock { content, version }; 30],
        bytes: Bytes::new(),
        apply: Apply::IfNewer,
    }
}

/// Opens a device of which something is damaged and looks at everything.
fn examine(device: MemoryDevice, model: &Model, fails: impl Fn(&DiskOp) -> bool) -> Result<Verdict, String> {
    let mut rig = Rig::opening(device, limits(), 1);
    while rig.step_with(|op| fails(op).then(Fault::default)) {}
    match rig.store.state() {
        StoreState::Open => {}
        StoreState::Refused(
            OpenError::Damaged { .. } | OpenError::LogDamaged { .. } | OpenError::LogUnreadable { .. },
        ) => return Ok(Verdict::Refused),
        other => return Err(format!("the store is {other:?}")),
    }
    rig.store.check_invariants();
    compare(&mut rig, model, &fails)
}

/// Compares all blocks of an open store with the model.
fn compare(rig: &mut Rig, model: &Model, fails: &dyn Fn(&DiskOp) -> bool) -> Result<Verdict, String> {
    let held = (
        rig.store.replica_of(GROUP).map(|replica| (replica.epoch, replica.role)),
        rig.store.seal_of(GROUP.volume).get(),
    );
    if held != (model.replica, model.seal) {
        return Err(format!("replica and seal are {held:?}"));
    }
    let mut verdict = Verdict::Whole;
    for (chunk, layer) in [(0, 0), (0, 1), (3, 0), (3, 1)] {
        // The workload's blocks, and one page that only discards and zeroes of whole chunks touch.
        for start in [0, 256, 16384 - 256] {
            let at = range(chunk, start, 256);
            let ticket = rig.submit(StoreRequest::Read {
                group: GROUP,
                layer: Layer(layer),
                range: at,
            });
            while rig.step_with(|op| fails(op).then(Fault::default)) {}
            match rig.replies.remove(&ticket).expect("an idle store has answered") {
                StoreReply::Read { blocks, bytes } => {
                    let damaged = compare_read(model, layer, at, &blocks, &bytes.concat())?;
                    verdict = verdict.max(if damaged { Verdict::SomeDamaged } else { Verdict::Whole });
                }
                StoreReply::Failed(StoreError::IndexDamaged | StoreError::Unreadable(_)) => {
                    verdict = verdict.max(Verdict::SomeDamaged);
                }
                other => return Err(format!("a read of {at} was answered {other:?}")),
            }
        }
    }
    Ok(verdict)
}

/// Each block is what was acknowledged, or damaged in the version that was acknowledged. Returns whether any is damaged.
fn compare_read(
    model: &Model,
    layer: u32,
    at: BlockRange,
    blocks: &[BlockState],
    bytes: &[u8],
) -> Result<bool, String> {
    let never = BlockState {
        content: Content::Absent,
        version: Version::ZERO,
    };
    let mut contents = bytes.chunks_exact(BLOCK_BYTES);
    let mut damaged = false;
    for (i, found) in (0..).zip(blocks) {
        let name = at.volume_block(i);
        let key = (at.chunk().0, layer, at.start() + i);
        let expected = model.blocks.get(&key).copied().unwrap_or(never);
        if found.content == Content::Damaged && found.version == expected.version {
            damaged = true;
            continue;
        }
        if *found != expected {
            return Err(format!("block {key:?} is {found:?}, acknowledged was {expected:?}"));
        }
        if let Content::Data(checksum) = found.content {
            let block = contents.next().ok_or("too few bytes")?;
            if block_checksum(GROUP.volume, name, block) != checksum || block != content(name, found.version) {
                return Err(format!("block {key:?} does not hold what {} wrote", found.version));
            }
        }
    }
    Ok(damaged)
}

fn written(device: &MemoryDevice) -> Vec<DeviceBlock> {
    let blocks = (0..device.geometry().blocks).map(DeviceBlock);
    blocks
        .filter(|at| device.peek(*at).iter().any(|byte| *byte != 0))
        .collect()
}

/// Opens a device that must be whole, and compares.
fn open_whole(device: MemoryDevice, image: &Image, fails: impl Fn(&DiskOp) -> bool) -> Rig {
    let mut rig = Rig::opening(device, limits(), 1);
    while rig.step_with(|op| fails(op).then(Fault::default)) {}
    assert_eq!(rig.store.state(), StoreState::Open, "{}", image.name);
    let verdict = compare(&mut rig, &image.model, &|_| false).unwrap();
    assert_eq!(verdict, Verdict::Whole, "{}", image.name);
    rig
}

/// Whether it is a read of this block.
fn reads(op: &DiskOp, block: DeviceBlock) -> bool {
    matches!(op, DiskOp::Read { at, blocks, .. } if (at.0..at.0 + u64::from(*blocks)).contains(&block.0))
}

/// Counts verdicts.
#[derive(Default, Debug)]
struct Tally(BTreeMap<Verdict, usize>);

impl Tally {
    fn add(&mut self, verdict: Verdict) {
        *self.0.entry(verdict).or_default() += 1;
    }

    /// All verdicts must have come up, or the test looked at too little.
    fn check(&self) {
        let all = [Verdict::Whole, Verdict::SomeDamaged, Verdict::Refused];
        assert!(all.iter().all(|verdict| self.0.contains_key(verdict)), "{self:?}");
    }
}

/// Damages the images in one way after the other; some ways must do no harm, some damage blocks, some the device.
fn sweep(mut damage: impl FnMut(&Image, &mut dyn FnMut(String, MemoryDevice))) {
    let mut tally = Tally::default();
    for image in images() {
        damage(&image, &mut |words, device| {
            let verdict = examine(device, &image.model, |_| false);
            tally.add(verdict.unwrap_or_else(|error| panic!("{}, {words}: {error}", image.name)));
        });
    }
    tally.check();
}

#[test]
fn a_flipped_bit_in_any_block_is_survived_or_reported() {
    let mut prng = Prng::new(5);
    sweep(|image, examine| {
        for at in written(&image.device) {
            // Where headers and the first entries are, and anywhere.
            for bit in [prng.below(200 * 8), prng.below(4096 * 8)] {
                let mut device = image.device.clone();
                device.rot(at, bit as usize);
                examine(format!("bit {bit} of {at}"), device);
            }
        }
    });
}

#[test]
fn a_lost_write_of_any_block_is_survived_or_reported() {
    sweep(|image, examine| {
        for at in written(&image.device) {
            let mut device = image.device.clone();
            lose(&mut device, at);
            examine(format!("the last write of {at} lost"), device);
        }
    });
}

#[test]
fn the_loss_of_any_write_as_a_whole_is_survived_or_reported() {
    sweep(|image, examine| {
        let mut writes: BTreeMap<u64, Vec<DeviceBlock>> = BTreeMap::new();
        for at in written(&image.device) {
            let (number, _) = image.device.last_write(at).unwrap();
            writes.entry(number).or_default().push(at);
        }
        for blocks in writes.into_values().filter(|blocks| blocks.len() > 1) {
            let mut device = image.device.clone();
            blocks.iter().for_each(|at| lose(&mut device, *at));
            examine(format!("the write of {blocks:?} lost"), device);
        }
    });
}

#[test]
fn a_write_that_lands_on_any_other_block_is_survived_or_reported() {
    let mut prng = Prng::new(6);
    sweep(|image, examine| {
        let blocks = written(&image.device);
        let number = |at| image.device.last_write(at).map(|(number, _)| number);
        for at in &blocks {
            // Beside where it belongs, or anywhere. What was written there later is there still.
            let beside = if prng.chance(1, 2) {
                at.0 + 1
            } else {
                at.0.saturating_sub(1)
            };
            let anywhere = blocks[prng.below(blocks.len() as u64) as usize];
            let mut places = vec![DeviceBlock(beside % BLOCKS), anywhere];
            places.retain(|to| to != at && number(*to) <= number(*at));
            for to in places {
                let mut device = image.device.clone();
                lose(&mut device, *at);
                device.poke(to, image.device.peek(*at));
                examine(format!("the last write of {at} landed at {to}"), device);
            }
        }
    });
}

#[test]
fn a_block_that_can_not_be_read_is_survived_or_reported() {
    let mut tally = Tally::default();
    for image in images() {
        for at in written(&image.device) {
            let verdict = examine(image.device.clone(), &image.model, |op| reads(op, at));
            tally.add(verdict.unwrap_or_else(|error| panic!("{}, {at}: {error}", image.name)));
        }
    }
    tally.check();
}

/// A block is as it was before the last write to it.
fn lose(device: &mut MemoryDevice, at: DeviceBlock) {
    let (_, before) = device.last_write(at).expect("it was written");
    let before = *before;
    device.poke(at, &before);
}

#[test]
fn a_damaged_superblock_copy_is_written_anew_and_the_next_one_may_be_damaged() {
    for image in images() {
        let mut device = image.device.clone();
        let good = device.clone();
        for place in Superblock::copies(BLOCKS) {
            for damage in 0..4 {
                match damage {
                    0 => device.rot(place, 100),
                    1 => device.poke(place, &[0; BLOCK_BYTES]),
                    // Another copy landed here.
                    2 => device.poke(place, good.peek(DeviceBlock((place.0 + 1) % 2))),
                    _ => {}
                }
                let unreadable = |op: &DiskOp| damage == 3 && reads(op, place);
                let rig = open_whole(device, &image, unreadable);
                let counters = rig.store.counters();
                assert_eq!(
                    (counters.superblocks_damaged, counters.superblocks_mended),
                    (1, 1),
                    "{place}"
                );
                device = rig.device;
                device.power_cut(&mut Prng::new(1));
                assert_eq!(device.peek(place), good.peek(place), "{place}");
            }
        }
        let counters = open_whole(device, &image, |_| false).store.counters();
        assert_eq!((counters.superblocks_damaged, counters.superblocks_mended), (0, 0));
    }
}

#[test]
fn a_superblock_copy_that_can_not_be_written_stops_nothing() {
    let image = &images()[1];
    let mut device = image.device.clone();
    device.rot(DeviceBlock(1), 3);
    let mut rig = open_whole(device, image, |op| matches!(op, DiskOp::Write { at, .. } if at.0 == 1));
    let counters = rig.store.counters();
    assert_eq!((counters.superblocks_damaged, counters.superblocks_mended), (1, 0));
    assert!(matches!(rig.write(1, 0, 3, 1), StoreReply::Durable { .. }));
    assert_eq!(rig.store.state(), StoreState::Open);
}

#[test]
fn the_copy_at_the_end_of_what_is_used_is_mended_on_a_device_that_has_grown() {
    let image = &images()[1];
    let geometry = DiskGeometry {
        blocks: BLOCKS + 100,
        volatile_cache: true,
    };
    for damaged in [false, true] {
        let mut device = MemoryDevice::new(geometry);
        let blocks = (0..BLOCKS).map(DeviceBlock);
        blocks.for_each(|at| device.poke(at, image.device.peek(at)));
        let last = DeviceBlock(BLOCKS - 1);
        if damaged {
            device.rot(last, 9);
        }
        let rig = open_whole(device, image, |_| false);
        assert_eq!(rig.store.counters().superblocks_mended, u64::from(damaged));
        assert_eq!(rig.device.peek(last), image.device.peek(last));
    }
}

#[test]
fn one_of_two_checkpoints_is_enough_whether_the_other_is_rotten_or_can_not_be_read() {
    let image = &images()[1];
    for place in CHECKPOINT_PLACES {
        for readable in [true, false] {
            let mut device = image.device.clone();
            if readable {
                device.rot(place, 8 * 50);
            }
            let rig = open_whole(device, image, |op| !readable && reads(op, place));
            assert_eq!(rig.store.counters().checkpoints_damaged, 1, "{place}");
        }
    }
    let rig = open_whole(image.device.clone(), image, |_| false);
    assert_eq!(rig.store.counters().checkpoints_damaged, 0);
}

#[test]
fn the_images_have_records_of_several_pages_and_a_log_that_changed_its_run() {
    let images = images();
    let device = &images.last().unwrap().device;
    let records = written(device)
        .into_iter()
        .filter(|at| device.peek(*at).starts_with(b"CAIRNREC"));
    let pages: Vec<u8> = records.map(|at| device.peek(at)[10]).collect();
    assert!(pages.iter().any(|pages| *pages > 1), "{pages:?}");
    assert!(written(device).len() as u64 > 4 * u64::from(limits().run_blocks));
}

/// A batch is torn by a power cut and dropped when the device is opened. What is written over it is lost. Then writes are
/// acknowledged, and power fails again: the dropped batch is there once more, and what was acknowledged must not vanish.
/// Once the checkpoint after opening is durable, nobody needs what was lost.
#[test]
fn a_dropped_batch_whose_successor_was_lost_is_found_out() {
    let (mut found, mut survived) = (0, 0);
    for seed in 0..40 {
        let mut rig = Rig::new(BLOCKS, limits(), seed);
        rig.create();
        rig.write(0, 0, 3, 1);
        rig.submit(write_request(0, 10, 5, 2));
        let torn = rig.device.in_flight().find_map(|op| match op {
            DiskOp::Write { at, .. } => Some(*at),
            _ => None,
        });
        let record = torn.expect("the batch is being written");
        // Its record is kept, with some of its data.
        let mut prng = Prng::new(seed);
        rig.device.power_cut_as(Cut::Blocks(0b01_0111), &mut prng);
        let mut rig = Rig::opening(rig.device, limits(), seed);
        let overwrites = |op: &DiskOp| matches!(op, DiskOp::Write { at, .. } if *at == record);
        while rig.store.state() != StoreState::Open {
            assert!(rig.step_with(|op| overwrites(op).then_some(Fault::LostWrite)));
        }
        assert_eq!(rig.store.counters().discarded_at_open, 1);
        let ticket = rig.submit(write_request(0, 10, 4, 3));
        while !rig.replies.contains_key(&ticket) {
            assert!(rig.step());
        }
        let reply = &rig.replies[&ticket];
        assert!(matches!(reply, StoreReply::Durable { .. }), "{reply:?}");
        let has_checkpoint = seed % 2 == 0;
        if has_checkpoint {
            rig.settle();
            assert_eq!(rig.store.counters().checkpoints, 1);
        }
        let mut rig = rig.reopen(true);
        rig.settle();
        match rig.store.state() {
            StoreState::Refused(OpenError::LogDamaged { .. }) if !has_checkpoint => found += 1,
            StoreState::Open => {
                let StoreReply::Read { blocks, bytes } = rig.read(0, 10, 4) else {
                    panic!("seed {seed}: it can be read")
                };
                assert!(blocks.iter().all(|block| block.version == version(3)), "seed {seed}");
                assert_eq!(bytes.concat(), contents(range(0, 10, 4), version(3)), "seed {seed}");
                survived += 1;
            }
            other => panic!("seed {seed}: {other:?}"),
        }
    }
    assert!(found >= 5 && survived >= 20, "{found} and {survived}");
}

/// After opening only one checkpoint is left. A store writes the other by itself, once.
#[test]
fn soon_after_opening_there_are_two_checkpoints_and_an_idle_store_writes_no_more() {
    for image in images() {
        let mut rig = open_whole(image.device.clone(), &image, |_| false);
        for _ in 0..3 {
            assert_eq!(rig.store.counters().checkpoints, 1, "{}", image.name);
            assert_eq!(rig.store.poll_timeout(), None, "{}", image.name);
            let written = rig.device.blocks_written();
            rig.now += std::time::Duration::from_secs(1);
            rig.store.handle_timeout(rig.now);
            rig.take_actions();
            rig.settle();
            assert_eq!(rig.device.blocks_written(), written, "{}", image.name);
        }
        rig.store.check_invariants();
    }
}

/// Whatever of a checkpoint is damaged soon after opening, header or root: the other one has everything.
#[test]
fn damage_of_a_checkpoint_soon_after_opening_is_survived() {
    for image in images() {
        let mut rig = Rig::opening(image.device.clone(), limits(), 1);
        rig.settle();
        let mut device = rig.device;
        device.power_cut(&mut Prng::new(1));
        let is_root = |at: &DeviceBlock| device.peek(*at).starts_with(b"CAIRNDIR");
        let roots: Vec<DeviceBlock> = written(&device).into_iter().filter(is_root).collect();
        let mut passed_over = 0;
        for at in CHECKPOINT_PLACES.into_iter().chain(roots) {
            for readable in [true, false] {
                let mut device = device.clone();
                if readable {
                    device.rot(at, 8 * 50);
                }
                let rig = open_whole(device, &image, |op| !readable && reads(op, at));
                let damaged = rig.store.counters().checkpoints_damaged;
                assert!(damaged == 1 || !CHECKPOINT_PLACES.contains(&at), "{}, {at}", image.name);
                passed_over += damaged;
            }
        }
        // Both headers, and the root of the newer one.
        assert!(passed_over >= 6, "{}: {passed_over}", image.name);
    }
}

/// The places of the copies of each page of the free-space map.
fn map_copies(rig: &Rig) -> Vec<[DeviceBlock; 2]> {
    let homes = &rig.store.engine().expect("it is open").space.homes;
    let places = homes.iter().flatten().map(|home| home.places);
    places
        .map(|copies| copies.map(|place| DeviceBlock(place.into())))
        .collect()
}

/// A page of the free-space map that does not change is needed by both checkpoints: it stands on the device twice.
#[test]
fn damage_of_a_copy_of_a_map_page_is_survived_and_the_page_written_anew() {
    for image in images() {
        let mut rig = Rig::opening(image.device.clone(), limits(), 1);
        rig.settle();
        let pages = map_copies(&rig);
        assert_eq!(pages.len(), 1, "{}", image.name);
        for (at, damage) in pages
            .concat()
            .into_iter()
            .flat_map(|at| (0..3).map(move |damage| (at, damage)))
        {
            let mut device = rig.device.clone();
            match damage {
                0 => device.rot(at, 8 * 50),
                1 => lose(&mut device, at),
                _ => {}
            }
            let mended = open_whole(device, &image, |op| damage == 2 && reads(op, at));
            let counters = mended.store.counters();
            assert_eq!((counters.map_copies_damaged, counters.checkpoints_damaged), (1, 0));
            mended.store.check_invariants();
            assert!(!map_copies(&mended).concat().contains(&at), "it is written elsewhere");
            let mut again = mended.reopen(true);
            again.settle();
            let counters = again.store.counters();
            assert_eq!((counters.map_copies_damaged, counters.checkpoints_damaged), (0, 0));
        }
    }
}

/// A device so large that its map has many pages: what one write has of them is never all there is of a page.
#[test]
fn no_write_has_both_copies_of_a_map_page() {
    const PAGES: u64 = 70;
    let mut rig = Rig::new(PAGES * MAP_PAGE_BLOCKS, limits(), 1);
    rig.create();
    let Inner::Running(engine) = &mut rig.store.inner else {
        panic!("it is open")
    };
    let places: Vec<u32> = (0..PAGES).map(|page| (page * MAP_PAGE_BLOCKS + 9000) as u32).collect();
    for place in &places {
        assert!(engine.space.allocator.take(*place));
    }
    engine.space.mark_data(&places, true);
    rig = {
        let before = rig.store.counters().checkpoints;
        for seq in 1.. {
            if rig.store.counters().checkpoints > before {
                break;
            }
            rig.write(0, 0, 1, seq);
        }
        rig
    };
    let pages = map_copies(&rig);
    assert_eq!(pages.len() as u64, PAGES);
    let write_of = |at: DeviceBlock| rig.device.last_write(at).expect("it was written").0;
    assert!(pages.iter().all(|copies| write_of(copies[0]) != write_of(copies[1])));
    let writes: std::collections::BTreeSet<u64> = pages.concat().into_iter().map(write_of).collect();
    assert!(writes.len() <= 10, "they are written together: {} writes", writes.len());
    let mut device = rig.device.clone();
    // One of all first copies, and one of the second.
    for (i, copies) in pages.iter().enumerate() {
        device.rot(copies[i % 2], 8 * 700);
    }
    let mut rig = Rig::opening(device, limits(), 1);
    rig.settle();
    assert_eq!(rig.store.state(), StoreState::Open);
    assert_eq!(rig.store.counters().map_copies_damaged, PAGES);
    assert_eq!(rig.store.space().data, PAGES + 1);
}

/// Writes go wrong while the store is at work, one in each run: what it does afterwards makes nothing worse.
#[test]
fn a_write_that_goes_wrong_while_the_store_is_at_work_is_survived_or_reported() {
    let mut tally = Tally::default();
    for wrong in 0..60 {
        let mut prng = Prng::new(wrong);
        let mut rig = Rig::new(BLOCKS, limits(), 21);
        rig.create();
        let mut model = Model {
            replica: Some((Epoch(1), 1)),
            ..Model::default()
        };
        let mut workload = Workload::new(200, 24);
        let mut writes = 0;
        for _ in 0..40 {
            let request = workload.request(&mut prng, false);
            let ticket = rig.submit(request.clone());
            loop {
                let fault = if prng.chance(1, 2) {
                    Fault::LostWrite
                } else {
                    Fault::MisdirectedBy(prng.below(BLOCKS))
                };
                let before = rig
                    .device
                    .in_flight()
                    .filter(|op| matches!(op, DiskOp::Write { .. }))
                    .count();
                let only = before == 1 && writes == wrong;
                let more = rig.step_with(|op| (only && matches!(op, DiskOp::Write { .. })).then_some(fault));
                let after = rig
                    .device
                    .in_flight()
                    .filter(|op| matches!(op, DiskOp::Write { .. }))
                    .count();
                writes += u64::from(after < before);
                if !more {
                    break;
                }
            }
            match rig.replies.remove(&ticket).expect("an idle store has answered") {
                StoreReply::Durable { .. } => model.apply(&request),
                StoreReply::Failed(StoreError::IndexDamaged) => {}
                other => panic!("write {wrong}: {other:?}"),
            }
        }
        rig.pass_time();
        let words = |error| format!("write {wrong} went wrong: {error}");
        compare(&mut rig, &model, &|_| false).map_err(words).unwrap();
        rig.device.power_cut(&mut prng);
        tally.add(examine(rig.device, &model, |_| false).map_err(words).unwrap());
    }
    tally.check();
}
