//! What the driver counts. Every handle is made once, so that counting allocates nothing; what is counted several times for each
//! operation is published now and then.

use std::time::Duration;

use cairn_meta::metrics::Seconds;
use cairn_proto::message::Message;
use metrics::{Counter, Gauge, Label, counter, gauge};

use super::DeviceLoad;
use super::socket::Calls;
use crate::core::api::Notice;
use crate::volume::api::VolumeOp;

/// The kinds of operations, as metrics tell them apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    BlockStatus,
}

const KINDS: [(Kind, &str); 6] = [
    (Kind::Read, "read"),
    (Kind::Write, "write"),
    (Kind::Flush, "flush"),
    (Kind::Discard, "discard"),
    (Kind::WriteZeroes, "write_zeroes"),
    (Kind::BlockStatus, "block_status"),
];

impl Kind {
    pub(super) fn of(op: &VolumeOp) -> (Kind, u64) {
        match op {
            VolumeOp::Read { length, .. } => (Kind::Read, u64::from(*length)),
            VolumeOp::Write { data, .. } => (Kind::Write, data.len() as u64),
            VolumeOp::Flush => (Kind::Flush, 0),
            VolumeOp::Discard { length, .. } => (Kind::Discard, *length),
            VolumeOp::WriteZeroes { length, .. } => (Kind::WriteZeroes, *length),
            VolumeOp::BlockStatus { .. } => (Kind::BlockStatus, 0),
        }
    }
}

pub(super) struct KindMetrics {
    pub(super) seconds: Seconds,
    pub(super) bytes: Counter,
    pub(super) errors: Counter,
}

pub(super) struct Metrics {
    kinds: [KindMetrics; KINDS.len()],
    pub(super) in_flight: Gauge,
    pub(super) guest_bytes: Gauge,
    pub(super) guests: Gauge,
    pub(super) volumes: Gauge,
    devices_up: Gauge,
    devices_down: Gauge,
    device_in_flight: Gauge,
    device_queued: Gauge,
    pub(super) device_sent_bytes: Counter,
    pub(super) device_received_bytes: Counter,
    pub(super) device_refused: Counter,
    epoll_wait: Counter,
    readv: Counter,
    writev: Counter,
    copied_bytes: Counter,
    copied_hole_blocks: Counter,
    pub(super) meta_questions: Counter,
    damaged: Counter,
    repaired: Counter,
    round_trip: Seconds,
    queue: Seconds,
    read: Seconds,
    write: Seconds,
    flush: Seconds,
}

impl Metrics {
    pub(super) fn new() -> Metrics {
        let stage =
            |stage: &'static str| Seconds::new("cairn_client_device_stage_seconds", vec![Label::new("stage", stage)]);
        Metrics {
            kinds: KINDS.map(|(_, name)| KindMetrics {
                seconds: Seconds::new("cairn_client_operation_seconds", vec![Label::new("op", name)]),
                bytes: counter!("cairn_client_operation_bytes_total", "op" => name),
                errors: counter!("cairn_client_operation_errors_total", "op" => name),
            }),
            in_flight: gauge!("cairn_client_operations_in_flight"),
            guest_bytes: gauge!("cairn_export_held_bytes"),
            guests: gauge!("cairn_export_connections"),
            volumes: gauge!("cairn_client_open_volumes"),
            devices_up: gauge!("cairn_client_devices", "state" => "up"),
            devices_down: gauge!("cairn_client_devices", "state" => "down"),
            device_in_flight: gauge!("cairn_client_device_requests", "state" => "in_flight"),
            device_queued: gauge!("cairn_client_device_requests", "state" => "queued"),
            device_sent_bytes: counter!("cairn_client_device_sent_bytes_total"),
            device_received_bytes: counter!("cairn_client_device_received_bytes_total"),
            device_refused: counter!("cairn_client_device_refused_total"),
            epoll_wait: counter!("cairn_client_system_calls_total", "call" => "epoll_wait"),
            readv: counter!("cairn_client_system_calls_total", "call" => "readv"),
            writev: counter!("cairn_client_system_calls_total", "call" => "writev"),
            copied_bytes: counter!("cairn_client_copied_bytes_total"),
            copied_hole_blocks: counter!("cairn_client_copied_hole_blocks_total"),
            meta_questions: counter!("cairn_client_meta_questions_total"),
            damaged: counter!("cairn_client_damaged_blocks_total"),
            repaired: counter!("cairn_client_repaired_blocks_total"),
            round_trip: Seconds::new("cairn_client_device_round_trip_seconds", Vec::new()),
            queue: stage("queue"),
            read: stage("read"),
            write: stage("write"),
            flush: stage("flush"),
        }
    }

    pub(super) fn load(&self, load: DeviceLoad) {
        self.devices_up.set(load.up as f64);
        self.devices_down.set(load.down as f64);
        self.device_in_flight.set(load.in_flight as f64);
        self.device_queued.set(load.queued as f64);
    }

    /// How often the thread has called the kernel since it was told last. A process may have several such threads.
    pub(super) fn calls(&self, calls: Calls) {
        self.epoll_wait.increment(calls.epoll_wait);
        self.readv.increment(calls.readv);
        self.writev.increment(calls.writev);
    }

    /// Something has happened to a volume.
    pub(super) fn notice(&self, notice: &Notice) {
        match notice {
            Notice::Damage { .. } => self.damaged.increment(1),
            Notice::Repaired { blocks, .. } => self.repaired.increment(*blocks),
            _ => {}
        }
    }

    /// A message is sent to a device: counts what is copied to one that lacks it, again if it is sent again.
    pub(super) fn sent(&self, message: &Message) {
        match message {
            Message::Copy(copy) => self.copied_bytes.increment(copy.bytes.len() as u64),
            Message::CopyHole(hole) => self.copied_hole_blocks.increment(u64::from(hole.range.count())),
            _ => {}
        }
    }

    pub(super) fn round_trip(&mut self, took: Duration) {
        self.round_trip.record(took);
    }

    /// What a device says of where an operation's time went.
    pub(super) fn answer(&mut self, message: &Message) {
        let record = |stage: &mut Seconds, micros: u32| stage.record(Duration::from_micros(micros.into()));
        match message {
            Message::Durable(answer) => {
                record(&mut self.queue, answer.queue_us);
                record(&mut self.write, answer.write_us);
                record(&mut self.flush, answer.flush_us);
            }
            Message::ReadAnswer(answer) => {
                record(&mut self.queue, answer.queue_us);
                record(&mut self.read, answer.read_us);
            }
            _ => {}
        }
    }

    pub(super) fn kind(&mut self, kind: Kind) -> &mut KindMetrics {
        &mut self.kinds[kind as usize]
    }

    /// Shows what was counted since the last time.
    pub(super) fn publish(&mut self) {
        let stages = [&mut self.queue, &mut self.read, &mut self.write, &mut self.flush];
        let kinds = self.kinds.iter_mut().map(|kind| &mut kind.seconds);
        for seconds in kinds.chain(stages).chain([&mut self.round_trip]) {
            seconds.publish();
        }
    }
}
