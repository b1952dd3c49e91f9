//! Places and lengths: blocks within a chunk, byte sizes as people write them.

use std::fmt;

use crate::ids::ChunkIndex;
use crate::limits::{BLOCK_BYTES, BLOCKS_PER_CHUNK, CHUNK_BYTES};

/// A run of blocks within one chunk: never empty, never past the chunk's end. Ordered by chunk, then place.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BlockRange {
    chunk: ChunkIndex,
    start: u32,
    count: u32,
}

impl BlockRange {
    /// `None` when empty or past the end of the chunk.
    pub fn new(chunk: ChunkIndex, start: u32, count: u32) -> Option<BlockRange> {
        let end = start.checked_add(count)?;
        (count > 0 && end <= BLOCKS_PER_CHUNK).then_some(BlockRange { chunk, start, count })
    }

    /// All of a chunk.
    pub fn whole(chunk: ChunkIndex) -> BlockRange {
        BlockRange {
            chunk,
            start: 0,
            count: BLOCKS_PER_CHUNK,
        }
    }

    /// The chunk, counted from the start of the volume.
    pub fn chunk(&self) -> ChunkIndex {
        self.chunk
    }

    /// The first block, counted from the start of the chunk.
    pub fn start(&self) -> u32 {
        self.start
    }

    /// How many blocks; at least one.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// The first block after it, counted from the start of the chunk.
    pub fn end(&self) -> u32 {
        self.start + self.count
    }

    /// Bytes of its content.
    pub fn bytes(&self) -> usize {
        self.count as usize * BLOCK_BYTES
    }

    /// The block's number counted from the start of the volume: what its checksum is computed over.
    pub fn volume_block(&self, index: u32) -> u64 {
        assert!(index < self.count, "block {index} of a run of {}", self.count);
        u64::from(self.chunk.0) * u64::from(BLOCKS_PER_CHUNK) + u64::from(self.start + index)
    }

    /// Whether the two share a block.
    pub fn overlaps(&self, other: &BlockRange) -> bool {
        self.chunk == other.chunk && self.start < other.end() && other.start < self.end()
    }

    /// The blocks that both have.
    pub fn intersection(&self, other: &BlockRange) -> Option<BlockRange> {
        if !self.overlaps(other) {
            return None;
        }
        let start = self.start.max(other.start);
        BlockRange::new(self.chunk, start, self.end().min(other.end()) - start)
    }
}

impl fmt::Display for BlockRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}+{}", self.chunk, self.start, self.count)
    }
}

/// A number of bytes as people write and read it: `512M`, `10GiB`, `1T`, `4096`. All units are powers of 1024.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct ByteSize(pub u64);

impl ByteSize {
    /// Chunks that a volume of this size has.
    pub fn chunks(self) -> u64 {
        self.0.div_ceil(CHUNK_BYTES)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u32); 5] = [("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
        for (unit, shift) in UNITS {
            let one = 1u64 << shift;
            if self.0 >= one {
                return if self.0.is_multiple_of(one) {
                    write!(f, "{} {unit}", self.0 / one)
                } else {
                    write!(f, "{:.1} {unit}", self.0 as f64 / one as f64)
                };
            }
        }
        write!(f, "{} B", self.0)
    }
}

/// The text is not a size.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ParseByteSizeError(String);

impl fmt::Display for ParseByteSizeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`{}` is not a size: write a whole number and a unit of 1024, as 512M, 10GiB or 1T",
            self.0
        )
    }
}

impl std::error::Error for ParseByteSizeError {}

impl std::str::FromStr for ByteSize {
    type Err = ParseByteSizeError;

    fn from_str(text: &str) -> Result<ByteSize, ParseByteSizeError> {
        let error = || ParseByteSizeError(text.to_string());
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let number: u64 = text[..digits].parse().map_err(|_| error())?;
        let shift = match text[digits..].trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            "p" | "pb" | "pib" => 50,
            _ => return Err(error()),
        };
        number.checked_mul(1 << shift).map(ByteSize).ok_or_else(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_stays_within_its_chunk() {
        let chunk = ChunkIndex(3);
        assert!(BlockRange::new(chunk, 0, 0).is_none());
        assert!(BlockRange::new(chunk, BLOCKS_PER_CHUNK, 1).is_none());
        assert!(BlockRange::new(chunk, u32::MAX, 2).is_none());
        assert_eq!(
            BlockRange::new(chunk, 0, BLOCKS_PER_CHUNK),
            Some(BlockRange::whole(chunk))
        );
        let range = BlockRange::new(chunk, 5, 2).unwrap();
        assert_eq!(range.volume_block(1), 3 * 16384 + 6);
    }

    #[test]
    fn ranges_overlap_only_where_they_share_blocks() {
        let range = |chunk, start, count| BlockRange::new(ChunkIndex(chunk), start, count).unwrap();
        assert!(!range(0, 0, 4).overlaps(&range(0, 4, 4)));
        assert!(!range(0, 0, 4).overlaps(&range(1, 0, 4)));
        assert_eq!(range(0, 2, 4).intersection(&range(0, 4, 9)), Some(range(0, 4, 2)));
    }

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("4096", 4096),
            ("512M", 512 << 20),
            ("10GiB", 10 << 30),
            ("1 TiB", 1 << 40),
            ("0", 0),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in ["", "G", "-1", "1.5G", "1X", "99999999999P", "18446744073709551616"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
        assert_eq!(ByteSize(10 << 30).to_string(), "10 GiB");
        assert_eq!(ByteSize(1536).to_string(), "1.5 KiB");
    }
}
