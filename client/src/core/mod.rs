//! The client's core: volumes, their attachments and the connections to devices, without I/O.
//!
//! `ClientCore::new(config: CoreConfig)`, then as every core: `handle(now, Event)`, `handle_timeout(now)`,
//! `poll_action() -> Option<Action>`, `poll_timeout() -> Option<Time>`; and `status(volume) -> Option<VolumeStatus>`.

pub mod api;
pub mod limits;
