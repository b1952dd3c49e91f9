//! The store of one device.

pub mod api;
