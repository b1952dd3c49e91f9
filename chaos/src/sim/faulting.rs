//! How faults strike the world, and how they end.

use std::collections::BTreeMap;
use std::time::Duration;

use cairn_proto::ids::NodeId;
use cairn_proto::limits::{BLOCK_BYTES, BLOCKS_PER_CHUNK};

use super::actors::{Actor, Input, operator};
use super::disk::DiskErrors;
use super::nemesis::FaultKind;
use super::options::Options;
use super::process::Process;
use super::split::Play;
use super::world::{Event, GROWN_BLOCKS, SessionPhase, World};
use crate::checker::history::Broken;
use crate::rng::{Rng, mix};

/// How often it is looked whether each volume is in use.
const KEEP_INTERVAL: Duration = Duration::from_millis(150);

/// A volume with more regions than this does not grow any more.
const GROWN_REGIONS_MAX: usize = 7;

/// An entry of the schedule about faults.
#[derive(Clone, Debug)]
pub(super) enum Strike {
    /// The next fault.
    Next,
    /// Somebody uses each volume.
    Keep,
    Restart(Process),
    /// The power of a process's host fails for a moment.
    Power(Process),
    Thaw(Process),
    Unblock(Vec<(Process, Process)>),
    Flap {
        way: (Process, Process),
        blocked: bool,
        turns: u32,
    },
    Unslow(Process),
    UnslowDisk(u8),
    Unstick(u8),
    /// A device works again; a node that has given it up is started anew.
    Mend(u8),
    /// A node that was away is back.
    Return(u8),
    /// A node may hold copies again.
    Undrain(NodeId),
    /// A device is lost while a member is being ejected, if that comes to pass within so many looks.
    Race {
        kind: FaultKind,
        node: u8,
        looks: u32,
    },
    /// The play about split holders goes on.
    Play,
}

/// Where the faults of a world come from.
pub(super) struct Faulting {
    pub(super) active: bool,
    pub(super) rng: Rng,
    weights: [u32; FaultKind::COUNT],
    interval: Duration,
    span: Duration,
    /// The play about split holders that is under way.
    pub(super) play: Option<Play>,
    /// How often each kind struck.
    pub(super) counts: BTreeMap<&'static str, u64>,
}

impl Faulting {
    pub(super) fn new(options: &Options) -> Faulting {
        Faulting {
            active: false,
            rng: Rng::stream(options.seed, "faults"),
            weights: options.faults.weights,
            interval: options.faults.interval,
            span: options.faults.span,
            play: None,
            counts: BTreeMap::new(),
        }
    }
}

impl World {
    /// From now on things go wrong.
    pub(super) fn begin_faults(&mut self) {
        self.faulting.active = true;
        let now = self.now();
        self.schedule.at(now, Event::Nemesis(Strike::Keep));
        if self.faulting.weights.iter().any(|weight| *weight > 0) {
            self.schedule.at(now, Event::Nemesis(Strike::Next));
        }
    }

    /// From now on nothing goes wrong, and what is broken is mended.
    pub(super) fn heal(&mut self) -> Result<(), Broken> {
        self.faulting.active = false;
        self.faulting.play = None;
        for session in &mut self.sessions {
            session.guest.aim = None;
        }
        self.busy = false;
        let now = self.now();
        self.trace.event(now, &[50], format_args!("everything heals"));
        self.net.heal(now);
        self.collect_network();
        for node in 0..self.options.nodes {
            let tokens = self.disks[usize::from(node)].heal();
            self.unstick(node, tokens);
            self.end_of_failed(node);
        }
        for process in self.processes() {
            if let Some(slot) = self.slots.get_mut(&process)
                && std::mem::take(&mut slot.frozen) > 0
            {
                self.thaw(process)?;
            }
            let late = self.faulting.rng.span(Duration::ZERO, Duration::from_millis(200));
            self.schedule.at(now + late, Event::Nemesis(Strike::Restart(process)));
        }
        Ok(())
    }

    pub(super) fn strike(&mut self, strike: Strike) -> Result<(), Broken> {
        if let Strike::Restart(process) = strike {
            return self.start(process);
        }
        if !self.faulting.active {
            return Ok(());
        }
        match strike {
            Strike::Next => {
                let weights = self.faulting.weights;
                let kind = FaultKind::ALL[self.faulting.rng.weighted(&weights)];
                if !self.must_wait(kind) {
                    self.inject(kind)?;
                }
                let pause = self.faulting.rng.spread(self.faulting.interval);
                self.later(pause, Strike::Next);
            }
            Strike::Keep => {
                self.keep_volumes_in_use()?;
                self.later(KEEP_INTERVAL, Strike::Keep);
            }
            Strike::Restart(_) => unreachable!("handled above"),
            Strike::Power(process) => {
                self.kill(process, true);
                let span = self.span();
                self.later(span, Strike::Restart(process));
            }
            Strike::Thaw(process) => {
                if let Some(slot) = self.slots.get_mut(&process) {
                    slot.frozen = slot.frozen.saturating_sub(1);
                }
                self.note(format_args!("{process} goes on"));
                self.thaw(process)?;
            }
            Strike::Unblock(ways) => {
                let now = self.now();
                self.note(format_args!("ways open again: {ways:?}"));
                for (from, to) in ways {
                    self.net.block(now, from, to, false);
                }
            }
            Strike::Flap { way, blocked, turns } => self.flap(way, blocked, turns),
            Strike::Unslow(process) => self.net.slow(process, Duration::ZERO),
            Strike::UnslowDisk(node) => self.disks[usize::from(node)].slow(false),
            Strike::Unstick(node) => {
                let tokens = self.disks[usize::from(node)].stuck(false);
                self.unstick(node, tokens);
            }
            Strike::Mend(node) => self.mend(node),
            Strike::Return(node) => self.come_back(node),
            Strike::Undrain(node) => self.drain(node, false)?,
            Strike::Race { kind, node, looks } => self.race(kind, node, looks),
            Strike::Play => self.go_on_playing()?,
        }
        Ok(())
    }

    pub(super) fn note(&mut self, words: std::fmt::Arguments<'_>) {
        let now = self.now();
        self.trace.note(now, words);
    }

    pub(super) fn later(&mut self, span: Duration, strike: Strike) {
        let at = self.now() + span;
        self.schedule.at(at, Event::Nemesis(strike));
    }

    pub(super) fn span(&mut self) -> Duration {
        self.faulting.rng.spread(self.faulting.span)
    }

    fn inject(&mut self, kind: FaultKind) -> Result<(), Broken> {
        let now = self.now();
        self.trace
            .event(now, &[51, kind as u64], format_args!("fault: {}", kind.name()));
        *self.faulting.counts.entry(kind.name()).or_default() += 1;
        match kind {
            FaultKind::KillMeta => self.kill_one(|p| matches!(p, Process::Meta(_)), false),
            FaultKind::KillNode => self.kill_one(|p| matches!(p, Process::Node(_)), false),
            FaultKind::KillClient => self.kill_one(|p| matches!(p, Process::Client(_)), false),
            FaultKind::PowerNode => self.kill_one(|p| matches!(p, Process::Node(_)), true),
            FaultKind::KillAll => self.kill_all(false),
            FaultKind::PowerAll => self.kill_all(true),
            FaultKind::Freeze => self.freeze(),
            FaultKind::Isolate => self.isolate(),
            FaultKind::OneWay => {
                if let Some((a, b)) = self.pair() {
                    self.block(vec![(a, b)]);
                }
            }
            FaultKind::Flapping => {
                if let Some(way) = self.pair() {
                    let turns = self.faulting.rng.within(4, 20) as u32;
                    self.flap(way, true, turns);
                }
            }
            FaultKind::SplitMeta => self.split_meta(),
            FaultKind::SlowNetwork => {
                let process = *self.faulting.rng.pick(&self.processes());
                let extra = self
                    .faulting
                    .rng
                    .span(Duration::from_millis(1), Duration::from_millis(300));
                self.net.slow(process, extra);
                let span = self.span();
                self.later(span, Strike::Unslow(process));
            }
            FaultKind::Reset => {
                let links = self.net.established();
                if !links.is_empty() {
                    let link = *self.faulting.rng.pick(&links);
                    self.net.reset(now, link);
                }
            }
            FaultKind::HalfOpen => {
                let links = self.net.established();
                if !links.is_empty() {
                    let link = *self.faulting.rng.pick(&links);
                    self.net.silence(link);
                }
            }
            FaultKind::SlowDisk => {
                let node = self.faulting.rng.index(self.disks.len()) as u8;
                self.disks[usize::from(node)].slow(true);
                let span = self.span();
                self.later(span, Strike::UnslowDisk(node));
            }
            FaultKind::StuckDisk => {
                let node = self.faulting.rng.index(self.disks.len()) as u8;
                let tokens = self.disks[usize::from(node)].stuck(true);
                self.unstick(node, tokens);
                let span = self.span();
                self.later(span, Strike::Unstick(node));
            }
            FaultKind::Drain => self.drain_one()?,
            FaultKind::AddNode => self.add_node(),
            FaultKind::NodeGone => self.node_gone(),
            FaultKind::GreyNode => self.grey_node(),
            FaultKind::TakeOver => self.take_over()?,
            FaultKind::Zombie => self.zombie()?,
            FaultKind::Split => self.begin_play(),
            FaultKind::HandOver => self.hand_over()?,
            FaultKind::Grow => self.grow()?,
            FaultKind::ClockJump => self.jump_clock()?,
            FaultKind::ReadError => self.device_errors(true),
            FaultKind::WriteError => self.device_errors(false),
            FaultKind::BitRot => self.rot(),
            FaultKind::LostWrite => self.lie(true),
            FaultKind::Misdirected => self.lie(false),
            FaultKind::StaleSector => self.make_stale(),
            FaultKind::Wiped
            | FaultKind::Swapped
            | FaultKind::Replaced
            | FaultKind::NodeLost
            | FaultKind::NodeBack
            | FaultKind::DomainGone => {
                if !self.lose(kind) {
                    *self.faulting.counts.entry(kind.name()).or_default() -= 1;
                }
            }
            FaultKind::Release => {
                let open: Vec<usize> = self.open_sessions();
                if !open.is_empty() {
                    let session = *self.faulting.rng.pick(&open);
                    self.close(session)?;
                }
            }
        }
        self.collect_network();
        Ok(())
    }

    /// The node that stays away or is slow: the same one for the whole run, so that the others are never at fault for that.
    pub(super) fn victim(&self) -> u8 {
        let first = self.options.nodes - self.options.late_nodes;
        (mix(self.options.seed) % u64::from(first)) as u8
    }

    fn node_gone(&mut self) {
        let node = self.victim();
        let victim = Process::Node(node);
        // Often for what is left of the run.
        let span = match self.faulting.rng.below(3) {
            0 => self.options.faulty,
            _ => self.span(),
        };
        match self.faulting.rng.below(4) {
            0 => {
                let power_too = self.faulting.rng.permille(500);
                self.kill(victim, power_too);
                self.later(span, Strike::Restart(victim));
            }
            1 => {
                if let Some(slot) = self.slots.get_mut(&victim) {
                    slot.frozen += 1;
                }
                self.later(span, Strike::Thaw(victim));
            }
            2 => {
                let tokens = self.disks[usize::from(node)].stuck(true);
                self.unstick(node, tokens);
                self.later(span, Strike::Unstick(node));
            }
            _ => {
                let now = self.now();
                let others = self.processes().into_iter().filter(|other| *other != victim);
                let ways: Vec<_> = others.flat_map(|other| [(victim, other), (other, victim)]).collect();
                for (from, to) in &ways {
                    self.net.block(now, *from, *to, true);
                }
                self.later(span, Strike::Unblock(ways));
            }
        }
    }

    fn grey_node(&mut self) {
        let node = self.victim();
        let span = self.span() * 3;
        if self.faulting.rng.permille(500) {
            self.disks[usize::from(node)].slow(true);
            return self.later(span, Strike::UnslowDisk(node));
        }
        let extra = self
            .faulting
            .rng
            .span(Duration::from_millis(20), Duration::from_millis(2000));
        self.net.slow(Process::Node(node), extra);
        self.later(span, Strike::Unslow(Process::Node(node)));
    }

    fn alive(&self, of: impl Fn(&Process) -> bool) -> Vec<Process> {
        let alive = self.slots.iter().filter(|(_, slot)| slot.actor.is_some());
        alive
            .map(|(process, _)| *process)
            .filter(|process| *process != Process::Operator && of(process))
            .collect()
    }

    fn kill_one(&mut self, of: impl Fn(&Process) -> bool, power_too: bool) {
        let candidates = self.alive(of);
        if candidates.is_empty() {
            return;
        }
        let process = *self.faulting.rng.pick(&candidates);
        self.kill(process, power_too);
        let span = self.span();
        self.later(span, Strike::Restart(process));
    }

    fn kill_all(&mut self, power_too: bool) {
        let span = self.span();
        for process in self.alive(|_| true) {
            self.kill(process, power_too);
            let late = self.faulting.rng.span(Duration::ZERO, span + Duration::from_millis(50));
            self.later(late, Strike::Restart(process));
        }
    }

    fn freeze(&mut self) {
        let candidates = self.alive(|_| true);
        if candidates.is_empty() {
            return;
        }
        let process = *self.faulting.rng.pick(&candidates);
        self.note(format_args!("{process} is frozen"));
        if let Some(slot) = self.slots.get_mut(&process) {
            slot.frozen += 1;
        }
        let span = match self.faulting.rng.below(4) {
            0 => Duration::from_millis(5000),
            1 => Duration::from_millis(1200),
            _ => self.span(),
        };
        self.later(span, Strike::Thaw(process));
    }

    fn block(&mut self, ways: Vec<(Process, Process)>) {
        let now = self.now();
        self.note(format_args!("ways are cut: {ways:?}"));
        for (from, to) in &ways {
            self.net.block(now, *from, *to, true);
        }
        let span = self.span();
        self.later(span, Strike::Unblock(ways));
    }

    fn isolate(&mut self) {
        let processes = self.processes();
        let lonely = *self.faulting.rng.pick(&processes);
        let others = processes.into_iter().filter(|other| *other != lonely);
        let ways = others.flat_map(|other| [(lonely, other), (other, lonely)]).collect();
        self.block(ways);
    }

    fn pair(&mut self) -> Option<(Process, Process)> {
        let processes = self.processes();
        for _ in 0..8 {
            let (a, b) = (*self.faulting.rng.pick(&processes), *self.faulting.rng.pick(&processes));
            let speak = match (a, b) {
                (Process::Meta(a), Process::Meta(b)) => a != b,
                (Process::Node(a), Process::Node(b)) => a != b,
                (Process::Client(_), Process::Client(_)) => false,
                _ => true,
            };
            if speak {
                return Some((a, b));
            }
        }
        None
    }

    fn flap(&mut self, way: (Process, Process), block: bool, turns: u32) {
        let now = self.now();
        self.net.block(now, way.0, way.1, block);
        if turns == 0 && !block {
            return;
        }
        let pause = self
            .faulting
            .rng
            .span(Duration::from_millis(5), Duration::from_millis(400));
        let next = Strike::Flap {
            way,
            blocked: !block,
            turns: turns.saturating_sub(1),
        };
        self.later(pause, next);
    }

    fn split_meta(&mut self) {
        let (left, right): (Vec<u8>, Vec<u8>) = (0..self.options.metas).partition(|_| self.faulting.rng.permille(500));
        let ways = left
            .iter()
            .flat_map(|a| right.iter().map(move |b| (Process::Meta(*a), Process::Meta(*b))));
        let ways: Vec<_> = ways.flat_map(|(a, b)| [(a, b), (b, a)]).collect();
        if !ways.is_empty() {
            self.block(ways);
        }
    }

    /// A volume moves: the target is there, the source drains and releases, the guest goes on at the target.
    fn hand_over(&mut self) -> Result<(), Broken> {
        let open = self.open_sessions();
        if open.is_empty() {
            return Ok(());
        }
        let source = *self.faulting.rng.pick(&open);
        let volume = self.sessions[source].volume;
        let free = self.free_clients(volume);
        if free.is_empty() {
            return Ok(());
        }
        let client = *self.faulting.rng.pick(&free);
        let target = self.open(client, volume)?;
        self.sessions[target].after = Some(source);
        self.close(source)
    }

    fn grow(&mut self) -> Result<(), Broken> {
        let volume = self.faulting.rng.index(self.volumes.len());
        let blocks = self.faulting.rng.within(GROWN_BLOCKS, u64::from(BLOCKS_PER_CHUNK));
        let bytes = self.options.volumes[volume].bytes + blocks * BLOCK_BYTES as u64;
        if self.options.volumes[volume].regions.len() > GROWN_REGIONS_MAX {
            return Ok(());
        }
        let id = self.volumes[volume].created.id;
        self.deliver(Process::Operator, Input::Operator(operator::Wish::Grow(id, bytes)))
    }

    /// Of nodes no clock jumps: that none does by itself, only together with the time that a host was suspended, is what
    /// read grants rest on.
    fn jump_clock(&mut self) -> Result<(), Broken> {
        let candidates = self.alive(|process| !matches!(process, Process::Node(_)));
        if candidates.is_empty() {
            return Ok(());
        }
        let process = *self.faulting.rng.pick(&candidates);
        let most = *self.faulting.rng.pick(&[50, 2000, 60_000]);
        let span = self
            .faulting
            .rng
            .span(Duration::from_millis(1), Duration::from_millis(most));
        self.note(format_args!("the clock of {process} jumps by {span:?}"));
        self.jump(process, span)
    }

    /// On one device at a time, of those with production's store.
    fn device_errors(&mut self, of_reads: bool) {
        let hurt = |disk: &super::disk::Disk| disk.is_hurt() || disk.has_errors();
        if self.options.model_store || self.disks.iter().any(hurt) {
            return;
        }
        let node = self.faulting.rng.index(self.disks.len()) as u8;
        let odds = *self.faulting.rng.pick(&[20, 200, 1000]);
        let errors = match of_reads {
            true => DiskErrors { reads: odds, writes: 0 },
            false => DiskErrors { reads: 0, writes: odds },
        };
        self.note(format_args!("node-{node}: {errors:?}"));
        self.disks[usize::from(node)].set_errors(errors);
        let span = self.span();
        self.later(span, Strike::Mend(node));
    }

    fn mend(&mut self, node: u8) {
        self.disks[usize::from(node)].set_errors(DiskErrors::default());
        if self.end_of_failed(node) {
            let span = self.span();
            self.later(span, Strike::Restart(Process::Node(node)));
        }
    }

    /// Ends a node that has given its device up, as whoever looks after it does.
    fn end_of_failed(&mut self, node: u8) -> bool {
        let process = Process::Node(node);
        let slot = self.slots.get(&process).and_then(|slot| slot.actor.as_ref());
        let failed = match slot {
            Some(Actor::Node(actor)) => actor.status().is_some_and(|status| status.failed.is_some()),
            _ => false,
        };
        if failed {
            self.kill(process, false);
        }
        failed
    }

    fn open_sessions(&self) -> Vec<usize> {
        let open = self.sessions.iter().enumerate();
        open.filter(|(_, session)| session.phase == SessionPhase::Open)
            .map(|(i, _)| i)
            .collect()
    }

    /// Clients that run and have nothing to do with the volume at the moment.
    pub(super) fn free_clients(&self, volume: usize) -> Vec<u8> {
        let alive = self.alive(|process| matches!(process, Process::Client(_)));
        let alive = alive.into_iter().filter_map(|process| match process {
            Process::Client(client) => Some(client),
            _ => None,
        });
        let taken = |client: u8| {
            let mut of_client = self
                .sessions
                .iter()
                .filter(|s| s.client == client && s.volume == volume);
            of_client.any(|session| session.phase != SessionPhase::Over)
        };
        alive.filter(|client| !taken(*client)).collect()
    }

    fn take_over(&mut self) -> Result<(), Broken> {
        let volume = self.faulting.rng.index(self.volumes.len());
        let free = self.free_clients(volume);
        if !free.is_empty() {
            let client = *self.faulting.rng.pick(&free);
            self.open(client, volume)?;
        }
        Ok(())
    }

    /// A holder that can't hear that it is over, with writes on their way to devices that may be stuck or about to lose
    /// what they have just promised to the next holder.
    fn zombie(&mut self) -> Result<(), Broken> {
        let rng = &mut self.faulting.rng;
        let held: Vec<(u8, usize)> = self
            .sessions
            .iter()
            .filter(|session| session.phase == SessionPhase::Open && !session.guest.in_flight.is_empty())
            .map(|session| (session.client, session.volume))
            .collect();
        if held.is_empty() {
            return Ok(());
        }
        let (old, volume) = *rng.pick(&held);
        let nodes: Vec<Process> = (0..self.options.nodes)
            .map(Process::Node)
            .filter(|_| rng.permille(700))
            .collect();
        let old = Process::Client(old);
        let ways: Vec<(Process, Process)> = match rng.below(4) {
            0 => nodes.iter().map(|node| (old, *node)).collect(),
            1 => nodes.iter().map(|node| (*node, old)).collect(),
            2 => nodes.iter().flat_map(|node| [(old, *node), (*node, old)]).collect(),
            _ => Vec::new(),
        };
        if rng.permille(300) {
            let node = rng.index(self.disks.len()) as u8;
            let span = rng.span(Duration::from_millis(500), Duration::from_millis(2500));
            let tokens = self.disks[usize::from(node)].stuck(true);
            self.unstick(node, tokens);
            self.later(span, Strike::Unstick(node));
        }
        let rng = &mut self.faulting.rng;
        if rng.permille(400) {
            // Now, or when the first holder's read grants have run out.
            let node = Process::Node(rng.index(self.disks.len()) as u8);
            let (low, high) = *rng.pick(&[(0, 30), (900, 1300)]);
            let after = rng.span(Duration::from_millis(low), Duration::from_millis(high));
            self.later(after, Strike::Power(node));
        }
        let cut_off = !ways.is_empty();
        self.block(ways);
        if !cut_off && let Some(slot) = self.slots.get_mut(&old) {
            slot.frozen += 1;
            let span = self.span();
            self.later(span + Duration::from_secs(1), Strike::Thaw(old));
        }
        let free = self.free_clients(volume);
        if !free.is_empty() {
            let client = *self.faulting.rng.pick(&free);
            self.open(client, volume)?;
        }
        Ok(())
    }

    fn keep_volumes_in_use(&mut self) -> Result<(), Broken> {
        let played = self.faulting.play.as_ref().map(Play::volume);
        for volume in (0..self.volumes.len()).filter(|volume| Some(*volume) != played) {
            let in_use = self.sessions.iter().any(|session| {
                session.volume == volume && matches!(session.phase, SessionPhase::Open | SessionPhase::Opening)
            });
            let free = self.free_clients(volume);
            if !in_use && !free.is_empty() {
                let client = *self.faulting.rng.pick(&free);
                self.open(client, volume)?;
            }
        }
        Ok(())
    }

    /// The core has said that the attachment is over: who runs it closes the volume.
    pub(super) fn close_fenced(&mut self, index: usize) {
        let session = &mut self.sessions[index];
        if session.phase == SessionPhase::Open {
            session.phase = SessionPhase::Fenced;
            let (client, volume) = (session.client, session.handle);
            self.schedule.at(self.schedule.now(), Event::Close { client, volume });
        }
    }
}
