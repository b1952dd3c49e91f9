//! Cairn.

pub mod checker;
pub mod faults;
pub mod live;
pub mod rng;
pub mod sim;
