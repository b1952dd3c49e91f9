//! A metadata server: production's Raft node and state machine over a log store in memory. The gRPC service above it is
//! not simulated; this file does what it does: commands are proposed, questions answered after a read that is
//! linearizable.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use cairn_meta::heal::HealSettings;
use cairn_meta::log::memory::MemoryLogStore;
use cairn_meta::raft::{self, MetaAction, MetaNode, NodeConfig, Ticket};
use cairn_meta::state::command::{Command, InitCluster};
use cairn_meta::state::model::{Device, Group, State};
use cairn_meta::state::{FEATURE_LEVEL, Outcome};
use cairn_proto::control::Code;
use cairn_proto::ids::{ClusterId, DeviceId};
use cairn_proto::time::Time;
use cairn_storage_node::host::HeldReplica;

use super::healing::Healing;
use super::{Ctx, Input, Output, earliest};
use crate::rng::Rng;
use crate::sim::msg::{Answer, Msg, Placed, Request};
use crate::sim::network::Delivery;
use crate::sim::process::Process;

/// What a metadata server needs to start.
pub struct MetaSetup {
    /// Which one, from 0 on; its id in the group is one more.
    pub index: u8,
    /// How often the process has been started.
    pub run: u32,
    /// The cluster that it founds, if nobody has.
    pub cluster: ClusterId,
    /// After how many entries there is a snapshot, and how many are kept behind it.
    pub snapshots: (u64, u64),
    /// How long a flush of the log takes about.
    pub flush: Duration,
    /// What an earlier run left.
    pub log: MemoryLogStore,
    /// How the cluster heals.
    pub heal: HealSettings,
    /// For the time of flushes.
    pub rng: Rng,
    /// A planted bug of healing.
    #[cfg(feature = "canary")]
    pub neglected: Option<cairn_meta::heal::Duty>,
}

/// Who asked, and what, to be answered under a ticket.
struct Asked {
    from: Process,
    id: u64,
    request: Request,
}

/// A metadata server process.
pub struct MetaActor {
    node: MetaNode<MemoryLogStore>,
    cluster: ClusterId,
    flush: Duration,
    rng: Rng,
    /// It is writing to its log until then, and sees nothing that comes.
    writing_until: Option<Time>,
    waiting: VecDeque<Input>,
    asked: BTreeMap<Ticket, Asked>,
    next_ticket: u64,
    founding: bool,
    healing: Healing,
}

impl MetaActor {
    /// A process that has just started. Panics when the log can't be used: nothing in the simulation damages it.
    pub fn new(setup: MetaSetup) -> MetaActor {
        let mut config = NodeConfig::new(u64::from(setup.index) + 1, u64::from(setup.run) + 1);
        (config.snapshot_entries, config.kept_entries) = setup.snapshots;
        let node = MetaNode::new(config, setup.log).expect("a log that was only cut off is usable");
        #[cfg_attr(not(feature = "canary"), allow(unused_mut))]
        let mut healing = Healing::new(setup.heal);
        #[cfg(feature = "canary")]
        healing.plant(setup.neglected);
        MetaActor {
            node,
            cluster: setup.cluster,
            flush: setup.flush,
            rng: setup.rng,
            writing_until: None,
            waiting: VecDeque::new(),
            asked: BTreeMap::new(),
            next_ticket: 0,
            founding: false,
            healing,
        }
    }

    /// What is left when the process ends.
    pub fn into_log(self) -> MemoryLogStore {
        self.node.into_log()
    }

    /// The state machine.
    pub fn state(&self) -> &State {
        self.node.state()
    }

    /// How far it has applied.
    pub fn applied(&self) -> u64 {
        self.node.status().applied
    }

    pub(super) fn start(&mut self, ctx: &mut Ctx<'_>) {
        self.node.tick(ctx.now);
        self.drive(ctx);
    }

    pub(super) fn handle(&mut self, ctx: &mut Ctx<'_>, input: Input) {
        self.waiting.push_back(input);
        if self.writing_until.is_none_or(|until| until <= ctx.now) {
            self.go_on(ctx);
        }
    }

    pub(super) fn handle_timeout(&mut self, ctx: &mut Ctx<'_>) {
        if self.writing_until.is_some_and(|until| until > ctx.now) {
            return;
        }
        if self.node.poll_timeout().is_some_and(|at| at <= ctx.now) {
            self.node.tick(ctx.now);
        }
        self.go_on(ctx);
    }

    pub(super) fn timeout(&self) -> Option<Time> {
        match self.writing_until {
            // A tick that is due meanwhile comes late.
            Some(until) => Some(until),
            None => earliest(self.node.poll_timeout(), self.node.leads().then(|| self.healing.due())),
        }
    }

    fn ticket(&mut self) -> Ticket {
        self.next_ticket += 1;
        Ticket(self.next_ticket)
    }

    /// Finishes what was begun, then takes everything that has come meanwhile together.
    fn go_on(&mut self, ctx: &mut Ctx<'_>) {
        self.writing_until = None;
        self.drive(ctx);
        while self.writing_until.is_none() && !self.waiting.is_empty() {
            while let Some(input) = self.waiting.pop_front() {
                self.take(ctx, input);
            }
            self.drive(ctx);
        }
        if self.writing_until.is_none() && self.node.leads() {
            self.heal(ctx);
        }
    }

    /// Does what the leader should do about devices that are lost.
    fn heal(&mut self, ctx: &mut Ctx<'_>) {
        let commands = self.healing.decide(self.node.state(), ctx.now);
        if commands.is_empty() {
            return;
        }
        for command in commands {
            ctx.note(format_args!("heals: {command:?}"));
            let ticket = self.ticket();
            self.healing.proposed(ticket);
            self.node.propose(ticket, unix_ms(ctx.now), command);
        }
        self.drive(ctx);
    }

    fn take(&mut self, ctx: &mut Ctx<'_>, input: Input) {
        let Input::Net(Delivery::Message { from, message }) = input else {
            return;
        };
        match message {
            Msg::Raft(bytes) => {
                if let Err(error) = self.node.step(&bytes) {
                    ctx.out.push(Output::Broken(format!(
                        "{} refuses a message of {from}: {error}",
                        ctx.me
                    )));
                }
            }
            Msg::Call { id, request } => {
                if self.node.leads()
                    && let Some(answer) = self.healing.heard(self.node.state(), ctx.now, &request)
                {
                    let msg = Msg::Answer { id, answer };
                    return ctx.net.message(ctx.world, (ctx.me, from), msg, false);
                }
                let ticket = self.ticket();
                match &request {
                    Request::Command(command) => {
                        let command = self.healing.complete(self.node.state(), ctx.now, command.clone());
                        self.node.propose(ticket, unix_ms(ctx.now), command);
                    }
                    _ => self.node.read_index(ticket),
                }
                self.asked.insert(ticket, Asked { from, id, request });
            }
            Msg::Answer { .. } => {}
        }
    }

    /// Lets the node work until it is done, or has to wait for its log.
    fn drive(&mut self, ctx: &mut Ctx<'_>) {
        loop {
            let more = match self.node.drive() {
                Ok(more) => more,
                Err(error) => {
                    ctx.out.push(Output::Broken(format!("{} has stopped: {error}", ctx.me)));
                    false
                }
            };
            let mut acted = false;
            while let Some(action) = self.node.poll_action() {
                acted = true;
                self.act(ctx, action);
            }
            if !more && !acted {
                break;
            }
            // What `drive` sent went out before its log was written: the process may die here.
            if self.flush > Duration::ZERO && self.rng.permille(300) {
                self.writing_until = Some(ctx.now + self.rng.spread(self.flush));
                return;
            }
        }
        self.found(ctx);
    }

    /// The first leader gives the cluster its id.
    fn found(&mut self, ctx: &mut Ctx<'_>) {
        if self.founding || !self.node.leads() || self.node.state().cluster().is_some() {
            return;
        }
        self.founding = true;
        let ticket = self.ticket();
        let command = InitCluster {
            cluster: self.cluster,
            feature_level: FEATURE_LEVEL,
        };
        self.node
            .propose(ticket, unix_ms(ctx.now), Command::InitCluster(command));
        self.drive(ctx);
    }

    fn act(&mut self, ctx: &mut Ctx<'_>, action: MetaAction) {
        match action {
            MetaAction::Send { to, message } => {
                let to = Process::Meta(u8::try_from(to - 1).expect("few members"));
                ctx.net
                    .message(ctx.world, (ctx.me, to), Msg::Raft(message.into()), true);
            }
            MetaAction::Answer(ticket, answer) => {
                if self.healing.ended(ticket) {
                    return;
                }
                let Some(asked) = self.asked.remove(&ticket) else {
                    self.founding = false;
                    return;
                };
                let answer = self.answer(&asked.request, answer);
                self.healing.answered(self.node.state(), &answer, ctx.now);
                let msg = Msg::Answer { id: asked.id, answer };
                ctx.net.message(ctx.world, (ctx.me, asked.from), msg, false);
            }
            MetaAction::Leader { id, term } => {
                self.healing.reset(ctx.now);
                ctx.note(format_args!("sees {id} lead in term {term}"));
            }
        }
    }

    fn answer(&self, request: &Request, answer: raft::Answer) -> Answer {
        let state = self.node.state();
        match answer {
            raft::Answer::Applied(result) => match *result {
                Ok(outcome) => Answer::Done {
                    cluster: state.cluster().unwrap_or_default(),
                    devices: match &outcome {
                        Outcome::Attached { groups, .. } => devices_of(state, groups),
                        _ => Vec::new(),
                    },
                    outcome,
                },
                Err(refusal) if matches!(refusal.code, Code::NotReady | Code::Busy) => Answer::Unknown,
                Err(refusal) => Answer::Refused(refusal),
            },
            raft::Answer::Readable => look(state, request),
            raft::Answer::Refused(refusal) if refusal.code == Code::NotLeader => {
                let leader = self.node.status().leader;
                Answer::NotLeader((leader > 0).then(|| (leader - 1) as u8))
            }
            raft::Answer::Refused(refusal) if refusal.code == Code::InvalidArgument => Answer::Refused(refusal),
            raft::Answer::Refused(_) | raft::Answer::Unknown(_) => Answer::Unknown,
        }
    }
}

/// Unix time as this process sees it: any fixed origin will do.
fn unix_ms(now: Time) -> u64 {
    1_700_000_000_000 + now.as_nanos() / 1_000_000
}

fn look(state: &State, request: &Request) -> Answer {
    match request {
        Request::Volume(id) => Answer::Volume(state.volumes().get(id).map(|volume| {
            let groups: Vec<Group> = state.groups_of(*id).map(|(_, group)| group.clone()).collect();
            Placed {
                id: *id,
                volume: volume.clone(),
                devices: devices_of(state, &groups),
                groups,
            }
        })),
        Request::Volumes => Answer::Volumes(state.volumes().iter().map(|(id, v)| (*id, v.clone())).collect()),
        Request::Inventory(device, held) => {
            let unneeded = |held: &&HeldReplica| {
                state.is_deleted(held.group.volume) || state.is_unnamed(held.group, device, held.epoch)
            };
            Answer::Unneeded(held.iter().filter(unneeded).copied().collect())
        }
        // Only a leader says anything about these, and by itself.
        Request::Heartbeat(_) | Request::Report(..) | Request::Care(_) => Answer::Unknown,
        Request::Command(_) => unreachable!("a command is proposed"),
    }
}

fn devices_of(state: &State, groups: &[Group]) -> Vec<(DeviceId, Device)> {
    let named: BTreeSet<&DeviceId> = groups.iter().flat_map(Group::named).collect();
    let known = named
        .into_iter()
        .filter_map(|id| Some((*id, state.devices().get(id)?.clone())));
    known.collect()
}
