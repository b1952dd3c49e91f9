//! A device in memory that loses power the way a disk with a volatile cache does.
//!
//! What the medium promises, and nothing more:
//! - operations complete in any order the caller chooses;
//! - a completed write is seen by every read that is submitted later;
//! - a write is durable once a flush that was submitted after the write's completion has completed;
//! - when power fails, each sector (512 bytes) of each write that is not durable is kept or lost on its own, whether the
//!   write had completed or not; where several such writes cover one sector, any of them may be the one that is kept.
//!   A sector itself is never torn.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::disk::{DeviceBlock, DiskDone, DiskError, DiskGeometry, DiskOp, DiskToken};
use cairn_proto::limits::{BLOCK_BYTES, SECTOR_BYTES};

use super::Prng;

const SECTORS_PER_BLOCK: usize = BLOCK_BYTES / SECTOR_BYTES;
const EIO: i32 = 5;

type Block = Arc<[u8; BLOCK_BYTES]>;

/// What goes wrong with an operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// It fails with an error number. A write that fails may have written any of its sectors.
    Error(i32),
    /// A write completes and writes nothing.
    LostWrite,
    /// A write completes and lands so many blocks further on (wrapped at the end of the device).
    MisdirectedBy(u64),
}

/// What becomes of the writes that are not durable when power fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cut {
    /// All of them are lost.
    AllLost,
    /// All of them are kept; of each block the last write.
    AllKept,
    /// Of the blocks at risk, in order of their places, those are kept (with their last write) whose bit is set; the
    /// others are as they were. Blocks beyond the 64th are lost.
    Blocks(u64),
    /// Each sector of each block is kept or lost on its own, by the generator; some blocks are whole.
    Torn,
}

/// Content of a block that has changed since it was last durable.
#[derive(Clone, Debug)]
struct Volatile {
    /// What reads see.
    seen: Block,
    /// Everything that was written to it since, oldest first: any sector of these may survive.
    writes: Vec<Block>,
}

/// A sparse device in memory. Cloning it is cheap: blocks are shared until they change.
#[derive(Clone, Debug)]
pub struct MemoryDevice {
    geometry: DiskGeometry,
    durable: BTreeMap<u64, Block>,
    volatile: BTreeMap<u64, Volatile>,
    in_flight: BTreeMap<DiskToken, InFlight>,
    completed_writes: u64,
    /// The last write of each block: its number, and what stood there before.
    last_writes: BTreeMap<u64, (u64, Block)>,
    writes: u64,
    /// Counts everything after which a power cut may leave something else.
    changes: u64,
    zero: Block,
}

#[derive(Clone, Debug)]
struct InFlight {
    op: DiskOp,
    /// For a flush: the blocks and how many of their writes had completed when it was submitted.
    covers: Vec<(u64, usize)>,
}

impl MemoryDevice {
    /// A device of zeroes.
    pub fn new(geometry: DiskGeometry) -> MemoryDevice {
        MemoryDevice {
            geometry,
            durable: BTreeMap::new(),
            volatile: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            completed_writes: 0,
            last_writes: BTreeMap::new(),
            writes: 0,
            changes: 0,
            zero: Arc::new([0; BLOCK_BYTES]),
        }
    }

    /// What a store must know of it.
    pub fn geometry(&self) -> DiskGeometry {
        self.geometry
    }

    /// Takes an operation. It has no effect that reads can see before it is completed. Panics on one that no driver
    /// would take: misaligned, empty, out of the device, or with a token that is in flight.
    pub fn submit(&mut self, op: DiskOp) {
        let token = op_token(&op);
        let covers = match &op {
            DiskOp::Read { at, blocks, .. } => {
                assert!(*blocks > 0, "a read of nothing at {at}");
                self.check_within(*at, u64::from(*blocks));
                Vec::new()
            }
            DiskOp::Write { at, buffers, .. } => {
                assert!(!buffers.is_empty(), "a write of nothing at {at}");
                for buffer in buffers {
                    assert!(cairn_proto::buffer::is_aligned(buffer), "a misaligned buffer for {at}");
                    assert!(!buffer.is_empty(), "an empty buffer for {at}");
                }
                self.check_within(*at, write_blocks(buffers));
                Vec::new()
            }
            DiskOp::Flush { .. } => self
                .volatile
                .iter()
                .map(|(at, block)| (*at, block.writes.len()))
                .collect(),
        };
        self.changes += u64::from(matches!(op, DiskOp::Write { .. }));
        let before = self.in_flight.insert(token, InFlight { op, covers });
        assert!(before.is_none(), "{token:?} is in flight already");
    }

    /// Operations that wait to be completed, in order of their tokens.
    pub fn in_flight(&self) -> impl Iterator<Item = &DiskOp> {
        self.in_flight.values().map(|entry| &entry.op)
    }

    /// Completes an operation in flight.
    pub fn complete(&mut self, token: DiskToken) -> DiskDone {
        let entry = self.take(token);
        let result = match entry.op {
            DiskOp::Read { at, blocks, .. } => self.read(at, blocks),
            DiskOp::Write {
                at, buffers, durable, ..
            } => {
                self.write(at, &buffers);
                if durable {
                    self.settle_range(at, write_blocks(&buffers));
                }
                Bytes::new()
            }
            DiskOp::Flush { .. } => {
                self.settle(&entry.covers);
                Bytes::new()
            }
        };
        DiskDone {
            token,
            result: Ok(result),
        }
    }

    /// Completes an operation in flight with something going wrong.
    pub fn complete_with(&mut self, token: DiskToken, fault: Fault, prng: &mut Prng) -> DiskDone {
        match (fault, &self.in_flight[&token].op) {
            (Fault::Error(errno), op) => {
                if let DiskOp::Write { at, buffers, .. } = op.clone() {
                    self.write_torn(at, &buffers, prng);
                }
                self.take(token);
                DiskDone {
                    token,
                    result: Err(DiskError { errno }),
                }
            }
            (Fault::LostWrite, DiskOp::Write { .. }) => {
                self.take(token);
                DiskDone {
                    token,
                    result: Ok(Bytes::new()),
                }
            }
            (Fault::MisdirectedBy(blocks), DiskOp::Write { at, buffers, .. }) => {
                let room = self.geometry.blocks - write_blocks(buffers) + 1;
                let (at, buffers) = (DeviceBlock((at.0 + blocks) % room), buffers.clone());
                self.take(token);
                self.write(at, &buffers);
                DiskDone {
                    token,
                    result: Ok(Bytes::new()),
                }
            }
            (fault, op) => panic!("{fault:?} can't happen to {op:?}"),
        }
    }

    /// Power fails and comes back: nothing is in flight, and of what was not durable each sector is kept or lost.
    /// Without a volatile cache, completed writes are durable and only those in flight are torn.
    pub fn power_cut(&mut self, prng: &mut Prng) {
        self.power_cut_as(Cut::Torn, prng);
    }

    /// Power fails and comes back; `cut` says what is left of the writes that were not durable.
    pub fn power_cut_as(&mut self, cut: Cut, prng: &mut Prng) {
        self.put_at_risk();
        for (i, (at, block)) in std::mem::take(&mut self.volatile).into_iter().enumerate() {
            let kept = match cut {
                Cut::AllLost => false,
                Cut::Blocks(kept) => i < 64 && kept >> i & 1 == 1,
                Cut::AllKept => true,
                Cut::Torn => {
                    let content = self.torn(at, &block, prng);
                    self.put_durable(at, content);
                    continue;
                }
            };
            if kept {
                self.put_durable(at, block.seen);
            }
        }
        self.changes += 1;
    }

    /// Blocks with writes that a power cut now could lose.
    pub fn blocks_at_risk(&self) -> usize {
        let mut device = self.clone();
        device.put_at_risk();
        device.volatile.len()
    }

    /// Counts up with everything after which a power cut may leave something else than before.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Power is about to fail: what is in flight is as uncertain as what is in the cache.
    fn put_at_risk(&mut self) {
        if !self.geometry.volatile_cache {
            self.make_all_durable();
        }
        for entry in std::mem::take(&mut self.in_flight).into_values() {
            if let DiskOp::Write { at, buffers, .. } = entry.op {
                self.write(at, &buffers);
            }
        }
    }

    /// A block of whose writes each sector was kept or lost on its own.
    fn torn(&self, at: u64, block: &Volatile, prng: &mut Prng) -> Block {
        let mut content = **self.durable.get(&at).unwrap_or(&self.zero);
        let writes = block.writes.len() as u64;
        // Most blocks of a torn write are whole: tearing every one would make some states too rare.
        let whole = prng.chance(1, 2).then(|| prng.below(writes + 1));
        for sector in 0..SECTORS_PER_BLOCK {
            let choice = whole.unwrap_or_else(|| prng.below(writes + 1)) as usize;
            if let Some(write) = choice.checked_sub(1).map(|i| &block.writes[i]) {
                let bytes = sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES;
                content[bytes.clone()].copy_from_slice(&write[bytes]);
            }
        }
        Arc::new(content)
    }

    /// Operations in flight are forgotten without effect, as when the process that asked for them was killed: what had
    /// completed stays as it is. Writes in flight happen or not, whole, by the generator.
    pub fn process_killed(&mut self, prng: &mut Prng) {
        for entry in std::mem::take(&mut self.in_flight).into_values() {
            if let DiskOp::Write { at, buffers, .. } = entry.op
                && prng.chance(1, 2)
            {
                self.write(at, &buffers);
            }
        }
    }

    /// Flips one bit of what is stored, in cache and on the medium.
    pub fn rot(&mut self, at: DeviceBlock, bit: usize) {
        let flip = |block: &Block| {
            let mut content = **block;
            content[bit / 8 % BLOCK_BYTES] ^= 1 << (bit % 8);
            Arc::new(content)
        };
        if let Some(block) = self.volatile.get_mut(&at.0) {
            block.seen = flip(&block.seen);
            block.writes.iter_mut().for_each(|write| *write = flip(write));
        }
        let rotten = flip(self.durable.get(&at.0).unwrap_or(&self.zero));
        self.durable.insert(at.0, rotten);
    }

    /// Every block becomes zero and durable, as on a device that was wiped.
    pub fn wipe(&mut self) {
        self.durable.clear();
        self.volatile.clear();
        self.in_flight.clear();
    }

    /// What a read of one block would see now.
    pub fn peek(&self, at: DeviceBlock) -> &[u8; BLOCK_BYTES] {
        self.seen(at.0)
    }

    /// Puts content onto the medium, durable at once: for tests that begin with a damaged or foreign device.
    pub fn poke(&mut self, at: DeviceBlock, content: &[u8; BLOCK_BYTES]) {
        self.check_within(at, 1);
        self.volatile.remove(&at.0);
        self.put_durable(at.0, Arc::new(*content));
    }

    /// The number of the last write to a block, and what stood there before: what a device that had lost the write would
    /// still have. `None` if it was never written.
    pub fn last_write(&self, at: DeviceBlock) -> Option<(u64, &[u8; BLOCK_BYTES])> {
        self.last_writes.get(&at.0).map(|(number, before)| (*number, &**before))
    }

    /// Blocks of writes completed so far.
    pub fn blocks_written(&self) -> u64 {
        self.completed_writes
    }

    fn check_within(&self, at: DeviceBlock, blocks: u64) {
        let end = at.0.checked_add(blocks).expect("an operation beyond all devices");
        assert!(
            end <= self.geometry.blocks,
            "{blocks} blocks {at} of a device of {}",
            self.geometry.blocks
        );
    }

    fn take(&mut self, token: DiskToken) -> InFlight {
        self.in_flight
            .remove(&token)
            .unwrap_or_else(|| panic!("{token:?} is not in flight"))
    }

    fn seen(&self, at: u64) -> &Block {
        match self.volatile.get(&at) {
            Some(block) => &block.seen,
            None => self.durable.get(&at).unwrap_or(&self.zero),
        }
    }

    fn read(&self, at: DeviceBlock, blocks: u32) -> Bytes {
        let mut buf = BlockBuf::zeroed(blocks as usize);
        for (content, at) in buf.chunks_exact_mut(BLOCK_BYTES).zip(at.0..) {
            content.copy_from_slice(&self.seen(at)[..]);
        }
        buf.freeze()
    }

    fn write(&mut self, at: DeviceBlock, buffers: &[Bytes]) {
        self.changes += 1;
        self.writes += 1;
        let blocks = buffers.iter().flat_map(|buffer| buffer.chunks_exact(BLOCK_BYTES));
        for (content, at) in blocks.zip(at.0..) {
            let content: Block = Arc::new(content.try_into().expect("a whole block"));
            self.completed_writes += 1;
            let before = self.seen(at).clone();
            self.last_writes.insert(at, (self.writes, before));
            self.write_block(at, content);
        }
    }

    fn write_block(&mut self, at: u64, content: Block) {
        let block = self.volatile.entry(at).or_insert_with(|| Volatile {
            seen: content.clone(),
            writes: Vec::new(),
        });
        block.seen = content.clone();
        block.writes.push(content);
    }

    /// A write that failed: any of its sectors may have been written.
    fn write_torn(&mut self, at: DeviceBlock, buffers: &[Bytes], prng: &mut Prng) {
        self.changes += 1;
        let blocks = buffers.iter().flat_map(|buffer| buffer.chunks_exact(BLOCK_BYTES));
        for (new, at) in blocks.zip(at.0..) {
            let mut content = **self.seen(at);
            for (old, new) in content
                .chunks_exact_mut(SECTOR_BYTES)
                .zip(new.chunks_exact(SECTOR_BYTES))
            {
                if prng.chance(1, 2) {
                    old.copy_from_slice(new);
                }
            }
            self.write_block(at, Arc::new(content));
        }
    }

    /// A flush has completed: of the covered blocks the last covered write is durable, and what came later is not yet.
    fn settle(&mut self, covers: &[(u64, usize)]) {
        self.changes += u64::from(!covers.is_empty());
        for &(at, count) in covers {
            // Another flush may have settled some of them meanwhile: the counts are from the block's first write on.
            let Some(block) = self.volatile.get_mut(&at) else {
                continue;
            };
            let settled = count.min(block.writes.len());
            if settled == 0 {
                continue;
            }
            let durable = block.writes[settled - 1].clone();
            block.writes.drain(..settled);
            if block.writes.is_empty() {
                self.volatile.remove(&at);
            }
            self.put_durable(at, durable);
            for other in self.in_flight.values_mut() {
                for (_, count) in other.covers.iter_mut().filter(|(other, _)| *other == at) {
                    *count = count.saturating_sub(settled);
                }
            }
        }
    }

    /// What these blocks have is durable; nothing is said of others.
    fn settle_range(&mut self, at: DeviceBlock, blocks: u64) {
        let blocks = self.volatile.range(at.0..at.0 + blocks);
        let covers: Vec<(u64, usize)> = blocks.map(|(at, block)| (*at, block.writes.len())).collect();
        self.settle(&covers);
    }

    fn make_all_durable(&mut self) {
        for (at, block) in std::mem::take(&mut self.volatile) {
            self.put_durable(at, block.seen);
        }
    }

    fn put_durable(&mut self, at: u64, content: Block) {
        if content == self.zero {
            self.durable.remove(&at);
        } else {
            self.durable.insert(at, content);
        }
    }
}

fn op_token(op: &DiskOp) -> DiskToken {
    match op {
        DiskOp::Read { token, .. } | DiskOp::Write { token, .. } | DiskOp::Flush { token } => *token,
    }
}

fn write_blocks(buffers: &[Bytes]) -> u64 {
    buffers.iter().map(|buffer| (buffer.len() / BLOCK_BYTES) as u64).sum()
}

/// The error that [`Fault::Error`] stands for where nothing better is known.
impl Default for Fault {
    fn default() -> Fault {
        Fault::Error(EIO)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(volatile_cache: bool) -> MemoryDevice {
        MemoryDevice::new(DiskGeometry {
            blocks: 16,
            volatile_cache,
        })
    }

    fn write(device: &mut MemoryDevice, token: u64, at: u64, byte: u8) {
        let buffers = vec![BlockBuf::copied_from(&[byte; BLOCK_BYTES]).freeze()];
        device.submit(DiskOp::Write {
            token: DiskToken(token),
            at: DeviceBlock(at),
            buffers,
            durable: false,
        });
    }

    fn flush(device: &mut MemoryDevice, token: u64) {
        device.submit(DiskOp::Flush {
            token: DiskToken(token),
        });
    }

    /// The bytes that a block may begin its sectors with after any of many power cuts.
    fn after_cuts(device: &MemoryDevice, at: u64) -> Vec<u8> {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..64 {
            let mut device = device.clone();
            device.power_cut(&mut Prng::new(seed));
            seen.extend(device.peek(DeviceBlock(at)).iter().step_by(SECTOR_BYTES).copied());
        }
        seen.into_iter().collect()
    }

    #[test]
    fn a_write_is_seen_when_it_completes_and_kept_when_a_later_flush_completes() {
        let mut device = device(true);
        write(&mut device, 1, 3, 7);
        assert_eq!(device.peek(DeviceBlock(3))[0], 0);
        device.complete(DiskToken(1)).result.unwrap();
        assert_eq!(device.peek(DeviceBlock(3))[0], 7);
        assert_eq!(after_cuts(&device, 3), [0, 7]);
        flush(&mut device, 2);
        assert_eq!(after_cuts(&device, 3), [0, 7]);
        device.complete(DiskToken(2)).result.unwrap();
        assert_eq!(after_cuts(&device, 3), [7]);
    }

    #[test]
    fn a_flush_covers_only_what_had_completed_when_it_was_submitted() {
        let mut device = device(true);
        write(&mut device, 1, 3, 7);
        flush(&mut device, 2);
        device.complete(DiskToken(1)).result.unwrap();
        device.complete(DiskToken(2)).result.unwrap();
        assert_eq!(after_cuts(&device, 3), [0, 7]);
    }

    #[test]
    fn two_flushes_in_flight_settle_each_write_once() {
        let mut device = device(true);
        write(&mut device, 1, 3, 7);
        device.complete(DiskToken(1)).result.unwrap();
        flush(&mut device, 2);
        write(&mut device, 3, 3, 8);
        device.complete(DiskToken(3)).result.unwrap();
        flush(&mut device, 4);
        write(&mut device, 5, 3, 9);
        device.complete(DiskToken(5)).result.unwrap();
        device.complete(DiskToken(2)).result.unwrap();
        assert_eq!(after_cuts(&device, 3), [7, 8, 9]);
        device.complete(DiskToken(4)).result.unwrap();
        assert_eq!(after_cuts(&device, 3), [8, 9]);
    }

    #[test]
    fn without_a_volatile_cache_completed_writes_are_kept() {
        let mut device = device(false);
        write(&mut device, 1, 3, 7);
        device.complete(DiskToken(1)).result.unwrap();
        write(&mut device, 2, 3, 8);
        assert_eq!(after_cuts(&device, 3), [7, 8]);
    }

    #[test]
    fn a_power_cut_keeps_what_it_was_told_to_keep() {
        let mut device = device(true);
        write(&mut device, 1, 3, 7);
        write(&mut device, 2, 4, 8);
        device.complete(DiskToken(1)).result.unwrap();
        assert_eq!(device.blocks_at_risk(), 2);
        let left = |cut| {
            let mut device = device.clone();
            device.power_cut_as(cut, &mut Prng::new(1));
            assert_eq!(device.blocks_at_risk(), 0);
            [3, 4].map(|at| device.peek(DeviceBlock(at))[0])
        };
        assert_eq!(left(Cut::AllLost), [0, 0]);
        assert_eq!(left(Cut::AllKept), [7, 8]);
        assert_eq!(left(Cut::Blocks(0b01)), [7, 0]);
        assert_eq!(left(Cut::Blocks(0b10)), [0, 8]);
    }

    #[test]
    fn faults_do_what_they_say() {
        let mut device = device(true);
        let prng = &mut Prng::new(1);
        write(&mut device, 1, 3, 7);
        device
            .complete_with(DiskToken(1), Fault::LostWrite, prng)
            .result
            .unwrap();
        assert_eq!(device.peek(DeviceBlock(3))[0], 0);
        write(&mut device, 2, 3, 7);
        device
            .complete_with(DiskToken(2), Fault::MisdirectedBy(2), prng)
            .result
            .unwrap();
        assert_eq!(device.peek(DeviceBlock(5))[0], 7);
        write(&mut device, 3, 3, 7);
        let error = device
            .complete_with(DiskToken(3), Fault::default(), prng)
            .result
            .unwrap_err();
        assert_eq!(error.errno, EIO);
        device.rot(DeviceBlock(5), 0);
        assert_eq!(device.peek(DeviceBlock(5))[0], 6);
        write(&mut device, 4, 5, 9);
        device.complete(DiskToken(4)).result.unwrap();
        let (number, before) = device.last_write(DeviceBlock(5)).unwrap();
        assert_eq!((number, before[0]), (2, 6), "two writes landed, both there");
        assert!(device.last_write(DeviceBlock(4)).is_none());
    }
}
