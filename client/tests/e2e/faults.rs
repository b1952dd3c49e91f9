//! Parts of the cluster die, freeze and come back while it is used: no error, no mismatch, nothing stale.

use std::time::Duration;

use cairn_chaos::live::dev::Dev;
use cairn_chaos::live::fio::{self, Target};
use cairn_chaos::live::process;
use cairn_chaos::live::tools;
use cairn_chaos::live::wait::wait_for;

use crate::support::cluster::{WHOLE_BOUND, is_healthy, wait_healthy};
use crate::support::nbd::Nbd;
use crate::support::stamped::Stamped;
use crate::support::{heavy, run, start};

/// The part that leads the metadata servers: `meta-2`.
fn meta_leader(dev: &Dev) -> String {
    let leader = wait_for(WHOLE_BOUND, || {
        let ran = run(&mut dev.cairn(&["status", "--json"]));
        let status: serde_json::Value = serde_json::from_str(&ran.out).ok()?;
        status["leader_id"].as_u64()
    });
    format!("meta-{}", leader.expect("the metadata servers elect a leader"))
}

/// A connection to a volume that is attached, and stays so as long as the connection is held.
fn attached(dev: &Dev, volume: &str) -> Nbd {
    let mut nbd = Nbd::connect(&dev.socket(), volume).unwrap();
    nbd.read(0, 4096);
    nbd
}

/// One node and then the metadata servers' leader are killed and started again under every kind of load.
#[test]
fn fio_verifies_all_it_wrote_while_a_node_and_the_meta_leader_die() {
    if !tools::available(&[("fio", "fio")]) {
        return;
    }
    let _turn = heavy();
    let mut dev = start(&["small:128M", "mixed:256M", "trimmed:64M"]);
    // As a running VM does: an attachment that is held takes no notice of a node that is away.
    let _attached: Vec<Nbd> = ["small", "mixed", "trimmed"]
        .map(|volume| attached(&dev, volume))
        .into();
    let [on_small, on_mixed, on_trimmed] = ["small", "mixed", "trimmed"].map(|volume| Target::Nbd(dev.uri(volume)));
    let verify = ["--verify=crc32c", "--verify_fatal=1", "--do_verify=1"];
    let start = |name: &str, target: &Target, args: &[&str]| fio::start(name, target, &[&verify[..], args].concat());
    let timed = ["--time_based", "--runtime=25", "--verify_backlog=512"];
    let small = ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=128M"];
    let mixed = [
        "--rw=randwrite",
        "--bssplit=512/20:4k/40:12k/20:128k/20",
        "--iodepth=8",
        "--size=256M",
    ];
    // One I/O at a time per job: fio does not order a trim before the write that follows it to the same place.
    let trimmed = [
        "--rw=randtrimwrite",
        "--bs=16k",
        "--iodepth=1",
        "--numjobs=2",
        "--offset_increment=32M",
        "--size=32M",
    ];
    let mut running = vec![
        start("small", &on_small, &[&small[..], &timed].concat()),
        start("mixed", &on_mixed, &[&mixed[..], &timed].concat()),
        start("trimmed", &on_trimmed, &trimmed),
    ];

    let line = dev.kill("node-2");
    assert!(
        running.iter_mut().all(fio::Running::is_running),
        "fio runs when the node dies"
    );
    std::thread::sleep(Duration::from_secs(4));
    dev.restart("node-2", &line);
    wait_healthy(&dev);
    let leader = meta_leader(&dev);
    let line = dev.kill(&leader);
    std::thread::sleep(Duration::from_secs(2));
    dev.restart(&leader, &line);
    assert!(running[0].is_running(), "fio runs until after the leader died");
    for run in running {
        run.finish(WHOLE_BOUND).unwrap_or_else(|error| panic!("{error}"));
    }
    wait_healthy(&dev);
    // Once more, all at rest, and with the node that was away as one of two that are left.
    dev.kill("node-1");
    let check = ["--rw=randwrite", "--bs=4k", "--iodepth=32", "--size=32M"];
    start("again", &on_small, &check)
        .finish(WHOLE_BOUND)
        .unwrap_or_else(|error| panic!("{error}"));
}

/// One replica misses writes; then everything is killed. Whichever node is out of reach afterwards, and whichever is
/// asked first, no read returns what the lagging replica still had.
#[test]
fn nothing_stale_is_read_when_everything_dies_while_a_replica_lags() {
    let _turn = heavy();
    let mut dev = start(&["demo:128M"]);
    let mut stamped = Stamped::new(0, 512, 3);
    let mut nbd = attached(&dev, "demo");
    stamped.write_all(&mut nbd).unwrap();
    for lagging in ["node-1", "node-2", "node-3"] {
        // Frozen, not killed: it keeps what it had, and its connections.
        process::freeze(dev.pid(lagging));
        for _ in 0..150 {
            stamped.step(&mut nbd).unwrap();
        }
        dev = dev.kill_all_and_start_again().unwrap();
        nbd = attached(&dev, "demo");
        stamped.check(&mut nbd);
        // Any two must do, the lagging one among them.
        for away in ["node-1", "node-2", "node-3"] {
            process::freeze(dev.pid(away));
            stamped.check(&mut nbd);
            process::resume(dev.pid(away));
            wait_healthy(&dev);
        }
    }
}

/// A node is killed, misses writes, comes back, and then has to carry the volume with either of the others.
#[test]
fn a_node_that_was_away_becomes_complete_again() {
    let _turn = heavy();
    let mut dev = start(&["demo:128M"]);
    let mut stamped = Stamped::new(1000, 512, 4);
    let mut nbd = Nbd::connect(&dev.socket(), "demo").unwrap();
    stamped.write_all(&mut nbd).unwrap();
    let line = dev.kill("node-3");
    for _ in 0..200 {
        stamped.step(&mut nbd).unwrap();
    }
    dev.restart("node-3", &line);
    for _ in 0..100 {
        stamped.step(&mut nbd).unwrap();
    }
    wait_healthy(&dev);
    for away in ["node-1", "node-2"] {
        let line = dev.kill(away);
        stamped.check(&mut nbd);
        for _ in 0..50 {
            stamped.step(&mut nbd).unwrap();
        }
        dev.restart(away, &line);
        wait_healthy(&dev);
    }
    stamped.check(&mut nbd);
}

/// A volume is attached, with a node missing, from nothing: it is served within seconds by those that are there, and the
/// missing one is filled up when it is back.
#[test]
fn a_volume_is_attached_without_a_node_and_that_is_filled_up_when_it_is_back() {
    let _turn = heavy();
    let mut dev = start(&["demo:64M"]);
    let mut stamped = Stamped::new(0, 256, 6);
    let mut nbd = Nbd::connect(&dev.socket(), "demo").unwrap();
    stamped.write_all(&mut nbd).unwrap();
    drop(nbd);
    let line = dev.kill("node-2");
    let mut nbd = Nbd::connect(&dev.socket(), "demo").unwrap();
    stamped.check(&mut nbd);
    for _ in 0..200 {
        stamped.step(&mut nbd).unwrap();
    }
    let stale = |dev: &Dev| {
        let ran = run(&mut dev.cairn(&["volume", "show", "demo", "--json"])).expect_success();
        let shown: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
        let groups = shown["group_list"].as_array().unwrap().clone();
        groups
            .iter()
            .map(|group| group["stale"].as_array().unwrap().len())
            .sum::<usize>()
    };
    assert_eq!(stale(&dev), 1, "the copy on the dead node is known to be stale");
    assert!(!is_healthy(&dev));
    dev.restart("node-2", &line);
    wait_healthy(&dev);
    assert_eq!(stale(&dev), 0);
    // It carries the volume with either of the others.
    for away in ["node-1", "node-3"] {
        let line = dev.kill(away);
        stamped.check(&mut nbd);
        dev.restart(away, &line);
        wait_healthy(&dev);
    }
}

/// With every metadata server dead, an attached volume reads and writes on; when they are back, all is well.
#[test]
fn an_attached_volume_needs_no_metadata_server() {
    let _turn = heavy();
    let mut dev = start(&["demo:64M"]);
    let mut stamped = Stamped::new(0, 256, 5);
    let mut nbd = Nbd::connect(&dev.socket(), "demo").unwrap();
    stamped.write_all(&mut nbd).unwrap();
    let metas = ["meta-1", "meta-2", "meta-3"];
    let lines = metas.map(|meta| dev.kill(meta));
    for _ in 0..200 {
        stamped.step(&mut nbd).unwrap();
    }
    stamped.check(&mut nbd);
    let ran = run(&mut dev.cairn(&["status"]));
    assert_eq!(ran.status.code(), Some(5), "unreachable: {ran:?}");
    for (meta, line) in metas.iter().zip(&lines) {
        dev.restart(meta, line);
    }
    wait_healthy(&dev);
    stamped.check(&mut nbd);
}
