//! Whether a volume can be used: a read through NBD, as a client would do it.

use std::fmt;
use std::io;
use std::path::Path;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

// Numbers of the NBD protocol, from `doc/proto.md` of the NBD project.
const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const FLAGS_FIXED_NEWSTYLE_NO_ZEROES: u32 = 3;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_ERROR: u32 = 1 << 31;
const COMMAND_READ: u16 = 0;
const COMMAND_DISCONNECT: u16 = 2;
/// What is read: the first block.
const READ_BYTES: u32 = 4096;
/// Bytes of an answer in the handshake at the most.
const ANSWER_BYTES_MAX: u32 = 64 << 10;

/// Why a volume can't be read.
#[derive(Debug)]
pub(crate) enum ProbeError {
    /// The export does not answer, or the connection ended.
    Io(io::Error),
    /// What answers does not speak the protocol.
    Protocol(&'static str),
    /// The export refuses the volume, in its words.
    Refused(String),
    /// The read ended with this error number.
    Read(u32),
}

impl fmt::Display for ProbeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProbeError::Io(error) => write!(f, "the export does not answer: {error}"),
            ProbeError::Protocol(what) => write!(f, "what answers on the socket does not speak NBD: {what}"),
            ProbeError::Refused(words) => write!(f, "the export refuses it: {words}"),
            ProbeError::Read(errno) => write!(f, "reading its first block fails with error {errno}"),
        }
    }
}

impl From<io::Error> for ProbeError {
    fn from(error: io::Error) -> ProbeError {
        ProbeError::Io(error)
    }
}

/// Reads the first block of a volume. It ends when the volume answers, which may take as long as the cluster needs: the
/// caller bounds it.
pub(crate) async fn read_first_block(socket: &Path, volume: &str) -> Result<(), ProbeError> {
    let mut stream = UnixStream::connect(socket).await?;
    if stream.read_u64().await? != MAGIC || stream.read_u64().await? != OPTION_MAGIC {
        return Err(ProbeError::Protocol("it greets otherwise"));
    }
    stream.read_u16().await?;
    choose(&mut stream, volume).await?;
    let mut request = Vec::new();
    request.extend(REQUEST_MAGIC.to_be_bytes());
    request.extend([0; 2]);
    request.extend(COMMAND_READ.to_be_bytes());
    request.extend([0; 16]);
    request.extend(READ_BYTES.to_be_bytes());
    stream.write_all(&request).await?;
    if stream.read_u32().await? != REPLY_MAGIC {
        return Err(ProbeError::Protocol("its answer to a read is none"));
    }
    let errno = stream.read_u32().await?;
    stream.read_u64().await?;
    if errno != 0 {
        return Err(ProbeError::Read(errno));
    }
    let mut block = vec![0; READ_BYTES as usize];
    stream.read_exact(&mut block).await?;
    request[6..8].copy_from_slice(&COMMAND_DISCONNECT.to_be_bytes());
    // The volume has answered: how the connection ends does not matter any more.
    let _ = stream.write_all(&request).await;
    Ok(())
}

/// Chooses the export and waits until it is granted.
async fn choose(stream: &mut UnixStream, volume: &str) -> Result<(), ProbeError> {
    let mut hello = Vec::new();
    hello.extend(FLAGS_FIXED_NEWSTYLE_NO_ZEROES.to_be_bytes());
    hello.extend(OPTION_MAGIC.to_be_bytes());
    hello.extend(OPTION_GO.to_be_bytes());
    hello.extend((volume.len() as u32 + 6).to_be_bytes());
    hello.extend((volume.len() as u32).to_be_bytes());
    hello.extend(volume.as_bytes());
    hello.extend([0; 2]);
    stream.write_all(&hello).await?;
    loop {
        let magic = stream.read_u64().await?;
        let _option = stream.read_u32().await?;
        let reply = stream.read_u32().await?;
        let length = stream.read_u32().await?;
        if magic != OPTION_REPLY_MAGIC || length > ANSWER_BYTES_MAX {
            return Err(ProbeError::Protocol("its answer to the choice of a volume is none"));
        }
        let mut words = vec![0; length as usize];
        stream.read_exact(&mut words).await?;
        match reply {
            REPLY_ACK => return Ok(()),
            error if error & REPLY_ERROR != 0 => {
                return Err(ProbeError::Refused(String::from_utf8_lossy(&words).into_owned()));
            }
            // A piece of information.
            _ => (),
        }
    }
}

#[cfg(test)]
mod tests {
    use cairn_client::nbd::{ExportInfo, Handshake, HandshakeAction, Refusal};
    use tokio::net::UnixListener;

    use super::*;

    /// The product's own server side of the handshake, with one volume `demo` whose read ends with `errno`.
    async fn serve(listener: UnixListener, errno: u32) {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut handshake = Handshake::default();
        let mut buffer = [0; 1024];
        loop {
            while let Some(action) = handshake.poll_action() {
                match action {
                    HandshakeAction::Send(bytes) => stream.write_all(&bytes).await.unwrap(),
                    HandshakeAction::Describe(name) => handshake.description(match name.as_str() {
                        "demo" => Ok(ExportInfo {
                            size: 1 << 30,
                            read_only: false,
                        }),
                        _ => Err(Refusal::Unknown),
                    }),
                    HandshakeAction::Transmission(_) => {
                        let mut request = [0; 28];
                        stream.read_exact(&mut request).await.unwrap();
                        let mut reply = REPLY_MAGIC.to_be_bytes().to_vec();
                        reply.extend(errno.to_be_bytes());
                        reply.extend([0; 8 + READ_BYTES as usize]);
                        stream.write_all(&reply).await.unwrap();
                        return;
                    }
                    _ => return,
                }
            }
            let length = stream.read(&mut buffer).await.unwrap();
            if length == 0 {
                return;
            }
            handshake.receive(&buffer[..length]);
        }
    }

    async fn probe(volume: &str, errno: u32) -> Result<(), ProbeError> {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let server = tokio::spawn(serve(UnixListener::bind(&socket).unwrap(), errno));
        let result = read_first_block(&socket, volume).await;
        server.await.unwrap();
        result
    }

    #[tokio::test]
    async fn a_volume_that_answers_is_told_from_one_that_does_not() {
        probe("demo", 0).await.unwrap();
        assert!(matches!(probe("demo", 5).await, Err(ProbeError::Read(5))));
        let refused = probe("none", 0).await.unwrap_err();
        assert!(
            matches!(&refused, ProbeError::Refused(words) if words.contains("no such volume")),
            "{refused}"
        );
        let missing = read_first_block(Path::new("/nowhere/s"), "demo").await.unwrap_err();
        assert!(matches!(missing, ProbeError::Io(_)));
    }
}
