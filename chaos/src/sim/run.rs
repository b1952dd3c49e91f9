//! One seed from start to verdict: set up, load with faults, heal, and then everything must come right.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use cairn_proto::ids::{ChunkIndex, VolumeId};
use cairn_proto::limits::{BLOCKS_PER_CHUNK, FRAME_BLOCKS_MAX};

use super::actors::operator::Wish;
use super::actors::{Actor, Input};
use super::guest::Plan;
use super::options::Options;
use super::process::Process;
use super::trace::{Keep, Trace};
use super::world::{Event, SessionPhase, Slot, World};
use crate::checker::history::{Broken, Checked, Op};

/// Virtual time that setting up may take.
const SET_UP_BOUND: Duration = Duration::from_secs(60);
/// Virtual time in which, after everything has healed, all I/O must complete.
const COMPLETE_BOUND: Duration = Duration::from_secs(60);
/// Virtual time that an operation may take while only one node is at fault: a take-over waits for read grants and for
/// the members that it will eject, and asks meta.
const WAIT_BOUND: Duration = Duration::from_secs(5);
/// Events of one world at the most: more are a loop.
const EVENTS_MAX: u64 = 20_000_000;
/// Bytes under way in one direction of one connection at the most, with room for what a peer's limits allow.
const LINK_BYTES_MAX: usize = 80 << 20;
/// Entries of the schedule at the most.
const SCHEDULE_MAX: usize = 200_000;

/// What came of a seed.
#[derive(Clone, Debug)]
pub struct Report {
    /// Which seed.
    pub seed: u64,
    /// What is broken; `None` if nothing is.
    pub broken: Option<Broken>,
    /// What the seed chose.
    pub options: String,
    /// How much was done.
    pub stats: Stats,
    /// The end of the trace's hash chain.
    pub hash: u64,
}

/// How long a fetch may take to end, once all are well.
const FETCHES_BOUND: Duration = Duration::from_secs(10);

/// How much a world did.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Events.
    pub events: u64,
    /// Operations that were called.
    pub ops: u64,
    /// Operations that were done.
    pub done: u64,
    /// Operations that ended with an error, by kind.
    pub errors: BTreeMap<String, u64>,
    /// Sessions.
    pub sessions: u64,
    /// Frames that arrived.
    pub frames: u64,
    /// Copies that coordinators sent, and that arrived.
    pub copies: u64,
    /// Copies whose content nodes got from each other.
    pub fetched: u64,
    /// How often each fault struck.
    pub faults: BTreeMap<&'static str, u64>,
    /// Virtual time, in milliseconds.
    pub virtual_ms: u64,
    /// Acknowledged writes of which it was looked at once whether enough devices hold them.
    pub probes: u64,
    /// Blocks whose history was checked.
    pub blocks: u64,
    /// Blocks whose history could not be decided.
    pub undecided: u64,
    /// Processor time, in microseconds.
    pub cpu_us: u64,
}

thread_local! {
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Panics of simulated worlds become verdicts, without a word on standard error. Panics elsewhere are as loud as ever.
pub fn install_panic_hook() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let inside = PANIC.with_borrow_mut(|slot| match slot {
                Some(words) => {
                    *words = info.to_string();
                    true
                }
                None => false,
            });
            if !inside {
                before(info);
            }
        }));
    });
}

/// Which store nodes run on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StoreKind {
    /// Production's.
    Production,
    /// The model of a store.
    Model,
}

/// Runs a seed. The trace is given back with as much text as was asked for.
pub fn run_seed(seed: u64, keep: Keep) -> (Report, Trace) {
    run_seed_on(seed, None, keep)
}

/// Runs a seed with nodes on a store of this kind, whatever the seed chooses.
pub fn run_seed_on(seed: u64, store: Option<StoreKind>, keep: Keep) -> (Report, Trace) {
    let mut options = Options::of_seed(seed);
    if let Some(store) = store {
        options.model_store = store == StoreKind::Model;
    }
    run(options, keep)
}

/// Runs a world of these options.
pub fn run(options: Options, keep: Keep) -> (Report, Trace) {
    install_panic_hook();
    let began = cpu_time();
    let words = options.to_string();
    let seed = options.seed;
    let mut world = World::new(options, Trace::new(keep));
    PANIC.set(Some(String::new()));
    let result = catch_unwind(AssertUnwindSafe(|| world.live()));
    let panic = PANIC.take().unwrap_or_default();
    let result = result.unwrap_or_else(|_| Err(world.broken("assertions of the code hold", panic)));
    let mut stats = world.stats();
    let broken = match result {
        Ok(checked) => {
            stats.blocks = checked.blocks as u64;
            stats.undecided = checked.undecided as u64;
            None
        }
        Err(broken) => Some(broken),
    };
    stats.cpu_us = u64::try_from((cpu_time() - began).as_micros()).unwrap_or(u64::MAX);
    let trace = world.into_trace();
    let report = Report {
        seed,
        broken,
        options: words,
        stats,
        hash: trace.hash(),
    };
    (report, trace)
}

/// Processor time of this thread.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

impl World {
    fn live(&mut self) -> Result<Checked, Broken> {
        self.set_up()?;
        self.load()?;
        self.heal()?;
        if self.options.race {
            // Who is in sync, and so who is needed, is known for sure when all metadata servers are up again.
            self.run_until(COMPLETE_BOUND, |world| world.newest_groups().is_some())?;
            self.call_back_who_is_needed();
        }
        self.complete()?;
        self.read_everything()?;
        self.end_sessions()?;
        self.regain_copies()?;
        self.come_to_rest()?;
        self.count_operations();
        self.check_survivors()?;
        self.check_bounds()?;
        self.check_waits()?;
        let volumes = &self.volumes;
        let group_of = |volume: VolumeId, block: u64| {
            let known = volumes.iter().find(|known| known.created.id == volume);
            let chunk = ChunkIndex((block / u64::from(BLOCKS_PER_CHUNK)) as u32);
            known.map_or(0, |known| known.created.volume.group_count.group_of(chunk).0)
        };
        self.history.check(&group_of)
    }

    fn stats(&self) -> Stats {
        Stats {
            events: self.trace.events(),
            ops: self.history.ops().len() as u64,
            done: self.ops_done,
            errors: self.errors.clone(),
            sessions: self.sessions.len() as u64,
            frames: self.net.counts.frames,
            copies: self.net.counts.copies,
            fetched: self.net.counts.fetched,
            faults: self.faulting.counts.clone(),
            virtual_ms: self.now().as_nanos() / 1_000_000,
            probes: self.probes,
            blocks: 0,
            undecided: 0,
            cpu_us: 0,
        }
    }

    /// Lets things happen until a condition holds. `Ok(false)` when the span has passed without it.
    pub(super) fn run_until(
        &mut self,
        span: Duration,
        mut done: impl FnMut(&mut World) -> bool,
    ) -> Result<bool, Broken> {
        let end = self.now() + span;
        loop {
            if done(self) {
                return Ok(true);
            }
            if self.schedule.next_at().is_none_or(|at| at > end) {
                return Ok(false);
            }
            self.step()?;
            if self.trace.events() > EVENTS_MAX {
                return Err(self.broken("time goes on", format!("more than {EVENTS_MAX} events")));
            }
        }
    }

    fn set_up(&mut self) -> Result<(), Broken> {
        for node in 0..self.options.nodes {
            self.setup.format(node, &mut self.disks[usize::from(node)]);
        }
        let now = self.now();
        for process in self.processes() {
            let late = self.rng.span(Duration::ZERO, Duration::from_millis(300));
            self.schedule
                .at(now + late, Event::Nemesis(super::faulting::Strike::Restart(process)));
        }
        self.start(Process::Operator)?;
        let volumes = self.options.volumes.iter();
        let volumes = volumes.map(|volume| (volume.bytes, volume.min_copies_one)).collect();
        self.deliver(Process::Operator, Input::Operator(Wish::Create(volumes)))?;
        self.collect_network();
        if !self.run_until(SET_UP_BOUND, |world| world.is_set_up())? {
            return Err(self.broken("a cluster gets up", "the volumes could not be created".to_string()));
        }
        Ok(())
    }

    fn load(&mut self) -> Result<(), Broken> {
        self.busy = true;
        self.begin_faults();
        let span = self.options.faulty;
        let ops_max = self.options.ops_max as usize;
        self.run_until(span, |world| world.history.ops().len() >= ops_max)?;
        Ok(())
    }

    /// Every operation ends, and every volume that is being opened or closed is.
    pub(super) fn complete(&mut self) -> Result<(), Broken> {
        let unfinished = |world: &World| {
            let ended = |(process, slot): (&Process, &Slot)| slot.actor.is_none() && !world.losses.holds(*process);
            if world.slots.iter().any(ended) {
                return true;
            }
            let beyond = world.beyond_help();
            let mut sessions = world.sessions.iter();
            sessions.any(|session| {
                let under_way = session
                    .guest
                    .in_flight
                    .values()
                    .map(|(number, _)| world.history.op(*number));
                let mut under_way = under_way.peekable();
                let is_settled = matches!(session.phase, SessionPhase::Over | SessionPhase::Open);
                session.phase != SessionPhase::Over
                    && match under_way.peek() {
                        None => !is_settled,
                        Some(_) => !under_way.all(|op| world.can_not_end(&beyond, session.volume, op)),
                    }
            })
        };
        if self.run_until(COMPLETE_BOUND, |world| !unfinished(world))? {
            return Ok(());
        }
        let words: Vec<String> = self
            .sessions
            .iter()
            .enumerate()
            .filter_map(|(i, s)| self.waits(i, s))
            .collect();
        Err(self.broken("all I/O completes once everything has healed", words.join("; ")))
    }

    fn waits(&self, index: usize, session: &super::world::Session) -> Option<String> {
        let idle = session.phase == SessionPhase::Open && session.guest.in_flight.is_empty();
        if session.phase == SessionPhase::Over || idle {
            return None;
        }
        let ops: Vec<String> = session.guest.in_flight.values().map(|(n, _)| n.to_string()).collect();
        let status = self
            .client(session.client)
            .and_then(|client| client.status(session.handle));
        Some(format!(
            "session {index} of client {} is {:?}, operations {} wait, the core says {status:?}",
            session.client,
            session.phase,
            ops.join(", ")
        ))
    }

    /// Someone reads all that was ever touched: what was acknowledged is there.
    pub(super) fn read_everything(&mut self) -> Result<(), Broken> {
        for volume in 0..self.volumes.len() {
            let mut attempts = 0;
            loop {
                attempts += 1;
                let session = self.session_for(volume, attempts > 1)?;
                if self.read_volume(volume, session)? {
                    break;
                }
                if attempts > 5 {
                    return Err(self.broken(
                        "all I/O completes once everything has healed",
                        format!("volume {volume} is always fenced, though nobody attaches it any more"),
                    ));
                }
            }
        }
        Ok(())
    }

    /// A session that is attached last, or a new one.
    fn session_for(&mut self, volume: usize, fresh: bool) -> Result<usize, Broken> {
        let of_volume = self.sessions.iter().enumerate();
        let open = of_volume.filter(|(_, s)| s.volume == volume && s.phase == SessionPhase::Open);
        let newest = open.max_by_key(|(_, session)| session.generation).map(|(i, _)| i);
        let fresh = fresh || self.rng.permille(500);
        if newest.is_none() {
            // Those who have a session are about to release it.
            self.run_until(COMPLETE_BOUND, |world| !world.free_clients(volume).is_empty())?;
        }
        let free = self.free_clients(volume);
        match newest {
            Some(newest) if !fresh || free.is_empty() => Ok(newest),
            _ => {
                assert!(!free.is_empty(), "no session, and no client without one");
                let client = *self.rng.pick(&free);
                self.open(client, volume)
            }
        }
    }

    /// `Ok(false)` when it turned out that another attachment had taken over.
    fn read_volume(&mut self, volume: usize, session: usize) -> Result<bool, Broken> {
        let opened = self.run_until(COMPLETE_BOUND, |world| {
            world.sessions[session].phase != SessionPhase::Opening
        })?;
        if !opened {
            let words = format!("session {session} can't open its volume");
            return Err(self.broken("all I/O completes once everything has healed", words));
        }
        let mut plans = Vec::new();
        for (first, count) in self.options.volumes[volume].regions.clone() {
            let mut at = first;
            while at < first + count {
                let blocks = (first + count - at).min(u64::from(FRAME_BLOCKS_MAX) / 4);
                plans.push(Plan::read(at, blocks));
                at += blocks;
            }
        }
        for plan in plans {
            if self.sessions[session].phase == SessionPhase::Open {
                self.submit(session, plan)?;
                self.collect_network();
            }
        }
        self.complete()?;
        Ok(self.sessions[session].phase == SessionPhase::Open)
    }

    /// What nodes still want of each other.
    fn fetching(&self) -> Option<String> {
        self.slots.iter().find_map(|(process, slot)| {
            let Actor::Node(actor) = slot.actor.as_ref()? else {
                return None;
            };
            let status = actor.status()?;
            let open = status.fetching > 0 || status.fetching_bytes > 0;
            open.then(|| {
                let (fetches, bytes) = (status.fetching, status.fetching_bytes);
                format!("{process} still waits for {fetches} fetches and {bytes} bytes of other nodes")
            })
        })
    }

    /// With one node at fault, and meta and the other nodes well, nobody waits for long.
    fn check_waits(&mut self) -> Result<(), Broken> {
        if !self.options.lonely {
            return Ok(());
        }
        let waited = |op: &Op| Some((op.ended.as_ref()?.1.saturating_since(op.called.1), op.number));
        let longest = self.history.ops().iter().filter_map(waited).max();
        let Some((span, number)) = longest.filter(|(span, _)| *span > WAIT_BOUND) else {
            return Ok(());
        };
        let words = format!(
            "operation {number} took {span:?} with one node at fault: {:?}",
            self.history.op(number)
        );
        Err(self.broken("with one node at fault nothing waits for long", words))
    }

    /// Nothing has grown without a bound.
    fn check_bounds(&mut self) -> Result<(), Broken> {
        let promise = "queues are bounded";
        if self.net.bytes_max > LINK_BYTES_MAX {
            let words = format!("{} bytes waited on one connection", self.net.bytes_max);
            return Err(self.broken(promise, words));
        }
        if self.schedule.len() > SCHEDULE_MAX {
            return Err(self.broken(promise, format!("{} events are to come", self.schedule.len())));
        }
        let ended = self.run_until(FETCHES_BOUND, |world| world.fetching().is_none())?;
        match self.fetching().filter(|_| !ended) {
            Some(words) => Err(self.broken(promise, words)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::nemesis::FaultKind;
    use crate::sim::network::NetworkOptions;
    use crate::sim::options::{Ending, FaultOptions};

    #[test]
    fn a_cluster_without_nodes_does_not_get_up_and_the_verdict_says_so() {
        let options = Options {
            nodes: 0,
            late_nodes: 0,
            metas: 3,
            ..Options::of_seed(1)
        };
        let (report, _) = run(options, Keep::Hash);
        assert_eq!(report.broken.map(|broken| broken.promise), Some("a cluster gets up"));
    }

    /// A world in which one node of four is lost, nothing else goes wrong, and nobody holds the volumes in the end.
    fn with_a_node_lost(rebuild_after: Duration) -> Options {
        let weights = FaultKind::ALL.map(|kind| u32::from(kind == FaultKind::NodeLost));
        let mut options = Options {
            metas: 1,
            nodes: 4,
            late_nodes: 0,
            clients: 1,
            racks: 0,
            lonely: false,
            rot: false,
            loss: true,
            model_store: false,
            faulty: Duration::from_secs(8),
            rebuild_after,
            ending: Ending::Released,
            ..Options::of_seed(1)
        };
        options.volumes.truncate(1);
        options.volumes[0].min_copies_one = false;
        options.volumes[0].think = Duration::from_millis(100);
        options.network = NetworkOptions {
            reset_ppm: 0,
            flip_ppm: 0,
            loss_permille: 0,
            double_permille: 0,
            late_permille: 0,
            delay: Duration::from_micros(100),
        };
        options.faults = FaultOptions {
            interval: Duration::from_secs(1),
            span: Duration::from_millis(100),
            weights,
        };
        options
    }

    #[test]
    fn a_node_that_is_lost_is_made_up_for_and_it_is_noticed_when_nobody_does() {
        let lost = |report: &Report| report.stats.faults.get("node-lost").copied();
        let (report, _) = run(with_a_node_lost(Duration::from_secs(6)), Keep::Hash);
        assert_eq!(lost(&report), Some(1), "one more would be too many");
        assert!(report.broken.is_none(), "{:?}", report.broken);
        let (report, _) = run(with_a_node_lost(Duration::from_secs(3600)), Keep::Hash);
        assert_eq!(lost(&report), Some(1));
        let promise = report.broken.map(|broken| broken.promise);
        assert_eq!(promise, Some("every group regains its copies"));
    }
}
