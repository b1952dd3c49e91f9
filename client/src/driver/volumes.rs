//! The open volumes of one driver and who uses them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use cairn_proto::ids::VolumeId;
use tokio::sync::oneshot;

use super::limits::{DESCRIBE_AGAIN_DEADLINE, DESCRIBE_DEADLINE, VOLUMES_MAX};
use super::mailbox::UserId;
use super::meta::OpenError;
use crate::core::api::{Event, VolumeDescription, VolumeHandle};

/// Who uses a volume.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum User {
    /// An NBD connection, by its key.
    Guest(usize),
    /// The library.
    Library(UserId),
}

type OpenReply = oneshot::Sender<Result<(UserId, VolumeDescription), OpenError>>;

struct Entry {
    handle: VolumeHandle,
    description: VolumeDescription,
    users: BTreeSet<User>,
    /// It is being closed; who has come since then waits until it can be opened again.
    closing: bool,
    opening: Vec<(UserId, OpenReply)>,
    leaving: Vec<oneshot::Sender<()>>,
}

/// A volume is open while it has users. Its attachment comes with its first operation and goes with its last user.
#[derive(Default)]
pub(super) struct Volumes {
    by_id: BTreeMap<VolumeId, Entry>,
    by_user: BTreeMap<User, VolumeId>,
    last_handle: u32,
}

impl Volumes {
    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// A handle that no volume has had.
    pub(super) fn next_handle(&mut self) -> VolumeHandle {
        self.last_handle += 1;
        VolumeHandle(self.last_handle)
    }

    pub(super) fn users(&self) -> Vec<User> {
        self.by_user.keys().copied().collect()
    }

    pub(super) fn name_of(&self, handle: VolumeHandle) -> &str {
        let entry = self.by_id.values().find(|entry| entry.handle == handle);
        entry.map_or("(closed)", |entry| &entry.description.name)
    }

    /// Short when there is an answer already: an open volume is served with all metadata servers down.
    pub(super) fn describe_deadline(&self, name: &str) -> Duration {
        if self.known(name).is_some() {
            DESCRIBE_AGAIN_DEADLINE
        } else {
            DESCRIBE_DEADLINE
        }
    }

    /// The answer, or what is known of an open volume if there is none.
    pub(super) fn or_known(
        &self,
        name: &str,
        answer: Result<VolumeDescription, OpenError>,
    ) -> Result<VolumeDescription, OpenError> {
        match answer {
            Err(OpenError::Unreachable(why)) => self.known(name).cloned().ok_or(OpenError::Unreachable(why)),
            answer => answer,
        }
    }

    fn known(&self, name: &str) -> Option<&VolumeDescription> {
        let mut entries = self.by_id.values().map(|entry| &entry.description);
        entries.find(|description| description.name == name)
    }

    /// Whether one more user of this volume is possible.
    pub(super) fn has_room(&self, id: VolumeId) -> bool {
        self.by_id.contains_key(&id) || self.by_id.len() < VOLUMES_MAX
    }

    /// Adds a user; gives what the core must be told.
    pub(super) fn enter(&mut self, user: User, description: &VolumeDescription) -> Result<Vec<Event>, OpenError> {
        let id = description.id;
        if !self.has_room(id) {
            return Err(OpenError::TooMany);
        }
        let mut events = Vec::new();
        let entry = self.by_id.entry(id).or_insert_with(|| {
            self.last_handle += 1;
            let volume = VolumeHandle(self.last_handle);
            let description = description.clone();
            events.push(Event::OpenVolume {
                volume,
                description: description.clone(),
            });
            Entry {
                handle: volume,
                description,
                users: BTreeSet::new(),
                closing: false,
                opening: Vec::new(),
                leaving: Vec::new(),
            }
        });
        if description.size > entry.description.size {
            entry.description.size = description.size;
            if !entry.closing {
                let (volume, size) = (entry.handle, description.size);
                events.push(Event::Grown { volume, size });
            }
        }
        entry.users.insert(user);
        let before = self.by_user.insert(user, id);
        assert_eq!(before, None, "{user:?} uses a volume already");
        Ok(events)
    }

    /// The volume that operations of this user go to; `None` while it is being closed, or when the user has left.
    pub(super) fn handle_of_user(&self, user: User) -> Option<VolumeHandle> {
        let entry = self.by_id.get(self.by_user.get(&user)?)?;
        (!entry.closing).then_some(entry.handle)
    }

    /// Tells the library when its volume is open.
    pub(super) fn when_open(&mut self, user: User, reply: OpenReply, description: VolumeDescription) {
        let User::Library(id) = user else {
            unreachable!("only the library waits")
        };
        match self.by_id.get_mut(&description.id) {
            Some(entry) if entry.closing => entry.opening.push((id, reply)),
            _ => drop(reply.send(Ok((id, description)))),
        }
    }

    /// Takes a user away; gives the volume, and what the core must be told.
    pub(super) fn leave(&mut self, user: User) -> Option<(VolumeId, Option<Event>)> {
        let id = self.by_user.remove(&user)?;
        let entry = self.by_id.get_mut(&id)?;
        entry.users.remove(&user);
        let close = entry.users.is_empty() && !entry.closing;
        entry.closing |= close;
        let volume = entry.handle;
        Some((id, close.then_some(Event::CloseVolume { volume })))
    }

    /// Tells who left when the volume is closed, or at once if others use it.
    pub(super) fn when_closed(&mut self, id: VolumeId, reply: oneshot::Sender<()>) {
        match self.by_id.get_mut(&id) {
            Some(entry) if entry.closing => entry.leaving.push(reply),
            _ => drop(reply.send(())),
        }
    }

    /// A volume is closed. If users have come meanwhile it is opened again; they, and what the core must be told.
    pub(super) fn closed(&mut self, handle: VolumeHandle) -> Vec<(User, Option<Event>)> {
        let Some((&id, entry)) = self.by_id.iter_mut().find(|(_, entry)| entry.handle == handle) else {
            return Vec::new();
        };
        for reply in entry.leaving.drain(..) {
            let _ = reply.send(());
        }
        if entry.users.is_empty() {
            self.by_id.remove(&id);
            return Vec::new();
        }
        self.last_handle += 1;
        entry.handle = VolumeHandle(self.last_handle);
        entry.closing = false;
        let description = entry.description.clone();
        for (user, reply) in entry.opening.drain(..) {
            let _ = reply.send(Ok((user, description.clone())));
        }
        let volume = entry.handle;
        let mut event = Some(Event::OpenVolume { volume, description });
        entry.users.iter().map(|user| (*user, event.take())).collect()
    }
}
