//! What a cluster's directory remembers from one start to the next: how many parts there are, and their ports.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::layout::Part;
use crate::failure::{Failure, Kind};
use crate::limits::{PORT_ATTEMPTS_MAX, PORTS};

const VERSION: u32 = 1;

/// The contents of `DIR/dev.toml`.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Memory {
    version: u32,
    /// Whether it has been ready for use once. A start that failed before has to be made good.
    was_ready: bool,
    /// By name of the part.
    parts: BTreeMap<String, Ports>,
}

/// The ports of one process, all on the loopback interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Ports {
    /// Where it serves; none for the export, which has a Unix socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    listen: Option<u16>,
    /// Where it shows its metrics.
    metrics: u16,
}

impl Memory {
    /// What a directory remembers; nothing for a new one.
    pub(crate) fn load(path: &Path) -> Result<Memory, Failure> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Memory {
                    version: VERSION,
                    was_ready: false,
                    parts: BTreeMap::new(),
                });
            }
            Err(error) => return Err(Failure::failed(format!("can't read {}: {error}", path.display()))),
        };
        let memory: Memory = toml::from_str(&text).map_err(|error| {
            Failure::failed(format!("{} is damaged: {}", path.display(), error.message()))
                .hint("It holds the ports of the cluster's processes: restore it, or choose another directory.")
        })?;
        if memory.version != VERSION {
            return Err(Failure::failed(format!(
                "{} has version {}; this cairn knows version {VERSION}",
                path.display(),
                memory.version
            ))
            .hint("Use the cairn that made this directory, or choose another directory."));
        }
        Ok(memory)
    }

    /// Written whole or not at all.
    pub(crate) fn store(&self, path: &Path) -> Result<(), Failure> {
        let text = toml::to_string(self).expect("ports and names can be written as TOML");
        let new = path.with_extension("new");
        fs::write(&new, text)
            .and_then(|()| fs::rename(&new, path))
            .map_err(|error| Failure::failed(format!("can't write {}: {error}", path.display())))
    }

    /// Whether nothing was ever started here.
    pub(crate) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Whether the cluster has been ready for use once.
    pub(crate) fn was_ready(&self) -> bool {
        self.was_ready
    }

    /// The cluster is ready for use.
    pub(crate) fn set_ready(&mut self) {
        self.was_ready = true;
    }

    /// How many metadata servers and storage nodes there are.
    pub(crate) fn counts(&self) -> (u32, u32) {
        let count = |command: &str| {
            let parts = self.parts.keys().filter_map(|name| name.parse::<Part>().ok());
            parts.filter(|part| part.command() == command).count() as u32
        };
        (count("meta"), count("node"))
    }

    /// All parts of the cluster, metadata servers first, the export last.
    pub(crate) fn parts(&self) -> Vec<Part> {
        let mut parts: Vec<Part> = self.parts.keys().filter_map(|name| name.parse().ok()).collect();
        parts.sort();
        parts
    }

    /// Where a part serves.
    pub(crate) fn listen(&self, part: Part) -> Option<SocketAddr> {
        self.parts.get(&part.to_string())?.listen.map(loopback)
    }

    /// Where a part shows its metrics.
    pub(crate) fn metrics(&self, part: Part) -> Option<SocketAddr> {
        self.parts.get(&part.to_string()).map(|ports| loopback(ports.metrics))
    }

    /// Gives every part the ports that it has had before, or free ones. A metadata server's address is known to the others
    /// and written in their logs: it can't be another one. Gives the parts whose ports had to be changed.
    ///
    /// # Errors
    /// A metadata server's port is taken, or no port is free.
    pub(crate) fn assign(&mut self, metas: u32, nodes: u32) -> Result<Vec<Part>, Failure> {
        let parts = (1..=metas)
            .map(Part::Meta)
            .chain((1..=nodes).map(Part::Node))
            .chain([Part::Export]);
        let mut chooser = Chooser::new(self.parts.values());
        let mut changed = Vec::new();
        for part in parts {
            let old = self.parts.get(&part.to_string()).copied();
            let mut ports = old.unwrap_or_default();
            if part != Part::Export {
                ports.listen = Some(match ports.listen {
                    Some(port) if is_free(port) => port,
                    Some(port) if matches!(part, Part::Meta(_)) => return Err(taken(part, port)),
                    _ => chooser.choose()?,
                });
            }
            if old.is_none() || !is_free(ports.metrics) {
                ports.metrics = chooser.choose()?;
            }
            if old.is_some_and(|old| old != ports) {
                changed.push(part);
            }
            self.parts.insert(part.to_string(), ports);
        }
        Ok(changed)
    }
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

fn is_free(port: u16) -> bool {
    TcpListener::bind(loopback(port)).is_ok()
}

fn taken(part: Part, port: u16) -> Failure {
    Failure::new(
        Kind::Occupied,
        format!("port {port} of {part} is in use by another process"),
    )
    .hint(format!(
        "The cluster was made with it. `ss -ltnp 'sport = :{port}'` shows who has it: stop that, and start again."
    ))
}

/// Chooses ports that are free and not yet chosen. It stays below the range from which the kernel takes the ports of
/// outgoing connections: those would be taken by somebody at the next start.
struct Chooser {
    chosen: Vec<u16>,
    next: u16,
}

impl Chooser {
    fn new<'a>(known: impl Iterator<Item = &'a Ports>) -> Chooser {
        let chosen = known
            .flat_map(|ports| ports.listen.into_iter().chain([ports.metrics]))
            .collect();
        let mut random = [0; 2];
        // Without randomness the first port is tried first, which is as good.
        let _ = getrandom::fill(&mut random);
        let next = PORTS.start + u16::from_le_bytes(random) % (PORTS.end - PORTS.start);
        Chooser { chosen, next }
    }

    fn choose(&mut self) -> Result<u16, Failure> {
        for _ in 0..PORT_ATTEMPTS_MAX {
            let port = self.next;
            self.next = if port + 1 < PORTS.end { port + 1 } else { PORTS.start };
            if !self.chosen.contains(&port) && is_free(port) {
                self.chosen.push(port);
                return Ok(port);
            }
        }
        Err(Failure::new(
            Kind::Occupied,
            format!(
                "found no free port among {PORT_ATTEMPTS_MAX} from {} to {}",
                PORTS.start,
                PORTS.end - 1
            ),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty() -> Memory {
        Memory {
            version: VERSION,
            was_ready: false,
            parts: BTreeMap::new(),
        }
    }

    #[test]
    fn ports_are_distinct_and_come_back_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dev.toml");
        let mut memory = Memory::load(&path).unwrap();
        assert!(memory.is_empty() && !memory.was_ready());
        assert_eq!(memory.assign(3, 2).unwrap(), []);
        assert_eq!(memory.counts(), (3, 2));
        assert_eq!(memory.parts().len(), 6);
        let ports = |memory: &Memory| -> Vec<_> {
            let parts = memory.parts();
            parts
                .iter()
                .flat_map(|part| [memory.listen(*part), memory.metrics(*part)])
                .flatten()
                .collect()
        };
        let before = ports(&memory);
        let mut distinct = before.clone();
        distinct.sort();
        distinct.dedup();
        assert_eq!((before.len(), distinct.len()), (11, 11));
        memory.store(&path).unwrap();
        let mut again = Memory::load(&path).unwrap();
        assert_eq!(again, memory);
        // One more node leaves the others as they were.
        again.assign(3, 3).unwrap();
        assert_eq!(again.counts(), (3, 3));
        assert_eq!(again.listen(Part::Meta(1)), memory.listen(Part::Meta(1)));
        assert_eq!(again.listen(Part::Node(2)), memory.listen(Part::Node(2)));
    }

    #[test]
    fn a_taken_port_of_a_node_is_changed_and_one_of_meta_is_refused() {
        let mut memory = empty();
        memory.assign(1, 1).unwrap();
        let node = memory.listen(Part::Node(1)).unwrap();
        let holder = TcpListener::bind(node).unwrap();
        assert_eq!(memory.assign(1, 1).unwrap(), [Part::Node(1)]);
        assert_ne!(memory.listen(Part::Node(1)), Some(node));
        drop(holder);
        let meta = memory.listen(Part::Meta(1)).unwrap();
        let _holder = TcpListener::bind(meta).unwrap();
        let failure = memory.assign(1, 1).unwrap_err();
        assert_eq!(failure.kind, Kind::Occupied);
        assert!(
            failure.what.contains(&format!("port {} of meta-1", meta.port())),
            "{failure}"
        );
    }

    #[test]
    fn a_damaged_or_newer_memory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dev.toml");
        fs::write(&path, "nonsense").unwrap();
        assert!(Memory::load(&path).unwrap_err().what.contains("is damaged"));
        fs::write(&path, "version = 2\nwas_ready = true\n[parts]\n").unwrap();
        assert!(Memory::load(&path).unwrap_err().what.contains("has version 2"));
    }
}
