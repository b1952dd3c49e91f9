//! The loop of a device's thread: completions in, the host, actions out, one submit.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSlice};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cairn_proto::frame::FrameError;
use cairn_proto::ids::DeviceId;
use cairn_proto::message::{Envelope, FailureKind, Message};
use cairn_proto::time::Time;
use rustix::net::{SendAncillaryBuffer, SendFlags, Shutdown, sendmsg, shutdown, sockopt};

use super::budget::Budget;
use super::clock;
use super::connection::{Connection, Parsed};
use super::control::{Control, ControlQueue};
use super::limits::{
    ACCEPT_PAUSE, DRAIN_TIMEOUT, DriverLimits, KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES, LINGER,
    SEND_PIECES_NOW, SWEEP_INTERVAL,
};
use super::meters::Meters;
use super::open::ring_error;
use super::ring::{Completion, ReceiveBufs, Ring};
use super::thread::DriverError;
use crate::host::{CloseReason, ConnId, DeviceHost, HostAction, HostEvent, PeerId};

/// How long to wait when nothing is to be waited for.
const IDLE: Duration = Duration::from_secs(10);

/// A device that is open and served.
pub(super) struct Serving {
    ring: Ring,
    file: Rc<OwnedFd>,
    pub(super) host: DeviceHost,
    pub(super) device: DeviceId,
    listener: Rc<OwnedFd>,
    event: Rc<OwnedFd>,
    pub(super) control: Arc<ControlQueue>,
    limits: DriverLimits,
    budget: Budget,
    pub(super) meters: Meters,
    pub(super) connections: BTreeMap<ConnId, Connection>,
    /// Those that were made to other devices.
    pub(super) peers: BTreeMap<PeerId, ConnId>,
    /// Those that are being made.
    pub(super) reaching: BTreeSet<PeerId>,
    /// Threads that are at it, also for what nobody wants any more.
    pub(super) reach_threads: usize,
    /// Connections of which something may be sent, received or closed.
    pub(super) dirty: BTreeSet<ConnId>,
    pub(super) next_conn: u64,
    next_sweep: Time,
    /// Bytes that wait to be sent, on all connections.
    sending: usize,
    /// Calls of `sendmsg`.
    sends: u64,
    /// When to accept again, after there was no descriptor left.
    accept_at: Option<Time>,
    accepting: bool,
    /// When to end at the latest.
    pub(super) end_by: Option<Time>,
    pub(super) now: Time,
}

impl Serving {
    pub(super) fn new(
        ring: Ring,
        file: Rc<OwnedFd>,
        host: DeviceHost,
        device: DeviceId,
        listener: TcpListener,
        limits: DriverLimits,
        control: Arc<ControlQueue>,
    ) -> Result<Serving, DriverError> {
        let prepare = |error| DriverError::Io {
            doing: "preparing to accept connections",
            error,
        };
        // The ring waits by itself; a descriptor that does not block would make it come back at once.
        listener.set_nonblocking(false).map_err(prepare)?;
        let now = clock::now();
        Ok(Serving {
            ring,
            file,
            host,
            device,
            listener: Rc::new(listener.into()),
            event: Rc::new(control.event().map_err(prepare)?),
            control,
            limits,
            budget: Budget::new(limits.receive_bytes),
            meters: Meters::new(device.uuid),
            connections: BTreeMap::new(),
            peers: BTreeMap::new(),
            reaching: BTreeSet::new(),
            reach_threads: 0,
            dirty: BTreeSet::new(),
            next_conn: 0,
            next_sweep: now,
            sending: 0,
            sends: 0,
            accept_at: None,
            accepting: false,
            end_by: None,
            now,
        })
    }

    /// Serves until it is asked to end.
    pub(super) fn run(mut self) -> Result<(), DriverError> {
        self.ring.wait_for(&self.event);
        loop {
            self.now = clock::now();
            while let Some(completion) = self.ring.completion() {
                self.completed(completion);
            }
            self.hear_control();
            self.keep_time();
            self.act();
            self.feed_starved();
            self.serve_dirty();
            if self.is_over() {
                break;
            }
            let wait = self.time_to_wait();
            self.ring.submit_and_wait(wait).map_err(ring_error)?;
        }
        self.settle();
        tracing::info!(device = %self.device, "stopped");
        Ok(())
    }

    /// Lets what the device is still doing for itself (a checkpoint, zeroes ahead) end. Nothing depends on it.
    fn settle(&mut self) {
        self.control.stop();
        let end = self.now + LINGER;
        while self.ring.in_flight() > 0 && clock::now() < end {
            if self.ring.submit_and_wait(LINGER).is_err() {
                return;
            }
            while self.ring.completion().is_some() {}
        }
    }

    fn completed(&mut self, completion: Completion) {
        match completion {
            Completion::Disk(done) => self.host.handle(self.now, HostEvent::Disk(done)),
            Completion::Received(conn, bufs, result) => self.received(conn, bufs, result),
            Completion::Sent(conn, result) => self.sent(conn, result),
            Completion::Accepted(result) => self.accepted(result),
            Completion::Woken => self.ring.wait_for(&self.event),
        }
    }

    fn accepted(&mut self, result: io::Result<OwnedFd>) {
        self.accepting = false;
        if self.end_by.is_some() {
            return;
        }
        match result {
            Ok(socket) => {
                let conn = ConnId(self.next_conn);
                self.next_conn += 1;
                let socket = TcpStream::from(socket);
                let address = socket
                    .peer_addr()
                    .map_or_else(|_| "unknown".to_string(), |at| at.to_string());
                if let Err(error) = prepare(&socket) {
                    tracing::debug!(device = %self.device, %conn, %error, "can't set options of the socket");
                }
                tracing::debug!(device = %self.device, %conn, %address, "connected");
                self.meters.accepted();
                self.connections.insert(conn, Connection::new(socket.into(), address));
                self.dirty.insert(conn);
                self.host.handle(self.now, HostEvent::Connected { conn });
            }
            Err(error) => {
                tracing::warn!(device = %self.device, %error, "can't accept a connection; trying again soon");
                self.accept_at = Some(self.now + ACCEPT_PAUSE);
            }
        }
    }

    fn received(&mut self, conn: ConnId, bufs: ReceiveBufs, result: io::Result<usize>) {
        self.dirty.insert(conn);
        let connection = self
            .connections
            .get_mut(&conn)
            .expect("it goes when nothing is in flight");
        let count = *result.as_ref().unwrap_or(&0);
        connection.inbox.received(self.now, bufs, count);
        if connection.closing.is_some() {
            return;
        }
        if count == 0 {
            match result {
                Ok(_) => tracing::debug!(device = %self.device, %conn, "disconnected by the peer"),
                Err(error) => tracing::debug!(device = %self.device, %conn, %error, "disconnected"),
            }
            return self.broken(conn);
        }
        self.parse(conn);
    }

    /// Gives the host every frame that is complete.
    fn parse(&mut self, conn: ConnId) {
        loop {
            let Some(connection) = self.connections.get_mut(&conn) else {
                return;
            };
            if connection.closing.is_some() {
                return;
            }
            connection.starved = false;
            match connection.inbox.parse(self.now, &self.budget) {
                Parsed::Frame(envelope) => {
                    if let Some(peer) = connection.peer {
                        self.peer_frame(peer, envelope);
                        continue;
                    }
                    let is_hello = matches!(envelope.message, Message::Hello(_));
                    self.meters.received(&envelope);
                    self.host.handle(self.now, HostEvent::Frame { conn, envelope });
                    if is_hello {
                        // What may come after it depends on whether it was accepted.
                        self.act();
                    }
                }
                Parsed::Bad(error) => return self.bad_frame(conn, error),
                Parsed::More => return,
                Parsed::NoMemory => {
                    connection.starved = true;
                    return;
                }
            }
        }
    }

    fn bad_frame(&mut self, conn: ConnId, error: FrameError) {
        if self
            .connections
            .get(&conn)
            .is_some_and(|connection| connection.peer.is_some())
        {
            tracing::warn!(device = %self.device, %conn, %error, "another device sent what is no frame");
            return self.broken(conn);
        }
        self.host.handle(self.now, HostEvent::BadFrame { conn, error });
        // Before the next frame is looked for: nothing after it can be trusted.
        self.act();
    }

    fn sent(&mut self, conn: ConnId, result: io::Result<usize>) {
        self.dirty.insert(conn);
        let connection = self
            .connections
            .get_mut(&conn)
            .expect("it goes when nothing is in flight");
        let count = *result.as_ref().unwrap_or(&0);
        self.sending -= connection.outbox.sent(self.now, count);
        if let Err(error) = result {
            tracing::debug!(device = %self.device, %conn, %error, "can't send");
            self.sending -= connection.outbox.discard();
            if connection.closing.is_none() {
                self.broken(conn);
            }
            return;
        }
        self.eased(conn);
    }

    /// The connection does not stand any more.
    fn broken(&mut self, conn: ConnId) {
        let connection = self.connections.get_mut(&conn).expect("the caller has looked");
        connection.closing = Some(self.now);
        self.sending -= connection.outbox.discard();
        self.dirty.insert(conn);
        let event = match connection.peer {
            Some(peer) => {
                self.peers.remove(&peer);
                HostEvent::PeerEnded { peer }
            }
            None => HostEvent::Disconnected { conn },
        };
        self.host.handle(self.now, event);
    }

    fn hear_control(&mut self) {
        while let Some(message) = self.control.pop() {
            match message {
                Control::Drop(replicas) => self.host.handle(self.now, HostEvent::Drop { replicas }),
                Control::Reached(peer, result) => self.reached(peer, result),
                Control::Scrub => self.host.handle(self.now, HostEvent::Scrub),
                // Whoever asked may have given up meanwhile.
                Control::Status(reply) => drop(reply.send(self.host.status())),
                Control::Inventory(reply) => drop(reply.send(self.host.inventory())),
            }
        }
        if self.control.is_stopping() && self.end_by.is_none() {
            tracing::info!(device = %self.device, connections = self.connections.len(), "stopping");
            self.end_by = Some(self.now + DRAIN_TIMEOUT);
            // Ends the accept that is in flight.
            let _ = shutdown(&self.listener, Shutdown::Both);
        }
        let may_accept = self.accept_at.is_none_or(|at| at <= self.now);
        if self.end_by.is_none() && !self.accepting && may_accept {
            self.accept_at = None;
            self.accepting = true;
            self.ring.accept(&self.listener);
        }
    }

    fn keep_time(&mut self) {
        if self.host.poll_timeout().is_some_and(|at| at <= self.now) {
            self.host.handle_timeout(self.now);
        }
        if self.next_sweep > self.now {
            return;
        }
        self.next_sweep = self.now + SWEEP_INTERVAL;
        self.meters.status(&self.host.status(), &self.budget);
        self.meters.system_calls(self.ring.enters(), self.sends);
        let slow: Vec<_> = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.closing.is_none())
            .filter_map(|(conn, connection)| {
                if connection.outbox.is_stuck(self.now, &self.limits) {
                    Some((*conn, "it does not take its answers"))
                } else if connection.inbox.is_late(self.now, &self.limits) && !connection.congested {
                    Some((*conn, "a frame has begun and does not end"))
                } else {
                    None
                }
            })
            .collect();
        for (conn, why) in slow {
            let address = &self.connections[&conn].address;
            tracing::warn!(device = %self.device, %conn, %address, "closing the connection: {why}");
            self.meters.closed("slow");
            self.broken(conn);
        }
        // Those that linger are looked at again.
        let closing = self.connections.iter().filter(|(_, c)| c.closing.is_some());
        self.dirty.extend(closing.map(|(conn, _)| *conn));
    }

    /// Does what the host wants done.
    fn act(&mut self) {
        while let Some(action) = self.host.poll_action() {
            match action {
                HostAction::Disk(op) => self.ring.disk(&self.file, op),
                HostAction::Send { conn, envelope } => self.send(conn, envelope),
                HostAction::Close { conn, reason } => self.close(conn, &reason),
                HostAction::Reach { peer, address } => self.reach(peer, address),
                HostAction::SendPeer { peer, envelope } => self.send_peer(peer, &envelope),
                HostAction::ClosePeer { peer } => self.close_peer(peer),
            }
        }
    }

    fn send(&mut self, conn: ConnId, envelope: Envelope) {
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        self.meters.sent(&envelope);
        match &envelope.message {
            Message::Hello(_) => {
                connection.inbox.greeted();
                let peer = self.host.peer(conn);
                tracing::info!(device = %self.device, %conn, address = connection.address, ?peer, "peer");
            }
            Message::Sealed(sealed) => {
                let (volume, generation) = (sealed.holder.volume, sealed.holder.generation);
                tracing::info!(device = %self.device, %conn, %volume, %generation, "sealed");
            }
            Message::Failed(failed) if failed.kind == FailureKind::Unauthorized => {
                tracing::warn!(device = %self.device, %conn, address = connection.address, "refused: {failed}");
            }
            Message::Failed(failed) => tracing::debug!(device = %self.device, %conn, "refused: {failed}"),
            _ => {}
        }
        if envelope.flags.trace {
            let (message, trace) = (envelope.message.name(), envelope.trace_id);
            tracing::info!(device = %self.device, %conn, message, trace = format_args!("{trace:016x}"), "answered");
        }
        self.enqueue(conn, &envelope);
    }

    /// Queues a frame.
    pub(super) fn enqueue(&mut self, conn: ConnId, envelope: &Envelope) {
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        let frame = envelope.encode();
        self.sending += frame.len();
        connection.outbox.push(self.now, frame);
        let (waiting, limits) = (connection.outbox.bytes(), &self.limits);
        let too_much = waiting > limits.send_bytes_high
            || (self.sending > limits.send_bytes_total && waiting > limits.send_bytes_low);
        if !connection.congested && too_much {
            connection.congested = true;
            self.host.set_congested(conn, true);
        }
        self.dirty.insert(conn);
    }

    fn close(&mut self, conn: ConnId, reason: &CloseReason) {
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        tracing::info!(device = %self.device, %conn, address = connection.address, "closing the connection: {reason}");
        self.meters.closed(match reason {
            CloseReason::BadFrame(_) => "bad-frame",
            CloseReason::Refused(_) => "refused",
            CloseReason::NoHello(_) => "no-hello",
            CloseReason::Idle(_) => "idle",
            CloseReason::Unexpected(_) => "unexpected",
            CloseReason::Flood => "flood",
            CloseReason::TooMany(_) => "too-many",
        });
        connection.closing.get_or_insert(self.now + LINGER);
        self.dirty.insert(conn);
    }

    /// Connections whose frames wait for memory try again: some may have been given back.
    fn feed_starved(&mut self) {
        let starved: Vec<_> = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.starved)
            .map(|(conn, _)| *conn)
            .collect();
        for conn in starved {
            self.parse(conn);
            self.dirty.insert(conn);
        }
        self.act();
    }

    /// Sends, receives and closes what can be.
    fn serve_dirty(&mut self) {
        let stopping = self.end_by.is_some();
        for conn in std::mem::take(&mut self.dirty) {
            self.send_now(conn);
            let Some(connection) = self.connections.get_mut(&conn) else {
                continue;
            };
            if connection.shut {
                self.sending -= connection.outbox.discard();
            } else if let Some(pieces) = connection.outbox.next() {
                self.ring.send(conn, &connection.socket, pieces);
            }
            let done = connection.outbox.bytes() == 0 && connection.outbox.is_idle();
            match connection.closing {
                Some(until) if !connection.shut && (done || until <= self.now) => {
                    // Ends what is in flight.
                    let _ = shutdown(&connection.socket, Shutdown::Both);
                    connection.shut = true;
                }
                Some(_) => {}
                None if stopping => {}
                None => {
                    let waits = connection.congested || connection.starved;
                    if connection.inbox.is_idle() && !waits {
                        let bufs = connection.inbox.take_bufs();
                        self.ring.receive(conn, &connection.socket, bufs);
                    }
                }
            }
            if connection.shut && connection.inbox.is_idle() && connection.outbox.is_idle() {
                self.connections.remove(&conn);
            }
        }
    }

    /// Sends what the socket takes without waiting; the ring does the rest, and learns of errors. A send that ends in the ring at once
    /// would wake the thread for nothing but its completion.
    fn send_now(&mut self, conn: ConnId) {
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        if connection.shut {
            return;
        }
        let mut slices = [IoSlice::new(&[]); SEND_PIECES_NOW];
        let used = connection.outbox.slices(&mut slices);
        if used == 0 {
            return;
        }
        self.sends += 1;
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let mut no_extras = SendAncillaryBuffer::default();
        if let Ok(count) = sendmsg(&connection.socket, &slices[..used], &mut no_extras, flags) {
            self.sending -= connection.outbox.sent(self.now, count);
            self.eased(conn);
        }
    }

    /// Less waits to be sent than before.
    fn eased(&mut self, conn: ConnId) {
        let connection = self.connections.get_mut(&conn).expect("the caller has looked");
        if connection.congested && connection.outbox.bytes() < self.limits.send_bytes_low {
            connection.congested = false;
            self.host.set_congested(conn, false);
            // What it may do now is done in a turn to come, not after the next wait.
            self.dirty.insert(conn);
        }
    }

    /// Whether it was asked to end and has: first requests in flight and their answers, then the connections.
    fn is_over(&mut self) -> bool {
        let Some(end_by) = self.end_by else {
            return false;
        };
        if end_by <= self.now {
            tracing::warn!(device = %self.device, "stopping with requests in flight");
            return true;
        }
        let busy = self.host.status().requests > 0 || self.connections.values().any(|c| c.outbox.bytes() > 0);
        if busy {
            return false;
        }
        let open = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.closing.is_none());
        let open: Vec<ConnId> = open.map(|(conn, _)| *conn).collect();
        for conn in open {
            self.broken(conn);
        }
        self.act();
        self.serve_dirty();
        self.connections.is_empty() && !self.accepting
    }

    fn time_to_wait(&self) -> Duration {
        let sweep = (!self.connections.is_empty() || self.end_by.is_some()).then_some(self.next_sweep);
        let wake = [self.host.poll_timeout(), sweep, self.accept_at, self.end_by]
            .into_iter()
            .flatten()
            .min();
        match wake {
            _ if !self.dirty.is_empty() => Duration::ZERO,
            Some(at) => at.saturating_since(clock::now()).min(IDLE),
            None => IDLE,
        }
    }
}

/// Answers are small and waited for. A peer whose machine is gone is found out although it owes nothing.
pub(super) fn prepare(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(socket, KEEPALIVE_PROBES)?;
    sockopt::set_socket_keepalive(socket, true)?;
    Ok(())
}
