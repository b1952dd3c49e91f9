//! The store as a whole, on a device in memory.

mod basic;
mod crash;
mod model;
pub(crate) mod rig;
