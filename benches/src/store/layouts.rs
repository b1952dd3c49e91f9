//! Ways to commit a batch, on the device itself: where the record lies beside the data, and how both are flushed.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use cairn_proto::disk::{DeviceBlock, DiskOp, DiskToken};
use cairn_proto::units::ByteSize;
use cairn_storage_node::driver::BareDevice;
use cairn_storage_node::testing::Prng;

use super::cases::prepare;
use super::content::Content;
use super::disk::Disk;
use super::stats::{Latencies, Spread};

/// Blocks of data in one batch.
const BATCHES: [u32; 2] = [1, 64];
/// How long one way is measured before it is the next one's turn.
const SLICE: Duration = Duration::from_millis(20);
const PATIENCE: Duration = Duration::from_secs(30);

/// Where the record goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Layout {
    /// One write of record and data.
    Contiguous,
    /// Two writes at once, of record and data.
    Parallel,
    /// A write for each block of data, all at once with that of the record.
    Scattered,
}

/// How it becomes durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Flush {
    /// A flush in the ring when all is written.
    Ring,
    /// `fdatasync` by the thread itself: nothing else is served meanwhile.
    Inline,
    /// `fdatasync` by another thread, which is waited for without the ring.
    Thread,
    /// Every write of the batch is durable when it ends (`RWF_DSYNC`).
    Durable,
}

const WAYS: [(Layout, Flush, &str); 8] = [
    (Layout::Contiguous, Flush::Ring, "contiguous, flush in the ring"),
    (Layout::Contiguous, Flush::Inline, "contiguous, flush inline"),
    (Layout::Contiguous, Flush::Thread, "contiguous, flush by a thread"),
    (Layout::Contiguous, Flush::Durable, "contiguous, durable write"),
    (Layout::Parallel, Flush::Ring, "parallel, flush in the ring"),
    (Layout::Parallel, Flush::Inline, "parallel, flush inline"),
    (Layout::Parallel, Flush::Durable, "parallel, durable writes"),
    (Layout::Scattered, Flush::Ring, "scattered, flush in the ring"),
];

/// Measures all of them in turn, and prints a table.
///
/// # Errors
/// The device failed, in words.
pub fn run(rounds: u32, runtime: Duration, size: ByteSize, dir: Option<&Path>) -> Result<(), String> {
    let dir = super::bench_dir(dir)?;
    let mut found = vec![Vec::<Figures>::new(); WAYS.len() * BATCHES.len()];
    for round in 0..rounds as usize {
        let files = tempfile::Builder::new().prefix("layouts-").tempdir_in(&dir);
        let files = files.map_err(|error| format!("{}: {error}", dir.display()))?;
        let device = prepare(&files.path().join("device"), size)?;
        let mut bench = Bench::new(device)?;
        for (batch, blocks) in BATCHES.into_iter().enumerate() {
            let figures = bench.round(blocks, round, runtime)?;
            for (way, figures) in figures.into_iter().enumerate() {
                found[batch * WAYS.len() + way].push(figures);
            }
        }
        eprintln!("round {} of {rounds} done", round + 1);
    }
    println!("Microseconds per batch, record page included; of the rounds: median (lowest–highest).");
    for (batch, blocks) in BATCHES.into_iter().enumerate() {
        println!(
            "\n{:<34} {:<20} {:<20}",
            format!("{blocks} blocks of data"),
            "half are quicker",
            "mean"
        );
        for (way, (_, _, name)) in WAYS.into_iter().enumerate() {
            let of = |figure: fn(&Figures) -> f64| {
                let spread = Spread::of(found[batch * WAYS.len() + way].iter().map(figure));
                format!("{:.0} ({:.0}–{:.0})", spread.median, spread.lowest, spread.highest)
            };
            println!("  {name:<32} {:<20} {:<20}", of(|f| f.p50_us), of(|f| f.mean_us));
        }
    }
    Ok(())
}

/// Of one way in one round.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
struct Figures {
    p50_us: f64,
    mean_us: f64,
}

struct Bench {
    device: BareDevice,
    descriptor: OwnedFd,
    content: Content,
    prng: Prng,
    ask: SyncSender<()>,
    answer: Receiver<std::io::Result<()>>,
}

impl Bench {
    fn new(device: BareDevice) -> Result<Bench, String> {
        let clone = || device.descriptor().map_err(|error| error.to_string());
        let (descriptor, theirs) = (clone()?, clone()?);
        let (ask, asked) = sync_channel(1);
        let (done, answer) = sync_channel(1);
        std::thread::spawn(move || {
            while asked.recv().is_ok() {
                let flushed = rustix::fs::fdatasync(&theirs).map_err(std::io::Error::from);
                if done.send(flushed).is_err() {
                    return;
                }
            }
        });
        Ok(Bench {
            device,
            descriptor,
            content: Content::new(),
            prng: Prng::new(9),
            ask,
            answer,
        })
    }

    /// All ways in turn, a short time each, again and again: what disturbs the machine disturbs all of them.
    fn round(&mut self, blocks: u32, first: usize, runtime: Duration) -> Result<Vec<Figures>, String> {
        let mut latencies = vec![Latencies::default(); WAYS.len()];
        let slices = (runtime.as_millis() / SLICE.as_millis()).max(1) as usize;
        for turn in 0..slices * WAYS.len() {
            let way = (first + turn) % WAYS.len();
            let (layout, flush, _) = WAYS[way];
            let end = Instant::now() + SLICE;
            while Instant::now() < end {
                let start = Instant::now();
                self.batch(layout, flush, blocks)?;
                latencies[way].add(start.elapsed());
            }
        }
        let figures = latencies.iter().map(|latencies| Figures {
            p50_us: latencies.quantiles_us([0.5])[0],
            mean_us: latencies.mean_us(),
        });
        Ok(figures.collect())
    }

    fn batch(&mut self, layout: Layout, flush: Flush, blocks: u32) -> Result<(), String> {
        let end = self.device.geometry().blocks;
        let sync = flush == Flush::Durable;
        let at = |prng: &mut Prng, blocks: u32| prng.below(end - u64::from(blocks));
        match layout {
            Layout::Contiguous => {
                let place = at(&mut self.prng, blocks + 1);
                self.write(place, blocks + 1, sync);
            }
            Layout::Parallel => {
                let (record, data) = (at(&mut self.prng, 1), at(&mut self.prng, blocks));
                self.write(record, 1, sync);
                self.write(data, blocks, sync);
            }
            Layout::Scattered => {
                for _ in 0..=blocks {
                    let place = at(&mut self.prng, 1);
                    self.write(place, 1, sync);
                }
            }
        }
        self.wait()?;
        match flush {
            Flush::Durable => Ok(()),
            Flush::Ring => {
                self.device.submit(DiskOp::Flush { token: DiskToken(1) });
                self.wait()
            }
            Flush::Inline => rustix::fs::fdatasync(&self.descriptor).map_err(|error| error.to_string()),
            Flush::Thread => {
                let gone = "the thread that flushes is gone";
                self.ask.send(()).map_err(|_| gone)?;
                let flushed = self.answer.recv().map_err(|_| gone)?;
                flushed.map_err(|error| error.to_string())
            }
        }
    }

    fn write(&mut self, place: u64, blocks: u32, durable: bool) {
        let (token, at) = (DiskToken(0), DeviceBlock(place));
        let buffers = vec![self.content.next(blocks)];
        self.device.submit(DiskOp::Write {
            token,
            at,
            buffers,
            durable,
        });
    }

    fn wait(&mut self) -> Result<(), String> {
        while self.device.in_flight() > 0 {
            Disk::wait(&mut self.device, PATIENCE)?;
            while let Some(done) = Disk::completion(&mut self.device) {
                done.result.map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }
}
