//! What a state of the model is made of. Everything is small and flat, so that millions of states fit into memory.

use std::hash::Hasher;

use super::fingerprint::Fingerprint;
use super::message::Net;

/// Devices: three replicas and a spare.
pub const DEVICES: usize = 4;
/// Starts of a coordinator at the most: three holders, and one more that heals what random walks have left.
pub const HOLDERS: usize = 4;
/// Blocks at the most.
pub const BLOCKS: usize = 2;
/// Copies that make a write durable (`W`).
pub const WRITE_QUORUM: usize = 2;
/// Writes of one holder at the most: the two low bits of a version.
pub const WRITES: u8 = 3;

/// A set of devices.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Debug)]
pub struct Set(pub u8);

impl Set {
    /// No device.
    pub const NONE: Set = Set(0);

    /// The set of one.
    pub fn one(device: u8) -> Set {
        Set(1 << device)
    }

    /// Whether it is in.
    pub fn has(self, device: u8) -> bool {
        self.0 & (1 << device) != 0
    }

    /// How many there are.
    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Those of either.
    pub fn or(self, other: Set) -> Set {
        Set(self.0 | other.0)
    }

    /// Those of both.
    pub fn and(self, other: Set) -> Set {
        Set(self.0 & other.0)
    }

    /// Those that are not in the other.
    pub fn minus(self, other: Set) -> Set {
        Set(self.0 & !other.0)
    }

    /// With one more.
    pub fn with(self, device: u8) -> Set {
        self.or(Set::one(device))
    }

    /// Without that one.
    pub fn without(self, device: u8) -> Set {
        self.minus(Set::one(device))
    }

    /// Them, in order.
    pub fn iter(self) -> impl Iterator<Item = u8> {
        (0..DEVICES as u8).filter(move |device| self.has(*device))
    }

    /// Those for which it is true.
    pub fn filter(self, is_so: impl Fn(u8) -> bool) -> Set {
        Set(self
            .iter()
            .filter(|device| is_so(*device))
            .fold(0, |set, device| set | 1 << device))
    }
}

/// A version `(g, s)` in one number that orders as versions do; zero is older than every write.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Version(pub u8);

impl Version {
    /// Before any write.
    pub const ZERO: Version = Version(0);

    /// Write `s` of generation `g`.
    pub fn new(g: u8, s: u8) -> Version {
        debug_assert!(g as usize <= HOLDERS && (1..=WRITES).contains(&s), "({g},{s})");
        Version(g << 2 | s)
    }

    /// The generation that wrote it.
    pub fn generation(self) -> u8 {
        self.0 >> 2
    }

    /// Its number in that generation.
    pub fn number(self) -> u8 {
        self.0 & 3
    }
}

/// What a device holds for a block: a version, and whether its content is absence (a discard's tombstone).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Cell(u8);

impl Default for Cell {
    fn default() -> Cell {
        Cell::EMPTY
    }
}

impl Cell {
    /// Never written, or its tombstone was dropped.
    pub const EMPTY: Cell = Cell(Cell::ABSENT);
    /// A coordinator's: nobody said yet.
    pub const UNKNOWN: Cell = Cell(0x7f);
    const ABSENT: u8 = 0x80;

    /// Data of that version.
    pub fn data(version: Version) -> Cell {
        Cell(version.0)
    }

    /// Absence of that version.
    pub fn absent(version: Version) -> Cell {
        Cell(version.0 | Cell::ABSENT)
    }

    /// All of it in one byte.
    pub fn bits(self) -> u8 {
        self.0
    }

    /// Its version. An unknown cell has none: ask [`Cell::is_known`] first.
    pub fn version(self) -> Version {
        debug_assert!(self.is_known(), "an unknown cell has no version");
        Version(self.0 & !Cell::ABSENT)
    }

    /// Whether there is no content.
    pub fn is_absent(self) -> bool {
        self.0 & Cell::ABSENT != 0
    }

    /// Whether somebody has said what is there.
    pub fn is_known(self) -> bool {
        self != Cell::UNKNOWN
    }

    /// Whether it is known, and not older.
    pub fn holds(self, version: Version) -> bool {
        self.is_known() && self.version() >= version
    }
}

/// A group's configuration, as meta keeps it and as a holder has read it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Config {
    /// Number of the configuration.
    pub epoch: u8,
    /// `I`
    pub insync: Set,
    /// `J`
    pub joining: Set,
}

impl Config {
    /// `I ∪ J`
    pub fn all(self) -> Set {
        self.insync.or(self.joining)
    }
}

/// The metadata servers, as one atomic state machine.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Meta {
    /// The last generation that was granted.
    pub granted: u8,
    /// The group's configuration.
    pub config: Config,
    /// The generation that had proposed it.
    pub proposer: u8,
}

/// A device. All of it is durable, but for what says otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Device {
    /// The highest generation of the volume that it has seen.
    pub seal: u8,
    /// The newest configuration of the group that it was told of.
    pub epoch: u8,
    /// Whether it has a replica of the group.
    pub replica: bool,
    /// Per block what it holds.
    pub cells: [Cell; BLOCKS],
    /// Tombstones up to this version are dropped.
    pub floor: Version,
    /// Volatile: what a crash brings back of `seal`. Equal to it while rule 3 is obeyed.
    pub seal_on_disk: u8,
    /// Volatile: what a crash brings back of `cells`. Equal to them while rule 13 is obeyed.
    pub cells_on_disk: [Cell; BLOCKS],
}

/// How far a holder is.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Phase {
    /// Not started.
    #[default]
    Waiting,
    /// It has read the group map and has no generation: only without rule 2.
    MapFirst,
    /// It has a generation and no group map.
    Granted,
    /// Sealing, then reconciling.
    Attaching,
    /// Reads and writes are served.
    Serving,
    /// Drained and let go, in order.
    Released,
    /// Somebody refused it: there is a newer one.
    Fenced,
}

/// The one operation that a holder has under way on a block (rules 15 and 16: those that overlap wait).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Op {
    /// None.
    #[default]
    Idle,
    /// A write or discard.
    Write {
        /// What it writes.
        cell: Cell,
        /// Watched only: a newer attachment had completed an operation before this one was issued.
        late: bool,
    },
    /// A read that waits for members to confirm its generation.
    Read {
        /// What a member answered.
        found: Cell,
        /// Members that have confirmed since it began.
        vouched: Set,
        /// Watched only: the newest version that anybody had completed before it began.
        seen: Version,
        /// Watched only: the highest generation that had completed an operation on the block before it began.
        top: u8,
    },
}

/// A change that was proposed and whose outcome is not known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Proposal {
    /// `I′`
    pub insync: Set,
    /// `J′`
    pub joining: Set,
}

/// A start of a coordinator: its memory. Its generation is its place in [`State::holders`], counted from one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Holder {
    /// How far it is.
    pub phase: Phase,
    /// The configuration that it knows to be committed.
    pub config: Config,
    /// What it has proposed without knowing the outcome.
    pub proposed: Option<Proposal>,
    /// How often it has proposed something.
    pub proposals: u8,
    /// The attachment is complete (rule 6).
    pub complete: bool,
    /// Members that are sealed, as far as it has heard.
    pub sealed: Set,
    /// Joining members that have adopted its generation.
    pub adopted: Set,
    /// Members that it wants ejected: what they answer counts no more (rule 10).
    pub ignored: Set,
    /// What each device is known to hold durably.
    pub known: [[Cell; BLOCKS]; DEVICES],
    /// The base while reconciling; then the newest acknowledged version.
    pub newest: [Cell; BLOCKS],
    /// What is under way.
    pub ops: [Op; BLOCKS],
    /// Writes issued.
    pub issued: u8,
    /// Members whose read grant it trusts, and who keep it (rule 8).
    pub granted_by: Set,
    /// Members that have confirmed at some time: only used without rule 17.
    pub confirmed: Set,
}

impl Default for Holder {
    fn default() -> Holder {
        Holder {
            phase: Phase::Waiting,
            config: Config::default(),
            proposed: None,
            proposals: 0,
            complete: false,
            sealed: Set::NONE,
            adopted: Set::NONE,
            ignored: Set::NONE,
            known: [[Cell::UNKNOWN; BLOCKS]; DEVICES],
            newest: [Cell::EMPTY; BLOCKS],
            ops: [Op::Idle; BLOCKS],
            issued: 0,
            granted_by: Set::NONE,
            confirmed: Set::NONE,
        }
    }
}

impl Holder {
    /// It still acts.
    pub fn acts(&self) -> bool {
        matches!(self.phase, Phase::Granted | Phase::Attaching | Phase::Serving)
    }
}

/// What an onlooker who sees everything notes, to judge the promises by. No rule may look at it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Watch {
    /// Per block the newest version that was acknowledged.
    pub acknowledged: [Version; BLOCKS],
    /// Per block the newest version that was acknowledged or returned by a read.
    pub seen: [Version; BLOCKS],
    /// Per block the highest generation that has completed an operation on it.
    pub top: [u8; BLOCKS],
    /// Discards that were issued, per block one bit per version.
    pub discards: [u32; BLOCKS],
}

/// The state of the whole world.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct State {
    /// The metadata servers.
    pub meta: Meta,
    /// a, b, c and the spare d.
    pub devices: [Device; DEVICES],
    /// h1, h2, h3, in the order of their generations.
    pub holders: [Holder; HOLDERS],
    /// Messages that may arrive.
    pub net: Net,
    /// What the onlooker noted.
    pub watch: Watch,
}

impl State {
    /// The device of that number.
    pub fn device(&self, device: u8) -> &Device {
        &self.devices[device as usize]
    }

    /// The same, to change it.
    pub fn device_mut(&mut self, device: u8) -> &mut Device {
        &mut self.devices[device as usize]
    }

    /// The holder of that generation.
    pub fn holder(&self, g: u8) -> &Holder {
        &self.holders[g as usize - 1]
    }

    /// The same, to change it.
    pub fn holder_mut(&mut self, g: u8) -> &mut Holder {
        &mut self.holders[g as usize - 1]
    }

    /// One number for the state, the same for all states that differ only by the names of their devices.
    ///
    /// Whatever the state says of a device is said of one device alone: its own fields, what each holder knows of it,
    /// whether it is in this set or that, the messages to and from it. So the state is what it says without devices, and
    /// a bag of what it says of each; the bag is a sum, in which order does not count. Exact but for collisions of
    /// 64-bit numbers, and much cheaper than trying permutations.
    pub fn fingerprint(&self) -> u64 {
        let mut own: [Fingerprint; DEVICES] = std::array::from_fn(|_| Fingerprint::new());
        let mut common = Fingerprint::new();
        common.write(&[self.meta.granted, self.meta.proposer, self.meta.config.epoch]);
        for block in 0..BLOCKS {
            let watch = &self.watch;
            common.write(&[watch.acknowledged[block].0, watch.seen[block].0, watch.top[block]]);
            common.write_u64(watch.discards[block].into());
        }
        for (device, hash) in own.iter_mut().enumerate() {
            hash.write_u64(self.devices[device].word());
            let place = device as u8;
            let mut bits =
                u64::from(self.meta.config.insync.has(place)) | u64::from(self.meta.config.joining.has(place)) << 1;
            for holder in &self.holders {
                bits = bits << 10 | holder.bits_of(place);
            }
            hash.write_u64(bits);
            let known = self.holders.map(|holder| {
                u64::from(holder.known[device][0].bits()) << 8 | u64::from(holder.known[device][1].bits())
            });
            hash.write_u64(known.iter().fold(0, |word, cells| word << 16 | cells));
        }
        for holder in &self.holders {
            holder.hash_without_devices(&mut common);
        }
        for message in self.net.iter() {
            message.hash_into(&mut common, &mut own);
        }
        own.iter()
            .fold(common.finish(), |sum, hash| sum.wrapping_add(hash.finish()))
    }
}

impl Device {
    /// All of it in one number.
    fn word(&self) -> u64 {
        let bytes = [
            self.seal | self.seal_on_disk << 3 | u8::from(self.replica) << 6,
            self.epoch,
            self.cells[0].bits(),
            self.cells[1].bits(),
            self.floor.0,
            0,
            self.cells_on_disk[0].bits(),
            self.cells_on_disk[1].bits(),
        ];
        u64::from_le_bytes(bytes)
    }
}

impl Holder {
    /// Whether the device is in each of its sets.
    fn bits_of(&self, device: u8) -> u64 {
        let vouched = self.ops.map(|op| match op {
            Op::Read { vouched, .. } => vouched,
            _ => Set::NONE,
        });
        let (next, next_joining) = self.proposed.map_or((Set::NONE, Set::NONE), |p| (p.insync, p.joining));
        let sets = [
            self.config.insync,
            self.config.joining,
            next,
            next_joining,
            self.sealed.or(self.adopted),
            self.ignored,
            self.granted_by,
            self.confirmed,
            vouched[0],
            vouched[1],
        ];
        sets.iter().fold(0, |bits, set| bits << 1 | u64::from(set.has(device)))
    }

    /// Everything else.
    fn hash_without_devices(&self, hash: &mut Fingerprint) {
        if self.phase == Phase::Waiting {
            return hash.word((0, 0));
        }
        let flags = self.phase as u64 | u64::from(self.complete) << 4 | u64::from(self.proposed.is_some()) << 5;
        let counts = [self.config.epoch, self.proposals, self.issued, 0];
        hash.word((flags, u64::from(u32::from_le_bytes(counts))));
        for (newest, op) in self.newest.iter().zip(&self.ops) {
            let op = match *op {
                Op::Idle => [0; 4],
                Op::Write { cell, late } => [1, cell.bits(), u8::from(late), 0],
                Op::Read { found, seen, top, .. } => [2, found.bits(), seen.0, top],
            };
            hash.write_u64(u64::from(u32::from_le_bytes(op)) << 8 | u64::from(newest.bits()));
        }
    }
}
