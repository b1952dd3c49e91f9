//! Bytes rot on the devices of a running cluster: they are found, repaired from a good copy, and never returned.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use cairn_chaos::live::dev::Dev;
use cairn_chaos::live::wait::{wait_for, wait_until};

use crate::support::cluster::{device_file, log_of};
use crate::support::nbd::Nbd;
use crate::support::{Random, heavy, run, start};

/// How long a pass over some megabytes, and the repair, may take.
const BOUND: Duration = Duration::from_secs(90);
const BLOCK: usize = 4096;
/// Blocks of the volume that are written.
const BLOCKS: usize = 2048;

/// Flips a bit in each of these blocks of content, wherever the device has it.
fn rot(device: &Path, contents: &[&[u8]]) {
    let file = std::fs::File::options().read(true).write(true).open(device).unwrap();
    let mut wanted: Vec<&[u8]> = contents.to_vec();
    let mut piece = vec![0; 256 * BLOCK];
    let length = file.metadata().unwrap().len();
    for start in (0..length).step_by(piece.len()) {
        let count = file.read_at(&mut piece, start).unwrap();
        for (i, block) in piece[..count].chunks_exact(BLOCK).enumerate() {
            if let Some(found) = wanted.iter().position(|content| *content == block) {
                wanted.swap_remove(found);
                let at = start + (i * BLOCK) as u64 + 100;
                file.write_all_at(&[block[100] ^ 1], at).unwrap();
            }
        }
    }
    file.sync_all().unwrap();
    assert!(wanted.is_empty(), "{} blocks are not on {device:?}", wanted.len());
}

/// How the verification of a node's device is: the last pass that has ended, and blocks known to be damaged now.
fn scrub_of(dev: &Dev, node: &str) -> Option<(u64, u64)> {
    let ran = run(&mut dev.cairn(&["node", "show", node, "--json"]));
    let shown: serde_json::Value = serde_json::from_str(&ran.out).ok()?;
    let scrub = &shown["devices"][0]["scrub"];
    Some((scrub["finished_pass"].as_u64()?, scrub["damaged_blocks"].as_u64()?))
}

/// Verifies the device of a node now; waits until a pass has ended and nothing on it is damaged any more.
fn scrub_until_good(dev: &Dev, node: &str) {
    let (before, _) = wait_for(BOUND, || scrub_of(dev, node)).expect("the node tells of its device");
    run(&mut dev.cairn(&["node", "scrub", node])).expect_success();
    let good = || scrub_of(dev, node).is_some_and(|(pass, damaged)| pass > before && damaged == 0);
    assert!(
        wait_until(BOUND, good),
        "{node}: {:?}\n{}",
        scrub_of(dev, node),
        log_of(dev, "export")
    );
}

#[test]
fn rot_that_a_scrub_finds_is_repaired_under_a_guest_and_never_read() {
    let _turn = heavy();
    let dev = start(&["disk:64M"]);
    let mut content = vec![0; BLOCKS * BLOCK];
    Random::new(7).fill(&mut content);
    let mut nbd = Nbd::connect(&dev.socket(), "disk").unwrap();
    for (i, piece) in content.chunks(64 * BLOCK).enumerate() {
        nbd.write((i * 64 * BLOCK) as u64, piece);
    }
    let block = |i: usize| &content[i * BLOCK..(i + 1) * BLOCK];
    // Some on one node alone, some on two.
    rot(
        &device_file(&dev, "node-1"),
        &[block(3), block(4), block(700), block(1500)],
    );
    rot(&device_file(&dev, "node-2"), &[block(700), block(900)]);
    scrub_until_good(&dev, "node-1");
    scrub_until_good(&dev, "node-2");
    let log = log_of(&dev, "export");
    let told = log.matches("is damaged on").count();
    assert!(told >= 6, "six blocks were damaged, {told} told:\n{log}");
    assert!(log.contains("were written anew from another copy"), "{log}");
    for (i, piece) in content.chunks(64 * BLOCK).enumerate() {
        let read = nbd.read((i * 64 * BLOCK) as u64, piece.len() as u32);
        assert!(read == piece, "piece {i} differs");
    }
    // A second pass finds what the first one has left: nothing.
    scrub_until_good(&dev, "node-1");
    assert_eq!(log_of(&dev, "export").matches("is damaged on").count(), told);
}

#[test]
fn rot_of_a_volume_that_nobody_holds_is_repaired_by_a_caretaker() {
    let _turn = heavy();
    let dev = start(&["disk:64M"]);
    let mut content = vec![0; BLOCKS * BLOCK];
    Random::new(8).fill(&mut content);
    {
        let mut nbd = Nbd::connect(&dev.socket(), "disk").unwrap();
        for (i, piece) in content.chunks(64 * BLOCK).enumerate() {
            nbd.write((i * 64 * BLOCK) as u64, piece);
        }
    }
    let is_held = || {
        let ran = run(&mut dev.cairn(&["volume", "show", "disk", "--json"]));
        let shown: serde_json::Value = serde_json::from_str(&ran.out).unwrap_or_default();
        !shown["holder"].is_null()
    };
    assert!(wait_until(BOUND, || !is_held()), "the last guest's going releases it");
    let block = |i: usize| &content[i * BLOCK..(i + 1) * BLOCK];
    rot(&device_file(&dev, "node-3"), &[block(17), block(1000)]);
    scrub_until_good(&dev, "node-3");
    assert!(wait_until(BOUND, || !is_held()), "the caretaker releases it too");
    let mut nbd = Nbd::connect(&dev.socket(), "disk").unwrap();
    for (i, piece) in content.chunks(64 * BLOCK).enumerate() {
        let read = nbd.read((i * 64 * BLOCK) as u64, piece.len() as u32);
        assert!(read == piece, "piece {i} differs");
    }
}
