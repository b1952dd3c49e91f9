//! The Cairn client.

pub mod config;
pub mod core;
pub mod nbd;
pub mod outbox;
pub mod volume;
