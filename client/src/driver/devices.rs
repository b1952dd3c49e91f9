//! Connections to devices.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;

use cairn_proto::frame::FrameError;
use cairn_proto::ids::{Correlation, DeviceId};
use cairn_proto::message::Envelope;
use cairn_proto::time::Time;
use mio::Interest;
use mio::net::TcpStream;

use super::Core;
use super::frames::FrameReader;
use super::limits::{
    ADDRESS_TIMEOUT, ADDRESSES_MAX, DEVICE_OUTBOX_BYTES_MAX, LOST_LATELY, LOST_MAX, RECONNECT_JITTER_MAX, ROUNDS_MAX,
};
use super::meta::Job;
use super::socket::{ReadOutcome, Readiness, Stream};
use super::thread::{Driver, Source, token_of};
use crate::core::api::{ConnId, Event};
use crate::outbox::Outbox;

enum Stage {
    /// Its addresses are names that are being looked up.
    Resolving,
    /// It was lost a moment ago; so that not all clients of a node that comes back do so at the same instant.
    Holding {
        addresses: VecDeque<SocketAddr>,
        until: Time,
    },
    /// One address is tried, the rest come after it.
    Connecting {
        stream: TcpStream,
        rest: VecDeque<SocketAddr>,
        deadline: Time,
    },
    Up {
        stream: Stream,
        reader: FrameReader,
    },
}

/// A connection to a device, or an attempt to make one.
pub(super) struct Device {
    pub(super) readiness: Readiness,
    conn: ConnId,
    id: DeviceId,
    stage: Stage,
    outbox: Outbox,
    /// A request whose round trip is being measured: one at a time, so that measuring costs next to nothing.
    measured: Option<(Correlation, Time)>,
}

/// Why a connection is over.
#[derive(Debug)]
enum Over {
    Closed,
    Lost(io::Error),
    Frame(FrameError),
    /// It takes nothing.
    Stuck(u64),
}

impl std::fmt::Display for Over {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Over::Closed => f.write_str("the node closed it"),
            Over::Lost(error) => error.fmt(f),
            Over::Frame(error) => error.fmt(f),
            Over::Stuck(bytes) => write!(f, "{bytes} bytes wait to be sent, more than any device may ask for"),
        }
    }
}

impl Device {
    /// Until when the attempt is put off, if it is.
    pub(super) fn held_until(&self) -> Option<Time> {
        match self.stage {
            Stage::Holding { until, .. } => Some(until),
            _ => None,
        }
    }

    pub(super) fn is_overdue(&self, now: Time) -> bool {
        match &self.stage {
            Stage::Connecting { deadline: at, .. } | Stage::Holding { until: at, .. } => now >= *at,
            Stage::Resolving | Stage::Up { .. } => false,
        }
    }
}

impl<C: Core> Driver<C> {
    pub(super) fn connect(&mut self, conn: ConnId, id: DeviceId, addresses: Vec<String>) {
        let device = Device {
            readiness: Readiness::default(),
            conn,
            id,
            stage: Stage::Resolving,
            outbox: Outbox::default(),
            measured: None,
        };
        let key = self.sources.insert(None);
        self.by_conn.insert(conn, key);
        let literal: Option<Vec<SocketAddr>> = addresses
            .iter()
            .take(ADDRESSES_MAX)
            .map(|address| address.parse().ok())
            .collect();
        match literal {
            Some(addresses) => self.begin(key, Box::new(device), addresses.into()),
            None => {
                self.sources[key] = Some(Source::Device(Box::new(device)));
                if self.ask(Job::Resolve { conn, addresses }).is_err() {
                    self.device_gone(key, conn, true);
                }
            }
        }
    }

    pub(super) fn resolved(&mut self, conn: ConnId, addresses: Vec<SocketAddr>) {
        let Some(&key) = self.by_conn.get(&conn) else { return };
        if let Some(Source::Device(device)) = self.sources[key].take() {
            self.begin(key, device, addresses.into());
        }
    }

    /// Connects at once, or a moment later to a device that was lost lately.
    fn begin(&mut self, key: usize, mut device: Box<Device>, addresses: VecDeque<SocketAddr>) {
        let lost_lately = self.lost.get(&device.id).is_some_and(|at| self.now < *at + LOST_LATELY);
        if !lost_lately {
            return self.try_addresses(key, device, addresses);
        }
        let until = self.now + self.jitter.up_to(RECONNECT_JITTER_MAX);
        self.next_check = self.next_check.min(until);
        device.stage = Stage::Holding { addresses, until };
        self.sources[key] = Some(Source::Device(device));
    }

    /// Tries the first address that does not fail at once.
    fn try_addresses(&mut self, key: usize, mut device: Box<Device>, mut rest: VecDeque<SocketAddr>) {
        while let Some(address) = rest.pop_front() {
            let interests = Interest::READABLE | Interest::WRITABLE;
            let stream = TcpStream::connect(address).and_then(|mut stream| {
                stream.set_nodelay(true)?;
                self.poll.registry().register(&mut stream, token_of(key), interests)?;
                Ok(stream)
            });
            match stream {
                Ok(stream) => {
                    let deadline = self.now + ADDRESS_TIMEOUT;
                    device.readiness = Readiness {
                        queued: device.readiness.queued,
                        ..Readiness::default()
                    };
                    device.stage = Stage::Connecting { stream, rest, deadline };
                    self.sources[key] = Some(Source::Device(device));
                    return;
                }
                Err(error) => tracing::debug!(device = %device.id, %address, %error, "can't connect"),
            }
        }
        self.device_gone(key, device.conn, true);
    }

    /// The address that is being tried does not answer, or it is time to try the first.
    pub(super) fn try_next_address(&mut self, key: usize, mut device: Box<Device>) {
        match std::mem::replace(&mut device.stage, Stage::Resolving) {
            Stage::Connecting { rest, .. } => self.try_addresses(key, device, rest),
            Stage::Holding { addresses, .. } => self.try_addresses(key, device, addresses),
            Stage::Resolving | Stage::Up { .. } => panic!("no address of {} is being tried", device.id),
        }
    }

    /// Drives a connection that was taken out of the table, and puts it back or ends it.
    pub(super) fn with_device(&mut self, key: usize, mut device: Box<Device>) {
        if let Stage::Connecting { stream, .. } = &device.stage {
            if !device.readiness.writable {
                self.sources[key] = Some(Source::Device(device));
                return;
            }
            match connected(stream) {
                Ok(true) => self.device_up(&mut device),
                Ok(false) => {
                    device.readiness.writable = false;
                    self.sources[key] = Some(Source::Device(device));
                    return;
                }
                Err(error) => {
                    tracing::debug!(device = %device.id, %error, "can't connect");
                    return self.try_next_address(key, device);
                }
            }
        }
        let result = self.receive(&mut device);
        self.put_back(key, device, result);
    }

    fn device_up(&mut self, device: &mut Device) {
        let stage = std::mem::replace(&mut device.stage, Stage::Resolving);
        let Stage::Connecting { stream, .. } = stage else {
            unreachable!("it was being connected")
        };
        let (stream, reader) = (Stream::Tcp(stream), FrameReader::new());
        device.stage = Stage::Up { stream, reader };
        self.core.handle(self.now, Event::Connected { conn: device.conn });
    }

    fn receive(&mut self, device: &mut Device) -> Result<(), Over> {
        for _ in 0..ROUNDS_MAX {
            let Stage::Up { stream, reader } = &mut device.stage else {
                return Ok(());
            };
            if !device.readiness.readable {
                return Ok(());
            }
            let (data, ahead) = reader.read_target();
            let outcome = stream.read_into(data, ahead, &mut self.calls).map_err(Over::Lost)?;
            device.readiness.after_read(outcome);
            match outcome {
                ReadOutcome::End => return Err(Over::Closed),
                ReadOutcome::Nothing => return Ok(()),
                ReadOutcome::Bytes(count) | ReadOutcome::BytesThenNothing(count) => {
                    reader.received(count);
                    self.metrics.device_received_bytes.increment(count as u64);
                }
            }
            while let Some(envelope) = reader.next_frame().map_err(Over::Frame)? {
                self.metrics.answer(&envelope.message);
                if let Some((_, since)) = device.measured.take_if(|(sent, _)| *sent == envelope.correlation) {
                    self.metrics.round_trip(self.now.saturating_since(since));
                }
                self.core.handle(
                    self.now,
                    Event::Frame {
                        conn: device.conn,
                        envelope,
                    },
                );
            }
        }
        Ok(())
    }

    /// Queues one encoding for all of them.
    pub(super) fn send(&mut self, to: &[ConnId], envelope: &Envelope) {
        let frame = envelope.encode();
        for conn in to {
            let Some(&key) = self.by_conn.get(conn) else { continue };
            let Some(Some(Source::Device(device))) = self.sources.get_mut(key) else {
                continue;
            };
            if device.measured.is_none() && envelope.message.is_request() {
                device.measured = Some((envelope.correlation, self.now));
            }
            self.metrics.sent(&envelope.message);
            device.outbox.push(frame.head.clone());
            frame.data.iter().for_each(|piece| device.outbox.push(piece.clone()));
            self.unsent.insert(key);
        }
    }

    pub(super) fn flush_device(&mut self, key: usize, mut device: Box<Device>) {
        let result = self.transmit(&mut device);
        self.put_back(key, device, result);
    }

    fn transmit(&mut self, device: &mut Device) -> Result<(), Over> {
        let Stage::Up { stream, .. } = &mut device.stage else {
            return Ok(());
        };
        if device.readiness.writable {
            let before = device.outbox.bytes();
            let took = stream.write_from(&mut device.outbox, &mut self.calls);
            device.readiness.writable = took.map_err(Over::Lost)?;
            self.metrics.device_sent_bytes.increment(before - device.outbox.bytes());
        }
        match device.outbox.bytes() {
            bytes if bytes > DEVICE_OUTBOX_BYTES_MAX => Err(Over::Stuck(bytes)),
            _ => Ok(()),
        }
    }

    fn put_back(&mut self, key: usize, mut device: Box<Device>, result: Result<(), Over>) {
        if let Err(over) = result {
            tracing::info!(device = %device.id, "the connection to a device ended: {over}");
            if self.lost.len() >= LOST_MAX {
                self.lost.clear();
            }
            self.lost.insert(device.id, self.now);
            return self.device_gone(key, device.conn, false);
        }
        if device.readiness.writable && !device.outbox.is_empty() {
            self.unsent.insert(key);
        }
        if device.readiness.readable && !std::mem::replace(&mut device.readiness.queued, true) {
            self.ready.push_back(key);
        }
        self.sources[key] = Some(Source::Device(device));
    }

    /// The core wants it closed.
    pub(super) fn disconnect(&mut self, conn: ConnId) {
        if let Some(key) = self.by_conn.remove(&conn) {
            self.sources.remove(key);
            self.unsent.remove(&key);
        }
    }

    fn device_gone(&mut self, key: usize, conn: ConnId, refused: bool) {
        self.sources.remove(key);
        self.by_conn.remove(&conn);
        self.unsent.remove(&key);
        if refused {
            self.metrics.device_refused.increment(1);
        }
        self.core.handle(self.now, Event::Disconnected { conn, refused });
    }
}

/// Whether an attempt has come to a good end; an error if to a bad one.
fn connected(stream: &TcpStream) -> io::Result<bool> {
    if let Some(error) = stream.take_error()? {
        return Err(error);
    }
    match stream.peer_addr() {
        // A port nobody listens on may be given to the very socket that asks for it.
        Ok(peer) if stream.local_addr()? == peer => Err(io::ErrorKind::ConnectionRefused.into()),
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(false),
        Err(error) => Err(error),
    }
}
