//! Nodes that are to hold nothing.

use cairn_proto::control::Code;
use cairn_proto::ids::*;

use crate::state::command::DrainNode;
use crate::state::events::{Event, EventKind};
use crate::state::model::{Drain, Group, State};
use crate::state::placement::Spares;
use crate::state::{Outcome, Refusal};

impl State {
    /// Whether a device is of a node that is to hold nothing.
    pub fn is_draining(&self, device: &DeviceId) -> bool {
        let node = self.devices.get(device).and_then(|device| self.nodes.get(&device.node));
        node.is_some_and(|node| node.draining.is_some())
    }

    /// The copies that a node has or is getting: groups, and on which of its devices. Who is only remembered in a rescue set
    /// is one of them too.
    pub fn copies_on(&self, node: NodeId) -> impl Iterator<Item = (&GroupId, &Group, DeviceId)> {
        let is_there = move |device: &DeviceId| self.devices.get(device).is_some_and(|device| device.node == node);
        self.groups.iter().flat_map(move |(id, group)| {
            let mut devices: Vec<DeviceId> = group.named().filter(|device| is_there(device)).copied().collect();
            devices.sort_unstable();
            devices.dedup();
            devices.into_iter().map(move |device| (id, group, device))
        })
    }

    pub(super) fn drain_node(&mut self, time_ms: u64, command: &DrainNode) -> Result<Outcome, Refusal> {
        let id = command.node;
        let Some(node) = self.nodes.get(&id) else {
            return Err(Refusal::new(
                Code::NodeNotFound,
                format!("there is no storage node with the id {id}: `cairn node list` shows those that exist"),
            ));
        };
        if command.drain == node.draining.is_some() {
            return Ok(Outcome::Done);
        }
        let name = node.name.clone();
        let draining = match command.drain {
            true => Some(Drain {
                since_ms: time_ms,
                copies: self.copies_on(id).count() as u64,
            }),
            false => None,
        };
        self.nodes.get_mut(&id).expect("it was just there").draining = draining;
        if command.drain
            && let Err(refusal) = self.check_room_elsewhere(id, &name, &command.silent)
        {
            self.nodes.get_mut(&id).expect("it was just there").draining = None;
            return Err(refusal);
        }
        let (kind, message) = match command.drain {
            true => (
                EventKind::NodeDraining,
                format!("storage node `{name}` is to hold nothing: its copies are made elsewhere"),
            ),
            false => (
                EventKind::NodeUndrained,
                format!("storage node `{name}` may hold copies again"),
            ),
        };
        let mut event = Event::new(time_ms, kind, message).because("an operator wants it");
        event.node = Some(id);
        self.note(event);
        Ok(Outcome::Done)
    }

    /// Whether all copies of a node could be on others, which is marked as draining already.
    fn check_room_elsewhere(&self, id: NodeId, name: &str, silent: &[DeviceId]) -> Result<(), Refusal> {
        let mut spares = Spares::new(self, |device| silent.contains(device));
        let counted = |(_, group, device): &(&GroupId, &Group, DeviceId)| group.has(device);
        let (mut all, mut stuck, mut first) = (0, 0, None);
        for (group_id, group, device) in self.copies_on(id).filter(counted) {
            all += 1;
            let volume = &self.volumes[&group_id.volume];
            if spares.choose(volume, group, device, |_| true).is_none() {
                stuck += 1;
                first.get_or_insert((group_id.index, volume));
            }
        }
        let Some((index, volume)) = first else { return Ok(()) };
        let spread = format!("{:?}", volume.spread).to_lowercase();
        Err(Refusal::new(
            Code::NotEnoughDevices,
            format!(
                "node `{name}` can't be emptied: {stuck} of its {all} copies (the first is of group {index} of volume \
                 `{}`) have no other device that answers, has room, and stands on a distinct {spread} from the other \
                 copies; add a node, or start those that are down, and try again",
                volume.name
            ),
        ))
    }
}
