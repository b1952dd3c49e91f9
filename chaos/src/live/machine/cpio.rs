//! The archive that a kernel unpacks as its first file system: cpio, "new ASCII" format
//! (Linux, `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::collections::BTreeSet;

/// An archive in the making.
pub(crate) struct Cpio {
    out: Vec<u8>,
    inode: u32,
    directories: BTreeSet<String>,
}

impl Cpio {
    /// An empty one.
    pub(crate) fn new() -> Cpio {
        Cpio {
            out: Vec::new(),
            inode: 1,
            directories: BTreeSet::new(),
        }
    }

    /// Adds a file with this absolute path, and the directories on its way.
    pub(crate) fn file(&mut self, path: &str, executable: bool, content: &[u8]) {
        let path = path.strip_prefix('/').expect("an absolute path");
        for (end, _) in path.match_indices('/') {
            self.directory(&path[..end]);
        }
        self.entry(path, if executable { 0o100_755 } else { 0o100_644 }, content);
    }

    /// The finished archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.out
    }

    fn directory(&mut self, path: &str) {
        if self.directories.insert(path.to_string()) {
            self.entry(path, 0o040_755, &[]);
        }
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        let links = if mode & 0o040_000 != 0 { 2 } else { 1 };
        let size = content.len() as u32;
        let name_size = name.len() as u32 + 1;
        self.out.extend(b"070701");
        // inode, mode, uid, gid, links, mtime, size, device and special device (major, minor), name size, check
        for field in [self.inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0] {
            self.out.extend(format!("{field:08x}").as_bytes());
        }
        self.inode += 1;
        self.out.extend(name.as_bytes());
        self.out.push(0);
        self.pad();
        self.out.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.out.resize(self.out.len().next_multiple_of(4), 0);
    }
}
