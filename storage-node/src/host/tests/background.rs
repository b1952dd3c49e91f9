//! Scrub and mover: how fast they go, when they hold back, and how they go on after a restart. Time is virtual.

use std::time::Duration;

use cairn_proto::block::Cursor;
use cairn_proto::ids::{ChunkIndex, Layer, Version};
use cairn_proto::message::WriteData;

use super::support::*;
use crate::host::limits::*;
use crate::host::*;
use crate::store::api::{DamagedBlock, ScrubCursor, ScrubState, StoreReply, StoreRequest, Ticket, Why};

const DAY: Duration = Duration::from_secs(24 * 3600);
const RATE: u64 = 16 << 20;

fn background(scrub_rate: u64, move_rate: u64) -> BackgroundConfig {
    BackgroundConfig {
        scrub_rate,
        scrub_interval: 7 * DAY,
        move_rate,
        wall_clock: Some(Duration::from_secs(1_700_000_000)),
    }
}

fn world(background: BackgroundConfig, scrub: ScrubState) -> World {
    let store = HeldStore {
        scrub,
        ..HeldStore::default()
    };
    World::with(HostConfig { background, ..config() }, store)
}

/// A cursor behind so many blocks.
fn cursor(blocks: u64) -> ScrubCursor {
    let at = Cursor {
        chunk: ChunkIndex((blocks / 16384) as u32),
        layer: Layer(0),
        block: (blocks % 16384) as u32,
    };
    ScrubCursor {
        group: holder(1).group(Default::default()),
        at,
    }
}

/// What the store of the device was asked for and has not answered.
fn asked(world: &World, which: impl Fn(&StoreRequest) -> bool) -> Option<(Ticket, StoreRequest)> {
    let mut asked = world.host.store().asked.iter().filter(|(_, request)| which(request));
    asked.next().map(|(ticket, request)| (*ticket, request.clone()))
}

fn scrub(world: &World) -> Option<(Ticket, ScrubCursor)> {
    match asked(world, |request| matches!(request, StoreRequest::Scrub { .. }))? {
        (ticket, StoreRequest::Scrub { from, .. }) => Some((ticket, from)),
        _ => None,
    }
}

fn defragment(world: &World) -> Option<(Ticket, ScrubCursor)> {
    match asked(world, |request| matches!(request, StoreRequest::Defragment { .. }))? {
        (ticket, StoreRequest::Defragment { from }) => Some((ticket, from)),
        _ => None,
    }
}

fn scrubbed(checked: u32, next: Option<ScrubCursor>) -> StoreReply {
    StoreReply::Scrubbed {
        checked,
        damaged: Vec::new(),
        metadata: Vec::new(),
        next,
    }
}

fn moved(moved: u32, next: Option<ScrubCursor>, is_full: bool) -> StoreReply {
    StoreReply::Defragmented {
        windows: 1,
        moved,
        extents_before: 0,
        extents_after: 0,
        is_full,
        damaged: Vec::new(),
        next,
    }
}

/// Lets time pass until something is asked for; returns after how many seconds that was, at most `bound`.
fn wait_for<T>(world: &mut World, bound: Duration, what: impl Fn(&World) -> Option<T>) -> Option<(Duration, T)> {
    let start = world.now;
    loop {
        if let Some(found) = what(world) {
            return Some((world.now - start, found));
        }
        let next = world.host.poll_timeout().filter(|at| *at <= start + bound)?;
        world.pass(u64::try_from(next.saturating_since(world.now).as_millis()).unwrap() + 1);
    }
}

/// A pass over so many blocks from where it is; returns the seconds that it took.
fn run_pass(world: &mut World, blocks: u64, mut done: u64) -> f64 {
    let start = world.now;
    loop {
        let (_, (ticket, from)) = wait_for(world, DAY, scrub).expect("the pass goes on");
        assert!(
            from == cursor(done) || (done == 0 && from == ScrubCursor::START),
            "{from:?}"
        );
        done += 256;
        let next = (done < blocks).then(|| cursor(done));
        world.store_answers(ticket, scrubbed(256, next));
        world.store_ends_if(|request| matches!(request, StoreRequest::SaveScrub { .. }));
        if next.is_none() {
            return (world.now - start).as_secs_f64();
        }
    }
}

#[test]
fn a_pass_keeps_to_its_rate_and_the_next_begins_after_the_interval() {
    let mut world = world(background(RATE, 0), ScrubState::default());
    let (waited, _) = wait_for(&mut world, DAY, scrub).expect("the first pass begins");
    assert!(waited >= SCRUB_START_DELAY && waited < SCRUB_START_DELAY + Duration::from_secs(1));
    // 1 GiB at 16 MiB a second.
    let took = run_pass(&mut world, 1 << 18, 0);
    assert!((63.0..67.0).contains(&took), "{took} s");
    let state = world.host.status().scrub.state;
    assert_eq!(
        (state.pass, state.finished_pass, state.finished_checked),
        (1, 1, 1 << 18)
    );
    let (waited, _) = wait_for(&mut world, 8 * DAY, scrub).expect("the next pass begins");
    assert!(
        waited >= 7 * DAY && waited < 7 * DAY + Duration::from_secs(2),
        "{waited:?}"
    );
    assert_eq!(world.host.status().scrub.state.pass, 2);
}

#[test]
fn how_far_a_pass_is_is_kept_now_and_then_and_at_its_end() {
    let mut world = world(background(RATE, 0), ScrubState::default());
    let mut saves = 0;
    let blocks = 3 * SCRUB_SAVE_BLOCKS;
    let mut done = 0;
    while done < blocks {
        let (_, (ticket, _)) = wait_for(&mut world, DAY, scrub).expect("the pass goes on");
        done += 256;
        let next = (done < blocks).then(|| cursor(done));
        world.store_answers(ticket, scrubbed(256, next));
        if let Some((ticket, request)) = asked(&world, |r| matches!(r, StoreRequest::SaveScrub { .. })) {
            let StoreRequest::SaveScrub { state } = request else {
                unreachable!("it was looked for")
            };
            assert_eq!((state.cursor, state.checked), (next, done));
            saves += 1;
            assert!(scrub(&world).is_none(), "one after the other");
            world.store_answers(ticket, StoreReply::Failed(crate::store::StoreError::NoSpace));
        }
    }
    assert_eq!(saves, 3);
}

#[test]
fn a_pass_goes_on_where_it_was_after_a_restart() {
    let state = ScrubState {
        pass: 5,
        cursor: Some(cursor(512)),
        checked: 512,
        damaged: 3,
        finished_pass: 4,
        ..ScrubState::default()
    };
    let mut world = world(background(RATE, 0), state);
    world.pass(1);
    assert_eq!(scrub(&world).map(|(_, from)| from), Some(cursor(512)), "at once");
    assert_eq!(world.host.status().scrub.percent(), Some(51));
    run_pass(&mut world, 1024, 512);
    let state = world.host.status().scrub.state;
    assert_eq!((state.finished_pass, state.finished_checked), (5, 1024));
    assert_eq!(state.finished_damaged, 3);
    assert_eq!(world.host.status().scrub.percent(), None);
}

#[test]
fn the_interval_is_counted_over_restarts_by_the_wall_clock_and_from_the_start_without_one() {
    let finished = |finished_s| ScrubState {
        pass: 4,
        finished_pass: 4,
        finished_s,
        ..ScrubState::default()
    };
    let begins = |wall_clock: Option<u64>, finished_s| {
        let config = BackgroundConfig {
            wall_clock: wall_clock.map(Duration::from_secs),
            ..background(RATE, 0)
        };
        let mut world = world(config, finished(finished_s));
        let (waited, _) = wait_for(&mut world, 8 * DAY, scrub).expect("it begins");
        waited.as_secs() / (24 * 3600)
    };
    let now = 1_700_000_000;
    let days = 24 * 3600;
    assert_eq!(begins(Some(now), now - 3 * days), 4);
    assert_eq!(begins(Some(now), now - 30 * days), 0, "it is overdue");
    assert_eq!(begins(Some(now), now + 30 * days), 7, "the clock went back");
    assert_eq!(begins(None, now - 3 * days), 7);
    assert_eq!(begins(Some(now), 0), 7);
}

#[test]
fn a_device_without_rates_does_nothing_until_it_is_told_to() {
    let mut world = world(background(0, 0), ScrubState::default());
    assert_eq!(world.host.poll_timeout(), None);
    world.event(HostEvent::Scrub);
    world.event(HostEvent::Scrub);
    let took = run_pass(&mut world, 4096, 0);
    assert!(took > 0.9, "{took}");
    assert_eq!(world.host.status().scrub.state.finished_pass, 1);
    assert_eq!(world.host.poll_timeout(), None);
}

#[test]
fn guests_come_before_the_scrub_when_the_store_has_no_room_for_all() {
    let mut config = HostConfig {
        background: background(1 << 40, 0),
        ..config()
    };
    config.limits.store_requests = 1;
    let mut world = World::with(config, HeldStore::default());
    let peer = world.take(1);
    world.event(HostEvent::Scrub);
    // Steps of the scrub that the store works on among so many guest reads: both always wait.
    let (mut reads, mut steps, mut done) = (0, 0, 0);
    for _ in 0..8 {
        world.send(peer, read(1));
    }
    while reads < 2000 {
        if let Some((ticket, _)) = scrub(&world) {
            steps += 1;
            done += 256;
            world.now += Duration::from_millis(1);
            world.store_answers(ticket, scrubbed(256, Some(cursor(done))));
            world.pass(1);
        } else if asked(&world, |r| matches!(r, StoreRequest::Read { .. })).is_some() {
            reads += 1;
            world.store_ends_only(|r| matches!(r, StoreRequest::Read { .. }));
            world.send(peer, read(1));
        } else {
            world.store_ends();
            world.pass(1);
        }
    }
    assert!(steps >= 1, "the scrub does not starve");
    assert!(steps <= 4, "{steps} steps of the scrub, {reads} reads");
}

#[test]
fn the_mover_waits_for_quiet_goes_round_and_keeps_to_its_rate() {
    let mut world = world(background(0, 8 << 20), ScrubState::default());
    let peer = world.take(1);
    let (waited, _) = wait_for(&mut world, DAY, defragment).expect("it begins");
    assert!(waited >= MOVE_PAUSE - Duration::from_secs(1), "{waited:?}");
    // 256 MiB at 8 MiB a second.
    let start = world.now;
    for step in 1..=256u64 {
        let (_, (ticket, from)) = wait_for(&mut world, DAY, defragment).expect("it goes on");
        assert!(from == cursor((step - 1) * 256) || step == 1, "{from:?}");
        world.store_answers(ticket, moved(256, Some(cursor(step * 256)), false));
    }
    let took = (world.now - start).as_secs_f64();
    assert!((31.0..34.0).contains(&took), "{took} s");
    // Guests ask for much: it holds back until they do not.
    for _ in 0..=MOVE_GUEST_REQUESTS_MAX {
        world.send(peer, read(1));
        world.store_ends_only(|r| matches!(r, StoreRequest::Read { .. }));
    }
    let (waited, (ticket, _)) = wait_for(&mut world, DAY, defragment).expect("it goes on");
    assert!(waited >= Duration::from_secs(1), "{waited:?}");
    world.store_answers(ticket, moved(0, None, false));
    // The round has moved something: another follows at once, and as that moves nothing, a pause, for nothing is written.
    let (waited, (ticket, from)) = wait_for(&mut world, DAY, defragment).expect("another round");
    assert!(
        from == ScrubCursor::START && waited < Duration::from_secs(5),
        "{waited:?}"
    );
    world.store_answers(ticket, moved(0, None, false));
    assert!(wait_for(&mut world, DAY, defragment).is_none(), "nothing was written");
    world.send(peer, write(1, 77, WriteData::Discard));
    world.store_ends();
    assert!(wait_for(&mut world, DAY, defragment).is_some());
}

#[test]
fn a_round_that_comes_back_to_the_start_goes_on() {
    let mut world = world(background(0, 8 << 20), ScrubState::default());
    let (_, (mut ticket, _)) = wait_for(&mut world, DAY, defragment).expect("the first round begins");
    // Nothing was moved yet: room is being made.
    for _ in 0..3 {
        world.store_answers(ticket, moved(0, Some(ScrubCursor::START), false));
        let (waited, next) = wait_for(&mut world, DAY, defragment).expect("the round goes on");
        assert!(waited < Duration::from_secs(1), "{waited:?}");
        assert_eq!(next.1, ScrubCursor::START);
        ticket = next.0;
    }
    world.store_answers(ticket, moved(0, None, false));
    assert!(
        wait_for(&mut world, DAY, defragment).is_none(),
        "nothing was moved, and nothing is written"
    );
}

#[test]
fn the_mover_rests_when_there_is_no_space_and_stops_when_the_device_fails() {
    let mut world = world(background(0, 8 << 20), ScrubState::default());
    let (_, (ticket, _)) = wait_for(&mut world, DAY, defragment).expect("it begins");
    world.store_answers(ticket, moved(0, Some(cursor(256)), true));
    let peer = world.take(1);
    world.send(peer, write(1, 77, WriteData::Discard));
    world.store_ends();
    let (waited, (_, from)) = wait_for(&mut world, DAY, defragment).expect("it tries again");
    assert!(waited >= MOVE_PAUSE - Duration::from_secs(1), "{waited:?}");
    assert_eq!(from, ScrubCursor::START);
    world.store_fails(crate::store::StoreError::Poisoned(cairn_proto::disk::DiskError {
        errno: 5,
    }));
    assert!(wait_for(&mut world, DAY, defragment).is_none());
}

#[test]
fn damage_is_listed_and_counted() {
    let mut world = world(background(RATE, 0), ScrubState::default());
    world.event(HostEvent::Scrub);
    let (ticket, _) = scrub(&world).expect("it begins");
    let damaged = DamagedBlock {
        group: holder(1).group(Default::default()),
        layer: Layer(0),
        chunk: ChunkIndex(1),
        block: 5,
        version: Version::from_bits(9),
        why: Why::Mismatch,
    };
    let reply = StoreReply::Scrubbed {
        checked: 256,
        damaged: vec![damaged],
        metadata: Vec::new(),
        next: Some(cursor(256)),
    };
    world.store_answers(ticket, reply);
    assert_eq!(world.host.damage().copied().collect::<Vec<_>>(), [damaged]);
    assert_eq!(world.host.status().scrub.state.damaged, 1);
}

#[test]
fn a_step_that_fails_is_tried_again_later() {
    let mut world = world(background(RATE, 0), ScrubState::default());
    world.event(HostEvent::Scrub);
    let (ticket, _) = scrub(&world).expect("it begins");
    world.store_answers(ticket, StoreReply::Failed(crate::store::StoreError::Busy));
    let (waited, (_, from)) = wait_for(&mut world, DAY, scrub).expect("it tries again");
    assert!(waited >= RETRY_PAUSE, "{waited:?}");
    assert_eq!(from, ScrubCursor::START);
}
