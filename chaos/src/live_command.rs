//! `chaos live` and `chaos nightly`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use cairn_chaos::live::cluster::ClusterOptions;
use cairn_chaos::live::operators;
use cairn_chaos::live::planted;
use cairn_chaos::live::report::{FailureKind, Timeline};
use cairn_chaos::live::run::{RunOptions, VolumeOptions};
use cairn_chaos::live::scenario::{self, Outcome, Plan, Scenario, quantiles};
use cairn_chaos::live::stop;
use cairn_chaos::live::tools;
use clap::{Args, ValueEnum};

/// Bytes of each node's device; it takes space only as it is written.
const DEVICE_BYTES: u64 = 1 << 30;

/// After what silence the copies of a node are made anew elsewhere: longer than most faults last.
const REBUILD_AFTER: Duration = Duration::from_secs(15);

/// Arguments of `chaos live`.
#[derive(Args)]
pub(crate) struct LiveArgs {
    /// Chooses what happens
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// For so many minutes; without it every fault once, or as many cuts as there are to be
    #[arg(long)]
    minutes: Option<f64>,
    /// Only this fault, by its name here or in the catalogue; may be repeated
    #[arg(long)]
    only: Vec<String>,
    /// Which story
    #[arg(long, value_enum, default_value_t = Story::Faults)]
    scenario: Story,
    /// With `--scenario power`: how often the power of everything is cut
    #[arg(long, default_value_t = 20)]
    cuts: u64,
    /// With `--scenario operators`: how many steps
    #[arg(long, default_value_t = 100)]
    steps: usize,
    /// The program is a build with the feature `canary`, and has this bug
    #[arg(long)]
    planted: Option<String>,
    #[command(flatten)]
    place: PlaceArgs,
}

/// Where, and how it is told.
#[derive(Clone, Args)]
pub(crate) struct PlaceArgs {
    /// The `cairn` to try [default: the one beside this program, or on PATH]
    #[arg(long)]
    pub(crate) program: Option<PathBuf>,
    /// Where everything is kept, by a short path [default: a new directory for temporary files]
    #[arg(long)]
    pub(crate) dir: Option<PathBuf>,
    /// Storage nodes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(3..=9))]
    nodes: u8,
    /// Racks that nodes stand in, in turn, with copies of volumes in distinct racks [default: none]
    #[arg(long, value_parser = clap::value_parser!(u8).range(3..=9))]
    racks: Option<u8>,
    /// Nodes use their device files directly; without faults of devices (power cuts kill all processes, and no more)
    #[arg(long)]
    no_shims: bool,
    /// Processes reach each other directly; without faults of the network
    #[arg(long)]
    no_proxies: bool,
    /// Each process is in a network namespace of its own, where ways between two of them are cut, instead of behind a proxy. It needs
    /// root and `ip`
    #[arg(long, conflicts_with = "no_proxies")]
    namespaces: bool,
    /// Devices call flushes done that they have not done: it must fail, or it proves nothing
    #[arg(long, conflicts_with = "no_shims")]
    lying_flushes: bool,
    /// Metadata servers keep their files on disks behind shims, which lose power as those of nodes do. It needs root and loop devices
    #[arg(long, conflicts_with = "no_shims")]
    meta_disks: bool,
    /// A virtual machine of QEMU works beside the guests: ext4, files that are synced, and its power goes now and then
    #[arg(long)]
    guest: bool,
    /// Keeps the directory of a run that did not fail, too
    #[arg(long)]
    pub(crate) keep: bool,
    /// Says nothing while it runs
    #[arg(long)]
    quiet: bool,
    /// The result as one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Story {
    /// Every fault in turn
    Faults,
    /// Faults drawn at random, until the minutes are over
    Random,
    /// Cuts of the power of everything
    Power,
    /// What operators do, at random, against a model
    Operators,
    /// Strangers at every socket, for three minutes or as told
    Garbage,
}

/// Arguments of `chaos nightly`.
#[derive(Args)]
pub(crate) struct NightlyArgs {
    /// Chooses what happens
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// For so many minutes, after what operators do
    #[arg(long, default_value_t = 30.0)]
    minutes: f64,
    #[command(flatten)]
    place: PlaceArgs,
}

/// Steps of the walk of operators that begins a night.
const NIGHTLY_STEPS: usize = 60;

/// The night's words on standard output are one line with `--quiet`; its directory is kept if it failed; the exit code says how.
pub(crate) fn nightly(args: &NightlyArgs) -> ExitCode {
    if let Err(code) = operators(&args.place, args.seed, NIGHTLY_STEPS) {
        return code;
    }
    let span = Duration::from_secs_f64(args.minutes * 60.0);
    let plan = Plan {
        scenario: Scenario::Nightly,
        only: Vec::new(),
        span: Some(span),
    };
    let (outcome, dir) = match outcome(&args.place, args.seed, &plan, None) {
        Ok(outcome) => outcome,
        Err(code) => return code,
    };
    if args.place.json {
        println!("{}", outcome.json(args.seed));
    } else {
        if !args.place.quiet {
            println!("{}", outcome.table);
        }
        println!("{}", night(&outcome, args.seed));
    }
    end(&args.place, &outcome, &dir)
}

/// A night in one line.
fn night(outcome: &Outcome, seed: u64) -> String {
    let rows = outcome.table.rows();
    let faults: u64 = rows.iter().map(|row| row.times).sum();
    let ios: u64 = rows.iter().map(|row| row.tally.done).sum();
    let minutes = outcome.took.as_secs_f64() / 60.0;
    let what = format!(
        "seed {seed}, {NIGHTLY_STEPS} steps of operators, {minutes:.1} minutes, {faults} faults of {} kinds, {ios} I/Os checked",
        rows.len()
    );
    match (&outcome.failure, outcome.first_io.last()) {
        (Some((failure, _)), _) if failure.kind == FailureKind::Stopped => {
            format!("night STOPPED: {} ({what})", failure.words)
        }
        (Some((failure, dir)), _) => {
            let (kind, words) = (failure.kind.name(), &failure.words);
            format!(
                "night FAILED: {kind}: {words} ({what}); all that is known of it is in {}",
                dir.display()
            )
        }
        (None, Some(first_io)) => format!(
            "night ok: {what}; the power of everything failed last, and all guests were answered {:.1} s after it was back",
            first_io.as_secs_f64()
        ),
        (None, None) => format!("night ok: {what}"),
    }
}

/// A walk of operators on a cluster of its own.
fn operators(place: &PlaceArgs, seed: u64, steps: usize) -> Result<(), ExitCode> {
    listen()?;
    let dir = new_dir(place, "operators-")?;
    let options = cluster_options(place, dir.clone())?;
    let steps = operators::walk(seed, steps);
    let mut timeline = match std::fs::create_dir_all(&dir) {
        Ok(()) => Timeline::new(&dir, !place.quiet),
        Err(error) => {
            eprintln!("{} can't be made: {error}; say --dir DIR", dir.display());
            return Err(ExitCode::from(2));
        }
    };
    let mut count = 0;
    let mut dirs = || {
        count += 1;
        dir.join(format!("walk-{count}"))
    };
    let result = operators::play_and_shrink(&options, &steps, &mut timeline, &mut dirs);
    match result {
        Err(failure) if failure.kind == FailureKind::Stopped => {
            println!("seed {seed}: a walk of operators: {failure}");
            if !place.keep {
                // What stays behind is in nobody's way.
                let _ = std::fs::remove_dir_all(&dir);
            }
            Err(ExitCode::from(failure.kind.exit_code()))
        }
        Ok(()) => {
            if !place.quiet {
                eprintln!(
                    "seed {seed}: a walk of {} steps of operators, all as it must be",
                    steps.len()
                );
            }
            if !place.keep {
                // As above.
                let _ = std::fs::remove_dir_all(&dir);
            }
            Ok(())
        }
        Err(failure) => {
            println!("seed {seed}: a walk of operators FAILED: {failure}");
            println!("  everything that is known of it is in {}", dir.display());
            Err(ExitCode::from(failure.kind.exit_code()))
        }
    }
}

fn new_dir(place: &PlaceArgs, prefix: &str) -> Result<PathBuf, ExitCode> {
    if let Some(dir) = &place.dir {
        let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.clone());
        return Ok(if prefix.is_empty() {
            dir
        } else {
            dir.join(prefix.trim_end_matches('-'))
        });
    }
    let made = tempfile::Builder::new().prefix(&format!("cairn-{prefix}")).tempdir();
    made.map(tempfile::TempDir::keep).map_err(|error| {
        eprintln!("a directory for temporary files can't be made: {error}; say --dir DIR");
        ExitCode::from(2)
    })
}

fn cluster_options(place: &PlaceArgs, dir: PathBuf) -> Result<ClusterOptions, ExitCode> {
    let Some(program) = place.program.clone().or_else(beside).or_else(|| tools::find("cairn")) else {
        eprintln!("there is no `cairn` beside this program or on PATH: build it, or say --program FILE");
        return Err(ExitCode::from(2));
    };
    Ok(ClusterOptions {
        program: std::path::absolute(&program).unwrap_or(program),
        dir,
        metas: 3,
        nodes: place.nodes,
        device_bytes: DEVICE_BYTES,
        rebuild_after: REBUILD_AFTER,
        env: Vec::new(),
    })
}

pub(crate) fn run(args: &LiveArgs) -> ExitCode {
    if let Err(name) = scenario::chosen(&args.only) {
        eprintln!("there is no fault `{name}`: `chaos live --help` and `chaos list` name them");
        return ExitCode::from(2);
    }
    if args.scenario == Story::Random && args.minutes.is_none() {
        eprintln!("--scenario random needs --minutes");
        return ExitCode::from(2);
    }
    if args.scenario == Story::Operators {
        return operators(&args.place, args.seed, args.steps)
            .err()
            .unwrap_or(ExitCode::SUCCESS);
    }
    let plan = Plan {
        scenario: match args.scenario {
            Story::Faults | Story::Operators => Scenario::Faults,
            Story::Random => Scenario::Random,
            Story::Power => Scenario::Power(args.cuts),
            Story::Garbage => Scenario::Garbage,
        },
        only: args.only.clone(),
        span: args.minutes.map(|minutes| Duration::from_secs_f64(minutes * 60.0)),
    };
    play(&args.place, args.seed, &plan, args.planted.as_deref())
}

/// Plays a plan on a new cluster, with a planted bug or without; what came of it, and where.
pub(crate) fn outcome(
    place: &PlaceArgs,
    seed: u64,
    plan: &Plan,
    bug: Option<&str>,
) -> Result<(Outcome, PathBuf), ExitCode> {
    listen()?;
    let mut cluster = cluster_options(place, new_dir(place, "")?)?;
    cluster
        .env
        .extend(bug.map(|bug| (planted::VARIABLE.to_string(), bug.to_string())));
    let dir = cluster.dir.clone();
    let volume = |name: &str, mib: u64, export| VolumeOptions {
        name: name.to_string(),
        bytes: mib << 20,
        export,
    };
    let options = RunOptions {
        cluster,
        seed,
        volumes: vec![volume("a", 192, 1), volume("b", 64, 1), volume("c", 128, 2)],
        has_shims: !place.no_shims,
        has_lying_flushes: place.lying_flushes,
        has_proxies: !place.no_proxies,
        has_namespaces: place.namespaces,
        racks: place.racks.unwrap_or(0),
        has_meta_disks: place.meta_disks,
        has_vm: place.guest,
        is_told: !place.quiet,
    };
    Ok((scenario::run(options, plan), dir))
}

/// The same; tells it, and gives the exit code.
pub(crate) fn play(place: &PlaceArgs, seed: u64, plan: &Plan, bug: Option<&str>) -> ExitCode {
    let (outcome, dir) = match outcome(place, seed, plan, bug) {
        Ok(outcome) => outcome,
        Err(code) => return code,
    };
    if place.json {
        println!("{}", outcome.json(seed));
    } else {
        tell(&outcome, seed);
    }
    end(place, &outcome, &dir)
}

/// The exit code; the directory goes unless it is wanted or there is something in it to be looked into.
fn end(place: &PlaceArgs, outcome: &Outcome, dir: &Path) -> ExitCode {
    let kind = outcome.failure.as_ref().map(|(failure, _)| failure.kind);
    if !place.keep && matches!(kind, None | Some(FailureKind::Stopped)) {
        // What stays behind is in nobody's way.
        let _ = std::fs::remove_dir_all(dir);
    }
    kind.map_or(ExitCode::SUCCESS, |kind| ExitCode::from(kind.exit_code()))
}

/// From now on signals end all that runs, in order.
fn listen() -> Result<(), ExitCode> {
    stop::listen().map_err(|words| {
        eprintln!("{words}");
        ExitCode::from(2)
    })
}

/// The `cairn` in the directory of this program.
fn beside() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?.with_file_name("cairn");
    program.is_file().then_some(program)
}

fn tell(outcome: &Outcome, seed: u64) {
    println!("{}", outcome.table);
    if !outcome.first_io.is_empty() {
        let (least, median, most) = quantiles(&outcome.first_io);
        println!(
            "{} cuts of the power of everything; until all guests were answered: {least} ms at least, {median} ms median, {most} ms at most",
            outcome.first_io.len()
        );
    }
    let minutes = outcome.took.as_secs_f64() / 60.0;
    match &outcome.failure {
        None => println!("seed {seed}: {minutes:.1} minutes, all promises kept"),
        Some((failure, _)) if failure.kind == FailureKind::Stopped => {
            println!("seed {seed}: {minutes:.1} minutes: {failure}");
        }
        Some((failure, dir)) => {
            println!("seed {seed}: FAILED after {minutes:.1} minutes: {failure}");
            println!("  everything that is known of it is in {}", dir.display());
        }
    }
}
