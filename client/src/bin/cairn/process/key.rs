//! The cluster key's file.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use cairn_client::config::Config;
use cairn_proto::capability::ClusterKey;

use super::required;
use crate::args::Key;
use crate::failure::Failure;

/// Digits of a key: two for each byte.
const DIGITS: usize = 64;

/// The key that a flag or the configuration names.
pub(crate) fn of(flag: &Key, config: &Config) -> Result<ClusterKey, Failure> {
    let path = flag.file.clone().or_else(|| config.cluster.key_file.clone());
    let path = required(path, "the cluster key", "--cluster-key FILE", "key_file = \"FILE\"")?;
    read(&path)
}

/// Reads a key: 64 hexadecimal digits, in a file that its owner alone can read.
fn read(path: &Path) -> Result<ClusterKey, Failure> {
    let what = |error| Failure::failed(format!("can't read the cluster key {}: {error}", path.display()));
    let mode = fs::metadata(path).map_err(what)?.permissions().mode();
    if mode & 0o007 != 0 {
        return Err(
            Failure::usage(format!("the cluster key {} can be read by everybody", path.display()))
                .hint(format!("chmod 600 {}", path.display())),
        );
    }
    let text = fs::read(path).map_err(what)?;
    parse(text.trim_ascii()).ok_or_else(|| {
        Failure::usage(format!("{} is no cluster key", path.display())).hint(format!(
            "It must be {DIGITS} hexadecimal digits, the same on all metadata servers and storage nodes."
        ))
    })
}

/// Makes a new key, for its owner's eyes only. A file that exists is left as it is.
pub(crate) fn create(path: &Path) -> Result<(), Failure> {
    let what = |error| Failure::failed(format!("can't make the cluster key {}: {error}", path.display()));
    if path.exists() {
        return Ok(());
    }
    let mut key = [0; DIGITS / 2];
    getrandom::fill(&mut key).map_err(|error| Failure::failed(format!("the system gives no random bytes: {error}")))?;
    let text: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    // Made whole or not at all: a key that was cut short by a crash would lock everybody out.
    let new = path.with_extension("new");
    let mut options = fs::OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)
        .map_err(what)?;
    file.write_all(format!("{text}\n").as_bytes()).map_err(what)?;
    file.sync_all().map_err(what)?;
    fs::rename(&new, path).map_err(what)
}

fn parse(digits: &[u8]) -> Option<ClusterKey> {
    if digits.len() != DIGITS {
        return None;
    }
    let mut key = [0; DIGITS / 2];
    for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |c: u8| char::from(c).to_digit(16);
        *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
    }
    Some(ClusterKey(key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_key_is_private_random_and_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cluster.key");
        create(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let key = read(&path).unwrap();
        create(&path).unwrap();
        assert_eq!(read(&path).unwrap(), key);
        let other = dir.path().join("other.key");
        create(&other).unwrap();
        assert_ne!(read(&other).unwrap(), key);
    }

    #[test]
    fn a_key_that_others_can_read_and_a_file_that_is_none_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cluster.key");
        assert!(read(&path).unwrap_err().what.contains("can't read"));
        create(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let failure = read(&path).unwrap_err();
        assert!(failure.what.contains("can be read by everybody"), "{failure}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "too short\n").unwrap();
        assert!(read(&path).unwrap_err().what.contains("is no cluster key"));
    }
}
