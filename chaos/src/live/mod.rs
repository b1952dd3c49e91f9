//! Real processes: a `cairn dev` cluster as a child, and what tests and benches do to it and beside it.
//!
//! Reading order: [`wait`] (conditions with a bound), [`process`] (any process, by its id), [`dev`] (the cluster),
//! [`tools`] (programs that may be absent), [`fio`] (load and its figures), [`inject`] (what goes wrong around the processes).

#![allow(
    clippy::disallowed_methods,
    reason = "this part watches real processes in real time; nothing of it runs in the simulator"
)]

pub mod dev;
pub mod fio;
pub mod inject;
pub mod process;
pub mod tools;
pub mod wait;
