//! Disk images in and out with the programs that people use.

use std::fs;
use std::path::Path;
use std::process::Command;

use cairn_chaos::live::tools;

use crate::support::{Random, heavy, run, start};

const MIB: u64 = 1 << 20;

/// An image of 96 MiB with data in few places, some at odd ends, and holes between.
fn sparse_image(path: &Path) -> Vec<u8> {
    let mut image = vec![0; (96 * MIB) as usize];
    let mut random = Random::new(11);
    for (from, bytes) in [
        (0, 70_000),
        (5 * MIB, 4096),
        (31 * MIB + 512, 2 * MIB + 1536),
        (64 * MIB - 4096, 8192),
        (96 * MIB - 512, 512),
    ] {
        random.fill(&mut image[from as usize..(from + bytes) as usize]);
    }
    let file = fs::File::create(path).unwrap();
    file.set_len(image.len() as u64).unwrap();
    for (index, chunk) in image
        .chunks(4096)
        .enumerate()
        .filter(|(_, chunk)| chunk.iter().any(|byte| *byte != 0))
    {
        std::os::unix::fs::FileExt::write_all_at(&file, chunk, index as u64 * 4096).unwrap();
    }
    image
}

/// Bytes of data and of holes that the export reports.
fn map_totals(uri: &str) -> (u64, u64) {
    let ran = run(Command::new("nbdinfo").args(["--map", "--totals", "--json", uri])).expect_success();
    let totals: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    let of = |kind: u64| {
        let rows = totals.as_array().unwrap().iter();
        rows.filter(|row| row["type"].as_u64() == Some(kind))
            .map(|row| row["size"].as_u64().unwrap())
            .sum()
    };
    // Type 0 is data; 3 is a hole that reads as zeroes.
    (of(0), of(3))
}

#[test]
fn an_image_goes_in_and_out_and_its_holes_stay_holes() {
    if !tools::available(&[("nbdcopy", "libnbd-bin"), ("nbdinfo", "libnbd-bin")]) {
        return;
    }
    let _turn = heavy();
    let dev = start(&["demo:96M"]);
    let uri = dev.uri("demo");
    assert_eq!(map_totals(&uri), (0, 96 * MIB), "a new volume is one hole");
    run(Command::new("nbdinfo")
        .arg("--list")
        .arg(format!("nbd+unix:///?socket={}", dev.socket().display())))
    .expect_success();

    let files = tempfile::tempdir().unwrap();
    let (image, back) = (files.path().join("in.img"), files.path().join("out.img"));
    let content = sparse_image(&image);
    run(Command::new("nbdcopy").arg(&image).arg(&uri)).expect_success();
    let (data, hole) = map_totals(&uri);
    assert_eq!(data + hole, 96 * MIB);
    assert!(data < 4 * MIB, "{data} bytes of data for less than 3 MiB of it");

    run(Command::new("nbdcopy").arg(&uri).arg(&back)).expect_success();
    assert!(fs::read(&back).unwrap() == content, "what came back is what went in");
    let blocks = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&back).unwrap());
    assert!(
        blocks * 512 < 8 * MIB,
        "the copy takes {} bytes: its holes were filled",
        blocks * 512
    );
}

#[test]
fn qemu_img_converts_both_ways_and_finds_no_difference() {
    if !tools::available(&[("qemu-img", "qemu-utils")]) {
        return;
    }
    let _turn = heavy();
    let dev = start(&["demo:96M"]);
    let uri = dev.uri("demo");
    let files = tempfile::tempdir().unwrap();
    let (raw, qcow) = (files.path().join("in.img"), files.path().join("out.qcow2"));
    let content = sparse_image(&raw);
    let qemu_img = |args: &[&str]| run(Command::new("qemu-img").args(args));
    let (raw_name, qcow_name) = (raw.to_str().unwrap(), qcow.to_str().unwrap());
    qemu_img(&["convert", "-n", "-f", "raw", "-O", "raw", raw_name, &uri]).expect_success();
    qemu_img(&["compare", "-f", "raw", "-F", "raw", raw_name, &uri]).expect_success();
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &uri, qcow_name]).expect_success();
    qemu_img(&["compare", "-f", "qcow2", "-F", "raw", qcow_name, &uri]).expect_success();
    assert!(
        fs::metadata(&qcow).unwrap().len() < 8 * MIB,
        "the holes were not copied"
    );

    // A difference would be found: the comparison is one.
    let mut changed = content;
    changed[40_000] ^= 1;
    fs::write(&raw, changed).unwrap();
    assert_eq!(
        qemu_img(&["compare", "-f", "raw", "-F", "raw", raw_name, &uri])
            .status
            .code(),
        Some(1)
    );
}
