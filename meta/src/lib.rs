//! The Cairn metadata service.
#![forbid(unsafe_code)]

pub mod client;
pub mod config;
pub mod metrics;
