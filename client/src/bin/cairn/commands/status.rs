//! `cairn status`.

use cairn_proto::control::v1;
use cairn_proto::units::ByteSize;
use serde::Serialize;

use super::drain::{self, DrainRecord};
use super::health::{self, HealthRecord};
use super::{block_on, percent, uuid_text};
use crate::args::{Global, Status};
use crate::context::meta_client;
use crate::failure::{Failure, Kind};
use crate::limits::REPAIRS_SHOWN_MAX;
use crate::output::{self, Table, count};

pub(crate) fn run(global: &Global, args: &Status) -> Result<(), Failure> {
    let meta = meta_client(global)?;
    let answer = block_on(meta.status());
    let answer = answer.map_err(|error| Failure::of_meta("see how the cluster is", &meta.endpoints(), &error))?;
    let record = StatusRecord::from(answer);
    output::show(global.json, &record, || describe(&record))?;
    if record.leader_id.is_none() {
        return Err(Failure::new(Kind::Unreachable, "no metadata server leads")
            .hint("A majority of them must run and reach each other. Volumes that are in use go on meanwhile."));
    }
    if args.check && !record.problems.is_empty() {
        let problems = count(record.problems.len() as u64, "problem");
        return Err(Failure::new(Kind::Unhealthy, format!("the cluster has {problems}")));
    }
    Ok(())
}

/// How the cluster is, for programs.
#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
struct StatusRecord {
    cluster_id: Option<String>,
    leader_id: Option<u64>,
    leader_address: Option<String>,
    term: u64,
    answered_by: u64,
    members: Vec<MemberRecord>,
    volumes: u64,
    volumes_unhealthy: u64,
    groups: u64,
    groups_degraded: u64,
    groups_below_quorum: u64,
    repairs: u64,
    unhealthy: Vec<HealthRecord>,
    rebuild_after_ms: Option<u64>,
    drains: Vec<DrainRecord>,
    nodes: u64,
    devices: u64,
    devices_alive: u64,
    capacity_bytes: u64,
    used_bytes: u64,
    problems: Vec<ProblemRecord>,
    version: String,
}

/// One metadata server.
#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
pub(super) struct MemberRecord {
    pub(super) id: u64,
    pub(super) address: String,
    pub(super) alive: bool,
    pub(super) matched_index: Option<u64>,
}

impl From<v1::Member> for MemberRecord {
    fn from(member: v1::Member) -> MemberRecord {
        MemberRecord {
            id: member.id,
            address: member.address,
            alive: member.seems_alive,
            matched_index: member.matched_index,
        }
    }
}

/// Metadata servers as a table for people.
pub(super) fn members_table(members: &[MemberRecord], leader: Option<u64>) -> String {
    let mut table = Table::new(&["META", "ADDRESS", "STATE"]);
    for member in members {
        let state = match (member.alive, leader == Some(member.id)) {
            (true, true) => "leads",
            (true, false) => "up",
            (false, _) => "down",
        };
        table.row([member.id.to_string(), member.address.clone(), state.to_string()]);
    }
    table.render()
}

/// Something that an operator should know.
#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
struct ProblemRecord {
    code: String,
    message: String,
}

impl From<v1::StatusResponse> for StatusRecord {
    fn from(status: v1::StatusResponse) -> StatusRecord {
        StatusRecord {
            cluster_id: Some(uuid_text(&status.cluster_id)).filter(|id| !id.is_empty()),
            leader_id: Some(status.leader_id).filter(|id| *id != 0),
            leader_address: Some(status.leader_address).filter(|address| !address.is_empty()),
            term: status.term,
            answered_by: status.member_id,
            members: status.members.into_iter().map(MemberRecord::from).collect(),
            volumes: status.volumes,
            volumes_unhealthy: status.volumes_unhealthy,
            groups: status.groups,
            groups_degraded: status.groups_degraded,
            groups_below_quorum: status.groups_below_quorum,
            repairs: status.repairs,
            unhealthy: status.unhealthy.into_iter().map(HealthRecord::from).collect(),
            drains: status.drains.into_iter().map(DrainRecord::from).collect(),
            rebuild_after_ms: Some(status.rebuild_after_ms).filter(|ms| *ms > 0),
            nodes: status.nodes,
            devices: status.devices,
            devices_alive: status.devices_alive,
            capacity_bytes: status.capacity_bytes,
            used_bytes: status.used_bytes,
            problems: status
                .problems
                .into_iter()
                .map(|problem| ProblemRecord {
                    code: problem.code,
                    message: problem.message,
                })
                .collect(),
            version: status.version,
        }
    }
}

fn describe(status: &StatusRecord) -> String {
    let mut table = Table::pairs();
    table.row(["cluster", status.cluster_id.as_deref().unwrap_or("not initialised yet")]);
    let alive = status.members.iter().filter(|member| member.alive).count();
    let leader = match (status.leader_id, &status.leader_address) {
        (Some(id), Some(address)) => format!("meta {id} at {address} leads"),
        (Some(id), None) => format!("meta {id} leads"),
        (None, _) => "nobody leads".to_string(),
    };
    table.row([
        "metadata".to_string(),
        format!("{alive} of {} alive, {leader}", status.members.len()),
    ]);
    table.row([
        "storage".to_string(),
        format!(
            "{}, {} of {} alive, {} used of {} ({})",
            count(status.nodes, "node"),
            status.devices_alive,
            count(status.devices, "device"),
            ByteSize(status.used_bytes),
            ByteSize(status.capacity_bytes),
            percent(status.used_bytes, status.capacity_bytes)
        ),
    ]);
    table.row(["volumes".to_string(), volumes(status)]);
    if status.problems.is_empty() {
        table.row(["problems", "none"]);
    }
    let mut text = table.render();
    if !status.problems.is_empty() {
        text.push_str("\nproblems:\n");
        for problem in &status.problems {
            text.push_str(&format!("  {}: {}\n", problem.code, problem.message));
        }
    }
    let repairs = health::table(status.unhealthy.iter(), REPAIRS_SHOWN_MAX);
    if !repairs.is_empty() {
        text.push_str("\nrepairs:\n");
        text.push_str(&repairs);
    }
    let drains = drain::table(&status.drains);
    if !drains.is_empty() {
        text.push_str("\nnodes that are emptied:\n");
        text.push_str(&drains);
    }
    text.push('\n');
    text.push_str(&members_table(&status.members, status.leader_id));
    text
}

/// How the volumes are, in a line.
fn volumes(status: &StatusRecord) -> String {
    let mut text = status.volumes.to_string();
    if status.volumes_unhealthy > 0 {
        text.push_str(&format!(
            ", {} not whole: {} of {} with fewer copies than they should have",
            status.volumes_unhealthy,
            status.groups_degraded,
            count(status.groups, "group")
        ));
    }
    if status.groups_below_quorum > 0 {
        text.push_str(&format!(", {} without a quorum", status.groups_below_quorum));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> v1::StatusResponse {
        let member = |id: u64, alive| v1::Member {
            id,
            address: format!("127.0.0.1:740{id}"),
            seems_alive: alive,
            matched_index: None,
            directory: 0,
        };
        v1::StatusResponse {
            cluster_id: vec![0x11; 16],
            member_id: 2,
            leader_id: 2,
            leader_address: "127.0.0.1:7402".to_string(),
            members: vec![member(1, true), member(2, true), member(3, false)],
            term: 3,
            volumes: 1,
            nodes: 3,
            devices: 3,
            devices_alive: 2,
            capacity_bytes: 24 << 30,
            used_bytes: 6 << 30,
            problems: vec![v1::Problem {
                code: "member-down".to_string(),
                message: "meta 3 does not answer: start it again".to_string(),
            }],
            version: "0.1.0".to_string(),
            ..v1::StatusResponse::default()
        }
    }

    #[test]
    fn the_state_of_the_cluster_is_told_to_people() {
        assert_eq!(
            describe(&status().into()),
            "cluster   11111111-1111-1111-1111-111111111111\n\
             metadata  2 of 3 alive, meta 2 at 127.0.0.1:7402 leads\n\
             storage   3 nodes, 2 of 3 devices alive, 6 GiB used of 24 GiB (25 %)\n\
             volumes   1\n\
             \n\
             problems:\n  member-down: meta 3 does not answer: start it again\n\
             \n\
             META  ADDRESS         STATE\n\
             1     127.0.0.1:7401  up\n\
             2     127.0.0.1:7402  leads\n\
             3     127.0.0.1:7403  down\n"
        );
        let calm = v1::StatusResponse {
            problems: Vec::new(),
            leader_id: 0,
            leader_address: String::new(),
            cluster_id: Vec::new(),
            ..status()
        };
        let text = describe(&calm.into());
        assert!(
            text.contains("not initialised yet") && text.contains("nobody leads"),
            "{text}"
        );
        assert!(text.contains("problems  none\n"), "{text}");
    }

    #[test]
    fn volumes_that_are_not_whole_are_told_with_their_repairs() {
        let status = v1::StatusResponse {
            volumes_unhealthy: 1,
            groups: 3,
            groups_degraded: 2,
            repairs: 2,
            unhealthy: vec![health::tests::health()],
            ..status()
        };
        let text = describe(&status.into());
        let line = "volumes   1, 1 not whole: 2 of 3 groups with fewer copies than they should have\n";
        assert!(text.contains(line), "{text}");
        assert!(
            text.contains("\nrepairs:\nVOLUME") && text.contains("about 10 s"),
            "{text}"
        );
    }

    #[test]
    fn the_state_of_the_cluster_has_stable_keys_for_programs() {
        let json = serde_json::to_value(StatusRecord::from(status())).unwrap();
        let keys: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(
            keys.join(" "),
            "answered_by capacity_bytes cluster_id devices devices_alive drains groups groups_below_quorum groups_degraded \
             leader_address leader_id members nodes problems rebuild_after_ms repairs term unhealthy used_bytes version \
             volumes volumes_unhealthy"
        );
        assert_eq!(json["members"][2]["alive"], false);
    }
}
