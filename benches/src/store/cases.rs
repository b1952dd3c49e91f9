//! The cases of one round, on a store and a raw file that are fresh and written in full.

use std::path::Path;
use std::time::{Duration, Instant};

use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::units::ByteSize;
use cairn_storage_node::driver::{BareDevice, DeviceFile, DevicePath};
use cairn_storage_node::store::limits::PAGE_ENTRIES;
use cairn_storage_node::store::{ScrubCursor, StoreLimits, StoreReply, StoreRequest};

use super::driven::{Driven, format_params};
use super::raw::{Durability, Raw};
use super::report::{Fact, Outcome, Sample};
use super::work::{self, Load, Stop};

/// Operations of 1 MiB in flight in the sequential cases.
const SEQUENTIAL_DEPTH: usize = 8;
/// Depths of the random cases.
const DEPTHS: [usize; 3] = [1, 16, 64];
/// How full the device is made for the case that says so.
const FULL_PERCENT: u64 = 90;
/// How full it is when data is moved together for the last time.
const MOVED_PERCENT: u64 = 80;
/// How many times smaller than the index its memory is in the case that says so.
const SMALL_INDEX: u64 = 10;

/// What a case is compared with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// The store. A write is durable when answered.
    Store,
    /// The device, a write is not durable when answered.
    Raw,
    /// The device, each batch (all writes in flight) flushed before it is answered.
    RawFlush,
}

impl Side {
    /// As it stands in the table.
    pub fn name(self) -> &'static str {
        match self {
            Side::Store => "store",
            Side::Raw => "raw",
            Side::RawFlush => "raw-flush",
        }
    }
}

const WRITES: [Side; 3] = [Side::Store, Side::RawFlush, Side::Raw];
const READS: [Side; 2] = [Side::Store, Side::Raw];

/// What does not change between rounds.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Where the files lie.
    pub dir: std::path::PathBuf,
    /// Bytes of each device.
    pub size: ByteSize,
    /// Time of each case.
    pub runtime: Duration,
    /// Only cases whose name contains one of these; all when empty.
    pub only: Vec<String>,
}

/// One round: both devices and what was found.
pub struct Round<'a> {
    setup: &'a Setup,
    number: u32,
    raw: BareDevice,
    store: Option<Driven<BareDevice>>,
    out: &'a mut Outcome,
    seed: u64,
}

impl Setup {
    fn wants(&self, case: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| case.contains(part.as_str()))
    }

    fn blocks(&self) -> u64 {
        self.size.0 / BLOCK_BYTES as u64
    }

    /// Blocks that most cases are spread over: half of the device.
    fn span(&self) -> u64 {
        self.blocks() / 2
    }
}

/// Runs one round.
///
/// # Errors
/// A device can't be made, or an operation failed, in words.
pub fn round(setup: &Setup, number: u32, out: &mut Outcome) -> Result<(), String> {
    let files = tempfile::Builder::new()
        .prefix("store-bench-")
        .tempdir_in(&setup.dir)
        .map_err(|error| format!("{}: {error}", setup.dir.display()))?;
    // Each round begins with another file, so that neither always has the better place on the disk.
    let mut devices = Vec::new();
    let names = if number.is_multiple_of(2) {
        ["store", "raw"]
    } else {
        ["raw", "store"]
    };
    for name in names {
        devices.push(prepare(&files.path().join(name), setup.size)?);
    }
    if names[0] == "raw" {
        devices.swap(0, 1);
    }
    let raw = devices.pop().expect("two were made");
    let mut disk = devices.pop().expect("two were made");
    disk.format(format_params()).map_err(|error| error.to_string())?;
    let store = disk.open(StoreLimits::default()).map_err(|error| error.to_string())?;
    let mut driven = Driven::new(disk, store);
    driven.create_replica()?;
    let mut round = Round {
        setup,
        number,
        raw,
        store: Some(driven),
        out,
        seed: u64::from(number) << 32,
    };
    round.sequential()?;
    round.random()?;
    round.rewritten()?;
    round.recovery()?;
    round.small_index()?;
    round.rewritten_full()?;
    round.full()
}

/// A file that was written in full.
pub(super) fn prepare(path: &Path, size: ByteSize) -> Result<BareDevice, String> {
    let place = DevicePath {
        path: path.to_path_buf(),
        create_size: Some(size),
        volatile_cache: None,
    };
    let words = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let file = DeviceFile::open(&place).map_err(|error| words(&error))?;
    let mut device = BareDevice::new(file).map_err(|error| words(&error))?;
    let load = Load {
        write: true,
        random: false,
        blocks: 256,
        depth: SEQUENTIAL_DEPTH,
        span: device.geometry().blocks,
        stop: Stop::Once,
    };
    let mut raw = Raw::new(&mut device, 0, Durability::FlushPerBatch);
    work::run(&mut raw, &load, 0).map_err(|error| words(&error))?;
    Ok(device)
}

impl Round<'_> {
    fn load(&self, write: bool, random: bool, blocks: u32, depth: usize) -> Load {
        Load {
            write,
            random,
            blocks,
            depth,
            span: self.setup.span(),
            stop: Stop::After(self.setup.runtime),
        }
    }

    fn store(&mut self) -> &mut Driven<BareDevice> {
        self.store.as_mut().expect("the store is open between cases")
    }

    /// Runs a case on each side in turn.
    fn compare(&mut self, case: &'static str, sides: &[Side], load: &Load) -> Result<(), String> {
        if !self.setup.wants(case) {
            return Ok(());
        }
        let first = self.number as usize % sides.len();
        for side in sides[first..].iter().chain(&sides[..first]) {
            self.measure(case, *side, load)?;
        }
        Ok(())
    }

    fn measure(&mut self, case: &'static str, side: Side, load: &Load) -> Result<(), String> {
        self.seed += 1;
        let seed = self.seed;
        let figures = match side {
            Side::Store => work::run(self.store(), load, seed),
            Side::Raw => work::run(&mut Raw::new(&mut self.raw, 0, Durability::None), load, seed),
            Side::RawFlush => work::run(&mut Raw::new(&mut self.raw, 0, Durability::FlushPerBatch), load, seed),
        };
        let sample = Sample {
            case,
            side,
            round: self.number,
            figures: figures.map_err(|error| format!("{case} on {}: {error}", side.name()))?,
        };
        eprintln!("round {}: {}", self.number, super::report::line(&sample));
        self.out.samples.push(sample);
        Ok(())
    }

    fn fact(&mut self, name: &'static str, value: f64) {
        let round = self.number;
        eprintln!("round {round}: {name} {value:.2}");
        self.out.facts.push(Fact { name, round, value });
    }

    /// The first writes of the span, which every later case needs, then reads.
    fn sequential(&mut self) -> Result<(), String> {
        let fill = Load {
            stop: Stop::Once,
            ..self.load(true, false, 256, SEQUENTIAL_DEPTH)
        };
        if self.setup.wants("seqwrite-1m") {
            self.compare("seqwrite-1m", &WRITES, &fill)?;
        } else {
            work::run(self.store(), &fill, 0)?;
        }
        let read = self.load(false, false, 256, SEQUENTIAL_DEPTH);
        self.compare("seqread-1m", &READS, &read)
    }

    fn random(&mut self) -> Result<(), String> {
        let names = [
            ("randread-4k-qd1", "randwrite-4k-qd1"),
            ("randread-4k-qd16", "randwrite-4k-qd16"),
            ("randread-4k-qd64", "randwrite-4k-qd64"),
        ];
        for (depth, (read, _)) in DEPTHS.into_iter().zip(names) {
            self.compare(read, &READS, &self.load(false, true, 1, depth))?;
        }
        for (depth, (_, write)) in DEPTHS.into_iter().zip(names) {
            self.compare(write, &WRITES, &self.load(true, true, 1, depth))?;
        }
        Ok(())
    }

    /// Sequential reads of what was written at random.
    fn rewritten(&mut self) -> Result<(), String> {
        if !self.setup.wants("rewritten") {
            return Ok(());
        }
        let rewrite = Load {
            stop: Stop::Once,
            ..self.load(true, true, 1, 64)
        };
        self.measure("rewritten-randwrite-qd64", Side::Store, &rewrite)?;
        let read = self.load(false, false, 256, SEQUENTIAL_DEPTH);
        self.compare("rewritten-seqread-1m", &READS, &read)?;
        self.move_all("half")?;
        self.compare("rewritten-moved-seqread-1m", &READS, &read)
    }

    /// The same on a device that is 80 % full.
    fn rewritten_full(&mut self) -> Result<(), String> {
        if !self.setup.wants("rewritten80") {
            return Ok(());
        }
        let capacity = self.store().store.space().capacity;
        let span = capacity * MOVED_PERCENT / 100 / 256 * 256;
        let fill = Load {
            span,
            stop: Stop::Once,
            ..self.load(true, false, 256, 4)
        };
        work::run(self.store(), &fill, 0).map_err(|error| format!("filling the device: {error}"))?;
        let rewrite = Load {
            span,
            stop: Stop::Operations(2 * span),
            ..self.load(true, true, 1, 64)
        };
        self.measure("rewritten80-randwrite-qd64", Side::Store, &rewrite)?;
        let read = Load {
            span,
            ..self.load(false, false, 256, SEQUENTIAL_DEPTH)
        };
        self.compare("rewritten80-seqread-1m", &READS, &read)?;
        self.move_all("80")?;
        self.compare("rewritten80-moved-seqread-1m", &READS, &read)
    }

    /// Moves everything that is fragmented, as fast as it goes.
    fn move_all(&mut self, full: &str) -> Result<(), String> {
        let begun = Instant::now();
        let (mut blocks, mut is_full) = (0, false);
        let evacuated = self.store().store.counters().blocks_evacuated;
        let mut from = ScrubCursor::START;
        loop {
            let reply = self.store().alone(StoreRequest::Defragment { from })?;
            let StoreReply::Defragmented {
                moved,
                is_full: short,
                next,
                ..
            } = reply
            else {
                return Err(format!("moving was answered by {reply:?}"));
            };
            blocks += u64::from(moved);
            is_full |= short;
            match next {
                Some(next) => from = next,
                None => break,
            }
        }
        let seconds = begun.elapsed().as_secs_f64();
        if is_full {
            eprintln!(
                "round {}: there was too little free space to move everything",
                self.number
            );
        }
        let evacuated = self.store().store.counters().blocks_evacuated - evacuated;
        let names = match full {
            "80" => ["moved80-blocks", "moved80-blocks-for-room", "move80-mib-per-s"],
            _ => ["moved-blocks", "moved-blocks-for-room", "move-mib-per-s"],
        };
        self.fact(names[0], blocks as f64);
        self.fact(names[1], evacuated as f64);
        self.fact(
            names[2],
            (blocks * BLOCK_BYTES as u64) as f64 / seconds / f64::from(1 << 20),
        );
        Ok(())
    }

    /// How long it takes to open after a kill when the log is as long as it gets.
    fn recovery(&mut self) -> Result<(), String> {
        if !self.setup.wants("recovery") {
            return Ok(());
        }
        let limits = StoreLimits::default();
        let single = self.load(true, true, 1, 1);
        let driven = self.store.as_mut().expect("the store is open");
        let begun = Instant::now();
        let mut last = driven.store.counters();
        let mut pages = 0;
        // At depth 1 each write is a batch of its own.
        while pages < limits.checkpoint_log_pages * 9 / 10 && begun.elapsed() < self.setup.runtime * 4 {
            let burst = Load {
                stop: Stop::Operations(64),
                ..single
            };
            self.seed += 1;
            work::run(driven, &burst, self.seed)?;
            let now = driven.store.counters();
            pages = if now.checkpoints == last.checkpoints {
                now.record_pages - last.record_pages
            } else {
                last = now;
                0
            };
        }
        let store = self.reopen(limits)?;
        let replayed = store.store.counters().replayed;
        self.store = Some(store);
        self.fact("recovery-replayed-batches", replayed as f64);
        Ok(())
    }

    /// Kills the store and opens it again; notes how long that takes.
    fn reopen(&mut self, limits: StoreLimits) -> Result<Driven<BareDevice>, String> {
        let driven = self.store.take().expect("the store is open");
        let mut disk = driven.kill()?;
        let begun = Instant::now();
        let store = disk.open(limits).map_err(|error| error.to_string())?;
        self.fact("recovery-ms", begun.elapsed().as_secs_f64() * 1e3);
        let mut again = Driven::new(disk, store);
        again.go_on();
        Ok(again)
    }

    /// The index is ten times larger than its memory.
    fn small_index(&mut self) -> Result<(), String> {
        if !self.setup.wants("index") {
            return Ok(());
        }
        let pages = self.setup.span() / u64::from(PAGE_ENTRIES);
        let limits = StoreLimits {
            // An index page in memory takes 4 KiB and a bit.
            index_memory_max: (pages / SMALL_INDEX).max(8) as usize * 4400,
            checkpoint_dirty_pages: (pages / SMALL_INDEX / 2).max(4) as usize,
            ..StoreLimits::default()
        };
        let store = self.reopen(limits)?;
        self.store = Some(store);
        self.compare("small-index-randread-4k-qd1", &READS, &self.load(false, true, 1, 1))?;
        self.compare("small-index-randread-4k-qd64", &READS, &self.load(false, true, 1, 64))?;
        self.compare("small-index-randwrite-4k-qd64", &WRITES, &self.load(true, true, 1, 64))?;
        let resident = self.store().store.counters().index_pages_resident;
        self.fact("small-index-resident-pages", resident as f64);
        let store = self.reopen(StoreLimits::default())?;
        self.store = Some(store);
        Ok(())
    }

    /// Overwrites of a device that is 90 % full, once all of it was overwritten.
    fn full(&mut self) -> Result<(), String> {
        let case = "full90-randwrite-4k-qd64";
        if !self.setup.wants(case) {
            return Ok(());
        }
        let capacity = self.store().store.space().capacity;
        let span = capacity * FULL_PERCENT / 100 / 256 * 256;
        let fill = Load {
            span,
            stop: Stop::Once,
            ..self.load(true, false, 256, 4)
        };
        work::run(self.store(), &fill, 0).map_err(|error| format!("filling the device: {error}"))?;
        let steady = Load {
            random: true,
            blocks: 1,
            depth: 64,
            stop: Stop::Operations(span),
            ..fill
        };
        self.measure("full90-first-overwrite-qd64", Side::Store, &steady)?;
        let load = Load {
            stop: Stop::After(self.setup.runtime),
            ..steady
        };
        self.compare(case, &WRITES, &load)
    }
}
