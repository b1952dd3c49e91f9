//! Fetches: what a holder wants copied to this device is read from another one, from node to node, and then written as any
//! copy is. DESIGN.md, "Fetches".
//!
//! The answers of other devices are no more than content here: that it applies is looked at when it is about to be
//! written, as for a copy that the holder has sent itself.

use std::collections::{BTreeMap, VecDeque};

use cairn_proto::frame::Class;
use cairn_proto::ids::{ClientId, CommitSeq, Correlation, DeviceId, GroupId, VolumeId};
use cairn_proto::message::{
    Envelope, Failed, FailureKind, Fetch, Hello, Holder, Message, PeerLimits, Purpose, Read, ReadAnswer, features,
};
use cairn_proto::time::Time;

use super::api::PeerId;
use super::{ConnId, DeviceHost, HostAction, ReplicaStore, Request};

/// What is known of the connections to other devices, and of what is read on them.
#[derive(Default)]
pub(super) struct Fetches {
    peers: BTreeMap<PeerId, Peer>,
    next_peer: u64,
    next_correlation: u64,
    /// Fetches without an answer to their holder that are not written yet.
    len: usize,
    /// Bytes of ranges that were asked for and are not here yet.
    reading: u64,
    /// Bytes that came, since the start.
    fetched: u64,
}

/// What a connection is to. Holders share none: each proves its own right, with the hello.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Key {
    device: DeviceId,
    /// Which run of its process.
    recovered: CommitSeq,
    holder: Holder,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// Until then it must stand and be greeted.
    Connecting {
        until: Time,
    },
    Up,
}

/// A connection to another device.
struct Peer {
    key: Key,
    stage: Stage,
    /// Fetches that have not been asked for.
    waiting: VecDeque<Pending>,
    /// What was asked for.
    sent: BTreeMap<Correlation, Sent>,
    /// Since when nothing is to be done.
    idle_since: Time,
}

/// A fetch of a holder.
struct Pending {
    request: Request,
    fetch: Fetch,
    /// By then it must be here.
    deadline: Time,
}

/// A read on its way.
struct Sent {
    /// `None` when nobody wants it any more.
    pending: Option<Pending>,
    bytes: u64,
    deadline: Time,
}

impl Peer {
    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.sent.is_empty()
    }

    /// When something is due. Asked for at each turn of the device's thread: only who came first is looked at, since all may
    /// take the same time.
    fn due(&self, idle: std::time::Duration) -> Time {
        let waiting = self.waiting.front().map(|pending| pending.deadline);
        let sent = self.sent.values().next().map(|sent| sent.deadline);
        let first = waiting.into_iter().chain(sent).min();
        let stage = match self.stage {
            Stage::Connecting { until } => Some(until),
            Stage::Up if self.is_idle() => Some(self.idle_since + idle),
            Stage::Up => None,
        };
        first.into_iter().chain(stage).min().unwrap_or(Time::MAX)
    }
}

impl Fetches {
    /// Fetches that wait for other devices.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Connections to other devices.
    pub(super) fn peers(&self) -> usize {
        self.peers.len()
    }

    /// Bytes that came from other devices.
    pub(super) fn fetched(&self) -> u64 {
        self.fetched
    }

    /// Bytes that were asked of other devices and are not here yet.
    pub(super) fn reading(&self) -> u64 {
        self.reading
    }

    /// Takes out the fetches that match.
    fn take(&mut self, matches: impl Fn(&Request, &Fetch) -> bool) -> Vec<Pending> {
        let mut taken = Vec::new();
        for peer in self.peers.values_mut() {
            for pending in std::mem::take(&mut peer.waiting) {
                if matches(&pending.request, &pending.fetch) {
                    taken.push(pending);
                } else {
                    peer.waiting.push_back(pending);
                }
            }
            let wanted = |pending: &mut Pending| matches(&pending.request, &pending.fetch);
            let sent = peer.sent.values_mut();
            taken.extend(sent.filter_map(|sent| sent.pending.take_if(wanted)));
        }
        self.len -= taken.len();
        taken
    }

    /// Takes a connection out, with what waited for it.
    fn remove(&mut self, id: PeerId) -> Vec<Pending> {
        let Some(peer) = self.peers.remove(&id) else {
            return Vec::new();
        };
        self.reading -= peer.sent.values().map(|sent| sent.bytes).sum::<u64>();
        let sent = peer.sent.into_values().filter_map(|sent| sent.pending);
        let lost: Vec<Pending> = sent.chain(peer.waiting).collect();
        self.len -= lost.len();
        lost
    }
}

impl<S: ReplicaStore> DeviceHost<S> {
    /// A holder wants blocks of another device here.
    pub(super) fn fetch(&mut self, request: &Request, fetch: Fetch) {
        if let Err(failed) = self.authorize_change(request) {
            return self.answer(request, Message::Failed(failed));
        }
        let (capability, holder) = (&fetch.capability, fetch.holder);
        let is_its_own = (capability.volume, capability.generation) == (holder.volume, holder.generation);
        if !is_its_own || !capability.is_valid(&self.config.cluster_key, self.config.cluster) {
            let words = "the capability that a fetch is to show is not its holder's";
            return self.fail(request, FailureKind::Unauthorized, words);
        }
        if fetch.from == self.config.device {
            return self.fail(request, FailureKind::Invalid, "a device fetches nothing from itself");
        }
        let limits = self.config.limits;
        if self.fetches.len >= limits.fetches {
            let words = format!("{} fetches wait here already: send the blocks", self.fetches.len);
            return self.fail(request, FailureKind::NotFetched, words);
        }
        let key = Key {
            device: fetch.from,
            recovered: fetch.recovered,
            holder,
        };
        let known = self.fetches.peers.iter().find(|(_, peer)| peer.key == key);
        let Some(id) = known.map(|(id, _)| *id).or_else(|| self.reach(key, &fetch.address)) else {
            let words = format!("{} connections to other devices are in use", self.fetches.peers.len());
            return self.fail(request, FailureKind::NotFetched, words);
        };
        let pending = Pending {
            request: *request,
            fetch,
            deadline: self.now + limits.fetch_timeout,
        };
        let peer = self.fetches.peers.get_mut(&id).expect("it was just found");
        peer.waiting.push_back(pending);
        self.fetches.len += 1;
        self.ask_peers();
    }

    /// Begins to connect. `None` if all connections that may be are in use.
    fn reach(&mut self, key: Key, address: &str) -> Option<PeerId> {
        let limits = &self.config.limits;
        if self.fetches.peers.len() >= limits.fetch_peers {
            let idle = self.fetches.peers.iter().filter(|(_, peer)| peer.is_idle());
            let (id, _) = idle.min_by_key(|(id, peer)| (peer.idle_since, **id))?;
            self.drop_peer(*id, FailureKind::NotFetched, "");
        }
        let id = PeerId(self.fetches.next_peer);
        self.fetches.next_peer += 1;
        let peer = Peer {
            key,
            stage: Stage::Connecting {
                until: self.now + self.config.limits.fetch_connect_timeout,
            },
            waiting: VecDeque::new(),
            sent: BTreeMap::new(),
            idle_since: self.now,
        };
        self.fetches.peers.insert(id, peer);
        let address = address.to_string();
        self.actions.push_back(HostAction::Reach { peer: id, address });
        Some(id)
    }

    /// The connection stands: says who is here, for whom, and whom it wants.
    pub(super) fn peer_connected(&mut self, id: PeerId) {
        let Some(peer) = self.fetches.peers.get(&id) else {
            return;
        };
        let Some(capability) = peer.waiting.front().map(|pending| pending.fetch.capability) else {
            // Whoever wanted something has given up.
            return self.drop_peer(id, FailureKind::NotFetched, "");
        };
        let hello = Hello {
            version_min: Hello::VERSION,
            version_max: Hello::VERSION,
            purpose: Purpose::Repair,
            features: features::NONE,
            cluster: self.config.cluster,
            device: peer.key.device,
            recovered: CommitSeq(0),
            commit: CommitSeq(0),
            client: ClientId(self.config.device.uuid.0),
            limits: PeerLimits::default(),
            capability: Some(capability),
        };
        self.send_peer(id, Correlation(0), Message::Hello(hello));
    }

    fn send_peer(&mut self, peer: PeerId, correlation: Correlation, message: Message) {
        let envelope = Envelope {
            class: Class::Repair,
            ..Envelope::new(correlation, message)
        };
        self.actions.push_back(HostAction::SendPeer { peer, envelope });
    }

    /// Another device says something.
    pub(super) fn peer_frame(&mut self, id: PeerId, envelope: Envelope) {
        let Some(peer) = self.fetches.peers.get(&id) else {
            return;
        };
        match (peer.stage, envelope.message) {
            (Stage::Connecting { .. }, Message::Hello(theirs)) => self.peer_greeted(id, &theirs),
            (Stage::Connecting { .. }, Message::Failed(failed)) => {
                self.drop_peer(id, FailureKind::PeerUnreachable, &format!("it refused: {failed}"));
            }
            (Stage::Up, Message::ReadAnswer(answer)) => self.peer_answered(id, envelope.correlation, Ok(answer)),
            (Stage::Up, Message::Failed(failed)) => self.peer_answered(id, envelope.correlation, Err(failed)),
            // Said to whoever holds the volume; the holder hears it itself.
            (Stage::Up, Message::Damaged(_)) => {}
            (_, message) => {
                let words = format!("it sent {} out of turn", message.name());
                self.drop_peer(id, FailureKind::PeerUnreachable, &words);
            }
        }
    }

    fn peer_greeted(&mut self, id: PeerId, theirs: &Hello) {
        let now = self.now;
        let cluster = self.config.cluster;
        let peer = self.fetches.peers.get_mut(&id).expect("the caller has looked");
        let known = peer.waiting.iter().map(|pending| pending.fetch.commit).max();
        let words = if theirs.cluster != cluster {
            "it is of another cluster"
        } else if theirs.device != peer.key.device {
            "another device answers there"
        } else if theirs.version_min > Hello::VERSION || theirs.version_max < Hello::VERSION {
            "it speaks no version that this device speaks"
        } else if theirs.recovered != peer.key.recovered || known.is_some_and(|known| theirs.commit < known) {
            // The holder will notice, and compare it if it has forgotten something.
            return self.drop_peer(id, FailureKind::NotFetched, "it was started anew");
        } else {
            (peer.stage, peer.idle_since) = (Stage::Up, now);
            return self.ask_peers();
        };
        self.drop_peer(id, FailureKind::PeerUnreachable, words);
    }

    /// Asks for what there is room for.
    fn ask_peers(&mut self) {
        let limits = self.config.limits;
        let ids: Vec<PeerId> = self.fetches.peers.keys().copied().collect();
        for id in ids {
            loop {
                let fetches = &mut self.fetches;
                let peer = fetches.peers.get_mut(&id).expect("it was just listed");
                if peer.stage != Stage::Up || peer.sent.len() >= limits.fetches_per_peer {
                    break;
                }
                let Some(next) = peer.waiting.front() else { break };
                let bytes = next.fetch.range.bytes() as u64;
                // One is always to be had when there is none.
                if fetches.reading > 0 && fetches.reading + bytes > limits.fetch_bytes {
                    return;
                }
                let pending = peer.waiting.pop_front().expect("it was just there");
                fetches.next_correlation += 1;
                let correlation = Correlation(fetches.next_correlation);
                fetches.reading += bytes;
                let read = Read {
                    holder: pending.fetch.holder,
                    group: pending.fetch.group,
                    layer: pending.fetch.layer,
                    range: pending.fetch.range,
                };
                let sent = Sent {
                    deadline: pending.deadline,
                    pending: Some(pending),
                    bytes,
                };
                peer.sent.insert(correlation, sent);
                self.send_peer(id, correlation, Message::Read(read));
            }
        }
    }

    /// A read has ended.
    fn peer_answered(&mut self, id: PeerId, correlation: Correlation, answer: Result<ReadAnswer, Failed>) {
        let now = self.now;
        let fetches = &mut self.fetches;
        let peer = fetches.peers.get_mut(&id).expect("the caller has looked");
        let Some(sent) = peer.sent.remove(&correlation) else {
            return self.drop_peer(id, FailureKind::PeerUnreachable, "it answered what was not asked");
        };
        peer.idle_since = now;
        fetches.reading -= sent.bytes;
        if let Ok(answer) = &answer {
            fetches.fetched += answer.bytes.iter().map(|bytes| bytes.len() as u64).sum::<u64>();
        }
        if let Some(pending) = sent.pending {
            fetches.len -= 1;
            self.fetched(pending, answer);
        }
        self.ask_peers();
    }

    /// What a holder wanted is here, or is not to be had: it is written as any copy is.
    fn fetched(&mut self, pending: Pending, answer: Result<ReadAnswer, Failed>) {
        let Pending { request, fetch, .. } = pending;
        let from = fetch.from;
        let copy = answer
            .map_err(|failed| failed.to_string())
            .and_then(|answer| fetch.copy(answer).map_err(str::to_string))
            .and_then(|copy| {
                self.verify_copy(&copy)
                    .map_err(|failed| failed.to_string())
                    .map(|()| copy)
            });
        match copy {
            #[cfg(feature = "canary")]
            Ok(copy) if self.config.canary == super::Canary::FetchAckedEarly => self.write_acked(&request, copy),
            Ok(copy) => self.write_fetched(&request, copy, self.ignores_generation_of_fetches()),
            Err(words) => self.fail(&request, FailureKind::NotFetched, format!("from {from}: {words}")),
        }
    }

    /// The driver says that a connection is over, or that there will be none.
    pub(super) fn peer_ended(&mut self, id: PeerId) {
        let Some(peer) = self.fetches.peers.get(&id) else {
            return;
        };
        let (kind, words) = match peer.stage {
            Stage::Connecting { .. } => (FailureKind::PeerUnreachable, "it can't be reached from here"),
            Stage::Up => (FailureKind::NotFetched, "the connection to it is over"),
        };
        let lost = self.fetches.remove(id);
        self.refuse_fetches(lost, kind, words);
        self.ask_peers();
    }

    /// Gives a connection up.
    fn drop_peer(&mut self, id: PeerId, kind: FailureKind, words: &str) {
        let lost = self.fetches.remove(id);
        self.actions.push_back(HostAction::ClosePeer { peer: id });
        self.refuse_fetches(lost, kind, words);
    }

    fn refuse_fetches(&mut self, fetches: Vec<Pending>, kind: FailureKind, words: &str) {
        for pending in fetches {
            let words = format!("from {}: {words}", pending.fetch.from);
            self.fail(&pending.request, kind, words);
        }
    }

    /// When something of it is due.
    pub(super) fn fetch_wake(&self) -> Option<Time> {
        let idle = self.config.limits.fetch_idle;
        self.fetches.peers.values().map(|peer| peer.due(idle)).min()
    }

    /// Gives up what has taken too long, and connections that nobody uses.
    pub(super) fn fetch_timeout(&mut self) {
        let (now, idle) = (self.now, self.config.limits.fetch_idle);
        let due: Vec<PeerId> = self
            .fetches
            .peers
            .iter()
            .filter(|(_, peer)| peer.due(idle) <= now)
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            let peer = self.fetches.peers.get_mut(&id).expect("it was just listed");
            let overdue = peer.sent.values().any(|sent| sent.deadline <= now);
            match peer.stage {
                Stage::Connecting { until } if until <= now => {
                    self.drop_peer(id, FailureKind::PeerUnreachable, "it did not answer in time");
                }
                Stage::Up if overdue => {
                    self.drop_peer(id, FailureKind::PeerUnreachable, "it did not answer in time");
                }
                Stage::Up if peer.is_idle() => self.drop_peer(id, FailureKind::NotFetched, ""),
                Stage::Connecting { .. } | Stage::Up => {
                    // What has waited here for too long says nothing about the other device.
                    let count = peer.waiting.iter().take_while(|p| p.deadline <= now).count();
                    let late: Vec<Pending> = peer.waiting.drain(..count).collect();
                    peer.idle_since = now;
                    self.fetches.len -= late.len();
                    self.refuse_fetches(late, FailureKind::NotFetched, "too much is being fetched");
                }
            }
        }
        self.ask_peers();
    }

    /// The connection of a holder is gone: nobody waits for its fetches any more.
    pub(super) fn forget_fetches(&mut self, conn: ConnId) {
        self.fetches.take(|request, _| request.conn == conn);
    }

    /// A seal has come on a connection: fetches for the volume that came on others are of who is fenced, or of a
    /// connection that its holder has given up.
    pub(super) fn give_up_fetches(&mut self, volume: VolumeId, conn: ConnId) {
        if self.ignores_generation_of_fetches() {
            return;
        }
        let taken = self
            .fetches
            .take(|request, _| request.holder.volume == volume && request.conn != conn);
        self.refuse_given_up(taken);
    }

    /// A join of a group begins anew: what was to be fetched for it before is not wanted any more.
    pub(super) fn give_up_fetches_of(&mut self, group: GroupId) {
        let taken = self.fetches.take(|_, fetch| fetch.holder.group(fetch.group) == group);
        self.refuse_given_up(taken);
    }

    fn refuse_given_up(&mut self, taken: Vec<Pending>) {
        for pending in taken {
            let seen = self.rules.seen(pending.request.holder.volume);
            if seen > pending.request.holder.generation {
                self.answer(&pending.request, Message::Failed(Failed::fenced(seen)));
            } else {
                let words = "its holder has begun anew";
                self.fail(&pending.request, FailureKind::NotFetched, words);
            }
        }
    }

    #[cfg(feature = "canary")]
    fn ignores_generation_of_fetches(&self) -> bool {
        self.config.canary == super::Canary::FetchIgnoresGeneration
    }

    #[cfg(not(feature = "canary"))]
    fn ignores_generation_of_fetches(&self) -> bool {
        false
    }
}
