//! The store and a plain map do the same: requests of every kind, crashes, bit rot, devices that fail. They are compared
//! after each.

use std::cell::RefCell;
use std::collections::BTreeSet;

use cairn_proto::block::Content;
use cairn_proto::disk::{DeviceBlock, DiskOp};
use cairn_proto::ids::Epoch;
use cairn_proto::limits::{BLOCK_BYTES, BLOCKS_PER_CHUNK};

use super::model::*;
use super::rig::*;
use crate::store::api::{StoreError, StoreReply, StoreRequest};
use crate::store::{ScrubCursor, StoreLimits, StoreState};
use crate::testing::store::crash::brief;
use crate::testing::{Fault, Prng};

/// What was broken on purpose, by name: block of the volume and version.
type Broken = BTreeSet<(u64, u64)>;

struct Story {
    rig: Rig,
    model: Model,
    workload: Workload,
    broken: Broken,
    prng: Prng,
    /// How often each thing was done.
    done: [u64; 7],
}

impl Story {
    fn new(seed: u64) -> Story {
        let mut prng = Prng::new(seed);
        let limits = StoreLimits {
            overwrite_reserve_blocks: 32,
            run_blocks: prng.between(1, 40) as u32,
            checkpoint_log_pages: prng.between(2, 30),
            index_memory_max: prng.between(1, 50) as usize * 1024,
            zero_ahead: prng.chance(1, 4),
            ..StoreLimits::tiny()
        };
        let mut rig = Rig::on(prng.between(400, 900), prng.chance(3, 4), limits, seed);
        rig.create();
        Story {
            rig,
            model: Model {
                replica: Some((Epoch(1), 1)),
                ..Model::default()
            },
            workload: Workload::new(prng.between(32, 300) as u32, 24),
            broken: Broken::new(),
            prng,
            done: [0; 7],
        }
    }

    fn step(&mut self) {
        let what = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6][self.prng.below(16) as usize];
        self.done[what] += 1;
        match what {
            0 => self.request(),
            1 => self.open_anew(),
            2 => self.rot(),
            3 => self.fail_reads(),
            4 => self.fail_a_write(),
            5 => self.scrub(),
            _ => self.defragment(),
        }
        self.compare();
    }

    fn request(&mut self) {
        let request = self.workload.request(&mut self.prng, true);
        match self.rig.call(request.clone()) {
            StoreReply::Durable { .. } => self.model.apply(&request),
            StoreReply::Failed(StoreError::NoSpace) => {}
            StoreReply::Failed(StoreError::NoReplica) => assert_eq!(self.model.replica, None),
            other => panic!("{} was answered {other:?}", brief(&request)),
        }
    }

    /// Also while the last batch is not confirmed yet, and without the time to write a checkpoint.
    fn open_anew(&mut self) {
        let power_cut = self.prng.chance(1, 2);
        self.replace(|rig| rig.reopen(power_cut));
        self.rig.settle();
        assert_eq!(self.rig.store.state(), StoreState::Open);
    }

    fn replace(&mut self, with: impl FnOnce(Rig) -> Rig) {
        let rig = std::mem::replace(&mut self.rig, Rig::new(256, StoreLimits::tiny(), 0));
        self.rig = with(rig);
    }

    /// Flips a bit of some block of data. What holds it must be reported damaged, if it still matters.
    fn rot(&mut self) {
        // Damage to a batch that nothing confirms yet can't be told from a batch that was being written.
        self.rig.pass_time();
        let blocks = self.rig.device.geometry().blocks;
        let from = self.prng.below(blocks);
        let is_data = |block: &[u8; BLOCK_BYTES]| block[..16] != [0; 16] && block[16..] == block[..BLOCK_BYTES - 16];
        let found = (from..blocks).find(|at| is_data(self.rig.device.peek(DeviceBlock(*at))));
        let Some(at) = found.map(DeviceBlock) else { return };
        let content = self.rig.device.peek(at);
        let word = |at: usize| u64::from_le_bytes(content[at..at + 8].try_into().unwrap());
        self.broken.insert((word(0), word(8)));
        self.rig
            .device
            .rot(at, self.prng.below(BLOCK_BYTES as u64 * 8) as usize);
    }

    /// Reads fail while a range is read: it fails, or says which blocks can't be read; then all is as before.
    fn fail_reads(&mut self) {
        let (chunk, start) = (self.prng.below(2) as u32 * 3, self.prng.below(100) as u32);
        let ticket = self.rig.submit(read_request(chunk, start, 32));
        let chance = RefCell::new(self.prng.split());
        let fails = |op: &DiskOp| {
            let is_read = matches!(op, DiskOp::Read { .. });
            (is_read && chance.borrow_mut().chance(1, 2)).then(Fault::default)
        };
        while self.rig.step_with(fails) {}
        match self.rig.replies.remove(&ticket).expect("it was answered") {
            StoreReply::Read { blocks, .. } => {
                for (block, found) in (start..).zip(blocks) {
                    let held = self.model.blocks.get(&(chunk, 0, block)).copied();
                    let held = held.unwrap_or(cairn_proto::block::BlockState::ABSENT);
                    assert!(
                        found == held || (found.version == held.version && found.content == Content::Damaged),
                        "block {block} is {found:?}, not {held:?}"
                    );
                }
            }
            StoreReply::Failed(StoreError::Unreadable(_)) => {}
            StoreReply::Failed(StoreError::NoReplica) => assert_eq!(self.model.replica, None),
            other => panic!("{other:?}"),
        }
        assert_eq!(self.rig.store.state(), StoreState::Open);
    }

    /// A write or a flush fails: nothing is acknowledged any more, and after it is opened anew the request is done as a
    /// whole or not at all.
    fn fail_a_write(&mut self) {
        let request = self.workload.request(&mut self.prng, true);
        let ticket = self.rig.submit(request.clone());
        let chance = RefCell::new(self.prng.split());
        let fails = |op: &DiskOp| {
            let is_read = matches!(op, DiskOp::Read { .. });
            (!is_read && chance.borrow_mut().chance(1, 2)).then(Fault::default)
        };
        while self.rig.step_with(fails) {}
        let reply = self.rig.replies.remove(&ticket).expect("it was answered");
        let poisoned = matches!(self.rig.store.state(), StoreState::Poisoned(_));
        match reply {
            StoreReply::Durable { .. } => self.model.apply(&request),
            StoreReply::Failed(StoreError::NoSpace | StoreError::NoReplica) => {}
            StoreReply::Failed(StoreError::Poisoned(_)) => {
                let mut done = self.model.clone();
                done.apply(&request);
                self.open_anew();
                let found = Model::observe(&mut self.rig).unwrap_or_else(|words| panic!("{words}"));
                let broken = self.broken_and_known();
                if difference_but_for(&broken, &done, &found).is_none() {
                    self.model = done;
                }
                return;
            }
            other => panic!("{} was answered {other:?}", brief(&request)),
        }
        if poisoned {
            self.open_anew();
        }
    }

    /// The scrub finds damage, and nothing that is not damaged.
    fn scrub(&mut self) {
        let mut from = Some(ScrubCursor::START);
        while let Some(cursor) = from {
            let request = StoreRequest::Scrub {
                from: cursor,
                blocks_max: 200,
            };
            let StoreReply::Scrubbed {
                damaged,
                metadata,
                next,
                ..
            } = self.rig.call(request)
            else {
                panic!("the scrub failed")
            };
            assert!(metadata.is_empty(), "{metadata:?}");
            for found in damaged {
                let words = format!("{found:?}");
                assert!(!self.broken.is_empty(), "{words} is not damaged");
            }
            from = next;
        }
    }

    fn defragment(&mut self) {
        let mut from = Some(ScrubCursor::START);
        while let Some(cursor) = from {
            match self.rig.call(StoreRequest::Defragment { from: cursor }) {
                StoreReply::Defragmented { next, is_full, .. } => from = next.filter(|_| !is_full),
                other => panic!("{other:?}"),
            }
        }
    }

    /// What was broken on purpose, and what the store has failed to read: it lists that as damaged.
    fn broken_and_known(&self) -> Broken {
        let mut broken = self.broken.clone();
        for (_, layer, range) in self.rig.store.damage() {
            for i in 0..range.count() {
                let held = self.model.blocks.get(&(range.chunk().0, layer.0, range.start() + i));
                broken.extend(held.map(|held| (range.volume_block(i), held.version.to_bits())));
            }
        }
        broken
    }

    fn compare(&mut self) {
        let found = Model::observe(&mut self.rig).unwrap_or_else(|words| panic!("{words}"));
        let broken = self.broken_and_known();
        if let Some(words) = difference_but_for(&broken, &self.model, &found) {
            panic!("{words}");
        }
        self.rig.store.check_invariants();
        let replica = self.rig.store.replica_of(GROUP);
        assert_eq!(
            replica.map_or(0, |replica| replica.blocks_used),
            self.model.data_blocks(),
            "blocks of the replica"
        );
        assert_eq!(self.rig.store.space().data, self.model.data_blocks(), "blocks of data");
    }
}

/// Where the two differ otherwise than by the damage that was done.
fn difference_but_for(broken: &Broken, expected: &Model, found: &Model) -> Option<String> {
    let mut expected = expected.clone();
    while let Some(key) = expected.blocks.difference(&found.blocks) {
        let (chunk, layer, block) = key;
        let (held, now) = (expected.blocks.get(&key).copied(), found.blocks.get(&key).copied());
        let name = u64::from(chunk) * u64::from(BLOCKS_PER_CHUNK) + u64::from(block);
        match (held, now) {
            (Some(held), Some(now))
                if now.content == Content::Damaged
                    && now.version == held.version
                    && broken.contains(&(name, held.version.to_bits())) =>
            {
                expected.blocks.set(layer, range(chunk, block, 1), now);
            }
            _ => return Some(difference(&expected, found)),
        }
    }
    (expected != *found).then(|| difference(&expected, found))
}

#[test]
fn the_store_does_what_a_plain_map_does() {
    let mut done = [0; 7];
    for seed in 0..10 {
        let mut story = Story::new(seed);
        for _ in 0..60 {
            story.step();
        }
        (0..7).for_each(|i| done[i] += story.done[i]);
    }
    assert!(done.iter().all(|count| *count > 10), "{done:?}");
}
