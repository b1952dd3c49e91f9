//! Healing without an operator: what the leader proposes and whom it asks, from the state and what it has heard. Pure.

pub mod condition;
pub mod decide;
mod moves;
#[cfg(test)]
mod tests;
pub mod view;

pub use decide::{HealSettings, decide};
pub use view::{AttachmentReport, Duty, GroupReport, Phase, Progress, View};
