//! Connections: made for the devices that volumes use, greeted, watched while something is outstanding, made anew.

use cairn_proto::ids::{CommitSeq, DeviceId};
use cairn_proto::message::{Damaged, Envelope, Hello, Message, PeerLimits, Purpose, features};
use cairn_proto::replication::{self, RequestId};

use super::api::{Action, ConnId, VolumeHandle};
use super::device::Link;
use super::{ClientCore, Correlation};

impl ClientCore {
    /// Connects to every device whose time has come.
    pub(super) fn connect_due(&mut self) {
        let due: Vec<DeviceId> = {
            let now = self.now;
            let devices = self.devices.values();
            let due = devices.filter(|device| device.link == Link::Down && device.retry_at <= now);
            due.map(|device| device.id).collect()
        };
        for device in due {
            self.connect(device);
        }
    }

    fn connect(&mut self, id: DeviceId) {
        let device = self.devices.get_mut(&id).expect("the caller has it");
        if device.addresses.is_empty() {
            device.retry_at = device.backoff.next(self.now, &self.config.limits);
            return self.want_addresses(id);
        }
        let conn = ConnId(self.next_conn);
        self.next_conn += 1;
        device.link = Link::Connecting {
            conn,
            until: self.now + self.config.limits.connect_timeout,
        };
        self.conns.insert(conn, id);
        self.actions.push_back(Action::Connect {
            conn,
            device: id,
            purpose: Purpose::Guest,
            addresses: device.addresses.clone(),
        });
    }

    fn hello(&self, device: DeviceId) -> Hello {
        Hello {
            version_min: Hello::VERSION,
            version_max: Hello::VERSION,
            purpose: Purpose::Guest,
            features: features::NONE,
            cluster: self.config.cluster,
            device,
            recovered: CommitSeq(0),
            commit: CommitSeq(0),
            client: self.config.client,
            limits: PeerLimits::default(),
            capability: None,
        }
    }

    /// A connection stands: say who we are and whom we want.
    pub(super) fn greet(&mut self, conn: ConnId) {
        let Some(id) = self.conns.get(&conn).copied() else {
            return;
        };
        let hello = Message::Hello(self.hello(id));
        self.actions.push_back(Action::Send {
            to: vec![conn],
            envelope: Envelope::new(Correlation(0), hello),
        });
    }

    /// A frame came in.
    pub(super) fn frame(&mut self, conn: ConnId, envelope: Envelope) {
        let Some(id) = self.conns.get(&conn).copied() else {
            return;
        };
        match (self.devices[&id].link, &envelope.message) {
            (Link::Connecting { .. }, Message::Hello(theirs)) => self.greeted(id, conn, theirs),
            (Link::Connecting { .. }, Message::Failed(failed)) => {
                self.not_there(id, &format!("it refused the connection: {failed}"), true);
            }
            (Link::Up { .. }, Message::Damaged(damaged)) => self.damaged(id, damaged.clone()),
            (Link::Up { .. }, message) if !message.is_request() && !matches!(message, Message::Hello(_)) => {
                self.answer(id, envelope);
            }
            (_, message) => {
                let words = format!("it sent {} out of turn", message.name());
                self.drop_link(id, &words, true);
            }
        }
    }

    fn greeted(&mut self, id: DeviceId, conn: ConnId, theirs: &Hello) {
        let ours = self.hello(id);
        let device = self.devices.get_mut(&id).expect("the caller has it");
        if let Err(words) = device.greet(conn, &ours, theirs) {
            return self.not_there(id, &words, true);
        }
        for event in device.greetings() {
            self.tell_volumes(id, &event);
        }
    }

    /// An answer came in.
    fn answer(&mut self, id: DeviceId, envelope: Envelope) {
        let now = self.now;
        let device = self.devices.get_mut(&id).expect("the caller has it");
        let Some(request) = device.answered(now, envelope.correlation) else {
            return self.drop_link(id, "it answered what was not asked", true);
        };
        if let Some((handle, request)) = request.asker
            && let Some(volume) = self.volumes.get_mut(&handle)
            && let Some(coordinator) = volume.coordinator()
        {
            let event = replication::Event::Answer {
                device: id,
                request,
                grant: envelope.flags.grant,
                message: envelope.message,
            };
            coordinator.handle(now, event);
            self.touched.insert(handle);
        }
        self.send_queued(id);
    }

    /// A device tells an attachment what it can't read any more.
    fn damaged(&mut self, id: DeviceId, damaged: Damaged) {
        let now = self.now;
        for (handle, volume) in &mut self.volumes {
            if volume.description.id != damaged.holder.volume {
                continue;
            }
            let coordinator = volume.coordinator();
            if let Some(coordinator) = coordinator.filter(|c| c.generation() == damaged.holder.generation) {
                let event = replication::Event::Damaged {
                    device: id,
                    group: damaged.group,
                    runs: damaged.runs,
                };
                coordinator.handle(now, event);
                self.touched.insert(*handle);
                return;
            }
        }
    }

    /// Sends what waited for room.
    fn send_queued(&mut self, id: DeviceId) {
        let now = self.now;
        let device = self.devices.get_mut(&id).expect("the caller has it");
        let Link::Up { conn } = device.link else { return };
        while let Some(envelope) = device.next_queued(now) {
            self.actions.push_back(Action::Send {
                to: vec![conn],
                envelope,
            });
        }
    }

    /// Sends a request to each of these devices, at once where there is room.
    pub(super) fn send(&mut self, to: &[DeviceId], asker: (VolumeHandle, RequestId), envelope: Envelope) {
        let mut conns = Vec::with_capacity(to.len());
        for id in to {
            // A device that was lost since the request was made is reported lost to its coordinator too.
            let Some(device) = self.devices.get_mut(id) else {
                continue;
            };
            conns.extend(device.admit(self.now, Some(asker), &envelope));
        }
        if !conns.is_empty() {
            self.actions.push_back(Action::Send { to: conns, envelope });
        }
    }

    /// Tells every volume that uses a device.
    pub(super) fn tell_volumes(&mut self, id: DeviceId, event: &replication::Event) {
        let now = self.now;
        for (handle, volume) in &mut self.volumes {
            if !volume.devices.contains(&id) {
                continue;
            }
            if let Some(coordinator) = volume.coordinator() {
                coordinator.handle(now, event.clone());
                self.touched.insert(*handle);
            }
        }
    }

    /// The driver says that a connection is over.
    pub(super) fn conn_ended(&mut self, conn: ConnId, refused: bool) {
        let Some(id) = self.conns.get(&conn).copied() else {
            return;
        };
        if refused {
            self.not_there(id, "it can't be reached", false);
        } else {
            self.drop_link(id, "its connection is over", false);
        }
    }

    /// An attempt to connect has shown at once that the device is not there.
    fn not_there(&mut self, id: DeviceId, words: &str, close: bool) {
        self.drop_link(id, words, close);
        self.tell_volumes(id, &replication::Event::Unreachable { device: id });
    }

    /// Gives a connection up. It is made anew after a pause, at the address that meta knows then.
    fn drop_link(&mut self, id: DeviceId, words: &str, close: bool) {
        let device = self.devices.get_mut(&id).expect("the caller has it");
        let was_up = device.is_up();
        let Some(conn) = device.conn() else { return };
        let retry_at = device.backoff.next(self.now, &self.config.limits);
        device.reset(retry_at);
        if device.told.as_deref() != Some(words) {
            // Said once, not at every attempt.
            device.told = Some(words.to_string());
            self.actions.push_back(Action::DeviceNotice {
                device: id,
                words: words.to_string(),
            });
        }
        self.conns.remove(&conn);
        if close {
            self.actions.push_back(Action::Disconnect { conn });
        }
        if was_up {
            self.tell_volumes(id, &replication::Event::Disconnected { device: id });
        }
        self.want_addresses(id);
    }

    /// A device may have moved: ask meta, not too often.
    fn want_addresses(&mut self, id: DeviceId) {
        for (handle, volume) in &mut self.volumes {
            if volume.devices.contains(&id) {
                volume.refresh_wanted = true;
                // It has a time for that now.
                self.touched.insert(*handle);
            }
        }
    }

    /// What a device's connection waits for may be due.
    pub(super) fn device_timeout(&mut self, id: DeviceId) {
        let now = self.now;
        let limits = self.config.limits;
        let device = self.devices.get_mut(&id).expect("the caller has it");
        match device.link {
            Link::Down if device.retry_at <= now => self.connect(id),
            Link::Connecting { until, .. } if until <= now => {
                self.drop_link(id, "it did not answer in time", true);
            }
            Link::Up { .. } if device.is_silent(now, &limits) => {
                self.drop_link(id, "it is silent", true);
            }
            Link::Up { .. } => {
                let correlation = self.correlation();
                let device = self.devices.get_mut(&id).expect("the caller has it");
                if let Some((conn, envelope)) = device.ping(now, &limits, correlation) {
                    self.actions.push_back(Action::Send {
                        to: vec![conn],
                        envelope,
                    });
                }
            }
            Link::Down | Link::Connecting { .. } => {}
        }
    }

    /// A volume uses its devices no more: connections that nobody else uses are closed.
    pub(super) fn leave_devices(&mut self, handle: VolumeHandle) {
        let volume = self.volumes.get_mut(&handle).expect("the caller has it");
        volume.refresh_wanted = false;
        let left = std::mem::take(&mut volume.devices);
        for id in left {
            if self.volumes.values().any(|volume| volume.devices.contains(&id)) {
                continue;
            }
            let Some(device) = self.devices.remove(&id) else {
                continue;
            };
            if let Some(conn) = device.conn() {
                self.conns.remove(&conn);
                self.actions.push_back(Action::Disconnect { conn });
            }
        }
    }
}
