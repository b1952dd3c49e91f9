//! Everything that can happen next, and what becomes of the state.

use super::device::Received;
use super::message::{End, Message};
use super::promises::Broken;
use super::rules::{Rule, Rules};
use super::scope::{Reads, Scope};
use super::state::{BLOCKS, Cell, Config, DEVICES, Op, Phase, Set, State, Version};

/// What becomes of a device's answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// It is heard at once.
    Heard,
    /// It is under way: heard later, or never.
    Late,
    /// It is lost, or there is none. The request may arrive again and be answered again.
    Lost,
}

/// One thing that happens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Meta grants the next generation to this holder.
    Grant(u8),
    /// A holder reads the group map, and asks the members to seal.
    ReadMap(u8),
    /// A request arrives at a device.
    Arrive(Message, Fate),
    /// A late answer is heard.
    Hear(Message),
    /// A holder issues a write or a discard.
    Write {
        /// Who.
        holder: u8,
        /// Where.
        block: u8,
        /// Whether it is a discard.
        discard: bool,
    },
    /// A holder reads from a device. Under read grants that is all of it, else others have to confirm.
    Read {
        /// Who.
        holder: u8,
        /// Where.
        block: u8,
        /// From whom.
        device: u8,
    },
    /// A device confirms a holder's generation.
    Confirm {
        /// Whose.
        holder: u8,
        /// Who.
        device: u8,
    },
    /// A device gives a read grant to a holder.
    GiveGrant {
        /// To whom.
        holder: u8,
        /// Who.
        device: u8,
    },
    /// A read grant runs out: first for the holder, then for the device, so in one step.
    GrantEnds {
        /// To whom.
        holder: u8,
        /// Whose.
        device: u8,
    },
    /// A holder proposes to eject a member.
    Eject {
        /// Who.
        holder: u8,
        /// Whom.
        device: u8,
    },
    /// A holder that reconciles waits no longer for members it has not heard, and listens to them no more: they will have to
    /// be ejected. The base is settled by that (rules 9 and 21).
    Settle(u8),
    /// A holder proposes that a device joins.
    Invite {
        /// Who.
        holder: u8,
        /// Whom.
        device: u8,
    },
    /// A holder proposes to admit a joiner.
    Admit {
        /// Who.
        holder: u8,
        /// Whom.
        device: u8,
    },
    /// Meta commits a proposal; the proposer hears of it at once, or not.
    Commit {
        /// Which proposal.
        proposal: Message,
        /// Whether it is heard.
        heard: bool,
    },
    /// A holder learns later that its proposal was committed.
    Learn(u8),
    /// A holder has tombstones dropped.
    DropTombstones {
        /// Who.
        holder: u8,
        /// Of which block.
        block: u8,
    },
    /// A holder releases its attachment, in order.
    Release(u8),
    /// A holder hears from a device that there is a newer one.
    Refusal {
        /// Who.
        holder: u8,
        /// From whom.
        device: u8,
    },
    /// A device outside the group drops its replica.
    Forget(u8),
    /// A device puts all on disk: only where it has answered before.
    Flush(u8),
    /// A device crashes and starts again: only where it has something to lose.
    Crash(u8),
}

/// The protocol under these rules, within these bounds.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    /// Which rules are obeyed.
    pub rules: Rules,
    /// What happens at all.
    pub scope: Scope,
}

/// A state and what it breaks.
pub struct Step {
    /// The state.
    pub state: State,
    /// What was broken on the way there.
    pub broken: Option<Broken>,
}

impl Model {
    /// What may happen. Some of it may turn out to change nothing.
    pub fn actions(&self, state: &State, out: &mut Vec<Action>) {
        out.clear();
        let scope = &self.scope;
        for g in 1..=scope.holders {
            self.actions_of_holder(state, g, out);
        }
        let room = state.net.has_room(1);
        let late = state.net.iter().filter(|m| matches!(m.end(), End::From(_))).count();
        for message in state.net.iter() {
            match message.end() {
                End::To(_) => {
                    if state.holder(message.holder()).acts() {
                        out.push(Action::Arrive(message, Fate::Heard));
                        if late < scope.late as usize && room {
                            out.push(Action::Arrive(message, Fate::Late));
                        }
                    }
                    out.push(Action::Arrive(message, Fate::Lost));
                }
                End::From(_) => out.push(Action::Hear(message)),
                End::Meta => {
                    for heard in [true, false] {
                        out.push(Action::Commit {
                            proposal: message,
                            heard,
                        });
                    }
                }
            }
        }
        for device in 0..DEVICES as u8 {
            let at = state.device(device);
            if scope.forgets && at.replica && !state.meta.config.all().has(device) {
                out.push(Action::Forget(device));
            }
            if at.seal != at.seal_on_disk || at.cells != at.cells_on_disk {
                out.push(Action::Flush(device));
                out.push(Action::Crash(device));
            }
        }
    }

    fn actions_of_holder(&self, state: &State, g: u8, out: &mut Vec<Action>) {
        let holder = state.holder(g);
        match holder.phase {
            Phase::Waiting | Phase::MapFirst => {
                if state.meta.granted == g - 1 {
                    out.push(Action::Grant(g));
                    if holder.phase == Phase::Waiting && !self.rules.has(Rule::MapAfterGrant) {
                        out.push(Action::ReadMap(g));
                    }
                }
            }
            Phase::Granted => out.push(Action::ReadMap(g)),
            Phase::Attaching => {
                if holder.complete && !holder.config.joining.is_empty() && !holder.is_settled() {
                    out.push(Action::Settle(g));
                }
                self.changes(state, g, out);
            }
            Phase::Serving => {
                self.changes(state, g, out);
                self.operations(state, g, out);
                let idle = holder.ops.iter().all(|op| *op == Op::Idle);
                if self.scope.releases && idle && holder.proposed.is_none() {
                    out.push(Action::Release(g));
                }
            }
            Phase::Released | Phase::Fenced => {}
        }
        for device in 0..DEVICES as u8 {
            if holder.granted_by.has(device) {
                out.push(Action::GrantEnds { holder: g, device });
            }
            let asked = holder.acts() && holder.config.all().has(device) && holder.phase != Phase::Granted;
            let heeds = self.scope.refusals || !self.rules.has(Rule::RefusalKills);
            if heeds && asked && state.device(device).seal > g {
                out.push(Action::Refusal { holder: g, device });
            }
        }
    }

    fn changes(&self, state: &State, g: u8, out: &mut Vec<Action>) {
        let holder = state.holder(g);
        if holder.proposed.is_some() {
            out.push(Action::Learn(g));
        }
        if holder.config.epoch >= self.scope.changes {
            return;
        }
        for device in 0..DEVICES as u8 {
            if self.scope.ejects && holder.may_eject(self.rules, device) {
                out.push(Action::Eject { holder: g, device });
            }
            if !self.scope.joins {
                continue;
            }
            let small = holder.config.insync.len() < DEVICES;
            if small && holder.config.joining.is_empty() && holder.may_propose(self.rules) {
                let outside = !holder.config.insync.has(device);
                if outside {
                    out.push(Action::Invite { holder: g, device });
                }
            }
            if holder.may_admit(self.rules, g, device) {
                out.push(Action::Admit { holder: g, device });
            }
        }
    }

    fn operations(&self, state: &State, g: u8, out: &mut Vec<Action>) {
        let holder = state.holder(g);
        let members = holder
            .config
            .insync
            .or(holder.proposed.map_or(Set::NONE, |next| next.insync));
        for block in 0..self.scope.blocks {
            let op = holder.ops[block as usize];
            if op == Op::Idle {
                let room = state.net.has_room(DEVICES);
                if holder.issued < self.scope.writes[g as usize - 1] && room {
                    for discard in [false, true] {
                        if self.scope.discards || !discard {
                            out.push(Action::Write {
                                holder: g,
                                block,
                                discard,
                            });
                        }
                    }
                }
                if self.scope.reads != Reads::No {
                    for device in holder.readable(self.rules, block).iter() {
                        out.push(Action::Read {
                            holder: g,
                            block,
                            device,
                        });
                    }
                }
                if self.scope.discards && self.may_drop(state, g, block) {
                    out.push(Action::DropTombstones { holder: g, block });
                }
            }
        }
        let reading = holder.ops.iter().any(|op| matches!(op, Op::Read { .. }));
        for device in members.iter() {
            let keeps = !self.rules.has(Rule::ConfirmAfter) && self.scope.reads == Reads::Confirmed;
            if reading || keeps {
                out.push(Action::Confirm { holder: g, device });
            }
            if self.scope.reads == Reads::Granted && !holder.granted_by.has(device) {
                out.push(Action::GiveGrant { holder: g, device });
            }
        }
    }

    /// Rule 24: whether a tombstone is on all of `I ∪ J`, and everything that is older as well.
    fn may_drop(&self, state: &State, g: u8, block: u8) -> bool {
        let holder = state.holder(g);
        let newest = holder.newest[block as usize];
        let next = holder.proposed.map_or(Set::NONE, |next| next.insync.or(next.joining));
        let all = holder.config.all().or(next);
        if !newest.is_absent() || newest == Cell::EMPTY {
            return false;
        }
        let holds = |d: u8| {
            let known = &holder.known[d as usize];
            (0..BLOCKS).all(|b| known[b].holds(holder.newest[b].version()))
        };
        let idle = holder.ops.iter().all(|op| !matches!(op, Op::Write { .. }));
        let holding = all.filter(holds);
        if self.rules.has(Rule::AllHoldTombstone) {
            idle && holding == all
        } else {
            holding.len() >= super::state::WRITE_QUORUM
        }
    }

    /// What becomes of the state; nothing if it can't happen, or changes nothing.
    pub fn step(&self, state: &State, action: Action) -> Option<Step> {
        let mut next = state.clone();
        let broken = self.apply(&mut next, action)?;
        if next == *state && broken.is_none() {
            return None;
        }
        self.forget_what_has_no_effect(&mut next);
        let broken = broken.or_else(|| next.check());
        Some(Step { state: next, broken })
    }

    fn apply(&self, state: &mut State, action: Action) -> Option<Option<Broken>> {
        let rules = self.rules;
        match action {
            Action::Grant(g) => {
                state.meta.granted = g;
                let holder = state.holder_mut(g);
                if holder.phase == Phase::MapFirst {
                    self.start(state, g);
                } else {
                    holder.phase = Phase::Granted;
                }
            }
            Action::ReadMap(g) => {
                let config = state.meta.config;
                let holder = state.holder_mut(g);
                holder.config = config;
                if holder.phase == Phase::Waiting {
                    holder.phase = Phase::MapFirst;
                } else {
                    self.start(state, g);
                }
            }
            Action::Arrive(request, fate) => return self.arrive(state, request, fate),
            Action::Hear(answer) => {
                state.net.remove(answer);
                return Some(state.hear(rules, answer));
            }
            Action::Write { holder, block, discard } => self.write(state, holder, block, discard),
            Action::Read { holder, block, device } => return self.read(state, holder, block, device),
            Action::Confirm { holder, device } => return self.confirm(state, holder, device),
            Action::GiveGrant { holder, device } => {
                if state.device(device).seal != holder || !state.device(device).replica {
                    return None;
                }
                let to = state.holder_mut(holder);
                to.granted_by = to.granted_by.with(device);
            }
            Action::GrantEnds { holder, device } => {
                let to = state.holder_mut(holder);
                to.granted_by = to.granted_by.without(device);
            }
            Action::Eject { holder, device } => {
                let config = state.holder(holder).config;
                state.propose(holder, config.insync.without(device), config.joining);
            }
            Action::Settle(g) => {
                let holder = state.holder_mut(g);
                holder.ignored = holder.config.insync.minus(holder.sealed);
                return Some(state.settle(rules, g));
            }
            Action::Invite { holder, device } => {
                let config = state.holder(holder).config;
                state.propose(holder, config.insync, config.joining.with(device));
            }
            Action::Admit { holder, device } => {
                let config = state.holder(holder).config;
                state.propose(holder, config.insync.with(device), config.joining.without(device));
                let last = state.meta.granted == holder;
                return Some(state.check_admitted(device).filter(|_| last));
            }
            Action::Commit { proposal, heard } => return self.commit(state, proposal, heard),
            Action::Learn(g) => {
                let (committed, holder) = (state.meta.config, state.holder(g));
                let proposed = holder.proposed?;
                let same = (committed.insync, committed.joining) == (proposed.insync, proposed.joining);
                let ours = same && (state.meta.proposer == g || !rules.has(Rule::OwnOutcome));
                if committed.epoch <= holder.config.epoch || !ours {
                    return None;
                }
                return Some(state.adopt_config(rules, g, committed));
            }
            Action::DropTombstones { holder, block } => self.drop_tombstones(state, holder, block),
            Action::Release(g) => {
                let holder = state.holder_mut(g);
                holder.phase = Phase::Released;
                holder.granted_by = Set::NONE;
            }
            Action::Refusal { holder, .. } => self.refused(state, holder),
            Action::Forget(device) => {
                let epoch = state.meta.config.epoch;
                state.device_mut(device).forget(rules, epoch);
            }
            Action::Flush(device) => state.device_mut(device).flush(),
            Action::Crash(device) => state.device_mut(device).crash(),
        }
        Some(None)
    }

    fn start(&self, state: &mut State, g: u8) {
        let holder = state.holder_mut(g);
        holder.phase = Phase::Attaching;
        let members = holder.config.insync;
        for device in members.iter() {
            state.net.send(Message::Seal { holder: g, device });
        }
    }

    /// Rule 8: a device that has granted reads to an older holder answers no newer one.
    fn is_held_back(&self, state: &State, g: u8, device: u8) -> bool {
        let older = (1..g).any(|older| state.holder(older).granted_by.has(device));
        older && self.rules.has(Rule::GrantsHold)
    }

    fn arrive(&self, state: &mut State, request: Message, fate: Fate) -> Option<Option<Broken>> {
        let End::To(device) = request.end() else {
            return None;
        };
        if self.is_held_back(state, request.holder(), device) {
            return None;
        }
        let before = *state.device(device);
        match state.device_mut(device).receive(self.rules, request) {
            Received::Refused => None,
            Received::Silent => (fate == Fate::Lost).then_some(None),
            Received::Answer(answer) => match fate {
                Fate::Heard => Some(state.hear(self.rules, answer)),
                Fate::Late => {
                    state.net.send(answer);
                    Some(None)
                }
                Fate::Lost => (before != *state.device(device)).then_some(None),
            },
        }
    }

    fn write(&self, state: &mut State, g: u8, block: u8, discard: bool) {
        let late = state.top() > g;
        let holder = state.holder_mut(g);
        holder.issued += 1;
        let version = Version::new(g, holder.issued);
        let cell = if discard {
            Cell::absent(version)
        } else {
            Cell::data(version)
        };
        holder.ops[block as usize] = Op::Write { cell, late };
        let members = holder.config.all();
        if discard {
            state.watch.discards[block as usize] |= 1 << version.0;
        }
        for device in members.iter() {
            state.net.send(Message::Write {
                holder: g,
                device,
                block,
                cell,
            });
        }
    }

    fn read(&self, state: &mut State, g: u8, block: u8, device: u8) -> Option<Option<Broken>> {
        let rules = self.rules;
        let at = state.device(device);
        if !at.replica || at.seal > g && rules.has(Rule::RefuseReads) || self.is_held_back(state, g, device) {
            return None;
        }
        let found = match at.cells[block as usize] {
            Cell::EMPTY => Cell::absent(at.floor),
            cell => cell,
        };
        state.device_mut(device).adopt(rules, g);
        let (seen, top) = (state.watch.seen[block as usize], state.watch.top[block as usize]);
        let holder = state.holder_mut(g);
        if self.scope.reads == Reads::Granted {
            if !holder.is_vouched(rules, holder.granted_by) {
                return None;
            }
            return Some(state.returned(g, block, found, seen, top));
        }
        // Who answers the read vouches by that, too.
        holder.ops[block as usize] = Op::Read {
            found,
            vouched: holder.confirmed.with(device),
            seen,
            top,
        };
        Some(state.settle(rules, g))
    }

    fn confirm(&self, state: &mut State, g: u8, device: u8) -> Option<Option<Broken>> {
        if state.device(device).seal != g || !state.device(device).replica {
            return None;
        }
        let holder = state.holder_mut(g);
        if !self.rules.has(Rule::ConfirmAfter) {
            holder.confirmed = holder.confirmed.with(device);
        }
        for op in &mut holder.ops {
            if let Op::Read { vouched, .. } = op {
                *vouched = vouched.with(device);
            }
        }
        Some(state.settle(self.rules, g))
    }

    /// Rule 18.
    fn commit(&self, state: &mut State, proposal: Message, heard: bool) -> Option<Option<Broken>> {
        let Message::Change {
            holder,
            epoch,
            insync,
            joining,
            ..
        } = proposal
        else {
            return None;
        };
        let now = state.meta.config;
        let newest = state.meta.granted == holder || !self.rules.has(Rule::LastGeneration);
        let follows = now.epoch == epoch || !self.rules.has(Rule::EpochMatches);
        if !newest || !follows || now.epoch >= self.scope.changes {
            return None;
        }
        let config = Config {
            epoch: now.epoch + 1,
            insync,
            joining,
        };
        state.meta.config = config;
        state.meta.proposer = holder;
        let to = state.holder(holder);
        let awaits = to
            .proposed
            .is_some_and(|next| (next.insync, next.joining) == (insync, joining));
        if !heard {
            return Some(None);
        }
        if !(awaits && to.acts()) {
            return None;
        }
        Some(state.adopt_config(self.rules, holder, config))
    }

    /// Rule 24.
    fn drop_tombstones(&self, state: &mut State, g: u8, block: u8) {
        let holder = state.holder_mut(g);
        let floor = holder.newest[block as usize].version();
        // The coordinator keeps no versions of absent blocks either: the floor says what there is to know.
        let absent = if self.rules.has(Rule::AbsenceVersion) {
            Cell::absent(floor)
        } else {
            Cell::EMPTY
        };
        holder.newest[block as usize] = absent;
        let config = holder.config;
        for device in config.all().iter() {
            state.net.send(Message::Drop {
                holder: g,
                device,
                floor,
                epoch: config.epoch,
            });
        }
    }

    /// Rule 5.
    fn refused(&self, state: &mut State, g: u8) {
        let holder = state.holder_mut(g);
        if self.rules.has(Rule::RefusalKills) {
            holder.phase = Phase::Fenced;
            holder.granted_by = Set::NONE;
            return;
        }
        for op in &mut holder.ops {
            if matches!(op, Op::Write { .. }) {
                *op = Op::Idle;
            }
        }
    }

    /// Takes messages out of the network that can have no effect any more, so that states which differ in nothing else are one.
    fn forget_what_has_no_effect(&self, state: &mut State) {
        let fences = [
            Rule::RefuseWrites,
            Rule::RefuseReads,
            Rule::RefuseResyncs,
            Rule::SealDurable,
            Rule::KeepGeneration,
        ];
        let fenced = fences.iter().all(|rule| self.rules.has(*rule));
        let seals = state.devices.map(|device| device.seal);
        let configs = state.devices.map(|device| device.epoch);
        let acts = state.holders.map(|holder| holder.acts());
        let meta = state.meta;
        let (epochs, last) = (self.rules.has(Rule::EpochMatches), self.rules.has(Rule::LastGeneration));
        state.net.retain(|message| match message.end() {
            End::To(device) => {
                let outdated = match message {
                    Message::Join { epoch, .. } | Message::Drop { epoch, .. } => epoch < configs[device as usize],
                    _ => false,
                };
                let fenced = fenced && message.holder() < seals[device as usize];
                !(fenced || outdated && self.rules.has(Rule::EpochOrder))
            }
            End::From(_) => acts[message.holder() as usize - 1],
            End::Meta => {
                let Message::Change { holder, epoch, .. } = message else {
                    return false;
                };
                (!epochs || epoch == meta.config.epoch) && (!last || holder == meta.granted)
            }
        });
    }
}
