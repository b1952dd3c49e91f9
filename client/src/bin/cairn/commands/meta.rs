//! `cairn meta list` and `cairn meta remove`. A metadata server is added by starting it with `--join`.

use cairn_meta::client::MetaClient;
use cairn_proto::control::v1;
use serde::Serialize;

use super::block_on;
use super::status::{MemberRecord, members_table};
use crate::args::{Global, RemoveMeta};
use crate::context::{command_config, meta_client};
use crate::failure::{Failure, Kind};
use crate::output::{self, confirm, count};
use crate::process::key;

/// All metadata servers, for programs.
#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
struct Listing {
    leader_id: Option<u64>,
    members: Vec<MemberRecord>,
}

pub(crate) fn list(global: &Global) -> Result<(), Failure> {
    let listing = listing(&meta_client(global)?)?;
    output::show(global.json, &listing, || {
        members_table(&listing.members, listing.leader_id)
    })
}

fn listing(meta: &MetaClient) -> Result<Listing, Failure> {
    let answer = block_on(meta.status());
    let status = answer.map_err(|error| Failure::of_meta("list the metadata servers", &meta.endpoints(), &error))?;
    Ok(Listing {
        leader_id: Some(status.leader_id).filter(|id| *id != 0),
        members: status.members.into_iter().map(MemberRecord::from).collect(),
    })
}

/// What was done, for programs.
#[derive(Serialize)]
struct Removed {
    id: u64,
    address: String,
    members: Vec<MemberRecord>,
}

pub(crate) fn remove(global: &Global, args: &RemoveMeta) -> Result<(), Failure> {
    let key = key::of(&args.key, &command_config(global)?)?;
    let listing = listing(&meta_client(global)?)?;
    let member = find(&listing, args.id)?.clone();
    confirm(&question(&listing, &member), args.yes)?;
    // A client of its own: connections live no longer than what they were made for.
    let meta = meta_client(global)?.with_cluster_key(&key);
    let doing = format!("remove metadata server {} at {}", member.id, member.address);
    let answer = block_on(meta.remove_member(v1::RemoveMemberRequest { id: member.id }));
    let answer = answer.map_err(|error| Failure::of_meta(&doing, &meta.endpoints(), &error))?;
    let removed = Removed {
        id: member.id,
        address: member.address,
        members: answer.members.into_iter().map(MemberRecord::from).collect(),
    };
    output::show(global.json, &removed, || words(&removed))
}

fn find(listing: &Listing, id: u64) -> Result<&MemberRecord, Failure> {
    let member = listing.members.iter().find(|member| member.id == id);
    member.ok_or_else(|| {
        Failure::new(Kind::NotFound, format!("there is no metadata server {id}"))
            .hint("`cairn meta list` shows those that exist.")
    })
}

fn question(listing: &Listing, member: &MemberRecord) -> String {
    let left = listing.members.len() as u64 - 1;
    let state = match (member.alive, listing.leader_id == Some(member.id)) {
        (true, true) => ", which leads",
        (true, false) => "",
        (false, _) => ", which is down",
    };
    format!(
        "Remove metadata server {} at {}{state}, for good? {} may be down of the {left} that are left",
        member.id,
        member.address,
        may_fail(left)
    )
}

/// How many of so many servers may be down while the others still decide.
fn may_fail(servers: u64) -> u64 {
    servers.saturating_sub(1) / 2
}

fn words(removed: &Removed) -> String {
    let left = removed.members.len() as u64;
    let addresses: Vec<&str> = removed.members.iter().map(|member| member.address.as_str()).collect();
    format!(
        "metadata server {} is removed, and its process ends: {} left, of which {} may be down\n\
         what is started from now on is told: --meta {}\n",
        removed.id,
        count(left, "metadata server"),
        may_fail(left),
        addresses.join(",")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: u64, alive: bool) -> MemberRecord {
        MemberRecord {
            id,
            address: format!("10.0.0.{id}:7401"),
            alive,
            matched_index: None,
        }
    }

    #[test]
    fn who_removes_a_server_is_told_what_is_left() {
        let listing = Listing {
            leader_id: Some(1),
            members: vec![member(1, true), member(2, false), member(3, true), member(4, true)],
        };
        let asked = |id| question(&listing, find(&listing, id).unwrap());
        assert_eq!(
            asked(1),
            "Remove metadata server 1 at 10.0.0.1:7401, which leads, for good? 1 may be down of the 3 that are left"
        );
        assert!(asked(2).contains("which is down"), "{}", asked(2));
        let failure = find(&listing, 9).unwrap_err();
        assert_eq!(
            (failure.kind, failure.what.as_str()),
            (Kind::NotFound, "there is no metadata server 9")
        );
        let removed = Removed {
            id: 2,
            address: String::new(),
            members: vec![member(1, true), member(3, true)],
        };
        assert_eq!(
            words(&removed),
            "metadata server 2 is removed, and its process ends: 2 metadata servers left, of which 0 may be down\n\
             what is started from now on is told: --meta 10.0.0.1:7401,10.0.0.3:7401\n"
        );
    }

    #[test]
    fn the_list_has_stable_keys_for_programs() {
        let listing = Listing {
            leader_id: Some(1),
            members: vec![member(1, true)],
        };
        let json = serde_json::to_value(listing).unwrap();
        let keys = |value: &serde_json::Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
        assert_eq!(keys(&json), "leader_id members");
        assert_eq!(keys(&json["members"][0]), "address alive id matched_index");
    }
}
