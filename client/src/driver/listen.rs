//! Where exports listen: unix sockets and TCP.

use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use mio::net::{TcpListener, TcpStream, UnixListener};
use mio::{Interest, Registry, Token};

use rustix::net::sockopt;

use super::limits::{KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES};
use super::socket::Stream;

/// The longest path of a unix socket, in bytes, on Linux.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// A place to listen at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Listen {
    /// A unix socket at this path. One that a killed process left behind is replaced.
    Unix(PathBuf),
    /// A TCP port. Port 0 takes a free one.
    Tcp(SocketAddr),
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listen::Unix(path) => write!(f, "unix socket {}", path.display()),
            Listen::Tcp(address) => write!(f, "TCP {address}"),
        }
    }
}

/// Why nothing can be served at a place.
#[derive(Debug)]
pub enum ListenError {
    /// Another process serves there.
    InUse(Listen),
    /// There is a file that is no socket.
    NotASocket(PathBuf),
    /// A unix socket's path is longer than the system allows.
    PathTooLong(PathBuf),
    /// The system refused.
    Io(Listen, io::Error),
}

impl fmt::Display for ListenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ListenError::InUse(Listen::Unix(path)) => write!(
                f,
                "can't listen on {}: another process serves there; end it or choose another path",
                path.display()
            ),
            ListenError::InUse(Listen::Tcp(address)) => {
                write!(
                    f,
                    "can't listen on {address}: the port is taken; end what uses it or choose another port"
                )
            }
            ListenError::NotASocket(path) => write!(
                f,
                "can't listen on {}: there is a file that is no socket, and it stays; move it away or choose another path",
                path.display()
            ),
            ListenError::PathTooLong(path) => write!(
                f,
                "can't listen on {}: a unix socket's path has at most {SOCKET_PATH_BYTES_MAX} bytes, this has {}; \
                 choose a shorter directory",
                path.display(),
                path.as_os_str().len()
            ),
            ListenError::Io(listen, error) => write!(f, "can't listen on {listen}: {error}"),
        }
    }
}

impl std::error::Error for ListenError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ListenError::Io(_, error) => Some(error),
            _ => None,
        }
    }
}

enum Socket {
    Unix {
        socket: UnixListener,
        path: PathBuf,
        inode: Option<u64>,
    },
    Tcp(TcpListener),
}

/// A socket that accepts NBD connections. A unix socket's file goes with it.
pub(crate) struct Listener {
    socket: Socket,
    listen: Listen,
}

impl Listener {
    pub(crate) fn bind(listen: &Listen) -> Result<Listener, ListenError> {
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::AddrInUse => ListenError::InUse(listen.clone()),
            _ => ListenError::Io(listen.clone(), error),
        };
        let (socket, listen) = match listen {
            Listen::Tcp(address) => {
                let socket = TcpListener::bind(*address).map_err(failed)?;
                let address = socket.local_addr().map_err(failed)?;
                (Socket::Tcp(socket), Listen::Tcp(address))
            }
            Listen::Unix(path) => {
                remove_stale(path)?;
                let socket = UnixListener::bind(path).map_err(failed)?;
                let (path, inode) = (path.clone(), inode_of(path));
                (Socket::Unix { socket, path, inode }, listen.clone())
            }
        };
        Ok(Listener { socket, listen })
    }

    /// Where it listens: with the real port where 0 was asked for.
    pub(crate) fn place(&self) -> &Listen {
        &self.listen
    }

    pub(super) fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        match &mut self.socket {
            Socket::Unix { socket, .. } => registry.register(socket, token, Interest::READABLE),
            Socket::Tcp(socket) => registry.register(socket, token, Interest::READABLE),
        }
    }

    /// The next connection; `None` when there is none for now.
    pub(super) fn accept(&self) -> io::Result<Option<Stream>> {
        let accepted = match &self.socket {
            Socket::Unix { socket, .. } => socket.accept().map(|(stream, _)| Stream::Unix(stream)),
            Socket::Tcp(socket) => socket.accept().and_then(|(stream, _)| {
                stream.set_nodelay(true)?;
                detect_death(&stream)?;
                Ok(Stream::Tcp(stream))
            }),
        };
        match accepted {
            Ok(stream) => Ok(Some(stream)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// A client whose host has vanished would hold its volume for ever.
fn detect_death(stream: &TcpStream) -> io::Result<()> {
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?;
    Ok(())
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Socket::Unix { path, inode, .. } = &self.socket {
            // Unless somebody has put another one in its place.
            if inode.is_some() && inode_of(path) == *inode {
                let _ = fs::remove_file(path);
            }
        }
    }
}

fn inode_of(path: &Path) -> Option<u64> {
    fs::symlink_metadata(path).ok().map(|metadata| metadata.ino())
}

/// Removes a socket at which nobody listens any more.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let listen = || Listen::Unix(path.to_path_buf());
    if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
        return Err(ListenError::PathTooLong(path.to_path_buf()));
    }
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(ListenError::Io(listen(), error)),
        Ok(metadata) if !metadata.file_type().is_socket() => return Err(ListenError::NotASocket(path.to_path_buf())),
        Ok(_) => {}
    }
    match std::os::unix::net::UnixStream::connect(path) {
        // Nobody listens: a killed process left it.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|error| ListenError::Io(listen(), error))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(ListenError::Io(listen(), error)),
        Ok(_) | Err(_) => Err(ListenError::InUse(listen())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_left_behind_is_replaced_and_one_in_use_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let listen = Listen::Unix(dir.path().join("sock"));
        let path = dir.path().join("sock");
        // Dropped without removal of the file, as after a kill.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let listener = Listener::bind(&listen).unwrap();
        let error = Listener::bind(&listen).err().unwrap();
        assert!(matches!(error, ListenError::InUse(_)), "{error}");
        assert!(path.exists(), "the refused one took nothing away");
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_is_no_socket_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "data").unwrap();
        let error = Listener::bind(&Listen::Unix(path.clone())).err().unwrap();
        assert!(matches!(error, ListenError::NotASocket(_)), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"data");
        let long = dir.path().join("x".repeat(120));
        let error = Listener::bind(&Listen::Unix(long)).err().unwrap();
        assert!(error.to_string().contains("at most 107 bytes"), "{error}");
    }

    #[test]
    fn a_taken_port_is_said_so() {
        let first = Listener::bind(&Listen::Tcp("127.0.0.1:0".parse().unwrap())).unwrap();
        let error = Listener::bind(first.place()).err().unwrap();
        assert!(error.to_string().contains("the port is taken"), "{error}");
    }
}
