//! What the store costs per operation on a device that does nothing, and the CRC of a metadata block.

#![allow(
    missing_docs,
    reason = "the macros of criterion make public functions without documentation"
)]
#![allow(clippy::unwrap_used, reason = "a benchmark may panic")]

use std::hint::black_box;

use cairn_benches::store::driven::on_null_device;
use cairn_benches::store::work::{self, Load, Stop};
use cairn_storage_node::store::StoreLimits;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// Blocks that operations are spread over.
const SPAN: u64 = 1 << 16;
/// Operations of one measurement.
const OPERATIONS: u64 = 1024;

fn load(write: bool, depth: usize) -> Load {
    Load {
        write,
        random: true,
        blocks: 1,
        depth,
        span: SPAN,
        stop: Stop::Operations(OPERATIONS),
    }
}

/// Batches, records, allocator and index together.
fn operations(c: &mut Criterion) {
    let mut driven = on_null_device(SPAN * 2, StoreLimits::default()).unwrap();
    let fill = Load {
        stop: Stop::Once,
        ..load(true, 64)
    };
    work::run(&mut driven, &fill, 0).unwrap();
    for (name, write) in [("store-write-4k", true), ("store-read-4k", false)] {
        let mut group = c.benchmark_group(name);
        group.throughput(Throughput::Elements(OPERATIONS));
        for depth in [1, 16, 64] {
            let mut seed = 0;
            group.bench_function(BenchmarkId::new("depth", depth), |b| {
                b.iter(|| {
                    seed += 1;
                    work::run(&mut driven, &load(write, depth), seed).unwrap()
                })
            });
        }
        group.finish();
    }
}

/// The allocator when nine of ten blocks are taken and free space is scattered.
fn full(c: &mut Criterion) {
    let mut driven = on_null_device(SPAN * 10 / 9, StoreLimits::default()).unwrap();
    let overwrite = Load {
        stop: Stop::Once,
        ..load(true, 64)
    };
    work::run(&mut driven, &overwrite, 0).unwrap();
    work::run(&mut driven, &overwrite, 1).unwrap();
    let mut group = c.benchmark_group("store-write-4k-90-percent-full");
    group.throughput(Throughput::Elements(OPERATIONS));
    let mut seed = 0;
    group.bench_function(BenchmarkId::new("depth", 64), |b| {
        b.iter(|| {
            seed += 1;
            work::run(&mut driven, &load(true, 64), seed).unwrap()
        })
    });
    group.finish();
}

fn crc(c: &mut Criterion) {
    let block = vec![7; 4096];
    let mut group = c.benchmark_group("crc");
    group.throughput(Throughput::Bytes(4096));
    group.bench_function("metadata block", |b| b.iter(|| crc32fast::hash(black_box(&block))));
    group.finish();
}

criterion_group!(store, operations, full, crc);
criterion_main!(store);
