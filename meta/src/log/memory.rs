//! A log store in memory, for the simulator: it can lose what was not flushed, and refuse to flush.

use raft::eraftpb::{Entry, HardState, Snapshot};

use crate::log::{LogError, LogStore, Stored};

/// A write that has not been flushed.
#[derive(Clone, Debug)]
enum Write {
    Log(Vec<Entry>, Option<HardState>),
    Compact(u64, u64),
}

/// A log store in memory.
#[derive(Clone, Debug, Default)]
pub struct MemoryLogStore {
    durable: Stored,
    buffered: Vec<Write>,
    flushes: u64,
    fail_flush: bool,
}

impl MemoryLogStore {
    /// A store that holds this, durably.
    pub fn new(stored: Stored) -> MemoryLogStore {
        MemoryLogStore {
            durable: stored,
            ..MemoryLogStore::default()
        }
    }

    /// The power fails: of the writes that were not flushed the first `kept` survive.
    pub fn crash(&mut self, kept: usize) {
        let buffered = std::mem::take(&mut self.buffered);
        for write in buffered.into_iter().take(kept) {
            apply(&mut self.durable, write);
        }
        self.fail_flush = false;
    }

    /// How many writes a crash would lose at the most.
    pub fn unflushed(&self) -> usize {
        self.buffered.len()
    }

    /// How often it was flushed.
    pub fn flushes(&self) -> u64 {
        self.flushes
    }

    /// From now on flushes fail, until the next crash.
    pub fn fail_flushes(&mut self) {
        self.fail_flush = true;
    }

    /// What would be there after a crash now.
    pub fn durable(&self) -> &Stored {
        &self.durable
    }

    fn check(&self) -> Result<(), LogError> {
        if self.fail_flush {
            return Err(LogError::io("flush the log", std::io::Error::other("injected")));
        }
        Ok(())
    }
}

fn apply(stored: &mut Stored, write: Write) {
    match write {
        Write::Log(entries, hard_state) => {
            if let Some(first) = entries.first() {
                let end = stored.truncated.0 + 1 + stored.entries.len() as u64;
                assert!(
                    first.index > stored.truncated.0 && first.index <= end,
                    "a log without gaps"
                );
                stored.entries.truncate((first.index - stored.truncated.0 - 1) as usize);
                stored.entries.extend(entries);
            }
            if let Some(hard_state) = hard_state {
                stored.hard_state = hard_state;
            }
        }
        Write::Compact(index, term) => {
            let count = index.saturating_sub(stored.truncated.0) as usize;
            stored.entries.drain(..count.min(stored.entries.len()));
            stored.truncated = (index, term);
        }
    }
}

impl LogStore for MemoryLogStore {
    fn load(&mut self) -> Result<Stored, LogError> {
        self.buffered.clear();
        Ok(self.durable.clone())
    }

    fn write(&mut self, entries: &[Entry], hard_state: Option<&HardState>) -> Result<(), LogError> {
        self.buffered.push(Write::Log(entries.to_vec(), hard_state.cloned()));
        Ok(())
    }

    fn compact(&mut self, index: u64, term: u64) -> Result<(), LogError> {
        self.buffered.push(Write::Compact(index, term));
        Ok(())
    }

    fn save_snapshot(&mut self, snapshot: &Snapshot) -> Result<(), LogError> {
        self.check()?;
        self.durable.snapshot = snapshot.clone();
        Ok(())
    }

    fn install_snapshot(&mut self, snapshot: &Snapshot, hard_state: &HardState) -> Result<(), LogError> {
        self.check()?;
        self.buffered.clear();
        self.durable = Stored {
            hard_state: hard_state.clone(),
            ..Stored::bootstrap(snapshot.clone())
        };
        Ok(())
    }

    fn flush(&mut self) -> Result<(), LogError> {
        self.check()?;
        for write in std::mem::take(&mut self.buffered) {
            apply(&mut self.durable, write);
        }
        self.flushes += 1;
        Ok(())
    }
}
