#![doc = include_str!("../DESIGN.md")]

pub mod store;
pub mod testing;
