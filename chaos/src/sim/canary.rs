//! Planted bugs: each must be found by some seed, or the checkers prove nothing.

use std::time::Duration;

pub use cairn_client::planted::Planted;

use super::nemesis::FaultKind;
use super::options::{Ending, Options};
use super::run;
use super::trace::Keep;

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

/// Whether a seed can bring a bug out at all: some need a fault that most seeds don't have.
fn is_about(planted: Planted, options: &Options) -> bool {
    match planted {
        Planted::LostTooEarly => options.rot,
        // Production's store makes a seal durable after the writes that came before it, whatever its host waits for.
        Planted::WritesOvertakeSeal => options.model_store && options.faults.weights[FaultKind::Split as usize] > 0,
        // A fetch must be under way when the volume is taken over, from somebody who is filling a member.
        Planted::FetchIgnoresGeneration => options.faults.weights[FaultKind::Split as usize] > 0,
        Planted::SettledUnseen | Planted::LeftUnsettled => options.ending != Ending::Held,
        Planted::LeftClose => options.racks > 0 && options.faults.weights[FaultKind::Swapped as usize] > 0,
        Planted::LeftOnDrained => options.faults.weights[FaultKind::Drain as usize] > 0,
        _ => true,
    }
}

/// Bugs that no seed is known to show yet, so that they are only tried by name: see DESIGN.md.
const HIDDEN: &[Planted] = &[Planted::FetchIgnoresGeneration];

/// Runs seeds from 1 on with a bug, those that can bring it out, until one fails; so many of them at the most.
pub fn hunt_one(planted: Planted, seeds_max: u64) -> Found {
    let mut cpu = Duration::ZERO;
    let seeds = (1..).filter(|seed| is_about(planted, &Options::of_seed(*seed)));
    for seed in seeds.take(usize::try_from(seeds_max).unwrap_or(usize::MAX)) {
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

/// Hunts all bugs that seeds can show, or the one of this name; `print` gets a table, line by line. Whether all were found.
pub fn hunt(name: Option<&str>, seeds_max: u64, mut print: impl FnMut(String)) -> bool {
    let chosen: Vec<Planted> = Planted::ALL
        .iter()
        .filter(|planted| match name {
            Some(name) => planted.name() == name,
            None => !HIDDEN.contains(planted),
        })
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
        "{:<25} {:<12} {:>6} {:>8}  {}",
        "BUG", "COMPONENT", "SEEDS", "CPU", "BROKEN PROMISE"
    ));
    let mut all = true;
    for planted in chosen {
        let found = hunt_one(planted, seeds_max);
        all &= found.seeds.is_some();
        let seeds = found.seeds.map_or("never".to_string(), |seeds| seeds.to_string());
        print(format!(
            "{:<25} {:<12} {:>6} {:>6.1} s  {}",
            planted.name(),
            planted.component(),
            seeds,
            found.cpu.as_secs_f64(),
            found.promise
        ));
    }
    all
}
