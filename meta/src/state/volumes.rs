//! Volumes and grants.

use cairn_proto::checksum::ChecksumAlgorithm;
use cairn_proto::control::Code;
use cairn_proto::ids::*;
use cairn_proto::limits::{
    BLOCK_BYTES, BYTES_PER_GROUP, GROUPS_PER_VOLUME_MAX, REPLICAS_MAX, VOLUME_BYTES_MAX, VOLUME_NAME_BYTES_MAX,
};
use cairn_proto::units::ByteSize;

use crate::limits::{TEXT_BYTES_MAX, VOLUMES_MAX};
use crate::state::command::{Attach, CreateVolume, DeleteVolume, Detach, GrowVolume, Selector};
use crate::state::events::{Event, EventKind};
use crate::state::model::{Group, Holder, State, Volume};
use crate::state::{Outcome, Refusal, is_name, placement};

/// How many groups a volume of this size gets: one for each [`BYTES_PER_GROUP`], at least one.
pub(crate) fn group_count(size_bytes: u64) -> GroupCount {
    let count = (size_bytes / BYTES_PER_GROUP).clamp(1, u64::from(GROUPS_PER_VOLUME_MAX));
    GroupCount::new(count as u8).expect("it was clamped to what is allowed")
}

fn check_size(size_bytes: u64) -> Result<(), Refusal> {
    let refuse = |why: &str| {
        let size = ByteSize(size_bytes);
        Err(Refusal::new(
            Code::InvalidSize,
            format!("a volume can't have {size_bytes} bytes ({size}): {why}"),
        ))
    };
    if size_bytes == 0 {
        return refuse("give a size above zero");
    }
    if size_bytes > VOLUME_BYTES_MAX {
        return refuse("the largest volume has 256 TiB");
    }
    if !size_bytes.is_multiple_of(BLOCK_BYTES as u64) {
        return refuse("give a multiple of 4096 bytes");
    }
    Ok(())
}

impl State {
    /// The volume that is meant.
    ///
    /// # Errors
    /// There is none.
    pub fn find(&self, selector: &Selector) -> Result<(VolumeId, &Volume), Refusal> {
        let id = match selector {
            Selector::Id(id) => Some(*id),
            Selector::Name(name) => self.names.get(name).copied(),
        };
        let found = id.and_then(|id| self.volumes.get_key_value(&id));
        found.map(|(id, volume)| (*id, volume)).ok_or_else(|| {
            Refusal::new(
                Code::VolumeNotFound,
                format!("there is no volume {selector}: see which there are with `cairn volume list`"),
            )
        })
    }

    fn find_mut(&mut self, selector: &Selector) -> Result<(VolumeId, &mut Volume), Refusal> {
        let id = self.find(selector)?.0;
        let volume = self.volumes.get_mut(&id).expect("it was just found");
        Ok((id, volume))
    }

    pub(super) fn create_volume(&mut self, time_ms: u64, command: &CreateVolume) -> Result<Outcome, Refusal> {
        let name = &command.name;
        if !is_name(name, VOLUME_NAME_BYTES_MAX) {
            let name: String = name.chars().take(40).collect();
            return Err(Refusal::new(
                Code::InvalidName,
                format!(
                    "`{}` can't name a volume: use 1 to {VOLUME_NAME_BYTES_MAX} letters, digits, `-`, `_`, `.`, and \
                     begin with a letter or a digit",
                    name.escape_debug()
                ),
            ));
        }
        check_size(command.size_bytes)?;
        check_copies(command.replicas, command.write_quorum)?;
        if let Some(id) = self.names.get(name) {
            return Err(Refusal::new(
                Code::NameTaken,
                format!("there is a volume `{name}` already (id {id}): choose another name, or delete that one first"),
            ));
        }
        if self.volumes.len() >= VOLUMES_MAX {
            return Err(Refusal::new(
                Code::TooMany,
                format!("the cluster has {VOLUMES_MAX} volumes, and that is the limit: delete some first"),
            ));
        }
        let group_count = group_count(command.size_bytes);
        let sets = placement::place(self, command, group_count)?;
        self.last_volume += 1;
        let id = VolumeId(self.last_volume);
        for (in_sync, index) in sets.into_iter().zip(0..) {
            let group = Group {
                epoch: Epoch(1),
                in_sync,
                joining: vec![],
                stale: vec![],
                rescue: vec![],
                rebuilding: vec![],
                moving: None,
            };
            self.groups.insert(
                GroupId {
                    volume: id,
                    index: GroupIndex(index),
                },
                group,
            );
        }
        let volume = Volume {
            name: name.clone(),
            size_bytes: command.size_bytes,
            group_count,
            replicas: command.replicas,
            write_quorum: command.write_quorum,
            min_copies_one: command.min_copies_one,
            checksum: ChecksumAlgorithm::Crc32,
            spread: command.spread,
            layer: Layer(0),
            generation: Generation::NONE,
            holder: None,
            created_ms: time_ms,
            settled: true,
        };
        self.names.insert(name.clone(), id);
        self.volumes.insert(id, volume.clone());
        let message = format!(
            "volume `{name}` was created ({}, {} copies)",
            ByteSize(command.size_bytes),
            command.replicas
        );
        self.note(Event::new(time_ms, EventKind::VolumeCreated, message).of_volume(id, name));
        Ok(Outcome::Volume(id, volume))
    }

    pub(super) fn grow_volume(&mut self, time_ms: u64, command: &GrowVolume) -> Result<Outcome, Refusal> {
        check_size(command.size_bytes)?;
        let (id, volume) = self.find_mut(&command.volume)?;
        if command.size_bytes < volume.size_bytes {
            return Err(Refusal::new(
                Code::InvalidSize,
                format!(
                    "volume `{}` has {} and can't become smaller ({}): volumes only grow",
                    volume.name,
                    ByteSize(volume.size_bytes),
                    ByteSize(command.size_bytes)
                ),
            ));
        }
        let before = std::mem::replace(&mut volume.size_bytes, command.size_bytes);
        let volume = volume.clone();
        if before != command.size_bytes {
            let (name, before, after) = (&volume.name, ByteSize(before), ByteSize(command.size_bytes));
            let message = format!("volume `{name}` has grown from {before} to {after}");
            self.note(Event::new(time_ms, EventKind::VolumeGrown, message).of_volume(id, name));
        }
        Ok(Outcome::Volume(id, volume))
    }

    pub(super) fn delete_volume(&mut self, time_ms: u64, command: &DeleteVolume) -> Result<Outcome, Refusal> {
        let (id, volume) = self.find(&command.volume)?;
        // A caretaker gives way to an operator as it does to a guest: it learns that from the answer to its next report.
        let in_the_way = |holder: &&Holder| !command.force && !holder.caretaker;
        if let Some(holder) = volume.holder.as_ref().filter(in_the_way) {
            return Err(Refusal::new(
                Code::VolumeAttached,
                format!(
                    "volume `{}` is in use by {}: detach it there first, or force the deletion",
                    volume.name,
                    say(holder)
                ),
            ));
        }
        let groups: Vec<GroupIndex> = self.groups_of(id).map(|(index, _)| index).collect();
        for index in groups {
            self.groups.remove(&GroupId { volume: id, index });
        }
        let volume = self.volumes.remove(&id).expect("it was just found");
        self.names.remove(&volume.name);
        self.deletions += 1;
        let message = format!("volume `{}` was deleted", volume.name);
        let cause = volume
            .holder
            .as_ref()
            .filter(|holder| !holder.caretaker)
            .map_or(String::new(), |holder| format!("by force: {} held it", say(holder)));
        let event = Event::new(time_ms, EventKind::VolumeDeleted, message).because(cause);
        self.note(event.of_volume(id, &volume.name));
        Ok(Outcome::Volume(id, volume))
    }

    pub(super) fn attach(&mut self, time_ms: u64, command: &Attach) -> Result<Outcome, Refusal> {
        if command.address.len() > TEXT_BYTES_MAX {
            return Err(Refusal::new(
                Code::InvalidArgument,
                format!("a client may say at most {TEXT_BYTES_MAX} bytes of itself"),
            ));
        }
        let (id, volume) = self.find_mut(&command.volume)?;
        if command.after.is_some_and(|after| after != volume.generation) {
            return Err(Refusal::new(
                Code::StaleGeneration,
                format!(
                    "volume `{}` is at generation {} by now: look at it again before attaching it",
                    volume.name, volume.generation
                ),
            ));
        }
        let in_the_way = |holder: &&Holder| {
            if command.caretaker {
                // Whatever it is called, and however hard it asks: a living guest is never fenced by a caretaker.
                !(holder.caretaker && holder.client == command.client) && command.displace != Some(holder.generation)
            } else {
                holder.client != command.client && !holder.caretaker && !command.force
            }
        };
        if let Some(holder) = volume.holder.as_ref().filter(in_the_way) {
            return Err(Refusal::new(
                Code::VolumeAttached,
                format!(
                    "volume `{}` is in use by {}: detach it there first, or force the attachment, which cuts the other \
                     one off",
                    volume.name,
                    say(holder)
                ),
            ));
        }
        let generation = volume.generation.next().ok_or_else(|| {
            Refusal::new(
                Code::GenerationsExhausted,
                format!(
                    "volume `{}` was attached {} times, and that is the limit",
                    volume.name,
                    Generation::MAX
                ),
            )
        })?;
        volume.generation = generation;
        volume.settled = false;
        let former = volume.holder.replace(Holder {
            client: command.client,
            address: command.address.clone(),
            generation,
            since_ms: time_ms,
            caretaker: command.caretaker,
        });
        let volume = volume.clone();
        self.note(attached(time_ms, command, former.as_ref(), &volume).of_volume(id, &volume.name));
        let groups = self.groups_of(id).map(|(_, group)| group.clone()).collect();
        Ok(Outcome::Attached { id, volume, groups })
    }

    pub(super) fn detach(&mut self, time_ms: u64, command: &Detach) -> Result<Outcome, Refusal> {
        let (id, volume) = self.find_mut(&command.volume)?;
        if command.generation == Generation::NONE || command.generation > volume.generation {
            return Err(Refusal::new(
                Code::InvalidArgument,
                format!(
                    "generation {} of volume `{}` was never granted",
                    command.generation, volume.name
                ),
            ));
        }
        // An older grant has ended already: there is nothing left to give back.
        let is_last = command.generation == volume.generation;
        if let Some(holder) = volume.holder.take_if(|_| is_last) {
            volume.settled = command.settled;
            let name = volume.name.clone();
            let (kind, message) = match holder.caretaker {
                true => (
                    EventKind::CaretakerDone,
                    format!("{} has taken care of volume `{name}`", say(&holder)),
                ),
                false => (
                    EventKind::Detached,
                    format!("{} has given volume `{name}` back", say(&holder)),
                ),
            };
            let cause = match command.settled {
                true => "",
                false => "some copies lack what was written last: a node makes them equal",
            };
            self.note(Event::new(time_ms, kind, message).of_volume(id, &name).because(cause));
        }
        Ok(Outcome::Done)
    }
}

fn check_copies(replicas: u8, write_quorum: u8) -> Result<(), Refusal> {
    let refuse = |why: String| Err(Refusal::new(Code::InvalidArgument, why));
    if replicas == 0 || usize::from(replicas) > REPLICAS_MAX {
        return refuse(format!("a volume has 1 to {REPLICAS_MAX} copies, not {replicas}"));
    }
    if write_quorum > replicas || u16::from(write_quorum) * 2 <= u16::from(replicas) {
        return refuse(format!(
            "a write quorum of {write_quorum} does not go with {replicas} copies: it must be more than half of them"
        ));
    }
    Ok(())
}

/// What is written down of a grant.
fn attached(time_ms: u64, command: &Attach, former: Option<&Holder>, volume: &Volume) -> Event {
    let name = &volume.name;
    let holder = volume.holder.as_ref().map(say).unwrap_or_default();
    let (kind, message) = match former.filter(|former| former.client != command.client) {
        _ if command.caretaker => (
            EventKind::CaretakerBegan,
            format!("{holder} takes care of volume `{name}`"),
        ),
        Some(former) => (
            EventKind::TakenOver,
            format!("{holder} has taken volume `{name}` over from {}", say(former)),
        ),
        None => (EventKind::Attached, format!("{holder} holds volume `{name}`")),
    };
    let cause = match former {
        Some(former) if former.client == command.client => "the same client takes a new grant",
        Some(former) if command.caretaker && former.caretaker => "the caretaker before it has fallen silent",
        Some(_) if command.caretaker => "nothing was heard of the client that held it",
        Some(former) if former.caretaker => "a caretaker gives way to a client",
        Some(_) => "by force",
        None if command.caretaker => "nobody holds it, and its copies need care",
        None => "",
    };
    Event::new(time_ms, kind, message).because(cause)
}

fn say(holder: &Holder) -> String {
    let address = if holder.address.is_empty() {
        "a client"
    } else {
        &holder.address
    };
    format!("{address} (client {}, generation {})", holder.client, holder.generation)
}
