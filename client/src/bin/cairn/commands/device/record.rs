//! What `cairn node inspect` has found, for programs. The keys are in CLI.md.

use std::collections::BTreeMap;

use cairn_proto::message::ReplicaRole;
use cairn_storage_node::driver::DeviceReader;
use cairn_storage_node::store::inspect::{
    CheckpointContent, CheckpointSlot, Contents, Damage, Inspection, LogSummary, ReplicaSummary, SuperblockCopy,
};
use cairn_storage_node::store::{OpenError, Probe, ScrubState, superblock};
use serde::Serialize;

use super::inspect::bytes;
use crate::args::InspectDevice;

#[derive(Serialize, Clone, Debug)]
pub(super) struct Record {
    pub(super) path: String,
    pub(super) kind: &'static str,
    pub(super) bytes: u64,
    pub(super) volatile_cache: bool,
    pub(super) state: &'static str,
    pub(super) message: Option<String>,
    pub(super) cluster_id: Option<String>,
    pub(super) uuid: Option<String>,
    /// As text: programs that know only floating-point numbers would round it.
    pub(super) incarnation: Option<String>,
    pub(super) format: Option<u16>,
    pub(super) features: Option<FeaturesRecord>,
    pub(super) superblocks: Vec<SuperblockRecord>,
    pub(super) checkpoints: Vec<CheckpointRecord>,
    pub(super) log: Option<LogRecord>,
    pub(super) space: Option<SpaceRecord>,
    pub(super) scrub: Option<ScrubRecord>,
    pub(super) seals: Vec<SealRecord>,
    pub(super) volumes: Vec<VolumeRecord>,
    pub(super) replicas: Vec<ReplicaRecord>,
    pub(super) verified: Option<VerifiedRecord>,
    pub(super) damage_total: u64,
    pub(super) damage: Vec<DamageRecord>,
}

#[derive(Serialize, Clone, Debug)]
pub(super) struct FeaturesRecord {
    pub(super) compatible: String,
    pub(super) read_only_compatible: String,
    pub(super) incompatible: String,
}

#[derive(Serialize, Clone, Debug)]
pub(super) struct SuperblockRecord {
    pub(super) block: u64,
    pub(super) valid: bool,
    pub(super) message: Option<String>,
    pub(super) sequence: Option<u64>,
}

#[derive(Serialize, Clone, Debug)]
pub(super) struct CheckpointRecord {
    pub(super) block: u64,
    pub(super) state: &'static str,
    pub(super) message: Option<String>,
    pub(super) used: bool,
    pub(super) sequence: Option<u64>,
    pub(super) commit: Option<u64>,
    pub(super) directory_bytes: Option<u64>,
    pub(super) seals: Option<u64>,
    pub(super) replicas: Option<u64>,
    pub(super) leaves: Option<u64>,
    pub(super) data_bytes: Option<u64>,
}

#[derive(Serialize, Clone, Debug)]
pub(super) struct LogRecord {
    pub(super) checkpoint_commit: u64,
    pub(super) last_commit: u64,
    pub(super) batches: u64,
    pub(super) record_pages: u64,
    pub(super) last_batch: &'static str,
}

#[derive(Serialize, Clone, Debug)]
pub(super) struct SpaceRecord {
    pub(super) capacity_bytes: u64,
    pub(super) free_bytes: u64,
    pub(super) reserved_bytes: u64,
    pub(super) data_bytes: u64,
    pub(super) metadata_bytes: u64,
}

/// Times are `null` where they were not known.
#[derive(Serialize, Clone, Debug)]
pub(super) struct ScrubRecord {
    pub(super) pass: u64,
    pub(super) running: bool,
    pub(super) begun_unix_ms: Option<u64>,
    pub(super) checked_bytes: u64,
    pub(super) damaged_blocks: u64,
    pub(super) finished_pass: Option<u64>,
    pub(super) finished_unix_ms: Option<u64>,
    pub(super) finished_checked_bytes: u64,
    pub(super) finished_damaged_blocks: u64,
}

#[derive(Serialize, Clone, Debug)]
pub(super) struct SealRecord {
    pub(super) volume_id: u64,
    pub(super) generation: u32,
}

#[derive(Serialize, Clone, Debug)]
pub(super) struct VolumeRecord {
    pub(super) volume_id: u64,
    pub(super) data_bytes: u64,
}

#[derive(Serialize, Clone, Debug)]
pub(super) struct ReplicaRecord {
    pub(super) volume_id: u64,
    pub(super) group: u8,
    pub(super) role: String,
    /// The configuration of the group that last named it.
    pub(super) epoch: u64,
    pub(super) data_bytes: u64,
    /// Runs of data per chunk that has data; 1 at best. `null` without data.
    pub(super) extents_per_chunk: Option<f64>,
    pub(super) layers: Vec<LayerRecord>,
}

#[derive(Serialize, Clone, Debug)]
pub(super) struct LayerRecord {
    pub(super) layer: u32,
    pub(super) chunks: u64,
    pub(super) data_chunks: u64,
    pub(super) data_bytes: u64,
    pub(super) index_bytes: u64,
    pub(super) extents: u64,
}

#[derive(Serialize, Clone, Debug)]
pub(super) struct VerifiedRecord {
    pub(super) data_bytes: u64,
    pub(super) index_bytes: u64,
}

#[derive(Serialize, Clone, Debug)]
pub(super) struct DamageRecord {
    pub(super) kind: &'static str,
    pub(super) volume_id: Option<u64>,
    pub(super) group: Option<u8>,
    pub(super) layer: Option<u32>,
    pub(super) chunk: Option<u32>,
    /// Counted from the start of the chunk.
    pub(super) block: Option<u32>,
    pub(super) blocks: Option<u32>,
    /// Bytes from the start of the volume.
    pub(super) volume_offset: Option<u64>,
    pub(super) version: Option<String>,
    pub(super) device_block: Option<u64>,
    pub(super) message: String,
}

impl Record {
    pub(super) fn new(args: &InspectDevice, device: &DeviceReader, found: &Inspection) -> Record {
        let superblock = match &found.probe {
            Probe::Cairn(superblock) => Some(superblock),
            _ => None,
        };
        let bits = |bits: u64| format!("{bits:#x}");
        let contents = found.contents.as_ref().ok();
        let replicas: Vec<ReplicaRecord> = contents.iter().flat_map(|found| &found.replicas).map(replica).collect();
        Record {
            path: args.path.display().to_string(),
            kind: if device.is_block_device() {
                "block_device"
            } else {
                "file"
            },
            bytes: device.bytes(),
            volatile_cache: found.geometry.volatile_cache,
            state: state(found),
            message: found.contents.as_ref().err().map(ToString::to_string),
            cluster_id: found.identity.map(|identity| identity.cluster.to_string()),
            uuid: found.identity.map(|identity| identity.device.uuid.to_string()),
            incarnation: found.identity.map(|identity| identity.device.incarnation.to_string()),
            format: found.identity.map(|_| superblock::FORMAT),
            features: superblock.map(|superblock| FeaturesRecord {
                compatible: bits(superblock.compat),
                read_only_compatible: bits(superblock.ro_compat),
                incompatible: bits(superblock.incompat),
            }),
            superblocks: found.superblocks.iter().map(superblock_copy).collect(),
            checkpoints: found.checkpoints.iter().map(checkpoint).collect(),
            log: contents.map(|found| log(&found.log)),
            space: contents.map(space),
            scrub: contents.and_then(|found| found.scrub).map(|state| scrub(&state)),
            seals: contents.into_iter().flat_map(|found| &found.seals).map(seal).collect(),
            volumes: volumes(&replicas),
            replicas,
            verified: contents
                .and_then(|found| found.verified)
                .map(|verified| VerifiedRecord {
                    data_bytes: bytes(verified.blocks),
                    index_bytes: bytes(verified.index_pages),
                }),
            damage_total: found.damage.total,
            damage: found.damage.listed.iter().map(damage).collect(),
        }
    }
}

fn state(found: &Inspection) -> &'static str {
    match (&found.contents, &found.probe) {
        (Ok(_), _) => "cairn",
        (Err(OpenError::Length { .. }), _) => "too_small",
        (Err(_), Probe::Blank) => "blank",
        (Err(_), Probe::Unfinished) => "unfinished",
        (Err(_), Probe::Foreign { .. }) => "foreign",
        (Err(OpenError::Truncated { .. }), _) => "truncated",
        (Err(OpenError::Device { .. }), _) => "unreadable",
        (Err(_), _) => "damaged",
    }
}

fn superblock_copy(copy: &SuperblockCopy) -> SuperblockRecord {
    SuperblockRecord {
        block: copy.place.0,
        valid: copy.content.is_ok(),
        message: copy.content.as_ref().err().cloned(),
        sequence: copy.content.as_ref().ok().map(|superblock| superblock.sequence),
    }
}

fn checkpoint(slot: &CheckpointSlot) -> CheckpointRecord {
    let (state, message, valid) = match &slot.content {
        CheckpointContent::Empty => ("empty", None, None),
        CheckpointContent::Damaged(words) => ("damaged", Some(words.clone()), None),
        CheckpointContent::Valid(found) => ("valid", None, Some(found)),
    };
    CheckpointRecord {
        block: slot.place.0,
        state,
        message,
        used: valid.is_some_and(|found| found.used),
        sequence: valid.map(|found| found.sequence),
        commit: valid.map(|found| found.commit),
        directory_bytes: valid.map(|found| bytes(found.directory_blocks)),
        seals: valid.map(|found| found.seals),
        replicas: valid.map(|found| found.replicas),
        leaves: valid.map(|found| found.leaves),
        data_bytes: valid.map(|found| bytes(found.data_blocks)),
    }
}

fn log(log: &LogSummary) -> LogRecord {
    LogRecord {
        checkpoint_commit: log.checkpoint_commit,
        last_commit: log.last_commit,
        batches: log.batches,
        record_pages: log.record_pages,
        last_batch: match (log.discarded, log.batches) {
            (true, _) => "dropped",
            (false, 0) => "none",
            (false, _) => "believed",
        },
    }
}

fn space(found: &Contents) -> SpaceRecord {
    let space = &found.space;
    SpaceRecord {
        capacity_bytes: bytes(space.capacity),
        free_bytes: bytes(space.free),
        reserved_bytes: bytes(space.reserved),
        data_bytes: bytes(space.data),
        metadata_bytes: bytes(space.capacity.saturating_sub(space.free + space.data)),
    }
}

fn scrub(state: &ScrubState) -> ScrubRecord {
    let known = |number: u64| Some(number).filter(|number| *number > 0);
    let time = |seconds: u64| known(seconds).map(|seconds| seconds.saturating_mul(1000));
    ScrubRecord {
        pass: state.pass,
        running: state.cursor.is_some(),
        begun_unix_ms: time(state.begun_s),
        checked_bytes: bytes(state.checked),
        damaged_blocks: state.damaged,
        finished_pass: known(state.finished_pass),
        finished_unix_ms: time(state.finished_s),
        finished_checked_bytes: bytes(state.finished_checked),
        finished_damaged_blocks: state.finished_damaged,
    }
}

fn seal((volume, generation): &(cairn_proto::ids::VolumeId, cairn_proto::ids::Generation)) -> SealRecord {
    SealRecord {
        volume_id: volume.0,
        generation: generation.get(),
    }
}

fn replica(found: &ReplicaSummary) -> ReplicaRecord {
    let layers = found.layers.iter().map(|layer| LayerRecord {
        layer: layer.layer.0,
        chunks: layer.chunks,
        data_chunks: layer.data_chunks,
        data_bytes: bytes(layer.data_blocks),
        index_bytes: bytes(layer.index_pages),
        extents: layer.extents,
    });
    let sum = |of: fn(&LayerRecord) -> u64, layers: &[LayerRecord]| layers.iter().map(of).sum::<u64>();
    let layers: Vec<LayerRecord> = layers.collect();
    let (extents, chunks) = (
        sum(|layer| layer.extents, &layers),
        sum(|layer| layer.data_chunks, &layers),
    );
    ReplicaRecord {
        volume_id: found.group.volume.0,
        group: found.group.index.0,
        role: match ReplicaRole::from_u8(found.role) {
            Some(ReplicaRole::InSync) => "in_sync".to_string(),
            Some(ReplicaRole::Joining) => "joining".to_string(),
            None => found.role.to_string(),
        },
        epoch: found.epoch.0,
        data_bytes: bytes(found.blocks_counted),
        extents_per_chunk: (chunks > 0).then(|| (extents as f64 / chunks as f64 * 100.0).round() / 100.0),
        layers,
    }
}

fn volumes(replicas: &[ReplicaRecord]) -> Vec<VolumeRecord> {
    let mut volumes: BTreeMap<u64, u64> = BTreeMap::new();
    for replica in replicas {
        let sum = volumes.entry(replica.volume_id).or_default();
        *sum = sum.saturating_add(replica.data_bytes);
    }
    let record = |(volume_id, data_bytes)| VolumeRecord { volume_id, data_bytes };
    volumes.into_iter().map(record).collect()
}

fn damage(damage: &Damage) -> DamageRecord {
    let blocks = damage.blocks;
    DamageRecord {
        kind: damage.kind.name(),
        volume_id: blocks.map(|blocks| blocks.group.volume.0),
        group: blocks.map(|blocks| blocks.group.index.0),
        layer: blocks.map(|blocks| blocks.layer.0),
        chunk: blocks.map(|blocks| blocks.chunk.0),
        block: blocks.map(|blocks| blocks.block),
        blocks: blocks.map(|blocks| blocks.count),
        volume_offset: blocks.map(|blocks| bytes(blocks.volume_block())),
        version: blocks
            .and_then(|blocks| blocks.version)
            .map(|version| version.to_string()),
        device_block: damage.place.map(|place| place.0),
        message: damage.to_string(),
    }
}
