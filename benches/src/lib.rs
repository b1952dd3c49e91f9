#![doc = include_str!("../DESIGN.md")]
//!
//! Reading order: [`targets`] brings up what is measured, [`matrix`] runs the cases, [`report`] makes table and JSON.

#![allow(clippy::disallowed_methods, reason = "this crate measures real time")]

pub mod matrix;
pub mod report;
pub mod targets;
