//! The power of all nodes is cut under load, each on a device that loses what was not flushed: nothing acknowledged is lost.

use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cairn_chaos::live::cluster::{Cluster as Parts, ClusterOptions, Part};
use cairn_chaos::live::dev::{Dev, DevOptions};
use cairn_chaos::live::inject::shim::{CutBy, Shim};
use cairn_chaos::live::meta_disk::MetaDisk;
use cairn_chaos::live::tools;

use crate::support::nbd::Nbd;
use crate::support::stamped::Stamped;
use crate::support::{cairn, cluster_dir, heavy};

/// Bytes of each node's device.
const DEVICE_BYTES: u64 = 1 << 30;
/// As `cairn dev` calls a node's device.
const DEVICE: &str = "device-1";
const NODES: usize = 3;

/// A cluster of which every node's device is behind a shim.
struct Cluster {
    // In this order: the mounts go before the directory that they are in.
    shims: Vec<Shim>,
    dev: Option<Dev>,
    backings: tempfile::TempDir,
    options: DevOptions,
}

/// Whether shims can be mounted here.
fn can_mount() -> bool {
    let fuse = Path::new("/dev/fuse").exists() || tools::skip("needs /dev/fuse");
    fuse && (rustix::process::geteuid().is_root() || tools::available(&[("fusermount3", "fuse3")]))
}

impl Cluster {
    fn start(volume: &str) -> Cluster {
        let options = DevOptions::new(cairn()).volumes(&[volume]);
        let dir = cluster_dir();
        let backings = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let shims = (1..=NODES).map(|node| {
            let backing = backings.path().join(format!("node-{node}"));
            File::create(&backing).unwrap().set_len(DEVICE_BYTES).unwrap();
            let mount = dir.path().join(format!("node-{node}"));
            std::fs::create_dir(&mount).unwrap();
            Shim::start_as(DEVICE, &backing, &mount, node as u64).unwrap()
        });
        let mut cluster = Cluster {
            shims: shims.collect(),
            dev: None,
            backings,
            options,
        };
        let dev = Dev::start(cluster.options.clone(), dir).unwrap_or_else(|error| panic!("{error}"));
        cluster.dev = Some(dev);
        cluster
    }

    fn attach(&self) -> Nbd {
        let socket = self.dev.as_ref().expect("it runs").socket();
        Nbd::connect(&socket, "demo").unwrap()
    }

    fn cut(&self, by: CutBy) {
        for shim in &self.shims {
            shim.power_cut(by).unwrap();
        }
    }

    /// Kills whatever runs, cuts the power (again), and starts all anew.
    fn cycle(&mut self, by: CutBy) {
        let dir = self.dev.take().expect("it runs").kill_all();
        dir.kill_all();
        self.cut(by);
        for shim in &self.shims {
            shim.power_on();
        }
        let dev = Dev::start(self.options.clone(), dir).unwrap_or_else(|error| panic!("{error}"));
        self.dev = Some(dev);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for shim in &self.shims {
                eprintln!(
                    "{}: {}",
                    shim.device().display(),
                    shim.obey("status").unwrap_or_default()
                );
            }
            eprintln!("backing files are in {}", self.backings.path().display());
        }
    }
}

/// In turns: the power goes at the very moment of an acknowledgement, and in the middle of several writers' load.
#[test]
fn what_was_acknowledged_survives_power_cuts_of_all_nodes() {
    if !can_mount() {
        return;
    }
    let _turn = heavy();
    let mut cluster = Cluster::start("demo:128M");
    let mut regions: Vec<Stamped> = (0..4).map(|i| Stamped::new(i * 1000, 200, 100 + i)).collect();
    for round in 0..6u64 {
        let mut nbd = cluster.attach();
        for _ in 0..30 {
            regions[0].step(&mut nbd).unwrap();
        }
        if round % 2 == 0 {
            // Nothing but an acknowledgement lies between.
            cluster.cut(CutBy::Seed(round));
        } else {
            under_load(&cluster, &mut regions, || cluster.cut(CutBy::LoseAll));
        }
        cluster.cycle(CutBy::Seed(round));
        let mut nbd = cluster.attach();
        for region in &mut regions {
            region.check(&mut nbd);
        }
    }
    let lost: u64 = cluster.shims.iter().map(|shim| shim.counters().cut_lost).sum();
    assert!(lost > 0, "no power cut lost a sector: they showed nothing");
}

/// Calls `then` while all regions are written to, which ends when their connections break.
fn under_load(cluster: &Cluster, regions: &mut [Stamped], then: impl FnOnce()) {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for region in regions {
            let mut nbd = cluster.attach();
            let over = &over;
            scope.spawn(move || -> io::Result<()> {
                while !over.load(Ordering::Acquire) {
                    region.step(&mut nbd)?;
                }
                Ok(())
            });
        }
        std::thread::sleep(std::time::Duration::from_millis(700));
        let dev = cluster.dev.as_ref().expect("it runs");
        // The export first: what guests are told after a power cut of all nodes is another test's matter.
        for part in ["export", "node-1", "node-2", "node-3"] {
            cairn_chaos::live::process::signal(dev.pid(part), rustix::process::Signal::KILL);
        }
        then();
        over.store(true, Ordering::Release);
    });
}

/// That the test above would find it: devices that call lost flushes done are as bad as a node that acknowledges before it flushes.
#[test]
fn an_acknowledgement_before_the_flush_is_found_by_a_power_cut() {
    if !can_mount() {
        return;
    }
    let _turn = heavy();
    let mut cluster = Cluster::start("demo:128M");
    let mut stamped = Stamped::new(0, 200, 1);
    let mut nbd = cluster.attach();
    stamped.write_all(&mut nbd).unwrap();
    for shim in &cluster.shims {
        shim.add("flush lose".parse().unwrap()).unwrap();
    }
    stamped.write_all(&mut nbd).unwrap();
    cluster.cut(CutBy::LoseAll);
    drop(nbd);
    for shim in &cluster.shims {
        shim.heal();
    }
    cluster.cycle(CutBy::LoseAll);
    let mut nbd = cluster.attach();
    let checked = catch_unwind(AssertUnwindSafe(|| stamped.check(&mut nbd)));
    assert!(checked.is_err(), "acknowledged writes were lost, and nobody noticed");
}

/// `sled` calls a write flushed that is in the cache of the device: a metadata server must not.
#[test]
fn what_a_metadata_server_has_acknowledged_survives_the_power_failure_of_all_of_them() {
    let can_attach = rustix::process::geteuid().is_root() && Path::new("/dev/loop-control").exists();
    if !can_mount() || !(can_attach || tools::skip("needs root and loop devices")) {
        return;
    }
    if !tools::available(&[("losetup", "mount"), ("mkfs.ext4", "e2fsprogs")]) {
        return;
    }
    let _turn = heavy();
    let dir = tempfile::tempdir_in(std::env::temp_dir()).unwrap();
    let mut disk = MetaDisk::new(dir.path(), "meta-1", 1).unwrap();
    let mut parts = Parts::new(ClusterOptions {
        program: cairn().into(),
        dir: dir.path().to_path_buf(),
        metas: 1,
        nodes: 3,
        device_bytes: 64 << 20,
        rebuild_after: Duration::from_secs(600),
        env: Vec::new(),
    })
    .unwrap();
    parts.use_meta_dir(1, disk.path());
    parts.begin().unwrap();
    let mut created = Vec::new();
    for round in 0..6 {
        let name = format!("volume-{round}");
        parts.create_volume(&name, "16M").unwrap();
        created.push(name);
        parts.kill(&[Part::Meta(1)]);
        disk.power_cut(CutBy::LoseAll).unwrap();
        disk.restore().unwrap();
        parts.start(Part::Meta(1)).unwrap();
        let well = parts.wait_well(Duration::from_secs(60));
        assert!(well.is_ok(), "after power failure {round}: {well:?}");
        let listed = parts.ask(&["volume", "list"]);
        let listed: Vec<&str> = listed.json["volumes"]
            .as_array()
            .unwrap_or_else(|| panic!("{listed:?}"))
            .iter()
            .filter_map(|volume| volume["name"].as_str())
            .collect();
        assert_eq!(listed, created, "after power failure {round}");
    }
}
