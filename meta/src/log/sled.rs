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
//! Two plain files, each replaced as a whole: written under another name, made durable, renamed.
//!
//! - `snapshot`: `b"CAIRNSNP"`, `u16` format (1), a snapshot, `u32` CRC-32 over all of that;
//! - `vote`: `b"CAIRNVOT"`, `u16` format (1), `u64` term, `u64` vote, `u64` member id, `u64` directory id, `u32` CRC-32 over
//!   all of that.
//!
//! The vote is kept twice because forgetting it lets two members lead one term, and because a log that `sled` has found
//! torn is shortened by it without a word. The file is durable before the log's copy: at start its term is never the
//! lower one, and it wins. A directory with a vote and without a log has lost its log, and is not begun anew.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use cairn_proto::codec::{DecodeError, Put, Reader};
use raft::eraftpb::{Entry, HardState, Snapshot};
use sled::{Batch, Db, IVec, Mode, Tree};

use crate::log::durable::Durable;
use crate::log::{LogError, LogStore, Stored, file};
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
const VOTE_MAGIC: &[u8; 8] = b"CAIRNVOT";
const VOTE_FORMAT: u16 = 1;
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

/// Term and vote.
type Vote = (u64, u64);

/// A log store in a directory.
#[derive(Debug)]
pub struct SledLogStore {
    dir: PathBuf,
    _db: Db,
    tree: Tree,
    durable: Durable,
    identity: Option<Identity>,
    /// Term and vote as the file has them.
    vote: Vote,
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
        let mut store = SledLogStore {
            dir: dir.to_path_buf(),
            _db: db,
            tree,
            durable: Durable::new(&path)?,
            identity: None,
            vote: (0, 0),
            bounds: (0, 0),
        };
        store.identity = store.read_identity()?;
        match (store.identity, store.read_vote()?) {
            (None, None) => {}
            (Some(identity), Some((voter, vote))) if identity == voter => store.vote = vote,
            (Some(_), None) if store.is_untouched()? => {}
            (None, Some(_)) => return Err(store.damaged("the log", "it is gone, though there was one")),
            (Some(_), _) => return Err(store.damaged("the vote", "it is gone, or of another directory")),
        }
        Ok(store)
    }

    /// Whose directory it is; `None` for a new one.
    pub fn identity(&self) -> Option<Identity> {
        self.identity
    }

    fn read_identity(&self) -> Result<Option<Identity>, LogError> {
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
        // A vote without a log would be taken for a lost log, so its file comes last.
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
        self.flush()?;
        self.identity = Some(identity);
        self.keep_vote(&stored.hard_state)
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
        let Some(body) = file::read(&self.dir, "snapshot", SNAPSHOT_MAGIC, SNAPSHOT_FORMAT)? else {
            return Ok(None);
        };
        let mut reader = Reader::new(&body);
        let snapshot = decode_snapshot(&mut reader).and_then(|snapshot| reader.finish().map(|()| snapshot));
        snapshot.map(Some).map_err(|error| self.damaged("the snapshot", error))
    }

    fn write_snapshot_file(&self, snapshot: &Snapshot) -> Result<(), LogError> {
        let mut body = Vec::with_capacity(snapshot.data.len() + 128);
        encode_snapshot(&mut body, snapshot);
        file::write(&self.dir, "snapshot", SNAPSHOT_MAGIC, SNAPSHOT_FORMAT, &body)
    }

    fn read_vote(&self) -> Result<Option<(Identity, Vote)>, LogError> {
        let Some(body) = file::read(&self.dir, "vote", VOTE_MAGIC, VOTE_FORMAT)? else {
            return Ok(None);
        };
        let mut reader = Reader::new(&body);
        let read = |reader: &mut Reader<'_>| -> Result<_, DecodeError> {
            let vote = (reader.u64()?, reader.u64()?);
            let (id, directory) = (reader.u64()?, reader.u64()?);
            Ok((Identity { id, directory }, vote))
        };
        read(&mut reader)
            .map(Some)
            .map_err(|error| self.damaged("the vote", error))
    }

    /// Makes term and vote durable, if they have changed.
    fn keep_vote(&mut self, hard_state: &HardState) -> Result<(), LogError> {
        let vote = (hard_state.term, hard_state.vote);
        if vote == self.vote {
            return Ok(());
        }
        let identity = self
            .identity
            .expect("only a directory that was initialised is written to");
        let mut body = Vec::new();
        for number in [vote.0, vote.1, identity.id, identity.directory] {
            body.put_u64(number);
        }
        file::write(&self.dir, "vote", VOTE_MAGIC, VOTE_FORMAT, &body)?;
        self.vote = vote;
        Ok(())
    }

    fn read_hard_state(&self) -> Result<HardState, LogError> {
        let Some(value) = self.get(HARD_STATE_KEY)? else {
            return Ok(HardState::default());
        };
        decode_hard_state(&mut Reader::new(&value)).map_err(|error| self.damaged("the hard state", error))
    }

    /// Whether the directory was made just now, so that its vote may not be there yet.
    fn is_untouched(&self) -> Result<bool, LogError> {
        Ok(self.read_hard_state()?.vote == 0 && self.tree.scan_prefix([ENTRY_PREFIX]).next().is_none())
    }

    /// Drops the whole log: what comes next follows the snapshot.
    fn reset(&mut self, truncated: (u64, u64), hard_state: &HardState) -> Result<(), LogError> {
        self.keep_vote(hard_state)?;
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
        let mut hard_state = self.read_hard_state()?;
        if self.vote.0 < hard_state.term {
            if !self.is_untouched()? {
                let why = format!("it is of term {}, the log of term {}", self.vote.0, hard_state.term);
                return Err(self.damaged("the vote", why));
            }
            self.keep_vote(&hard_state)?;
        }
        (hard_state.term, hard_state.vote) = self.vote;
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
            self.keep_vote(hard_state)?;
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
        self.tree.flush().map_err(|error| explain(&self.dir, error))?;
        self.durable.sync()
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

#[cfg(test)]
mod tests {
    use raft::eraftpb::ConfState;

    use super::*;

    const IDENTITY: Identity = Identity { id: 3, directory: 77 };

    fn entry(index: u64, term: u64) -> Entry {
        let data = format!("data {index}").into_bytes().into();
        Entry {
            index,
            term,
            data,
            ..Entry::default()
        }
    }

    fn entries(indexes: std::ops::RangeInclusive<u64>, term: u64) -> Vec<Entry> {
        indexes.map(|index| entry(index, term)).collect()
    }

    fn hard_state(term: u64, commit: u64) -> HardState {
        HardState {
            term,
            vote: 2,
            commit,
            ..HardState::default()
        }
    }

    fn snapshot(index: u64, term: u64) -> Snapshot {
        let mut snapshot = Snapshot {
            data: format!("state {index}").into_bytes().into(),
            ..Snapshot::default()
        };
        (snapshot.mut_metadata().index, snapshot.mut_metadata().term) = (index, term);
        let conf_state = ConfState {
            voters: vec![1, 2, 3],
            ..ConfState::default()
        };
        snapshot.mut_metadata().set_conf_state(conf_state);
        snapshot
    }

    fn fresh(dir: &Path) -> SledLogStore {
        let mut store = SledLogStore::open(dir).unwrap();
        assert_eq!(store.identity(), None);
        store.initialise(IDENTITY, &Stored::bootstrap(snapshot(1, 1))).unwrap();
        store.load().unwrap();
        store
    }

    fn reopen(store: SledLogStore, dir: &Path) -> (SledLogStore, Stored) {
        drop(store);
        let mut store = SledLogStore::open(dir).unwrap();
        assert_eq!(store.identity(), Some(IDENTITY));
        let stored = store.load().unwrap();
        (store, stored)
    }

    #[test]
    fn what_was_flushed_is_there_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = fresh(dir.path());
        store.write(&entries(2..=9, 1), Some(&hard_state(1, 5))).unwrap();
        // A new leader replaces the end of the log.
        store.write(&entries(7..=8, 2), Some(&hard_state(2, 5))).unwrap();
        store.flush().unwrap();
        let (mut store, stored) = reopen(store, dir.path());
        assert_eq!(stored.hard_state, hard_state(2, 5));
        assert_eq!((stored.truncated, &stored.snapshot), ((1, 1), &snapshot(1, 1)));
        assert_eq!(stored.entries, [entries(2..=6, 1), entries(7..=8, 2)].concat());

        store.save_snapshot(&snapshot(6, 1)).unwrap();
        store.compact(4, 1).unwrap();
        store.write(&[], Some(&hard_state(2, 8))).unwrap();
        store.flush().unwrap();
        let (_, stored) = reopen(store, dir.path());
        assert_eq!((stored.truncated, stored.entries.len()), ((4, 1), 4));
        assert_eq!(stored.snapshot, snapshot(6, 1));
        assert_eq!(stored.hard_state.commit, 8);
    }

    #[test]
    fn a_leaders_snapshot_takes_the_place_of_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = fresh(dir.path());
        store.write(&entries(2..=9, 1), Some(&hard_state(1, 5))).unwrap();
        store.flush().unwrap();
        store.install_snapshot(&snapshot(50, 4), &hard_state(4, 50)).unwrap();
        store.write(&entries(51..=52, 4), None).unwrap();
        store.flush().unwrap();
        let (_, stored) = reopen(store, dir.path());
        assert_eq!((stored.truncated, &stored.entries), ((50, 4), &entries(51..=52, 4)));
    }

    #[test]
    fn the_power_fails_between_snapshot_and_log() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = fresh(dir.path());
        store.write(&entries(2..=9, 1), Some(&hard_state(1, 5))).unwrap();
        store.flush().unwrap();
        // The file is in its place, and the log still is what it was.
        store.write_snapshot_file(&snapshot(50, 4)).unwrap();
        let (store, stored) = reopen(store, dir.path());
        assert_eq!(
            (stored.truncated, stored.entries.len(), stored.hard_state.commit),
            ((50, 4), 0, 50)
        );
        assert_eq!(stored.hard_state.term, 4);
        let (_, again) = reopen(store, dir.path());
        assert_eq!(again, stored);
        // An own snapshot that the log goes beyond is no reason to drop the log.
        let dir = tempfile::tempdir().unwrap();
        let mut store = fresh(dir.path());
        store.write(&entries(2..=9, 1), Some(&hard_state(1, 9))).unwrap();
        store.flush().unwrap();
        store.save_snapshot(&snapshot(8, 1)).unwrap();
        let (_, stored) = reopen(store, dir.path());
        assert_eq!((stored.truncated, stored.entries.len()), ((1, 1), 8));
    }

    /// Changes a record behind the store's back, opens it again, and gives the error's words.
    fn tampered(tamper: impl FnOnce(&SledLogStore)) -> String {
        let dir = tempfile::tempdir().unwrap();
        let mut store = fresh(dir.path());
        store.write(&entries(2..=9, 1), Some(&hard_state(1, 5))).unwrap();
        store.flush().unwrap();
        tamper(&store);
        store.flush().unwrap();
        drop(store);
        SledLogStore::open(dir.path())
            .and_then(|mut store| store.load())
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn damage_is_found_and_named() {
        let flip = |key: &[u8], store: &SledLogStore| {
            let mut value = store.tree.get(key).unwrap().unwrap().to_vec();
            value[3] ^= 1;
            store.tree.insert(key, value).unwrap();
        };
        for key in [&entry_key(5)[..], IDENTITY_KEY, HARD_STATE_KEY, TRUNCATED_KEY] {
            let error = tampered(|store| flip(key, store));
            assert!(
                error.contains("checksum") && error.contains("remove it from the cluster"),
                "{error}"
            );
        }
        let error = tampered(|store| drop(store.tree.remove(entry_key(5)).unwrap()));
        assert!(error.contains("entry 5 is missing"), "{error}");
        let error = tampered(|store| {
            let value = store.tree.get(entry_key(5)).unwrap().unwrap();
            store.tree.insert(entry_key(6), value).unwrap();
        });
        assert!(error.contains("checksum"), "a record in the wrong place: {error}");
        let error = tampered(|store| (3..=9).for_each(|index| drop(store.tree.remove(entry_key(index)).unwrap())));
        assert!(error.contains("though 5 was committed"), "{error}");
        let error = tampered(|store| {
            let path = store.dir.join("snapshot");
            let mut bytes = std::fs::read(&path).unwrap();
            let place = bytes.len() / 2;
            bytes[place] ^= 1;
            std::fs::write(path, bytes).unwrap();
        });
        assert!(error.contains("snapshot") && error.contains("checksum"), "{error}");
        let error = tampered(|store| std::fs::remove_file(store.dir.join("snapshot")).unwrap());
        assert!(error.contains("the snapshot"), "{error}");
        let error = tampered(|store| {
            let mut value = Vec::new();
            value.put_u16(9);
            value.put_bytes(&[0; 16]);
            let mut batch = Batch::default();
            put(&mut batch, IDENTITY_KEY, value);
            store.apply(batch).unwrap();
        });
        assert!(error.contains("format 9"), "{error}");
    }

    #[test]
    fn damage_of_sleds_own_file_is_an_error_or_harmless_but_never_another_log() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = fresh(dir.path());
        store.write(&entries(2..=9, 1), Some(&hard_state(1, 9))).unwrap();
        store.flush().unwrap();
        let (store, intact) = reopen(store, dir.path());
        drop(store);
        let file = dir.path().join("log").join("db");
        let bytes = std::fs::read(&file).unwrap();
        let mut refused = 0;
        for place in (0..bytes.len().min(8192)).step_by(97) {
            let mut damaged = bytes.clone();
            damaged[place] ^= 0x40;
            std::fs::write(&file, damaged).unwrap();
            let opened = SledLogStore::open(dir.path());
            let found = opened.and_then(|mut store| {
                // It lost its identity: then it is not this member's directory any more, and is not started as such.
                let identity = store.identity().ok_or_else(|| LogError::damaged("the identity"))?;
                assert_eq!(identity, IDENTITY);
                store.load()
            });
            match found {
                Ok(stored) => assert_eq!(stored, intact, "byte {place}"),
                Err(_) => refused += 1,
            }
        }
        assert!(refused > 0, "some of it must have mattered");
    }

    #[test]
    fn a_vote_is_not_forgotten_when_the_log_goes_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = fresh(dir.path());
        store.write(&entries(2..=3, 1), Some(&hard_state(1, 2))).unwrap();
        store.flush().unwrap();
        // The vote's file is durable before the log's flush, which the power cut prevents here.
        store.keep_vote(&hard_state(8, 2)).unwrap();
        let (store, stored) = reopen(store, dir.path());
        assert_eq!(
            (stored.hard_state.term, stored.hard_state.vote, stored.hard_state.commit),
            (8, 2, 2)
        );
        drop(store);
        std::fs::remove_dir_all(dir.path().join("log")).unwrap();
        let error = SledLogStore::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("it is gone, though there was one"), "{error}");

        let error = tampered(|store| std::fs::remove_file(store.dir.join("vote")).unwrap());
        assert!(error.contains("the vote"), "{error}");
        let error = tampered(|store| {
            let mut batch = Batch::default();
            put_hard_state(&mut batch, &hard_state(9, 5));
            store.apply(batch).unwrap();
        });
        assert!(error.contains("of term 1, the log of term 9"), "{error}");
    }

    #[test]
    fn a_directory_is_used_by_one_process() {
        let dir = tempfile::tempdir().unwrap();
        let _store = fresh(dir.path());
        let error = SledLogStore::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("in use"), "{error}");
    }
}
