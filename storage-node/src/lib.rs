#![doc = include_str!("../DESIGN.md")]

pub mod driver;
pub mod host;
pub mod store;
pub mod testing;
