#![doc = include_str!("../DESIGN.md")]
//!
//! Reading order: [`targets`] brings up what is measured, [`matrix`] runs the cases, [`report`] makes table and JSON.
//! [`stall`] and [`rebuild`] are what guests feel of failures and of their repair.
//! [`store`] is the store of one device beside the device itself.

#![allow(clippy::disallowed_methods, reason = "this crate measures real time")]

pub mod matrix;
pub mod rebuild;
pub mod report;
pub mod stall;
pub mod store;
pub mod targets;
