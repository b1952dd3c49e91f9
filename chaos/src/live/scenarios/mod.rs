//! Faults of what is around the processes: devices behind shims, connections through proxies.

pub mod device;
pub mod disk;
mod drain;
pub mod network;
pub mod operation;
