//! The contract of `cairn dev`: what tools outside this project rely on.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use cairn_chaos::live::dev::{Dev, DevOptions};
use cairn_chaos::live::nbd::{FLAG_FLUSH, FLAG_FUA, FLAG_MULTI_CONN, FLAG_TRIM, FLAG_WRITE_ZEROES};
use cairn_chaos::live::process;
use cairn_chaos::live::wait::wait_until;
use rustix::process::Signal;

use crate::support::nbd::Nbd;
use crate::support::stamped::Stamped;
use crate::support::{cairn, cluster_dir, heavy, run, start, start_with};

const BOUND: Duration = Duration::from_secs(60);

#[test]
fn it_prints_where_each_volume_is_and_leaves_files_that_tools_find() {
    let dev = start(&["demo:256M", "second:64M"]);
    let printed = dev.printed();
    for volume in ["demo", "second"] {
        let line = format!("ready nbd+unix:///{volume}?socket={}", dev.socket().display());
        assert!(printed.contains(&line), "no line `{line}` in {printed:#?}");
    }
    assert_eq!(printed.last().map(String::as_str), Some("cluster ready"));

    let parts: BTreeSet<String> = dev.pids().into_keys().collect();
    let wanted = ["export", "meta-1", "meta-2", "meta-3", "node-1", "node-2", "node-3"];
    assert_eq!(parts, BTreeSet::from(wanted.map(String::from)));
    for (part, pid) in dev.pids() {
        assert!(
            process::is_running(pid),
            "{part} has a pid file, and process {pid} does not run"
        );
        let log = dev.path().join("log").join(format!("{part}.log"));
        assert!(log.is_file(), "{part} has no {}", log.display());
    }
    for node in 1..=3 {
        let devices = std::fs::read_dir(dev.path().join(format!("node-{node}"))).unwrap();
        assert_ne!(devices.count(), 0, "node {node} has no device");
    }
    run(&mut dev.cairn(&["status"])).expect_success();

    for (volume, bytes) in [("demo", 256 << 20), ("second", 64 << 20)] {
        let nbd = Nbd::connect(&dev.socket(), volume).unwrap();
        assert_eq!(nbd.size, bytes);
        let wanted = FLAG_FLUSH | FLAG_FUA | FLAG_TRIM | FLAG_WRITE_ZEROES | FLAG_MULTI_CONN;
        assert_eq!(nbd.flags & wanted, wanted);
    }
}

#[test]
fn it_stops_cleanly_and_comes_back_with_all_data() {
    let mut dev = start(&["demo:64M", "second:64M"]);
    let mut parts = [("demo", Stamped::new(0, 64, 1)), ("second", Stamped::new(100, 64, 2))];
    for signal in [Signal::TERM, Signal::INT] {
        for (volume, stamped) in &mut parts {
            let mut nbd = Nbd::connect(&dev.socket(), volume).unwrap();
            stamped.write_all(&mut nbd).unwrap();
        }
        let (status, dir) = dev.stop(signal);
        assert_eq!(status.code(), Some(0), "after {signal:?}");
        assert_eq!(
            process::of_dir(dir.path()),
            [] as [i32; 0],
            "processes are left after {signal:?}"
        );
        let options = DevOptions::new(cairn()).volumes(&["demo:64M", "second:64M"]);
        dev = Dev::start(options, dir).unwrap();
        for (volume, stamped) in &mut parts {
            stamped.check(&mut Nbd::connect(&dev.socket(), volume).unwrap());
        }
    }
}

/// Everything is killed in the middle of writes, three times over; afterwards each block holds what was acknowledged or
/// issued later, and goes on holding it.
#[test]
fn everything_acknowledged_survives_a_kill_of_everything() {
    let _turn = heavy();
    let mut dev = start(&["demo:256M"]);
    let mut writers: Vec<Stamped> = (0..4).map(|w| Stamped::new(w * 4096, 256, w + 1)).collect();
    for round in 0..3 {
        let socket = dev.socket();
        let (killed, steps) = (AtomicBool::new(false), AtomicU64::new(0));
        dev = std::thread::scope(|scope| {
            let mut handles = Vec::new();
            for stamped in &mut writers {
                let (socket, killed, steps) = (&socket, &killed, &steps);
                handles.push(scope.spawn(move || {
                    let mut nbd = Nbd::connect(socket, "demo").unwrap();
                    while stamped.step(&mut nbd).is_ok() {
                        steps.fetch_add(1, Ordering::SeqCst);
                    }
                    assert!(
                        killed.load(Ordering::SeqCst),
                        "the connection broke before anything was killed"
                    );
                }));
            }
            let busy = wait_until(BOUND, || steps.load(Ordering::SeqCst) >= 300 + 77 * round);
            assert!(busy, "only {steps:?} writes in {BOUND:?}");
            killed.store(true, Ordering::SeqCst);
            let dir = dev.kill_all();
            for handle in handles {
                handle.join().unwrap();
            }
            Dev::start(DevOptions::new(cairn()).volumes(&["demo:256M"]), dir).unwrap_or_else(|error| panic!("{error}"))
        });
        let mut nbd = Nbd::connect(&dev.socket(), "demo").unwrap();
        for _ in 0..2 {
            writers.iter_mut().for_each(|stamped| stamped.check(&mut nbd));
        }
    }
}

#[test]
fn a_process_that_dies_is_started_again_only_with_supervise() {
    for supervise in [false, true] {
        let args: &[&str] = if supervise { &["--supervise"] } else { &[] };
        let mut dev = start_with(DevOptions::new(cairn()).volumes(&["demo:64M"]).args(args));
        let mut nbd = Nbd::connect(&dev.socket(), "demo").unwrap();
        nbd.write(0, &[1; 8192]);
        let before = dev.pid("node-2");
        dev.kill("node-2");
        let bound = if supervise { BOUND } else { Duration::from_secs(3) };
        let back = wait_until(bound, || {
            let pids = dev.pids();
            pids.get("node-2")
                .is_some_and(|pid| *pid != before && process::is_running(*pid))
        });
        assert_eq!(back, supervise);
        // Either way the volume is as usable as before.
        nbd.write(4096, &[2; 8192]);
        assert_eq!(nbd.read(0, 8192), [[1; 4096], [2; 4096]].concat());
    }
}

#[test]
fn a_second_one_on_the_same_directory_is_refused_and_does_no_harm() {
    let dev = start(&["demo:64M"]);
    let mut nbd = Nbd::connect(&dev.socket(), "demo").unwrap();
    nbd.write(0, &[5; 4096]);
    let mut second = std::process::Command::new(cairn());
    let ran = run(second.arg("dev").arg("--dir").arg(dev.path()));
    assert_eq!(ran.status.code(), Some(7), "{ran:?}");
    assert!(
        ran.err.contains(&*dev.path().to_string_lossy()),
        "it says which directory: {ran:?}"
    );
    assert_eq!(nbd.read(0, 4096), [5; 4096]);
    for (part, pid) in dev.pids() {
        assert!(process::is_running(pid), "{part} still runs");
    }
}

#[test]
fn a_volume_that_can_not_be_made_ends_the_start_with_words_and_no_process() {
    for (volume, words) in [("demo:0", "size"), ("demo:300T", "256 TiB"), ("a b:64M", "name")] {
        let error = Dev::start(DevOptions::new(cairn()).volumes(&[volume]), cluster_dir()).unwrap_err();
        assert!(error.status.is_some_and(|status| !status.success()), "{error}");
        assert!(
            error.to_string().contains(words),
            "{volume} should mention `{words}`: {error}"
        );
    }
}
