#![doc = include_str!("../DESIGN.md")]
//!
//! Reading order: [`targets`] brings up what is measured, [`ceph`] the peer that takes most of it; [`matrix`] runs the cases,
//! [`cost`] and [`calls`] say what they cost, [`report`] makes table and JSON, [`aims`] says what was aimed at and whether it was met.
//! [`library`] runs the cases without NBD. [`scale`] is what an idle cluster costs, and what an I/O costs as work grows.
//! [`stall`] and [`rebuild`] are what guests feel of failures and of their repair.
//! [`store`] is the store of one device beside the device itself; [`path`] all that is computed for an I/O, in one process and without I/O.

#![allow(clippy::disallowed_methods, reason = "this crate measures real time")]

pub mod aims;
pub mod calls;
pub mod ceph;
pub mod cost;
pub mod library;
pub mod matrix;
pub mod path;
pub mod rebuild;
pub mod report;
pub mod scale;
pub mod stall;
pub mod store;
pub mod targets;
