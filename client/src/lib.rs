//! The Cairn client.

pub mod volume;
