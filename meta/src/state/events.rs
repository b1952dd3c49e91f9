//! What has happened, for people: a ring of events in the state, written by [`State::apply`] alone.
//!
//! One command writes one event for each thing that people would name, not one for each group: a node that dies with
//! thousands of groups must not push everything else out of the ring.

use std::ops::Bound;

use cairn_proto::ids::*;

use crate::limits::{EVENTS_KEPT, TEXT_BYTES_MAX};
use crate::state::codec::{numbered, record};
use crate::state::model::State;

numbered! {
    /// What an event is about. Numbers and texts are stable.
    pub enum EventKind {
        /// A volume was created.
        VolumeCreated = 1,
        /// A volume was made larger.
        VolumeGrown = 2,
        /// A volume was deleted.
        VolumeDeleted = 3,
        /// A client holds a volume.
        Attached = 4,
        /// A client holds a volume that another one held until then.
        TakenOver = 5,
        /// A client has given a volume back.
        Detached = 6,
        /// A caretaker holds a volume.
        CaretakerBegan = 7,
        /// A caretaker has given a volume back.
        CaretakerDone = 8,
        /// A copy does not count any more.
        Ejected = 9,
        /// A copy is being filled.
        Joining = 10,
        /// A copy is not being filled any more, and is not complete.
        JoinEnded = 11,
        /// A copy counts.
        Admitted = 12,
        /// Another device has taken the place of one that is lost.
        Replaced = 13,
        /// A copy is not needed any more.
        Released = 14,
        /// A device was registered for the first time.
        DeviceAdded = 15,
        /// A device is not heard of.
        DeviceSilent = 16,
        /// A device that was silent is heard of again.
        DeviceBack = 17,
        /// A device can't acknowledge writes.
        DeviceFailed = 18,
        /// A device that had failed can acknowledge writes again.
        DeviceRecovered = 19,
        /// A device has lost what it had acknowledged.
        DeviceForgot = 20,
        /// A device was formatted anew.
        DeviceReformatted = 21,
        /// A device is served by another node.
        DeviceMoved = 22,
        /// A storage node was registered for the first time.
        NodeAdded = 23,
        /// A metadata server was added.
        MemberAdded = 24,
        /// A metadata server was removed.
        MemberRemoved = 25,
        /// A copy is to be on another device.
        Moving = 26,
        /// A node is to hold nothing.
        NodeDraining = 27,
        /// A node is not emptied any more.
        NodeUndrained = 28,
    }
}

impl EventKind {
    /// The text that programs see.
    pub fn as_str(self) -> &'static str {
        match self {
            EventKind::VolumeCreated => "volume-created",
            EventKind::VolumeGrown => "volume-grown",
            EventKind::VolumeDeleted => "volume-deleted",
            EventKind::Attached => "attached",
            EventKind::TakenOver => "taken-over",
            EventKind::Detached => "detached",
            EventKind::CaretakerBegan => "caretaker-began",
            EventKind::CaretakerDone => "caretaker-done",
            EventKind::Ejected => "ejected",
            EventKind::Joining => "joining",
            EventKind::JoinEnded => "join-ended",
            EventKind::Admitted => "admitted",
            EventKind::Replaced => "replaced",
            EventKind::Released => "released",
            EventKind::DeviceAdded => "device-added",
            EventKind::DeviceSilent => "device-silent",
            EventKind::DeviceBack => "device-back",
            EventKind::DeviceFailed => "device-failed",
            EventKind::DeviceRecovered => "device-recovered",
            EventKind::DeviceForgot => "device-forgot",
            EventKind::DeviceReformatted => "device-reformatted",
            EventKind::DeviceMoved => "device-moved",
            EventKind::NodeAdded => "node-added",
            EventKind::MemberAdded => "member-added",
            EventKind::MemberRemoved => "member-removed",
            EventKind::Moving => "moving",
            EventKind::NodeDraining => "node-draining",
            EventKind::NodeUndrained => "node-undrained",
        }
    }
}

record! {
    /// Something that has happened.
    pub struct Event {
        /// Unix time of the proposer, in milliseconds.
        pub time_ms: u64,
        /// What it was, for programs.
        pub kind: EventKind,
        /// Of which volume.
        pub volume: Option<VolumeId>,
        /// The volume's name then; empty for none.
        pub name: String,
        /// Of which group, if it was one alone.
        pub group: Option<GroupIndex>,
        /// About which device.
        pub device: Option<DeviceId>,
        /// About which node, or that of the device then.
        pub node: Option<NodeId>,
        /// What it was, for people.
        pub message: String,
        /// Why, for people; may be empty.
        pub cause: String,
    }
}

impl Event {
    /// An event about nothing in particular yet.
    pub(super) fn new(time_ms: u64, kind: EventKind, message: impl Into<String>) -> Event {
        Event {
            time_ms,
            kind,
            volume: None,
            name: String::new(),
            group: None,
            device: None,
            node: None,
            message: message.into(),
            cause: String::new(),
        }
    }

    /// It is of this volume.
    pub(super) fn of_volume(mut self, id: VolumeId, name: &str) -> Event {
        (self.volume, self.name) = (Some(id), name.to_string());
        self
    }

    /// It has this cause.
    pub(super) fn because(mut self, cause: impl Into<String>) -> Event {
        self.cause = cause.into();
        self
    }
}

/// A text that is not longer than what people say may be.
fn bounded(mut text: String) -> String {
    let mut end = text.len().min(TEXT_BYTES_MAX * 2);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

impl State {
    /// Writes an event down; the oldest one goes when there are too many.
    pub(super) fn note(&mut self, mut event: Event) {
        event.message = bounded(event.message);
        event.cause = bounded(event.cause);
        self.last_event += 1;
        self.events.insert(self.last_event, event);
        while self.events.len() > EVENTS_KEPT {
            self.events.pop_first();
        }
    }

    /// Writes down an event about a device, which [`Self::device_words`] names.
    pub(super) fn note_device(&mut self, mut event: Event, device: DeviceId) {
        event.device = Some(device);
        event.node = self.devices.get(&device).map(|device| device.node);
        self.note(event);
    }

    /// A device as people know it.
    pub(super) fn device_words(&self, id: &DeviceId) -> String {
        let node = self.devices.get(id).and_then(|device| self.nodes.get(&device.node));
        let uuid = id.uuid.to_string();
        let short: String = uuid.chars().take(8).collect();
        match node {
            Some(node) => format!("device {short} of node `{}`", node.name),
            None => format!("device {short}"),
        }
    }

    /// The events that are kept, by id: the oldest first, without gaps.
    pub fn events(&self) -> impl DoubleEndedIterator<Item = (u64, &Event)> {
        self.events.iter().map(|(id, event)| (*id, event))
    }

    /// The events after this one.
    pub fn events_after(&self, id: u64) -> impl DoubleEndedIterator<Item = (u64, &Event)> {
        let later = self.events.range((Bound::Excluded(id), Bound::Unbounded));
        later.map(|(id, event)| (*id, event))
    }

    /// The id of the newest event; 0 before the first.
    pub fn last_event(&self) -> u64 {
        self.last_event
    }
}

/// Group numbers as people write them: `0-3, 7`.
pub(super) fn group_words(indexes: &[GroupIndex]) -> String {
    let mut runs: Vec<(u8, u8)> = Vec::new();
    for index in indexes {
        match runs.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(index.0) => *last = index.0,
            _ => runs.push((index.0, index.0)),
        }
    }
    let word = |(first, last): &(u8, u8)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    let words: Vec<String> = runs.iter().map(word).collect();
    let noun = if indexes.len() == 1 { "group" } else { "groups" };
    format!("{noun} {}", words.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_named_in_runs() {
        let words = |numbers: &[u8]| group_words(&numbers.iter().map(|number| GroupIndex(*number)).collect::<Vec<_>>());
        assert_eq!(words(&[4]), "group 4");
        assert_eq!(words(&[0, 1, 2, 7, 9, 10]), "groups 0-2, 7, 9-10");
    }

    #[test]
    fn the_oldest_events_go_and_ids_have_no_gaps() {
        let mut state = State::default();
        let count = EVENTS_KEPT as u64 + 10;
        for time_ms in 1..=count {
            state.note(Event::new(time_ms, EventKind::Attached, "ä".repeat(TEXT_BYTES_MAX * 3)));
        }
        let ids: Vec<u64> = state.events().map(|(id, _)| id).collect();
        assert_eq!(ids, (11..=count).collect::<Vec<u64>>());
        assert_eq!((state.last_event(), state.events_after(count - 2).count()), (count, 2));
        assert!(
            state
                .events()
                .all(|(_, event)| event.message.len() <= TEXT_BYTES_MAX * 2)
        );
    }
}
