//! What `cairn node inspect` has found, for people.

use cairn_proto::units::ByteSize;

use super::record::{CheckpointRecord, Record, SuperblockRecord};
use crate::commands::percent;
use crate::output::{Table, count};

/// Damage that is printed line by line at the most: `--json` has more of it.
const DAMAGE_LINES_MAX: usize = 100;
/// Seals that are printed line by line at the most: `--json` has all of them.
const SEAL_LINES_MAX: usize = 20;

pub(super) fn describe(record: &Record) -> String {
    let mut text = head(record);
    if record.log.is_some() {
        text.push_str(&contents(record));
    }
    if record.damage_total > 0 {
        text.push_str(&format!("\n{}:\n", count(record.damage_total, "damaged part")));
        for damage in record.damage.iter().take(DAMAGE_LINES_MAX) {
            text.push_str(&format!("  {}: {}\n", damage.kind, damage.message));
        }
        if record.damage_total > DAMAGE_LINES_MAX as u64 {
            text.push_str(&format!(
                "  and {} more\n",
                record.damage_total - DAMAGE_LINES_MAX as u64
            ));
        }
    }
    text
}

fn head(record: &Record) -> String {
    let mut table = Table::pairs();
    let kind = if record.kind == "file" { "file" } else { "block device" };
    table.row([
        "device".to_string(),
        format!("{} ({kind}, {})", record.path, ByteSize(record.bytes)),
    ]);
    let cache = if record.volatile_cache {
        "volatile: every commit is flushed"
    } else {
        "none: writes are durable when they complete"
    };
    table.row(["write cache", cache]);
    if let (Some(uuid), Some(incarnation)) = (&record.uuid, &record.incarnation) {
        table.row(["uuid".to_string(), uuid.clone()]);
        table.row(["incarnation".to_string(), incarnation.clone()]);
    }
    if let Some(cluster) = &record.cluster_id {
        table.row(["cluster".to_string(), cluster.clone()]);
    }
    if let (Some(format), Some(features)) = (record.format, &record.features) {
        let words = format!(
            "{format}, features {} compatible, {} read-only, {} incompatible",
            features.compatible, features.read_only_compatible, features.incompatible
        );
        table.row(["format".to_string(), words]);
    }
    for (number, copy) in record.superblocks.iter().enumerate() {
        table.row([format!("superblock {number}"), superblock(copy)]);
    }
    for (number, slot) in record.checkpoints.iter().enumerate() {
        table.row([format!("checkpoint {number}"), checkpoint(slot)]);
    }
    if let Some(log) = &record.log {
        let words = match log.batches {
            0 => format!("empty, after commit {}", log.checkpoint_commit),
            _ => format!(
                "commits {} to {}, {}",
                log.checkpoint_commit.saturating_add(1),
                log.last_commit,
                count(log.record_pages, "record page")
            ),
        };
        let last = match log.last_batch {
            "dropped" => "; one more was there and never acknowledged: it does not count",
            _ => "",
        };
        table.row(["log".to_string(), format!("{words}{last}")]);
    }
    if let Some(space) = &record.space {
        let (free, capacity) = (space.free_bytes, space.capacity_bytes);
        let words = format!(
            "{} free of {} ({}), {} data, {} metadata, {} reserved",
            ByteSize(free),
            ByteSize(capacity),
            percent(free, capacity),
            ByteSize(space.data_bytes),
            ByteSize(space.metadata_bytes),
            ByteSize(space.reserved_bytes)
        );
        table.row(["space".to_string(), words]);
    }
    if let Some(scrub) = &record.scrub {
        let words = |pass: u64, doing: &str, bytes: u64, damaged: u64| {
            format!("pass {pass} {doing}, {} checked, {damaged} damaged", ByteSize(bytes))
        };
        let running = words(scrub.pass, "under way", scrub.checked_bytes, scrub.damaged_blocks);
        let finished = |pass| {
            words(
                pass,
                "finished",
                scrub.finished_checked_bytes,
                scrub.finished_damaged_blocks,
            )
        };
        let finished = scrub.finished_pass.map(finished);
        let parts = [scrub.running.then_some(running), finished].into_iter().flatten();
        table.row(["scrub".to_string(), parts.collect::<Vec<_>>().join("; ")]);
    }
    if let Some(verified) = &record.verified {
        let words = format!(
            "{} of data and {} of index read, {}",
            ByteSize(verified.data_bytes),
            ByteSize(verified.index_bytes),
            match record.damage_total {
                0 => "all of it sound".to_string(),
                damage => count(damage, "damaged part"),
            }
        );
        table.row(["verified".to_string(), words]);
    }
    table.render()
}

fn superblock(copy: &SuperblockRecord) -> String {
    match &copy.message {
        None => format!("valid (block {})", copy.block),
        Some(words) => format!("DAMAGED (block {}): {words}", copy.block),
    }
}

fn checkpoint(slot: &CheckpointRecord) -> String {
    match (&slot.message, slot.sequence, slot.commit) {
        (Some(words), ..) => format!("DAMAGED (block {}): {words}", slot.block),
        (None, Some(sequence), Some(commit)) => {
            let used = if slot.used { ", used" } else { "" };
            format!("number {sequence}, up to commit {commit} (block {}){used}", slot.block)
        }
        (None, ..) => format!("empty (block {})", slot.block),
    }
}

fn contents(record: &Record) -> String {
    let mut text = String::new();
    if !record.seals.is_empty() {
        let mut table = Table::new(&["SEALED VOLUME", "GENERATION"]).right(&[0, 1]);
        for seal in record.seals.iter().take(SEAL_LINES_MAX) {
            table.row([seal.volume_id.to_string(), seal.generation.to_string()]);
        }
        text.push_str(&format!("\n{}", table.render()));
        if record.seals.len() > SEAL_LINES_MAX {
            text.push_str(&format!("and {} more\n", record.seals.len() - SEAL_LINES_MAX));
        }
    }
    if record.replicas.is_empty() {
        return text;
    }
    let headings = [
        "VOLUME",
        "GROUP",
        "ROLE",
        "LAYER",
        "DATA",
        "INDEX",
        "CHUNKS",
        "EXTENTS/CHUNK",
    ];
    let mut table = Table::new(&headings).right(&[0, 1, 3, 4, 5, 6, 7]);
    for replica in &record.replicas {
        let name = [
            replica.volume_id.to_string(),
            replica.group.to_string(),
            replica.role.replace('_', " "),
        ];
        if replica.layers.is_empty() {
            table.row(name.clone());
        }
        for layer in &replica.layers {
            let fragments = layer.extents as f64 / layer.data_chunks.max(1) as f64;
            let numbers = [
                layer.layer.to_string(),
                ByteSize(layer.data_bytes).to_string(),
                ByteSize(layer.index_bytes).to_string(),
                layer.chunks.to_string(),
                if layer.data_chunks > 0 {
                    format!("{fragments:.1}")
                } else {
                    String::new()
                },
            ];
            table.row(name.iter().cloned().chain(numbers));
        }
    }
    text.push_str(&format!("\n{}", table.render()));
    if record.volumes.len() > 1 {
        let mut table = Table::new(&["VOLUME", "DATA"]).right(&[0, 1]);
        for volume in &record.volumes {
            table.row([volume.volume_id.to_string(), ByteSize(volume.data_bytes).to_string()]);
        }
        text.push_str(&format!("\n{}", table.render()));
    }
    text
}
