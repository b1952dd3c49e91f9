#![doc = include_str!("../DESIGN.md")]

pub mod caretaker;
pub mod config;
pub mod core;
pub mod driver;
pub mod export;
pub mod nbd;
pub mod outbox;
#[cfg(feature = "canary")]
pub mod planted;
pub mod volume;

pub use driver::library::{Client, Volume};
