//! Random walks: far beyond the depth that a search sees whole, with everything that the model knows going on at once. Each
//! ends with a member dead for good and all else well: then operations must complete (promise 4).

use super::message::{End, Message};
use super::promises::Broken;
use super::rules::Rules;
use super::scope::{Reads, Scope};
use super::state::{HOLDERS, Op, Phase, Set, State, WRITE_QUORUM};
use super::step::{Action, Fate, Model};
use crate::rng::Rng;

/// Steps of a walk.
const STEPS: u32 = 160;
/// Steps to heal in: a bound on what a fair schedule takes.
const HEALING_STEPS: u32 = 400;
/// Messages of a holder that takes over, serves, writes and reads.
const ROOM_TO_HEAL: usize = 26;
/// Configuration changes of a holder that heals.
const CHANGES_TO_HEAL: u8 = 4;

/// The widest scope. The last holder is kept for the end.
pub const WIDE: Scope = Scope {
    blocks: 2,
    writes: [3, 3, 3, 2],
    discards: true,
    reads: Reads::Confirmed,
    holders: HOLDERS as u8 - 1,
    changes: 12,
    ejects: true,
    joins: true,
    late: 3,
    releases: true,
    forgets: true,
    refusals: true,
    ..Scope::plain("walk")
};

/// How a walk went.
#[derive(Clone, Debug, Default)]
pub struct Walk {
    /// Steps that were made.
    pub steps: u32,
    /// Generations that were granted.
    pub attachments: u8,
    /// Configuration changes that were committed.
    pub changes: u8,
    /// Some write was acknowledged.
    pub acknowledged: bool,
    /// There was no room for more messages in the model, so that progress was not judged.
    pub crowded: bool,
    /// What was broken, and the way there from the start.
    pub broken: Option<(Broken, Vec<Action>)>,
}

/// The world that a walk with this seed goes through: half of them read under grants.
pub fn model_of(rules: Rules, seed: u64) -> Model {
    let reads = if seed.is_multiple_of(2) {
        Reads::Granted
    } else {
        Reads::Confirmed
    };
    let scope = Scope { reads, ..WIDE };
    Model { rules, scope }
}

/// The same with room for what happens at the end, to tell a walk by.
pub fn whole_model(rules: Rules, seed: u64) -> Model {
    let mut model = model_of(rules, seed);
    model.scope.holders = HOLDERS as u8;
    model.scope.changes += CHANGES_TO_HEAL;
    model
}

/// Walks.
pub fn walk(rules: Rules, seed: u64) -> Walk {
    let model = model_of(rules, seed);
    let mut rng = Rng::stream(seed, "model");
    let mut walker = Walker {
        model,
        state: model.scope.start(),
        way: Vec::new(),
        actions: Vec::new(),
        broken: None,
    };
    let steps = 20 + rng.below(STEPS.into()) as u32;
    for _ in 0..steps {
        if !walker.wander(&mut rng) {
            break;
        }
    }
    let mut report = Walk {
        steps: walker.way.len() as u32,
        attachments: walker.state.meta.granted,
        changes: walker.state.meta.config.epoch,
        acknowledged: walker.state.watch.acknowledged.iter().any(|version| version.0 > 0),
        ..Walk::default()
    };
    // Without room for messages the model can't tell who gets what: then nothing is said of progress.
    report.crowded = walker.state.net.is_crowded() || !walker.state.net.has_room(ROOM_TO_HEAL);
    if walker.broken.is_none() && !report.crowded {
        walker.heal(&mut rng);
    }
    report.broken = walker.broken.map(|broken| (broken, walker.way));
    report
}

struct Walker {
    model: Model,
    state: State,
    way: Vec<Action>,
    actions: Vec<Action>,
    broken: Option<Broken>,
}

/// How often a kind of action is drawn, to others.
fn weight(action: Action) -> u32 {
    match action {
        Action::Arrive(_, Fate::Heard) | Action::Write { .. } | Action::Admit { .. } => 12,
        Action::Learn(_) | Action::ReadMap(_) | Action::Confirm { .. } => 12,
        Action::Commit { heard: true, .. } | Action::Hear(_) | Action::DropTombstones { .. } => 6,
        Action::Arrive(..) | Action::Invite { .. } | Action::GiveGrant { .. } => 4,
        Action::Read { .. } | Action::Commit { .. } | Action::Forget(_) | Action::GrantEnds { .. } => 3,
        Action::Eject { .. } | Action::Settle(_) | Action::Flush(_) | Action::Crash(_) => 2,
        Action::Grant(_) | Action::Release(_) | Action::Refusal { .. } => 1,
    }
}

impl Walker {
    /// Makes one random step. False if there is none, or something broke.
    fn wander(&mut self, rng: &mut Rng) -> bool {
        let mut actions = std::mem::take(&mut self.actions);
        self.model.actions(&self.state, &mut actions);
        let mut weights: Vec<u32> = actions.iter().map(|action| weight(*action)).collect();
        let mut moved = false;
        while weights.iter().any(|weight| *weight > 0) {
            let drawn = rng.weighted(&weights);
            if self.act(actions[drawn]) {
                moved = true;
                break;
            }
            weights[drawn] = 0;
        }
        self.actions = actions;
        moved && self.broken.is_none()
    }

    /// Does that, if it changes something.
    fn act(&mut self, action: Action) -> bool {
        let Some(step) = self.model.step(&self.state, action) else {
            return false;
        };
        self.state = step.state;
        self.way.push(action);
        self.broken = self.broken.or(step.broken);
        true
    }

    /// One member of three is dead from now on, and all else is well. Whoever serves must go on; else a new holder must come
    /// to serve.
    fn heal(&mut self, rng: &mut Rng) {
        let insync = self.state.meta.config.insync;
        let dead = if insync.len() > WRITE_QUORUM {
            let members: Vec<u8> = insync.iter().collect();
            Some(*rng.pick(&members))
        } else {
            None
        };
        let alive = Set(0b1111).minus(dead.map_or(Set::NONE, Set::one));
        let g = self.state.meta.granted;
        let holder = self.state.holder(g);
        let known = holder.proposed.is_none() && holder.config == self.state.meta.config;
        if holder.phase == Phase::Serving && known {
            self.goes_on(g, alive);
        }
        if self.broken.is_none() {
            self.takes_over(alive, rng);
        }
    }

    /// A holder that serves completes what it has under way, and a read of each block; it needs nobody else for that.
    fn goes_on(&mut self, g: u8, alive: Set) {
        self.exchange(g, alive);
        self.confirm(g, alive);
        for block in 0..self.model.scope.blocks {
            let readable = self.state.holder(g).readable(self.model.rules, block).and(alive);
            let waits = self.state.holder(g).ops[block as usize] != Op::Idle;
            if waits || readable.is_empty() {
                return self.stalled(g, alive);
            }
        }
    }

    /// A new holder takes over, ejects who is dead, serves, writes and reads.
    fn takes_over(&mut self, alive: Set, rng: &mut Rng) {
        let g = self.state.meta.granted + 1;
        self.model.scope.holders = g;
        self.model.scope.changes += CHANGES_TO_HEAL;
        for holder in 1..g {
            for device in alive.iter() {
                self.act(Action::GrantEnds { holder, device });
            }
        }
        self.act(Action::Grant(g));
        self.act(Action::ReadMap(g));
        for _ in 0..HEALING_STEPS {
            self.exchange(g, alive);
            if self.broken.is_some() || self.state.holder(g).phase == Phase::Serving {
                break;
            }
            if !self.repair_membership(g, alive) {
                break;
            }
        }
        if self.broken.is_some() {
            return;
        }
        if self.state.holder(g).phase != Phase::Serving {
            return self.stalled(g, alive);
        }
        let discard = rng.chance(1, 2);
        for block in 0..self.model.scope.blocks {
            self.act(Action::Write {
                holder: g,
                block,
                discard,
            });
        }
        self.goes_on(g, alive);
        self.read_all(g, alive);
    }

    /// What a holder does about members that are missing, one thing at a time.
    fn repair_membership(&mut self, g: u8, alive: Set) -> bool {
        let proposal = self.state.net.iter().find(|m| m.end() == End::Meta && m.holder() == g);
        if let Some(proposal) = proposal {
            return self.act(Action::Commit { proposal, heard: true });
        }
        let mut actions = Vec::new();
        self.model.actions(&self.state, &mut actions);
        let wanted = |action: &&Action| match **action {
            Action::Eject { holder, device } => holder == g && !alive.has(device),
            Action::Admit { holder, .. } | Action::Settle(holder) => holder == g,
            _ => false,
        };
        let wanted = actions.iter().find(wanted).copied();
        wanted.is_some_and(|action| self.act(action))
    }

    fn read_all(&mut self, g: u8, alive: Set) {
        for block in 0..self.model.scope.blocks {
            for device in self.state.holder(g).readable(self.model.rules, block).and(alive).iter() {
                self.grant_reads(g, alive);
                self.act(Action::Read {
                    holder: g,
                    block,
                    device,
                });
                self.confirm(g, alive);
            }
        }
    }

    fn grant_reads(&mut self, g: u8, alive: Set) {
        for device in alive.and(self.state.holder(g).config.insync).iter() {
            self.act(Action::GiveGrant { holder: g, device });
        }
    }

    fn confirm(&mut self, g: u8, alive: Set) {
        for device in alive.and(self.state.holder(g).config.insync).iter() {
            if self.state.holder(g).ops.iter().any(|op| matches!(op, Op::Read { .. })) {
                self.act(Action::Confirm { holder: g, device });
            }
        }
    }

    /// All requests of the holder to those who are alive arrive, and are answered.
    fn exchange(&mut self, g: u8, alive: Set) {
        for _ in 0..HEALING_STEPS {
            let requests: Vec<Message> = self.state.net.iter().filter(|message| message.holder() == g).collect();
            let to_alive = |message: &&Message| matches!(message.end(), End::To(device) if alive.has(device));
            let moved = requests.iter().filter(to_alive).any(|message| {
                self.act(Action::Arrive(*message, Fate::Heard))
                    || self.is_silent(*message) && self.act(Action::Arrive(*message, Fate::Lost))
            });
            if !moved {
                return;
            }
        }
    }

    /// It is a request that is not answered.
    fn is_silent(&self, message: Message) -> bool {
        matches!(message, Message::Drop { .. })
    }

    fn stalled(&mut self, holder: u8, alive: Set) {
        let dead = Set(0b1111).minus(alive).iter().next();
        self.broken = Some(Broken::Stalled { holder, dead });
    }
}
