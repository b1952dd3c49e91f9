//! A small NBD client of our own, so that tests can read and write without any program being installed, and speak the
//! protocol wrongly on purpose. Fixed newstyle, simple replies, one request at a time.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
/// How long an answer may take: generous, as everything may have been killed a moment ago.
const ANSWER_BOUND: Duration = Duration::from_secs(60);

/// `NBD_FLAG_SEND_FLUSH`.
pub(crate) const FLAG_FLUSH: u16 = 1 << 2;
/// `NBD_FLAG_SEND_FUA`.
pub(crate) const FLAG_FUA: u16 = 1 << 3;
/// `NBD_FLAG_SEND_TRIM`.
pub(crate) const FLAG_TRIM: u16 = 1 << 5;
/// `NBD_FLAG_SEND_WRITE_ZEROES`.
pub(crate) const FLAG_WRITE_ZEROES: u16 = 1 << 6;
/// `NBD_FLAG_CAN_MULTI_CONN`.
pub(crate) const FLAG_MULTI_CONN: u16 = 1 << 8;

/// An error number as NBD sends it: the request is not allowed.
pub(crate) const EINVAL: u32 = 22;

/// A connection to one export.
pub(crate) struct Nbd {
    stream: UnixStream,
    /// Bytes of the export.
    pub(crate) size: u64,
    /// Transmission flags.
    pub(crate) flags: u16,
    next: u64,
}

impl Nbd {
    /// Connects and negotiates the export of this name.
    pub(crate) fn connect(socket: &Path, export: &str) -> io::Result<Nbd> {
        let mut stream = hello(socket)?;
        let mut data = Vec::new();
        data.extend((export.len() as u32).to_be_bytes());
        data.extend(export.as_bytes());
        data.extend(0u16.to_be_bytes());
        send_option(&mut stream, OPT_GO, &data)?;
        let (mut size, mut flags) = (0, 0);
        loop {
            let (kind, data) = read_option_reply(&mut stream)?;
            match kind {
                REP_ACK => break,
                REP_INFO if data.len() == 12 && data[..2] == [0, 0] => {
                    size = u64::from_be_bytes(data[2..10].try_into().expect("eight bytes"));
                    flags = u16::from_be_bytes([data[10], data[11]]);
                }
                REP_INFO => {}
                error => {
                    let text = String::from_utf8_lossy(&data).into_owned();
                    return Err(io::Error::other(format!("option refused, reply {error:#x}: {text}")));
                }
            }
        }
        Ok(Nbd {
            stream,
            size,
            flags,
            next: 1,
        })
    }

    /// Sends a request; the data is that of a write.
    fn request(&mut self, kind: u16, flags: u16, offset: u64, length: u32, data: &[u8]) -> io::Result<u64> {
        let handle = self.next;
        self.next += 1;
        let mut out = Vec::with_capacity(28 + data.len());
        out.extend(REQUEST_MAGIC.to_be_bytes());
        out.extend(flags.to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend(handle.to_be_bytes());
        out.extend(offset.to_be_bytes());
        out.extend(length.to_be_bytes());
        out.extend(data);
        self.stream.write_all(&out)?;
        Ok(handle)
    }

    fn reply(&mut self, handle: u64) -> io::Result<u32> {
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        assert_eq!(reply[..4], REPLY_MAGIC.to_be_bytes(), "a simple reply");
        assert_eq!(reply[8..], handle.to_be_bytes(), "the reply to the one request");
        Ok(u32::from_be_bytes(reply[4..8].try_into().expect("four bytes")))
    }

    fn done(&mut self, kind: u16, flags: u16, offset: u64, length: u32, data: &[u8]) -> io::Result<Result<(), u32>> {
        let handle = self.request(kind, flags, offset, length, data)?;
        Ok(match self.reply(handle)? {
            0 => Ok(()),
            error => Err(error),
        })
    }

    /// Reads; the inner error is NBD's number.
    pub(crate) fn try_read(&mut self, offset: u64, length: u32) -> io::Result<Result<Vec<u8>, u32>> {
        let handle = self.request(0, 0, offset, length, &[])?;
        match self.reply(handle)? {
            0 => {
                let mut data = vec![0; length as usize];
                self.stream.read_exact(&mut data)?;
                Ok(Ok(data))
            }
            error => Ok(Err(error)),
        }
    }

    /// Writes; the inner error is NBD's number.
    pub(crate) fn try_write(&mut self, offset: u64, data: &[u8]) -> io::Result<Result<(), u32>> {
        self.done(1, 0, offset, data.len() as u32, data)
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
        let done = self.done(3, 0, 0, 0, &[]).expect("the connection lives");
        done.unwrap_or_else(|error| panic!("flush: NBD error {error}"));
    }

    /// Trims; the inner error is NBD's number.
    pub(crate) fn try_trim(&mut self, offset: u64, length: u32) -> io::Result<Result<(), u32>> {
        self.done(4, 0, offset, length, &[])
    }

    /// Trims, panicking on any error.
    pub(crate) fn trim(&mut self, offset: u64, length: u32) {
        let done = self.try_trim(offset, length).expect("the connection lives");
        done.unwrap_or_else(|error| panic!("trim of {length} at {offset}: NBD error {error}"));
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        // A polite end; when the peer is gone there is no one to tell.
        let _ = self.request(2, 0, 0, 0, &[]);
    }
}

/// Connects and exchanges the flags of the handshake; options may follow.
pub(crate) fn hello(socket: &Path) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(ANSWER_BOUND))?;
    stream.set_write_timeout(Some(ANSWER_BOUND))?;
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    assert_eq!(greeting[17] & 1, 1, "fixed newstyle");
    // Fixed newstyle, no zeroes.
    stream.write_all(&3u32.to_be_bytes())?;
    Ok(stream)
}

/// Sends one option.
pub(crate) fn send_option(stream: &mut UnixStream, option: u32, data: &[u8]) -> io::Result<()> {
    let mut out = Vec::with_capacity(16 + data.len());
    out.extend(OPTION_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    stream.write_all(&out)
}

/// The reply's kind and data.
pub(crate) fn read_option_reply(stream: &mut UnixStream) -> io::Result<(u32, Vec<u8>)> {
    let mut header = [0; 20];
    stream.read_exact(&mut header)?;
    assert_eq!(header[..8], OPTION_REPLY_MAGIC.to_be_bytes());
    let kind = u32::from_be_bytes(header[12..16].try_into().expect("four bytes"));
    let length = u32::from_be_bytes(header[16..].try_into().expect("four bytes"));
    assert!(length <= 1 << 16, "an option's reply of {length} bytes");
    let mut data = vec![0; length as usize];
    stream.read_exact(&mut data)?;
    Ok((kind, data))
}
