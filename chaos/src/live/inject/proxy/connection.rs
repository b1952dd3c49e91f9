//! One connection through the proxy: its two ends, and a pipe each way.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};

use super::Counters;
use super::fault::Direction;
use super::pipe::Pipe;
use super::switches::Switches;
use crate::rng::Rng;

/// Its end at the target.
#[derive(Debug)]
enum Target {
    /// It is not made: the connection is half open, or the target's end is gone.
    None,
    /// It is made once something can pass.
    Later,
    Connecting(TcpStream),
    Connected(TcpStream),
}

/// Which end of a connection a socket is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum End {
    Client,
    Target,
}

/// What is to become of a connection after a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fate {
    GoOn,
    /// Both ends have said goodbye, and know it.
    Close,
    /// Both ends get a reset.
    Reset,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Connection {
    client: Option<TcpStream>,
    target: Target,
    up: Pipe,
    down: Pipe,
    /// Nothing is forwarded ever again.
    silent: bool,
    /// Bytes until it is reset.
    reset_left: Option<u64>,
}

/// What a connection's step may use.
pub(super) struct Context<'a> {
    pub(super) now: Instant,
    pub(super) switches: &'a Switches,
    pub(super) rng: &'a mut Rng,
    pub(super) counters: &'a mut Counters,
}

impl Connection {
    /// Of a client that was just accepted.
    pub(super) fn new(client: TcpStream, switches: &Switches) -> io::Result<Connection> {
        client.set_nonblocking(true)?;
        client.set_nodelay(true)?;
        Ok(Connection {
            client: Some(client),
            target: if switches.half_open {
                Target::None
            } else {
                Target::Later
            },
            up: Pipe::new(),
            down: Pipe::new(),
            silent: switches.half_open,
            reset_left: switches.reset_after,
        })
    }

    /// Nothing is forwarded from now on.
    pub(super) fn silence(&mut self) {
        self.silent = true;
    }

    pub(super) fn is_silent(&self) -> bool {
        self.silent
    }

    /// Counts the bytes until a reset anew, or not at all.
    pub(super) fn reset_after(&mut self, bytes: Option<u64>) {
        self.reset_left = bytes;
    }

    /// Begins to connect to the target, if that is to be done now.
    pub(super) fn begin(&mut self, target: SocketAddr, switches: &Switches) -> io::Result<()> {
        if !matches!(self.target, Target::Later) || switches.black_hole || self.silent {
            return Ok(());
        }
        let family = match target {
            SocketAddr::V4(_) => AddressFamily::INET,
            SocketAddr::V6(_) => AddressFamily::INET6,
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(family, SocketType::STREAM, flags, None)?;
        match connect(&socket, &target) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(errno) => return Err(errno.into()),
        }
        let stream = TcpStream::from(socket);
        stream.set_nodelay(true)?;
        self.target = Target::Connecting(stream);
        Ok(())
    }

    /// The sockets to look at, and for what.
    pub(super) fn interest(&self, now: Instant, switches: &Switches) -> [(End, Option<(&TcpStream, PollFlags)>); 2] {
        let client = self.client.as_ref();
        let target = match &self.target {
            Target::None | Target::Later => None,
            Target::Connecting(stream) | Target::Connected(stream) => Some(stream),
        };
        let look = |stream, flags: PollFlags| match stream {
            // A socket without interest is left out: its hang-up would be told over and over.
            Some(stream) if !flags.is_empty() => Some((stream, flags)),
            _ => None,
        };
        if self.silent {
            return [
                (End::Client, look(client, PollFlags::RDHUP)),
                (End::Target, look(target, PollFlags::RDHUP)),
            ];
        }
        let connected = matches!(self.target, Target::Connected(_));
        let [mut of_client, mut of_target] = [PollFlags::empty(); 2];
        if matches!(self.target, Target::Connecting(_)) {
            of_target |= PollFlags::OUT;
        }
        for (direction, pipe) in [(Direction::ToTarget, &self.up), (Direction::ToClient, &self.down)] {
            if !switches.passes(direction) {
                continue;
            }
            let (from, to) = match direction {
                Direction::ToTarget => (&mut of_client, &mut of_target),
                Direction::ToClient => (&mut of_target, &mut of_client),
            };
            if pipe.wants_to_read() && (connected || direction == Direction::ToTarget) {
                *from |= PollFlags::IN;
            }
            if connected && pipe.wants_to_write_at(switches).is_some_and(|at| at <= now) {
                *to |= PollFlags::OUT;
            }
        }
        [
            (End::Client, look(client, of_client)),
            (End::Target, look(target, of_target)),
        ]
    }

    /// When something is to be written that can't be yet.
    pub(super) fn wakes_at(&self, now: Instant, switches: &Switches) -> Option<Instant> {
        if self.silent || !matches!(self.target, Target::Connected(_)) {
            return None;
        }
        let pipes = [(Direction::ToTarget, &self.up), (Direction::ToClient, &self.down)];
        let moments = pipes
            .into_iter()
            .filter(|(direction, _)| switches.passes(*direction))
            .filter_map(|(_, pipe)| pipe.wants_to_write_at(switches))
            .filter(|at| *at > now);
        moments.min()
    }

    /// Something can be done at this end.
    pub(super) fn ready(&mut self, end: End, flags: PollFlags, context: &mut Context<'_>) -> Fate {
        if self.silent {
            return self.hung_up(end);
        }
        if let Target::Connecting(_) = self.target {
            if end == End::Target {
                return self.connected(context.counters);
            }
        } else if let Err(fate) = self
            .write(Direction::ToTarget, context)
            .and_then(|()| self.write(Direction::ToClient, context))
        {
            return fate;
        }
        let readable = flags.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR | PollFlags::RDHUP);
        let direction = match end {
            End::Client => Direction::ToTarget,
            End::Target => Direction::ToClient,
        };
        if readable && context.switches.passes(direction) {
            let moved = self
                .read(direction, context)
                .and_then(|()| self.write(direction, context));
            if let Err(fate) = moved {
                return fate;
            }
        }
        if self.up.is_done() && self.down.is_done() {
            Fate::Close
        } else {
            Fate::GoOn
        }
    }

    /// Of a silent connection an end is gone. The other one is not told.
    fn hung_up(&mut self, end: End) -> Fate {
        match end {
            End::Client => self.client = None,
            End::Target => self.target = Target::None,
        }
        match (&self.client, &self.target) {
            (None, Target::None | Target::Later) => Fate::Close,
            _ => Fate::GoOn,
        }
    }

    fn connected(&mut self, counters: &mut Counters) -> Fate {
        match std::mem::replace(&mut self.target, Target::None) {
            Target::Connecting(stream) => match stream.take_error() {
                Ok(None) => {
                    self.target = Target::Connected(stream);
                    Fate::GoOn
                }
                Ok(Some(_)) | Err(_) => {
                    counters.unreachable += 1;
                    Fate::Reset
                }
            },
            other => {
                self.target = other;
                Fate::GoOn
            }
        }
    }

    fn read(&mut self, direction: Direction, context: &mut Context<'_>) -> Result<(), Fate> {
        let (pipe, from) = match (direction, &self.client, &self.target) {
            (Direction::ToTarget, Some(client), _) => (&mut self.up, client),
            (Direction::ToClient, _, Target::Connected(target)) => (&mut self.down, target),
            _ => return Ok(()),
        };
        if !pipe.wants_to_read() {
            return Ok(());
        }
        let moved = pipe
            .read(from, context.now, context.switches, context.rng)
            .map_err(|_| Fate::Reset)?;
        context.counters.corrupted += moved.flipped;
        context.counters.delayed += moved.delayed;
        Ok(())
    }

    fn write(&mut self, direction: Direction, context: &mut Context<'_>) -> Result<(), Fate> {
        if !context.switches.passes(direction) {
            return Ok(());
        }
        let (Some(client), Target::Connected(target)) = (&self.client, &self.target) else {
            return Ok(());
        };
        let (pipe, to, count) = match direction {
            Direction::ToTarget => (&mut self.up, target, &mut context.counters.to_target),
            Direction::ToClient => (&mut self.down, client, &mut context.counters.to_client),
        };
        let left = self.reset_left.unwrap_or(u64::MAX);
        let due = pipe
            .wants_to_write_at(context.switches)
            .is_some_and(|at| at <= context.now);
        if left == 0 && due {
            context.counters.resets += 1;
            return Err(Fate::Reset);
        }
        let moved = pipe
            .write(to, context.now, context.switches, left)
            .map_err(|_| Fate::Reset)?;
        *count += moved.bytes;
        if self.reset_left.is_some() {
            self.reset_left = Some(left - moved.bytes);
            if left == moved.bytes && moved.bytes > 0 {
                context.counters.resets += 1;
                return Err(Fate::Reset);
            }
        }
        Ok(())
    }

    /// Ends it in such a way that both ends see a reset, not an orderly end.
    pub(super) fn reset(self) {
        let target = match self.target {
            Target::Connecting(stream) | Target::Connected(stream) => Some(stream),
            Target::None | Target::Later => None,
        };
        for stream in self.client.into_iter().chain(target) {
            // It fails only if the connection has ended already.
            let _ = sockopt::set_socket_linger(&stream, Some(std::time::Duration::ZERO));
        }
    }
}
