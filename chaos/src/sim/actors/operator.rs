//! Who sets the cluster up: waits for the nodes, creates the volumes.

use std::collections::BTreeMap;
use std::time::Duration;

use cairn_meta::state::Outcome;
use cairn_meta::state::command::{Command, CreateVolume, DrainNode, GrowVolume, Selector};
use cairn_meta::state::model::{Spread, Volume};
use cairn_proto::control::Code;
use cairn_proto::ids::{NodeId, VolumeId};
use cairn_proto::time::Time;

use super::{Ctx, Input, Output, earliest};
use crate::sim::caller::{Caller, Ended};
use crate::sim::msg::{Answer, Msg, Request};
use crate::sim::network::Delivery;

/// The pause before the operator tries again.
const PAUSE: Duration = Duration::from_millis(200);

/// What the operator is told.
#[derive(Clone, Debug)]
pub enum Wish {
    /// Create volumes of these sizes; whether one copy is enough to write them when no more are in sync.
    Create(Vec<(u64, bool)>),
    /// Let a volume have this size.
    Grow(VolumeId, u64),
    /// Let a node hold nothing, or let it hold copies again.
    Drain(NodeId, bool),
}

/// A volume that was created.
#[derive(Clone, Debug)]
pub struct Created {
    /// Its id.
    pub id: VolumeId,
    /// As it is.
    pub volume: Volume,
}

/// The operator.
pub struct OperatorActor {
    caller: Caller,
    replicas: u8,
    spread: Spread,
    /// The volumes that are still to be created, the last first.
    todo: Vec<(u64, bool)>,
    created: Vec<Created>,
    retry_at: Option<Time>,
    growing: BTreeMap<u64, (VolumeId, u64)>,
    /// What is wanted of nodes, until they have it.
    drains: BTreeMap<NodeId, bool>,
    draining: BTreeMap<u64, (NodeId, bool)>,
}

impl OperatorActor {
    /// One who has nothing to do yet.
    pub fn new(metas: u8, replicas: u8, spread: Spread) -> OperatorActor {
        OperatorActor {
            caller: Caller::new(metas, 0),
            replicas,
            spread,
            todo: Vec::new(),
            created: Vec::new(),
            retry_at: None,
            growing: BTreeMap::new(),
            drains: BTreeMap::new(),
            draining: BTreeMap::new(),
        }
    }

    pub(super) fn handle(&mut self, ctx: &mut Ctx<'_>, input: Input) {
        match input {
            Input::Operator(Wish::Create(volumes)) => {
                self.todo = volumes.into_iter().rev().collect();
                self.create(ctx);
            }
            // One step after the other: volumes never become smaller.
            Input::Operator(Wish::Grow(id, _)) if self.growing.values().any(|(growing, _)| *growing == id) => {}
            Input::Operator(Wish::Grow(id, size_bytes)) => self.grow(ctx, id, size_bytes),
            Input::Operator(Wish::Drain(node, drain)) => {
                self.drains.insert(node, drain);
                // Not two at once: which of them comes last would be left to chance.
                if !self.draining.values().any(|(asked, _)| *asked == node) {
                    self.drain(ctx, node, drain);
                }
            }
            Input::Net(Delivery::Message {
                message: Msg::Answer { id, answer },
                ..
            }) => {
                if let Some(ended) = self.caller.answered(ctx.now, id, answer) {
                    self.ended(ctx, ended);
                }
            }
            _ => {}
        }
    }

    pub(super) fn handle_timeout(&mut self, ctx: &mut Ctx<'_>) {
        let mut calls = Vec::new();
        let ended = self.caller.handle_timeout(ctx.now, &mut calls);
        ctx.send_calls(calls);
        for ended in ended {
            self.ended(ctx, ended);
        }
        if self.retry_at.is_some_and(|at| at <= ctx.now) {
            self.retry_at = None;
            self.create(ctx);
        }
    }

    pub(super) fn timeout(&self) -> Option<Time> {
        earliest(self.caller.timeout(), self.retry_at)
    }

    fn create(&mut self, ctx: &mut Ctx<'_>) {
        let Some((size_bytes, min_copies_one)) = self.todo.last().copied() else {
            ctx.out.push(Output::SetUp(self.created.clone()));
            return;
        };
        let command = CreateVolume {
            name: format!("volume-{}", self.created.len()),
            size_bytes,
            replicas: self.replicas,
            write_quorum: self.replicas / 2 + 1,
            min_copies_one,
            spread: self.spread,
            silent: Vec::new(),
        };
        let mut calls = Vec::new();
        let request = Request::Command(Command::CreateVolume(command));
        self.caller.call(ctx.now, request, &mut calls);
        ctx.send_calls(calls);
    }

    fn grow(&mut self, ctx: &mut Ctx<'_>, id: VolumeId, size_bytes: u64) {
        let command = Command::GrowVolume(GrowVolume {
            volume: Selector::Id(id),
            size_bytes,
        });
        let mut calls = Vec::new();
        let call = self.caller.call(ctx.now, Request::Command(command), &mut calls);
        ctx.send_calls(calls);
        self.growing.insert(call, (id, size_bytes));
    }

    fn drain(&mut self, ctx: &mut Ctx<'_>, node: NodeId, drain: bool) {
        let silent = Vec::new();
        let command = Command::DrainNode(DrainNode { node, drain, silent });
        let mut calls = Vec::new();
        let call = self.caller.call(ctx.now, Request::Command(command), &mut calls);
        ctx.send_calls(calls);
        self.draining.insert(call, (node, drain));
    }

    /// A node is to be empty, or not any more. Where its copies have no other place it is refused, which an operator bears.
    fn drained(&mut self, ctx: &mut Ctx<'_>, (node, asked): (NodeId, bool), answer: Option<Answer>) {
        let wanted = self.drains.get(&node).copied();
        match answer {
            Some(Answer::Refused(refusal)) if refusal.code != Code::NotEnoughDevices => {
                let words = format!("node {node} can't be drained ({asked}): {refusal}");
                ctx.out.push(Output::Broken(words));
            }
            Some(Answer::Done { .. } | Answer::Refused(_)) if wanted == Some(asked) => {
                self.drains.remove(&node);
            }
            _ => self.drain(ctx, node, wanted.unwrap_or(asked)),
        }
    }

    fn ended(&mut self, ctx: &mut Ctx<'_>, (call, answer): Ended) {
        if let Some(asked) = self.draining.remove(&call) {
            return self.drained(ctx, asked, answer);
        }
        if let Some((id, size_bytes)) = self.growing.remove(&call) {
            match answer {
                Some(Answer::Done { .. }) => ctx.out.push(Output::Grown(id, size_bytes)),
                Some(Answer::Refused(refusal)) => ctx
                    .out
                    .push(Output::Broken(format!("volume {id} can't grow: {refusal}"))),
                _ => self.grow(ctx, id, size_bytes),
            }
            return;
        }
        match answer {
            Some(Answer::Done {
                outcome: Outcome::Volume(id, volume),
                ..
            }) => self.made(ctx, id, volume),
            // An attempt whose answer was lost has made it.
            Some(Answer::Refused(refusal)) if refusal.code == Code::NameTaken => {
                let mut calls = Vec::new();
                self.caller.call(ctx.now, Request::Volumes, &mut calls);
                ctx.send_calls(calls);
            }
            Some(Answer::Volumes(volumes)) => {
                let name = format!("volume-{}", self.created.len());
                match volumes.into_iter().find(|(_, volume)| volume.name == name) {
                    Some((id, volume)) => self.made(ctx, id, volume),
                    None => ctx
                        .out
                        .push(Output::Broken(format!("`{name}` is taken, and not there"))),
                }
            }
            Some(Answer::Refused(refusal))
                if refusal.code != Code::NotEnoughDevices && refusal.code != Code::NotReady =>
            {
                ctx.out
                    .push(Output::Broken(format!("a volume can't be created: {refusal}")));
            }
            _ => self.retry_at = Some(ctx.now + PAUSE),
        }
    }

    fn made(&mut self, ctx: &mut Ctx<'_>, id: VolumeId, volume: Volume) {
        ctx.note(format_args!("created volume {id} of {} bytes", volume.size_bytes));
        self.todo.pop();
        self.created.push(Created { id, volume });
        self.create(ctx);
    }
}
