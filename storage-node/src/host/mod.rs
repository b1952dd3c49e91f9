//! The replica host: one device, the rules that a replica obeys, and the peers that speak to it. DESIGN.md, "Replica host".

mod api;
pub mod limits;

#[cfg(feature = "canary")]
pub use api::Canary;
pub use api::{CloseReason, ConnId, HostAction, HostConfig, HostEvent, HostStatus};
