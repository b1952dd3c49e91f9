//! Makes what `sled` has written survive a power failure.
//!
//! On Linux `sled` 0.34 ends its `flush` with `sync_file_range`, which writes pages to the device and no more: neither does the
//! device empty its write cache, nor are the file's size and its extents made durable. Large values, which it keeps in files of
//! their own, it does not sync at all. So after each `flush`:
//!
//! 1. every file in `blobs` that has not been synced yet, then that directory: what the log points to is there before the log is;
//! 2. `db`, the log: all of it was written before `flush` returned.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::log::LogError;

/// The files of one database.
#[derive(Debug)]
pub(super) struct Durable {
    blobs: PathBuf,
    log: File,
    log_path: PathBuf,
    /// Blobs that are durable; none is ever changed.
    synced: BTreeSet<OsString>,
}

impl Durable {
    /// Of a database that was opened just now: its files will not be missing after a power failure.
    pub(super) fn new(database: &Path) -> Result<Durable, LogError> {
        let log_path = database.join("db");
        let open = || -> io::Result<Durable> {
            let log = File::open(&log_path)?;
            let mut durable = Durable {
                blobs: database.join("blobs"),
                log,
                log_path: log_path.clone(),
                synced: BTreeSet::new(),
            };
            durable.sync_blobs()?;
            durable.log.sync_all()?;
            for dir in [
                Some(database),
                database.parent(),
                database.parent().and_then(Path::parent),
            ] {
                if let Some(dir) = dir.filter(|dir| !dir.as_os_str().is_empty()) {
                    File::open(dir)?.sync_all()?;
                }
            }
            Ok(durable)
        };
        open().map_err(|error| LogError::io(format!("make {} durable", log_path.display()), error))
    }

    /// All that was written is durable when it returns.
    pub(super) fn sync(&mut self) -> Result<(), LogError> {
        let synced = self.sync_blobs().and_then(|()| self.log.sync_data());
        synced.map_err(|error| LogError::io(format!("make {} durable", self.log_path.display()), error))
    }

    fn sync_blobs(&mut self) -> io::Result<()> {
        let mut there = BTreeSet::new();
        let mut is_new = false;
        for entry in self.blobs.read_dir()? {
            let entry = entry?;
            let name = entry.file_name();
            if !self.synced.contains(&name) {
                match File::open(entry.path()) {
                    Ok(blob) => blob.sync_all()?,
                    // It was dropped just now, because nothing points to it any more.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(error),
                }
                is_new = true;
            }
            there.insert(name);
        }
        self.synced = there;
        if is_new {
            File::open(&self.blobs)?.sync_all()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_has_the_files_that_are_synced() {
        let dir = tempfile::tempdir().unwrap();
        let db = sled::Config::new().path(dir.path().join("log")).open().unwrap();
        let mut durable = Durable::new(&dir.path().join("log")).unwrap();
        assert!(durable.synced.is_empty());
        // Larger than what the log takes in: it becomes a file.
        db.insert(b"large", vec![7; 1 << 20]).unwrap();
        db.flush().unwrap();
        durable.sync().unwrap();
        assert!(!durable.synced.is_empty());
        assert!(durable.log.metadata().unwrap().len() > 0);
    }
}
