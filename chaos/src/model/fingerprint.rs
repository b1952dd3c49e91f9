//! A quick hash of good quality for states. It need not resist anybody.

use std::hash::Hasher;

use crate::rng::mix;

/// An odd number without a pattern: the golden ratio.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// A hash under way.
#[derive(Clone, Copy)]
pub struct Fingerprint {
    sum: u64,
    held: u64,
    bytes: u32,
}

impl Fingerprint {
    /// Nothing hashed yet.
    pub fn new() -> Fingerprint {
        Fingerprint {
            sum: 0x243f_6a88_85a3_08d3,
            held: 0,
            bytes: 0,
        }
    }

    /// Two words at once.
    pub fn word(&mut self, words: (u64, u64)) {
        self.write_u64(words.0);
        self.write_u64(words.1);
    }

    fn absorb(&mut self, word: u64) {
        let product = u128::from(self.sum ^ word) * u128::from(FACTOR);
        self.sum = (product as u64 ^ (product >> 64) as u64).rotate_left(23) ^ word.wrapping_add(FACTOR);
    }
}

impl Default for Fingerprint {
    fn default() -> Fingerprint {
        Fingerprint::new()
    }
}

impl Hasher for Fingerprint {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u8(*byte);
        }
    }

    fn write_u8(&mut self, byte: u8) {
        self.held = self.held << 8 | u64::from(byte);
        self.bytes += 1;
        if self.bytes == 8 {
            let held = std::mem::take(&mut self.held);
            self.bytes = 0;
            self.absorb(held);
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.absorb(word);
    }

    fn write_usize(&mut self, word: usize) {
        self.absorb(word as u64);
    }

    fn write_isize(&mut self, word: isize) {
        self.absorb(word as u64);
    }

    fn finish(&self) -> u64 {
        let mut last = *self;
        last.absorb(self.held ^ u64::from(self.bytes) << 56);
        mix(last.sum)
    }
}
