//! Holders, devices and the network between them, driven by a seed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use super::checker::History;
use super::fetching::Fetching;
use super::meta::Meta;
use super::model::{Answer, Device, Held, content, write_of};
use super::random::Random;
use super::{GROUPS, VOLUME};
use crate::block::{BlockState, Content};
use crate::capability::{Capability, ClusterKey, Rights};
use crate::ids::*;
use crate::limits::BLOCK_BYTES;
use crate::message::{Damaged, Holder as Attachment, Message};
use crate::replication::*;
use crate::time::Time;
use crate::units::BlockRange;

#[derive(Default)]
pub(super) struct Link {
    up: bool,
    to_device: VecDeque<(RequestId, Message)>,
    pub(super) to_holder: VecDeque<(RequestId, Message, bool)>,
    /// Sealings that wait for a grant to run out.
    deferred: Vec<(Time, RequestId, Message)>,
}

pub(super) struct Holder {
    coordinator: Coordinator,
    pub(super) links: Vec<Link>,
    in_flight: BTreeMap<OpToken, InFlight>,
    active: bool,
    released: bool,
    generation: Generation,
    /// What it asks of meta.
    ask: Option<MetaAsk>,
}

struct InFlight {
    range: BlockRange,
    invoked: u64,
    value: Option<u64>,
}

/// What may go wrong in a run.
#[derive(Clone, Copy, Default)]
pub(super) struct Faults {
    pub(super) disconnects: bool,
    pub(super) crashes: bool,
    pub(super) takeovers: bool,
    /// Holders change often.
    pub(super) rushed: bool,
    pub(super) damage: bool,
    pub(super) forget: bool,
    pub(super) full: bool,
    /// Answers of meta are lost, and meta is away.
    pub(super) meta: bool,
    /// Devices read from each other what they lack; some can't.
    pub(super) fetch: bool,
}

pub(super) struct World {
    pub(super) random: Random,
    pub(super) now: Time,
    step: u64,
    pub(super) devices: Vec<Device>,
    pub(super) holders: Vec<Holder>,
    /// Requests of connections that are over, which may still arrive.
    strays: Vec<(usize, Message)>,
    pub(super) history: History,
    limits: ReplicationLimits,
    pub(super) faults: Faults,
    next_value: u64,
    next_op: u64,
    pub(super) meta: Meta,
    /// Requests to meta without an asker, which may still arrive.
    ghosts: Vec<(Generation, MetaAsk)>,
    /// The newest version of each block that was acknowledged.
    acked: BTreeMap<(ChunkIndex, Layer, u32), Version>,
    pub(super) results: BTreeMap<&'static str, u64>,
    pub(super) notices: Vec<Notice>,
    remembered: Option<BTreeMap<(ChunkIndex, Layer, u32), Held>>,
    remembered_commit: u64,
    /// Whether a story has damaged all copies of a block.
    pub(super) may_be_lost: bool,
    /// Messages that reached a device, by name.
    pub(super) arrived: BTreeMap<&'static str, u64>,
    /// A device that takes nothing in, and whose connections stand.
    pub(super) frozen: Option<usize>,
    /// What devices are to read from each other.
    pub(super) fetches: Vec<Fetching>,
    /// Pairs of devices of which the second can't read from the first.
    pub(super) cut: BTreeSet<(usize, usize)>,
}

impl World {
    pub(super) fn new(seed: u64, faults: Faults, limits: ReplicationLimits) -> World {
        let devices: Vec<Device> = (1..=3).map(Device::new).collect();
        World {
            random: Random::new(seed),
            now: Time::from_nanos(1),
            step: 1,
            meta: Meta::new(GROUPS, devices.iter().map(|device| device.id).collect()),
            ghosts: Vec::new(),
            acked: BTreeMap::new(),
            devices,
            holders: Vec::new(),
            strays: Vec::new(),
            history: History::default(),
            limits,
            faults,
            next_value: 1,
            next_op: 1,
            results: BTreeMap::new(),
            notices: Vec::new(),
            remembered: None,
            remembered_commit: 0,
            may_be_lost: false,
            arrived: BTreeMap::new(),
            frozen: None,
            fetches: Vec::new(),
            cut: BTreeSet::new(),
        }
    }

    /// A new attachment, beside those that are there.
    pub(super) fn attach(&mut self) -> usize {
        let generation = self.meta.grant();
        let key = ClusterKey([1; 32]);
        let capability = Capability::grant(&key, ClusterId([2; 16]), VOLUME, generation, Rights::Write);
        let settings = VolumeSettings {
            id: VOLUME,
            groups: GroupCount::new(GROUPS).unwrap(),
            replicas: 3,
            write_quorum: 2,
            min_copies: 2,
            layer: Layer(0),
        };
        let configs = self.meta.configs.clone();
        let grant = Grant { generation, capability };
        self.holders.push(Holder {
            coordinator: Coordinator::new(settings, grant, configs, self.limits).unwrap(),
            links: self.devices.iter().map(|_| Link::default()).collect(),
            in_flight: BTreeMap::new(),
            active: true,
            released: false,
            generation,
            ask: None,
        });
        self.holders.len() - 1
    }

    pub(super) fn status(&self, h: usize) -> Vec<GroupStatus> {
        self.holders[h].coordinator.status()
    }

    pub(super) fn is_idle(&self, h: usize) -> bool {
        self.holders[h].in_flight.is_empty()
    }

    fn tell(&mut self, h: usize, event: Event) {
        let now = self.now;
        self.holders[h].coordinator.handle(now, event);
        self.drain(h);
    }

    fn drain(&mut self, h: usize) {
        while let Some(action) = self.holders[h].coordinator.poll_action() {
            match action {
                Action::Send {
                    to, request, message, ..
                } => {
                    for device in to {
                        let d = self.devices.iter().position(|other| other.id == device).unwrap();
                        let link = &mut self.holders[h].links[d];
                        assert!(link.up, "sent to a device that is not connected");
                        link.to_device.push_back((request, message.clone()));
                    }
                }
                Action::Done { op, result } => self.done(h, op, result),
                Action::Notice(notice) => self.notices.push(notice),
                Action::Released => self.holders[h].released = true,
                Action::Meta(ask) => assert!(self.holders[h].ask.replace(ask).is_none(), "one question at a time"),
                Action::Devices | Action::Copying => {}
            }
        }
    }

    fn done(&mut self, h: usize, op: OpToken, result: Result<Outcome, OpError>) {
        let op = self.holders[h].in_flight.remove(&op).expect("an operation ends once");
        let blocks = (0..op.range.count()).map(|i| op.range.volume_block(i));
        if result.is_ok() {
            let group = GroupCount::new(GROUPS).unwrap().group_of(op.range.chunk());
            self.history.completed(group.0, h, self.step);
        }
        if let (Ok(Outcome::Written), Some(value)) = (&result, op.value) {
            self.acknowledged(h, op.range, value);
        }
        let name = match (&result, op.value) {
            (Ok(Outcome::Written), Some(value)) => {
                blocks.for_each(|block| self.history.write_done(block, value, self.step));
                "written"
            }
            (Ok(Outcome::Read(read)), None) => {
                let mut data = read.bytes.iter();
                for (block, state) in blocks.zip(&read.blocks) {
                    let value = match state.content {
                        Content::Absent => 0,
                        Content::Data(_) => {
                            let bytes = data.next().expect("bytes for each block of data");
                            assert_eq!(bytes.len(), BLOCK_BYTES);
                            let value = u64::from_le_bytes(bytes[..8].try_into().unwrap());
                            assert_eq!(*bytes, content(value, 1), "a block is whole");
                            value
                        }
                        other => panic!("read {other:?}"),
                    };
                    self.history.read(block, value, op.invoked, self.step);
                }
                "read"
            }
            (Ok(Outcome::Written), None) => "discarded",
            (Ok(Outcome::Status(runs)), None) => {
                assert_eq!(runs.iter().map(|(count, _)| count).sum::<u32>(), op.range.count());
                "status"
            }
            (Err(OpError::Fenced), _) => "fenced",
            (Err(OpError::NoSpace), Some(value)) => {
                self.history.write_undone(value);
                "no space"
            }
            // Only device 0 rots, so what is damaged on all who are in sync was never acknowledged, nor read.
            (Err(OpError::Damaged), None) if self.faults.damage && self.is_rotten(op.range) => "damaged",
            (Err(OpError::Damaged), None) if self.may_be_lost => "damaged",
            (result, value) => panic!("{value:?} ended as {result:?}"),
        };
        *self.results.entry(name).or_default() += 1;
        self.step += 1;
    }

    /// What is acknowledged is durable on a quorum of those in sync, and stays so with each change of who that is.
    fn acknowledged(&mut self, h: usize, range: BlockRange, value: u64) {
        if h + 1 < self.holders.len() || self.faults.forget || self.faults.damage {
            return;
        }
        for block in range.start()..range.end() {
            let key = (range.chunk(), Layer(0), block);
            let held = self.devices.iter().filter_map(|device| device.blocks.get(&key));
            let of_write = held.filter(|held| held.bytes.len() == BLOCK_BYTES && held.bytes == content(value, 1));
            let version = of_write.map(|held| held.state.version).max();
            self.acked.insert(key, version.expect("it is somewhere"));
        }
        self.check_durable();
    }

    fn check_durable(&self) {
        for (key, version) in &self.acked {
            let group = GroupCount::new(GROUPS).unwrap().group_of(key.0);
            let in_sync = &self.meta.configs[usize::from(group.0)].in_sync;
            let has = |device: &&Device| {
                device
                    .blocks
                    .get(key)
                    .is_some_and(|held| held.state.version >= *version)
            };
            let members = self.devices.iter().filter(|device| in_sync.contains(&device.id));
            let has = members.filter(has).count();
            assert!(
                has >= 2,
                "{key:?} was acknowledged as {version}, and {has} members in sync have it"
            );
        }
    }

    /// Whether a block of the range is damaged on device 0 of which nobody was ever told.
    fn is_rotten(&self, range: BlockRange) -> bool {
        (0..range.count()).any(|i| {
            let key = (range.chunk(), Layer(0), range.start() + i);
            let held = self.devices[0].blocks.get(&key);
            let held = held.filter(|held| held.state.content == Content::Damaged);
            let value = held.map(|held| u64::from_le_bytes(held.bytes[..8].try_into().unwrap()));
            value.is_some_and(|value| !self.history.is_known(range.volume_block(i), value))
        })
    }

    pub(super) fn submit(&mut self, h: usize, range: BlockRange, write: bool) -> bool {
        let overlaps = |op: &InFlight| op.range.overlaps(&range) && (write || op.value.is_some());
        if self.holders[h].released || self.holders[h].in_flight.values().any(overlaps) {
            return false;
        }
        let op = OpToken(self.next_op);
        self.next_op += 1;
        self.step += 1;
        let value = write.then(|| {
            self.next_value += 1;
            self.next_value
        });
        let operation = match value {
            Some(value) => {
                for i in 0..range.count() {
                    self.history.invoke_write(range.volume_block(i), value, h, self.step);
                }
                write_of(VOLUME, range, value)
            }
            None if self.random.one_in(8) => Operation::Status { range },
            None => Operation::Read { range },
        };
        let invoked = self.step;
        self.holders[h].in_flight.insert(op, InFlight { range, invoked, value });
        self.step += 1;
        self.tell(h, Event::Submit { op, operation });
        true
    }

    /// A discard that the history knows nothing of.
    pub(super) fn discard(&mut self, h: usize, range: BlockRange) {
        let op = OpToken(self.next_op);
        self.next_op += 1;
        let (invoked, value) = (self.step, None);
        self.holders[h].in_flight.insert(op, InFlight { range, invoked, value });
        let operation = Operation::Discard { range };
        self.tell(h, Event::Submit { op, operation });
    }

    pub(super) fn connect(&mut self, h: usize, d: usize) {
        let link = &mut self.holders[h].links[d];
        if link.up {
            return;
        }
        if !self.devices[d].alive {
            let device = self.devices[d].id;
            return self.tell(h, Event::Unreachable { device });
        }
        link.up = true;
        let device = &self.devices[d];
        let device = device.id;
        let event = Event::Connected {
            device,
            commit: CommitSeq(self.devices[d].commit),
            recovered: CommitSeq(self.devices[d].recovered),
        };
        self.tell(h, event);
        let event = Event::Located {
            device,
            address: format!("device-{d}:1"),
            can_fetch: self.faults.fetch,
        };
        self.tell(h, event);
    }

    pub(super) fn disconnect(&mut self, h: usize, d: usize) {
        let link = std::mem::take(&mut self.holders[h].links[d]);
        if !link.up {
            return;
        }
        for (_, message) in link.to_device {
            if self.random.one_in(2) {
                self.strays.push((d, message));
            }
        }
        let mine = |fetching: &Fetching| (fetching.h, fetching.d) == (h, d);
        let (over, rest) = std::mem::take(&mut self.fetches).into_iter().partition(mine);
        self.fetches = rest;
        // The device may hear of the end only when it is written.
        let late = over.into_iter().filter_map(|fetching: Fetching| fetching.copy);
        self.strays.extend(late.map(|copy| (d, Message::Copy(copy))));
        let device = self.devices[d].id;
        self.tell(h, Event::Disconnected { device });
    }

    /// Takes the answers of a device that are on their way to a holder, to let them arrive later.
    pub(super) fn hold_answers(&mut self, h: usize, d: usize) -> VecDeque<(RequestId, Message, bool)> {
        std::mem::take(&mut self.holders[h].links[d].to_holder)
    }

    /// Lets answers arrive that were held, whatever has come before them.
    pub(super) fn give_answers(&mut self, h: usize, d: usize, answers: VecDeque<(RequestId, Message, bool)>) {
        let later = std::mem::replace(&mut self.holders[h].links[d].to_holder, answers);
        while self.deliver(h, d, false) {}
        self.holders[h].links[d].to_holder = later;
    }

    /// Lets one message arrive at a device.
    pub(super) fn deliver_to(&mut self, h: usize, d: usize) -> bool {
        self.deliver(h, d, true)
    }

    /// Lets one message of a device arrive at a holder.
    pub(super) fn deliver_back(&mut self, h: usize, d: usize) -> bool {
        self.deliver(h, d, false)
    }

    pub(super) fn crash(&mut self, d: usize) {
        self.devices[d].alive = false;
        for h in 0..self.holders.len() {
            self.disconnect(h, d);
        }
    }

    pub(super) fn restart(&mut self, d: usize) {
        let now = self.now;
        if self.devices[d].alive {
            return;
        }
        if self.faults.forget && d == 0 {
            if let Some(blocks) = self.remembered.take() {
                self.devices[d].blocks = blocks;
                self.devices[d].commit = self.remembered_commit;
            } else {
                self.remembered = Some(self.devices[d].blocks.clone());
                self.remembered_commit = self.devices[d].commit;
            }
        }
        self.devices[d].restart(now);
    }

    /// An empty device takes the place of one that was ejected, and holders are told to look.
    pub(super) fn replace(&mut self, d: usize) {
        self.crash(d);
        self.strays.retain(|(to, _)| *to != d);
        let former = self.devices[d].id;
        let mut spare = Device::new(former.uuid.0[0]);
        spare.id.incarnation = Incarnation(former.incarnation.0 + 1);
        for config in &mut self.meta.configs {
            let place = config.stale.iter().position(|device| *device == former);
            config.stale[place.expect("only who was ejected is replaced")] = spare.id;
            config.epoch.0 += 1;
        }
        self.devices[d] = spare;
        for h in 0..self.holders.len() {
            self.tell(h, Event::Look);
        }
    }

    /// A holder dies, without a word to anybody.
    pub(super) fn abandon(&mut self, h: usize) {
        self.holders[h].active = false;
        (0..self.devices.len()).for_each(|d| self.disconnect(h, d));
    }

    /// Sets the pace of a holder's copies.
    pub(super) fn pace(&mut self, h: usize, pace: Pace) {
        self.tell(h, Event::Pace(pace));
    }

    /// Lets the first message of one direction of one link arrive.
    fn deliver(&mut self, h: usize, d: usize, to_device: bool) -> bool {
        let now = self.now;
        if to_device && self.frozen == Some(d) {
            return false;
        }
        let link = &mut self.holders[h].links[d];
        if !to_device {
            let Some((request, message, grant)) = link.to_holder.pop_front() else {
                return false;
            };
            let device = self.devices[d].id;
            if let Message::Damaged(told) = message {
                let (group, runs) = (told.group, told.runs);
                self.tell(h, Event::Damaged { device, group, runs });
                return true;
            }
            self.tell(
                h,
                Event::Answer {
                    device,
                    request,
                    grant,
                    message,
                },
            );
            return true;
        }
        let Some((request, message)) = link.to_device.pop_front() else {
            return false;
        };
        *self.arrived.entry(message.name()).or_default() += 1;
        if let Message::Fetch(fetch) = message {
            self.fetches.push(Fetching {
                h,
                d,
                request,
                fetch,
                since: now,
                copy: None,
            });
            return true;
        }
        match self.devices[d].handle(now, &message) {
            Answer::Now(answer, grant) => link.to_holder.push_back((request, answer, grant)),
            Answer::At(at, answer) => link.deferred.push((at, request, answer)),
        }
        true
    }

    /// Lets meta see what a holder asks. With faults it may be done or not, and the answer may be lost.
    pub(super) fn deliver_meta(&mut self, h: usize) -> bool {
        let Some(ask) = self.holders[h].ask.take() else {
            return false;
        };
        let generation = self.holders[h].generation;
        let told = match if self.faults.meta { self.random.below(8) } else { 7 } {
            _ if self.meta.down => MetaTold::Unreachable,
            0 => MetaTold::Unreachable,
            1 => {
                self.meta.answer(generation, &ask);
                MetaTold::Unreachable
            }
            2 => {
                self.ghosts.push((generation, ask));
                MetaTold::Unreachable
            }
            _ => self.meta.answer(generation, &ask),
        };
        self.check_durable();
        self.tell(h, Event::Meta(told));
        true
    }

    pub(super) fn deliver_any(&mut self) -> bool {
        if self.random.one_in(8) && (0..self.holders.len()).any(|h| self.deliver_meta(h)) {
            return true;
        }
        if !self.fetches.is_empty() && self.random.one_in(4) && self.fetch_any() {
            return true;
        }
        let links = self.holders.len() * self.devices.len() * 2;
        if links == 0 {
            return false;
        }
        let start = self.random.below(links as u64) as usize;
        (0..links).any(|i| {
            let i = (start + i) % links;
            let (h, d) = (i / 2 / self.devices.len(), i / 2 % self.devices.len());
            self.deliver(h, d, i.is_multiple_of(2))
        }) || self.fetch_any()
            || (0..self.holders.len()).any(|h| self.deliver_meta(h))
    }

    fn release_deferred(&mut self) {
        let now = self.now;
        for holder in &mut self.holders {
            for link in &mut holder.links {
                let (due, later): (Vec<_>, Vec<_>) = link.deferred.drain(..).partition(|(at, ..)| *at <= now);
                link.deferred = later;
                link.to_holder
                    .extend(due.into_iter().map(|(_, request, answer)| (request, answer, true)));
            }
        }
    }

    pub(super) fn pass(&mut self, span: Duration) {
        self.now += span;
        self.release_deferred();
        for h in 0..self.holders.len() {
            if self.holders[h]
                .coordinator
                .poll_timeout()
                .is_some_and(|at| at <= self.now)
            {
                self.holders[h].coordinator.handle_timeout(self.now);
                self.drain(h);
            }
        }
    }

    fn any_range(&mut self) -> BlockRange {
        let chunk = ChunkIndex(self.random.below(3) as u32);
        let start = self.random.below(5) as u32;
        BlockRange::new(chunk, start, 1 + self.random.below(3) as u32).unwrap()
    }

    /// One step of a run under faults.
    pub(super) fn fault_step(&mut self) {
        let faults = self.faults;
        let h = self.random.below(self.holders.len() as u64) as usize;
        let d = self.random.below(self.devices.len() as u64) as usize;
        match self.random.below(200) {
            0..120 => {
                self.deliver_any();
            }
            120..165 => {
                // The last two holders have guests; older ones are zombies that went quiet.
                let h = self.holders.len() - 1 - usize::from(self.holders.len() > 1 && self.random.one_in(4));
                let (range, write) = (self.any_range(), !self.random.one_in(3));
                self.submit(h, range, write);
            }
            165..180 => self.connect(h, d),
            180..184 => {
                let span = Duration::from_millis(1 + self.random.below(400));
                self.pass(span);
            }
            184..187 if faults.disconnects => self.disconnect(h, d),
            187 if faults.crashes && self.random.one_in(2) => self.crash(d),
            188..190 => self.restart(d),
            190 if faults.takeovers && (faults.rushed || self.random.one_in(4)) => {
                self.attach();
            }
            191 if !self.strays.is_empty() => {
                let i = self.random.below(self.strays.len() as u64) as usize;
                let (d, message) = self.strays.swap_remove(i);
                let message = match message {
                    Message::Fetch(fetch) => self.read_for(d, &fetch).map(Message::Copy),
                    message => Ok(message),
                };
                if let Ok(message) = message
                    && self.devices[d].alive
                {
                    let _lost = self.devices[d].handle(self.now, &message);
                }
            }
            191 if !self.ghosts.is_empty() => {
                let i = self.random.below(self.ghosts.len() as u64) as usize;
                let (generation, ask) = self.ghosts.swap_remove(i);
                self.meta.answer(generation, &ask);
            }
            199 if faults.fetch && faults.disconnects && d != 0 => {
                let (from, to) = (d, self.random.below(self.devices.len() as u64) as usize);
                if !self.cut.remove(&(from, to)) {
                    self.cut.insert((from, to));
                }
            }
            194 if faults.meta => self.meta.down = !self.meta.down,
            195..197 => self.pass(Duration::from_millis(300)),
            192 if faults.full => self.devices[d].full = !self.devices[d].full,
            193 if faults.damage => self.damage(),
            194 if faults.damage => self.tell_damage(h, 0),
            _ => self.pass(Duration::from_micros(100)),
        }
    }

    /// Damages a block of device 0: the others never lose anything.
    fn damage(&mut self) {
        let data = self.devices[0].blocks.iter();
        let data = data.filter(|(_, held)| matches!(held.state.content, Content::Data(_)));
        let keys: Vec<_> = data.map(|(key, _)| *key).collect();
        if keys.is_empty() {
            return;
        }
        let key = keys[self.random.below(keys.len() as u64) as usize];
        let was = &self.devices[0].blocks[&key];
        let held = Held {
            state: BlockState {
                content: Content::Damaged,
                version: was.state.version,
            },
            // For the checker alone.
            bytes: was.bytes.clone(),
        };
        self.devices[0].blocks.insert(key, held);
    }

    /// Lets a device say what it can't read; it arrives after what is on its way.
    pub(super) fn tell_damage(&mut self, h: usize, d: usize) {
        let (volume, generation) = (VOLUME, self.holders[h].generation);
        let holder = Attachment { volume, generation };
        if !self.holders[h].links[d].up || self.devices[d].seal != generation {
            return;
        }
        for group in (0..GROUPS).map(GroupIndex) {
            let runs = self.devices[d].damage(group);
            if !runs.is_empty() {
                let told = Message::Damaged(Damaged { holder, group, runs });
                self.holders[h].links[d]
                    .to_holder
                    .push_back((RequestId(0), told, false));
            }
        }
    }

    /// Damages one block of a device.
    pub(super) fn rot(&mut self, d: usize, block: u32) {
        let key = (ChunkIndex(0), Layer(0), block);
        let held = self.devices[d].blocks.get_mut(&key).expect("it was written");
        held.state.content = Content::Damaged;
    }

    /// Ends all faults and lets the last holder come to rest. Everything it was asked must end, and all of its members
    /// must become complete.
    pub(super) fn heal(&mut self) {
        let last = self.holders.len() - 1;
        (self.meta.down, self.faults.meta) = (false, false);
        self.cut.clear();
        for d in 0..self.devices.len() {
            self.devices[d].full = false;
            self.restart(d);
        }
        for round in 0..2_000 {
            for d in 0..self.devices.len() {
                // Superseded holders too: whatever they were asked must end.
                (0..=last).for_each(|h| self.connect(h, d));
            }
            while self.deliver_any() {}
            if round > 0 {
                (0..self.devices.len()).for_each(|d| self.tell_damage(last, d));
                while self.deliver_any() {}
            }
            if round > 0 && self.is_complete(last) && (0..=last).all(|h| self.is_idle(h)) {
                return;
            }
            assert!(round < 1_999, "no rest at {last}: {}", self.describe(last));
            self.pass(Duration::from_millis(100));
        }
    }

    fn describe(&self, h: usize) -> String {
        let mut words = String::new();
        for group in self.status(h) {
            words += &format!(
                "\n{} {:?} w{} r{} q{}",
                group.group, group.phase, group.writes, group.reads, group.queued
            );
            for member in group.members {
                let (joined, complete) = (member.joined, member.complete);
                words += &format!(
                    "\n  {:?} joined {joined} complete {complete} lacks {} awaits {}",
                    member.role, member.lacking_blocks, member.outstanding
                );
            }
        }
        words
    }

    pub(super) fn is_complete(&self, h: usize) -> bool {
        self.status(h)
            .iter()
            .all(|group| group.members.iter().all(is_complete) && !group.changing)
    }

    /// Reads everything, and compares the devices byte for byte.
    pub(super) fn check_convergence(&mut self) {
        let last = self.holders.len() - 1;
        for chunk in 0..3 {
            for block in 0..8 {
                let range = BlockRange::new(ChunkIndex(chunk), block, 1).unwrap();
                assert!(self.submit(last, range, false));
                while !self.is_idle(last) {
                    if !self.deliver_any() {
                        self.pass(Duration::from_millis(50));
                    }
                }
            }
        }
        let all: BTreeSet<_> = self
            .devices
            .iter()
            .flat_map(|device| device.blocks.keys().copied())
            .collect();
        for key in all {
            let held: Vec<_> = self.devices.iter().map(|device| device.blocks.get(&key)).collect();
            let good = |held: &&Held| held.state.content != Content::Damaged;
            let newest = |held: Vec<&Held>| held.iter().map(|held| held.state.version).max();
            let damaged = held.iter().flatten().copied().filter(|held| !good(held)).collect();
            if newest(damaged) > newest(held.iter().flatten().copied().filter(good).collect()) {
                // Nobody has it any more.
                continue;
            }
            assert!(held.iter().flatten().all(good), "{key:?} is still damaged");
            let mut states = held
                .iter()
                .flatten()
                .filter(|held| good(held))
                .map(|held| (held.state, &held.bytes));
            let first = states.next();
            assert!(states.all(|state| Some(state) == first), "{key:?} differs");
            let missing: Vec<usize> = (0..held.len()).filter(|d| held[*d].is_none()).collect();
            assert!(missing.is_empty(), "{key:?} is missing on {missing:?}");
        }
    }

    pub(super) fn release(&mut self, h: usize) -> bool {
        self.holders[h].active = false;
        self.tell(h, Event::Release);
        for _ in 0..100 {
            while self.deliver_any() {}
            self.pass(Duration::from_millis(10));
        }
        self.holders[h].released
    }

    pub(super) fn run_until(&mut self, what: &str, mut done: impl FnMut(&World) -> bool) {
        for _ in 0..10_000 {
            if done(self) {
                return;
            }
            if !self.deliver_any() {
                self.pass(Duration::from_millis(20));
            }
        }
        panic!("never happened: {what}; {:#?}", self.status(self.holders.len() - 1));
    }
}

fn is_complete(member: &MemberStatus) -> bool {
    member.complete && member.role == MemberRole::InSync
}
