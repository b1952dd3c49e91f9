//! Cairn beside its peers, in one run on one machine: figures are ratios, never numbers of one machine alone.
//!
//! `cargo run --release -p cairn-benches -- fio` brings up a cluster, a raw file and `qemu-nbd`, and runs the same fio
//! cases on each in turn ([`matrix`]); [`targets`] brings them up, [`report`] makes the table and the JSON. The micro
//! benches in `micro/` run with `cargo bench -p cairn-benches`. Peers other than these are deliberately absent so far.

#![allow(clippy::disallowed_methods, reason = "this crate measures real time")]

pub mod matrix;
pub mod report;
pub mod targets;
