//! The processes of a world, by name.

use std::fmt;

/// A process: the same one after each of its restarts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Process {
    /// A metadata server.
    Meta(u8),
    /// A storage node with its device.
    Node(u8),
    /// A client with its volumes.
    Client(u8),
    /// What takes care of volumes on a node. In production it is part of the node's process; here it ends with that, and can be
    /// at fault alone, too.
    Caretaker(u8),
    /// Who sets the cluster up; never at fault.
    Operator,
}

impl Process {
    /// For the hash chain of the trace.
    pub fn number(self) -> u64 {
        match self {
            Process::Meta(i) => u64::from(i),
            Process::Node(i) => 0x100 | u64::from(i),
            Process::Client(i) => 0x200 | u64::from(i),
            Process::Operator => 0x300,
            Process::Caretaker(i) => 0x400 | u64::from(i),
        }
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Process::Meta(i) => write!(f, "meta-{i}"),
            Process::Node(i) => write!(f, "node-{i}"),
            Process::Client(i) => write!(f, "client-{i}"),
            Process::Caretaker(i) => write!(f, "caretaker-{i}"),
            Process::Operator => f.write_str("operator"),
        }
    }
}
