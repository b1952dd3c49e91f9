//! Bounds of the injectors: whatever they inject into, they stay small themselves.

use std::time::Duration;

/// Bytes of a command, and of its answer.
pub const COMMAND_BYTES_MAX: usize = 4096;
/// Connections at a time to a control socket.
pub const CONTROLLERS_MAX: usize = 8;
/// How long one who asks over a control socket waits for the answer.
pub const ANSWER_BOUND: Duration = Duration::from_secs(20);

/// Connections at a time through a proxy; further ones are closed at once.
pub const PROXY_CONNECTIONS_MAX: usize = 1024;
/// Bytes under way in one direction of one connection.
pub const PROXY_QUEUE_BYTES: usize = 4 << 20;
/// Bytes read, and delayed, at a time.
pub const PROXY_CHUNK_BYTES: usize = 64 << 10;
/// The longest time for which bytes are delayed.
pub const PROXY_DELAY_MAX: Duration = Duration::from_secs(600);

const _: () = assert!(PROXY_CHUNK_BYTES <= PROXY_QUEUE_BYTES);

/// Sectors of 512 bytes that a shim's write cache holds; above it writes some back, as devices do.
pub const SHIM_CACHE_SECTORS: usize = (64 << 20) / 512;
/// Writes to one sector among which a power cut chooses.
pub const SHIM_VERSIONS: usize = 4;
/// Rules of a shim at a time.
pub const SHIM_RULES_MAX: usize = 64;
/// The longest time for which a shim delays I/O.
pub const SHIM_DELAY_MAX: Duration = Duration::from_secs(600);
/// Bytes of one request to a shim.
pub const SHIM_REQUEST_BYTES: u32 = 1 << 20;
/// Requests under way in a shim that the kernel sends without a thread that waits for each.
pub const SHIM_REQUESTS_MAX: u16 = 64;

/// Bytes that one flooding stranger sends at the most.
pub const GARBAGE_BYTES_MAX: usize = 8 << 20;
/// Strangers' connections that stay open at a time.
pub const GARBAGE_CONNECTIONS_MAX: usize = 512;
/// How long a stranger waits to be taken in, to be let send, and for an answer.
pub const GARBAGE_ANSWER_BOUND: Duration = Duration::from_millis(100);
/// Looks at the memory of a process that are kept.
pub const GARBAGE_SAMPLES_MAX: usize = 1000;

/// Namespaces of one network.
pub const NAMESPACES_MAX: u8 = 99;
