//! What the data plane costs per frame before any I/O: block checksums, encoding and decoding of a write.

#![allow(
    missing_docs,
    reason = "the macros of criterion make public functions without documentation"
)]
#![allow(clippy::unwrap_used, reason = "a benchmark may panic")]

use std::hint::black_box;

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::checksum::{block_checksum, range_checksums};
use cairn_proto::frame::FrameHeader;
use cairn_proto::ids::{ChunkIndex, Correlation, Generation, GroupIndex, Layer, Seq, Version, VolumeId};
use cairn_proto::limits::{BLOCK_BYTES, FRAME_BLOCKS_MAX, FRAME_HEADER_BYTES};
use cairn_proto::message::{Envelope, Holder, Message, Write, WriteData};
use cairn_proto::units::BlockRange;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// From one block to the largest frame.
const BLOCKS: [u32; 3] = [1, 16, FRAME_BLOCKS_MAX];

fn content(blocks: u32) -> Bytes {
    let mut buf = BlockBuf::zeroed(blocks as usize);
    for (i, byte) in buf.iter_mut().enumerate() {
        *byte = (i * 31 % 251) as u8;
    }
    buf.freeze()
}

fn write(blocks: u32) -> Envelope {
    let (volume, generation) = (VolumeId(7), Generation::new(3).unwrap());
    let range = BlockRange::new(ChunkIndex(2), 64, blocks).unwrap();
    let bytes = content(blocks);
    let checksums = range_checksums(volume, range, &bytes);
    let write = Write {
        holder: Holder { volume, generation },
        group: GroupIndex(0),
        layer: Layer(0),
        range,
        version: Version::new(generation, Seq::new(9).unwrap()),
        stable: Version::new(generation, Seq::new(8).unwrap()),
        data: WriteData::Data { bytes, checksums },
    };
    Envelope::new(Correlation(1), Message::Write(write))
}

fn checksums(c: &mut Criterion) {
    let block = content(1);
    let mut group = c.benchmark_group("checksum");
    group.throughput(Throughput::Bytes(BLOCK_BYTES as u64));
    group.bench_function("block", |b| {
        b.iter(|| block_checksum(VolumeId(7), 42, black_box(&block)))
    });
    group.finish();
}

fn frames(c: &mut Criterion) {
    let mut group = c.benchmark_group("write-frame");
    for blocks in BLOCKS {
        let envelope = write(blocks);
        let frame = envelope.encode();
        let head: &[u8; FRAME_HEADER_BYTES] = frame.head.first_chunk().unwrap();
        group.throughput(Throughput::Bytes(frame.len() as u64));
        group.bench_function(BenchmarkId::new("encode", blocks), |b| {
            b.iter(|| black_box(&envelope).encode())
        });
        group.bench_function(BenchmarkId::new("decode", blocks), |b| {
            b.iter(|| {
                let header = FrameHeader::decode(black_box(head)).unwrap();
                Envelope::decode(&header, &frame.head, frame.data[0].clone()).unwrap()
            });
        });
    }
    group.finish();
}

criterion_group!(codec, checksums, frames);
criterion_main!(codec);
