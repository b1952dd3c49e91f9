//! The coordinator side of replication: DESIGN.md, "Replication", has the rules and why each of them is there.

pub mod api;
pub mod config;

pub use api::{
    Action, Event, GroupPhase, GroupStatus, MemberStatus, Notice, OpError, OpToken, Operation, Outcome, ReadOutcome,
    RequestId,
};
pub use config::{Grant, GroupConfig, VolumeSettings};
