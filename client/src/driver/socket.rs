//! Non-blocking stream sockets of either kind.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use mio::event::Source;
use mio::net::{TcpStream, UnixStream};
use mio::{Interest, Registry, Token};

use super::limits::SLICES_MAX;
use crate::outbox::Outbox;

/// A connected socket.
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// What one read gave.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ReadOutcome {
    /// So many bytes; there may be more.
    Bytes(usize),
    /// So many bytes, and then nothing for now.
    BytesThenNothing(usize),
    /// Nothing for now.
    Nothing,
    /// The other side will send no more.
    End,
}

impl Stream {
    /// Reads into the two in turn, which together are not empty.
    pub(super) fn read_into(&mut self, first: &mut [u8], second: &mut [u8]) -> io::Result<ReadOutcome> {
        let room = first.len() + second.len();
        assert!(room > 0, "a read needs room");
        let mut slices = [IoSliceMut::new(first), IoSliceMut::new(second)];
        let slices = if slices[0].is_empty() {
            &mut slices[1..]
        } else {
            &mut slices[..]
        };
        loop {
            let result = match self {
                Stream::Tcp(stream) => stream.read_vectored(slices),
                Stream::Unix(stream) => stream.read_vectored(slices),
            };
            return match result {
                Ok(0) => Ok(ReadOutcome::End),
                Ok(count) if count == room => Ok(ReadOutcome::Bytes(count)),
                Ok(count) => Ok(ReadOutcome::BytesThenNothing(count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(ReadOutcome::Nothing),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
        }
    }

    /// Writes as much as the socket takes. Gives whether it takes more.
    pub(super) fn write_from(&mut self, outbox: &mut Outbox) -> io::Result<bool> {
        while !outbox.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let used = outbox.slices(&mut slices);
            let result = match self {
                Stream::Tcp(stream) => stream.write_vectored(&slices[..used]),
                Stream::Unix(stream) => stream.write_vectored(&slices[..used]),
            };
            match result {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => outbox.advance(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Tcp(stream) => stream.as_fd(),
            Stream::Unix(stream) => stream.as_fd(),
        }
    }
}

impl Source for Stream {
    fn register(&mut self, registry: &Registry, token: Token, interests: Interest) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.register(registry, token, interests),
            Stream::Unix(stream) => stream.register(registry, token, interests),
        }
    }

    fn reregister(&mut self, registry: &Registry, token: Token, interests: Interest) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.reregister(registry, token, interests),
            Stream::Unix(stream) => stream.reregister(registry, token, interests),
        }
    }

    fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.deregister(registry),
            Stream::Unix(stream) => stream.deregister(registry),
        }
    }
}

/// What the kernel last said of a socket that reports changes only.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Readiness {
    pub(super) readable: bool,
    pub(super) writable: bool,
    /// The other side has closed: a short read is not the end of what there is to see.
    pub(super) closed: bool,
    /// It waits in the list of sockets to be served.
    pub(super) queued: bool,
}

impl Readiness {
    pub(super) fn note(&mut self, event: &mio::event::Event) {
        self.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
        self.writable |= event.is_writable() || event.is_write_closed() || event.is_error();
        self.closed |= event.is_read_closed() || event.is_error();
    }

    /// After a read: whether another one is worth it.
    pub(super) fn after_read(&mut self, outcome: ReadOutcome) -> bool {
        self.readable = match outcome {
            ReadOutcome::Bytes(_) => true,
            ReadOutcome::BytesThenNothing(_) => self.closed,
            ReadOutcome::Nothing | ReadOutcome::End => false,
        };
        self.readable
    }
}
