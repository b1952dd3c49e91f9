//! The harness itself, proven against other servers: a test that fails below is then a failure of the product.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use cairn_chaos::live::machine::Guest;
use cairn_chaos::live::nbd::FLAG_TRIM;
use cairn_chaos::live::process::Guarded;
use cairn_chaos::live::tools;
use cairn_chaos::live::wait::wait_until;

use crate::guest::{FIRST_BOOT, SECOND_BOOT};
use crate::support::nbd::{EINVAL, Nbd};

const BOUND: Duration = Duration::from_secs(180);

/// qemu-nbd with a fresh sparse file.
fn qemu_nbd(dir: &Path, mib: u64) -> Guarded {
    let (image, socket) = (dir.join("image"), dir.join("sock"));
    fs::File::create(&image).unwrap().set_len(mib << 20).unwrap();
    let mut command = Command::new(tools::find("qemu-nbd").unwrap());
    command
        .args(["-f", "raw", "-t", "-x", "demo", "-e", "4", "--discard=unmap", "-k"])
        .arg(&socket)
        .arg(&image);
    let child = Guarded::new(command.stdin(Stdio::null()).spawn().unwrap());
    assert!(
        wait_until(BOUND, || Nbd::connect(&socket, "demo").is_ok()),
        "qemu-nbd listens"
    );
    child
}

#[test]
fn our_nbd_client_agrees_with_another_server() {
    if !tools::available(&[("qemu-nbd", "qemu-utils")]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let _server = qemu_nbd(dir.path(), 16);
    let socket = dir.path().join("sock");
    let mut nbd = Nbd::connect(&socket, "demo").unwrap();
    assert_eq!(nbd.size, 16 << 20);
    assert_ne!(nbd.flags & FLAG_TRIM, 0);
    nbd.write(4096, &[7; 8192]);
    nbd.flush();
    nbd.trim(8192, 4096);
    assert_eq!(nbd.read(4096, 4096), [7; 4096]);
    assert_eq!(nbd.try_read(16 << 20, 512).unwrap(), Err(EINVAL));
    assert!(Nbd::connect(&socket, "nothing").is_err());
}

#[test]
fn a_guest_finds_its_files_and_notices_a_missing_and_a_changed_one() {
    let Some(guest) = Guest::new() else { return };
    if !tools::available(&[("qemu-nbd", "qemu-utils")]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = qemu_nbd(dir.path(), 256);
    let uri = format!("nbd+unix:///demo?socket={}", dir.path().join("sock").display());
    let first = guest.run(&uri, FIRST_BOOT, &[], BOUND).expect_success();
    assert_eq!(first.said_after("complaint "), [] as [&str; 0]);
    let sums = first.said_after("sum ").join("\n") + "\n";
    assert_eq!(sums.lines().count(), 40);

    let second = guest
        .run(&uri, SECOND_BOOT, &[("/sums", &sums)], BOUND)
        .expect_success();
    assert_eq!(second.said_after("files "), ["40"]);
    assert_eq!(second.said_after("sums match").len(), 1);
    assert_eq!(second.said_after("complaint "), [] as [&str; 0]);

    // What must be noticed is noticed.
    let (last, rest) = sums
        .trim_end()
        .rsplit_once('\n')
        .map(|(rest, last)| (last, rest))
        .unwrap();
    let wrong = format!("{rest}\n{}{}\n", "0".repeat(64), &last[64..]).replace("/f0\n", "/f100\n");
    let third = guest
        .run(&uri, SECOND_BOOT, &[("/sums", &wrong)], BOUND)
        .expect_success();
    assert_eq!(third.said_after("sums match").len(), 0);
    assert!(third.said_after("mismatch ").len() >= 2, "{:?}", third.said);

    // A disk that fails is noticed too: nothing answers any more.
    drop(server);
    let fourth = guest.run(&uri, SECOND_BOOT, &[("/sums", &sums)], BOUND);
    assert_eq!(fourth.status, None, "{}", fourth.console);
}
