//! Metadata servers are added and removed while volumes are in use.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cairn_chaos::live::cluster::{Cluster, ClusterOptions, Part, Said};
use cairn_chaos::live::wait::wait_until;

use crate::support::nbd::Nbd;
use crate::support::stamped::Stamped;
use crate::support::{cairn, heavy};

const BOUND: Duration = Duration::from_secs(60);
/// What a guest may wait for while metadata servers come and go: volumes in use do not need them.
const PAUSE_MAX: Duration = Duration::from_secs(10);

fn cluster(dir: &std::path::Path) -> Cluster {
    Cluster::new(ClusterOptions {
        program: cairn().into(),
        dir: dir.to_path_buf(),
        metas: 3,
        nodes: 3,
        device_bytes: 256 << 20,
        rebuild_after: Duration::from_secs(600),
        env: Vec::new(),
    })
    .unwrap()
}

fn attach(cluster: &Cluster, volume: &str) -> Nbd {
    let mut nbd = None;
    let is_there = wait_until(BOUND, || {
        nbd = Nbd::connect(&cluster.socket(1), volume).ok();
        nbd.is_some()
    });
    assert!(is_there, "nobody serves {volume}");
    nbd.unwrap()
}

/// The metadata servers, as they say: number, and whether it is up.
fn listed(cluster: &Cluster) -> Vec<(u8, bool)> {
    let said = cluster.ask(&["meta", "list"]);
    let members = said.json["members"].as_array().cloned().unwrap_or_default();
    let member = |member: &serde_json::Value| Some((member["id"].as_u64()? as u8, member["alive"].as_bool()?));
    members.iter().filter_map(member).collect()
}

fn wait_listed(cluster: &Cluster, wanted: &[u8]) {
    let wanted: Vec<(u8, bool)> = wanted.iter().map(|id| (*id, true)).collect();
    assert!(wait_until(BOUND, || listed(cluster) == wanted), "{:?}", listed(cluster));
}

fn add(cluster: &mut Cluster) {
    let meta = cluster.add_meta().unwrap();
    cluster.start(meta).unwrap();
}

/// Removes it; its process ends by itself, with words.
fn remove(cluster: &mut Cluster, id: u8) {
    let mut said: Option<Said> = None;
    // One that has just joined may not have all of the log yet.
    let is_removed = wait_until(BOUND, || said.insert(cluster.remove_meta(id)).is_success());
    assert!(is_removed, "{said:?}");
    let mut ended = Vec::new();
    assert!(
        wait_until(BOUND, || {
            ended.extend(cluster.ended());
            !ended.is_empty()
        }),
        "meta-{id} goes on running"
    );
    assert_eq!(ended.len(), 1, "{ended:?}");
    assert_eq!((ended[0].0, ended[0].1.code()), (Part::Meta(id), Some(6)), "{ended:?}");
    let log = std::fs::read_to_string(cluster.log(Part::Meta(id))).unwrap();
    let last = log.lines().last().unwrap_or_default();
    assert!(
        last.contains("its directory is of no use any more") || last.contains("was removed"),
        "{last}"
    );
}

/// A fourth metadata server is added, the one that leads is removed, and then all that there were at first, while a guest writes: it
/// notices nothing. An export that goes on running knows the new ones, and those who begin anew find them.
#[test]
fn metadata_servers_are_added_and_removed_one_by_one_until_all_are_others_and_no_guest_notices() {
    let _turn = heavy();
    let dir = tempfile::tempdir_in(std::env::temp_dir()).unwrap();
    let mut cluster = cluster(dir.path());
    cluster.begin().unwrap();
    for volume in ["demo", "later"] {
        cluster.create_volume(volume, "64M").unwrap();
    }
    cluster.start(Part::Export(1)).unwrap();
    let mut region = Stamped::new(0, 200, 1);
    let mut nbd = attach(&cluster, "demo");
    region.write_all(&mut nbd).unwrap();
    let over = AtomicBool::new(false);
    let longest = std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let mut longest = Duration::ZERO;
            while !over.load(Ordering::Acquire) {
                let begun = Instant::now();
                region.step(&mut nbd).unwrap();
                longest = longest.max(begun.elapsed());
            }
            longest
        });
        let ended = Ends(&over);
        wait_listed(&cluster, &[1, 2, 3]);
        add(&mut cluster);
        wait_listed(&cluster, &[1, 2, 3, 4]);
        let Some(Part::Meta(leader)) = cluster.leader() else {
            panic!("nobody leads")
        };
        let unconfirmed = cluster.ask(&["meta", "remove", &leader.to_string(), "--cluster-key", &key(&cluster)]);
        assert_eq!(unconfirmed.code, Some(6), "{unconfirmed:?}");
        assert!(unconfirmed.err.contains("which leads"), "{unconfirmed:?}");
        remove(&mut cluster, leader);
        let left: Vec<u8> = (1..=4).filter(|id| *id != leader).collect();
        wait_listed(&cluster, &left);
        let nobody = cluster.ask(&[
            "meta",
            "remove",
            &leader.to_string(),
            "--yes",
            "--cluster-key",
            &key(&cluster),
        ]);
        assert_eq!(nobody.code, Some(3), "{nobody:?}");

        // One that is needed stays; that it is needed is said, and by what.
        cluster.kill(&[Part::Meta(left[0])]);
        let is_noticed = wait_until(BOUND, || listed(&cluster).contains(&(left[0], false)));
        assert!(is_noticed, "{:?}", listed(&cluster));
        let refused = cluster.remove_meta(left[1]);
        assert_eq!(refused.code, Some(6), "{refused:?}");
        assert!(
            refused.err.contains(&format!("missing first ({})", left[0])),
            "{refused:?}"
        );
        cluster.start(Part::Meta(left[0])).unwrap();
        wait_listed(&cluster, &left);

        // All others go, too; each has a successor first. Exports report every ten seconds, and hear then who there is.
        for gone in &left[..2] {
            add(&mut cluster);
            remove(&mut cluster, *gone);
        }
        wait_listed(&cluster, &[4, 5, 6]);
        drop(ended);
        load.join().unwrap()
    });
    assert!(longest < PAUSE_MAX, "a guest waited for {longest:?}");
    // The export was started with the addresses of three servers of which none is there any more.
    let mut later = Stamped::new(0, 50, 2);
    later.write_all(&mut attach(&cluster, "later")).unwrap();
    // Nodes and exports that begin anew are told of the new ones, and read what was written.
    drop(nbd);
    let all: Vec<Part> = cluster.nodes().chain([Part::Export(1)]).collect();
    cluster.kill(&all);
    all.iter().for_each(|part| cluster.start(*part).unwrap());
    cluster
        .wait_well(BOUND)
        .unwrap_or_else(|problems| panic!("{problems:?}"));
    region.check(&mut attach(&cluster, "demo"));
    later.check(&mut attach(&cluster, "later"));
}

/// Ends the load, however the test goes on.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

fn key(cluster: &Cluster) -> String {
    cluster.dir().join("cluster.key").display().to_string()
}
