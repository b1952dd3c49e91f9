#![doc = include_str!("../DESIGN.md")]

pub mod config;
pub mod driver;
mod heartbeat;
pub mod host;
pub mod process;
pub mod store;
pub mod testing;
