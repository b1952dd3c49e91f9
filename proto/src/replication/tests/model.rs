//! A device that obeys the rules of a replica, in a map.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;

use crate::block::{Apply, BlockState, Content, Cursor, Run};
use crate::buffer::BlockBuf;
use crate::checksum::range_checksums;
use crate::ids::*;
use crate::limits::{BLOCK_BYTES, READ_GRANT_MS};
use crate::message::*;
use crate::time::Time;
use crate::units::BlockRange;

/// Runs in one page: small, so that paging is exercised.
const PAGE_RUNS: usize = 3;

#[derive(Clone)]
pub(super) struct Held {
    pub(super) state: BlockState,
    pub(super) bytes: Bytes,
}

pub(super) struct Device {
    pub(super) id: DeviceId,
    pub(super) alive: bool,
    pub(super) full: bool,
    /// A part of its index is lost: it can't say what it holds, and takes no copies.
    pub(super) unlisted: bool,
    pub(super) seal: Generation,
    pub(super) groups: Vec<GroupIndex>,
    pub(super) blocks: BTreeMap<(ChunkIndex, Layer, u32), Held>,
    pub(super) commit: u64,
    pub(super) recovered: u64,
    grant_until: Time,
}

pub(super) enum Answer {
    Now(Message, bool),
    At(Time, Message),
}

impl Device {
    pub(super) fn new(number: u8) -> Device {
        Device {
            id: DeviceId {
                uuid: DeviceUuid([number; 16]),
                incarnation: Incarnation(1),
            },
            alive: true,
            full: false,
            unlisted: false,
            seal: Generation::NONE,
            groups: Vec::new(),
            blocks: BTreeMap::new(),
            commit: 0,
            recovered: 0,
            grant_until: Time::ZERO,
        }
    }

    /// After a crash: everything durable is there, and no grant is known, so none is overridden.
    pub(super) fn restart(&mut self, now: Time) {
        self.alive = true;
        self.recovered = self.commit;
        self.grant_until = now + Duration::from_millis(READ_GRANT_MS);
    }

    pub(super) fn handle(&mut self, now: Time, message: &Message) -> Answer {
        let generation = match message {
            Message::Seal(seal) => seal.capability.generation,
            Message::Join(m) => m.holder.generation,
            Message::Confirm(m) => m.holder.generation,
            Message::Release(m) => m.holder.generation,
            Message::Write(m) => m.holder.generation,
            Message::Copy(m) => m.holder.generation,
            Message::CopyHole(m) => m.holder.generation,
            Message::Read(m) => m.holder.generation,
            Message::Collect(m) => m.holder.generation,
            other => panic!("a device is not asked {}", other.name()),
        };
        if generation < self.seal {
            return Answer::Now(Message::Failed(Failed::fenced(self.seal)), false);
        }
        if let Message::Seal(seal) = message {
            return self.seal(now, seal);
        }
        if generation > self.seal {
            let failed = Failed::new(FailureKind::NotSealed, "never sealed");
            return Answer::Now(Message::Failed(failed), false);
        }
        match self.act(message) {
            Ok(answer) => {
                let released = matches!(answer, Message::Released(_));
                self.grant_until = if released {
                    now
                } else {
                    now + Duration::from_millis(READ_GRANT_MS)
                };
                Answer::Now(answer, !released)
            }
            Err(kind) => Answer::Now(Message::Failed(Failed::new(kind, "refused")), false),
        }
    }

    fn seal(&mut self, now: Time, seal: &Seal) -> Answer {
        let (generation, volume) = (seal.capability.generation, seal.capability.volume);
        let answer = Message::Sealed(Sealed {
            holder: Holder { volume, generation },
        });
        if generation > self.seal {
            self.seal = generation;
            self.commit += 1;
            if self.grant_until > now {
                return Answer::At(self.grant_until, answer);
            }
        }
        Answer::Now(answer, false)
    }

    fn act(&mut self, message: &Message) -> Result<Message, FailureKind> {
        let durable = |commit| {
            Message::Durable(Durable {
                commit: CommitSeq(commit),
                ..Durable::default()
            })
        };
        match message {
            Message::Join(join) => {
                let created = !self.groups.contains(&join.group);
                if created {
                    self.groups.push(join.group);
                }
                Ok(Message::Joined(Joined {
                    holder: join.holder,
                    group: join.group,
                    created,
                    stable: Version::ZERO,
                }))
            }
            Message::Confirm(confirm) => Ok(Message::Confirmed(*confirm)),
            Message::Release(release) => Ok(Message::Released(*release)),
            Message::Write(write) => {
                self.write(write)?;
                Ok(durable(self.commit))
            }
            Message::Copy(_) | Message::CopyHole(_) | Message::Collect(_) if self.unlisted => {
                Err(FailureKind::Unreadable)
            }
            Message::Copy(copy) => {
                self.copy(copy)?;
                Ok(durable(self.commit))
            }
            Message::CopyHole(hole) => {
                self.copy_hole(hole);
                Ok(durable(self.commit))
            }
            Message::Read(read) => Ok(self.read(read)),
            Message::Collect(collect) => Ok(self.collect(collect)),
            _ => unreachable!("handled before"),
        }
    }

    fn has_room(&self, key: &(ChunkIndex, Layer, u32)) -> bool {
        let held = self.blocks.get(key).map(|held| held.state.content);
        !self.full || matches!(held, Some(Content::Data(_) | Content::Damaged))
    }

    fn put(&mut self, key: (ChunkIndex, Layer, u32), state: BlockState, bytes: Bytes, apply: Apply) {
        let held = self.blocks.get(&key).map_or(BlockState::ABSENT, |held| held.state);
        let heals = held.content == Content::Damaged && state.version == held.version;
        if apply.applies(held.version, state.version) || heals {
            self.blocks.insert(key, Held { state, bytes });
        }
        if state == BlockState::ABSENT && apply.applies(held.version, Version::ZERO) {
            // Never written: what an older attachment left behind is gone.
            self.blocks.remove(&key);
        }
    }

    fn write(&mut self, write: &Write) -> Result<(), FailureKind> {
        assert!(self.groups.contains(&write.group), "a write came before the join");
        let keys = (write.range.start()..write.range.end()).map(|block| (write.range.chunk(), write.layer, block));
        let keys: Vec<_> = keys.collect();
        if matches!(write.data, WriteData::Data { .. }) {
            let newer = |key| {
                self.blocks
                    .get(key)
                    .is_none_or(|held| held.state.version < write.version)
            };
            if keys.iter().any(|key| newer(key) && !self.has_room(key)) {
                return Err(FailureKind::NoSpace);
            }
        }
        for (i, key) in keys.into_iter().enumerate() {
            let (content, bytes) = match &write.data {
                WriteData::Data { bytes, checksums } => {
                    let bytes = bytes.slice(i * BLOCK_BYTES..(i + 1) * BLOCK_BYTES);
                    (Content::Data(checksums[i]), bytes)
                }
                WriteData::Zero => (Content::Zero, Bytes::new()),
                WriteData::Discard => (Content::Absent, Bytes::new()),
            };
            let version = write.version;
            self.put(key, BlockState { content, version }, bytes, Apply::IfNewer);
        }
        self.commit += 1;
        Ok(())
    }

    fn copy(&mut self, copy: &Copy) -> Result<(), FailureKind> {
        let keys = (copy.range.start()..copy.range.end()).map(|block| (copy.range.chunk(), copy.layer, block));
        let keys: Vec<_> = keys.collect();
        let wants_room = |(key, state): (&(ChunkIndex, Layer, u32), &BlockState)| {
            let newer = self
                .blocks
                .get(key)
                .is_none_or(|held| held.state.version < state.version);
            matches!(state.content, Content::Data(_)) && newer && !self.has_room(key)
        };
        if keys.iter().zip(&copy.blocks).any(wants_room) {
            return Err(FailureKind::NoSpace);
        }
        let mut data = 0;
        for (key, state) in keys.into_iter().zip(&copy.blocks) {
            let bytes = if let Content::Data(_) = state.content {
                data += BLOCK_BYTES;
                copy.bytes.slice(data - BLOCK_BYTES..data)
            } else {
                Bytes::new()
            };
            self.put(key, *state, bytes, copy.apply());
        }
        self.commit += 1;
        Ok(())
    }

    fn copy_hole(&mut self, hole: &CopyHole) {
        assert!(hole.state.content.is_hole());
        for block in hole.range.start()..hole.range.end() {
            let key = (hole.range.chunk(), hole.layer, block);
            self.put(key, hole.state, Bytes::new(), hole.apply());
        }
        self.commit += 1;
    }

    fn read(&self, read: &Read) -> Message {
        let (mut blocks, mut bytes) = (Vec::new(), Vec::new());
        for block in read.range.start()..read.range.end() {
            let held = self.blocks.get(&(read.range.chunk(), read.layer, block));
            blocks.push(held.map_or(BlockState::ABSENT, |held| held.state));
            bytes.extend(
                held.filter(|held| matches!(held.state.content, Content::Data(_)))
                    .map(|held| held.bytes.clone()),
            );
        }
        Message::ReadAnswer(ReadAnswer {
            commit: CommitSeq(self.commit),
            blocks,
            bytes,
            ..ReadAnswer::default()
        })
    }

    /// What of a group it can't read.
    pub(super) fn damage(&self, group: GroupIndex) -> Vec<(Layer, BlockRange)> {
        let groups = GroupCount::new(super::GROUPS).unwrap();
        let damaged = self
            .blocks
            .iter()
            .filter(|((chunk, ..), held)| held.state.content == Content::Damaged && groups.group_of(*chunk) == group);
        let run =
            |(chunk, layer, block): &(ChunkIndex, Layer, u32)| (*layer, BlockRange::new(*chunk, *block, 1).unwrap());
        damaged.map(|(key, _)| run(key)).collect()
    }

    fn collect(&self, collect: &Collect) -> Message {
        let groups = GroupCount::new(super::GROUPS).unwrap();
        let from = (collect.from.chunk, collect.from.layer, collect.from.block);
        let mut runs = Vec::new();
        let mut next = None;
        for ((chunk, layer, block), held) in self.blocks.range(from..) {
            if groups.group_of(*chunk) != collect.group || held.state.version <= collect.above {
                continue;
            }
            let last: Option<&mut Run> = runs.last_mut();
            if let Some(run) = last
                && run.state == held.state
                && held.state.content.is_hole()
                && (run.range.chunk(), run.layer, run.range.end()) == (*chunk, *layer, *block)
            {
                run.range = BlockRange::new(*chunk, run.range.start(), run.range.count() + 1).unwrap();
                continue;
            }
            if runs.len() == PAGE_RUNS {
                next = Some(Cursor {
                    chunk: *chunk,
                    layer: *layer,
                    block: *block,
                });
                break;
            }
            runs.push(Run {
                layer: *layer,
                range: BlockRange::new(*chunk, *block, 1).unwrap(),
                state: held.state,
            });
        }
        Message::Collected(Collected {
            commit: CommitSeq(self.commit),
            runs,
            next,
        })
    }
}

/// A block that says who wrote it.
pub(super) fn content(value: u64, blocks: u32) -> Bytes {
    let mut buffer = BlockBuf::zeroed(blocks as usize);
    for block in buffer.chunks_exact_mut(BLOCK_BYTES) {
        block[..8].copy_from_slice(&value.to_le_bytes());
        block[BLOCK_BYTES - 8..].copy_from_slice(&value.to_le_bytes());
    }
    buffer.freeze()
}

pub(super) fn write_of(volume: VolumeId, range: BlockRange, value: u64) -> crate::replication::Operation {
    let bytes = content(value, range.count());
    let checksums = range_checksums(volume, range, &bytes);
    crate::replication::Operation::Write {
        range,
        bytes,
        checksums,
    }
}
