//! NBD connections.

use std::fmt;
use std::io;

use cairn_proto::time::Time;
use mio::Interest;

use super::Core;
use super::limits::{GUEST_BYTES_MAX, GUESTS_MAX, HANDSHAKE_IDLE, ROUNDS_MAX};
use super::meta::{Job, OpenError};
use super::socket::{Calls, ReadOutcome, Readiness, Stream};
use super::thread::{Asker, Driver, Phase, Source, token_of};
use super::volumes::User;
use crate::core::api::{MetaError, VolumeDescription};
use crate::nbd::{
    CloseReason, ExportInfo, Handshake, HandshakeAction, Input, Negotiated, Refusal, RequestToken, Transmission,
    TransmissionLimits,
};
use crate::outbox::Outbox;
use crate::volume::api::{VolumeError, VolumeReply};

/// Bytes read at once during a handshake.
const HANDSHAKE_READ_BYTES: usize = 4096;

enum Stage {
    Handshake(Box<Handshake>),
    Transmission(Box<Transmission>),
}

/// An NBD connection.
pub(super) struct Guest {
    pub(super) readiness: Readiness,
    /// Tells it from others that had its key before.
    pub(super) serial: u64,
    stream: Stream,
    stage: Stage,
    /// What the handshake has to say.
    outbox: Outbox,
    /// What the client was last told of; the one it goes on with.
    described: Option<VolumeDescription>,
    /// Its share of the bytes that all NBD connections hold.
    held: u64,
    /// Until when it must have spoken, during the handshake.
    deadline: Time,
    closing: Option<CloseReason>,
}

/// Why a connection is over.
enum Over {
    Closed(CloseReason),
    Lost(io::Error),
    Overdue,
    Shutdown,
    Full(OpenError),
}

impl fmt::Display for Over {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Over::Closed(reason) => reason.fmt(f),
            Over::Lost(error) => write!(f, "the connection was lost: {error}"),
            Over::Overdue => write!(f, "the client said nothing for {} s", HANDSHAKE_IDLE.as_secs()),
            Over::Shutdown => f.write_str("this server is shutting down"),
            Over::Full(error) => error.fmt(f),
        }
    }
}

impl From<io::Error> for Over {
    fn from(error: io::Error) -> Over {
        Over::Lost(error)
    }
}

impl Guest {
    pub(super) fn is_overdue(&self, now: Time) -> bool {
        matches!(self.stage, Stage::Handshake(_)) && now >= self.deadline
    }

    pub(super) fn complete(&mut self, token: RequestToken, result: Result<VolumeReply, VolumeError>) {
        let Stage::Transmission(transmission) = &mut self.stage else {
            panic!("a result for a connection in its handshake");
        };
        transmission.complete(token, result);
    }

    /// Writes what the socket takes. Gives whether something was written and nothing is left.
    fn flush(&mut self, calls: &mut Calls) -> io::Result<bool> {
        if !self.readiness.writable {
            return Ok(false);
        }
        let mut wrote = !self.outbox.is_empty();
        self.readiness.writable = self.stream.write_from(&mut self.outbox, calls)?;
        if let Stage::Transmission(transmission) = &mut self.stage
            && self.readiness.writable
        {
            wrote |= !transmission.outbox().is_empty();
            self.readiness.writable = self.stream.write_from(transmission.outbox(), calls)?;
        }
        Ok(wrote && self.readiness.writable)
    }

    /// Reads once. Gives whether there may be more; `None` when nothing may be read now.
    fn read(&mut self, now: Time, calls: &mut Calls) -> io::Result<Option<bool>> {
        if !self.readiness.readable {
            return Ok(None);
        }
        let outcome = match &mut self.stage {
            Stage::Handshake(handshake) => {
                if !handshake.wants_input() || self.closing.is_some() {
                    return Ok(None);
                }
                let mut buf = [0; HANDSHAKE_READ_BYTES];
                let outcome = self.stream.read_into(&mut buf, &mut [], calls)?;
                if let ReadOutcome::Bytes(count) | ReadOutcome::BytesThenNothing(count) = outcome {
                    handshake.receive(&buf[..count]);
                    self.deadline = now + HANDSHAKE_IDLE;
                }
                outcome
            }
            Stage::Transmission(transmission) => {
                let Some((payload, ahead)) = transmission.read_target() else {
                    return Ok(None);
                };
                let outcome = self.stream.read_into(payload, ahead, calls)?;
                if let ReadOutcome::Bytes(count) | ReadOutcome::BytesThenNothing(count) = outcome {
                    transmission.received(count);
                }
                outcome
            }
        };
        if outcome == ReadOutcome::End {
            self.closing.get_or_insert(CloseReason::Finished);
            if let Stage::Transmission(transmission) = &mut self.stage {
                transmission.close_input();
            }
        }
        Ok(Some(self.readiness.after_read(outcome)))
    }

    /// Whether reading would go on now.
    fn may_read(&mut self) -> bool {
        self.readiness.readable
            && match &mut self.stage {
                Stage::Handshake(handshake) => handshake.wants_input() && self.closing.is_none(),
                Stage::Transmission(transmission) => transmission.read_target().is_some(),
            }
    }
}

impl<C: Core> Driver<C> {
    pub(super) fn add_guest(&mut self, mut stream: Stream) {
        if self.guests >= GUESTS_MAX {
            tracing::warn!("an NBD connection is refused: there are {GUESTS_MAX} already");
            return;
        }
        let entry = self.sources.vacant_entry();
        let interests = Interest::READABLE | Interest::WRITABLE;
        if let Err(error) = self
            .poll
            .registry()
            .register(&mut stream, token_of(entry.key()), interests)
        {
            tracing::warn!(%error, "an NBD connection can't be watched");
            return;
        }
        self.serial += 1;
        let guest = Guest {
            readiness: Readiness::default(),
            serial: self.serial,
            stream,
            stage: Stage::Handshake(Box::default()),
            outbox: Outbox::default(),
            described: None,
            held: 0,
            deadline: self.now + HANDSHAKE_IDLE,
            closing: None,
        };
        entry.insert(Some(Source::Guest(Box::new(guest))));
        self.guests += 1;
    }

    /// Drives a connection that was taken out of the table, and puts it back or ends it.
    pub(super) fn with_guest(&mut self, key: usize, mut guest: Box<Guest>, may_read: bool) {
        let result = self.drive_guest(key, &mut guest, may_read);
        self.account(&mut guest);
        match result {
            Ok(()) => {
                if guest.may_read() && !std::mem::replace(&mut guest.readiness.queued, true) {
                    self.ready.push_back(key);
                }
                self.sources[key] = Some(Source::Guest(guest));
            }
            Err(over) => {
                let export = guest.described.as_ref().map_or("", |description| &description.name);
                match &over {
                    Over::Closed(CloseReason::Finished) | Over::Shutdown => {
                        tracing::debug!(export, "an NBD connection ended: {over}");
                    }
                    _ => tracing::warn!(export, "an NBD connection was closed: {over}"),
                }
                self.forget_guest(key, &guest);
            }
        }
    }

    /// Closes a connection without ado.
    pub(super) fn drop_guest(&mut self, key: usize) {
        if let Some(Source::Guest(guest)) = self.sources[key].take() {
            self.forget_guest(key, &guest);
        }
    }

    fn forget_guest(&mut self, key: usize, guest: &Guest) {
        self.sources.remove(key);
        self.guests -= 1;
        self.guest_bytes -= guest.held;
        self.starved.remove(&key);
        self.crowded.remove(&key);
        self.resumed.remove(&key);
        self.leave(User::Guest(key));
    }

    /// Keeps the sum of what all connections hold, and lets others go on when there is room again.
    fn account(&mut self, guest: &mut Guest) {
        let held = match &guest.stage {
            Stage::Transmission(transmission) => transmission.held_bytes(),
            Stage::Handshake(_) => 0,
        };
        self.guest_bytes = self.guest_bytes - guest.held + held;
        guest.held = held;
        if self.guest_bytes <= GUEST_BYTES_MAX {
            self.resumed.append(&mut self.starved);
        }
    }

    fn drive_guest(&mut self, key: usize, guest: &mut Guest, may_read: bool) -> Result<(), Over> {
        if guest.is_overdue(self.now) {
            return Err(Over::Overdue);
        }
        for round in 0..=ROUNDS_MAX {
            loop {
                match &guest.stage {
                    Stage::Handshake(_) => self.take_options(key, guest)?,
                    Stage::Transmission(_) => self.take_requests(key, guest),
                }
                // What was written makes room for more.
                if !guest.flush(&mut self.calls)? {
                    break;
                }
            }
            self.check_over(guest)?;
            if !may_read || round == ROUNDS_MAX || guest.read(self.now, &mut self.calls)?.is_none() {
                break;
            }
        }
        Ok(())
    }

    fn check_over(&self, guest: &mut Guest) -> Result<(), Over> {
        let shutdown = self.phase != Phase::Running;
        match &mut guest.stage {
            Stage::Transmission(transmission) => {
                if guest.outbox.is_empty() && transmission.is_finished() {
                    return Err(Over::Closed(guest.closing.take().unwrap_or(CloseReason::Finished)));
                }
                let idle = transmission.in_flight() == 0 && transmission.outbox().is_empty();
                if shutdown && idle { Err(Over::Shutdown) } else { Ok(()) }
            }
            Stage::Handshake(_) => match &guest.closing {
                // The last words are not worth waiting for when the socket does not take them.
                Some(reason) if guest.outbox.is_empty() || guest.readiness.closed => Err(Over::Closed(reason.clone())),
                _ if shutdown => Err(Over::Shutdown),
                _ => Ok(()),
            },
        }
    }

    fn take_options(&mut self, key: usize, guest: &mut Guest) -> Result<(), Over> {
        while let Stage::Handshake(handshake) = &mut guest.stage
            && guest.closing.is_none()
            && let Some(action) = handshake.poll_action()
        {
            match action {
                HandshakeAction::Send(bytes) => guest.outbox.push(bytes.into()),
                HandshakeAction::Close(reason) => guest.closing = Some(reason),
                HandshakeAction::ListExports => self.list_exports(key, guest),
                HandshakeAction::Describe(name) => self.describe_export(key, guest, name),
                HandshakeAction::Transmission(negotiated) => self.start_transmission(key, guest, negotiated)?,
            }
        }
        Ok(())
    }

    fn list_exports(&mut self, key: usize, guest: &mut Guest) {
        let serial = guest.serial;
        let asker = Asker::Guest {
            key,
            serial,
            name: String::new(),
        };
        let ticket = self.asks.insert(asker);
        if let Err(error) = self.ask(Job::Catalogue { ticket }) {
            self.asks.remove(ticket);
            let Stage::Handshake(handshake) = &mut guest.stage else {
                unreachable!("it asked for a list")
            };
            handshake.catalogue(Err(Refusal::Unavailable(error.to_string())));
        }
    }

    fn describe_export(&mut self, key: usize, guest: &mut Guest, name: String) {
        let name = match (&self.settings.default_export, name.is_empty()) {
            (Some(default), true) => default.clone(),
            _ => name,
        };
        let served = self.settings.only.as_ref().is_none_or(|only| only.contains(&name));
        if served && !name.is_empty() {
            let serial = guest.serial;
            return self.describe(
                Asker::Guest {
                    key,
                    serial,
                    name: name.clone(),
                },
                name,
            );
        }
        let Stage::Handshake(handshake) = &mut guest.stage else {
            unreachable!("it asked for a description")
        };
        handshake.description(Err(Refusal::Unknown));
    }

    fn handshaking(&mut self, key: usize, serial: u64) -> Option<&mut Guest> {
        match self.sources.get_mut(key)? {
            Some(Source::Guest(guest)) if guest.serial == serial => Some(guest),
            _ => None,
        }
    }

    pub(super) fn guest_catalogue(&mut self, key: usize, serial: u64, answer: Result<Vec<String>, MetaError>) {
        let only = self.settings.only.clone();
        let Some(guest) = self.handshaking(key, serial) else {
            return;
        };
        let Stage::Handshake(handshake) = &mut guest.stage else {
            return;
        };
        handshake.catalogue(match answer {
            Ok(mut names) => {
                names.retain(|name| only.as_ref().is_none_or(|only| only.contains(name)));
                Ok(names)
            }
            Err(error) => Err(Refusal::Unavailable(error.to_string())),
        });
        self.resumed.insert(key);
    }

    pub(super) fn guest_described(
        &mut self,
        key: usize,
        serial: u64,
        name: &str,
        answer: Result<VolumeDescription, OpenError>,
    ) {
        let answer = self.volumes.or_known(name, answer).and_then(|description| {
            let room = self.volumes.has_room(description.id);
            if room { Ok(description) } else { Err(OpenError::TooMany) }
        });
        let read_only = self.settings.read_only;
        let Some(guest) = self.handshaking(key, serial) else {
            return;
        };
        let Stage::Handshake(handshake) = &mut guest.stage else {
            return;
        };
        handshake.description(match answer {
            Ok(description) => {
                let size = description.size.0;
                guest.described = Some(description);
                Ok(ExportInfo { size, read_only })
            }
            Err(OpenError::NotFound(_)) => Err(Refusal::Unknown),
            Err(OpenError::Shutdown) => Err(Refusal::Shutdown),
            Err(error) => Err(Refusal::Unavailable(error.to_string())),
        });
        self.resumed.insert(key);
    }

    fn start_transmission(&mut self, key: usize, guest: &mut Guest, negotiated: Negotiated) -> Result<(), Over> {
        let description = guest
            .described
            .clone()
            .expect("an export is chosen after it was described");
        self.enter(User::Guest(key), &description).map_err(Over::Full)?;
        let stage = std::mem::replace(&mut guest.stage, Stage::Handshake(Box::default()));
        let Stage::Handshake(handshake) = stage else {
            unreachable!("a transmission starts once")
        };
        let rest = handshake.into_rest();
        tracing::debug!(
            export = description.name,
            structured = negotiated.structured,
            "an NBD connection started"
        );
        let transmission = Transmission::new(negotiated, &rest, TransmissionLimits::default());
        guest.stage = Stage::Transmission(Box::new(transmission));
        Ok(())
    }

    fn take_requests(&mut self, key: usize, guest: &mut Guest) {
        loop {
            if guest.held > 0 && self.guest_bytes > GUEST_BYTES_MAX {
                self.starved.insert(key);
                return;
            }
            let Stage::Transmission(transmission) = &mut guest.stage else {
                return;
            };
            if self.phase != Phase::Running {
                // Not an answer that hypervisors hand on to their guests as a broken disk: with the connection the request is
                // lost, and they make it again once there is somebody.
                return;
            }
            let Some(volume) = self.volumes.handle_of_user(User::Guest(key)) else {
                // It is being closed, and opened again then.
                return;
            };
            if !self.core.has_room(volume) {
                self.crowded.insert(key);
                return;
            }
            match transmission.next_input() {
                None => return,
                Some(Input::End(reason)) => guest.closing = Some(reason),
                Some(Input::Request { token, op }) => {
                    self.submit_for_guest(volume, op, (key, guest.serial), token);
                    self.account(guest);
                }
            }
        }
    }
}
