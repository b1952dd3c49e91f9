//! `chaos`: runs the deterministic simulator, and lists the faults that are injected.

mod inject_command;
mod live_command;
mod model_command;
mod planted_command;

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use cairn_chaos::batch::Seeds;
use cairn_chaos::faults;
use cairn_chaos::sim::batch::{Totals, run_batch};
use cairn_chaos::sim::run::{Report, StoreKind, run_seed, run_seed_on};
use cairn_chaos::sim::trace::{Keep, first_difference};
use cairn_chaos::store;
use clap::{Parser, Subcommand, ValueEnum};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Lines of the trace that are shown of a failing seed.
const TRACE_TAIL: usize = 60;

/// Breaks clusters on purpose, and says whether they kept their promises.
#[derive(Parser)]
#[command(version, about, long_version = LONG_VERSION)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[cfg(feature = "canary")]
const LONG_VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    "\nbuilt with the feature `canary`: bugs are planted in it"
);
#[cfg(not(feature = "canary"))]
const LONG_VERSION: &str = env!("CARGO_PKG_VERSION");

#[derive(Clone, Copy, ValueEnum)]
enum Store {
    /// Production's
    Production,
    /// The model of a store
    Model,
}

impl From<Store> for StoreKind {
    fn from(store: Store) -> StoreKind {
        match store {
            Store::Production => StoreKind::Production,
            Store::Model => StoreKind::Model,
        }
    }
}

#[derive(Subcommand)]
enum Command {
    /// Simulates whole clusters, one per seed
    ///
    /// Example: chaos sim --seed 1 --seeds 1000
    Sim {
        /// The first seed
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// How many seeds, counting up from the first
        #[arg(long)]
        seeds: Option<u64>,
        /// Instead of a number of seeds: as many as fit into so many minutes
        #[arg(long, conflicts_with = "seeds")]
        minutes: Option<f64>,
        /// Threads; as many as there are processors if not given
        #[arg(long)]
        threads: Option<usize>,
        /// Nodes run on this store, whatever a seed chooses: what fails on both is the protocol's
        #[arg(long)]
        store: Option<Store>,
        /// With a planted bug; prints the trace
        #[cfg(feature = "canary")]
        #[arg(long)]
        planted: Option<String>,
        /// The result as one JSON object
        #[arg(long)]
        json: bool,
        /// Prints the whole trace of one seed
        #[arg(long, conflicts_with_all = ["seeds", "minutes", "json"])]
        trace: bool,
    },
    /// Runs a seed twice and compares the traces byte for byte
    ///
    /// Example: chaos twice --seed 1
    Twice {
        /// Which seed
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// How many seeds, counting up from it
        #[arg(long, default_value_t = 1)]
        seeds: u64,
    },
    /// Cuts power at every operation of the store, and of its recovery
    ///
    /// Example: chaos store --seed 1 --seeds 100
    Store {
        /// The first seed
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// How many seeds, counting up from the first
        #[arg(long)]
        seeds: Option<u64>,
        /// Instead of a number of seeds: as many as fit into so many minutes
        #[arg(long, conflicts_with = "seeds")]
        minutes: Option<f64>,
        /// Threads; as many as there are processors if not given
        #[arg(long)]
        threads: Option<usize>,
        /// Only the cut at this moment, as a failure names it
        #[arg(long)]
        moment: Option<u64>,
        /// The result as one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Searches the model of the replication protocol, walks it at random, and leaves out its rules one by one
    ///
    /// Example: chaos model --without 10-copies
    Model(model_command::ModelArgs),
    /// Tries to break a cluster of real processes, and says what guests saw
    ///
    /// Exit codes: 0 all promises kept, 10 wrong data, 11 a guest got an error, 12 I/O stalled, 13 the cluster did not
    /// become well, 14 a process ended by itself, 15 memory grew, 16 an operator's command went wrong, 20 it could not be tried,
    /// 21 a signal asked it to stop: it has ended all that it had started.
    ///
    /// Example: chaos live --seed 1 --scenario power --cuts 200
    Live(live_command::LiveArgs),
    /// A mix of all for a cron job: what operators do, then faults at random, at the end the power of everything is cut, and it
    /// returns unattended. Exit codes as of `chaos live`
    ///
    /// Example: chaos nightly --minutes 60 --seed 20
    Nightly(live_command::NightlyArgs),
    /// Tries real processes with planted bugs, one by one: each must be found, by a program built with the feature `canary`
    ///
    /// Example: chaos planted --program target/canary/cairn --sound target/sim/cairn
    Planted(planted_command::PlantedArgs),
    /// Prints the fault catalogue
    List,
    /// Gives broken input to everything that decodes bytes from outside
    ///
    /// Example: chaos fuzz --target frame --seed 1 --runs 100000
    Fuzz {
        /// Only this target
        #[arg(long)]
        target: Option<String>,
        /// Chooses the inputs
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// How many inputs for each target
        #[arg(long, default_value_t = 100_000)]
        runs: u64,
    },
    /// Runs a TCP proxy that does what bad networks do
    Proxy(inject_command::ProxyArgs),
    /// Serves a device that loses power, fails, sticks and lies on demand
    Shim(inject_command::ShimArgs),
    /// Sends a command to a running proxy or shim
    ///
    /// Example: chaos tell /tmp/proxy.sock one-way to-target
    Tell(inject_command::TellArgs),
    /// Switches planted bugs on, one by one, and runs seeds until each is found
    ///
    /// Example: chaos canary --name ack-before-flush
    #[cfg(feature = "canary")]
    Canary {
        /// Only this one
        #[arg(long)]
        name: Option<String>,
        /// Seeds to try for each at the most
        #[arg(long, default_value_t = 1500)]
        seeds: u64,
    },
}

fn main() -> ExitCode {
    match Args::parse().command {
        Command::Sim {
            seed,
            seeds,
            minutes,
            threads,
            store,
            #[cfg(feature = "canary")]
            planted,
            json,
            trace,
        } => {
            #[cfg(feature = "canary")]
            if let Some(name) = planted {
                return trace_planted(seed, &name);
            }
            let store = store.map(StoreKind::from);
            if trace {
                return trace_one(seed, store);
            }
            sim(which(seed, seeds, minutes, threads), store, json)
        }
        Command::Store {
            seed,
            seeds,
            minutes,
            threads,
            moment,
            json,
        } => prove_store(which(seed, seeds, minutes, threads), moment, json),
        Command::Twice { seed, seeds } => twice(seed, seeds),
        Command::Model(args) => model_command::run(&args),
        Command::Live(args) => live_command::run(&args),
        Command::Nightly(args) => live_command::nightly(&args),
        Command::Planted(args) => planted_command::run(&args),
        Command::List => {
            print!("{}", faults::table());
            ExitCode::SUCCESS
        }
        Command::Fuzz { target, seed, runs } => fuzz(target.as_deref(), seed, runs),
        Command::Proxy(args) => inject_command::proxy(&args),
        Command::Shim(args) => inject_command::shim(&args),
        Command::Tell(args) => inject_command::tell(&args),
        #[cfg(feature = "canary")]
        Command::Canary { name, seeds } => canary(name.as_deref(), seeds),
    }
}

/// The seeds that a command line names.
fn which(first: u64, seeds: Option<u64>, minutes: Option<f64>, threads: Option<usize>) -> Seeds {
    let span = minutes.map(|minutes| Duration::from_secs_f64(minutes * 60.0));
    Seeds {
        first,
        count: if span.is_some() { None } else { Some(seeds.unwrap_or(1)) },
        span,
        threads,
    }
}

fn trace_one(seed: u64, store: Option<StoreKind>) -> ExitCode {
    let (report, _) = run_seed_on(seed, store, Keep::Print);
    print_verdict(&report);
    exit_code(report.broken.is_none())
}

fn exit_code(good: bool) -> ExitCode {
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn sim(seeds: Seeds, store: Option<StoreKind>, json: bool) -> ExitCode {
    let tell = !json && seeds.count != Some(1);
    let terminal = std::io::stderr().is_terminal();
    let totals = run_batch(seeds, store, |totals, took| {
        if tell {
            let end = if terminal { "\r" } else { "\n" };
            let mut err = std::io::stderr();
            let _ = write!(
                err,
                "{} seeds, {} failed, {} operations, {:.0} s{end}",
                totals.seeds,
                totals.failed.len(),
                totals.ops,
                took.as_secs_f64()
            );
            let _ = err.flush();
        }
    });
    if json {
        println!("{}", as_json(&totals));
    } else {
        for report in &totals.failed {
            explain(report, store);
        }
        print_totals(&totals);
    }
    exit_code(totals.failed.is_empty())
}

/// Runs a failing seed again, to show what led to it.
fn explain(report: &Report, store: Option<StoreKind>) {
    let (again, trace) = run_seed_on(report.seed, store, Keep::Last(TRACE_TAIL));
    println!("seed {} FAILED", report.seed);
    println!("{}", report.options);
    println!("last events:");
    for line in trace.lines() {
        println!("  {line}");
    }
    print_verdict(report);
    if again.hash != report.hash {
        println!(
            "  and it ran otherwise the second time: see `chaos twice --seed {}`",
            report.seed
        );
    }
    let option = match store {
        None => "",
        Some(StoreKind::Production) => " --store production",
        Some(StoreKind::Model) => " --store model",
    };
    println!("  replay: chaos sim --seed {}{option} --trace", report.seed);
    println!();
}

fn print_verdict(report: &Report) {
    match &report.broken {
        None => println!("seed {}: all promises kept, trace {:016x}", report.seed, report.hash),
        Some(broken) => {
            println!("broken promise: {}", broken.promise);
            println!("  at {:?}: {}", broken.at, broken.words);
            for line in &broken.story {
                println!("  | {line}");
            }
        }
    }
}

fn print_totals(totals: &Totals) {
    let seeds = totals.seeds.max(1);
    println!(
        "{} seeds, {} failed; {} operations ({} done) in {} sessions, {} blocks checked ({} undecided), {} \
         acknowledged writes looked for at once, {} frames, {} copies through coordinators and {} from node to node, \
         {} events, {} s of virtual time",
        totals.seeds,
        totals.failed.len(),
        totals.ops,
        totals.done,
        totals.sessions,
        totals.blocks,
        totals.undecided,
        totals.probes,
        totals.frames,
        totals.copies,
        totals.fetched,
        totals.events,
        totals.virtual_ms / 1000,
    );
    println!(
        "processor time: {:.1} s, {} ms per seed, the dearest ({}) {} ms",
        totals.cpu_us as f64 / 1e6,
        totals.cpu_us / seeds / 1000,
        totals.dearest.1,
        totals.dearest.0 / 1000
    );
    let listed = |counts: Vec<String>| {
        if counts.is_empty() {
            "none".to_string()
        } else {
            counts.join(", ")
        }
    };
    println!(
        "faults: {}",
        listed(totals.faults.iter().map(|(kind, n)| format!("{kind} {n}")).collect())
    );
    println!(
        "errors that guests got: {}",
        listed(totals.errors.iter().map(|(kind, n)| format!("{kind} {n}")).collect())
    );
}

fn as_json(totals: &Totals) -> serde_json::Value {
    let failed: Vec<serde_json::Value> = totals
        .failed
        .iter()
        .filter_map(|report| {
            let broken = report.broken.as_ref()?;
            Some(serde_json::json!({
                "seed": report.seed,
                "promise": broken.promise,
                "words": broken.words,
                "at_ns": broken.at.as_nanos(),
                "replay": format!("chaos sim --seed {} --trace", report.seed),
            }))
        })
        .collect();
    serde_json::json!({
        "seeds": totals.seeds,
        "failed": failed,
        "operations": totals.ops,
        "operations_done": totals.done,
        "sessions": totals.sessions,
        "blocks_checked": totals.blocks,
        "blocks_undecided": totals.undecided,
        "probes": totals.probes,
        "frames": totals.frames,
        "copies": totals.copies,
        "fetched": totals.fetched,
        "events": totals.events,
        "virtual_ms": totals.virtual_ms,
        "cpu_us": totals.cpu_us,
        "dearest": { "seed": totals.dearest.1, "cpu_us": totals.dearest.0 },
        "faults": totals.faults,
        "errors": totals.errors,
    })
}

fn prove_store(seeds: Seeds, moment: Option<u64>, json: bool) -> ExitCode {
    let totals = store::run(seeds, moment, |totals| {
        if !json {
            eprintln!("{totals}");
        }
    });
    if json {
        println!("{}", totals.json());
    } else {
        totals.failed.iter().for_each(|failure| println!("{failure}\n"));
        println!("{totals}");
    }
    exit_code(totals.failed.is_empty())
}

fn twice(first: u64, seeds: u64) -> ExitCode {
    for seed in first..first.saturating_add(seeds) {
        let ((one, left), (two, right)) = (run_seed(seed, Keep::All), run_seed(seed, Keep::All));
        if let Some((line, a, b)) = first_difference(&left, &right) {
            println!("seed {seed}: the two runs differ at line {line}:");
            for before in left.lines().take(line).skip(line.saturating_sub(10)) {
                println!("    {before}");
            }
            println!("  1 {a}\n  2 {b}");
            return ExitCode::FAILURE;
        }
        if (one.hash, left.events()) != (two.hash, right.events()) {
            println!(
                "seed {seed}: the texts are equal and the hash chains are not: {:016x} {:016x}",
                one.hash, two.hash
            );
            return ExitCode::FAILURE;
        }
        println!(
            "seed {seed}: {} events, twice the same, trace {:016x}",
            left.events(),
            one.hash
        );
    }
    ExitCode::SUCCESS
}

/// Address space while fuzzing: an input that makes a decoder allocate without bounds ends the process with an error.
const FUZZ_MEMORY_MAX: u64 = 2 << 30;

fn fuzz(target: Option<&str>, seed: u64, runs: u64) -> ExitCode {
    let limit = Rlimit {
        current: Some(FUZZ_MEMORY_MAX),
        maximum: getrlimit(Resource::As).maximum,
    };
    if let Err(error) = setrlimit(Resource::As, limit) {
        println!("memory can't be limited to {FUZZ_MEMORY_MAX} bytes: {error}");
        return ExitCode::FAILURE;
    }
    let chosen = cairn_chaos::fuzz::targets().filter(|candidate| target.is_none_or(|name| candidate.name == name));
    let mut count = 0;
    for target in chosen {
        count += 1;
        if let Err(failure) = cairn_chaos::fuzz::fuzz(target, seed, runs) {
            println!("{failure}");
            return ExitCode::FAILURE;
        }
        let inputs = runs.div_ceil(target.cost);
        println!("{}: {inputs} inputs of seed {seed}: {}", target.name, target.what);
    }
    if count == 0 {
        let names: Vec<&str> = cairn_chaos::fuzz::targets().map(|target| target.name).collect();
        println!("there is no such target: choose one of {}", names.join(", "));
    }
    exit_code(count > 0)
}

#[cfg(feature = "canary")]
fn trace_planted(seed: u64, name: &str) -> ExitCode {
    use cairn_chaos::sim::{canary::Planted, options::Options, run::run};
    let Some(planted) = Planted::ALL.iter().find(|planted| planted.name() == name) else {
        println!("there is no planted bug `{name}`");
        return ExitCode::FAILURE;
    };
    let options = Options {
        planted: Some(*planted),
        ..Options::of_seed(seed)
    };
    let (report, _) = run(options, Keep::Print);
    print_verdict(&report);
    exit_code(report.broken.is_none())
}

#[cfg(feature = "canary")]
fn canary(name: Option<&str>, seeds: u64) -> ExitCode {
    let table = cairn_chaos::sim::canary::hunt(name, seeds, |line| println!("{line}"));
    exit_code(table)
}
