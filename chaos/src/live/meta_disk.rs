//! A disk for a metadata server: a file behind a shim, as a loop device with ext4 on it. A power cut takes from it what was not
//! flushed, as it does from a whole machine's disk; then the file system is mounted anew and recovers from its journal.
//!
//! It needs root, loop devices, and the programs losetup, mount and umount of package mount, and mkfs.ext4 of e2fsprogs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::inject::shim::{Cut, CutBy, Shim};

/// Bytes of it; it takes space only as it is written.
const BYTES: u64 = 256 << 20;

/// A mounted disk. Dropping it unmounts it.
pub struct MetaDisk {
    shim: Shim,
    mount: PathBuf,
    /// The loop device while there is one.
    device: Option<String>,
}

/// Runs a program to its end; what it printed.
fn run(program: &str, args: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{program} can't be run: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_string());
    }
    let words = String::from_utf8_lossy(&output.stderr).trim().to_string();
    Err(format!("{program} {}: {words} ({})", args.join(" "), output.status))
}

impl MetaDisk {
    /// A new one with an empty file system, at `dir/NAME-disk`.
    ///
    /// # Errors
    /// In words: something of what it needs is missing or fails.
    pub fn new(dir: &Path, name: &str, seed: u64) -> Result<MetaDisk, String> {
        let (backing, shims, mount) = (
            dir.join(format!("{name}.img")),
            dir.join(format!("{name}-shim")),
            dir.join(format!("{name}-disk")),
        );
        let failed = |error: std::io::Error| format!("a disk for {name}: {error}");
        fs::create_dir_all(&shims).map_err(failed)?;
        fs::create_dir_all(&mount).map_err(failed)?;
        let file = fs::File::create(&backing).map_err(failed)?;
        file.set_len(BYTES).map_err(failed)?;
        let shim = Shim::start(&backing, &shims, seed).map_err(failed)?;
        let mut disk = MetaDisk {
            shim,
            mount,
            device: None,
        };
        disk.attach()?;
        let device = disk.device.clone().expect("attached above");
        run("mkfs.ext4", &["-q", "-F", "-E", "lazy_itable_init=0", &device])?;
        disk.mount()?;
        disk.shim.settle().map_err(failed)?;
        Ok(disk)
    }

    /// Where the metadata server keeps its files.
    pub fn path(&self) -> PathBuf {
        self.mount.join("data")
    }

    fn attach(&mut self) -> Result<(), String> {
        let file = self.shim.device().display().to_string();
        // Directly: nothing of it may be in a cache beside the shim's own.
        let device = run("losetup", &["--direct-io=on", "--find", "--show", &file])?;
        self.device = Some(device);
        Ok(())
    }

    fn mount(&mut self) -> Result<(), String> {
        let device = self.device.clone().expect("attached before");
        run("mount", &["-t", "ext4", &device, &self.mount.display().to_string()]).map(drop)
    }

    /// Cuts the power: all I/O fails until [`MetaDisk::restore`].
    ///
    /// # Errors
    /// Of the backing file, in words.
    pub fn power_cut(&self, by: CutBy) -> Result<Cut, String> {
        self.shim.power_cut(by)
    }

    /// Power is back, and nobody uses it: the file system is mounted as it was left.
    ///
    /// # Errors
    /// In words: it can't be unmounted, or what was left is no file system any more.
    pub fn restore(&mut self) -> Result<(), String> {
        self.detach()?;
        self.shim.power_on();
        self.attach()?;
        self.mount()
    }

    fn detach(&mut self) -> Result<(), String> {
        let mount = self.mount.display().to_string();
        run("umount", &[&mount])?;
        match self.device.take() {
            Some(device) => run("losetup", &["--detach", &device]).map(drop),
            None => Ok(()),
        }
    }
}

impl Drop for MetaDisk {
    fn drop(&mut self) {
        self.shim.heal();
        self.shim.power_on();
        // What stays mounted is told, for the shim goes in a moment.
        if let Err(words) = self.detach() {
            eprintln!("{words}");
        }
    }
}
