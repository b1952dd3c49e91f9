//! Moves fragmented data together, so that what is sequential in a volume is sequential on the device.
//!
//! One window (the blocks of an index page) at a time:
//! 1. long runs of free blocks are taken for it;
//! 2. its data is read and compared; what is damaged stays where it is;
//! 3. the data is written to the runs;
//! 4. when all of that is written, a batch takes in records of type move, for the blocks that are still what was read. Its
//!    flush makes data and records durable together.
//!
//! Until the batch is durable the index says the old places, so that a crash at any point loses nothing but the work.
//!
//! Where free space has no long runs, some are made first: see `evacuate.rs`.

use std::collections::VecDeque;

use bytes::Bytes;
use cairn_proto::checksum::Checksum;
use cairn_proto::disk::DiskError;
use cairn_proto::units::BlockRange;

use super::allocator::Allocator;
use super::api::{StoreError, StoreReply, Ticket};
use super::catalog::Unknown;
use super::chunk::PageKey;
use super::engine::{Engine, Purpose};
use super::entry::Entry;
use super::evacuate::{Phase, Room};
use super::io::WriteList;
use super::limits::{MOVE_BATCHES_MAX, MOVE_EXTENT_BLOCKS, MOVE_EXTENTS_MIN, MOVE_RUNS_MAX};
use super::load::For;
use super::plan::{Building, Draft, pages_for};
use super::record::{Extent, Moved, Record, Target, body_capacity};
use super::scrub::DamagedBlock;
use super::scrub_state::ScrubCursor;
use super::window::{Found, Step, Walk, Walked, Walker, Window, page_range};

/// The mover of a store: one request at a time.
#[derive(Debug, Default)]
pub(super) struct Mover {
    pub(super) active: Option<Active>,
    /// What requests are at: it goes over all that the device holds once in each phase.
    pub(super) phase: Phase,
    pub(super) room: Room,
}

/// A request under way.
#[derive(Debug)]
pub(super) struct Active {
    ticket: Ticket,
    /// It has come to what it is at.
    pub(super) walk: Walk,
    pub(super) result: Outcome,
    pub(super) stage: Option<Stage>,
}

/// What has come of it so far.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) moved: u32,
    extents_before: u32,
    extents_after: u32,
    pub(super) is_full: bool,
    damaged: Vec<DamagedBlock>,
}

#[derive(Debug)]
pub(super) enum Stage {
    /// A leaf of the directory is being loaded.
    Leaf,
    /// Checkpoints give back what was freed.
    Checkpoint,
    /// The index page is being read, and then, into the places that were taken for it, the data.
    Reading(Box<Window>, VecDeque<u32>),
    /// The data is being written, by so many writes.
    Writing(Move, usize),
    /// It waits for a batch that has room for it; so many have gone without it.
    Waiting(Move, u32),
    /// Its batch is in flight.
    Committing,
}

/// Blocks that stand at their new places too.
#[derive(Debug)]
pub(super) struct Move {
    key: PageKey,
    blocks: Vec<MovedBlock>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct MovedBlock {
    block: u32,
    /// What the index said when the block was read.
    was: Entry,
    to: u32,
}

impl Move {
    /// The records: one for each run of blocks.
    fn records(&self) -> Vec<Record> {
        let key = self.key.chunk;
        let follows = |a: &MovedBlock, b: &MovedBlock| a.block + 1 == b.block;
        let runs = self.blocks.chunk_by(follows).map(|run| {
            let range = BlockRange::new(key.chunk, run[0].block, run.len() as u32).expect("blocks of a page");
            let moves = run.iter().map(|moved| Moved {
                from: moved.was.data_place().expect("only data is moved"),
                to: moved.to,
                checksum: Checksum(moved.was.checksum),
            });
            Record::Move {
                at: Target {
                    group: key.group,
                    layer: key.layer,
                    range,
                },
                moves: moves.collect(),
            }
        });
        runs.collect()
    }
}

impl Engine {
    pub(super) fn submit_defragment(&mut self, ticket: Ticket, from: ScrubCursor) {
        if let Some(error) = self.poisoned {
            return self.fail(ticket, StoreError::Poisoned(error));
        }
        if self.mover.active.is_some() {
            return self.fail(ticket, StoreError::Busy);
        }
        let from = self.begin_phase(from);
        self.move_on(Active {
            ticket,
            walk: Walk::new(Walker::Mover, from),
            result: Outcome::default(),
            stage: None,
        });
    }

    /// Looks at the next windows until something of one is to be moved.
    pub(super) fn move_on(&mut self, mut active: Active) {
        match self.mover.phase {
            Phase::Order | Phase::Evacuate(_) => {}
            Phase::Survey(_) => return self.survey(active),
            Phase::Settle(_) => return self.settle_room(active),
        }
        while active.result.moved == 0 && !active.result.is_full {
            match self.walk(&mut active.walk) {
                Found::Over(Walked::All) => return self.phase_over(active),
                Found::Over(Walked::Enough) => break,
                Found::Loading => {
                    active.stage = Some(Stage::Leaf);
                    self.mover.active = Some(active);
                    return;
                }
                // The scrub reports them.
                Found::LostLeaf(..) | Found::LostPage(_) => {}
                Found::Window(window) if window.has_index() => match self.consider(active, window) {
                    Some(back) => active = back,
                    None => return,
                },
                Found::Window(window) => {
                    active.stage = Some(Stage::Reading(window, VecDeque::new()));
                    self.mover.active = Some(active);
                    return;
                }
            }
        }
        let next = active.walk.cursor;
        let next = self.pause_phase(next);
        self.answer_defragment(active, Some(next));
    }

    /// A part of the index was loaded, perhaps the leaf that it waits for.
    pub(super) fn move_leaf_loaded(&mut self) {
        if let Some(mut active) = self
            .mover
            .active
            .take_if(|active| matches!(active.stage, Some(Stage::Leaf)))
        {
            active.stage = None;
            self.move_on(active);
        }
    }

    pub(super) fn answer_defragment(&mut self, active: Active, next: Option<ScrubCursor>) {
        let result = active.result;
        let reply = StoreReply::Defragmented {
            windows: active.walk.windows() as u32,
            moved: result.moved,
            extents_before: result.extents_before,
            extents_after: result.extents_after,
            is_full: result.is_full,
            damaged: result.damaged,
            next,
        };
        self.io.reply(active.ticket, reply);
    }

    /// A read of it has come.
    pub(super) fn move_read_done(&mut self, piece: u64, result: Result<Bytes, DiskError>) {
        let mut active = self.mover.active.take().expect("a move is under way");
        let Some(Stage::Reading(mut window, places)) = active.stage.take() else {
            panic!("nothing of {active:?} is being read")
        };
        match self.window_read_done(&mut window, piece, result) {
            Step::Working => {
                active.stage = Some(Stage::Reading(window, places));
                self.mover.active = Some(active);
            }
            Step::Indexed => {
                if let Some(active) = self.consider(active, window) {
                    self.move_on(active);
                }
            }
            Step::Done => self.write_moved(active, *window, places),
            Step::IndexDamaged(..) => {
                // The scrub reports it.
                self.close_window(&window);
                self.move_on(active);
            }
        }
    }

    /// The index page is known: begins to read what is to be moved, if anything is. Else gives the request back.
    fn consider(&mut self, mut active: Active, mut window: Box<Window>) -> Option<Active> {
        let is_evacuated = matches!(self.mover.phase, Phase::Evacuate(_));
        let runs = match (self.poisoned.is_some(), is_evacuated) {
            (true, _) => Vec::new(),
            (false, true) => self.take_for_evacuation(&window, &mut active.result),
            (false, false) => self.take_in_order(&window, &mut active.result),
        };
        if runs.is_empty() {
            self.close_window(&window);
            return Some(active);
        }
        let places = runs
            .into_iter()
            .flat_map(|run| run.place..run.place + run.count)
            .collect();
        window.keep_intact();
        let step = self.read_window(&mut window, |engine, place| {
            !is_evacuated || engine.space.allocator.is_closed(place)
        });
        assert_eq!(step, Step::Working, "what is to be moved is to be read");
        active.stage = Some(Stage::Reading(window, places));
        self.mover.active = Some(active);
        None
    }

    /// Takes a few long runs for all of a window, if that is clearly better than what there is.
    fn take_in_order(&mut self, window: &Window, result: &mut Outcome) -> Vec<Extent> {
        let (blocks, before) = extents(window.entries().iter().filter_map(Entry::data_place));
        if before < MOVE_EXTENTS_MIN || before <= blocks.div_ceil(MOVE_EXTENT_BLOCKS) {
            return Vec::new();
        }
        let runs = self.take_for_move(blocks, before, result);
        if runs.is_empty() && !result.is_full {
            self.mover.room.note_stuck(blocks);
        } else if !runs.is_empty() {
            result.extents_before += before;
            result.extents_after += runs.len() as u32;
        }
        runs
    }

    /// Blocks that the mover leaves free.
    pub(super) fn kept_from_moves(&self) -> u64 {
        self.metadata_reserve() + self.limits.overwrite_reserve_blocks + u64::from(self.limits.run_blocks)
    }

    /// Takes a few long runs, if that is clearly better than what there is and leaves enough space: of what was emptied for
    /// that, else of what is free.
    fn take_for_move(&mut self, blocks: u32, before: u32, result: &mut Outcome) -> Vec<Extent> {
        let enough = self.kept_from_moves() + u64::from(blocks);
        if self.space.free() < enough || self.space.allocator.free() < u64::from(blocks) {
            result.is_full = true;
            return Vec::new();
        }
        let runs_max = MOVE_RUNS_MAX.min(before / 2);
        if self.mover.room.may_take(blocks) {
            let emptied = self.take_runs(blocks, runs_max, Allocator::take_closed);
            if !emptied.is_empty() {
                return emptied;
            }
            self.mover.room.note_too_large(blocks);
            self.space.allocator.look_again();
        }
        self.take_runs(blocks, runs_max, |allocator, want, _| allocator.take_open_run(want))
    }

    /// Takes at most so many runs that together have so many blocks; or none. `take` is told how many blocks it takes at the
    /// most and at least.
    fn take_runs(
        &mut self,
        blocks: u32,
        runs_max: u32,
        take: impl Fn(&mut Allocator, u32, u32) -> Option<Extent>,
    ) -> Vec<Extent> {
        let mut runs: Vec<Extent> = Vec::with_capacity(1);
        let mut left = blocks;
        while left > 0 && (runs.len() as u32) < runs_max {
            let least = left.div_ceil(runs_max - runs.len() as u32);
            let Some(run) = take(&mut self.space.allocator, left, least) else {
                break;
            };
            left -= run.count;
            runs.push(run);
        }
        if left > 0 {
            let places = runs.drain(..).flat_map(|run| run.place..run.place + run.count);
            places.for_each(|place| self.space.allocator.release(place));
        }
        runs
    }

    /// All of the data was read: writes what is intact to its new places.
    fn write_moved(&mut self, mut active: Active, mut window: Window, mut places: VecDeque<u32>) {
        let found = self.note_found(&window);
        active.result.damaged.extend(found);
        let first = window.range().start();
        let mut writes = WriteList::default();
        let mut moved = Move {
            key: window.key,
            blocks: Vec::with_capacity(window.intact.len()),
        };
        for (slot, bytes) in std::mem::take(&mut window.intact) {
            let to = places.pop_front().expect("a place was taken for each block");
            moved.blocks.push(MovedBlock {
                block: first + u32::from(slot),
                was: window.entry(slot),
                to,
            });
            writes.push(to, bytes);
        }
        self.close_window(&window);
        places.into_iter().for_each(|place| self.space.allocator.release(place));
        if moved.blocks.is_empty() || self.poisoned.is_some() {
            return self.give_up(active, moved);
        }
        let writes = writes.into_writes();
        self.zero_ahead.note_used(&writes);
        active.stage = Some(Stage::Writing(moved, writes.len()));
        self.mover.active = Some(active);
        for (place, buffers) in writes {
            self.write(Purpose::MoveWrite, place, buffers);
        }
    }

    pub(super) fn move_write_done(&mut self) {
        let active = self.mover.active.as_mut().expect("a move is under way");
        match active.stage.take() {
            Some(Stage::Writing(moved, 1)) => active.stage = Some(Stage::Waiting(moved, 0)),
            Some(Stage::Writing(moved, left)) => active.stage = Some(Stage::Writing(moved, left - 1)),
            other => panic!("nothing of {other:?} is being written"),
        }
    }

    /// Adds the records of a move that waits to the batch, if they fit beside what it has.
    pub(super) fn add_move(&mut self, building: &mut Building) {
        if !self.move_waits() {
            return;
        }
        let mut active = self.mover.active.take().expect("a move waits");
        let Some(Stage::Waiting(mut moved, batches)) = active.stage.take() else {
            unreachable!("it was looked at")
        };
        let key = moved.key.chunk;
        let at = Target {
            group: key.group,
            layer: key.layer,
            range: page_range(moved.key),
        };
        if self.catalog.is_doomed(&key) {
            return self.give_up(active, moved);
        }
        let mut later = building.touches(&at);
        if !later {
            let unknown: Vec<Unknown> = self.catalog.unknown(key, at.range).collect();
            if unknown.contains(&Unknown::Broken) {
                return self.give_up(active, moved);
            }
            match self.load_all(unknown, For::Write) {
                Err(_) => return self.give_up(active, moved),
                Ok(true) => {}
                Ok(false) => {
                    self.loads.pinned_for_writes.extend(at.pages());
                    later = true;
                }
            }
        }
        if !later {
            self.drop_changed(&mut moved);
            let records = moved.records();
            let bytes: usize = records.iter().map(Record::encoded_bytes).sum();
            let pages = pages_for(building.bytes_max + bytes) as u64;
            let needed = self.metadata_reserve() + building.pages + 2 + u64::from(building.blocks) + pages;
            if moved.blocks.is_empty() || self.space.free() < needed {
                return self.give_up(active, moved);
            }
            later = building.bytes_max + bytes > body_capacity(self.limits.batch_record_pages_max);
            if !later {
                building.bytes_max += bytes;
                building.pages += 2;
                building.drafts.extend(records.into_iter().map(Draft::Ready));
                active.result.moved += moved.blocks.len() as u32;
                active.stage = Some(Stage::Committing);
                self.mover.active = Some(active);
                return;
            }
        }
        if batches == MOVE_BATCHES_MAX {
            return self.give_up(active, moved);
        }
        active.stage = Some(Stage::Waiting(moved, batches + 1));
        self.mover.active = Some(active);
    }

    fn move_waits(&self) -> bool {
        matches!(
            self.mover.active,
            Some(Active {
                stage: Some(Stage::Waiting(..)),
                ..
            })
        )
    }

    /// Blocks that are not any more what was read stay where they are. It is not enough that a block is at its place: it
    /// may have been written twice meanwhile, the second time to the place that the first had given back.
    fn drop_changed(&mut self, moved: &mut Move) {
        let key = moved.key.chunk;
        let unchecked = self.limits.canary.move_unchecked();
        let blocks = std::mem::take(&mut moved.blocks);
        for block in blocks {
            let now = self.entry_now(key, block.block);
            let is_data = now.is_some_and(|now| now.data_place().is_some());
            if now == Some(block.was) || (unchecked && is_data) {
                moved.blocks.push(block);
            } else {
                self.space.allocator.release(block.to);
            }
        }
    }

    /// The batch with the records is durable.
    pub(super) fn move_committed(&mut self) {
        let active = self
            .mover
            .active
            .take_if(|active| matches!(active.stage, Some(Stage::Committing)));
        if let Some(active) = active {
            self.io.counters.blocks_moved += u64::from(active.result.moved);
            self.note_evacuated(active.result.moved);
            self.move_on(active);
        }
    }

    /// Nothing of this window is moved: its new places are free again, and the request goes on behind it.
    fn give_up(&mut self, mut active: Active, moved: Move) {
        if let Some(error) = self.poisoned {
            return self.fail(active.ticket, StoreError::Poisoned(error));
        }
        for block in moved.blocks {
            self.space.allocator.release(block.to);
        }
        active.result.extents_before = 0;
        active.result.extents_after = 0;
        self.move_on(active);
    }

    /// Panics if a place that was taken for a move is free, or holds data already.
    pub(super) fn check_move(&self) {
        let places: Vec<u32> = match self.mover.active.as_ref().and_then(|active| active.stage.as_ref()) {
            Some(Stage::Reading(_, places)) => places.iter().copied().collect(),
            Some(Stage::Writing(moved, _) | Stage::Waiting(moved, _)) => moved.blocks.iter().map(|b| b.to).collect(),
            Some(Stage::Leaf | Stage::Checkpoint | Stage::Committing) | None => Vec::new(),
        };
        for place in places {
            assert!(self.space.allocator.is_taken(place), "block {place} of a move is free");
            assert!(!self.space.data.get(place), "block {place} of a move holds data");
        }
    }

    /// The store has stopped writing. What is being read ends by itself.
    pub(super) fn poison_move(&mut self, error: DiskError) {
        let writes = |active: &mut Active| !matches!(active.stage, Some(Stage::Reading(..)));
        if let Some(active) = self.mover.active.take_if(writes) {
            self.fail(active.ticket, StoreError::Poisoned(error));
        }
    }
}

/// Blocks, and runs of places that follow each other.
fn extents(places: impl Iterator<Item = u32>) -> (u32, u32) {
    let (mut blocks, mut extents, mut last) = (0, 0, None);
    for place in places {
        extents += u32::from(last.is_none_or(|last: u32| last + 1 != place));
        last = Some(place);
        blocks += 1;
    }
    (blocks, extents)
}
