//! What Raft reads: all of the log that is not compacted, in memory, and the last snapshot.

use raft::eraftpb::{ConfState, Entry, Snapshot};
use raft::{Error, GetEntriesContext, RaftState, Storage, StorageError};

use crate::log::Stored;

/// A mirror of the log store, kept in step by the owner.
#[derive(Clone, Debug)]
pub(super) struct Mirror {
    pub(super) stored: Stored,
    pub(super) conf_state: ConfState,
    /// Bytes of data of the entries.
    bytes: u64,
}

impl Mirror {
    pub(super) fn new(stored: Stored, conf_state: ConfState) -> Mirror {
        let bytes = stored.entries.iter().map(size).sum();
        Mirror {
            stored,
            conf_state,
            bytes,
        }
    }

    pub(super) fn append(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        let keep = (first.index - self.stored.truncated.0 - 1) as usize;
        assert!(keep <= self.stored.entries.len(), "a log without gaps");
        self.stored.entries.truncate(keep);
        self.stored.entries.extend_from_slice(entries);
        self.bytes = self.stored.entries.iter().map(size).sum();
    }

    pub(super) fn install(&mut self, snapshot: Snapshot) {
        self.stored.truncated = (snapshot.get_metadata().index, snapshot.get_metadata().term);
        self.conf_state = snapshot.get_metadata().get_conf_state().clone();
        self.stored.snapshot = snapshot;
        self.stored.entries.clear();
        self.bytes = 0;
    }

    pub(super) fn compact(&mut self, index: u64, term: u64) {
        let count = index.saturating_sub(self.stored.truncated.0) as usize;
        self.stored.entries.drain(..count);
        self.stored.truncated = (index, term);
        self.bytes = self.stored.entries.iter().map(size).sum();
    }

    pub(super) fn last(&self) -> u64 {
        self.stored.truncated.0 + self.stored.entries.len() as u64
    }

    /// Bytes of data of the entries that are kept.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    fn at(&self, index: u64) -> Option<&Entry> {
        let place = index.checked_sub(self.stored.truncated.0 + 1)?;
        self.stored.entries.get(place as usize)
    }
}

fn size(entry: &Entry) -> u64 {
    64 + (entry.data.len() + entry.context.len()) as u64
}

impl Storage for Mirror {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.stored.hard_state.clone(), self.conf_state.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.stored.truncated.0 {
            return Err(Error::Store(StorageError::Compacted));
        }
        assert!(
            high <= self.last() + 1,
            "entries up to {high} of a log that ends at {}",
            self.last()
        );
        let base = self.stored.truncated.0 + 1;
        let range = &self.stored.entries[(low - base) as usize..(high - base) as usize];
        let max_size = max_size.into().unwrap_or(u64::MAX);
        let mut total = 0;
        let within = |entry: &&Entry| {
            let first = total == 0;
            total += size(entry);
            first || total <= max_size
        };
        Ok(range.iter().take_while(within).cloned().collect())
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == self.stored.truncated.0 {
            return Ok(self.stored.truncated.1);
        }
        if index < self.stored.truncated.0 {
            return Err(Error::Store(StorageError::Compacted));
        }
        self.at(index)
            .map(|entry| entry.term)
            .ok_or(Error::Store(StorageError::Unavailable))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.stored.truncated.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, _to: u64) -> raft::Result<Snapshot> {
        let snapshot = &self.stored.snapshot;
        if snapshot.is_empty() || snapshot.get_metadata().index < request_index {
            return Err(Error::Store(StorageError::SnapshotTemporarilyUnavailable));
        }
        Ok(snapshot.clone())
    }
}
