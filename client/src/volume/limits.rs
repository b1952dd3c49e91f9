//! Bounds of a volume's data path.

use super::api::OP_BYTES_MAX;

/// Bounds of one volume's data path. They can be set tiny for tests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VolumeLimits {
    /// Operations that are worked on at a time; the others wait in order.
    pub ops_max: usize,
    /// Bytes of data of those operations. One operation is always let through.
    pub op_bytes_max: u64,
    /// Pieces of operations that are worked on at a time.
    pub pieces_max: usize,
    /// Pieces of one operation that are worked on at a time.
    pub pieces_of_op_max: usize,
    /// Operations that may wait before a well-behaved export stops to submit; see `has_room`.
    pub waiting_max: usize,
}

impl VolumeLimits {
    /// What production uses.
    pub const DEFAULT: VolumeLimits = VolumeLimits {
        ops_max: 512,
        op_bytes_max: 64 << 20,
        pieces_max: 1024,
        pieces_of_op_max: 64,
        waiting_max: 64,
    };
}

impl Default for VolumeLimits {
    fn default() -> VolumeLimits {
        VolumeLimits::DEFAULT
    }
}

/// Chunks that one block-status answer covers at the most.
pub const STATUS_CHUNKS_MAX: u64 = 64;

const _: () = assert!(VolumeLimits::DEFAULT.op_bytes_max >= OP_BYTES_MAX as u64);
// A partial piece has two reads under way at a time, and nothing else has more than one operation.
const _: () =
    assert!(2 * VolumeLimits::DEFAULT.pieces_max <= cairn_proto::replication::ReplicationLimits::DEFAULT.queued_max);
