//! Hello, ping, and who holds a volume: what is answered without waiting behind data.

use cairn_proto::capability::Rights;
use cairn_proto::ids::{ClientId, Generation, GroupId, VolumeId};
use cairn_proto::message::{
    Confirm, Envelope, Failed, FailureKind, Hello, Holder, Join, Joined, Message, PeerLimits, Release, ReplicaRole,
    Seal,
};
use cairn_proto::replica::{Refusal, SealStep};

use super::reply::failed;
use super::{CloseReason, ConnId, DeviceHost, HostAction, Membership, ReplicaStore, Request, Task};
use crate::store::api::{StoreError, StoreRequest};

impl<S: ReplicaStore> DeviceHost<S> {
    /// The first message of a connection: answered with the device's own hello, or refused and closed.
    pub(super) fn hello(&mut self, conn: ConnId, envelope: Envelope) {
        let Message::Hello(hello) = &envelope.message else {
            unreachable!("the caller looked");
        };
        let mine = self.own_hello(hello);
        let message = match self.check_hello(hello, &mine) {
            Ok(version) => {
                let connection = self.connections.get_mut(&conn).expect("it was looked up before");
                connection.greeted(hello, version);
                if let Some(capability) = &hello.capability {
                    connection.proves(capability, 1, |_| false);
                }
                Message::Hello(mine)
            }
            Err(failed) => Message::Failed(failed),
        };
        let refused = match &message {
            Message::Failed(failed) => Some(failed.words.clone()),
            _ => None,
        };
        let answer = Envelope { message, ..envelope };
        self.actions.push_back(HostAction::Send { conn, envelope: answer });
        if let Some(words) = refused {
            self.close(conn, CloseReason::Refused(words));
        }
    }

    fn own_hello(&self, theirs: &Hello) -> Hello {
        let limits = &self.config.limits;
        Hello {
            version_min: Hello::VERSION,
            version_max: Hello::VERSION,
            purpose: theirs.purpose,
            features: cairn_proto::message::features::FETCH,
            cluster: self.config.cluster,
            device: self.config.device,
            recovered: self.store.recovered(),
            commit: self.store.commit(),
            client: ClientId::default(),
            limits: PeerLimits {
                requests_in_flight: limits.requests_in_flight,
                request_bytes_in_flight: limits.request_bytes_in_flight,
                ..PeerLimits::default()
            },
            capability: None,
        }
    }

    fn check_hello(&self, theirs: &Hello, mine: &Hello) -> Result<u16, Failed> {
        let version = mine.common_version(theirs).ok_or_else(|| {
            let words = format!(
                "this device speaks versions {} to {} of the messages, you speak {} to {}: upgrade the older side",
                mine.version_min, mine.version_max, theirs.version_min, theirs.version_max
            );
            Failed::new(FailureKind::VersionUnsupported, words)
        })?;
        if theirs.cluster != mine.cluster {
            let words = format!("this device is of cluster {}, not of {}", mine.cluster, theirs.cluster);
            return Err(Failed::new(FailureKind::WrongCluster, words));
        }
        if theirs.device != mine.device {
            let words = format!(
                "this is device {}, not {}: ask the metadata servers where that is now",
                mine.device, theirs.device
            );
            return Err(Failed::new(FailureKind::WrongDevice, words));
        }
        match &theirs.capability {
            Some(shown) if !shown.is_valid(&self.config.cluster_key, self.config.cluster) => {
                Err(unauthorized(shown.volume, shown.generation))
            }
            _ => Ok(version),
        }
    }

    pub(super) fn seal(&mut self, request: &Request, seal: &Seal) {
        let (capability, limits) = (&seal.capability, self.config.limits);
        let (volume, generation) = (capability.volume, capability.generation);
        if !capability.is_valid(&self.config.cluster_key, self.config.cluster) || generation == Generation::NONE {
            return self.answer(request, Message::Failed(unauthorized(volume, generation)));
        }
        let connection = self
            .connections
            .get_mut(&request.conn)
            .expect("its request has just come");
        let rules = &self.rules;
        let over = |holder: Holder| holder.generation < rules.seen(holder.volume);
        if !connection.proves(capability, limits.volumes_per_connection, over) {
            let words = format!(
                "more than {} volumes on one connection: open another one",
                limits.volumes_per_connection
            );
            return self.fail(request, FailureKind::TooManyInFlight, words);
        }
        if let Some(error) = self.store.failed() {
            return self.answer(request, Message::Failed(failed(StoreError::Poisoned(error))));
        }
        let holder = request.holder;
        let step = self.rules.seal(holder);
        if !matches!(step, SealStep::Fenced(_)) {
            self.give_up_fetches(volume, request.conn);
        }
        match step {
            SealStep::Fenced(seen) => return self.answer(request, Message::Failed(Failed::fenced(seen))),
            SealStep::Durable => {}
            SealStep::MakeDurable => {
                self.refuse_waiting(holder);
                if self.seals.begin_storing(holder) {
                    let work = StoreRequest::Seal { volume, generation };
                    // On behalf of nobody: it is made durable even if the connection is gone by then.
                    self.submit(None, Task::Seal(holder), None, work);
                }
            }
        }
        self.seals.wait(*request);
        self.try_open(volume);
    }

    /// What waits for the store under a lower generation than this holder's is refused: it was not accepted yet, so
    /// nothing of it may show from now on.
    fn refuse_waiting(&mut self, holder: Holder) {
        if self.ignores_generation() {
            return;
        }
        let waiting = self.queues.take(
            |(volume, _)| volume == holder.volume,
            |queued| {
                queued
                    .request
                    .is_some_and(|request| request.holder.generation < holder.generation)
            },
        );
        for request in waiting.into_iter().filter_map(|queued| queued.request) {
            let fenced = Message::Failed(Failed::fenced(holder.generation));
            self.answer(&request, fenced);
        }
    }

    pub(super) fn join(&mut self, request: &Request, join: &Join) {
        let (holder, role) = (join.holder, join.role as u8);
        if let Err(failed) = self.authorize(request, Rights::Write) {
            return self.answer(request, Message::Failed(failed));
        }
        let group = holder.group(join.group);
        self.give_up_fetches_of(group);
        let underway = self
            .working
            .values()
            .any(|working| matches!(working.task, Task::Join { group: other, .. } if other == group));
        let held = self.store.membership(group);
        let is_known = |held: Membership| join.epoch < held.epoch || (join.epoch, role) == (held.epoch, held.role);
        if held.is_some_and(is_known) && !underway {
            return self.joined(request, group, false);
        }
        // Who was ejected and can't be compared any more begins anew: nothing that it holds is relied on, and a later
        // configuration says so.
        let spoilt = held.filter(|held| join.role == ReplicaRole::Joining && join.epoch > held.epoch);
        let spoilt = spoilt.filter(|_| !underway && self.store.is_index_lost(group));
        if let Some(Membership { epoch, .. }) = spoilt {
            self.submit(None, Task::Drop, None, StoreRequest::DropReplica { group, epoch });
        }
        // Also of one that is being made, for another connection: its asker may never hear of it.
        let created = held.is_none() || spoilt.is_some();
        let epoch = join.epoch;
        let create = StoreRequest::CreateReplica { group, role, epoch };
        let task = Task::Join { group, created };
        self.submit(Some(*request), task, None, create);
    }

    pub(super) fn joined(&mut self, request: &Request, group: GroupId, created: bool) {
        if created {
            self.stables.remove(&group);
        }
        let stable = self.stables.get(&group).copied().unwrap_or_default();
        let joined = Joined {
            holder: request.holder,
            group: group.index,
            created,
            stable,
        };
        self.answer(request, Message::Joined(joined));
    }

    pub(super) fn confirm(&mut self, request: &Request, confirm: &Confirm) {
        let message = match self.authorize(request, Rights::Read) {
            Ok(()) => Message::Confirmed(*confirm),
            Err(failed) => Message::Failed(failed),
        };
        self.answer(request, message);
    }

    /// Also a holder that a newer one has fenced may release: that one need not wait any longer then.
    pub(super) fn release(&mut self, request: &Request, release: &Release) {
        let holder = release.holder;
        let connection = self
            .connections
            .get_mut(&request.conn)
            .expect("its request has just come");
        if connection.rights(holder).is_none() {
            return self.answer(request, Message::Failed(not_sealed(holder)));
        }
        connection.release(holder);
        self.rules.release(holder);
        self.answer(request, Message::Released(*release));
        self.try_open(holder.volume);
    }

    /// Whether a request of a holder may be done: its generation is the one that is served, and its connection has shown
    /// the capability for it.
    pub(super) fn authorize(&self, request: &Request, needed: Rights) -> Result<(), Failed> {
        let holder = request.holder;
        match self.rules.admit(holder) {
            Ok(()) => {}
            Err(Refusal::Fenced(seen)) => return Err(Failed::fenced(seen)),
            Err(Refusal::NotSealed) => return Err(not_sealed(holder)),
        }
        let connection = self.connections.get(&request.conn).expect("its request has just come");
        match connection.rights(holder) {
            None => Err(not_sealed(holder)),
            Some(rights) if rights < needed => {
                let words = format!("the capability for volume {} is for reading only", holder.volume);
                Err(Failed::new(FailureKind::Unauthorized, words))
            }
            Some(_) => Ok(()),
        }
    }

    #[cfg(feature = "canary")]
    pub(super) fn ignores_generation(&self) -> bool {
        self.config.canary == super::Canary::GenerationIgnored
    }

    #[cfg(not(feature = "canary"))]
    pub(super) fn ignores_generation(&self) -> bool {
        false
    }
}

fn not_sealed(holder: Holder) -> Failed {
    let words = format!(
        "generation {} of volume {} is not sealed on this connection: send a seal and wait for its answer first",
        holder.generation, holder.volume
    );
    Failed::new(FailureKind::NotSealed, words)
}

fn unauthorized(volume: VolumeId, generation: Generation) -> Failed {
    let words = format!(
        "the capability for generation {generation} of volume {volume} was not granted by this cluster's metadata \
         servers: attach the volume anew, and check that all nodes have the same cluster key"
    );
    Failed::new(FailureKind::Unauthorized, words)
}
