//! Superblock copies that were found damaged are written anew once the store is open. The good copies are not touched, so
//! a power cut meanwhile leaves no fewer of them than there were.

use bytes::Bytes;

use super::engine::{Engine, Purpose};

/// Copies to be written.
#[derive(Debug, Default)]
pub(super) struct Mends {
    waiting: Vec<(u32, Bytes)>,
    in_flight: usize,
    /// Written and not flushed yet.
    written: u64,
}

impl Mends {
    /// What stands at each place should be this.
    pub(super) fn new(waiting: Vec<(u32, Bytes)>) -> Mends {
        Mends {
            waiting,
            ..Mends::default()
        }
    }

    /// What stands at a place should be this.
    pub(super) fn add(&mut self, place: u32, block: Bytes) {
        self.waiting.push((place, block));
    }
}

impl Engine {
    pub(super) fn pump_mends(&mut self) {
        if !self.opened || self.poisoned.is_some() {
            return;
        }
        for (place, block) in std::mem::take(&mut self.mends.waiting) {
            self.mends.in_flight += 1;
            self.write(Purpose::Mend, place, vec![block]);
        }
    }

    /// A copy that can't be written is no reason to stop: others are good, and nothing was promised about it.
    pub(super) fn mend_done(&mut self, written: bool) {
        self.mends.in_flight -= 1;
        self.mends.written += u64::from(written);
        if self.mends.in_flight > 0 || self.mends.written == 0 || self.poisoned.is_some() {
            return;
        }
        if self.geometry.volatile_cache {
            self.flush(Purpose::MendFlush);
        } else {
            self.mends_durable();
        }
    }

    pub(super) fn mends_durable(&mut self) {
        self.io.counters.superblocks_mended += std::mem::take(&mut self.mends.written);
    }
}
