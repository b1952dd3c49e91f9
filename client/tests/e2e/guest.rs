//! A guest makes a file system, and finds its files again after everything was killed.

use std::time::Duration;

use cairn_chaos::live::machine::Guest;

use crate::support::{heavy, start};

/// How long a guest may take for its scenario, on emulated processors.
const BOUND: Duration = Duration::from_secs(180);

/// Makes an ext4 file system, fills it, and says the checksum of every file.
pub(crate) const FIRST_BOOT: &str = r#"
must /sbin/mke2fs -q -F -t ext4 /dev/vda
must mount -t ext4 /dev/vda /mnt
i=0
while [ $i -lt 40 ]; do
  mkdir -p /mnt/d$((i % 4))
  # From a part of a block to 1.5 MiB
  must dd if=/dev/urandom of=/mnt/d$((i % 4))/f$i bs=$((1000 + i * 997)) count=$((1 + i)) 
  i=$((i+1))
done
(cd /mnt && find . -type f | sort | xargs sha256sum) | while read -r line; do say "sum $line"; done
# Half of them once more under another name, then gone: the space is given back while the rest stays.
must cp -r /mnt/d0 /mnt/d1 /tmp/
must cp -r /tmp/d0 /tmp/d1 /mnt/d2/
must sync
rm -rf /mnt/d2/d0 /mnt/d2/d1
must fstrim /mnt
must sync
kernel_complaints | while read -r line; do say "complaint $line"; done
"#;

/// Compares every file with the checksums in `/sums`, then the file system itself.
pub(crate) const SECOND_BOOT: &str = r#"
must mount -t ext4 /dev/vda /mnt
say "files $(find /mnt -type f | wc -l)"
cd /mnt && sha256sum -c /sums > /tmp/check 2>&1 && say "sums match"
grep -v ': OK$' /tmp/check | while read -r line; do say "mismatch $line"; done
cd /
must umount /mnt
must /sbin/e2fsck -fn /dev/vda
kernel_complaints | while read -r line; do say "complaint $line"; done
"#;

#[test]
fn a_guest_finds_every_file_after_everything_was_killed() {
    let Some(guest) = Guest::new() else { return };
    let _turn = heavy();
    let dev = start(&["demo:256M"]);
    let first = guest.run(&dev.uri("demo"), FIRST_BOOT, &[], BOUND).expect_success();
    assert_eq!(first.said_after("complaint "), [] as [&str; 0]);
    let sums = first.said_after("sum ").join("\n") + "\n";
    assert_eq!(sums.lines().count(), 40);

    let dev = dev.kill_all_and_start_again().unwrap();
    let second = guest
        .run(&dev.uri("demo"), SECOND_BOOT, &[("/sums", &sums)], BOUND)
        .expect_success();
    assert_eq!(second.said_after("files "), ["40"]);
    assert_eq!(second.said_after("sums match").len(), 1, "{:#?}", second.said);
    assert_eq!(second.said_after("complaint "), [] as [&str; 0]);
}
