use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::time::Duration;

use rustix::fs::OFlags;

use super::*;
use crate::live::{tools, wait};

const BYTES: u64 = 16 << 20;
const BOUND: Duration = Duration::from_secs(30);

/// Whether a shim can be mounted here.
fn can_mount() -> bool {
    let root = rustix::process::geteuid().is_root();
    let fuse = Path::new("/dev/fuse").exists() || tools::skip("needs /dev/fuse");
    fuse && (root || tools::available(&[("fusermount3", "fuse3")]))
}

struct Place {
    // In this order: the mount goes before its directory.
    shim: Shim,
    backing: PathBuf,
    _dir: tempfile::TempDir,
}

fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let backing = dir.path().join("backing");
    let mount = dir.path().join("mount");
    std::fs::create_dir(&mount).unwrap();
    File::create(&backing).unwrap().set_len(BYTES).unwrap();
    let shim = Shim::start(&backing, &mount, 1).unwrap();
    Place {
        shim,
        backing,
        _dir: dir,
    }
}

fn open(shim: &Shim) -> File {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(OFlags::DIRECT.bits() as i32);
    options.open(shim.device()).unwrap()
}

#[test]
fn a_file_on_it_is_read_written_and_flushed_with_direct_io() {
    if !can_mount() {
        return;
    }
    let place = place();
    let file = open(&place.shim);
    assert_eq!(file.metadata().unwrap().len(), BYTES);
    let bytes: Vec<u8> = (0..3 << 20).map(|i: u32| (i / 512) as u8).collect();
    file.write_all_at(&bytes, 4096).unwrap();
    let mut found = vec![0; bytes.len()];
    file.read_exact_at(&mut found, 4096).unwrap();
    assert!(found == bytes);
    let below = File::open(&place.backing).unwrap();
    below.read_exact_at(&mut found, 4096).unwrap();
    assert!(found.iter().all(|byte| *byte == 0), "nothing is durable before a flush");
    file.sync_data().unwrap();
    below.read_exact_at(&mut found, 4096).unwrap();
    assert!(found == bytes);
    assert_eq!(place.shim.counters().flushes, 1);
    assert_eq!(file.read_at(&mut found, BYTES).unwrap(), 0, "behind its end is nothing");
}

#[test]
fn a_write_that_asks_for_it_is_durable_when_it_ends() {
    if !can_mount() {
        return;
    }
    let place = place();
    let file = open(&place.shim);
    let bytes = vec![7; 4096];
    let flags = rustix::io::ReadWriteFlags::DSYNC;
    let written = rustix::io::pwritev2(&file, &[io::IoSlice::new(&bytes)], 8192, flags);
    assert_eq!(written, Ok(4096));
    let mut found = vec![0; 4096];
    let below = File::open(&place.backing).unwrap();
    below.read_exact_at(&mut found, 8192).unwrap();
    assert!(found == bytes);
    assert_eq!((place.shim.counters().writes, place.shim.counters().flushes), (1, 1));
    // A flush that fails fails the write.
    place.shim.add(Rule::always(Some(Kind::Flush), Effect::Eio)).unwrap();
    let failed = rustix::io::pwritev2(&file, &[io::IoSlice::new(&bytes)], 8192, flags);
    assert_eq!(failed, Err(rustix::io::Errno::IO));
}

#[test]
fn commands_have_the_effects_they_name() {
    if !can_mount() {
        return;
    }
    let place = place();
    let (shim, file) = (&place.shim, open(&place.shim));
    let kind = |result: io::Result<()>| result.unwrap_err().raw_os_error().unwrap();
    let (eio, enospc) = (5, 28);
    shim.obey("on write enospc once").unwrap();
    assert_eq!(kind(file.write_all_at(&[1; 4096], 0)), enospc);
    file.write_all_at(&[1; 4096], 0).unwrap();
    shim.obey("on flush eio once").unwrap();
    assert_eq!(kind(file.sync_data()), eio);
    file.sync_data().unwrap();
    file.write_all_at(&[2; 4096], 4096).unwrap();
    let cut = shim.obey("power-cut 1").unwrap();
    assert!(cut.starts_with("kept "), "{cut}");
    assert_eq!(kind(file.read_exact_at(&mut [0; 4096], 0)), eio);
    shim.obey("power-on").unwrap();
    let mut found = [0; 4096];
    file.read_exact_at(&mut found, 0).unwrap();
    assert_eq!(found, [1; 4096], "what was flushed is there");
    assert_eq!(shim.obey("rot 3 0..4096").unwrap(), "rotten 3");
    file.read_exact_at(&mut found, 0).unwrap();
    assert_ne!(found, [1; 4096]);
    shim.obey("wipe").unwrap();
    file.read_exact_at(&mut found, 0).unwrap();
    assert_eq!(found, [0; 4096]);
    let status = shim.obey("status").unwrap();
    assert!(status.starts_with("power on waiting 0 unflushed 0 "), "{status}");
    for nonsense in ["", "explode", "power-cut x", "on read", "rot", "swap /nowhere/at/all"] {
        assert!(shim.obey(nonsense).is_err(), "{nonsense}");
    }
}

#[test]
fn slow_io_is_slow_and_stuck_io_ends_when_it_is_healed() {
    if !can_mount() {
        return;
    }
    let place = place();
    let file = open(&place.shim);
    place.shim.obey("on read delay 80 once").unwrap();
    let start = std::time::Instant::now();
    file.read_exact_at(&mut [0; 4096], 0).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(80));
    place.shim.obey("on write stick").unwrap();
    let writer = {
        let file = file.try_clone().unwrap();
        std::thread::spawn(move || file.write_all_at(&[3; 4096], 0))
    };
    assert!(wait::wait_until(BOUND, || place.shim.waiting() == 1));
    file.read_exact_at(&mut [0; 4096], 8192).unwrap();
    assert!(!writer.is_finished());
    place.shim.heal();
    writer.join().unwrap().unwrap();
}

#[test]
fn what_still_has_the_file_open_gets_errors_when_the_shim_goes_and_nothing_is_lost() {
    if !can_mount() {
        return;
    }
    let place = place();
    let file = open(&place.shim);
    file.write_all_at(&[4; 4096], 0).unwrap();
    place.shim.obey("on read stick").unwrap();
    let reader = {
        let file = file.try_clone().unwrap();
        std::thread::spawn(move || file.read_exact_at(&mut [0; 4096], 0))
    };
    assert!(wait::wait_until(BOUND, || place.shim.waiting() == 1));
    let mount = place.shim.device();
    let Place { shim, backing, _dir } = place;
    drop(shim);
    assert!(reader.join().unwrap().is_err());
    assert!(file.read_exact_at(&mut [0; 4096], 0).is_err());
    assert!(!mount.exists());
    let mut found = [0; 4096];
    File::open(backing).unwrap().read_exact_at(&mut found, 0).unwrap();
    assert_eq!(found, [4; 4096]);
}

#[test]
fn two_devices_are_swapped_by_giving_each_the_others_file() {
    if !can_mount() {
        return;
    }
    let (one, other) = (place(), place());
    let (file_one, file_other) = (open(&one.shim), open(&other.shim));
    file_one.write_all_at(&[1; 512], 0).unwrap();
    file_other.write_all_at(&[2; 512], 0).unwrap();
    one.shim.settle().unwrap();
    other.shim.settle().unwrap();
    one.shim.swap(&other.backing).unwrap();
    other.shim.swap(&one.backing).unwrap();
    let mut found = [0; 512];
    file_one.read_exact_at(&mut found, 0).unwrap();
    assert_eq!(found, [2; 512]);
    file_other.read_exact_at(&mut found, 0).unwrap();
    assert_eq!(found, [1; 512]);
}
