//! `cairn node list`, `cairn node show` and `cairn node scrub`.

use cairn_meta::client::{ClientError, MetaClient};
use cairn_proto::control::v1;
use cairn_proto::units::ByteSize;
use serde::Serialize;

use super::{ago, block_on, device_id, percent, short};
use crate::args::{Global, ScrubNode, ShowNode};
use crate::context::meta_client;
use crate::failure::{Failure, Kind};
use crate::limits::LIST_PAGE;
use crate::output::{self, Table};

pub(crate) fn list(global: &Global) -> Result<(), Failure> {
    let listing = listing(global)?;
    output::show(global.json, &listing, || table(&listing.nodes))
}

pub(crate) fn show(global: &Global, args: &ShowNode) -> Result<(), Failure> {
    let listing = listing(global)?;
    let node = find(&listing.nodes, &args.node)?;
    output::show(global.json, node, || describe(node))
}

/// Has devices of a node verify all that they hold.
pub(crate) fn scrub(global: &Global, args: &ScrubNode) -> Result<(), Failure> {
    let listing = listing(global)?;
    let node = find(&listing.nodes, &args.node)?;
    let devices = to_scrub(node, &args.devices)?;
    let meta = meta_client(global)?;
    let request = v1::ScrubDevicesRequest {
        devices: devices.iter().map(|device| device.id.clone()).collect(),
    };
    block_on(meta.scrub_devices(request))
        .map_err(|error| Failure::of_meta("have the devices verified", &meta.endpoints(), &error))?;
    let asked = ScrubAsked {
        devices: devices.iter().map(|device| device.uuid.clone()).collect(),
    };
    output::show(global.json, &asked, || {
        format!(
            "{} of node {} will be verified: `cairn node show {}` tells how far that is\n",
            match asked.devices.len() {
                1 => "1 device".to_string(),
                count => format!("{count} devices"),
            },
            node.name,
            node.name
        )
    })
}

/// The devices of a node that are named, by the begin of their UUID; all that are in use when none is.
fn to_scrub<'a>(node: &'a NodeRecord, wanted: &[String]) -> Result<Vec<&'a DeviceRecord>, Failure> {
    for wanted in wanted {
        let count = node
            .active()
            .filter(|device| device.uuid.starts_with(wanted.as_str()))
            .count();
        if count != 1 {
            let words = match count {
                0 => "no device",
                _ => "more than one device",
            };
            let failure = Failure::new(
                Kind::NotFound,
                format!(
                    "node `{}` has {words} in use whose UUID begins with `{wanted}`",
                    node.name
                ),
            );
            return Err(failure.hint(format!("`cairn node show {} --json` tells them in full.", node.name)));
        }
    }
    let is_wanted =
        |device: &&DeviceRecord| wanted.is_empty() || wanted.iter().any(|w| device.uuid.starts_with(w.as_str()));
    let devices: Vec<_> = node.active().filter(is_wanted).collect();
    if devices.is_empty() {
        return Err(Failure::new(
            Kind::NotFound,
            format!("node `{}` has no device in use", node.name),
        ));
    }
    Ok(devices)
}

#[derive(Serialize)]
struct ScrubAsked {
    devices: Vec<String>,
}

fn listing(global: &Global) -> Result<Listing, Failure> {
    let meta = meta_client(global)?;
    let nodes = block_on(all(&meta));
    let nodes = nodes.map_err(|error| Failure::of_meta("list the nodes", &meta.endpoints(), &error))?;
    let mut nodes: Vec<NodeRecord> = nodes.into_iter().map(NodeRecord::from).collect();
    nodes.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Listing { nodes })
}

#[derive(Serialize)]
struct Listing {
    nodes: Vec<NodeRecord>,
}

/// A storage node, for programs.
#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
struct NodeRecord {
    id: u64,
    name: String,
    alive: bool,
    heard_ms_ago: Option<u64>,
    version: String,
    domain: DomainRecord,
    /// It is to hold nothing.
    draining: bool,
    devices: Vec<DeviceRecord>,
}

/// Where it stands.
#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
struct DomainRecord {
    room: String,
    rack: String,
    host: String,
}

/// One device of a node.
#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
struct DeviceRecord {
    #[serde(skip)]
    id: v1::DeviceId,
    uuid: String,
    /// As text: programs that know only floating-point numbers would round it.
    incarnation: String,
    state: &'static str,
    alive: bool,
    addresses: Vec<String>,
    capacity_bytes: u64,
    used_bytes: u64,
    groups: u64,
    /// Not known while its node is silent.
    write_cache: Option<&'static str>,
    /// Not known while its node is silent.
    scrub: Option<ScrubRecord>,
    trouble: Option<String>,
}

/// How the verification of a device is.
#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
struct ScrubRecord {
    pass: u64,
    under_way: bool,
    /// Not known, or never.
    begun_unix_ms: Option<u64>,
    checked_blocks: u64,
    data_blocks: u64,
    finished_pass: u64,
    finished_unix_ms: Option<u64>,
    damaged_blocks: u64,
    damaged_metadata: u64,
    moved_blocks: u64,
}

fn unix_ms(seconds: u64) -> Option<u64> {
    (seconds > 0).then(|| seconds.saturating_mul(1000))
}

impl From<v1::DeviceScrub> for ScrubRecord {
    fn from(scrub: v1::DeviceScrub) -> ScrubRecord {
        ScrubRecord {
            pass: scrub.pass,
            under_way: scrub.under_way,
            begun_unix_ms: unix_ms(scrub.begun_s),
            checked_blocks: scrub.checked_blocks,
            data_blocks: scrub.data_blocks,
            finished_pass: scrub.finished_pass,
            finished_unix_ms: unix_ms(scrub.finished_s),
            damaged_blocks: scrub.damaged_blocks,
            damaged_metadata: scrub.damaged_metadata,
            moved_blocks: scrub.moved_blocks,
        }
    }
}

impl ScrubRecord {
    fn progress(&self) -> String {
        match (self.pass, self.under_way) {
            (0, _) => "not yet".to_string(),
            (pass, false) => format!("pass {pass} done"),
            (pass, true) => format!(
                "pass {pass} {}",
                percent(self.checked_blocks.min(self.data_blocks), self.data_blocks)
            ),
        }
    }

    fn damage(&self) -> String {
        match (self.damaged_blocks, self.damaged_metadata) {
            (0, 0) => "none".to_string(),
            (blocks, 0) => format!("{blocks} blocks"),
            (blocks, metadata) => format!("{blocks} blocks, {metadata} of its own"),
        }
    }
}

impl From<v1::Node> for NodeRecord {
    fn from(node: v1::Node) -> NodeRecord {
        let domain = node.domain.unwrap_or_default();
        NodeRecord {
            id: node.id,
            name: node.name,
            alive: node.seems_alive,
            heard_ms_ago: node.heard_ms_ago,
            version: node.version,
            draining: node.draining,
            domain: DomainRecord {
                room: domain.room,
                rack: domain.rack,
                host: domain.host,
            },
            devices: node.devices.into_iter().map(DeviceRecord::from).collect(),
        }
    }
}

impl From<v1::Device> for DeviceRecord {
    fn from(device: v1::Device) -> DeviceRecord {
        let id = device_id(device.id.as_ref());
        let write_cache = match device.write_cache() {
            v1::WriteCache::Unspecified => None,
            v1::WriteCache::Volatile => Some("volatile"),
            v1::WriteCache::None => Some("none"),
            v1::WriteCache::VolatileByOperator => Some("volatile_by_operator"),
            v1::WriteCache::NoneByOperator => Some("none_by_operator"),
        };
        DeviceRecord {
            id: device.id.clone().unwrap_or_default(),
            uuid: id.uuid.to_string(),
            incarnation: id.incarnation.to_string(),
            state: match device.state() {
                v1::DeviceState::Active => "active",
                v1::DeviceState::Failed => "failed",
                v1::DeviceState::Replaced => "replaced",
                v1::DeviceState::Removed => "removed",
                v1::DeviceState::Unspecified => "unknown",
            },
            alive: device.seems_alive,
            addresses: device.addresses,
            capacity_bytes: device.capacity_bytes,
            used_bytes: device.used_bytes,
            groups: device.groups,
            write_cache,
            scrub: device.scrub.map(ScrubRecord::from),
            trouble: Some(device.trouble).filter(|trouble| !trouble.is_empty()),
        }
    }
}

impl NodeRecord {
    fn state(&self) -> String {
        let state = self.up_or_down();
        match self.draining {
            true => format!("{state}, draining"),
            false => state,
        }
    }

    fn up_or_down(&self) -> String {
        match (self.alive, self.heard_ms_ago) {
            (true, _) => "up".to_string(),
            (false, Some(ms)) => format!("down for {}", ago(ms)),
            (false, None) => "down".to_string(),
        }
    }

    /// Devices that count: those of earlier formats do not.
    fn active(&self) -> impl Iterator<Item = &DeviceRecord> {
        self.devices.iter().filter(|device| device.state == "active")
    }

    fn place(&self) -> String {
        let domain = &self.domain;
        let parts = [&domain.room, &domain.rack, &domain.host];
        parts
            .map(String::as_str)
            .into_iter()
            .filter(|part| !part.is_empty())
            .collect::<Vec<_>>()
            .join("/")
    }
}

/// All nodes, page by page.
pub(crate) async fn all(meta: &MetaClient) -> Result<Vec<v1::Node>, ClientError> {
    let mut nodes: Vec<v1::Node> = Vec::new();
    loop {
        let request = v1::ListNodesRequest {
            after: nodes.last().map_or(0, |node| node.id),
            limit: LIST_PAGE,
        };
        let page = meta.list_nodes(request).await?;
        let more = page.more && !page.nodes.is_empty();
        nodes.extend(page.nodes);
        if !more {
            return Ok(nodes);
        }
    }
}

/// A node that a command is about.
pub(crate) struct Named {
    pub(crate) id: u64,
    pub(crate) name: String,
    pub(crate) draining: bool,
    /// Groups that its devices are members of.
    pub(crate) copies: u64,
}

/// The node of this name or number.
pub(crate) fn find_named(global: &Global, wanted: &str) -> Result<Named, Failure> {
    let listing = listing(global)?;
    let node = find(&listing.nodes, wanted)?;
    Ok(Named {
        id: node.id,
        name: node.name.clone(),
        draining: node.draining,
        copies: node.devices.iter().map(|device| device.groups).sum(),
    })
}

/// By name; by number where no node has that name.
fn find<'a>(nodes: &'a [NodeRecord], wanted: &str) -> Result<&'a NodeRecord, Failure> {
    let by_name = nodes.iter().find(|node| node.name == wanted);
    let by_id = || nodes.iter().find(|node| wanted.parse() == Ok(node.id));
    by_name.or_else(by_id).ok_or_else(|| {
        Failure::new(Kind::NotFound, format!("there is no node `{wanted}`"))
            .hint("`cairn node list` shows those that exist.")
    })
}

fn table(nodes: &[NodeRecord]) -> String {
    if nodes.is_empty() {
        return "there is no storage node: `cairn node --help` tells how to start one\n".to_string();
    }
    let mut table = Table::new(&["NAME", "STATE", "DEVICES", "SIZE", "USED", "GROUPS", "PLACE"]).right(&[2, 3, 4, 5]);
    for node in nodes {
        let size: u64 = node.active().map(|device| device.capacity_bytes).sum();
        let used: u64 = node.active().map(|device| device.used_bytes).sum();
        let groups: u64 = node.active().map(|device| device.groups).sum();
        table.row([
            node.name.clone(),
            node.state(),
            node.active().count().to_string(),
            ByteSize(size).to_string(),
            percent(used, size),
            groups.to_string(),
            node.place(),
        ]);
    }
    table.render()
}

fn describe(node: &NodeRecord) -> String {
    let mut table = Table::pairs();
    table.row(["name", node.name.as_str()]);
    table.row(["id".to_string(), node.id.to_string()]);
    table.row(["state".to_string(), node.state()]);
    table.row(["place".to_string(), node.place()]);
    table.row(["version", node.version.as_str()]);
    let mut text = table.render();
    let headings = [
        "DEVICE",
        "STATE",
        "SIZE",
        "USED",
        "GROUPS",
        "WRITE CACHE",
        "VERIFIED",
        "DAMAGED",
        "ADDRESS",
        "TROUBLE",
    ];
    let mut table = Table::new(&headings).right(&[2, 3, 4]);
    for device in &node.devices {
        let uuid = device.uuid.parse().unwrap_or_default();
        let state = match (device.state, device.alive) {
            ("active", true) => "up",
            ("active", false) => "down",
            (state, _) => state,
        };
        table.row([
            short(&uuid),
            state.to_string(),
            ByteSize(device.capacity_bytes).to_string(),
            percent(device.used_bytes, device.capacity_bytes),
            device.groups.to_string(),
            match device.write_cache {
                None => "?",
                // Worth a look: nothing is flushed, because somebody said so.
                Some("none_by_operator") => "NONE, as told",
                Some("volatile_by_operator") => "volatile, as told",
                Some(detected) => detected,
            }
            .to_string(),
            device.scrub.as_ref().map_or("?".to_string(), ScrubRecord::progress),
            device.scrub.as_ref().map_or("?".to_string(), ScrubRecord::damage),
            device.addresses.join(" "),
            device.trouble.clone().unwrap_or_default(),
        ]);
    }
    text.push('\n');
    text.push_str(&table.render());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: u64, name: &str, alive: bool) -> NodeRecord {
        v1::Node {
            id,
            name: name.to_string(),
            domain: Some(v1::FailureDomain {
                rack: "r1".to_string(),
                host: name.to_string(),
                ..v1::FailureDomain::default()
            }),
            seems_alive: alive,
            heard_ms_ago: Some(400_000),
            version: "0.1.0".to_string(),
            devices: vec![v1::Device {
                id: Some(v1::DeviceId {
                    uuid: vec![id as u8; 16],
                    incarnation: 1,
                }),
                addresses: vec!["127.0.0.1:7402".to_string()],
                capacity_bytes: 8 << 30,
                used_bytes: 2 << 30,
                state: v1::DeviceState::Active as i32,
                seems_alive: alive,
                groups: 5,
                write_cache: v1::WriteCache::Volatile.into(),
                scrub: Some(v1::DeviceScrub {
                    pass: 3,
                    under_way: true,
                    checked_blocks: 25,
                    data_blocks: 100,
                    damaged_blocks: 2,
                    ..v1::DeviceScrub::default()
                }),
                ..v1::Device::default()
            }],
            draining: false,
        }
        .into()
    }

    #[test]
    fn nodes_are_a_table_for_people() {
        assert_eq!(
            table(&[node(1, "node-1", true), node(2, "node-2", false)]),
            "NAME    STATE           DEVICES   SIZE  USED  GROUPS  PLACE\n\
             node-1  up                    1  8 GiB  25 %       5  r1/node-1\n\
             node-2  down for 6 min        1  8 GiB  25 %       5  r1/node-2\n"
        );
    }

    #[test]
    fn a_node_is_found_by_name_or_number_and_shown_with_its_devices() {
        let nodes = [node(1, "node-1", true), node(2, "1", true)];
        assert_eq!(find(&nodes, "1").unwrap().id, 2, "a name goes before a number");
        assert_eq!(find(&nodes, "2").unwrap().id, 2);
        assert_eq!(find(&nodes, "node-9").unwrap_err().kind, Kind::NotFound);
        let text = describe(&nodes[0]);
        assert!(text.starts_with("name     node-1\nid       1\nstate    up\n"), "{text}");
        assert!(
            text.ends_with(
                "DEVICE    STATE   SIZE  USED  GROUPS  WRITE CACHE  VERIFIED     DAMAGED   ADDRESS         TROUBLE\n\
                 01010101  up     8 GiB  25 %       5  volatile     pass 3 25 %  2 blocks  127.0.0.1:7402\n"
            ),
            "{text}"
        );
    }

    #[test]
    fn devices_to_be_verified_are_named_by_the_begin_of_their_uuid() {
        let node = node(1, "node-1", true);
        let names = |wanted: &[&str]| {
            let wanted: Vec<String> = wanted.iter().map(|w| w.to_string()).collect();
            to_scrub(&node, &wanted).map(|devices| devices.len())
        };
        assert_eq!(names(&[]).unwrap(), 1);
        assert_eq!(names(&["0101"]).unwrap(), 1);
        let failure = names(&["02"]).unwrap_err();
        assert!(
            failure.kind == Kind::NotFound && failure.to_string().contains("begins with `02`"),
            "{failure}"
        );
    }

    #[test]
    fn nodes_have_stable_keys_for_programs() {
        let json = serde_json::to_value(node(1, "node-1", true)).unwrap();
        let keys = |value: &serde_json::Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
        assert_eq!(
            keys(&json),
            "alive devices domain draining heard_ms_ago id name version"
        );
        assert_eq!(
            keys(&json["devices"][0]),
            "addresses alive capacity_bytes groups incarnation scrub state trouble used_bytes uuid write_cache"
        );
    }
}
