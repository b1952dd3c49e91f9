//! A run: a cluster, its volumes and guests; faults are injected one after another, and after each all must be well again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cairn_proto::ids::{GroupCount, VolumeId};

use super::cluster::{Cluster, ClusterError, ClusterOptions, Part};
use super::guest::{Disk, Guest, Held, Place, sweep};
use super::inject::proxy::Proxy;
use super::inject::shim::{self, Effect, Kind, Rule, Shim};
use super::ledger::Ledger;
use super::meta_disk::MetaDisk;
use super::process;
use super::report::{Failure, FailureKind, Table, Timeline};
use super::scrape::scrape_what_comes;
use super::stop;
use super::vm::{self, Vm};
use super::wait::wait_until;
use crate::checker::history::Broken;
use crate::rng::Rng;

/// How long operations may take once every fault has ended.
pub const IO_BOUND: Duration = Duration::from_secs(60);
/// How long the cluster may take until it has no problem any more.
pub const WELL_BOUND: Duration = Duration::from_secs(120);
/// How long a process may take to end when it is asked to.
const STOP_BOUND: Duration = Duration::from_secs(20);
/// Connections with load for each volume.
const GUESTS_PER_DISK: usize = 2;
/// How often it is looked at whether everything is as it should be.
const WATCH_INTERVAL: Duration = Duration::from_millis(50);

/// A volume of a run.
#[derive(Clone, Debug)]
pub struct VolumeOptions {
    /// Its name.
    pub name: String,
    /// Bytes.
    pub bytes: u64,
    /// Which export serves it to guests.
    pub export: u8,
}

/// What a run begins with.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// The cluster.
    pub cluster: ClusterOptions,
    /// Chooses what happens.
    pub seed: u64,
    /// Its volumes.
    pub volumes: Vec<VolumeOptions>,
    /// Whether devices are behind shims, which lose what was not flushed when power is cut, and fail on demand.
    pub has_shims: bool,
    /// Devices call flushes done that they have not done, as bad as a node that acknowledges before it flushes: power cuts must
    /// find it, or they prove nothing.
    pub has_lying_flushes: bool,
    /// Whether metadata servers and nodes are reached through proxies.
    pub has_proxies: bool,
    /// Whether each process is in a network namespace of its own; there are no proxies then.
    pub has_namespaces: bool,
    /// Racks that nodes stand in, in turn; in none if it is zero. Copies of volumes are in distinct racks then.
    pub racks: u8,
    /// Whether each metadata server has a disk of its own behind a shim.
    pub has_meta_disks: bool,
    /// Whether a virtual machine of QEMU works beside the guests, on a volume of its own.
    pub has_vm: bool,
    /// Whether the timeline goes to standard error too.
    pub is_told: bool,
}

/// How long things took after a fault.
#[derive(Clone, Copy, Debug, Default)]
pub struct Recovery {
    /// Until every guest was answered again.
    pub first_io: Duration,
    /// Until the cluster had no problem any more.
    pub well: Duration,
}

/// A cluster with load.
pub struct Run {
    /// The processes.
    pub cluster: Cluster,
    /// What guests are told.
    pub ledger: Arc<Ledger>,
    /// For whoever injects faults.
    pub rng: Rng,
    /// What happened when.
    pub timeline: Timeline,
    /// What faults did.
    pub table: Table,
    /// Between nodes and their devices, by node; none if the run has none.
    pub shims: BTreeMap<u8, Shim>,
    /// Disks of metadata servers, by their number; none if the run has none.
    pub meta_disks: BTreeMap<u8, MetaDisk>,
    /// Between parts and whoever connects to them; none if the run has none.
    pub proxies: BTreeMap<Part, Proxy>,
    seed: u64,
    places: BTreeMap<u8, Arc<Mutex<Place>>>,
    disks: Vec<(Disk, u8)>,
    guests: Vec<Guest>,
    sessions: u32,
    vm: Option<Vm>,
    /// Parts that a fault may bring to their end.
    may_end: BTreeSet<Part>,
    /// How far each log has been looked at.
    logs_read: BTreeMap<PathBuf, u64>,
}

impl From<ClusterError> for Failure {
    fn from(error: ClusterError) -> Failure {
        Failure::new(FailureKind::Setup, error.0)
    }
}

impl From<Broken> for Failure {
    fn from(broken: Broken) -> Failure {
        Failure {
            kind: FailureKind::Data,
            words: format!("{}: {}", broken.promise, broken.words),
            story: broken.story,
        }
    }
}

impl Run {
    /// Starts the cluster, creates the volumes, starts exports and guests.
    pub fn begin(options: RunOptions) -> Result<Run, Failure> {
        let mut run = Run::new(&options)?;
        if options.has_namespaces {
            run.cluster.use_namespaces()?;
        }
        if options.racks > 0 {
            let nodes = run.cluster.nodes().count() as u8;
            (1..=nodes).for_each(|k| {
                run.cluster
                    .put_into_rack(k, &format!("rack-{}", (k - 1) % options.racks + 1))
            });
        }
        if options.has_shims {
            run.put_shims()?;
            if options.has_lying_flushes {
                run.lie()?;
            }
        }
        if options.has_meta_disks {
            run.put_meta_disks()?;
        }
        if options.has_proxies && !options.has_namespaces {
            run.put_proxies()?;
        }
        run.cluster.begin()?;
        for volume in &options.volumes {
            run.create(volume)?;
        }
        let exports: Vec<u8> = run.places.keys().copied().collect();
        for export in exports {
            run.start(Part::Export(export))?;
        }
        run.add_guests();
        run.timeline.note("guests begin");
        if options.has_vm {
            run.cluster.create_volume(vm::VOLUME, &vm::BYTES.to_string())?;
            let socket = run
                .cluster
                .socket(*run.places.keys().next().expect("there are exports"));
            let rng = Rng::stream(options.seed, "vm");
            run.vm = Some(Vm::start(&socket, run.cluster.dir(), rng)?);
            run.timeline.note("a virtual machine begins");
        }
        Ok(run)
    }

    /// A run of which nothing is started yet.
    pub fn new(options: &RunOptions) -> Result<Run, Failure> {
        let cluster = Cluster::new(options.cluster.clone())?;
        let mut timeline = Timeline::new(cluster.dir(), options.is_told);
        timeline.note(format!("seed {} in {}", options.seed, cluster.dir().display()));
        let exports = options.volumes.iter().map(|volume| volume.export);
        let place = |export: u8| Place::new(cluster.socket(export), 1);
        let places = exports
            .map(|export| (export, Arc::new(Mutex::new(place(export)))))
            .collect();
        Ok(Run {
            ledger: Arc::new(Ledger::default()),
            rng: Rng::stream(options.seed, "live"),
            timeline,
            table: Table::default(),
            shims: BTreeMap::new(),
            meta_disks: BTreeMap::new(),
            proxies: BTreeMap::new(),
            seed: options.seed,
            places,
            disks: Vec::new(),
            guests: Vec::new(),
            sessions: 1,
            vm: None,
            may_end: BTreeSet::new(),
            logs_read: BTreeMap::new(),
            cluster,
        })
    }

    fn put_shims(&mut self) -> Result<(), Failure> {
        shim::sweep(self.cluster.dir());
        let nodes: Vec<Part> = self.cluster.nodes().collect();
        nodes.into_iter().try_for_each(|node| self.put_shim(node))
    }

    fn put_shim(&mut self, node: Part) -> Result<(), Failure> {
        let Part::Node(k) = node else { return Ok(()) };
        let dir = self.cluster.dir();
        let (backing, mount) = (dir.join(format!("node-{k}.img")), dir.join(format!("mount-{k}")));
        let failed = |error: std::io::Error| {
            let words = format!("the device of {node} can't be put behind a shim: {error}");
            Failure::new(FailureKind::Setup, words)
        };
        let file = fs::File::create(&backing).map_err(failed)?;
        file.set_len(self.cluster.device_bytes()).map_err(failed)?;
        fs::create_dir_all(&mount).map_err(failed)?;
        let shim = Shim::start(&backing, &mount, self.rng.word()).map_err(failed)?;
        self.cluster.use_device(k, shim.device());
        self.shims.insert(k, shim);
        Ok(())
    }

    fn put_meta_disks(&mut self) -> Result<(), Failure> {
        for meta in self.cluster.metas() {
            let Part::Meta(k) = meta else { continue };
            let disk = MetaDisk::new(self.cluster.dir(), &meta.to_string(), self.rng.word())
                .map_err(|words| Failure::new(FailureKind::Setup, words))?;
            self.cluster.use_meta_dir(k, disk.path());
            self.meta_disks.insert(k, disk);
        }
        Ok(())
    }

    fn lie(&mut self) -> Result<(), Failure> {
        self.timeline.note("devices lie: their flushes do nothing");
        for shim in self.shims.values() {
            let rule = Rule::always(Some(Kind::Flush), Effect::Lose);
            shim.add(rule)
                .map_err(|words| Failure::new(FailureKind::Setup, words))?;
        }
        Ok(())
    }

    fn put_proxies(&mut self) -> Result<(), Failure> {
        self.cluster
            .servers()
            .into_iter()
            .try_for_each(|part| self.put_proxy(part))
    }

    fn put_proxy(&mut self, part: Part) -> Result<(), Failure> {
        let (listen, target) = (self.cluster.address_before(part), self.cluster.address(part));
        let failed = |words: String| Failure::new(FailureKind::Setup, format!("no proxy before {part}: {words}"));
        let parse = |address: &str| address.parse::<SocketAddr>().map_err(|error| failed(error.to_string()));
        let proxy = Proxy::start(parse(&listen)?, parse(&target)?, self.rng.word());
        let proxy = proxy.map_err(|error| failed(error.to_string()))?;
        self.cluster.advertise(part, proxy.address());
        self.proxies.insert(part, proxy);
        Ok(())
    }

    /// A storage node more, with a shim and a proxy if the others have them. It is not started.
    pub fn add_node(&mut self) -> Result<Part, Failure> {
        let node = self.cluster.add_node()?;
        if !self.shims.is_empty() {
            self.put_shim(node)?;
        }
        if !self.proxies.is_empty() {
            self.put_proxy(node)?;
        }
        Ok(node)
    }

    /// After what silence the copies of a node are made anew elsewhere.
    pub fn rebuild_after(&self) -> Duration {
        self.cluster.rebuild_after()
    }

    /// Until [`Run::never_ends`] it is no failure when this part ends by itself: a fault leaves it no choice.
    pub fn may_end(&mut self, part: Part) {
        self.may_end.insert(part);
    }

    /// From now on this part must not end by itself.
    pub fn never_ends(&mut self, part: Part) {
        self.may_end.remove(&part);
    }

    /// Guests who find their disks at `home` let end what is under way, and go on at `to`, under a new attachment.
    pub fn move_guests(&mut self, home: u8, to: u8) -> Result<(), Failure> {
        let place = Arc::clone(&self.places[&home]);
        let moving = |guests: &[Guest], of: fn(&Guest)| guests.iter().filter(|guest| guest.is_at(&place)).for_each(of);
        moving(&self.guests, Guest::pause);
        let are_idle = |guests: &[Guest]| guests.iter().filter(|guest| guest.is_at(&place)).all(Guest::is_idle);
        if !wait_until(IO_BOUND, || are_idle(&self.guests)) {
            let words = format!("what was under way at export-{home} did not end within {IO_BOUND:?}");
            return Err(Failure::new(FailureKind::Stall, words));
        }
        self.sessions += 1;
        *place.lock().unwrap_or_else(PoisonError::into_inner) = Place::new(self.cluster.socket(to), self.sessions);
        moving(&self.guests, Guest::resume);
        Ok(())
    }

    /// Ends all faults of devices and of the network. Harm that was done stays.
    pub fn heal(&mut self) -> Result<(), Failure> {
        for shim in self.shims.values() {
            shim.heal();
            shim.power_on();
        }
        for (part, proxy) in &self.proxies {
            proxy.heal().map_err(|error| {
                let words = format!("the proxy before {part} can't listen again: {error}");
                Failure::new(FailureKind::Setup, words)
            })?;
        }
        self.cluster.open_ways()?;
        Ok(())
    }

    /// Creates a volume, without guests.
    pub fn create(&mut self, volume: &VolumeOptions) -> Result<Disk, Failure> {
        let shown = self.cluster.create_volume(&volume.name, &volume.bytes.to_string())?;
        let id = VolumeId(self.disks.len() as u64 + 1);
        let groups = shown["groups"]
            .as_u64()
            .and_then(|groups| GroupCount::new(groups as u8));
        let groups =
            groups.ok_or_else(|| Failure::new(FailureKind::Operation, format!("a volume without groups: {shown}")))?;
        self.ledger.add_volume(id, groups);
        let disk = Disk::new(id, &volume.name, volume.bytes);
        self.disks.push((disk.clone(), volume.export));
        Ok(disk)
    }

    fn add_guests(&mut self) {
        for (disk, export) in &self.disks {
            for k in 0..GUESTS_PER_DISK {
                let rng = Rng::stream(self.seed, &format!("guest {} {k}", disk.name));
                let (ledger, place) = (Arc::clone(&self.ledger), Arc::clone(&self.places[export]));
                self.guests.push(Guest::start(disk.clone(), ledger, place, rng));
            }
        }
    }

    /// The exports that the guests use who are there all the time.
    pub fn exports(&self) -> Vec<Part> {
        let used = |export: &&u8| self.guests.iter().any(|guest| guest.is_at(&self.places[export]));
        self.places
            .keys()
            .filter(used)
            .map(|export| Part::Export(*export))
            .collect()
    }

    /// The volume of this name.
    pub fn disk(&self, name: &str) -> Option<Disk> {
        self.disks
            .iter()
            .map(|(disk, _)| disk)
            .find(|disk| disk.name == name)
            .cloned()
    }

    /// Guests may be told where to find a further export; it is started by whoever needs it.
    pub fn add_place(&mut self, export: u8) {
        let socket = self.cluster.socket(export);
        self.places
            .entry(export)
            .or_insert_with(|| Arc::new(Mutex::new(Place::new(socket, 1))));
    }

    /// Where guests find an export.
    pub fn place(&self, export: u8) -> Arc<Mutex<Place>> {
        Arc::clone(&self.places[&export])
    }

    /// A number for what will be the newest attachment.
    pub fn next_session(&mut self) -> u32 {
        self.sessions += 1;
        self.sessions
    }

    /// Starts a part.
    pub fn start(&mut self, part: Part) -> Result<(), Failure> {
        if let Part::Export(export) = part
            && let Some(place) = self.places.get(&export)
        {
            self.sessions += 1;
            *place.lock().unwrap_or_else(PoisonError::into_inner) =
                Place::new(self.cluster.socket(export), self.sessions);
        }
        self.cluster.start(part)?;
        self.timeline.note(format!("{part} is started"));
        Ok(())
    }

    /// Starts what does not run, in this order.
    pub fn start_all(&mut self, parts: &[Part]) -> Result<(), Failure> {
        for part in parts {
            if !self.cluster.is_running(*part) {
                self.start(*part)?;
            }
        }
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(&mut self, parts: &[Part]) {
        let names: Vec<String> = parts.iter().map(ToString::to_string).collect();
        self.cluster.kill(parts);
        self.timeline.note(format!("{} killed", names.join(", ")));
    }

    /// SIGTERM; it must end in order.
    pub fn stop(&mut self, part: Part) -> Result<(), Failure> {
        let status = self.cluster.stop(part, STOP_BOUND);
        self.timeline.note(format!("{part} was asked to stop: {status:?}"));
        if status.is_some_and(|status| status.success()) {
            return Ok(());
        }
        let words = format!("{part} was asked to stop and ended so: {status:?}");
        Err(Failure::new(FailureKind::Died, words))
    }

    /// SIGSTOP.
    pub fn freeze(&mut self, part: Part) {
        process::freeze(self.cluster.pid(part));
        self.timeline.note(format!("{part} is frozen"));
    }

    /// SIGCONT.
    pub fn resume(&mut self, part: Part) {
        process::resume(self.cluster.pid(part));
        self.timeline.note(format!("{part} goes on"));
    }

    /// Lets the load go on for a while, and fails as soon as something is wrong that need not be waited for.
    pub fn load(&mut self, span: Duration) -> Result<(), Failure> {
        let end = Instant::now() + span;
        loop {
            self.watch()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(WATCH_INTERVAL));
        }
    }

    /// Whether nobody has read what nobody wrote, and no process has ended by itself.
    pub fn watch(&mut self) -> Result<(), Failure> {
        stop::check()?;
        if let Some(broken) = self.ledger.broken() {
            return Err(broken.into());
        }
        if let Some(vm) = &mut self.vm {
            vm.poll()?;
        }
        for (part, status) in self.cluster.ended() {
            let words = format!("{part} has ended by itself, {status}");
            if self.may_end.contains(&part) {
                self.timeline.note(words);
                continue;
            }
            return Err(Failure {
                story: self.log_end(part),
                ..Failure::new(FailureKind::Died, words)
            });
        }
        Ok(())
    }

    /// At the end of a run: what a virtual machine has written is there after its power went.
    pub fn finish(&mut self) -> Result<(), Failure> {
        let Some(mut vm) = self.vm.take() else { return Ok(()) };
        let result = vm.finish();
        self.timeline.note(format!(
            "the power of the virtual machine went {} times, {} files were found again",
            vm.power_offs, vm.found
        ));
        result
    }

    /// The last lines of a part's log.
    pub fn log_end(&self, part: Part) -> Vec<String> {
        let text = fs::read(self.cluster.log(part)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<String> = text.lines().map(str::to_string).collect();
        lines[lines.len().saturating_sub(20)..].to_vec()
    }

    /// After a fault has ended: every guest is answered again, the cluster becomes well by itself, all is read and all that was
    /// ever answered fits together. Guests go on afterwards.
    pub fn verify(&mut self) -> Result<Recovery, Failure> {
        let begun = Instant::now();
        self.wait_answers()?;
        let first_io = begun.elapsed();
        let end = Instant::now() + WELL_BOUND;
        let well = loop {
            self.watch()?;
            match self.cluster.wait_well(Duration::from_secs(2)) {
                Ok(_) => break begun.elapsed(),
                Err(problems) if Instant::now() >= end => {
                    let words = format!("after {WELL_BOUND:?} there is still: {}", problems.join("; "));
                    return Err(Failure::new(FailureKind::Unhealed, words));
                }
                Err(_) => {}
            }
        };
        self.pause()?;
        self.read_and_check()?;
        self.look_for_panics()?;
        for guest in &self.guests {
            guest.resume();
        }
        Ok(Recovery { first_io, well })
    }

    /// Every guest is answered something that it asks from now on.
    pub fn wait_answers(&mut self) -> Result<(), Failure> {
        let before: Vec<u64> = self.guests.iter().map(Guest::done).collect();
        let end = Instant::now() + IO_BOUND;
        loop {
            self.watch()?;
            let waiting: Vec<&str> = self
                .guests
                .iter()
                .zip(&before)
                // Those under way when it began may have been answered before the fault ended.
                .filter(|(guest, before)| guest.done() < **before + 8)
                .map(|(guest, _)| guest.disk().name.as_str())
                .collect();
            if waiting.is_empty() {
                return Ok(());
            }
            if Instant::now() >= end {
                let words = format!("guests of {} have had no answer for {IO_BOUND:?}", waiting.join(", "));
                return Err(Failure::new(FailureKind::Stall, words));
            }
            std::thread::sleep(WATCH_INTERVAL / 5);
        }
    }

    fn pause(&mut self) -> Result<(), Failure> {
        self.guests.iter().for_each(Guest::pause);
        if wait_until(IO_BOUND, || self.guests.iter().all(Guest::is_idle)) {
            return Ok(());
        }
        self.watch()?;
        let words = format!("operations did not end within {IO_BOUND:?} though nothing new was begun");
        Err(Failure::new(FailureKind::Stall, words))
    }

    /// Reads everything, with no guest at work, and checks the history.
    fn read_and_check(&mut self) -> Result<(), Failure> {
        let mut held = Held::new();
        for (disk, export) in &self.disks {
            let place = self.places[export]
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
            sweep(disk, &self.ledger, &place, IO_BOUND, &mut held)?;
        }
        let checked = self.ledger.check()?;
        if checked.undecided > 0 {
            self.timeline
                .note(format!("{} blocks could not be decided", checked.undecided));
        }
        self.ledger.settle(held);
        Ok(())
    }

    /// Logs are looked at for panics that did not end their process.
    fn look_for_panics(&mut self) -> Result<(), Failure> {
        let logs = fs::read_dir(self.cluster.dir().join("log"))
            .into_iter()
            .flatten()
            .flatten();
        for entry in logs {
            let path = entry.path();
            let bytes = fs::read(&path).unwrap_or_default();
            let from = self.logs_read.insert(path.clone(), bytes.len() as u64).unwrap_or(0);
            let news = String::from_utf8_lossy(bytes.get(from as usize..).unwrap_or_default()).into_owned();
            if let Some(line) = news.lines().find(|line| line.contains("panicked at")) {
                let words = format!("{}: {line}", path.display());
                return Err(Failure::new(FailureKind::Died, words));
            }
        }
        Ok(())
    }

    /// One step: injects a fault, lets it end, verifies, and adds what was seen to the table. A fault that leaves a quorum must
    /// not hold anybody up for longer than `stall_max`.
    pub fn step(
        &mut self,
        fault: &'static str,
        stall_max: Option<Duration>,
        inject: impl FnOnce(&mut Run) -> Result<(), Failure>,
    ) -> Result<Recovery, Failure> {
        self.timeline.note(format!("-- {fault}"));
        let result = inject(self).and_then(|()| self.verify());
        let tally = self.ledger.take_tally();
        let result = result.and_then(|recovery| {
            if tally.errors > 0 {
                return Err(Failure {
                    story: tally.words.clone(),
                    ..Failure::new(
                        FailureKind::GuestError,
                        format!("{} errors during {fault}", tally.errors),
                    )
                });
            }
            match stall_max.filter(|bound| tally.longest_stall > *bound) {
                Some(bound) => {
                    let stall = tally.longest_stall;
                    let words =
                        format!("a guest had no answer for {stall:?} during {fault}, where {bound:?} is the bound");
                    Err(Failure::new(FailureKind::Stall, words))
                }
                None => Ok(recovery),
            }
        });
        self.timeline.note(format!(
            "   {fault}: {} done, longest stall {:.2} s, {}",
            tally.done,
            tally.longest_stall.as_secs_f64(),
            match &result {
                Ok(recovery) => format!("well after {:.2} s", recovery.well.as_secs_f64()),
                Err(failure) => format!("FAILED: {}", failure.words),
            }
        ));
        let row = self.table.row(fault);
        row.times += 1;
        row.tally.add(&tally);
        match &result {
            Ok(recovery) => row.well_after = row.well_after.max(recovery.well),
            Err(failure) => {
                row.failed = Some(failure.kind);
                row.mismatches += u64::from(failure.kind == FailureKind::Data);
            }
        }
        result
    }

    /// Puts all that is known of a failure beside the logs: the operations, the metrics of each process, and then, with all
    /// processes killed, the devices stay as they were.
    pub fn keep(mut self, failure: &Failure) -> PathBuf {
        let dir = self.cluster.dir().to_path_buf();
        self.timeline.note(format!("FAILED {failure}"));
        let metrics = dir.join("metrics");
        // What can't be written can't be looked at: the words of the failure are printed in any case.
        let _ = fs::create_dir_all(&metrics);
        for part in self.cluster.running() {
            let text = scrape_what_comes(self.cluster.metrics_address(part));
            let _ = fs::write(metrics.join(format!("{part}.txt")), text);
        }
        let _ = fs::write(dir.join("status.txt"), format!("{:#?}", self.cluster.ask(&["status"])));
        let _ = fs::write(dir.join("failure.txt"), format!("seed {}\n{failure}\n", self.seed));
        let _ = fs::write(dir.join("operations.txt"), self.ledger.lines().join("\n"));
        let _ = fs::write(dir.join("table.txt"), self.table.to_string());
        dir
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // Guests first: they would try to come back to exports that are gone. Then what waits on a device, so that
        // processes can be killed, then those, so that the devices are no longer in use when the shims go.
        self.guests.clear();
        self.vm = None;
        for shim in self.shims.values() {
            shim.heal();
        }
        let running = self.cluster.running();
        self.cluster.kill(&running);
    }
}
