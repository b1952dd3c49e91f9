//! Crash consistency, exhaustively. A workload that its seed fixes is run once to learn what each commit holds. Then it
//! is run again, and power is cut at every operation: when it is submitted, when it completes, and when its end is
//! acknowledged. Recovery must find exactly the state after the last acknowledged commit, or after one that holds whole
//! requests of the one batch that was in flight. Power is cut at every operation of recovery too.

use std::cell::Cell;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use cairn_proto::disk::DiskGeometry;

use cairn_proto::ids::Epoch;

use super::content::GROUP;
use super::crash_format::{Before, cut_formatting};
use super::model::{Model, difference};
use super::rig::{Moment, Rig, formatted};
use super::workload::Workload;
use crate::store::api::{StoreError, StoreReply, StoreRequest};
use crate::store::inspect::{InspectOptions, inspect};
use crate::store::{ScrubCursor, StoreLimits, StoreState};
use crate::testing::{Cut, MemoryDevice, Prng};

/// What is run, and how much of it.
#[derive(Clone, Debug)]
pub struct CrashRun {
    /// Chooses the workload, the order of completions, and what power cuts leave.
    pub seed: u64,
    /// Blocks of the device.
    pub blocks: u64,
    /// Whether completed writes need a flush.
    pub volatile_cache: bool,
    /// Limits of the store.
    pub limits: StoreLimits,
    /// Requests of the workload.
    pub requests: u64,
    /// Blocks of each chunk that data is written to.
    pub span: u32,
    /// Blocks of one request of data at the most.
    pub largest: u64,
    /// Outcomes by chance for each cut that puts more than [`SUBSETS_MAX`] blocks at risk.
    pub torn: u32,
    /// After every so many cuts, recovery is cut at each of its own operations.
    pub nested_every: u64,
    /// After every so many cuts, the store goes on working and is opened anew.
    pub works_on_every: u64,
    /// After every so many cuts, each block of the device must have one owner.
    pub audit_every: u64,
    /// Only this moment, to replay a failure.
    pub only: Option<u64>,
}

/// Where so few blocks are at risk, every subset of them is kept once.
pub const SUBSETS_MAX: usize = 3;

/// What was done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CrashTotals {
    /// Operations that the device completed in the workload.
    pub operations: u64,
    /// Commits of the workload.
    pub commits: u64,
    /// Checkpoints of the workload.
    pub checkpoints: u64,
    /// Requests refused because the device was full.
    pub no_space: u64,
    /// Blocks that were moved together.
    pub moved: u64,
    /// Blocks that were written to the device.
    pub blocks_written: u64,
    /// Moments at which power was cut.
    pub moments: u64,
    /// Recoveries from those cuts: each moment has several outcomes.
    pub recoveries: u64,
    /// Recoveries from cuts during recovery.
    pub nested: u64,
    /// Outcomes of cuts while the device was formatted.
    pub formatted: u64,
    /// Blocks that were moved only to make room for others.
    pub evacuated: u64,
}

impl std::ops::AddAssign for CrashTotals {
    fn add_assign(&mut self, other: CrashTotals) {
        self.operations += other.operations;
        self.commits += other.commits;
        self.checkpoints += other.checkpoints;
        self.no_space += other.no_space;
        self.moved += other.moved;
        self.blocks_written += other.blocks_written;
        self.moments += other.moments;
        self.recoveries += other.recoveries;
        self.nested += other.nested;
        self.formatted += other.formatted;
        self.evacuated += other.evacuated;
    }
}

/// What went wrong, and where.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CrashFailure {
    /// The seed.
    pub seed: u64,
    /// The moment of the cut; `None` if it went wrong before any.
    pub moment: Option<u64>,
    /// What was found.
    pub words: String,
}

impl CrashFailure {
    /// The command that shows it again.
    pub fn replay(&self) -> String {
        let moment = self.moment.map(|moment| format!(" --moment {moment}"));
        format!("chaos store --seed {}{}", self.seed, moment.unwrap_or_default())
    }
}

impl fmt::Display for CrashFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CrashFailure { seed, moment, words } = self;
        write!(f, "seed {seed}")?;
        if let Some(moment) = moment {
            write!(f, ", power cut at moment {moment}")?;
        }
        write!(f, ": {words}\nreplay it: {}", self.replay())
    }
}

impl std::error::Error for CrashFailure {}

impl CrashRun {
    /// The run of a seed: device, limits and mix of requests differ from seed to seed, all small enough that the log
    /// wraps, checkpoints come often, and many devices fill up.
    pub fn of_seed(seed: u64) -> CrashRun {
        let mut prng = Prng::new(seed ^ 0x6372_6173_6865_6473);
        let full = seed.is_multiple_of(3);
        CrashRun {
            seed,
            blocks: if full { 256 } else { prng.between(320, 800) },
            volatile_cache: seed % 4 != 2,
            limits: StoreLimits {
                batch_record_pages_max: prng.between(2, 16) as usize,
                run_blocks: prng.between(1, 40) as u32,
                checkpoint_log_pages: prng.between(2, 24),
                checkpoint_dirty_pages: prng.between(1, 10) as usize,
                checkpoint_writes_in_flight: prng.between(1, 4) as usize,
                checkpoint_step_blocks: prng.between(1, 6) as usize,
                leaf_bytes_max: prng.between(60, 400) as usize,
                index_memory_max: prng.between(1, 50) as usize * 1024,
                overwrite_reserve_blocks: prng.between(16, 64),
                zero_ahead: prng.chance(1, 4),
                ..StoreLimits::tiny()
            },
            requests: 60,
            span: if full { 280 } else { prng.between(64, 300) as u32 },
            largest: if full { 64 } else { prng.between(8, 40) },
            torn: 2,
            nested_every: 8,
            works_on_every: 4,
            audit_every: 16,
            only: None,
        }
    }

    /// Runs it: first the formatting of the device alone, then the workload.
    pub fn run(&self) -> Result<CrashTotals, Box<CrashFailure>> {
        let moment = Cell::new(None);
        let outcome = unwinding(|| {
            let mut learned = Learned::default();
            if self.only.is_none() {
                let geometry = DiskGeometry {
                    blocks: self.blocks,
                    volatile_cache: self.volatile_cache,
                };
                for before in [Before::Blank, Before::Cairn, Before::Foreign] {
                    learned.totals.formatted += cut_formatting(geometry, before, self.seed)
                        .map_err(|words| format!("while it was formatted: {words}"))?;
                }
            }
            self.play(&mut learned, &mut |_| Ok(()))?;
            let mut checker = Checker {
                run: self,
                learned: &learned,
                totals: learned.totals,
                moment: &moment,
            };
            self.play(&mut Learned::default(), &mut |at| checker.moment(at))?;
            Ok(checker.totals)
        });
        outcome.map_err(|words| {
            Box::new(CrashFailure {
                seed: self.seed,
                moment: moment.get(),
                words,
            })
        })
    }

    /// Runs the workload; shows each moment of it to `visit`.
    fn play(&self, learned: &mut Learned, visit: &mut dyn FnMut(Moment) -> Result<(), String>) -> Result<(), String> {
        let mut prng = Prng::new(self.seed);
        let geometry = DiskGeometry {
            blocks: self.blocks,
            volatile_cache: self.volatile_cache,
        };
        let seed = prng.below(u64::MAX);
        let mut rig = Rig::opening_watched(formatted(geometry), self.limits.clone(), seed);
        settle(&mut rig, visit)?;
        let mut workload = Workload::new(self.span, self.largest);
        let in_flight_max = prng.between(1, 5);
        let create = StoreRequest::CreateReplica {
            group: GROUP,
            role: 1,
            epoch: Epoch(1),
        };
        learned.submit(&mut rig, create);
        let mut left = self.requests;
        while left > 0 || !learned.open.is_empty() {
            if left > 0 && (learned.open.len() as u64) < in_flight_max && prng.chance(2, 3) {
                left -= 1;
                let request = if prng.chance(1, 10) {
                    learned.housekeeping(&mut prng)
                } else {
                    workload.request(&mut prng, learned.open.is_empty())
                };
                learned.submit(&mut rig, request);
            } else if !rig.step() {
                rig.pass_time();
            }
            learned.take_replies(&mut rig)?;
            rig.take_moments().into_iter().try_for_each(&mut *visit)?;
            if learned.open.is_empty() && prng.chance(1, 24) {
                rig = self.open_anew(rig, &mut prng, learned, visit)?;
            }
        }
        learned.end_of_life(&rig);
        let found = Model::observe(&mut rig)?;
        compare(learned.last(), &found)?;
        rig.store.check_invariants();
        Ok(())
    }

    /// Opens the device anew between two requests. What was acknowledged before goes on to be there.
    fn open_anew(
        &self,
        mut rig: Rig,
        prng: &mut Prng,
        learned: &mut Learned,
        visit: &mut dyn FnMut(Moment) -> Result<(), String>,
    ) -> Result<Rig, String> {
        settle(&mut rig, visit)?;
        rig.store.check_invariants();
        let commit = rig.store.commit_seq();
        learned.end_of_life(&rig);
        let mut rig = rig.reopen(prng.chance(1, 2));
        settle(&mut rig, visit)?;
        if rig.store.recovered_seq() != commit {
            let found = rig.store.recovered_seq();
            return Err(format!("commit {found} was recovered of an idle store at {commit}"));
        }
        Ok(rig)
    }

    /// What is left of a moment's writes.
    fn cuts(&self, device: &MemoryDevice, prng: &mut Prng) -> Vec<Cut> {
        let at_risk = device.blocks_at_risk();
        if at_risk <= SUBSETS_MAX {
            let mut cuts: Vec<Cut> = (0..1 << at_risk).map(Cut::Blocks).collect();
            cuts.extend((at_risk > 0).then_some(Cut::Torn));
            return cuts;
        }
        let mut cuts = vec![Cut::AllLost, Cut::AllKept];
        for _ in 0..self.torn {
            cuts.push(Cut::Torn);
            cuts.push(Cut::Blocks(prng.next_u64()));
        }
        cuts
    }

    /// Each block that is taken must have one owner, and all data be what the index says, without opening the device.
    /// That costs ten times as much as opening it.
    fn audit(&self, device: &MemoryDevice, turn: u64) -> Result<(), String> {
        if !turn.is_multiple_of(self.audit_every) {
            return Ok(());
        }
        let options = InspectOptions {
            verify: true,
            volume: None,
        };
        let inspection = inspect(&mut device.clone(), options, &mut |_| {});
        match inspection.damage.listed.first() {
            Some(found) => Err(format!("inspection finds: {found:?}")),
            None => Ok(()),
        }
    }

    /// Opens a device. All of the index may stay in memory, so that all of them can be compared.
    fn recovered(&self, device: MemoryDevice, seed: u64) -> Result<Rig, String> {
        let limits = StoreLimits {
            index_memory_max: 16 << 20,
            ..self.limits.clone()
        };
        let mut rig = Rig::opening(device, limits, seed);
        rig.settle();
        match rig.store.state() {
            StoreState::Open => Ok(rig),
            other => Err(format!("after a power cut the store is {other:?}")),
        }
    }
}

fn settle(rig: &mut Rig, visit: &mut dyn FnMut(Moment) -> Result<(), String>) -> Result<(), String> {
    loop {
        rig.take_moments().into_iter().try_for_each(&mut *visit)?;
        if !rig.step() {
            return Ok(());
        }
    }
}

/// What the first run of the workload has shown.
#[derive(Default)]
struct Learned {
    /// In flight, by ticket.
    open: Vec<(u64, StoreRequest)>,
    /// What the store holds after each commit that acknowledged something, in order of the commits.
    states: Vec<(u64, Arc<Model>)>,
    totals: CrashTotals,
}

impl Learned {
    fn submit(&mut self, rig: &mut Rig, request: StoreRequest) {
        let ticket = rig.submit(request.clone());
        self.open.push((ticket, request));
    }

    /// What goes on in the background of a device.
    fn housekeeping(&self, prng: &mut Prng) -> StoreRequest {
        let from = ScrubCursor::START;
        if prng.chance(2, 3) {
            StoreRequest::Defragment { from }
        } else {
            StoreRequest::Scrub { from, blocks_max: 256 }
        }
    }

    fn take_replies(&mut self, rig: &mut Rig) -> Result<(), String> {
        for (ticket, reply) in rig.take_replies() {
            let Some(at) = self.open.iter().position(|(open, _)| *open == ticket) else {
                return Err(format!("ticket {ticket} was answered, and nobody waits for it"));
            };
            let (_, request) = self.open.remove(at);
            match reply {
                StoreReply::Durable { commit, .. } => self.acknowledged(commit.0, &request)?,
                StoreReply::Failed(StoreError::NoSpace) => self.totals.no_space += 1,
                StoreReply::Failed(StoreError::NoReplica | StoreError::Busy) => {}
                StoreReply::Defragmented { moved, damaged, .. } if damaged.is_empty() => {
                    self.totals.moved += u64::from(moved);
                }
                StoreReply::Scrubbed { damaged, metadata, .. } if damaged.is_empty() && metadata.is_empty() => {}
                other => return Err(format!("{} was answered {other:?}", brief(&request))),
            }
        }
        Ok(())
    }

    fn acknowledged(&mut self, commit: u64, request: &StoreRequest) -> Result<(), String> {
        let mut model = self.last().clone();
        model.apply(request);
        match self.states.last_mut() {
            Some((last, _)) if *last > commit => {
                return Err(format!("commit {commit} was acknowledged after commit {last}"));
            }
            Some((last, state)) if *last == commit => *state = Arc::new(model),
            _ => self.states.push((commit, Arc::new(model))),
        }
        Ok(())
    }

    fn last(&self) -> &Model {
        static NOTHING: Model = Model::NOTHING;
        self.states.last().map_or(&NOTHING, |(_, model)| model)
    }

    /// What the store holds after a commit.
    fn after(&self, commit: u64) -> Arc<Model> {
        let index = self.states.partition_point(|(held, _)| *held <= commit);
        index
            .checked_sub(1)
            .map_or_else(Default::default, |index| self.states[index].1.clone())
    }

    /// How many commits that acknowledge something there are above one and up to another.
    fn between(&self, above: u64, to: u64) -> usize {
        let commits = self
            .states
            .iter()
            .filter(|(commit, _)| *commit > above && *commit <= to);
        commits.count()
    }

    /// A store is about to be forgotten, and its counters with it.
    fn end_of_life(&mut self, rig: &Rig) {
        self.totals.operations += rig.completed;
        self.totals.commits = rig.store.commit_seq().0;
        self.totals.checkpoints += rig.store.counters().checkpoints;
        self.totals.evacuated += rig.store.counters().blocks_evacuated;
        self.totals.blocks_written = rig.device.blocks_written();
    }
}

/// Cuts power at each moment of the second run.
struct Checker<'a> {
    run: &'a CrashRun,
    learned: &'a Learned,
    totals: CrashTotals,
    moment: &'a Cell<Option<u64>>,
}

impl Checker<'_> {
    fn moment(&mut self, at: Moment) -> Result<(), String> {
        let number = self.totals.moments;
        self.totals.moments += 1;
        if self.run.only.is_some_and(|only| only != number) {
            return Ok(());
        }
        self.moment.set(Some(number));
        // Draws of one moment do not shift those of the next: it can be replayed alone.
        let mut prng = Prng::new(Prng::new(self.run.seed ^ number.rotate_left(32)).next_u64());
        for (i, cut) in (0..).zip(self.run.cuts(&at.device, &mut prng)) {
            let mut device = at.device.clone();
            device.power_cut_as(cut, &mut prng);
            let turn = number + i;
            self.after_cut(device, at.acknowledged, turn, &mut prng)
                .map_err(|words| format!("{cut:?}: {words}"))?;
        }
        if self.run.volatile_cache {
            self.killed(&at, &mut prng)
                .map_err(|words| format!("killed: {words}"))?;
        }
        self.moment.set(None);
        Ok(())
    }

    fn after_cut(&mut self, device: MemoryDevice, acknowledged: u64, turn: u64, prng: &mut Prng) -> Result<(), String> {
        self.totals.recoveries += 1;
        self.run.audit(&device, self.totals.recoveries)?;
        let mut rig = self.run.recovered(device.clone(), prng.next_u64())?;
        let commit = self.check(&mut rig, acknowledged)?;
        if turn.is_multiple_of(self.run.works_on_every) {
            self.works_on(rig, commit, prng)?;
        }
        if turn.is_multiple_of(self.run.nested_every) {
            self.cut_recovery(device, acknowledged, commit, prng)?;
        }
        Ok(())
    }

    /// What was recovered must be a state that the workload went through, no older than what was acknowledged, and
    /// newer by one batch at the most. Returns the commit.
    fn check(&self, rig: &mut Rig, acknowledged: u64) -> Result<u64, String> {
        let commit = rig.store.recovered_seq().0;
        if commit < acknowledged {
            return Err(format!(
                "commit {commit} was recovered, commit {acknowledged} was acknowledged"
            ));
        }
        if self.learned.between(acknowledged, commit) > 1 {
            return Err(format!(
                "commit {commit} was recovered, commit {acknowledged} was acknowledged: that is more than one batch"
            ));
        }
        let words = |words| format!("at commit {commit}, {acknowledged} being acknowledged: {words}");
        self.holds(rig, &self.learned.after(commit)).map_err(words)?;
        Ok(commit)
    }

    /// The store must hold this, and account for it.
    fn holds(&self, rig: &mut Rig, expected: &Model) -> Result<(), String> {
        let found = Model::observe(rig)?;
        compare(expected, &found)?;
        rig.store.check_invariants();
        let (data, listed) = (rig.store.space().data, found.data_blocks());
        let replica = rig.store.replica_of(GROUP).map_or(data, |replica| replica.blocks_used);
        if data != listed || replica != listed {
            return Err(format!(
                "{listed} blocks of data are listed, {data} are taken, and {replica} are counted for the replica"
            ));
        }
        Ok(())
    }

    /// A recovered store serves, and keeps what it then acknowledges.
    fn works_on(&self, mut rig: Rig, commit: u64, prng: &mut Prng) -> Result<(), String> {
        let mut model = Model::clone(&self.learned.after(commit));
        let mut workload = Workload::new(self.run.span, self.run.largest);
        workload.seq = 1_000_000;
        for _ in 0..4 {
            let request = workload.request(prng, true);
            match rig.call(request.clone()) {
                StoreReply::Durable { .. } => model.apply(&request),
                StoreReply::Failed(StoreError::NoSpace | StoreError::NoReplica) => {}
                other => return Err(format!("after recovery, {} was answered {other:?}", brief(&request))),
            }
        }
        self.holds(&mut rig, &model)
            .map_err(|words| format!("after recovery and four requests: {words}"))?;
        let mut rig = rig.reopen(true);
        rig.settle();
        if rig.store.state() != StoreState::Open {
            return Err(format!("opened a second time the store is {:?}", rig.store.state()));
        }
        self.holds(&mut rig, &model)
            .map_err(|words| format!("opened a second time: {words}"))
    }

    /// Cuts power at each operation of a recovery that comes to `commit`.
    fn cut_recovery(
        &mut self,
        device: MemoryDevice,
        acknowledged: u64,
        commit: u64,
        prng: &mut Prng,
    ) -> Result<(), String> {
        let mut rig = Rig::opening_watched(device, self.run.limits.clone(), prng.next_u64());
        loop {
            for moment in rig.take_moments() {
                for cut in self.run.cuts(&moment.device, prng) {
                    let mut device = moment.device.clone();
                    device.power_cut_as(cut, prng);
                    self.totals.nested += 1;
                    self.run.audit(&device, self.totals.nested)?;
                    let mut again = self.run.recovered(device, prng.next_u64())?;
                    self.check_again(&mut again, acknowledged, commit, moment.is_open)
                        .map_err(|words| format!("recovery was cut too, {cut:?}: {words}"))?;
                }
            }
            if !rig.step() {
                return Ok(());
            }
        }
    }

    /// A recovery that follows another one, which came to `commit`. Once that one was open it may have told so: then nothing
    /// but `commit` may be found, and on top the batch that ended the other recovery and those that gave back what was dropped,
    /// which change nothing that can be seen. Before, nobody knows of it, and the batch that it did not believe may be
    /// found after all: see "Power cuts, case by case" in DESIGN.md.
    fn check_again(&self, rig: &mut Rig, acknowledged: u64, commit: u64, told: bool) -> Result<(), String> {
        let found = rig.store.recovered_seq().0;
        if found <= commit {
            return self.check(rig, acknowledged).map(|_| ());
        }
        let outcome = self.holds(rig, &self.learned.after(commit));
        if told || found > commit + 1 {
            return outcome;
        }
        outcome.or_else(|_| self.check(rig, acknowledged).map(|_| ()))
    }

    /// The process is killed, not the machine: what it wrote without a flush is seen by the next one. Power fails when
    /// that one has just opened the device; it may have told others what it found.
    fn killed(&mut self, at: &Moment, prng: &mut Prng) -> Result<(), String> {
        let mut device = at.device.clone();
        device.process_killed(prng);
        self.totals.recoveries += 1;
        let mut rig = self.run.recovered(device, prng.next_u64())?;
        let commit = self.check(&mut rig, at.acknowledged)?;
        // Beside the batch that ends recovery, those that give back what was dropped.
        let expected = rig.store.commit_seq().0;
        rig.device.power_cut_as(Cut::AllLost, prng);
        let mut again = self.run.recovered(rig.device, prng.next_u64())?;
        let found = again.store.recovered_seq().0;
        if found != expected || found <= commit {
            return Err(format!(
                "commit {commit} was recovered, and {found} when power had failed"
            ));
        }
        self.holds(&mut again, &self.learned.after(commit))
    }
}

fn compare(expected: &Model, found: &Model) -> Result<(), String> {
    if expected == found {
        Ok(())
    } else {
        Err(difference(expected, found))
    }
}

/// A request without its content.
pub fn brief(request: &StoreRequest) -> String {
    use crate::store::api::WriteContent;
    match request {
        StoreRequest::Write {
            layer,
            range,
            version,
            content,
            ..
        } => {
            let kind = match content {
                WriteContent::Data { .. } => "data",
                WriteContent::Zero => "zero",
                WriteContent::Discard => "discard",
            };
            format!("{kind} {range} layer {layer} {version}")
        }
        StoreRequest::Copy {
            layer, range, blocks, ..
        } => format!("copy {range} layer {layer} from {}", blocks[0].version),
        StoreRequest::CopyHole {
            layer,
            range,
            block,
            apply,
            ..
        } => format!(
            "hole {range} layer {layer} from {}, {:?}, {apply:?}",
            block.version, block.content
        ),
        other => format!("{other:?}"),
    }
}

/// A panic is a failure like others: the store's assertions are part of the proof.
pub fn unwinding<T>(run: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let words = panic.downcast_ref::<String>().cloned();
        let words = words.or_else(|| panic.downcast_ref::<&str>().map(|words| words.to_string()));
        Err(format!(
            "panic: {}",
            words.unwrap_or_else(|| "without words".to_string())
        ))
    })
}
