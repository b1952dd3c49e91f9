//! The log store of a real metadata server: entries and hard state in `sled`, the snapshot in a plain file.
//!
//! `sled` makes a batch atomic per tree, so there is one tree. Its keys, and its values, each followed by a CRC-32 over
//! key and value:
//!
//! - `i`: identity: `u16` format (1), `u64` member id, `u64` directory id;
//! - `h`: hard state;
//! - `t`: `u64` index and `u64` term of the last entry that was compacted away;
//! - `e` and the index, big-endian so that keys are in order: an entry.
//!
//! The file `snapshot`: `b"CAIRNSNP"`, `u16` format (1), a snapshot, and a CRC-32 over all of that; replaced as a whole by
//! writing `snapshot.new`, making it durable, and renaming it.

use std::fs::File;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use cairn_proto::codec::{DecodeError, Put, Reader};
use raft::eraftpb::{Entry, HardState, Snapshot};
use sled::{Batch, Db, IVec, Mode, Tree};

use crate::log::{LogError, LogStore, Stored};
use crate::raft::message::{
    decode_entry, decode_hard_state, decode_snapshot, encode_entry, encode_hard_state, encode_snapshot,
};

const IDENTITY_KEY: &[u8] = b"i";
const HARD_STATE_KEY: &[u8] = b"h";
const TRUNCATED_KEY: &[u8] = b"t";
const ENTRY_PREFIX: u8 = b'e';
const IDENTITY_FORMAT: u16 = 1;
const SNAPSHOT_MAGIC: &[u8; 8] = b"CAIRNSNP";
const SNAPSHOT_FORMAT: u16 = 1;
/// What `sled` may keep in memory: the entries are in memory anyway.
const CACHE_BYTES: u64 = 8 << 20;

/// Whose directory it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// The member.
    pub id: u64,
    /// Drawn when the directory was made. Not zero.
    pub directory: u64,
}

/// A log store in a directory.
#[derive(Debug)]
pub struct SledLogStore {
    dir: PathBuf,
    _db: Db,
    tree: Tree,
    /// Index of the last entry compacted away, and of the last one there is.
    bounds: (u64, u64),
}

impl SledLogStore {
    /// Opens a directory, or makes a new one.
    ///
    /// # Errors
    /// Another process uses it, or it can't be read.
    pub fn open(dir: &Path) -> Result<SledLogStore, LogError> {
        std::fs::create_dir_all(dir).map_err(|error| LogError::io(format!("make {}", dir.display()), error))?;
        let path = dir.join("log");
        let config = sled::Config::new()
            .path(&path)
            .mode(Mode::HighThroughput)
            .cache_capacity(CACHE_BYTES)
            .flush_every_ms(None);
        // Some kinds of damage make sled panic instead of answering.
        let opened = catch_unwind(AssertUnwindSafe(|| {
            let db = config.open()?;
            let tree = db.open_tree(b"raft")?;
            Ok((db, tree))
        }));
        let (db, tree) = opened
            .map_err(|_| LogError::damaged(path.display().to_string()))?
            .map_err(|error| explain(&path, error))?;
        Ok(SledLogStore {
            dir: dir.to_path_buf(),
            _db: db,
            tree,
            bounds: (0, 0),
        })
    }

    /// Whose directory it is; `None` for a new one.
    ///
    /// # Errors
    /// The record is damaged, or of a later version.
    pub fn identity(&self) -> Result<Option<Identity>, LogError> {
        let Some(value) = self.get(IDENTITY_KEY)? else {
            return Ok(None);
        };
        let mut reader = Reader::new(&value);
        let read =
            |reader: &mut Reader<'_>| -> Result<_, DecodeError> { Ok((reader.u16()?, reader.u64()?, reader.u64()?)) };
        let (format, id, directory) = read(&mut reader).map_err(|error| self.damaged("its identity", error))?;
        if format != IDENTITY_FORMAT {
            let what = format!(
                "{} has format {format}, this version reads {IDENTITY_FORMAT}: run the version that wrote it",
                self.dir.display()
            );
            return Err(LogError::Foreign { what });
        }
        Ok(Some(Identity { id, directory }))
    }

    /// Makes a new directory one of this member, beginning with this. Durable when it returns.
    ///
    /// # Errors
    /// It can't be written.
    pub fn initialise(&mut self, identity: Identity, stored: &Stored) -> Result<(), LogError> {
        assert!(
            stored.entries.is_empty(),
            "a log begins with a snapshot or with nothing"
        );
        if !stored.snapshot.is_empty() {
            self.write_snapshot_file(&stored.snapshot)?;
        }
        let mut batch = Batch::default();
        let mut value = Vec::new();
        value.put_u16(IDENTITY_FORMAT);
        value.put_u64(identity.id);
        value.put_u64(identity.directory);
        // The identity makes the directory valid; it is in the same batch as the rest.
        put(&mut batch, IDENTITY_KEY, value);
        put_hard_state(&mut batch, &stored.hard_state);
        put_truncated(&mut batch, stored.truncated);
        self.apply(batch)?;
        self.flush()
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, LogError> {
        let value = self.tree.get(key).map_err(|error| explain(&self.dir, error))?;
        value.map(|value| self.verify(key, &value)).transpose()
    }

    fn verify(&self, key: &[u8], value: &IVec) -> Result<Vec<u8>, LogError> {
        let (body, checksum) = value
            .split_last_chunk::<4>()
            .ok_or_else(|| self.damaged("a record", "it is too short"))?;
        if checksum_of(key, body) != u32::from_le_bytes(*checksum) {
            return Err(self.damaged(&format!("record {}", key.escape_ascii()), "its checksum does not match"));
        }
        Ok(body.to_vec())
    }

    fn damaged(&self, what: &str, why: impl std::fmt::Display) -> LogError {
        LogError::damaged(format!("{what} in {} ({why})", self.dir.display()))
    }

    fn apply(&self, batch: Batch) -> Result<(), LogError> {
        self.tree.apply_batch(batch).map_err(|error| explain(&self.dir, error))
    }

    fn read_entries(&self, truncated: u64) -> Result<Vec<Entry>, LogError> {
        let mut entries: Vec<Entry> = Vec::new();
        for item in self.tree.scan_prefix([ENTRY_PREFIX]) {
            let (key, value) = item.map_err(|error| explain(&self.dir, error))?;
            let body = self.verify(&key, &value)?;
            let mut reader = Reader::new(&body);
            let entry = decode_entry(&mut reader).and_then(|entry| reader.finish().map(|()| entry));
            let entry = entry.map_err(|error| self.damaged("an entry", error))?;
            let expected = entries.last().map_or(truncated, |last| last.index) + 1;
            if entry.index != expected || key[..] != entry_key(entry.index) {
                return Err(self.damaged("the log", format!("entry {expected} is missing")));
            }
            entries.push(entry);
        }
        Ok(entries)
    }

    fn read_snapshot_file(&self) -> Result<Option<Snapshot>, LogError> {
        let path = self.dir.join("snapshot");
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(LogError::io(format!("read {}", path.display()), error)),
        };
        let failed = |error: &dyn std::fmt::Display| LogError::damaged(format!("{} ({error})", path.display()));
        let body = bytes.split_last_chunk::<4>();
        let (body, checksum) = body.ok_or_else(|| failed(&DecodeError::Truncated))?;
        if crc32fast::hash(body) != u32::from_le_bytes(*checksum) {
            return Err(failed(&"its checksum does not match"));
        }
        let mut reader = Reader::new(body);
        let mut read = || {
            if reader.bytes(8)? != SNAPSHOT_MAGIC || reader.u16()? != SNAPSHOT_FORMAT {
                return Err(DecodeError::Invalid("format"));
            }
            let snapshot = decode_snapshot(&mut reader)?;
            reader.clone().finish()?;
            Ok(snapshot)
        };
        read().map(Some).map_err(|error| failed(&error))
    }

    fn write_snapshot_file(&self, snapshot: &Snapshot) -> Result<(), LogError> {
        let mut bytes = SNAPSHOT_MAGIC.to_vec();
        bytes.put_u16(SNAPSHOT_FORMAT);
        encode_snapshot(&mut bytes, snapshot);
        bytes.put_u32(crc32fast::hash(&bytes));
        let (new, path) = (self.dir.join("snapshot.new"), self.dir.join("snapshot"));
        let write = || {
            let mut file = File::create(&new)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            std::fs::rename(&new, &path)?;
            File::open(&self.dir)?.sync_all()
        };
        write().map_err(|error| LogError::io(format!("write {}", path.display()), error))
    }

    /// Drops the whole log: what comes next follows the snapshot.
    fn reset(&mut self, truncated: (u64, u64), hard_state: &HardState) -> Result<(), LogError> {
        let mut batch = Batch::default();
        for key in self.tree.scan_prefix([ENTRY_PREFIX]).keys() {
            batch.remove(key.map_err(|error| explain(&self.dir, error))?);
        }
        put_truncated(&mut batch, truncated);
        put_hard_state(&mut batch, hard_state);
        self.apply(batch)?;
        self.bounds = (truncated.0, truncated.0);
        self.flush()
    }
}

impl LogStore for SledLogStore {
    fn load(&mut self) -> Result<Stored, LogError> {
        let hard_state = match self.get(HARD_STATE_KEY)? {
            Some(value) => decode_hard_state(&mut Reader::new(&value)),
            None => Ok(HardState::default()),
        };
        let mut hard_state = hard_state.map_err(|error| self.damaged("the hard state", error))?;
        let truncated = match self.get(TRUNCATED_KEY)? {
            Some(value) => {
                let mut reader = Reader::new(&value);
                reader.u64().and_then(|index| Ok((index, reader.u64()?)))
            }
            None => Ok((0, 0)),
        };
        let truncated = truncated.map_err(|error| self.damaged("the start of the log", error))?;
        let entries = self.read_entries(truncated.0)?;
        let snapshot = self.read_snapshot_file()?.unwrap_or_default();
        let (index, term) = (snapshot.get_metadata().index, snapshot.get_metadata().term);
        if index < truncated.0 {
            return Err(self.damaged(
                "the snapshot",
                format!("it ends at {index}, the log begins after {}", truncated.0),
            ));
        }
        let last = entries.last().map_or(truncated.0, |entry| entry.index);
        let at_snapshot = if index == truncated.0 {
            Some(truncated.1)
        } else {
            entries.get((index - truncated.0 - 1) as usize).map(|entry| entry.term)
        };
        if at_snapshot != Some(term) {
            // A leader's snapshot was made durable, and then the power failed before the log gave way to it.
            hard_state.term = hard_state.term.max(term);
            hard_state.commit = hard_state.commit.max(index);
            self.reset((index, term), &hard_state)?;
            hard_state.commit = index;
            return Ok(Stored {
                hard_state,
                snapshot,
                truncated: (index, term),
                entries: vec![],
            });
        }
        if hard_state.commit > last {
            let why = format!("it ends at {last}, though {} was committed", hard_state.commit);
            return Err(self.damaged("the log", why));
        }
        self.bounds = (truncated.0, last);
        Ok(Stored {
            hard_state,
            snapshot,
            truncated,
            entries,
        })
    }

    fn write(&mut self, entries: &[Entry], hard_state: Option<&HardState>) -> Result<(), LogError> {
        let mut batch = Batch::default();
        if let (Some(first), Some(last)) = (entries.first(), entries.last()) {
            assert!(
                first.index > self.bounds.0 && first.index <= self.bounds.1 + 1,
                "a log without gaps"
            );
            for index in last.index + 1..=self.bounds.1 {
                batch.remove(entry_key(index).as_slice());
            }
            for entry in entries {
                let mut value = Vec::with_capacity(64 + entry.data.len());
                encode_entry(&mut value, entry);
                put(&mut batch, &entry_key(entry.index), value);
            }
            self.bounds.1 = last.index;
        }
        if let Some(hard_state) = hard_state {
            put_hard_state(&mut batch, hard_state);
        }
        self.apply(batch)
    }

    fn compact(&mut self, index: u64, term: u64) -> Result<(), LogError> {
        assert!(index <= self.bounds.1, "only what is there can be compacted");
        let mut batch = Batch::default();
        for index in self.bounds.0 + 1..=index {
            batch.remove(entry_key(index).as_slice());
        }
        put_truncated(&mut batch, (index, term));
        self.bounds.0 = self.bounds.0.max(index);
        self.apply(batch)
    }

    fn save_snapshot(&mut self, snapshot: &Snapshot) -> Result<(), LogError> {
        self.write_snapshot_file(snapshot)
    }

    fn install_snapshot(&mut self, snapshot: &Snapshot, hard_state: &HardState) -> Result<(), LogError> {
        self.write_snapshot_file(snapshot)?;
        self.reset(
            (snapshot.get_metadata().index, snapshot.get_metadata().term),
            hard_state,
        )
    }

    fn flush(&mut self) -> Result<(), LogError> {
        self.tree.flush().map(drop).map_err(|error| explain(&self.dir, error))
    }
}

fn entry_key(index: u64) -> [u8; 9] {
    let mut key = [ENTRY_PREFIX; 9];
    key[1..].copy_from_slice(&index.to_be_bytes());
    key
}

fn checksum_of(key: &[u8], body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(key);
    hasher.update(body);
    hasher.finalize()
}

fn put(batch: &mut Batch, key: &[u8], mut value: Vec<u8>) {
    let checksum = checksum_of(key, &value);
    value.put_u32(checksum);
    batch.insert(key, value);
}

fn put_hard_state(batch: &mut Batch, hard_state: &HardState) {
    let mut value = Vec::new();
    encode_hard_state(&mut value, hard_state);
    put(batch, HARD_STATE_KEY, value);
}

fn put_truncated(batch: &mut Batch, (index, term): (u64, u64)) {
    let mut value = Vec::new();
    value.put_u64(index);
    value.put_u64(term);
    put(batch, TRUNCATED_KEY, value);
}

fn explain(path: &Path, error: sled::Error) -> LogError {
    let path = path.display();
    match error {
        sled::Error::Io(source) if source.to_string().contains("lock") => LogError::Io {
            what: format!("{path} is in use: is this metadata server running already?"),
            source,
        },
        sled::Error::Io(source) => LogError::io(format!("use {path}"), source),
        other => LogError::damaged(format!("{path} ({other})")),
    }
}
