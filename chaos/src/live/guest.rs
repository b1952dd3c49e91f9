//! What guests do with their disks: reads, writes of whole and partial blocks with and without FUA, trims, zeroes and flushes
//! on a few hot blocks, several at a time on several connections. Every sector that they write names the operation.
//!
//! A guest whose connection breaks makes a new one and goes on, as a virtual machine's driver does.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cairn_proto::ids::VolumeId;
use cairn_proto::limits::{BLOCKS_PER_CHUNK, SECTOR_BYTES};

use super::ledger::{Ledger, Sectors};
use super::nbd::{Command, Connection};
use super::report::{Failure, FailureKind};
use crate::checker::history::{OpKind, OpNumber};
use crate::checker::linear::BlockContent;
use crate::checker::pattern::{SECTORS_PER_BLOCK, fill};
use crate::rng::Rng;

/// Requests under way on one connection.
const DEPTH: usize = 4;
/// The mean time between two requests of one connection.
const PACE: Duration = Duration::from_millis(6);
/// How long a guest looks for an answer before it looks for something else to do.
const TURN: Duration = Duration::from_millis(4);
/// The pause before a broken connection is made anew.
const RECONNECT_PAUSE: Duration = Duration::from_millis(20);
/// Blocks of an operation, mostly.
const BLOCKS_MAX: u64 = 16;
/// Blocks of one read when everything is read.
const SWEEP_BLOCKS: u64 = 64;
/// Blocks of the region that long operations go to: longer than a frame may be.
const LONG_REGION: u64 = 1024;

/// A volume as guests see it.
#[derive(Clone, Debug)]
pub struct Disk {
    /// For the history.
    pub volume: VolumeId,
    /// The export's name.
    pub name: String,
    /// Runs of blocks that are used: the first, and how many. The last one is for long operations.
    pub regions: Vec<(u64, u64)>,
}

impl Disk {
    /// Uses its start, its end, and the borders between its chunks.
    pub fn new(volume: VolumeId, name: &str, bytes: u64) -> Disk {
        let blocks = bytes / (SECTOR_BYTES * SECTORS_PER_BLOCK) as u64;
        let chunk = u64::from(BLOCKS_PER_CHUNK);
        assert!(blocks > 4 * LONG_REGION, "a volume of {bytes} bytes is too small");
        let mut regions = vec![(0, 32), (blocks - 32, 32)];
        // The first borders do: a chunk more is one like the others.
        let borders = (1..=3).map(|k| k * chunk).filter(|border| border + 64 < blocks);
        regions.extend(borders.map(|border| (border - 24, 48)));
        regions.push((LONG_REGION, LONG_REGION));
        Disk {
            volume,
            name: name.to_string(),
            regions,
        }
    }
}

/// Where a disk is reached just now.
#[derive(Clone, Debug)]
pub struct Place {
    /// The export's socket.
    pub socket: PathBuf,
    /// The attachment, counted up whenever the export begins anew.
    pub session: u32,
}

impl Place {
    /// An export, and which of its runs it is.
    pub fn new(socket: PathBuf, session: u32) -> Place {
        Place { socket, session }
    }
}

/// What guests are to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum Phase {
    Run,
    Pause,
    Stop,
}

/// What is shared with a guest's thread.
struct Shared {
    disk: Disk,
    ledger: Arc<Ledger>,
    place: Arc<Mutex<Place>>,
    phase: AtomicU8,
    is_idle: AtomicBool,
    /// From now on errors are due: somebody else has taken the disk.
    is_fenced: AtomicBool,
    /// Operations done.
    done: AtomicU64,
    /// Never connects again once its connection is lost.
    once: bool,
}

impl Shared {
    fn place(&self) -> Place {
        self.place.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn is(&self, phase: Phase) -> bool {
        self.phase.load(Ordering::Acquire) == phase as u8
    }
}

/// One connection's worth of load. Its thread ends when it is dropped.
pub struct Guest {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Guest {
    /// Begins at once.
    pub fn start(disk: Disk, ledger: Arc<Ledger>, place: Arc<Mutex<Place>>, rng: Rng) -> Guest {
        Guest::spawn(disk, ledger, place, rng, false)
    }

    /// One that stays with the first connection that it gets.
    pub fn start_once(disk: Disk, ledger: Arc<Ledger>, place: Arc<Mutex<Place>>, rng: Rng) -> Guest {
        Guest::spawn(disk, ledger, place, rng, true)
    }

    fn spawn(disk: Disk, ledger: Arc<Ledger>, place: Arc<Mutex<Place>>, rng: Rng, once: bool) -> Guest {
        let shared = Arc::new(Shared {
            disk,
            ledger,
            place,
            phase: AtomicU8::new(Phase::Run as u8),
            is_idle: AtomicBool::new(false),
            is_fenced: AtomicBool::new(false),
            done: AtomicU64::new(0),
            once,
        });
        let worker = Worker {
            shared: Arc::clone(&shared),
            rng,
            link: None,
            had_link: false,
            due: Instant::now(),
            waits_since: None,
        };
        Guest {
            shared,
            thread: Some(std::thread::spawn(move || worker.run())),
        }
    }

    /// Asks it to begin nothing new; it is idle once everything was answered.
    pub fn pause(&self) {
        self.shared.is_idle.store(false, Ordering::Release);
        self.shared.phase.store(Phase::Pause as u8, Ordering::Release);
    }

    /// Asks it to go on.
    pub fn resume(&self) {
        self.shared.is_idle.store(false, Ordering::Release);
        self.shared.phase.store(Phase::Run as u8, Ordering::Release);
    }

    /// After a pause: whether nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.shared.is_idle.load(Ordering::Acquire)
    }

    /// From now on errors are what it must get.
    pub fn expect_fence(&self) {
        self.shared.is_fenced.store(true, Ordering::Release);
    }

    /// How many operations were done so far.
    pub fn done(&self) -> u64 {
        self.shared.done.load(Ordering::Acquire)
    }

    /// Whether it looks for its disk there.
    pub fn is_at(&self, place: &Arc<Mutex<Place>>) -> bool {
        Arc::ptr_eq(&self.shared.place, place)
    }

    /// Its disk.
    pub fn disk(&self) -> &Disk {
        &self.shared.disk
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.shared.phase.store(Phase::Stop as u8, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // A panic there was printed; the run notices that nothing is done any more.
            let _ = thread.join();
        }
    }
}

struct Link {
    connection: Connection,
    session: u32,
    under_way: BTreeMap<u64, OpNumber>,
}

struct Worker {
    shared: Arc<Shared>,
    rng: Rng,
    link: Option<Link>,
    had_link: bool,
    /// When the next request is made.
    due: Instant,
    /// Since when it has had something to do and got no answer.
    waits_since: Option<Instant>,
}

impl Worker {
    fn run(mut self) {
        while !self.shared.is(Phase::Stop) {
            if self.shared.is(Phase::Pause) && self.link.as_ref().is_none_or(|link| link.under_way.is_empty()) {
                self.waits_since = None;
                self.shared.is_idle.store(true, Ordering::Release);
                std::thread::sleep(TURN);
                continue;
            }
            if self.link.is_none() && !self.connect() {
                std::thread::sleep(RECONNECT_PAUSE);
                continue;
            }
            if self.turn().is_err() {
                self.lose();
            }
        }
        self.lose();
    }

    fn connect(&mut self) -> bool {
        if self.shared.once && self.had_link {
            return false;
        }
        self.waits_since.get_or_insert_with(Instant::now);
        let place = self.shared.place();
        let Ok(connection) = Connection::open(&place.socket, &self.shared.disk.name) else {
            return false;
        };
        self.shared.ledger.attached(place.session);
        self.had_link = true;
        self.due = Instant::now();
        self.link = Some(Link {
            connection,
            session: place.session,
            under_way: BTreeMap::new(),
        });
        true
    }

    fn lose(&mut self) {
        for number in self
            .link
            .take()
            .into_iter()
            .flat_map(|link| link.under_way.into_values())
        {
            self.shared.ledger.unanswered(number);
        }
    }

    /// Submits what is due, and takes what is answered.
    fn turn(&mut self) -> io::Result<()> {
        let link = self.link.as_mut().expect("connected before");
        let has_moved = !self.shared.once && self.shared.place().session != link.session;
        if has_moved && link.under_way.is_empty() {
            // A good-bye, so that the export lets go of the volume; one that is gone needs none.
            let _ = link.connection.submit(Command::Disconnect, 0, 0, &[]);
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        while !has_moved && self.shared.is(Phase::Run) && link.under_way.len() < DEPTH && self.due <= Instant::now() {
            let plan = Plan::draw(&mut self.rng, &self.shared.disk);
            let volume = self.shared.disk.volume;
            let Some(number) = self.shared.ledger.call(link.session, volume, plan.kind, plan.place) else {
                break;
            };
            // After a pause it does not make up for what it has not asked.
            self.due = self.due.max(Instant::now() - PACE) + self.rng.spread(PACE);
            self.waits_since.get_or_insert_with(Instant::now);
            let sent = plan.submit(volume, number, &mut link.connection);
            // It may have been sent although that failed.
            link.under_way
                .insert(sent.as_ref().copied().unwrap_or(u64::MAX), number);
            sent?;
        }
        let Some(reply) = link.connection.poll(TURN)? else {
            return Ok(());
        };
        let number = link
            .under_way
            .remove(&reply.handle)
            .expect("only what was asked is answered");
        if reply.error != 0 {
            let fenced = self.shared.is_fenced.load(Ordering::Acquire);
            self.shared.ledger.failed(number, reply.error, fenced);
        } else {
            let now = Instant::now();
            let stalled = self.waits_since.map_or(Duration::ZERO, |since| now - since);
            self.waits_since = (!link.under_way.is_empty()).then_some(now);
            self.shared.ledger.done(number, reply.data, stalled);
            self.shared.done.fetch_add(1, Ordering::AcqRel);
        }
        Ok(())
    }
}

/// One operation to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Plan {
    kind: OpKind,
    command: Command,
    place: Sectors,
}

impl Plan {
    fn draw(rng: &mut Rng, disk: &Disk) -> Plan {
        let per_block = SECTORS_PER_BLOCK as u64;
        let (long, short) = disk.regions.split_last().expect("a disk has regions");
        let is_long = rng.permille(8);
        let (first, count) = if is_long { *long } else { *rng.pick(short) };
        let blocks = rng.within(1, if is_long { count } else { BLOCKS_MAX.min(count) });
        let block = first + rng.below(count - blocks + 1);
        let mut place = (block * per_block, blocks * per_block);
        let kind_drawn = rng.weighted(&[36, 36, 12, 6, 6, 4]);
        let is_part = kind_drawn == 2 || (matches!(kind_drawn, 3 | 4) && rng.permille(300));
        if is_part {
            let from = rng.below(place.1);
            place = (place.0 + from, rng.within(1, place.1 - from));
        }
        let (kind, command) = match kind_drawn {
            0 => (OpKind::Read, Command::Read),
            2 if rng.permille(200) => (OpKind::Read, Command::Read),
            1 | 2 => {
                let fua = rng.permille(150);
                (OpKind::Write, Command::Write { fua })
            }
            3 => (OpKind::Zero, Command::Trim),
            4 => {
                let no_hole = rng.permille(500);
                (OpKind::Zero, Command::WriteZeroes { no_hole })
            }
            _ => (OpKind::Other, Command::Flush),
        };
        Plan { kind, command, place }
    }

    fn submit(&self, volume: VolumeId, number: OpNumber, connection: &mut Connection) -> io::Result<u64> {
        let (sector, sectors) = self.place;
        let (offset, length) = match self.command {
            Command::Flush => (0, 0),
            _ => (sector * SECTOR_BYTES as u64, (sectors * SECTOR_BYTES as u64) as u32),
        };
        match self.command {
            Command::Write { .. } => {
                let data = fill(volume, sector, sectors as usize, number);
                connection.submit(self.command, offset, length, &data)
            }
            _ => connection.submit(self.command, offset, length, &[]),
        }
    }
}

/// What blocks of volumes held.
pub type Held = BTreeMap<(VolumeId, u64), BlockContent>;

/// Reads all that guests use of a disk, into the ledger and `held`; how long it took to the first answer.
///
/// # Errors
/// It can't be read within `bound`, or an answer is an error.
pub fn sweep(
    disk: &Disk,
    ledger: &Ledger,
    place: &Place,
    bound: Duration,
    held: &mut Held,
) -> Result<Duration, Failure> {
    let begun = Instant::now();
    let left = || bound.saturating_sub(begun.elapsed()).max(Duration::from_millis(1));
    let mut connection = loop {
        match Connection::open(&place.socket, &disk.name) {
            Ok(connection) => break connection,
            Err(error) if begun.elapsed() >= bound => {
                let words = format!("volume {} can't be attached for {bound:?}: {error}", disk.name);
                return Err(Failure::new(FailureKind::Stall, words));
            }
            Err(_) => std::thread::sleep(RECONNECT_PAUSE),
        }
    };
    ledger.attached(place.session);
    let mut first = None;
    for (start, count) in &disk.regions {
        let mut block = *start;
        while block < start + count {
            let blocks = SWEEP_BLOCKS.min(start + count - block);
            let per_block = SECTORS_PER_BLOCK as u64;
            let sectors = (block * per_block, blocks * per_block);
            let number = ledger
                .call(place.session, disk.volume, OpKind::Read, sectors)
                .expect("nothing else is under way");
            let offset = sectors.0 * SECTOR_BYTES as u64;
            let length = (sectors.1 * SECTOR_BYTES as u64) as u32;
            match connection.ask(Command::Read, offset, length, &[], left()) {
                Ok(data) => ledger.done(number, data, Duration::ZERO),
                Err(error) => {
                    ledger.unanswered(number);
                    let kind = match error.kind() {
                        io::ErrorKind::Other => FailureKind::GuestError,
                        _ => FailureKind::Stall,
                    };
                    let words = format!(
                        "volume {}: a read of {length} bytes at {offset}, after {:?}: {error}",
                        disk.name,
                        begun.elapsed()
                    );
                    return Err(Failure::new(kind, words));
                }
            }
            first.get_or_insert_with(|| begun.elapsed());
            held.extend(
                ledger
                    .seen(number)
                    .into_iter()
                    .map(|(block, content)| ((disk.volume, block), content)),
            );
            block += blocks;
        }
    }
    Ok(first.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_stay_within_their_regions_and_are_of_every_kind() {
        let disk = Disk::new(VolumeId(1), "v", 192 << 20);
        let mut rng = Rng::new(1);
        let mut kinds = BTreeMap::new();
        for _ in 0..20_000 {
            let plan = Plan::draw(&mut rng, &disk);
            let (first, end) = (plan.place.0, plan.place.0 + plan.place.1);
            assert!(first < end);
            let inside = disk
                .regions
                .iter()
                .any(|(start, count)| start * 8 <= first && end <= (start + count) * 8);
            assert!(inside, "{plan:?}");
            *kinds.entry(format!("{:?}", plan.command)).or_insert(0) += 1;
        }
        assert_eq!(kinds.len(), 7, "{kinds:?}");
        assert!(
            disk.regions
                .iter()
                .all(|(start, count)| (start + count) * 4096 <= 192 << 20)
        );
    }
}
