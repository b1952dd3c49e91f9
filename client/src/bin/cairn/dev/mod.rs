//! `cairn dev`: a whole cluster on this machine, each part of it a process of this program.
//!
//! Standard output carries the lines that programs rely on (`ready …`, `cluster ready`), standard error everything else.
//!
//! Reading order: `layout` (the directory), `memory` (ports that stay the same), `lock` (one at a time), `parts` (the
//! processes), `ready` and `probe` (until volumes can be used), `logs`.

mod layout;
mod lock;
mod logs;
mod memory;
mod parts;
mod probe;
mod ready;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::time::{Duration, Instant};

use cairn_meta::client::MetaClient;
use cairn_proto::units::ByteSize;
use tokio::task::JoinHandle;

use crate::args::{Dev, Global};
use crate::commands::block_on;
use crate::failure::{Failure, Kind};
use crate::limits::{LOG_FOLLOW_INTERVAL, PATIENCE_INTERVAL, RESTART_CALM, RESTART_PAUSES, START_BOUND};
use crate::output::{self, count};
use crate::process::{StopSignals, key, refuse_canary};
use layout::{Layout, Part};
use memory::Memory;
use parts::{Ended, Parts, Wishes, write_configs};
use ready::{Progress, Start};

/// Metadata servers and storage nodes of a new cluster.
const COUNTS: (u32, u32) = (3, 3);
/// The size of a new device file.
const DEVICE_SIZE: ByteSize = ByteSize(8 << 30);

/// Talk, which goes to standard error. Whether anybody listens does not matter.
macro_rules! say {
    ($($words:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), "cairn dev: {}", format_args!($($words)*));
    }};
}
use say;

pub(crate) fn run(global: &Global, args: &Dev) -> Result<(), Failure> {
    refuse_canary()?;
    let layout = Layout::new(args.dir.as_deref())?;
    layout.create()?;
    let _lock = lock::DirLock::acquire(&layout)?;
    let leftovers = lock::stop_leftovers(&layout)?;
    if !leftovers.is_empty() {
        let names: Vec<_> = leftovers
            .iter()
            .map(|(part, pid)| format!("{part} (process {pid})"))
            .collect();
        say!("stopped what an earlier start had left running: {}", names.join(", "));
    }
    let mut memory = Memory::load(&layout.state())?;
    let (metas, nodes) = counts(&memory, args)?;
    for part in memory.assign(metas, nodes)? {
        say!("a port of {part} was taken by another process: it has another one now");
    }
    memory.store(&layout.state())?;
    key::create(&layout.key())?;
    if memory.was_ready() && args.device_size.is_some() {
        say!("--device-size is for new devices only; those that exist stay as they are");
    }
    let wishes = Wishes {
        device_size: args.device_size.unwrap_or(DEVICE_SIZE),
        nbd_tcp: args.nbd_tcp,
        log: global.log.clone(),
        rebuild_after: args.rebuild_after,
    };
    write_configs(&layout, &memory, &wishes)?;
    Parts::forget(&layout, &memory.parts());
    // All on this thread: the processes die with the thread that started them.
    block_on(async {
        let signals = StopSignals::listen()?;
        let parts = Parts::new(&layout)?;
        let mut cluster = Cluster {
            layout: &layout,
            memory: &mut memory,
            args,
            signals,
            parts,
            pauses: BTreeMap::new(),
            restarts: Vec::new(),
        };
        let result = cluster.run().await;
        let stopped = cluster.stop().await;
        result.and(stopped)
    })
}

/// How many metadata servers and storage nodes there are to be. A cluster can get more nodes; what it has it needs.
fn counts(memory: &Memory, args: &Dev) -> Result<(u32, u32), Failure> {
    if memory.is_empty() {
        return Ok((args.metas.unwrap_or(COUNTS.0), args.nodes.unwrap_or(COUNTS.1)));
    }
    let (metas, nodes) = memory.counts();
    let refuse =
        |what: String| Err(Failure::usage(what).hint("Leave the option out, or choose another directory with --dir."));
    if args.metas.is_some_and(|wanted| wanted != metas) {
        return refuse(format!(
            "the cluster in this directory has {}: --metas can't change that",
            count(metas.into(), "metadata server")
        ));
    }
    match args.nodes {
        Some(wanted) if wanted < nodes => refuse(format!(
            "the cluster in this directory has {}: with fewer, copies would be out of reach",
            count(nodes.into(), "storage node")
        )),
        Some(wanted) => Ok((metas, wanted)),
        None => Ok((metas, nodes)),
    }
}

/// The running cluster.
struct Cluster<'a> {
    layout: &'a Layout,
    memory: &'a mut Memory,
    args: &'a Dev,
    signals: StopSignals,
    parts: Parts,
    /// How long each part waits before its next restart.
    pauses: BTreeMap<Part, Duration>,
    /// When parts are started again.
    restarts: Vec<(Instant, Part)>,
}

impl Cluster<'_> {
    /// From the start of the processes to the signal that ends them.
    async fn run(&mut self) -> Result<(), Failure> {
        let parts = self.memory.parts();
        let (metas, nodes) = self.memory.counts();
        say!(
            "starting {} and {} in {}",
            count(metas.into(), "metadata server"),
            count(nodes.into(), "storage node"),
            self.layout.dir().display()
        );
        let follower = self.args.foreground_logs.then(|| follow(self.layout, &parts));
        for part in &parts {
            self.parts.start(*part)?;
        }
        let Some(volumes) = self.start().await? else {
            return Ok(());
        };
        self.memory.set_ready();
        self.memory.store(&self.layout.state())?;
        self.announce(&volumes)?;
        loop {
            tokio::select! {
                signal = self.signals.next() => {
                    say!("{signal} received, stopping");
                    break;
                }
                ended = self.parts.next_end() => self.mourn(&ended, None)?,
                () = next_restart(&self.restarts) => self.restart()?,
            }
        }
        if let Some(follower) = follower {
            follower.abort();
        }
        Ok(())
    }

    /// Waits until the volumes can be used; gives their names, or nothing when a signal came first.
    async fn start(&mut self) -> Result<Option<Vec<String>>, Failure> {
        let progress = Progress::default();
        let layout = self.layout;
        let metas = self
            .memory
            .parts()
            .into_iter()
            .filter(|part| matches!(part, Part::Meta(_)));
        let addresses = metas
            .filter_map(|part| self.memory.listen(part))
            .map(|address| address.to_string());
        let start = Start {
            layout,
            meta: MetaClient::new(addresses.collect()),
            nodes: self.memory.counts().1,
            is_new: !self.memory.was_ready(),
            volumes: &self.args.volumes,
            progress: &progress,
            began: Instant::now(),
        };
        let up = start.bring_up();
        let bound = tokio::time::sleep(START_BOUND);
        let mut patience = tokio::time::interval_at(tokio::time::Instant::now() + PATIENCE_INTERVAL, PATIENCE_INTERVAL);
        tokio::pin!(up, bound);
        let (mut said, mut gave_up) = (String::new(), false);
        loop {
            tokio::select! {
                volumes = &mut up => return volumes.map(Some),
                ended = self.parts.next_end() => self.mourn(&ended, Some(&progress))?,
                () = next_restart(&self.restarts) => self.restart()?,
                signal = self.signals.next() => {
                    say!("{signal} received before the cluster was ready, stopping");
                    return Ok(None);
                }
                _ = patience.tick() => {
                    let now = format!("{}{}", progress.waiting_for(), progress.losses());
                    if now != said {
                        say!("waiting for {now}");
                        said = now;
                    }
                }
                () = &mut bound, if !gave_up => {
                    gave_up = true;
                    let missing = format!("{}{}", progress.waiting_for(), progress.losses());
                    let bound = START_BOUND.as_secs();
                    let logs = layout.dir().join("log");
                    if !self.memory.was_ready() {
                        let what = format!("the cluster is not ready after {bound} s: it waits for {missing}");
                        return Err(Failure::failed(what).hint(format!("The logs in {} may tell why.", logs.display())));
                    }
                    // There is data in it: whoever wants to save or repair it needs what does run.
                    say!(
                        "the cluster is not ready after {bound} s and stays as it is: it waits for {missing}. The logs in \
                         {} may tell why; Ctrl-C stops it.",
                        logs.display()
                    );
                }
            }
        }
    }

    /// A process has ended that should not have. During the start `progress` is given: what can't come up then ends it.
    fn mourn(&mut self, ended: &Ended, progress: Option<&Progress>) -> Result<(), Failure> {
        let part = ended.part;
        say!("{part} (process {}) {}", ended.pid, ended.how());
        if self.args.supervise {
            let (first, longest) = RESTART_PAUSES;
            let calm = ended.since.elapsed() >= RESTART_CALM;
            let pause = self.pauses.get(&part).copied().filter(|_| !calm).unwrap_or(first);
            self.pauses.insert(part, (pause * 2).min(longest));
            self.restarts.push((Instant::now() + pause, part));
            return Ok(());
        }
        if let Some(progress) = progress {
            let log = self.layout.log(part);
            let tail = logs::tail(&log);
            let tail = tail.trim_end();
            progress.without(part);
            let (metas, nodes) = self.memory.counts();
            let hopeless = !self.memory.was_ready()
                || part == Part::Export
                || progress.dead("meta") * 2 > metas
                || progress.dead("node") * 2 > nodes;
            if hopeless {
                let what = format!("{part} {} during the start; its log ends with\n{tail}", ended.how());
                return Err(Failure::failed(what).hint(format!("All of it is in {}.", log.display())));
            }
            say!("its log ends with\n{tail}");
        }
        say!("start it again with: {}", self.parts.command_line(part));
        Ok(())
    }

    fn restart(&mut self) -> Result<(), Failure> {
        let now = Instant::now();
        let due: Vec<Part> = self
            .restarts
            .iter()
            .filter(|(at, _)| *at <= now)
            .map(|(_, part)| *part)
            .collect();
        self.restarts.retain(|(at, _)| *at > now);
        // Somebody else may have been quicker.
        let running = lock::running(self.layout);
        for part in due {
            if !running.iter().any(|(other, _)| *other == part) {
                self.parts.start(part)?;
                say!("started {part} again");
            }
        }
        Ok(())
    }

    /// The last line that programs rely on, then a few for people.
    fn announce(&self, volumes: &[String]) -> Result<(), Failure> {
        output::print("cluster ready\n")?;
        let mut err = std::io::stderr().lock();
        // Whether anybody listens does not matter.
        let _ = err.write_all(self.advice(volumes).as_bytes());
        Ok(())
    }

    fn advice(&self, volumes: &[String]) -> String {
        let config = self.layout.config();
        let program = std::env::args().next().unwrap_or_else(|| "cairn".to_string());
        let mut text = String::new();
        match volumes.first() {
            Some(volume) => {
                let uri = self.layout.uri(volume);
                text.push_str(&format!(
                    "\nUse the disk `{volume}`:\n  \
                     qemu-system-x86_64 -m 1G -drive 'file={uri},format=raw,if=virtio,discard=unmap' ...\n  \
                     nbdcopy image.raw '{uri}'\n  \
                     nbdcopy '{uri}' image.raw\n"
                ));
                if let Some(address) = self.args.nbd_tcp {
                    text.push_str(&format!("Over TCP: nbd://{address}/{volume}\n"));
                }
            }
            None => text.push_str(&format!(
                "\nMake a disk:\n  {program} --config {} volume create demo 1GiB\n",
                config.display()
            )),
        }
        text.push_str(&format!(
            "Look at the cluster:\n  {program} --config {} status\nCtrl-C stops it; the data stays.\n",
            config.display()
        ));
        text
    }

    /// Stops every process. A second signal kills them at once.
    async fn stop(&mut self) -> Result<(), Failure> {
        let killed = tokio::select! {
            killed = self.parts.stop() => killed,
            signal = self.signals.next() => {
                say!("a second {signal}: killing the processes");
                self.parts.kill().await;
                Vec::new()
            }
        };
        Parts::forget(self.layout, &self.memory.parts());
        if killed.is_empty() {
            return Ok(());
        }
        let names: Vec<String> = killed.iter().map(Part::to_string).collect();
        Err(Failure::new(
            Kind::Failed,
            format!("had to kill {}, which did not stop in time", names.join(", ")),
        )
        .hint("Nothing that was written is lost by that; the log may tell what held it up."))
    }
}

/// Shows the logs as they grow.
fn follow(layout: &Layout, parts: &[Part]) -> JoinHandle<()> {
    let mut follower = logs::Follower::new(layout, parts);
    tokio::spawn(async move {
        loop {
            let text = follower.read();
            // Whether anybody listens does not matter.
            let _ = std::io::stderr().lock().write_all(text.as_bytes());
            tokio::time::sleep(LOG_FOLLOW_INTERVAL).await;
        }
    })
}

/// Waits until the first part is due to be started again; for ever when none is.
async fn next_restart(restarts: &[(Instant, Part)]) {
    match restarts.iter().map(|(at, _)| *at).min() {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
