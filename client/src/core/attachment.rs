//! What a volume asks of meta, and how it is closed.

use cairn_proto::ids::DeviceId;
use cairn_proto::replication::{self, Coordinator, MetaAsk, MetaTold};

use super::api::{
    Action, DeviceEntry, Grant, GroupConfig, MetaAnswer, MetaError, MetaQuestion, MetaReply, MetaRequest,
    MetaRequestId, Notice, VolumeHandle,
};
use super::volume::Phase;
use super::{ClientCore, Device};
use crate::volume::api::VolumeError;

impl ClientCore {
    fn ask_meta(&mut self, handle: VolumeHandle, question: MetaQuestion) -> MetaRequestId {
        let request = self.meta_request_id();
        let id = self.volumes[&handle].description.id;
        self.actions.push_back(Action::Meta(MetaRequest {
            request,
            volume: handle,
            id,
            question,
        }));
        request
    }

    /// Asks for the attachment: a new generation each time (rule 1).
    pub(super) fn ask_attach(&mut self, handle: VolumeHandle) {
        let question = if self.volumes[&handle].is_care {
            MetaQuestion::Care
        } else {
            MetaQuestion::Attach
        };
        let request = Some(self.ask_meta(handle, question));
        let retry_at = self.now;
        let volume = self.volumes.get_mut(&handle).expect("the caller has it");
        volume.phase = Phase::Asking { request, retry_at };
    }

    pub(super) fn meta_answered(&mut self, answer: MetaAnswer) {
        let asker = self.volumes.iter().find(|(_, volume)| {
            let phase = match &volume.phase {
                Phase::Asking { request, .. } => *request,
                Phase::Detaching { request } => Some(*request),
                _ => None,
            };
            [phase, volume.refresh, volume.asked].contains(&Some(answer.request))
        });
        let Some(handle) = asker.map(|(handle, _)| *handle) else {
            return;
        };
        let volume = self.volumes.get_mut(&handle).expect("found above");
        self.touched.insert(handle);
        if volume.refresh == Some(answer.request) {
            volume.refresh = None;
            return self.refreshed(handle, answer.result);
        }
        if volume.asked == Some(answer.request) {
            volume.asked = None;
            return self.told_coordinator(handle, answer.result);
        }
        if matches!(volume.phase, Phase::Detaching { .. }) {
            // Whatever it was: the members are released, and the next grant does not depend on it.
            return self.closed(handle);
        }
        match answer.result {
            Ok(MetaReply::Attached { grant, groups, devices }) => self.attached(handle, grant, groups, devices),
            Err(MetaError::Refused(why)) => {
                let error = VolumeError::Gone(why.clone());
                self.end_attachment(handle, Phase::Gone(why), &error);
            }
            Err(MetaError::Unreachable(_) | MetaError::Superseded(_)) | Ok(_) => {
                let retry_at = volume.backoff.next(self.now, &self.config.limits);
                volume.phase = Phase::Asking {
                    request: None,
                    retry_at,
                };
            }
        }
    }

    fn attached(&mut self, handle: VolumeHandle, grant: Grant, groups: Vec<GroupConfig>, entries: Vec<DeviceEntry>) {
        let now = self.now;
        let volume = self.volumes.get_mut(&handle).expect("the caller has it");
        volume.backoff.reset();
        let coordinator = Coordinator::new(volume.settings(), grant, groups, self.config.limits.replication);
        let mut coordinator = match coordinator {
            Ok(coordinator) => Box::new(coordinator),
            Err(why) => {
                let why = format!("what the metadata servers say of it can't be used: {why}");
                let error = VolumeError::Gone(why.clone());
                return self.end_attachment(handle, Phase::Gone(why), &error);
            }
        };
        volume.devices = coordinator.devices().collect();
        volume.asked = None;
        for device in &volume.devices {
            let device = self.devices.entry(*device).or_insert_with(|| Device::new(*device, now));
            // Whether it is there matters now.
            device.retry_at = device.retry_at.min(now);
            if device.is_up() {
                for event in device.greetings() {
                    coordinator.handle(now, event);
                }
            }
        }
        for (op, operation) in std::mem::take(&mut volume.held) {
            coordinator.handle(now, replication::Event::Submit { op, operation });
        }
        let notice = Notice::Attached(grant.generation);
        (volume.look_at, volume.reported_at, volume.whole_since) = (Some(now), None, None);
        volume.phase = Phase::Attached(coordinator);
        self.actions.push_back(Action::Notice { volume: handle, notice });
        self.take_addresses(entries);
        self.connect_due();
    }

    fn refreshed(&mut self, handle: VolumeHandle, result: Result<MetaReply, MetaError>) {
        if let Ok(MetaReply::Refreshed { size, devices, .. }) = result {
            let volume = self.volumes.get_mut(&handle).expect("the caller has it");
            volume.layer.grow(size.0);
            self.take_addresses(devices);
            self.connect_due();
        }
    }

    /// The coordinator wants something of meta.
    pub(super) fn ask_for_coordinator(&mut self, handle: VolumeHandle, ask: MetaAsk) {
        let volume = self.volumes.get_mut(&handle).expect("the caller has it");
        let Some(coordinator) = volume.coordinator() else {
            return;
        };
        let generation = coordinator.generation();
        let question = match ask {
            MetaAsk::Look => MetaQuestion::Refresh,
            MetaAsk::Change(changes) => MetaQuestion::Configure { generation, changes },
        };
        let request = self.ask_meta(handle, question);
        self.volumes.get_mut(&handle).expect("it was there").asked = Some(request);
    }

    /// Meta has answered the coordinator, or nobody has.
    fn told_coordinator(&mut self, handle: VolumeHandle, result: Result<MetaReply, MetaError>) {
        let now = self.now;
        let mut entries = Vec::new();
        let told = match result {
            Ok(MetaReply::Refreshed {
                generation,
                groups,
                devices,
                ..
            }) => {
                entries = devices;
                MetaTold::Looked { generation, groups }
            }
            Ok(MetaReply::Configured(outcomes)) => MetaTold::Changed(outcomes),
            Err(MetaError::Superseded(generation)) => MetaTold::Superseded(generation),
            // A refusal of the whole question says nothing about an earlier sending of it.
            Ok(_) | Err(MetaError::Unreachable(_) | MetaError::Refused(_)) => MetaTold::Unreachable,
        };
        let volume = self.volumes.get_mut(&handle).expect("the caller has it");
        if let Some(coordinator) = volume.coordinator() {
            coordinator.handle(now, replication::Event::Meta(told));
        }
        self.take_addresses(entries);
        self.connect_due();
    }

    /// The coordinator needs connections to more devices than before.
    pub(super) fn more_devices(&mut self, handle: VolumeHandle) {
        let now = self.now;
        let volume = self.volumes.get_mut(&handle).expect("the caller has it");
        let Some(coordinator) = volume.coordinator() else {
            return;
        };
        let devices: Vec<DeviceId> = coordinator.devices().collect();
        let before = std::mem::replace(&mut volume.devices, devices.clone());
        for id in devices.into_iter().filter(|id| !before.contains(id)) {
            let device = self.devices.entry(id).or_insert_with(|| Device::new(id, now));
            if device.is_up() {
                let greetings = device.greetings();
                let volume = self.volumes.get_mut(&handle).expect("it was there");
                let coordinator = volume.coordinator().expect("it was there");
                for event in greetings {
                    coordinator.handle(now, event);
                }
            }
        }
        self.connect_due();
    }

    fn take_addresses(&mut self, entries: Vec<DeviceEntry>) {
        let now = self.now;
        for entry in entries {
            let Some(device) = self.devices.get_mut(&entry.device) else {
                continue;
            };
            if device.addresses != entry.addresses {
                device.addresses = entry.addresses;
                device.backoff.reset();
                device.retry_at = device.retry_at.min(now);
                if device.is_up() {
                    let (id, event) = (device.id, device.located());
                    self.tell_volumes(id, &event);
                }
            }
        }
    }

    /// What a volume waits for may be due.
    pub(super) fn volume_timeout(&mut self, handle: VolumeHandle) {
        let now = self.now;
        let limits = self.config.limits;
        let volume = self.volumes.get_mut(&handle).expect("the caller has it");
        if volume.close_by.is_some_and(|by| by <= now) {
            return self.closed(handle);
        }
        if volume.timeout(&limits).is_none_or(|at| at > now) {
            return;
        }
        self.touched.insert(handle);
        if let Some(coordinator) = volume.coordinator() {
            coordinator.handle_timeout(now);
        }
        if volume.refresh_due(&limits).is_some_and(|at| at <= now) {
            volume.refresh_wanted = false;
            volume.refreshed_at = Some(now);
            let request = self.ask_meta(handle, MetaQuestion::Refresh);
            self.volumes.get_mut(&handle).expect("the caller has it").refresh = Some(request);
        }
        let ask_again = matches!(
            self.volumes[&handle].phase,
            Phase::Asking { request: None, retry_at } if retry_at <= now
        );
        if ask_again {
            self.ask_attach(handle);
        }
    }

    /// The volume is to be closed in order.
    pub(super) fn close(&mut self, handle: VolumeHandle) {
        let Some(volume) = self.volumes.get_mut(&handle) else {
            return;
        };
        if volume.close_by.is_none() {
            volume.close_by = Some(self.now + self.config.limits.close_timeout);
            self.touched.insert(handle);
        }
    }

    /// Goes on closing, once every operation has its reply.
    pub(super) fn check_close(&mut self, handle: VolumeHandle) {
        let now = self.now;
        let Some(volume) = self.volumes.get_mut(&handle) else {
            return;
        };
        if volume.close_by.is_none() || volume.layer.operations() > 0 {
            return;
        }
        if !volume.is_releasing && volume.is_settling() {
            let until = *volume.settle_by.get_or_insert(now + self.config.limits.settle_timeout);
            if now < until {
                return;
            }
        }
        (volume.is_releasing, volume.settle_by) = (true, None);
        match &mut volume.phase {
            Phase::Attached(coordinator) => {
                coordinator.handle(now, replication::Event::Release);
                while self.step(handle) {}
            }
            Phase::Detaching { .. } => {}
            Phase::Idle | Phase::Asking { .. } | Phase::Fenced | Phase::Gone(_) => self.closed(handle),
        }
    }

    /// The members are released: tell meta.
    pub(super) fn released(&mut self, handle: VolumeHandle) {
        let volume = self.volumes.get_mut(&handle).expect("the caller has it");
        let Phase::Attached(coordinator) = &volume.phase else {
            return;
        };
        let generation = coordinator.generation();
        let settled = volume.is_settled();
        #[cfg(feature = "canary")]
        let settled = settled || self.config.limits.replication.canary.settled_unseen;
        let request = self.ask_meta(handle, MetaQuestion::Detach { generation, settled });
        let volume = self.volumes.get_mut(&handle).expect("the caller has it");
        volume.phase = Phase::Detaching { request };
        volume.look_at = None;
        self.leave_devices(handle);
    }

    /// The volume is closed; whatever has no reply yet gets one.
    fn closed(&mut self, handle: VolumeHandle) {
        let volume = self.volumes.get_mut(&handle).expect("the caller has it");
        volume.phase = Phase::Idle;
        volume.layer.close(&VolumeError::Shutdown);
        while self.step(handle) {}
        self.leave_devices(handle);
        self.volumes.remove(&handle);
        self.timers.set(handle, None);
        self.actions.push_back(Action::Closed { volume: handle });
    }
}
