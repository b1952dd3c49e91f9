//! Makes long runs of scattered free blocks, so that the mover has where to move things in order.
//!
//! What it does for the mover when windows were found that no long runs are there for, one phase after the other:
//! 1. *Survey*: the regions with the most free blocks are chosen, and closed to the allocator: no more than half of what can
//!    be used, and no more than what is needed. If free space gets short, all are opened at once.
//! 2. *Evacuate*: a walk over the whole index moves what stands in them into holes elsewhere, window by window.
//! 3. *Settle*: two checkpoints give back the metadata that stood in them.
//! 4. *Order*: a walk moves fragmented windows into the emptied regions. All are opened at its end.
//!
//! This goes on while it pays. Nothing of it is kept by the device: after a restart it begins anew, with a device that is in
//! better order than before. A block is moved out of a region like any other (see `mover.rs`), so a crash harms nothing.

use super::engine::Engine;
use super::entry::Entry;
use super::limits::{EVACUATE_FREE_PART, PAGE_ENTRIES, SURVEY_REGIONS_MAX};
use super::mover::{Active, Outcome, Stage};
use super::record::Extent;
use super::scrub_state::ScrubCursor;
use super::window::Window;

/// What the mover is at.
#[derive(Debug, Default)]
pub(super) enum Phase {
    /// Fragmented windows are moved together.
    #[default]
    Order,
    /// Regions are chosen.
    Survey(Survey),
    /// They are emptied: the walk goes on here.
    Evacuate(ScrubCursor),
    /// So many checkpoints must have been since the store was opened.
    Settle(u64),
}

/// What is known of the need for long runs, and of what making them has brought.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// Blocks of windows that stay fragmented, of those that this walk has come to.
    stuck: u64,
    /// Blocks that were moved out of regions, and the stuck ones before that; `None` if nothing was emptied since it last
    /// did not pay.
    last: Option<Emptied>,
    /// Blocks that had been written when it did not pay.
    given_up_at: Option<u64>,
    /// The smallest window for which what was emptied did not do; zero if nothing was emptied.
    too_large: u32,
}

#[derive(Clone, Copy, Debug)]
struct Emptied {
    moved: u64,
    stuck_before: u64,
}

impl Room {
    /// Nothing was found for a fragmented window of so many blocks.
    pub(super) fn note_stuck(&mut self, blocks: u32) {
        self.stuck += u64::from(blocks);
    }

    /// Whether what was emptied may do for a window of so many blocks.
    pub(super) fn may_take(&self, blocks: u32) -> bool {
        blocks < self.too_large
    }

    /// What was emptied does not do for a window of so many blocks.
    pub(super) fn note_too_large(&mut self, blocks: u32) {
        self.too_large = blocks;
    }

    /// Emptying regions has paid if at least one block is in order for every four that it moved.
    fn has_paid(&self) -> bool {
        self.last
            .is_none_or(|last| last.stuck_before.saturating_sub(self.stuck) * 4 >= last.moved.max(1))
    }
}

/// Chooses regions, some at a time: it counts how many there are with how many free blocks, and then closes the freest.
#[derive(Debug)]
pub(super) struct Survey {
    /// Blocks of windows that need long runs.
    need: u64,
    /// The region to be looked at next.
    next: usize,
    /// How many regions have so many free blocks.
    by_free: Vec<u32>,
    choice: Option<Choice>,
}

/// Which regions are closed.
#[derive(Clone, Copy, Debug)]
struct Choice {
    /// Those with more free blocks than this, …
    free: u32,
    /// … and so many with exactly that.
    equal: u32,
    /// So many in all at the most.
    left: u64,
}

impl Survey {
    fn new(need: u64, region_blocks: u32) -> Survey {
        Survey {
            need,
            next: 0,
            by_free: vec![0; region_blocks as usize + 1],
            choice: None,
        }
    }

    /// The freest regions, so many at the most.
    fn choose(&self, regions_max: u64) -> Choice {
        let least = (self.by_free.len() as u32 - 1).div_ceil(EVACUATE_FREE_PART).max(1);
        let mut choice = Choice {
            free: self.by_free.len() as u32 - 1,
            equal: 0,
            left: regions_max,
        };
        let mut chosen = 0;
        for free in (least..self.by_free.len() as u32).rev() {
            let count = self.by_free[free as usize];
            if chosen == regions_max {
                break;
            }
            choice.free = free;
            choice.equal = u64::from(count).min(regions_max - chosen) as u32;
            chosen += u64::from(choice.equal);
        }
        choice
    }
}

impl Choice {
    fn has(&mut self, free: u32) -> bool {
        if self.left == 0 || free < self.free || (free == self.free && self.equal == 0) {
            return false;
        }
        self.equal -= u32::from(free == self.free);
        self.left -= 1;
        true
    }
}

impl Engine {
    /// Where a request that is to begin at `from` begins in the phase.
    pub(super) fn begin_phase(&mut self, from: ScrubCursor) -> ScrubCursor {
        match self.mover.phase {
            Phase::Evacuate(cursor) => cursor,
            Phase::Survey(_) | Phase::Settle(_) => from,
            Phase::Order => {
                if from == ScrubCursor::START {
                    self.mover.room.stuck = 0;
                }
                from
            }
        }
    }

    /// A request ends before its phase does; `next` is where the walk goes on. Returns what the next one is to begin at.
    pub(super) fn pause_phase(&mut self, next: ScrubCursor) -> ScrubCursor {
        match &mut self.mover.phase {
            Phase::Evacuate(cursor) => {
                *cursor = next;
                ScrubCursor::START
            }
            _ => next,
        }
    }

    /// A walk has come to its end: begins the next phase, if there is any.
    pub(super) fn phase_over(&mut self, active: Active) {
        let next = match self.mover.phase {
            Phase::Evacuate(_) => {
                // One that is being written may have begun before the last blocks were moved.
                let under_way = u64::from(self.checkpoint.is_some());
                self.mover.phase = Phase::Settle(self.io.counters.checkpoints + 2 + under_way);
                Some(ScrubCursor::START)
            }
            _ => {
                self.space.allocator.open_all();
                self.mover.room.note_too_large(0);
                self.wants_room().then(|| {
                    let room = &mut self.mover.room;
                    self.mover.phase = Phase::Survey(Survey::new(room.stuck, self.limits.region_blocks));
                    room.last = Some(Emptied {
                        moved: 0,
                        stuck_before: room.stuck,
                    });
                    ScrubCursor::START
                })
            }
        };
        self.answer_defragment(active, next);
    }

    /// Whether regions are to be emptied: if something needs it, and it has paid, or much was written since it did not.
    fn wants_room(&mut self) -> bool {
        let written = self.io.counters.blocks_written;
        let room = &mut self.mover.room;
        if !room.has_paid() {
            room.given_up_at = Some(written);
        }
        let stuck = room.stuck;
        if room.given_up_at.is_some_and(|at| written - at >= stuck.max(1)) {
            room.given_up_at = None;
        }
        room.last = None;
        stuck > 0 && room.given_up_at.is_none()
    }

    /// Chooses regions and closes them, a bounded number at a time.
    pub(super) fn survey(&mut self, active: Active) {
        let Phase::Survey(mut survey) = std::mem::take(&mut self.mover.phase) else {
            unreachable!("it was looked at")
        };
        let regions = self.space.allocator.regions();
        let end = (survey.next + SURVEY_REGIONS_MAX).min(regions);
        for region in survey.next..end {
            if !self.may_close(region) {
                continue;
            }
            let free = self.space.allocator.region_free(region);
            match &mut survey.choice {
                None => survey.by_free[free as usize] += 1,
                Some(choice) => {
                    if choice.has(free) {
                        self.space.allocator.close(region);
                    }
                }
            }
        }
        survey.next = end;
        if end == regions && survey.choice.is_none() {
            survey.choice = Some(survey.choose(self.regions_to_empty(survey.need)));
            survey.next = 0;
        } else if end == regions {
            if self.space.allocator.closed() == 0 {
                return self.give_up_room(active);
            }
            self.mover.phase = Phase::Evacuate(ScrubCursor::START);
            return self.answer_defragment(active, Some(ScrubCursor::START));
        }
        self.mover.phase = Phase::Survey(survey);
        self.answer_defragment(active, Some(ScrubCursor::START));
    }

    /// How many regions are emptied together.
    fn regions_to_empty(&self, need: u64) -> u64 {
        let usable = self.space.free().saturating_sub(self.kept_from_moves());
        let region = u64::from(self.limits.region_blocks);
        // Some blocks of a region stay where they are, and runs too short for a window are left.
        (usable / 2).min(need + need / 4 + region) / region
    }

    /// Whether a region can be emptied: not where the log goes on, nor where nothing was written yet.
    fn may_close(&self, region: usize) -> bool {
        let allocator = &self.space.allocator;
        let has = |run: &Extent| {
            let last = run.place + run.count.max(1) - 1;
            (allocator.region_of(run.place.into())..=allocator.region_of(last.into())).contains(&region)
        };
        let log = self.space.log_runs();
        allocator.region_of(allocator.frontier.max(1) - 1) >= region && !log.iter().any(has)
    }

    /// No room can be made for now.
    fn give_up_room(&mut self, mut active: Active) {
        self.space.allocator.open_all();
        self.mover.phase = Phase::Order;
        let room = &mut self.mover.room;
        room.given_up_at = Some(self.io.counters.blocks_written);
        room.last = None;
        active.result.is_full = true;
        self.answer_defragment(active, None);
    }

    /// Takes holes for what of a window stands in closed regions. Sets `is_full`, and opens them, when space has become
    /// short.
    pub(super) fn take_for_evacuation(&mut self, window: &Window, result: &mut Outcome) -> Vec<Extent> {
        let allocator = &self.space.allocator;
        let places = window.entries().iter().filter_map(Entry::data_place);
        let mut left = places.filter(|place| allocator.is_closed(*place)).count() as u32;
        let open = allocator.open_free() > u64::from(left) + self.kept_from_moves();
        if allocator.closed() == 0 || !open {
            self.space.allocator.open_all();
            self.mover.phase = Phase::Order;
            self.mover.room.given_up_at = Some(self.io.counters.blocks_written);
            self.mover.room.last = None;
            result.is_full = true;
            return Vec::new();
        }
        let mut holes = Vec::new();
        while left > 0 {
            let hole = self.space.allocator.take_hole(left).expect("open blocks were counted");
            left -= hole.count;
            holes.push(hole);
        }
        holes
    }

    /// Blocks of closed regions were moved.
    pub(super) fn note_evacuated(&mut self, blocks: u32) {
        if let (Phase::Evacuate(_), Some(last)) = (&self.mover.phase, &mut self.mover.room.last) {
            last.moved += u64::from(blocks);
            self.io.counters.blocks_evacuated += u64::from(blocks);
        }
    }

    /// Waits for the checkpoints that give back what stood in closed regions and was freed.
    pub(super) fn settle_room(&mut self, mut active: Active) {
        let Phase::Settle(checkpoints) = self.mover.phase else {
            unreachable!("it was looked at")
        };
        if self.io.counters.checkpoints >= checkpoints {
            self.mover.phase = Phase::Order;
            self.mover.room.note_too_large(PAGE_ENTRIES + 1);
            return self.answer_defragment(active, Some(ScrubCursor::START));
        }
        self.checkpoints.wanted_for_space = true;
        active.stage = Some(Stage::Checkpoint);
        self.mover.active = Some(active);
    }

    /// A checkpoint is durable, perhaps one that a request waits for.
    pub(super) fn move_checkpoint_stored(&mut self) {
        let waits = |active: &mut Active| matches!(active.stage, Some(Stage::Checkpoint));
        if let Some(mut active) = self.mover.active.take_if(waits) {
            active.stage = None;
            self.move_on(active);
        }
    }
}

const _: () = assert!(EVACUATE_FREE_PART <= PAGE_ENTRIES);
