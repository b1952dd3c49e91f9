//! Breadth first through all states, so that what is found is shortest.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::promises::Broken;
use super::state::{Holder, Phase, State};
use super::step::{Action, Model};
use super::visited::Visited;

/// States of a layer that a thread takes at a time.
const PIECE: usize = 64;

/// Bounds of a search.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Steps from the start.
    pub depth: u32,
    /// Bytes for states and fingerprints, about.
    pub memory: u64,
    /// Threads.
    pub threads: usize,
}

/// How a search ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// There is no state that it has not seen.
    Complete,
    /// All states up to the depth were seen.
    Depth,
    /// All states up to the depth reached were seen; more would not fit into memory.
    Memory,
    /// Whoever is told of the progress wanted no more.
    Stopped,
    /// A promise was broken.
    Broken,
}

/// What a search has found.
#[derive(Debug)]
pub struct Found {
    /// How it ended.
    pub end: End,
    /// Different states.
    pub states: u64,
    /// Steps that were tried.
    pub steps: u64,
    /// Steps from the start of which all states were seen.
    pub depth: u32,
    /// Messages were lost for want of room in the model, so not everything was seen.
    pub crowded: bool,
    /// What was broken, and the shortest way there.
    pub broken: Option<(Broken, Vec<Action>)>,
}

/// A state at rest: without its empty places.
struct Packed {
    rest: Rest,
    holders: Box<[Holder]>,
    messages: Box<[super::message::Message]>,
}

type Rest = (
    super::state::Meta,
    [super::state::Device; super::state::DEVICES],
    super::state::Watch,
);

impl Packed {
    fn new(state: &State) -> Packed {
        let used = state
            .holders
            .iter()
            .filter(|holder| holder.phase != Phase::Waiting)
            .count();
        Packed {
            rest: (state.meta, state.devices, state.watch),
            holders: state.holders[..used].into(),
            messages: state.net.as_slice().into(),
        }
    }

    fn unpack(&self) -> State {
        let mut holders = [Holder::default(); super::state::HOLDERS];
        holders[..self.holders.len()].copy_from_slice(&self.holders);
        State {
            meta: self.rest.0,
            devices: self.rest.1,
            watch: self.rest.2,
            holders,
            net: super::message::Net::of(&self.messages),
        }
    }

    fn bytes(&self) -> u64 {
        (size_of::<Packed>() + 32 + size_of_val(&*self.holders) + size_of_val(&*self.messages)) as u64
    }
}

/// One thread's part of the next layer.
#[derive(Default)]
struct Part {
    next: Vec<Packed>,
    bytes: u64,
    steps: u64,
    crowded: bool,
    broken: Vec<(Broken, u64, Action)>,
}

/// Searches from a state on. `tell` is told states, depth and size of the layer, once per layer, and may stop the search.
pub fn search(
    model: &Model,
    start: &State,
    bounds: Bounds,
    mut tell: impl FnMut(u64, u32, usize) -> ControlFlow<()>,
) -> Found {
    let visited = Visited::new();
    visited.insert(start.fingerprint(), 0);
    let mut layer = vec![Packed::new(start)];
    let mut found = Found {
        end: End::Complete,
        states: 1,
        steps: 0,
        depth: 0,
        crowded: false,
        broken: None,
    };
    while !layer.is_empty() {
        if found.depth >= bounds.depth {
            found.end = End::Depth;
            break;
        }
        let room = bounds.memory.saturating_sub(layer.iter().map(Packed::bytes).sum());
        let taken = AtomicUsize::new(0);
        let mut parts = Vec::new();
        if bounds.threads <= 1 || layer.len() < PIECE {
            parts.push(expand(model, &layer, &taken, &visited, room));
        } else {
            std::thread::scope(|scope| {
                let worker = || expand(model, &layer, &taken, &visited, room / bounds.threads as u64);
                let workers: Vec<_> = (0..bounds.threads).map(|_| scope.spawn(worker)).collect();
                for worker in workers {
                    parts.push(
                        worker
                            .join()
                            .expect("a searching thread panics only if a check of the model fails"),
                    );
                }
            });
        }
        found.steps += parts.iter().map(|part| part.steps).sum::<u64>();
        found.states = visited.len();
        found.crowded |= parts.iter().any(|part| part.crowded);
        let broken = parts.iter().flat_map(|part| &part.broken);
        if let Some((broken, from, action)) = broken.min_by_key(|(broken, from, _)| (*broken, *from)) {
            let mut way = way_to(model, start, &visited, *from);
            // The way may lead to the same state under other names of devices, so the last step is looked up again.
            let last = last_step(model, start, &way, *broken).unwrap_or(*action);
            way.push(last);
            found.end = End::Broken;
            found.broken = Some((*broken, way));
            return found;
        }
        if taken.load(Ordering::Relaxed) < layer.len() {
            found.end = End::Memory;
            break;
        }
        layer = parts.into_iter().flat_map(|part| part.next).collect();
        if !layer.is_empty() {
            found.depth += 1;
        }
        if tell(found.states, found.depth, layer.len()).is_break() {
            found.end = End::Stopped;
            break;
        }
    }
    found
}

fn expand(model: &Model, layer: &[Packed], taken: &AtomicUsize, visited: &Visited, room: u64) -> Part {
    let mut part = Part::default();
    let mut actions = Vec::new();
    loop {
        // Looked at before a piece is taken: who takes the last one has room for it.
        if part.bytes + visited.bytes() > room {
            return part;
        }
        let begin = taken.fetch_add(PIECE, Ordering::Relaxed);
        let Some(piece) = layer.get(begin..layer.len().min(begin + PIECE)) else {
            return part;
        };
        for packed in piece {
            let state = packed.unpack();
            let from = state.fingerprint();
            model.actions(&state, &mut actions);
            for action in &actions {
                let Some(step) = model.step(&state, *action) else {
                    continue;
                };
                part.steps += 1;
                part.crowded |= step.state.net.is_crowded();
                if let Some(broken) = step.broken {
                    part.broken.push((broken, from, *action));
                } else if visited.insert(step.state.fingerprint(), from) {
                    let packed = Packed::new(&step.state);
                    part.bytes += packed.bytes();
                    part.next.push(packed);
                }
            }
        }
    }
}

/// The actions that lead to a state that was visited. Replayed from the start with the true names of devices: at each step
/// the action is taken that leads to a state which is the next one but for names.
fn way_to(model: &Model, start: &State, visited: &Visited, to: u64) -> Vec<Action> {
    let mut marks = vec![to];
    while let Some(parent) = visited.parent(marks[marks.len() - 1]).filter(|parent| *parent != 0) {
        marks.push(parent);
    }
    marks.pop();
    let mut state = start.clone();
    let mut way = Vec::new();
    let mut actions = Vec::new();
    for mark in marks.iter().rev() {
        model.actions(&state, &mut actions);
        let next = actions.iter().find_map(|action| {
            let step = model.step(&state, *action)?;
            (step.state.fingerprint() == *mark).then_some((*action, step.state))
        });
        let (action, after) = next.expect("each state on the way was reached by a step from the one before");
        way.push(action);
        state = after;
    }
    way
}

/// The step after a way that breaks that kind of promise.
fn last_step(model: &Model, start: &State, way: &[Action], broken: Broken) -> Option<Action> {
    let mut state = start.clone();
    for action in way {
        state = model.step(&state, *action)?.state;
    }
    let mut actions = Vec::new();
    model.actions(&state, &mut actions);
    let breaks = |action: &Action| {
        let step = model.step(&state, *action)?;
        (std::mem::discriminant(&step.broken?) == std::mem::discriminant(&broken)).then_some(*action)
    };
    actions.iter().find_map(breaks)
}
