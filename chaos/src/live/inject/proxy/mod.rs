//! A TCP proxy that does what bad networks do: `Proxy::start(listen, target, seed)`, then [`Proxy::set`] and [`Proxy::heal`].
//!
//! A process is put behind it by advertising its address: `cairn node --listen A --advertise PROXY`, the same for `cairn meta`.
//! One thread serves all connections; what is under way is bounded, so a slow end holds the other one back, as TCP does.
//! Reading order: [`fault`], then `connection` and `pipe`, then the loop here.

mod connection;
pub mod fault;
mod pipe;
mod switches;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};

use self::connection::{Connection, Context, End, Fate};
pub use self::fault::{COMMANDS, Direction, Fault};
use self::switches::Switches;
use super::limits::PROXY_CONNECTIONS_MAX;
use crate::rng::Rng;

/// How many connections may wait to be accepted.
const BACKLOG: i32 = 128;
/// Whatever happens, the loop looks around this often.
const IDLE: Duration = Duration::from_secs(1);

/// What a proxy did since its start.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Counters {
    /// Connections accepted.
    pub accepted: u64,
    /// Connections there are now, silent ones too.
    pub open: u64,
    /// Connections that were not forwarded because the target could not be reached.
    pub unreachable: u64,
    /// Connections closed at once because there were too many.
    pub too_many: u64,
    /// Bytes forwarded to the target.
    pub to_target: u64,
    /// Bytes forwarded to clients.
    pub to_client: u64,
    /// Bytes that had to wait for a delay.
    pub delayed: u64,
    /// Bytes of which a bit was flipped.
    pub corrupted: u64,
    /// Connections reset after so many bytes.
    pub resets: u64,
    /// Connections reset by `drop`.
    pub dropped: u64,
    /// Connections that were accepted and left half open.
    pub half_open: u64,
    /// Connections that fell silent for good.
    pub silenced: u64,
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "accepted {} open {} unreachable {} too-many {} to-target {} to-client {} delayed {} corrupted {} resets {} \
             dropped {} half-open {} silenced {}",
            self.accepted,
            self.open,
            self.unreachable,
            self.too_many,
            self.to_target,
            self.to_client,
            self.delayed,
            self.corrupted,
            self.resets,
            self.dropped,
            self.half_open,
            self.silenced
        )
    }
}

#[derive(Debug)]
enum Order {
    Set(Fault),
    Heal,
    Count,
    End,
}

#[derive(Debug)]
struct Request {
    order: Order,
    done: Sender<io::Result<()>>,
}

/// A running proxy. Dropping it resets its connections and frees its address.
#[derive(Debug)]
pub struct Proxy {
    listen: SocketAddr,
    requests: Sender<Request>,
    waker: Arc<OwnedFd>,
    counters: Arc<Mutex<Counters>>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Listens at `listen` (with port 0 the system chooses, see [`Proxy::address`]) and forwards to `target`, which need not
    /// listen yet. `seed` chooses jitter and flipped bits.
    ///
    /// # Errors
    /// The address can't be listened at.
    pub fn start(listen: SocketAddr, target: SocketAddr, seed: u64) -> io::Result<Proxy> {
        let listener = TcpListener::bind(listen)?;
        listener.set_nonblocking(true)?;
        let listen = listener.local_addr()?;
        let waker = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        let (sender, requests) = channel();
        let counters = Arc::new(Mutex::new(Counters::default()));
        let state = Loop {
            address: listen,
            target,
            door: Door::Open(listener),
            requests,
            waker: Arc::clone(&waker),
            connections: BTreeMap::new(),
            accepted: 0,
            switches: Switches::default(),
            rng: Rng::stream(seed, "proxy"),
            counters: Counters::default(),
            shown: Arc::clone(&counters),
        };
        let thread = std::thread::Builder::new()
            .name("proxy".into())
            .spawn(move || state.run())?;
        Ok(Proxy {
            listen,
            requests: sender,
            waker,
            counters,
            thread: Some(thread),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.listen
    }

    /// Switches a fault on; it has begun when this returns.
    ///
    /// # Errors
    /// [`Fault::Refuse`] could not keep the address.
    pub fn set(&self, fault: Fault) -> io::Result<()> {
        self.order(Order::Set(fault))
    }

    /// Switches all faults off; it has happened when this returns. What waited goes on.
    ///
    /// # Errors
    /// It can't listen again after [`Fault::Refuse`].
    pub fn heal(&self) -> io::Result<()> {
        self.order(Order::Heal)
    }

    /// What it did so far.
    pub fn counters(&self) -> Counters {
        // What the thread has done is counted before it can be seen from outside: so is what it is doing.
        let _ = self.order(Order::Count);
        *self.counters.lock().expect("no holder of the lock panics")
    }

    /// Does what a line says: a fault (see [`COMMANDS`]), `heal`, or `status`, which is answered by the counters.
    ///
    /// # Errors
    /// In words: it is no command, or it could not be done.
    pub fn obey(&self, line: &str) -> Result<String, String> {
        let done = match line {
            "status" => return Ok(self.counters().to_string()),
            "heal" => self.heal(),
            line => self.set(line.parse()?),
        };
        done.map(|()| String::new()).map_err(|error| error.to_string())
    }

    fn order(&self, order: Order) -> io::Result<()> {
        let (done, answer) = channel();
        let gone = || io::Error::other("the proxy's thread has ended");
        self.requests.send(Request { order, done }).map_err(|_| gone())?;
        rustix::io::write(&*self.waker, &1u64.to_ne_bytes())?;
        answer.recv().map_err(|_| gone())?
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // It fails only if the thread has ended.
        let _ = self.order(Order::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What stands at the address.
#[derive(Debug)]
enum Door {
    Open(TcpListener),
    /// A socket that keeps the address and does not listen: who connects is refused.
    Shut(OwnedFd),
    /// The address was lost.
    None,
}

struct Loop {
    address: SocketAddr,
    target: SocketAddr,
    door: Door,
    requests: Receiver<Request>,
    waker: Arc<OwnedFd>,
    connections: BTreeMap<u64, Connection>,
    accepted: u64,
    switches: Switches,
    rng: Rng,
    counters: Counters,
    shown: Arc<Mutex<Counters>>,
}

/// Whose socket something can be done at.
#[derive(Clone, Copy, Debug)]
enum Source {
    Waker,
    Door,
    Connection(u64, End),
}

impl Loop {
    fn run(mut self) {
        loop {
            let ready = self.wait();
            let mut woken = false;
            for (source, flags) in ready {
                match source {
                    Source::Waker => woken = true,
                    Source::Door => self.accept(),
                    Source::Connection(id, end) => self.step(id, end, flags),
                }
            }
            self.show();
            if woken && self.obey_all() {
                return;
            }
        }
    }

    fn show(&mut self) {
        self.counters.open = self.connections.len() as u64;
        *self.shown.lock().expect("no holder of the lock panics") = self.counters;
    }

    fn wait(&self) -> Vec<(Source, PollFlags)> {
        let now = Instant::now();
        let mut sources = vec![Source::Waker];
        let mut fds = vec![PollFd::new(&*self.waker, PollFlags::IN)];
        if let Door::Open(listener) = &self.door {
            sources.push(Source::Door);
            fds.push(PollFd::new(listener, PollFlags::IN));
        }
        let mut until = now + IDLE;
        for (id, connection) in &self.connections {
            for (end, looked_at) in connection.interest(now, &self.switches) {
                if let Some((stream, flags)) = looked_at {
                    sources.push(Source::Connection(*id, end));
                    fds.push(PollFd::from_borrowed_fd(stream.as_fd(), flags));
                }
            }
            if let Some(at) = connection.wakes_at(now, &self.switches) {
                until = until.min(at);
            }
        }
        let timeout = Timespec::try_from(until - now).expect("a second or less");
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => panic!("poll of {} sockets: {errno}", fds.len()),
        }
        let ready = sources.iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty());
        ready.map(|(source, fd)| (*source, fd.revents())).collect()
    }

    fn accept(&mut self) {
        let Door::Open(listener) = &self.door else { return };
        // Errors here are the client's that has gone away again, or of a system without free descriptors: the next look
        // will show.
        let Ok((client, _)) = listener.accept() else { return };
        self.counters.accepted += 1;
        if self.connections.len() >= PROXY_CONNECTIONS_MAX {
            self.counters.too_many += 1;
            return;
        }
        let Ok(connection) = Connection::new(client, &self.switches) else {
            return;
        };
        if connection.is_silent() {
            self.counters.half_open += 1;
        }
        let id = self.accepted;
        self.accepted += 1;
        self.connections.insert(id, connection);
        self.begin(id);
    }

    fn begin(&mut self, id: u64) {
        let connection = self.connections.get_mut(&id).expect("its caller has it");
        if connection.begin(self.target, &self.switches).is_err() {
            self.counters.unreachable += 1;
            self.end(id, Fate::Reset);
        }
    }

    fn step(&mut self, id: u64, end: End, flags: PollFlags) {
        // It may have ended by what its other end did in the same round.
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let mut context = Context {
            now: Instant::now(),
            switches: &self.switches,
            rng: &mut self.rng,
            counters: &mut self.counters,
        };
        let fate = connection.ready(end, flags, &mut context);
        self.end(id, fate);
    }

    fn end(&mut self, id: u64, fate: Fate) {
        match fate {
            Fate::GoOn => {}
            Fate::Close => drop(self.connections.remove(&id)),
            Fate::Reset => {
                if let Some(connection) = self.connections.remove(&id) {
                    connection.reset();
                }
            }
        }
    }

    /// Whether this was the last order.
    fn obey_all(&mut self) -> bool {
        let mut count = [0; 8];
        // It says that it was woken; if that is already read, nothing is lost.
        let _ = rustix::io::read(&*self.waker, &mut count);
        while let Ok(Request { order, done }) = self.requests.try_recv() {
            let end = matches!(order, Order::End);
            let result = match order {
                Order::Set(fault) => self.set(fault),
                Order::Heal => self.heal(),
                Order::Count => Ok(()),
                Order::End => {
                    self.drop_all();
                    self.door = Door::None;
                    Ok(())
                }
            };
            self.show();
            // Whoever ordered it may have gone.
            let _ = done.send(result);
            if end {
                return true;
            }
        }
        false
    }

    fn set(&mut self, fault: Fault) -> io::Result<()> {
        self.switches.switch_on(fault);
        match fault {
            Fault::Drop => self.counters.dropped += self.drop_all(),
            Fault::Silence => {
                for connection in self.connections.values_mut().filter(|one| !one.is_silent()) {
                    connection.silence();
                    self.counters.silenced += 1;
                }
            }
            Fault::ResetAfter { bytes } => {
                for connection in self.connections.values_mut() {
                    connection.reset_after(Some(bytes));
                }
            }
            Fault::Refuse => return self.shut(),
            _ => {}
        }
        Ok(())
    }

    fn heal(&mut self) -> io::Result<()> {
        self.switches = Switches::default();
        let ids: Vec<u64> = self.connections.keys().copied().collect();
        for id in ids {
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.reset_after(None);
            }
            self.begin(id);
        }
        self.open()
    }

    fn drop_all(&mut self) -> u64 {
        let all = std::mem::take(&mut self.connections);
        let count = all.len() as u64;
        all.into_values().for_each(Connection::reset);
        count
    }

    fn shut(&mut self) -> io::Result<()> {
        if matches!(self.door, Door::Shut(_)) {
            return Ok(());
        }
        // The listener goes first: two sockets may share an address only while neither listens.
        self.door = Door::None;
        self.door = Door::Shut(bound(self.address)?);
        Ok(())
    }

    fn open(&mut self) -> io::Result<()> {
        let socket = match std::mem::replace(&mut self.door, Door::None) {
            Door::Open(listener) => {
                self.door = Door::Open(listener);
                return Ok(());
            }
            Door::Shut(socket) => socket,
            Door::None => bound(self.address)?,
        };
        listen(&socket, BACKLOG)?;
        self.door = Door::Open(TcpListener::from(socket));
        Ok(())
    }
}

fn bound(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &address)?;
    Ok(socket)
}
