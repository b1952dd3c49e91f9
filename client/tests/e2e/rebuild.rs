//! A node goes for good, or for a while: its copies are made anew on another one, or get what they have missed and no more.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

use cairn_chaos::live::dev::{Dev, DevOptions};
use cairn_chaos::live::wait::{wait_for, wait_until};

use crate::support::cluster::{
    WHOLE_BOUND, assert_on_device, events, held_on, is_held, json, log_of, metric, settled_hosts, wait_healthy,
};
use crate::support::nbd::Nbd;
use crate::support::stamped::{BLOCK, Stamped};
use crate::support::{Random, cairn, heavy, start_with};

/// What data was copied, as the holder of a volume counts it.
const COPIED_BYTES: &str = "cairn_client_copied_bytes_total";
/// First block and count of the parts of the volume that are written: in two chunks.
const REGIONS: [(u64, u64); 2] = [(0, 800), (20_000, 800)];

/// A cluster of four nodes, which rebuilds what is gone for so long.
fn start_four(rebuild_after: &str) -> Dev {
    let args = ["--nodes", "4", "--rebuild-after", rebuild_after];
    start_with(DevOptions::new(cairn()).volumes(&["demo:128M"]).args(&args))
}

fn connect(dev: &Dev) -> Nbd {
    Nbd::connect(&dev.socket(), "demo").unwrap()
}

fn regions(seed: u64) -> Vec<Stamped> {
    let region = |(first, count)| Stamped::new(first, count, seed + first);
    REGIONS.into_iter().map(region).collect()
}

/// The hosts of the volume, and the one that has no copy of it.
fn hosts(dev: &Dev) -> (BTreeSet<String>, String) {
    let hosts = wait_for(WHOLE_BOUND, || settled_hosts(dev, "demo")).expect("a new volume has all its copies");
    assert_eq!(hosts.len(), 3, "{hosts:?}");
    let mut nodes = (1..=4).map(|node| format!("node-{node}"));
    let spare = nodes.find(|node| !hosts.contains(node));
    (hosts, spare.expect("three of four have a copy"))
}

/// These hosts without one, and another one.
fn replaced(hosts: &BTreeSet<String>, gone: &str, spare: &str) -> BTreeSet<String> {
    let mut hosts = hosts.clone();
    hosts.remove(gone);
    hosts.insert(spare.to_string());
    hosts
}

fn wait_hosts(dev: &Dev, wanted: &BTreeSet<String>) {
    let there = wait_until(WHOLE_BOUND, || settled_hosts(dev, "demo").as_ref() == Some(wanted));
    assert!(there, "not on {wanted:?}: {}", json(dev, &["volume", "show", "demo"]));
}

/// Writes and trims on every region, each over a connection of its own, until `then` returns.
fn under_load(dev: &mut Dev, regions: &mut [Stamped], then: impl FnOnce(&mut Dev)) {
    let over = AtomicBool::new(false);
    let connections: Vec<Nbd> = regions.iter().map(|_| connect(dev)).collect();
    std::thread::scope(|scope| {
        let writers = regions.iter_mut().zip(connections).map(|(region, mut nbd)| {
            let over = &over;
            scope.spawn(move || {
                let mut steps = 0u64;
                while !over.load(Ordering::Acquire) {
                    region.step(&mut nbd).unwrap();
                    steps += 1;
                }
                steps
            })
        });
        let writers: Vec<_> = writers.collect();
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| then(dev)));
        over.store(true, Ordering::Release);
        let steps: Vec<u64> = writers.into_iter().map(|writer| writer.join().unwrap()).collect();
        if let Err(panic) = ended {
            std::panic::resume_unwind(panic);
        }
        assert!(
            steps.iter().all(|steps| *steps > 100),
            "there was little load: {steps:?}"
        );
    });
}

/// All that was written is read, lies on the device of `node`, and the devices of all hosts have as much as it has.
fn assert_equal_copies(dev: &mut Dev, regions: &mut [Stamped], hosts: &BTreeSet<String>, node: &str) {
    let mut nbd = connect(dev);
    for (region, (first, count)) in regions.iter_mut().zip(REGIONS) {
        region.check(&mut nbd);
        assert_on_device(dev, node, &mut nbd, first..first + count);
    }
    drop(nbd);
    let lines: Vec<_> = hosts.iter().map(|host| (host, dev.kill(host))).collect();
    let held: Vec<_> = hosts.iter().map(|host| held_on(dev, host)).collect();
    assert!(held.iter().all(|other| *other == held[0]), "{hosts:?} hold {held:?}");
    for (host, line) in lines {
        dev.restart(host, &line);
    }
}

#[test]
fn a_node_that_is_gone_is_replaced_under_load_and_drops_its_copies_when_it_is_back() {
    let _turn = heavy();
    let mut dev = start_four("5s");
    let (hosts, spare) = hosts(&dev);
    let gone = hosts.first().expect("three hosts").clone();
    let wanted = replaced(&hosts, &gone, &spare);
    let mut regions = regions(21);
    let mut nbd = connect(&dev);
    for region in &mut regions {
        region.write_all(&mut nbd).unwrap();
    }
    let mut line = None;
    under_load(&mut dev, &mut regions, |dev| {
        line = Some(dev.kill(&gone));
        wait_hosts(dev, &wanted);
    });
    assert_eq!(metric(&dev, "export", "cairn_client_operation_errors_total"), 0.0);
    drop(nbd);
    assert_equal_copies(&mut dev, &mut regions, &wanted, &spare);
    // It comes back to a cluster that has no use for what it holds.
    dev.restart(&gone, &line.expect("it was killed"));
    let used = |node: &str| json(&dev, &["node", "show", node])["devices"][0]["used_bytes"].as_u64();
    let data = REGIONS.iter().map(|(_, count)| count * BLOCK).sum::<u64>();
    let is_back = || json(&dev, &["node", "show", &gone])["devices"][0]["alive"] == true;
    let dropped = || is_back() && used(&gone).is_some_and(|bytes| bytes < data / 4);
    assert!(
        wait_until(WHOLE_BOUND, dropped),
        "{:?}, and {spare} {:?}",
        used(&gone),
        used(&spare)
    );
    wait_healthy(&dev);
    dev.kill(&gone);
    assert!(held_on(&dev, &gone).is_empty(), "{:?}", held_on(&dev, &gone));
    assert_eq!(settled_hosts(&dev, "demo"), Some(wanted));
    let mut nbd = connect(&dev);
    regions.iter_mut().for_each(|region| region.check(&mut nbd));
}

#[test]
fn a_node_that_is_gone_is_replaced_though_nobody_holds_the_volume() {
    let _turn = heavy();
    let mut dev = start_four("3s");
    let (hosts, spare) = hosts(&dev);
    let gone = hosts.last().expect("three hosts").clone();
    let wanted = replaced(&hosts, &gone, &spare);
    let mut regions = regions(22);
    let mut nbd = connect(&dev);
    for region in &mut regions {
        region.write_all(&mut nbd).unwrap();
    }
    drop(nbd);
    assert!(wait_until(WHOLE_BOUND, || !is_held(&dev, "demo")), "the guest has left");
    dev.kill(&gone);
    wait_hosts(&dev, &wanted);
    assert!(
        wait_until(WHOLE_BOUND, || !is_held(&dev, "demo")),
        "the caretaker leaves it"
    );
    let kinds = events(&dev);
    assert_eq!(kinds.get("replaced"), Some(&1), "{kinds:?}");
    assert!(kinds.contains_key("caretaker-done"), "{kinds:?}");
    assert_equal_copies(&mut dev, &mut regions, &wanted, &spare);
}

#[test]
fn a_short_absence_moves_no_copy_and_the_node_gets_only_what_it_missed() {
    let _turn = heavy();
    let mut dev = start_four("60s");
    let (hosts, spare) = hosts(&dev);
    let away = hosts.first().expect("three hosts").clone();
    let mut regions = regions(23);
    let mut nbd = connect(&dev);
    for region in &mut regions {
        region.write_all(&mut nbd).unwrap();
    }
    let line = dev.kill(&away);
    let before = metric(&dev, "export", COPIED_BYTES);
    const MISSED: u64 = 150;
    let mut missed = Stamped::new(REGIONS[0].0 + REGIONS[0].1, MISSED, 24);
    missed.write_all(&mut nbd).unwrap();
    dev.restart(&away, &line);
    let is_caught_up = || log_of(&dev, "export").contains("holds everything again");
    assert!(
        wait_until(WHOLE_BOUND, is_caught_up),
        "{away} does not get what it missed"
    );
    let copied = metric(&dev, "export", COPIED_BYTES) - before;
    let differs = (MISSED * BLOCK) as f64;
    assert!(
        copied >= differs && copied <= differs * 1.2,
        "{copied} bytes were copied, {differs} were missed"
    );
    let kinds = events(&dev);
    assert!(!kinds.contains_key("replaced"), "{kinds:?}");
    assert_eq!(settled_hosts(&dev, "demo"), Some(hosts.clone()));
    missed.check(&mut nbd);
    drop(nbd);
    assert_equal_copies(&mut dev, &mut regions, &hosts, &away);
    dev.kill(&spare);
    assert!(held_on(&dev, &spare).is_empty());
}

/// A volume whose blocks are written one by one, in a scattered order, each with a content of its own.
struct Scattered {
    nbd: Nbd,
    /// The last write of each block; zero for none, or a trim.
    stamps: Vec<u64>,
    next: u64,
}

impl Scattered {
    const BLOCKS: u64 = 16_384;
    /// Blocks that are read and filled at once.
    const SPAN: u64 = 128;

    /// The block at a place of the scattered order.
    fn block(place: u64) -> u64 {
        place * 7919 % Self::BLOCKS
    }

    fn write(&mut self, place: u64) {
        let block = Self::block(place);
        self.next += 1;
        self.nbd.write(block * BLOCK, &content(block, self.next));
        self.stamps[block as usize] = self.next;
    }

    fn trim(&mut self, place: u64) {
        let block = Self::block(place);
        self.nbd.trim(block * BLOCK, BLOCK as u32);
        self.stamps[block as usize] = 0;
    }

    /// Writes the first half, in order.
    fn fill(&mut self) {
        for first in (0..Self::BLOCKS / 2).step_by(Self::SPAN as usize) {
            let blocks = first..first + Self::SPAN;
            self.next += 1;
            let data: Vec<u8> = blocks.clone().flat_map(|block| content(block, self.next)).collect();
            self.nbd.write(first * BLOCK, &data);
            blocks.for_each(|block| self.stamps[block as usize] = self.next);
        }
    }

    fn check(&mut self) {
        for first in (0..Self::BLOCKS).step_by(Self::SPAN as usize) {
            let read = self.nbd.read(first * BLOCK, (Self::SPAN * BLOCK) as u32);
            for (block, data) in (first..).zip(read.chunks_exact(BLOCK as usize)) {
                assert!(
                    data == content(block, self.stamps[block as usize]),
                    "block {block} differs"
                );
            }
        }
    }
}

fn content(block: u64, stamp: u64) -> Vec<u8> {
    let mut data = vec![0; BLOCK as usize];
    if stamp != 0 {
        Random::new(block ^ stamp << 20).fill(&mut data);
    }
    data
}

/// A node is away until it is ejected, so that it is compared when it comes back. What differs is known: blocks that were
/// written once while it was away, and trims.
#[test]
fn a_resync_moves_what_differs_and_no_more() {
    let _turn = heavy();
    let mut dev = start_with(DevOptions::new(cairn()).volumes(&["demo:64M"]));
    let mut volume = Scattered {
        nbd: connect(&dev),
        stamps: vec![0; Scattered::BLOCKS as usize],
        next: 0,
    };
    volume.fill();
    let line = dev.kill("node-2");
    let (mut place, mut trims) = (2000, 0);
    let ejected = wait_until(WHOLE_BOUND, || {
        for _ in 0..100 {
            if place < 6000 {
                volume.write(place);
                place += 1;
            }
        }
        if trims < 500 {
            volume.trim(trims);
            trims += 1;
        }
        events(&dev).contains_key("ejected")
    });
    assert!(ejected, "{:?}", events(&dev));
    let differs = ((place - 2000) * BLOCK) as f64;
    let before = metric(&dev, "export", COPIED_BYTES);
    dev.restart("node-2", &line);
    // Writes that go on meanwhile are the joiner's from the first moment on: they are no part of the resync.
    let mut live = 0;
    let admitted = wait_until(WHOLE_BOUND, || {
        volume.write(8000 + live % 200);
        live += 1;
        events(&dev).contains_key("admitted")
    });
    assert!(admitted, "{:?}", events(&dev));
    let copied = metric(&dev, "export", COPIED_BYTES) - before;
    eprintln!(
        "{:.0} blocks and {trims} trims differed, {live} writes went on, {:.3} times the bytes that differed were copied",
        differs / BLOCK as f64,
        copied / differs
    );
    assert!(
        differs > 0.0 && copied >= differs,
        "{copied} of {differs} bytes were copied"
    );
    assert!(
        copied <= differs * 1.2,
        "{copied} bytes were copied, {differs} differed"
    );
    volume.check();
}
