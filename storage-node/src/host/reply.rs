//! What the store has answered, and what the peer is told.

use std::time::Duration;

use cairn_proto::ids::VolumeId;
use cairn_proto::message::{Collected, Durable, Failed, FailureKind, Holder, Message, ReadAnswer};
use cairn_proto::replica::Refusal;

use super::{DeviceHost, HeldReplica, ReplicaStore, Request, Task, Working};
use crate::store::api::{StoreError, StoreReply, StoreRequest, Ticket};

impl<S: ReplicaStore> DeviceHost<S> {
    pub(super) fn store_replied(&mut self, ticket: Ticket, reply: StoreReply) {
        let working = self
            .working
            .remove(&ticket)
            .expect("the store answers what it was asked");
        if let Some(bytes) = working.window {
            self.window.0 -= 1;
            self.window.1 -= bytes;
        }
        match working.task {
            Task::Seal(holder) => return self.seal_stored(holder, reply),
            Task::Chore(chore) => {
                self.background.replied(self.now, chore, reply);
                let store = &self.store;
                return self.background.forget_mended(|found| store.is_damaged(found));
            }
            _ => {}
        }
        let Some(request) = working.request else {
            return;
        };
        let message = match reply {
            StoreReply::Failed(error) => Some(Message::Failed(failed(error))),
            StoreReply::Durable {
                commit,
                queue_us,
                write_us,
                flush_us,
            } => {
                let waited = micros(working.since.saturating_since(request.arrived));
                let durable = Durable {
                    commit,
                    queue_us: queue_us.saturating_add(waited),
                    write_us,
                    flush_us,
                };
                self.durable(&working, &request, durable)
            }
            StoreReply::Read { blocks, bytes } => Some(self.unless_fenced(&request, |host| {
                Message::ReadAnswer(ReadAnswer {
                    commit: host.store.commit(),
                    queue_us: micros(working.since.saturating_since(request.arrived)),
                    read_us: micros(host.now.saturating_since(working.since)),
                    blocks,
                    bytes,
                })
            })),
            StoreReply::Collected { runs, next } => Some(self.unless_fenced(&request, |host| {
                let commit = host.store.commit();
                Message::Collected(Collected { commit, runs, next })
            })),
            StoreReply::Scrubbed { .. } | StoreReply::Defragmented { .. } => {
                unreachable!("no peer asks for it")
            }
        };
        // Answered first: a seal that waits for its end is answered after it.
        if let Some(message) = message {
            self.answer(&request, message);
        }
        if working.task.changes_the_volume() {
            // A write that was under way when the device failed may show or not when it is opened anew: it has not ended.
            match self.store.failed() {
                Some(error) => self.refuse_seals(request.holder.volume, StoreError::Poisoned(error)),
                None => self.rules.ended(request.holder),
            }
            self.try_open(request.holder.volume);
        }
    }

    /// A device that has failed answers no seal.
    pub(super) fn refuse_seals(&mut self, volume: VolumeId, error: StoreError) {
        for holder in self.seals.holders(volume) {
            for waiting in self.seals.take(holder) {
                self.answer(&waiting, Message::Failed(failed(error)));
            }
        }
    }

    /// A write that was accepted and is durable is acknowledged even to a holder that has been fenced meanwhile: it is
    /// the truth, and the newer holder, whose seal has waited for it, will find it.
    fn durable(&mut self, working: &Working, request: &Request, durable: Durable) -> Option<Message> {
        match working.task {
            Task::Join { group, created } => {
                self.joined(request, group, created);
                None
            }
            Task::Write { group, stable } => {
                let known = self.stables.entry(group).or_default();
                *known = stable.max(*known);
                Some(Message::Durable(durable))
            }
            _ => Some(Message::Durable(durable)),
        }
    }

    /// A read that was fenced while the store was at it returns nothing (rule 3).
    fn unless_fenced(&self, request: &Request, message: impl FnOnce(&Self) -> Message) -> Message {
        match self.rules.admit(request.holder) {
            Err(Refusal::Fenced(seen)) => Message::Failed(Failed::fenced(seen)),
            _ => message(self),
        }
    }

    fn seal_stored(&mut self, holder: Holder, reply: StoreReply) {
        self.seals.end_storing(holder);
        match reply {
            StoreReply::Failed(error) => {
                for waiting in self.seals.take(holder) {
                    self.answer(&waiting, Message::Failed(failed(error)));
                }
                return;
            }
            _ => self.rules.made_durable(holder),
        }
        self.try_open(holder.volume);
    }

    /// Meta says that nobody needs these replicas. It said so of what was reported, and the store looks again: in between
    /// a later configuration may have named one, and it may be full of acknowledged data by now.
    pub(super) fn drop_replicas(&mut self, replicas: Vec<HeldReplica>) {
        for HeldReplica { group, epoch } in replicas {
            if self.store.membership(group).is_some_and(|held| held.epoch <= epoch) {
                self.stables.remove(&group);
                self.submit(None, Task::Drop, None, StoreRequest::DropReplica { group, epoch });
            }
        }
    }
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

pub(super) fn failed(error: StoreError) -> Failed {
    let (kind, hint) = match error {
        StoreError::Opening => (FailureKind::Starting, "ask again soon"),
        StoreError::NoReplica => (FailureKind::NoReplica, "only a join makes one"),
        StoreError::NoSpace => (FailureKind::NoSpace, "discard or delete what is not needed"),
        StoreError::Poisoned(_) => (FailureKind::DeviceFailed, "replace it, or start its node again"),
        StoreError::Unreadable(_) | StoreError::IndexDamaged => (FailureKind::Unreadable, "another copy has them"),
        StoreError::Busy => (FailureKind::TooManyInFlight, "ask again later"),
        StoreError::Invalid(_) => (FailureKind::Invalid, "nothing of it was done"),
    };
    Failed::new(kind, format!("{error}; {hint}"))
}
