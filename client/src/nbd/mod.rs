//! The server's side of the Network Block Device protocol, without any I/O: bytes in, questions and bytes out.
//!
//! Written from the protocol's own description (`doc/proto.md` of the NBD project): fixed newstyle handshake, simple and
//! structured replies, the metadata context `base:allocation`. Numbers are big-endian.
//!
//! Reading order: [`handshake`] up to the choice of an export, then [`transmission`], which turns requests into
//! [`VolumeOp`](crate::volume::api::VolumeOp)s and their results into replies; `options`, `request` and `reply` are the
//! formats below them, `wire` the numbers, [`limits`] the bounds.
//!
//! Deliberately absent: oldstyle negotiation, TLS (it lies below this codec), extended headers, `NBD_CMD_CACHE`.

pub mod handshake;
pub mod limits;
mod options;
mod reply;
mod request;
pub mod transmission;
mod wire;

pub use handshake::{CloseReason, ExportInfo, Handshake, HandshakeAction, Negotiated, Refusal};
pub use transmission::{Input, RequestToken, Transmission, TransmissionLimits};
