//! The caretaker of a node: production's core and production's plan, and what surrounds them: it asks meta what it is to take
//! care of (in production that comes with the answers to the node's heartbeats).

use std::collections::BTreeMap;
use std::time::Duration;

use cairn_client::caretaker::plan::Plan;
use cairn_client::core::api::VolumeHandle;
use cairn_proto::ids::{Generation, VolumeId};
use cairn_proto::time::Time;

use super::client::{ClientActor, ClientSetup, Wish};
use super::{Ctx, Input, Output, earliest};
use crate::sim::caller::Caller;
use crate::sim::msg::{Answer, Msg, Request};
use crate::sim::network::Delivery;
use crate::sim::process::Process;

/// How often it asks.
const INTERVAL: Duration = Duration::from_secs(1);
/// Numbers of its own calls have this bit, those of its client have not.
const OWN_CALL: u64 = 1 << 31;

/// A caretaker process.
pub struct CaretakerActor {
    client: ClientActor,
    /// Of which node.
    name: String,
    caller: Caller,
    plan: Plan,
    /// What it works on, and under which grant.
    working: BTreeMap<VolumeHandle, (VolumeId, Option<Generation>)>,
    next_handle: u32,
    ask_at: Option<Time>,
}

impl CaretakerActor {
    /// A process of this node that has just started.
    pub fn new(setup: &ClientSetup, node: u8) -> CaretakerActor {
        CaretakerActor {
            client: ClientActor::new(setup),
            name: Process::Node(node).to_string(),
            caller: Caller::new(setup.metas, u64::from(setup.run) << 32 | OWN_CALL),
            plan: Plan::default(),
            working: BTreeMap::new(),
            next_handle: 0,
            ask_at: None,
        }
    }

    pub(super) fn start(&mut self, ctx: &mut Ctx<'_>) {
        self.ask(ctx);
    }

    pub(super) fn handle(&mut self, ctx: &mut Ctx<'_>, input: Input) {
        match input {
            Input::Net(Delivery::Message {
                message: Msg::Answer { id, answer },
                ..
            }) if Caller::number(id) & OWN_CALL != 0 => {
                if let Some((_, answer)) = self.caller.answered(ctx.now, id, answer) {
                    self.told(ctx, answer);
                }
            }
            input => self.of_client(ctx, |client, ctx| client.handle(ctx, input)),
        }
        self.begin(ctx);
    }

    pub(super) fn handle_timeout(&mut self, ctx: &mut Ctx<'_>) {
        let mut calls = Vec::new();
        let ended = self.caller.handle_timeout(ctx.now, &mut calls);
        ctx.send_calls(calls);
        for (_, answer) in ended {
            self.told(ctx, answer);
        }
        if self.ask_at.is_some_and(|at| at <= ctx.now) {
            self.ask_at = None;
            self.ask(ctx);
        }
        if self.client.timeout().is_some_and(|at| at <= ctx.now) {
            self.of_client(ctx, |client, ctx| client.handle_timeout(ctx));
        }
        self.begin(ctx);
    }

    pub(super) fn timeout(&self) -> Option<Time> {
        earliest(earliest(self.client.timeout(), self.caller.timeout()), self.ask_at)
    }

    fn ask(&mut self, ctx: &mut Ctx<'_>) {
        let mut calls = Vec::new();
        self.caller.call(ctx.now, Request::Care(self.name.clone()), &mut calls);
        ctx.send_calls(calls);
    }

    fn told(&mut self, ctx: &mut Ctx<'_>, answer: Option<Answer>) {
        self.ask_at = Some(ctx.now + INTERVAL);
        if let Some(Answer::Care(node, tasks)) = answer {
            self.client.cares_for(node);
            self.plan.told(ctx.now, &tasks);
        }
    }

    fn begin(&mut self, ctx: &mut Ctx<'_>) {
        while let Some(volume) = self.plan.begin(ctx.now) {
            let handle = VolumeHandle(self.next_handle);
            self.next_handle += 1;
            ctx.note(format_args!("takes care of volume {volume} as {handle:?}"));
            self.working.insert(handle, (volume, None));
            self.of_client(ctx, |client, ctx| {
                client.handle(ctx, Input::Guest(Wish::Care(handle, volume)))
            });
        }
    }

    /// Lets the client act, and keeps what it says of its volumes.
    fn of_client(&mut self, ctx: &mut Ctx<'_>, act: impl FnOnce(&mut ClientActor, &mut Ctx<'_>)) {
        let from = ctx.out.len();
        act(&mut self.client, ctx);
        for output in ctx.out.split_off(from) {
            match output {
                Output::Attached(handle, generation) => {
                    if let Some((_, granted)) = self.working.get_mut(&handle) {
                        *granted = Some(generation);
                    }
                }
                Output::Closed(handle) => {
                    if let Some((volume, granted)) = self.working.remove(&handle) {
                        ctx.note(format_args!("is done with volume {volume}, granted {granted:?}"));
                        self.plan.ended(ctx.now, volume, granted);
                    }
                }
                Output::Opened(_) => {}
                other => ctx.out.push(other),
            }
        }
    }
}
