#![doc = include_str!("../DESIGN.md")]
#![forbid(unsafe_code)]

pub mod block;
pub mod buffer;
pub mod capability;
pub mod checksum;
pub mod codec;
pub mod collections;
#[cfg(feature = "control")]
pub mod control;
pub mod disk;
pub mod frame;
pub mod ids;
pub mod limits;
pub mod message;
pub mod replica;
pub mod replication;
pub mod time;
pub mod units;
