//! Network namespaces: each process in a network of its own, all joined by a bridge, and ways between them that are cut. Needs
//! root and `ip` (package iproute2).
//!
//! A way is cut at its end, by a routing rule of the receiver that drops what comes from the sender: nobody is told, connections stay,
//! and what TCP sends again arrives when the way is open. That needs neither netem nor a firewall in the kernel.
//!
//! Names begin with `cz` and the process id of their owner. What an owner that died left is removed by [`sweep`], which every
//! new network calls.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use super::limits::NAMESPACES_MAX;
use crate::live::tools;

/// What all names begin with.
const PREFIX: &str = "cz";
/// The interface of a process, within its namespace.
const INTERFACE: &str = "eth0";
/// Rules that drop come first; the kernel's own rule for local addresses, which is otherwise the first of all, comes after them.
const DROP_PREFERENCE: &str = "10";
const LOCAL_PREFERENCE: &str = "100";

/// Tells networks of one process apart.
static NETWORKS: AtomicU32 = AtomicU32::new(0);

/// Whether namespaces can be made here; says SKIPPED and why if not.
pub fn available() -> bool {
    if !tools::available(&[("ip", "iproute2")]) {
        return false;
    }
    if !rustix::process::geteuid().is_root() {
        return tools::skip("needs root, for network namespaces");
    }
    // A container may be root and still not be allowed to.
    let name = format!("{PREFIX}{}probe", std::process::id());
    let made = ip(["netns", "add", &name]);
    let _ = ip(["netns", "del", &name]);
    match made {
        Ok(_) => true,
        Err(error) => tools::skip(&format!("needs network namespaces: {error}")),
    }
}

fn ip<const N: usize>(args: [&str; N]) -> io::Result<String> {
    let program = tools::find("ip").ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            "there is no `ip`: install the package iproute2",
        )
    })?;
    let output = Command::new(program).args(args).output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let words = String::from_utf8_lossy(&output.stderr).trim().to_string();
    Err(io::Error::other(format!("ip {}: {words}", args.join(" "))))
}

/// A bridge with namespaces; all of it goes when it is dropped. Processes in it are their owner's, who ends them first.
#[derive(Debug)]
pub struct Network {
    /// What its names begin with.
    name: String,
    subnet: [u8; 3],
    joined: u8,
    /// Ways that are cut: from, to.
    cut: BTreeSet<(u8, u8)>,
    /// Those whose cables are pulled.
    isolated: BTreeSet<u8>,
}

/// A namespace of a network.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Namespace(u8);

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "namespace {}", self.0)
    }
}

impl Network {
    /// A bridge without namespaces. The caller itself is on it, too: see [`Network::gateway`].
    ///
    /// # Errors
    /// What `ip` says.
    pub fn new() -> io::Result<Network> {
        sweep();
        let number = NETWORKS.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let place = pid.wrapping_mul(31).wrapping_add(number);
        let network = Network {
            name: format!("{PREFIX}{pid}{}", letter(number)),
            subnet: [10, 200 + (place / 251 % 50) as u8, (place % 251) as u8],
            joined: 0,
            cut: BTreeSet::new(),
            isolated: BTreeSet::new(),
        };
        // From here on dropping it takes away what there is.
        let bridge = network.bridge();
        ip(["link", "add", &bridge, "type", "bridge"])?;
        let gateway = format!("{}/24", network.gateway());
        ip(["address", "add", &gateway, "dev", &bridge])?;
        ip(["link", "set", &bridge, "up"])?;
        Ok(network)
    }

    fn bridge(&self) -> String {
        format!("{}br", self.name)
    }

    /// The address of the caller, which is in no namespace. Ways from and to it can't be cut one by one, but
    /// [`Network::isolate`] works.
    pub fn gateway(&self) -> Ipv4Addr {
        let [a, b, c] = self.subnet;
        Ipv4Addr::new(a, b, c, 1)
    }

    /// The name of a namespace, as `ip netns` knows it.
    pub fn name(&self, namespace: Namespace) -> String {
        format!("{}{}", self.name, namespace.0)
    }

    /// The address of a namespace.
    pub fn address(&self, namespace: Namespace) -> Ipv4Addr {
        let [a, b, c] = self.subnet;
        Ipv4Addr::new(a, b, c, namespace.0 + 1)
    }

    /// One more namespace, with an address of its own.
    ///
    /// # Errors
    /// There are too many, or what `ip` says.
    pub fn join(&mut self) -> io::Result<Namespace> {
        if self.joined >= NAMESPACES_MAX {
            return Err(io::Error::other(format!(
                "a network has at most {NAMESPACES_MAX} namespaces"
            )));
        }
        self.joined += 1;
        let namespace = Namespace(self.joined);
        let (name, outer) = (self.name(namespace), self.outer(namespace));
        let address = format!("{}/24", self.address(namespace));
        ip(["netns", "add", &name])?;
        ip([
            "link", "add", &outer, "type", "veth", "peer", "name", INTERFACE, "netns", &name,
        ])?;
        ip(["link", "set", &outer, "master", &self.bridge(), "up"])?;
        ip(["-n", &name, "address", "add", &address, "dev", INTERFACE])?;
        ip(["-n", &name, "link", "set", "lo", "up"])?;
        ip(["-n", &name, "link", "set", INTERFACE, "up"])?;
        ip(["-n", &name, "rule", "add", "pref", LOCAL_PREFERENCE, "lookup", "local"])?;
        ip(["-n", &name, "rule", "del", "pref", "0"])?;
        Ok(namespace)
    }

    /// The end of its cable that is on the bridge.
    fn outer(&self, namespace: Namespace) -> String {
        format!("{}v{}", self.name, namespace.0)
    }

    /// A command that runs a program in a namespace.
    pub fn command(&self, namespace: Namespace, program: impl AsRef<OsStr>) -> Command {
        // Without it nothing could have joined.
        let mut command = Command::new(tools::find("ip").unwrap_or_else(|| PathBuf::from("ip")));
        command.args(["netns", "exec", &self.name(namespace)]).arg(program);
        command
    }

    /// Nothing from the one arrives at the other any more; the other way stays open.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn cut(&mut self, from: Namespace, to: Namespace) -> io::Result<()> {
        if self.cut.contains(&(from.0, to.0)) {
            return Ok(());
        }
        self.rule("add", from, to)?;
        self.cut.insert((from.0, to.0));
        Ok(())
    }

    /// Opens that way again.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn open(&mut self, from: Namespace, to: Namespace) -> io::Result<()> {
        if !self.cut.contains(&(from.0, to.0)) {
            return Ok(());
        }
        self.rule("del", from, to)?;
        self.cut.remove(&(from.0, to.0));
        Ok(())
    }

    fn rule(&self, verb: &str, from: Namespace, to: Namespace) -> io::Result<()> {
        let (name, address) = (self.name(to), self.address(from).to_string());
        let rule = ["pref", DROP_PREFERENCE, "from", &address, "iif", INTERFACE, "blackhole"];
        let [a, b, c, d, e, f, g] = rule;
        ip(["-n", &name, "rule", verb, a, b, c, d, e, f, g]).map(drop)
    }

    /// Pulls its cable: nothing goes in or out. Its interface has no carrier then; processes are not told.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn isolate(&mut self, namespace: Namespace) -> io::Result<()> {
        ip(["link", "set", &self.outer(namespace), "down"])?;
        self.isolated.insert(namespace.0);
        Ok(())
    }

    /// Opens all ways.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn heal(&mut self) -> io::Result<()> {
        for (from, to) in self.cut.clone() {
            self.open(Namespace(from), Namespace(to))?;
        }
        for number in self.isolated.clone() {
            ip(["link", "set", &self.outer(Namespace(number)), "up"])?;
            self.isolated.remove(&number);
        }
        Ok(())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // Each fails only if it was never made.
        for number in 1..=self.joined {
            let _ = ip(["netns", "del", &self.name(Namespace(number))]);
            let _ = ip(["link", "del", &self.outer(Namespace(number))]);
        }
        let _ = ip(["link", "del", &self.bridge()]);
    }
}

/// A letter, so that the number of a network does not run into the process id.
fn letter(number: u32) -> char {
    char::from(b'a' + (number % 26) as u8)
}

/// The process id in a name of ours.
fn owner(name: &str) -> Option<u32> {
    let rest = name.strip_prefix(PREFIX)?;
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    rest[..end].parse().ok()
}

/// Removes namespaces and interfaces whose owners are dead. Gives how many.
pub fn sweep() -> usize {
    let dead = |name: &String| owner(name).is_some_and(|pid| !PathBuf::from(format!("/proc/{pid}")).exists());
    let names = |dir: &str| -> Vec<String> {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(dead)
            .collect()
    };
    let namespaces = names("/run/netns");
    let gone = namespaces
        .iter()
        .filter(|name| ip(["netns", "del", name]).is_ok())
        .count();
    // Cables go with their namespaces, a moment later.
    let links = names("/sys/class/net");
    gone + links.iter().filter(|name| ip(["link", "del", name]).is_ok()).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_its_owner() {
        assert_eq!(owner("cz123a4"), Some(123));
        assert_eq!(owner("cz77abr"), Some(77));
        assert_eq!(owner("czech"), None);
        assert_eq!(owner("eth0"), None);
    }

    #[test]
    fn names_fit_into_an_interfaces() {
        // 15 bytes are all that the kernel takes; process ids end at 4194304.
        let network = Network {
            name: format!("{PREFIX}4194304{}", letter(25)),
            subnet: [10, 200, 0],
            joined: 0,
            cut: BTreeSet::new(),
            isolated: BTreeSet::new(),
        };
        assert!(network.outer(Namespace(NAMESPACES_MAX)).len() <= 15);
        assert!(network.bridge().len() <= 15);
    }
}
