//! What a search covers: bounds, and kinds of action that happen at all. Small worlds are searched whole.

use super::state::{Config, Device, HOLDERS, Holder, Phase, Set, State};

/// How reads are allowed to answer (rules 8 and 17).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reads {
    /// There are none.
    No,
    /// Members confirm each.
    Confirmed,
    /// Under read grants.
    Granted,
}

/// A search's bounds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Scope {
    /// What the command calls it.
    pub name: &'static str,
    /// Blocks.
    pub blocks: u8,
    /// Writes per holder.
    pub writes: [u8; HOLDERS],
    /// Discards among the writes.
    pub discards: bool,
    /// Reads.
    pub reads: Reads,
    /// Holders, with the first, which serves from the start.
    pub holders: u8,
    /// Configuration changes.
    pub changes: u8,
    /// Members are ejected.
    pub ejects: bool,
    /// Members join and are admitted.
    pub joins: bool,
    /// Answers that are late at one time.
    pub late: u8,
    /// Holders release their attachment in order.
    pub releases: bool,
    /// Devices outside the group drop their replica.
    pub forgets: bool,
    /// Holders hear that they are refused, and die of it. Never acting again is the same to everyone else, so it is
    /// left out where every state counts.
    pub refusals: bool,
}

/// What is searched whole before a change lands: together a few minutes.
pub const SCOPES: &[(Scope, &str)] = &[
    (
        Scope {
            ejects: true,
            changes: 2,
            reads: Reads::Confirmed,
            ..Scope::plain("take-over")
        },
        "a second holder takes over; reads are confirmed; members are ejected",
    ),
    (
        Scope {
            ejects: true,
            changes: 2,
            reads: Reads::Granted,
            ..Scope::plain("grants")
        },
        "the same with read grants",
    ),
    (
        Scope {
            ejects: true,
            changes: 2,
            late: 1,
            ..Scope::plain("late-answers")
        },
        "a second holder takes over; answers come late",
    ),
    (
        Scope {
            ejects: true,
            changes: 2,
            holders: 3,
            writes: [1, 1, 1, 0],
            ..Scope::plain("three-holders")
        },
        "two take-overs, two changes, each holder writes",
    ),
    (
        Scope {
            ejects: true,
            changes: 2,
            holders: 3,
            writes: [1, 0, 1, 0],
            reads: Reads::Confirmed,
            ..Scope::plain("three-readers")
        },
        "two take-overs, two changes, reads",
    ),
    (
        Scope {
            ejects: true,
            joins: true,
            changes: 3,
            ..Scope::plain("joins")
        },
        "a second holder takes over; members are ejected, the spare joins, ejected ones join again",
    ),
    (
        Scope {
            ejects: true,
            joins: true,
            forgets: true,
            changes: 3,
            writes: [1, 0, 0, 0],
            ..Scope::plain("replaced")
        },
        "the same with replicas that are dropped",
    ),
    (
        Scope {
            blocks: 2,
            ejects: true,
            changes: 1,
            writes: [2, 1, 0, 0],
            ..Scope::plain("two-blocks")
        },
        "writes of two blocks at once, a second holder takes over",
    ),
    (
        Scope {
            discards: true,
            ejects: true,
            joins: true,
            holders: 1,
            changes: 3,
            writes: [2, 0, 0, 0],
            ..Scope::plain("discards")
        },
        "writes and discards, dropped tombstones, members come and go",
    ),
    (
        Scope {
            releases: true,
            holders: 3,
            writes: [1, 1, 0, 0],
            reads: Reads::Confirmed,
            ..Scope::plain("hand-over")
        },
        "holders release in order, or are taken over from",
    ),
];

/// Larger ones, for a machine that has nothing else to do; they end at the bound of memory at the latest.
pub const DEEP: &[(Scope, &str)] = &[
    (
        Scope {
            ejects: true,
            joins: true,
            changes: 2,
            reads: Reads::Confirmed,
            ..Scope::plain("deep-joins")
        },
        "a second holder takes over; members come and go; reads",
    ),
    (
        Scope {
            ejects: true,
            joins: true,
            holders: 3,
            changes: 2,
            writes: [1, 1, 0, 0],
            ..Scope::plain("deep-three")
        },
        "two take-overs, two changes, with the spare",
    ),
    (
        Scope {
            ejects: true,
            joins: true,
            changes: 2,
            holders: 3,
            writes: [1, 1, 1, 0],
            reads: Reads::Confirmed,
            ..Scope::plain("deep-holders")
        },
        "two take-overs, two changes, with the spare; each holder writes and reads",
    ),
    (
        Scope {
            ejects: true,
            changes: 2,
            holders: 3,
            writes: [1, 1, 1, 0],
            reads: Reads::Confirmed,
            ..Scope::plain("deep-readers")
        },
        "two take-overs, two changes, each holder writes and reads",
    ),
    (
        Scope {
            discards: true,
            ejects: true,
            joins: true,
            changes: 2,
            writes: [2, 1, 0, 0],
            ..Scope::plain("deep-discards")
        },
        "a second holder takes over; discards, members come and go",
    ),
    (
        Scope {
            blocks: 2,
            discards: true,
            writes: [2, 1, 0, 0],
            reads: Reads::Confirmed,
            ..Scope::plain("deep-two-blocks")
        },
        "a second holder takes over; discards and reads of two blocks",
    ),
    (
        Scope {
            ejects: true,
            joins: true,
            holders: 3,
            changes: 4,
            writes: [1, 1, 1, 0],
            late: 2,
            forgets: true,
            releases: true,
            ..Scope::plain("deep-all")
        },
        "three holders and everything that may happen to members; answers come late",
    ),
];

impl Scope {
    /// Nothing but attachments and writes: what others add to.
    pub const fn plain(name: &'static str) -> Scope {
        Scope {
            name,
            blocks: 1,
            writes: [1, 1, 0, 0],
            discards: false,
            reads: Reads::No,
            holders: 2,
            changes: 0,
            ejects: false,
            joins: false,
            late: 0,
            releases: false,
            forgets: false,
            refusals: false,
        }
    }

    /// The world at the start: h1 serves an empty volume on a, b and c.
    pub fn start(&self) -> State {
        let insync = Set(0b0111);
        let config = Config {
            epoch: 0,
            insync,
            joining: Set::NONE,
        };
        let mut state = State {
            meta: super::state::Meta {
                granted: 1,
                config,
                proposer: 0,
            },
            devices: Default::default(),
            holders: [Holder::default(); HOLDERS],
            net: Default::default(),
            watch: Default::default(),
        };
        let cells = [super::state::Cell::EMPTY; super::state::BLOCKS];
        for (place, device) in state.devices.iter_mut().enumerate() {
            let member = insync.has(place as u8);
            *device = Device {
                seal: u8::from(member),
                seal_on_disk: u8::from(member),
                replica: member,
                cells,
                cells_on_disk: cells,
                ..Device::default()
            };
        }
        let first = state.holder_mut(1);
        first.phase = Phase::Serving;
        first.config = config;
        first.complete = true;
        first.sealed = insync;
        for member in insync.iter() {
            first.known[member as usize] = cells;
        }
        if self.forgets {
            // What created the replicas may arrive again.
            for device in insync.iter() {
                state.net.send(super::message::Message::Join {
                    holder: 1,
                    device,
                    epoch: 0,
                });
            }
        }
        state
    }
}
