//! Real processes: a `cairn dev` cluster as a child, and what tests and benches do to it and beside it.
//!
//! Reading order: [`wait`] (conditions with a bound), [`process`] (any process, by its id), [`dev`] (the cluster),
//! [`scrape`] (metrics), [`tools`] (programs that may be absent), [`fio`] (load and its figures), [`inject`] (what goes wrong around the
//! processes). Then what `chaos live` is made of: [`cluster`]
//! (processes started one by one), [`nbd`], [`guest`] and [`ledger`] (load of which each sector says who wrote it, and what is
//! known of it), [`run`] (faults, and what must be true after each), [`steps`] and [`scenarios`] (the faults), [`scenario`], [`operators`], [`report`], [`stop`].

#![allow(
    clippy::disallowed_methods,
    reason = "this part watches real processes in real time; nothing of it runs in the simulator"
)]

pub mod cluster;
pub mod dev;
pub mod fio;
mod foreign;
pub mod guest;
pub mod inject;
pub mod ledger;
pub mod machine;
pub mod meta_disk;
pub mod nbd;
pub mod operators;
pub mod planted;
pub mod process;
pub mod report;
pub mod run;
pub mod scenario;
pub mod scenarios;
pub mod scrape;
pub mod steps;
pub mod stop;
pub mod tools;
pub mod vm;
pub mod wait;
mod zombie;
