//! The scrub: what it finds, and how a pass goes on after a restart.

use cairn_proto::block::{Apply, Content, Cursor};
use cairn_proto::checksum::range_checksums;
use cairn_proto::disk::{DeviceBlock, DiskError, DiskOp};
use cairn_proto::ids::{ChunkIndex, Epoch, Layer};

use super::rig::*;
use crate::store::api::{
    CopiedBlock, DamagedBlock, DamagedMetadata, MetadataKind, StoreError, StoreReply, StoreRequest, Why, WriteContent,
};
use crate::store::superblock::CHECKPOINT_PLACES;
use crate::store::{ScrubCursor, ScrubState, StoreLimits};
use crate::testing::Fault;

/// What one pass has found.
#[derive(Default, Debug)]
struct Pass {
    checked: u64,
    requests: u32,
    damaged: Vec<DamagedBlock>,
    metadata: Vec<DamagedMetadata>,
}

impl Pass {
    fn blocks(&self) -> Vec<(u32, u32)> {
        self.damaged.iter().map(|found| (found.chunk.0, found.block)).collect()
    }

    fn is_clean(&self) -> bool {
        self.damaged.is_empty() && self.metadata.is_empty()
    }
}

/// A whole pass; device operations that `fault` says fail.
fn pass_with(rig: &mut Rig, blocks_max: u32, fault: impl Fn(&DiskOp) -> Option<Fault>) -> Pass {
    let mut pass = Pass::default();
    let mut from = ScrubCursor::START;
    loop {
        pass.requests += 1;
        let ticket = rig.submit(StoreRequest::Scrub { from, blocks_max });
        while rig.step_with(&fault) {}
        let Some(StoreReply::Scrubbed {
            checked,
            damaged,
            metadata,
            next,
        }) = rig.replies.remove(&ticket)
        else {
            panic!("a scrub is answered")
        };
        assert!(checked < blocks_max + 256, "{checked} blocks of {blocks_max} at once");
        pass.checked += u64::from(checked);
        pass.damaged.extend(damaged);
        pass.metadata.extend(metadata);
        match next {
            None => return pass,
            Some(next) => assert!(next > from, "{next:?} is not behind {from:?}"),
        }
        from = next.expect("it was looked at");
    }
}

fn pass(rig: &mut Rig) -> Pass {
    pass_with(rig, 256, |_| None)
}

fn place_of(rig: &Rig, chunk: u32, block: u32, seq: u64) -> DeviceBlock {
    let content = content(range(chunk, block, 1).volume_block(0), version(seq));
    rig.find(&content).expect("it was written")
}

/// A copy, as another replica has it, of blocks that were written with one version.
fn copy_request(chunk: u32, start: u32, blocks: u32, seq: u64) -> StoreRequest {
    let range = range(chunk, start, blocks);
    let bytes = contents(range, version(seq));
    let state = |checksum| CopiedBlock {
        content: Content::Data(checksum),
        version: version(seq),
    };
    StoreRequest::Copy {
        group: GROUP,
        layer: Layer(0),
        range,
        blocks: range_checksums(GROUP.volume, range, &bytes)
            .into_iter()
            .map(state)
            .collect(),
        bytes,
        apply: Apply::IfNewer,
    }
}

fn state(pass: u64, block: u32) -> ScrubState {
    let at = Cursor {
        chunk: ChunkIndex(3),
        layer: Layer(1),
        block,
    };
    ScrubState {
        pass,
        cursor: Some(ScrubCursor { group: GROUP, at }),
        begun_s: 1_700_000_000,
        checked: 55,
        damaged: 2,
        finished_pass: pass - 1,
        ..ScrubState::default()
    }
}

#[test]
fn how_far_a_pass_is_survives_power_cuts_and_checkpoints() {
    let mut rig = Rig::new(1024, StoreLimits::tiny(), 1);
    assert_eq!(rig.store.scrub_state(), ScrubState::default());
    rig.create();
    for (block, writes) in [(77, 0), (99, 200)] {
        let reply = rig.call(StoreRequest::SaveScrub { state: state(4, block) });
        assert!(matches!(reply, StoreReply::Durable { .. }), "{reply:?}");
        // Without writes it is in the log, with many of them in a checkpoint.
        let checkpoints = rig.store.counters().checkpoints;
        (0..writes).for_each(|i| drop(rig.write(0, i % 64, 1, 1 + u64::from(i))));
        assert_eq!(rig.store.counters().checkpoints > checkpoints + 2, writes > 0);
        rig = rig.reopen(true);
        rig.settle();
        assert_eq!(rig.store.scrub_state(), state(4, block));
    }
}

/// Data, holes and layers over several chunks.
fn filled(limits: StoreLimits) -> Rig {
    let mut rig = Rig::new(2048, limits, 1);
    rig.create();
    for (i, start) in (0..12u32).zip((0..).step_by(300)) {
        rig.write(i % 3, start, 40, 10 + u64::from(i));
    }
    rig.call(hole_request(0, 310, 600, 30, WriteContent::Zero));
    rig.call(hole_request(1, 0, 64, 31, WriteContent::Discard));
    let StoreRequest::Write { range, content, .. } = write_request(1, 500, 20, 32) else {
        unreachable!("it is a write")
    };
    rig.call(StoreRequest::Write {
        group: GROUP,
        layer: Layer(4),
        range,
        version: version(32),
        content,
    });
    rig
}

#[test]
fn a_pass_checks_every_block_of_data_once_whatever_it_is_cut_into() {
    let mut rig = filled(StoreLimits::tiny());
    let data = rig.store.space().data;
    let mut requests = Vec::new();
    for blocks_max in [1, 50, 100_000] {
        let pass = pass_with(&mut rig, blocks_max, |_| None);
        assert!(pass.is_clean(), "{pass:?}");
        assert_eq!(pass.checked, data, "{blocks_max} at once");
        requests.push(pass.requests);
    }
    assert!(requests[0] > requests[1] && requests[2] == 1, "{requests:?}");
    rig.store.check_invariants();
}

#[test]
fn rot_is_found_and_a_copy_of_the_same_version_mends_it() {
    let mut rig = filled(StoreLimits::tiny());
    let at = place_of(&rig, 2, 610, 12);
    rig.device.rot(at, 77);
    let found = pass(&mut rig);
    let expected = DamagedBlock {
        group: GROUP,
        layer: Layer(0),
        chunk: ChunkIndex(2),
        block: 610,
        version: version(12),
        why: Why::Mismatch,
    };
    assert_eq!((found.damaged, found.metadata), (vec![expected], vec![]));
    assert_eq!(rig.store.counters().blocks_damaged, 1);
    let written = rig.store.counters().blocks_written;
    rig.call(copy_request(2, 600, 40, 12));
    assert_eq!(
        rig.store.counters().blocks_written,
        written + 1,
        "only that one is written"
    );
    assert!(pass(&mut rig).is_clean());
    rig.call(copy_request(2, 600, 40, 12));
    assert_eq!(
        rig.store.counters().blocks_written,
        written + 1,
        "it is damaged no more"
    );
}

fn damage(rig: &Rig) -> Vec<(u32, u32, u32)> {
    let runs = rig.store.damage();
    runs.map(|(_, _, range)| (range.chunk().0, range.start(), range.count()))
        .collect()
}

#[test]
fn known_damage_is_told_and_listed_with_its_version_until_it_is_mended_or_gone() {
    let mut rig = filled(StoreLimits::tiny());
    for block in [610, 611, 613] {
        let at = place_of(&rig, 2, block, 12);
        rig.device.rot(at, 77);
    }
    assert!(damage(&rig).is_empty());
    assert_eq!(pass(&mut rig).damaged.len(), 3);
    assert_eq!(damage(&rig), [(2, 610, 2), (2, 613, 1)]);
    let list = |rig: &mut Rig| {
        let from = Cursor {
            chunk: ChunkIndex(2),
            layer: Layer(0),
            block: 609,
        };
        let to = Cursor { block: 615, ..from };
        let (above, runs_max) = (cairn_proto::ids::Version::ZERO, 100);
        let group = GROUP;
        let reply = rig.call(StoreRequest::Collect {
            group,
            from,
            to,
            above,
            runs_max,
        });
        let StoreReply::Collected { runs, .. } = reply else {
            panic!("{reply:?}")
        };
        let run = |run: &cairn_proto::block::Run| {
            assert_eq!(
                run.state.version,
                version(12),
                "damage does not change what it is a copy of"
            );
            (
                run.range.start(),
                run.range.count(),
                run.state.content == Content::Damaged,
            )
        };
        runs.iter().map(run).collect::<Vec<_>>()
    };
    let expected = [
        (609, 1, false),
        (610, 2, true),
        (612, 1, false),
        (613, 1, true),
        (614, 1, false),
    ];
    assert_eq!(list(&mut rig), expected);
    // An older copy changes nothing, one of the same version mends.
    rig.call(copy_request(2, 610, 1, 11));
    assert_eq!(damage(&rig), [(2, 610, 2), (2, 613, 1)]);
    rig.call(copy_request(2, 610, 1, 12));
    assert_eq!(damage(&rig), [(2, 611, 1), (2, 613, 1)]);
    // What is discarded is not damaged any more, and nothing of a replica that is dropped.
    rig.call(StoreRequest::Write {
        group: GROUP,
        layer: Layer(0),
        range: range(2, 611, 1),
        version: version(90),
        content: WriteContent::Discard,
    });
    assert_eq!(damage(&rig), [(2, 613, 1)]);
    assert_eq!(rig.store.counters().blocks_mended, 2);
    rig.call(StoreRequest::DropReplica {
        group: GROUP,
        epoch: Epoch(1),
    });
    assert!(damage(&rig).is_empty() && rig.store.damaged_blocks() == 0);
}

#[test]
fn a_bad_sector_is_damage_of_its_block_alone_and_forgotten_when_it_can_be_read_again() {
    let mut rig = filled(StoreLimits::tiny());
    let bad = place_of(&rig, 2, 610, 12).0;
    let hits =
        |op: &DiskOp| matches!(op, DiskOp::Read { at, blocks, .. } if (at.0..at.0 + u64::from(*blocks)).contains(&bad));
    let found = pass_with(&mut rig, 256, |op| hits(op).then(Fault::default));
    assert_eq!(found.blocks(), [(2, 610)]);
    assert_eq!(found.damaged[0].why, Why::Unreadable(DiskError { errno: 5 }));
    assert_eq!(found.checked, rig.store.space().data);
    assert!(pass(&mut rig).is_clean());
    let written = rig.store.counters().blocks_written;
    rig.call(copy_request(2, 600, 40, 12));
    assert_eq!(rig.store.counters().blocks_written, written, "there is nothing to mend");
}

#[test]
fn what_is_written_meanwhile_is_never_taken_for_damage() {
    for seed in 0..20 {
        let limits = StoreLimits {
            overwrite_reserve_blocks: 32,
            ..StoreLimits::tiny()
        };
        // Small enough that what is given back is soon used again.
        let mut rig = Rig::new(400, limits, seed);
        rig.create();
        rig.write(0, 200, 110, 1);
        let (mut seq, mut from, mut scrub, mut passes) = (2, ScrubCursor::START, None, 0);
        while passes < 6 {
            if scrub.is_none() {
                scrub = Some(rig.submit(StoreRequest::Scrub { from, blocks_max: 60 }));
            }
            if rig.prng.chance(1, 2) {
                let start = rig.prng.between(200, 300) as u32;
                let count = rig.prng.between(1, 10) as u32;
                rig.submit(write_request(0, start, count, seq));
                seq += 1;
            }
            for _ in 0..rig.prng.below(6) {
                rig.step();
            }
            if let Some(reply) = scrub.and_then(|ticket| rig.replies.remove(&ticket)) {
                let StoreReply::Scrubbed {
                    damaged,
                    metadata,
                    next,
                    ..
                } = reply
                else {
                    panic!("a scrub is answered")
                };
                assert_eq!((damaged, metadata), (vec![], vec![]), "seed {seed}, write {seq}");
                (scrub, from) = (None, next.unwrap_or(ScrubCursor::START));
                passes += u32::from(next.is_none());
            }
        }
        rig.settle();
        rig.store.check_invariants();
    }
}

#[test]
fn damage_of_any_metadata_is_found() {
    let mut rig = filled(StoreLimits::tiny());
    rig.settle();
    let last = DeviceBlock(rig.device.geometry().blocks - 1);
    let newest = CHECKPOINT_PLACES[(rig.store.counters().checkpoints as usize + 1) % 2];
    for (at, kind) in [
        (DeviceBlock(0), MetadataKind::Superblock),
        (DeviceBlock(1), MetadataKind::Superblock),
        (last, MetadataKind::Superblock),
        (newest, MetadataKind::CheckpointHeader),
    ] {
        rig.device.rot(at, 99);
        let found = pass(&mut rig);
        let named: Vec<_> = found.metadata.iter().map(|m| (m.kind, m.place, m.why)).collect();
        assert_eq!(named, [(kind, at, Why::Mismatch)], "{found:?}");
        assert!(found.damaged.is_empty());
        let is_superblock = kind == MetadataKind::Superblock;
        assert_eq!(found.metadata[0].is_mended, is_superblock);
        if is_superblock {
            assert!(pass(&mut rig).is_clean(), "it is written anew from another copy");
        } else {
            rig.device.rot(at, 99);
        }
    }
    rig = rig.reopen(true);
    rig.settle();
    assert!(pass(&mut rig).is_clean());
}

#[test]
fn a_damaged_copy_of_a_map_page_is_found_and_written_anew_by_the_next_checkpoint() {
    for copy in 0..2 {
        let mut rig = filled(StoreLimits::tiny());
        rig.settle();
        let home = rig.store.engine().expect("it is open").space.homes[0].expect("blocks are used");
        let at = DeviceBlock(home.places[copy].into());
        rig.device.rot(at, 99);
        let found = pass(&mut rig);
        let named: Vec<_> = found.metadata.iter().map(|m| (m.kind, m.place, m.is_mended)).collect();
        assert_eq!(named, [(MetadataKind::MapPage, at, true)], "{found:?}");
        let checkpoints = rig.store.counters().checkpoints;
        for seq in 0.. {
            if rig.store.counters().checkpoints > checkpoints {
                break;
            }
            rig.write(9, 0, 1, 1000 + seq);
        }
        assert!(pass(&mut rig).is_clean());
    }
}

/// Fills so many index pages that most are not in memory.
fn many_pages(checkpoint_dirty_pages: usize) -> Rig {
    let limits = StoreLimits {
        checkpoint_dirty_pages,
        ..StoreLimits::tiny()
    };
    let mut rig = Rig::new(2048, limits, 1);
    rig.create();
    for page in 0..40 {
        rig.write(page / 20, page % 20 * 256, 3, 1 + u64::from(page));
    }
    rig.pass_time();
    rig
}

#[test]
fn a_pass_leaves_the_index_in_memory_as_it_is() {
    let mut rig = many_pages(20);
    let before = rig.store.counters();
    assert!(before.index_pages_resident < 20);
    let found = pass(&mut rig);
    assert_eq!((found.checked, found.is_clean()), (120, true));
    let after = rig.store.counters();
    assert_eq!(after.index_pages_resident, before.index_pages_resident);
    assert_eq!(after.index_loads, before.index_loads);
    assert_eq!(after.index_evictions, before.index_evictions);
}

#[test]
fn rotten_index_pages_are_reported_and_those_in_memory_are_written_anew() {
    rotten_index_pages(20);
}

/// What is in memory is not given up because a checkpoint is being written when it is found.
#[test]
fn rotten_index_pages_are_written_anew_beside_a_checkpoint_too() {
    rotten_index_pages(4);
}

fn rotten_index_pages(checkpoint_dirty_pages: usize) {
    let mut rig = many_pages(checkpoint_dirty_pages);
    // An index page is known by its first entry: the version and checksum of the page's first block.
    let mut homes = Vec::new();
    for page in 0..40u32 {
        let range = range(page / 20, page % 20 * 256, 1);
        let version = version(1 + u64::from(page));
        let checksum = range_checksums(GROUP.volume, range, &contents(range, version))[0];
        let entry = [&version.to_bits().to_le_bytes()[..], &checksum.0.to_le_bytes()[..]].concat();
        let blocks = (4..rig.device.geometry().blocks).map(DeviceBlock);
        let found = blocks.into_iter().filter(|at| rig.device.peek(*at).starts_with(&entry));
        homes.push(found.collect::<Vec<_>>());
    }
    homes.iter().flatten().for_each(|at| rig.device.rot(*at, 12_345));
    let found = pass(&mut rig);
    assert!(found.damaged.is_empty());
    let (mended, lost): (Vec<DamagedMetadata>, Vec<_>) = found.metadata.iter().partition(|m| m.is_mended);
    assert!(
        !mended.is_empty() && lost.len() > 20,
        "{} and {}",
        mended.len(),
        lost.len()
    );
    let is_page = |m: &&DamagedMetadata| matches!(m.kind, MetadataKind::IndexPage { .. }) && m.why == Why::Mismatch;
    assert!(found.metadata.iter().all(|m| is_page(&m)), "{found:?}");
    // After the next checkpoint the ones that were in memory are whole again, and the others still damaged.
    (0..30).for_each(|i| drop(rig.write(5, i * 256, 1, 100 + u64::from(i))));
    rig.settle();
    assert_eq!(pass(&mut rig).metadata, lost);
}

#[test]
fn one_scrub_at_a_time() {
    let mut rig = filled(StoreLimits::tiny());
    let request = StoreRequest::Scrub {
        from: ScrubCursor::START,
        blocks_max: 10,
    };
    rig.submit(request.clone());
    let reply = rig.call(request);
    assert!(matches!(reply, StoreReply::Failed(StoreError::Busy)), "{reply:?}");
}

#[test]
fn a_store_that_has_stopped_writing_is_still_verified() {
    let mut rig = filled(StoreLimits::tiny());
    rig.submit(write_request(0, 0, 4, 99));
    while rig.step_with(|op| matches!(op, DiskOp::Write { .. }).then(Fault::default)) {}
    let at = place_of(&rig, 2, 610, 12);
    rig.device.rot(at, 77);
    assert_eq!(pass(&mut rig).blocks(), [(2, 610)]);
}
