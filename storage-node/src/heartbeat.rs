//! What a node tells meta: who it is, how its devices are, and what they hold.

use std::collections::BTreeSet;
use std::time::Duration;

use cairn_meta::client::{ClientError, MetaClient};
use cairn_proto::control::Code;
use cairn_proto::control::v1;
use cairn_proto::ids::{DeviceId, Epoch, Generation, GroupId, GroupIndex, VolumeId};
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::message::Holder;
use tokio::sync::watch;

use crate::config::NodeConfig;
use crate::driver::WriteCache;
use crate::host::limits::{DAMAGED_VOLUMES_MAX, HELD_MAX};
use crate::host::{HeldReplica, HostStatus, ScrubStatus};
use crate::process::Care;
use crate::process::device::{Device, Phase, random};

/// The highest feature level that this version understands.
pub(crate) const FEATURE_LEVEL: u32 = 1;
/// How often a node speaks until meta says how often.
const INTERVAL: Duration = Duration::from_secs(1);
/// The shortest and the longest interval that meta can ask for.
const INTERVAL_BOUNDS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(60));
/// Groups on one page of an inventory.
const INVENTORY_PAGE: usize = 4096;
/// Volumes that meta can have a node take care of.
const CARE_TASKS_MAX: usize = 4;
/// Bytes of words about what is wrong.
const TROUBLE_BYTES_MAX: usize = 256;
/// How long to wait before registering again after meta has said that another process has this node's name.
const SUPERSEDED_PAUSE: Duration = Duration::from_secs(10);

/// Speaks to meta. It never fails: what serves data does not depend on it.
pub(crate) struct Reporter {
    meta: MetaClient,
    name: String,
    domain: v1::FailureDomain,
    run: [u8; 16],
    /// As registered, and with which devices.
    registered: Option<(u64, Vec<DeviceId>)>,
    interval: Duration,
    /// Where what meta wants to be taken care of is told.
    care: watch::Sender<Care>,
    /// Whether the last call failed: said once.
    silent: bool,
}

impl Reporter {
    pub(crate) fn new(config: &NodeConfig, meta: MetaClient, care: watch::Sender<Care>) -> Reporter {
        Reporter {
            meta,
            care,
            name: config.name.clone(),
            domain: v1::FailureDomain {
                room: config.domain.room.clone(),
                rack: config.domain.rack.clone(),
                host: config.domain.host.clone(),
            },
            // Without randomness it would not have come this far.
            run: random().unwrap_or([1; 16]),
            registered: None,
            interval: INTERVAL,
            silent: false,
        }
    }

    /// How long to wait before the next report.
    pub(crate) fn interval(&self) -> Duration {
        self.interval
    }

    /// Registers what is not registered, else sends a heartbeat and what meta asks for.
    pub(crate) async fn report(&mut self, devices: &mut [Device]) {
        let served: Vec<DeviceId> = devices
            .iter()
            .filter(|device| device.is_running())
            .filter_map(id_of)
            .collect();
        if served.is_empty() && self.registered.is_none() {
            return;
        }
        for device in devices.iter_mut() {
            device.last_status = status_of(device).await.or(device.last_status.take());
        }
        let known = self.registered.as_ref().is_some_and(|(_, known)| *known == served);
        let outcome = if known {
            self.heartbeat(devices).await
        } else {
            self.register(devices).await
        };
        match outcome {
            Ok(()) if self.silent => {
                self.silent = false;
                tracing::info!(node = self.name, "the metadata servers answer again");
            }
            Ok(()) => {}
            Err(error) => self.failed(&error),
        }
    }

    fn failed(&mut self, error: &ClientError) {
        match error.code {
            Code::NodeNotFound => self.registered = None,
            Code::NodeSuperseded => {
                self.registered = None;
                self.interval = SUPERSEDED_PAUSE;
                tracing::error!(
                    node = self.name,
                    "another process has registered as this node: give each node a name of its own ({error})"
                );
                return;
            }
            _ => {}
        }
        if !self.silent {
            self.silent = true;
            tracing::warn!(node = self.name, %error, "can't tell the metadata servers how the node is; data is served");
        }
    }

    async fn register(&mut self, devices: &mut [Device]) -> Result<(), ClientError> {
        let mut registrations = Vec::new();
        let mut asked = Vec::new();
        for device in devices.iter().filter(|device| device.is_running()) {
            let (Some(opened), Some(status)) = (device.opened, &device.last_status) else {
                continue;
            };
            asked.push(opened.identity.device);
            registrations.push(v1::RegisterDevice {
                id: Some(wire_id(opened.identity.device)),
                addresses: vec![device.advertised.clone()],
                capacity_bytes: bytes(status.capacity_blocks),
                used_bytes: bytes(status.used_blocks),
                commit_seq: status.commit.0,
                cluster_id: opened.identity.cluster.0.to_vec(),
            });
        }
        let answer = self
            .meta
            .register_node(v1::RegisterNodeRequest {
                name: self.name.clone(),
                run_id: self.run.to_vec(),
                domain: Some(self.domain.clone()),
                devices: registrations,
                version: env!("CARGO_PKG_VERSION").to_string(),
                feature_level: FEATURE_LEVEL,
            })
            .await?;
        tracing::info!(
            node = self.name,
            id = answer.node_id,
            devices = asked.len(),
            "registered"
        );
        for outcome in answer.devices {
            let Some(device) = devices.iter_mut().find(|device| {
                outcome
                    .id
                    .as_ref()
                    .is_some_and(|id| id_of(device).map(wire_id).as_ref() == Some(id))
            }) else {
                continue;
            };
            if !outcome.code.is_empty() {
                device.refuse(outcome.message);
            } else if outcome.forgot {
                tracing::error!(
                    path = %device.path.display(),
                    "the device has forgotten writes that it had acknowledged: its disk, or its cache, is not reliable"
                );
            }
        }
        asked.retain(|id| devices.iter().filter_map(id_of).any(|served| served == *id));
        self.registered = Some((answer.node_id, asked));
        self.set_interval(answer.heartbeat_interval_ms);
        Ok(())
    }

    async fn heartbeat(&mut self, devices: &mut [Device]) -> Result<(), ClientError> {
        let Some((node_id, _)) = self.registered else {
            return Ok(());
        };
        let reports = devices.iter().filter_map(report_of).collect();
        let answer = self
            .meta
            .heartbeat(v1::HeartbeatRequest {
                node_id,
                run_id: self.run.to_vec(),
                devices: reports,
                held: held(devices),
                damaged: damaged(devices),
            })
            .await?;
        self.meta.set_endpoints(answer.members);
        self.set_interval(answer.heartbeat_interval_ms);
        self.tell_care(node_id, &answer.care);
        for wanted in &answer.scrub {
            let is_wanted = |device: &&Device| id_of(device).map(wire_id).as_ref() == Some(wanted);
            if let Some(Phase::Running(thread)) = devices.iter().find(is_wanted).map(|device| &device.phase) {
                // A thread that is stuck is told again with the next heartbeat.
                thread.scrub();
            }
        }
        for wanted in answer.send_inventory {
            let is_wanted = |device: &&Device| id_of(device).map(wire_id).as_ref() == Some(&wanted);
            if let Some(device) = devices.iter().find(is_wanted) {
                self.inventory(node_id, device, wanted).await?;
            }
        }
        Ok(())
    }

    fn tell_care(&self, node_id: u64, tasks: &[v1::CareTask]) {
        // A generation that can't be is none that was granted.
        let task = |task: &v1::CareTask| Some((VolumeId(task.volume_id), Generation::new(task.generation_seen)?));
        let volumes = tasks.iter().take(CARE_TASKS_MAX).filter_map(task).collect();
        let care = Care { node_id, volumes };
        self.care.send_if_modified(|known| {
            let is_news = *known != care;
            *known = care;
            is_news
        });
    }

    /// Tells what a device holds, and drops what meta says that nobody needs.
    async fn inventory(&self, node_id: u64, device: &Device, id: v1::DeviceId) -> Result<(), ClientError> {
        let (Phase::Running(thread), Some(status)) = (&device.phase, &device.last_status) else {
            return Ok(());
        };
        let Some(replicas) = thread.inventory().await else {
            return Ok(());
        };
        // Of a set that has changed since the digest was told: the next heartbeat's differs, and meta asks again.
        let digest = status.inventory_digest;
        let pages = replicas.len().div_ceil(INVENTORY_PAGE).max(1);
        for page in 0..pages {
            let end = replicas.len().min((page + 1) * INVENTORY_PAGE);
            let held = replicas[page * INVENTORY_PAGE..end].iter().map(|held| v1::HeldGroup {
                volume_id: held.group.volume.0,
                index: u32::from(held.group.index.0),
                epoch: held.epoch.0,
            });
            let answer = self
                .meta
                .report_inventory(v1::InventoryRequest {
                    node_id,
                    run_id: self.run.to_vec(),
                    device: Some(id.clone()),
                    groups: held.collect(),
                    page: u32::try_from(page).unwrap_or(u32::MAX),
                    last: page + 1 == pages,
                    inventory_digest: digest,
                })
                .await?;
            let drop: Vec<HeldReplica> = answer.drop.iter().filter_map(held_of).collect();
            if !drop.is_empty() {
                tracing::info!(path = %device.path.display(), replicas = drop.len(), "dropping what nobody needs");
                thread.drop_replicas(drop);
            }
        }
        Ok(())
    }

    fn set_interval(&mut self, ms: u32) {
        let (shortest, longest) = INTERVAL_BOUNDS;
        self.interval = Duration::from_millis(u64::from(ms)).clamp(shortest, longest);
    }
}

/// The id of a device that is, or was, served.
fn id_of(device: &Device) -> Option<DeviceId> {
    device.opened.map(|opened| opened.identity.device)
}

async fn status_of(device: &Device) -> Option<HostStatus> {
    match &device.phase {
        Phase::Running(thread) => tokio::time::timeout(INTERVAL, thread.status()).await.ok().flatten(),
        _ => None,
    }
}

/// How a device is that is, or was, served.
fn report_of(device: &Device) -> Option<v1::DeviceHeartbeat> {
    let status = device.last_status.as_ref()?;
    let ended = device.trouble.clone();
    let mut report = v1::DeviceHeartbeat {
        id: Some(wire_id(id_of(device)?)),
        capacity_bytes: bytes(status.capacity_blocks),
        used_bytes: bytes(status.used_blocks),
        commit_seq: status.commit.0,
        inventory_digest: status.inventory_digest,
        failed: status.failed.is_some() || ended.is_some(),
        trouble: ended.or_else(|| status.failed.clone()).unwrap_or_default(),
        write_cache: write_cache(device.write_cache).into(),
        scrub: Some(wire_scrub(&status.scrub)),
    };
    let mut end = report.trouble.len().min(TROUBLE_BYTES_MAX);
    while !report.trouble.is_char_boundary(end) {
        end -= 1;
    }
    report.trouble.truncate(end);
    Some(report)
}

/// Attachments that are alive on any of the devices.
fn held(devices: &[Device]) -> Vec<v1::HeldVolume> {
    let statuses = devices.iter().filter_map(|device| device.last_status.as_ref());
    let held: BTreeSet<Holder> = statuses.flat_map(|status| status.held.iter().copied()).collect();
    let wire = |holder: Holder| v1::HeldVolume {
        volume_id: holder.volume.0,
        generation: holder.generation.get(),
    };
    held.into_iter().take(HELD_MAX).map(wire).collect()
}

/// Volumes of which any of the devices has damaged blocks.
fn damaged(devices: &[Device]) -> Vec<u64> {
    let statuses = devices.iter().filter_map(|device| device.last_status.as_ref());
    let damaged: BTreeSet<u64> = statuses
        .flat_map(|status| status.damaged_volumes.iter().map(|volume| volume.0))
        .collect();
    damaged.into_iter().take(DAMAGED_VOLUMES_MAX).collect()
}

fn write_cache(cache: WriteCache) -> v1::WriteCache {
    match (cache.volatile, cache.by_operator) {
        (true, false) => v1::WriteCache::Volatile,
        (false, false) => v1::WriteCache::None,
        (true, true) => v1::WriteCache::VolatileByOperator,
        (false, true) => v1::WriteCache::NoneByOperator,
    }
}

fn wire_scrub(scrub: &ScrubStatus) -> v1::DeviceScrub {
    let state = &scrub.state;
    v1::DeviceScrub {
        pass: state.pass,
        under_way: state.cursor.is_some(),
        begun_s: state.begun_s,
        checked_blocks: state.checked,
        data_blocks: scrub.blocks,
        finished_pass: state.finished_pass,
        finished_s: state.finished_s,
        damaged_blocks: scrub.damaged_blocks,
        damaged_metadata: scrub.damaged_metadata,
        moved_blocks: scrub.moved_blocks,
    }
}

fn bytes(blocks: u64) -> u64 {
    blocks * BLOCK_BYTES as u64
}

fn wire_id(id: DeviceId) -> v1::DeviceId {
    v1::DeviceId {
        uuid: id.uuid.0.to_vec(),
        incarnation: id.incarnation.0,
    }
}

fn held_of(held: &v1::HeldGroup) -> Option<HeldReplica> {
    let group = GroupId {
        volume: VolumeId(held.volume_id),
        index: GroupIndex(u8::try_from(held.index).ok()?),
    };
    let epoch = Epoch(held.epoch);
    Some(HeldReplica { group, epoch })
}
