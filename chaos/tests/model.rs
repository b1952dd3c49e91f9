//! The model of the replication protocol: with all rules the promises hold, and without any one of them they do not.

use std::ops::ControlFlow;

use cairn_chaos::model::canary;
use cairn_chaos::model::message::{End, Message};
use cairn_chaos::model::rules::{Rule, Rules};
use cairn_chaos::model::scope::{DEEP, Reads, SCOPES, Scope};
use cairn_chaos::model::search::{self, Bounds, Found, search};
use cairn_chaos::model::state::State;
use cairn_chaos::model::step::{Action, Fate, Model};
use cairn_chaos::model::{story, walk};

/// One thread, so that the same is found each time.
const BOUNDS: Bounds = Bounds {
    depth: u32::MAX,
    memory: 512 << 20,
    threads: 1,
};

fn on(_: u64, _: u32, _: usize) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn whole(scope: Scope) -> Found {
    let model = Model {
        rules: Rules::ALL,
        scope,
    };
    search(&model, &scope.start(), BOUNDS, on)
}

#[track_caller]
fn assert_kept(found: &Found) {
    assert_eq!(found.broken, None);
    assert_eq!(found.end, search::End::Complete);
    assert!(!found.crowded, "messages were lost for want of room");
}

#[test]
fn without_any_one_rule_a_promise_is_broken() {
    for rule in Rule::ALL {
        let canary = canary::of(*rule);
        let found = canary.hunt(false, BOUNDS, on);
        let (broken, way) = found
            .broken
            .unwrap_or_else(|| panic!("rule {rule} can be left out and nothing happens: {:?}", found.end));
        let model = Model {
            rules: Rules::without(*rule),
            scope: canary.scope,
        };
        let (lines, told) = story::tell(&model, &canary.scope.start(), &way);
        assert_eq!(lines.len(), way.len());
        let told = told.expect("the story ends with what is broken");
        assert_eq!(
            std::mem::discriminant(&told),
            std::mem::discriminant(&broken),
            "rule {rule}"
        );
        println!("without rule {rule}: {}", rule.left_out());
        println!("  {}\n  {told}\n", lines.join("\n  "));
    }
}

#[test]
fn with_all_rules_nothing_is_broken_where_a_missing_one_shows() {
    for rule in Rule::ALL {
        let canary = canary::of(*rule);
        let (model, state, _) = canary.start(Rules::ALL, false);
        let bounds = Bounds { depth: 7, ..BOUNDS };
        let found = search(&model, &state, bounds, on);
        assert_eq!(found.broken, None, "the beginning for rule {rule}");
    }
}

#[test]
fn a_take_over_with_an_ejection_keeps_the_promises() {
    let scope = Scope {
        ejects: true,
        changes: 1,
        reads: Reads::Confirmed,
        writes: [1, 0, 0, 0],
        ..Scope::plain("take-over")
    };
    let found = whole(scope);
    assert_kept(&found);
    assert!(found.states > 1000, "{}", found.states);
}

#[test]
fn a_joining_spare_keeps_the_promises() {
    let scope = Scope {
        joins: true,
        changes: 2,
        holders: 1,
        reads: Reads::Confirmed,
        ..Scope::plain("joins")
    };
    assert_kept(&whole(scope));
}

#[test]
fn discards_and_dropped_tombstones_keep_the_promises() {
    let scope = Scope {
        discards: true,
        holders: 1,
        writes: [2, 0, 0, 0],
        reads: Reads::Confirmed,
        ..Scope::plain("discards")
    };
    assert_kept(&whole(scope));
}

#[test]
fn random_walks_keep_the_promises_and_go_on_with_one_member_dead() {
    let mut changes = 0;
    let mut judged = 0;
    for seed in 1..=150 {
        let report = walk::walk(Rules::ALL, seed);
        if let Some((broken, way)) = report.broken {
            let model = walk::whole_model(Rules::ALL, seed);
            let (lines, _) = story::tell(&model, &model.scope.start(), &way);
            panic!("walk {seed}:\n  {}\n{broken}", lines.join("\n  "));
        }
        changes += u32::from(report.changes);
        judged += u32::from(!report.crowded);
    }
    assert!(changes > 150, "walks change configurations: {changes}");
    assert!(judged > 75, "most walks end with a look at progress: {judged}");
}

#[test]
fn a_walk_goes_the_same_way_each_time() {
    let (one, two) = (walk::walk(Rules::ALL, 7), walk::walk(Rules::ALL, 7));
    assert_eq!(
        (one.steps, one.attachments, one.changes),
        (two.steps, two.attachments, two.changes)
    );
}

#[test]
fn two_threads_see_what_one_sees() {
    let scope = Scope {
        ejects: true,
        changes: 1,
        ..Scope::plain("threads")
    };
    let model = Model {
        rules: Rules::ALL,
        scope,
    };
    let two = search(&model, &scope.start(), Bounds { threads: 2, ..BOUNDS }, on);
    let one = search(&model, &scope.start(), BOUNDS, on);
    assert_eq!(
        (one.states, one.steps, one.depth, one.end),
        (two.states, two.steps, two.depth, two.end)
    );
}

/// The states that follow when that device is ejected, or gets the write first.
fn named(device: u8) -> (State, State) {
    let scope = Scope {
        ejects: true,
        changes: 1,
        ..Scope::plain("names")
    };
    let model = Model {
        rules: Rules::ALL,
        scope,
    };
    let step = |state: &State, action| model.step(state, action).expect("it can happen").state;
    let holder = 1;
    let ejected = step(&scope.start(), Action::Eject { holder, device });
    let (block, discard) = (0, false);
    let writing = Action::Write { holder, block, discard };
    let written = step(&scope.start(), writing);
    let to_device = |message: &Message| message.end() == End::To(device);
    let message = written.net.iter().find(to_device).expect("it was sent");
    (ejected, step(&written, Action::Arrive(message, Fate::Late)))
}

#[test]
fn states_that_differ_by_names_of_devices_are_one() {
    let (ejected, written) = named(0);
    for other in [1, 2] {
        let (also_ejected, also_written) = named(other);
        assert!(ejected != also_ejected && written != also_written);
        assert_eq!(ejected.fingerprint(), also_ejected.fingerprint());
        assert_eq!(written.fingerprint(), also_written.fingerprint());
    }
    assert_ne!(ejected.fingerprint(), written.fingerprint());
    // The spare is no other name of a member.
    let mut moved = ejected.clone();
    moved.devices.swap(0, 3);
    assert_ne!(moved.fingerprint(), ejected.fingerprint());
}

#[test]
fn a_search_ends_at_its_bounds() {
    let model = Model {
        rules: Rules::ALL,
        scope: DEEP[0].0,
    };
    let start = model.scope.start();
    let shallow = search(&model, &start, Bounds { depth: 4, ..BOUNDS }, on);
    assert_eq!((shallow.end, shallow.depth), (search::End::Depth, 4));
    let small = search(
        &model,
        &start,
        Bounds {
            memory: 2 << 20,
            ..BOUNDS
        },
        on,
    );
    assert_eq!(small.end, search::End::Memory);
    let stopped = search(&model, &start, BOUNDS, |_, depth, _| {
        if depth < 3 {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    });
    assert_eq!((stopped.end, stopped.depth), (search::End::Stopped, 3));
}

#[test]
fn scopes_and_rules_have_names_of_their_own() {
    let scopes = SCOPES.iter().chain(DEEP).map(|(scope, _)| scope.name);
    let names: Vec<&str> = scopes.chain(Rule::ALL.iter().map(|rule| rule.name())).collect();
    let mut once = names.clone();
    once.sort_unstable();
    once.dedup();
    assert_eq!(once.len(), names.len());
    for rule in Rule::ALL {
        assert_eq!(Rule::named(rule.name()), Some(*rule));
    }
}
