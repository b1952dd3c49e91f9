//! The world of one seed: processes, network, disks and guests on virtual time. What happens next is decided by the
//! schedule and the seed alone.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use cairn_client::core::api::VolumeHandle;
use cairn_proto::disk::{DiskOp, DiskToken};
use cairn_proto::ids::{Generation, VolumeId};
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::time::Time;

use super::actors::client::Wish;
use super::actors::operator::Created;
use super::actors::{Actor, Ctx, Input, Output};
use super::clock::Clock;
use super::disk::Disk;
use super::guest::Guest;
use super::msg::Msg;
use super::network::{Delivery, NetEvent, Network};
use super::options::Options;
use super::process::Process;
use super::schedule::Schedule;
use super::setup::Setup;
use super::trace::Trace;
use crate::checker::history::{Broken, History};
use crate::rng::{Rng, mix};

/// Timers of one process that may be due at one instant of virtual time before it counts as stuck in a loop.
const TIMERS_AT_ONCE_MAX: u32 = 10_000;

/// Blocks around the former end of a volume that are used once it has grown.
pub(super) const GROWN_BLOCKS: u64 = 6;

/// After this time a process that has ended by itself is started again.
const EXIT_PAUSE: Duration = Duration::from_millis(500);

/// An entry of the schedule.
#[derive(Debug)]
pub(super) enum Event {
    Net(NetEvent<Msg>),
    /// A disk operation has taken its time; of which run of the node's process.
    Disk {
        node: u8,
        run: u32,
        token: DiskToken,
    },
    /// A process may have something to do.
    Timer {
        process: Process,
        run: u32,
    },
    /// A guest may have something to do.
    Guest {
        client: u8,
        volume: VolumeHandle,
        session: u32,
    },
    /// Whoever runs a client closes a volume.
    Close {
        client: u8,
        volume: VolumeHandle,
    },
    /// The next fault, or the end of one.
    Nemesis(super::faulting::Strike),
}

/// One process and what surrounds it.
pub(super) struct Slot {
    pub(super) actor: Option<Actor>,
    pub(super) clock: Clock,
    /// How many faults freeze it.
    pub(super) frozen: u32,
    inbox: VecDeque<Input>,
    timer_at: Option<Time>,
    pub(super) run: u32,
    timers_at_once: (Time, u32),
}

/// One volume as the world knows it.
pub(super) struct VolumeState {
    pub(super) created: Created,
}

/// How a session is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum SessionPhase {
    Opening,
    Open,
    Closing,
    /// A newer attachment took over; being closed.
    Fenced,
    /// Closed or dead.
    Over,
}

pub(super) struct Session {
    pub(super) client: u8,
    pub(super) handle: VolumeHandle,
    pub(super) volume: usize,
    pub(super) phase: SessionPhase,
    pub(super) guest: Guest,
    pub(super) generation: Option<Generation>,
    /// Operations that were done.
    pub(super) done: u64,
    /// The size of the volume as its client knows it.
    pub(super) told_bytes: u64,
    /// The session from which this one takes the volume over in order: the guest begins when that one is over.
    pub(super) after: Option<usize>,
    /// The generation whose seals were looked for on the devices.
    pub(super) seal_probed: Option<Generation>,
}

/// A world.
pub struct World {
    pub(super) options: Options,
    pub(super) setup: Setup,
    pub(super) schedule: Schedule<Event>,
    pub(super) net: Network<Msg>,
    pub(super) slots: BTreeMap<Process, Slot>,
    pub(super) disks: Vec<Disk>,
    pub(super) volumes: Vec<VolumeState>,
    pub(super) sessions: Vec<Session>,
    /// Which session a handle of a client belongs to.
    pub(super) handles: BTreeMap<(u8, VolumeHandle), usize>,
    pub(super) history: History,
    pub(super) faulting: super::faulting::Faulting,
    pub(super) losses: super::loss::Losses,
    pub(super) rng: Rng,
    pub(super) probe_rng: Rng,
    pub(super) probes: u64,
    /// Whether guests begin new operations.
    pub(super) busy: bool,
    pub(super) ops_done: u64,
    pub(super) errors: BTreeMap<String, u64>,
    /// Processes that end by themselves.
    exits: Vec<Process>,
    set_up: bool,
    pub(super) trace: Trace,
    out: Vec<Output>,
}

impl World {
    /// A world in which nothing runs yet.
    pub fn new(options: Options, trace: Trace) -> World {
        let seed = options.seed;
        let setup = Setup::new(&options);
        let disk = |i: u8| Disk::new(options.disk, Rng::stream(seed, &format!("disk-{i}")));
        let disks = (0..options.nodes).map(disk).collect();
        let net = Network::new(options.network, Rng::stream(seed, "network"));
        World {
            schedule: Schedule::default(),
            net,
            slots: BTreeMap::new(),
            disks,
            volumes: Vec::new(),
            sessions: Vec::new(),
            handles: BTreeMap::new(),
            history: History::default(),
            faulting: super::faulting::Faulting::new(&options),
            losses: super::loss::Losses::new(&options),
            rng: Rng::stream(seed, "world"),
            probe_rng: Rng::stream(seed, "probes"),
            probes: 0,
            busy: false,
            ops_done: 0,
            errors: BTreeMap::new(),
            exits: Vec::new(),
            set_up: false,
            trace,
            out: Vec::new(),
            setup,
            options,
        }
    }

    /// Virtual time.
    pub fn now(&self) -> Time {
        self.schedule.now()
    }

    /// Gives the trace back.
    pub fn into_trace(self) -> Trace {
        self.trace
    }

    /// Every process, in order.
    pub(super) fn processes(&self) -> Vec<Process> {
        let metas = (0..self.options.metas).map(Process::Meta);
        let nodes = (0..self.options.nodes).map(Process::Node);
        let clients = (0..self.options.clients).map(Process::Client);
        let caretakers = (0..self.options.nodes).map(Process::Caretaker);
        metas.chain(nodes).chain(clients).chain(caretakers).collect()
    }

    /// Lets the next thing happen. `Ok(false)` when nothing is to come.
    pub(super) fn step(&mut self) -> Result<bool, Broken> {
        let Some(event) = self.schedule.next_event() else {
            return Ok(false);
        };
        match event {
            Event::Net(event) => {
                if let Some((process, delivery)) = self.net.handle(self.schedule.now(), event) {
                    self.trace_delivery(process, &delivery);
                    self.deliver(process, Input::Net(delivery))?;
                }
            }
            Event::Disk { node, run, token } => self.disk_done(node, run, token)?,
            Event::Timer { process, run } => self.timer(process, run)?,
            Event::Guest {
                client,
                volume,
                session,
            } => self.guest_turn(client, volume, session)?,
            Event::Close { client, volume } => {
                if self.handles.contains_key(&(client, volume)) {
                    self.deliver(Process::Client(client), Input::Guest(Wish::Close(volume)))?;
                }
            }
            Event::Nemesis(strike) => self.strike(strike)?,
        }
        for process in std::mem::take(&mut self.exits) {
            self.kill(process, false);
            let at = self.now() + EXIT_PAUSE;
            self.schedule
                .at(at, Event::Nemesis(super::faulting::Strike::Restart(process)));
        }
        self.collect_network();
        Ok(true)
    }

    pub(super) fn collect_network(&mut self) {
        for (at, event) in self.net.take_events() {
            self.schedule.at(at, Event::Net(event));
        }
    }

    fn trace_delivery(&mut self, to: Process, delivery: &Delivery<Msg>) {
        let now = self.schedule.now();
        match delivery {
            Delivery::Frame { link, frame } => {
                let crc = crc32fast::hash(&frame.head);
                let numbers = [1, to.number(), link.0, crc.into(), frame.len() as u64];
                let kind = frame.head.get(5).copied().unwrap_or_default();
                self.trace.event(
                    now,
                    &numbers,
                    format_args!(
                        "{to} gets frame 0x{kind:02x} of {} bytes on {link:?} crc {crc:08x}",
                        frame.len()
                    ),
                );
            }
            Delivery::Message { from, message } => {
                let digest = match message {
                    Msg::Raft(bytes) => crc32fast::hash(bytes).into(),
                    Msg::Call { id, .. } => mix(*id),
                    Msg::Answer { id, .. } => mix(mix(*id)),
                };
                let words = match message {
                    Msg::Raft(bytes) => format!("Raft of {} bytes", bytes.len()),
                    Msg::Call { request, .. } => format!("call {}", request.name()),
                    Msg::Answer { answer, .. } => format!("answer {}", answer.name()),
                };
                let numbers = [2, to.number(), from.number(), digest];
                self.trace
                    .event(now, &numbers, format_args!("{to} gets {words} from {from}"));
            }
            Delivery::Accepted { link, from } => {
                let numbers = [3, to.number(), link.0];
                self.trace
                    .event(now, &numbers, format_args!("{to} is connected to by {from}: {link:?}"));
            }
            Delivery::Connected { link } => {
                self.trace.event(
                    now,
                    &[4, to.number(), link.0],
                    format_args!("{to} is connected: {link:?}"),
                );
            }
            Delivery::Closed { link, refused } => {
                let numbers = [5, to.number(), link.0, u64::from(*refused)];
                let words = if *refused { "is refused" } else { "loses" };
                self.trace.event(now, &numbers, format_args!("{to} {words} {link:?}"));
            }
        }
    }

    /// Something happens to a process: now, or when it thaws; never, if it is dead.
    pub(super) fn deliver(&mut self, process: Process, input: Input) -> Result<(), Broken> {
        let Some(slot) = self.slots.get_mut(&process).filter(|slot| slot.actor.is_some()) else {
            return Ok(());
        };
        if slot.frozen > 0 {
            slot.inbox.push_back(input);
            return Ok(());
        }
        self.run_actor(process, |actor, ctx| actor.handle(ctx, input))
    }

    fn run_actor(&mut self, process: Process, act: impl FnOnce(&mut Actor, &mut Ctx<'_>)) -> Result<(), Broken> {
        let world = self.schedule.now();
        let slot = self.slots.get_mut(&process).expect("the caller looked it up");
        let actor = slot.actor.as_mut().expect("the caller looked it up");
        let mut out = std::mem::take(&mut self.out);
        let mut ctx = Ctx {
            world,
            now: slot.clock.local(world),
            me: process,
            net: &mut self.net,
            out: &mut out,
            trace: &mut self.trace,
        };
        act(actor, &mut ctx);
        let timeout = actor.timeout().map(|local| slot.clock.world(local));
        if let Some(at) = timeout
            && slot.timer_at.is_none_or(|planned| at < planned)
        {
            slot.timer_at = Some(at);
            let run = slot.run;
            self.schedule.at(at, Event::Timer { process, run });
        }
        for output in out.drain(..) {
            self.output(process, output)?;
        }
        self.out = out;
        Ok(())
    }

    fn timer(&mut self, process: Process, run: u32) -> Result<(), Broken> {
        let now = self.schedule.now();
        let Some(slot) = self.slots.get_mut(&process).filter(|slot| slot.run == run) else {
            return Ok(());
        };
        // A later entry of the schedule than the one planned last was overtaken.
        if slot.timer_at.is_some_and(|at| at > now) {
            return Ok(());
        }
        slot.timer_at = None;
        let Some(actor) = &slot.actor else { return Ok(()) };
        if slot.frozen > 0 {
            return Ok(());
        }
        let local = slot.clock.local(now);
        let due = actor.timeout().is_some_and(|at| at <= local);
        if !due {
            return self.run_actor(process, |_, _| ());
        }
        if slot.timers_at_once.0 != now {
            slot.timers_at_once = (now, 0);
        }
        slot.timers_at_once.1 += 1;
        if slot.timers_at_once.1 > TIMERS_AT_ONCE_MAX {
            return Err(self.broken(
                "timers make progress",
                format!("{process} is always due for another timer"),
            ));
        }
        self.trace
            .event(now, &[6, process.number()], format_args!("{process} is woken"));
        self.run_actor(process, |actor, ctx| actor.handle_timeout(ctx))
    }

    /// A process goes on after a freeze: everything that waited for it happens at once.
    pub(super) fn thaw(&mut self, process: Process) -> Result<(), Broken> {
        while let Some(slot) = self.slots.get_mut(&process)
            && slot.frozen == 0
            && slot.actor.is_some()
            && let Some(input) = slot.inbox.pop_front()
        {
            self.run_actor(process, |actor, ctx| actor.handle(ctx, input))?;
        }
        let alive = self
            .slots
            .get(&process)
            .is_some_and(|slot| slot.actor.is_some() && slot.frozen == 0);
        if alive {
            self.run_actor(process, |_, _| ())?;
        }
        Ok(())
    }

    fn output(&mut self, process: Process, output: Output) -> Result<(), Broken> {
        match output {
            Output::Disk(op) => self.disk_submit(process, op),
            Output::SetUp(created) => {
                self.set_up = true;
                self.volumes = created.into_iter().map(|created| VolumeState { created }).collect();
            }
            Output::Grown(id, bytes) => self.grown(id, bytes),
            Output::Unusable(words) => {
                let Process::Node(node) = process else {
                    unreachable!("only nodes have devices");
                };
                if !self.disks[usize::from(node)].is_hurt() {
                    return Err(self.broken("components agree with each other", words));
                }
                self.exits.push(process);
            }
            Output::Broken(words) => return Err(self.broken("components agree with each other", words)),
            Output::Opened(handle) => {
                if let Some(session) = self.session_mut(process, handle) {
                    if session.phase == SessionPhase::Opening {
                        session.phase = SessionPhase::Open;
                    }
                    self.wake_guest(process, handle);
                }
            }
            Output::Attached(handle, generation) => {
                if let Some(session) = self.session_mut(process, handle) {
                    session.generation = Some(generation);
                    let number = session.guest.session;
                    self.history.attached(number, generation);
                }
            }
            Output::Closed(handle) => {
                if let Some(session) = self.session_mut(process, handle) {
                    session.phase = SessionPhase::Over;
                    let left = session.guest.in_flight.len();
                    if left > 0 {
                        let words = format!("{process} closed {handle:?} with {left} operations unanswered");
                        return Err(self.broken("every operation is answered", words));
                    }
                }
            }
            Output::Reply {
                volume,
                op,
                result,
                generation,
            } => self.replied(process, volume, op, result, generation)?,
        }
        Ok(())
    }

    /// A volume has grown: guests use what is new, and what lies around its former end.
    fn grown(&mut self, id: VolumeId, bytes: u64) {
        let Some(volume) = self.volumes.iter().position(|volume| volume.created.id == id) else {
            return;
        };
        let volume = &mut self.options.volumes[volume];
        if bytes > volume.bytes {
            let former_end = volume.bytes / BLOCK_BYTES as u64;
            volume.regions.push((former_end - 2, GROWN_BLOCKS));
            volume.bytes = bytes;
        }
    }

    pub(super) fn is_set_up(&self) -> bool {
        self.set_up
    }

    pub(super) fn broken(&self, promise: &'static str, words: String) -> Broken {
        Broken {
            promise,
            words,
            at: self.now(),
            story: Vec::new(),
        }
    }

    // Disks.

    fn disk_submit(&mut self, process: Process, op: DiskOp) {
        let Process::Node(node) = process else {
            unreachable!("only nodes have devices");
        };
        let now = self.schedule.now();
        let (kind, place) = match &op {
            DiskOp::Read { at, blocks, .. } => (10, (at.0, u64::from(*blocks))),
            DiskOp::Write { at, buffers, .. } => (11, (at.0, buffers.iter().map(|b| b.len() as u64 / 4096).sum())),
            DiskOp::Flush { .. } => (12, (0, 0)),
        };
        let digest = match &op {
            // Enough to notice what differs, at little cost.
            DiskOp::Write { buffers, .. } => crc32fast::hash(&buffers[0][..512]),
            _ => 0,
        };
        let name = ["reads", "writes", "flushes"][kind as usize - 10];
        let numbers = [kind, process.number(), place.0, place.1, digest.into()];
        self.trace.event(
            now,
            &numbers,
            format_args!("{process} {name} @{}+{} {digest:08x}", place.0, place.1),
        );
        let (token, latency) = self.disks[usize::from(node)].submit(op);
        let run = self.slots[&process].run;
        self.schedule.at(now + latency, Event::Disk { node, run, token });
    }

    fn disk_done(&mut self, node: u8, run: u32, token: DiskToken) -> Result<(), Broken> {
        let process = Process::Node(node);
        let same_run = self
            .slots
            .get(&process)
            .is_some_and(|slot| slot.run == run && slot.actor.is_some());
        if !same_run {
            return Ok(());
        }
        let is_read = self.disks[usize::from(node)].is_read(token);
        let Some(done) = self.disks[usize::from(node)].complete(token) else {
            return Ok(());
        };
        let now = self.schedule.now();
        let numbers = [13, process.number(), token.0];
        self.trace
            .event(now, &numbers, format_args!("{process} disk done {token:?}"));
        let failed = done.result.is_err();
        self.deliver(process, Input::Disk(done))?;
        if failed {
            self.check_failure_is_told(node, is_read)
        } else {
            Ok(())
        }
    }

    /// A device that does not take what it is given is given up, and its node says so.
    fn check_failure_is_told(&self, node: u8, is_read: bool) -> Result<(), Broken> {
        let slot = self.slots.get(&Process::Node(node)).filter(|slot| slot.frozen == 0);
        let Some(Actor::Node(actor)) = slot.and_then(|slot| slot.actor.as_ref()) else {
            return Ok(());
        };
        match actor.status() {
            Some(status) if !is_read && status.failed.is_none() => Err(self.broken(
                "a device that fails is told of",
                format!("node-{node} had a write or a flush that failed, and goes on"),
            )),
            _ => Ok(()),
        }
    }

    pub(super) fn unstick(&mut self, node: u8, tokens: Vec<DiskToken>) {
        let now = self.schedule.now();
        let run = self.slots.get(&Process::Node(node)).map_or(0, |slot| slot.run);
        for token in tokens {
            self.schedule.at(now, Event::Disk { node, run, token });
        }
    }

    // Processes.

    /// Starts a process; a new run of it if it ran before.
    pub(super) fn start(&mut self, process: Process) -> Result<(), Broken> {
        let now = self.schedule.now();
        let run = self.slots.get(&process).map_or(0, |slot| slot.run + 1);
        let runs = self.slots.get(&process).is_some_and(|slot| slot.actor.is_some());
        if runs || self.losses.holds(process) {
            return Ok(());
        }
        self.trace.event(
            now,
            &[20, process.number(), run.into()],
            format_args!("{process} starts, run {run}"),
        );
        let clock = match self.slots.get(&process) {
            Some(slot) => slot.clock,
            None => self.setup.clock(process, &self.options),
        };
        let frozen = self.slots.get(&process).map_or(0, |slot| slot.frozen);
        let actor = self.setup.actor(process, run, &self.disks, clock.local(now));
        let slot = Slot {
            actor: Some(actor),
            clock,
            frozen,
            inbox: VecDeque::new(),
            timer_at: None,
            run,
            timers_at_once: (now, 0),
        };
        self.slots.insert(process, slot);
        self.net.process_back(now, process);
        self.run_actor(process, |actor, ctx| actor.start(ctx))?;
        self.collect_network();
        match process {
            Process::Node(node) => self.start(Process::Caretaker(node)),
            _ => Ok(()),
        }
    }

    /// Ends a process at once; with the power, what its host had in volatile caches goes too.
    pub(super) fn kill(&mut self, process: Process, power_too: bool) {
        let now = self.schedule.now();
        let Some(slot) = self.slots.get_mut(&process) else {
            return;
        };
        let Some(actor) = slot.actor.take() else { return };
        slot.inbox.clear();
        slot.timer_at = None;
        let words = if power_too { "loses its power" } else { "is killed" };
        self.trace.event(
            now,
            &[21, process.number(), power_too.into()],
            format_args!("{process} {words}"),
        );
        self.net.process_down(now, process, power_too);
        match process {
            Process::Node(node) if power_too => self.disks[usize::from(node)].power_cut(),
            Process::Node(node) => self.disks[usize::from(node)].process_killed(),
            Process::Client(client) => self.client_died(client),
            Process::Meta(_) => self.setup.meta_stopped(process, actor, &mut self.rng),
            Process::Operator | Process::Caretaker(_) => {}
        }
        self.collect_network();
        if let Process::Node(node) = process {
            self.kill(Process::Caretaker(node), power_too);
        }
    }

    fn client_died(&mut self, client: u8) {
        for session in self.sessions.iter_mut().filter(|session| session.client == client) {
            session.phase = SessionPhase::Over;
            session.guest.in_flight.clear();
        }
        self.handles.retain(|(of, _), _| *of != client);
    }

    /// The clock of a process jumps forward: what it waited for may be due.
    pub(super) fn jump(&mut self, process: Process, span: Duration) -> Result<(), Broken> {
        let Some(slot) = self.slots.get_mut(&process) else {
            return Ok(());
        };
        slot.clock.jump(span);
        if slot.actor.is_some() && slot.frozen == 0 {
            self.run_actor(process, |_, _| ())?;
        }
        Ok(())
    }
}
