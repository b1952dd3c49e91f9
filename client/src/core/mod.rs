//! The client's core: volumes, their attachments and the connections to devices, without I/O.
//!
//! Reading order: [`api`] (the seam to the driver), this file (where events go), `attachment` (what is asked of meta),
//! `link` (connections), `pace` (of copies), `timers`, `volume` and `device` (state).

pub mod api;
mod attachment;
mod backoff;
mod device;
pub mod limits;
mod link;
pub mod pace;
mod report;
mod timers;
mod volume;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use cairn_proto::frame::Class;
use cairn_proto::ids::{Correlation, DeviceId};
use cairn_proto::replication::{self, OpToken, Operation};
use cairn_proto::time::Time;

use self::api::{Action, ConnId, CoreConfig, Event, MetaRequestId, Notice, VolumeHandle, VolumeStatus};
use self::device::{Device, Link, envelope};
use self::pace::Pacing;
use self::timers::Timers;
use self::volume::{Phase, Volume};
use crate::volume::Output;
use crate::volume::api::{OpId, VolumeError, VolumeOp};

/// The state machine of a client process: every volume that it serves, over one guest connection per device.
pub struct ClientCore {
    config: CoreConfig,
    now: Time,
    volumes: BTreeMap<VolumeHandle, Volume>,
    devices: BTreeMap<DeviceId, Device>,
    conns: BTreeMap<ConnId, DeviceId>,
    next_conn: u64,
    next_meta_request: u64,
    next_correlation: u64,
    /// Volumes that may have something to do.
    touched: BTreeSet<VolumeHandle>,
    /// When each volume wants to be told of the passing of time.
    timers: Timers,
    actions: VecDeque<Action>,
    pacing: Pacing,
}

impl ClientCore {
    /// A client without volumes.
    pub fn new(config: CoreConfig) -> ClientCore {
        ClientCore {
            pacing: Pacing::new(config.limits.pace),
            config,
            now: Time::ZERO,
            volumes: BTreeMap::new(),
            devices: BTreeMap::new(),
            conns: BTreeMap::new(),
            next_conn: 1,
            next_meta_request: 1,
            next_correlation: 1,
            touched: BTreeSet::new(),
            timers: Timers::default(),
            actions: VecDeque::new(),
        }
    }

    /// Takes an event.
    pub fn handle(&mut self, now: Time, event: Event) {
        self.advance(now);
        // What I/O changes of a volume's times it changes of one that it touches. Everything else is rare enough to look at all.
        let is_io = matches!(event, Event::Frame { .. } | Event::Submit { .. });
        match event {
            Event::Connected { conn } => self.greet(conn),
            Event::Disconnected { conn, refused } => self.conn_ended(conn, refused),
            Event::Frame { conn, envelope } => self.frame(conn, envelope),
            Event::OpenVolume { volume, description } => {
                let opened = Volume::new(description, &self.config.limits);
                let before = self.volumes.insert(volume, opened);
                assert!(before.is_none(), "{volume:?} is open already");
            }
            Event::CareForVolume { volume, description } => self.care_for(volume, description),
            Event::Advice(advice) => self.advised(&advice),
            Event::CloseVolume { volume } => self.close(volume),
            Event::Grown { volume, size } => {
                if let Some(volume) = self.volumes.get_mut(&volume) {
                    volume.layer.grow(size.0);
                }
            }
            Event::Submit { volume, op, request } => self.submit(volume, op, request),
            Event::Meta(answer) => self.meta_answered(answer),
        }
        self.settle();
        if !is_io {
            self.set_all_timers();
        }
    }

    /// Does what was to be done by now.
    pub fn handle_timeout(&mut self, now: Time) {
        self.advance(now);
        let devices: Vec<DeviceId> = self.devices.keys().copied().collect();
        for device in devices {
            self.device_timeout(device);
        }
        // Those that a device's end has just given something to do have their time from that on.
        self.set_all_timers();
        for volume in self.timers.due(now) {
            self.volume_timeout(volume);
        }
        self.report_due();
        self.pace_due();
        self.settle();
        self.set_all_timers();
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`handle_timeout`](Self::handle_timeout) wants to be called.
    pub fn poll_timeout(&self) -> Option<Time> {
        let limits = &self.config.limits;
        let volumes = self.timers.first();
        debug_assert_eq!(
            volumes,
            self.volumes.values().filter_map(|volume| volume.timeout(limits)).min(),
            "a volume's time has changed and nobody has said so"
        );
        let devices = self.devices.values().filter_map(|device| match device.link {
            Link::Down => Some(device.retry_at),
            Link::Connecting { until, .. } => Some(until),
            Link::Up { .. } => device.silence_timeout(limits),
        });
        devices.chain(volumes).chain(self.pacing.tick_at).min()
    }

    /// A volume as metrics and logs see it.
    pub fn status(&self, volume: VolumeHandle) -> Option<VolumeStatus> {
        self.volumes.get(&volume).map(Volume::status)
    }

    /// Whether the volume's exports should go on to submit. One that does not look is served all the same, at the cost
    /// of memory.
    pub fn has_room(&self, volume: VolumeHandle) -> bool {
        self.volumes.get(&volume).is_none_or(|volume| volume.layer.has_room())
    }

    /// For each device whether its connection stands, how many requests are on their way to it, and how many wait for
    /// room.
    pub fn device_load(&self) -> impl Iterator<Item = (DeviceId, bool, usize, usize)> {
        self.devices.values().map(|device| {
            let (in_flight, queued) = device.load();
            (device.id, device.is_up(), in_flight, queued)
        })
    }

    fn advance(&mut self, now: Time) {
        assert!(now >= self.now, "time went back from {:?} to {now:?}", self.now);
        self.now = now;
    }

    fn submit(&mut self, handle: VolumeHandle, op: OpId, request: VolumeOp) {
        let result = match self.volumes.get_mut(&handle) {
            Some(volume) if volume.close_by.is_none() => {
                volume.layer.submit(op, request);
                self.touched.insert(handle);
                return;
            }
            Some(_) | None => Err(VolumeError::Shutdown),
        };
        self.actions.push_back(Action::Reply {
            volume: handle,
            op,
            result,
        });
    }

    /// Carries what the parts of each touched volume want from one to the other, until they want nothing more.
    fn settle(&mut self) {
        while let Some(handle) = self.touched.pop_first() {
            while self.step(handle) {}
            self.check_close(handle);
            self.set_timer(handle);
        }
    }

    fn set_timer(&mut self, handle: VolumeHandle) {
        let volume = self.volumes.get(&handle);
        let at = volume.and_then(|volume| volume.timeout(&self.config.limits));
        self.timers.set(handle, at);
    }

    fn set_all_timers(&mut self) {
        for (handle, volume) in &self.volumes {
            self.timers.set(*handle, volume.timeout(&self.config.limits));
        }
    }

    /// One step of it. False if there was none to take.
    fn step(&mut self, handle: VolumeHandle) -> bool {
        let Some(volume) = self.volumes.get_mut(&handle) else {
            return false;
        };
        if let Some(output) = volume.layer.poll() {
            match output {
                Output::Start(token, operation) => self.start(handle, token, operation),
                Output::Reply(op, result) => self.actions.push_back(Action::Reply {
                    volume: handle,
                    op,
                    result,
                }),
            }
            return true;
        }
        let Some(action) = volume.coordinator().and_then(|coordinator| coordinator.poll_action()) else {
            return false;
        };
        match action {
            replication::Action::Send {
                to,
                request,
                class,
                message,
            } => {
                // What a caretaker does never comes before a guest.
                let class = if volume.is_care { Class::Repair } else { class };
                let correlation = self.correlation();
                let envelope = envelope(correlation, class, message);
                self.send(&to, (handle, request), envelope);
            }
            replication::Action::Done { op, result } => volume.layer.done(op, result),
            replication::Action::Notice(notice) => self.notice(handle, notice),
            replication::Action::Released => self.released(handle),
            replication::Action::Meta(ask) => self.ask_for_coordinator(handle, ask),
            replication::Action::Devices => self.more_devices(handle),
            replication::Action::Copying => self.copying(handle),
        }
        true
    }

    fn start(&mut self, handle: VolumeHandle, op: OpToken, operation: Operation) {
        let now = self.now;
        let volume = self.volumes.get_mut(&handle).expect("the caller has it");
        if let Some(coordinator) = volume.coordinator() {
            return coordinator.handle(now, replication::Event::Submit { op, operation });
        }
        volume.held.push_back((op, operation));
        if matches!(volume.phase, Phase::Idle) {
            self.ask_attach(handle);
        }
    }

    fn notice(&mut self, handle: VolumeHandle, notice: Notice) {
        let fenced = matches!(notice, Notice::Fenced { .. });
        self.actions.push_back(Action::Notice { volume: handle, notice });
        if fenced {
            self.end_attachment(handle, Phase::Fenced, &VolumeError::Fenced);
        }
    }

    /// The attachment is over, and everything submitted ends with this error.
    fn end_attachment(&mut self, handle: VolumeHandle, phase: Phase, error: &VolumeError) {
        let volume = self.volumes.get_mut(&handle).expect("the caller has it");
        volume.phase = phase;
        volume.held.clear();
        volume.layer.close(error);
        volume.look_at = None;
        if volume.is_care {
            // Somebody else holds it, so nothing is left to do here.
            volume.close_by.get_or_insert(self.now);
        }
        self.touched.insert(handle);
        self.leave_devices(handle);
    }

    fn correlation(&mut self) -> Correlation {
        self.next_correlation += 1;
        Correlation(self.next_correlation)
    }

    fn meta_request_id(&mut self) -> MetaRequestId {
        self.next_meta_request += 1;
        MetaRequestId(self.next_meta_request)
    }
}

#[cfg(test)]
mod tests;
