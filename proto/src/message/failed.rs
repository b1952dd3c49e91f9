//! Failed: a request was not done, and why.

use std::fmt;

use bytes::Bytes;

use super::no_data;
use crate::codec::{DecodeError, Put, Reader};
use crate::ids::Generation;

/// Bytes of the words at the most.
const WORDS_BYTES_MAX: usize = 512;

/// Why a request was not done. The numbers are final and never reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u16)]
pub enum FailureKind {
    /// A higher generation has been seen: the sender's attachment is over (rule 5).
    Fenced = 1,
    /// The generation of the request was never sealed here.
    NotSealed = 2,
    /// The group has no replica here.
    NoReplica = 3,
    /// The capability is not one of this cluster's meta.
    Unauthorized = 4,
    /// The device is full.
    NoSpace = 5,
    /// The device has failed, and acknowledges nothing until it is reopened.
    DeviceFailed = 6,
    /// A read failed at the device.
    Unreadable = 7,
    /// The request is outside what the protocol allows.
    Invalid = 8,
    /// A block's checksum does not match: damaged on the way.
    ChecksumMismatch = 9,
    /// This is another device, or another format of it.
    WrongDevice = 10,
    /// This device is of another cluster.
    WrongCluster = 11,
    /// The two sides have no version in common.
    VersionUnsupported = 12,
    /// More requests or bytes in flight than the hello allows.
    TooManyInFlight = 13,
    /// The device is not ready yet; ask again.
    Starting = 14,
    /// To a fetch: the other device can't be reached from here, or does not answer in time.
    PeerUnreachable = 15,
    /// To a fetch: it was not done, and that says nothing about whether others can be: the other device refused, has
    /// damaged blocks there, or too much is being fetched.
    NotFetched = 16,
}

impl FailureKind {
    const ALL: [FailureKind; 16] = [
        FailureKind::Fenced,
        FailureKind::NotSealed,
        FailureKind::NoReplica,
        FailureKind::Unauthorized,
        FailureKind::NoSpace,
        FailureKind::DeviceFailed,
        FailureKind::Unreadable,
        FailureKind::Invalid,
        FailureKind::ChecksumMismatch,
        FailureKind::WrongDevice,
        FailureKind::WrongCluster,
        FailureKind::VersionUnsupported,
        FailureKind::TooManyInFlight,
        FailureKind::Starting,
        FailureKind::PeerUnreachable,
        FailureKind::NotFetched,
    ];
}

/// A request was not done. Nothing of it will show.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failed {
    /// Why.
    pub kind: FailureKind,
    /// For `Fenced`: the highest generation seen; else none.
    pub seen: Generation,
    /// For people: what failed, on what, what to do.
    pub words: String,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.words)
    }
}

impl Failed {
    /// Words longer than the bound are cut.
    pub fn new(kind: FailureKind, words: impl Into<String>) -> Failed {
        let mut words = words.into();
        let mut end = words.len().min(WORDS_BYTES_MAX);
        while !words.is_char_boundary(end) {
            end -= 1;
        }
        words.truncate(end);
        Failed {
            kind,
            seen: Generation::NONE,
            words,
        }
    }

    /// A newer attachment has been seen.
    pub fn fenced(seen: Generation) -> Failed {
        let words = format!("generation {seen} has taken the volume over");
        Failed {
            kind: FailureKind::Fenced,
            seen,
            words,
        }
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Vec<Bytes> {
        out.put_u16(self.kind as u16);
        out.put_u16(0);
        out.put_u32(self.seen.get());
        out.put_u32(self.words.len() as u32);
        out.put_bytes(self.words.as_bytes());
        Vec::new()
    }

    pub(super) fn decode(reader: &mut Reader<'_>, data: Bytes) -> Result<Failed, DecodeError> {
        no_data(&data)?;
        let number = reader.u16()?;
        let kind = FailureKind::ALL.into_iter().find(|kind| *kind as u16 == number);
        let kind = kind.ok_or(DecodeError::Invalid("failure kind"))?;
        reader.zeroes(2)?;
        let seen = Generation::new(reader.u32()?).ok_or(DecodeError::Invalid("generation"))?;
        let length = reader.count("words", WORDS_BYTES_MAX)?;
        let words = std::str::from_utf8(reader.bytes(length)?).map_err(|_| DecodeError::Invalid("words"))?;
        Ok(Failed {
            kind,
            seen,
            words: words.to_string(),
        })
    }
}
