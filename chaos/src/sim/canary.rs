//! Planted bugs: each must be found by some seed, or the checkers prove nothing.

use std::time::Duration;

use cairn_proto::replication::limits::Canary as CoordinatorCanary;
use cairn_storage_node::host::Canary as HostCanary;
use cairn_storage_node::store::Canary as StoreCanary;

use super::options::Options;
use super::run;
use super::trace::Keep;

macro_rules! planted {
    ($($(#[$doc:meta])* $name:ident = ($words:literal, $where:literal),)*) => {
        /// A planted bug.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Planted {
            $($(#[$doc])* $name,)*
        }

        impl Planted {
            /// Every one.
            pub const ALL: &'static [Planted] = &[$(Planted::$name,)*];

            /// What the command calls it.
            pub fn name(self) -> &'static str {
                match self { $(Planted::$name => $words,)* }
            }

            /// Whose bug it would be.
            pub fn component(self) -> &'static str {
                match self { $(Planted::$name => $where,)* }
            }
        }
    };
}

planted! {
    /// A write is answered when it is written, not when it is flushed.
    AckBeforeFlush = ("ack-before-flush", "store"),
    /// Recovery believes the last record without looking at its data.
    SkipDataChecksum = ("skip-data-checksum", "store"),
    /// Blocks are free for others as soon as what supersedes them is being written.
    ReuseTooEarly = ("reuse-too-early", "store"),
    /// A discard leaves no version behind.
    ForgetTombstones = ("forget-tombstones", "store"),
    /// Writes and copies of lower generations are applied.
    GenerationIgnored = ("generation-ignored", "host"),
    /// A seal is answered before it is durable.
    SealNotDurable = ("seal-not-durable", "host"),
    /// A seal is answered although an older holder's read grant has not run out.
    GrantIgnored = ("grant-ignored", "host"),
    /// A seal is answered although writes of an older holder are under way.
    WritesOvertakeSeal = ("writes-overtake-seal", "host"),
    /// The checksums of incoming blocks are not verified.
    ChecksumUnverified = ("checksum-unverified", "host"),
    /// A write is acknowledged when one copy is durable.
    AckAtOneCopy = ("ack-at-one-copy", "coordinator"),
    /// Members are read that are known to lack blocks of the range.
    ReadFromLagging = ("read-from-lagging", "coordinator"),
    /// A group is served without comparing its members.
    SkipReconcile = ("skip-reconcile", "coordinator"),
    /// The coordinator goes on when a newer generation was seen.
    IgnoreFenced = ("ignore-fenced", "coordinator"),
    /// Members are ejected without asking meta.
    EjectWithoutCommit = ("eject-without-commit", "coordinator"),
    /// Copies to joining members apply only where they are newer.
    ResyncByHighest = ("resync-by-highest-version", "coordinator"),
    /// Joining members count for the write quorum.
    JoinerCounted = ("joiner-counted-in-quorum", "coordinator"),
    /// The ejection of members is proposed before the repairs among the others are durable.
    ProposeBeforeRepair = ("propose-before-repair", "coordinator"),
    /// Reads are returned though nobody vouches for them.
    StaleReadAfterTakeOver = ("stale-read-after-take-over", "coordinator"),
}

impl Planted {
    /// For the store.
    pub fn store(self) -> StoreCanary {
        StoreCanary {
            ack_before_flush: self == Planted::AckBeforeFlush,
            skip_data_checksum_at_recovery: self == Planted::SkipDataChecksum,
            reuse_too_early: self == Planted::ReuseTooEarly,
            forget_tombstones: self == Planted::ForgetTombstones,
            // What only tests of the store plant.
            ..StoreCanary::default()
        }
    }

    /// For the replica host.
    pub fn host(self) -> HostCanary {
        match self {
            Planted::GenerationIgnored => HostCanary::GenerationIgnored,
            Planted::SealNotDurable => HostCanary::SealNotDurable,
            Planted::GrantIgnored => HostCanary::GrantIgnored,
            Planted::WritesOvertakeSeal => HostCanary::WritesOvertakeSeal,
            Planted::ChecksumUnverified => HostCanary::ChecksumUnverified,
            _ => HostCanary::None,
        }
    }
}

impl Planted {
    /// For the coordinator.
    pub fn coordinator(self) -> CoordinatorCanary {
        CoordinatorCanary {
            ack_at_one_copy: self == Planted::AckAtOneCopy,
            read_from_lagging: self == Planted::ReadFromLagging,
            skip_reconcile: self == Planted::SkipReconcile,
            ignore_fenced: self == Planted::IgnoreFenced,
            eject_without_commit: self == Planted::EjectWithoutCommit,
            resync_by_highest: self == Planted::ResyncByHighest,
            joiner_counted: self == Planted::JoinerCounted,
            propose_before_repair: self == Planted::ProposeBeforeRepair,
            unvouched_read: self == Planted::StaleReadAfterTakeOver,
        }
    }
}

/// How a hunt for one bug ended.
#[derive(Clone, Debug)]
pub struct Found {
    /// How many seeds it took; `None` if none found it.
    pub seeds: Option<u64>,
    /// What was broken.
    pub promise: &'static str,
    /// Processor time.
    pub cpu: Duration,
}

/// Runs seeds from 1 on with a bug until one fails.
pub fn hunt_one(planted: Planted, seeds_max: u64) -> Found {
    let mut cpu = Duration::ZERO;
    for seed in 1..=seeds_max {
        let options = Options {
            planted: Some(planted),
            ..Options::of_seed(seed)
        };
        let (report, _) = run::run(options, Keep::Hash);
        cpu += Duration::from_micros(report.stats.cpu_us);
        if let Some(broken) = report.broken {
            return Found {
                seeds: Some(seed),
                promise: broken.promise,
                cpu,
            };
        }
    }
    Found {
        seeds: None,
        promise: "",
        cpu,
    }
}

/// Hunts all bugs, or the one of this name; `print` gets a table, line by line. Whether all were found.
pub fn hunt(name: Option<&str>, seeds_max: u64, mut print: impl FnMut(String)) -> bool {
    let chosen: Vec<Planted> = Planted::ALL
        .iter()
        .filter(|planted| name.is_none_or(|name| planted.name() == name))
        .copied()
        .collect();
    if chosen.is_empty() {
        let names: Vec<&str> = Planted::ALL.iter().map(|planted| planted.name()).collect();
        print(format!(
            "there is no planted bug of this name: choose one of {}",
            names.join(", ")
        ));
        return false;
    }
    print(format!(
        "{:<22} {:<12} {:>6} {:>8}  {}",
        "BUG", "COMPONENT", "SEEDS", "CPU", "BROKEN PROMISE"
    ));
    let mut all = true;
    for planted in chosen {
        let found = hunt_one(planted, seeds_max);
        all &= found.seeds.is_some();
        let seeds = found.seeds.map_or("never".to_string(), |seeds| seeds.to_string());
        print(format!(
            "{:<22} {:<12} {:>6} {:>6.1} s  {}",
            planted.name(),
            planted.component(),
            seeds,
            found.cpu.as_secs_f64(),
            found.promise
        ));
    }
    all
}
