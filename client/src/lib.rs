//! The Cairn client.

pub mod nbd;
pub mod outbox;
pub mod volume;
