//! Every bound of the protocol, in one place, with the relations between them checked by the compiler.

/// Bytes of a block: the unit of allocation, checksum and version.
pub const BLOCK_BYTES: usize = 4096;
/// Bytes of a chunk: the unit of the store's bookkeeping.
pub const CHUNK_BYTES: u64 = 64 << 20;
/// Blocks of a chunk.
pub const BLOCKS_PER_CHUNK: u32 = (CHUNK_BYTES / BLOCK_BYTES as u64) as u32;
/// Bytes of a sector as guests address it.
pub const SECTOR_BYTES: usize = 512;

/// Groups of one volume at the most.
pub const GROUPS_PER_VOLUME_MAX: u8 = 32;
/// A volume gets one group for each this many bytes of its size at creation, up to the maximum.
pub const BYTES_PER_GROUP: u64 = 16 << 30;
/// The largest volume: 256 TiB, so that a chunk index fits 22 bits and a group has at most 2¹⁷ chunks.
pub const VOLUME_BYTES_MAX: u64 = 256 << 40;
/// The longest name of a volume, in bytes.
pub const VOLUME_NAME_BYTES_MAX: usize = 128;
/// Copies of a group at the most.
pub const REPLICAS_MAX: usize = 5;
/// Members of a configuration at the most: the in-sync and the joining set together.
pub const MEMBERS_MAX: usize = 8;

/// Bits of a version that hold the write number; the others hold the generation.
pub const SEQ_BITS: u32 = 40;

/// Bytes of a frame's header.
pub const FRAME_HEADER_BYTES: usize = 64;
/// Bytes of a frame's control part at the most.
pub const FRAME_CONTROL_BYTES_MAX: usize = 64 << 10;
/// Bytes of a frame's data part at the most.
pub const FRAME_DATA_BYTES_MAX: usize = 1 << 20;
/// Blocks of data in one frame at the most.
pub const FRAME_BLOCKS_MAX: u32 = (FRAME_DATA_BYTES_MAX / BLOCK_BYTES) as u32;
/// Runs of versions in one `Collect` answer at the most.
pub const COLLECT_RUNS_MAX: usize = 1920;
/// Runs of damaged blocks that a device tells at a time at the most.
pub const DAMAGED_RUNS_MAX: usize = 256;
/// Bytes of the address of a device at the most, where a message carries one.
pub const ADDRESS_BYTES_MAX: usize = 255;
/// Requests without an answer on one connection at the most. A peer that sends more is disconnected.
pub const REQUESTS_IN_FLIGHT_MAX: u32 = 1024;
/// Bytes of data in requests without an answer on one connection at the most.
pub const REQUEST_BYTES_IN_FLIGHT_MAX: u64 = 64 << 20;

/// How long a member's read grant lasts, in milliseconds (rule 8's `T`).
pub const READ_GRANT_MS: u64 = 1000;
/// The part of the grant that its holder trusts, in milliseconds: 0.8 `T`.
pub const READ_GRANT_TRUSTED_MS: u64 = 800;
/// How often a connection without traffic is pinged, in milliseconds.
pub const PING_INTERVAL_MS: u64 = 250;

const _: () = assert!(BLOCKS_PER_CHUNK == 16384);
const _: () = assert!(CHUNK_BYTES.is_multiple_of(BLOCK_BYTES as u64));
const _: () = assert!(BLOCK_BYTES.is_multiple_of(SECTOR_BYTES));
const _: () = assert!(VOLUME_BYTES_MAX / CHUNK_BYTES <= u32::MAX as u64);
const _: () = assert!(FRAME_DATA_BYTES_MAX.is_multiple_of(BLOCK_BYTES));
const _: () = assert!((FRAME_BLOCKS_MAX as usize) * 16 + 256 <= FRAME_CONTROL_BYTES_MAX);
const _: () = assert!(COLLECT_RUNS_MAX * 32 + 256 <= FRAME_CONTROL_BYTES_MAX);
const _: () = assert!(DAMAGED_RUNS_MAX * 16 + 256 <= FRAME_CONTROL_BYTES_MAX);
const _: () = assert!(REQUEST_BYTES_IN_FLIGHT_MAX >= FRAME_DATA_BYTES_MAX as u64);
const _: () = assert!(READ_GRANT_TRUSTED_MS * 10 == READ_GRANT_MS * 8);
const _: () = assert!(PING_INTERVAL_MS * 3 < READ_GRANT_TRUSTED_MS);
const _: () = assert!(REPLICAS_MAX <= MEMBERS_MAX);
