use super::*;

const VOLUME: VolumeId = VolumeId(7);
const GRANT: Duration = Duration::from_secs(1);

fn holder(generation: u32) -> Holder {
    Holder {
        volume: VOLUME,
        generation: Generation::new(generation).unwrap(),
    }
}

fn at(ms: u64) -> Time {
    Time::from_nanos(ms * 1_000_000)
}

fn fresh() -> ReplicaRules {
    ReplicaRules::new(at(0), GRANT, [])
}

/// Seals, makes durable and opens.
fn take(rules: &mut ReplicaRules, now: Time, generation: u32) {
    assert_eq!(rules.seal(holder(generation)), SealStep::MakeDurable);
    rules.made_durable(holder(generation));
    assert_eq!(rules.open(now, holder(generation)), Opening::Open);
}

#[test]
fn only_the_open_generation_is_served() {
    let mut rules = fresh();
    assert_eq!(rules.admit(holder(1)), Err(Refusal::NotSealed));
    take(&mut rules, at(0), 2);
    assert_eq!(rules.admit(holder(1)), Err(Refusal::Fenced(holder(2).generation)));
    assert_eq!(rules.admit(holder(2)), Ok(()));
    assert_eq!(rules.admit(holder(3)), Err(Refusal::NotSealed));
    assert_eq!(rules.seal(holder(1)), SealStep::Fenced(holder(2).generation));
    assert_eq!(rules.seal(holder(2)), SealStep::Durable);
}

#[test]
fn a_seal_fences_at_once_and_serves_only_when_it_is_durable() {
    let mut rules = fresh();
    take(&mut rules, at(0), 1);
    assert_eq!(rules.seal(holder(2)), SealStep::MakeDurable);
    assert_eq!(rules.admit(holder(1)), Err(Refusal::Fenced(holder(2).generation)));
    assert_eq!(rules.admit(holder(2)), Err(Refusal::NotSealed));
    assert_eq!(rules.open(at(0), holder(2)), Opening::NotDurable);
    rules.made_durable(holder(2));
    assert_eq!(rules.open(at(0), holder(2)), Opening::Open);
    assert_eq!(rules.admit(holder(2)), Ok(()));
}

#[test]
fn a_seal_waits_for_writes_that_were_accepted_before_it() {
    let mut rules = fresh();
    take(&mut rules, at(0), 1);
    rules.accepted(holder(1));
    rules.accepted(holder(1));
    rules.seal(holder(2));
    rules.made_durable(holder(2));
    assert_eq!(rules.open(at(1), holder(2)), Opening::InFlight(2));
    rules.ended(holder(1));
    assert_eq!(rules.open(at(1), holder(2)), Opening::InFlight(1));
    rules.ended(holder(1));
    assert_eq!(rules.open(at(1), holder(2)), Opening::Open);
}

#[test]
fn a_seal_waits_until_the_older_holders_grant_has_run_out() {
    let mut rules = fresh();
    take(&mut rules, at(0), 1);
    assert!(rules.grant(at(100), holder(1)));
    rules.seal(holder(2));
    rules.made_durable(holder(2));
    assert_eq!(rules.open(at(100), holder(2)), Opening::Granted(at(1100)));
    assert!(!rules.grant(at(500), holder(1)), "a fenced holder gets no more");
    assert!(
        !rules.grant(at(500), holder(2)),
        "nor does one that has not been let in"
    );
    assert_eq!(rules.open(at(1099), holder(2)), Opening::Granted(at(1100)));
    assert_eq!(rules.open(at(1100), holder(2)), Opening::Open);
    assert!(rules.grant(at(1100), holder(2)));
}

#[test]
fn a_release_ends_the_grant_and_none_is_given_after_it() {
    let mut rules = fresh();
    take(&mut rules, at(0), 1);
    assert!(rules.grant(at(0), holder(1)));
    rules.release(holder(1));
    assert!(!rules.grant(at(1), holder(1)));
    rules.seal(holder(2));
    rules.made_durable(holder(2));
    assert_eq!(rules.open(at(2), holder(2)), Opening::Open);
}

#[test]
fn a_release_of_somebody_else_ends_nothing() {
    let mut rules = fresh();
    take(&mut rules, at(0), 1);
    rules.release(holder(1));
    take(&mut rules, at(0), 2);
    assert!(rules.grant(at(0), holder(2)));
    rules.release(holder(1));
    rules.seal(holder(3));
    rules.made_durable(holder(3));
    assert_eq!(rules.open(at(1), holder(3)), Opening::Granted(at(1000)));
}

#[test]
fn a_grant_that_nobody_waited_for_still_holds_back_the_one_after() {
    let mut rules = fresh();
    take(&mut rules, at(0), 1);
    assert!(rules.grant(at(0), holder(1)));
    rules.seal(holder(2));
    rules.made_durable(holder(2));
    assert_eq!(rules.open(at(1), holder(2)), Opening::Granted(at(1000)));
    rules.seal(holder(3));
    rules.made_durable(holder(3));
    assert_eq!(rules.open(at(2), holder(2)), Opening::Fenced(holder(3).generation));
    assert_eq!(rules.open(at(2), holder(3)), Opening::Granted(at(1000)));
    rules.release(holder(1));
    assert_eq!(rules.open(at(3), holder(3)), Opening::Open);
}

#[test]
fn after_a_restart_no_seal_is_answered_for_the_time_of_a_grant() {
    let start = at(5000);
    let mut rules = ReplicaRules::new(start, GRANT, [(VOLUME, holder(2).generation)]);
    assert_eq!(rules.seal(holder(1)), SealStep::Fenced(holder(2).generation));
    assert_eq!(rules.admit(holder(2)), Err(Refusal::NotSealed));
    // Also the same generation: its seal may have been held back by an older grant when the device stopped.
    assert_eq!(rules.seal(holder(2)), SealStep::Durable);
    assert_eq!(rules.open(at(5001), holder(2)), Opening::Granted(at(6000)));
    rules.release(holder(2));
    assert_eq!(rules.open(at(5001), holder(2)), Opening::Granted(at(6000)));
    assert_eq!(rules.open(at(6000), holder(2)), Opening::Open);

    let other = Holder {
        volume: VolumeId(8),
        ..holder(1)
    };
    assert_eq!(rules.seal(other), SealStep::MakeDurable);
    rules.made_durable(other);
    assert_eq!(rules.open(start, other), Opening::Open, "it was never granted here");
}
