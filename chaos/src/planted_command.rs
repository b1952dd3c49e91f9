//! `chaos planted`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use cairn_chaos::live::planted::{BOUND, HUNTS, Hunt, NONE, SOUND};
use cairn_chaos::live::report::{Failure, FailureKind};
use clap::Args;

use crate::live_command::{PlaceArgs, outcome};

/// Arguments of `chaos planted`.
#[derive(Args)]
pub(crate) struct PlantedArgs {
    /// Only this bug
    #[arg(long)]
    name: Option<String>,
    /// Chooses what happens
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A `cairn` without planted bugs, in which the same faults must find nothing [default: the same program, told to have none]
    #[arg(long)]
    sound: Option<PathBuf>,
    /// For how many seconds they are tried without the bug
    #[arg(long, value_name = "SECONDS", default_value_t = SOUND.as_secs())]
    sound_for: u64,
    #[command(flatten)]
    place: PlaceArgs,
}

/// One line of the table.
struct Row {
    hunt: &'static Hunt,
    /// How a run with the bug ended, and after how many seconds.
    found: (Option<Failure>, f64),
    /// The same without it.
    sound: (Option<Failure>, f64),
}

impl Row {
    fn is_good(&self) -> bool {
        let is_found = self
            .found
            .0
            .as_ref()
            .is_some_and(|failure| self.hunt.shows_as.contains(&failure.kind));
        is_found && self.sound.0.is_none()
    }

    fn line(&self) -> String {
        let told = |(failure, seconds): &(Option<Failure>, f64), good: &str| {
            let kind = failure.as_ref().map_or(good, |failure| failure.kind.name());
            format!("{kind}, {seconds:.0} s")
        };
        format!(
            "| {:<20} | {:<11} | {:<34} | {:<18} | {:<18} |",
            self.hunt.bug,
            self.hunt.component,
            self.hunt.faults.join(", "),
            told(&self.found, "nothing"),
            told(&self.sound, "ok")
        )
    }
}

pub(crate) fn run(args: &PlantedArgs) -> ExitCode {
    let hunts: Vec<&Hunt> = match &args.name {
        None => HUNTS.iter().collect(),
        Some(name) => match Hunt::of(name) {
            Some(hunt) => vec![hunt],
            None => {
                let all: Vec<&str> = HUNTS.iter().map(|hunt| hunt.bug).collect();
                eprintln!(
                    "`{name}` is no bug that real processes are tried with: there are {}",
                    all.join(", ")
                );
                return ExitCode::from(2);
            }
        },
    };
    let mut rows = Vec::new();
    for hunt in hunts {
        let tried = try_one(args, hunt);
        match tried {
            Ok(row) => rows.push(row),
            Err(code) => return code,
        }
    }
    println!(
        "| {:<20} | {:<11} | {:<34} | {:<18} | {:<18} |",
        "bug", "component", "faults", "found as, after", "without it, for"
    );
    println!("|{:-<22}|{:-<13}|{:-<36}|{:-<20}|{:-<20}|", "", "", "", "", "");
    for row in &rows {
        println!("{}", row.line());
    }
    let missed: Vec<&str> = rows
        .iter()
        .filter(|row| !row.is_good())
        .map(|row| row.hunt.bug)
        .collect();
    if missed.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("NOT AS IT MUST BE within {BOUND:?}: {}", missed.join(", "));
    ExitCode::FAILURE
}

fn try_one(args: &PlantedArgs, hunt: &'static Hunt) -> Result<Row, ExitCode> {
    let name = hunt.bug;
    let found = play(args, hunt, true)?;
    let sound = play(args, hunt, false)?;
    let row = Row { hunt, found, sound };
    eprintln!("{name}: {}", if row.is_good() { "found" } else { "NOT AS IT MUST BE" });
    Ok(row)
}

fn play(args: &PlantedArgs, hunt: &Hunt, is_planted: bool) -> Result<(Option<Failure>, f64), ExitCode> {
    let mut place = args.place.clone();
    let bug = match (is_planted, &args.sound) {
        (true, _) => Some(hunt.bug),
        (false, None) => Some(NONE),
        (false, Some(_)) => None,
    };
    let span = if is_planted {
        BOUND
    } else {
        Duration::from_secs(args.sound_for)
    };
    place.dir = place
        .dir
        .map(|dir| dir.join(if is_planted { hunt.bug } else { "sound" }));
    if !is_planted && args.sound.is_some() {
        place.program.clone_from(&args.sound);
    }
    let (outcome, dir) = outcome(&place, args.seed, &hunt.plan(span), bug)?;
    let failure = outcome.failure.map(|(failure, _)| failure);
    if let Some(failure) = &failure {
        let which = if is_planted { hunt.bug } else { "without it" };
        eprintln!("{which}: {}: {}", failure.kind.name(), failure.words);
        if failure.kind == FailureKind::Stopped {
            return Err(ExitCode::from(failure.kind.exit_code()));
        }
        if failure.kind == FailureKind::Setup {
            eprintln!("a build with the feature `canary` is needed: say --program FILE");
            return Err(ExitCode::from(failure.kind.exit_code()));
        }
    }
    let is_expected = failure.is_some() == is_planted;
    if is_expected && !place.keep {
        // What stays behind is in nobody's way.
        let _ = std::fs::remove_dir_all(&dir);
    }
    Ok((failure, outcome.took.as_secs_f64()))
}
