//! What the leader proposes by itself so that groups get all their copies back.

use cairn_proto::control::Code;
use cairn_proto::ids::*;

use crate::limits::{REPORTS_MAX, STALE_MAX, TEXT_BYTES_MAX};
use crate::state::command::{MoveMember, NoteDevices, ReplaceMember};
use crate::state::events::{Event, EventKind};
use crate::state::model::{DeviceState, Group, Move, State, Volume};
use crate::state::{Outcome, Refusal, placement};

impl State {
    /// Takes a member out that is not in sync, and puts a spare in its place. `I` and the rescue set stay as they are: who
    /// is in them may hold the only copy of something, and only a coordinator knows.
    pub(super) fn replace_member(&mut self, time_ms: u64, command: &ReplaceMember) -> Result<Outcome, Refusal> {
        let ReplaceMember {
            volume: volume_id,
            index,
            lost,
            spare,
            ..
        } = *command;
        let id = GroupId {
            volume: volume_id,
            index,
        };
        let (volume, now) = self.group_at(id, command.epoch, &command.cause)?;
        let group = self.replaced(id, volume, now, lost, spare)?;
        let name = volume.name.clone();
        let (kind, message) = match spare {
            Some(spare) => (
                EventKind::Replaced,
                format!(
                    "{} takes the place of {} in group {index} of volume `{name}`",
                    self.device_words(&spare),
                    self.device_words(&lost)
                ),
            ),
            None => (
                EventKind::Released,
                format!(
                    "the copy of group {index} of volume `{name}` on {} is not needed any more",
                    self.device_words(&lost)
                ),
            ),
        };
        let mut event = Event::new(time_ms, kind, message)
            .of_volume(volume_id, &name)
            .because(&command.cause);
        event.group = Some(index);
        self.note_device(event, lost);
        self.groups.insert(id, group.clone());
        self.releases += 1;
        Ok(Outcome::Configured(vec![(index, group, None)]))
    }

    /// The group that a proposal of the leader is about, if it is still as the leader saw it.
    fn group_at(&self, id: GroupId, epoch: Epoch, cause: &str) -> Result<(&Volume, &Group), Refusal> {
        if cause.len() > TEXT_BYTES_MAX {
            return Err(Refusal::new(
                Code::InvalidArgument,
                format!("a cause has at most {TEXT_BYTES_MAX} bytes"),
            ));
        }
        let (Some(volume), Some(now)) = (self.volumes.get(&id.volume), self.groups.get(&id)) else {
            return Err(Refusal::new(
                Code::VolumeNotFound,
                format!("there is no group {id} any more"),
            ));
        };
        if now.epoch != epoch {
            return Err(Refusal::new(
                Code::StaleEpoch,
                format!(
                    "group {id} has epoch {} by now, not {epoch}: look at it again",
                    now.epoch
                ),
            ));
        }
        Ok((volume, now))
    }

    /// The configuration that follows.
    fn replaced(
        &self,
        id: GroupId,
        volume: &Volume,
        now: &Group,
        lost: DeviceId,
        spare: Option<DeviceId>,
    ) -> Result<Group, Refusal> {
        let refuse = |why: String| Err(Refusal::new(Code::InvalidConfiguration, format!("group {id}: {why}")));
        if !now.joining.contains(&lost) && !now.stale.contains(&lost) {
            return refuse(format!(
                "{lost} is neither joining nor stale, so nobody can take its place"
            ));
        }
        let mut next = now.clone();
        next.epoch = Epoch(now.epoch.0 + 1);
        for list in [&mut next.joining, &mut next.stale, &mut next.rebuilding] {
            list.retain(|device| *device != lost);
        }
        let is_kept = now.rescue.contains(&lost);
        if is_kept {
            // Its data may be the last of an acknowledged write: when it comes back it must find itself named.
            next.stale.push(lost);
        }
        // Whoever takes the place of the one that was to take a member's place does so for that member.
        next.moving = next.moving.and_then(|moving| match moving.to == lost {
            true => spare.map(|to| Move { to, ..moving }),
            false => Some(moving),
        });
        let Some(spare) = spare else {
            let named = next.in_sync.len() + next.joining.len() + next.stale.len();
            if is_kept || named < usize::from(volume.replicas) {
                return refuse(format!("without {lost} it would have too few members: name a spare"));
            }
            return Ok(next);
        };
        self.check_spare(id, volume, now, &next, spare)?;
        next.stale.push(spare);
        next.rebuilding.push(spare);
        next.rebuilding.sort_unstable();
        Ok(next)
    }

    /// Whether a device may be filled for a group that is `now`, and will be `without` the one whose place it takes.
    fn check_spare(
        &self,
        id: GroupId,
        volume: &Volume,
        now: &Group,
        without: &Group,
        spare: DeviceId,
    ) -> Result<(), Refusal> {
        let refuse = |why: String| Err(Refusal::new(Code::InvalidConfiguration, format!("group {id}: {why}")));
        match self.devices.get(&spare) {
            Some(device) if device.state == DeviceState::Active && !device.forgot => {}
            Some(_) => return refuse(format!("{spare} can't be a spare: it has failed, or was replaced")),
            None => {
                return Err(Refusal::new(
                    Code::DeviceNotFound,
                    format!("group {id}: no device {spare} is registered, so it can't be a spare"),
                ));
            }
        }
        if now.named().any(|device| *device == spare) {
            return refuse(format!("{spare} is named already, so it can't be a spare"));
        }
        if without.stale.len() >= STALE_MAX {
            return refuse(format!("it has {STALE_MAX} stale members already"));
        }
        if !placement::is_apart(self, volume.spread, without, spare) {
            return refuse(format!(
                "{spare} stands too close to another member: the copies of the volume stand on distinct {}s",
                format!("{:?}", volume.spread).to_lowercase()
            ));
        }
        Ok(())
    }

    /// Notes that another device is to take the place of a member that is in sync. It is the holder that fills it, and that
    /// lets the one go when the other holds everything.
    pub(super) fn move_member(&mut self, time_ms: u64, command: &MoveMember) -> Result<Outcome, Refusal> {
        let MoveMember {
            volume: volume_id,
            index,
            from,
            to,
            ..
        } = *command;
        let id = GroupId {
            volume: volume_id,
            index,
        };
        let (volume, now) = self.group_at(id, command.epoch, &command.cause)?;
        let refuse = |why: &str| Err(Refusal::new(Code::InvalidConfiguration, format!("group {id}: {why}")));
        if !now.in_sync.contains(&from) {
            return refuse("only a member in sync can give its place to another");
        }
        if now.in_sync.len() < usize::from(volume.replicas) || now.moving.is_some() {
            return refuse("it lacks a copy, or one is being moved already");
        }
        let mut next = now.clone();
        next.in_sync.retain(|device| *device != from);
        self.check_spare(id, volume, now, &next, to)?;
        next.in_sync = now.in_sync.clone();
        next.epoch = Epoch(now.epoch.0 + 1);
        next.stale.push(to);
        next.rebuilding.push(to);
        next.rebuilding.sort_unstable();
        next.moving = Some(Move { from, to });
        let name = volume.name.clone();
        let message = format!(
            "the copy of group {index} of volume `{name}` on {} moves to {}",
            self.device_words(&from),
            self.device_words(&to)
        );
        let event = Event::new(time_ms, EventKind::Moving, message);
        let mut event = event.of_volume(volume_id, &name).because(&command.cause);
        event.group = Some(index);
        self.note_device(event, to);
        self.groups.insert(id, next.clone());
        Ok(Outcome::Configured(vec![(index, next, None)]))
    }

    /// Who has fallen silent, and who is back.
    pub(super) fn note_devices(&mut self, time_ms: u64, command: &NoteDevices) -> Result<Outcome, Refusal> {
        let is_long = |cause: &String| cause.len() > TEXT_BYTES_MAX;
        if command.devices.len() > REPORTS_MAX || command.devices.iter().any(|note| is_long(&note.cause)) {
            return Err(Refusal::new(
                Code::InvalidArgument,
                format!("at most {REPORTS_MAX} devices at a time, with causes of at most {TEXT_BYTES_MAX} bytes"),
            ));
        }
        for note in &command.devices {
            let Some(device) = self.devices.get_mut(&note.id) else {
                continue;
            };
            if device.silent == note.silent {
                continue;
            }
            device.silent = note.silent;
            let words = self.device_words(&note.id);
            let (kind, message) = match note.silent {
                true => (EventKind::DeviceSilent, format!("{words} is silent")),
                false => (EventKind::DeviceBack, format!("{words} is back")),
            };
            let event = Event::new(time_ms, kind, message).because(&note.cause);
            self.note_device(event, note.id);
        }
        Ok(Outcome::Done)
    }
}
