//! Bounds of the client's core.

use std::time::Duration;

use cairn_proto::replication::ReplicationLimits;

use super::pace::PaceLimits;
use crate::volume::limits::VolumeLimits;

/// Bounds of the client's core. They can be set tiny for tests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CoreLimits {
    /// How long a connection attempt with its hello may take.
    pub connect_timeout: Duration,
    /// How long a device may leave everything unanswered before its connection is closed.
    pub silence_timeout: Duration,
    /// How often a connection with something outstanding is pinged when nothing comes in.
    pub ping_interval: Duration,
    /// The first pause between two attempts to reach a device or meta; it doubles.
    pub retry_min: Duration,
    /// The longest pause.
    pub retry_max: Duration,
    /// How often the addresses of a volume's devices are asked for at the most.
    pub refresh_interval: Duration,
    /// How long a volume may take to be closed in order; what is left then ends as it is.
    pub close_timeout: Duration,
    /// How long a release waits for members of which an answer to the last writes is still on its way, so that nobody has
    /// to make the copies equal afterwards.
    pub settle_timeout: Duration,
    /// How often meta is told how an attached volume is while a group of it is not whole.
    pub report_interval: Duration,
    /// How often while all are whole.
    pub report_interval_whole: Duration,
    /// For how long all groups of a volume must be whole before its caretaker releases it.
    pub care_whole_for: Duration,
    /// Of how fast copies are while guests are about.
    pub pace: PaceLimits,
    /// Of each volume's data path.
    pub volume: VolumeLimits,
    /// Of each attachment.
    pub replication: ReplicationLimits,
}

impl CoreLimits {
    /// What production uses.
    pub const DEFAULT: CoreLimits = CoreLimits {
        connect_timeout: Duration::from_secs(3),
        silence_timeout: Duration::from_secs(4),
        ping_interval: Duration::from_secs(1),
        retry_min: Duration::from_millis(50),
        retry_max: Duration::from_secs(2),
        refresh_interval: Duration::from_secs(2),
        close_timeout: Duration::from_secs(10),
        settle_timeout: Duration::from_millis(100),
        report_interval: Duration::from_secs(2),
        report_interval_whole: Duration::from_secs(10),
        care_whole_for: Duration::from_secs(5),
        pace: PaceLimits::DEFAULT,
        volume: VolumeLimits::DEFAULT,
        replication: ReplicationLimits::DEFAULT,
    };
}

impl Default for CoreLimits {
    fn default() -> CoreLimits {
        CoreLimits::DEFAULT
    }
}

/// Volumes of which meta is told with one message at the most.
pub const REPORTS_MAX: usize = 64;
