//! Where a metadata server keeps what it must not forget: its Raft log, its vote, its last snapshot.

mod durable;
mod file;
pub mod memory;
pub mod sled;

use std::fmt;

use raft::eraftpb::{Entry, HardState, Snapshot};

/// All that a store holds, as it is read at start.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Stored {
    /// Term, vote and commit.
    pub hard_state: HardState,
    /// The last snapshot; empty (index 0) when there is none.
    pub snapshot: Snapshot,
    /// Index and term of the last entry that was compacted away. Not above the snapshot.
    pub truncated: (u64, u64),
    /// The entries after it, without a gap.
    pub entries: Vec<Entry>,
}

impl Stored {
    /// A store as the first members of a cluster begin it: all with the same snapshot, at index 1 of term 1. Since
    /// nobody's log reaches back before it, whoever joins later begins with a snapshot, which names the members.
    pub fn bootstrap(snapshot: Snapshot) -> Stored {
        let truncated = (snapshot.get_metadata().index, snapshot.get_metadata().term);
        let mut hard_state = HardState::default();
        (hard_state.commit, hard_state.term) = truncated;
        Stored {
            hard_state,
            snapshot,
            truncated,
            entries: vec![],
        }
    }
}

/// What a metadata server writes to. Writes may be buffered until [`flush`](LogStore::flush), except those that say
/// that they are durable. After an error a store is not used any more: what a failed flush left behind is not known.
pub trait LogStore {
    /// Reads everything. Called once, at start.
    fn load(&mut self) -> Result<Stored, LogError>;

    /// Writes entries and a hard state as one. Entries of the log from the index of the first one on are replaced.
    /// Buffered.
    fn write(&mut self, entries: &[Entry], hard_state: Option<&HardState>) -> Result<(), LogError>;

    /// Drops the entries up to and including this index, whose term is given. Buffered.
    fn compact(&mut self, index: u64, term: u64) -> Result<(), LogError>;

    /// Keeps a snapshot of the own state in place of the one before. The log stays. Durable when it returns.
    fn save_snapshot(&mut self, snapshot: &Snapshot) -> Result<(), LogError>;

    /// Replaces everything by a snapshot that the leader has sent. Durable when it returns; after a crash in between
    /// there is either the old or the new.
    fn install_snapshot(&mut self, snapshot: &Snapshot, hard_state: &HardState) -> Result<(), LogError>;

    /// Everything written before is durable when it returns.
    fn flush(&mut self) -> Result<(), LogError>;
}

/// Why a log can't be used.
#[derive(Debug)]
pub enum LogError {
    /// The system refused something.
    Io {
        /// What was done, and to what.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Something is not as it was written.
    Damaged {
        /// What, and where.
        what: String,
    },
    /// A later version wrote it, or it is of another member.
    Foreign {
        /// What is wrong.
        what: String,
    },
}

impl LogError {
    pub(crate) fn io(what: impl Into<String>, source: std::io::Error) -> LogError {
        LogError::Io {
            what: what.into(),
            source,
        }
    }

    pub(crate) fn damaged(what: impl Into<String>) -> LogError {
        LogError::Damaged { what: what.into() }
    }
}

impl fmt::Display for LogError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LogError::Io { what, source } => write!(f, "{what}: {source}"),
            LogError::Damaged { what } => write!(
                f,
                "{what} is damaged: this metadata server can't go on with its directory; remove it from the cluster \
                 and add a new one with another id, which gets everything from the others"
            ),
            LogError::Foreign { what } => f.write_str(what),
        }
    }
}

impl std::error::Error for LogError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            LogError::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}
