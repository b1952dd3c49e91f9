//! NBD for tests: one request at a time, and whatever goes wrong is a panic.

use std::io;
use std::path::Path;
use std::time::Duration;

use cairn_chaos::live::nbd::{Command, Connection};

/// How long an answer may take: generous, as everything may have been killed a moment ago.
pub(crate) const ANSWER_BOUND: Duration = Duration::from_secs(60);

/// An error number as NBD sends it: the request is not allowed.
pub(crate) const EINVAL: u32 = 22;

/// A connection to one export.
pub(crate) struct Nbd {
    connection: Connection,
    /// Bytes of the export.
    pub(crate) size: u64,
    /// Transmission flags.
    pub(crate) flags: u16,
}

impl Nbd {
    /// Connects and negotiates the export of this name.
    pub(crate) fn connect(socket: &Path, export: &str) -> io::Result<Nbd> {
        let connection = Connection::open(socket, export)?;
        let (size, flags) = (connection.size, connection.flags);
        Ok(Nbd {
            connection,
            size,
            flags,
        })
    }

    fn ask(&mut self, command: Command, offset: u64, length: u32, data: &[u8]) -> io::Result<Result<Vec<u8>, u32>> {
        self.connection.ask_plainly(command, offset, length, data, ANSWER_BOUND)
    }

    /// Reads; the inner error is NBD's number.
    pub(crate) fn try_read(&mut self, offset: u64, length: u32) -> io::Result<Result<Vec<u8>, u32>> {
        self.ask(Command::Read, offset, length, &[])
    }

    /// Writes; the inner error is NBD's number.
    pub(crate) fn try_write(&mut self, offset: u64, data: &[u8]) -> io::Result<Result<(), u32>> {
        let done = self.ask(Command::Write { fua: false }, offset, data.len() as u32, data)?;
        Ok(done.map(drop))
    }

    /// Reads, panicking on any error.
    pub(crate) fn read(&mut self, offset: u64, length: u32) -> Vec<u8> {
        let data = self.try_read(offset, length).expect("the connection lives");
        data.unwrap_or_else(|error| panic!("read of {length} at {offset}: NBD error {error}"))
    }

    /// Writes, panicking on any error.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        let done = self.try_write(offset, data).expect("the connection lives");
        done.unwrap_or_else(|error| panic!("write of {} at {offset}: NBD error {error}", data.len()));
    }

    /// Flushes, panicking on any error.
    pub(crate) fn flush(&mut self) {
        let done = self.ask(Command::Flush, 0, 0, &[]).expect("the connection lives");
        done.unwrap_or_else(|error| panic!("flush: NBD error {error}"));
    }

    /// Trims; the inner error is NBD's number.
    pub(crate) fn try_trim(&mut self, offset: u64, length: u32) -> io::Result<Result<(), u32>> {
        Ok(self.ask(Command::Trim, offset, length, &[])?.map(drop))
    }

    /// Trims, panicking on any error.
    pub(crate) fn trim(&mut self, offset: u64, length: u32) {
        let done = self.try_trim(offset, length).expect("the connection lives");
        done.unwrap_or_else(|error| panic!("trim of {length} at {offset}: NBD error {error}"));
    }
}
