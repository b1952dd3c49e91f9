use cairn_proto::disk::{DeviceBlock, DiskError, DiskGeometry};
use cairn_proto::ids::{Epoch, GroupId, GroupIndex, Layer, VolumeId};
use cairn_proto::limits::BLOCK_BYTES;

use super::*;
use crate::store::api::{StoreRequest, WriteContent};
use crate::store::tests::rig::*;
use crate::store::{StoreLimits, StoreState};
use crate::testing::{MemoryDevice, Prng};

const VERIFY: InspectOptions = InspectOptions {
    verify: true,
    volume: None,
};

fn look(device: &mut MemoryDevice, options: InspectOptions) -> Inspection {
    inspect(device, options, &mut |_| {})
}

fn contents_of(inspection: &Inspection) -> &Contents {
    inspection.contents.as_ref().expect("it can be opened")
}

/// A store with chunks, overwrites, holes and a checkpoint behind it.
fn used() -> Rig {
    let mut rig = Rig::new(2048, StoreLimits::tiny(), 1);
    rig.create();
    for seq in 1..60 {
        rig.write((seq % 3) as u32, (seq * 37 % 4000) as u32, 5, seq);
    }
    rig.call(hole_request(1, 0, 500, 100, WriteContent::Discard));
    rig.write(0, 0, 20, 101);
    rig.pass_time();
    assert!(rig.store.counters().checkpoints > 0, "the limits are tiny");
    rig
}

/// Where the block of chunk 0 stands that version 101 has written.
fn place(rig: &Rig, block: u32) -> DeviceBlock {
    let content = content(range(0, block, 1).volume_block(0), version(101));
    rig.find(&content).expect("it was written")
}

#[test]
fn a_sound_device_is_counted_as_its_store_counts_and_nothing_is_written() {
    let mut rig = used();
    let (space, writes) = (rig.store.space(), rig.device.blocks_written());
    let inspection = look(&mut rig.device, VERIFY);
    assert_eq!(rig.device.blocks_written(), writes);
    assert_eq!(inspection.damage, DamageList::default());
    assert_eq!(inspection.identity, rig.store.identity());
    assert!(inspection.superblocks.iter().all(|copy| copy.content.is_ok()));
    assert_eq!(inspection.superblocks.len(), 3);
    let found = contents_of(&inspection);
    let slot = |slot: &CheckpointSlot| match &slot.content {
        CheckpointContent::Valid(found) => Some(*found),
        _ => None,
    };
    let used = inspection.checkpoints.iter().filter_map(slot).find(|found| found.used);
    assert_eq!(used.expect("one was used").commit, found.log.checkpoint_commit);
    assert_eq!(found.log.last_commit, rig.store.commit_seq().0);
    assert!(!found.log.discarded);
    assert_eq!((found.space.data, found.space.capacity), (space.data, space.capacity));
    assert_eq!(found.verified.unwrap().blocks, space.data);
    let [replica] = found.replicas.as_slice() else {
        panic!("one replica")
    };
    assert_eq!(
        (replica.group, replica.role, replica.blocks_counted),
        (GROUP, 1, space.data)
    );
    let [layer] = replica.layers.as_slice() else {
        panic!("one layer")
    };
    assert_eq!((layer.data_blocks, layer.chunks, layer.data_chunks), (space.data, 3, 3));
    assert!(layer.extents >= layer.data_chunks && layer.extents <= layer.data_blocks);
}

#[test]
fn what_was_cut_off_by_a_power_failure_is_no_damage() {
    for seed in 0..40 {
        let mut rig = used();
        rig.prng = Prng::new(seed);
        for seq in 200..203 {
            rig.submit(write_request(0, (seq % 7) as u32, 9, seq));
        }
        for _ in 0..seed % 12 {
            rig.step();
        }
        rig.device.power_cut(&mut rig.prng);
        let inspection = look(&mut rig.device, VERIFY);
        assert_eq!(inspection.damage, DamageList::default(), "seed {seed}");
        let expected = contents_of(&inspection).log;
        let mut reopened = Rig::opening(rig.device, StoreLimits::tiny(), seed);
        reopened.settle();
        assert_eq!(reopened.store.state(), StoreState::Open);
        assert_eq!(reopened.store.recovered_seq().0, expected.last_commit, "seed {seed}");
        let discarded = reopened.store.counters().discarded_at_open > 0;
        assert_eq!(discarded, expected.discarded, "seed {seed}");
    }
}

#[test]
fn a_flipped_bit_of_data_is_found_by_verify_and_named() {
    let mut rig = used();
    let at = place(&rig, 7);
    rig.device.rot(at, 12_345);
    assert_eq!(look(&mut rig.device, InspectOptions::default()).damage.total, 0);
    let inspection = look(&mut rig.device, VERIFY);
    let [damage] = inspection.damage.listed.as_slice() else {
        panic!("{:?}", inspection.damage)
    };
    let blocks = damage.blocks.expect("it is of a volume");
    assert_eq!((damage.kind, damage.place), (DamageKind::Checksum, Some(at)));
    assert_eq!(
        (blocks.group, blocks.chunk.0, blocks.block, blocks.version),
        (GROUP, 0, 7, Some(version(101)))
    );
    assert!(
        damage
            .to_string()
            .starts_with("volume 7 group 1 layer 0 chunk 0 block 7 version v1.101: ")
    );
    let other = InspectOptions {
        volume: Some(VolumeId(8)),
        ..VERIFY
    };
    let inspection = look(&mut rig.device, other);
    assert_eq!(
        (inspection.damage.total, contents_of(&inspection).replicas.len()),
        (0, 0)
    );
}

/// A device on which one block can't be read.
struct BadBlock(MemoryDevice, DeviceBlock);

impl BlockReader for BadBlock {
    fn geometry(&self) -> DiskGeometry {
        self.0.geometry()
    }

    fn read(&mut self, wanted: &[(DeviceBlock, u32)]) -> Vec<Result<Bytes, DiskError>> {
        let results = BlockReader::read(&mut self.0, wanted).into_iter().zip(wanted);
        let bad = self.1.0;
        results
            .map(
                |(result, (at, blocks))| match (at.0..at.0 + u64::from(*blocks)).contains(&bad) {
                    true => Err(DiskError { errno: 5 }),
                    false => result,
                },
            )
            .collect()
    }
}

#[test]
fn a_block_that_cannot_be_read_does_not_hide_its_neighbours() {
    let rig = used();
    let at = place(&rig, 3);
    let in_all = rig.store.space().data;
    let inspection = inspect(&mut BadBlock(rig.device, at), VERIFY, &mut |_| {});
    let [damage] = inspection.damage.listed.as_slice() else {
        panic!("{:?}", inspection.damage)
    };
    assert_eq!((damage.kind, damage.blocks.unwrap().block), (DamageKind::Unreadable, 3));
    assert_eq!(contents_of(&inspection).verified.unwrap().blocks, in_all);
}

#[test]
fn every_block_of_metadata_that_rots_is_reported() {
    let rig = used();
    // The newest checkpoint, and what it refers to, are found by their kinds of block.
    let mut found = 0;
    for place in 0..rig.device.geometry().blocks {
        let block = rig.device.peek(DeviceBlock(place));
        let is_head = block.starts_with(b"CAIRNDEV") || block.starts_with(b"CAIRNCKP");
        if !is_head {
            continue;
        }
        found += 1;
        let mut device = rig.device.clone();
        device.rot(DeviceBlock(place), 200);
        let inspection = look(&mut device, VERIFY);
        assert!(inspection.damage.total > 0, "block {place}");
        assert!(inspection.contents.is_ok(), "block {place}: another copy does");
    }
    assert!(found >= 4, "{found}");
}

#[test]
fn a_page_of_the_index_that_rots_names_the_blocks_that_are_not_known() {
    let mut rig = used();
    // Everything is in the checkpoint; nothing of the index comes from the log.
    for seq in 300..340 {
        rig.write(2, (seq % 9) as u32, 1, seq);
    }
    let sound = look(&mut rig.device, VERIFY);
    assert_eq!(sound.damage.total, 0);
    let places = 4..rig.device.geometry().blocks - 1;
    let mut lost = 0;
    for place in places {
        let block = rig.device.peek(DeviceBlock(place));
        if block[..256] == block[256..512] || lost == 3 {
            // Zeroes, or the pattern of the data.
            continue;
        }
        let mut device = rig.device.clone();
        device.rot(DeviceBlock(place), 4001);
        let inspection = look(&mut device, InspectOptions::default());
        let kinds = inspection.damage.listed.iter().map(|damage| damage.kind);
        if kinds.clone().any(|kind| kind == DamageKind::IndexPage) {
            lost += 1;
            assert!(
                kinds.clone().all(|kind| kind == DamageKind::IndexPage),
                "{:?}",
                inspection.damage
            );
            let blocks = inspection.damage.listed[0].blocks.unwrap();
            assert_eq!((blocks.group, blocks.count), (GROUP, 256));
        }
    }
    assert!(lost > 0, "some pages are on the device only");
}

#[test]
fn what_is_no_store_is_said() {
    let geometry = DiskGeometry {
        blocks: 1024,
        volatile_cache: true,
    };
    let mut device = MemoryDevice::new(geometry);
    let inspection = look(&mut device, VERIFY);
    assert_eq!(inspection.contents.unwrap_err(), OpenError::Blank);
    device.poke(DeviceBlock(0), &[0x61; BLOCK_BYTES]);
    let inspection = look(&mut device, VERIFY);
    assert!(matches!(inspection.probe, Probe::Foreign { .. }));
    assert!(inspection.superblocks.is_empty());
    let mut device = formatted(geometry);
    let inspection = look(&mut device, VERIFY);
    let found = contents_of(&inspection);
    assert_eq!(
        (found.log.last_commit, found.replicas.len(), inspection.damage.total),
        (0, 0, 0)
    );
    // Without two of its ends it is damaged, and says which.
    device.rot(DeviceBlock(0), 400);
    device.rot(DeviceBlock(1), 400);
    let inspection = look(&mut device, VERIFY);
    assert_eq!((inspection.damage.total, inspection.contents.is_ok()), (2, true));
    device.rot(DeviceBlock(1023), 400);
    let inspection = look(&mut device, VERIFY);
    assert!(matches!(inspection.contents, Err(OpenError::Damaged { .. })));
    assert_eq!(inspection.damage.total, 3);
    let short = DiskGeometry {
        blocks: 100,
        ..geometry
    };
    let inspection = look(&mut MemoryDevice::new(short), VERIFY);
    assert_eq!(inspection.contents.unwrap_err(), OpenError::Length { blocks: 100 });
}

/// What the walk says of a device whose state in memory was changed after it was opened.
fn walked(device: &mut MemoryDevice, change: impl FnOnce(&mut Engine)) -> Vec<DamageKind> {
    let geometry = MemoryDevice::geometry(device);
    let mut engine = open(device, geometry).expect("it is sound");
    change(&mut engine);
    let mut damage = DamageList::default();
    let mut progress = |_: InspectProgress| {};
    let mut walk = Walk::new(
        &mut engine,
        device,
        InspectOptions::default(),
        &mut damage,
        &mut progress,
    );
    let replicas = walk.replicas();
    walk.finish(&replicas);
    damage.listed.iter().map(|damage| damage.kind).collect()
}

#[test]
fn a_map_that_does_not_agree_with_the_index_is_reported() {
    let rig = used();
    let data = place(&rig, 1).0 as u32;
    let mut device = rig.device;
    assert_eq!(walked(&mut device, |_| {}), []);
    let free = |engine: &Engine| {
        let places = 4..engine.identity.blocks as u32 - 1;
        let homes: Vec<u32> = places.filter(|place| !engine.space.data.get(*place)).collect();
        *homes.last().expect("it is not full")
    };
    let found = walked(&mut device, |engine| {
        engine.space.data.set(data, false);
    });
    assert_eq!(found, [DamageKind::Unmapped]);
    let found = walked(&mut device, |engine| {
        let place = free(engine);
        engine.space.data.set(place, true);
    });
    assert_eq!(found, [DamageKind::Leak]);
    let found = walked(&mut device, |engine| {
        engine.catalog.replicas.get_mut(&GROUP).expect("it is there").blocks += 1;
    });
    assert_eq!(found, [DamageKind::Count]);
}

#[test]
fn a_damaged_copy_of_a_map_page_is_reported_and_the_contents_are_read_from_the_other() {
    let rig = used();
    let home = rig.store.engine().expect("it is open").space.homes[0].expect("blocks are used");
    for place in home.places {
        let mut device = rig.device.clone();
        device.rot(DeviceBlock(place.into()), 77);
        let inspection = look(&mut device, VERIFY);
        let kinds: Vec<DamageKind> = inspection.damage.listed.iter().map(|damage| damage.kind).collect();
        assert_eq!(kinds, [DamageKind::MapPage]);
        assert_eq!(contents_of(&inspection).space.data, rig.store.space().data);
    }
}

#[test]
fn layers_are_counted_apart() {
    let mut rig = used();
    let before = rig.store.space().data;
    for (layer, blocks) in [(3, 7), (1, 4)] {
        let StoreRequest::Write {
            group,
            range,
            version,
            content,
            ..
        } = write_request(0, 100, blocks, 400)
        else {
            unreachable!("it is a write")
        };
        let layer = Layer(layer);
        rig.call(StoreRequest::Write {
            group,
            layer,
            range,
            version,
            content,
        });
    }
    let inspection = look(&mut rig.device, VERIFY);
    assert_eq!(inspection.damage, DamageList::default());
    let layers = &contents_of(&inspection).replicas[0].layers;
    let found: Vec<(u32, u64)> = layers.iter().map(|layer| (layer.layer.0, layer.data_blocks)).collect();
    assert_eq!(found, [(0, before), (1, 4), (3, 7)]);
}

/// Two groups in many leaves of the directory, most of them not in memory when the device is opened.
fn spread() -> Rig {
    let mut rig = Rig::new(4096, StoreLimits::tiny(), 3);
    rig.create();
    let group = GroupId {
        index: GroupIndex(2),
        ..GROUP
    };
    rig.call(StoreRequest::CreateReplica {
        group,
        role: 2,
        epoch: Epoch(1),
    });
    for seq in 1..=120 {
        let StoreRequest::Write {
            layer,
            range,
            version,
            content,
            ..
        } = write_request((seq % 40) as u32, 7, 3, seq)
        else {
            unreachable!("it is a write")
        };
        let group = if seq % 3 == 0 { group } else { GROUP };
        rig.call(StoreRequest::Write {
            group,
            layer,
            range,
            version,
            content,
        });
    }
    rig.pass_time();
    rig
}

#[test]
fn groups_that_share_leaves_are_counted_apart() {
    let mut rig = spread();
    let in_all = rig.store.space().data;
    let inspection = look(&mut rig.device, VERIFY);
    assert_eq!(inspection.damage, DamageList::default());
    let replicas = &contents_of(&inspection).replicas;
    let chunks: Vec<u64> = replicas.iter().map(|replica| replica.layers[0].chunks).collect();
    assert_eq!(chunks, [40, 40]);
    let blocks: u64 = replicas.iter().map(|replica| replica.layers[0].data_blocks).sum();
    assert_eq!(blocks, in_all);
}

#[test]
fn a_leaf_that_rots_is_reported_once_and_nothing_is_concluded_from_it() {
    let rig = spread();
    let mut reported = 0;
    for place in 4..rig.device.geometry().blocks - 1 {
        if !rig.device.peek(DeviceBlock(place)).starts_with(b"CAIRNLEF") || reported == 5 {
            continue;
        }
        let mut device = rig.device.clone();
        device.rot(DeviceBlock(place), 900);
        let inspection = look(&mut device, InspectOptions::default());
        match inspection.damage.listed.as_slice() {
            // A leaf that is not used any more, or is in the log as well.
            [] => {}
            [damage] => {
                assert_eq!(
                    (damage.kind, damage.place),
                    (DamageKind::IndexPage, Some(DeviceBlock(place)))
                );
                reported += 1;
            }
            more => panic!("{more:?}"),
        }
    }
    assert!(reported > 1, "{reported}");
}

#[test]
fn nothing_that_stands_on_a_device_makes_it_panic() {
    let sound = used().device;
    let blocks = MemoryDevice::geometry(&sound).blocks;
    for seed in 0..60 {
        let mut prng = Prng::new(seed);
        let mut device = sound.clone();
        for _ in 0..prng.between(1, 12) {
            // Half of the damage hits what everything begins with.
            let end = if prng.chance(1, 2) { 12 } else { blocks };
            let at = DeviceBlock(prng.below(end));
            match prng.below(3) {
                0 => device.rot(at, prng.below(BLOCK_BYTES as u64 * 8) as usize),
                1 => {
                    // Sound, and in the wrong place.
                    let other = *device.peek(DeviceBlock(prng.below(blocks)));
                    device.poke(at, &other);
                }
                _ => device.poke(at, &[prng.below(256) as u8; BLOCK_BYTES]),
            }
        }
        let inspection = look(&mut device, VERIFY);
        let mut opened = Rig::opening(device, StoreLimits::tiny(), seed);
        opened.settle();
        let can_be_opened = opened.store.state() == StoreState::Open;
        assert_eq!(
            inspection.contents.is_ok(),
            can_be_opened,
            "seed {seed}: {:?}",
            inspection.contents
        );
    }
}
