#![doc = include_str!("../DESIGN.md")]

pub mod store;
