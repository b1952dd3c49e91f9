//! Every bound of the driver.

use std::time::Duration;

use cairn_proto::limits::REQUEST_BYTES_IN_FLIGHT_MAX;

use crate::nbd::limits::PAYLOAD_BYTES_MAX;

/// Events taken from the kernel at once.
pub const EVENTS_MAX: usize = 256;
/// Connections accepted or reads done for one socket before the others have their turn.
pub const ROUNDS_MAX: usize = 16;
/// Pieces written with one call.
pub const SLICES_MAX: usize = 64;
/// How often deadlines of connections are looked at: also how late timers are at the most after a suspended machine has
/// woken up.
pub const DEADLINE_CHECK: Duration = Duration::from_millis(250);

/// How often an attachment is asked for when the volume's generation has changed since it was read.
pub const ATTACH_TRIES: u32 = 4;

/// NBD connections at a time.
pub const GUESTS_MAX: usize = 256;
/// How long a client may be silent during its handshake.
pub const HANDSHAKE_IDLE: Duration = Duration::from_secs(60);
/// After how long a silence the host of an NBD client on TCP is asked whether it is there.
pub const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// How often it is asked.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// How often it may leave that unanswered.
pub const KEEPALIVE_PROBES: u32 = 3;
/// Bytes of payload that all NBD connections together hold before each is kept to one request at a time.
pub const GUEST_BYTES_MAX: u64 = 256 << 20;
/// Members of a group that meta is told of at the most.
pub const REPORTED_MEMBERS_MAX: usize = 16;
/// Volumes that are only repaired, at a time.
pub const CARED_MAX: usize = 8;
/// Open volumes at a time.
pub const VOLUMES_MAX: usize = 1024;

/// Bytes read ahead on a device's connection.
pub const FRAME_READ_AHEAD_BYTES: usize = 128 << 10;
/// Bytes queued for one device. The core keeps well below: beyond it the connection is closed.
pub const DEVICE_OUTBOX_BYTES_MAX: u64 = 2 * REQUEST_BYTES_IN_FLIGHT_MAX;
/// How long one address of a device may take to answer before the next is tried.
pub const ADDRESS_TIMEOUT: Duration = Duration::from_secs(1);
/// For how long a device that was lost is reached again with a pause that is drawn at random.
pub const LOST_LATELY: Duration = Duration::from_secs(5);
/// The longest such pause, on top of the core's own, which doubles.
pub const RECONNECT_JITTER_MAX: Duration = Duration::from_millis(50);
/// Devices that are remembered as lost.
pub const LOST_MAX: usize = 1024;
/// Addresses of one device that are tried.
pub const ADDRESSES_MAX: usize = 8;

/// Questions to the metadata servers that wait.
pub const META_QUEUE_MAX: usize = 256;
/// Questions to the metadata servers at a time.
pub const META_CONCURRENCY_MAX: usize = 32;
/// How long a client waits for the description of an export.
pub const DESCRIBE_DEADLINE: Duration = Duration::from_secs(5);
/// How long it waits when an older description would do.
pub const DESCRIBE_AGAIN_DEADLINE: Duration = Duration::from_millis(500);

/// Operations of one volume handle of the library at a time; more wait for a permit.
pub const LIBRARY_OPS_MAX: usize = 256;
/// Bytes of payload of one volume handle of the library, in units of [`LIBRARY_PERMIT_BYTES`].
pub const LIBRARY_BYTES_MAX: usize = 64 << 20;
/// Bytes that one permit stands for.
pub const LIBRARY_PERMIT_BYTES: usize = 4096;

/// How long an orderly end waits for operations in flight.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(10);
/// How long it then waits for attachments to be released.
pub const RELEASE_DEADLINE: Duration = Duration::from_secs(5);

const _: () = assert!(GUEST_BYTES_MAX >= PAYLOAD_BYTES_MAX as u64);
const _: () = assert!(LIBRARY_BYTES_MAX >= PAYLOAD_BYTES_MAX as usize);
const _: () = assert!(DESCRIBE_AGAIN_DEADLINE.as_millis() < DESCRIBE_DEADLINE.as_millis());
