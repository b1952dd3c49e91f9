//! One direction of one connection: bytes that were read from one end and not yet written to the other.

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use super::super::limits::{PROXY_CHUNK_BYTES, PROXY_QUEUE_BYTES};
use super::switches::Switches;
use crate::rng::Rng;

/// What a chunk costs beside its bytes.
const CHUNK_OVERHEAD: usize = 128;
/// With a bandwidth, bytes are let go in portions of so much time.
const PORTION: Duration = Duration::from_millis(10);

#[derive(Debug)]
struct Chunk {
    due: Instant,
    bytes: Vec<u8>,
    written: usize,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Pipe {
    queue: VecDeque<Chunk>,
    queued: usize,
    /// Chunks don't overtake each other.
    last_due: Option<Instant>,
    /// With a bandwidth, when the next bytes may go.
    next_free: Option<Instant>,
    /// Bytes until the next one that is flipped, once that is drawn.
    next_flip: Option<u64>,
    /// The end it reads from has said that no more comes.
    ended: bool,
    /// The end it writes to knows that.
    told: bool,
}

/// What a step did.
#[derive(Default, Debug)]
pub(super) struct Moved {
    /// Bytes.
    pub(super) bytes: u64,
    /// Bytes that were changed.
    pub(super) flipped: u64,
    /// Bytes that have to wait.
    pub(super) delayed: u64,
}

impl Pipe {
    pub(super) fn new() -> Pipe {
        Pipe {
            queue: VecDeque::new(),
            queued: 0,
            last_due: None,
            next_free: None,
            next_flip: None,
            ended: false,
            told: false,
        }
    }

    pub(super) fn wants_to_read(&self) -> bool {
        !self.ended && self.queued < PROXY_QUEUE_BYTES
    }

    /// When it has something to write: now or later.
    pub(super) fn wants_to_write_at(&self, switches: &Switches) -> Option<Instant> {
        let due = self.queue.front()?.due;
        match self.next_free {
            Some(free) if switches.bytes_per_s.is_some() => Some(due.max(free)),
            _ => Some(due),
        }
    }

    /// Whether everything has gone through, and the other end knows.
    pub(super) fn is_done(&self) -> bool {
        self.told
    }

    /// Reads what is there, up to a chunk.
    pub(super) fn read(
        &mut self,
        mut from: &TcpStream,
        now: Instant,
        switches: &Switches,
        rng: &mut Rng,
    ) -> io::Result<Moved> {
        let mut moved = Moved::default();
        let mut bytes = vec![0; PROXY_CHUNK_BYTES];
        let read = match from.read(&mut bytes) {
            Ok(read) => read,
            Err(error) if is_idle(&error) => return Ok(moved),
            Err(error) => return Err(error),
        };
        if read == 0 {
            self.ended = true;
            return Ok(moved);
        }
        bytes.truncate(read);
        bytes.shrink_to_fit();
        moved.flipped = self.flip(&mut bytes, switches, rng);
        let wait = match switches.delay {
            Some((fixed, jitter)) => fixed + rng.span(Duration::ZERO, jitter),
            None => Duration::ZERO,
        };
        if !wait.is_zero() {
            moved.delayed = read as u64;
        }
        let due = (now + wait).max(self.last_due.unwrap_or(now));
        self.last_due = Some(due);
        self.queued += read + CHUNK_OVERHEAD;
        self.queue.push_back(Chunk { due, bytes, written: 0 });
        Ok(moved)
    }

    /// Writes what is due, `left` bytes at the most.
    pub(super) fn write(
        &mut self,
        mut to: &TcpStream,
        now: Instant,
        switches: &Switches,
        left: u64,
    ) -> io::Result<Moved> {
        let mut moved = Moved::default();
        while self.wants_to_write_at(switches).is_some_and(|at| at <= now) && moved.bytes < left {
            let chunk = self.queue.front_mut().expect("it has something to write");
            let rest = &chunk.bytes[chunk.written..];
            let mut portion = (rest.len() as u64).min(left - moved.bytes);
            if let Some(rate) = switches.bytes_per_s {
                portion = portion.min((rate / (1000 / PORTION.as_millis() as u64)).max(1));
            }
            let written = match to.write(&rest[..portion as usize]) {
                Ok(written) => written,
                Err(error) if is_idle(&error) => break,
                Err(error) => return Err(error),
            };
            chunk.written += written;
            moved.bytes += written as u64;
            if let Some(rate) = switches.bytes_per_s {
                // What was not used is not saved up.
                let from = self.next_free.unwrap_or(now).max(now);
                self.next_free = Some(from + Duration::from_secs_f64(written as f64 / rate as f64));
            }
            if chunk.written == chunk.bytes.len() {
                self.queued -= chunk.bytes.len() + CHUNK_OVERHEAD;
                self.queue.pop_front();
            }
        }
        if self.ended && self.queue.is_empty() && !self.told {
            self.told = true;
            // It fails when the other end is gone, and then there is nobody to tell.
            let _ = to.shutdown(Shutdown::Write);
        }
        Ok(moved)
    }

    fn flip(&mut self, bytes: &mut [u8], switches: &Switches, rng: &mut Rng) -> u64 {
        let Some(one_in) = switches.corrupt_one_in else {
            self.next_flip = None;
            return 0;
        };
        let mut draw = || rng.below(one_in.saturating_mul(2).saturating_sub(1).max(1));
        let mut next = self.next_flip.unwrap_or_else(&mut draw);
        let mut flipped = 0;
        let length = bytes.len() as u64;
        while next < length {
            let gap = draw();
            bytes[next as usize] ^= 1 << (gap % 8);
            flipped += 1;
            next += 1 + gap;
        }
        self.next_flip = Some(next - length);
        flipped
    }
}

fn is_idle(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
