//! Proving the store: it is driven over a [`MemoryDevice`](super::MemoryDevice), its power is cut at every operation, and
//! what it holds afterwards is compared with a model that is too plain to be wrong.
//!
//! Only the store's public interface is used here, so nothing of this depends on how it keeps what it keeps.

pub mod blocks;
pub mod content;
pub mod crash;
pub mod crash_format;
pub mod image;
pub mod model;
pub mod rig;
pub mod workload;
