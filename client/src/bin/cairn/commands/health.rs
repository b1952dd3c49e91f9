//! How volumes are, and what is being repaired: parts of `cairn status` and `cairn volume show`.

use cairn_proto::control::v1;
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::units::ByteSize;
use serde::Serialize;

use super::{ago, device_id};
use crate::output::{Table, count};

/// How a volume is, for programs.
#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
pub(crate) struct HealthRecord {
    pub(crate) volume_id: u64,
    pub(crate) volume: String,
    pub(crate) groups_whole: u32,
    pub(crate) groups_degraded: u32,
    pub(crate) groups_below_quorum: u32,
    pub(crate) damaged: bool,
    pub(crate) caretaker: bool,
    pub(crate) damaged_blocks: u64,
    pub(crate) repaired_blocks: u64,
    pub(crate) groups: Vec<GroupRecord>,
    pub(crate) repairs: Vec<RepairRecord>,
}

/// How a group is, for programs.
#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
pub(crate) struct GroupRecord {
    pub(crate) index: u32,
    pub(crate) copies_wanted: u32,
    pub(crate) copies_in_sync: u32,
    pub(crate) copies_reachable: u32,
    pub(crate) joining: u32,
    pub(crate) stale: u32,
    pub(crate) below_quorum: bool,
    /// What its holder says; nothing while nobody holds it.
    pub(crate) phase: Option<&'static str>,
}

/// A copy that is not as it should be, for programs.
#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
pub(crate) struct RepairRecord {
    pub(crate) group: u32,
    pub(crate) device: String,
    pub(crate) incarnation: String,
    pub(crate) node_id: u64,
    pub(crate) node: String,
    pub(crate) state: &'static str,
    pub(crate) rebuild: bool,
    pub(crate) copied_bytes: u64,
    pub(crate) lacking_bytes: u64,
    pub(crate) bytes_per_second: Option<u64>,
    pub(crate) remaining_ms: Option<u64>,
}

impl From<v1::VolumeHealth> for HealthRecord {
    fn from(health: v1::VolumeHealth) -> HealthRecord {
        HealthRecord {
            volume_id: health.volume_id,
            volume: health.volume,
            groups_whole: health.groups_whole,
            groups_degraded: health.groups_degraded,
            groups_below_quorum: health.groups_below_quorum,
            damaged: health.damaged,
            caretaker: health.caretaker,
            damaged_blocks: health.damaged_blocks,
            repaired_blocks: health.repaired_blocks,
            groups: health.groups.iter().map(GroupRecord::from).collect(),
            repairs: health.repairs.iter().map(RepairRecord::from).collect(),
        }
    }
}

impl From<&v1::GroupHealth> for GroupRecord {
    fn from(group: &v1::GroupHealth) -> GroupRecord {
        GroupRecord {
            index: group.index,
            copies_wanted: group.copies_wanted,
            copies_in_sync: group.copies_in_sync,
            copies_reachable: group.copies_reachable,
            joining: group.joining,
            stale: group.stale,
            below_quorum: group.below_quorum,
            phase: match group.phase() {
                v1::GroupPhase::Unspecified => None,
                v1::GroupPhase::Sealing => Some("sealing"),
                v1::GroupPhase::Waiting => Some("waiting"),
                v1::GroupPhase::Reconciling => Some("reconciling"),
                v1::GroupPhase::Serving => Some("serving"),
                v1::GroupPhase::Fenced => Some("fenced"),
            },
        }
    }
}

impl From<&v1::Repair> for RepairRecord {
    fn from(repair: &v1::Repair) -> RepairRecord {
        let id = device_id(repair.device.as_ref());
        let bytes = |blocks: u64| blocks.saturating_mul(BLOCK_BYTES as u64);
        RepairRecord {
            group: repair.group,
            device: id.uuid.to_string(),
            incarnation: id.incarnation.to_string(),
            node_id: repair.node_id,
            node: repair.node.clone(),
            state: match repair.state() {
                v1::RepairState::Unspecified => "unknown",
                v1::RepairState::AwaitingReturn => "awaiting_return",
                v1::RepairState::NoSpare => "no_spare",
                v1::RepairState::Waiting => "waiting",
                v1::RepairState::Comparing => "comparing",
                v1::RepairState::Copying => "copying",
            },
            rebuild: repair.rebuild,
            copied_bytes: bytes(repair.copied_blocks),
            lacking_bytes: bytes(repair.lacking_blocks),
            bytes_per_second: Some(repair.bytes_per_second).filter(|rate| *rate > 0),
            remaining_ms: repair.remaining_ms,
        }
    }
}

impl RepairRecord {
    /// What is done about the copy, for people.
    fn words(&self) -> String {
        let until = |ms: u64| ago(ms.next_multiple_of(1000));
        match (self.state, self.remaining_ms) {
            ("awaiting_return", Some(0)) => "silent, is rebuilt elsewhere now".to_string(),
            ("awaiting_return", Some(ms)) => format!("silent, is rebuilt elsewhere in {}", until(ms)),
            ("awaiting_return", None) => "silent".to_string(),
            ("no_spare", _) => "lost, no device to take it".to_string(),
            ("comparing", _) => "comparing".to_string(),
            ("copying", _) => "copying".to_string(),
            ("waiting", _) => "waiting".to_string(),
            (state, _) => state.to_string(),
        }
    }

    fn left(&self) -> String {
        match (self.state, self.remaining_ms) {
            ("copying", Some(ms)) => format!("about {}", ago(ms.next_multiple_of(1000))),
            ("copying" | "comparing", _) => "unknown".to_string(),
            _ => "-".to_string(),
        }
    }
}

/// The repairs of volumes as a table for people.
pub(crate) fn table<'a>(volumes: impl Iterator<Item = &'a HealthRecord>, lines_max: usize) -> String {
    let headings = [
        "VOLUME", "GROUP", "COPY ON", "STATE", "COPIED", "LACKING", "SPEED", "LEFT",
    ];
    let mut table = Table::new(&headings).right(&[1, 4, 5, 6]);
    let (mut lines, mut more) = (0, 0);
    for volume in volumes {
        for repair in &volume.repairs {
            if lines >= lines_max {
                more += 1;
                continue;
            }
            lines += 1;
            let is_filled = matches!(repair.state, "copying" | "comparing");
            let size = |bytes: u64| match is_filled {
                true => ByteSize(bytes).to_string(),
                false => "-".to_string(),
            };
            let device: String = match repair.node.is_empty() {
                true => repair.device.chars().take(8).collect(),
                false => repair.node.clone(),
            };
            let what = match (repair.rebuild, volume.caretaker && is_filled) {
                (true, _) => format!("{} (new copy)", repair.words()),
                (false, true) => format!("{} (caretaker)", repair.words()),
                (false, false) => repair.words(),
            };
            table.row([
                volume.volume.clone(),
                repair.group.to_string(),
                device,
                what,
                size(repair.copied_bytes),
                size(repair.lacking_bytes),
                repair
                    .bytes_per_second
                    .map_or("-".to_string(), |rate| format!("{}/s", ByteSize(rate))),
                repair.left(),
            ]);
        }
    }
    if lines == 0 {
        return String::new();
    }
    let mut text = table.render();
    if more > 0 {
        text.push_str(&format!("and {more} more\n"));
    }
    text
}

/// How a volume is, in a few words.
pub(crate) fn words(health: &HealthRecord) -> String {
    let mut parts = Vec::new();
    if health.groups_below_quorum > 0 {
        parts.push(format!(
            "I/O waits in {}: too few copies within reach",
            count(health.groups_below_quorum.into(), "group")
        ));
    }
    if health.groups_degraded > 0 {
        parts.push(format!(
            "{} with fewer copies than they should have",
            count(health.groups_degraded.into(), "group")
        ));
    }
    if health.damaged {
        parts.push("damage that is not repaired yet".to_string());
    }
    if parts.is_empty() {
        parts.push(match health.repairs.is_empty() {
            true => "all copies in sync".to_string(),
            false => "all copies in sync and within reach, others are tidied up".to_string(),
        });
    }
    if health.damaged_blocks > 0 {
        parts.push(format!(
            "{} of {} damaged blocks repaired",
            health.repaired_blocks, health.damaged_blocks
        ));
    }
    if health.caretaker {
        parts.push("a caretaker is at work".to_string());
    }
    parts.join("; ")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A volume with one group that is filled and one that waits for its third copy.
    pub(crate) fn health() -> v1::VolumeHealth {
        let device = |n: u8| {
            Some(v1::DeviceId {
                uuid: vec![n; 16],
                incarnation: 1,
            })
        };
        let group = |index, stale, joining| v1::GroupHealth {
            index,
            copies_wanted: 3,
            copies_in_sync: 2,
            copies_reachable: 2,
            joining,
            stale,
            below_quorum: false,
            phase: v1::GroupPhase::Serving.into(),
        };
        let repair = |group, n| v1::Repair {
            volume_id: 7,
            volume: "demo".to_string(),
            group,
            device: device(n),
            node_id: n.into(),
            node: format!("node-{n}"),
            ..v1::Repair::default()
        };
        v1::VolumeHealth {
            volume_id: 7,
            volume: "demo".to_string(),
            groups_whole: 1,
            groups_degraded: 2,
            groups: vec![group(0, 0, 1), group(1, 1, 0)],
            repairs: vec![
                v1::Repair {
                    state: v1::RepairState::Copying.into(),
                    rebuild: true,
                    copied_blocks: 256,
                    lacking_blocks: 2560,
                    bytes_per_second: 1 << 20,
                    remaining_ms: Some(10_000),
                    ..repair(0, 4)
                },
                v1::Repair {
                    state: v1::RepairState::AwaitingReturn.into(),
                    remaining_ms: Some(300_000),
                    ..repair(1, 3)
                },
            ],
            ..v1::VolumeHealth::default()
        }
    }

    #[test]
    fn repairs_are_told_with_how_far_they_are() {
        let record = HealthRecord::from(health());
        let text = table([&record].into_iter(), 10);
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| {
                line.split("  ")
                    .map(str::trim)
                    .filter(|cell| !cell.is_empty())
                    .collect()
            })
            .collect();
        assert_eq!(
            lines[0],
            [
                "VOLUME", "GROUP", "COPY ON", "STATE", "COPIED", "LACKING", "SPEED", "LEFT"
            ]
        );
        let copying = [
            "demo",
            "0",
            "node-4",
            "copying (new copy)",
            "1 MiB",
            "10 MiB",
            "1 MiB/s",
            "about 10 s",
        ];
        assert_eq!(lines[1], copying);
        let silent = "silent, is rebuilt elsewhere in 5 min";
        assert_eq!(lines[2], ["demo", "1", "node-3", silent, "-", "-", "-", "-"]);
        assert!(table([&record].into_iter(), 1).ends_with("and 1 more\n"));
        assert_eq!(table([].into_iter(), 1), "");
        assert_eq!(words(&record), "2 groups with fewer copies than they should have");
    }

    #[test]
    fn health_has_stable_keys_for_programs() {
        let json = serde_json::to_value(HealthRecord::from(health())).unwrap();
        let keys = |value: &serde_json::Value| {
            let keys: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
            keys.join(" ")
        };
        assert_eq!(
            keys(&json),
            "caretaker damaged damaged_blocks groups groups_below_quorum groups_degraded groups_whole repaired_blocks \
             repairs volume volume_id"
        );
        assert_eq!(
            keys(&json["groups"][0]),
            "below_quorum copies_in_sync copies_reachable copies_wanted index joining phase stale"
        );
        assert_eq!(
            keys(&json["repairs"][0]),
            "bytes_per_second copied_bytes device group incarnation lacking_bytes node node_id rebuild remaining_ms state"
        );
        assert_eq!(json["repairs"][1]["state"], "awaiting_return");
        assert!(json["repairs"][1]["bytes_per_second"].is_null());
    }
}
