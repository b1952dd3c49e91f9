//! The simulator.

pub mod actors;
mod answers;
pub mod batch;
mod beyond;
pub mod caller;
#[cfg(feature = "canary")]
pub mod canary;
pub mod clock;
pub mod disk;
mod ending;
mod faulting;
pub mod guest;
mod harm;
pub mod inspect;
mod loss;
pub mod model_store;
pub mod msg;
pub mod nemesis;
pub mod network;
mod operations;
pub mod options;
mod probe;
pub mod process;
pub mod run;
pub mod schedule;
mod setup;
mod split;
pub mod trace;
pub mod wire;
pub mod world;
