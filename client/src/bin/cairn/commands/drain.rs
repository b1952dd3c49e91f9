//! `cairn node drain` and `cairn node undrain`.

use cairn_proto::control::v1;
use serde::Serialize;

use super::node;
use super::{ago, block_on, since};
use crate::args::{DrainNode, Global, UndrainNode};
use crate::context::meta_client;
use crate::failure::Failure;
use crate::output::{self, Table, confirm, count};

/// Has a node emptied.
pub(crate) fn drain(global: &Global, args: &DrainNode) -> Result<(), Failure> {
    let found = node::find_named(global, &args.node)?;
    if !found.draining {
        let copies = count(found.copies, "group");
        confirm(
            &format!(
                "Have all that node {} holds (copies of {copies}) made elsewhere, and put nothing new on it?",
                found.name
            ),
            args.yes,
        )?;
    }
    let asked = ask(global, &found, true)?;
    output::show(global.json, &asked, || {
        format!(
            "node {} is being emptied (copies of {}): `cairn status` tells how far that is\n",
            asked.node,
            count(asked.copies, "group")
        )
    })
}

/// Ends that.
pub(crate) fn undrain(global: &Global, args: &UndrainNode) -> Result<(), Failure> {
    let found = node::find_named(global, &args.node)?;
    let asked = ask(global, &found, false)?;
    output::show(global.json, &asked, || {
        format!("node {} may hold copies again\n", asked.node)
    })
}

/// What was asked for, for programs.
#[derive(Serialize)]
struct DrainAsked {
    node: String,
    node_id: u64,
    draining: bool,
    /// That it has.
    copies: u64,
}

fn ask(global: &Global, found: &node::Named, drain: bool) -> Result<DrainAsked, Failure> {
    let meta = meta_client(global)?;
    let node_id = found.id;
    let doing = match drain {
        true => format!("empty node `{}`", found.name),
        false => format!("let node `{}` hold copies again", found.name),
    };
    let answer = block_on(meta.drain_node(v1::DrainNodeRequest { node_id, drain }));
    let answer = answer.map_err(|error| Failure::of_meta(&doing, &meta.endpoints(), &error))?;
    Ok(DrainAsked {
        node: found.name.clone(),
        node_id,
        draining: drain,
        copies: answer.copies,
    })
}

/// A node that is being emptied, or is empty already, for programs.
#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
pub(crate) struct DrainRecord {
    node: String,
    node_id: u64,
    state: &'static str,
    since_unix_ms: u64,
    copies_at_start: u64,
    copies_left: u64,
    copies_moving: u64,
    copies_without_place: u64,
}

impl From<v1::Drain> for DrainRecord {
    fn from(drain: v1::Drain) -> DrainRecord {
        DrainRecord {
            state: match (drain.copies_left, drain.copies_moving, drain.copies_without_place) {
                (0, ..) => "empty",
                (_, 0, 1..) => "no_place",
                _ => "draining",
            },
            node: drain.node,
            node_id: drain.node_id,
            since_unix_ms: drain.since_unix_ms,
            copies_at_start: drain.copies_at_start,
            copies_left: drain.copies_left,
            copies_moving: drain.copies_moving,
            copies_without_place: drain.copies_without_place,
        }
    }
}

impl DrainRecord {
    fn words(&self) -> &'static str {
        match self.state {
            "empty" => "holds nothing: it may be stopped",
            "no_place" => "waits: no device with room far enough from the other copies, add a node",
            _ => "its copies are made elsewhere",
        }
    }
}

/// How far nodes are emptied, as a table for people; empty when none is.
pub(crate) fn table(drains: &[DrainRecord]) -> String {
    if drains.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&["NODE", "LEFT", "OF", "MOVING", "SINCE", "STATE"]).right(&[1, 2, 3]);
    for drain in drains {
        table.row([
            drain.node.clone(),
            drain.copies_left.to_string(),
            drain.copies_at_start.max(drain.copies_left).to_string(),
            drain.copies_moving.to_string(),
            ago(since(drain.since_unix_ms)),
            drain.words().to_string(),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(left: u64, moving: u64, without_place: u64) -> DrainRecord {
        v1::Drain {
            node_id: 3,
            node: "node-3".to_string(),
            since_unix_ms: 1,
            copies_at_start: 8,
            copies_left: left,
            copies_moving: moving,
            copies_without_place: without_place,
        }
        .into()
    }

    #[test]
    fn a_drain_tells_how_far_it_is_and_what_it_waits_for() {
        let states = [drain(5, 2, 0), drain(5, 0, 3), drain(0, 0, 0)].map(|drain| drain.state);
        assert_eq!(states, ["draining", "no_place", "empty"]);
        let text = table(&[drain(5, 2, 0), drain(0, 0, 0)]);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].starts_with("node-3     5   8       2  "), "{text}");
        assert!(lines[2].contains("it may be stopped"), "{text}");
        assert_eq!(table(&[]), "");
    }
}
