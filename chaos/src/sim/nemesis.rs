//! What goes wrong: the kinds of fault that the simulator draws from. When one strikes and when it ends is drawn from
//! the seed; what it does to the world stands in `world`.

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = ($words:literal, $weight:literal),)*) => {
        /// A kind of fault.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        pub enum FaultKind {
            $($(#[$doc])* $name,)*
        }

        impl FaultKind {
            /// Every kind, in order.
            pub const ALL: [FaultKind; FaultKind::COUNT] = [$(FaultKind::$name,)*];
            /// How many kinds there are.
            pub const COUNT: usize = [$($weight,)*].len();

            /// What it is called; by the catalogue too, which puts some together.
            pub fn name(self) -> &'static str {
                match self {
                    $(FaultKind::$name => $words,)*
                }
            }

            /// How often it comes beside the others.
            pub fn weight(self) -> u32 {
                match self {
                    $(FaultKind::$name => $weight,)*
                }
            }
        }
    };
}

impl FaultKind {
    /// Whether it comes only in seeds that are made for it: it harms what lies on a device, so that not everything else may
    /// go wrong at the same time.
    pub fn is_harm(self) -> bool {
        use FaultKind as F;
        matches!(self, F::BitRot | F::LostWrite | F::Misdirected | F::StaleSector) || self.is_loss()
    }

    /// Whether it is what an operator does, in seeds with one who does something.
    pub fn is_operation(self) -> bool {
        matches!(self, FaultKind::Drain | FaultKind::AddNode)
    }

    /// Whether what lies on a device is lost, or away for long.
    pub fn is_loss(self) -> bool {
        use FaultKind as F;
        matches!(
            self,
            F::Wiped | F::Swapped | F::Replaced | F::NodeLost | F::NodeBack | F::DomainGone
        )
    }
}

kinds! {
    /// A metadata server is killed.
    KillMeta = ("kill-meta", 4),
    /// A node is killed.
    KillNode = ("kill-node", 8),
    /// A client is killed.
    KillClient = ("kill-client", 4),
    /// Everything is killed.
    KillAll = ("kill-all", 1),
    /// A node's host loses its power.
    PowerNode = ("power-cut", 6),
    /// Every host loses its power.
    PowerAll = ("power-cut-all", 2),
    /// A process stops for a while.
    Freeze = ("freeze", 6),
    /// A process is cut off.
    Isolate = ("isolate", 6),
    /// One direction between two processes is cut.
    OneWay = ("one-way", 6),
    /// A way between two processes is cut and opened in quick turns.
    Flapping = ("flapping", 3),
    /// The metadata servers are split.
    SplitMeta = ("partition-meta", 2),
    /// Everything to and from a process is slow.
    SlowNetwork = ("delay", 3),
    /// A connection ends in the middle of a frame.
    Reset = ("reset", 5),
    /// A connection falls silent.
    HalfOpen = ("half-open", 4),
    /// A device is slow.
    SlowDisk = ("slow-disk", 4),
    /// A device answers nothing.
    StuckDisk = ("stuck-disk", 3),
    /// A second client takes a volume.
    TakeOver = ("take-over", 6),
    /// A second client takes a volume while the first is cut off, frozen, or waits for a device.
    Zombie = ("zombie", 6),
    /// Holders of a group that come one after the other reach different members of it.
    Split = ("split-holders", 3),
    /// A volume moves from one client to another while its guest goes on.
    HandOver = ("hand-over", 3),
    /// A volume grows under load.
    Grow = ("grow", 2),
    /// The clock of a client or of a metadata server jumps forward.
    ClockJump = ("jump", 3),
    /// Reads of a device fail.
    ReadError = ("read-error", 2),
    /// Writes and flushes of a device fail.
    WriteError = ("write-error", 2),
    /// Stored bits flip: on one device only, the same each time.
    BitRot = ("bit-rot", 2),
    /// A device says that it has written, and has not: the same device as above.
    LostWrite = ("lost-write", 3),
    /// What a device was to write lands in another place of it.
    Misdirected = ("misdirected", 3),
    /// A sector of a device is as it was before it was last written.
    StaleSector = ("stale-sector", 3),
    /// A device is formatted anew.
    Wiped = ("wiped", 2),
    /// Two nodes get each other's device.
    Swapped = ("swapped", 1),
    /// An empty device takes the place of one.
    Replaced = ("replaced", 2),
    /// A node is gone for good.
    NodeLost = ("node-lost", 2),
    /// A node comes back when its copies were made anew elsewhere.
    NodeBack = ("node-back", 3),
    /// All nodes of a rack are gone for good.
    DomainGone = ("domain-gone", 3),
    /// A volume is released.
    Release = ("release", 3),
    /// One node, the same each time, stays away for long.
    NodeGone = ("node-gone", 2),
    /// One node, the same each time, is slow for long.
    GreyNode = ("grey-node", 2),
    /// A node is to hold nothing, for good or for a while.
    Drain = ("drain", 2),
    /// A node with an empty device is added.
    AddNode = ("add-node", 2),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::faults::{CATALOGUE, Injected};

    #[test]
    fn every_kind_stands_in_the_catalogue_as_injected() {
        for kind in FaultKind::ALL {
            let name = match kind {
                FaultKind::LostWrite => "misdirected",
                FaultKind::Swapped => "wiped",
                kind => kind.name().trim_end_matches("-all"),
            };
            let fault = CATALOGUE
                .iter()
                .find(|fault| fault.name.trim_end_matches("-all") == name);
            assert_eq!(fault.map(|fault| fault.sim), Some(Injected::Yes), "{}", kind.name());
        }
    }
}
