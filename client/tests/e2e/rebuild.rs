//! A node goes for good, or for a while: its copies are made anew on another one, or get what they have missed and no more.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use cairn_chaos::live::dev::{Dev, DevOptions};
use cairn_chaos::live::process::CommandLine;
use cairn_chaos::live::wait::{wait_for, wait_until};

use crate::support::cluster::{
    WHOLE_BOUND, assert_on_device, events, held_on, is_held, json, log_of, metric, settled_hosts, wait_healthy,
};
use crate::support::nbd::Nbd;
use crate::support::stamped::{BLOCK, Stamped};
use crate::support::{Random, cairn, heavy, run, start_with};

/// What data was copied through the holder of a volume.
const COPIED_BYTES: &str = "cairn_client_copied_bytes_total";
/// What data a node has read from others.
const FETCHED_BYTES: &str = "cairn_node_fetched_bytes_total";
/// First block and count of the parts of the volume that are written: in two chunks.
const REGIONS: [(u64, u64); 2] = [(0, 800), (20_000, 800)];

/// A cluster of four nodes, which rebuilds what is gone for so long.
fn start_four(rebuild_after: &str) -> Dev {
    let args = ["--nodes", "4", "--rebuild-after", rebuild_after];
    start_with(DevOptions::new(cairn()).volumes(&["demo:128M"]).args(&args))
}

/// Bytes that were copied to a node: through the holder, and from other nodes.
#[derive(Clone, Copy, Debug)]
struct Copied {
    through: f64,
    fetched: f64,
}

impl Copied {
    fn to(dev: &Dev, node: &str) -> Copied {
        Copied {
            through: metric(dev, "export", COPIED_BYTES),
            fetched: metric(dev, node, FETCHED_BYTES),
        }
    }

    fn all(self) -> f64 {
        self.through + self.fetched
    }

    /// As good as all of it went from node to node.
    fn assert_from_node_to_node(self) {
        assert!(self.fetched > 0.0 && self.through <= self.all() / 20.0, "{self:?}");
    }
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
    let copied = Copied {
        through: metric(&dev, "export", COPIED_BYTES) - before,
        fetched: metric(&dev, &away, FETCHED_BYTES),
    };
    copied.assert_from_node_to_node();
    let copied = copied.all();
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

/// The copies in sync that the groups of the volume have at the least; 3 while that can't be asked.
fn in_sync_copies(dev: &Dev) -> u64 {
    let shown = json(dev, &["volume", "show", "demo"]);
    let groups = shown["health"]["groups"].as_array();
    let counts = groups
        .into_iter()
        .flatten()
        .filter_map(|group| group["copies_in_sync"].as_u64());
    counts.min().unwrap_or(3)
}

/// A storage node is started beside those of the cluster, with a configuration like theirs: that is all that it takes.
fn add_node(dev: &mut Dev, like: &str, name: &str) {
    let config = |name: &str| dev.path().join("conf").join(format!("{name}.toml"));
    let listener = || std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let own = |line: &str| match line.split_once(" = ") {
        Some((key @ ("listen" | "metrics"), _)) => format!("{key} = \"{}\"", listener().local_addr().unwrap()),
        _ => line.replace(like, name),
    };
    let text = std::fs::read_to_string(config(like)).unwrap();
    let text: Vec<String> = text.lines().map(own).collect();
    std::fs::write(config(name), text.join("\n")).unwrap();
    std::fs::create_dir(dev.path().join(name)).unwrap();
    let mut line = CommandLine::of(dev.pid(like)).expect("it runs");
    for arg in &mut line.args {
        if *arg == *config(like) {
            *arg = config(name).into();
        }
    }
    dev.restart(name, &line);
}

#[test]
fn a_node_that_is_added_takes_over_all_of_one_that_is_drained_under_load_and_no_copy_is_missing_at_any_time() {
    // More than the store's log ever takes, so that used space tells whether data is held.
    const FILLER: std::ops::Range<u64> = 25_000..55_000;
    const SPAN: u64 = 250;
    let _turn = heavy();
    let mut dev = start_with(DevOptions::new(cairn()).volumes(&["demo:256M"]));
    let (gone, wanted) = ("node-2", ["node-1", "node-3", "node-4"].map(str::to_string));
    let mut regions = regions(25);
    let mut nbd = connect(&dev);
    for region in &mut regions {
        region.write_all(&mut nbd).unwrap();
    }
    for first in FILLER.step_by(SPAN as usize) {
        let data: Vec<u8> = (first..first + SPAN).flat_map(|block| content(block, 1)).collect();
        nbd.write(first * BLOCK, &data);
    }
    let drain = |dev: &Dev| run(&mut dev.cairn(&["node", "drain", gone, "--yes"]));
    let refused = drain(&dev);
    assert!(
        !refused.status.success() && refused.err.contains("add a node"),
        "{refused:#?}"
    );
    assert_eq!(
        json(&dev, &["status"])["drains"],
        serde_json::json!([]),
        "nothing was changed"
    );
    under_load(&mut dev, &mut regions, |dev| {
        add_node(dev, "node-3", "node-4");
        assert!(
            wait_until(WHOLE_BOUND, || drain(dev).status.success()),
            "{:#?}",
            drain(dev)
        );
        // What was asked for is remembered by the metadata servers, not by who leads.
        let metas = ["meta-1", "meta-2", "meta-3"];
        let lines = metas.map(|meta| dev.kill(meta));
        for (meta, line) in metas.iter().zip(&lines) {
            dev.restart(meta, line);
        }
        let state = |dev: &Dev| json(dev, &["status"])["drains"][0]["state"].clone();
        let empty = wait_until(WHOLE_BOUND, || {
            let is_empty = state(dev) == "empty";
            assert!(in_sync_copies(dev) >= 3, "a copy is missing");
            is_empty
        });
        assert!(empty, "{}", json(dev, &["status"]));
        wait_hosts(dev, &BTreeSet::from(wanted.clone()));
    });
    assert_eq!(metric(&dev, "export", "cairn_client_operation_errors_total"), 0.0);
    let kinds = events(&dev);
    assert!(
        !kinds.contains_key("replaced") && kinds.contains_key("moving"),
        "{kinds:?}"
    );
    drop(nbd);
    let used = || json(&dev, &["node", "show", gone])["devices"][0]["used_bytes"].as_u64();
    // What is left is the store's own: records of its log, which go with the next checkpoint.
    let filled = (FILLER.end - FILLER.start) * BLOCK;
    let dropped = wait_until(WHOLE_BOUND, || used().is_some_and(|bytes| bytes < filled / 2));
    assert!(dropped, "{gone} holds {:?}", used());
    wait_healthy(&dev);
    dev.kill(gone);
    assert!(held_on(&dev, gone).is_empty(), "{:?}", held_on(&dev, gone));
    assert_equal_copies(&mut dev, &mut regions, &BTreeSet::from(wanted), "node-4");
}

/// Steps on a region until told to stop; when the connection breaks it is made anew, as guests do. How often it was.
fn step_over_reconnects(socket: &Path, region: &mut Stamped, over: &AtomicBool) -> u32 {
    let mut connections = 0;
    while !over.load(Ordering::Acquire) {
        let Some(mut nbd) = wait_for(WHOLE_BOUND, || Nbd::connect(socket, "demo").ok()) else {
            panic!("nobody serves the volume");
        };
        connections += 1;
        // An error that the server reports is a panic; a broken connection ends the loop.
        while !over.load(Ordering::Acquire) && region.step(&mut nbd).is_ok() {}
    }
    connections
}

/// The export dies in the middle of a rebuild. Whoever goes on compares, and copies only what is not there yet.
#[test]
fn a_rebuild_goes_on_from_where_it_was_when_the_export_is_started_again() {
    const FILLED: u64 = 32_768;
    const SPAN: u64 = 256;
    let _turn = heavy();
    let args = ["--nodes", "4", "--rebuild-after", "3s"];
    let mut dev = start_with(DevOptions::new(cairn()).volumes(&["demo:256M"]).args(&args));
    let (hosts, spare) = hosts(&dev);
    let gone = hosts.first().expect("three hosts").clone();
    let data = |first: u64| -> Vec<u8> { (first..first + SPAN).flat_map(|block| content(block, 1)).collect() };
    let mut nbd = connect(&dev);
    for first in (0..FILLED).step_by(SPAN as usize) {
        nbd.write(first * BLOCK, &data(first));
    }
    drop(nbd);
    let mut region = Stamped::new(FILLED + 1000, 200, 31);
    let over = AtomicBool::new(false);
    let filled = (FILLED * BLOCK) as f64;
    dev.kill(&gone);
    let socket = dev.socket();
    let ((before, after), connections) = std::thread::scope(|scope| {
        let load = scope.spawn(|| step_over_reconnects(&socket, &mut region, &over));
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let begun = wait_for(WHOLE_BOUND, || {
                Some(Copied::to(&dev, &spare)).filter(|copied| copied.all() > filled / 4.0)
            });
            let begun = begun.expect("the rebuild begins");
            let line = dev.kill("export");
            assert!(!events(&dev).contains_key("admitted"), "it was over after {begun:?}");
            dev.restart("export", &line);
            wait_hosts(&dev, &replaced(&hosts, &gone, &spare));
            // The export counts anew, and the node goes on.
            let ended = Copied::to(&dev, &spare);
            (begun.through, ended)
        }));
        over.store(true, Ordering::Release);
        let connections = load.join().unwrap();
        match ended {
            Ok(ended) => (ended, connections),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    });
    after.assert_from_node_to_node();
    let after = after.all();
    eprintln!("{before} and {after} bytes were copied of {filled}, over {connections} connections");
    assert!(connections >= 2, "the guest saw no restart");
    assert!(
        before + after < filled * 1.4,
        "{before} and {after} bytes were copied of {filled}"
    );
    assert_eq!(metric(&dev, "export", "cairn_client_operation_errors_total"), 0.0);
    let mut nbd = connect(&dev);
    region.check(&mut nbd);
    for first in (0..FILLED).step_by(SPAN as usize) {
        let read = nbd.read(first * BLOCK, (SPAN * BLOCK) as u32);
        assert!(read == data(first), "blocks from {first} on differ");
    }
    assert_on_device(&dev, &spare, &mut nbd, 0..2048);
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
    let copied = Copied {
        through: metric(&dev, "export", COPIED_BYTES) - before,
        fetched: metric(&dev, "node-2", FETCHED_BYTES),
    };
    eprintln!("{copied:?}");
    copied.assert_from_node_to_node();
    let copied = copied.all();
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
