//! Deterministic stand-ins for the outside world, for tests and for the simulator. Nothing here runs in production.

mod memory_device;
mod prng;
mod reader;
pub mod store;

pub use memory_device::{Cut, Fault, MemoryDevice};
pub use prng::Prng;
