//! One member of the Raft group, without clock, socket or thread.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;

use cairn_proto::codec::{Put, Reader};
use cairn_proto::control::Code;
use cairn_proto::time::Time;
use raft::eraftpb::{ConfChange, ConfChangeType, Entry, EntryType, Message, MessageType, Snapshot};
use raft::{ProgressState, RawNode, ReadState, Ready, SnapshotStatus, StateRole, Storage as _};

use super::api::*;
use super::message::{decode_message, encode_message};
use super::storage::Mirror;
use crate::limits::*;
use crate::log::LogStore;
use crate::state::command::{Command, Logged};
use crate::state::model::State;
use crate::state::{Outcome, Refusal};

/// One member of the Raft group.
///
/// Feed it with [`step`](Self::step), [`tick`](Self::tick), [`propose`](Self::propose) and
/// [`read_index`](Self::read_index); then, as long as [`drive`](Self::drive) says so, take its actions with
/// [`poll_action`](Self::poll_action) and call `drive` again. What was fed together shares one flush. The log store is
/// called synchronously, within `drive` or at the next feeding.
pub struct MetaNode<L> {
    config: NodeConfig,
    raw: RawNode<Mirror>,
    log: L,
    state: State,
    applied: u64,
    actions: VecDeque<MetaAction>,
    /// What Raft wants made durable; its first messages are on their way already.
    unpersisted: Option<Ready>,
    /// Why it has stopped, until that was said.
    failure: Option<NodeError>,
    failed: bool,
    proposals: BTreeMap<Ticket, u64>,
    reads: Reads,
    ticks: u64,
    next_tick: Option<Time>,
    /// When a snapshot was sent to whom, in ticks.
    snapshots_sent: BTreeMap<u64, u64>,
    /// A snapshot that was stepped in, decoded already.
    incoming: Option<(u64, State)>,
    leader: (u64, u64),
    removed: bool,
}

#[derive(Default)]
struct Reads {
    /// Asked for since the last drive.
    waiting: Vec<Ticket>,
    /// Asked the others: by number of the round.
    rounds: BTreeMap<u64, (u64, Vec<Ticket>)>,
    /// Confirmed; to be answered when this index is applied.
    confirmed: Vec<(u64, Vec<Ticket>)>,
    last_round: u64,
    count: usize,
}

impl<L> fmt::Debug for MetaNode<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("MetaNode");
        out.field("id", &self.config.id)
            .field("leader", &self.leader)
            .field("applied", &self.applied);
        out.finish_non_exhaustive()
    }
}

impl<L: LogStore> MetaNode<L> {
    /// Starts from what the log holds. An empty log is one of a member that waits to be added.
    ///
    /// # Errors
    /// The log or the state in it can't be used.
    pub fn new(config: NodeConfig, mut log: L) -> Result<MetaNode<L>, NodeError> {
        let mut stored = log.load()?;
        let snapshot = &stored.snapshot;
        // A snapshot is durable at once, the commit index that came before it only with the next flush: a crash between
        // the two leaves the snapshot ahead. What it covers is committed, or it would not have been applied.
        stored.hard_state.commit = stored.hard_state.commit.max(snapshot.get_metadata().index);
        let state = if snapshot.is_empty() {
            State::default()
        } else {
            State::decode(&snapshot.data).map_err(NodeError::State)?
        };
        let applied = snapshot.get_metadata().index;
        let conf_state = snapshot.get_metadata().get_conf_state().clone();
        let removed = !snapshot.is_empty() && !conf_state.voters.contains(&config.id);
        let mirror = Mirror::new(stored, conf_state);
        let is_alone = mirror.conf_state.voters == [config.id];
        let mut raw = RawNode::new(&config.raft(applied), mirror, &logger())?;
        if is_alone {
            // There is nobody to wait for.
            raw.campaign()?;
        }
        Ok(MetaNode {
            config,
            raw,
            log,
            state,
            applied,
            actions: VecDeque::new(),
            unpersisted: None,
            failure: None,
            failed: false,
            proposals: BTreeMap::new(),
            reads: Reads::default(),
            ticks: 0,
            next_tick: None,
            snapshots_sent: BTreeMap::new(),
            incoming: None,
            leader: (0, 0),
            removed,
        })
    }

    /// Takes a message of another member. One that is damaged or nonsense changes nothing.
    ///
    /// # Errors
    /// It was not taken.
    pub fn step(&mut self, bytes: &[u8]) -> Result<(), StepError> {
        let message = decode_message(bytes).map_err(StepError::Damaged)?;
        let (from, to) = (message.from, message.to);
        if to != self.config.id || from == to || from == 0 {
            return Err(StepError::Misdirected { from, to });
        }
        self.settle();
        self.check_message(&message)?;
        if !self.failed {
            // What Raft refuses here (a proposal, an unknown peer) needs no answer.
            let _ = self.raw.step(message);
        }
        Ok(())
    }

    fn check_message(&mut self, message: &Message) -> Result<(), StepError> {
        let last = self.raw.raft.raft_log.last_index();
        if message.get_msg_type() == MessageType::MsgHeartbeat
            && message.commit > last
            && message.term >= self.raw.raft.term
        {
            // Raft would panic: it takes its own log for granted.
            return Err(StepError::LostEntries {
                expected: message.commit,
                last,
            });
        }
        if message.get_msg_type() == MessageType::MsgSnapshot {
            let snapshot = message.get_snapshot();
            let state = State::decode(&snapshot.data).map_err(StepError::Snapshot)?;
            self.incoming = Some((snapshot.get_metadata().index, state));
        }
        Ok(())
    }

    /// Time has passed. Ticks that are due are made, but no more than a few after the process was held up: the others
    /// may just as well have been quiet because nobody here listened.
    pub fn tick(&mut self, now: Time) {
        self.settle();
        let due = *self.next_tick.get_or_insert(now + self.config.tick);
        if now < due || self.failed {
            return;
        }
        let late = (now - due).as_nanos() / self.config.tick.as_nanos().max(1);
        for _ in 0..=u64::try_from(late).unwrap_or(u64::MAX).min(CATCH_UP_TICKS - 1) {
            self.raw.tick();
            self.ticks += 1;
        }
        self.next_tick = Some(now + self.config.tick);
        self.retry_snapshots();
        self.give_up();
    }

    /// When [`tick`](Self::tick) is due.
    pub fn poll_timeout(&self) -> Option<Time> {
        self.next_tick
    }

    /// Proposes a command; `time_ms` is Unix time. It ends with an [`Answer`] in any case.
    pub fn propose(&mut self, ticket: Ticket, time_ms: u64, command: Command) {
        self.settle();
        if let Err(answer) = self.try_propose(ticket, time_ms, command) {
            self.actions.push_back(MetaAction::Answer(ticket, answer));
        }
    }

    fn try_propose(&mut self, ticket: Ticket, time_ms: u64, command: Command) -> Result<(), Answer> {
        self.check_leader().map_err(Answer::Refused)?;
        let busy = || Answer::Refused(Refusal::new(Code::Busy, "the metadata server is overloaded: try again"));
        if self.proposals.len() >= PROPOSALS_MAX {
            return Err(busy());
        }
        let conf_change = self.conf_change(&command)?;
        let encoded = Logged { time_ms, command }.encode();
        let bytes = encoded.map_err(|error| {
            Answer::Refused(Refusal::new(
                Code::InvalidArgument,
                format!("too much at once: {error}"),
            ))
        })?;
        let mut context = Vec::new();
        context.put_u64(self.config.run);
        context.put_u64(ticket.0);
        let proposed = match conf_change {
            None => self.raw.propose(context, bytes),
            Some(change) => {
                context.put_bytes(&bytes);
                self.raw.propose_conf_change(context, change)
            }
        };
        proposed.map_err(|_| busy())?;
        self.proposals.insert(ticket, self.ticks + ANSWER_TICKS);
        Ok(())
    }

    /// A change of the members, as Raft knows it, if the command is one.
    fn conf_change(&self, command: &Command) -> Result<Option<ConfChange>, Answer> {
        let refused = |refusal| Answer::Refused(refusal);
        let (id, kind, is_done) = match command {
            Command::AddMember(add) => {
                self.state.check_add_member(add).map_err(refused)?;
                (
                    add.id,
                    ConfChangeType::AddNode,
                    self.state.members().contains_key(&add.id),
                )
            }
            Command::RemoveMember(remove) => {
                self.state.check_remove_member(remove).map_err(refused)?;
                (
                    remove.id,
                    ConfChangeType::RemoveNode,
                    !self.state.members().contains_key(&remove.id),
                )
            }
            _ => return Ok(None),
        };
        if is_done {
            return Err(Answer::Applied(Box::new(Ok(Outcome::Done))));
        }
        if self.raw.raft.has_pending_conf() {
            return Err(refused(Refusal::new(
                Code::MemberChangePending,
                "another change of the metadata servers is not finished yet: try again in a moment",
            )));
        }
        let mut change = ConfChange::default();
        change.set_change_type(kind);
        change.node_id = id;
        Ok(Some(change))
    }

    /// Asks for a linearizable read: after [`Answer::Readable`] the state holds everything that was committed when this
    /// was called. It ends with an [`Answer`] in any case.
    pub fn read_index(&mut self, ticket: Ticket) {
        self.settle();
        let refusal = match self.check_leader() {
            Ok(()) if self.reads.count < READS_MAX => {
                self.reads.count += 1;
                self.reads.waiting.push(ticket);
                return;
            }
            Ok(()) => Refusal::new(Code::Busy, "the metadata server is overloaded: try again"),
            Err(refusal) => refusal,
        };
        self.actions
            .push_back(MetaAction::Answer(ticket, Answer::Refused(refusal)));
    }

    fn check_leader(&self) -> Result<(), Refusal> {
        if self.failed {
            return Err(Refusal::new(
                Code::Internal,
                "this metadata server has stopped: see its log",
            ));
        }
        if self.raw.raft.state != StateRole::Leader {
            return Err(not_leader());
        }
        if !self.raw.raft.commit_to_current_term() {
            return Err(Refusal::new(
                Code::NotReady,
                "a new leader is just taking over: try again",
            ));
        }
        Ok(())
    }

    /// Asks the member that is furthest to lead in place of this one, if this one leads: before it stops.
    pub fn hand_over(&mut self) {
        self.settle();
        if self.failed || self.raw.raft.state != StateRole::Leader {
            return;
        }
        let others = self
            .raw
            .raft
            .prs()
            .iter()
            .filter(|(id, progress)| **id != self.config.id && progress.recent_active);
        let next = others.map(|(id, progress)| (progress.matched, *id)).max();
        if let Some((_, id)) = next {
            self.raw.transfer_leader(id);
        }
    }

    /// The transport could not reach another member.
    pub fn report_unreachable(&mut self, id: u64) {
        self.settle();
        if !self.failed {
            self.raw.report_unreachable(id);
        }
    }

    /// Goes one step on. While it says true, take the actions and call it again.
    ///
    /// # Errors
    /// The node has stopped for good; every request has been answered.
    pub fn drive(&mut self) -> Result<bool, NodeError> {
        let had_work = self.unpersisted.is_some();
        self.settle();
        if let Some(error) = self.failure.take() {
            return Err(error);
        }
        if self.failed {
            return Ok(!self.actions.is_empty());
        }
        if had_work {
            return Ok(true);
        }
        self.ask_for_reads();
        if !self.raw.has_ready() {
            return Ok(!self.actions.is_empty());
        }
        let mut ready = self.raw.ready();
        self.note_leader();
        // A leader's messages need not wait for its own log: it counts itself only when that is durable.
        self.send(ready.take_messages());
        self.unpersisted = Some(ready);
        Ok(true)
    }

    /// The next thing to do, in order.
    pub fn poll_action(&mut self) -> Option<MetaAction> {
        self.actions.pop_front()
    }

    /// The state as of what is applied here: linearizable only after [`Answer::Readable`].
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Whether this member leads, as far as it knows, and its state is complete: everything committed in earlier terms
    /// is applied.
    pub fn leads(&self) -> bool {
        self.check_leader().is_ok() && self.raw.raft.apply_to_current_term()
    }

    /// Whether this member was removed from the group: it has nothing left to do.
    pub fn is_removed(&self) -> bool {
        self.removed
    }

    /// The log store, to look at.
    pub fn log(&self) -> &L {
        &self.log
    }

    /// The log store, to inject faults.
    pub fn log_mut(&mut self) -> &mut L {
        &mut self.log
    }

    /// Ends the node; the log store stays, with what was not flushed.
    pub fn into_log(self) -> L {
        self.log
    }

    /// How it is.
    pub fn status(&self) -> MetaStatus {
        let raft = &self.raw.raft;
        let leads = raft.state == StateRole::Leader;
        let mut peers: Vec<PeerProgress> = raft
            .prs()
            .iter()
            .filter(|_| leads)
            .map(|(id, progress)| PeerProgress {
                id: *id,
                matched: progress.matched,
                active: progress.recent_active || *id == self.config.id,
            })
            .collect();
        peers.sort_unstable_by_key(|peer| peer.id);
        let mirror = self.raw.store();
        MetaStatus {
            id: self.config.id,
            leader: raft.leader_id,
            term: raft.term,
            commit: raft.raft_log.committed,
            applied: self.applied,
            log: (mirror.stored.entries.len() as u64, mirror.bytes()),
            peers,
        }
    }

    /// Finishes what Raft wants made durable before anything else is fed to it.
    fn settle(&mut self) {
        if let Some(ready) = self.unpersisted.take()
            && let Err(error) = self.persist(ready)
        {
            self.failure = Some(error);
            self.failed = true;
            self.end_all(&Refusal::new(
                Code::Internal,
                "this metadata server has stopped: see its log",
            ));
        }
    }

    fn persist(&mut self, mut ready: Ready) -> Result<(), NodeError> {
        if !ready.snapshot().is_empty() {
            self.install(ready.snapshot().clone(), &ready)?;
        }
        let entries = ready.take_entries();
        let hard_state = ready.hs().cloned();
        if !entries.is_empty() || hard_state.is_some() {
            self.log.write(&entries, hard_state.as_ref())?;
            let mirror = self.raw.mut_store();
            mirror.append(&entries);
            if let Some(hard_state) = hard_state {
                mirror.stored.hard_state = hard_state;
            }
        }
        if ready.must_sync() {
            // One flush for all that was fed since the last one.
            self.log.flush()?;
        }
        self.send(ready.take_persisted_messages());
        self.apply(ready.take_committed_entries())?;
        self.confirm_reads(ready.take_read_states());
        let mut light = self.raw.advance_append(ready);
        if let Some(commit) = light.commit_index() {
            let mirror = self.raw.mut_store();
            mirror.stored.hard_state.commit = commit;
            let hard_state = mirror.stored.hard_state.clone();
            // A hint that saves waiting at the next start; it becomes durable with the next flush.
            self.log.write(&[], Some(&hard_state))?;
        }
        self.send(light.take_messages());
        self.apply(light.take_committed_entries())?;
        self.raw.advance_apply();
        self.answer_reads();
        self.note_leader();
        self.compact()
    }

    fn install(&mut self, snapshot: Snapshot, ready: &Ready) -> Result<(), NodeError> {
        let index = snapshot.get_metadata().index;
        let state = match self.incoming.take() {
            Some((incoming, state)) if incoming == index => state,
            _ => State::decode(&snapshot.data).map_err(NodeError::State)?,
        };
        let mut hard_state = ready
            .hs()
            .cloned()
            .unwrap_or_else(|| self.raw.store().stored.hard_state.clone());
        hard_state.commit = hard_state.commit.max(index);
        self.log.install_snapshot(&snapshot, &hard_state)?;
        let mirror = self.raw.mut_store();
        mirror.install(snapshot);
        mirror.stored.hard_state = hard_state;
        self.state = state;
        self.applied = index;
        Ok(())
    }

    fn apply(&mut self, entries: Vec<Entry>) -> Result<(), NodeError> {
        for entry in entries {
            if entry.index <= self.applied {
                continue;
            }
            self.applied = entry.index;
            let mut context = Reader::new(&entry.context);
            let origin = context.u64().and_then(|run| Ok((run, context.u64()?)));
            let bytes = match entry.get_entry_type() {
                EntryType::EntryNormal => &entry.data[..],
                _ => context.bytes(context.remaining()).unwrap_or_default(),
            };
            if bytes.is_empty() {
                // A new leader's first entry.
                continue;
            }
            let logged = Logged::decode(bytes).map_err(|error| NodeError::Command(entry.index, error))?;
            let result = self.state.apply(&logged);
            if result.is_ok() {
                self.change_members(&logged.command)?;
            }
            let ticket = origin
                .ok()
                .filter(|(run, _)| *run == self.config.run)
                .map(|(_, ticket)| Ticket(ticket));
            if let Some(ticket) = ticket.filter(|ticket| self.proposals.remove(ticket).is_some()) {
                self.actions
                    .push_back(MetaAction::Answer(ticket, Answer::Applied(Box::new(result))));
            }
        }
        Ok(())
    }

    fn change_members(&mut self, command: &Command) -> Result<(), NodeError> {
        let mut change = ConfChange::default();
        match command {
            Command::AddMember(add) => {
                change.set_change_type(ConfChangeType::AddNode);
                change.node_id = add.id;
            }
            Command::RemoveMember(remove) => {
                change.set_change_type(ConfChangeType::RemoveNode);
                change.node_id = remove.id;
                self.removed |= remove.id == self.config.id;
            }
            _ => return Ok(()),
        }
        let conf_state = self.raw.apply_conf_change(&change)?;
        self.raw.mut_store().conf_state = conf_state;
        // Whoever is new can use only a snapshot that names it.
        self.take_snapshot()
    }

    fn compact(&mut self) -> Result<(), NodeError> {
        let mirror = self.raw.store();
        let since = self.applied - mirror.stored.snapshot.get_metadata().index;
        let large = mirror.bytes() > SNAPSHOT_BYTES && since > 0;
        if since < self.config.snapshot_entries && !large {
            return Ok(());
        }
        self.take_snapshot()?;
        let kept = if large { 0 } else { self.config.kept_entries };
        let index = self.applied.saturating_sub(kept);
        if index > self.raw.store().stored.truncated.0 {
            let term = self.raw.store().term(index)?;
            self.log.compact(index, term)?;
            self.raw.mut_store().compact(index, term);
        }
        Ok(())
    }

    fn take_snapshot(&mut self) -> Result<(), NodeError> {
        let data = self.state.encode().into();
        let mut snapshot = Snapshot {
            data,
            ..Snapshot::default()
        };
        let mirror = self.raw.mut_store();
        let metadata = snapshot.mut_metadata();
        metadata.index = self.applied;
        metadata.term = mirror.term(self.applied)?;
        metadata.set_conf_state(mirror.conf_state.clone());
        self.log.save_snapshot(&snapshot)?;
        mirror.stored.snapshot = snapshot;
        Ok(())
    }

    fn send(&mut self, messages: Vec<Message>) {
        for message in messages {
            if message.get_msg_type() == MessageType::MsgSnapshot {
                self.snapshots_sent.insert(message.to, self.ticks);
            }
            if let Some(bytes) = encode_message(&message) {
                self.actions.push_back(MetaAction::Send {
                    to: message.to,
                    message: bytes,
                });
            }
        }
    }

    /// A follower that was sent a snapshot gets nothing else until it answers. If either was lost, it gets another one.
    fn retry_snapshots(&mut self) {
        let ticks = self.ticks;
        let due = self
            .snapshots_sent
            .iter()
            .filter(|(_, sent)| ticks - **sent >= SNAPSHOT_RETRY_TICKS);
        let due: Vec<u64> = due.map(|(id, _)| *id).collect();
        for id in due {
            self.snapshots_sent.remove(&id);
            let progress = self.raw.raft.prs().get(id);
            if progress.is_some_and(|progress| progress.state == ProgressState::Snapshot) {
                self.raw.report_snapshot(id, SnapshotStatus::Failure);
            }
        }
    }

    /// Requests that have waited too long end.
    fn give_up(&mut self) {
        let ticks = self.ticks;
        let refusal = Refusal::new(
            Code::Timeout,
            "a majority of the metadata servers did not answer in time: are enough of them running?",
        );
        let late: Vec<Ticket> = self
            .proposals
            .iter()
            .filter(|(_, due)| **due <= ticks)
            .map(|(ticket, _)| *ticket)
            .collect();
        for ticket in late {
            self.proposals.remove(&ticket);
            self.actions
                .push_back(MetaAction::Answer(ticket, Answer::Unknown(refusal.clone())));
        }
        while let Some(round) = self.reads.rounds.first_entry().filter(|round| round.get().0 <= ticks) {
            let (_, tickets) = round.remove();
            self.reads.count -= tickets.len();
            for ticket in tickets {
                self.actions
                    .push_back(MetaAction::Answer(ticket, Answer::Refused(refusal.clone())));
            }
        }
    }

    fn ask_for_reads(&mut self) {
        if self.reads.waiting.is_empty() {
            return;
        }
        let tickets = std::mem::take(&mut self.reads.waiting);
        self.reads.last_round += 1;
        let round = self.reads.last_round;
        self.reads.rounds.insert(round, (self.ticks + ANSWER_TICKS, tickets));
        let mut context = Vec::new();
        context.put_u64(self.config.run);
        context.put_u64(round);
        self.raw.read_index(context);
    }

    fn confirm_reads(&mut self, states: Vec<ReadState>) {
        for state in states {
            let mut context = Reader::new(&state.request_ctx);
            let Ok(round) = context.u64().and_then(|_| context.u64()) else {
                continue;
            };
            if let Some((_, tickets)) = self.reads.rounds.remove(&round) {
                self.reads.confirmed.push((state.index, tickets));
            }
        }
    }

    fn answer_reads(&mut self) {
        let applied = self.applied;
        let (now, later) = std::mem::take(&mut self.reads.confirmed)
            .into_iter()
            .partition(|(index, _)| *index <= applied);
        self.reads.confirmed = later;
        let now: Vec<(u64, Vec<Ticket>)> = now;
        for ticket in now.into_iter().flat_map(|(_, tickets)| tickets) {
            self.reads.count -= 1;
            self.actions.push_back(MetaAction::Answer(ticket, Answer::Readable));
        }
    }

    fn note_leader(&mut self) {
        let now = (self.raw.raft.leader_id, self.raw.raft.term);
        if now == self.leader {
            return;
        }
        let led = self.leader.0 == self.config.id;
        self.leader = now;
        self.actions.push_back(MetaAction::Leader { id: now.0, term: now.1 });
        if led {
            self.end_all(&not_leader());
        }
    }

    fn end_all(&mut self, refusal: &Refusal) {
        let lost = Refusal::new(
            Code::Timeout,
            "the leader changed while this was being done: look what came of it",
        );
        for (ticket, _) in std::mem::take(&mut self.proposals) {
            self.actions
                .push_back(MetaAction::Answer(ticket, Answer::Unknown(lost.clone())));
        }
        let reads = std::mem::take(&mut self.reads);
        self.reads.last_round = reads.last_round;
        let rounds = reads.rounds.into_values().chain(reads.confirmed);
        for ticket in reads.waiting.into_iter().chain(rounds.flat_map(|(_, tickets)| tickets)) {
            self.actions
                .push_back(MetaAction::Answer(ticket, Answer::Refused(refusal.clone())));
        }
    }
}

fn not_leader() -> Refusal {
    Refusal::new(Code::NotLeader, "this metadata server does not lead: ask the leader")
}

/// Raft's own log goes to `tracing`: what it calls information is noise to an operator.
fn logger() -> slog::Logger {
    struct ToTracing;

    impl slog::Drain for ToTracing {
        type Ok = ();
        type Err = slog::Never;

        fn log(&self, record: &slog::Record<'_>, _: &slog::OwnedKVList) -> Result<(), slog::Never> {
            match record.level() {
                slog::Level::Critical | slog::Level::Error => tracing::error!(target: "raft", "{}", record.msg()),
                slog::Level::Warning => tracing::warn!(target: "raft", "{}", record.msg()),
                _ => tracing::debug!(target: "raft", "{}", record.msg()),
            }
            Ok(())
        }
    }

    slog::Logger::root(ToTracing, slog::o!())
}
