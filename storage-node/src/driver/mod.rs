//! The driver of one device: a thread with an io_uring that serves the device file and its sockets. It takes completions,
//! tells the [`DeviceHost`](crate::host::DeviceHost), does what that wants, and submits once. DESIGN.md, "Driver".

mod bare;
mod budget;
pub mod clock;
mod connection;
mod control;
mod device;
mod format;
mod limits;
mod meters;
mod open;
mod reach;
mod reader;
mod ring;
mod serve;
mod thread;

pub use bare::BareDevice;
pub use device::{DeviceError, DeviceFile, DevicePath, WriteCache};
pub use format::format;
pub use limits::DriverLimits;
pub use reader::DeviceReader;
pub use thread::{DeviceThread, DriverError, Opened, ThreadConfig};
