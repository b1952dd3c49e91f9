//! The replication protocol as an executable model: one group on three devices and a spare, a few starts of a coordinator, a
//! network that does its worst, and an onlooker who judges the promises in every state that can come about.
//!
//! It is written to be read: who wants to know the protocol reads
//! - [`state`]: what meta, devices and holders know;
//! - [`device`]: what a device does with a request;
//! - [`coordinator`]: what a holder concludes from answers, and when it may propose something;
//! - [`message`]: what is said, and the network;
//! - [`step`]: what can happen at all;
//! - [`promises`]: what must be true whatever happens;
//! - [`rules`]: the rules as switches. `chaos model --without RULE` tells what happens without one.
//!
//! The rest searches: [`search`] breadth first with [`visited`] and [`fingerprint`], [`walk`] at random; [`scope`] says
//! within which bounds, [`canary`] and [`script`] where a missing rule shows, [`story`] tells it.
//!
//! DESIGN.md, "The model", says what is left out and why that is no loss.

pub mod canary;
pub mod coordinator;
pub mod device;
pub mod fingerprint;
pub mod message;
pub mod promises;
pub mod rules;
pub mod scope;
pub mod script;
pub mod search;
pub mod state;
pub mod step;
pub mod story;
pub mod visited;
pub mod walk;
