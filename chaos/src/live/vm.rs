//! A virtual machine of QEMU with an ext4 file system on a volume of its own: it writes files and says each when `fsync` has
//! returned, until its power goes; then another one looks for all of them, and checks the file system. And so on.
//!
//! Its kernel must never complain: no I/O error, no read-only remount, no task that hangs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::machine::{Guest, Machine, said};
use super::report::{Failure, FailureKind};
use super::stop;
use crate::rng::Rng;

/// The volume.
pub const VOLUME: &str = "vm";
/// Its size.
pub const BYTES: u64 = 256 << 20;
/// How long a machine may take to boot and check everything, on emulated processors that it shares.
const CHECK_BOUND: Duration = Duration::from_secs(180);
/// For how long it works before its power goes.
const WORK: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(45));
/// The pause between two looks at it.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Lines of the serial line that a failure tells.
const TAIL_LINES: usize = 30;

/// Makes the file system.
const MAKE: &str = "must /sbin/mke2fs -q -F -t ext4 /dev/vda\n";

/// Writes files, keeps the newest thirty, and says of each when it is there for good and when it goes.
const WORKLOAD: &str = r#"
must mount -t ext4 /dev/vda /mnt
for file in /mnt/b*; do [ -e $file ] && say "gone ${file#/mnt/}"; done
rm -f /mnt/b*
boot=$(cat /boot-number)
i=0
while [ $i -lt 100000 ]; do
  name=b$boot-$i
  dd if=/dev/urandom of=/mnt/$name bs=$((500 + i % 50 * 997)) count=4 conv=fsync 2>/tmp/err || { say "complaint $(tail -1 /tmp/err)"; end 1; }
  say "synced $name $(sha256sum < /mnt/$name | cut -d' ' -f1)"
  i=$((i+1))
  if [ $i -gt 30 ]; then say "gone b$boot-$((i-31))"; rm /mnt/b$boot-$((i-31)); fi
  if [ $((i % 10)) = 0 ]; then kernel_complaints | while read -r line; do say "complaint $line"; done; fi
  if [ $((i % 25)) = 0 ]; then fstrim /mnt; fi
done
"#;

/// Looks for all files that were said to be there.
const CHECK: &str = r#"
must mount -t ext4 /dev/vda /mnt
if [ -s /sums ]; then
  (cd /mnt && sha256sum -c /sums) > /tmp/check 2>&1
  grep -v ': OK$' /tmp/check | while read -r line; do say "mismatch $line"; done
  say "found $(grep -c ': OK$' /tmp/check)"
fi
must umount /mnt
must /sbin/e2fsck -fn /dev/vda
kernel_complaints | while read -r line; do say "complaint $line"; done
"#;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Works(Instant),
    Checks(Instant),
}

/// Machines, one after the other.
pub struct Vm {
    guest: Guest,
    drive: String,
    dir: PathBuf,
    rng: Rng,
    boots: u64,
    stage: Stage,
    next_look: Instant,
    machine: Option<Machine>,
    /// What must be there: the checksum of each file.
    synced: BTreeMap<String, String>,
    /// Files that were found again.
    pub found: u64,
    /// Times that the power went.
    pub power_offs: u64,
}

impl Vm {
    /// Boots the first one, which makes a file system on the volume, served at this socket.
    ///
    /// # Errors
    /// What a guest is made of is missing.
    pub fn start(socket: &Path, dir: &Path, rng: Rng) -> Result<Vm, Failure> {
        let guest = Guest::new().ok_or_else(|| {
            let words =
                "no guest can be booted: it needs qemu-system-x86_64, e2fsprogs, and what .ci/fetch-guest fetches";
            Failure::new(FailureKind::Setup, words)
        })?;
        // It waits for an export that is not there yet, or begins anew, as one would be configured.
        let drive = format!(
            "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={},file.export={VOLUME},\
             file.open-timeout=600,file.reconnect-delay=600",
            socket.display()
        );
        let mut vm = Vm {
            guest,
            drive,
            dir: dir.join("vm"),
            rng,
            boots: 0,
            stage: Stage::Works(Instant::now()),
            next_look: Instant::now(),
            machine: None,
            synced: BTreeMap::new(),
            found: 0,
            power_offs: 0,
        };
        vm.work();
        Ok(vm)
    }

    fn boot(&mut self, scenario: &str, sums: &str) {
        self.boots += 1;
        let dir = self.dir.join(self.boots.to_string());
        fs::create_dir_all(&dir).expect("a directory for a machine can be made");
        let files = [("/boot-number", &*self.boots.to_string()), ("/sums", sums)];
        self.machine = Some(self.guest.boot(&self.drive, scenario, &files, &dir));
    }

    fn work(&mut self) {
        let make = if self.boots == 0 { MAKE } else { "" };
        self.boot(&format!("{make}{WORKLOAD}"), "");
        self.stage = Stage::Works(Instant::now() + self.rng.span(WORK.0, WORK.1));
    }

    fn check(&mut self) {
        let lines: Vec<String> = self
            .synced
            .iter()
            .map(|(file, sum)| format!("{sum}  {file}\n"))
            .collect();
        self.boot(CHECK, &lines.concat());
        self.stage = Stage::Checks(Instant::now() + CHECK_BOUND);
    }

    /// Looks at the machine, turns it off, and boots the next one, as it comes.
    ///
    /// # Errors
    /// A kernel complained, a file is missing or other than it was, or a machine did not end as it should.
    pub fn poll(&mut self) -> Result<(), Failure> {
        let Some(machine) = &mut self.machine else {
            return Ok(());
        };
        if Instant::now() < self.next_look {
            return Ok(());
        }
        self.next_look = Instant::now() + LOOK_INTERVAL;
        let has_ended = machine.has_ended();
        let console = machine.console();
        complaints(&console)?;
        match self.stage {
            Stage::Works(until) => {
                if has_ended {
                    never_began(&console)?;
                    return Err(wrong(
                        FailureKind::GuestError,
                        "the machine has ended by itself",
                        &console,
                    ));
                }
                // One that has not got to its first file yet is let be.
                let has_begun = console.contains("GUEST synced ");
                if Instant::now() >= until && has_begun {
                    self.power_off();
                    self.check();
                }
            }
            Stage::Checks(until) => {
                if !has_ended && Instant::now() >= until {
                    return Err(wrong(
                        FailureKind::Stall,
                        "the machine does not come to its end",
                        &console,
                    ));
                }
                if has_ended {
                    self.checked(&console)?;
                    self.work();
                }
            }
        }
        Ok(())
    }

    fn checked(&mut self, console: &str) -> Result<(), Failure> {
        never_began(console)?;
        if !console.contains("GUEST-END status=0") {
            return Err(wrong(
                FailureKind::Data,
                "the file system is not as it was left",
                console,
            ));
        }
        let said = said(console);
        let found = said
            .iter()
            .find_map(|line| line.strip_prefix("found ")?.parse::<u64>().ok());
        let expected = self.synced.len() as u64;
        if found.unwrap_or(0) != expected {
            let words = format!("{found:?} files of {expected} are as they were");
            return Err(wrong(FailureKind::Data, &words, console));
        }
        self.found += expected;
        // The consoles of machines that found all well are not looked at any more.
        let _ = fs::remove_dir_all(self.dir.join((self.boots - 1).to_string()));
        Ok(())
    }

    /// Without a word to the machine.
    fn power_off(&mut self) {
        let Some(machine) = self.machine.take() else { return };
        let console = machine.outcome(Duration::ZERO).console;
        self.power_offs += 1;
        for line in said(&console) {
            if let Some(file) = line.strip_prefix("gone ") {
                self.synced.remove(file);
            } else if let Some((file, sum)) = line.strip_prefix("synced ").and_then(|rest| rest.split_once(' ')) {
                self.synced.insert(file.to_string(), sum.to_string());
            }
        }
    }

    /// Turns the machine off and has everything checked once more.
    ///
    /// # Errors
    /// As of [`Vm::poll`].
    pub fn finish(&mut self) -> Result<(), Failure> {
        if matches!(self.stage, Stage::Works(_)) {
            self.power_off();
            self.check();
        }
        while matches!(self.stage, Stage::Checks(_)) {
            stop::check()?;
            self.poll()?;
            std::thread::sleep(Duration::from_millis(100));
        }
        // The next one has begun to work; nobody needs it.
        self.machine = None;
        Ok(())
    }
}

/// What the kernel or the scenario complain of. The kernel's own words go to the serial line when they are errors.
fn complaints(console: &str) -> Result<(), Failure> {
    const WORDS: [&str; 8] = [
        "GUEST complaint ",
        "I/O error",
        "EXT4-fs error",
        "EXT4-fs warning",
        "Remounting filesystem read-only",
        "Aborting journal",
        "blocked for more than",
        "GUEST failed: ",
    ];
    let complaint = console
        .lines()
        .find(|line| WORDS.iter().any(|words| line.contains(words)));
    if let Some(line) = complaint {
        return Err(wrong(
            FailureKind::GuestError,
            &format!("the guest's kernel: {line}"),
            console,
        ));
    }
    if console.contains("GUEST mismatch ") {
        return Err(wrong(FailureKind::Data, "files are not as they were", console));
    }
    Ok(())
}

/// A machine that ended before its scenario said a word has not looked at its disk: whatever ended it, it was not that.
fn never_began(console: &str) -> Result<(), Failure> {
    if console.contains("GUEST ") || console.contains("GUEST-END") {
        return Ok(());
    }
    let words = "the machine has ended before it looked at its disk";
    Err(wrong(FailureKind::Setup, words, console))
}

fn wrong(kind: FailureKind, words: &str, console: &str) -> Failure {
    let lines: Vec<&str> = console.lines().collect();
    let tail = &lines[lines.len().saturating_sub(TAIL_LINES)..];
    Failure {
        story: tail.iter().map(ToString::to_string).collect(),
        ..Failure::new(kind, format!("virtual machine: {words}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_of_a_kernel_and_files_that_are_gone_are_failures() {
        assert!(complaints("GUEST synced b1-0 00\nGUEST found 3\n").is_ok());
        let kind = |console: &str| complaints(console).unwrap_err().kind;
        let error = "[  12.3] I/O error, dev vda, sector 8 op 0x1:(WRITE)\n";
        assert_eq!(kind(error), FailureKind::GuestError);
        assert_eq!(
            kind("INFO: task dd:91 blocked for more than 30 seconds.\n"),
            FailureKind::GuestError
        );
        assert_eq!(kind("GUEST mismatch b1-3: FAILED\n"), FailureKind::Data);
        assert_eq!(never_began("Kernel panic\n").unwrap_err().kind, FailureKind::Setup);
        assert!(never_began("GUEST synced a 1\n").is_ok());
    }
}
