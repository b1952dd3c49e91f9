//! Small files that are replaced as a whole: magic (8 bytes), `u16` format, body, `u32` CRC-32 over all before it.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use cairn_proto::codec::{Put, Reader};

use crate::log::LogError;

/// Replaces a file. Durable when it returns; after a crash in between there is either the old or the new one.
pub(super) fn write(dir: &Path, name: &str, magic: &[u8; 8], format: u16, body: &[u8]) -> Result<(), LogError> {
    let mut bytes = magic.to_vec();
    bytes.put_u16(format);
    bytes.put_bytes(body);
    bytes.put_u32(crc32fast::hash(&bytes));
    let (new, path) = (dir.join(format!("{name}.new")), dir.join(name));
    let write = || {
        let mut file = File::create(&new)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        std::fs::rename(&new, &path)?;
        File::open(dir)?.sync_all()
    };
    write().map_err(|error| LogError::io(format!("write {}", path.display()), error))
}

/// The body of a file; `None` when there is no such file.
pub(super) fn read(dir: &Path, name: &str, magic: &[u8; 8], format: u16) -> Result<Option<Vec<u8>>, LogError> {
    let path = dir.join(name);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(LogError::io(format!("read {}", path.display()), error)),
    };
    let damaged = |why: &str| LogError::damaged(format!("{} ({why})", path.display()));
    let (body, checksum) = bytes
        .split_last_chunk::<4>()
        .ok_or_else(|| damaged("it is too short"))?;
    if crc32fast::hash(body) != u32::from_le_bytes(*checksum) {
        return Err(damaged("its checksum does not match"));
    }
    let mut reader = Reader::new(body);
    if reader.bytes(8).ok() != Some(magic) {
        return Err(damaged("it is something else"));
    }
    let found = reader.u16().map_err(|_| damaged("it is too short"))?;
    if found != format {
        let what = format!(
            "{} has format {found}, this version reads {format}: run the version that wrote it",
            path.display()
        );
        return Err(LogError::Foreign { what });
    }
    Ok(Some(reader.bytes(reader.remaining()).unwrap_or_default().to_vec()))
}
