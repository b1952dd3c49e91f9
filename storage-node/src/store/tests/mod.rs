//! The store as a whole, on a device in memory.

mod basic;
#[cfg(feature = "canary")]
mod canary;
mod contradiction;
mod crash;
mod evacuate;
mod exhaustive;
mod faults;
mod full;
mod index;
mod layers;
mod model;
mod mover;
mod opening;
mod property;
pub(crate) mod rig;
mod rot;
mod scrub;
mod sweep;
