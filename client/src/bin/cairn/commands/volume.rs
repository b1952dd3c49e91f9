//! `cairn volume`.

use cairn_meta::client::{ClientError, MetaClient};
use cairn_proto::collections::Map;
use cairn_proto::control::v1::{self, volume_selector};
use cairn_proto::ids::{DeviceId, VolumeId};
use cairn_proto::units::ByteSize;
use serde::Serialize;

use super::health::{self, HealthRecord};
use super::{ago, block_on, device_id, since, uuid_text};
use crate::args::{CreateVolume, DeleteVolume, Global, GrowVolume, ShowVolume, SpreadArg, VolumeCommand};
use crate::context::meta_client;
use crate::failure::Failure;
use crate::limits::LIST_PAGE;
use crate::output::{self, Table, confirm};

pub(crate) fn run(global: &Global, command: &VolumeCommand) -> Result<(), Failure> {
    let meta = meta_client(global)?;
    block_on(async {
        match command {
            VolumeCommand::Create(args) => create(global, &meta, args).await,
            VolumeCommand::List => list(global, &meta).await,
            VolumeCommand::Show(args) => show(global, &meta, args).await,
            VolumeCommand::Grow(args) => grow(global, &meta, args).await,
            VolumeCommand::Delete(args) => delete(global, &meta, args).await,
        }
    })
}

/// A volume, for programs.
#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
struct VolumeRecord {
    id: u64,
    name: String,
    size_bytes: u64,
    copies: u32,
    write_quorum: u32,
    allow_single_copy: bool,
    groups: u32,
    generation: u32,
    holder: Option<HolderRecord>,
    created_unix_ms: u64,
}

/// Who may write a volume.
#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
struct HolderRecord {
    client_id: String,
    address: String,
    generation: u32,
    since_unix_ms: u64,
    caretaker: bool,
}

/// One group with its copies.
#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
struct GroupRecord {
    index: u32,
    epoch: u64,
    in_sync: Vec<CopyRecord>,
    joining: Vec<CopyRecord>,
    stale: Vec<CopyRecord>,
}

/// One copy of a group.
#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
struct CopyRecord {
    device: String,
    /// As text: programs that know only floating-point numbers would round it.
    incarnation: String,
    node_id: Option<u64>,
    host: String,
    alive: bool,
}

impl From<v1::Volume> for VolumeRecord {
    fn from(volume: v1::Volume) -> VolumeRecord {
        VolumeRecord {
            id: volume.id,
            name: volume.name,
            size_bytes: volume.size_bytes,
            copies: volume.replicas,
            write_quorum: volume.write_quorum,
            allow_single_copy: volume.min_copies_one,
            groups: volume.group_count,
            generation: volume.generation,
            holder: volume.holder.map(|holder| HolderRecord {
                client_id: uuid_text(&holder.client_id),
                address: holder.address,
                generation: holder.generation,
                since_unix_ms: holder.since_unix_ms,
                caretaker: holder.caretaker,
            }),
            created_unix_ms: volume.created_unix_ms,
        }
    }
}

impl VolumeRecord {
    fn size(&self) -> String {
        ByteSize(self.size_bytes).to_string()
    }

    fn used_by(&self) -> String {
        match &self.holder {
            Some(holder) => holder.address.clone(),
            None => "-".to_string(),
        }
    }
}

/// A volume by its name.
fn by_name(name: &str) -> Option<v1::VolumeSelector> {
    Some(v1::VolumeSelector {
        by: Some(volume_selector::By::Name(name.to_string())),
    })
}

/// The volume of an answer, which always has one.
fn present(volume: Option<v1::Volume>) -> Result<v1::Volume, Failure> {
    volume.ok_or_else(|| Failure::failed("the metadata server's answer lacks the volume: is it of another version?"))
}

/// What is asked of meta to create a volume.
pub(crate) fn create_request(name: &str, size: ByteSize, copies: u32) -> v1::CreateVolumeRequest {
    v1::CreateVolumeRequest {
        name: name.to_string(),
        size_bytes: size.0,
        replicas: copies,
        write_quorum: 0,
        min_copies_one: false,
        spread: v1::Spread::Host as i32,
    }
}

/// What is asked of meta to look at a volume.
pub(crate) fn by_name_request(name: &str) -> v1::GetVolumeRequest {
    v1::GetVolumeRequest { volume: by_name(name) }
}

async fn create(global: &Global, meta: &MetaClient, args: &CreateVolume) -> Result<(), Failure> {
    let request = v1::CreateVolumeRequest {
        write_quorum: args.write_quorum.unwrap_or(0),
        min_copies_one: args.allow_single_copy,
        spread: match args.spread {
            SpreadArg::Device => v1::Spread::Device,
            SpreadArg::Host => v1::Spread::Host,
            SpreadArg::Rack => v1::Spread::Rack,
            SpreadArg::Room => v1::Spread::Room,
        } as i32,
        ..create_request(&args.name, args.size, args.copies)
    };
    let answer = meta.create_volume(request).await;
    let answer = answer.map_err(|error| failed(meta, format!("create volume `{}`", args.name), &error))?;
    let volume = VolumeRecord::from(present(answer.volume)?);
    output::show(global.json, &volume, || {
        format!(
            "created volume {} ({}, {} copies)\n",
            volume.name,
            volume.size(),
            volume.copies
        )
    })
}

/// All volumes, page by page.
pub(crate) async fn all(meta: &MetaClient) -> Result<Vec<v1::Volume>, ClientError> {
    let mut volumes: Vec<v1::Volume> = Vec::new();
    loop {
        let after = volumes.last().map(|volume| volume.name.clone()).unwrap_or_default();
        let request = v1::ListVolumesRequest {
            after,
            limit: LIST_PAGE,
        };
        let page = meta.list_volumes(request).await?;
        let more = page.more && !page.volumes.is_empty();
        volumes.extend(page.volumes);
        if !more {
            return Ok(volumes);
        }
    }
}

async fn list(global: &Global, meta: &MetaClient) -> Result<(), Failure> {
    #[derive(Serialize)]
    struct Listing {
        volumes: Vec<VolumeRecord>,
    }
    let volumes = all(meta)
        .await
        .map_err(|error| failed(meta, "list volumes".into(), &error))?;
    let listing = Listing {
        volumes: volumes.into_iter().map(VolumeRecord::from).collect(),
    };
    output::show(global.json, &listing, || table(&listing.volumes))
}

fn table(volumes: &[VolumeRecord]) -> String {
    if volumes.is_empty() {
        return "there is no volume: `cairn volume create NAME SIZE` makes one\n".to_string();
    }
    let mut table = Table::new(&["NAME", "SIZE", "COPIES", "USED BY"]).right(&[1, 2]);
    for volume in volumes {
        table.row([
            volume.name.clone(),
            volume.size(),
            volume.copies.to_string(),
            volume.used_by(),
        ]);
    }
    table.render()
}

async fn show(global: &Global, meta: &MetaClient, args: &ShowVolume) -> Result<(), Failure> {
    #[derive(Serialize)]
    struct Shown {
        #[serde(flatten)]
        volume: VolumeRecord,
        group_list: Vec<GroupRecord>,
        health: Option<HealthRecord>,
    }
    let request = v1::GetGroupsRequest {
        volume: by_name(&args.name),
    };
    let answer = meta.get_groups(request).await;
    let answer = answer.map_err(|error| failed(meta, format!("show volume `{}`", args.name), &error))?;
    let shown = Shown {
        volume: present(answer.volume)?.into(),
        group_list: groups(&answer.groups, &answer.devices),
        health: answer.health.map(HealthRecord::from),
    };
    output::show(global.json, &shown, || {
        describe(&shown.volume, &shown.group_list, shown.health.as_ref())
    })
}

fn groups(groups: &[v1::GroupConfig], devices: &[v1::Device]) -> Vec<GroupRecord> {
    let known: Map<DeviceId, &v1::Device> = devices.iter().map(|d| (device_id(d.id.as_ref()), d)).collect();
    let copies = |ids: &[v1::DeviceId]| {
        let copy = |id: &v1::DeviceId| {
            let id = device_id(Some(id));
            let device = known.get(&id);
            CopyRecord {
                device: id.uuid.to_string(),
                incarnation: id.incarnation.to_string(),
                node_id: device.map(|device| device.node_id),
                host: device
                    .and_then(|device| device.domain.clone())
                    .map(|domain| domain.host)
                    .unwrap_or_default(),
                alive: device.is_some_and(|device| device.seems_alive),
            }
        };
        ids.iter().map(copy).collect()
    };
    let group = |group: &v1::GroupConfig| GroupRecord {
        index: group.index,
        epoch: group.epoch,
        in_sync: copies(&group.in_sync),
        joining: copies(&group.joining),
        stale: copies(&group.stale),
    };
    groups.iter().map(group).collect()
}

fn describe(volume: &VolumeRecord, groups: &[GroupRecord], health: Option<&HealthRecord>) -> String {
    let mut table = Table::pairs();
    table.row(["name", volume.name.as_str()]);
    table.row(["id".to_string(), VolumeId(volume.id).to_string()]);
    table.row(["size", &volume.size()]);
    let single = if volume.allow_single_copy {
        ", goes on with one"
    } else {
        ""
    };
    table.row([
        "copies".to_string(),
        format!("{}, {} acknowledge a write{single}", volume.copies, volume.write_quorum),
    ]);
    table.row([
        "created".to_string(),
        format!("{} ago", ago(since(volume.created_unix_ms))),
    ]);
    match &volume.holder {
        Some(holder) => table.row([
            "used by".to_string(),
            format!("{} for {}", holder.address, ago(since(holder.since_unix_ms))),
        ]),
        None => table.row(["used by", "nobody"]),
    }
    if let Some(health) = health {
        table.row(["health".to_string(), health::words(health)]);
    }
    let mut text = table.render();
    let mut table = Table::new(&["GROUP", "IN SYNC", "JOINING", "STALE"]);
    let names = |copies: &[CopyRecord]| {
        let name = |copy: &CopyRecord| {
            let host = if copy.host.is_empty() {
                &copy.device[..8]
            } else {
                &copy.host
            };
            format!("{host}{}", if copy.alive { "" } else { " (down)" })
        };
        let mut names: Vec<String> = copies.iter().map(name).collect();
        names.sort();
        if names.is_empty() {
            "-".to_string()
        } else {
            names.join(", ")
        }
    };
    for group in groups {
        table.row([
            group.index.to_string(),
            names(&group.in_sync),
            names(&group.joining),
            names(&group.stale),
        ]);
    }
    text.push('\n');
    text.push_str(&table.render());
    let repairs = health.map(|health| health::table(std::iter::once(health), usize::MAX));
    if let Some(repairs) = repairs.filter(|repairs| !repairs.is_empty()) {
        text.push_str("\nrepairs:\n");
        text.push_str(&repairs);
    }
    text
}

async fn grow(global: &Global, meta: &MetaClient, args: &GrowVolume) -> Result<(), Failure> {
    let request = v1::GrowVolumeRequest {
        volume: by_name(&args.name),
        size_bytes: args.size.0,
    };
    let answer = meta.grow_volume(request).await;
    let answer = answer.map_err(|error| failed(meta, format!("grow volume `{}`", args.name), &error))?;
    let volume = VolumeRecord::from(present(answer.volume)?);
    output::show(global.json, &volume, || {
        format!("volume {} has {} now\n", volume.name, volume.size())
    })
}

async fn delete(global: &Global, meta: &MetaClient, args: &DeleteVolume) -> Result<(), Failure> {
    // Looked up first: nobody should confirm what does not exist, and the size may remind of something.
    let doing = || format!("delete volume `{}`", args.name);
    let answer = meta.get_volume(by_name_request(&args.name)).await;
    let volume = present(answer.map_err(|error| failed(meta, doing(), &error))?.volume)?;
    let size = ByteSize(volume.size_bytes);
    confirm(
        &format!("Delete volume {} ({size}) and all its data?", args.name),
        args.yes,
    )?;
    // By id: a volume that took the name in the meantime is not the one that was confirmed.
    let request = v1::DeleteVolumeRequest {
        volume: Some(v1::VolumeSelector {
            by: Some(volume_selector::By::Id(volume.id)),
        }),
        force: args.force,
    };
    let answer = meta.delete_volume(request).await;
    let answer = answer.map_err(|error| failed(meta, doing(), &error))?;
    let volume = VolumeRecord::from(present(answer.volume)?);
    output::show(global.json, &volume, || format!("deleted volume {}\n", volume.name))
}

fn failed(meta: &MetaClient, doing: String, error: &ClientError) -> Failure {
    Failure::of_meta(&doing, &meta.endpoints(), error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(name: &str, holder: Option<&str>) -> VolumeRecord {
        v1::Volume {
            id: 7,
            name: name.to_string(),
            size_bytes: 10 << 30,
            group_count: 1,
            replicas: 3,
            write_quorum: 2,
            generation: 4,
            holder: holder.map(|address| v1::Holder {
                client_id: vec![0xab; 16],
                address: address.to_string(),
                generation: 4,
                caretaker: false,
                since_unix_ms: 1,
            }),
            created_unix_ms: 1,
            ..v1::Volume::default()
        }
        .into()
    }

    #[test]
    fn volumes_are_a_table_for_people() {
        assert_eq!(
            table(&[volume("demo", None), volume("a", Some("export on host-1"))]),
            "NAME    SIZE  COPIES  USED BY\n\
             demo  10 GiB       3  -\n\
             a     10 GiB       3  export on host-1\n"
        );
        assert!(table(&[]).contains("cairn volume create"));
    }

    #[test]
    fn volumes_have_stable_keys_for_programs() {
        let json = serde_json::to_string(&volume("demo", Some("here"))).unwrap();
        assert_eq!(
            json,
            "{\"id\":7,\"name\":\"demo\",\"size_bytes\":10737418240,\"copies\":3,\"write_quorum\":2,\
             \"allow_single_copy\":false,\"groups\":1,\"generation\":4,\"holder\":{\
             \"client_id\":\"abababab-abab-abab-abab-abababababab\",\"address\":\"here\",\"generation\":4,\
             \"since_unix_ms\":1,\"caretaker\":false},\"created_unix_ms\":1}"
        );
    }

    #[test]
    fn groups_show_where_their_copies_are_and_which_are_down() {
        let id = |n: u8| v1::DeviceId {
            uuid: vec![n; 16],
            incarnation: 1,
        };
        let device = |n: u8, alive| v1::Device {
            id: Some(id(n)),
            node_id: u64::from(n),
            domain: Some(v1::FailureDomain {
                host: format!("node-{n}"),
                ..v1::FailureDomain::default()
            }),
            seems_alive: alive,
            ..v1::Device::default()
        };
        let config = v1::GroupConfig {
            index: 0,
            epoch: 1,
            in_sync: vec![id(1), id(2), id(9)],
            ..v1::GroupConfig::default()
        };
        let groups = groups(&[config], &[device(1, true), device(2, false)]);
        let text = describe(&volume("demo", None), &groups, None);
        assert!(text.contains("copies   3, 2 acknowledge a write\n"), "{text}");
        assert!(text.contains("used by  nobody\n"), "{text}");
        assert!(
            text.ends_with(
                "GROUP  IN SYNC                                 JOINING  STALE\n\
                 0      09090909 (down), node-1, node-2 (down)  -        -\n"
            ),
            "{text}"
        );
        let health = HealthRecord::from(health::tests::health());
        let text = describe(&volume("demo", None), &groups, Some(&health));
        assert!(
            text.contains("health   2 groups with fewer copies than they should have\n"),
            "{text}"
        );
        assert!(text.contains("\nrepairs:\nVOLUME"), "{text}");
    }
}
