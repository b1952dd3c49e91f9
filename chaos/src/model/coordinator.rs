//! What a holder concludes from what it hears: rules 6, 9 to 12, 16, 17, 19 and 21 to 24.

use super::message::{End, Message};
use super::promises::Broken;
use super::rules::{Rule, Rules};
use super::state::{BLOCKS, Cell, Config, Holder, Op, Phase, Proposal, Set, State, WRITE_QUORUM};

/// `S(I)`: members to seal.
pub fn seal_quorum(insync: Set) -> usize {
    (insync.len() + 1).saturating_sub(WRITE_QUORUM).max(1)
}

/// `C(I)`: members to confirm a read.
pub fn confirm_quorum(insync: Set) -> usize {
    insync.len().min(WRITE_QUORUM)
}

impl Holder {
    /// Members of `I` that count while reconciling: sealed, and not to be ejected.
    fn counted(&self) -> Set {
        self.sealed.and(self.config.insync).minus(self.ignored)
    }

    /// Whether the device is known to hold the base, or the newest acknowledged version, of every block.
    pub fn is_equal(&self, device: u8) -> bool {
        let known = &self.known[device as usize];
        self.counted().has(device) && (0..BLOCKS).all(|b| known[b].holds(self.newest[b].version()))
    }

    /// Whether nothing can raise the base any more: every member of `I` was heard, or is not listened to.
    pub fn is_settled(&self) -> bool {
        self.phase == Phase::Serving || self.config.insync.minus(self.sealed).minus(self.ignored).is_empty()
    }

    /// Rule 22: whether a joiner has everything.
    pub fn is_admissible(&self, rules: Rules, g: u8, device: u8) -> bool {
        let has = |block| self.holds_or_supersedes(rules, g, device, block);
        self.adopted.has(device) && (!rules.has(Rule::AdmitEqual) || (0..BLOCKS).all(has))
    }

    /// Rule 22 for one block: equal to the base, or of this generation and not older than what was acknowledged.
    fn holds_or_supersedes(&self, rules: Rules, g: u8, device: u8, block: usize) -> bool {
        let (known, newest) = (self.known[device as usize][block], self.newest[block].version());
        if !known.is_known() {
            return false;
        }
        let version = known.version();
        version == newest || version > newest && (version.generation() == g || !rules.has(Rule::ResyncGeneration))
    }

    /// A device has said what it holds of a block. Answers come in any order.
    ///
    /// What a member of `I` holds only grows while this holder has it sealed. A joiner may be taken back, by resync copies, to an
    /// older version of a lower generation: there the last word counts, and if that was an outdated one, the copy is sent again.
    fn learn(&mut self, g: u8, device: u8, block: usize, cell: Cell) {
        let known = &mut self.known[device as usize][block];
        let older = known.is_known() && cell.version() < known.version();
        let grows = self.config.insync.has(device) || known.is_known() && known.version().generation() == g;
        if !(older && grows) {
            *known = cell;
        }
    }

    /// Rule 16: who may be read.
    pub fn readable(&self, rules: Rules, block: u8) -> Set {
        let insync = match self.proposed {
            Some(next) if rules.has(Rule::ReadBoth) => self.config.insync.and(next.insync),
            _ => self.config.insync,
        };
        if !rules.has(Rule::ReadNewest) {
            return insync;
        }
        let block = block as usize;
        insync.filter(|d| self.known[d as usize][block].holds(self.newest[block].version()))
    }

    /// Rule 17: whether these are enough to vouch for a read.
    pub fn is_vouched(&self, rules: Rules, by: Set) -> bool {
        let enough = |insync: Set| {
            let quorum = if rules.has(Rule::ConfirmQuorum) {
                confirm_quorum(insync)
            } else {
                seal_quorum(insync)
            };
            by.and(insync).len() >= quorum
        };
        let next = self.proposed.filter(|_| rules.has(Rule::ReadBoth));
        enough(self.config.insync) && next.is_none_or(|next| enough(next.insync))
    }

    /// Rules 7, 10, 19 and 20: whether it may propose to eject that member.
    pub fn may_eject(&self, rules: Rules, device: u8) -> bool {
        let next = self.config.insync.without(device);
        if !self.may_propose(rules) || !self.config.insync.has(device) || next.len() < WRITE_QUORUM {
            return false;
        }
        let serving = self.phase == Phase::Serving;
        if serving {
            return !rules.has(Rule::KnownOnNext) || self.is_known_on(next);
        }
        let others = self.counted().without(device);
        let copied = others == others.filter(|d| self.is_equal(d)) && others.len() >= WRITE_QUORUM;
        !self.is_equal(device) && (copied || !rules.has(Rule::CopyFirst))
    }

    /// Whether all members of `I` that were heard are equal. While the base is not settled, more may come and raise it.
    fn is_level(&self) -> bool {
        let counted = self.counted();
        self.complete && counted == counted.filter(|d| self.is_equal(d))
    }

    /// Rules 7 and 22: whether it may propose to admit that joiner. It stands in for a member that was not heard if it is equal
    /// to those that were: whoever comes later is compared with all of them.
    pub fn may_admit(&self, rules: Rules, g: u8, device: u8) -> bool {
        let next = self.config.insync.with(device);
        self.may_propose(rules)
            && self.config.joining.has(device)
            && (self.is_settled() || self.is_level() || !rules.has(Rule::SettledBase))
            && self.is_admissible(rules, g, device)
            && (self.is_known_on(next) || !rules.has(Rule::AdmitEqual))
    }

    /// Rule 7: whether it may propose anything.
    pub fn may_propose(&self, rules: Rules) -> bool {
        let complete = self.complete || (!rules.has(Rule::ProposeComplete) && !self.sealed.is_empty());
        complete && self.proposed.is_none() && matches!(self.phase, Phase::Attaching | Phase::Serving)
    }

    /// Rule 19: whether every acknowledged and every reconciled version is known durable on enough of them.
    fn is_known_on(&self, next: Set) -> bool {
        (0..BLOCKS).all(|block| {
            let has = |d: u8| self.known[d as usize][block].holds(self.newest[block].version());
            next.filter(has).len() >= next.len().min(WRITE_QUORUM)
        })
    }
}

impl State {
    /// A holder hears an answer.
    pub fn hear(&mut self, rules: Rules, answer: Message) -> Option<Broken> {
        let g = answer.holder();
        let holder = self.holder_mut(g);
        let (device, cells) = match answer {
            Message::Sealed { device, cells, .. } | Message::Joined { device, cells, .. } => (device, cells.map(Some)),
            Message::Durable {
                device, block, cell, ..
            } => {
                let mut cells = [None; BLOCKS];
                cells[block as usize] = Some(cell);
                (device, cells)
            }
            _ => unreachable!("{answer:?} is no answer"),
        };
        let member = holder.config.all().has(device);
        if !holder.acts() || !member || holder.ignored.has(device) && rules.has(Rule::IgnoreEjected) {
            return None;
        }
        if holder.ignored.has(device) {
            // Left out, rule 10 lets the answer end the matter.
            holder.ignored = holder.ignored.without(device);
            holder.proposed = None;
        }
        match answer {
            Message::Sealed { .. } => holder.sealed = holder.sealed.with(device),
            Message::Joined { .. } => holder.adopted = holder.adopted.with(device),
            _ => {}
        }
        for (block, cell) in cells.into_iter().enumerate() {
            if let Some(cell) = cell {
                holder.learn(g, device, block, cell);
            }
        }
        self.settle(rules, g)
    }

    /// Draws all conclusions at once: waiting with them would add nothing that the network does not do already.
    pub fn settle(&mut self, rules: Rules, g: u8) -> Option<Broken> {
        let mut broken = None;
        if self.holder(g).phase == Phase::Attaching {
            self.reconcile(rules, g);
        }
        if self.holder(g).phase == Phase::Serving {
            for block in 0..BLOCKS as u8 {
                broken = broken.or(self.acknowledge(rules, g, block));
                broken = broken.or(self.finish_read(rules, g, block));
            }
        }
        self.resync(rules, g);
        broken
    }

    /// Rules 6, 9 and 11.
    fn reconcile(&mut self, rules: Rules, g: u8) {
        let after_release = g > 1 && self.holder(g - 1).phase == Phase::Released;
        let holder = self.holder_mut(g);
        let insync = holder.config.insync;
        let fewer = usize::from(!rules.has(Rule::SealQuorum));
        let needed = (seal_quorum(insync) - fewer).max(1);
        holder.complete |= holder.sealed.and(insync).len() >= needed;
        let counted = holder.counted();
        for block in 0..BLOCKS {
            let versions = counted.iter().map(|d| holder.known[d as usize][block]);
            holder.newest[block] = versions.max_by_key(|cell| cell.version()).unwrap_or(Cell::EMPTY);
        }
        if !holder.complete {
            return;
        }
        let equal = counted.filter(|d| holder.is_equal(d));
        let ready = holder.proposed.is_none() && equal == insync;
        let on_next = holder.proposed.is_some_and(|next| next.insync.minus(equal).is_empty());
        let skipping = after_release && !rules.has(Rule::ReleaseReconciles);
        if skipping {
            for member in insync.iter() {
                holder.known[member as usize] = holder.newest;
            }
        }
        if ready
            || skipping
            || !rules.has(Rule::NonePending) && on_next
            || !rules.has(Rule::AllEqual) && holder.proposed.is_none() && equal == counted
        {
            holder.phase = Phase::Serving;
            return;
        }
        let newest = holder.newest;
        for device in counted.minus(equal).iter() {
            for (block, cell) in newest.into_iter().enumerate() {
                if !self.holder(g).known[device as usize][block].holds(cell.version()) {
                    self.net.send(Message::Repair {
                        holder: g,
                        device,
                        block: block as u8,
                        cell,
                    });
                }
            }
        }
    }

    /// Rule 12.
    fn acknowledge(&mut self, rules: Rules, g: u8, block: u8) -> Option<Broken> {
        let holder = self.holder_mut(g);
        let Op::Write { cell, late } = holder.ops[block as usize] else {
            return None;
        };
        let has = |d: u8| holder.known[d as usize][block as usize].holds(cell.version());
        let counting = if rules.has(Rule::JoiningUncounted) {
            holder.config.insync
        } else {
            holder.config.all()
        };
        let next = holder.proposed.filter(|_| rules.has(Rule::BothQuorums));
        let enough = |set: Set| set.filter(has).len() >= WRITE_QUORUM;
        if !enough(counting) || next.is_some_and(|next| !enough(next.insync)) {
            return None;
        }
        holder.ops[block as usize] = Op::Idle;
        holder.newest[block as usize] = cell;
        self.acknowledged(g, block, cell.version(), late)
    }

    /// Rule 17.
    fn finish_read(&mut self, rules: Rules, g: u8, block: u8) -> Option<Broken> {
        let holder = self.holder_mut(g);
        let Op::Read {
            found,
            vouched,
            seen,
            top,
        } = holder.ops[block as usize]
        else {
            return None;
        };
        if !holder.is_vouched(rules, vouched) {
            return None;
        }
        holder.ops[block as usize] = Op::Idle;
        self.returned(g, block, found, seen, top)
    }

    /// Rule 21: adoption first, then copies of what differs.
    ///
    /// A resync copy may take a device back to an older version, if the local one is of a lower generation. So a second copy
    /// for the same block must never be older than the first: until I/O is served there must be one base only. Repair copies
    /// go to a joiner before that.
    fn resync(&mut self, rules: Rules, g: u8) {
        let holder = self.holder(g);
        if !holder.complete || !matches!(holder.phase, Phase::Attaching | Phase::Serving) {
            return;
        }
        let (joining, adopted, newest) = (holder.config.joining, holder.adopted, holder.newest);
        let epoch = holder.config.epoch;
        let settled = holder.is_settled() || !rules.has(Rule::SettledBase);
        for device in joining.iter() {
            if !adopted.has(device) {
                self.net.send(Message::Join {
                    holder: g,
                    device,
                    epoch,
                });
                continue;
            }
            for (block, cell) in newest.into_iter().enumerate() {
                let (holder, block) = (g, block as u8);
                let known = self.holder(g).known[device as usize][block as usize];
                if settled && !self.holder(g).holds_or_supersedes(rules, g, device, block.into()) {
                    self.net.send(Message::Resync {
                        holder,
                        device,
                        block,
                        cell,
                    });
                } else if !settled && known.is_known() && !known.holds(cell.version()) {
                    // A repair copy can't take it back, so there may be more than one base.
                    self.net.send(Message::Repair {
                        holder,
                        device,
                        block,
                        cell,
                    });
                }
            }
        }
    }

    /// Proposes a change; rule 10: who is to be ejected is not listened to from now on.
    pub fn propose(&mut self, g: u8, insync: Set, joining: Set) {
        let holder = self.holder_mut(g);
        let (number, epoch) = (holder.proposals, holder.config.epoch);
        holder.proposals += 1;
        holder.ignored = holder.ignored.or(holder.config.insync.minus(insync));
        holder.proposed = Some(Proposal { insync, joining });
        self.net.send(Message::Change {
            holder: g,
            number,
            epoch,
            insync,
            joining,
        });
    }

    /// A holder learns that its proposal was committed. Writes under way go to a joiner as well (rule 12).
    pub fn adopt_config(&mut self, rules: Rules, g: u8, config: Config) -> Option<Broken> {
        let known_joining = self.holder(g).config.joining;
        for (block, op) in self.holder(g).ops.into_iter().enumerate() {
            let Op::Write { cell, .. } = op else { continue };
            for device in config.joining.minus(known_joining).iter() {
                self.net.send(Message::Write {
                    holder: g,
                    device,
                    block: block as u8,
                    cell,
                });
            }
        }
        let holder = self.holder_mut(g);
        let ejected = holder.config.insync.minus(config.insync);
        let admitted = config.insync.minus(holder.config.insync);
        holder.config = config;
        holder.proposed = None;
        holder.sealed = holder.sealed.minus(ejected).or(admitted);
        holder.ignored = holder.ignored.minus(ejected);
        holder.adopted = holder.adopted.and(config.joining);
        if rules.has(Rule::ForgetEjected) {
            for device in ejected.iter() {
                holder.known[device as usize] = [Cell::UNKNOWN; BLOCKS];
            }
            // Also what it has answered and is still under way, up to when it joins again: it may drop its replica meanwhile.
            let gone = ejected.or(config.joining.minus(known_joining));
            let is_of = |end: End| matches!(end, End::From(device) if gone.has(device));
            self.net
                .retain(|message| message.holder() != g || !is_of(message.end()));
        } else {
            let remembered = |d: u8| holder.known[d as usize].iter().all(|cell| cell.is_known());
            holder.adopted = holder.adopted.or(config.joining.filter(remembered));
        }
        self.settle(rules, g)
    }
}
