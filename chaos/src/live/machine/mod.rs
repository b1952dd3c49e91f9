//! An unmodified guest in QEMU: a distribution's kernel, an archive with busybox and e2fsprogs as its only file system,
//! and a disk over NBD. A scenario is a shell script; what it says comes back over the serial line.

mod cpio;

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use self::cpio::Cpio;
use super::process::Guarded;
use super::tools;

/// Where `.ci/fetch-guest` was told to put the kernel and busybox.
const GUEST_DIR: &str = "CAIRN_GUEST_DIR";
/// In load order.
const MODULES: [&str; 6] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
];
/// Each with the libraries it needs, from the package e2fsprogs.
const HOST_PROGRAMS: [&str; 2] = ["mke2fs", "e2fsck"];
/// A line of this start and the scenario's status ends its output.
const END_MARK: &str = "GUEST-END status=";
/// Before each line that a scenario says.
const SAY_MARK: &str = "GUEST ";

const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /mnt /etc /tmp
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs devtmpfs /dev
for module in $(cat /modules/order); do insmod /modules/$module.ko || echo "GUEST no module $module"; done
say() { echo "GUEST $*"; }
# Ends the scenario unless the command works.
must() { "$@" > /tmp/out 2>&1 || { say "failed: $*"; while read -r line; do say "$line"; done < /tmp/out; end 1; }; }
end() { echo; echo "GUEST-END status=$1"; poweroff -f; sleep 60; }
# What a kernel says when a disk has failed it.
kernel_complaints() {
  dmesg | grep -iE 'I/O error|EXT4-fs (error|warning)|Remounting filesystem read-only|Aborting journal|blocked for more than|JBD2.*(error|abort)'
}
n=0; while [ ! -b /dev/vda ]; do n=$((n+1)); [ $n -gt 100 ] && { say "no disk /dev/vda"; end 1; }; sleep 0.1; done
. /scenario
end 0
"#;

/// What a scenario gave.
#[derive(Debug)]
pub struct Outcome {
    /// What it said, line by line.
    pub said: Vec<String>,
    /// All of the serial line.
    pub console: String,
    /// The status it ended with; `None` when the guest died or did not end within the bound.
    pub status: Option<i32>,
}

impl Outcome {
    /// The lines it said that start like this, without that start.
    pub fn said_after(&self, start: &str) -> Vec<&str> {
        self.said.iter().filter_map(|line| line.strip_prefix(start)).collect()
    }

    /// Panics unless it ended with success.
    #[track_caller]
    pub fn expect_success(self) -> Outcome {
        assert_eq!(
            self.status,
            Some(0),
            "the guest's scenario failed; its console:\n{}",
            self.console
        );
        self
    }
}

/// What guests are made of.
pub struct Guest {
    files: PathBuf,
    scratch: tempfile::TempDir,
}

impl Guest {
    /// `None` when something is not there that a guest needs; the test is then said to be skipped (or fails, see
    /// [`tools::skip`]).
    pub fn new() -> Option<Guest> {
        let needed = [
            ("qemu-system-x86_64", "qemu-system-x86"),
            ("mke2fs", "e2fsprogs"),
            ("e2fsck", "e2fsprogs"),
            ("ldd", "libc-bin"),
        ];
        if !tools::available(&needed) {
            return None;
        }
        let files = std::env::var_os(GUEST_DIR).map_or_else(default_files, PathBuf::from);
        if !files.join("vmlinuz").is_file() || !files.join("busybox").is_file() {
            tools::skip(&format!(
                "needs the packages linux-image-cloud-amd64 and busybox-static unpacked in {}: run .ci/fetch-guest",
                files.display()
            ));
            return None;
        }
        let scratch = tempfile::tempdir().expect("a temporary directory can be made");
        Some(Guest { files, scratch })
    }

    /// Boots with the disk at `uri`, runs the scenario (a shell script with `say`, `must` and `kernel_complaints` at
    /// hand), and waits for its end, `bound` at the most. `files` are put into the guest: path and content.
    pub fn run(&self, uri: &str, scenario: &str, files: &[(&str, &str)], bound: Duration) -> Outcome {
        let drive = format!("file={uri},format=raw");
        self.boot(&drive, scenario, files, self.scratch.path()).outcome(bound)
    }

    /// The same without waiting: `drive` is QEMU's description of the disk, as for `-drive`, and what comes over the serial line is
    /// kept in `dir`.
    pub fn boot(&self, drive: &str, scenario: &str, files: &[(&str, &str)], dir: &Path) -> Machine {
        let archive = dir.join("initramfs");
        fs::write(&archive, self.archive(scenario, files)).expect("the archive can be written");
        let console = dir.join("console");
        fs::write(&console, "").expect("the console's file can be written");
        let program = tools::find("qemu-system-x86_64").expect("found before");
        let mut command = Command::new(program);
        command.args(["-accel", "tcg,thread=multi", "-smp", "2", "-m", "384"]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command
            .arg("-kernel")
            .arg(self.files.join("vmlinuz"))
            .arg("-initrd")
            .arg(&archive);
        // Where an emulated processor waits for a real one, a kernel that tests its timer takes it for broken and panics.
        command.args([
            "-append",
            "console=ttyS0 quiet no_timer_check panic=-1 sysctl.kernel.hung_task_timeout_secs=30",
        ]);
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.arg("-drive");
        command.arg(format!("{drive},if=none,id=disk,cache=none,discard=unmap"));
        command.args(["-device", "virtio-blk-pci,drive=disk"]);
        let errors = dir.join("qemu");
        let log = fs::File::create(&errors).expect("the log of QEMU can be created");
        command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file can be shared"))
            .stderr(log);
        let qemu = Guarded::new(command.spawn().expect("QEMU can be started"));
        Machine { qemu, console, errors }
    }

    fn archive(&self, scenario: &str, files: &[(&str, &str)]) -> Vec<u8> {
        let read = |path: &Path| fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut archive = Cpio::new();
        archive.file("/init", true, INIT.as_bytes());
        archive.file("/scenario", false, scenario.as_bytes());
        archive.file("/bin/busybox", true, &read(&self.files.join("busybox")));
        archive.file("/modules/order", false, MODULES.join("\n").as_bytes());
        for module in MODULES {
            let name = format!("{module}.ko");
            archive.file(
                &format!("/modules/{name}"),
                false,
                &read(&self.files.join("modules").join(&name)),
            );
        }
        let mut libraries = std::collections::BTreeSet::new();
        for name in HOST_PROGRAMS {
            let program = tools::find(name).expect("found before");
            archive.file(&format!("/sbin/{name}"), true, &read(&program));
            libraries.extend(libraries_of(&program));
        }
        for library in libraries {
            archive.file(&library, true, &read(Path::new(&library)));
        }
        for (path, content) in files {
            archive.file(path, false, content.as_bytes());
        }
        archive.finish()
    }
}

/// The shared libraries of a program, the loader too, as absolute paths.
fn libraries_of(program: &Path) -> Vec<String> {
    let output = Command::new("ldd").arg(program).output().expect("ldd can be run");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(str::to_string)
        .collect()
}

fn default_files() -> PathBuf {
    let beside = std::env::current_exe().ok().and_then(|program| {
        let target = program.ancestors().find(|dir| dir.join("guest/vmlinuz").is_file())?;
        Some(target.join("guest"))
    });
    beside.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest"))
}

/// A guest that was booted. Dropping it is a power-off.
#[derive(Debug)]
pub struct Machine {
    qemu: Guarded,
    console: PathBuf,
    errors: PathBuf,
}

impl Machine {
    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        matches!(self.qemu.child().try_wait(), Ok(Some(_)))
    }

    /// What came over the serial line so far.
    pub fn console(&self) -> String {
        read_text(&self.console).replace('\r', "")
    }

    /// Waits for its end; ends it after `bound`.
    pub fn outcome(mut self, bound: Duration) -> Outcome {
        let ended = self.qemu.wait(bound);
        let Machine { qemu, console, errors } = self;
        drop(qemu);
        Outcome::of(read_text(&console).replace('\r', ""), ended, bound, &read_text(&errors))
    }
}

fn read_text(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

impl Outcome {
    fn of(mut console: String, ended: Option<ExitStatus>, bound: Duration, errors: &str) -> Outcome {
        let status = console
            .lines()
            .find_map(|line| line.strip_prefix(END_MARK)?.parse().ok());
        let said = said(&console);
        if status.is_none() {
            let end = ended.map_or(format!("did not end within {bound:?}"), |status| {
                format!("ended, {status}")
            });
            console.push_str(&format!("\n[QEMU {end}] {errors}"));
        }
        Outcome { said, console, status }
    }
}

/// The lines that a scenario has said, of what came over the serial line.
pub fn said(console: &str) -> Vec<String> {
    // The last line may not be there as a whole.
    let whole = console.rfind('\n').map_or("", |end| &console[..end]);
    whole
        .lines()
        .filter_map(|line| line.strip_prefix(SAY_MARK))
        .map(str::to_string)
        .collect()
}
