#![doc = include_str!("../DESIGN.md")]
#![forbid(unsafe_code)]

pub mod batch;
pub mod checker;
pub mod faults;
pub mod fuzz;
pub mod live;
pub mod model;
pub mod rng;
pub mod sim;
pub mod store;
