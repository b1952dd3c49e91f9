//! Faults of what is around the processes: devices behind shims, connections through proxies.

pub mod device;
pub mod disk;
pub mod network;
pub mod operation;
