//! Cairn.

pub mod live;
