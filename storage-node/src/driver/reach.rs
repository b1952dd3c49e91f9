//! Connections to other devices: looked up and made by a short-lived thread each, then served by the ring as others are.

use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use cairn_proto::message::{Envelope, Message};

use super::connection::Connection;
use super::control::{Control, ControlQueue};
use super::limits::{LINGER, REACH_ADDRESSES_MAX, REACH_THREADS_MAX, REACH_TIMEOUT};
use super::serve::{Serving, prepare};
use crate::host::{ConnId, HostEvent, PeerId};

impl Serving {
    /// Connects to another device.
    pub(super) fn reach(&mut self, peer: PeerId, address: String) {
        let queue = self.control.clone();
        let spawned = if self.reach_threads < REACH_THREADS_MAX {
            let named = std::thread::Builder::new().name("cairn-reach".to_string());
            named.spawn(move || run(peer, &address, &queue))
        } else {
            Err(io::Error::other("too many attempts are under way"))
        };
        match spawned {
            Ok(_) => {
                self.reach_threads += 1;
                self.reaching.insert(peer);
            }
            Err(error) => {
                tracing::warn!(device = %self.device, ?peer, %error, "can't connect to another device");
                self.host.handle(self.now, HostEvent::PeerEnded { peer });
            }
        }
    }

    /// A thread has connected, or could not.
    pub(super) fn reached(&mut self, peer: PeerId, result: io::Result<TcpStream>) {
        self.reach_threads -= 1;
        if !self.reaching.remove(&peer) || self.end_by.is_some() {
            return;
        }
        match result.and_then(|socket| prepare(&socket).map(|()| socket)) {
            Ok(socket) => {
                let conn = ConnId(self.next_conn);
                self.next_conn += 1;
                let address = socket
                    .peer_addr()
                    .map_or_else(|_| "unknown".to_string(), |at| at.to_string());
                tracing::debug!(device = %self.device, %conn, %address, "connected to another device");
                let mut connection = Connection::new(socket.into(), address);
                connection.peer = Some(peer);
                // It was chosen by a holder, and may send whatever a device answers with.
                connection.inbox.greeted();
                self.connections.insert(conn, connection);
                self.peers.insert(peer, conn);
                self.dirty.insert(conn);
                self.host.handle(self.now, HostEvent::PeerConnected { peer });
            }
            Err(error) => {
                tracing::debug!(device = %self.device, ?peer, %error, "can't connect to another device");
                self.host.handle(self.now, HostEvent::PeerEnded { peer });
            }
        }
    }

    pub(super) fn send_peer(&mut self, peer: PeerId, envelope: &Envelope) {
        if let Some(conn) = self.peers.get(&peer).copied() {
            self.enqueue(conn, envelope);
        }
    }

    /// The host has no use for a connection any more.
    pub(super) fn close_peer(&mut self, peer: PeerId) {
        self.reaching.remove(&peer);
        if let Some(connection) = self
            .peers
            .remove(&peer)
            .map(|conn| (conn, self.connections.get_mut(&conn)))
            && let (conn, Some(connection)) = connection
        {
            tracing::debug!(device = %self.device, %conn, address = connection.address, "closing the connection to another device");
            connection.closing.get_or_insert(self.now + LINGER);
            self.dirty.insert(conn);
        }
    }

    /// A frame came in from another device.
    pub(super) fn peer_frame(&mut self, peer: PeerId, envelope: Envelope) {
        if let Message::ReadAnswer(answer) = &envelope.message {
            self.meters
                .fetched(answer.bytes.iter().map(|bytes| bytes.len() as u64).sum());
        }
        self.host.handle(self.now, HostEvent::PeerFrame { peer, envelope });
    }
}

fn run(peer: PeerId, address: &str, queue: &Arc<ControlQueue>) {
    let result = connect(address, REACH_TIMEOUT);
    queue.push_always(Control::Reached(peer, result));
}

fn connect(address: &str, timeout: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the address names nothing");
    for address in address.to_socket_addrs()?.take(REACH_ADDRESSES_MAX) {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(last)
}
