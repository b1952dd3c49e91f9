//! Questions to the metadata servers, asked on the tokio runtime and answered through the mailbox.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use cairn_meta::client::{ClientError, MetaClient};
use cairn_proto::capability::Capability;
use cairn_proto::checksum::ChecksumAlgorithm;
use cairn_proto::codec::Reader;
use cairn_proto::control::{Code, v1};
use cairn_proto::ids::{
    ClientId, ClusterId, DeviceId, DeviceUuid, Epoch, Generation, GroupCount, Incarnation, Layer, VolumeId,
};
use cairn_proto::units::ByteSize;
use tokio::sync::{Semaphore, mpsc};

use super::limits::{ADDRESSES_MAX, ATTACH_TRIES, META_CONCURRENCY_MAX, REPORTED_MEMBERS_MAX};
use super::mailbox::{Command, Mailbox};
use crate::core::api::{
    Advice, AttachmentReport, ChangeOutcome, ConfigChange, ConnId, DeviceEntry, Grant, GroupConfig, GroupPhase,
    GroupStatus, MemberRole, MemberStatus, MetaAnswer, MetaError, MetaQuestion, MetaReply, MetaRequest, Move,
    VolumeDescription,
};
use crate::nbd::limits::LISTED_EXPORTS_MAX;

/// Why a volume can't be opened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum OpenError {
    /// There is no volume of that name.
    NotFound(String),
    /// The metadata servers can't be asked.
    Unreachable(String),
    /// They refused, or what they said makes no sense here.
    Refused(String),
    /// Too many volumes are open in this process.
    TooMany,
    /// The client is shutting down.
    Shutdown,
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OpenError::NotFound(name) => {
                write!(
                    f,
                    "there is no volume `{name}`: `cairn volume list` shows those that exist"
                )
            }
            OpenError::Unreachable(why) => write!(f, "the metadata servers can't be reached: {why}"),
            OpenError::Refused(why) => f.write_str(why),
            OpenError::TooMany => {
                f.write_str("too many volumes are open in this process: close some, or start another")
            }
            OpenError::Shutdown => f.write_str("the client is shutting down"),
        }
    }
}

impl std::error::Error for OpenError {}

impl From<MetaError> for OpenError {
    fn from(error: MetaError) -> OpenError {
        match error {
            MetaError::Unreachable(why) => OpenError::Unreachable(why),
            MetaError::Superseded(_) => OpenError::Refused(error.to_string()),
            MetaError::Refused(why) => OpenError::Refused(why),
        }
    }
}

/// A question.
#[derive(Debug)]
pub(super) enum Job {
    /// What is the volume of this name?
    Describe {
        ticket: usize,
        name: String,
        deadline: Duration,
    },
    /// Which volumes are there?
    Catalogue { ticket: usize },
    /// For the core.
    Core(MetaRequest),
    /// Where is a device whose addresses are names? Not meta's business, but as slow.
    Resolve { conn: ConnId, addresses: Vec<String> },
    /// Tell how volumes are.
    Report(Vec<AttachmentReport>),
}

/// Who asks.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    pub(super) cluster: ClusterId,
    pub(super) client: ClientId,
    /// What the client says of itself, for people.
    pub(super) words: String,
    /// Of caretakers: the node that they run on; else 0.
    pub(super) node_id: u64,
}

/// Answers jobs until the driver's thread has gone.
pub(super) async fn answer_jobs(
    client: MetaClient,
    identity: Identity,
    mut jobs: mpsc::Receiver<Job>,
    mailbox: Arc<Mailbox>,
) {
    let permits = Arc::new(Semaphore::new(META_CONCURRENCY_MAX));
    let identity = Arc::new(identity);
    while let Some(job) = jobs.recv().await {
        let Ok(permit) = permits.clone().acquire_owned().await else {
            return;
        };
        let (client, identity, mailbox) = (client.clone(), identity.clone(), mailbox.clone());
        tokio::spawn(async move {
            mailbox.send(answer(client, &identity, job).await);
            drop(permit);
        });
    }
}

async fn answer(client: MetaClient, identity: &Identity, job: Job) -> Command {
    match job {
        Job::Describe { ticket, name, deadline } => {
            let answer = describe(&client.with_deadline(deadline), &name).await;
            Command::Described { ticket, answer }
        }
        Job::Catalogue { ticket } => Command::Catalogue {
            ticket,
            answer: catalogue(&client).await,
        },
        Job::Core(request) => Command::Meta(MetaAnswer {
            request: request.request,
            result: ask(&client, identity, &request).await,
        }),
        Job::Report(reports) => Command::Advice(report(&client, identity.node_id, &reports).await),
        Job::Resolve { conn, addresses } => Command::Resolved {
            conn,
            addresses: resolve(&addresses).await,
        },
    }
}

/// Tells meta how volumes are. Without an answer there is no advice: it is told again soon.
async fn report(client: &MetaClient, node_id: u64, reports: &[AttachmentReport]) -> Vec<Advice> {
    let reports = reports.iter().map(|report| wire_report(node_id, report)).collect();
    match client
        .report_attachments(v1::ReportAttachmentsRequest { reports })
        .await
    {
        Ok(answer) => {
            // Those that it was started with may all be gone by and by.
            client.set_endpoints(answer.members);
            answer.advice.iter().map(advice).collect()
        }
        Err(error) => {
            tracing::debug!(%error, "can't tell the metadata servers how volumes are");
            Vec::new()
        }
    }
}

fn advice(advice: &v1::AttachmentAdvice) -> Advice {
    Advice {
        id: VolumeId(advice.volume_id),
        give_way: advice.give_way,
        look: !advice.look.is_empty(),
    }
}

fn wire_report(node_id: u64, report: &AttachmentReport) -> v1::AttachmentReport {
    let sum = |count: fn(&GroupStatus) -> u64| report.groups.iter().map(count).sum();
    v1::AttachmentReport {
        volume_id: report.id.0,
        generation: report.generation.get(),
        caretaker: report.is_caretaker,
        groups: report.groups.iter().map(wire_group).collect(),
        damaged_blocks: sum(|group| group.damage_found),
        repaired_blocks: sum(|group| group.damage_repaired),
        node_id: if report.is_caretaker { node_id } else { 0 },
    }
}

fn wire_group(group: &GroupStatus) -> v1::GroupReport {
    let phase = match group.phase {
        GroupPhase::Sealing => v1::GroupPhase::Sealing,
        GroupPhase::Waiting => v1::GroupPhase::Waiting,
        GroupPhase::Reconciling => v1::GroupPhase::Reconciling,
        GroupPhase::Serving => v1::GroupPhase::Serving,
        GroupPhase::Fenced => v1::GroupPhase::Fenced,
    };
    let role = |role: MemberRole| match role {
        MemberRole::InSync => v1::MemberRole::InSync,
        MemberRole::Joining => v1::MemberRole::Joining,
        MemberRole::Stale => v1::MemberRole::Stale,
    };
    // Those that count come first.
    let mut members: Vec<&MemberStatus> = group.members.iter().collect();
    members.sort_by_key(|member| member.role);
    members.truncate(REPORTED_MEMBERS_MAX);
    let member = |member: &MemberStatus| v1::MemberReport {
        device: Some(wire_id(&member.device)),
        role: role(member.role).into(),
        connected: member.connected,
        complete: member.complete,
        lacking_blocks: member.lacking_blocks,
        copied_blocks: member.copied_blocks,
        comparing: member.comparing,
    };
    v1::GroupReport {
        index: group.group.0.into(),
        epoch: group.epoch.0,
        phase: phase.into(),
        members: members.into_iter().map(member).collect(),
    }
}

/// What a volume is, by its id; for a caretaker.
pub(crate) async fn describe_id(client: &MetaClient, id: VolumeId) -> Result<VolumeDescription, MetaError> {
    let by = v1::volume_selector::By::Id(id.0);
    let volume = Some(v1::VolumeSelector { by: Some(by) });
    let response = client
        .get_volume(v1::GetVolumeRequest { volume })
        .await
        .map_err(failed)?;
    description(&response.volume.unwrap_or_default())
}

async fn describe(client: &MetaClient, name: &str) -> Result<VolumeDescription, OpenError> {
    let by = v1::volume_selector::By::Name(name.to_string());
    let volume = Some(v1::VolumeSelector { by: Some(by) });
    let response = client.get_volume(v1::GetVolumeRequest { volume }).await;
    let response = response.map_err(|error| match error.code {
        Code::VolumeNotFound | Code::InvalidName => OpenError::NotFound(name.to_string()),
        _ => OpenError::from(failed(error)),
    })?;
    Ok(description(&response.volume.unwrap_or_default())?)
}

async fn catalogue(client: &MetaClient) -> Result<Vec<String>, MetaError> {
    let mut names: Vec<String> = Vec::new();
    loop {
        let after = names.last().cloned().unwrap_or_default();
        let page = client
            .list_volumes(v1::ListVolumesRequest { after, limit: 0 })
            .await
            .map_err(failed)?;
        let more = page.more && !page.volumes.is_empty() && names.len() <= LISTED_EXPORTS_MAX;
        names.extend(page.volumes.into_iter().map(|volume| volume.name));
        if !more {
            return Ok(names);
        }
    }
}

async fn ask(client: &MetaClient, identity: &Identity, request: &MetaRequest) -> Result<MetaReply, MetaError> {
    let by = Some(v1::volume_selector::By::Id(request.id.0));
    let volume = Some(v1::VolumeSelector { by });
    match &request.question {
        MetaQuestion::Attach | MetaQuestion::Care => {
            attach(client, identity, volume, request.question == MetaQuestion::Care).await
        }
        MetaQuestion::Detach { generation, settled } => {
            let (generation, settled) = (generation.get(), *settled);
            client
                .detach(v1::DetachRequest {
                    volume,
                    generation,
                    settled,
                })
                .await
                .map_err(failed)?;
            Ok(MetaReply::Detached)
        }
        MetaQuestion::Refresh => {
            let response = client
                .get_groups(v1::GetGroupsRequest { volume })
                .await
                .map_err(failed)?;
            let volume = response.volume.unwrap_or_default();
            Ok(MetaReply::Refreshed {
                size: ByteSize(volume.size_bytes),
                generation: Generation::new(volume.generation).ok_or_else(|| nonsense("generation"))?,
                groups: group_configs(response.groups)?,
                devices: devices(&response.devices)?,
            })
        }
        MetaQuestion::Configure { generation, changes } => configure(client, volume, *generation, changes).await,
    }
}

/// Asks for a grant, by force: the last holder may have died, and a migration's target takes over from a living one. That no
/// two write is the generation's business, not that of who asked first.
///
/// It is asked for *after* the generation that was just read. So if this process dies and its question comes late, it takes
/// nothing from whoever has attached since; and of a question that is asked twice only one is granted.
async fn attach(
    client: &MetaClient,
    identity: &Identity,
    volume: Option<v1::VolumeSelector>,
    caretaker: bool,
) -> Result<MetaReply, MetaError> {
    for _ in 0..ATTACH_TRIES {
        let seen = client.get_volume(v1::GetVolumeRequest { volume: volume.clone() }).await;
        let seen = seen.map_err(failed)?.volume.unwrap_or_default();
        let request = v1::AttachRequest {
            volume: volume.clone(),
            client_id: identity.client.0.to_vec(),
            address: identity.words.clone(),
            force: !caretaker,
            caretaker,
            after: Some(seen.generation),
        };
        match client.attach(request).await {
            Ok(response) => return attached(identity, response),
            // Somebody else was faster, or an earlier question of this client was granted after all.
            Err(error) if error.code == Code::StaleGeneration => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Err(MetaError::Unreachable(
        "others attach the volume again and again".to_string(),
    ))
}

async fn configure(
    client: &MetaClient,
    volume: Option<v1::VolumeSelector>,
    generation: Generation,
    changes: &[ConfigChange],
) -> Result<MetaReply, MetaError> {
    let ids = |devices: &[DeviceId]| devices.iter().map(wire_id).collect();
    let change = |change: &ConfigChange| v1::GroupChange {
        index: change.group.0.into(),
        epoch: change.epoch.0,
        in_sync: ids(&change.in_sync),
        joining: ids(&change.joining),
        cause: String::new(),
    };
    let request = v1::ConfigureGroupsRequest {
        volume,
        generation: generation.get(),
        changes: changes.iter().map(change).collect(),
    };
    let response = client
        .configure_groups(request)
        .await
        .map_err(|error| match error.code {
            Code::StaleGeneration => MetaError::Superseded(generation.next().unwrap_or(generation)),
            _ => failed(error),
        })?;
    if response.outcomes.len() != changes.len() {
        return Err(nonsense("list of outcomes"));
    }
    let outcome = |outcome: v1::GroupOutcome| {
        let config = group_config(&outcome.config.ok_or_else(|| nonsense("configuration"))?)?;
        Ok(match outcome.code.is_empty() {
            true => ChangeOutcome::Committed(config),
            false => ChangeOutcome::Refused {
                config,
                words: outcome.message,
            },
        })
    };
    let outcomes = response.outcomes.into_iter().map(outcome).collect::<Result<_, _>>()?;
    Ok(MetaReply::Configured(outcomes))
}

fn wire_id(device: &DeviceId) -> v1::DeviceId {
    v1::DeviceId {
        uuid: device.uuid.0.to_vec(),
        incarnation: device.incarnation.0,
    }
}

fn attached(identity: &Identity, response: v1::AttachResponse) -> Result<MetaReply, MetaError> {
    if response.cluster_id != identity.cluster.0 {
        return Err(MetaError::Refused(
            "the metadata servers belong to another cluster by now: start the client again".to_string(),
        ));
    }
    let generation = Generation::new(response.generation).ok_or_else(|| nonsense("generation"))?;
    let mut reader = Reader::new(&response.capability);
    let capability = Capability::decode(&mut reader)
        .and_then(|capability| reader.finish().map(|()| capability))
        .map_err(|_| nonsense("capability"))?;
    Ok(MetaReply::Attached {
        grant: Grant { generation, capability },
        groups: group_configs(response.groups)?,
        devices: devices(&response.devices)?,
    })
}

/// The configurations in order of the group index, without a hole.
fn group_configs(mut groups: Vec<v1::GroupConfig>) -> Result<Vec<GroupConfig>, MetaError> {
    groups.sort_by_key(|group| group.index);
    if groups
        .iter()
        .enumerate()
        .any(|(index, group)| group.index as usize != index)
    {
        return Err(nonsense("list of groups"));
    }
    groups.iter().map(group_config).collect()
}

fn group_config(group: &v1::GroupConfig) -> Result<GroupConfig, MetaError> {
    let members = |ids: &[v1::DeviceId]| ids.iter().map(device_id).collect::<Result<Vec<_>, _>>();
    Ok(GroupConfig {
        epoch: Epoch(group.epoch),
        in_sync: members(&group.in_sync)?,
        joining: members(&group.joining)?,
        stale: members(&group.stale)?,
        rescue: members(&group.rescue)?,
        moving: match (&group.moving_from, &group.moving_to) {
            (Some(from), Some(to)) => Some(Move {
                from: device_id(from)?,
                to: device_id(to)?,
            }),
            _ => None,
        },
    })
}

fn devices(devices: &[v1::Device]) -> Result<Vec<DeviceEntry>, MetaError> {
    let entry = |device: &v1::Device| {
        Ok(DeviceEntry {
            device: device_id(device.id.as_ref().ok_or_else(|| nonsense("device"))?)?,
            addresses: device.addresses.iter().take(ADDRESSES_MAX).cloned().collect(),
        })
    };
    devices.iter().map(entry).collect()
}

fn device_id(id: &v1::DeviceId) -> Result<DeviceId, MetaError> {
    let uuid = <[u8; 16]>::try_from(&id.uuid[..]).map_err(|_| nonsense("device"))?;
    Ok(DeviceId {
        uuid: DeviceUuid(uuid),
        incarnation: Incarnation(id.incarnation),
    })
}

fn description(volume: &v1::Volume) -> Result<VolumeDescription, MetaError> {
    let byte = |value: u32, what| {
        u8::try_from(value)
            .ok()
            .filter(|value| *value > 0)
            .ok_or_else(|| nonsense(what))
    };
    let write_quorum = byte(volume.write_quorum, "write quorum")?;
    let groups = byte(volume.group_count, "group count").ok().and_then(GroupCount::new);
    Ok(VolumeDescription {
        id: VolumeId(volume.id),
        name: volume.name.clone(),
        size: ByteSize(volume.size_bytes),
        groups: groups.ok_or_else(|| nonsense("group count"))?,
        replicas: byte(volume.replicas, "replicas")?,
        write_quorum,
        min_copies: if volume.min_copies_one { 1 } else { write_quorum },
        layer: Layer(volume.layer),
        checksum: match volume.checksum_algorithm {
            1 => ChecksumAlgorithm::Crc32,
            _ => return Err(nonsense("checksum algorithm")),
        },
    })
}

fn nonsense(what: &str) -> MetaError {
    MetaError::Refused(format!(
        "the metadata servers answered with a {what} that this version does not understand: upgrade the client"
    ))
}

fn failed(error: ClientError) -> MetaError {
    use Code::{Busy, MemberChangePending, NotLeader, NotReady, Timeout, Unreachable};
    match error.code {
        Unreachable | Timeout | NotLeader | Busy | NotReady | MemberChangePending => {
            MetaError::Unreachable(error.message)
        }
        _ => MetaError::Refused(error.message),
    }
}

async fn resolve(addresses: &[String]) -> Vec<SocketAddr> {
    let mut resolved = Vec::new();
    for address in addresses.iter().take(ADDRESSES_MAX) {
        if let Ok(found) = tokio::net::lookup_host(address).await {
            resolved.extend(found.take(ADDRESSES_MAX));
        }
    }
    resolved.truncate(ADDRESSES_MAX);
    resolved
}

#[cfg(test)]
mod tests {
    use super::*;

    use cairn_proto::capability::{ClusterKey, Rights};

    fn volume() -> v1::Volume {
        v1::Volume {
            id: 7,
            name: "disk".to_string(),
            size_bytes: 1 << 30,
            group_count: 2,
            replicas: 3,
            write_quorum: 2,
            checksum_algorithm: 1,
            layer: 4,
            ..v1::Volume::default()
        }
    }

    #[test]
    fn a_description_is_taken_over_and_nonsense_is_refused() {
        let described = description(&volume()).unwrap();
        assert_eq!(
            (described.id, described.size.0, described.groups.get()),
            (VolumeId(7), 1 << 30, 2)
        );
        assert_eq!(
            (described.write_quorum, described.min_copies, described.layer),
            (2, 2, Layer(4))
        );
        let one = v1::Volume {
            min_copies_one: true,
            ..volume()
        };
        assert_eq!(description(&one).unwrap().min_copies, 1);
        let bad: [fn(&mut v1::Volume); 5] = [
            |volume| volume.group_count = 33,
            |volume| volume.group_count = 0,
            |volume| volume.replicas = 300,
            |volume| volume.write_quorum = 0,
            |volume| volume.checksum_algorithm = 2,
        ];
        for change in bad {
            let mut volume = volume();
            change(&mut volume);
            assert!(matches!(description(&volume), Err(MetaError::Refused(_))), "{volume:?}");
        }
    }

    #[test]
    fn a_grant_is_taken_over_in_the_order_of_its_groups() {
        let identity = Identity {
            cluster: ClusterId([9; 16]),
            client: ClientId([1; 16]),
            words: String::new(),
            node_id: 0,
        };
        let generation = Generation::new(5).unwrap();
        let key = ClusterKey([3; 32]);
        let mut capability = Vec::new();
        Capability::grant(&key, identity.cluster, VolumeId(7), generation, Rights::Write).encode(&mut capability);
        let device = v1::DeviceId {
            uuid: vec![8; 16],
            incarnation: 2,
        };
        let group = |index| v1::GroupConfig {
            index,
            epoch: u64::from(index) + 1,
            in_sync: vec![device.clone()],
            ..Default::default()
        };
        let response = v1::AttachResponse {
            volume: Some(volume()),
            generation: 5,
            capability,
            groups: vec![group(1), group(0)],
            devices: vec![v1::Device {
                id: Some(device.clone()),
                addresses: vec!["h:1".to_string()],
                ..Default::default()
            }],
            cluster_id: vec![9; 16],
            feature_level: 1,
        };
        let reply = attached(&identity, response.clone()).unwrap();
        let MetaReply::Attached { grant, groups, devices } = reply else {
            panic!("{reply:?}")
        };
        assert!(grant.generation == generation && grant.capability.is_valid(&key, identity.cluster));
        assert_eq!(
            groups.iter().map(|group| group.epoch).collect::<Vec<_>>(),
            [Epoch(1), Epoch(2)]
        );
        assert_eq!(devices[0].addresses, ["h:1"]);
        assert_eq!(groups[0].in_sync, [devices[0].device]);

        let mut foreign = response.clone();
        foreign.cluster_id = vec![0; 16];
        assert!(
            attached(&identity, foreign)
                .unwrap_err()
                .to_string()
                .contains("another cluster")
        );
        let mut hole = response.clone();
        hole.groups = vec![group(1)];
        assert!(attached(&identity, hole).is_err());
        let mut cut = response;
        cut.capability.pop();
        assert!(attached(&identity, cut).is_err());
    }

    #[test]
    fn what_may_pass_is_unreachable_and_what_stays_is_refused() {
        let error = |code| ClientError {
            code,
            message: "so".to_string(),
            outcome_unknown: false,
        };
        for code in [
            Code::Unreachable,
            Code::Timeout,
            Code::NotLeader,
            Code::Busy,
            Code::NotReady,
        ] {
            assert_eq!(failed(error(code)), MetaError::Unreachable("so".to_string()));
        }
        for code in [Code::VolumeNotFound, Code::GenerationsExhausted, Code::FeatureLevel] {
            assert_eq!(failed(error(code)), MetaError::Refused("so".to_string()));
        }
    }
}
