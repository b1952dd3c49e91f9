//! Where everything of a cluster on this machine lies.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use crate::failure::Failure;
use crate::limits::UNIX_PATH_BYTES_MAX;

/// The directory of a cluster unless told otherwise, below the working directory.
const DEFAULT_DIR: &str = "cairn-data";

/// One process of the cluster.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Part {
    /// A metadata server, counted from 1.
    Meta(u32),
    /// A storage node, counted from 1.
    Node(u32),
    /// The export of all volumes.
    Export,
}

impl Part {
    /// The command that runs it.
    pub(crate) fn command(self) -> &'static str {
        match self {
            Part::Meta(_) => "meta",
            Part::Node(_) => "node",
            Part::Export => "export",
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Meta(k) | Part::Node(k) => write!(f, "{}-{k}", self.command()),
            Part::Export => f.write_str("export"),
        }
    }
}

impl std::str::FromStr for Part {
    type Err = ();

    fn from_str(text: &str) -> Result<Part, ()> {
        if text == "export" {
            return Ok(Part::Export);
        }
        let (command, k) = text.split_once('-').ok_or(())?;
        let number = k.parse().map_err(|_| ())?;
        let part = match command {
            "meta" => Part::Meta(number),
            "node" => Part::Node(number),
            _ => return Err(()),
        };
        // `node-01` and `node-0` are nobody's names.
        if number > 0 && part.to_string() == text {
            Ok(part)
        } else {
            Err(())
        }
    }
}

/// Paths within the directory of a cluster.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    dir: PathBuf,
}

impl Layout {
    /// For a directory that need not exist yet. Symbolic links in its path stay as they are.
    pub(crate) fn new(dir: Option<&Path>) -> Result<Layout, Failure> {
        let dir = dir.unwrap_or(Path::new(DEFAULT_DIR));
        let absolute = std::path::absolute(dir)
            .map_err(|error| Failure::usage(format!("--dir {} is no path: {error}", dir.display())))?;
        let layout = Layout { dir: absolute };
        let socket = layout.socket();
        let length = socket.as_os_str().len();
        if length > UNIX_PATH_BYTES_MAX {
            return Err(Failure::usage(format!(
                "the path of the socket would have {length} bytes, and the system allows {UNIX_PATH_BYTES_MAX}: {}",
                socket.display()
            ))
            .hint("Choose a directory with a shorter path, as --dir /tmp/cairn."));
        }
        if layout.dir.to_str().is_none() {
            return Err(
                Failure::usage(format!("--dir {} is not valid UTF-8", layout.dir.display()))
                    .hint("Choose a directory whose path is."),
            );
        }
        Ok(layout)
    }

    /// Makes the directories.
    pub(crate) fn create(&self) -> Result<(), Failure> {
        for dir in [self.dir.clone(), self.sub("run"), self.sub("log"), self.sub("conf")] {
            fs::create_dir_all(&dir).map_err(|error| {
                Failure::failed(format!("can't make the directory {}: {error}", dir.display()))
                    .hint("Choose one where this user may write, with --dir.")
            })?;
        }
        Ok(())
    }

    /// The directory itself.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// What other commands need to reach the cluster.
    pub(crate) fn config(&self) -> PathBuf {
        self.sub("cairn.toml")
    }

    /// The NBD socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.sub("nbd.sock")
    }

    /// The cluster key.
    pub(crate) fn key(&self) -> PathBuf {
        self.sub("cluster.key")
    }

    /// What is remembered from one start to the next.
    pub(crate) fn state(&self) -> PathBuf {
        self.sub("dev.toml")
    }

    /// Locked while a `cairn dev` uses the directory.
    pub(crate) fn lock(&self) -> PathBuf {
        self.sub("dev.lock")
    }

    /// Where a part keeps its data: a metadata server's log, a node's devices.
    pub(crate) fn data(&self, part: Part) -> PathBuf {
        self.sub(&part.to_string())
    }

    /// Configuration files of the parts.
    pub(crate) fn part_configs(&self) -> PathBuf {
        self.sub("conf")
    }

    /// The configuration file of a part.
    pub(crate) fn part_config(&self, part: Part) -> PathBuf {
        self.part_configs().join(format!("{part}.toml"))
    }

    /// The file with a part's process id.
    pub(crate) fn pid_file(&self, part: Part) -> PathBuf {
        self.sub("run").join(format!("{part}.pid"))
    }

    /// A part's log.
    pub(crate) fn log(&self, part: Part) -> PathBuf {
        self.sub("log").join(format!("{part}.log"))
    }

    /// Where a volume is, for NBD clients.
    pub(crate) fn uri(&self, volume: &str) -> String {
        format!(
            "nbd+unix:///{volume}?socket={}",
            percent_encoded(self.socket().as_os_str())
        )
    }

    fn sub(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

/// A path within the query of a URI: what has a meaning there, and what does not print, is written as `%XX`.
fn percent_encoded(path: &OsStr) -> String {
    let mut text = String::new();
    for byte in path.as_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' | b'~' | b'@' | b':' | b',' => {
                text.push(char::from(*byte));
            }
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_have_names_that_lead_back_to_them() {
        for part in [Part::Meta(1), Part::Node(12), Part::Export] {
            assert_eq!(part.to_string().parse(), Ok(part));
        }
        for wrong in ["meta", "meta-", "node-0", "node-01", "export-1", "x-1", ""] {
            assert!(wrong.parse::<Part>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_paths_are_those_of_the_contract() {
        let layout = Layout::new(Some(Path::new("/d"))).unwrap();
        assert_eq!(layout.pid_file(Part::Meta(1)), Path::new("/d/run/meta-1.pid"));
        assert_eq!(layout.pid_file(Part::Export), Path::new("/d/run/export.pid"));
        assert_eq!(layout.log(Part::Node(2)), Path::new("/d/log/node-2.log"));
        assert_eq!(layout.data(Part::Node(2)), Path::new("/d/node-2"));
        assert_eq!(layout.config(), Path::new("/d/cairn.toml"));
        assert_eq!(layout.uri("demo"), "nbd+unix:///demo?socket=/d/nbd.sock");
    }

    #[test]
    fn a_path_with_signs_that_mean_something_in_a_uri_is_written_so_that_they_do_not() {
        let layout = Layout::new(Some(Path::new("/a b/c&d#é"))).unwrap();
        assert_eq!(layout.uri("v"), "nbd+unix:///v?socket=/a%20b/c%26d%23%C3%A9/nbd.sock");
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_refused_with_words() {
        let long = format!("/{}", "x".repeat(110));
        let failure = Layout::new(Some(Path::new(&long))).unwrap_err();
        assert!(
            failure.what.contains("120 bytes, and the system allows 107"),
            "{failure}"
        );
        let fits = format!("/{}", "x".repeat(UNIX_PATH_BYTES_MAX - "//nbd.sock".len()));
        assert!(Layout::new(Some(Path::new(&fits))).is_ok());
    }
}
