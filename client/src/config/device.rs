//! A device in the list of a storage node: a path, or a table with a path and what the operator knows better.

use std::fmt;
use std::path::PathBuf;

use serde::de::{MapAccess, Visitor, value::MapAccessDeserializer};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What an operator says of a device's write cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WriteCache {
    /// Completed writes are lost when power fails before a flush.
    Volatile,
    /// They are not. Where that is wrong, a power failure loses what was acknowledged.
    None,
}

impl WriteCache {
    /// Whether completed writes are lost when power fails before a flush.
    pub fn is_volatile(self) -> bool {
        self == WriteCache::Volatile
    }
}

impl std::str::FromStr for WriteCache {
    type Err = String;

    fn from_str(text: &str) -> Result<WriteCache, String> {
        match text {
            "volatile" => Ok(WriteCache::Volatile),
            "none" => Ok(WriteCache::None),
            _ => Err(format!("`{text}` is no write cache: write `volatile` or `none`")),
        }
    }
}

/// A device: `"/dev/nvme0n1"`, or `{ path = "/dev/nvme0n1", write_cache = "none" }`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceSection {
    /// A block device or a file.
    pub path: PathBuf,
    /// What the operator knows better than the kernel.
    pub write_cache: Option<WriteCache>,
}

impl From<PathBuf> for DeviceSection {
    fn from(path: PathBuf) -> DeviceSection {
        DeviceSection {
            path,
            write_cache: None,
        }
    }
}

/// The form with keys.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Table {
    path: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    write_cache: Option<WriteCache>,
}

impl<'de> Deserialize<'de> for DeviceSection {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<DeviceSection, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = DeviceSection;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a path, or a table with `path` and `write_cache`")
            }

            fn visit_str<E: serde::de::Error>(self, path: &str) -> Result<DeviceSection, E> {
                Ok(PathBuf::from(path).into())
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<DeviceSection, A::Error> {
                let Table { path, write_cache } = Table::deserialize(MapAccessDeserializer::new(map))?;
                Ok(DeviceSection { path, write_cache })
            }
        }
        deserializer.deserialize_any(Either)
    }
}

impl Serialize for DeviceSection {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.write_cache {
            None => self.path.serialize(serializer),
            write_cache => Table {
                path: self.path.clone(),
                write_cache,
            }
            .serialize(serializer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::NodeSection;
    use super::*;

    #[test]
    fn a_device_is_a_path_or_a_table() {
        let text = "devices = [\"/a\", { path = \"/b\", write_cache = \"none\" }]\n";
        let section: NodeSection = toml::from_str(text).unwrap();
        assert_eq!(section.devices[0], PathBuf::from("/a").into());
        assert_eq!(section.devices[1].write_cache, Some(WriteCache::None));
        assert_eq!(toml::to_string(&section).unwrap(), text);
        for (text, word) in [
            ("devices = [{ path = '/b', cache = 'none' }]", "`cache`"),
            (
                "devices = [{ path = '/b', write_cache = 'no' }]",
                "`volatile` or `none`",
            ),
            ("devices = [{ write_cache = 'none' }]", "`path`"),
            ("devices = [7]", "a path, or a table"),
        ] {
            let error = toml::from_str::<NodeSection>(text).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
