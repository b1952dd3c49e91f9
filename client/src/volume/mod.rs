//! Volumes.

pub mod api;
