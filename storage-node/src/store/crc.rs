//! The CRC that every metadata block carries in itself.

/// CRC-32 (IEEE 802.3) of `bytes` with the four bytes at `field` taken as zero.
pub(super) fn with_field_zero(bytes: &[u8], field: usize) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..field]);
    hasher.update(&[0; 4]);
    hasher.update(&bytes[field + 4..]);
    hasher.finalize()
}

/// Computes the CRC of `bytes` and puts it at `field`.
pub(super) fn put(bytes: &mut [u8], field: usize) -> u32 {
    let crc = with_field_zero(bytes, field);
    bytes[field..field + 4].copy_from_slice(&crc.to_le_bytes());
    crc
}

/// Whether the CRC at `field` is that of `bytes`.
pub(super) fn matches(bytes: &[u8], field: usize) -> bool {
    bytes[field..field + 4] == with_field_zero(bytes, field).to_le_bytes()
}
