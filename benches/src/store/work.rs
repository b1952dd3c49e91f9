//! What is done to a target, and the closed loop that does it: so many operations in flight, each replaced when it ends.

use std::time::{Duration, Instant};

use cairn_storage_node::testing::Prng;

use super::stats::Latencies;

/// One operation on blocks of the span.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Work {
    /// Whether it writes.
    pub write: bool,
    /// The first block.
    pub block: u64,
    /// How many.
    pub blocks: u32,
}

/// Something that takes operations.
pub trait Target {
    /// Takes one; `id` is less than the depth and comes back once.
    fn submit(&mut self, id: usize, work: Work);
    /// Waits until something has ended; appends what has.
    ///
    /// # Errors
    /// The device or the store failed an operation, in words.
    fn wait(&mut self, done: &mut Vec<usize>) -> Result<(), String>;
    /// Bytes written to the device so far.
    fn device_bytes(&self) -> u64;
}

/// What one case does.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Load {
    /// Whether it writes.
    pub write: bool,
    /// In random order.
    pub random: bool,
    /// Blocks of one operation.
    pub blocks: u32,
    /// Operations in flight.
    pub depth: usize,
    /// Blocks that it is spread over, from the first on.
    pub span: u64,
    /// When it ends.
    pub stop: Stop,
}

/// When a load ends.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Stop {
    /// After so much time.
    After(Duration),
    /// After so many operations.
    Operations(u64),
    /// When every block of the span was touched once.
    Once,
}

/// What a load gave.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Figures {
    /// Operations done.
    pub ops: u64,
    /// Operations in a second.
    pub iops: f64,
    /// Bytes in a second.
    pub bytes_per_s: f64,
    /// Latency, in microseconds.
    pub mean_us: f64,
    /// Half of the operations take no longer.
    pub p50_us: f64,
    /// 99 of a hundred take no longer.
    pub p99_us: f64,
    /// 999 of a thousand take no longer.
    pub p999_us: f64,
    /// The longest.
    pub max_us: f64,
    /// Busy time of this process, the kernel's workers for it included, per operation.
    pub cpu_us_per_op: f64,
    /// Bytes written to the device for each byte written by the load; zero for reads.
    pub amplification: f64,
}

/// Runs a load.
///
/// # Errors
/// An operation failed: no figure is taken from such a run.
pub fn run(target: &mut dyn Target, load: &Load, seed: u64) -> Result<Figures, String> {
    let mut source = Source::new(load, seed);
    let mut begun: Vec<Option<(Instant, u64)>> = vec![None; load.depth];
    let mut latencies = Latencies::default();
    let bytes_before = target.device_bytes();
    let cpu_before = cpu();
    let start = Instant::now();
    let mut idle: Vec<usize> = (0..load.depth).rev().collect();
    let mut done = Vec::with_capacity(load.depth);
    let mut now = start;
    loop {
        while !idle.is_empty()
            && let Some(work) = source.next(now - start)
        {
            let id = idle.pop().expect("one is idle");
            begun[id] = Some((now, u64::from(work.blocks)));
            target.submit(id, work);
        }
        if idle.len() == load.depth {
            break;
        }
        target.wait(&mut done)?;
        now = Instant::now();
        for id in done.drain(..) {
            let (since, _) = begun[id].take().expect("it was begun");
            latencies.add(now - since);
            idle.push(id);
        }
    }
    let seconds = (now - start).as_secs_f64();
    let [p50_us, p99_us, p999_us, max_us] = latencies.quantiles_us([0.5, 0.99, 0.999, 1.0]);
    let ops = latencies.count();
    let bytes = source.blocks_given as f64 * 4096.0;
    Ok(Figures {
        ops,
        iops: ops as f64 / seconds,
        bytes_per_s: bytes / seconds,
        mean_us: latencies.mean_us(),
        p50_us,
        p99_us,
        p999_us,
        max_us,
        cpu_us_per_op: (cpu() - cpu_before).as_secs_f64() * 1e6 / ops.max(1) as f64,
        amplification: if load.write && bytes > 0.0 {
            (target.device_bytes() - bytes_before) as f64 / bytes
        } else {
            0.0
        },
    })
}

/// Busy time of this process so far, the kernel's workers for it included.
pub fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name of the program, in parentheses, may hold anything; utime and stime are the 12th and 13th field after it.
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let ticks = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok());
    Duration::from_millis(ticks.sum::<u64>() * MILLIS_PER_TICK)
}

/// The kernel tells times in hundredths of a second (`USER_HZ`), whatever it counts in itself.
const MILLIS_PER_TICK: u64 = 10;

/// Gives one operation after the other.
struct Source {
    load: Load,
    prng: Prng,
    given: u64,
    blocks_given: u64,
}

impl Source {
    fn new(load: &Load, seed: u64) -> Source {
        assert!(load.span >= u64::from(load.blocks), "the span holds one operation");
        Source {
            load: *load,
            prng: Prng::new(seed),
            given: 0,
            blocks_given: 0,
        }
    }

    fn next(&mut self, elapsed: Duration) -> Option<Work> {
        let slots = self.load.span / u64::from(self.load.blocks);
        let over = match self.load.stop {
            Stop::After(time) => elapsed >= time,
            Stop::Operations(count) => self.given >= count,
            Stop::Once => self.given >= slots,
        };
        if over {
            return None;
        }
        let slot = match (self.load.random, self.load.stop) {
            (false, _) => self.given % slots,
            (true, Stop::Once) => permuted(self.given, slots),
            (true, _) => self.prng.below(slots),
        };
        self.given += 1;
        self.blocks_given += u64::from(self.load.blocks);
        Some(Work {
            write: self.load.write,
            block: slot * u64::from(self.load.blocks),
            blocks: self.load.blocks,
        })
    }
}

/// A permutation of `0..count` that looks random: a Feistel network on the next even power of two, walked until it falls
/// inside.
fn permuted(index: u64, count: u64) -> u64 {
    let half = (64 - (count.max(2) - 1).leading_zeros()).div_ceil(2);
    let mask = (1 << half) - 1;
    let mut at = index;
    loop {
        let (mut left, mut right) = (at >> half, at & mask);
        for round in 0..4 {
            let mixed = Prng::new(right ^ (round << 40)).next_u64() & mask;
            (left, right) = (right, left ^ mixed);
        }
        at = left << half | right;
        if at < count {
            return at;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permutation_meets_every_number_once_and_out_of_order() {
        for count in [1, 2, 3, 100, 1000, 4096] {
            let found: Vec<u64> = (0..count).map(|index| permuted(index, count)).collect();
            let mut sorted = found.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..count).collect::<Vec<_>>());
            assert!(count < 100 || found != sorted);
        }
    }

    /// Ends the oldest operation at each wait.
    #[derive(Default)]
    struct Fake {
        in_flight: std::collections::VecDeque<(usize, Work)>,
        deepest: usize,
        done: Vec<Work>,
    }

    impl Target for Fake {
        fn submit(&mut self, id: usize, work: Work) {
            self.in_flight.push_back((id, work));
            self.deepest = self.deepest.max(self.in_flight.len());
        }

        fn wait(&mut self, done: &mut Vec<usize>) -> Result<(), String> {
            let (id, work) = self.in_flight.pop_front().ok_or("nothing is in flight")?;
            done.push(id);
            self.done.push(work);
            Ok(())
        }

        fn device_bytes(&self) -> u64 {
            self.done.iter().map(|work| u64::from(work.blocks) * 4096 * 2).sum()
        }
    }

    #[test]
    fn the_loop_keeps_its_depth_and_counts_everything_once() {
        let mut fake = Fake::default();
        let load = Load {
            write: true,
            random: true,
            blocks: 4,
            depth: 3,
            span: 40,
            stop: Stop::Once,
        };
        let figures = run(&mut fake, &load, 1).unwrap();
        assert_eq!((figures.ops, fake.deepest), (10, 3));
        assert_eq!(figures.amplification, 2.0);
        let mut blocks: Vec<u64> = fake.done.iter().map(|work| work.block).collect();
        blocks.sort_unstable();
        assert_eq!(blocks, (0..40).step_by(4).collect::<Vec<_>>());
    }
}
