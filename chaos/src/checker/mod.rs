//! The checker: knows what the clients asked and were answered, and nothing of how the cluster works.

pub mod history;
pub mod linear;
pub mod pattern;
