//! Explicit little-endian reading and writing. Every format of this project goes through these two types.

use std::fmt;

/// Appends little-endian numbers and bytes.
pub trait Put {
    /// One byte.
    fn put_u8(&mut self, value: u8);
    /// Raw bytes.
    fn put_bytes(&mut self, value: &[u8]);

    /// Two bytes.
    fn put_u16(&mut self, value: u16) {
        self.put_bytes(&value.to_le_bytes());
    }
    /// Four bytes.
    fn put_u32(&mut self, value: u32) {
        self.put_bytes(&value.to_le_bytes());
    }
    /// Eight bytes.
    fn put_u64(&mut self, value: u64) {
        self.put_bytes(&value.to_le_bytes());
    }
}

impl Put for Vec<u8> {
    fn put_u8(&mut self, value: u8) {
        self.push(value);
    }

    fn put_bytes(&mut self, value: &[u8]) {
        self.extend_from_slice(value);
    }
}

/// Why bytes could not be decoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DecodeError {
    /// They end before the value does.
    Truncated,
    /// They go on after the value has ended.
    TrailingBytes(usize),
    /// A field has a value that the format does not allow.
    Invalid(&'static str),
    /// A count or length is above its bound.
    TooLarge {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// Its bound.
        limit: u64,
    },
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DecodeError::Truncated => f.write_str("it ends too early"),
            DecodeError::TrailingBytes(count) => write!(f, "{count} bytes stand after its end"),
            DecodeError::Invalid(field) => write!(f, "field `{field}` has a value that is not allowed"),
            DecodeError::TooLarge { field, value, limit } => {
                write!(f, "field `{field}` is {value}, at most {limit} is allowed")
            }
        }
    }
}

impl std::error::Error for DecodeError {}

/// Reads little-endian numbers and bytes from the front of a slice.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads from the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { rest: bytes }
    }

    /// The next `count` bytes.
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(DecodeError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    /// The next `N` bytes, as an array.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(DecodeError::Truncated)?;
        self.rest = rest;
        Ok(*taken)
    }

    /// One byte.
    pub fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array().map(u8::from_le_bytes)
    }

    /// Two bytes.
    pub fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_le_bytes)
    }

    /// Four bytes.
    pub fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_le_bytes)
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_le_bytes)
    }

    /// A byte that must be 0 or 1.
    pub fn bool(&mut self, field: &'static str) -> Result<bool, DecodeError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(DecodeError::Invalid(field)),
        }
    }

    /// Bytes that must be zero: reserved places, so that a later format can use them.
    pub fn zeroes(&mut self, count: usize) -> Result<(), DecodeError> {
        let zero = self.bytes(count)?.iter().all(|b| *b == 0);
        if zero {
            Ok(())
        } else {
            Err(DecodeError::Invalid("reserved"))
        }
    }

    /// A count that must not be above its bound: checked before anything is allocated for it.
    pub fn count(&mut self, field: &'static str, limit: usize) -> Result<usize, DecodeError> {
        let value = self.u32()?;
        if value as usize > limit {
            return Err(DecodeError::TooLarge {
                field,
                value: value.into(),
                limit: limit as u64,
            });
        }
        Ok(value as usize)
    }

    /// How many bytes are left.
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// Nothing may be left.
    pub fn finish(self) -> Result<(), DecodeError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(DecodeError::TrailingBytes(self.rest.len()))
        }
    }
}
