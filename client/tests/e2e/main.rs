//! End to end: real processes of `cairn dev`, attached by real programs.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "these tests watch real processes in real time, and a panic is how a test fails"
)]

mod damage;
mod dev;
mod faults;
mod guest;
mod members;
mod memory;
mod power;
mod programs;
mod rebuild;
mod refusals;
mod stand_in;
mod support;
