//! Where a shim keeps what is durable.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use rustix::fs::{SeekFrom, seek};

/// Extents of data that are looked for at the most when bits are to rot.
const EXTENTS_MAX: usize = 100_000;

/// Bytes that stay.
pub trait Media {
    /// How many.
    fn bytes(&self) -> u64;
    /// Reads all of `into` at `offset`, which lies within.
    ///
    /// # Errors
    /// Of what is below.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
    /// Writes all of `from` at `offset`, which lies within.
    ///
    /// # Errors
    /// Of what is below.
    fn write(&mut self, offset: u64, from: &[u8]) -> io::Result<()>;
    /// Makes everything zero.
    ///
    /// # Errors
    /// Of what is below.
    fn wipe(&mut self) -> io::Result<()>;
    /// Where there may be something else than zeroes, in order.
    ///
    /// # Errors
    /// Of what is below.
    fn data(&self) -> io::Result<Vec<Range<u64>>>;
}

/// A file: the backing of a shim.
///
/// It is not flushed: a shim survives the power cuts that it makes itself, not those of the machine.
#[derive(Debug)]
pub struct Backing {
    file: File,
    bytes: u64,
}

impl Backing {
    /// Opens an existing file of whole sectors.
    ///
    /// # Errors
    /// It can't be opened for reading and writing, or its length is no multiple of 512 bytes, or zero.
    pub fn open(path: &Path) -> io::Result<Backing> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let bytes = file.metadata()?.len();
        if bytes == 0 || bytes % super::cache::SECTOR as u64 != 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "its length, {bytes}, is not a multiple of 512 bytes above zero: `truncate -s 1G` gives it one"
                ),
            ));
        }
        Ok(Backing { file, bytes })
    }
}

impl Media for Backing {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, offset)
    }

    fn write(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.file.write_all_at(from, offset)
    }

    fn wipe(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.set_len(self.bytes)
    }

    fn data(&self) -> io::Result<Vec<Range<u64>>> {
        let mut extents = Vec::new();
        let mut at = 0;
        while at < self.bytes && extents.len() < EXTENTS_MAX {
            let start = match seek(&self.file, SeekFrom::Data(at)) {
                Ok(start) => start,
                // No data behind this.
                Err(rustix::io::Errno::NXIO) => break,
                Err(errno) => return Err(errno.into()),
            };
            at = seek(&self.file, SeekFrom::Hole(start))?;
            extents.push(start..at);
        }
        Ok(extents)
    }
}

/// In memory, for tests.
#[cfg(test)]
impl Media for Vec<u8> {
    fn bytes(&self) -> u64 {
        self.len() as u64
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        into.copy_from_slice(&self[offset as usize..][..into.len()]);
        Ok(())
    }

    fn write(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        self[offset as usize..][..from.len()].copy_from_slice(from);
        Ok(())
    }

    fn wipe(&mut self) -> io::Result<()> {
        self.fill(0);
        Ok(())
    }

    fn data(&self) -> io::Result<Vec<Range<u64>>> {
        Ok(std::iter::once(0..self.bytes()).collect())
    }
}
