//! The store as a whole, on a device in memory.

mod basic;
pub(crate) mod rig;
