//! What goes wrong around real processes, from outside of them: the product has no hooks for it.
//!
//! | what | injects |
//! |---|---|
//! | [`proxy`] | faults of a TCP connection, between a process and whoever connects to it |
//! | [`shim`] | faults of a device, between a process and a file |
//! | [`netns`] | cuts between processes in network namespaces |
//! | [`garbage`] | strangers at listening sockets |
//!
//! Reading order: [`control`] (commands by line over a Unix socket, to injectors that run as processes of their own),
//! then any injector. An injector is told what to do by method calls or by lines of the same meaning, counts what it did, and
//! leaves nothing behind when it is dropped.

pub mod control;
pub mod garbage;
pub mod limits;
pub mod netns;
pub mod proxy;
pub mod shim;
