//! Random walks of what operators do, against a model of what must be true: volumes are created, grown, deleted, written,
//! read, servers are killed and come back, exports begin anew; and what is wrong is asked for too, and must be refused with
//! the right exit code. Metadata servers are added and removed. After each step the cluster lists exactly the volumes and the metadata
//! servers of the model.
//!
//! A walk is a list of steps, and what a step does depends on it and the model alone, so a failing walk is shrunk: parts of it
//! are left out and the rest is walked on a new cluster, as long as that fails in the same way.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use cairn_proto::ids::VolumeId;
use cairn_proto::limits::BLOCK_BYTES;
use serde_json::Value;

use super::cluster::{Cluster, ClusterOptions, Part, Said};
use super::nbd::{Command, Connection};
use super::report::{Failure, FailureKind, Timeline};
use super::stop;
use super::wait::wait_until;
use crate::checker::pattern::{SECTORS_PER_BLOCK, ZEROES, fill, writer_of};
use crate::rng::Rng;

/// How long one step may take, with a server missing.
const STEP_BOUND: Duration = Duration::from_secs(60);
/// How long it may take, with no node away, until all volumes have all copies: the holder of one may have died, and is given a minute.
const WHOLE_BOUND: Duration = Duration::from_secs(120);
/// The pause before something is asked once more.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// Entries of the log that a metadata server may lack and is said to be up.
const LAG_MAX: u64 = 500;
/// Names that volumes have.
const NAMES: u64 = 3;
/// Blocks of a volume that are written and read, spread over it.
const BLOCKS: u64 = 8;
const SIZE_STEP: u64 = 32 << 20;
const SIZE_STEPS_MAX: u64 = 4;
/// Walks that are tried to make a failing one shorter.
const SHRINK_MAX: usize = 16;
/// Metadata servers at the most.
const METAS_MAX: u64 = 5;
const NODES: u8 = 3;
const EXPORT: Part = Part::Export(1);

// The exit codes of `cairn` that are expected.
const NOT_FOUND: i32 = 3;
const EXISTS: i32 = 4;
const UNREACHABLE: i32 = 5;
const REFUSED: i32 = 6;
const USAGE: i32 = 2;

/// What an operator does. Volumes are meant by number, servers by theirs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// `cairn volume create`, of so many times 32 MiB.
    Create(u64, u64),
    /// `cairn volume grow` by 32 MiB.
    Grow(u64),
    /// `cairn volume delete`.
    Delete(u64),
    /// Writes a block.
    Write(u64, u64),
    /// Makes a block zeroes.
    Trim(u64, u64),
    /// Reads all blocks.
    Read(u64),
    /// Kills a storage node, unless another is away, or starts it again. All copies are there when it is killed.
    Node(u8),
    /// Kills a metadata server (the first, the second, …), unless another is away or too few would be left, or starts it again.
    Meta(u8),
    /// Starts a further metadata server, which joins, unless there are as many as there may be or one is away.
    AddMeta,
    /// `cairn meta remove`, of the first, the second, …: refused where too few of the others would answer.
    RemoveMeta(u8),
    /// Kills all metadata servers and starts them again.
    AllMetas,
    /// Kills the export and starts it again.
    Export,
    /// Cuts the power of everything that runs, and starts everything.
    Everything,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// A random walk.
pub fn walk(seed: u64, length: usize) -> Vec<Step> {
    let mut rng = Rng::stream(seed, "operators");
    let step = |_| {
        let volume = rng.below(NAMES);
        let block = rng.below(BLOCKS);
        match rng.weighted(&[16, 8, 8, 24, 6, 16, 8, 5, 2, 4, 3, 4, 4]) {
            0 => Step::Create(volume, rng.within(1, SIZE_STEPS_MAX)),
            1 => Step::Grow(volume),
            2 => Step::Delete(volume),
            3 => Step::Write(volume, block),
            4 => Step::Trim(volume, block),
            5 => Step::Read(volume),
            6 => Step::Node(rng.within(1, NODES.into()) as u8),
            7 => Step::Meta(rng.within(1, METAS_MAX) as u8),
            8 => Step::AllMetas,
            9 => Step::Export,
            10 => Step::Everything,
            11 => Step::AddMeta,
            _ => Step::RemoveMeta(rng.within(1, METAS_MAX) as u8),
        }
    };
    (0..length).map(step).collect()
}

/// What must be true of a volume.
#[derive(Clone, Debug)]
struct Volume {
    bytes: u64,
    /// Told apart from an earlier one of the same name.
    id: VolumeId,
    /// Who wrote each block that is not zeroes.
    blocks: BTreeMap<u64, u32>,
}

/// A cluster, and what must be true of it.
struct World {
    cluster: Cluster,
    volumes: BTreeMap<u64, Volume>,
    away: Vec<Part>,
    steps: u32,
}

fn name(volume: u64) -> String {
    format!("volume-{volume}")
}

fn wrong(words: String) -> Failure {
    Failure::new(FailureKind::Operation, words)
}

/// Walks on a new cluster in `options.dir`; the number of the step that failed, counted from one, and why.
pub fn play(options: &ClusterOptions, steps: &[Step], timeline: &mut Timeline) -> Result<(), (usize, Failure)> {
    let mut world = World::begin(options).map_err(|failure| (0, failure))?;
    for (number, step) in steps.iter().enumerate() {
        timeline.note(format!("{:>4} {step}", number + 1));
        world.step(*step).map_err(|failure| (number + 1, failure))?;
    }
    world.end().map_err(|failure| (steps.len(), failure))
}

/// Walks, and makes the walk shorter if it fails. `dirs` gives a new directory for each cluster.
pub fn play_and_shrink(
    options: &ClusterOptions,
    steps: &[Step],
    timeline: &mut Timeline,
    dirs: &mut dyn FnMut() -> PathBuf,
) -> Result<(), Failure> {
    let at = |dir: PathBuf| ClusterOptions { dir, ..options.clone() };
    let Err((failed_at, failure)) = play(&at(dirs()), steps, timeline) else {
        return Ok(());
    };
    let failure = stop::judged(failure);
    timeline.note(format!("step {failed_at} FAILED: {failure}"));
    if matches!(failure.kind, FailureKind::Setup | FailureKind::Stopped) {
        return Err(failure);
    }
    let mut tried = 0;
    let shortest = shrink(steps[..failed_at].to_vec(), &mut |candidate| {
        tried += 1;
        if tried > SHRINK_MAX || stop::asked().is_some() {
            return false;
        }
        timeline.note(format!("is a walk of {} steps enough?", candidate.len()));
        let result = play(&at(dirs()), candidate, timeline);
        matches!(result, Err((_, again)) if again.kind == failure.kind)
    });
    let mut story = failure.story.clone();
    story.push(format!("the shortest walk that fails so has {} steps:", shortest.len()));
    story.extend(shortest.iter().map(Step::to_string));
    Err(Failure { story, ..failure })
}

/// Leaves out runs of steps, halves first, then shorter ones, as long as what is left fails.
fn shrink(mut steps: Vec<Step>, fails: &mut dyn FnMut(&[Step]) -> bool) -> Vec<Step> {
    let mut run = steps.len() / 2;
    while run > 0 {
        let mut from = 0;
        while from < steps.len() {
            let to = (from + run).min(steps.len());
            let candidate: Vec<Step> = steps[..from].iter().chain(&steps[to..]).copied().collect();
            if !candidate.is_empty() && fails(&candidate) {
                steps = candidate;
            } else {
                from = to;
            }
        }
        run /= 2;
    }
    steps
}

impl World {
    fn begin(options: &ClusterOptions) -> Result<World, Failure> {
        let mut cluster = Cluster::new(options.clone())?;
        cluster.begin()?;
        cluster.start(EXPORT)?;
        Ok(World {
            cluster,
            volumes: BTreeMap::new(),
            away: Vec::new(),
            steps: 0,
        })
    }

    fn step(&mut self, step: Step) -> Result<(), Failure> {
        stop::check()?;
        self.steps += 1;
        match step {
            Step::Create(volume, steps) => self.create(volume, steps * SIZE_STEP)?,
            Step::Grow(volume) => self.grow(volume)?,
            Step::Delete(volume) => self.delete(volume)?,
            Step::Write(volume, block) => self.put(volume, block, false)?,
            Step::Trim(volume, block) => self.put(volume, block, true)?,
            Step::Read(volume) => self.read(volume)?,
            Step::Node(k) => self.toggle(Part::Node(k))?,
            Step::Meta(k) => {
                let meta = self.meta(k);
                self.toggle(meta)?;
            }
            Step::AddMeta => self.add_meta()?,
            Step::RemoveMeta(k) => self.remove_meta(k)?,
            Step::AllMetas => {
                let metas: Vec<Part> = self.cluster.metas().collect();
                self.again(&metas)?;
            }
            Step::Export => self.again(&[EXPORT])?,
            Step::Everything => {
                let all = self.cluster.running();
                self.again(&all)?;
            }
        }
        if let Some((part, status)) = self.cluster.ended().first() {
            let words = format!("{part} has ended by itself, {status}, during {step}");
            return Err(Failure::new(FailureKind::Died, words));
        }
        self.compare(step)
    }

    /// Everything comes back, and every volume is read once more.
    fn end(&mut self) -> Result<(), Failure> {
        for part in std::mem::take(&mut self.away) {
            self.cluster.start(part)?;
        }
        self.cluster.wait_well(STEP_BOUND * 2).map_err(|problems| {
            let words = format!("with everything back there is still: {}", problems.join("; "));
            Failure::new(FailureKind::Unhealed, words)
        })?;
        let volumes: Vec<u64> = self.volumes.keys().copied().collect();
        volumes.into_iter().try_for_each(|volume| self.read(volume))
    }

    fn again(&mut self, parts: &[Part]) -> Result<(), Failure> {
        self.cluster.kill(parts);
        for part in parts {
            if !self.away.contains(part) {
                self.cluster.start(*part)?;
            }
        }
        Ok(())
    }

    fn toggle(&mut self, part: Part) -> Result<(), Failure> {
        if let Some(place) = self.away.iter().position(|away| *away == part) {
            self.away.remove(place);
            self.cluster.start(part)?;
            return Ok(());
        }
        let of_kind = |other: &Part| {
            matches!(
                (other, part),
                (Part::Node(_), Part::Node(_)) | (Part::Meta(_), Part::Meta(_))
            )
        };
        if !self.away.iter().any(of_kind) {
            match part {
                Part::Node(_) => self.wait_whole(part)?,
                Part::Meta(_) if !self.decides_without(part) => return Ok(()),
                _ => {}
            }
            self.cluster.kill(&[part]);
            self.away.push(part);
        }
        Ok(())
    }

    /// One of the metadata servers, by its place among them.
    fn meta(&self, place: u8) -> Part {
        let metas: Vec<Part> = self.cluster.metas().collect();
        metas[usize::from(place - 1) % metas.len()]
    }

    /// Whether a majority of the metadata servers runs when this one does not.
    fn decides_without(&self, meta: Part) -> bool {
        let runs = |other: &Part| *other != meta && !self.away.contains(other);
        let (all, left) = (self.cluster.metas().count(), self.cluster.metas().filter(runs).count());
        left > all / 2
    }

    /// Until metadata servers say of each other what is true: who is up, and how much of the log each has.
    fn wait_metas(&self) -> Result<(), Failure> {
        let differs = || {
            let said = self.cluster.ask(&["meta", "list"]);
            let listed = said.json["members"].as_array().cloned().unwrap_or_default();
            let matched = |member: &Value| member["matched_index"].as_u64().unwrap_or(0);
            let most = listed.iter().map(matched).max().unwrap_or(0);
            let seen: BTreeMap<Part, bool> = listed
                .iter()
                .filter_map(|member| {
                    let is_up = member["alive"].as_bool()? && matched(member) + LAG_MAX >= most;
                    Some((Part::Meta(member["id"].as_u64()? as u8), is_up))
                })
                .collect();
            let known = self.cluster.metas().map(|meta| (meta, !self.away.contains(&meta)));
            (seen != known.collect()).then_some(said)
        };
        if wait_until(STEP_BOUND, || stop::asked().is_some() || differs().is_none()) {
            return stop::check();
        }
        let known: Vec<Part> = self.cluster.metas().collect();
        Err(wrong(format!(
            "of metadata servers, {known:?} without {:?}, is said: {:?}",
            self.away,
            differs()
        )))
    }

    fn meta_is_away(&self) -> bool {
        self.away.iter().any(|part| matches!(part, Part::Meta(_)))
    }

    fn add_meta(&mut self) -> Result<(), Failure> {
        if self.meta_is_away() || self.cluster.metas().count() as u64 >= METAS_MAX {
            return Ok(());
        }
        let meta = self.cluster.add_meta()?;
        self.cluster.start(meta)?;
        self.wait_metas()
    }

    fn remove_meta(&mut self, place: u8) -> Result<(), Failure> {
        self.wait_metas()?;
        let meta = self.meta(place);
        let Part::Meta(id) = meta else {
            unreachable!("metadata servers are metadata servers")
        };
        let left: Vec<Part> = self.cluster.metas().filter(|other| *other != meta).collect();
        let up = left.iter().filter(|other| !self.away.contains(other)).count();
        let expected = match left.len() {
            0 => USAGE,
            left if up > left / 2 => 0,
            _ => REFUSED,
        };
        let begun = Instant::now();
        let mut is_repeated = false;
        let mut said = loop {
            stop::check()?;
            let said = self.cluster.remove_meta(id);
            let is_unreachable = said.code.is_none_or(|code| code == UNREACHABLE);
            if !is_unreachable || begun.elapsed() > STEP_BOUND {
                break said;
            }
            is_repeated = true;
        };
        if is_repeated && said.code == Some(NOT_FOUND) {
            // An attempt whose answer was lost has removed it.
            self.cluster.forget_meta(id);
            said.code = Some(0);
        }
        if said.code != Some(expected) {
            let words = format!(
                "removing {meta} ended with {:?} instead of {expected}, with {:?} away: {}",
                said.code,
                self.away,
                said.err.trim()
            );
            return Err(wrong(words));
        }
        if expected != 0 {
            return Ok(());
        }
        self.away.retain(|part| *part != meta);
        self.ends(meta)
    }

    /// What was removed ends by itself.
    fn ends(&mut self, meta: Part) -> Result<(), Failure> {
        let mut others = Vec::new();
        let has_ended = wait_until(STEP_BOUND, || {
            others.extend(self.cluster.ended().into_iter().filter(|(part, _)| *part != meta));
            !self.cluster.is_running(meta) || stop::asked().is_some()
        });
        stop::check()?;
        if let Some((part, status)) = others.first() {
            let words = format!("{part} has ended by itself, {status}, when {meta} was removed");
            return Err(Failure::new(FailureKind::Died, words));
        }
        if has_ended {
            return Ok(());
        }
        Err(wrong(format!(
            "{meta} was removed, and goes on running for {STEP_BOUND:?}"
        )))
    }

    /// Who takes a node away waits until the one before has all copies again: a volume whose second copy goes meanwhile has no quorum.
    fn wait_whole(&self, next: Part) -> Result<(), Failure> {
        let lacks = || -> Vec<String> {
            let problems = self.cluster.problems().into_iter();
            problems
                .filter(|words| words.starts_with("groups-") || words.starts_with("status:"))
                .collect()
        };
        if wait_until(WHOLE_BOUND, || stop::asked().is_some() || lacks().is_empty()) {
            return stop::check();
        }
        let words = format!("{next} can't be taken away for {WHOLE_BOUND:?}: {}", lacks().join("; "));
        Err(Failure::new(FailureKind::Unhealed, words))
    }

    /// Asks until the answer is one of who leads: what has just begun can't answer yet, and what somebody has just let go is
    /// in use for a moment.
    fn ask(&self, args: &[&str], retried: &[i32]) -> Result<Said, Failure> {
        self.ask_noting(args, retried).map(|(said, _)| said)
    }

    /// The same, and whether it was asked more than once.
    fn ask_noting(&self, args: &[&str], retried: &[i32]) -> Result<(Said, bool), Failure> {
        let begun = Instant::now();
        let mut is_repeated = false;
        loop {
            let said = self.cluster.ask(args);
            let again = said
                .code
                .is_none_or(|code| code == UNREACHABLE || retried.contains(&code));
            if !again {
                return Ok((said, is_repeated));
            }
            stop::check()?;
            is_repeated = true;
            if begun.elapsed() > STEP_BOUND {
                let words = format!(
                    "`cairn {}` ends with {:?} for {STEP_BOUND:?}: {}",
                    args.join(" "),
                    said.code,
                    said.err
                );
                return Err(wrong(words));
            }
            std::thread::sleep(RETRY_PAUSE);
        }
    }

    fn create(&mut self, volume: u64, bytes: u64) -> Result<(), Failure> {
        let (name, size) = (name(volume), bytes.to_string());
        let exists = self.volumes.contains_key(&volume);
        // A node that was started a moment ago may not be known to be back.
        let retried: &[i32] = if exists || self.node_is_away() { &[] } else { &[REFUSED] };
        let (said, is_repeated) = self.ask_noting(&["volume", "create", &name, &size], retried)?;
        match said.code {
            // An attempt whose answer was lost may have created it.
            Some(code) if !exists && (code == 0 || (code == EXISTS && is_repeated)) => {
                let id = VolumeId(u64::from(self.steps));
                let blocks = BTreeMap::new();
                self.volumes.insert(volume, Volume { bytes, id, blocks });
                Ok(())
            }
            Some(EXISTS) if exists => Ok(()),
            // Copies need three nodes.
            Some(REFUSED) if !exists && self.node_is_away() => Ok(()),
            code => Err(wrong(format!(
                "creating {name}, which {}, ended with {code:?}: {}",
                if exists { "exists" } else { "does not exist" },
                said.err.trim()
            ))),
        }
    }

    fn node_is_away(&self) -> bool {
        self.away.iter().any(|part| matches!(part, Part::Node(_)))
    }

    fn grow(&mut self, volume: u64) -> Result<(), Failure> {
        let bytes = self
            .volumes
            .get(&volume)
            .map_or(SIZE_STEP, |known| known.bytes + SIZE_STEP);
        let (name, size) = (name(volume), bytes.to_string());
        let said = self.ask(&["volume", "grow", &name, &size], &[])?;
        match (said.code, self.volumes.get_mut(&volume)) {
            (Some(0), Some(known)) => known.bytes = bytes,
            (Some(NOT_FOUND), None) => {}
            (code, known) => {
                let words = format!(
                    "growing {name} ended with {code:?}, known is {known:?}: {}",
                    said.err.trim()
                );
                return Err(wrong(words));
            }
        }
        Ok(())
    }

    fn delete(&mut self, volume: u64) -> Result<(), Failure> {
        let name = name(volume);
        let said = self.ask(&["volume", "delete", &name, "--yes"], &[REFUSED])?;
        match (said.code, self.volumes.remove(&volume)) {
            (Some(0), Some(_)) | (Some(NOT_FOUND), None) => Ok(()),
            (code, known) => {
                let words = format!(
                    "deleting {name} ended with {code:?}, known is {known:?}: {}",
                    said.err.trim()
                );
                Err(wrong(words))
            }
        }
    }

    fn attach(&self, volume: u64) -> Result<Connection, Failure> {
        let begun = Instant::now();
        let name = name(volume);
        loop {
            match Connection::open(&self.cluster.socket(1), &name) {
                Ok(connection) => return Ok(connection),
                Err(error) if begun.elapsed() > STEP_BOUND => {
                    let words = format!("{name} can't be attached for {STEP_BOUND:?}: {error}");
                    return Err(Failure::new(FailureKind::Stall, words));
                }
                Err(_) => std::thread::sleep(RETRY_PAUSE),
            }
        }
    }

    /// Where the blocks of a volume are that are written and read: at its start, and at the end of its first size.
    fn offset(block: u64) -> u64 {
        let per_half = BLOCKS / 2;
        let bytes = BLOCK_BYTES as u64;
        if block < per_half {
            block * bytes
        } else {
            SIZE_STEP - (BLOCKS - block) * bytes
        }
    }

    fn put(&mut self, volume: u64, block: u64, zeroes: bool) -> Result<(), Failure> {
        let Some(known) = self.volumes.get(&volume) else {
            return self.refuses(volume);
        };
        let offset = World::offset(block);
        let sector = offset / (BLOCK_BYTES / SECTORS_PER_BLOCK) as u64;
        let data = fill(known.id, sector, SECTORS_PER_BLOCK, self.steps);
        let mut connection = self.attach(volume)?;
        let done = if zeroes {
            connection.ask(Command::Trim, offset, BLOCK_BYTES as u32, &[], STEP_BOUND)
        } else {
            connection.ask(
                Command::Write { fua: false },
                offset,
                BLOCK_BYTES as u32,
                &data,
                STEP_BOUND,
            )
        };
        done.map_err(|error| Failure::new(FailureKind::GuestError, format!("{}: {error}", name(volume))))?;
        let writer = if zeroes { ZEROES } else { self.steps };
        let known = self.volumes.get_mut(&volume).expect("looked up above");
        known.blocks.insert(block, writer);
        Ok(())
    }

    /// A volume that does not exist is exported to nobody.
    fn refuses(&self, volume: u64) -> Result<(), Failure> {
        match Connection::open(&self.cluster.socket(1), &name(volume)) {
            Ok(_) => Err(wrong(format!(
                "{} does not exist, and its export is there",
                name(volume)
            ))),
            Err(_) => Ok(()),
        }
    }

    fn read(&mut self, volume: u64) -> Result<(), Failure> {
        let Some(known) = self.volumes.get(&volume) else {
            return self.refuses(volume);
        };
        let mut connection = self.attach(volume)?;
        if connection.size != known.bytes {
            let words = format!(
                "{} has {} bytes for guests, and {} in truth",
                name(volume),
                connection.size,
                known.bytes
            );
            return Err(wrong(words));
        }
        for block in 0..BLOCKS {
            let offset = World::offset(block);
            let data = connection.ask(Command::Read, offset, BLOCK_BYTES as u32, &[], STEP_BOUND);
            let data =
                data.map_err(|error| Failure::new(FailureKind::GuestError, format!("{}: {error}", name(volume))))?;
            let sector_bytes = BLOCK_BYTES / SECTORS_PER_BLOCK;
            let expected = known.blocks.get(&block).copied().unwrap_or(ZEROES);
            for (content, sector) in data.chunks_exact(sector_bytes).zip(offset / sector_bytes as u64..) {
                let seen = writer_of(known.id, sector, content);
                if seen != Ok(expected) {
                    let words = format!(
                        "{} block {block} has {seen:?}, written last was {expected}",
                        name(volume)
                    );
                    return Err(Failure::new(FailureKind::Data, words));
                }
            }
        }
        Ok(())
    }

    /// The cluster lists what the model has.
    fn compare(&self, step: Step) -> Result<(), Failure> {
        let said = self.ask(&["volume", "list"], &[])?;
        let listed = said.json["volumes"].as_array().cloned().unwrap_or_default();
        let listed: BTreeMap<String, u64> = listed
            .iter()
            .filter_map(|volume| Some((volume["name"].as_str()?.to_string(), volume["size_bytes"].as_u64()?)))
            .collect();
        let known: BTreeMap<String, u64> = self
            .volumes
            .iter()
            .map(|(volume, known)| (name(*volume), known.bytes))
            .collect();
        if listed != known {
            return Err(wrong(format!(
                "after {step} the cluster lists {listed:?}, and {known:?} is true"
            )));
        }
        let said = self.ask(&["meta", "list"], &[])?;
        let members = said.json["members"].as_array().into_iter().flatten();
        let listed: BTreeSet<Part> = members
            .filter_map(|member| Some(Part::Meta(member["id"].as_u64()? as u8)))
            .collect();
        let known: BTreeSet<Part> = self.cluster.metas().collect();
        if listed != known {
            return Err(wrong(format!(
                "after {step} the metadata servers are said to be {listed:?}, and {known:?} is true"
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_walk_depends_on_its_seed_alone_and_has_every_kind_of_step() {
        assert_eq!(walk(3, 100), walk(3, 100));
        assert_ne!(walk(3, 100), walk(4, 100));
        let mut kinds: Vec<String> = walk(1, 2000)
            .iter()
            .map(|step| format!("{step:?}").split('(').next().unwrap_or_default().to_string())
            .collect();
        kinds.sort();
        kinds.dedup();
        assert_eq!(kinds.len(), 13);
    }

    #[test]
    fn a_failing_walk_is_shrunk_to_what_matters() {
        let steps = walk(5, 200);
        let mut deletes_after_create = |steps: &[Step]| {
            let create = steps.iter().position(|step| matches!(step, Step::Create(..)));
            create.is_some_and(|at| steps[at..].iter().any(|step| matches!(step, Step::Delete(_))))
        };
        let shortest = shrink(steps, &mut deletes_after_create);
        assert!(
            matches!(shortest[..], [Step::Create(..), Step::Delete(_)]),
            "{shortest:?}"
        );
    }

    #[test]
    fn blocks_are_apart_and_within_the_smallest_volume() {
        let mut offsets: Vec<u64> = (0..BLOCKS).map(World::offset).collect();
        offsets.dedup();
        assert_eq!(offsets.len() as u64, BLOCKS);
        assert!(offsets.iter().all(|offset| offset + BLOCK_BYTES as u64 <= SIZE_STEP));
    }
}
