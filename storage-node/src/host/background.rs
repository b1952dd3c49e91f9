//! What a device does when nobody asks: it verifies all it holds (the scrub), and moves fragmented data together (the
//! mover). Both at a bounded rate, in queues of class scrub; the mover only while guests ask for little.
//!
//! The pass of the scrub is kept by the device, so it goes on after a restart. When the next one begins is counted from
//! the end of the last one by the wall clock that was passed in at the start; without it, from the start.

use std::time::Duration;

use cairn_proto::ids::VolumeId;
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::time::Time;

use super::limits::{
    DAMAGE_MAX, MOVE_GUEST_REQUESTS_MAX, MOVE_PAUSE, MOVE_RATE_DEFAULT, RETRY_PAUSE, SCRUB_INTERVAL_DEFAULT,
    SCRUB_RATE_DEFAULT, SCRUB_SAVE_BLOCKS, SCRUB_START_DELAY, SCRUB_STEP_BLOCKS, STEP_BLOCKS_MIN,
};
use crate::store::api::{DamagedBlock, DamagedMetadata, ScrubCursor, ScrubState, StoreError, StoreReply, StoreRequest};

/// How much a device does when nobody asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BackgroundConfig {
    /// Bytes a second that the scrub verifies at the most; zero for no scrub.
    pub scrub_rate: u64,
    /// From the end of a pass to the begin of the next.
    pub scrub_interval: Duration,
    /// Bytes a second that are moved at the most; zero for nothing.
    pub move_rate: u64,
    /// What the wall clock says at the start, since 1970. `None` if it is not to be trusted.
    pub wall_clock: Option<Duration>,
}

impl Default for BackgroundConfig {
    /// The usual rates, without a wall clock.
    fn default() -> BackgroundConfig {
        BackgroundConfig {
            scrub_rate: SCRUB_RATE_DEFAULT,
            scrub_interval: SCRUB_INTERVAL_DEFAULT,
            move_rate: MOVE_RATE_DEFAULT,
            wall_clock: None,
        }
    }
}

impl BackgroundConfig {
    /// Nothing is done.
    pub const OFF: BackgroundConfig = BackgroundConfig {
        scrub_rate: 0,
        scrub_interval: Duration::MAX,
        move_rate: 0,
        wall_clock: None,
    };
}

/// How the scrub is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ScrubStatus {
    /// The pass: its number and counts, and those of the last one that was finished.
    pub state: ScrubState,
    /// Blocks of data that the device holds: a pass is over when so many were checked.
    pub blocks: u64,
    /// Blocks known to be damaged now, found by the scrub or by reads. Mended ones do not count.
    pub damaged_blocks: u64,
    /// Damaged blocks that were written anew from another copy, or by a guest, since the start.
    pub mended_blocks: u64,
    /// Parts of the device's own metadata that the pass has found damaged and that are not mended.
    pub damaged_metadata: u64,
    /// Blocks moved together since the start.
    pub moved_blocks: u64,
}

impl ScrubStatus {
    /// How much of the pass is done, in percent; `None` between passes. An estimate: data is written meanwhile.
    pub fn percent(&self) -> Option<u8> {
        self.state.cursor?;
        let done = self.state.checked.saturating_mul(100) / self.blocks.max(1);
        Some(u8::try_from(done.min(99)).expect("at most 99"))
    }
}

/// What the store is asked for on behalf of nobody.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Chore {
    Scrub,
    SaveScrub,
    Move,
}

/// The queue of a chore: of no volume.
pub(super) fn queue_of(chore: Chore) -> VolumeId {
    match chore {
        Chore::Scrub | Chore::SaveScrub => VolumeId(u64::MAX),
        Chore::Move => VolumeId(u64::MAX - 1),
    }
}

/// A loop that does one step after the other.
#[derive(Debug)]
struct Pace {
    /// Bytes a second; zero for never.
    rate: u64,
    /// When the step under way was asked for; `None` if none is.
    since: Option<Time>,
    /// When the next one may be.
    next: Time,
}

impl Pace {
    fn new(rate: u64, next: Time) -> Pace {
        Pace {
            rate,
            since: None,
            next,
        }
    }

    fn is_due(&self, now: Time) -> bool {
        self.rate > 0 && self.since.is_none() && self.next <= now
    }

    fn wake(&self) -> Option<Time> {
        (self.rate > 0 && self.since.is_none()).then_some(self.next)
    }

    /// The step under way has ended and has done so many blocks: the next may be when the rate allows for it.
    fn ended(&mut self, now: Time, blocks: u64) {
        let since = self.since.take().expect("a step is under way");
        let bytes = blocks.max(STEP_BLOCKS_MIN) * BLOCK_BYTES as u64;
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.rate.max(1));
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.next = now.max(since + cost);
    }
}

/// All that a device does when nobody asks.
#[derive(Debug)]
pub(super) struct Background {
    config: BackgroundConfig,
    started: Time,
    scrub: Pace,
    state: ScrubState,
    /// Blocks that had been checked when the state was kept last.
    saved_checked: u64,
    /// Whether it is to be kept before the pass goes on.
    save: bool,
    /// A pass was asked for.
    wanted: bool,
    damage: Vec<DamagedBlock>,
    metadata: Vec<DamagedMetadata>,
    mover: Pace,
    cursor: ScrubCursor,
    /// Whether the next step begins a round. A round may come back to the start, when room was made for what is to be
    /// moved.
    begins_round: bool,
    /// Whether this round has moved anything.
    round_moved: bool,
    /// Writes since the round began.
    round_writes: u64,
    moved_blocks: u64,
    /// Requests of guests in this second and in the one before.
    guest: (u64, u64),
    guest_until: Time,
}

impl Background {
    /// Goes on where the device says that the scrub was.
    pub(super) fn new(now: Time, config: BackgroundConfig, state: ScrubState) -> Background {
        let mut background = Background {
            config,
            started: now,
            scrub: Pace::new(config.scrub_rate, now),
            state,
            saved_checked: state.checked,
            save: false,
            wanted: false,
            damage: Vec::new(),
            metadata: Vec::new(),
            mover: Pace::new(config.move_rate, now + MOVE_PAUSE),
            cursor: ScrubCursor::START,
            begins_round: true,
            round_moved: false,
            round_writes: 1,
            moved_blocks: 0,
            guest: (0, 0),
            guest_until: now,
        };
        background.plan_pass(now);
        background
    }

    /// Seconds since 1970; zero if that is not known.
    fn wall(&self, now: Time) -> u64 {
        let since = now.saturating_since(self.started);
        let wall = |start: Duration| start.saturating_add(since).as_secs();
        self.config.wall_clock.map_or(0, wall)
    }

    /// Decides when the scrub goes on.
    fn plan_pass(&mut self, now: Time) {
        let interval = self.config.scrub_interval;
        self.scrub.next = if self.state.cursor.is_some() || self.wanted {
            now
        } else if self.state.finished_pass == 0 {
            self.started + SCRUB_START_DELAY.min(interval)
        } else {
            // A clock that went back makes nobody wait longer than the interval.
            let ago = match (self.wall(now), self.state.finished_s) {
                (0, _) | (_, 0) => now.saturating_since(self.started),
                (wall, finished) => Duration::from_secs(wall.saturating_sub(finished)),
            };
            now + interval.saturating_sub(ago)
        };
    }

    /// A pass begins now, unless one is under way.
    pub(super) fn want_scrub(&mut self, now: Time) {
        if self.state.cursor.is_none() {
            self.wanted = true;
            // Without a rate of its own it goes at the usual one.
            if self.scrub.rate == 0 {
                self.scrub.rate = SCRUB_RATE_DEFAULT;
            }
            self.scrub.next = now;
        }
    }

    /// A request of a guest, or a write of anybody, was given to the store.
    pub(super) fn note_request(&mut self, now: Time, is_guest: bool, is_write: bool) {
        self.turn_guest(now);
        self.guest.0 += u64::from(is_guest);
        self.round_writes += u64::from(is_write);
    }

    fn turn_guest(&mut self, now: Time) {
        const SECOND: Duration = Duration::from_secs(1);
        if now >= self.guest_until {
            let is_next = now < self.guest_until + SECOND;
            self.guest = (0, if is_next { self.guest.0 } else { 0 });
            self.guest_until = now + SECOND;
        }
    }

    /// What is to be asked of the store now. To be called until there is nothing. `is_quiet`: no request waits.
    pub(super) fn poll(&mut self, now: Time, is_quiet: bool) -> Option<(Chore, StoreRequest)> {
        if self.scrub.since.is_none() && self.save {
            self.save = false;
            self.saved_checked = self.state.checked;
            self.scrub.since = Some(now);
            return Some((Chore::SaveScrub, StoreRequest::SaveScrub { state: self.state }));
        }
        if self.scrub.is_due(now) {
            self.scrub.since = Some(now);
            let from = self.state.cursor.unwrap_or_else(|| self.begin_pass(now));
            let blocks_max = SCRUB_STEP_BLOCKS;
            return Some((Chore::Scrub, StoreRequest::Scrub { from, blocks_max }));
        }
        if self.mover.is_due(now) {
            self.turn_guest(now);
            if !is_quiet || self.guest.0 + self.guest.1 > MOVE_GUEST_REQUESTS_MAX {
                self.mover.next = now + Duration::from_secs(1);
                return None;
            }
            if self.begins_round {
                if self.round_writes == 0 && !self.round_moved {
                    self.mover.next = now + MOVE_PAUSE;
                    return None;
                }
                self.round_writes = 0;
                self.round_moved = false;
                self.begins_round = false;
            }
            self.mover.since = Some(now);
            return Some((Chore::Move, StoreRequest::Defragment { from: self.cursor }));
        }
        None
    }

    fn begin_pass(&mut self, now: Time) -> ScrubCursor {
        self.wanted = false;
        self.metadata.clear();
        self.state = ScrubState {
            pass: self.state.pass + 1,
            cursor: Some(ScrubCursor::START),
            begun_s: self.wall(now),
            checked: 0,
            damaged: 0,
            ..self.state
        };
        self.saved_checked = 0;
        ScrubCursor::START
    }

    /// When [`poll`](Self::poll) wants to be called.
    pub(super) fn wake(&self) -> Option<Time> {
        let save = (self.save && self.scrub.since.is_none()).then_some(self.started);
        [save, self.scrub.wake(), self.mover.wake()].into_iter().flatten().min()
    }

    /// The store has answered.
    pub(super) fn replied(&mut self, now: Time, chore: Chore, reply: StoreReply) {
        match (chore, reply) {
            (
                Chore::Scrub,
                StoreReply::Scrubbed {
                    checked,
                    damaged,
                    metadata,
                    next,
                },
            ) => {
                self.scrub.ended(now, checked.into());
                self.state.checked += u64::from(checked);
                self.state.damaged += damaged.len() as u64;
                self.state.cursor = next;
                self.note_damage(damaged);
                let room = DAMAGE_MAX.saturating_sub(self.metadata.len());
                self.metadata.extend(metadata.into_iter().take(room));
                match next {
                    None => self.end_pass(now),
                    Some(_) => self.save |= self.state.checked - self.saved_checked >= SCRUB_SAVE_BLOCKS,
                }
            }
            (Chore::SaveScrub, _) => {
                // Not kept is kept later: a pass does a part anew after a restart, no more.
                self.scrub.since = None;
            }
            (
                Chore::Move,
                StoreReply::Defragmented {
                    windows,
                    moved,
                    is_full,
                    damaged,
                    next,
                    ..
                },
            ) => {
                self.mover.ended(now, u64::from(windows) + u64::from(moved));
                self.moved_blocks += u64::from(moved);
                self.round_moved |= moved > 0;
                self.note_damage(damaged);
                let next = next.filter(|_| !is_full);
                self.begins_round = next.is_none();
                self.cursor = next.unwrap_or(ScrubCursor::START);
                if self.begins_round && (is_full || !self.round_moved) {
                    self.mover.next = now + MOVE_PAUSE;
                }
            }
            (Chore::Scrub, _) => self.failed_scrub(now),
            (Chore::Move, StoreReply::Failed(StoreError::Poisoned(_))) => self.mover.rate = 0,
            (Chore::Move, _) => {
                self.mover.ended(now, 0);
                self.mover.next = now + RETRY_PAUSE;
            }
        }
    }

    fn failed_scrub(&mut self, now: Time) {
        self.scrub.ended(now, 0);
        self.scrub.next = now + RETRY_PAUSE;
    }

    fn end_pass(&mut self, now: Time) {
        self.state = ScrubState {
            finished_s: self.wall(now),
            finished_pass: self.state.pass,
            finished_checked: self.state.checked,
            finished_damaged: self.state.damaged,
            ..self.state
        };
        self.save = true;
        self.scrub.next = now + self.config.scrub_interval;
        // A pass that was asked for on a device without scrub is the only one.
        self.scrub.rate = self.config.scrub_rate;
    }

    /// The first ones are kept; the others are found again by the next pass.
    fn note_damage(&mut self, damaged: Vec<DamagedBlock>) {
        for found in damaged {
            let same = |known: &DamagedBlock| {
                (known.group, known.layer, known.chunk, known.block)
                    == (found.group, found.layer, found.chunk, found.block)
            };
            match self.damage.iter().position(same) {
                Some(known) => self.damage[known] = found,
                None if self.damage.len() < DAMAGE_MAX => self.damage.push(found),
                None => {}
            }
        }
    }

    /// Forgets what is not damaged any more.
    pub(super) fn forget_mended(&mut self, is_damaged: impl Fn(&DamagedBlock) -> bool) {
        self.damage.retain(is_damaged);
    }

    /// Steps under way: what the device does for nobody.
    pub(super) fn chores(&self) -> usize {
        usize::from(self.scrub.since.is_some()) + usize::from(self.mover.since.is_some())
    }

    pub(super) fn damage(&self) -> &[DamagedBlock] {
        &self.damage
    }

    pub(super) fn damaged_metadata(&self) -> &[DamagedMetadata] {
        &self.metadata
    }

    /// What it knows; the counts of the device are filled in by who has it.
    pub(super) fn status(&self) -> ScrubStatus {
        ScrubStatus {
            state: self.state,
            damaged_metadata: self.metadata.iter().filter(|found| !found.is_mended).count() as u64,
            moved_blocks: self.moved_blocks,
            ..ScrubStatus::default()
        }
    }
}
