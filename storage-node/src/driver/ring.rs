//! The io_uring of a device: what is in flight, and who owns its memory meanwhile.
//!
//! All of the crate's `unsafe` is here. The argument is always the same: every address that the kernel is given points
//! into memory that an entry of the in-flight table owns, that memory does not move while the entry is in the table (it
//! is on the heap, behind a `Vec`, `Box` or `Bytes` that is not touched), every file descriptor is kept open by the
//! entry, and the entry leaves the table only when the kernel has said that the operation is over. If the ring goes away
//! before that, the table is leaked.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::disk::{DeviceBlock, DiskDone, DiskError, DiskOp, DiskToken};
use cairn_proto::limits::BLOCK_BYTES;
use io_uring::{IoUring, opcode, squeue, types};
use slab::Slab;

use super::budget::BudgetBuf;
use super::limits::{RING_COMPLETIONS, RING_ENTRIES};
use crate::host::ConnId;

const EIO: i32 = 5;
const EINTR: i32 = 4;
const EAGAIN: i32 = 11;
const EBUSY: i32 = 16;
const ETIME: i32 = 62;
/// The offset of a read or write on something that has no place, as a socket.
const NO_OFFSET: u64 = u64::MAX;

/// A piece of memory as the kernel wants it told: the layout of `struct iovec`.
#[repr(C)]
#[derive(Clone, Copy)]
struct IoVec {
    base: *mut u8,
    len: usize,
}

impl IoVec {
    /// To be written from only.
    fn of(bytes: &[u8]) -> IoVec {
        IoVec {
            base: bytes.as_ptr().cast_mut(),
            len: bytes.len(),
        }
    }

    fn of_mut(bytes: &mut [u8]) -> IoVec {
        IoVec {
            base: bytes.as_mut_ptr(),
            len: bytes.len(),
        }
    }
}

/// Where a connection's bytes go: first what is missing of a frame's data part, then the stage.
#[derive(Debug)]
pub(super) struct ReceiveBufs {
    /// The data part of a frame that has begun, and how much of it is there.
    pub(super) data: Option<(BudgetBuf, usize)>,
    /// Everything else.
    pub(super) stage: Box<[u8]>,
    /// Bytes of the stage that are there: `stage[..filled]`.
    pub(super) filled: usize,
}

/// What the in-flight table owns.
enum InFlight {
    Read {
        token: DiskToken,
        file: Rc<OwnedFd>,
        at: u64,
        buf: BlockBuf,
        done: usize,
    },
    Write {
        token: DiskToken,
        file: Rc<OwnedFd>,
        at: u64,
        buffers: Vec<Bytes>,
        vectors: Vec<IoVec>,
        left: usize,
        /// Durable when it ends.
        durable: bool,
    },
    Flush {
        token: DiskToken,
        _file: Rc<OwnedFd>,
    },
    Receive {
        conn: ConnId,
        _socket: Rc<OwnedFd>,
        bufs: ReceiveBufs,
        _vectors: Box<[IoVec; 2]>,
    },
    Send {
        conn: ConnId,
        _socket: Rc<OwnedFd>,
        _pieces: Vec<Bytes>,
        _vectors: Vec<IoVec>,
    },
    Accept {
        _listener: Rc<OwnedFd>,
    },
    Wake {
        _event: Rc<OwnedFd>,
        _value: Box<[u8; 8]>,
    },
}

/// Something has ended.
pub(super) enum Completion {
    /// An operation of the device.
    Disk(DiskDone),
    /// So many bytes came in; zero at the end of the stream.
    Received(ConnId, ReceiveBufs, io::Result<usize>),
    /// So many bytes went out.
    Sent(ConnId, io::Result<usize>),
    /// Somebody has connected.
    Accepted(io::Result<OwnedFd>),
    /// The control thread has something to say.
    Woken,
}

/// An io_uring with its in-flight table.
pub(super) struct Ring {
    ring: IoUring,
    in_flight: Slab<InFlight>,
    /// Entries that the submission queue had no room for.
    overflow: VecDeque<squeue::Entry>,
    /// Calls of `io_uring_enter`.
    enters: u64,
}

impl Ring {
    /// A new ring, to be used by this thread only.
    pub(super) fn new() -> io::Result<Ring> {
        // Kernels before 6.1 do not know the second flag: then without it.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_cqsize(RING_COMPLETIONS)
            .build(RING_ENTRIES)
            .or_else(|_| IoUring::builder().setup_cqsize(RING_COMPLETIONS).build(RING_ENTRIES))?;
        Ok(Ring {
            ring,
            in_flight: Slab::with_capacity(64),
            overflow: VecDeque::new(),
            enters: 0,
        })
    }

    /// How often the kernel was called, with `io_uring_enter`.
    pub(super) fn enters(&self) -> u64 {
        self.enters
    }

    /// Operations that have not ended.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Gives an operation to the device.
    pub(super) fn disk(&mut self, file: &Rc<OwnedFd>, op: DiskOp) {
        let file = file.clone();
        let byte = |at: DeviceBlock| at.0 * BLOCK_BYTES as u64;
        match op {
            DiskOp::Read { token, at, blocks } => {
                let buf = BlockBuf::to_be_filled(blocks as usize);
                let at = byte(at);
                let done = 0;
                self.start(InFlight::Read {
                    token,
                    file,
                    at,
                    buf,
                    done,
                });
            }
            DiskOp::Write {
                token,
                at,
                buffers,
                durable,
            } => self.write(file, token, at, buffers, durable),
            DiskOp::Flush { token } => self.start(InFlight::Flush { token, _file: file }),
        }
    }

    fn write(&mut self, file: Rc<OwnedFd>, token: DiskToken, at: DeviceBlock, buffers: Vec<Bytes>, durable: bool) {
        let vectors = buffers.iter().map(|bytes| IoVec::of(bytes)).collect();
        let left = buffers.iter().map(Bytes::len).sum();
        let at = at.0 * BLOCK_BYTES as u64;
        self.start(InFlight::Write {
            token,
            file,
            at,
            buffers,
            vectors,
            left,
            durable,
        });
    }

    /// Receives on a connection. There must be room in the buffers.
    pub(super) fn receive(&mut self, conn: ConnId, socket: &Rc<OwnedFd>, mut bufs: ReceiveBufs) {
        let data = match &mut bufs.data {
            Some((buf, filled)) => IoVec::of_mut(&mut buf[*filled..]),
            None => IoVec::of_mut(&mut []),
        };
        let vectors = Box::new([data, IoVec::of_mut(&mut bufs.stage[bufs.filled..])]);
        assert!(vectors[0].len + vectors[1].len > 0, "no room to receive into");
        self.start(InFlight::Receive {
            conn,
            _socket: socket.clone(),
            bufs,
            _vectors: vectors,
        });
    }

    /// Sends pieces of memory, one after the other.
    pub(super) fn send(&mut self, conn: ConnId, socket: &Rc<OwnedFd>, pieces: Vec<Bytes>) {
        let vectors = pieces.iter().map(|bytes| IoVec::of(bytes)).collect();
        self.start(InFlight::Send {
            conn,
            _socket: socket.clone(),
            _pieces: pieces,
            _vectors: vectors,
        });
    }

    /// Waits for a connection.
    pub(super) fn accept(&mut self, listener: &Rc<OwnedFd>) {
        self.start(InFlight::Accept {
            _listener: listener.clone(),
        });
    }

    /// Waits for an eventfd.
    pub(super) fn wait_for(&mut self, event: &Rc<OwnedFd>) {
        self.start(InFlight::Wake {
            _event: event.clone(),
            _value: Box::default(),
        });
    }

    fn start(&mut self, operation: InFlight) {
        let key = self.in_flight.insert(operation);
        self.submit_entry(key);
    }

    /// Queues the entry of an operation that is in the table.
    fn submit_entry(&mut self, key: usize) {
        let entry = entry_of(&mut self.in_flight[key]).user_data(key as u64);
        if !self.overflow.is_empty() || !self.push(&entry) {
            self.overflow.push_back(entry);
        }
    }

    fn push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: every address in the entry points into memory, and every descriptor is one, that the entry of the
        // in-flight table named by its user data owns, and that one stays until the kernel completes the operation.
        unsafe { self.ring.submission().push(entry) }.is_ok()
    }

    /// Gives the kernel what is queued, and waits until something has ended or so much time has passed.
    pub(super) fn submit_and_wait(&mut self, timeout: Duration) -> io::Result<()> {
        let timespec = types::Timespec::new()
            .sec(timeout.as_secs())
            .nsec(timeout.subsec_nanos());
        let args = types::SubmitArgs::new().timespec(&timespec);
        loop {
            while let Some(entry) = self.overflow.pop_front() {
                if !self.push(&entry) {
                    self.overflow.push_front(entry);
                    break;
                }
            }
            self.enters += 1;
            if !self.overflow.is_empty() {
                // More than one queue full: hand over without waiting.
                match self.ring.submit() {
                    Ok(_) => continue,
                    Err(error) if is_passing(&error) => return Ok(()),
                    Err(error) => return Err(error),
                }
            }
            return match self.ring.submitter().submit_with_args(1, &args) {
                Ok(_) => Ok(()),
                Err(error) if is_passing(&error) => Ok(()),
                Err(error) => Err(error),
            };
        }
    }

    /// What has ended next.
    pub(super) fn completion(&mut self) -> Option<Completion> {
        loop {
            let entry = self.ring.completion().next()?;
            let key = usize::try_from(entry.user_data()).expect("it was a key of the table");
            let result = match entry.result() {
                result if result < 0 => Err(-result),
                result => Ok(result as usize),
            };
            if self.goes_on(key, &result) {
                self.submit_entry(key);
                continue;
            }
            let operation = self.in_flight.remove(key);
            return Some(ended(operation, result));
        }
    }

    /// Whether only a part of an operation is done and the rest is to be asked for.
    fn goes_on(&mut self, key: usize, result: &Result<usize, i32>) -> bool {
        let operation = &mut self.in_flight[key];
        if matches!(result, Err(errno) if matches!(*errno, EINTR | EAGAIN)) {
            return true;
        }
        match (operation, result) {
            (InFlight::Read { buf, done, .. }, Ok(count)) if *count > 0 => {
                *done += count;
                *done < buf.len()
            }
            (
                InFlight::Write {
                    at,
                    buffers,
                    vectors,
                    left,
                    ..
                },
                Ok(count),
            ) if *count > 0 => {
                *left -= count;
                *at += *count as u64;
                advance(buffers, *count);
                *vectors = buffers.iter().map(|bytes| IoVec::of(bytes)).collect();
                *left > 0
            }
            _ => false,
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // What is still in flight may be written to by the kernel after the ring is closed: its memory is given up.
        if !self.in_flight.is_empty() {
            tracing::debug!(operations = self.in_flight.len(), "leaving operations in flight");
            std::mem::forget(std::mem::take(&mut self.in_flight));
        }
    }
}

/// The kernel could not wait or take more right now.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(ETIME | EINTR | EAGAIN | EBUSY))
}

/// Takes bytes that are written from the front.
fn advance(buffers: &mut Vec<Bytes>, mut count: usize) {
    let whole = buffers
        .iter()
        .take_while(|bytes| {
            let fits = bytes.len() <= count;
            if fits {
                count -= bytes.len();
            }
            fits
        })
        .count();
    buffers.drain(..whole);
    if count > 0 {
        let _ = buffers[0].split_to(count);
    }
}

/// The submission entry of an operation, with addresses into what the operation owns.
fn entry_of(operation: &mut InFlight) -> squeue::Entry {
    let fd = |fd: &Rc<OwnedFd>| types::Fd(fd.as_raw_fd());
    match operation {
        InFlight::Read {
            file, at, buf, done, ..
        } => {
            let rest = &mut buf[*done..];
            let length = u32::try_from(rest.len()).expect("a read is bounded");
            opcode::Read::new(fd(file), rest.as_mut_ptr(), length)
                .offset(*at + *done as u64)
                .build()
        }
        InFlight::Write {
            file,
            at,
            vectors,
            durable,
            ..
        } => {
            let count = u32::try_from(vectors.len()).expect("a write is bounded");
            opcode::Writev::new(fd(file), vectors.as_ptr().cast(), count)
                .offset(*at)
                .rw_flags(if *durable { RWF_DSYNC } else { 0 })
                .build()
        }
        InFlight::Flush { _file, .. } => opcode::Fsync::new(fd(_file)).flags(types::FsyncFlags::DATASYNC).build(),
        InFlight::Receive { _socket, _vectors, .. } => opcode::Readv::new(fd(_socket), _vectors.as_ptr().cast(), 2)
            .offset(NO_OFFSET)
            .build(),
        InFlight::Send { _socket, _vectors, .. } => {
            let count = u32::try_from(_vectors.len()).expect("a send is bounded");
            opcode::Writev::new(fd(_socket), _vectors.as_ptr().cast(), count)
                .offset(NO_OFFSET)
                .build()
        }
        InFlight::Accept { _listener } => {
            opcode::Accept::new(fd(_listener), std::ptr::null_mut(), std::ptr::null_mut())
                .flags(CLOEXEC)
                .build()
        }
        InFlight::Wake { _event, _value } => opcode::Read::new(fd(_event), _value.as_mut_ptr(), 8)
            .offset(NO_OFFSET)
            .build(),
    }
}

/// `RWF_DSYNC`: as if the file were open with `O_DSYNC`.
const RWF_DSYNC: i32 = 2;
/// `SOCK_CLOEXEC`.
const CLOEXEC: i32 = 0o2000000;

fn ended(operation: InFlight, result: Result<usize, i32>) -> Completion {
    let io_result = |result: Result<usize, i32>| result.map_err(io::Error::from_raw_os_error);
    let disk = |token, result: Result<Bytes, i32>| {
        let result = result.map_err(|errno| DiskError { errno });
        Completion::Disk(DiskDone { token, result })
    };
    match operation {
        InFlight::Read { token, buf, done, .. } => match result {
            Ok(_) if done == buf.len() => disk(token, Ok(buf.freeze())),
            // It ends before the device does: the file was cut.
            Ok(_) => disk(token, Err(EIO)),
            Err(errno) => disk(token, Err(errno)),
        },
        InFlight::Write { token, left, .. } => match result {
            Ok(_) if left == 0 => disk(token, Ok(Bytes::new())),
            Ok(_) => disk(token, Err(EIO)),
            Err(errno) => disk(token, Err(errno)),
        },
        InFlight::Flush { token, .. } => disk(token, result.map(|_| Bytes::new())),
        InFlight::Receive { conn, bufs, .. } => Completion::Received(conn, bufs, io_result(result)),
        InFlight::Send { conn, .. } => Completion::Sent(conn, io_result(result)),
        InFlight::Accept { .. } => {
            // SAFETY: a successful accept returns a new descriptor that nobody else has.
            let socket = |fd: usize| unsafe { OwnedFd::from_raw_fd(fd as i32) };
            Completion::Accepted(io_result(result).map(socket))
        }
        InFlight::Wake { .. } => Completion::Woken,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait(ring: &mut Ring) -> Completion {
        for _ in 0..100 {
            if let Some(completion) = ring.completion() {
                return completion;
            }
            ring.submit_and_wait(Duration::from_millis(100)).unwrap();
        }
        panic!("nothing has ended");
    }

    fn disk(ring: &mut Ring) -> Result<Bytes, DiskError> {
        match wait(ring) {
            Completion::Disk(done) => done.result,
            _ => panic!("something else has ended"),
        }
    }

    #[test]
    fn what_is_written_is_read_and_the_end_of_a_file_is_an_error() {
        let file = Rc::new(OwnedFd::from(tempfile::tempfile().unwrap()));
        let mut ring = Ring::new().unwrap();
        let token = DiskToken(1);
        let buffers = vec![
            BlockBuf::copied_from(&[1; BLOCK_BYTES]).freeze(),
            BlockBuf::copied_from(&[2; 2 * BLOCK_BYTES]).freeze(),
        ];
        let at = DeviceBlock(5);
        ring.disk(
            &file,
            DiskOp::Write {
                token,
                at,
                buffers,
                durable: false,
            },
        );
        disk(&mut ring).unwrap();
        ring.disk(&file, DiskOp::Flush { token });
        disk(&mut ring).unwrap();
        ring.disk(&file, DiskOp::Read { token, at, blocks: 3 });
        let read = disk(&mut ring).unwrap();
        assert_eq!((read[0], read[BLOCK_BYTES], read.len()), (1, 2, 3 * BLOCK_BYTES));
        ring.disk(&file, DiskOp::Read { token, at, blocks: 4 });
        assert_eq!(disk(&mut ring).unwrap_err().errno, EIO);
        assert_eq!(ring.in_flight(), 0);
    }

    #[test]
    fn more_than_the_queue_holds_is_kept() {
        let file = Rc::new(OwnedFd::from(tempfile::tempfile().unwrap()));
        let mut ring = Ring::new().unwrap();
        let count = u64::from(RING_ENTRIES) * 3;
        for i in 0..count {
            let (token, at) = (DiskToken(i), DeviceBlock(i));
            let buffers = vec![BlockBuf::copied_from(&i.to_le_bytes()).freeze()];
            ring.disk(
                &file,
                DiskOp::Write {
                    token,
                    at,
                    buffers,
                    durable: false,
                },
            );
        }
        for _ in 0..count {
            disk(&mut ring).unwrap();
        }
        let calls = ring.enters();
        assert!(
            (3..=count).contains(&calls),
            "{calls} calls for three queues of operations"
        );
    }

    #[test]
    fn writes_that_stop_anywhere_go_on_from_there() {
        let piece = |length| Bytes::from(vec![0; length]);
        let mut pieces = vec![piece(3), piece(4), piece(5)];
        advance(&mut pieces, 5);
        assert_eq!(pieces.iter().map(Bytes::len).collect::<Vec<_>>(), [2, 5]);
        advance(&mut pieces, 7);
        assert!(pieces.is_empty());
    }
}
