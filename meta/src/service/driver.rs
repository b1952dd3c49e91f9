//! The thread that owns the node: everything that happens to it happens here, one after the other.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use cairn_proto::control::{CODE_KEY, Code, LEADER_KEY};
use cairn_proto::ids::ClusterId;
use cairn_proto::time::Time;
use tokio::sync::{oneshot, watch};
use tonic::Status;

use super::health;
use super::soft::{SeenMember, Soft};
use super::transport::Transport;
use crate::heal;
use crate::limits::{CONDITION_INTERVAL_MS, EVENTS_MAX, HEAL_INTERVAL_MS, REQUEST_TIMEOUT_MS};
use crate::log::sled::SledLogStore;
use crate::raft::{Answer, MetaAction, MetaNode, MetaStatus, NodeError, Ticket};
use crate::state::command::{Command, InitCluster, ReportDevices, UpdateMember};
use crate::state::model::State;
use crate::state::{FEATURE_LEVEL, Outcome, Refusal};

/// How often the leader looks after what is due.
const HOUSEKEEPING_INTERVAL: Duration = Duration::from_millis(200);

/// How often it is looked whether somebody else leads before this member stops, and how long between.
const HAND_OVER_CHECKS: u32 = 20;
const HAND_OVER_PAUSE: Duration = Duration::from_millis(20);

/// Why a request failed, and who might do better.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) refusal: Refusal,
    pub(super) leader: Option<String>,
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Failure {
        Failure { refusal, leader: None }
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Status {
        let code = failure.refusal.code;
        metrics::counter!("cairn_meta_refusals_total", "code" => code.as_str()).increment(1);
        let mut status = Status::new(code.grpc(), failure.refusal.message);
        let metadata = status.metadata_mut();
        metadata.insert(CODE_KEY, tonic::metadata::MetadataValue::from_static(code.as_str()));
        if let Some(leader) = failure.leader.and_then(|leader| leader.parse().ok()) {
            metadata.insert(LEADER_KEY, leader);
        }
        status
    }
}

/// What a request may look at, on the driver's thread.
pub(super) struct World<'a> {
    pub(super) state: &'a State,
    pub(super) soft: &'a mut Soft,
    pub(super) status: MetaStatus,
    pub(super) leads: bool,
    pub(super) now: Time,
}

impl World<'_> {
    /// Refuses unless this member leads.
    pub(super) fn check_leads(&self) -> Result<(), Refusal> {
        if self.leads {
            return Ok(());
        }
        if self.status.leader == self.status.id {
            return Err(Refusal::new(
                Code::NotReady,
                "a new leader is just taking over: try again",
            ));
        }
        Err(Refusal::new(
            Code::NotLeader,
            "this metadata server does not lead: ask the leader",
        ))
    }
}

type Make = Box<dyn FnOnce(&mut World<'_>) -> Result<Command, Refusal> + Send>;
type Then = Box<dyn FnOnce(Result<Outcome, Failure>, &mut World<'_>) + Send>;
type Query = Box<dyn FnOnce(Result<&mut World<'_>, Failure>) + Send>;
type Look = Box<dyn FnOnce(&mut World<'_>) + Send>;

pub(super) enum Event {
    /// A Raft message of another member.
    Message {
        from: u64,
        address: String,
        directory: u64,
        bytes: Vec<u8>,
    },
    /// A command, made here of what is known here.
    Propose(Make, Then),
    /// A linearizable read.
    Read(Query),
    /// Whatever is known here now.
    Look(Look),
    /// A member can't be reached.
    Unreachable(u64),
    /// Another member says that this one has no place in the cluster.
    Rejected(Refusal),
    /// Somebody else should lead.
    HandOver,
    /// The end.
    Stop,
}

/// Why members were turned away: by id and directory.
pub(super) type Rejections = Arc<Mutex<BTreeMap<(u64, u64), Refusal>>>;

/// The way to the driver.
#[derive(Clone)]
pub(super) struct Handle {
    events: SyncSender<Event>,
    pub(super) rejections: Rejections,
    /// Says true when the process is to stop: streams end then.
    stopping: Arc<watch::Sender<bool>>,
}

/// The channel to a driver that is still to be started.
pub(super) fn channel() -> (Handle, Receiver<Event>) {
    let (events, receiver) = std::sync::mpsc::sync_channel(EVENTS_MAX);
    (
        Handle {
            events,
            rejections: Rejections::default(),
            stopping: Arc::default(),
        },
        receiver,
    )
}

impl Handle {
    /// Hands over an event if there is room for it.
    pub(super) fn offer(&self, event: Event) -> Result<(), Refusal> {
        self.events.try_send(event).map_err(|error| match error {
            TrySendError::Full(_) => Refusal::new(Code::Busy, "the metadata server is overloaded: try again"),
            TrySendError::Disconnected(_) => {
                Refusal::new(Code::Internal, "this metadata server has stopped: see its log")
            }
        })
    }

    /// The process is to stop: somebody else should lead, and streams end. Waits for that a little.
    pub(super) async fn wind_down(&self) {
        // If the driver is too busy or gone the others find out by themselves.
        let _ = self.offer(Event::HandOver);
        for _ in 0..HAND_OVER_CHECKS {
            let leads = self.look(|world| Ok(world.leads && world.status.peers.len() > 1)).await;
            if !matches!(leads, Ok(true)) {
                break;
            }
            tokio::time::sleep(HAND_OVER_PAUSE).await;
        }
        self.stopping.send_replace(true);
    }

    /// Completes when the process is to stop.
    pub(super) async fn stopping(&self) {
        // The sender lives as long as this handle, so there is no error.
        let _ = self.stopping.subscribe().wait_for(|stopping| *stopping).await;
    }

    /// Proposes the command that `make` makes, and says what `then` makes of its outcome.
    pub(super) async fn propose<T: Send + 'static>(
        &self,
        make: impl FnOnce(&mut World<'_>) -> Result<Command, Refusal> + Send + 'static,
        then: impl FnOnce(Outcome, &mut World<'_>) -> T + Send + 'static,
    ) -> Result<T, Status> {
        let (sender, receiver) = oneshot::channel();
        let then: Then = Box::new(move |outcome, world| {
            // Whoever asked may have gone away.
            let _ = sender.send(outcome.map(|outcome| then(outcome, world)));
        });
        self.ask(Event::Propose(Box::new(make), then), receiver).await
    }

    /// Reads what is true now.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        query: impl FnOnce(&mut World<'_>) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Status> {
        let (sender, receiver) = oneshot::channel();
        let query: Query = Box::new(move |world| {
            let result = world.and_then(|world| query(world).map_err(Failure::from));
            let _ = sender.send(result);
        });
        self.ask(Event::Read(query), receiver).await
    }

    /// Looks at what this member knows.
    pub(super) async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&mut World<'_>) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Status> {
        let (sender, receiver) = oneshot::channel();
        let look: Look = Box::new(move |world| {
            let result = look(world).map_err(|refusal| failure(refusal, world));
            let _ = sender.send(result);
        });
        self.ask(Event::Look(look), receiver).await
    }

    async fn ask<T>(&self, event: Event, receiver: oneshot::Receiver<Result<T, Failure>>) -> Result<T, Status> {
        self.offer(event).map_err(Failure::from)?;
        let timeout = Duration::from_millis(REQUEST_TIMEOUT_MS);
        let refusal = match tokio::time::timeout(timeout, receiver).await {
            Ok(Ok(result)) => return result.map_err(Status::from),
            Ok(Err(_)) => Refusal::new(
                Code::Timeout,
                "this metadata server stopped while it was asked: ask another one",
            ),
            Err(_) => Refusal::new(Code::Timeout, "no answer in time: are enough metadata servers running?"),
        };
        Err(Failure::from(refusal).into())
    }
}

/// Adds who leads, where that helps.
fn failure(refusal: Refusal, world: &World<'_>) -> Failure {
    let leader = world.state.members().get(&world.status.leader);
    let leader = leader
        .filter(|_| refusal.code == Code::NotLeader)
        .map(|member| member.address.clone());
    Failure { refusal, leader }
}

/// Who this member is.
#[derive(Clone, Debug)]
pub(super) struct Myself {
    pub(super) id: u64,
    pub(super) address: String,
    pub(super) directory: u64,
    /// What a new cluster will be called if this member is the first to lead it.
    pub(super) cluster_draft: ClusterId,
}

/// Why the driver ended.
#[derive(Debug)]
pub(super) enum End {
    Stopped,
    Removed,
    Rejected(Refusal),
    Failed(NodeError),
}

pub(super) struct Driver {
    myself: Myself,
    node: MetaNode<SledLogStore>,
    events: Receiver<Event>,
    transport: Transport,
    rejections: Rejections,
    soft: Soft,
    origin: Instant,
    last_ticket: u64,
    proposals: BTreeMap<Ticket, (Instant, Then)>,
    reads: BTreeMap<Ticket, Query>,
    housekept: Time,
    /// A proposal of the housekeeping is under way.
    housekeeping: Option<Ticket>,
    healed: Time,
    /// When the metrics of health were derived last.
    gauged: Time,
    /// What healing has proposed and is not answered yet.
    healing: BTreeSet<Ticket>,
}

#[expect(clippy::disallowed_methods, reason = "the driver is where clocks are read")]
impl Driver {
    pub(super) fn new(
        myself: Myself,
        node: MetaNode<SledLogStore>,
        events: Receiver<Event>,
        transport: Transport,
        rejections: Rejections,
    ) -> Driver {
        Driver {
            myself,
            node,
            events,
            transport,
            rejections,
            soft: Soft::default(),
            origin: Instant::now(),
            last_ticket: 0,
            proposals: BTreeMap::new(),
            reads: BTreeMap::new(),
            housekept: Time::ZERO,
            housekeeping: None,
            healed: Time::ZERO,
            gauged: Time::ZERO,
            healing: BTreeSet::new(),
        }
    }

    /// How the cluster heals while this member leads.
    pub(super) fn heal_by(&mut self, settings: heal::HealSettings) {
        self.soft.heal_settings = settings;
    }

    fn now(&self) -> Time {
        Time::ZERO + self.origin.elapsed()
    }

    /// Runs until something ends it.
    pub(super) fn run(mut self) -> End {
        self.node.tick(self.now());
        loop {
            let timeout = self
                .node
                .poll_timeout()
                .map_or(HOUSEKEEPING_INTERVAL, |due| due.saturating_since(self.now()));
            match self.events.recv_timeout(timeout) {
                Ok(event) => {
                    if let Some(end) = self.handle(event) {
                        return end;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return End::Stopped,
            }
            // What has come in meanwhile shares the flush.
            for _ in 0..EVENTS_MAX {
                let Ok(event) = self.events.try_recv() else { break };
                if let Some(end) = self.handle(event) {
                    return end;
                }
            }
            self.node.tick(self.now());
            self.housekeep();
            if let Err(error) = self.pump() {
                return End::Failed(error);
            }
            if self.node.is_removed() {
                return End::Removed;
            }
        }
    }

    fn handle(&mut self, event: Event) -> Option<End> {
        match event {
            Event::Message {
                from,
                address,
                directory,
                bytes,
            } => self.take_message(from, address, directory, &bytes),
            Event::Propose(make, then) => self.propose(make, then),
            Event::Read(query) => {
                let ticket = self.ticket();
                self.reads.insert(ticket, query);
                self.node.read_index(ticket);
            }
            Event::Look(look) => look(&mut self.world()),
            Event::Unreachable(id) => self.node.report_unreachable(id),
            Event::HandOver => self.node.hand_over(),
            Event::Rejected(refusal) => return Some(End::Rejected(refusal)),
            Event::Stop => return Some(End::Stopped),
        }
        None
    }

    fn take_message(&mut self, from: u64, address: String, directory: u64, bytes: &[u8]) {
        if let Some(refusal) = self.reject(from, directory) {
            tracing::warn!(from, "{refusal}");
            self.rejections
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert((from, directory), refusal);
            return;
        }
        let heard = self.now();
        self.transport.learn(from, &address);
        self.soft.members.insert(
            from,
            SeenMember {
                address,
                directory,
                heard,
            },
        );
        if let Err(error) = self.node.step(bytes) {
            tracing::error!(from, "{error}");
        }
    }

    /// Why a member may not speak: it was removed, or it is an empty shell of what it was.
    fn reject(&self, from: u64, directory: u64) -> Option<Refusal> {
        let state = self.node.state();
        let refuse = |message: String| Some(Refusal::new(Code::InvalidMember, message));
        match state.members().get(&from) {
            Some(member) if member.directory != 0 && member.directory != directory => refuse(format!(
                "metadata server {from} comes with another directory than the one that the cluster knows, so it has lost \
                 its log: remove it from the cluster, and add it anew with another id"
            )),
            None if state.was_member(from) => refuse(format!(
                "metadata server {from} was removed from the cluster: stop it; to have it back add it anew with another id"
            )),
            _ => None,
        }
    }

    fn propose(&mut self, make: Make, then: Then) {
        let mut world = self.world();
        let made = world.check_leads().and_then(|()| make(&mut world));
        match made {
            Ok(command) => {
                metrics::counter!("cairn_meta_proposals_total", "command" => command.tag().1).increment(1);
                let ticket = self.ticket();
                self.proposals.insert(ticket, (Instant::now(), then));
                self.node.propose(ticket, unix_ms(), command);
            }
            Err(refusal) => {
                let failure = failure(refusal, &world);
                then(Err(failure), &mut world);
            }
        }
    }

    fn ticket(&mut self) -> Ticket {
        self.last_ticket += 1;
        Ticket(self.last_ticket)
    }

    fn world(&mut self) -> World<'_> {
        let now = self.now();
        let (status, leads) = (self.node.status(), self.node.leads());
        World {
            state: self.node.state(),
            soft: &mut self.soft,
            status,
            leads,
            now,
        }
    }

    fn pump(&mut self) -> Result<(), NodeError> {
        let started = Instant::now();
        let mut worked = false;
        let result = loop {
            match self.node.drive() {
                Ok(true) => worked = true,
                Ok(false) => break Ok(()),
                Err(error) => break Err(error),
            }
            self.take_actions();
        };
        self.take_actions();
        if worked {
            metrics::histogram!("cairn_meta_drive_seconds").record(started.elapsed().as_secs_f64());
        }
        result
    }

    fn take_actions(&mut self) {
        while let Some(action) = self.node.poll_action() {
            match action {
                MetaAction::Send { to, message } => {
                    let member = self.node.state().members().get(&to);
                    let address = member.map(|member| member.address.clone());
                    self.transport
                        .send(to, address.as_deref(), self.node.state().cluster(), message);
                }
                MetaAction::Answer(ticket, answer) => self.answer(ticket, answer),
                MetaAction::Leader { id, term } => {
                    let now = self.now();
                    self.soft.reset(now);
                    metrics::counter!("cairn_meta_leader_changes_total").increment(1);
                    tracing::info!(
                        leader = id,
                        term,
                        leads = id == self.myself.id,
                        "the leader is known anew"
                    );
                }
            }
        }
    }

    fn answer(&mut self, ticket: Ticket, answer: Answer) {
        if self.housekeeping == Some(ticket) {
            self.housekeeping = None;
            return;
        }
        if self.healing.remove(&ticket) {
            match answer {
                Answer::Applied(result) => {
                    if let Err(refusal) = *result {
                        // Somebody was quicker. It is looked at again in a second.
                        tracing::debug!("not healed: {refusal}");
                    }
                }
                Answer::Refused(_) | Answer::Unknown(_) | Answer::Readable => {}
            }
            return;
        }
        if let Some(query) = self.reads.remove(&ticket) {
            let mut world = self.world();
            match answer {
                Answer::Readable => query(Ok(&mut world)),
                Answer::Refused(refusal) | Answer::Unknown(refusal) => query(Err(failure(refusal, &world))),
                Answer::Applied(_) => unreachable!("a read is no command"),
            }
        } else if let Some((since, then)) = self.proposals.remove(&ticket) {
            metrics::histogram!("cairn_meta_proposal_seconds").record(since.elapsed().as_secs_f64());
            let mut world = self.world();
            let result = match answer {
                Answer::Applied(result) => result.map_err(Failure::from),
                Answer::Refused(refusal) | Answer::Unknown(refusal) => Err(failure(refusal, &world)),
                Answer::Readable => unreachable!("a command is no read"),
            };
            then(result, &mut world);
        }
    }

    fn housekeep(&mut self) {
        let now = self.now();
        if now.saturating_since(self.housekept) < HOUSEKEEPING_INTERVAL {
            return;
        }
        self.housekept = now;
        self.gauge();
        if now.saturating_since(self.gauged) >= Duration::from_millis(CONDITION_INTERVAL_MS) {
            self.gauged = now;
            health::gauge(&self.world());
        }
        self.heal(now);
        if self.housekeeping.is_some() || !self.node.leads() {
            return;
        }
        if let Some(command) = self.due() {
            let ticket = self.ticket();
            self.housekeeping = Some(ticket);
            self.node.propose(ticket, unix_ms(), command);
        }
    }

    /// Does what the leader should do about devices that are lost.
    fn heal(&mut self, now: Time) {
        let is_due = now.saturating_since(self.healed) >= Duration::from_millis(HEAL_INTERVAL_MS);
        let is_able = self.node.leads() && self.node.state().cluster().is_some() && self.healing.is_empty();
        if !is_due || !is_able {
            return;
        }
        self.healed = now;
        let settings = self.soft.heal_settings;
        let commands = heal::decide(self.node.state(), &mut self.soft.heal, now, &settings);
        for command in commands {
            metrics::counter!("cairn_meta_proposals_total", "command" => command.tag().1).increment(1);
            let ticket = self.ticket();
            self.healing.insert(ticket);
            self.node.propose(ticket, unix_ms(), command);
        }
    }

    /// What the leader should put into the log by itself.
    fn due(&mut self) -> Option<Command> {
        let state = self.node.state();
        if state.cluster().is_none() {
            let cluster = self.myself.cluster_draft;
            return Some(
                InitCluster {
                    cluster,
                    feature_level: FEATURE_LEVEL,
                }
                .into(),
            );
        }
        for (id, member) in state.members() {
            let (address, directory) = if *id == self.myself.id {
                (&self.myself.address, self.myself.directory)
            } else if let Some(seen) = self.soft.members.get(id) {
                (&seen.address, seen.directory)
            } else {
                continue;
            };
            if member.directory != directory || member.address != *address {
                let update = UpdateMember {
                    id: *id,
                    address: address.clone(),
                    directory,
                };
                return Some(update.into());
            }
        }
        let devices = self.soft.due_reports(state, self.now());
        (!devices.is_empty()).then(|| ReportDevices { devices }.into())
    }

    fn gauge(&self) {
        let status = self.node.status();
        metrics::gauge!("cairn_meta_leader").set(f64::from(u8::from(status.leader == self.myself.id)));
        metrics::gauge!("cairn_meta_term").set(status.term as f64);
        metrics::gauge!("cairn_meta_commit_index").set(status.commit as f64);
        metrics::gauge!("cairn_meta_applied_index").set(status.applied as f64);
        metrics::gauge!("cairn_meta_log_entries").set(status.log.0 as f64);
        metrics::gauge!("cairn_meta_log_bytes").set(status.log.1 as f64);
        metrics::gauge!("cairn_meta_volumes").set(self.node.state().volumes().len() as f64);
        metrics::gauge!("cairn_meta_requests_waiting").set((self.proposals.len() + self.reads.len()) as f64);
    }
}

#[expect(clippy::disallowed_methods, reason = "the driver is where clocks are read")]
fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}
