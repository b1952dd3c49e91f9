//! What a run does from beginning to end.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::foreign;
use super::report::{Failure, FailureKind, Table};
use super::run::{Run, RunOptions};
use super::scenarios::disk::power_cut as cut;
use super::steps::{self, Fault};
use super::stop;

/// Load before the first fault.
const CALM: Duration = Duration::from_secs(2);
/// How long strangers come unless told otherwise.
const GARBAGE_SPAN: Duration = Duration::from_secs(180);
/// Faults that are no part of a mix: they last too long.
const LONG: &[&str] = &[
    "freeze-node-60s",
    "node-gone",
    "node-back",
    "node-lost",
    "rack-gone",
    "device-wiped",
    "device-replaced",
];

/// Which story.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Scenario {
    /// Every fault in turn, again and again until the time is over; at least once.
    Faults,
    /// Faults drawn at random.
    Random,
    /// So many cuts of the power of everything.
    Power(u64),
    /// Strangers at every socket, for as long as the plan says.
    Garbage,
    /// Faults drawn at random, and at the end a cut of the power of everything, from which it returns unattended.
    Nightly,
}

/// How it is told and bounded.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The story.
    pub scenario: Scenario,
    /// Only these faults; all if empty.
    pub only: Vec<String>,
    /// For how long.
    pub span: Option<Duration>,
}

/// What came of a run.
#[derive(Debug)]
pub struct Outcome {
    /// The faults, and what guests saw.
    pub table: Table,
    /// Why it failed, and where everything is that is known of it.
    pub failure: Option<(Failure, std::path::PathBuf)>,
    /// How long it took.
    pub took: Duration,
    /// Times to the first answer for every guest, after cuts of the power of everything.
    pub first_io: Vec<Duration>,
}

impl Outcome {
    /// For programs.
    pub fn json(&self, seed: u64) -> Value {
        let (low, median, high) = quantiles(&self.first_io);
        json!({
            "seed": seed,
            "took_ms": self.took.as_millis() as u64,
            "faults": self.table.json(),
            "power_cuts": self.first_io.len(),
            "first_io_ms": { "min": low, "median": median, "max": high },
            "failure": self.failure.as_ref().map(|(failure, dir)| json!({
                "kind": failure.kind.name(),
                "words": failure.words,
                "story": failure.story,
                "dir": dir,
            })),
        })
    }
}

/// Milliseconds: the least, the median, the most.
pub fn quantiles(spans: &[Duration]) -> (u64, u64, u64) {
    let mut millis: Vec<u64> = spans.iter().map(|span| span.as_millis() as u64).collect();
    millis.sort_unstable();
    let at = |index: usize| millis.get(index).copied().unwrap_or(0);
    (at(0), at(millis.len() / 2), at(millis.len().saturating_sub(1)))
}

/// The faults of these names, all if there are none; the first name that is no fault's. A name that is a fault's own means that
/// fault alone, one of the catalogue all faults that are of its kind.
pub fn chosen(only: &[String]) -> Result<Vec<&'static Fault>, String> {
    for name in only {
        if !steps::all().any(|fault| fault.name == name || fault.catalogue == name) {
            return Err(name.clone());
        }
    }
    let is_own = |name: &str| steps::all().any(|fault| fault.name == name);
    let means = |name: &String, fault: &Fault| fault.name == name || (fault.catalogue == name && !is_own(name));
    let wanted = |fault: &&Fault| only.is_empty() || only.iter().any(|name| means(name, fault));
    Ok(steps::all().filter(wanted).collect())
}

/// Runs it. When it fails everything is kept in the directory of the cluster.
pub fn run(options: RunOptions, plan: &Plan) -> Outcome {
    let begun = Instant::now();
    let dir = options.cluster.dir.clone();
    let mut first_io = Vec::new();
    let mut run = match Run::begin(options) {
        Ok(run) => run,
        Err(failure) => {
            return Outcome {
                table: Table::default(),
                failure: Some((stop::judged(failure), dir)),
                took: begun.elapsed(),
                first_io,
            };
        }
    };
    let result = play(&mut run, plan, begun, &mut first_io).and_then(|()| run.finish());
    let table = run.table.clone();
    let failure = result.err().map(|failure| {
        let failure = stop::judged(failure);
        // Who asks to stop waits for nothing that nobody will look at.
        if failure.kind == FailureKind::Stopped {
            return (failure, dir);
        }
        let dir = run.keep(&failure);
        (failure, dir)
    });
    Outcome {
        table,
        failure,
        took: begun.elapsed(),
        first_io,
    }
}

fn play(run: &mut Run, plan: &Plan, begun: Instant, first_io: &mut Vec<Duration>) -> Result<(), Failure> {
    run.load(CALM)?;
    let faults =
        chosen(&plan.only).map_err(|name| Failure::new(FailureKind::Setup, format!("there is no fault `{name}`")))?;
    let faults: Vec<_> = faults.into_iter().filter(|fault| fault.is_possible(run)).collect();
    let is_over = || plan.span.is_none_or(|span| begun.elapsed() >= span);
    match plan.scenario {
        Scenario::Faults => loop {
            for fault in &faults {
                fault.step(run)?;
                if plan.span.is_some() && is_over() {
                    return Ok(());
                }
            }
            if is_over() {
                return Ok(());
            }
        },
        Scenario::Random | Scenario::Nightly => {
            let named = !plan.only.is_empty();
            let faults: Vec<_> = faults
                .into_iter()
                .filter(|fault| named || !LONG.contains(&fault.name))
                .collect();
            while !is_over() {
                let fault = *run.rng.pick(&faults);
                fault.step(run)?;
            }
            if plan.scenario == Scenario::Nightly {
                power_cut(run, first_io)?;
            }
            Ok(())
        }
        Scenario::Garbage => {
            let span = plan.span.unwrap_or(GARBAGE_SPAN);
            run.step("garbage", Some(steps::PAUSE_MAX), |run| foreign::strangers(run, span))
                .map(drop)
        }
        Scenario::Power(cuts) => {
            for _ in 0..cuts {
                power_cut(run, first_io)?;
                if plan.span.is_some() && is_over() {
                    break;
                }
            }
            Ok(())
        }
    }
}

/// The power of everything fails at a random moment under load; it comes back, everything starts in random order.
pub fn power_cut(run: &mut Run, first_io: &mut Vec<Duration>) -> Result<(), Failure> {
    let recovery = run.step("power-cut", None, cut)?;
    first_io.push(recovery.first_io);
    run.timeline.note(format!(
        "   power cut {}: all guests were answered {:.2} s after the last process was started",
        first_io.len(),
        recovery.first_io.as_secs_f64()
    ));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_chosen_by_their_name_or_the_catalogues() {
        let names = |only: &[&str]| {
            let only: Vec<String> = only.iter().map(ToString::to_string).collect();
            chosen(&only).map(|faults| faults.len())
        };
        assert_eq!(names(&[]), Ok(steps::all().count()));
        assert_eq!(names(&["kill-meta-leader"]), Ok(1));
        assert_eq!(names(&["kill-meta"]), Ok(3));
        assert_eq!(names(&["kill-node"]), Ok(1), "a fault's own name comes first");
        assert_eq!(names(&["zombie", "nonsense"]), Err("nonsense".to_string()));
        assert!(LONG.iter().all(|name| steps::all().any(|fault| fault.name == *name)));
    }

    #[test]
    fn quantiles_of_nothing_are_zero() {
        let millis = |count: &[u64]| {
            count
                .iter()
                .map(|count| Duration::from_millis(*count))
                .collect::<Vec<_>>()
        };
        assert_eq!(quantiles(&[]), (0, 0, 0));
        assert_eq!(quantiles(&millis(&[5, 1, 3])), (1, 3, 5));
    }
}
