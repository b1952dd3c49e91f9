//! The layer over a coordinator that is an array, which ends operations in any order.

use std::collections::BTreeMap;

use cairn_proto::block::{BlockState, Content};
use cairn_proto::checksum::Checksum;
use cairn_proto::ids::Version;
use proptest::prelude::*;

use super::*;

const SIZE: u64 = 2 * CHUNK_BYTES;

/// Blocks that were written, by number; `None` is zeroes on record.
#[derive(Default)]
struct Blocks {
    held: BTreeMap<u64, Option<Bytes>>,
    started: Vec<(OpToken, Operation)>,
    fail: Option<OpError>,
}

impl Blocks {
    fn numbers(range: BlockRange) -> impl Iterator<Item = u64> {
        (0..range.count()).map(move |i| range.volume_block(i))
    }

    fn start(&mut self, token: OpToken, operation: Operation) {
        for (_, other) in &self.started {
            let both_read = other.is_read() && operation.is_read();
            assert!(
                both_read || !other.range().overlaps(&operation.range()),
                "{operation:?} overlaps {other:?}"
            );
        }
        self.started.push((token, operation));
    }

    fn end(&mut self, i: usize) -> (OpToken, Result<Outcome, OpError>) {
        let (token, operation) = self.started.swap_remove(i);
        if let Some(error) = self.fail {
            return (token, Err(error));
        }
        (token, Ok(self.act(operation)))
    }

    fn act(&mut self, operation: Operation) -> Outcome {
        let range = operation.range();
        match operation {
            Operation::Read { .. } => {
                let state = |content| BlockState {
                    content,
                    version: Version::ZERO,
                };
                let (mut blocks, mut bytes) = (Vec::new(), Vec::new());
                for number in Blocks::numbers(range) {
                    match self.held.get(&number) {
                        None => blocks.push(state(Content::Absent)),
                        Some(None) => blocks.push(state(Content::Zero)),
                        Some(Some(block)) => {
                            blocks.push(state(Content::Data(Checksum(0))));
                            bytes.push(block.clone());
                        }
                    }
                }
                Outcome::Read(ReadOutcome { blocks, bytes })
            }
            Operation::Write { bytes, checksums, .. } => {
                assert_eq!(checksums, range_checksums(VolumeId(1), range, &bytes));
                for (number, i) in Blocks::numbers(range).zip(0..) {
                    self.held
                        .insert(number, Some(bytes.slice(i * BLOCK_BYTES..(i + 1) * BLOCK_BYTES)));
                }
                Outcome::Written
            }
            Operation::Zero { .. } => {
                self.held.extend(Blocks::numbers(range).map(|number| (number, None)));
                Outcome::Written
            }
            Operation::Discard { .. } => {
                Blocks::numbers(range).for_each(|number| {
                    self.held.remove(&number);
                });
                Outcome::Written
            }
            Operation::Status { .. } => {
                let data = Blocks::numbers(range).map(|number| matches!(self.held.get(&number), Some(Some(_))));
                let data: Vec<bool> = data.collect();
                Outcome::Status(
                    data.chunk_by(|a, b| a == b)
                        .map(|run| (run.len() as u32, run[0]))
                        .collect(),
                )
            }
        }
    }
}

struct Bench {
    layer: VolumeLayer,
    blocks: Blocks,
    replies: BTreeMap<OpId, Result<VolumeReply, VolumeError>>,
}

impl Bench {
    fn new(limits: VolumeLimits) -> Bench {
        Bench {
            layer: VolumeLayer::new(VolumeId(1), SIZE, limits),
            blocks: Blocks::default(),
            replies: BTreeMap::new(),
        }
    }

    fn poll(&mut self) {
        while let Some(output) = self.layer.poll() {
            match output {
                Output::Start(token, operation) => self.blocks.start(token, operation),
                Output::Reply(op, result) => assert!(self.replies.insert(op, result).is_none(), "replied twice"),
            }
        }
    }

    fn submit(&mut self, op: u64, request: VolumeOp) {
        self.layer.submit(OpId(op), request);
        self.poll();
    }

    /// Ends what is in flight, taking the next one from `order`.
    fn run(&mut self, order: &[usize]) {
        let mut order = order.iter().copied().cycle();
        while !self.blocks.started.is_empty() {
            let i = order.next().unwrap_or(0) % self.blocks.started.len();
            let (token, result) = self.blocks.end(i);
            self.layer.done(token, result);
            self.poll();
        }
    }

    fn read(&mut self, offset: u64, length: u32) -> Vec<u8> {
        self.submit(u64::MAX, VolumeOp::Read { offset, length });
        self.run(&[]);
        match self.replies.remove(&OpId(u64::MAX)) {
            Some(Ok(VolumeReply::Read(pieces))) => pieces.concat(),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn what_lies_outside_is_refused_with_words() {
    let mut bench = Bench::new(VolumeLimits::DEFAULT);
    let refused = [
        VolumeOp::Read {
            offset: SIZE,
            length: 512,
        },
        VolumeOp::Read {
            offset: 100,
            length: 512,
        },
        VolumeOp::Discard {
            offset: u64::MAX - 511,
            length: 512,
        },
        VolumeOp::Read {
            offset: 0,
            length: OP_BYTES_MAX + 512,
        },
        VolumeOp::BlockStatus { offset: 0, length: 0 },
    ];
    for (request, op) in refused.into_iter().zip(0..) {
        bench.submit(op, request);
        assert!(matches!(bench.replies[&OpId(op)], Err(VolumeError::Invalid(_))));
    }
    assert!(bench.blocks.started.is_empty());
    bench.layer.grow(2 * SIZE);
    bench.submit(
        9,
        VolumeOp::Read {
            offset: SIZE,
            length: 512,
        },
    );
    bench.run(&[]);
    assert!(bench.replies[&OpId(9)].is_ok(), "it has grown");
}

#[test]
fn a_discard_of_everything_is_one_operation_per_chunk_and_few_at_a_time() {
    let limits = VolumeLimits {
        pieces_of_op_max: 1,
        ..VolumeLimits::DEFAULT
    };
    let mut bench = Bench::new(limits);
    bench.submit(
        1,
        VolumeOp::Discard {
            offset: 0,
            length: SIZE,
        },
    );
    assert_eq!(bench.blocks.started.len(), 1);
    bench.run(&[]);
    assert!(matches!(bench.replies[&OpId(1)], Ok(VolumeReply::Done)));
}

#[test]
fn permits_are_given_in_order_and_one_operation_always_goes() {
    let limits = VolumeLimits {
        op_bytes_max: 8192,
        waiting_max: 1,
        ..VolumeLimits::DEFAULT
    };
    let mut bench = Bench::new(limits);
    let write = |offset, length| VolumeOp::Write {
        offset,
        data: Bytes::from(vec![1; length]),
    };
    bench.submit(1, write(0, 16384));
    assert!(bench.layer.has_room());
    bench.submit(2, write(65536, 4096));
    assert!(
        !bench.layer.has_room(),
        "the second one waits, and so should the export"
    );
    assert_eq!((bench.layer.operations(), bench.layer.permit_bytes()), (2, 16384));
    bench.run(&[]);
    assert_eq!((bench.layer.operations(), bench.layer.permit_bytes()), (0, 0));
    assert_eq!(bench.replies.len(), 2);
}

#[test]
fn an_error_of_one_piece_is_the_error_of_the_operation_once() {
    let mut bench = Bench::new(VolumeLimits::DEFAULT);
    bench.blocks.fail = Some(OpError::NoSpace);
    bench.submit(
        1,
        VolumeOp::Write {
            offset: 512,
            data: Bytes::from(vec![1; 4 << 20]),
        },
    );
    bench.run(&[3, 1, 2]);
    assert!(matches!(bench.replies[&OpId(1)], Err(VolumeError::NoSpace)));
    bench.blocks.fail = None;
    bench.layer.close(&VolumeError::Fenced);
    bench.submit(2, VolumeOp::Flush);
    assert!(matches!(bench.replies[&OpId(2)], Err(VolumeError::Fenced)));
}

#[test]
fn status_tells_holes_from_data_and_starts_where_it_was_asked() {
    let mut bench = Bench::new(VolumeLimits::DEFAULT);
    bench.submit(
        1,
        VolumeOp::Write {
            offset: 8192,
            data: Bytes::from(vec![1; 4096]),
        },
    );
    bench.run(&[]);
    bench.submit(
        2,
        VolumeOp::BlockStatus {
            offset: 4608,
            length: SIZE - 4608,
        },
    );
    bench.run(&[]);
    let Ok(VolumeReply::BlockStatus(extents)) = &bench.replies[&OpId(2)] else {
        panic!()
    };
    let hole = |length| StatusExtent { length, data: false };
    let data = StatusExtent {
        length: 4096,
        data: true,
    };
    assert_eq!(*extents, [hole(3584), data, hole(SIZE - 12288)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn the_bytes_are_those_of_the_operations_one_after_the_other(
        ops in prop::collection::vec((0u8..4, 0u64..64, 1u64..40, any::<u8>()), 1..24),
        order in prop::collection::vec(0usize..16, 1..8),
    ) {
        let base = CHUNK_BYTES - 16 * 512;
        let mut bench = Bench::new(VolumeLimits::DEFAULT);
        let mut model = vec![0u8; 128 * 512];
        for ((kind, sector, sectors, fill), op) in ops.into_iter().zip(0..) {
            let (at, length) = (sector as usize * 512, sectors as usize * 512);
            let offset = base + at as u64;
            let request = match kind {
                0 => VolumeOp::Discard { offset, length: length as u64 },
                1 => VolumeOp::WriteZeroes { offset, length: length as u64, may_discard: fill & 1 == 0 },
                _ => VolumeOp::Write { offset, data: Bytes::from(vec![fill; length]) },
            };
            model[at..at + length].fill(if kind < 2 { 0 } else { fill });
            bench.submit(op, request);
        }
        bench.run(&order);
        prop_assert!(bench.replies.values().all(|reply| matches!(reply, Ok(VolumeReply::Done))));
        prop_assert!(bench.layer.order.is_empty());
        prop_assert_eq!(bench.layer.operations(), 0);
        let read = bench.read(base + 512, 127 * 512);
        prop_assert_eq!(&read[..], &model[512..]);
    }
}
