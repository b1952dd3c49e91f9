//! The fault catalogue: what is injected, by whom, and what may be noticed. `chaos list` prints it.

use std::fmt;

/// How far a fault can be injected in one of the two worlds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Injected {
    /// It is.
    Yes,
    /// Not yet.
    NotYet,
    /// It makes no sense there.
    Never,
}

impl fmt::Display for Injected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Injected::Yes => "yes",
            Injected::NotYet => "not yet",
            Injected::Never => "–",
        })
    }
}

/// One fault.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Where it strikes.
    pub layer: &'static str,
    /// What it is called.
    pub name: &'static str,
    /// What happens.
    pub what: &'static str,
    /// In the simulator.
    pub sim: Injected,
    /// With real processes.
    pub live: Injected,
    /// What a user may notice.
    pub noticed: &'static str,
}

const fn fault(
    layer: &'static str,
    name: &'static str,
    what: &'static str,
    sim: Injected,
    noticed: &'static str,
) -> Fault {
    let live = Injected::NotYet;
    Fault {
        layer,
        name,
        what,
        sim,
        live,
        noticed,
    }
}

impl Fault {
    /// It is injected with real processes too.
    const fn live(mut self) -> Fault {
        self.live = Injected::Yes;
        self
    }

    /// It makes no sense with real processes: their connections repeat nothing, they share one clock, and nobody can
    /// choose what each of them hears.
    const fn never_live(mut self) -> Fault {
        self.live = Injected::Never;
        self
    }
}

const PAUSE: &str = "a pause, no error";
const NOTHING: &str = "nothing";
const WAITS: &str = "I/O waits while a quorum is away, no error";

/// All faults, by layer.
pub const CATALOGUE: &[Fault] = &[
    fault(
        "process",
        "kill-meta",
        "a metadata server is killed and comes back",
        Injected::Yes,
        NOTHING,
    )
    .live(),
    fault(
        "process",
        "kill-node",
        "a storage node is killed and comes back",
        Injected::Yes,
        PAUSE,
    )
    .live(),
    fault(
        "process",
        "kill-client",
        "a client is killed, in mid-write too, and comes back",
        Injected::Yes,
        "its I/O ends",
    )
    .live(),
    fault(
        "process",
        "kill-all",
        "everything is killed at once and comes back in any order",
        Injected::Yes,
        WAITS,
    )
    .live(),
    fault(
        "process",
        "freeze",
        "a process stops for 100 ms to 5 s, then goes on",
        Injected::Yes,
        PAUSE,
    )
    .live(),
    fault(
        "process",
        "slow-start",
        "processes come back late and in any order",
        Injected::Yes,
        WAITS,
    )
    .live(),
    fault(
        "network",
        "delay",
        "frames and messages take long, now and then very long",
        Injected::Yes,
        NOTHING,
    )
    .live(),
    fault(
        "network",
        "loss",
        "messages of Raft and of the control plane are lost",
        Injected::Yes,
        NOTHING,
    )
    .live(),
    fault(
        "network",
        "duplicate",
        "messages of Raft and of the control plane come twice",
        Injected::Yes,
        NOTHING,
    )
    .never_live(),
    fault(
        "network",
        "reorder",
        "messages overtake each other; connections do among themselves",
        Injected::Yes,
        NOTHING,
    )
    .live(),
    fault(
        "network",
        "half-open",
        "a connection falls silent and nobody is told",
        Injected::Yes,
        PAUSE,
    )
    .live(),
    fault(
        "network",
        "reset",
        "a connection ends in the middle of a frame",
        Injected::Yes,
        PAUSE,
    )
    .live(),
    fault(
        "network",
        "isolate",
        "a process is cut off from all others",
        Injected::Yes,
        WAITS,
    )
    .live(),
    fault(
        "network",
        "one-way",
        "one direction between two processes is cut",
        Injected::Yes,
        PAUSE,
    )
    .live(),
    fault(
        "network",
        "flapping",
        "a way is cut and opened again in quick turns",
        Injected::Yes,
        PAUSE,
    )
    .live(),
    fault(
        "network",
        "partition-meta",
        "the metadata servers are split",
        Injected::Yes,
        NOTHING,
    )
    .live(),
    fault("network", "corrupt", "a bit of a frame flips", Injected::Yes, PAUSE).live(),
    fault(
        "network",
        "foreign",
        "wrong protocol, oversized frame, slow-loris, port scan",
        Injected::NotYet,
        NOTHING,
    )
    .live(),
    fault(
        "disk",
        "power-cut",
        "unflushed writes are lost, torn at 512 bytes, reordered",
        Injected::Yes,
        WAITS,
    )
    .live(),
    fault(
        "disk",
        "slow-disk",
        "everything on a device takes many times as long",
        Injected::Yes,
        "slower writes",
    )
    .live(),
    fault(
        "disk",
        "stuck-disk",
        "a device answers nothing for a while",
        Injected::Yes,
        PAUSE,
    )
    .live(),
    fault("disk", "read-error", "reads fail for a while", Injected::Yes, NOTHING).live(),
    fault(
        "disk",
        "write-error",
        "writes and flushes fail for a while: the device is given up until its process starts anew",
        Injected::Yes,
        PAUSE,
    )
    .live(),
    fault(
        "disk",
        "full",
        "a device is full",
        Injected::NotYet,
        "ENOSPC for what needs space",
    )
    .live(),
    fault(
        "disk",
        "bit-rot",
        "stored bits of guests flip on one device",
        Injected::Yes,
        NOTHING,
    )
    .live(),
    fault(
        "disk",
        "misdirected",
        "a write lands elsewhere, or nowhere",
        Injected::Yes,
        NOTHING,
    )
    .live(),
    fault(
        "disk",
        "stale-sector",
        "a sector is as it was before it was last written",
        Injected::Yes,
        NOTHING,
    )
    .live(),
    fault(
        "disk",
        "wiped",
        "a device is formatted anew or swapped with another",
        Injected::Yes,
        WAITS,
    )
    .live(),
    fault(
        "clock",
        "drift",
        "clocks run a little fast or slow",
        Injected::Yes,
        NOTHING,
    )
    .never_live(),
    fault(
        "clock",
        "pause",
        "time goes on while a process does not",
        Injected::Yes,
        PAUSE,
    )
    .live(),
    fault(
        "clock",
        "jump",
        "the clock of a client or of a metadata server jumps forward",
        Injected::Yes,
        NOTHING,
    )
    .never_live(),
    fault(
        "cluster",
        "node-gone",
        "a node stays away for the rest of the run, or comes and goes",
        Injected::Yes,
        PAUSE,
    )
    .live(),
    fault(
        "cluster",
        "grey-node",
        "a node's device or network is slow for seconds",
        Injected::Yes,
        PAUSE,
    )
    .live(),
    fault("cluster", "node-lost", "a node is gone for good", Injected::Yes, PAUSE).live(),
    fault(
        "cluster",
        "node-back",
        "a node comes back when its copies were made anew elsewhere",
        Injected::Yes,
        PAUSE,
    )
    .live(),
    fault(
        "cluster",
        "domain-gone",
        "a whole failure domain is gone",
        Injected::Yes,
        NOTHING,
    )
    .live(),
    fault(
        "cluster",
        "replaced",
        "a device is replaced by an empty one",
        Injected::Yes,
        NOTHING,
    )
    .live(),
    fault(
        "client",
        "take-over",
        "a second client takes a volume, the first does not know",
        Injected::Yes,
        "the first gets errors",
    )
    .live(),
    fault(
        "client",
        "zombie",
        "a second client takes a volume while the first is cut off, frozen, or waits for a device",
        Injected::Yes,
        "the first gets errors",
    )
    .live(),
    fault(
        "client",
        "split-holders",
        "holders that follow each other reach different members, and end in mid-write, in reconcile, or when the configuration changes",
        Injected::Yes,
        "all but the last get errors",
    )
    .never_live(),
    fault(
        "client",
        "hand-over",
        "a volume moves to another client in mid-write: the source drains and releases, the target goes on",
        Injected::Yes,
        "a pause, no error",
    )
    .live(),
    fault(
        "client",
        "death-in-write",
        "a client dies with writes under way",
        Injected::Yes,
        "its I/O ends",
    )
    .live(),
    fault(
        "client",
        "death-in-reconcile",
        "a client dies while it takes a volume over",
        Injected::Yes,
        "its I/O ends",
    )
    .live(),
    fault(
        "client",
        "release",
        "a volume is released and attached again, here or elsewhere",
        Injected::Yes,
        NOTHING,
    )
    .live(),
    Fault {
        layer: "operation",
        name: "upgrade",
        what: "one process at a time is upgraded under load",
        sim: Injected::Never,
        live: Injected::Yes,
        noticed: NOTHING,
    },
    Fault {
        layer: "operation",
        name: "grow",
        what: "a volume grows under load",
        sim: Injected::Yes,
        live: Injected::Yes,
        noticed: NOTHING,
    },
    Fault {
        layer: "operation",
        name: "drain",
        what: "a node is drained under load",
        sim: Injected::Yes,
        live: Injected::Yes,
        noticed: NOTHING,
    },
    Fault {
        layer: "operation",
        name: "add-node",
        what: "a node is added under load",
        sim: Injected::Yes,
        live: Injected::Yes,
        noticed: NOTHING,
    },
    Fault {
        layer: "operation",
        name: "config-error",
        what: "a process is started with a device, an address, a key or a directory that is not for it",
        sim: Injected::Never,
        live: Injected::Yes,
        noticed: "it is refused, with words",
    },
];

/// The catalogue as a table.
pub fn table() -> String {
    let mut out = format!(
        "{:<10} {:<19} {:<8} {:<8} {}\n",
        "LAYER", "FAULT", "SIM", "LIVE", "WHAT HAPPENS → WHAT IS NOTICED"
    );
    for fault in CATALOGUE {
        let Fault {
            layer,
            name,
            what,
            sim,
            live,
            noticed,
        } = fault;
        out += &format!("{layer:<10} {name:<19} {sim:<8} {live:<8} {what} → {noticed}\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_has_a_name_of_its_own() {
        let mut names: Vec<_> = CATALOGUE.iter().map(|fault| fault.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), CATALOGUE.len());
        assert!(table().lines().count() == CATALOGUE.len() + 1);
    }
}
