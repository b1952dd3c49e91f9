//! Planted bugs, one at a time: each must be found by the simulator or by chaos with real processes, or those prove nothing.
//! A process that was built with them serves only with the one that its environment names, or with none if it says so: the same
//! program without any of them must pass what finds them.

use std::fmt;
use std::sync::OnceLock;

use cairn_meta::heal::Duty;
use cairn_proto::replication::limits::Canary as CoordinatorCanary;
use cairn_storage_node::host::Canary as HostCanary;
use cairn_storage_node::store::Canary as StoreCanary;

/// Names the planted bug of a process.
pub const VARIABLE: &str = "CAIRN_PLANTED";
/// Its value for a process without any.
pub const NONE: &str = "none";

static CHOSEN: OnceLock<Planted> = OnceLock::new();

macro_rules! planted {
    ($($(#[$doc:meta])* $name:ident = ($words:literal, $where:literal),)*) => {
        /// A planted bug.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Planted {
            $($(#[$doc])* $name,)*
        }

        impl Planted {
            /// Every one.
            pub const ALL: &'static [Planted] = &[$(Planted::$name,)*];

            /// What the command calls it.
            pub fn name(self) -> &'static str {
                match self { $(Planted::$name => $words,)* }
            }

            /// Whose bug it would be.
            pub fn component(self) -> &'static str {
                match self { $(Planted::$name => $where,)* }
            }
        }
    };
}

planted! {
    /// A write is answered when it is written, not when it is flushed.
    AckBeforeFlush = ("ack-before-flush", "store"),
    /// Recovery believes the last record without looking at its data.
    SkipDataChecksum = ("skip-data-checksum", "store"),
    /// Blocks are free for others as soon as what supersedes them is being written.
    ReuseTooEarly = ("reuse-too-early", "store"),
    /// A discard leaves no version behind.
    ForgetTombstones = ("forget-tombstones", "store"),
    /// Writes and copies of lower generations are applied.
    GenerationIgnored = ("generation-ignored", "host"),
    /// A seal is answered before it is durable.
    SealNotDurable = ("seal-not-durable", "host"),
    /// A seal is answered although an older holder's read grant has not run out.
    GrantIgnored = ("grant-ignored", "host"),
    /// A seal is answered although writes of an older holder are under way.
    WritesOvertakeSeal = ("writes-overtake-seal", "host"),
    /// The checksums of incoming blocks are not verified.
    ChecksumUnverified = ("checksum-unverified", "host"),
    /// What was fetched from another node is written though its holder was fenced meanwhile.
    FetchIgnoresGeneration = ("fetch-ignores-generation", "host"),
    /// What is fetched from another node is called durable before it is written.
    FetchAckedEarly = ("fetch-acked-early", "host"),
    /// A write is acknowledged when one copy is durable.
    AckAtOneCopy = ("ack-at-one-copy", "coordinator"),
    /// Members are read that are known to lack blocks of the range.
    ReadFromLagging = ("read-from-lagging", "coordinator"),
    /// A group is served without comparing its members.
    SkipReconcile = ("skip-reconcile", "coordinator"),
    /// The coordinator goes on when a newer generation was seen.
    IgnoreFenced = ("ignore-fenced", "coordinator"),
    /// Members are ejected without asking meta.
    EjectWithoutCommit = ("eject-without-commit", "coordinator"),
    /// Copies to joining members apply only where they are newer.
    ResyncByHighest = ("resync-by-highest-version", "coordinator"),
    /// Joining members count for the write quorum.
    JoinerCounted = ("joiner-counted-in-quorum", "coordinator"),
    /// The ejection of members is proposed before the repairs among the others are durable.
    ProposeBeforeRepair = ("propose-before-repair", "coordinator"),
    /// Reads are returned though nobody vouches for them.
    StaleReadAfterTakeOver = ("stale-read-after-take-over", "coordinator"),
    /// What members answer is believed, whatever its checksums say.
    AnswerUnverified = ("answer-unverified", "coordinator"),
    /// A block that one member can't read counts as lost, whatever the others have.
    LostTooEarly = ("lost-too-early", "coordinator"),
    /// Who gives a volume back says that all its copies are equal, whether they are or not.
    SettledUnseen = ("settled-unseen", "client"),
    /// A volume that was given back with unequal copies, or whose holder has died, gets no caretaker.
    LeftUnsettled = ("left-unsettled", "meta"),
    /// Copies that stand too close to each other stay there.
    LeftClose = ("left-close", "meta"),
    /// A node that is to hold nothing keeps its copies.
    LeftOnDrained = ("left-on-drained", "meta"),
}

impl Planted {
    /// For the store.
    pub fn store(self) -> StoreCanary {
        StoreCanary {
            ack_before_flush: self == Planted::AckBeforeFlush,
            skip_data_checksum_at_recovery: self == Planted::SkipDataChecksum,
            reuse_too_early: self == Planted::ReuseTooEarly,
            forget_tombstones: self == Planted::ForgetTombstones,
            // What only tests of the store plant.
            ..StoreCanary::default()
        }
    }

    /// For the replica host.
    pub fn host(self) -> HostCanary {
        match self {
            Planted::GenerationIgnored => HostCanary::GenerationIgnored,
            Planted::SealNotDurable => HostCanary::SealNotDurable,
            Planted::GrantIgnored => HostCanary::GrantIgnored,
            Planted::WritesOvertakeSeal => HostCanary::WritesOvertakeSeal,
            Planted::ChecksumUnverified => HostCanary::ChecksumUnverified,
            Planted::FetchAckedEarly => HostCanary::FetchAckedEarly,
            Planted::FetchIgnoresGeneration => HostCanary::FetchIgnoresGeneration,
            _ => HostCanary::None,
        }
    }
}

impl Planted {
    /// For the coordinator.
    pub fn coordinator(self) -> CoordinatorCanary {
        CoordinatorCanary {
            ack_at_one_copy: self == Planted::AckAtOneCopy,
            read_from_lagging: self == Planted::ReadFromLagging,
            skip_reconcile: self == Planted::SkipReconcile,
            ignore_fenced: self == Planted::IgnoreFenced,
            eject_without_commit: self == Planted::EjectWithoutCommit,
            resync_by_highest: self == Planted::ResyncByHighest,
            joiner_counted: self == Planted::JoinerCounted,
            propose_before_repair: self == Planted::ProposeBeforeRepair,
            unvouched_read: self == Planted::StaleReadAfterTakeOver,
            answer_unverified: self == Planted::AnswerUnverified,
            lost_too_early: self == Planted::LostTooEarly,
            settled_unseen: self == Planted::SettledUnseen,
        }
    }

    /// For meta: what it leaves undone.
    pub fn meta(self) -> Option<Duty> {
        match self {
            Planted::LeftUnsettled => Some(Duty::Settle),
            Planted::LeftClose => Some(Duty::Spread),
            Planted::LeftOnDrained => Some(Duty::Drain),
            _ => None,
        }
    }
}

impl fmt::Display for Planted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The bug of this name.
///
/// # Errors
/// There is none, in words that name all.
pub fn named(name: &str) -> Result<Planted, String> {
    let found = Planted::ALL.iter().find(|planted| planted.name() == name);
    found.copied().ok_or_else(|| {
        let all: Vec<&str> = Planted::ALL.iter().map(|planted| planted.name()).collect();
        format!("`{name}` is no planted bug: there are {}", all.join(", "))
    })
}

/// Chooses, for the rest of the process, the bug that the environment names; `None` if it says [`NONE`].
///
/// # Errors
/// It names nothing, or more than one: such a process must not serve. In words.
pub fn choose() -> Result<Option<Planted>, String> {
    let refused = |words: &str| format!("this build has planted bugs (feature `canary`) and serves nothing: {words}");
    let name = std::env::var(VARIABLE)
        .map_err(|_| refused(&format!("only tests of the tests name one of them in {VARIABLE}")))?;
    if name == NONE {
        return Ok(None);
    }
    let planted = named(&name).map_err(|words| refused(&words))?;
    Ok(Some(*CHOSEN.get_or_init(|| planted)))
}

/// The bug that was chosen.
pub fn chosen() -> Option<Planted> {
    CHOSEN.get().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_one_bug_can_be_named() {
        assert_eq!(named("ack-before-flush"), Ok(Planted::AckBeforeFlush));
        for name in ["", NONE, "all", "ack-before-flush,skip-reconcile"] {
            assert!(named(name).unwrap_err().contains("skip-reconcile"), "{name}");
        }
    }

    #[test]
    fn every_bug_is_planted_somewhere() {
        for planted in Planted::ALL {
            let places = [
                planted.store() != StoreCanary::default(),
                planted.host() != HostCanary::None,
                planted.coordinator() != CoordinatorCanary::NONE,
            ];
            assert_eq!(places.iter().filter(|is_there| **is_there).count(), 1, "{planted}");
        }
    }
}
