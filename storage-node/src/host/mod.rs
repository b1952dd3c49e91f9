//! The replica host: one device, the rules that a replica obeys, and the peers that speak to it. It is sans-I/O: a
//! driver (or the simulator) tells it what came in, and does what it wants done. DESIGN.md, "Replica host".

mod api;
mod background;
mod control;
mod damage;
mod data;
mod fetch;
pub mod limits;
mod queue;
mod reply;
mod seals;
mod session;
mod store;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

#[cfg(feature = "canary")]
pub use api::Canary;
pub use api::{CloseReason, ConnId, HeldReplica, HostAction, HostConfig, HostEvent, HostStatus, PeerId};
use background::{Background, Chore};
pub use background::{BackgroundConfig, ScrubStatus};
use cairn_proto::collections::Map;
use cairn_proto::frame::{Class, Flags};
use cairn_proto::ids::{Correlation, GroupId, Version};
use cairn_proto::message::{Empty, Envelope, Failed, FailureKind, Holder, Message};
use cairn_proto::replica::ReplicaRules;
use cairn_proto::time::Time;
use fetch::Fetches;
use limits::{SCRUB_STEP_BLOCKS, SWEEP_INTERVAL};
use queue::Queues;
use seals::Seals;
use session::Connection;
pub use session::Peer;
pub use store::{Membership, ReplicaStore};

use crate::store::api::{DamagedBlock, DamagedMetadata};
use crate::store::{Store, StoreAction, StoreRequest, Ticket};

/// A request of a peer that has no answer yet. It is counted against its connection until it is answered.
#[derive(Clone, Copy, Debug)]
struct Request {
    conn: ConnId,
    correlation: Correlation,
    class: Class,
    flags: Flags,
    trace_id: u64,
    /// Under which attachment.
    holder: Holder,
    /// Bytes of data that came with it.
    bytes: u64,
    /// When it came.
    arrived: Time,
}

/// A request that waits for its turn at the store.
struct Queued {
    /// `None` for what no peer has asked for.
    request: Option<Request>,
    task: Task,
    work: StoreRequest,
}

/// What the store was asked for.
#[derive(Clone, Copy, Debug)]
enum Task {
    Seal(Holder),
    Drop,
    Join { group: GroupId, created: bool },
    Write { group: GroupId, stable: Version },
    Copy,
    Read { blocks: u32 },
    Collect,
    Chore(Chore),
}

/// A request that the store works on.
#[derive(Clone, Copy, Debug)]
struct Working {
    /// `None` for what no peer has asked for.
    request: Option<Request>,
    task: Task,
    /// When it was given to the store.
    since: Time,
    /// Bytes that it counts for in the store's window; zero for what passes by the window.
    window: Option<u64>,
}

/// One device with its store and its peers.
pub struct DeviceHost<S = Store> {
    config: HostConfig,
    store: S,
    rules: ReplicaRules,
    connections: BTreeMap<ConnId, Connection>,
    seals: Seals,
    queues: Queues<Queued>,
    fetches: Fetches,
    working: Map<Ticket, Working>,
    /// Requests and bytes of `working` that count for the store's window.
    window: (usize, u64),
    background: Background,
    /// The highest stable watermark that a holder has told, by group.
    stables: BTreeMap<GroupId, Version>,
    actions: VecDeque<HostAction>,
    next_ticket: u64,
    next_sweep: Time,
    /// When holders are told of damage next.
    next_damage: Time,
    now: Time,
}

impl<S: ReplicaStore> DeviceHost<S> {
    /// For a store that has just been opened. `now` is when the device started, or later: older read grants are assumed
    /// to begin at it.
    pub fn new(now: Time, config: HostConfig, store: S) -> DeviceHost<S> {
        let mut rules = ReplicaRules::new(now, config.limits.read_grant, store.seals());
        plant(&config, &mut rules);
        let background = Background::new(now, config.background, store.scrub_state());
        DeviceHost {
            background,
            config,
            store,
            rules,
            connections: BTreeMap::new(),
            seals: Seals::default(),
            queues: Queues::new(),
            fetches: Fetches::default(),
            working: Map::default(),
            window: (0, 0),
            stables: BTreeMap::new(),
            actions: VecDeque::new(),
            next_ticket: 0,
            next_sweep: now,
            next_damage: now,
            now,
        }
    }

    /// Takes in what happened.
    pub fn handle(&mut self, now: Time, event: HostEvent) {
        self.now = now;
        match event {
            HostEvent::Connected { conn } => self.connected(conn),
            HostEvent::Frame { conn, envelope } => self.frame(conn, envelope),
            HostEvent::BadFrame { conn, error } => self.close(conn, CloseReason::BadFrame(error)),
            HostEvent::Disconnected { conn } => self.forget(conn),
            HostEvent::PeerConnected { peer } => self.peer_connected(peer),
            HostEvent::PeerFrame { peer, envelope } => self.peer_frame(peer, envelope),
            HostEvent::PeerEnded { peer } => self.peer_ended(peer),
            HostEvent::Disk(done) => self.store.disk_done(now, done),
            HostEvent::Drop { replicas } => self.drop_replicas(replicas),
            HostEvent::Scrub => self.background.want_scrub(now),
        }
    }

    /// The time of [`poll_timeout`](Self::poll_timeout) has come.
    pub fn handle_timeout(&mut self, now: Time) {
        self.now = now;
        if self.store.poll_timeout().is_some_and(|at| at <= now) {
            self.store.handle_timeout(now);
        }
        for volume in self.seals.due(now) {
            self.try_open(volume);
        }
        if self.fetch_wake().is_some_and(|at| at <= now) {
            self.fetch_timeout();
        }
        if self.next_sweep <= now {
            self.sweep();
        }
        if self.damage_wake().is_some_and(|at| at <= now) {
            self.tell_damage();
        }
    }

    /// What is to be done next. To be called until there is nothing, after every batch of events: the more events were
    /// taken in before, the more writes share a commit.
    pub fn poll_action(&mut self) -> Option<HostAction> {
        loop {
            if let Some(action) = self.actions.pop_front() {
                return Some(action);
            }
            self.pump();
            match self.store.poll_action() {
                Some(StoreAction::Disk(op)) => return Some(HostAction::Disk(op)),
                Some(StoreAction::Reply(ticket, reply)) => self.store_replied(ticket, reply),
                None => return self.actions.pop_front(),
            }
        }
    }

    /// When to call [`handle_timeout`](Self::handle_timeout) if nothing else happens.
    pub fn poll_timeout(&self) -> Option<Time> {
        let sweep = (!self.connections.is_empty()).then_some(self.next_sweep);
        let background = self.background.wake();
        let (damage, fetch) = (self.damage_wake(), self.fetch_wake());
        let own = [self.store.poll_timeout(), self.seals.wake(), sweep];
        own.into_iter().chain([background, damage, fetch]).flatten().min()
    }

    /// Holds back the requests of a connection while its answers do not get out as fast as they are made.
    pub fn set_congested(&mut self, conn: ConnId, congested: bool) {
        if let Some(connection) = self.connections.get_mut(&conn) {
            connection.congested = congested;
        }
    }

    /// Who is at the other end of a connection that has said hello.
    pub fn peer(&self, conn: ConnId) -> Option<Peer> {
        self.connections.get(&conn)?.peer
    }

    /// How the device is.
    pub fn status(&self) -> HostStatus {
        let peers = self.connections.values().filter(|c| c.peer.is_some()).count();
        HostStatus {
            capacity_blocks: self.store.capacity_blocks(),
            used_blocks: self.store.used_blocks(),
            commit: self.store.commit(),
            failed: self.store.failed().map(|error| error.to_string()),
            inventory_digest: digest(&self.store.replicas()),
            peers,
            strangers: self.connections.len() - peers,
            requests: self.queues.len() + self.working.len() + self.seals.len() - self.background.chores(),
            queued: self.queues.len(),
            fetching: self.fetches.len(),
            fetching_bytes: self.fetches.reading(),
            fetch_peers: self.fetches.peers(),
            fetched_bytes: self.fetches.fetched(),
            held: self.held(),
            damaged_volumes: self.damaged_volumes(),
            scrub: ScrubStatus {
                blocks: self.store.data_blocks(),
                damaged_blocks: self.store.damaged_blocks(),
                mended_blocks: self.store.mended_blocks(),
                ..self.background.status()
            },
        }
    }

    /// Blocks that were found damaged and are not mended yet: a bounded number of them, in no order. A copy of the same
    /// version from another replica mends one. They are not known any more after a restart, until a read or the next pass
    /// finds them again.
    pub fn damage(&self) -> impl Iterator<Item = &DamagedBlock> {
        self.background
            .damage()
            .iter()
            .filter(|found| self.store.is_damaged(found))
    }

    /// What the last pass of the scrub, or the one under way, has found damaged of the device's own metadata.
    pub fn damaged_metadata(&self) -> &[DamagedMetadata] {
        self.background.damaged_metadata()
    }

    /// The replicas that are here, in order of their groups.
    pub fn inventory(&self) -> Vec<HeldReplica> {
        self.store.replicas()
    }

    /// The store, for checkers.
    pub fn store(&self) -> &S {
        &self.store
    }

    fn connected(&mut self, conn: ConnId) {
        let limits = &self.config.limits;
        let strangers = self.connections.values().filter(|c| c.peer.is_none()).count();
        let full = self.connections.len() >= limits.connections || strangers >= limits.strangers;
        if self.connections.is_empty() {
            self.next_sweep = self.now + SWEEP_INTERVAL;
        }
        let before = self.connections.insert(conn, Connection::new(self.now));
        assert!(before.is_none(), "{conn} is connected already");
        if full {
            self.close(conn, CloseReason::TooMany(self.connections.len() - 1));
        }
    }

    /// Something is wrong with the connection.
    fn close(&mut self, conn: ConnId, reason: CloseReason) {
        if self.connections.contains_key(&conn) {
            self.forget(conn);
            self.actions.push_back(HostAction::Close { conn, reason });
        }
    }

    /// The connection is gone: what waits is dropped, and the answers to what the store works on will be.
    fn forget(&mut self, conn: ConnId) {
        self.connections.remove(&conn);
        self.queues.take(
            |_| true,
            |queued| queued.request.is_some_and(|request| request.conn == conn),
        );
        self.seals.forget(conn);
        self.forget_fetches(conn);
    }

    fn sweep(&mut self) {
        let (now, limits) = (self.now, self.config.limits);
        self.next_sweep = now + SWEEP_INTERVAL;
        let late = |since: Time, timeout: Duration| now.saturating_since(since) >= timeout;
        let silent: Vec<_> = self
            .connections
            .iter()
            .filter_map(|(conn, connection)| {
                if connection.peer.is_none() {
                    let reason = CloseReason::NoHello(limits.hello_timeout);
                    late(connection.since, limits.hello_timeout).then_some((*conn, reason))
                } else {
                    let reason = CloseReason::Idle(limits.idle_timeout);
                    // Who holds a volume may be silent: its guest is idle.
                    let has_use = connection.requests > 0 || (connection.is_guest() && !connection.is_bare());
                    (!has_use && late(connection.heard, limits.idle_timeout)).then_some((*conn, reason))
                }
            })
            .collect();
        for (conn, reason) in silent {
            self.close(conn, reason);
        }
    }

    fn frame(&mut self, conn: ConnId, envelope: Envelope) {
        let now = self.now;
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        connection.heard = now;
        match (&envelope.message, connection.peer.is_some()) {
            (Message::Hello(_), false) => self.hello(conn, envelope),
            (Message::Hello(_), true) => self.close(conn, CloseReason::Unexpected("a second hello")),
            (_, false) => self.close(conn, CloseReason::Unexpected("a message before its hello")),
            (message, true) if !message.is_request() => {
                let name = message.name();
                self.close(conn, CloseReason::Unexpected(name));
            }
            (_, true) => self.request(conn, envelope),
        }
    }

    fn request(&mut self, conn: ConnId, envelope: Envelope) {
        let bytes = match &envelope.message {
            Message::Write(write) => match &write.data {
                cairn_proto::message::WriteData::Data { bytes, .. } => bytes.len() as u64,
                _ => 0,
            },
            Message::Copy(copy) => copy.bytes.len() as u64,
            _ => 0,
        };
        let limits = self.config.limits;
        let connection = self.connections.get_mut(&conn).expect("it was looked up before");
        let request = Request {
            conn,
            correlation: envelope.correlation,
            class: envelope.class,
            flags: envelope.flags,
            trace_id: envelope.trace_id,
            holder: holder_of(&envelope.message),
            bytes,
            arrived: self.now,
        };
        connection.requests += 1;
        connection.bytes += bytes;
        if connection.requests > limits.requests_in_flight || connection.bytes > limits.request_bytes_in_flight {
            connection.refused += 1;
            if connection.refused > limits.requests_in_flight {
                return self.close(conn, CloseReason::Flood);
            }
            let words = format!(
                "more than {} requests or {} bytes in flight on one connection: wait for answers first",
                limits.requests_in_flight, limits.request_bytes_in_flight
            );
            return self.fail(&request, FailureKind::TooManyInFlight, words);
        }
        connection.refused = 0;
        match envelope.message {
            Message::Ping(_) => self.answer(&request, Message::Pong(Empty)),
            Message::Seal(seal) => self.seal(&request, &seal),
            Message::Join(join) => self.join(&request, &join),
            Message::Confirm(confirm) => self.confirm(&request, &confirm),
            Message::Release(release) => self.release(&request, &release),
            Message::Write(write) => self.write(&request, write),
            Message::Copy(copy) => self.copy(&request, copy),
            Message::CopyHole(copy) => self.copy_hole(&request, copy),
            Message::Read(read) => self.read(&request, &read),
            Message::Collect(collect) => self.collect(&request, &collect),
            Message::Fetch(fetch) => self.fetch(&request, fetch),
            other => unreachable!("{} is no request", other.name()),
        }
    }

    /// Answers a request, with a read grant if its holder may have one. Nothing happens if its connection is gone.
    fn answer(&mut self, request: &Request, message: Message) {
        let Some(connection) = self.connections.get_mut(&request.conn) else {
            return;
        };
        let count = connection.requests.checked_sub(1);
        connection.requests = count.expect("a request is answered once");
        connection.bytes -= request.bytes;
        // Another device that reads for a holder is not the holder.
        let of_holder =
            connection.is_guest() && !matches!(message, Message::Failed(_) | Message::Released(_) | Message::Pong(_));
        let grant = of_holder && self.rules.grant(self.now, request.holder);
        let flags = Flags { grant, ..request.flags };
        let envelope = Envelope {
            correlation: request.correlation,
            class: request.class,
            flags,
            trace_id: request.trace_id,
            message,
        };
        let conn = request.conn;
        self.actions.push_back(HostAction::Send { conn, envelope });
    }

    fn fail(&mut self, request: &Request, kind: FailureKind, words: impl Into<String>) {
        self.answer(request, Message::Failed(Failed::new(kind, words)));
    }

    /// Gives the store what it has room for.
    fn pump(&mut self) {
        let limits = self.config.limits;
        let is_quiet = self.queues.len() == 0;
        while let Some((chore, work)) = self.background.poll(self.now, is_quiet) {
            let queued = Queued {
                request: None,
                task: Task::Chore(chore),
                work,
            };
            let key = (background::queue_of(chore), Class::Scrub);
            self.queues.push(key, SCRUB_STEP_BLOCKS, queued);
        }
        while self.window.0 < limits.store_requests && self.window.1 < limits.store_bytes {
            let connections = &self.connections;
            let congested = |queued: &Queued| {
                let conn = queued.request.and_then(|request| connections.get(&request.conn));
                conn.is_some_and(|connection| connection.congested)
            };
            let Some(queued) = self.queues.next(congested) else {
                return;
            };
            let bytes = match queued.task {
                Task::Read { blocks } => u64::from(blocks) * cairn_proto::limits::BLOCK_BYTES as u64,
                Task::Chore(_) => u64::from(SCRUB_STEP_BLOCKS) * cairn_proto::limits::BLOCK_BYTES as u64,
                _ => match &queued.work {
                    // Also of what was fetched, which did not come with its request.
                    StoreRequest::Copy { bytes, .. } => bytes.len() as u64,
                    _ => queued.request.map_or(0, |request| request.bytes),
                },
            };
            self.window.0 += 1;
            self.window.1 += bytes;
            let is_guest = queued.request.is_some_and(|request| request.class == Class::Guest);
            let is_write = matches!(queued.task, Task::Write { .. } | Task::Copy);
            self.background.note_request(self.now, is_guest, is_write);
            self.submit(queued.request, queued.task, Some(bytes), queued.work);
        }
    }

    fn submit(&mut self, request: Option<Request>, task: Task, window: Option<u64>, work: StoreRequest) {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        if let Some(request) = request.filter(|_| task.changes_the_volume()) {
            self.rules.accepted(request.holder);
        }
        let since = self.now;
        let working = Working {
            request,
            task,
            since,
            window,
        };
        self.working.insert(ticket, working);
        self.store.submit(self.now, ticket, work);
    }
}

impl Task {
    /// Whether a higher generation's seal must wait until it has ended.
    fn changes_the_volume(self) -> bool {
        match self {
            Task::Join { .. } | Task::Write { .. } | Task::Copy => true,
            Task::Seal(_) | Task::Drop | Task::Read { .. } | Task::Collect | Task::Chore(_) => false,
        }
    }
}

/// Under which attachment a request is made; of no volume for one that is about none.
fn holder_of(message: &Message) -> Holder {
    match message {
        Message::Seal(seal) => Holder {
            volume: seal.capability.volume,
            generation: seal.capability.generation,
        },
        Message::Join(join) => join.holder,
        Message::Confirm(confirm) => confirm.holder,
        Message::Release(release) => release.holder,
        Message::Write(write) => write.holder,
        Message::Copy(copy) => copy.holder,
        Message::CopyHole(copy) => copy.holder,
        Message::Read(read) => read.holder,
        Message::Collect(collect) => collect.holder,
        Message::Fetch(fetch) => fetch.holder,
        _ => Holder {
            volume: Default::default(),
            generation: Default::default(),
        },
    }
}

/// FNV-1a over the groups: equal sets have equal digests, and an empty one has another than most.
fn digest(replicas: &[HeldReplica]) -> u64 {
    let bytes = replicas.iter().flat_map(|held| {
        let volume = held.group.volume.0.to_le_bytes();
        let epoch = held.epoch.0.to_le_bytes();
        volume.into_iter().chain([held.group.index.0]).chain(epoch)
    });
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(feature = "canary")]
fn plant(config: &HostConfig, rules: &mut ReplicaRules) {
    rules.set_canaries(cairn_proto::replica::RuleCanaries {
        grant_ignored: config.canary == Canary::GrantIgnored,
        seal_not_durable: config.canary == Canary::SealNotDurable,
        writes_overtake_seal: config.canary == Canary::WritesOvertakeSeal,
    });
}

#[cfg(not(feature = "canary"))]
fn plant(_config: &HostConfig, _rules: &mut ReplicaRules) {}

#[cfg(test)]
mod tests;
