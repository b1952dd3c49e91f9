//! What waits to be written to a socket: an ordered queue of pieces, written with vectored writes that may stop
//! anywhere. It never blocks and sets no bound itself; its owner stops taking work while too much is queued.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::Bytes;

/// The largest piece that is kept in the queue itself, without memory of its own: a frame's header.
pub const INLINE_BYTES_MAX: usize = 64;

enum Piece {
    Inline { bytes: [u8; INLINE_BYTES_MAX], length: u8 },
    Shared(Bytes),
}

impl Piece {
    fn as_slice(&self) -> &[u8] {
        match self {
            Piece::Inline { bytes, length } => &bytes[..usize::from(*length)],
            Piece::Shared(bytes) => bytes,
        }
    }
}

/// An ordered queue of bytes on their way out.
#[derive(Default)]
pub struct Outbox {
    pieces: VecDeque<Piece>,
    /// Bytes of the first piece that are written already.
    sent: usize,
    bytes: u64,
}

impl Outbox {
    /// Queues a copy of a few bytes: headers. Neighbours share a piece where they fit.
    pub fn push_small(&mut self, small: &[u8]) {
        if small.len() > INLINE_BYTES_MAX {
            return self.push(Bytes::copy_from_slice(small));
        }
        self.bytes += small.len() as u64;
        if let Some(Piece::Inline { bytes, length }) = self.pieces.back_mut() {
            let start = usize::from(*length);
            if let Some(room) = bytes.get_mut(start..start + small.len()) {
                room.copy_from_slice(small);
                *length += small.len() as u8;
                return;
            }
        }
        let mut bytes = [0; INLINE_BYTES_MAX];
        bytes[..small.len()].copy_from_slice(small);
        self.pieces.push_back(Piece::Inline {
            bytes,
            length: small.len() as u8,
        });
    }

    /// Queues bytes without a copy.
    pub fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.bytes += bytes.len() as u64;
            self.pieces.push_back(Piece::Shared(bytes));
        }
    }

    /// Nothing is left to write.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// How many bytes are left to write.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many pieces are left to write.
    pub fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// Points `slices` at what is to be written next, and returns how many of them it used.
    pub fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut used = 0;
        for (slot, piece) in slices.iter_mut().zip(&self.pieces) {
            let skip = if used == 0 { self.sent } else { 0 };
            *slot = IoSlice::new(&piece.as_slice()[skip..]);
            used += 1;
        }
        used
    }

    /// Takes `count` bytes, which were written, from the front.
    pub fn advance(&mut self, count: usize) {
        assert!(
            count as u64 <= self.bytes,
            "{count} bytes written, {} were queued",
            self.bytes
        );
        self.bytes -= count as u64;
        self.sent += count;
        while let Some(first) = self.pieces.front() {
            let length = first.as_slice().len();
            if self.sent < length {
                break;
            }
            self.sent -= length;
            self.pieces.pop_front();
        }
    }

    /// Forgets everything: the connection is gone.
    pub fn clear(&mut self) {
        *self = Outbox::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_pushed_comes_out_in_order_however_it_is_written(
            pieces in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..200)), 0..20),
            writes in prop::collection::vec(1usize..97, 1..9),
        ) {
            let mut outbox = Outbox::default();
            let mut expected = Vec::new();
            for (small, bytes) in &pieces {
                if *small { outbox.push_small(bytes) } else { outbox.push(Bytes::copy_from_slice(bytes)) }
                expected.extend_from_slice(bytes);
            }
            prop_assert_eq!(outbox.bytes(), expected.len() as u64);
            let mut got = Vec::new();
            for limit in writes.iter().cycle() {
                if outbox.is_empty() {
                    break;
                }
                let mut slices = [IoSlice::new(&[]); 3];
                let used = outbox.slices(&mut slices);
                let available: Vec<u8> = slices[..used].iter().flat_map(|s| s.to_vec()).collect();
                prop_assert!(!available.is_empty());
                let count = available.len().min(*limit);
                got.extend_from_slice(&available[..count]);
                outbox.advance(count);
            }
            prop_assert_eq!(got, expected);
            prop_assert_eq!(outbox.pieces(), 0);
        }
    }
}
