//! Bounds of a coordinator, and the planted bugs that the checkers must find.

use std::time::Duration;

use crate::limits::{FRAME_BLOCKS_MAX, READ_GRANT_TRUSTED_MS};

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
        hedge_min: Duration::from_millis(5),
        hedge_max: Duration::from_millis(200),
        retry_pause: Duration::from_millis(500),
        queued_max: 4096,
        grant_trusted: Duration::from_millis(READ_GRANT_TRUSTED_MS),
        #[cfg(feature = "canary")]
        canary: Canary::NONE,
    };
}

/// Chunks with blocks that are damaged on every member, noted block by block; a further one counts as lost as a whole.
pub(super) const LOST_CHUNKS_EXACT_MAX: usize = 4096;

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
}

#[cfg(feature = "canary")]
impl Canary {
    /// No bug.
    pub const NONE: Canary = Canary {
        ack_at_one_copy: false,
        read_from_lagging: false,
        skip_reconcile: false,
        ignore_fenced: false,
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

canaries!(ack_at_one_copy, read_from_lagging, skip_reconcile, ignore_fenced);
