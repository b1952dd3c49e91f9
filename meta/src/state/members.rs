//! The metadata servers.

use cairn_proto::control::Code;

use crate::limits::META_MEMBERS_MAX;
use crate::state::command::{AddMember, RemoveMember, UpdateMember};
use crate::state::devices::is_address;
use crate::state::events::{Event, EventKind};
use crate::state::model::{Member, State};
use crate::state::{Outcome, Refusal};

impl State {
    /// Whether the member may be added; what [`Self::apply`] checks again.
    ///
    /// # Errors
    /// It may not.
    pub fn check_add_member(&self, command: &AddMember) -> Result<(), Refusal> {
        let refuse = |why: String| Err(Refusal::new(Code::InvalidMember, why));
        if !is_address(&command.address) {
            return refuse(format!(
                "`{}` is not an address: write host:port",
                command.address.escape_debug()
            ));
        }
        if let Some(known) = self.members.get(&command.id) {
            // The same again, after a lost answer.
            if known.address == command.address && known.directory == command.directory {
                return Ok(());
            }
            return refuse(format!(
                "metadata server {} is {} already: choose an id above {}",
                command.id, known.address, self.last_member
            ));
        }
        if command.id <= self.last_member {
            return refuse(format!(
                "id {} was used before, and a member that was removed can't come back: choose an id above {}",
                command.id, self.last_member
            ));
        }
        if self.members.len() >= META_MEMBERS_MAX {
            return refuse(format!(
                "there are {META_MEMBERS_MAX} metadata servers, and that is the limit"
            ));
        }
        Ok(())
    }

    pub(super) fn add_member(&mut self, time_ms: u64, command: &AddMember) -> Result<Outcome, Refusal> {
        self.check_add_member(command)?;
        let member = Member {
            address: command.address.clone(),
            directory: command.directory,
        };
        let (id, address) = (command.id, &command.address);
        if self.members.insert(id, member).is_none() {
            let message = format!("metadata server {id} at {address} was added");
            self.note(Event::new(time_ms, EventKind::MemberAdded, message));
        }
        self.last_member = self.last_member.max(command.id);
        Ok(Outcome::Done)
    }

    /// Whether the member may be removed; what [`Self::apply`] checks again.
    ///
    /// # Errors
    /// It may not.
    pub fn check_remove_member(&self, command: &RemoveMember) -> Result<(), Refusal> {
        let id = command.id;
        if id == 0 || id > self.last_member {
            return Err(Refusal::new(
                Code::InvalidMember,
                format!("there never was a metadata server {id}"),
            ));
        }
        if self.members.len() == 1 && self.members.contains_key(&id) {
            return Err(Refusal::new(
                Code::InvalidMember,
                format!("metadata server {id} is the only one: add another one before it is removed"),
            ));
        }
        Ok(())
    }

    pub(super) fn remove_member(&mut self, time_ms: u64, command: &RemoveMember) -> Result<Outcome, Refusal> {
        self.check_remove_member(command)?;
        if let Some(member) = self.members.remove(&command.id) {
            let message = format!("metadata server {} at {} was removed", command.id, member.address);
            self.note(Event::new(time_ms, EventKind::MemberRemoved, message));
        }
        Ok(Outcome::Done)
    }

    pub(super) fn update_member(&mut self, command: &UpdateMember) -> Result<Outcome, Refusal> {
        let Some(member) = self.members.get_mut(&command.id) else {
            return Err(Refusal::new(
                Code::InvalidMember,
                format!("there is no metadata server {}", command.id),
            ));
        };
        if member.directory != 0 && member.directory != command.directory {
            return Err(Refusal::new(
                Code::InvalidMember,
                format!(
                    "metadata server {} has lost its directory: remove it, and add a new one with another id",
                    command.id
                ),
            ));
        }
        if is_address(&command.address) {
            member.address = command.address.clone();
        }
        member.directory = command.directory;
        Ok(Outcome::Done)
    }
}
