//! `chaos model`: searches the model of the protocol, and leaves out its rules one by one.

#![allow(
    clippy::disallowed_methods,
    reason = "how long a search takes is shown to people, and nothing depends on it"
)]

use std::io::{IsTerminal as _, Write as _};
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::time::Instant;

use cairn_chaos::model::canary;
use cairn_chaos::model::rules::{Rule, Rules};
use cairn_chaos::model::scope::{DEEP, SCOPES, Scope};
use cairn_chaos::model::search::{Bounds, End, Found, search};
use cairn_chaos::model::step::{Action, Model};
use cairn_chaos::model::{story, walk};
use clap::Args;
use serde_json::json;

/// What is searched, and how far.
#[derive(Args)]
pub(crate) struct ModelArgs {
    /// Steps from the start at the most; without it a scope is searched until it has no state left
    #[arg(long)]
    depth: Option<u32>,
    /// Random walks beyond that
    #[arg(long, default_value_t = 20_000)]
    walks: u64,
    /// The first walk's seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only this: leaves out a rule, and tells the shortest story of what goes wrong
    #[arg(long, value_name = "RULE")]
    without: Option<String>,
    /// Only this scope
    #[arg(long)]
    scope: Option<String>,
    /// The larger scopes: hours, and as much memory as is given
    #[arg(long)]
    deep: bool,
    /// Memory for states, in GiB, about
    #[arg(long, default_value_t = 2, value_name = "GIB")]
    memory: u64,
    /// Threads of a search
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Prints scopes and rules
    #[arg(long)]
    list: bool,
    /// The result as one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &ModelArgs) -> ExitCode {
    if args.list {
        list();
        return ExitCode::SUCCESS;
    }
    if let Some(name) = &args.without {
        let Some(rule) = Rule::named(name) else {
            eprintln!("there is no rule `{name}`: `chaos model --list` names them");
            return ExitCode::from(2);
        };
        return without(args, rule);
    }
    let all = SCOPES.iter().chain(DEEP);
    let chosen: Vec<&(Scope, &str)> = match &args.scope {
        Some(name) => all.filter(|(scope, _)| scope.name == name).collect(),
        None if args.deep => DEEP.iter().collect(),
        None => SCOPES.iter().collect(),
    };
    if chosen.is_empty() {
        eprintln!("there is no such scope: `chaos model --list` names them");
        return ExitCode::from(2);
    }
    let mut result = Vec::new();
    let mut good = true;
    for (scope, about) in chosen {
        let (kept, found) = whole(args, *scope, about);
        good &= kept;
        result.push(found);
    }
    let (mut walks, mut canaries) = (json!(null), json!(null));
    if args.scope.is_none() {
        let (kept, found) = random(args);
        good &= kept;
        walks = found;
    }
    if args.scope.is_none() && !args.deep {
        let (kept, found) = all_canaries(args);
        good &= kept;
        canaries = found;
    }
    if args.json {
        println!(
            "{}",
            json!({ "kept": good, "scopes": result, "walks": walks, "canaries": canaries })
        );
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn list() {
    println!("scopes:");
    for (scope, about) in SCOPES.iter().chain(DEEP) {
        println!("  {:<16} {about}", scope.name);
    }
    println!("rules that can be left out:");
    for rule in Rule::ALL {
        println!("  {:<16} {}", rule.name(), rule.left_out());
    }
}

fn bounds(args: &ModelArgs) -> Bounds {
    Bounds {
        depth: args.depth.unwrap_or(u32::MAX),
        memory: args.memory << 30,
        threads: args.threads,
    }
}

/// Tells of the progress on a terminal.
fn progress(name: &'static str, quiet: bool) -> impl FnMut(u64, u32, usize) -> ControlFlow<()> {
    let shown = std::io::stderr().is_terminal() && !quiet;
    move |states, depth, layer| {
        if shown {
            let mut err = std::io::stderr();
            let _ = write!(
                err,
                "\r{name}: {states} states, depth {depth}, {layer} to go on from   \r"
            );
            let _ = err.flush();
        }
        ControlFlow::Continue(())
    }
}

fn end_of(found: &Found) -> &'static str {
    match found.end {
        End::Complete => "all of them",
        End::Depth => "all up to that depth",
        End::Memory => "all up to that depth, then the memory was full",
        End::Stopped => "stopped",
        End::Broken => "BROKEN",
    }
}

fn whole(args: &ModelArgs, scope: Scope, about: &str) -> (bool, serde_json::Value) {
    let model = Model {
        rules: Rules::ALL,
        scope,
    };
    let begun = Instant::now();
    let found = search(&model, &scope.start(), bounds(args), progress(scope.name, args.json));
    let took = begun.elapsed().as_secs_f64();
    if !args.json {
        println!(
            "{}: {} states, {} steps, depth {}: {}{}; {took:.1} s ({about})",
            scope.name,
            found.states,
            found.steps,
            found.depth,
            end_of(&found),
            if found.crowded {
                ", but messages were lost for want of room"
            } else {
                ""
            },
        );
        if let Some((_, way)) = &found.broken {
            tell(&model, way);
        }
    }
    let kept = found.broken.is_none() && !found.crowded;
    let value = json!({
        "scope": scope.name,
        "states": found.states,
        "steps": found.steps,
        "depth": found.depth,
        "end": format!("{:?}", found.end),
        "crowded": found.crowded,
        "broken": found.broken.map(|(broken, _)| broken.to_string()),
        "seconds": took,
    });
    (kept, value)
}

/// Tells a way from the start.
fn tell(model: &Model, way: &[Action]) {
    let (lines, broken) = story::tell(model, &model.scope.start(), way);
    for (number, line) in lines.iter().enumerate() {
        println!("  {:>3} {line}", number + 1);
    }
    if let Some(broken) = broken {
        println!("      {broken}");
    }
}

fn random(args: &ModelArgs) -> (bool, serde_json::Value) {
    let begun = Instant::now();
    let threads = args.threads.max(1) as u64;
    let walk_some = |thread: u64| {
        let mut sums = [0_u64; 5];
        let mut broken = None;
        for seed in (args.seed..args.seed.saturating_add(args.walks)).filter(|seed| seed % threads == thread) {
            let report = walk::walk(Rules::ALL, seed);
            let counts: [u64; 5] = [
                report.steps.into(),
                report.attachments.into(),
                report.changes.into(),
                report.acknowledged.into(),
                report.crowded.into(),
            ];
            for (sum, count) in sums.iter_mut().zip(counts) {
                *sum += count;
            }
            if report.broken.is_some() {
                broken = Some((seed, report));
                break;
            }
        }
        (sums, broken)
    };
    let mut sums = [0_u64; 5];
    let mut broken = None;
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                let walk_some = &walk_some;
                scope.spawn(move || walk_some(thread))
            })
            .collect();
        for worker in workers {
            let (counts, found) = worker.join().expect("a walk panics only if the model is wrong");
            for (sum, count) in sums.iter_mut().zip(counts) {
                *sum += count;
            }
            broken = broken.take().or(found);
        }
    });
    let [steps, attachments, changes, acknowledged, crowded] = sums;
    let took = begun.elapsed().as_secs_f64();
    if !args.json {
        println!(
            "random walks: {} from seed {}, {steps} steps, {attachments} attachments, {changes} changes; {acknowledged} with \
             acknowledged writes; progress judged in {}; {took:.1} s",
            args.walks,
            args.seed,
            args.walks - crowded,
        );
        if let Some((seed, report)) = &broken {
            println!("walk {seed} BROKEN");
            if let Some((why, way)) = &report.broken {
                tell(&walk::whole_model(Rules::ALL, *seed), way);
                println!("      {why}");
            }
        }
    }
    let value = json!({
        "walks": args.walks,
        "first_seed": args.seed,
        "steps": steps,
        "attachments": attachments,
        "changes": changes,
        "crowded": crowded,
        "broken_seed": broken.as_ref().map(|(seed, _)| seed),
        "seconds": took,
    });
    (broken.is_none(), value)
}

/// Leaves out one rule, and tells what goes wrong.
fn without(args: &ModelArgs, rule: Rule) -> ExitCode {
    let canary = canary::of(rule);
    let begun = Instant::now();
    let found = canary.hunt(canary.from_start, bounds(args), progress(rule.name(), args.json));
    let took = begun.elapsed().as_secs_f64();
    let value = canary_value(rule, &found, took);
    if args.json {
        println!("{value}");
    } else {
        println!("without rule {rule}: {}", rule.left_out());
        let from = if canary.from_start {
            "the start"
        } else {
            "a beginning that is given"
        };
        println!(
            "{} states from {from}, {took:.1} s: {}",
            found.states,
            if found.broken.is_some() {
                "a promise is broken"
            } else {
                "NOTHING FOUND"
            }
        );
        if let Some((_, way)) = &found.broken {
            let model = Model {
                rules: Rules::without(rule),
                scope: canary.scope,
            };
            tell(&model, way);
        }
    }
    if found.broken.is_some() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn canary_value(rule: Rule, found: &Found, took: f64) -> serde_json::Value {
    json!({
        "without": rule.name(),
        "found": found.broken.is_some(),
        "states": found.states,
        "steps_to_it": found.broken.as_ref().map(|(_, way)| way.len()),
        "broken": found.broken.as_ref().map(|(broken, _)| broken.to_string()),
        "seconds": took,
    })
}

fn all_canaries(args: &ModelArgs) -> (bool, serde_json::Value) {
    let mut values = Vec::new();
    let mut good = true;
    if !args.json {
        println!("rules left out, one by one: states, steps of the shortest story, what is broken");
    }
    for rule in Rule::ALL {
        let canary = canary::of(*rule);
        let begun = Instant::now();
        let found = canary.hunt(canary.from_start, bounds(args), progress(rule.name(), args.json));
        let took = begun.elapsed().as_secs_f64();
        good &= found.broken.is_some();
        values.push(canary_value(*rule, &found, took));
        if !args.json {
            let from = if canary.from_start {
                ""
            } else {
                ", from a given beginning"
            };
            match &found.broken {
                Some((broken, way)) => println!("  {rule:<15} {:>8} {:>3}{from}: {broken}", found.states, way.len()),
                None => println!("  {rule:<15} {:>8}    {from}: NOT FOUND", found.states),
            }
        }
    }
    (good, json!(values))
}
