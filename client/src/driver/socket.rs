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

/// System calls of the driver's thread. Plain numbers, told to the metrics now and then, so that counting costs an I/O nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Calls {
    /// Of `epoll_wait`.
    pub(super) epoll_wait: u64,
    /// Of `readv`.
    pub(super) readv: u64,
    /// Of `writev`.
    pub(super) writev: u64,
}

impl Stream {
    /// Reads into the two in turn, which together are not empty.
    pub(super) fn read_into(
        &mut self,
        first: &mut [u8],
        second: &mut [u8],
        calls: &mut Calls,
    ) -> io::Result<ReadOutcome> {
        let room = first.len() + second.len();
        assert!(room > 0, "a read needs room");
        let mut slices = [IoSliceMut::new(first), IoSliceMut::new(second)];
        let slices = if slices[0].is_empty() {
            &mut slices[1..]
        } else {
            &mut slices[..]
        };
        loop {
            calls.readv += 1;
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
    pub(super) fn write_from(&mut self, outbox: &mut Outbox, calls: &mut Calls) -> io::Result<bool> {
        while !outbox.is_empty() {
            calls.writev += 1;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_of_the_kernel_are_counted_however_they_end() {
        let (mine, mut peer) = UnixStream::pair().unwrap();
        let (mut stream, mut outbox, mut calls) = (Stream::Unix(mine), Outbox::default(), Calls::default());
        assert!(stream.write_from(&mut outbox, &mut calls).unwrap());
        assert_eq!(calls, Calls::default(), "nothing was to be written");
        outbox.push(vec![1; 8].into());
        outbox.push(vec![2; 8].into());
        assert!(stream.write_from(&mut outbox, &mut calls).unwrap());
        peer.write_all(&[3; 8]).unwrap();
        let mut buf = [0; 16];
        for outcome in [ReadOutcome::BytesThenNothing(8), ReadOutcome::Nothing] {
            assert_eq!(stream.read_into(&mut buf, &mut [], &mut calls).unwrap(), outcome);
        }
        let (epoll_wait, readv, writev) = (0, 2, 1);
        let expected = Calls {
            epoll_wait,
            readv,
            writev,
        };
        assert_eq!(calls, expected);
    }
}
