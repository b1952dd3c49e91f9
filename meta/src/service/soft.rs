//! What the leader knows and need not remember: who was heard of when. A new leader begins with nothing, and gives
//! everybody time to be heard before it holds anybody for dead.

use std::collections::BTreeMap;
use std::time::Duration;

use cairn_proto::control::Code;
use cairn_proto::control::v1::{DeviceScrub, WriteCache};
use cairn_proto::ids::{DeviceId, NodeId};
use cairn_proto::time::Time;

use crate::heal::{HealSettings, View};
use crate::limits::{MEMBER_SILENCE_MS, RELEASE_INTERVAL_MS, REPORT_INTERVAL_MS, REPORTS_MAX};
use crate::state::Refusal;
use crate::state::command::DeviceReport;
use crate::state::model::{DeviceState, State};

/// What was heard of a device.
#[derive(Clone, Debug)]
struct SoftDevice {
    report: DeviceReport,
    write_cache: WriteCache,
    scrub: Option<DeviceScrub>,
    /// What was when its inventory was last looked at completely, and when that was.
    inventory: Option<(Looked, Time)>,
    /// The page of an inventory that is expected next, and what was at its first.
    pages: (u32, Looked),
    written: Time,
}

/// What makes it worth to look at an inventory: if any of it has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Looked {
    /// Of the groups that the device holds.
    pub(super) digest: u64,
    /// How many volumes were ever deleted.
    pub(super) deletions: u64,
    /// How often copies may have become superfluous.
    pub(super) releases: u64,
}

impl Looked {
    /// As it is now.
    pub(super) fn at(digest: u64, state: &State) -> Looked {
        Looked {
            digest,
            deletions: state.deletions(),
            releases: state.releases(),
        }
    }
}

/// What was heard of a metadata server.
#[derive(Clone, Debug)]
pub(super) struct SeenMember {
    pub(super) address: String,
    pub(super) directory: u64,
    pub(super) heard: Time,
}

#[derive(Debug, Default)]
pub(super) struct Soft {
    /// What healing goes by.
    pub(super) heal: View,
    /// What an operator has decided about it.
    pub(super) heal_settings: HealSettings,
    devices: BTreeMap<DeviceId, SoftDevice>,
    /// Devices that an operator wants to be verified, with the pass that they were at, until they begin.
    wanted_scrubs: BTreeMap<DeviceId, u64>,
    pub(super) members: BTreeMap<u64, SeenMember>,
}

impl Soft {
    /// This member has just become the leader, or has ceased to be.
    pub(super) fn reset(&mut self, now: Time) {
        self.heal.reset(now);
        self.devices.clear();
        self.wanted_scrubs.clear();
    }

    pub(super) fn heard_node(&mut self, node: NodeId, now: Time) {
        self.heal.heard_node(node, now);
    }

    /// A node said that it serves the device.
    pub(super) fn heard_served(&mut self, device: DeviceId, now: Time) {
        self.heal.heard_device(device, now);
    }

    /// Whether the device seems to be served by somebody.
    pub(super) fn is_served(&self, device: &DeviceId, now: Time) -> bool {
        self.heal.is_served(device, now)
    }

    /// Whether the node seems alive.
    pub(super) fn is_alive(&self, node: NodeId, now: Time) -> bool {
        self.heal.is_alive(node, now)
    }

    /// Milliseconds since the node was heard of.
    pub(super) fn heard_ms_ago(&self, node: NodeId, now: Time) -> Option<u64> {
        self.heal.heard_ms_ago(node, now)
    }

    pub(super) fn is_member_alive(&self, id: u64, now: Time) -> bool {
        let heard = self.members.get(&id).map(|seen| seen.heard);
        heard.is_some_and(|heard| now.saturating_since(heard) < Duration::from_millis(MEMBER_SILENCE_MS))
    }

    /// Notes what a device says of itself. Whether its inventory should be looked at.
    pub(super) fn heard_device(&mut self, report: DeviceReport, now_is: Looked, now: Time) -> bool {
        let device = self.devices.entry(report.id).or_insert_with(|| SoftDevice {
            report: report.clone(),
            write_cache: WriteCache::Unspecified,
            scrub: None,
            inventory: None,
            pages: (0, now_is),
            written: Time::ZERO,
        });
        device.report = report;
        let Some((was, at)) = device.inventory else {
            return true;
        };
        // What nobody needs any more takes space, and nothing else: there is no hurry.
        let is_old = now.saturating_since(at) >= Duration::from_millis(RELEASE_INTERVAL_MS);
        (was.digest, was.deletions) != (now_is.digest, now_is.deletions) || (was != now_is && is_old)
    }

    /// Notes what a device that was heard of says about its write cache.
    pub(super) fn heard_write_cache(&mut self, device: &DeviceId, write_cache: WriteCache) {
        if let Some(device) = self.devices.get_mut(device) {
            device.write_cache = write_cache;
        }
    }

    /// An operator wants the device to be verified.
    pub(super) fn want_scrub(&mut self, device: DeviceId) {
        let pass = self.scrub(&device).map_or(0, |scrub| scrub.pass);
        self.wanted_scrubs.insert(device, pass);
    }

    /// Notes how the verification of a device that was heard of is. Whether it should be told to begin.
    pub(super) fn heard_scrub(&mut self, device: &DeviceId, scrub: Option<DeviceScrub>) -> bool {
        if let Some(known) = self.devices.get_mut(device) {
            known.scrub = scrub;
        }
        let Some(pass) = self.wanted_scrubs.get(device) else {
            return false;
        };
        let has_begun = scrub.is_some_and(|scrub| scrub.under_way || scrub.pass > *pass);
        if has_begun {
            self.wanted_scrubs.remove(device);
        }
        !has_begun
    }

    /// How the verification of a device is, as it has said.
    pub(super) fn scrub(&self, device: &DeviceId) -> Option<DeviceScrub> {
        self.devices.get(device)?.scrub
    }

    /// What a device has said about its write cache.
    pub(super) fn write_cache(&self, device: &DeviceId) -> WriteCache {
        self.devices
            .get(device)
            .map_or(WriteCache::Unspecified, |device| device.write_cache)
    }

    /// Notes a page of an inventory. Pages out of order are answered all the same, but do not complete it.
    pub(super) fn heard_inventory(&mut self, device: DeviceId, page: u32, last: bool, now_is: Looked, now: Time) {
        let Some(device) = self.devices.get_mut(&device) else {
            return;
        };
        if page == 0 {
            device.pages = (0, now_is);
        }
        if device.pages.0 != page {
            return;
        }
        device.pages.0 += 1;
        if last {
            let digest = now_is.digest;
            device.inventory = Some((
                Looked {
                    digest,
                    ..device.pages.1
                },
                now,
            ));
        }
    }

    /// The freshest report of a device.
    pub(super) fn report(&self, device: &DeviceId) -> Option<&DeviceReport> {
        self.devices.get(device).map(|device| &device.report)
    }

    /// The same, once this member knows of each device whether it is there. A new leader takes all for served for a moment.
    ///
    /// # Errors
    /// It does not know yet.
    pub(super) fn known_silent(&self, state: &State, now: Time) -> Result<Vec<DeviceId>, Refusal> {
        let mut active = state
            .devices()
            .iter()
            .filter(|(_, device)| device.state == DeviceState::Active);
        if active.any(|(id, _)| self.heal.is_unknown(id, now)) {
            return Err(Refusal::new(
                Code::Busy,
                "a new leader is just finding out which devices are there: try again",
            ));
        }
        Ok(self.silent(state, now))
    }

    /// Devices on which nothing new should be placed.
    pub(super) fn silent(&self, state: &State, now: Time) -> Vec<DeviceId> {
        let devices = state
            .devices()
            .iter()
            .filter(|(_, device)| device.state == DeviceState::Active);
        let silent = devices.filter(|(id, _)| {
            let failed = self.report(id).is_some_and(|report| report.failed);
            failed || !self.is_served(id, now)
        });
        silent.map(|(id, _)| *id).collect()
    }

    /// What should be written to the log now: at once when a device fails or recovers, now and then when its usage or
    /// commit sequence has moved.
    pub(super) fn due_reports(&mut self, state: &State, now: Time) -> Vec<DeviceReport> {
        let mut due = Vec::new();
        for (id, soft) in &mut self.devices {
            let Some(device) = state.devices().get(id) else {
                continue;
            };
            let report = &soft.report;
            let failed = device.state == DeviceState::Failed;
            let in_use = matches!(device.state, DeviceState::Active | DeviceState::Failed);
            let urgent = in_use && failed != report.failed;
            let moved = device.used_bytes != report.used_bytes
                || device.capacity_bytes != report.capacity_bytes
                || device.commit_seq < report.commit_seq
                || (!device.forgot && device.trouble != report.trouble);
            let waited = now.saturating_since(soft.written) >= Duration::from_millis(REPORT_INTERVAL_MS);
            if (urgent || (moved && waited)) && due.len() < REPORTS_MAX {
                soft.written = now;
                due.push(report.clone());
            }
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::NODE_SILENCE_MS;
    use cairn_proto::ids::CommitSeq;

    fn at(ms: u64) -> Time {
        Time::ZERO + Duration::from_millis(ms)
    }

    fn report() -> DeviceReport {
        DeviceReport {
            id: DeviceId::default(),
            capacity_bytes: 10,
            used_bytes: 1,
            commit_seq: CommitSeq(1),
            failed: false,
            trouble: String::new(),
        }
    }

    #[test]
    fn a_new_leader_gives_everybody_time_to_be_heard() {
        let mut soft = Soft::default();
        soft.reset(at(1000));
        assert!(soft.is_alive(NodeId(1), at(2000)));
        assert!(!soft.is_alive(NodeId(1), at(1000 + NODE_SILENCE_MS)));
        soft.heard_node(NodeId(1), at(9000));
        assert!(soft.is_alive(NodeId(1), at(9001)));
        assert_eq!(soft.heard_ms_ago(NodeId(1), at(9001)), Some(1));
        let device = DeviceId::default();
        assert!(soft.is_served(&device, at(2000)) && !soft.is_served(&device, at(9001)));
        soft.heard_served(device, at(9000));
        assert!(soft.is_served(&device, at(9001)));
    }

    #[test]
    fn a_device_is_told_to_verify_until_it_does() {
        let (mut soft, id) = (Soft::default(), DeviceId::default());
        soft.heard_device(report(), Looked::default(), at(1));
        let scrub = |pass, under_way| DeviceScrub {
            pass,
            under_way,
            ..DeviceScrub::default()
        };
        assert!(!soft.heard_scrub(&id, Some(scrub(3, false))), "nobody wants it");
        soft.want_scrub(id);
        assert!(soft.heard_scrub(&id, Some(scrub(3, false))));
        assert!(
            soft.heard_scrub(&id, Some(scrub(3, false))),
            "the answer may have been lost"
        );
        assert!(!soft.heard_scrub(&id, Some(scrub(4, true))));
        soft.want_scrub(id);
        // So short that it was over before the next heartbeat.
        assert!(!soft.heard_scrub(&id, Some(scrub(5, false))));
        assert!(!soft.heard_scrub(&id, Some(scrub(5, false))));
    }

    #[test]
    fn an_inventory_is_asked_for_again_when_it_or_what_is_needed_of_it_has_changed() {
        let (mut soft, id) = (Soft::default(), DeviceId::default());
        let looked = |digest, deletions, releases| Looked {
            digest,
            deletions,
            releases,
        };
        let first = looked(7, 0, 0);
        assert!(soft.heard_device(report(), first, at(1)));
        soft.heard_inventory(id, 0, false, first, at(2));
        assert!(soft.heard_device(report(), first, at(3)), "only a page of it was seen");
        soft.heard_inventory(id, 1, true, first, at(4));
        assert!(!soft.heard_device(report(), first, at(5)));
        assert!(
            soft.heard_device(report(), looked(7, 1, 0), at(6)),
            "a volume was deleted"
        );
        assert!(
            soft.heard_device(report(), looked(8, 0, 0), at(7)),
            "the device holds something else"
        );
        assert!(
            !soft.heard_device(report(), looked(7, 0, 1), at(8)),
            "what is superfluous can wait"
        );
        assert!(soft.heard_device(report(), looked(7, 0, 1), at(4 + RELEASE_INTERVAL_MS)));
        // A deletion between two pages: the first page was answered without it.
        soft.heard_inventory(id, 0, false, looked(7, 1, 0), at(9));
        soft.heard_inventory(id, 1, true, looked(7, 2, 0), at(10));
        assert!(soft.heard_device(report(), looked(7, 2, 0), at(11)));
    }
}
