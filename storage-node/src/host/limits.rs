//! Bounds and times of a replica host.

use std::time::Duration;

use cairn_proto::limits::{
    FRAME_BLOCKS_MAX, FRAME_DATA_BYTES_MAX, READ_GRANT_MS, REQUEST_BYTES_IN_FLIGHT_MAX, REQUESTS_IN_FLIGHT_MAX,
};

/// Bounds and times of a replica host. They can be set tiny for tests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostLimits {
    /// Connections at the most.
    pub connections: usize,
    /// Connections that have not said hello, at the most.
    pub strangers: usize,
    /// Volumes that one connection may have sealed.
    pub volumes_per_connection: usize,
    /// Requests without an answer on one connection. Told in the hello; twice as many close the connection.
    pub requests_in_flight: u32,
    /// Bytes of data in requests without an answer on one connection. Told in the hello; twice as many close the
    /// connection.
    pub request_bytes_in_flight: u64,
    /// Requests that the store works on at the same time; more wait in queues by volume and class.
    pub store_requests: usize,
    /// Bytes of data, read or written, that the store works on at the same time. One request may pass it.
    pub store_bytes: u64,
    /// Fetches of its holders that wait for other devices.
    pub fetches: usize,
    /// Reads on the way from one other device for one holder.
    pub fetches_per_peer: usize,
    /// Bytes that are asked of other devices at the same time. One fetch may pass it.
    pub fetch_bytes: u64,
    /// Connections to other devices.
    pub fetch_peers: usize,
    /// How long such a connection may take to stand and to be greeted.
    pub fetch_connect_timeout: Duration,
    /// How long a fetch may wait for the other device.
    pub fetch_timeout: Duration,
    /// How long a connection to another device is kept while nothing is fetched.
    pub fetch_idle: Duration,
    /// How long a connection may take to say hello.
    pub hello_timeout: Duration,
    /// How long a connection that has sealed no volume may be silent.
    pub idle_timeout: Duration,
    /// `T` of rule 8: how long a read grant lasts.
    pub read_grant: Duration,
}

impl Default for HostLimits {
    fn default() -> HostLimits {
        HostLimits {
            connections: 1024,
            strangers: 64,
            volumes_per_connection: 1024,
            requests_in_flight: REQUESTS_IN_FLIGHT_MAX,
            request_bytes_in_flight: REQUEST_BYTES_IN_FLIGHT_MAX,
            store_requests: 512,
            store_bytes: 16 << 20,
            fetches: 1024,
            fetches_per_peer: 8,
            fetch_bytes: 16 << 20,
            fetch_peers: 64,
            fetch_connect_timeout: Duration::from_secs(2),
            fetch_timeout: Duration::from_secs(5),
            fetch_idle: Duration::from_secs(10),
            hello_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(30),
            read_grant: Duration::from_millis(READ_GRANT_MS),
        }
    }
}

/// How often holders are told of blocks that are damaged, until they are good again.
pub const DAMAGE_INTERVAL: Duration = Duration::from_secs(2);
/// Attachments that a status lists at the most.
pub const HELD_MAX: usize = 4096;
/// Volumes with damaged blocks that a status lists at the most.
pub const DAMAGED_VOLUMES_MAX: usize = 64;

/// How often connections are looked through for silent ones.
pub const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// Blocks that a queue of guest requests may pass to the store when its turn comes.
pub const GUEST_QUANTUM_BLOCKS: u32 = 1024;
/// The same for copies between replicas.
pub const REPAIR_QUANTUM_BLOCKS: u32 = 256;
/// The same for verification.
pub const SCRUB_QUANTUM_BLOCKS: u32 = 64;

/// Bytes a second that the scrub verifies at the most, unless told otherwise.
pub const SCRUB_RATE_DEFAULT: u64 = 16 << 20;
/// From the end of a pass of the scrub to the begin of the next, unless told otherwise.
pub const SCRUB_INTERVAL_DEFAULT: Duration = Duration::from_secs(7 * 24 * 3600);
/// Bytes a second that are moved together at the most, unless told otherwise.
pub const MOVE_RATE_DEFAULT: u64 = 8 << 20;
/// Blocks that the scrub asks for at a time; up to 255 more are checked.
pub const SCRUB_STEP_BLOCKS: u32 = 256;
/// What a step of scrub or mover counts for at the least: it looks at index pages too.
pub const STEP_BLOCKS_MIN: u64 = 16;
/// After so many blocks (256 MiB) the device keeps how far the pass is.
pub const SCRUB_SAVE_BLOCKS: u64 = 64 << 10;
/// When the first pass begins on a device that never had one.
pub const SCRUB_START_DELAY: Duration = Duration::from_secs(3600);
/// How long the mover rests after a round that moved nothing, or when there is no space.
pub const MOVE_PAUSE: Duration = Duration::from_secs(600);
/// Requests of guests in the last second or two above which nothing is moved.
pub const MOVE_GUEST_REQUESTS_MAX: u64 = 100;
/// How long a step that failed is not tried again.
pub const RETRY_PAUSE: Duration = Duration::from_secs(10);
/// Damaged blocks that a host lists at the most, and as many damaged parts of metadata.
pub const DAMAGE_MAX: usize = 1024;

const _: () = assert!(GUEST_QUANTUM_BLOCKS >= FRAME_BLOCKS_MAX, "a turn passes any request");
const _: () = assert!(FRAME_DATA_BYTES_MAX as u64 <= REQUEST_BYTES_IN_FLIGHT_MAX);
