//! Two exports, one volume: the first is frozen in mid-write, a second one takes the volume over, the first goes on. Nothing
//! that it does from then on may be acknowledged or visible, and what its guests read must be current or an error.
//!
//! The checker's rule "one writer at a time" finds an acknowledgement, its order of attachments finds content that comes up
//! late, and a read of an older attachment must fit the one history of the volume like any other.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::cluster::Part;
use super::guest::{Disk, Guest, Place};
use super::report::{Failure, FailureKind};
use super::run::{IO_BOUND, Run, VolumeOptions};
use super::wait::wait_until;
use crate::rng::Rng;

/// The exports that fight; no other guest uses them.
const OLD: u8 = 61;
const NEW: u8 = 62;
/// How long the old holder may go on after it was resumed, to do harm.
const AFTERLIFE: Duration = Duration::from_secs(3);
const NAME: &str = "zombie";
const BYTES: u64 = 96 << 20;

/// Sees to it that there is a volume for this, and gives it.
fn disk(run: &mut Run) -> Result<Disk, Failure> {
    if let Some(disk) = run.disk(NAME) {
        return Ok(disk);
    }
    run.add_place(NEW);
    run.create(&VolumeOptions {
        name: NAME.to_string(),
        bytes: BYTES,
        export: NEW,
    })
}

/// The first holder is frozen meanwhile.
pub(super) fn zombie(run: &mut Run) -> Result<(), Failure> {
    fight(run, true)
}

/// The first holder is at work, and knows nothing of the second.
pub(super) fn take_over(run: &mut Run) -> Result<(), Failure> {
    fight(run, false)
}

fn fight(run: &mut Run, is_frozen: bool) -> Result<(), Failure> {
    let disk = disk(run)?;
    let (old, new) = (Part::Export(OLD), Part::Export(NEW));
    // The export of an earlier round goes: its successor is the next one's predecessor.
    run.kill(&[old, new]);
    run.cluster.start(old)?;
    let session = run.next_session();
    let seed = run.rng.word();
    let place = Arc::new(Mutex::new(Place::new(run.cluster.socket(OLD), session)));
    let guest = |once: bool, place: &Arc<Mutex<Place>>, k: u64| {
        let start = if once { Guest::start_once } else { Guest::start };
        start(
            disk.clone(),
            Arc::clone(&run.ledger),
            Arc::clone(place),
            Rng::new(seed + k),
        )
    };
    let old_guests = [guest(true, &place, 1), guest(true, &place, 2)];
    wait_done(&old_guests, 50, "the first holder")?;

    if is_frozen {
        run.freeze(old);
    }
    old_guests.iter().for_each(Guest::expect_fence);
    let begun = Instant::now();
    run.start(new)?;
    let place = run.place(NEW);
    let guest = |k: u64| {
        Guest::start(
            disk.clone(),
            Arc::clone(&run.ledger),
            Arc::clone(&place),
            Rng::new(seed + k),
        )
    };
    let new_guests = [guest(3), guest(4)];
    wait_done(&new_guests, 1, "the second holder")?;
    run.timeline.note(format!(
        "the second holder serves after {:.2} s",
        begun.elapsed().as_secs_f64()
    ));
    let head_start = run.rng.span(Duration::from_millis(10), Duration::from_millis(1500));
    run.load(head_start)?;
    if is_frozen {
        run.resume(old);
    }
    run.load(AFTERLIFE)?;
    let fenced: u64 = old_guests.iter().map(Guest::done).sum();
    run.load(AFTERLIFE / 3)?;
    let later: u64 = old_guests.iter().map(Guest::done).sum();
    // Reads that are current would be allowed; what no holder can do for seconds is know that.
    if later != fenced {
        let words = format!(
            "{} operations of a fenced holder were done seconds after the take-over",
            later - fenced
        );
        return Err(Failure::new(FailureKind::Data, words));
    }
    for guests in [old_guests, new_guests] {
        guests.iter().for_each(Guest::pause);
        if !wait_until(IO_BOUND, || guests.iter().all(Guest::is_idle)) {
            let words = format!("operations on volume {NAME} did not end within {IO_BOUND:?}");
            return Err(Failure::new(FailureKind::Stall, words));
        }
    }
    run.kill(&[old]);
    Ok(())
}

fn wait_done(guests: &[Guest], count: u64, who: &str) -> Result<(), Failure> {
    if wait_until(IO_BOUND, || guests.iter().all(|guest| guest.done() >= count)) {
        return Ok(());
    }
    let words = format!("{who} of volume {NAME} was not answered within {IO_BOUND:?}");
    Err(Failure::new(FailureKind::Stall, words))
}
