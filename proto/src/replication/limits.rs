//! Bounds of a coordinator, and the planted bugs that the checkers must find.

use std::time::Duration;

use crate::limits::{FRAME_BLOCKS_MAX, MEMBERS_MAX, READ_GRANT_MS, READ_GRANT_TRUSTED_MS};

/// Bounds of a coordinator. They can be set tiny for tests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReplicationLimits {
    /// Bytes of acknowledged writes that one member of a group may leave unanswered before it gets no more payloads.
    pub lag_bytes_max: u64,
    /// Acknowledged writes that one member of a group may leave unanswered before it gets no more payloads.
    pub lag_ops_max: usize,
    /// Chunks for which each block that a member lacks is noted; of further chunks only that something is lacking.
    /// One takes 2 KiB.
    pub lack_chunks_exact_max: usize,
    /// Blocks of one copy to a member that lacks them.
    pub copy_blocks: u32,
    /// Copies to one member of a group at a time.
    pub copies_in_flight: usize,
    /// For so long a member that could not reach another one does not try to read from it again.
    pub fetch_pause: Duration,
    /// A read that is not answered is asked of another member after at least this long.
    pub hedge_min: Duration,
    /// And after at most this long.
    pub hedge_max: Duration,
    /// How long to wait before something that a device refused is asked again.
    pub retry_pause: Duration,
    /// Operations that may wait for a group to be served.
    pub queued_max: usize,
    /// How long a read grant is trusted, counted from the sending of the request.
    pub grant_trusted: Duration,
    /// At attach, when enough members are there: how long one whose connection was refused is waited for.
    pub refused_patience: Duration,
    /// The same for one that is silent, at least; four times what the others took, if that is longer.
    pub silent_patience_min: Duration,
    /// And at the most.
    pub silent_patience_max: Duration,
    /// The same for one that is connected and has not answered the seal: it may have to wait for read grants of an older
    /// holder.
    pub seal_patience: Duration,
    /// How long a comparison at attach waits for an answer of one member while the others have answered, before it goes on
    /// without that one.
    pub reconcile_patience: Duration,
    /// How often a comparison may begin anew because a member came while it ran.
    pub reconcile_restarts_max: u32,
    /// How often troubled members are looked at.
    pub health_interval: Duration,
    /// A member is slow whose writes take this long, ...
    pub slow_min: Duration,
    /// ... and so many times as long as those of a quorum.
    pub slow_factor: u32,
    /// A member of a served group that has been in trouble for so long is proposed for ejection.
    pub eject_after: Duration,
    /// The same for one of which it is not noted exactly any more what it lacks.
    pub eject_inexact_after: Duration,
    /// A member must be well for so long to be taken for well again.
    pub well_after: Duration,
    /// An ejected member may join again after at least this long; twice as long each time, ...
    pub rejoin_min: Duration,
    /// ... up to this; anew from the least when it has stayed in sync for longer than this.
    pub rejoin_max: Duration,
    /// Groups in which one device is compared and filled as a joining member at a time.
    pub joining_groups_max: usize,
    /// The first pause after an attempt to ask meta in vain; it doubles.
    pub meta_retry_min: Duration,
    /// The longest such pause.
    pub meta_retry_max: Duration,
    /// For so long meta counts as reachable after an answer: otherwise it is asked before anything is proposed.
    pub meta_fresh: Duration,
    /// Planted bugs.
    #[cfg(feature = "canary")]
    pub canary: Canary,
}

impl ReplicationLimits {
    /// What production uses.
    pub const DEFAULT: ReplicationLimits = ReplicationLimits {
        lag_bytes_max: 16 << 20,
        lag_ops_max: 1024,
        lack_chunks_exact_max: 4096,
        copy_blocks: 64,
        copies_in_flight: 4,
        fetch_pause: Duration::from_secs(30),
        hedge_min: Duration::from_millis(5),
        hedge_max: Duration::from_millis(200),
        retry_pause: Duration::from_millis(500),
        queued_max: 4096,
        grant_trusted: Duration::from_millis(READ_GRANT_TRUSTED_MS),
        refused_patience: Duration::from_millis(100),
        silent_patience_min: Duration::from_millis(100),
        silent_patience_max: Duration::from_millis(300),
        seal_patience: Duration::from_millis(READ_GRANT_MS + 300),
        reconcile_patience: Duration::from_millis(500),
        reconcile_restarts_max: 2,
        health_interval: Duration::from_millis(250),
        slow_min: Duration::from_millis(100),
        slow_factor: 10,
        eject_after: Duration::from_secs(10),
        eject_inexact_after: Duration::from_secs(1),
        well_after: Duration::from_secs(1),
        rejoin_min: Duration::from_secs(1),
        rejoin_max: Duration::from_secs(600),
        joining_groups_max: 2,
        meta_retry_min: Duration::from_millis(100),
        meta_retry_max: Duration::from_secs(2),
        meta_fresh: Duration::from_secs(1),
        #[cfg(feature = "canary")]
        canary: Canary::NONE,
    };
}

/// Devices that one group's coordinator keeps apart: members, and those that were members and may be again.
pub(super) const PLACES_MAX: usize = 32;

const _: () = assert!(MEMBERS_MAX <= PLACES_MAX);

/// Pairs of devices that are remembered not to reach each other, of one attachment.
pub(super) const CUT_PAIRS_MAX: usize = 256;

/// Chunks with blocks that are damaged on every member, noted block by block; a further one counts as lost as a whole.
pub(super) const LOST_CHUNKS_EXACT_MAX: usize = 4096;

/// Damaged blocks of one member of a group that are noted one by one, to be counted.
pub(super) const DAMAGE_NOTED_MAX: usize = 4096;

const _: () = assert!(ReplicationLimits::DEFAULT.copy_blocks <= FRAME_BLOCKS_MAX);

impl Default for ReplicationLimits {
    fn default() -> ReplicationLimits {
        ReplicationLimits::DEFAULT
    }
}

/// Planted bugs: each breaks one rule, and the checkers must notice.
#[cfg(feature = "canary")]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Canary {
    /// Acknowledges a write when one copy is durable.
    pub ack_at_one_copy: bool,
    /// Reads from members that are known to lack blocks of the range.
    pub read_from_lagging: bool,
    /// Serves a group without comparing its members.
    pub skip_reconcile: bool,
    /// A newer generation ends only the write that was refused for it; the attachment goes on.
    pub ignore_fenced: bool,
    /// A configuration is in force as soon as it is wanted; meta is not asked.
    pub eject_without_commit: bool,
    /// Copies to a joining member apply only where they are newer.
    pub resync_by_highest: bool,
    /// Joining members count for the write quorum.
    pub joiner_counted: bool,
    /// The ejection of members is proposed before the repairs among the others are durable, and the group is served then.
    pub propose_before_repair: bool,
    /// Reads are returned though nobody vouches for them.
    pub unvouched_read: bool,
    /// What members answer is believed, whatever its checksums say.
    pub answer_unverified: bool,
    /// A block that one member can't read counts as lost, whatever the others have.
    pub lost_too_early: bool,
    /// Who holds a volume gives it back as settled, whether its copies are equal or not.
    pub settled_unseen: bool,
}

#[cfg(feature = "canary")]
impl Canary {
    /// No bug.
    pub const NONE: Canary = Canary {
        ack_at_one_copy: false,
        read_from_lagging: false,
        skip_reconcile: false,
        ignore_fenced: false,
        eject_without_commit: false,
        resync_by_highest: false,
        joiner_counted: false,
        propose_before_repair: false,
        unvouched_read: false,
        answer_unverified: false,
        lost_too_early: false,
        settled_unseen: false,
    };
}

macro_rules! canaries {
    ($($name:ident),*) => {
        impl ReplicationLimits {
            $(
                #[cfg(feature = "canary")]
                pub(super) fn $name(&self) -> bool {
                    self.canary.$name
                }

                #[cfg(not(feature = "canary"))]
                pub(super) const fn $name(&self) -> bool {
                    false
                }
            )*
        }
    };
}

canaries!(
    ack_at_one_copy,
    read_from_lagging,
    skip_reconcile,
    ignore_fenced,
    eject_without_commit,
    resync_by_highest,
    joiner_counted,
    propose_before_repair,
    unvouched_read,
    answer_unverified,
    lost_too_early
);
