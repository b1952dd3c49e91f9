//! What a device's thread measures.

use std::time::Duration;

use cairn_meta::metrics::Seconds;
use cairn_proto::frame::Class;
use cairn_proto::ids::DeviceUuid;
use cairn_proto::message::{Envelope, Message};
use metrics::{Counter, Gauge, Label, counter, gauge};

use super::budget::Budget;
use crate::host::HostStatus;

/// The metrics of one device, looked up once.
pub(super) struct Meters {
    device: String,
    stages: Stages,
    bytes_read: [Counter; 3],
    bytes_written: [Counter; 3],
    fetched: Counter,
    calls: [Counter; 2],
    accepted: Counter,
    connections: Gauge,
    strangers: Gauge,
    requests: Gauge,
    queued: Gauge,
    fetching: Gauge,
    fetch_peers: Gauge,
    receive_bytes: Gauge,
    used: Gauge,
    capacity: Gauge,
    failed: Gauge,
    scrub: ScrubMeters,
}

/// Where the time of requests goes.
struct Stages {
    write_queue: Seconds,
    write: Seconds,
    flush: Seconds,
    read_queue: Seconds,
    read: Seconds,
}

/// Of the device's background work.
struct ScrubMeters {
    pass: Gauge,
    progress: Gauge,
    checked: Gauge,
    finished: Gauge,
    damaged: Gauge,
    damaged_metadata: Gauge,
    mended: Counter,
    moved: Counter,
}

impl Meters {
    pub(super) fn new(device: DeviceUuid) -> Meters {
        let device = device.to_string();
        let stage = |operation: &'static str, stage: &'static str| {
            let labels = [
                ("device", device.clone()),
                ("operation", operation.into()),
                ("stage", stage.into()),
            ];
            Seconds::new(
                "cairn_node_request_seconds",
                labels.map(|(key, value)| Label::new(key, value)).into(),
            )
        };
        let gauge = |name: &'static str| gauge!(name, "device" => device.clone());
        let bytes = |name: &'static str| {
            ["guest", "repair", "scrub"].map(|class| counter!(name, "device" => device.clone(), "class" => class))
        };
        Meters {
            stages: Stages {
                write_queue: stage("write", "queue"),
                write: stage("write", "write"),
                flush: stage("write", "flush"),
                read_queue: stage("read", "queue"),
                read: stage("read", "read"),
            },
            bytes_read: bytes("cairn_node_read_bytes_total"),
            bytes_written: bytes("cairn_node_write_bytes_total"),
            fetched: counter!("cairn_node_fetched_bytes_total", "device" => device.clone()),
            calls: ["io_uring_enter", "sendmsg"]
                .map(|call| counter!("cairn_node_system_calls_total", "device" => device.clone(), "call" => call)),
            accepted: counter!("cairn_node_connections_accepted_total", "device" => device.clone()),
            connections: gauge("cairn_node_connections"),
            strangers: gauge("cairn_node_connections_without_hello"),
            requests: gauge("cairn_node_requests_in_flight"),
            queued: gauge("cairn_node_requests_queued"),
            fetching: gauge("cairn_node_fetches_in_flight"),
            fetch_peers: gauge("cairn_node_fetch_connections"),
            receive_bytes: gauge("cairn_node_receive_buffer_bytes"),
            used: gauge("cairn_node_used_blocks"),
            capacity: gauge("cairn_node_capacity_blocks"),
            failed: gauge("cairn_node_device_failed"),
            scrub: ScrubMeters {
                pass: gauge("cairn_node_scrub_pass"),
                progress: gauge("cairn_node_scrub_progress_ratio"),
                checked: gauge("cairn_node_scrub_checked_blocks"),
                finished: gauge("cairn_node_scrub_finished_timestamp_seconds"),
                damaged: gauge("cairn_node_damaged_blocks"),
                damaged_metadata: gauge("cairn_node_damaged_metadata"),
                mended: counter!("cairn_node_mended_blocks_total", "device" => device.clone()),
                moved: counter!("cairn_node_moved_blocks_total", "device" => device.clone()),
            },
            device,
        }
    }

    /// Somebody has connected.
    pub(super) fn accepted(&self) {
        self.accepted.increment(1);
    }

    /// Data came from another device.
    pub(super) fn fetched(&self, bytes: u64) {
        self.fetched.increment(bytes);
    }

    /// A frame came in.
    pub(super) fn received(&self, envelope: &Envelope) {
        let bytes = match &envelope.message {
            Message::Write(write) => match &write.data {
                cairn_proto::message::WriteData::Data { bytes, .. } => bytes.len(),
                _ => 0,
            },
            Message::Copy(copy) => copy.bytes.len(),
            _ => return,
        };
        self.bytes_written[class(envelope.class)].increment(bytes as u64);
    }

    /// An answer goes out.
    pub(super) fn sent(&mut self, envelope: &Envelope) {
        let micros = |micros: u32| Duration::from_micros(micros.into());
        match &envelope.message {
            Message::Durable(durable) => {
                self.stages.write_queue.record(micros(durable.queue_us));
                self.stages.write.record(micros(durable.write_us));
                self.stages.flush.record(micros(durable.flush_us));
            }
            Message::ReadAnswer(answer) => {
                self.stages.read_queue.record(micros(answer.queue_us));
                self.stages.read.record(micros(answer.read_us));
                let bytes: usize = answer.bytes.iter().map(bytes::Bytes::len).sum();
                self.bytes_read[class(envelope.class)].increment(bytes as u64);
            }
            Message::Failed(failed) => {
                let kind = format!("{:?}", failed.kind);
                counter!("cairn_node_errors_total", "device" => self.device.clone(), "kind" => kind).increment(1);
            }
            _ => {}
        }
    }

    /// How often the device's thread has called the kernel; told now and then, so that it costs an I/O nothing.
    pub(super) fn system_calls(&self, ring_enters: u64, sends: u64) {
        let [enter, send] = &self.calls;
        enter.absolute(ring_enters);
        send.absolute(sends);
    }

    /// A connection was closed because of what its peer did.
    pub(super) fn closed(&self, why: &'static str) {
        counter!("cairn_node_connections_closed_total", "device" => self.device.clone(), "why" => why).increment(1);
    }

    /// How the device is, now and then.
    pub(super) fn status(&mut self, status: &HostStatus, budget: &Budget) {
        let Stages {
            write_queue,
            write,
            flush,
            read_queue,
            read,
        } = &mut self.stages;
        for stage in [write_queue, write, flush, read_queue, read] {
            stage.publish();
        }
        self.connections.set(status.peers as f64);
        self.strangers.set(status.strangers as f64);
        self.requests.set(status.requests as f64);
        self.queued.set(status.queued as f64);
        self.fetching.set(status.fetching as f64);
        self.fetch_peers.set(status.fetch_peers as f64);
        self.receive_bytes.set(budget.used() as f64);
        self.used.set(status.used_blocks as f64);
        self.capacity.set(status.capacity_blocks as f64);
        self.failed.set(if status.failed.is_some() { 1.0 } else { 0.0 });
        let (meters, scrub) = (&self.scrub, &status.scrub);
        meters.pass.set(scrub.state.pass as f64);
        // Between passes all is done.
        meters
            .progress
            .set(scrub.percent().map_or(1.0, |percent| f64::from(percent) / 100.0));
        meters.checked.set(scrub.state.checked as f64);
        meters.finished.set(scrub.state.finished_s as f64);
        meters.damaged.set(scrub.damaged_blocks as f64);
        meters.damaged_metadata.set(scrub.damaged_metadata as f64);
        meters.mended.absolute(scrub.mended_blocks);
        meters.moved.absolute(scrub.moved_blocks);
    }
}

fn class(class: Class) -> usize {
    match class {
        Class::Guest => 0,
        Class::Repair => 1,
        Class::Scrub => 2,
    }
}
