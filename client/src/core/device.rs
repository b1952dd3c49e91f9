//! One device: its guest connection, which all volumes share, and what is on its way there.

use std::collections::VecDeque;

use cairn_proto::collections::Map;
use cairn_proto::frame::Class;
use cairn_proto::ids::{CommitSeq, Correlation, DeviceId};
use cairn_proto::message::{Envelope, Hello, Message, PeerLimits, WriteData, features};
use cairn_proto::replication::{self, RequestId};
use cairn_proto::time::Time;

use super::api::{ConnId, VolumeHandle};
use super::backoff::Backoff;
use super::limits::CoreLimits;

/// How far the connection is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Link {
    /// None; the next attempt is at `Device::retry_at`.
    Down,
    /// Asked for, or standing and waiting for the device's hello.
    Connecting { conn: ConnId, until: Time },
    /// Both hellos were exchanged.
    Up { conn: ConnId },
}

/// A request on its way.
#[derive(Clone, Copy, Debug)]
pub(super) struct InFlight {
    /// Whose, and what its coordinator calls it; `None` for a ping.
    pub(super) asker: Option<(VolumeHandle, RequestId)>,
    bytes: u64,
}

/// A device that some volume uses.
pub(super) struct Device {
    pub(super) id: DeviceId,
    pub(super) addresses: Vec<String>,
    pub(super) link: Link,
    /// When to connect next, while the link is down.
    pub(super) retry_at: Time,
    pub(super) backoff: Backoff,
    /// What its hello said.
    pub(super) commit: CommitSeq,
    pub(super) recovered: CommitSeq,
    features: u64,
    limits: PeerLimits,
    in_flight: Map<Correlation, InFlight>,
    bytes_in_flight: u64,
    /// Requests that the device's limits do not let through yet. Bounded by what coordinators may have outstanding.
    queue: VecDeque<(Option<(VolumeHandle, RequestId)>, Envelope)>,
    /// Since when something is outstanding and nothing has come in.
    waiting_since: Option<Time>,
    /// Whether a ping was due in this silence already.
    pinged: bool,
    /// What logs were told last about it.
    pub(super) told: Option<String>,
}

impl Device {
    pub(super) fn new(id: DeviceId, now: Time) -> Device {
        Device {
            id,
            addresses: Vec::new(),
            link: Link::Down,
            retry_at: now,
            backoff: Backoff::default(),
            commit: CommitSeq(0),
            recovered: CommitSeq(0),
            features: features::NONE,
            limits: PeerLimits::default(),
            in_flight: Map::default(),
            bytes_in_flight: 0,
            queue: VecDeque::new(),
            waiting_since: None,
            pinged: false,
            told: None,
        }
    }

    pub(super) fn conn(&self) -> Option<ConnId> {
        match self.link {
            Link::Down => None,
            Link::Connecting { conn, .. } | Link::Up { conn } => Some(conn),
        }
    }

    pub(super) fn is_up(&self) -> bool {
        matches!(self.link, Link::Up { .. })
    }

    /// Checks the device's hello against ours. Errors: what a person should know.
    pub(super) fn greet(&mut self, conn: ConnId, ours: &Hello, theirs: &Hello) -> Result<(), String> {
        if theirs.cluster != ours.cluster {
            return Err(format!(
                "it belongs to cluster {}, this client to {}: check the addresses",
                theirs.cluster, ours.cluster
            ));
        }
        if theirs.device != self.id {
            return Err(format!("at its address {} answered instead", theirs.device));
        }
        if ours.common_version(theirs).is_none() {
            return Err(format!(
                "it speaks versions {} to {}, this client {} to {}: upgrade the older one",
                theirs.version_min, theirs.version_max, ours.version_min, ours.version_max
            ));
        }
        let least = PeerLimits::default();
        let limits = theirs.limits;
        if limits.control_bytes < least.control_bytes
            || limits.data_bytes < least.data_bytes
            || limits.request_bytes_in_flight < u64::from(least.data_bytes)
            || limits.requests_in_flight == 0
        {
            return Err("it takes shorter messages than version 1 has".to_string());
        }
        self.limits = limits;
        (self.commit, self.recovered) = (theirs.commit, theirs.recovered);
        self.features = theirs.features;
        self.link = Link::Up { conn };
        self.backoff.reset();
        self.told = None;
        Ok(())
    }

    /// What coordinators are told when its connection stands.
    pub(super) fn greetings(&self) -> [replication::Event; 2] {
        let connected = replication::Event::Connected {
            device: self.id,
            commit: self.commit,
            recovered: self.recovered,
        };
        [connected, self.located()]
    }

    /// Where other devices reach it, and whether it reads from others.
    pub(super) fn located(&self) -> replication::Event {
        replication::Event::Located {
            device: self.id,
            address: self.addresses.first().cloned().unwrap_or_default(),
            can_fetch: self.features & features::FETCH != 0,
        }
    }

    /// Forgets everything about the connection.
    pub(super) fn reset(&mut self, retry_at: Time) {
        self.link = Link::Down;
        self.retry_at = retry_at;
        self.in_flight.clear();
        self.queue.clear();
        self.bytes_in_flight = 0;
        self.waiting_since = None;
        self.pinged = false;
    }

    /// Takes a request. `Some` if it may be sent at once, on this connection; otherwise it waits here.
    pub(super) fn admit(
        &mut self,
        now: Time,
        asker: Option<(VolumeHandle, RequestId)>,
        envelope: &Envelope,
    ) -> Option<ConnId> {
        let Link::Up { conn } = self.link else { return None };
        if self.queue.is_empty() && self.has_room(data_bytes(&envelope.message)) {
            self.note(now, asker, envelope);
            return Some(conn);
        }
        self.queue.push_back((asker, envelope.clone()));
        None
    }

    /// The next request that may be sent now.
    pub(super) fn next_queued(&mut self, now: Time) -> Option<Envelope> {
        let (_, envelope) = self.queue.front()?;
        if !self.has_room(data_bytes(&envelope.message)) {
            return None;
        }
        let (asker, envelope) = self.queue.pop_front()?;
        self.note(now, asker, &envelope);
        Some(envelope)
    }

    fn has_room(&self, bytes: u64) -> bool {
        self.in_flight.len() < self.limits.requests_in_flight as usize
            && self.bytes_in_flight + bytes <= self.limits.request_bytes_in_flight
    }

    fn note(&mut self, now: Time, asker: Option<(VolumeHandle, RequestId)>, envelope: &Envelope) {
        let bytes = data_bytes(&envelope.message);
        let before = self.in_flight.insert(envelope.correlation, InFlight { asker, bytes });
        assert!(before.is_none(), "correlation {} is used twice", envelope.correlation);
        self.bytes_in_flight += bytes;
        self.waiting_since.get_or_insert(now);
    }

    /// An answer came. `None` if nothing was asked under its number.
    pub(super) fn answered(&mut self, now: Time, correlation: Correlation) -> Option<InFlight> {
        let request = self.in_flight.remove(&correlation)?;
        self.bytes_in_flight -= request.bytes;
        self.pinged = false;
        self.waiting_since = (!self.in_flight.is_empty()).then_some(now);
        Some(request)
    }

    /// When a ping, or the end of the connection, is due.
    pub(super) fn silence_timeout(&self, limits: &CoreLimits) -> Option<Time> {
        let since = self.waiting_since?;
        let span = if self.pinged {
            limits.silence_timeout
        } else {
            limits.ping_interval.min(limits.silence_timeout)
        };
        Some(since + span)
    }

    /// Whether it was silent for too long.
    pub(super) fn is_silent(&self, now: Time, limits: &CoreLimits) -> bool {
        self.waiting_since
            .is_some_and(|since| since + limits.silence_timeout <= now)
    }

    /// A ping, if one is due.
    pub(super) fn ping(
        &mut self,
        now: Time,
        limits: &CoreLimits,
        correlation: Correlation,
    ) -> Option<(ConnId, Envelope)> {
        let Link::Up { conn } = self.link else { return None };
        let due = self
            .waiting_since
            .is_some_and(|since| since + limits.ping_interval <= now);
        if !due || self.pinged {
            return None;
        }
        self.pinged = true;
        if self.in_flight.len() >= self.limits.requests_in_flight as usize {
            // There is no room for it; so much else is unanswered that it is not needed either.
            return None;
        }
        let envelope = Envelope::new(correlation, Message::Ping(Default::default()));
        self.note(now, None, &envelope);
        Some((conn, envelope))
    }

    /// Requests on their way and waiting.
    pub(super) fn load(&self) -> (usize, usize) {
        (self.in_flight.len(), self.queue.len())
    }
}

/// Bytes of data that a message carries.
fn data_bytes(message: &Message) -> u64 {
    match message {
        Message::Write(write) => match &write.data {
            WriteData::Data { bytes, .. } => bytes.len() as u64,
            WriteData::Zero | WriteData::Discard => 0,
        },
        Message::Copy(copy) => copy.bytes.len() as u64,
        _ => 0,
    }
}

/// A message of a class.
pub(super) fn envelope(correlation: Correlation, class: Class, message: Message) -> Envelope {
    Envelope {
        class,
        ..Envelope::new(correlation, message)
    }
}
