#![doc = include_str!("../DESIGN.md")]
#![forbid(unsafe_code)]

pub mod client;
pub mod config;
pub mod heal;
pub mod limits;
pub mod log;
pub mod metrics;
pub mod raft;
mod service;
pub mod state;

pub use service::{MetaError, run, run_on};
