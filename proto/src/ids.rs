//! Names of things: newtypes for every number that travels, so that no two of them can be confused.

use std::fmt;

use crate::limits::{GROUPS_PER_VOLUME_MAX, SEQ_BITS};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $inner);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

macro_rules! uuid {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                for (i, byte) in self.0.iter().enumerate() {
                    if matches!(i, 4 | 6 | 8 | 10) {
                        f.write_str("-")?;
                    }
                    write!(f, "{byte:02x}")?;
                }
                Ok(())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl std::str::FromStr for $name {
            type Err = ParseUuidError;

            fn from_str(text: &str) -> Result<Self, ParseUuidError> {
                parse_uuid(text).map(Self)
            }
        }
    };
}

uuid! {
    /// A cluster, drawn at random when its first metadata server is initialised.
    ClusterId
}
uuid! {
    /// A storage device, drawn at random when it is formatted. Never an address or a path.
    DeviceUuid
}
uuid! {
    /// One run of a client process: tells two holders with the same name apart.
    ClientId
}

number! {
    /// A volume. Drawn from a counter in meta, never reused. Zero is no volume.
    VolumeId(u64)
}
number! {
    /// A group within its volume, `0 .. group_count`.
    GroupIndex(u8)
}
number! {
    /// How often this device has been formatted; new at each format, so a wiped device is a different member.
    Incarnation(u64)
}
number! {
    /// The number of a group's configuration; changed only by a Raft commit.
    Epoch(u64)
}
number! {
    /// Grows with each snapshot of a volume; part of the index key of every block.
    Layer(u32)
}
number! {
    /// A 64 MiB chunk of a volume.
    ChunkIndex(u32)
}
number! {
    /// A node process's host, as the operator names hosts apart: assigned by meta at registration.
    NodeId(u64)
}
number! {
    /// Counts durable commits of one device. It never goes back unless the device has forgotten something.
    CommitSeq(u64)
}
number! {
    /// Pairs an answer with its request on one connection.
    Correlation(u64)
}

/// The number of a grant of the right to write a volume. Only grows; granted through Raft. At most 2²⁴ − 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Generation(u32);

impl Generation {
    /// No grant yet: what an unsealed device holds.
    pub const NONE: Generation = Generation(0);
    /// The last generation that exists: it must fit beside [`Seq`] in a [`Version`].
    pub const MAX: Generation = Generation((1 << (64 - SEQ_BITS)) - 1);

    /// `None` when the number does not fit.
    pub fn new(number: u32) -> Option<Generation> {
        (number <= Self::MAX.0).then_some(Generation(number))
    }

    /// The number.
    pub fn get(self) -> u32 {
        self.0
    }

    /// The next grant; `None` when the volume has used up all of them.
    pub fn next(self) -> Option<Generation> {
        Self::new(self.0 + 1)
    }
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "g{}", self.0)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A group's write number within one generation. At most 2⁴⁰ − 1; a coordinator that comes near the end attaches anew.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Seq(u64);

impl Seq {
    /// The last write number that exists.
    pub const MAX: Seq = Seq((1 << SEQ_BITS) - 1);

    /// `None` when the number does not fit.
    pub fn new(number: u64) -> Option<Seq> {
        (number <= Self::MAX.0).then_some(Seq(number))
    }

    /// The number.
    pub fn get(self) -> u64 {
        self.0
    }
}

/// `(g, s)`: generation and write number, packed so that the order of the numbers is the order of the versions.
/// Stored with every block; on wire and disk a little-endian `u64` with `g` in the upper 24 bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Version(u64);

impl Version {
    /// Older than every write: the version of what was never written.
    pub const ZERO: Version = Version(0);

    /// Packs the two.
    pub fn new(generation: Generation, seq: Seq) -> Version {
        Version((u64::from(generation.0) << SEQ_BITS) | seq.0)
    }

    /// From its packed form. Every `u64` is a version.
    pub fn from_bits(bits: u64) -> Version {
        Version(bits)
    }

    /// The packed form.
    pub fn to_bits(self) -> u64 {
        self.0
    }

    /// The grant under which it was written.
    pub fn generation(self) -> Generation {
        Generation((self.0 >> SEQ_BITS) as u32)
    }

    /// The write number within that grant.
    pub fn seq(self) -> Seq {
        Seq(self.0 & Seq::MAX.0)
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{}.{}", self.generation().0, self.seq().0)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A device as a member of a group: its UUID and the format it was given. A reformatted device is another member.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct DeviceId {
    /// Which device.
    pub uuid: DeviceUuid,
    /// Which format of it.
    pub incarnation: Incarnation,
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.uuid, self.incarnation)
    }
}

/// One group of one volume: the unit of placement and configuration.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct GroupId {
    /// The volume.
    pub volume: VolumeId,
    /// Which of its groups.
    pub index: GroupIndex,
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.volume, self.index)
    }
}

/// How many groups a volume has: fixed at its creation, `1 ..= 32`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct GroupCount(u8);

impl GroupCount {
    /// `None` unless within `1 ..= 32`.
    pub fn new(count: u8) -> Option<GroupCount> {
        (1..=GROUPS_PER_VOLUME_MAX)
            .contains(&count)
            .then_some(GroupCount(count))
    }

    /// The number.
    pub fn get(self) -> u8 {
        self.0
    }

    /// The group of a chunk: chunks are dealt to the groups in turn.
    pub fn group_of(self, chunk: ChunkIndex) -> GroupIndex {
        GroupIndex((chunk.0 % u32::from(self.0)) as u8)
    }
}

/// The text is not a UUID: 32 hexadecimal digits, with or without dashes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ParseUuidError;

impl fmt::Display for ParseUuidError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a UUID: expected 32 hexadecimal digits, with or without dashes")
    }
}

impl std::error::Error for ParseUuidError {}

fn parse_uuid(text: &str) -> Result<[u8; 16], ParseUuidError> {
    let mut uuid = [0; 16];
    let mut digits = 0;
    for c in text.chars().filter(|c| *c != '-') {
        let digit = c.to_digit(16).ok_or(ParseUuidError)? as u8;
        let byte = uuid.get_mut(digits / 2).ok_or(ParseUuidError)?;
        *byte = (*byte << 4) | digit;
        digits += 1;
    }
    if digits == 32 { Ok(uuid) } else { Err(ParseUuidError) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_order_by_generation_then_write_number() {
        let v = |g, s| Version::new(Generation::new(g).unwrap(), Seq::new(s).unwrap());
        assert!(v(1, Seq::MAX.get()) < v(2, 0));
        assert!(v(2, 1) < v(2, 2));
        assert_eq!(v(7, 9).generation().get(), 7);
        assert_eq!(v(7, 9).seq().get(), 9);
        assert_eq!(Version::from_bits(v(7, 9).to_bits()), v(7, 9));
        assert!(Generation::new(1 << 24).is_none());
        assert!(Seq::new(1 << 40).is_none());
        assert_eq!(Generation::MAX.next(), None);
    }

    #[test]
    fn uuids_round_trip_and_garbage_is_refused() {
        let uuid = DeviceUuid([0xa5; 16]);
        assert_eq!(uuid.to_string().parse(), Ok(uuid));
        assert!("".parse::<DeviceUuid>().is_err());
        assert!("a5".repeat(17).parse::<DeviceUuid>().is_err());
        assert!("zz".repeat(16).parse::<DeviceUuid>().is_err());
    }

    #[test]
    fn chunks_are_dealt_to_groups_in_turn() {
        let groups = GroupCount::new(3).unwrap();
        assert_eq!(groups.group_of(ChunkIndex(0)), GroupIndex(0));
        assert_eq!(groups.group_of(ChunkIndex(5)), GroupIndex(2));
        assert!(GroupCount::new(0).is_none());
        assert!(GroupCount::new(33).is_none());
    }
}
