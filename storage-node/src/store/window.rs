//! The walk over all that the device holds, which the scrub and the mover share, and the window, which it is made of: the
//! blocks of one index page as they are at one moment, read without disturbing anybody. The index page is not put into
//! memory, and none in memory counts as used.
//!
//! A window is a read like others (`reads.begin`): blocks that are given back while it is open are not reused before it
//! is closed. So what it finds at a place is what the index said when it was opened, whatever is written meanwhile.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use cairn_proto::block::Cursor;
use cairn_proto::checksum::{Checksum, block_checksum};
use cairn_proto::disk::DiskError;
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::units::BlockRange;

use super::catalog::Unknown;
use super::chunk::{ChunkKey, Home, Page, PageKey, Resident, page_of};
use super::engine::{Engine, Purpose};
use super::entry::Entry;
use super::leaf::LeafState;
use super::limits::{PAGE_ENTRIES, PAGES_PER_CHUNK, WALK_CHUNKS_MAX, WALK_WINDOWS_MAX};
use super::load::For;
use super::scrub_state::ScrubCursor;

/// Who looks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Walker {
    Scrub,
    Mover,
}

/// Why a block, or metadata, is damaged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    /// It is not what was written there.
    Mismatch,
    /// The device can't read it.
    Unreadable(DiskError),
    /// It was found damaged before, and is known to be lost.
    Lost,
}

/// What comes next in the walk over all that the device holds.
enum Next {
    /// Blocks that are listed one by one.
    Window(PageKey),
    /// Nothing up to here.
    Far(ScrubCursor),
    /// The leaf that begins at this chunk must be loaded.
    Leaf(ChunkKey, Home),
    /// The leaf that begins at this chunk is lost: nothing is known of its chunks.
    LostLeaf(ChunkKey),
    End,
}

/// What became of opening a window.
enum Opened {
    /// There is no page any more.
    Nothing,
    /// Nothing is known about its blocks.
    Lost,
    Window(Box<Window>),
}

/// A walk over all that the device holds, leaf by leaf, as far as one request takes it.
#[derive(Debug)]
pub(super) struct Walk {
    walker: Walker,
    /// Where it goes on.
    pub(super) cursor: ScrubCursor,
    /// Index pages, and leaves that can't be had, that it may still come to.
    left: usize,
    /// It has come to the end, or as far as one request may go.
    over: Option<Walked>,
}

impl Walk {
    pub(super) fn new(walker: Walker, cursor: ScrubCursor) -> Walk {
        Walk {
            walker,
            cursor,
            left: WALK_WINDOWS_MAX,
            over: None,
        }
    }

    /// Index pages that it has come to.
    pub(super) fn windows(&self) -> usize {
        WALK_WINDOWS_MAX - self.left
    }
}

/// How a walk ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Walked {
    /// All was looked at.
    All,
    /// One request goes no further.
    Enough,
}

/// What a walk has come to.
pub(super) enum Found {
    /// A window. Its index page is known, or is being read.
    Window(Box<Window>),
    /// An index page of which nothing is known.
    LostPage(PageKey),
    /// A leaf that can't be had: nothing is known of its chunks.
    LostLeaf(ChunkKey, Option<Home>, Why),
    /// A leaf is being loaded: the walk goes on when it has come.
    Loading,
    Over(Walked),
}

/// How far a window is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    Working,
    /// Its index page is known. The data is read when it is asked for.
    Indexed,
    Done,
    /// Its index page is damaged on the device and not in memory.
    IndexDamaged(Home, Why),
}

/// Places that follow each other, with the block of the page that each holds.
#[derive(Debug)]
struct Run {
    place: u32,
    slots: Vec<u8>,
}

/// A window that is open.
#[derive(Debug)]
pub(super) struct Window {
    walker: Walker,
    pub(super) key: PageKey,
    /// Its number among the reads.
    number: u64,
    /// Where the device has the page, if it is read too.
    home: Option<Home>,
    /// What the page said; `None` until it is read.
    entries: Option<Vec<Entry>>,
    /// What is wrong with the device's copy of a page that is in memory.
    pub(super) home_damaged: Option<(Home, Why)>,
    keep: bool,
    /// Data to be read.
    runs: VecDeque<Run>,
    in_flight: BTreeMap<u64, Run>,
    next_piece: u64,
    /// Blocks whose data was read and compared.
    pub(super) checked: u32,
    /// The intact ones, if they are kept.
    pub(super) intact: BTreeMap<u8, Bytes>,
    pub(super) damaged: Vec<(u8, Why)>,
}

/// The number of the read of the index page.
const INDEX_PIECE: u64 = 0;

impl Window {
    /// The blocks of the page.
    pub(super) fn range(&self) -> BlockRange {
        page_range(self.key)
    }

    /// The entry of one of its blocks. Its index page has been read.
    pub(super) fn entry(&self, slot: u8) -> Entry {
        self.entries.as_ref().expect("the index page was read")[usize::from(slot)]
    }

    /// The entries, in order. The index page has been read.
    pub(super) fn entries(&self) -> &[Entry] {
        self.entries.as_ref().expect("the index page was read")
    }

    /// Whether its index page is known, and nothing of it is being read.
    pub(super) fn has_index(&self) -> bool {
        self.entries.is_some() && self.home.is_none()
    }

    /// Keeps the content of intact blocks from now on.
    pub(super) fn keep_intact(&mut self) {
        self.keep = true;
    }

    /// Puts the blocks that hold data, at places that are wanted, in the order of their places.
    fn plan(&mut self, wanted: impl Fn(u32) -> bool) {
        let entries = self.entries();
        let mut places: Vec<(u32, u8)> = entries
            .iter()
            .zip(0u8..=255)
            .filter_map(|(entry, slot)| Some((entry.data_place()?, slot)))
            .filter(|(place, _)| wanted(*place))
            .collect();
        places.sort_unstable();
        let mut runs: VecDeque<Run> = VecDeque::new();
        for (place, slot) in places {
            match runs.back_mut() {
                Some(run) if run.place + run.slots.len() as u32 == place => run.slots.push(slot),
                _ => runs.push_back(Run {
                    place,
                    slots: vec![slot],
                }),
            }
        }
        self.runs = runs;
    }

    fn compare(&mut self, run: &Run, content: &Bytes) {
        assert_eq!(
            content.len(),
            run.slots.len() * BLOCK_BYTES,
            "bytes of a read at {}",
            run.place
        );
        for (i, slot) in run.slots.iter().enumerate() {
            let block = content.slice(i * BLOCK_BYTES..(i + 1) * BLOCK_BYTES);
            let volume_block = self.range().volume_block(u32::from(*slot));
            let found = block_checksum(self.key.chunk.group.volume, volume_block, &block);
            self.checked += 1;
            if found != Checksum(self.entry(*slot).checksum) {
                self.damaged.push((*slot, Why::Mismatch));
            } else if self.keep {
                self.intact.insert(*slot, block);
            }
        }
    }

    /// Takes in what came of a run. One that fails is tried again block by block.
    fn run_done(&mut self, piece: u64, result: Result<Bytes, DiskError>) {
        let run = self.in_flight.remove(&piece).expect("the piece is in flight");
        match result {
            Ok(content) => self.compare(&run, &content),
            Err(_) if run.slots.len() > 1 => {
                for (i, slot) in run.slots.iter().enumerate().rev() {
                    self.runs.push_front(Run {
                        place: run.place + i as u32,
                        slots: vec![*slot],
                    });
                }
            }
            Err(error) => {
                self.checked += 1;
                self.damaged.push((run.slots[0], Why::Unreadable(error)));
            }
        }
    }
}

impl Engine {
    /// Goes on with a walk. What it comes to is not come to again.
    pub(super) fn walk(&mut self, walk: &mut Walk) -> Found {
        loop {
            if let Some(over) = walk.over {
                return Found::Over(over);
            }
            if walk.left == 0 {
                return Found::Over(Walked::Enough);
            }
            let key = match self.next_window(walk.cursor) {
                Next::End => return Found::Over(Walked::All),
                Next::Far(cursor) => {
                    walk.cursor = cursor;
                    return Found::Over(Walked::Enough);
                }
                Next::Window(key) => key,
                Next::Leaf(key, home) => match self.load_all(vec![Unknown::Leaf(key, home)], For::Read) {
                    Ok(_) => return Found::Loading,
                    Err(error) => return self.pass_leaf(walk, key, Some(home), Why::Unreadable(error)),
                },
                Next::LostLeaf(key) => return self.pass_leaf(walk, key, None, Why::Lost),
            };
            walk.cursor = behind(key);
            walk.left -= 1;
            match self.open_window(walk.walker, key) {
                Opened::Nothing => {}
                Opened::Lost => return Found::LostPage(key),
                Opened::Window(window) => return Found::Window(window),
            }
        }
    }

    /// Goes on behind a leaf that can't be had.
    fn pass_leaf(&self, walk: &mut Walk, from: ChunkKey, home: Option<Home>, why: Why) -> Found {
        walk.left -= 1;
        match self.catalog.leaf_end(from) {
            Some(end) => walk.cursor = cursor(end, 0),
            None => walk.over = Some(Walked::All),
        }
        Found::LostLeaf(from, home, why)
    }

    /// The first page from a place on whose blocks are listed one by one.
    fn next_window(&self, from: ScrubCursor) -> Next {
        let first = ChunkKey {
            group: from.group,
            chunk: from.at.chunk,
            layer: from.at.layer,
        };
        let from_block = from.at.block;
        let (leaf, _) = self.catalog.leaf_of(first);
        let mut looked = 0;
        for (from, leaf) in self.catalog.leaves.range(leaf..) {
            match leaf.state {
                LeafState::Loaded => {}
                LeafState::OnDisk(home) => return Next::Leaf(*from, home),
                LeafState::Broken => return Next::LostLeaf(*from),
            }
            let chunks = self.catalog.chunks_in(*from).skip_while(|(key, _)| **key < first);
            for (key, chunk) in chunks.filter(|(key, _)| !self.catalog.is_doomed(key)) {
                if looked == WALK_CHUNKS_MAX {
                    return Next::Far(cursor(*key, 0));
                }
                looked += 1;
                let page = if *key == first { page_of(from_block) } else { 0 };
                let listed = |page: &&Page| !matches!(page, Page::Uniform(_));
                let last = PAGES_PER_CHUNK as u8 - 1;
                if let Some((page, _)) = chunk.pages.range(page..=last).find(|(_, page)| listed(page)) {
                    return Next::Window(PageKey { chunk: *key, page });
                }
            }
        }
        Next::End
    }

    /// Opens a window, and reads its index page if need be.
    fn open_window(&mut self, walker: Walker, key: PageKey) -> Opened {
        let chunk = self.catalog.chunks.get(&key.chunk);
        let (entries, home) = match chunk.and_then(|chunk| chunk.pages.get(&key.page)) {
            None | Some(Page::Uniform(_)) => return Opened::Nothing,
            Some(Page::Broken) => return Opened::Lost,
            Some(Page::OnDisk(home)) => (None, Some(*home)),
            Some(Page::Resident(resident)) => {
                // What a checkpoint that is being written has may not be on the device yet.
                let is_there = walker == Walker::Scrub && resident.epoch <= self.catalog.stored;
                (Some(resident.entries.to_vec()), resident.home.filter(|_| is_there))
            }
        };
        let window = Box::new(Window {
            walker,
            key,
            number: self.reads.begin(),
            home,
            entries,
            home_damaged: None,
            keep: false,
            runs: VecDeque::new(),
            in_flight: BTreeMap::new(),
            next_piece: INDEX_PIECE + 1,
            checked: 0,
            intact: BTreeMap::new(),
            damaged: Vec::new(),
        });
        if let Some(home) = home {
            let token = self.io.read(home.place, 1);
            self.in_flight.insert(token, Purpose::Walk(walker, INDEX_PIECE));
        }
        Opened::Window(window)
    }

    /// Takes in what came of one of its reads.
    pub(super) fn window_read_done(
        &mut self,
        window: &mut Window,
        piece: u64,
        result: Result<Bytes, DiskError>,
    ) -> Step {
        if piece != INDEX_PIECE {
            window.run_done(piece, result);
            return self.pump_window(window);
        }
        let home = window.home.take().expect("the index page was being read");
        let end = self.space.allocator.space().end as u32;
        let page = match result {
            Ok(block) => Resident::decode(&block, home, end).ok_or(Why::Mismatch),
            Err(error) => Err(Why::Unreadable(error)),
        };
        match (&mut window.entries, page) {
            (Some(_), Ok(_)) => {}
            (Some(_), Err(why)) => window.home_damaged = Some((home, why)),
            (entries, Ok(page)) => *entries = Some(page.entries.to_vec()),
            (None, Err(why)) => return Step::IndexDamaged(home, why),
        }
        Step::Indexed
    }

    /// Begins to read the data that stands at wanted places. Its index page is known.
    pub(super) fn read_window(&mut self, window: &mut Window, wanted: impl Fn(&Engine, u32) -> bool) -> Step {
        window.plan(|place| wanted(self, place));
        self.pump_window(window)
    }

    /// Sends what is to be read next, a few reads at a time.
    fn pump_window(&mut self, window: &mut Window) -> Step {
        while window.in_flight.len() < self.limits.walk_reads_in_flight {
            let Some(run) = window.runs.pop_front() else { break };
            let piece = window.next_piece;
            window.next_piece += 1;
            let token = self.io.read(run.place, run.slots.len() as u32);
            self.in_flight.insert(token, Purpose::Walk(window.walker, piece));
            window.in_flight.insert(piece, run);
        }
        if window.in_flight.is_empty() {
            Step::Done
        } else {
            Step::Working
        }
    }

    /// Lets go of what it read. Nothing of it may be in flight.
    pub(super) fn close_window(&mut self, window: &Window) {
        assert!(
            window.in_flight.is_empty() && window.home.is_none(),
            "{:?} is being read",
            window.key
        );
        self.reads.end(window.number);
    }

    /// What the index in memory says of a block now; `None` if its page is not there.
    pub(super) fn entry_now(&self, key: ChunkKey, block: u32) -> Option<Entry> {
        self.catalog.chunks.get(&key).and_then(|chunk| chunk.entry(block))
    }
}

/// The blocks of a page.
pub(super) fn page_range(key: PageKey) -> BlockRange {
    let first = u32::from(key.page) * PAGE_ENTRIES;
    BlockRange::new(key.chunk.chunk, first, PAGE_ENTRIES).expect("a page lies in its chunk")
}

/// The place behind a page.
fn behind(key: PageKey) -> ScrubCursor {
    ScrubCursor {
        group: key.chunk.group,
        at: Cursor::behind(key.chunk.layer, &page_range(key)),
    }
}

/// The place of a block.
fn cursor(key: ChunkKey, block: u32) -> ScrubCursor {
    let at = Cursor {
        chunk: key.chunk,
        layer: key.layer,
        block,
    };
    let group = key.group;
    ScrubCursor { group, at }
}

const _: () = assert!(PAGE_ENTRIES == 256, "a block of a page is named by one byte");
