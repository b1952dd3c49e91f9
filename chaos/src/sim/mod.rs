//! The simulator.

pub mod clock;
pub mod nemesis;
pub mod network;
pub mod options;
pub mod process;
pub mod schedule;
pub mod trace;
pub mod wire;
