//! How the control thread speaks to a device's thread: a bounded queue and an eventfd that wakes the ring.

use std::collections::VecDeque;
use std::io;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use tokio::sync::oneshot;

use crate::host::{HeldReplica, HostStatus, PeerId};

/// What a device's thread is told.
pub(super) enum Control {
    /// Forget these groups: their volumes are deleted for good.
    Drop(Vec<HeldReplica>),
    /// A connection to another device stands, or can't be made.
    Reached(PeerId, io::Result<TcpStream>),
    /// Verify all that the device holds.
    Scrub,
    /// Say how the device is.
    Status(oneshot::Sender<HostStatus>),
    /// Say which groups it holds.
    Inventory(oneshot::Sender<Vec<HeldReplica>>),
}

/// The queue, shared by both threads.
pub(super) struct ControlQueue {
    messages: Mutex<VecDeque<Control>>,
    limit: usize,
    stop: AtomicBool,
    event: OwnedFd,
}

impl ControlQueue {
    pub(super) fn new(limit: usize) -> io::Result<Arc<ControlQueue>> {
        Ok(Arc::new(ControlQueue {
            messages: Mutex::default(),
            limit,
            stop: AtomicBool::new(false),
            event: eventfd(0, EventfdFlags::CLOEXEC)?,
        }))
    }

    /// The eventfd, for the ring.
    pub(super) fn event(&self) -> io::Result<OwnedFd> {
        self.event.try_clone()
    }

    /// Queues a message. False when too many wait: the device's thread is stuck.
    pub(super) fn push(&self, message: Control) -> bool {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        if messages.len() >= self.limit {
            return false;
        }
        messages.push_back(message);
        drop(messages);
        self.wake();
        true
    }

    /// Queues a message of which there can't be many, and which must come.
    pub(super) fn push_always(&self, message: Control) {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        messages.push_back(message);
        drop(messages);
        self.wake();
    }

    /// The next message.
    pub(super) fn pop(&self) -> Option<Control> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    /// Asks the thread to end.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake();
    }

    /// Whether the thread is asked to end.
    pub(super) fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn wake(&self) {
        // It fails only when the counter is full, and then the thread has been woken already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}
