//! Storage nodes and their devices.

use cairn_proto::control::Code;
use cairn_proto::ids::*;

use crate::limits::{
    ADDRESSES_MAX, DEVICES_MAX, DEVICES_PER_NODE_MAX, NAME_BYTES_MAX, NODES_MAX, REPORTS_MAX, TEXT_BYTES_MAX,
};
use crate::state::command::{DeviceRegistration, RegisterNode, ReportDevices};
use crate::state::events::{Event, EventKind};
use crate::state::model::{Device, DeviceState, Node, State};
use crate::state::{DeviceOutcome, Outcome, Refusal, is_name};

impl State {
    pub(super) fn register_node(&mut self, time_ms: u64, command: &RegisterNode) -> Result<Outcome, Refusal> {
        check_node(command)?;
        if command.feature_level < self.feature_level {
            return Err(Refusal::new(
                Code::FeatureLevel,
                format!(
                    "node `{}` understands feature level {}, the cluster is at {}: run a newer version on it",
                    command.name, command.feature_level, self.feature_level
                ),
            ));
        }
        let known = self.nodes.iter().find(|(_, node)| node.name == command.name);
        let id = match known {
            Some((id, _)) => *id,
            None if self.nodes.len() >= NODES_MAX => {
                return Err(Refusal::new(
                    Code::TooMany,
                    format!("the cluster has {NODES_MAX} nodes, and that is the limit"),
                ));
            }
            None => {
                self.last_node += 1;
                NodeId(self.last_node)
            }
        };
        let node = Node {
            draining: self.nodes.get(&id).and_then(|node| node.draining.clone()),
            name: command.name.clone(),
            run: command.run,
            domain: command.domain.clone(),
            version: command.version.clone(),
            feature_level: command.feature_level,
        };
        if self.nodes.insert(id, node).is_none() {
            let message = format!("storage node `{}` was registered for the first time", command.name);
            let mut event = Event::new(time_ms, EventKind::NodeAdded, message);
            event.node = Some(id);
            self.note(event);
        }
        let devices = command
            .devices
            .iter()
            .map(|device| match self.register_device(time_ms, id, device) {
                Ok(forgot) => DeviceOutcome {
                    id: device.id,
                    refusal: None,
                    forgot,
                },
                Err(refusal) => DeviceOutcome {
                    id: device.id,
                    refusal: Some(refusal),
                    forgot: false,
                },
            });
        Ok(Outcome::Registered {
            node: id,
            devices: devices.collect(),
        })
    }

    /// Whether the device has forgotten something.
    fn register_device(&mut self, time_ms: u64, node: NodeId, device: &DeviceRegistration) -> Result<bool, Refusal> {
        let id = device.id;
        check_device(device)?;
        if device.cluster.is_some_and(|cluster| Some(cluster) != self.cluster) {
            return Err(Refusal::new(
                Code::ForeignDevice,
                format!("device {id} belongs to another cluster: format it anew to use it here, which erases it"),
            ));
        }
        self.check_owner(node, device)?;
        let known = self.devices.get(&id);
        if known.is_none() && self.devices.len() >= DEVICES_MAX {
            return Err(Refusal::new(
                Code::TooMany,
                format!("the cluster has {DEVICES_MAX} devices, and that is the limit: remove some first"),
            ));
        }
        let forgot_now = known.is_some_and(|known| device.commit_seq < known.commit_seq);
        let forgot = forgot_now || known.is_some_and(|known| known.forgot);
        let commit_seq = known.map_or(device.commit_seq, |known| known.commit_seq.max(device.commit_seq));
        let trouble = match known {
            Some(known) if forgot_now => format!(
                "it came back with commit sequence {}, after {} was durable: it has lost data",
                device.commit_seq, known.commit_seq
            ),
            Some(known) if known.forgot => known.trouble.clone(),
            _ => String::new(),
        };
        let record = Device {
            node,
            addresses: device.addresses.clone(),
            capacity_bytes: device.capacity_bytes,
            used_bytes: device.used_bytes,
            state: DeviceState::Active,
            commit_seq,
            forgot,
            trouble,
            silent: known.is_some_and(|known| known.silent),
        };
        let former_node = known.map(|known| known.node);
        let was_failed = known.is_some_and(|known| known.state == DeviceState::Failed);
        // Formatted anew: what was a member under the former incarnation will not come back.
        let mut superseded = Vec::new();
        for (former_id, former) in self.formats_of_mut(id.uuid).filter(|(former, _)| **former != id) {
            if former.state != DeviceState::Replaced {
                superseded.push(*former_id);
            }
            former.state = DeviceState::Replaced;
        }
        let words = record.trouble.clone();
        self.devices.insert(id, record);
        let note = |state: &mut State, kind, what: &str, cause: &str| {
            let message = format!("{} {what}", state.device_words(&id));
            state.note_device(Event::new(time_ms, kind, message).because(cause), id);
        };
        match former_node {
            None if superseded.is_empty() => {
                note(self, EventKind::DeviceAdded, "was registered for the first time", "")
            }
            None => note(
                self,
                EventKind::DeviceReformatted,
                "was formatted anew: what it held is gone",
                "",
            ),
            Some(former) if former != node => note(self, EventKind::DeviceMoved, "is served by another node now", ""),
            Some(_) => {}
        }
        if forgot_now {
            note(
                self,
                EventKind::DeviceForgot,
                "has lost what it had acknowledged",
                &words,
            );
        }
        if was_failed {
            note(
                self,
                EventKind::DeviceRecovered,
                "can be written again",
                "its node was started anew",
            );
        }
        Ok(forgot_now)
    }

    /// One device, one node: two that serve the same one would each acknowledge what the other does not have.
    fn check_owner(&self, node: NodeId, device: &DeviceRegistration) -> Result<(), Refusal> {
        let id = device.id;
        let known = self.devices.get(&id).map(|known| known.state);
        if matches!(known, Some(DeviceState::Replaced | DeviceState::Removed)) {
            return Err(Refusal::new(
                Code::DeviceSuperseded,
                format!(
                    "device {id} was formatted anew or taken out since: this is an old copy of it; format it anew to \
                     use it, which erases it"
                ),
            ));
        }
        let elsewhere = self.devices_with(id.uuid).find(|(_, known)| {
            let in_use = matches!(known.state, DeviceState::Active | DeviceState::Failed);
            known.node != node && in_use && !device.displace
        });
        match elsewhere {
            None => Ok(()),
            Some((_, known)) => {
                let name = self.nodes.get(&known.node).map_or("?", |node| &node.name);
                Err(Refusal::new(
                    Code::DeviceElsewhere,
                    format!(
                        "device {id} is served by node `{name}`, which is alive: one device can't be served twice; is \
                         this a copy of it? If it was moved here, stop it there and try again in a few seconds"
                    ),
                ))
            }
        }
    }

    pub(super) fn report_devices(&mut self, time_ms: u64, command: &ReportDevices) -> Result<Outcome, Refusal> {
        if command.devices.len() > REPORTS_MAX {
            return Err(Refusal::new(
                Code::InvalidArgument,
                format!("at most {REPORTS_MAX} devices in one report"),
            ));
        }
        for report in &command.devices {
            let Some(device) = self.devices.get_mut(&report.id) else {
                continue;
            };
            device.capacity_bytes = report.capacity_bytes;
            device.used_bytes = report.used_bytes;
            device.commit_seq = device.commit_seq.max(report.commit_seq);
            if !device.forgot {
                device.trouble = report.trouble.chars().take(TEXT_BYTES_MAX / 4).collect();
            }
            let (before, after) = match (device.state, report.failed) {
                (before @ (DeviceState::Active | DeviceState::Failed), true) => (before, DeviceState::Failed),
                (before @ (DeviceState::Active | DeviceState::Failed), false) => (before, DeviceState::Active),
                (state, _) => (state, state),
            };
            device.state = after;
            if before != after {
                let cause = device.trouble.clone();
                let words = self.device_words(&report.id);
                let (kind, message) = match after {
                    DeviceState::Failed => (EventKind::DeviceFailed, format!("{words} can't acknowledge writes")),
                    _ => (EventKind::DeviceRecovered, format!("{words} can be written again")),
                };
                self.note_device(Event::new(time_ms, kind, message).because(cause), report.id);
            }
        }
        Ok(Outcome::Done)
    }

    fn devices_with(&self, uuid: DeviceUuid) -> impl Iterator<Item = (&DeviceId, &Device)> {
        self.devices.range(formats(uuid))
    }

    fn formats_of_mut(&mut self, uuid: DeviceUuid) -> impl Iterator<Item = (&DeviceId, &mut Device)> {
        self.devices.range_mut(formats(uuid))
    }
}

fn formats(uuid: DeviceUuid) -> std::ops::RangeInclusive<DeviceId> {
    let id = |incarnation| DeviceId {
        uuid,
        incarnation: Incarnation(incarnation),
    };
    id(0)..=id(u64::MAX)
}

fn check_node(command: &RegisterNode) -> Result<(), Refusal> {
    let refuse = |why: String| Err(Refusal::new(Code::InvalidArgument, why));
    if !is_name(&command.name, NAME_BYTES_MAX) {
        return refuse(format!(
            "`{}` can't name a node: use 1 to {NAME_BYTES_MAX} letters, digits, `-`, `_`, `.`",
            command.name.escape_debug().take(40).collect::<String>()
        ));
    }
    let domain = &command.domain;
    let texts = [&domain.room, &domain.rack, &domain.host, &command.version];
    if texts.iter().any(|text| text.len() > NAME_BYTES_MAX) {
        return refuse(format!(
            "room, rack, host and version have at most {NAME_BYTES_MAX} bytes"
        ));
    }
    let mut ids: Vec<DeviceUuid> = command.devices.iter().map(|device| device.id.uuid).collect();
    ids.sort_unstable();
    if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
        return refuse(format!(
            "node `{}` has device {} twice: is one a copy of the other?",
            command.name, pair[0]
        ));
    }
    if ids.len() > DEVICES_PER_NODE_MAX {
        return refuse(format!("a node serves at most {DEVICES_PER_NODE_MAX} devices"));
    }
    Ok(())
}

fn check_device(device: &DeviceRegistration) -> Result<(), Refusal> {
    let refuse = |why: String| {
        Err(Refusal::new(
            Code::InvalidArgument,
            format!("device {}: {why}", device.id),
        ))
    };
    let addresses = &device.addresses;
    if addresses.is_empty() || addresses.len() > ADDRESSES_MAX {
        return refuse(format!("give 1 to {ADDRESSES_MAX} addresses"));
    }
    if let Some(address) = addresses.iter().find(|address| !is_address(address)) {
        return refuse(format!(
            "`{}` is not an address: write host:port",
            address.escape_debug()
        ));
    }
    if device.id.uuid == DeviceUuid::default() || device.capacity_bytes == 0 {
        return refuse("it has no UUID or no capacity: format it first".to_string());
    }
    Ok(())
}

/// Whether a text looks like `host:port`.
pub(crate) fn is_address(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else {
        return false;
    };
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':' | '[' | ']');
    text.len() <= TEXT_BYTES_MAX
        && !host.is_empty()
        && host.chars().all(allowed)
        && port.parse::<u16>().is_ok_and(|port| port != 0)
}
