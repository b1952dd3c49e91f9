//! The configuration file: one versioned TOML file that all `cairn` commands and processes of a cluster can share.
//!
//! Each command reads the section that it needs. A key that does not exist is refused by name, since a misspelt key that
//! is silently ignored is a default that nobody chose. Paths in the file are relative to the file's directory.
//!
//! ```toml
//! version = 1
//!
//! [cluster]
//! meta = ["10.0.0.1:7401", "10.0.0.2:7401", "10.0.0.3:7401"]
//!
//! [node]
//! name = "node-4"
//! listen = "10.0.0.4:7402"
//! devices = ["/dev/nvme0n1", "/dev/nvme1n1"]
//! ```

mod device;
mod error;
mod sections;
mod span;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use device::{DeviceSection, WriteCache};
pub use error::ConfigError;
pub use sections::{ClusterSection, ExportSection, MemberAddress, MetaSection, NodeSection, ProcessSection};
pub use span::{ParseSpanError, Span};

/// The version that this program reads and writes.
pub const CONFIG_VERSION: i64 = 1;
/// A configuration file is at most this long; anything longer is some other file.
pub const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// The contents of a configuration file.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// [`CONFIG_VERSION`].
    pub version: i64,
    /// Where the cluster is: what every command needs.
    #[serde(default)]
    pub cluster: ClusterSection,
    /// What `cairn meta` runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub meta: Option<MetaSection>,
    /// What `cairn node` runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeSection>,
    /// What `cairn export` runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub export: Option<ExportSection>,
    /// What every process of this file does: logs, metrics, its process id.
    #[serde(default, skip_serializing_if = "ProcessSection::is_empty")]
    pub process: ProcessSection,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            version: CONFIG_VERSION,
            cluster: ClusterSection::default(),
            meta: None,
            node: None,
            export: None,
            process: ProcessSection::default(),
        }
    }
}

impl Config {
    /// Reads a file. Relative paths in it become relative to its directory.
    ///
    /// # Errors
    /// The file can't be read or is too long, is no TOML, is of another version, has an unknown key or a wrong value.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let read = |source| ConfigError::Read {
            path: path.to_path_buf(),
            source,
        };
        let length = std::fs::metadata(path).map_err(read)?.len();
        if length > CONFIG_BYTES_MAX {
            return Err(ConfigError::TooLong {
                path: path.to_path_buf(),
                length,
            });
        }
        let text = std::fs::read_to_string(path).map_err(read)?;
        let mut config = Config::parse(path, &text)?;
        let directory = std::path::absolute(path).map_err(read)?;
        config.resolve(directory.parent().unwrap_or(Path::new("/")));
        Ok(config)
    }

    /// Reads the text of a file; `path` is for the error message only.
    ///
    /// # Errors
    /// As [`load`](Config::load).
    pub fn parse(path: &Path, text: &str) -> Result<Config, ConfigError> {
        let invalid = |error: toml::de::Error| ConfigError::invalid(path, text, &error);
        // The version comes first: the keys of a version that this program does not know are not its business.
        let table: toml::Table = text.parse().map_err(invalid)?;
        match table.get("version") {
            None => return Err(ConfigError::NoVersion { path: path.into() }),
            Some(toml::Value::Integer(CONFIG_VERSION)) => (),
            Some(other) => {
                return Err(ConfigError::OtherVersion {
                    path: path.into(),
                    found: other.to_string(),
                });
            }
        }
        toml::from_str(text).map_err(invalid)
    }

    /// As the text of a file, without comments.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a configuration has string keys and no nesting that TOML can't write")
    }

    /// Makes its relative paths relative to `directory`.
    fn resolve(&mut self, directory: &Path) {
        let resolve = |path: &mut PathBuf| *path = directory.join(&*path);
        self.cluster.key_file.as_mut().map(resolve);
        if let Some(meta) = &mut self.meta {
            meta.dir.as_mut().map(resolve);
        }
        if let Some(node) = &mut self.node {
            node.devices.iter_mut().map(|device| &mut device.path).for_each(resolve);
        }
        if let Some(export) = &mut self.export {
            export.nbd_unix.as_mut().map(resolve);
        }
        self.process.log_file.as_mut().map(resolve);
        self.process.pid_file.as_mut().map(resolve);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        Config::parse(Path::new("cairn.toml"), text).unwrap_err().to_string()
    }

    #[test]
    fn a_file_is_read_and_its_paths_are_relative_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cairn.toml");
        let text = "version = 1\n[cluster]\nmeta = ['127.0.0.1:7401']\nkey_file = 'cluster.key'\n\
                    [node]\ndevices = ['a.img', '/dev/sdx']\n";
        std::fs::write(&path, text).unwrap();
        let config = Config::load(&path).unwrap();
        assert_eq!(config.cluster.meta, ["127.0.0.1:7401"]);
        assert_eq!(config.cluster.key_file, Some(dir.path().join("cluster.key")));
        let node = config.node.clone().unwrap();
        let paths = [dir.path().join("a.img"), PathBuf::from("/dev/sdx")];
        assert_eq!(node.devices, paths.map(DeviceSection::from));
        assert_eq!(Config::parse(&path, &config.to_toml()).unwrap(), config);
    }

    #[test]
    fn the_file_in_the_manual_has_every_key_and_is_valid() {
        let manual = include_str!("../../CLI.md");
        let text = manual.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
        let config = Config::parse(Path::new("CLI.md"), text).unwrap();
        let written: toml::Table = config.to_toml().parse().unwrap();
        let read: toml::Table = text.parse().unwrap();
        for (section, keys) in &written {
            if let (toml::Value::Table(keys), Some(read)) = (keys, read[section].as_table()) {
                assert!(keys.keys().all(|key| read.contains_key(key)), "[{section}]");
            }
        }
        // What the error for a key that does not exist lists is what exists.
        for section in ["cluster", "meta", "node", "export", "process"] {
            let text = refusal(&format!("version = 1\n[{section}]\nxyzzy = 1\n"));
            let known = text.split("known here: `").nth(1).unwrap().trim_end_matches("`)");
            for key in known.split("`, `") {
                assert!(
                    read[section].get(key).is_some(),
                    "[{section}] {key} is not in the manual"
                );
            }
        }
    }

    #[test]
    fn an_unknown_key_is_refused_by_name_with_a_hint() {
        let text = refusal("version = 1\n[node]\ndevice = ['a']\n");
        assert!(
            text.starts_with("cairn.toml, line 3: there is no key `device` here"),
            "{text}"
        );
        assert!(text.contains("did you mean `devices`?"), "{text}");
        let text = refusal("version = 1\n[nodes]\n");
        assert!(
            text.contains("no key `nodes`") && text.contains("did you mean `node`?"),
            "{text}"
        );
        let text = refusal("version = 1\nxyzzy = 1\n");
        assert!(
            text.contains("no key `xyzzy`") && !text.contains("did you mean"),
            "{text}"
        );
        assert!(text.contains("known here: `version`, `cluster`, `meta`"), "{text}");
    }

    #[test]
    fn a_file_without_or_of_another_version_is_refused() {
        assert_eq!(
            refusal("[cluster]\n"),
            "cairn.toml has no `version`: write `version = 1` on its first line"
        );
        // A newer version may have keys that are unknown here: the version is what must be named.
        let text = refusal("version = 2\nnews = true\n");
        assert!(
            text.starts_with("cairn.toml has version 2; this cairn reads version 1"),
            "{text}"
        );
        assert!(refusal("version = '1'\n").contains("version \"1\""));
    }

    #[test]
    fn a_wrong_value_and_broken_text_are_named_with_their_line() {
        let text = refusal("version = 1\n[node]\ndevice_size = '10 bananas'\n");
        assert!(text.starts_with("cairn.toml, line 3: "), "{text}");
        assert!(text.contains("`10 bananas` is not a size"), "{text}");
        let text = refusal("version = 1\n[node\n");
        assert!(text.starts_with("cairn.toml, line 2: "), "{text}");
    }

    #[test]
    fn a_missing_file_and_a_huge_one_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("none.toml");
        let text = Config::load(&missing).unwrap_err().to_string();
        assert!(text.contains("none.toml") && text.contains("No such file"), "{text}");
        let huge = dir.path().join("huge.toml");
        std::fs::File::create(&huge)
            .unwrap()
            .set_len(CONFIG_BYTES_MAX + 1)
            .unwrap();
        let text = Config::load(&huge).unwrap_err().to_string();
        assert!(text.contains("too long"), "{text}");
    }
}
