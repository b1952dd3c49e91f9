//! An NBD client of our own with many requests under way on one connection: fixed newstyle, simple replies.
//!
//! A connection belongs to one thread. [`Connection::submit`] sends a request, [`Connection::poll`] gives one answer, in
//! whatever order they come.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
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
const REPLY_BYTES: usize = 16;
/// Bytes of an option's reply at the most.
const OPTION_REPLY_MAX: usize = 1 << 16;
/// Bytes that are read from the socket at once.
const READ_BYTES: usize = 256 << 10;
/// How long a choice of an export may take: it needs the metadata servers.
const CHOICE_BOUND: Duration = Duration::from_secs(10);

/// `NBD_FLAG_SEND_FLUSH`.
pub const FLAG_FLUSH: u16 = 1 << 2;
/// `NBD_FLAG_SEND_FUA`.
pub const FLAG_FUA: u16 = 1 << 3;
/// `NBD_FLAG_SEND_TRIM`.
pub const FLAG_TRIM: u16 = 1 << 5;
/// `NBD_FLAG_SEND_WRITE_ZEROES`.
pub const FLAG_WRITE_ZEROES: u16 = 1 << 6;
/// `NBD_FLAG_CAN_MULTI_CONN`.
pub const FLAG_MULTI_CONN: u16 = 1 << 8;

/// The command flag that asks for durability before the answer.
const CMD_FLAG_FUA: u16 = 1;
/// The command flag that asks for zeroes to stay allocated.
const CMD_FLAG_NO_HOLE: u16 = 1 << 1;

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// Read.
    Read,
    /// Write the data given, durable before the answer if so flagged.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// Make what was answered durable.
    Flush,
    /// Make it zeroes by forgetting it.
    Trim,
    /// Write zeroes.
    WriteZeroes {
        /// Without making a hole.
        no_hole: bool,
    },
    /// Say goodbye; nothing is answered.
    Disconnect,
}

impl Command {
    fn numbers(self) -> (u16, u16) {
        let flag = |set: bool, flag: u16| if set { flag } else { 0 };
        match self {
            Command::Read => (0, 0),
            Command::Write { fua } => (1, flag(fua, CMD_FLAG_FUA)),
            Command::Disconnect => (2, 0),
            Command::Flush => (3, 0),
            Command::Trim => (4, 0),
            Command::WriteZeroes { no_hole } => (6, flag(no_hole, CMD_FLAG_NO_HOLE)),
        }
    }
}

/// The answer to one request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reply {
    /// What [`Connection::submit`] gave.
    pub handle: u64,
    /// NBD's error number, zero for success.
    pub error: u32,
    /// What was read.
    pub data: Vec<u8>,
}

/// A connection to one export.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// Bytes of the export.
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
    next: u64,
    /// Bytes to come with the answer, by handle.
    under_way: BTreeMap<u64, usize>,
    inbox: Vec<u8>,
    /// How much of the inbox was used up.
    taken: usize,
}

impl Connection {
    /// Connects and chooses the export of this name.
    ///
    /// # Errors
    /// Nobody listens, the export is refused, or it takes longer than ten seconds.
    pub fn open(socket: &Path, export: &str) -> io::Result<Connection> {
        let mut stream = hello(socket, CHOICE_BOUND)?;
        let mut data = Vec::new();
        data.extend((export.len() as u32).to_be_bytes());
        data.extend(export.as_bytes());
        data.extend(0u16.to_be_bytes());
        send_option(&mut stream, OPT_GO, &data)?;
        let (size, flags) = chosen(&mut stream)?;
        Ok(Connection {
            stream,
            size,
            flags,
            next: 1,
            under_way: BTreeMap::new(),
            inbox: Vec::new(),
            taken: 0,
        })
    }

    /// Sends a request; `data` is that of a write, whose length is `data.len()`. Waits for room in the socket.
    pub fn submit(&mut self, command: Command, offset: u64, length: u32, data: &[u8]) -> io::Result<u64> {
        let handle = self.next;
        self.next += 1;
        let (kind, flags) = command.numbers();
        let mut out = Vec::with_capacity(28 + data.len());
        out.extend(REQUEST_MAGIC.to_be_bytes());
        out.extend(flags.to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend(handle.to_be_bytes());
        out.extend(offset.to_be_bytes());
        out.extend(length.to_be_bytes());
        out.extend(data);
        if command != Command::Disconnect {
            let to_come = if command == Command::Read { length as usize } else { 0 };
            self.under_way.insert(handle, to_come);
        }
        self.stream.write_all(&out)?;
        Ok(handle)
    }

    /// How many requests have no answer yet.
    pub fn under_way(&self) -> usize {
        self.under_way.len()
    }

    /// One answer; `None` when none has come within `bound`, which is not zero.
    pub fn poll(&mut self, bound: Duration) -> io::Result<Option<Reply>> {
        loop {
            if let Some(reply) = self.take_reply()? {
                return Ok(Some(reply));
            }
            self.inbox.drain(..self.taken);
            self.taken = 0;
            let had = self.inbox.len();
            self.inbox.resize(had + READ_BYTES, 0);
            self.stream.set_read_timeout(Some(bound))?;
            let got = self.stream.read(&mut self.inbox[had..]);
            self.inbox.truncate(had + got.as_ref().copied().unwrap_or(0));
            match got {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn take_reply(&mut self) -> io::Result<Option<Reply>> {
        let bytes = &self.inbox[self.taken..];
        if bytes.len() < REPLY_BYTES {
            return Ok(None);
        }
        let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let handle = u64::from_be_bytes(bytes[8..16].try_into().expect("eight bytes"));
        let (magic, error) = (word(0), word(4));
        let Some(to_come) = self.under_way.get(&handle).copied().filter(|_| magic == REPLY_MAGIC) else {
            let words = format!("a reply of magic {magic:#x} to request {handle}, which nobody waits for");
            return Err(io::Error::other(words));
        };
        let length = if error == 0 { to_come } else { 0 };
        let Some(data) = bytes.get(REPLY_BYTES..REPLY_BYTES + length) else {
            return Ok(None);
        };
        let data = data.to_vec();
        self.under_way.remove(&handle);
        self.taken += REPLY_BYTES + length;
        Ok(Some(Reply { handle, error, data }))
    }

    /// Sends one request and waits for its answer, however long it takes but no longer than `bound`.
    ///
    /// # Errors
    /// The connection broke, `TimedOut` after `bound`, or NBD's error number in words.
    pub fn ask(
        &mut self,
        command: Command,
        offset: u64,
        length: u32,
        data: &[u8],
        bound: Duration,
    ) -> io::Result<Vec<u8>> {
        let answer = self.ask_plainly(command, offset, length, data, bound)?;
        answer.map_err(|error| io::Error::other(format!("{command:?} at {offset}: NBD error {error}")))
    }

    /// The same; the inner error is NBD's number.
    ///
    /// # Errors
    /// The connection broke, or `TimedOut` after `bound`.
    pub fn ask_plainly(
        &mut self,
        command: Command,
        offset: u64,
        length: u32,
        data: &[u8],
        bound: Duration,
    ) -> io::Result<Result<Vec<u8>, u32>> {
        let handle = self.submit(command, offset, length, data)?;
        match self.poll(bound)? {
            None => Err(io::ErrorKind::TimedOut.into()),
            Some(reply) if reply.handle != handle => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "answers to earlier requests were not taken",
            )),
            Some(Reply { error: 0, data, .. }) => Ok(Ok(data)),
            Some(reply) => Ok(Err(reply.error)),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.under_way.is_empty() {
            // A polite end; when the peer is gone there is no one to tell.
            let _ = self.submit(Command::Disconnect, 0, 0, &[]);
        }
    }
}

/// Connects and exchanges the flags of the handshake; options may follow.
///
/// # Errors
/// Nobody listens, or what greets is no NBD server of the fixed newstyle.
pub fn hello(socket: &Path, bound: Duration) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(bound))?;
    stream.set_write_timeout(Some(bound))?;
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    if &greeting[..16] != b"NBDMAGICIHAVEOPT" || greeting[17] & 1 == 0 {
        return Err(io::Error::other(format!("{} greets with no NBD", socket.display())));
    }
    // Fixed newstyle, no zeroes.
    stream.write_all(&3u32.to_be_bytes())?;
    Ok(stream)
}

/// Sends one option.
///
/// # Errors
/// The connection broke.
pub fn send_option(stream: &mut UnixStream, option: u32, data: &[u8]) -> io::Result<()> {
    let mut out = Vec::with_capacity(16 + data.len());
    out.extend(OPTION_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    stream.write_all(&out)
}

/// An option's reply: its kind and data.
///
/// # Errors
/// The connection broke, or it is no reply.
pub fn read_option_reply(stream: &mut UnixStream) -> io::Result<(u32, Vec<u8>)> {
    let mut header = [0; 20];
    stream.read_exact(&mut header)?;
    let kind = u32::from_be_bytes(header[12..16].try_into().expect("four bytes"));
    let length = u32::from_be_bytes(header[16..].try_into().expect("four bytes")) as usize;
    if header[..8] != OPTION_REPLY_MAGIC.to_be_bytes() || length > OPTION_REPLY_MAX {
        return Err(io::Error::other("an option was answered with what is no reply"));
    }
    let mut data = vec![0; length];
    stream.read_exact(&mut data)?;
    Ok((kind, data))
}

/// Reads the replies to the choice of an export, up to its acknowledgement; the export's size and flags.
fn chosen(stream: &mut UnixStream) -> io::Result<(u64, u16)> {
    let mut described = None;
    loop {
        let (kind, data) = read_option_reply(stream)?;
        match kind {
            REP_ACK => return described.ok_or_else(|| io::Error::other("an export without a size")),
            REP_INFO if data.len() == 12 && data[..2] == [0, 0] => {
                let size = u64::from_be_bytes(data[2..10].try_into().expect("eight bytes"));
                described = Some((size, u16::from_be_bytes([data[10], data[11]])));
            }
            REP_INFO => {}
            error => {
                let text = String::from_utf8_lossy(&data).into_owned();
                return Err(io::Error::other(format!(
                    "the export is refused, reply {error:#x}: {text}"
                )));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    const BOUND: Duration = Duration::from_secs(10);

    /// A server of one connection that answers two requests in reverse order, then ends.
    fn server(listener: &UnixListener) {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"NBDMAGICIHAVEOPT\0\x03").unwrap();
        let mut option = [0; 4 + 16 + 4 + 1 + 2];
        stream.read_exact(&mut option).unwrap();
        assert_eq!(&option[24..25], b"v");
        let mut reply = |kind: u32, data: &[u8]| {
            let mut out = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
            out.extend(OPT_GO.to_be_bytes());
            out.extend(kind.to_be_bytes());
            out.extend((data.len() as u32).to_be_bytes());
            out.extend(data);
            stream.write_all(&out).unwrap();
        };
        let mut info = vec![0, 0];
        info.extend(4096u64.to_be_bytes());
        info.extend([0, 0]);
        reply(REP_INFO, &info);
        reply(REP_ACK, &[]);
        let mut requests = [0; 28 + 28 + 3];
        stream.read_exact(&mut requests).unwrap();
        let (read, write) = requests.split_at(28);
        assert_eq!(&write[28..], b"abc");
        for (request, error, data) in [(write, 5u32, &b""[..]), (read, 0, b"12345")] {
            let mut out = REPLY_MAGIC.to_be_bytes().to_vec();
            out.extend(error.to_be_bytes());
            out.extend(&request[8..16]);
            out.extend(data);
            // In two pieces, so that a reply is put together.
            stream.write_all(&out[..10]).unwrap();
            stream.write_all(&out[10..]).unwrap();
        }
    }

    #[test]
    fn answers_are_told_apart_and_an_end_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let served = std::thread::spawn(move || server(&listener));
        let mut nbd = Connection::open(&socket, "v").unwrap();
        assert_eq!(nbd.size, 4096);
        let read = nbd.submit(Command::Read, 0, 5, &[]).unwrap();
        let write = nbd.submit(Command::Write { fua: true }, 0, 3, b"abc").unwrap();
        let first = nbd.poll(BOUND).unwrap().unwrap();
        assert_eq!((first.handle, first.error), (write, 5));
        let second = nbd.poll(BOUND).unwrap().unwrap();
        assert_eq!(
            (second.handle, second.error, &second.data[..]),
            (read, 0, &b"12345"[..])
        );
        assert_eq!(nbd.under_way(), 0);
        served.join().unwrap();
        assert!(nbd.poll(BOUND).is_err());
    }

    #[test]
    fn a_socket_that_nobody_serves_is_an_error() {
        assert!(Connection::open(Path::new("/nowhere/at/all"), "v").is_err());
    }
}
