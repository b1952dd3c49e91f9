//! The driver: one thread that owns the sockets of exports and devices and runs the client's [core](crate::core).
//!
//! Everything that decides is elsewhere, without I/O: the core for volumes and replication, [`nbd`](crate::nbd) for the
//! protocol of exports. Here bytes are moved: an epoll loop over non-blocking sockets, vectored reads straight into
//! block-aligned memory, vectored writes of what was queued, deadlines by a clock that goes on while the machine sleeps.
//! What may wait for long (metadata servers, names of hosts) is asked on the tokio runtime, through a bounded channel, and
//! answered through a mailbox that wakes the thread.
//!
//! Reading order: `thread` (the loop), `guests` and `devices` (the two kinds of connections), `volumes` (who uses
//! which), `meta` and `mailbox` (the other threads), [`library`] (the public face).

pub mod library;
pub mod limits;

mod clock;
mod devices;
mod frames;
mod guests;
mod listen;
mod mailbox;
mod meta;
mod metrics;
mod socket;
mod thread;
mod volumes;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use cairn_proto::time::Time;
use mio::Poll;
use tokio::sync::{mpsc, oneshot, watch};

pub use listen::{Listen, ListenError};
pub use meta::OpenError;
pub use thread::Ended;

pub(crate) use listen::Listener;
pub(crate) use mailbox::CareEnded;
pub(crate) use meta::describe_id;
pub(crate) use thread::Settings;

use crate::core::ClientCore;
use crate::core::api::{Action, Event, VolumeDescription, VolumeHandle};
use mailbox::{Command, Mailbox};
use meta::Job;

/// What the driver drives: [`ClientCore`], or a stand-in in tests.
pub trait Core: Send + 'static {
    /// Takes an event.
    fn handle(&mut self, now: Time, event: Event);
    /// Takes the passing of time, at or after [`poll_timeout`](Core::poll_timeout).
    fn handle_timeout(&mut self, now: Time);
    /// The next thing to do.
    fn poll_action(&mut self) -> Option<Action>;
    /// When it wants to be told of the passing of time.
    fn poll_timeout(&self) -> Option<Time>;
    /// Whether the exports of a volume should go on to submit. If not they wait for the next reply.
    fn has_room(&self, volume: VolumeHandle) -> bool;
    /// How it stands with the devices, for metrics.
    fn device_load(&self) -> DeviceLoad;
}

impl Core for ClientCore {
    fn handle(&mut self, now: Time, event: Event) {
        self.handle(now, event);
    }

    fn handle_timeout(&mut self, now: Time) {
        self.handle_timeout(now);
    }

    fn poll_action(&mut self) -> Option<Action> {
        self.poll_action()
    }

    fn poll_timeout(&self) -> Option<Time> {
        self.poll_timeout()
    }

    fn has_room(&self, volume: VolumeHandle) -> bool {
        self.has_room(volume)
    }

    fn device_load(&self) -> DeviceLoad {
        let mut load = DeviceLoad::default();
        for (_, is_up, in_flight, queued) in self.device_load() {
            *(if is_up { &mut load.up } else { &mut load.down }) += 1;
            load.in_flight += in_flight;
            load.queued += queued;
        }
        load
    }
}

/// How it stands with the devices of a client.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DeviceLoad {
    /// Devices whose connection stands.
    pub up: usize,
    /// Devices that can't be reached.
    pub down: usize,
    /// Requests on their way.
    pub in_flight: usize,
    /// Requests that wait for room on a connection.
    pub queued: usize,
}

/// The driver's thread has ended without being told to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Died(String);

impl fmt::Display for Died {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the thread that serves I/O has ended: {}; start the process again",
            self.0
        )
    }
}

impl std::error::Error for Died {}

/// A running driver thread. Dropping it tells the thread to end, and does not wait.
pub(crate) struct Running {
    mailbox: Arc<Mailbox>,
    thread: Option<JoinHandle<()>>,
    ended: watch::Receiver<Option<Result<Ended, Died>>>,
}

/// The ends of the channel of questions: the thread asks, [`meta::answer_jobs`] answers.
pub(crate) struct Questions {
    jobs: mpsc::Receiver<Job>,
    mailbox: Arc<Mailbox>,
}

/// Starts the thread. Whoever calls it answers the questions.
pub(crate) fn start<C: Core>(
    core: C,
    settings: Settings,
    listeners: Vec<Listener>,
) -> io::Result<(Running, Questions)> {
    let poll = Poll::new()?;
    let mailbox = Arc::new(Mailbox::new(mio::Waker::new(poll.registry(), thread::WAKER)?));
    let (asked, jobs) = mpsc::channel(limits::META_QUEUE_MAX);
    let driver = thread::Driver::new(core, poll, mailbox.clone(), asked, settings, listeners)?;
    let (end, ended) = watch::channel(None);
    let thread = std::thread::Builder::new()
        .name("cairn-driver".to_string())
        .spawn(move || {
            let result = driver.run().map_err(|error| Died(error.to_string()));
            end.send_replace(Some(result));
        })?;
    let thread = Some(thread);
    let questions = Questions {
        jobs,
        mailbox: mailbox.clone(),
    };
    Ok((Running { mailbox, thread, ended }, questions))
}

impl Running {
    /// Waits until the thread has ended.
    pub(crate) async fn ended(&self) -> Result<Ended, Died> {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(result) => result.clone().expect("it was waited for"),
            Err(_) => Err(Died("it panicked, see the log".to_string())),
        }
    }

    /// Lets what is in flight end, releases the attachments, and ends the thread.
    pub(crate) async fn shut_down(mut self) -> Result<Ended, Died> {
        self.mailbox.send(Command::Shutdown);
        let result = self.ended().await;
        if let Some(thread) = self.thread.take() {
            // It has nothing left to do but return.
            let _ = thread.join();
        }
        result
    }

    fn send(&self, command: Command) {
        self.mailbox.send(command);
    }

    /// Whether the thread has ended.
    pub(crate) fn is_over(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// Tells the thread to end in order, and does not wait.
    pub(crate) fn stop(&self) {
        self.send(Command::Shutdown);
    }

    /// Takes care of a volume, until it is whole or somebody else holds it.
    pub(crate) async fn care(&self, description: VolumeDescription) -> CareEnded {
        let (reply, ended) = oneshot::channel();
        self.send(Command::Care { description, reply });
        ended.await.unwrap_or(CareEnded { granted: None })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.mailbox.send(Command::Shutdown);
    }
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
