//! What a seed chooses: the cluster, the load, and how much goes wrong.

use std::fmt;
use std::time::Duration;

use cairn_proto::limits::{BLOCKS_PER_CHUNK, BYTES_PER_GROUP, CHUNK_BYTES};

use super::nemesis::FaultKind;
use super::network::NetworkOptions;
use crate::rng::Rng;

/// Seeds that run on the model of a store: they show what of a failure is the protocol's.
const MODEL_STORE_PERMILLE: u32 = 150;

/// Seeds in which an operator does something meanwhile.
const OPERATIONS_PERMILLE: u32 = 250;

/// One volume.
#[derive(Clone, Debug)]
pub struct VolumeOptions {
    /// Its size in bytes: it decides how many groups there are.
    pub bytes: u64,
    /// Where I/O goes: runs of blocks, first and count. They cross the borders of chunks and groups.
    pub regions: Vec<(u64, u64)>,
    /// Operations of one client at once.
    pub depth: usize,
    /// How often each kind of operation comes: read, write, partial write, discard, write-zeroes, flush, status.
    pub mix: [u32; 7],
    /// Blocks of one operation at the most.
    pub blocks_max: u64,
    /// Time between an answer and the next operation.
    pub think: Duration,
    /// Whether one copy is enough to write when no more are in sync.
    pub min_copies_one: bool,
}

/// How disks behave.
#[derive(Clone, Copy, Debug)]
pub struct DiskOptions {
    /// Usual time of a read or write.
    pub latency: Duration,
    /// Usual time of a flush.
    pub flush_latency: Duration,
    /// Whether completed writes are lost with the power.
    pub volatile_cache: bool,
    /// Its length.
    pub bytes: u64,
}

/// What goes wrong in the first phase.
#[derive(Clone, Copy, Debug)]
pub struct FaultOptions {
    /// Time from one fault to the next; none at all if zero.
    pub interval: Duration,
    /// How long one lasts.
    pub span: Duration,
    /// How often each kind comes, as `FaultKind` counts them.
    pub weights: [u32; FaultKind::COUNT],
}

/// What becomes of the volumes when everything has been read: whoever holds them, all copies must be there again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ending {
    /// Their holders keep them.
    Held,
    /// They are released, and caretakers come where something is to be done.
    Released,
    /// Their holders die without a word.
    Abandoned,
}

/// All of it.
#[derive(Clone, Debug)]
pub struct Options {
    /// From which it all follows.
    pub seed: u64,
    /// Metadata servers.
    pub metas: u8,
    /// Storage nodes, one device each.
    pub nodes: u8,
    /// The last so many of them are not there from the start: an operator adds them.
    pub late_nodes: u8,
    /// Clients.
    pub clients: u8,
    /// Volumes.
    pub volumes: Vec<VolumeOptions>,
    /// Whether the limits of the components are as small as they go.
    pub tiny_limits: bool,
    /// Whether nodes run on the model of a store in place of production's.
    pub model_store: bool,
    /// Length of the first phase.
    pub faulty: Duration,
    /// Operations in the first phase at the most.
    pub ops_max: u32,
    /// Acknowledged writes of which it is looked at once whether enough devices hold them: per thousand.
    pub probe_permille: u32,
    /// Clocks run this many millionths fast or slow at the most.
    pub drift_ppm: u64,
    /// The network.
    pub network: NetworkOptions,
    /// The disks.
    pub disk: DiskOptions,
    /// The faults.
    pub faults: FaultOptions,
    /// Only one node is ever at fault, so that no I/O may wait for long.
    pub lonely: bool,
    /// Devices are lost for good, one after the other: what was on them is made anew elsewhere.
    pub loss: bool,
    /// Of these, whether devices may be lost at any moment, above all while another member is being ejected.
    pub race: bool,
    /// Nodes stand in so many racks, and copies lie in distinct ones; in distinct hosts if zero.
    pub racks: u8,
    /// How long a device may be silent before its copies are made anew elsewhere.
    pub rebuild_after: Duration,
    /// What becomes of the volumes when all is over.
    pub ending: Ending,
    /// The device of one node lies: bits flip, writes are lost or land elsewhere. No device starts anew in these seeds: a log whose end is rotten is taken for one
    /// that was cut off, so the device would forget what it has acknowledged.
    pub rot: bool,
    /// A planted bug.
    #[cfg(feature = "canary")]
    pub planted: Option<super::canary::Planted>,
}

impl Options {
    /// What a seed chooses.
    pub fn of_seed(seed: u64) -> Options {
        let rng = &mut Rng::stream(seed, "options");
        let calm = rng.permille(50);
        // Some seeds are about nothing but holders that do not know that they are none any more.
        let zombies = !calm && rng.permille(120);
        let split = !calm && !zombies && rng.permille(350);
        let lonely = !calm && !zombies && !split && rng.permille(200);
        let rot = !calm && !zombies && !split && !lonely && rng.permille(120);
        let loss = !calm && !zombies && !split && !lonely && !rot && rng.permille(300);
        let calm_network = calm || lonely || (split && rng.permille(500));
        let volume_count = [1, 1, 2, 3][rng.index(4)];
        let mut options = Options {
            seed,
            metas: *rng.pick(&[1, 3, 3, 5]),
            nodes: *rng.pick(&[3, 3, 4, 5]),
            late_nodes: 0,
            clients: match (zombies, split) {
                (true, _) => 2,
                (_, true) => 3,
                _ => *rng.pick(&[1, 2, 2, 3]),
            },
            volumes: (0..volume_count).map(|_| volume(rng)).collect(),
            tiny_limits: rng.permille(600),
            model_store: rng.permille(MODEL_STORE_PERMILLE) && !rot,
            faulty: rng.span(Duration::from_secs(3), Duration::from_secs(12)),
            ops_max: rng.within(200, 900) as u32,
            probe_permille: 15,
            drift_ppm: *rng.pick(&[0, 50, 300, 2000]),
            network: network(rng, calm_network),
            disk: disk(rng),
            faults: match (zombies, split, lonely, rot) {
                (true, ..) => zombie_faults(rng),
                (_, true, ..) => split_faults(rng),
                (_, _, true, _) => lonely_faults(rng),
                (.., true) => rot_faults(rng),
                _ => faults(rng, calm),
            },
            lonely,
            loss,
            race: loss && Rng::stream(seed, "race").permille(500),
            racks: 0,
            rebuild_after: Duration::from_secs(*rng.pick(&[1, 6, 10, 600])),
            ending: *rng.pick(&[Ending::Held, Ending::Held, Ending::Released, Ending::Abandoned]),
            rot,
            #[cfg(feature = "canary")]
            planted: None,
        };
        if split {
            (options.faulty, options.ops_max) = (options.faulty * 2, options.ops_max * 2);
        }
        if loss {
            options.lose(rng);
            options.faults = loss_faults(rng, options.racks);
        }
        if split || loss || rng.permille(800) {
            options.pace();
        }
        if !calm {
            options.operate();
        }
        options
    }

    /// Room for losses: more nodes, time for copies to be made anew, and no volume that one copy is enough for, since that may be
    /// the one that is lost.
    fn lose(&mut self, rng: &mut Rng) {
        (self.nodes, self.racks) = *rng.pick(&[(3, 0), (4, 0), (5, 0), (6, 0), (6, 3), (7, 4), (7, 4)]);
        self.rebuild_after = Duration::from_secs(*rng.pick(&[1, 6, 10]));
        self.faulty = rng.span(Duration::from_secs(15), Duration::from_secs(50));
        for volume in &mut self.volumes {
            volume.min_copies_one = false;
        }
    }

    /// In some seeds an operator empties nodes and adds some, whatever else goes wrong.
    fn operate(&mut self) {
        let rng = &mut Rng::stream(self.seed, "operations");
        if !rng.permille(OPERATIONS_PERMILLE) {
            return;
        }
        self.late_nodes = *rng.pick(&[0, 1, 1, 1]);
        self.nodes += self.late_nodes;
        let others: u32 = self.faults.weights.iter().sum();
        for kind in FaultKind::ALL.into_iter().filter(|kind| kind.is_operation()) {
            self.faults.weights[kind as usize] = (others * kind.weight() / 20).max(1);
        }
    }

    /// Lets the operations last for as long as the faults do: without that, quick guests are done before much goes wrong.
    fn pace(&mut self) {
        let at_once: usize = self.volumes.iter().map(|volume| volume.depth).sum();
        let pace = self.faulty * u32::try_from(at_once).expect("few") / self.ops_max;
        for volume in &mut self.volumes {
            volume.think = volume.think.max(pace);
        }
    }
}

fn volume(rng: &mut Rng) -> VolumeOptions {
    let chunk_blocks = u64::from(BLOCKS_PER_CHUNK);
    let groups = *rng.pick(&[1, 1, 2, 3]);
    // Some volumes end in the middle of a chunk, and of a block's worth of sectors never.
    let tail = rng.pick(&[0, CHUNK_BYTES / 2, 4096 * 37]);
    let bytes = if groups == 1 {
        rng.within(1, 4) * CHUNK_BYTES + tail
    } else {
        groups * BYTES_PER_GROUP + CHUNK_BYTES * 4 + tail
    };
    let blocks = bytes / 4096;
    let mut regions = vec![(0, rng.within(4, 40))];
    if rng.permille(700) && blocks > chunk_blocks + 16 {
        regions.push((chunk_blocks - 6, 12));
    }
    if rng.permille(400) {
        regions.push((blocks - 5, 5));
    }
    if rng.permille(300) && blocks > 3 * chunk_blocks {
        regions.push((2 * chunk_blocks + 100, rng.within(2, 300)));
    }
    VolumeOptions {
        bytes,
        regions,
        depth: *rng.pick(&[1, 2, 4, 8]),
        mix: [
            rng.within(10, 60) as u32,
            rng.within(10, 60) as u32,
            rng.within(0, 20) as u32,
            rng.within(0, 6) as u32,
            rng.within(0, 6) as u32,
            rng.within(0, 3) as u32,
            rng.within(0, 2) as u32,
        ],
        blocks_max: *rng.pick(&[1, 3, 8, 8, 24]),
        think: Duration::from_micros(*rng.pick(&[0, 500, 5000, 30_000])),
        min_copies_one: rng.permille(250),
    }
}

fn network(rng: &mut Rng, calm: bool) -> NetworkOptions {
    let mut some = |odds: u32, high: u64| match !calm && rng.permille(odds) {
        true => rng.within(1, high) as u32,
        false => 0,
    };
    NetworkOptions {
        reset_ppm: some(500, 3000),
        flip_ppm: some(300, 1500),
        loss_permille: some(500, 80),
        double_permille: some(500, 80),
        late_permille: some(500, 100),
        delay: Duration::from_micros(*rng.pick(&[30, 100, 300, 2000])),
    }
}

fn disk(rng: &mut Rng) -> DiskOptions {
    DiskOptions {
        latency: Duration::from_micros(*rng.pick(&[20, 100, 1000])),
        flush_latency: Duration::from_micros(*rng.pick(&[50, 300, 5000])),
        volatile_cache: rng.permille(800),
        bytes: rng.within(24, 96) << 20,
    }
}

fn faults(rng: &mut Rng, calm: bool) -> FaultOptions {
    // Swarm testing: each seed leaves out many kinds of fault, so that the others meet undisturbed.
    let keep = *rng.pick(&[200, 500, 1000]);
    let mut weights = FaultKind::ALL.map(
        |kind| match !kind.is_operation() && rng.permille(keep) && !kind.is_harm() {
            true => kind.weight(),
            false => 0,
        },
    );
    if calm || weights.iter().all(|weight| *weight == 0) {
        weights = [0; FaultKind::COUNT];
    }
    // How many faults last at once on average: with too many, nothing gets done that could go wrong.
    let span_ms = *rng.pick(&[50, 300, 1000, 2500]);
    let at_once_percent = *rng.pick(&[20, 50, 100, 250]);
    FaultOptions {
        interval: Duration::from_millis((span_ms * 100 / at_once_percent).max(60)),
        span: Duration::from_millis(span_ms),
        weights,
    }
}

fn zombie_faults(rng: &mut Rng) -> FaultOptions {
    let power = rng.permille(500);
    let weights = FaultKind::ALL.map(|kind| match kind {
        FaultKind::Zombie => 6,
        FaultKind::TakeOver | FaultKind::SlowDisk => 1,
        FaultKind::PowerNode if power => 1,
        _ => 0,
    });
    FaultOptions {
        interval: Duration::from_millis(*rng.pick(&[1500, 3000])),
        span: Duration::from_millis(*rng.pick(&[1000, 2500])),
        weights,
    }
}

fn rot_faults(rng: &mut Rng) -> FaultOptions {
    use FaultKind as F;
    let lies = *rng.pick(&[
        &[F::BitRot][..],
        &[F::LostWrite],
        &[F::StaleSector],
        &[F::BitRot, F::LostWrite, F::Misdirected, F::StaleSector],
    ]);
    let others = rng.permille(700);
    let weights = FaultKind::ALL.map(|kind| match kind {
        kind if kind.is_harm() && !kind.is_loss() && lies.contains(&kind) => kind.weight(),
        FaultKind::KillClient | FaultKind::TakeOver | FaultKind::HandOver | FaultKind::Isolate if others => 1,
        FaultKind::SlowDisk | FaultKind::Reset | FaultKind::KillMeta if others => 1,
        _ => 0,
    });
    FaultOptions {
        interval: Duration::from_millis(*rng.pick(&[100, 400])),
        span: Duration::from_millis(*rng.pick(&[300, 1000])),
        weights,
    }
}

fn loss_faults(rng: &mut Rng, racks: u8) -> FaultOptions {
    let others = rng.permille(600);
    let keep = *rng.pick(&[400, 1000]);
    let weights = FaultKind::ALL.map(|kind| match kind {
        FaultKind::DomainGone if racks == 0 => 0,
        kind if kind.is_loss() => kind.weight(),
        FaultKind::TakeOver | FaultKind::KillClient | FaultKind::HandOver | FaultKind::Release => 2,
        FaultKind::KillMeta | FaultKind::KillNode | FaultKind::PowerNode | FaultKind::Isolate | FaultKind::Freeze
            if others && rng.permille(keep) =>
        {
            1
        }
        FaultKind::SlowDisk | FaultKind::Reset | FaultKind::OneWay if others && rng.permille(keep) => 1,
        _ => 0,
    });
    FaultOptions {
        interval: Duration::from_millis(*rng.pick(&[500, 1500, 4000])),
        span: Duration::from_millis(*rng.pick(&[100, 1000])),
        weights,
    }
}

fn split_faults(rng: &mut Rng) -> FaultOptions {
    let others = rng.permille(300);
    let weights = FaultKind::ALL.map(|kind| match kind {
        FaultKind::Split => 12,
        FaultKind::KillNode | FaultKind::PowerNode | FaultKind::SlowDisk | FaultKind::Reset if others => 1,
        _ => 0,
    });
    FaultOptions {
        interval: Duration::from_millis(*rng.pick(&[200, 700])),
        span: Duration::from_millis(*rng.pick(&[300, 1000])),
        weights,
    }
}

fn lonely_faults(rng: &mut Rng) -> FaultOptions {
    let take_over = rng.permille(300);
    let weights = FaultKind::ALL.map(|kind| match kind {
        FaultKind::NodeGone => 3,
        FaultKind::GreyNode => 2,
        FaultKind::TakeOver if take_over => 1,
        _ => 0,
    });
    FaultOptions {
        interval: Duration::from_millis(*rng.pick(&[600, 1500, 5000])),
        span: Duration::from_millis(*rng.pick(&[300, 1000, 4000, 20_000])),
        weights,
    }
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "seed {}: {} metas, {} nodes ({} of them added later) in {} racks, {} clients, {} volumes, {} limits, {} store, {:?} of faults, {} operations at the \
             most, then {:?}; copies are made anew after {:?}",
            self.seed,
            self.metas,
            self.nodes,
            self.late_nodes,
            self.racks,
            self.clients,
            self.volumes.len(),
            if self.tiny_limits { "tiny" } else { "usual" },
            if self.model_store { "model" } else { "production's" },
            self.faulty,
            self.ops_max,
            self.ending,
            self.rebuild_after
        )?;
        for volume in &self.volumes {
            writeln!(f, "  {volume:?}")?;
        }
        writeln!(f, "  {:?}", self.network)?;
        writeln!(f, "  {:?}", self.disk)?;
        let kinds = FaultKind::ALL.iter().zip(self.faults.weights);
        let kinds: Vec<String> = kinds
            .filter(|(_, weight)| *weight > 0)
            .map(|(kind, weight)| format!("{}×{weight}", kind.name()))
            .collect();
        write!(
            f,
            "  a fault each {:?} for {:?}: {}",
            self.faults.interval,
            self.faults.span,
            if kinds.is_empty() {
                "none".to_string()
            } else {
                kinds.join(" ")
            }
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_seeds_choose_is_possible() {
        for seed in 0..500 {
            let options = Options::of_seed(seed);
            for volume in &options.volumes {
                assert!(volume.mix.iter().any(|weight| *weight > 0));
                for (first, count) in &volume.regions {
                    assert!(*count > 0 && (first + count) * 4096 <= volume.bytes, "{options}");
                }
            }
        }
    }
}
