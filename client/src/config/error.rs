//! What is wrong with a configuration file, in words for the person who wrote it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Why a configuration file is not used.
#[derive(Debug)]
pub enum ConfigError {
    /// It can't be read.
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is too long to be a configuration file.
    TooLong {
        /// Which file.
        path: PathBuf,
        /// Its bytes.
        length: u64,
    },
    /// It does not say which version it is.
    NoVersion {
        /// Which file.
        path: PathBuf,
    },
    /// It is of a version that this program does not read.
    OtherVersion {
        /// Which file.
        path: PathBuf,
        /// What stands there.
        found: String,
    },
    /// A key that does not exist.
    UnknownKey {
        /// Which file.
        path: PathBuf,
        /// On which line, counted from 1.
        line: usize,
        /// The key.
        key: String,
        /// The keys that exist in its place.
        known: Vec<String>,
    },
    /// It is no TOML, or a value is of the wrong kind.
    Invalid {
        /// Which file.
        path: PathBuf,
        /// On which line, counted from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
}

impl ConfigError {
    pub(super) fn invalid(path: &Path, text: &str, error: &toml::de::Error) -> ConfigError {
        let line = error.span().map_or(1, |span| {
            1 + text.as_bytes()[..span.start.min(text.len())]
                .iter()
                .filter(|b| **b == b'\n')
                .count()
        });
        let path = path.to_path_buf();
        match unknown_key(error.message()) {
            Some((key, known)) => ConfigError::UnknownKey { path, line, key, known },
            None => ConfigError::Invalid {
                path,
                line,
                message: error.message().to_string(),
            },
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConfigError::Read { path, source } => write!(f, "{} can't be read: {source}", path.display()),
            ConfigError::TooLong { path, length } => {
                write!(
                    f,
                    "{} is too long for a configuration file ({length} bytes)",
                    path.display()
                )
            }
            ConfigError::NoVersion { path } => write!(
                f,
                "{} has no `version`: write `version = {}` on its first line",
                path.display(),
                super::CONFIG_VERSION
            ),
            ConfigError::OtherVersion { path, found } => write!(
                f,
                "{} has version {found}; this cairn reads version {}: use the cairn that the file was written for",
                path.display(),
                super::CONFIG_VERSION
            ),
            ConfigError::UnknownKey { path, line, key, known } => {
                write!(f, "{}, line {line}: there is no key `{key}` here", path.display())?;
                if let Some(near) = nearest(key, known) {
                    write!(f, "; did you mean `{near}`?")?;
                }
                write!(f, " (known here: `{}`)", known.join("`, `"))
            }
            ConfigError::Invalid { path, line, message } => {
                write!(f, "{}, line {line}: {message}", path.display())
            }
        }
    }
}

impl std::error::Error for ConfigError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ConfigError::Read { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// serde says it in words only: "unknown field `x`, expected one of `a`, `b`" (or "expected `a`", "`a` or `b`").
fn unknown_key(message: &str) -> Option<(String, Vec<String>)> {
    let rest = message.strip_prefix("unknown field `")?;
    let (key, known) = rest.split_once('`')?;
    let known = known.split('`').skip(1).step_by(2).map(str::to_string).collect();
    Some((key.to_string(), known))
}

/// The known key that differs least, if it differs by little.
fn nearest<'a>(key: &str, known: &'a [String]) -> Option<&'a str> {
    let (distance, near) = known.iter().map(|known| (edits(key, known), known.as_str())).min()?;
    (distance <= 1 + key.len() / 4).then_some(near)
}

/// Levenshtein's distance, over bytes: keys are ASCII.
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_is_nearly_right_is_found() {
        let known = ["devices", "device_size", "listen"].map(str::to_string);
        assert_eq!(nearest("device", &known), Some("devices"));
        assert_eq!(nearest("lisen", &known), Some("listen"));
        assert_eq!(nearest("colour", &known), None);
        assert_eq!(edits("kitten", "sitting"), 3);
    }
}
