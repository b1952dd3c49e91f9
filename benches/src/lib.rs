#![doc = include_str!("../DESIGN.md")]
//!
//! Reading order: [`targets`] brings up what is measured, [`matrix`] runs the cases, [`report`] makes table and JSON.
//! [`store`] is the store of one device beside the device itself.

#![allow(clippy::disallowed_methods, reason = "this crate measures real time")]

pub mod matrix;
pub mod report;
pub mod store;
pub mod targets;
