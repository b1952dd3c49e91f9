//! Deterministic stand-ins for the outside world, for tests and for the simulator. Nothing here runs in production.

mod memory_device;
mod prng;

pub use memory_device::{Fault, MemoryDevice};
pub use prng::Prng;
