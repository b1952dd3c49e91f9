//! The driver's thread: one loop over sockets, commands, deadlines and the core.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use cairn_proto::ids::{DeviceId, VolumeId};
use cairn_proto::time::Time;
use mio::{Events, Poll, Token};
use slab::Slab;
use tokio::sync::{mpsc, oneshot};

use super::Core;
use super::clock::{self, Jitter};
use super::devices::Device;
use super::guests::Guest;
use super::limits::{
    CARED_MAX, DEADLINE_CHECK, DRAIN_DEADLINE, EVENTS_MAX, META_QUEUE_MAX, RELEASE_DEADLINE, ROUNDS_MAX,
};
use super::listen::Listener;
use super::mailbox::{CareEnded, Command, Mailbox, UserId, Waiter};
use super::meta::{Job, OpenError};
use super::metrics::{Kind, Metrics};
use super::socket::Calls;
use super::volumes::{User, Volumes};
use crate::core::api::{Action, ConnId, Event, MetaAnswer, MetaError, Notice, VolumeDescription, VolumeHandle};
use crate::nbd::RequestToken;
use crate::volume::api::{OpId, VolumeError, VolumeOp, VolumeReply};

/// The token of the mailbox's waker; sockets come after it.
pub(super) const WAKER: Token = Token(0);

/// What is served, and how.
#[derive(Clone, Debug, Default)]
pub(crate) struct Settings {
    /// The volumes that are served; all if there is no list.
    pub(crate) only: Option<BTreeSet<String>>,
    /// What a client gets that names none.
    pub(crate) default_export: Option<String>,
    /// Whether writes are refused.
    pub(crate) read_only: bool,
    /// Of a caretaker: the node that it runs on; else 0.
    pub(crate) node_id: u64,
}

/// How the thread ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ended {
    /// Operations that were given up.
    pub unfinished: usize,
    /// Volumes whose attachment could not be released in time.
    pub unreleased: usize,
}

pub(super) enum Source {
    Listener(Listener),
    Guest(Box<Guest>),
    Device(Box<Device>),
}

/// Who waits for an operation.
enum Origin {
    Guest {
        key: usize,
        serial: u64,
        token: RequestToken,
    },
    Library(Waiter),
}

/// A volume that is only repaired, and who waits for the end of that.
struct Cared {
    name: String,
    ended: CareEnded,
    reply: oneshot::Sender<CareEnded>,
}

struct Pending {
    origin: Origin,
    kind: Kind,
    bytes: u64,
    since: Time,
}

/// Who waits for an answer of meta that is not the core's.
pub(super) enum Asker {
    Guest {
        key: usize,
        serial: u64,
        name: String,
    },
    Library {
        name: String,
        reply: oneshot::Sender<Result<(UserId, VolumeDescription), OpenError>>,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    Running,
    /// Nothing new is taken; what is in flight may end until then.
    Draining(Time),
    /// Attachments are released until then.
    Releasing(Time),
}

pub(super) struct Driver<C> {
    pub(super) core: C,
    pub(super) poll: Poll,
    pub(super) now: Time,
    pub(super) settings: Settings,
    pub(super) sources: Slab<Option<Source>>,
    pub(super) by_conn: BTreeMap<ConnId, usize>,
    /// Sockets that are to be served again.
    pub(super) ready: VecDeque<usize>,
    /// NBD connections with results to be written, or that may go on.
    pub(super) resumed: BTreeSet<usize>,
    /// NBD connections that wait for others to hold less.
    pub(super) starved: BTreeSet<usize>,
    /// NBD connections whose volume has no room for more; the next reply may make some.
    pub(super) crowded: BTreeSet<usize>,
    /// Listeners that could not accept, to be tried again after a while.
    stalled: BTreeSet<usize>,
    /// Device connections with frames to be written.
    pub(super) unsent: BTreeSet<usize>,
    pub(super) volumes: Volumes,
    /// Volumes that are only repaired.
    cared: BTreeMap<VolumeHandle, Cared>,
    pub(super) asks: Slab<Asker>,
    pub(super) phase: Phase,
    pub(super) metrics: Metrics,
    pub(super) calls: Calls,
    /// Bytes that all NBD connections hold.
    pub(super) guest_bytes: u64,
    pub(super) guests: usize,
    pub(super) serial: u64,
    mailbox: Arc<Mailbox>,
    jobs: mpsc::Sender<Job>,
    pending: Slab<Pending>,
    unfinished: usize,
    /// When deadlines are looked at next.
    pub(super) next_check: Time,
    /// Devices whose connection was lost lately, and when.
    pub(super) lost: BTreeMap<DeviceId, Time>,
    pub(super) jitter: Jitter,
}

impl<C: Core> Driver<C> {
    pub(super) fn new(
        core: C,
        poll: Poll,
        mailbox: Arc<Mailbox>,
        jobs: mpsc::Sender<Job>,
        settings: Settings,
        listeners: Vec<Listener>,
    ) -> io::Result<Driver<C>> {
        let mut driver = Driver {
            core,
            poll,
            now: clock::now(),
            settings,
            sources: Slab::new(),
            by_conn: BTreeMap::new(),
            ready: VecDeque::new(),
            resumed: BTreeSet::new(),
            starved: BTreeSet::new(),
            crowded: BTreeSet::new(),
            stalled: BTreeSet::new(),
            unsent: BTreeSet::new(),
            volumes: Volumes::default(),
            cared: BTreeMap::new(),
            asks: Slab::new(),
            phase: Phase::Running,
            metrics: Metrics::new(),
            calls: Calls::default(),
            guest_bytes: 0,
            guests: 0,
            serial: 0,
            mailbox,
            jobs,
            pending: Slab::new(),
            unfinished: 0,
            next_check: Time::ZERO,
            lost: BTreeMap::new(),
            jitter: Jitter::new()?,
        };
        for mut listener in listeners {
            let entry = driver.sources.vacant_entry();
            listener.register(driver.poll.registry(), token_of(entry.key()))?;
            entry.insert(Some(Source::Listener(listener)));
        }
        Ok(driver)
    }

    /// Runs until it was told to end and has.
    pub(super) fn run(mut self) -> io::Result<Ended> {
        let mut events = Events::with_capacity(EVENTS_MAX);
        loop {
            self.now = clock::now();
            self.calls.epoll_wait += 1;
            match self.poll.poll(&mut events, Some(self.sleep())) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            self.now = clock::now();
            for event in &events {
                self.note(event);
            }
            for command in self.mailbox.take() {
                self.obey(command);
            }
            if self.core.poll_timeout().is_some_and(|at| at <= self.now) {
                self.core.handle_timeout(self.now);
            }
            if self.next_check <= self.now {
                self.next_check = self.now + DEADLINE_CHECK;
                self.check_deadlines();
            }
            for _ in 0..self.ready.len() {
                let Some(key) = self.ready.pop_front() else { break };
                self.serve(key);
            }
            self.settle();
            if let Some(ended) = self.ended() {
                return Ok(ended);
            }
        }
    }

    fn sleep(&self) -> Duration {
        if !self.ready.is_empty() {
            return Duration::ZERO;
        }
        let core = self
            .core
            .poll_timeout()
            .map_or(DEADLINE_CHECK, |at| at.saturating_since(self.now));
        // Rounded up to what the kernel can tell apart, so that no turn is made in vain just before the time.
        let millis = core.as_nanos().div_ceil(1_000_000) as u64;
        let check = self.next_check.saturating_since(self.now).max(Duration::from_millis(1));
        Duration::from_millis(millis).min(check)
    }

    fn note(&mut self, event: &mio::event::Event) {
        if event.token() == WAKER {
            return;
        }
        let key = event.token().0 - 1;
        let Some(Some(source)) = self.sources.get_mut(key) else {
            return;
        };
        let readiness = match source {
            Source::Guest(guest) => &mut guest.readiness,
            Source::Device(device) => &mut device.readiness,
            Source::Listener(_) => {
                if !self.ready.contains(&key) {
                    self.ready.push_back(key);
                }
                return;
            }
        };
        readiness.note(event);
        if !std::mem::replace(&mut readiness.queued, true) {
            self.ready.push_back(key);
        }
    }

    /// Serves one socket for a bounded number of rounds.
    fn serve(&mut self, key: usize) {
        let Some(source) = self.sources.get_mut(key) else {
            return;
        };
        match source.take() {
            None => {}
            Some(Source::Listener(listener)) => self.accept(key, listener),
            Some(Source::Guest(mut guest)) => {
                guest.readiness.queued = false;
                self.with_guest(key, guest, true);
            }
            Some(Source::Device(mut device)) => {
                device.readiness.queued = false;
                self.with_device(key, device);
            }
        }
    }

    fn take(&mut self, key: usize) -> Option<Source> {
        self.sources.get_mut(key)?.take()
    }

    fn accept(&mut self, key: usize, listener: Listener) {
        let mut more = true;
        for _ in 0..ROUNDS_MAX {
            match listener.accept() {
                Ok(Some(stream)) => self.add_guest(stream),
                Ok(None) => {
                    more = false;
                    break;
                }
                Err(error) => {
                    // Out of descriptors, most likely: those that wait are accepted when others have gone.
                    tracing::warn!(%error, listen = %listener.place(), "can't accept an NBD connection");
                    self.stalled.insert(key);
                    more = false;
                    break;
                }
            }
        }
        self.sources[key] = Some(Source::Listener(listener));
        if more {
            self.ready.push_back(key);
        }
    }

    /// Does what the core wants, gives results to those who wait, and writes, until nothing is left to do.
    fn settle(&mut self) {
        loop {
            while let Some(action) = self.core.poll_action() {
                self.act(action);
            }
            if let Some(key) = self.resumed.pop_first() {
                match self.take(key) {
                    Some(Source::Guest(guest)) => self.with_guest(key, guest, false),
                    Some(other) => self.sources[key] = Some(other),
                    None => {}
                }
                continue;
            }
            let Some(key) = self.unsent.pop_first() else { return };
            match self.take(key) {
                Some(Source::Device(device)) => self.flush_device(key, device),
                Some(other) => self.sources[key] = Some(other),
                None => {}
            }
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Connect {
                conn,
                device,
                addresses,
                ..
            } => self.connect(conn, device, addresses),
            Action::Disconnect { conn } => self.disconnect(conn),
            Action::Send { to, envelope } => self.send(&to, &envelope),
            Action::Reply { op, result, .. } => self.reply(op, result),
            Action::Meta(request) => {
                let id = request.request;
                if let Err(error) = self.ask(Job::Core(request)) {
                    let result = Err(error);
                    self.core
                        .handle(self.now, Event::Meta(MetaAnswer { request: id, result }));
                }
            }
            // When the channel is full it is told again soon.
            Action::Report(reports) => drop(self.ask(Job::Report(reports))),
            Action::Closed { volume } => self.volume_closed(volume),
            Action::Notice { volume, notice } => self.notice(volume, &notice),
            Action::DeviceNotice { device, words } => tracing::info!(%device, "{words}"),
        }
    }

    fn notice(&mut self, volume: VolumeHandle, notice: &Notice) {
        self.metrics.notice(notice);
        let mut name = self.volumes.name_of(volume);
        if let Some(cared) = self.cared.get_mut(&volume) {
            name = &cared.name;
            if let Notice::Attached(generation) = notice {
                cared.ended.granted = Some(*generation);
            }
        }
        tracing::info!(volume = name, "{notice}");
    }

    fn care(&mut self, description: VolumeDescription, reply: oneshot::Sender<CareEnded>) {
        if self.phase != Phase::Running || self.cared.len() >= CARED_MAX {
            let _ = reply.send(CareEnded { granted: None });
            return;
        }
        let volume = self.volumes.next_handle();
        let cared = Cared {
            name: description.name.clone(),
            ended: CareEnded { granted: None },
            reply,
        };
        self.cared.insert(volume, cared);
        self.core.handle(self.now, Event::CareForVolume { volume, description });
    }

    /// Hands a question over to those who may wait for an answer.
    pub(super) fn ask(&mut self, job: Job) -> Result<(), MetaError> {
        self.metrics.meta_questions.increment(1);
        self.jobs.try_send(job).map_err(|error| {
            MetaError::Unreachable(match error {
                mpsc::error::TrySendError::Full(_) => format!("{META_QUEUE_MAX} questions to them wait already"),
                mpsc::error::TrySendError::Closed(_) => "the client is shutting down".to_string(),
            })
        })
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Described { ticket, answer } => match self.asks.try_remove(ticket) {
                Some(Asker::Guest { key, serial, name }) => self.guest_described(key, serial, &name, answer),
                Some(Asker::Library { name, reply }) => self.library_described(&name, answer, reply),
                None => {}
            },
            Command::Catalogue { ticket, answer } => {
                if let Some(Asker::Guest { key, serial, .. }) = self.asks.try_remove(ticket) {
                    self.guest_catalogue(key, serial, answer);
                }
            }
            Command::Meta(answer) => self.core.handle(self.now, Event::Meta(answer)),
            Command::Resolved { conn, addresses } => self.resolved(conn, addresses),
            Command::Open { name, reply } => self.open(name, reply),
            Command::Submit { user, op, waiter } => match self.volumes.handle_of_user(User::Library(user)) {
                Some(volume) if self.phase == Phase::Running => self.submit(volume, op, Origin::Library(waiter)),
                _ => waiter.tell(Err(VolumeError::Shutdown)),
            },
            Command::Advice(advice) => self.core.handle(self.now, Event::Advice(advice)),
            Command::Care { description, reply } => self.care(description, reply),
            Command::Leave { user, reply } => self.leave_with_reply(User::Library(user), reply),
            Command::Shutdown => self.shut_down(),
        }
    }

    pub(super) fn submit_for_guest(
        &mut self,
        volume: VolumeHandle,
        op: VolumeOp,
        (key, serial): (usize, u64),
        token: RequestToken,
    ) {
        self.submit(volume, op, Origin::Guest { key, serial, token });
    }

    fn submit(&mut self, volume: VolumeHandle, request: VolumeOp, origin: Origin) {
        let (kind, bytes) = Kind::of(&request);
        let since = self.now;
        let op = OpId(self.pending.insert(Pending {
            origin,
            kind,
            bytes,
            since,
        }) as u64);
        self.core.handle(self.now, Event::Submit { volume, op, request });
    }

    fn reply(&mut self, op: OpId, result: Result<VolumeReply, VolumeError>) {
        self.resumed.append(&mut self.crowded);
        // What was given up at an end in haste has nobody waiting.
        let Some(pending) = self.pending.try_remove(op.0 as usize) else {
            return;
        };
        let metrics = self.metrics.kind(pending.kind);
        metrics.seconds.record(self.now.saturating_since(pending.since));
        match &result {
            Ok(_) => metrics.bytes.increment(pending.bytes),
            Err(_) => metrics.errors.increment(1),
        }
        match pending.origin {
            Origin::Library(waiter) => waiter.tell(result),
            Origin::Guest { key, serial, token } => {
                if let Some(Some(Source::Guest(guest))) = self.sources.get_mut(key)
                    && guest.serial == serial
                {
                    guest.complete(token, result);
                    self.resumed.insert(key);
                }
            }
        }
    }

    fn open(&mut self, name: String, reply: oneshot::Sender<Result<(UserId, VolumeDescription), OpenError>>) {
        if self.phase != Phase::Running {
            let _ = reply.send(Err(OpenError::Shutdown));
            return;
        }
        let asker = Asker::Library {
            name: name.clone(),
            reply,
        };
        self.describe(asker, name);
    }

    pub(super) fn describe(&mut self, asker: Asker, name: String) {
        let ticket = self.asks.insert(asker);
        let deadline = self.volumes.describe_deadline(&name);
        if let Err(error) = self.ask(Job::Describe { ticket, name, deadline }) {
            // Not at once: the connection that asks is out of the table.
            let answer = Err(error.into());
            self.mailbox.send(Command::Described { ticket, answer });
        }
    }

    fn library_described(
        &mut self,
        name: &str,
        answer: Result<VolumeDescription, OpenError>,
        reply: oneshot::Sender<Result<(UserId, VolumeDescription), OpenError>>,
    ) {
        let description = match self.volumes.or_known(name, answer) {
            Ok(description) if self.phase == Phase::Running => description,
            Ok(_) => return drop(reply.send(Err(OpenError::Shutdown))),
            Err(error) => return drop(reply.send(Err(error))),
        };
        self.serial += 1;
        let user = UserId(self.serial);
        match self.enter(User::Library(user), &description) {
            Ok(()) => self.volumes.when_open(User::Library(user), reply, description),
            Err(error) => drop(reply.send(Err(error))),
        }
    }

    /// Makes `user` a user of the volume, which is opened for the first.
    pub(super) fn enter(&mut self, user: User, description: &VolumeDescription) -> Result<(), OpenError> {
        for event in self.volumes.enter(user, description)? {
            self.core.handle(self.now, event);
        }
        self.metrics.volumes.set(self.volumes.len() as f64);
        Ok(())
    }

    /// The last user's going closes the volume, which releases its attachment.
    pub(super) fn leave(&mut self, user: User) -> Option<VolumeId> {
        let (id, event) = self.volumes.leave(user)?;
        if let Some(event) = event {
            self.core.handle(self.now, event);
        }
        Some(id)
    }

    fn leave_with_reply(&mut self, user: User, reply: oneshot::Sender<()>) {
        match self.leave(user) {
            Some(id) => self.volumes.when_closed(id, reply),
            None => drop(reply.send(())),
        }
    }

    fn volume_closed(&mut self, volume: VolumeHandle) {
        if let Some(cared) = self.cared.remove(&volume) {
            let _ = cared.reply.send(cared.ended);
            return;
        }
        for (user, event) in self.volumes.closed(volume) {
            if let Some(event) = event {
                self.core.handle(self.now, event);
            }
            if let User::Guest(key) = user {
                self.resumed.insert(key);
            }
        }
        self.metrics.volumes.set(self.volumes.len() as f64);
    }

    fn check_deadlines(&mut self) {
        self.ready.extend(std::mem::take(&mut self.stalled));
        let keys: Vec<usize> = self.sources.iter().map(|(key, _)| key).collect();
        for key in keys {
            match &self.sources[key] {
                Some(Source::Guest(guest)) if guest.is_overdue(self.now) => self.resumed.extend([key]),
                Some(Source::Device(device)) if device.is_overdue(self.now) => {
                    if let Some(Source::Device(device)) = self.sources[key].take() {
                        self.try_next_address(key, device);
                    }
                }
                Some(Source::Device(device)) => {
                    let held = device.held_until().unwrap_or(Time::MAX);
                    self.next_check = self.next_check.min(held);
                }
                _ => {}
            }
        }
        self.metrics.publish();
        self.metrics.in_flight.set(self.pending.len() as f64);
        self.metrics.guests.set(self.guests as f64);
        self.metrics.load(self.core.device_load());
        self.metrics.calls(std::mem::take(&mut self.calls));
        self.metrics.guest_bytes.set(self.guest_bytes as f64);
    }

    fn shut_down(&mut self) {
        if self.phase != Phase::Running {
            return;
        }
        self.phase = Phase::Draining(self.now + DRAIN_DEADLINE);
        for key in self.keys_of(|source| matches!(source, Source::Listener(_))) {
            self.sources.remove(key);
        }
        for key in self.keys_of(|source| matches!(source, Source::Guest(_))) {
            self.resumed.insert(key);
        }
    }

    fn keys_of(&self, is_it: impl Fn(&Source) -> bool) -> Vec<usize> {
        let matching = self
            .sources
            .iter()
            .filter(|(_, source)| source.as_ref().is_some_and(&is_it));
        matching.map(|(key, _)| key).collect()
    }

    /// Goes from one phase of the end to the next.
    fn ended(&mut self) -> Option<Ended> {
        if let Phase::Draining(deadline) = self.phase {
            let late = self.now >= deadline;
            if !late && (self.guests > 0 || !self.pending.is_empty()) {
                return None;
            }
            self.unfinished = self.pending.len();
            // Guests are told nothing of what did not end: they ask again elsewhere, or later.
            for key in self.keys_of(|source| matches!(source, Source::Guest(_))) {
                self.drop_guest(key);
            }
            let unfinished: Vec<usize> = self.pending.iter().map(|(index, _)| index).collect();
            for index in unfinished {
                self.reply(OpId(index as u64), Err(VolumeError::Shutdown));
            }
            self.phase = Phase::Releasing(self.now + RELEASE_DEADLINE);
            self.settle();
            for user in self.volumes.users() {
                self.leave(user);
            }
            let cared: Vec<VolumeHandle> = self.cared.keys().copied().collect();
            for volume in cared {
                self.core.handle(self.now, Event::CloseVolume { volume });
            }
            self.settle();
        }
        match self.phase {
            Phase::Releasing(deadline) => {
                let unreleased = self.volumes.len() + self.cared.len();
                let unfinished = self.unfinished;
                (unreleased == 0 || self.now >= deadline).then_some(Ended { unfinished, unreleased })
            }
            Phase::Running | Phase::Draining(_) => None,
        }
    }
}

/// The token of a socket in the table.
pub(super) fn token_of(key: usize) -> Token {
    Token(key + 1)
}
