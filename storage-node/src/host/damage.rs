//! Who holds volumes here, and telling them what the device can't read any more.

use std::collections::{BTreeMap, BTreeSet};

use cairn_proto::frame::Class;
use cairn_proto::ids::{Correlation, VolumeId};
use cairn_proto::limits::DAMAGED_RUNS_MAX;
use cairn_proto::message::{Damaged, Envelope, Holder, Message};

use super::limits::{DAMAGE_INTERVAL, DAMAGED_VOLUMES_MAX, HELD_MAX};
use super::{ConnId, DeviceHost, HostAction, ReplicaStore};

impl<S: ReplicaStore> DeviceHost<S> {
    /// The attachments that are served now: their holder is connected, has shown the capability for the highest
    /// generation that was seen, and has not released it. A bounded number.
    pub(super) fn held(&self) -> Vec<Holder> {
        let mut held: BTreeSet<Holder> = BTreeSet::new();
        for connection in self.guests() {
            let live = connection.1.holds();
            held.extend(live.filter(|holder| self.rules.seen(holder.volume) == holder.generation));
            if held.len() >= HELD_MAX {
                break;
            }
        }
        held.into_iter().take(HELD_MAX).collect()
    }

    /// Volumes with blocks that are known to be damaged here: a bounded number.
    pub(super) fn damaged_volumes(&self) -> Vec<VolumeId> {
        let volumes: BTreeSet<VolumeId> = self.store.damage().map(|(group, ..)| group.volume).collect();
        volumes.into_iter().take(DAMAGED_VOLUMES_MAX).collect()
    }

    fn guests(&self) -> impl Iterator<Item = (&ConnId, &super::Connection)> {
        self.connections.iter().filter(|(_, c)| c.is_guest())
    }

    /// When damage is to be told again, if there is any and somebody who might want to know.
    pub(super) fn damage_wake(&self) -> Option<cairn_proto::time::Time> {
        (self.store.damaged_blocks() > 0 && !self.connections.is_empty()).then_some(self.next_damage)
    }

    /// Tells every holder of a volume which of its blocks are damaged here. What is known is bounded by the store, so all
    /// of it is told each time.
    pub(super) fn tell_damage(&mut self) {
        self.next_damage = self.now + DAMAGE_INTERVAL;
        let mut holders: BTreeMap<VolumeId, (ConnId, Holder)> = BTreeMap::new();
        for (conn, connection) in self.guests().filter(|(_, c)| !c.congested) {
            for holder in connection.holds().filter(|holder| self.rules.admit(*holder).is_ok()) {
                // Who has connected twice listens to the newer connection.
                holders.insert(holder.volume, (*conn, holder));
            }
        }
        let mut told: Vec<(ConnId, Damaged)> = Vec::new();
        for (group, layer, range) in self.store.damage() {
            let Some((conn, holder)) = holders.get(&group.volume) else {
                continue;
            };
            let open = told.last_mut().filter(|(to, damaged)| {
                (*to, damaged.holder.group(damaged.group)) == (*conn, group) && damaged.runs.len() < DAMAGED_RUNS_MAX
            });
            match open {
                Some((_, damaged)) => damaged.runs.push((layer, range)),
                None => {
                    let (holder, runs) = (*holder, vec![(layer, range)]);
                    let group = group.index;
                    told.push((*conn, Damaged { holder, group, runs }));
                }
            }
        }
        for (conn, damaged) in told {
            let envelope = Envelope {
                class: Class::Repair,
                ..Envelope::new(Correlation(0), Message::Damaged(damaged))
            };
            self.actions.push_back(HostAction::Send { conn, envelope });
        }
    }
}
