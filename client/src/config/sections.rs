//! The sections of the configuration file. Every key may be left out: a flag or a default takes its place.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use cairn_proto::units::ByteSize;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::device::DeviceSection;
use super::span::Span;

/// `[cluster]`: where the cluster is.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterSection {
    /// Addresses of the metadata servers, `host:port`. One that is alive is enough.
    pub meta: Vec<String>,
    /// The file with the cluster key. Metadata servers and storage nodes need it; commands and exports do not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_file: Option<PathBuf>,
}

/// `[meta]`: one metadata server.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct MetaSection {
    /// Its number among the metadata servers, from 1; never used again after it was removed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// Where it keeps its log and state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dir: Option<PathBuf>,
    /// Where it listens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// How others reach it, `host:port`; where it listens unless told otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advertise: Option<String>,
    /// The first metadata servers of a new cluster, this one included: how an empty directory begins.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub members: Vec<MemberAddress>,
    /// Instead of `members`: an empty directory begins as a further member of the cluster that `[cluster]` names.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub join: bool,
    /// How long a device may be silent before its copies are rebuilt on others, `10m`; the same on all servers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rebuild_after: Option<Span>,
}

/// `[node]`: one storage node.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct NodeSection {
    /// Its name in the cluster; the host's name unless told otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Where it listens for clients and other nodes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// How others reach it, `host:port`; where it listens unless told otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advertise: Option<String>,
    /// Its devices: block devices or files.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceSection>,
    /// How large a device file is made that does not exist yet; without it a missing file is an error.
    #[serde(skip_serializing_if = "Option::is_none", with = "size")]
    pub device_size: Option<ByteSize>,
    /// Bytes a second that each device verifies of what it holds, at the most; `0` for no verification.
    #[serde(skip_serializing_if = "Option::is_none", with = "size")]
    pub scrub_rate: Option<ByteSize>,
    /// Days from the end of a verification of all that a device holds to the begin of the next.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scrub_interval_days: Option<u32>,
    /// Bytes a second of fragmented data that each device moves together while guests ask for little, at the most; `0` for
    /// nothing.
    #[serde(skip_serializing_if = "Option::is_none", with = "size")]
    pub move_rate: Option<ByteSize>,
    /// The host, as a failure domain; the node's name unless told otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// The rack that the host stands in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rack: Option<String>,
    /// The room that the rack stands in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub room: Option<String>,
}

/// `[export]`: volumes served over NBD.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExportSection {
    /// The Unix socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nbd_unix: Option<PathBuf>,
    /// The TCP address. NBD over TCP has no authentication: only for networks where everybody is trusted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nbd_tcp: Option<SocketAddr>,
    /// Whether writes are refused.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
    /// Only these volumes; all of them when empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<String>,
}

/// `[process]`: what every process does beside its task.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProcessSection {
    /// What is logged: a level, or a filter as `info,cairn_meta=debug`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log: Option<String>,
    /// Where logs are appended; standard error unless told otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_file: Option<PathBuf>,
    /// Where metrics are served over HTTP for Prometheus.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<SocketAddr>,
    /// Where the process writes its id while it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid_file: Option<PathBuf>,
}

impl ProcessSection {
    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        *self == ProcessSection::default()
    }
}

/// A metadata server of a new cluster, written `1=10.0.0.1:7401`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct MemberAddress {
    /// Its number.
    pub id: u64,
    /// How it is reached, `host:port`.
    pub address: String,
}

impl fmt::Display for MemberAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.id, self.address)
    }
}

impl std::str::FromStr for MemberAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<MemberAddress, String> {
        let parse = || {
            let (id, address) = text.split_once('=')?;
            let (host, port) = address.rsplit_once(':')?;
            port.parse::<u16>().ok().filter(|_| !host.is_empty())?;
            Some(MemberAddress {
                id: id.parse().ok().filter(|id| *id > 0)?,
                address: address.to_string(),
            })
        };
        parse().ok_or_else(|| format!("`{text}` is no metadata server: write ID=HOST:PORT, as 1=10.0.0.1:7401"))
    }
}

impl<'de> Deserialize<'de> for MemberAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<MemberAddress, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for MemberAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Sizes as people write them, `10GiB`; written back exactly, in bytes.
mod size {
    use super::*;

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<ByteSize>, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map(Some).map_err(serde::de::Error::custom)
    }

    pub(super) fn serialize<S: Serializer>(size: &Option<ByteSize>, serializer: S) -> Result<S::Ok, S::Error> {
        match size {
            Some(size) => serializer.collect_str(&size.0),
            None => serializer.serialize_none(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_an_id_and_an_address() {
        let member: MemberAddress = "3=meta-3.example:7401".parse().unwrap();
        assert_eq!((member.id, member.address.as_str()), (3, "meta-3.example:7401"));
        assert_eq!(member.to_string(), "3=meta-3.example:7401");
        for wrong in ["", "1", "1=", "1=host", "0=a:1", "x=a:1", "1=a:99999", "1=:1"] {
            assert!(wrong.parse::<MemberAddress>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_size_is_written_exactly() {
        let section = NodeSection {
            device_size: Some(ByteSize((1 << 30) + 512)),
            ..NodeSection::default()
        };
        let text = toml::to_string(&section).unwrap();
        assert_eq!(text, "device_size = \"1073742336\"\n");
        assert_eq!(toml::from_str::<NodeSection>(&text).unwrap(), section);
    }
}
