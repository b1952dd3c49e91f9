//! Every bound of the NBD server.

use cairn_proto::limits::{BLOCK_BYTES, SECTOR_BYTES, VOLUME_NAME_BYTES_MAX};

use crate::volume::api::OP_BYTES_MAX;

/// Bytes of one option's data that are looked at. A longer one is skipped and refused.
pub const OPTION_BYTES_MAX: u32 = 16 << 10;
/// Bytes of one option's data that are skipped. A longer one ends the connection.
pub const OPTION_SKIP_BYTES_MAX: u32 = 1 << 20;
/// Options of one handshake.
pub const OPTIONS_MAX: u32 = 4096;
/// Bytes of a string of the protocol.
pub const STRING_BYTES_MAX: usize = 4096;
/// Exports in one answer to `NBD_OPT_LIST`.
pub const LISTED_EXPORTS_MAX: usize = 16384;

/// The smallest unit that can be addressed, in bytes.
pub const BLOCK_BYTES_MIN: u32 = SECTOR_BYTES as u32;
/// The smallest unit that needs no read-modify-write, in bytes.
pub const BLOCK_BYTES_PREFERRED: u32 = BLOCK_BYTES as u32;
/// Bytes of one read or write.
pub const PAYLOAD_BYTES_MAX: u32 = OP_BYTES_MAX;
/// Bytes of a refused write that are read and dropped. A longer one ends the connection.
pub const DRAIN_BYTES_MAX: u32 = 64 << 20;
/// How far a block status for a single extent looks ahead at least, in bytes.
pub const STATUS_WINDOW_BYTES_MIN: u32 = 256 << 10;
/// How far it looks ahead at the most.
pub const STATUS_WINDOW_BYTES_MAX: u32 = !(STATUS_WINDOW_BYTES_MIN - 1);

/// Requests without an answer on one connection. Beyond it the socket is not read.
pub const REQUESTS_IN_FLIGHT_MAX: usize = 256;
/// Bytes of payload in requests without an answer, and in answers not yet written, on one connection. Beyond it the socket
/// is not read.
pub const BYTES_IN_FLIGHT_MAX: u64 = 64 << 20;
/// Pieces of answers not yet written on one connection. Beyond it the socket is not read.
pub const QUEUED_PIECES_MAX: usize = 1024;
/// Bytes read ahead of the request that is being taken apart.
pub const READ_AHEAD_BYTES: usize = 16 << 10;

const _: () = assert!(OPTION_BYTES_MAX < OPTION_SKIP_BYTES_MAX);
const _: () = assert!(OPTION_BYTES_MAX as usize >= 2 * STRING_BYTES_MAX);
const _: () = assert!(VOLUME_NAME_BYTES_MAX <= STRING_BYTES_MAX);
const _: () = assert!(PAYLOAD_BYTES_MAX >= 1 << 20 && PAYLOAD_BYTES_MAX <= DRAIN_BYTES_MAX);
const _: () = assert!(BYTES_IN_FLIGHT_MAX >= PAYLOAD_BYTES_MAX as u64);
const _: () = assert!(READ_AHEAD_BYTES >= super::wire::REQUEST_BYTES);
