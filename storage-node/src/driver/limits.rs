//! Bounds of a device's driver.

use std::time::Duration;

use cairn_proto::limits::{FRAME_CONTROL_BYTES_MAX, FRAME_DATA_BYTES_MAX, FRAME_HEADER_BYTES};

/// Entries of the submission queue; more wait in memory until the kernel has taken those.
pub(super) const RING_ENTRIES: u32 = 256;
/// Entries of the completion queue.
pub(super) const RING_COMPLETIONS: u32 = 4096;

/// Reads of a device that is only looked at, at the same time.
pub(super) const READ_THREADS: usize = 16;

/// Bytes that a connection receives into before it has said hello.
pub(super) const STAGE_BYTES_STRANGER: usize = 4 << 10;
/// Bytes that a connection receives into afterwards: a whole header with the longest control part, and then some, so
/// that many small requests come with one completion.
pub(super) const STAGE_BYTES_PEER: usize = 68 << 10;
/// Pieces of memory that are offered to a socket before the ring gets what it does not take.
pub(super) const SEND_PIECES_NOW: usize = 64;
/// Pieces of memory in one send.
pub(super) const SEND_PIECES_MAX: usize = 256;

/// Threads that connect to other devices at the same time.
pub(super) const REACH_THREADS_MAX: usize = 64;
/// How long one of them tries one address.
pub(super) const REACH_TIMEOUT: Duration = Duration::from_secs(2);
/// Addresses that a name may stand for, as far as they are tried.
pub(super) const REACH_ADDRESSES_MAX: usize = 4;

/// How long a connection that is being closed may take to send what was to be sent before.
pub(super) const LINGER: Duration = Duration::from_secs(1);
/// How long a connection is silent before its peer is asked whether it is there.
pub(super) const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
/// How long an answer to that is waited for.
pub(super) const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// How often it is asked.
pub(super) const KEEPALIVE_PROBES: u32 = 3;
/// How long to wait before accepting again when the process has no file descriptor left.
pub(super) const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// How often connections are looked through for slow ones.
pub(super) const SWEEP_INTERVAL: Duration = Duration::from_millis(500);
/// How long requests in flight may take to end when the process is asked to end.
pub(super) const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Bounds of one device's driver that depend on the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DriverLimits {
    /// Bytes of received data that are held at the same time, for all connections; more is not received.
    pub receive_bytes: usize,
    /// Bytes that wait to be sent on one connection, above which its requests wait and nothing more is received from it.
    pub send_bytes_high: usize,
    /// Bytes that wait to be sent, below which it goes on.
    pub send_bytes_low: usize,
    /// Bytes that wait to be sent on all connections, above which every connection waits that is not below
    /// `send_bytes_low`.
    pub send_bytes_total: usize,
    /// Messages of the control thread that wait.
    pub control_messages: usize,
    /// How long a header with its control part may take once its first byte has come.
    pub head_timeout: Duration,
    /// How long a whole frame may take.
    pub frame_timeout: Duration,
    /// How long a peer may take nothing of what is to be sent to it.
    pub send_timeout: Duration,
}

impl Default for DriverLimits {
    fn default() -> DriverLimits {
        DriverLimits {
            receive_bytes: 64 << 20,
            send_bytes_high: 4 << 20,
            send_bytes_low: 1 << 20,
            send_bytes_total: 64 << 20,
            control_messages: 64,
            head_timeout: Duration::from_secs(5),
            frame_timeout: Duration::from_secs(30),
            send_timeout: Duration::from_secs(30),
        }
    }
}

const _: () = assert!(STAGE_BYTES_PEER >= FRAME_HEADER_BYTES + FRAME_CONTROL_BYTES_MAX);
const _: () = assert!(FRAME_DATA_BYTES_MAX <= 4 << 20);
