//! Seals that have not been answered yet.

use std::collections::BTreeMap;

use cairn_proto::ids::VolumeId;
use cairn_proto::message::{Failed, Holder, Message, Sealed};
use cairn_proto::replica::Opening;
use cairn_proto::time::Time;

use super::{ConnId, DeviceHost, ReplicaStore, Request};

/// The seals that wait, by volume. Bounded by what connections may have in flight.
#[derive(Default)]
pub(super) struct Seals {
    volumes: BTreeMap<VolumeId, Waiting>,
    len: usize,
}

#[derive(Default)]
struct Waiting {
    requests: Vec<Request>,
    /// When the read grant that they wait for runs out.
    wake: Option<Time>,
    /// Those that the store is making durable.
    storing: Vec<Holder>,
}

impl Seals {
    /// How many wait.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// When the first read grant runs out that one waits for.
    pub(super) fn wake(&self) -> Option<Time> {
        self.volumes.values().filter_map(|waiting| waiting.wake).min()
    }

    /// The volumes whose read grant has run out.
    pub(super) fn due(&self, now: Time) -> Vec<VolumeId> {
        let due = |waiting: &Waiting| waiting.wake.is_some_and(|wake| wake <= now);
        let volumes = self.volumes.iter().filter(|(_, waiting)| due(waiting));
        volumes.map(|(volume, _)| *volume).collect()
    }

    /// Adds one.
    pub(super) fn wait(&mut self, request: Request) {
        let waiting = self.volumes.entry(request.holder.volume).or_default();
        waiting.requests.push(request);
        self.len += 1;
    }

    /// The store is about to make this seal durable. False if it is at it already.
    pub(super) fn begin_storing(&mut self, holder: Holder) -> bool {
        let storing = &mut self.volumes.entry(holder.volume).or_default().storing;
        if storing.contains(&holder) {
            return false;
        }
        storing.push(holder);
        true
    }

    /// The store has ended with this seal.
    pub(super) fn end_storing(&mut self, holder: Holder) {
        if let Some(waiting) = self.volumes.get_mut(&holder.volume) {
            waiting.storing.retain(|other| *other != holder);
        }
        self.tidy(holder.volume);
    }

    /// Takes those of one holder out.
    pub(super) fn take(&mut self, holder: Holder) -> Vec<Request> {
        let Some(waiting) = self.volumes.get_mut(&holder.volume) else {
            return Vec::new();
        };
        let (taken, rest) = waiting.requests.drain(..).partition(|r: &Request| r.holder == holder);
        waiting.requests = rest;
        self.len -= Vec::len(&taken);
        self.tidy(holder.volume);
        taken
    }

    /// The connection is gone.
    pub(super) fn forget(&mut self, conn: ConnId) {
        self.volumes.retain(|_, waiting| {
            let before = waiting.requests.len();
            waiting.requests.retain(|request| request.conn != conn);
            self.len -= before - waiting.requests.len();
            !waiting.requests.is_empty() || !waiting.storing.is_empty()
        });
    }

    /// Those that wait, in order of the generation.
    pub(super) fn holders(&self, volume: VolumeId) -> Vec<Holder> {
        let Some(waiting) = self.volumes.get(&volume) else {
            return Vec::new();
        };
        let mut holders: Vec<_> = waiting.requests.iter().map(|request| request.holder).collect();
        holders.sort_unstable();
        holders.dedup();
        holders
    }

    fn set_wake(&mut self, volume: VolumeId, wake: Option<Time>) {
        if let Some(waiting) = self.volumes.get_mut(&volume) {
            waiting.wake = wake;
        }
    }

    fn tidy(&mut self, volume: VolumeId) {
        let empty = |waiting: &Waiting| waiting.requests.is_empty() && waiting.storing.is_empty();
        if self.volumes.get(&volume).is_some_and(empty) {
            self.volumes.remove(&volume);
        }
    }
}

impl<S: ReplicaStore> DeviceHost<S> {
    /// Answers the seals of a volume that need not wait any more.
    pub(super) fn try_open(&mut self, volume: VolumeId) {
        let mut wake = None;
        for holder in self.seals.holders(volume) {
            match self.rules.open(self.now, holder) {
                Opening::Open => {
                    for request in self.seals.take(holder) {
                        self.answer(&request, Message::Sealed(Sealed { holder }));
                    }
                }
                Opening::Fenced(seen) => {
                    for request in self.seals.take(holder) {
                        self.answer(&request, Message::Failed(Failed::fenced(seen)));
                    }
                }
                Opening::Granted(until) => wake = Some(until),
                Opening::NotDurable | Opening::InFlight(_) => {}
            }
        }
        self.seals.set_wake(volume, wake);
    }
}
