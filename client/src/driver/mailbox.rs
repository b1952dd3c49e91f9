//! How other threads speak to the driver's thread.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};

use cairn_proto::ids::Generation;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::meta::OpenError;
use crate::core::api::{Advice, ConnId, MetaAnswer, MetaError, VolumeDescription};
use crate::volume::api::{VolumeError, VolumeOp, VolumeReply};

/// A volume that the library has opened.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct UserId(pub(super) u64);

/// Who waits in the library for an operation, with the permits for it: given back when it is done, not when nobody waits
/// any more.
pub(super) struct Waiter {
    pub(super) reply: oneshot::Sender<Result<VolumeReply, VolumeError>>,
    pub(super) permits: [OwnedSemaphorePermit; 2],
}

impl Waiter {
    pub(super) fn tell(self, result: Result<VolumeReply, VolumeError>) {
        drop(self.permits);
        let _ = self.reply.send(result);
    }
}

/// How taking care of a volume has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct CareEnded {
    /// The attachment that was granted for it; `None` if none was.
    pub(crate) granted: Option<Generation>,
}

/// What the driver's thread is told.
pub(super) enum Command {
    /// An answer to [`Job::Describe`](super::meta::Job::Describe).
    Described {
        ticket: usize,
        answer: Result<VolumeDescription, OpenError>,
    },
    /// An answer to [`Job::Catalogue`](super::meta::Job::Catalogue).
    Catalogue {
        ticket: usize,
        answer: Result<Vec<String>, MetaError>,
    },
    /// An answer to [`Job::Core`](super::meta::Job::Core).
    Meta(MetaAnswer),
    /// An answer to [`Job::Resolve`](super::meta::Job::Resolve).
    Resolved { conn: ConnId, addresses: Vec<SocketAddr> },
    /// Open a volume for the library.
    Open {
        name: String,
        reply: oneshot::Sender<Result<(UserId, VolumeDescription), OpenError>>,
    },
    /// An operation of the library.
    Submit { user: UserId, op: VolumeOp, waiter: Waiter },
    /// The library closes a volume; answered when its attachment is released.
    Leave { user: UserId, reply: oneshot::Sender<()> },
    /// An answer to [`Job::Report`](super::meta::Job::Report).
    Advice(Vec<Advice>),
    /// Take care of a volume; answered when that has ended.
    Care {
        description: VolumeDescription,
        reply: oneshot::Sender<CareEnded>,
    },
    /// End in order.
    Shutdown,
}

/// Commands on their way, and the means to wake the thread. What is in it is bounded by those who send: questions to meta
/// by their number at a time, operations by permits.
pub(super) struct Mailbox {
    queue: Mutex<VecDeque<Command>>,
    waker: mio::Waker,
}

impl Mailbox {
    pub(super) fn new(waker: mio::Waker) -> Mailbox {
        Mailbox {
            queue: Mutex::default(),
            waker,
        }
    }

    pub(super) fn send(&self, command: Command) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let was_empty = queue.is_empty();
        queue.push_back(command);
        drop(queue);
        // One wake-up serves all that is queued. The thread is gone if it fails, and its callers notice that elsewhere.
        if was_empty {
            let _ = self.waker.wake();
        }
    }

    pub(super) fn take(&self) -> VecDeque<Command> {
        std::mem::take(&mut *self.queue.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
