//! Looks at what lies on a device, as it would be found after a restart: opens a copy of it with production's store and
//! reads everything of a group.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::Bytes;
use cairn_proto::block::{BlockState, Content, Cursor, Run};
use cairn_proto::disk::DiskToken;
use cairn_proto::ids::{Generation, GroupId, Layer, VolumeId};
use cairn_proto::limits::{BLOCK_BYTES, FRAME_BLOCKS_MAX};
use cairn_proto::time::Time;
use cairn_proto::units::BlockRange;
use cairn_storage_node::store::{
    OpenExpectation, Store, StoreAction, StoreLimits, StoreReply, StoreRequest, StoreState, Ticket,
};
use cairn_storage_node::testing::MemoryDevice;

use super::disk::token_of;
use super::model_store::Kept;

/// Runs asked for at once.
const RUNS_MAX: usize = 512;

/// A device that was opened to be looked at.
pub enum Inspected {
    /// A copy of the device, under production's store.
    Device(Box<Opened>),
    /// What the model of a store keeps.
    Model(Rc<RefCell<Kept>>),
}

/// A device under production's store.
pub struct Opened {
    device: MemoryDevice,
    store: Store,
    next_ticket: u64,
}

/// What a group's replica holds: by chunk, layer and block, the state and, for data, a digest of the content.
pub type Held = BTreeMap<(u32, Layer, u32), (BlockState, u32)>;

impl Inspected {
    /// Opens a device that nobody else uses.
    ///
    /// # Errors
    /// In words, when it can't be opened.
    pub fn open(mut device: MemoryDevice, limits: &StoreLimits) -> Result<Inspected, String> {
        // Nobody waits any more for what was under way.
        let left: Vec<DiskToken> = device.in_flight().map(token_of).collect();
        for token in left {
            let _ = device.complete(token);
        }
        let geometry = device.geometry();
        let store = Store::open(OpenExpectation::default(), geometry, limits.clone(), Time::ZERO);
        let mut opened = Opened {
            device,
            store,
            next_ticket: 0,
        };
        opened.pump(None);
        match opened.store.state() {
            StoreState::Open => Ok(Inspected::Device(Box::new(opened))),
            other => Err(format!("{other:?}")),
        }
    }

    /// What the model of a store keeps.
    pub fn of_model(kept: Rc<RefCell<Kept>>) -> Inspected {
        Inspected::Model(kept)
    }

    fn ask(&mut self, request: StoreRequest) -> Result<StoreReply, String> {
        let reply = match self {
            Inspected::Device(opened) => opened.ask(request).ok_or("no answer")?,
            Inspected::Model(kept) => kept.borrow().look(&request),
        };
        match reply {
            StoreReply::Failed(error) => Err(format!("{error:?}")),
            reply => Ok(reply),
        }
    }

    /// The highest generation of a volume that it remembers.
    pub fn seal_of(&self, volume: VolumeId) -> Generation {
        match self {
            Inspected::Device(opened) => opened.store.seal_of(volume),
            Inspected::Model(kept) => kept.borrow().seal_of(volume),
        }
    }

    /// One block of a group, with its content if it is data.
    ///
    /// # Errors
    /// In words, when there is no replica, or it can't be read.
    pub fn block(&mut self, group: GroupId, layer: Layer, range: BlockRange) -> Result<(BlockState, Bytes), String> {
        match self.ask(StoreRequest::Read { group, layer, range })? {
            StoreReply::Read { blocks, bytes } => Ok((blocks[0], bytes.into_iter().next().unwrap_or_default())),
            _ => Err("a strange answer".to_string()),
        }
    }

    /// Everything that a group's replica holds.
    ///
    /// # Errors
    /// In words, when there is no replica, or it can't be read.
    pub fn held(&mut self, group: GroupId) -> Result<Held, String> {
        let mut held = Held::new();
        let mut from = Some(Cursor::default());
        while let Some(cursor) = from {
            let request = StoreRequest::Collect {
                group,
                from: cursor,
                to: Cursor::END,
                above: Default::default(),
                runs_max: RUNS_MAX,
            };
            let StoreReply::Collected { runs, next, .. } = self.ask(request)? else {
                return Err("a strange answer".to_string());
            };
            for run in runs {
                self.add_run(group, &run, &mut held)?;
            }
            assert!(next.is_none_or(|next| next > cursor), "listing goes on");
            from = next;
        }
        Ok(held)
    }

    fn add_run(&mut self, group: GroupId, run: &Run, held: &mut Held) -> Result<(), String> {
        let (chunk, layer) = (run.range.chunk(), run.layer);
        if !matches!(run.state.content, Content::Data(_)) {
            for block in run.range.start()..run.range.end() {
                held.insert((chunk.0, layer, block), (run.state, 0));
            }
            return Ok(());
        }
        let mut start = run.range.start();
        while start < run.range.end() {
            let count = (run.range.end() - start).min(FRAME_BLOCKS_MAX);
            let range = BlockRange::new(chunk, start, count).expect("part of a range");
            let StoreReply::Read { blocks, bytes } = self.ask(StoreRequest::Read { group, layer, range })? else {
                return Err("a strange answer".to_string());
            };
            let mut contents = bytes.iter().flat_map(|piece: &Bytes| piece.chunks_exact(BLOCK_BYTES));
            for (state, block) in blocks.into_iter().zip(start..) {
                let digest = match state.content {
                    Content::Data(_) => crc32fast::hash(contents.next().expect("as many as there are states")),
                    _ => 0,
                };
                held.insert((chunk.0, layer, block), (state, digest));
            }
            start += count;
        }
        Ok(())
    }
}

impl Opened {
    /// Lets the store work, until it has nothing to do or has answered.
    fn pump(&mut self, wanted: Option<Ticket>) -> Option<StoreReply> {
        let mut answer = None;
        loop {
            let mut tokens = Vec::new();
            while let Some(action) = self.store.poll_action() {
                match action {
                    StoreAction::Disk(op) => {
                        tokens.push(token_of(&op));
                        self.device.submit(op);
                    }
                    StoreAction::Reply(ticket, reply) if Some(ticket) == wanted => answer = Some(reply),
                    StoreAction::Reply(..) => {}
                }
            }
            if tokens.is_empty() {
                return answer;
            }
            for token in tokens {
                let done = self.device.complete(token);
                self.store.handle_disk(Time::ZERO, done);
            }
        }
    }

    fn ask(&mut self, request: StoreRequest) -> Option<StoreReply> {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.store.submit(Time::ZERO, ticket, request);
        self.pump(Some(ticket))
    }
}

/// The first difference between two replicas, in words. Blocks of one that is `rotten` may be damaged, as long as they are
/// known to be of the same version, or of a newer one that nobody was told of (`is_open` says so of a chunk and a block in it).
pub fn difference(
    (a, a_rotten): (&Held, bool),
    (b, b_rotten): (&Held, bool),
    is_open: impl Fn(u32, u32) -> bool,
) -> Option<String> {
    let places: std::collections::BTreeSet<_> = a.keys().chain(b.keys()).collect();
    for place in places {
        let (left, right) = (a.get(place), b.get(place));
        let excused = match (left, right) {
            (Some((one, _)), Some((other, _))) => {
                let damaged = |state: &BlockState, rotten: bool| rotten && state.content == Content::Damaged;
                let open = || is_open(place.0, place.2);
                match one.version.cmp(&other.version) {
                    Ordering::Equal => damaged(one, a_rotten) || damaged(other, b_rotten),
                    Ordering::Greater => damaged(one, a_rotten) && open(),
                    Ordering::Less => damaged(other, b_rotten) && open(),
                }
            }
            _ => false,
        };
        if left != right && !excused {
            let (chunk, layer, block) = place;
            return Some(format!(
                "chunk {chunk} layer {layer} block {block}: {left:?} and {right:?}"
            ));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use cairn_proto::ids::{Seq, Version};

    use super::*;

    #[test]
    fn a_damaged_block_may_be_newer_than_others_only_where_it_lies_and_nobody_was_told() {
        let held = |content: Content, sequence: u64| -> Held {
            let generation = Generation::new(1).expect("it fits");
            let version = Version::new(generation, Seq::new(sequence).expect("it fits"));
            Held::from([((0, Layer(0), 7), (BlockState { content, version }, 0))])
        };
        let (older, newer) = (held(Content::Zero, 1), held(Content::Damaged, 2));
        let differ = |a_rotten, open| difference((&newer, a_rotten), (&older, false), |_, _| open).is_some();
        assert!(!differ(true, true));
        assert!(differ(true, false) && differ(false, true));
        // What the other has is newer: nothing excuses that.
        let (older, newer) = (held(Content::Damaged, 1), held(Content::Zero, 2));
        assert!(difference((&older, true), (&newer, false), |_, _| true).is_some());
        // Nor a block that can be read.
        let (older, newer) = (held(Content::Zero, 1), held(Content::Zero, 2));
        assert!(difference((&newer, true), (&older, true), |_, _| true).is_some());
    }
}
