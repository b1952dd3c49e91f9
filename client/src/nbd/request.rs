//! A request's header, and what it asks of a volume.

use bytes::Bytes;

use super::handshake::{ExportInfo, Negotiated};
use super::limits::{BLOCK_BYTES_MIN, BLOCK_BYTES_PREFERRED, PAYLOAD_BYTES_MAX};
use super::wire::{Errno, REQUEST_BYTES, command, command_flag};
use crate::volume::api::VolumeOp;

/// The 28 bytes at the start of every request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct RequestHeader {
    pub(super) magic: u32,
    pub(super) flags: u16,
    pub(super) command: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) length: u32,
}

impl RequestHeader {
    pub(super) fn parse(bytes: &[u8; REQUEST_BYTES]) -> RequestHeader {
        let [m0, m1, m2, m3, f0, f1, t0, t1, rest @ ..] = *bytes;
        let [
            c0,
            c1,
            c2,
            c3,
            c4,
            c5,
            c6,
            c7,
            o0,
            o1,
            o2,
            o3,
            o4,
            o5,
            o6,
            o7,
            length @ ..,
        ] = rest;
        RequestHeader {
            magic: u32::from_be_bytes([m0, m1, m2, m3]),
            flags: u16::from_be_bytes([f0, f1]),
            command: u16::from_be_bytes([t0, t1]),
            cookie: u64::from_be_bytes([c0, c1, c2, c3, c4, c5, c6, c7]),
            offset: u64::from_be_bytes([o0, o1, o2, o3, o4, o5, o6, o7]),
            length: u32::from_be_bytes(length),
        }
    }

    pub(super) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// What it asks for, `None` if there is nothing to do, or the error to answer with. A write comes back without its
    /// data, which is yet to arrive.
    pub(super) fn plan(&self, negotiated: &Negotiated) -> Result<Option<VolumeOp>, Refused> {
        self.check_flags(negotiated)?;
        let export = negotiated.info;
        if self.command == command::FLUSH {
            return match (self.offset, self.length) {
                (0, 0) => Ok(Some(VolumeOp::Flush)),
                _ => Err(refused(Errno::Invalid, "a flush takes no offset and no length")),
            };
        }
        if self.length == 0 {
            // What an empty request does is left open, except that there is no status of nothing.
            return match self.command {
                command::BLOCK_STATUS => Err(refused(Errno::Invalid, "a block status needs a length")),
                _ => Ok(None),
            };
        }
        let writes = matches!(self.command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
        if writes && export.read_only {
            return Err(refused(Errno::Perm, "the export is read-only"));
        }
        self.check_place(export)?;
        let (offset, length) = (self.offset, u64::from(self.length));
        Ok(Some(match self.command {
            command::READ if self.length > PAYLOAD_BYTES_MAX => {
                let errno = if negotiated.structured {
                    Errno::Overflow
                } else {
                    Errno::Invalid
                };
                return Err(refused(errno, "a read is longer than 32 MiB"));
            }
            command::WRITE if self.length > PAYLOAD_BYTES_MAX => {
                return Err(refused(Errno::Invalid, "a write is longer than 32 MiB"));
            }
            command::READ => VolumeOp::Read {
                offset,
                length: self.length,
            },
            command::WRITE => VolumeOp::Write {
                offset,
                data: Bytes::new(),
            },
            command::TRIM => VolumeOp::Discard { offset, length },
            command::WRITE_ZEROES => {
                if self.has(command_flag::FAST_ZERO) && !whole_blocks(offset, length, export.size) {
                    // Zeroes are a run-length record here, except that parts of blocks are read and merged.
                    return Err(refused(
                        Errno::NotSupported,
                        "only whole blocks of 4096 bytes are zeroed fast",
                    ));
                }
                VolumeOp::WriteZeroes {
                    offset,
                    length,
                    may_discard: !self.has(command_flag::NO_HOLE),
                }
            }
            _ => VolumeOp::BlockStatus { offset, length },
        }))
    }

    /// Unknown commands, and flags that do not belong to the command.
    fn check_flags(&self, negotiated: &Negotiated) -> Result<(), Refused> {
        let allowed = match self.command {
            command::READ if negotiated.structured => command_flag::DF,
            command::READ | command::WRITE | command::FLUSH | command::TRIM => 0,
            command::WRITE_ZEROES => command_flag::NO_HOLE | command_flag::FAST_ZERO,
            command::BLOCK_STATUS if negotiated.base_allocation => command_flag::REQ_ONE,
            command::BLOCK_STATUS => return Err(refused(Errno::Invalid, "no metadata context was negotiated")),
            _ => return Err(refused(Errno::Invalid, "unknown command")),
        };
        match self.flags & !(allowed | command_flag::FUA) {
            0 => Ok(()),
            _ => Err(refused(
                Errno::Invalid,
                "a command flag is unknown or does not belong to the command",
            )),
        }
    }

    fn check_place(&self, export: ExportInfo) -> Result<(), Refused> {
        let sector = u64::from(BLOCK_BYTES_MIN);
        if !self.offset.is_multiple_of(sector) || !u64::from(self.length).is_multiple_of(sector) {
            return Err(refused(Errno::Invalid, "offset and length must be multiples of 512"));
        }
        if self
            .offset
            .checked_add(self.length.into())
            .is_none_or(|end| end > export.size)
        {
            let errno = match self.command {
                command::WRITE | command::WRITE_ZEROES => Errno::NoSpace,
                _ => Errno::Invalid,
            };
            return Err(refused(errno, "the request goes past the end of the export"));
        }
        Ok(())
    }
}

/// An error that needs no volume to be found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Refused {
    pub(super) errno: Errno,
    pub(super) words: &'static str,
}

fn refused(errno: Errno, words: &'static str) -> Refused {
    Refused { errno, words }
}

fn whole_blocks(offset: u64, length: u64, size: u64) -> bool {
    let block = u64::from(BLOCK_BYTES_PREFERRED);
    let end = offset + length;
    offset.is_multiple_of(block) && (end.is_multiple_of(block) || end == size)
}
