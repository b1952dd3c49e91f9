//! Listing what a replica holds.

use std::ops::Range;

use cairn_proto::block::{BlockState, Content, Cursor, Run};
use cairn_proto::ids::{GroupId, Version};
use cairn_proto::limits::BLOCKS_PER_CHUNK;
use cairn_proto::units::BlockRange;

use super::api::{StoreError, StoreReply, Ticket};
use super::catalog::Unknown;
use super::chunk::{Chunk, ChunkKey, Page, PageKey};
use super::engine::Engine;
use super::limits::{PAGE_ENTRIES, PAGES_PER_CHUNK};
use super::load::For;

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct CollectRequest {
    pub(super) group: GroupId,
    pub(super) from: Cursor,
    /// Exclusive.
    pub(super) to: Cursor,
    pub(super) above: Version,
    pub(super) runs_max: usize,
}

/// Runs that grow block by block.
struct Runs {
    runs: Vec<Run>,
    max: usize,
}

impl Runs {
    /// Adds blocks; returns whether there was room.
    fn push(&mut self, run: Run) -> bool {
        let kind = |state: &BlockState| std::mem::discriminant(&state.content);
        if let Some(last) = self.runs.last_mut() {
            let follows = last.layer == run.layer
                && last.range.chunk() == run.range.chunk()
                && last.range.end() == run.range.start()
                && last.state.version == run.state.version
                && kind(&last.state) == kind(&run.state);
            if follows {
                let count = last.range.count() + run.range.count();
                last.range = BlockRange::new(run.range.chunk(), last.range.start(), count).expect("within the chunk");
                return true;
            }
        }
        if self.runs.len() == self.max {
            return false;
        }
        self.runs.push(run);
        true
    }
}

/// Why listing stopped early.
enum Stop {
    Full(Cursor),
    Unknown(Unknown, Cursor),
}

impl Engine {
    pub(super) fn submit_collect(&mut self, ticket: Ticket, request: CollectRequest) {
        if request.runs_max == 0 || request.from.block >= BLOCKS_PER_CHUNK {
            return self.fail(
                ticket,
                StoreError::Invalid("a listing has room for a run and begins at a block"),
            );
        }
        self.wait_collect(ticket, request);
    }

    /// Returns whether it was answered; else it waits for index pages. What was looked at in vain is not looked at again:
    /// its pages may be evicted before the next ones have come, and so on for ever.
    pub(super) fn try_collect(&mut self, ticket: Ticket, request: &mut CollectRequest) -> bool {
        if !self.catalog.replicas.contains_key(&request.group) {
            self.fail(ticket, StoreError::NoReplica);
            return true;
        }
        let mut runs = Runs {
            runs: Vec::new(),
            max: request.runs_max,
        };
        let next = match self.list(request, &mut runs) {
            Ok(()) => None,
            Err(Stop::Full(cursor)) => Some(cursor),
            Err(Stop::Unknown(Unknown::Broken, _)) if runs.runs.is_empty() => {
                self.fail(ticket, StoreError::IndexDamaged);
                return true;
            }
            Err(Stop::Unknown(unknown, cursor)) => {
                let failed = self.load_all(vec![unknown], For::Read).err();
                if runs.runs.is_empty() {
                    if let Some(error) = failed {
                        self.fail(ticket, StoreError::Unreadable(error));
                        return true;
                    }
                    match unknown {
                        Unknown::OnDisk(key, _) => drop(self.loads.pinned_for_reads.insert(key)),
                        Unknown::Leaf(chunk, _) => drop(self.loads.pinned_for_reads.insert(PageKey { chunk, page: 0 })),
                        Unknown::Broken => {}
                    }
                    request.from = cursor;
                    return false;
                }
                Some(cursor)
            }
        };
        let runs = runs.runs;
        self.io.reply(ticket, StoreReply::Collected { runs, next });
        true
    }

    fn list(&self, request: &CollectRequest, runs: &mut Runs) -> Result<(), Stop> {
        let first = ChunkKey {
            group: request.group,
            chunk: request.from.chunk,
            layer: request.from.layer,
        };
        let last = ChunkKey {
            chunk: request.to.chunk,
            layer: request.to.layer,
            ..first
        };
        if last < first {
            return Ok(());
        }
        let (leaf, _) = self.catalog.leaf_of(first);
        for (from, leaf) in self.catalog.leaves.range(leaf..=last) {
            if let Some(unknown) = self.catalog.unknown_leaf(*from, leaf) {
                let at = first.max(*from);
                let block = if at == first { request.from.block } else { 0 };
                let (chunk, layer) = (at.chunk, at.layer);
                return Err(Stop::Unknown(unknown, Cursor { chunk, layer, block }));
            }
            let chunks = self.catalog.chunks_in(*from).skip_while(|(key, _)| **key < first);
            let chunks = chunks.take_while(|(key, _)| **key <= last);
            for (key, chunk) in chunks.filter(|(key, _)| !self.catalog.is_doomed(key)) {
                let from = if *key == first { request.from.block } else { 0 };
                let to = if *key == last {
                    request.to.block
                } else {
                    BLOCKS_PER_CHUNK
                };
                self.list_chunk(key, chunk, from..to, request.above, runs)?;
            }
        }
        Ok(())
    }

    /// Lists blocks of a chunk. What was found not to be what the index says is damaged, and keeps its version.
    fn list_chunk(
        &self,
        key: &ChunkKey,
        chunk: &Chunk,
        blocks: Range<u32>,
        above: Version,
        runs: &mut Runs,
    ) -> Result<(), Stop> {
        let has_damage = self
            .damaged
            .range((*key, blocks.start)..(*key, blocks.end))
            .next()
            .is_some();
        let cursor = |block| Cursor {
            chunk: key.chunk,
            layer: key.layer,
            block,
        };
        let mut add = |start: u32, count: u32, state: BlockState| {
            let nothing = state.content == Content::Absent && state.version == Version::ZERO;
            if nothing || state.version <= above {
                return Ok(());
            }
            let range = BlockRange::new(key.chunk, start, count).expect("within the chunk");
            let layer = key.layer;
            if runs.push(Run { layer, range, state }) {
                Ok(())
            } else {
                Err(Stop::Full(cursor(start)))
            }
        };
        let mut block = blocks.start;
        while block < blocks.end {
            let page = (block / PAGE_ENTRIES) as u8;
            let end = ((u32::from(page) + 1) * PAGE_ENTRIES).min(blocks.end);
            match chunk.pages.get(&page) {
                Some(Page::Resident(resident)) => {
                    for block in block..end {
                        let mut state = resident.entries[(block % PAGE_ENTRIES) as usize].state();
                        if has_damage && self.damaged.contains(&(*key, block)) {
                            state.content = Content::Damaged;
                        }
                        add(block, 1, state)?;
                    }
                    block = end;
                }
                Some(Page::Uniform(uniform)) => {
                    add(block, end - block, uniform.entry().state())?;
                    block = end;
                }
                None => {
                    let next = chunk.pages.keys().find(|next| *next > page);
                    let next = next.map_or(PAGES_PER_CHUNK, u32::from);
                    let end = (next * PAGE_ENTRIES).min(blocks.end);
                    add(block, end - block, chunk.floor.entry().state())?;
                    block = end;
                }
                Some(Page::OnDisk(home)) => {
                    let key = PageKey { chunk: *key, page };
                    return Err(Stop::Unknown(Unknown::OnDisk(key, *home), cursor(block)));
                }
                Some(Page::Broken) => return Err(Stop::Unknown(Unknown::Broken, cursor(block))),
            }
        }
        Ok(())
    }
}
