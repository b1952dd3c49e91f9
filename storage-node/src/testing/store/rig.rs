//! A store on a device in memory, driven one operation at a time.

use std::collections::BTreeMap;
use std::time::Duration;

use cairn_proto::disk::{DiskGeometry, DiskOp, DiskToken};
use cairn_proto::time::Time;

use super::content::params;
use crate::store::api::{StoreAction, StoreReply, StoreRequest, Ticket};
use crate::store::{OpenExpectation, Store, StoreLimits, StoreState};
use crate::testing::{Fault, MemoryDevice, Prng};

/// A store, its device, and what it has answered.
#[derive(Debug)]
pub struct Rig {
    /// The device.
    pub device: MemoryDevice,
    /// The store.
    pub store: Store,
    /// The store's time.
    pub now: Time,
    /// Chooses which operation completes next.
    pub prng: Prng,
    /// Answers by ticket, until they are taken.
    pub replies: BTreeMap<u64, StoreReply>,
    /// Tickets in the order in which they were answered.
    answered: Vec<u64>,
    /// The last ticket that was used.
    pub next_ticket: u64,
    /// Operations completed since it was made.
    pub completed: u64,
    moments: Option<Moments>,
}

/// A moment at which power may be cut.
#[derive(Clone, Debug)]
pub struct Moment {
    /// The device as it is then.
    pub device: MemoryDevice,
    /// The highest commit acknowledged by then.
    pub acknowledged: u64,
    /// Whether the store had said that it is open.
    pub is_open: bool,
}

#[derive(Debug, Default)]
struct Moments {
    seen: Vec<Moment>,
    acknowledged: u64,
    last: Option<(u64, u64, bool)>,
}

/// A device that was just formatted.
pub fn formatted(geometry: DiskGeometry) -> MemoryDevice {
    let mut device = MemoryDevice::new(geometry);
    let mut formatter = Store::format(params(), geometry).expect("the device is long enough");
    loop {
        while let Some(op) = formatter.poll_op() {
            device.submit(op);
        }
        let Some(token) = device.in_flight().map(token).next() else {
            break;
        };
        let done = device.complete(token);
        formatter.handle_disk(done);
    }
    formatter
        .result()
        .expect("nothing is in flight")
        .expect("nothing failed");
    device
}

/// The token of an operation.
pub fn token(op: &DiskOp) -> DiskToken {
    let (DiskOp::Read { token, .. } | DiskOp::Write { token, .. } | DiskOp::Flush { token }) = op;
    *token
}

impl Rig {
    /// An open store on a fresh device with a volatile cache.
    pub fn new(blocks: u64, limits: StoreLimits, seed: u64) -> Rig {
        Rig::on(blocks, true, limits, seed)
    }

    /// An open store on a fresh device.
    pub fn on(blocks: u64, volatile_cache: bool, limits: StoreLimits, seed: u64) -> Rig {
        let geometry = DiskGeometry { blocks, volatile_cache };
        let mut rig = Rig::opening(formatted(geometry), limits, seed);
        rig.settle();
        assert_eq!(rig.store.state(), StoreState::Open);
        rig
    }

    /// A store that begins to open a device.
    pub fn opening(device: MemoryDevice, limits: StoreLimits, seed: u64) -> Rig {
        Rig::begin(device, limits, seed, None)
    }

    /// The same; every moment from now on is kept until it is taken with [`Rig::take_moments`].
    pub fn opening_watched(device: MemoryDevice, limits: StoreLimits, seed: u64) -> Rig {
        Rig::begin(device, limits, seed, Some(Moments::default()))
    }

    fn begin(device: MemoryDevice, limits: StoreLimits, seed: u64, moments: Option<Moments>) -> Rig {
        let geometry = device.geometry();
        let mut rig = Rig {
            device,
            store: Store::open(OpenExpectation::default(), geometry, limits, Time::ZERO),
            now: Time::ZERO,
            prng: Prng::new(seed),
            replies: BTreeMap::new(),
            answered: Vec::new(),
            next_ticket: 0,
            completed: 0,
            moments,
        };
        rig.take_actions();
        rig
    }

    /// Opens the device anew, after a power cut or not.
    pub fn reopen(mut self, power_cut: bool) -> Rig {
        if power_cut {
            self.device.power_cut(&mut self.prng);
        } else {
            self.device.process_killed(&mut self.prng);
        }
        let seed = self.prng.below(u64::MAX);
        let acknowledged = self.moments.as_ref().map_or(0, |moments| moments.acknowledged);
        let moments = self.moments.map(|_| Moments {
            acknowledged,
            ..Moments::default()
        });
        Rig::begin(self.device, self.store.limits().clone(), seed, moments)
    }

    /// Hands the store a request; returns its ticket.
    pub fn submit(&mut self, request: StoreRequest) -> u64 {
        self.next_ticket += 1;
        self.store.submit(self.now, Ticket(self.next_ticket), request);
        self.take_actions();
        self.next_ticket
    }

    /// Does what the store wants done.
    pub fn take_actions(&mut self) {
        while let Some(action) = self.store.poll_action() {
            match action {
                StoreAction::Disk(op) => self.device.submit(op),
                StoreAction::Reply(ticket, reply) => {
                    if let (Some(moments), StoreReply::Durable { commit, .. }) = (&mut self.moments, &reply) {
                        moments.acknowledged = moments.acknowledged.max(commit.0);
                    }
                    self.answered.push(ticket.0);
                    let other = self.replies.insert(ticket.0, reply);
                    assert!(other.is_none(), "{ticket:?} was answered twice");
                }
            }
            self.note_moment();
        }
    }

    /// Keeps this moment, unless the last one is the same to whoever looks at the device after a power cut.
    fn note_moment(&mut self) {
        let Some(moments) = &mut self.moments else { return };
        let is_open = self.store.state() == StoreState::Open;
        let now = (self.device.changes(), moments.acknowledged, is_open);
        if moments.last.replace(now) != Some(now) {
            moments.seen.push(Moment {
                device: self.device.clone(),
                acknowledged: moments.acknowledged,
                is_open,
            });
        }
    }

    /// The moments since they were last taken.
    pub fn take_moments(&mut self) -> Vec<Moment> {
        self.moments
            .as_mut()
            .map_or_else(Vec::new, |moments| std::mem::take(&mut moments.seen))
    }

    /// The answers that were not taken yet, in the order in which they came.
    pub fn take_replies(&mut self) -> Vec<(u64, StoreReply)> {
        let answered = std::mem::take(&mut self.answered);
        let replies = answered
            .into_iter()
            .filter_map(|ticket| Some((ticket, self.replies.remove(&ticket)?)));
        replies.collect()
    }

    /// Completes one operation in flight, any of them; false if there is none.
    pub fn step(&mut self) -> bool {
        self.step_with(|_| None)
    }

    /// The same; some operations fail.
    pub fn step_with(&mut self, fault: impl Fn(&DiskOp) -> Option<Fault>) -> bool {
        self.step_among(|_| true, fault)
    }

    /// The same, of those operations that may complete now.
    pub fn step_among(&mut self, may: impl Fn(&DiskOp) -> bool, fault: impl Fn(&DiskOp) -> Option<Fault>) -> bool {
        self.wait_while_opening();
        let count = self.device.in_flight().filter(|op| may(op)).count() as u64;
        if count == 0 {
            return false;
        }
        let chosen = self.prng.below(count) as usize;
        let op = self
            .device
            .in_flight()
            .filter(|op| may(op))
            .nth(chosen)
            .expect("counted above")
            .clone();
        let token = token(&op);
        let done = match fault(&op) {
            None => self.device.complete(token),
            Some(fault) => self.device.complete_with(token, fault, &mut self.prng),
        };
        self.note_moment();
        self.completed += 1;
        self.now += Duration::from_micros(50);
        self.store.handle_disk(self.now, done);
        self.take_actions();
        true
    }

    /// A store that is being opened may wait before it reads something again.
    fn wait_while_opening(&mut self) {
        let waits = matches!(self.store.state(), StoreState::Opening(_)) && self.device.in_flight().next().is_none();
        if let Some(at) = self.store.poll_timeout().filter(|_| waits) {
            self.now = self.now.max(at);
            self.store.handle_timeout(self.now);
            self.take_actions();
        }
    }

    /// Completes all operations, and those that follow.
    pub fn settle(&mut self) {
        while self.step() {}
    }

    /// Lets the store's timer run out.
    pub fn pass_time(&mut self) {
        if let Some(at) = self.store.poll_timeout() {
            self.now = self.now.max(at);
            self.store.handle_timeout(self.now);
            self.take_actions();
        }
        self.settle();
    }

    /// Hands the store a request and takes its answer.
    pub fn call(&mut self, request: StoreRequest) -> StoreReply {
        let ticket = self.submit(request);
        self.settle();
        self.replies.remove(&ticket).expect("an idle store has answered")
    }
}
