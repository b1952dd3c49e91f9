//! How the records of the state machine are written: little-endian, in the order in which their fields are declared;
//! strings and lists begin with a `u32` count, options with a byte 0 or 1, enums with their number.

use cairn_proto::codec::{DecodeError, Put, Reader};
use cairn_proto::ids::*;

/// A value with one explicit encoding.
pub(crate) trait Code: Sized {
    /// Appends it.
    fn encode(&self, out: &mut Vec<u8>);
    /// Reads it.
    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError>;
}

/// Items that a list may have at the most when it is decoded: the bound of memory, not of meaning.
const LIST_MAX: usize = 1 << 20;
/// Bytes that a string may have at the most when it is decoded.
const STRING_MAX: usize = 4096;

macro_rules! numbers {
    ($($type:ty: $put:ident $get:ident;)*) => {
        $(impl Code for $type {
            fn encode(&self, out: &mut Vec<u8>) {
                out.$put(*self);
            }

            fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
                reader.$get()
            }
        })*
    };
}

numbers! {
    u8: put_u8 u8;
    u16: put_u16 u16;
    u32: put_u32 u32;
    u64: put_u64 u64;
}

macro_rules! newtypes {
    ($($type:ident)*) => {
        $(impl Code for $type {
            fn encode(&self, out: &mut Vec<u8>) {
                self.0.encode(out);
            }

            fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
                Code::decode(reader).map($type)
            }
        })*
    };
}

newtypes! { ClusterId DeviceUuid ClientId VolumeId GroupIndex Incarnation Epoch Layer NodeId CommitSeq }

impl Code for bool {
    fn encode(&self, out: &mut Vec<u8>) {
        out.put_u8(u8::from(*self));
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        reader.bool("flag")
    }
}

impl Code for [u8; 16] {
    fn encode(&self, out: &mut Vec<u8>) {
        out.put_bytes(self);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        reader.array()
    }
}

impl Code for Generation {
    fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(self.get());
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Generation::new(reader.u32()?).ok_or(DecodeError::Invalid("generation"))
    }
}

impl Code for GroupCount {
    fn encode(&self, out: &mut Vec<u8>) {
        out.put_u8(self.get());
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        GroupCount::new(reader.u8()?).ok_or(DecodeError::Invalid("group count"))
    }
}

impl Code for DeviceId {
    fn encode(&self, out: &mut Vec<u8>) {
        self.uuid.encode(out);
        self.incarnation.encode(out);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let (uuid, incarnation) = (Code::decode(reader)?, Code::decode(reader)?);
        Ok(DeviceId { uuid, incarnation })
    }
}

impl Code for GroupId {
    fn encode(&self, out: &mut Vec<u8>) {
        self.volume.encode(out);
        self.index.encode(out);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let (volume, index) = (Code::decode(reader)?, Code::decode(reader)?);
        Ok(GroupId { volume, index })
    }
}

impl Code for String {
    fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(self.len() as u32);
        out.put_bytes(self.as_bytes());
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let count = reader.count("string", STRING_MAX)?;
        let bytes = reader.bytes(count)?.to_vec();
        String::from_utf8(bytes).map_err(|_| DecodeError::Invalid("string"))
    }
}

impl<T: Code> Code for Option<T> {
    fn encode(&self, out: &mut Vec<u8>) {
        self.is_some().encode(out);
        if let Some(value) = self {
            value.encode(out);
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        if reader.bool("presence")? {
            T::decode(reader).map(Some)
        } else {
            Ok(None)
        }
    }
}

impl<T: Code> Code for Vec<T> {
    fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(self.len() as u32);
        for item in self {
            item.encode(out);
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let count = reader.count("list", LIST_MAX)?;
        // Grows as items are really there: a count alone allocates nothing.
        let mut items = Vec::new();
        for _ in 0..count {
            items.push(T::decode(reader)?);
        }
        Ok(items)
    }
}

impl<K: Code + Ord, V: Code> Code for std::collections::BTreeMap<K, V> {
    fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(self.len() as u32);
        for (key, value) in self {
            key.encode(out);
            value.encode(out);
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let count = reader.count("map", LIST_MAX)?;
        let mut map = std::collections::BTreeMap::new();
        for _ in 0..count {
            let (key, value) = (K::decode(reader)?, V::decode(reader)?);
            if map.last_key_value().is_some_and(|(last, _)| *last >= key) {
                return Err(DecodeError::Invalid("order of keys"));
            }
            map.insert(key, value);
        }
        Ok(map)
    }
}

/// A struct whose encoding is its fields in the order of declaration. The order is part of the format.
macro_rules! record {
    ($(#[$doc:meta])* pub struct $name:ident { $($(#[$field_doc:meta])* pub $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Debug)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type,)*
        }

        impl $crate::state::codec::Code for $name {
            fn encode(&self, out: &mut Vec<u8>) {
                $($crate::state::codec::Code::encode(&self.$field, out);)*
            }

            fn decode(reader: &mut cairn_proto::codec::Reader<'_>) -> Result<Self, cairn_proto::codec::DecodeError> {
                Ok($name { $($field: $crate::state::codec::Code::decode(reader)?,)* })
            }
        }
    };
}

/// An enum without content whose encoding is its number in one byte. Numbers are never used again.
macro_rules! numbered {
    ($(#[$doc:meta])* pub enum $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $number:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        #[repr(u8)]
        pub enum $name {
            $($(#[$variant_doc])* $variant = $number,)*
        }

        impl $crate::state::codec::Code for $name {
            fn encode(&self, out: &mut Vec<u8>) {
                out.push(*self as u8);
            }

            fn decode(reader: &mut cairn_proto::codec::Reader<'_>) -> Result<Self, cairn_proto::codec::DecodeError> {
                match reader.u8()? {
                    $($number => Ok($name::$variant),)*
                    _ => Err(cairn_proto::codec::DecodeError::Invalid(stringify!($name))),
                }
            }
        }
    };
}

pub(crate) use {numbered, record};
