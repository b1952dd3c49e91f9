//! Opening a device: a raw block device or a file, for direct I/O, by nobody else.

use std::fmt;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use cairn_proto::buffer::BlockBuf;
use cairn_proto::disk::DiskGeometry;
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::units::ByteSize;
use rustix::fs::{FlockOperation, OFlags, SeekFrom, flock, seek};

use crate::store::limits::DEVICE_BLOCKS_MIN;
use crate::store::superblock::{EDGE_BLOCKS, PROBE_BLOCKS, Probe, probe, probe_edges};

/// Where a device is and how it is to be treated.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DevicePath {
    /// A block device or a file.
    pub path: PathBuf,
    /// A file that does not exist yet is made with this size.
    pub create_size: Option<ByteSize>,
    /// Whether completed writes are lost when power fails before a flush; `None` to find out.
    pub volatile_cache: Option<bool>,
}

/// What is known of a device's write cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WriteCache {
    /// Whether completed writes are lost when power fails before a flush, as the store takes it.
    pub volatile: bool,
    /// Whether the operator said so; else it was found out.
    pub by_operator: bool,
    /// What was found out.
    pub detected_volatile: bool,
}

impl fmt::Display for WriteCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.volatile, self.by_operator) {
            (true, false) => "volatile",
            (false, false) => "none",
            (true, true) => "volatile (said the operator)",
            (false, true) => "none (said the operator)",
        })
    }
}

/// A device that is open, and locked against other processes.
#[derive(Debug)]
pub struct DeviceFile {
    path: PathBuf,
    file: File,
    geometry: DiskGeometry,
    is_block_device: bool,
    write_cache: WriteCache,
}

/// Why a device can't be opened.
#[derive(Debug)]
pub enum DeviceError {
    /// There is nothing at the path, and no size to make a file with.
    Missing,
    /// It is neither a file nor a block device.
    Kind(&'static str),
    /// The operating system refused.
    Io {
        /// What was being done.
        doing: &'static str,
        /// What it said.
        error: io::Error,
    },
    /// Another process has it.
    InUse,
    /// It is too short to hold anything.
    TooSmall {
        /// Its bytes.
        bytes: u64,
    },
    /// Its file system can't do direct I/O.
    NoDirectIo,
    /// Its sectors are larger than a block.
    Sectors(io::Error),
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceError::Missing => {
                f.write_str("it does not exist: check the path, or give a size to make a file with")
            }
            DeviceError::Kind(kind) => write!(f, "it is {kind}: a device is a block device or a file"),
            DeviceError::Io { doing, error } => write!(f, "{doing} failed: {error}"),
            DeviceError::InUse => f.write_str(
                "another process uses it (another node, or a mounted file system): end that, or choose another device",
            ),
            DeviceError::TooSmall { bytes } => write!(
                f,
                "it has {}, at least {} are needed",
                ByteSize(*bytes),
                ByteSize(DEVICE_BLOCKS_MIN * BLOCK_BYTES as u64)
            ),
            DeviceError::NoDirectIo => f.write_str(
                "its file system can't do direct I/O (O_DIRECT): put it on ext4, XFS or another local file system",
            ),
            DeviceError::Sectors(error) => write!(
                f,
                "it can't be read in blocks of {BLOCK_BYTES} bytes ({error}): devices with larger sectors are not supported"
            ),
        }
    }
}

impl std::error::Error for DeviceError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            DeviceError::Io { error, .. } | DeviceError::Sectors(error) => Some(error),
            _ => None,
        }
    }
}

pub(super) fn io_error(doing: &'static str) -> impl Fn(io::Error) -> DeviceError {
    move |error| DeviceError::Io { doing, error }
}

impl DeviceFile {
    /// Opens it for direct I/O and locks it.
    ///
    /// # Errors
    /// In words that say what to do.
    pub fn open(device: &DevicePath) -> Result<DeviceFile, DeviceError> {
        let file = match open_existing(&device.path) {
            Err(DeviceError::Missing) => match device.create_size {
                // Nothing is made that can't be used: it would be in the way of a better size.
                Some(size) if size.0 / (BLOCK_BYTES as u64) < DEVICE_BLOCKS_MIN => {
                    return Err(DeviceError::TooSmall { bytes: size.0 });
                }
                Some(size) => create(&device.path, size)?,
                None => return Err(DeviceError::Missing),
            },
            opened => opened?,
        };
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|errno| {
            if errno == rustix::io::Errno::WOULDBLOCK {
                DeviceError::InUse
            } else {
                io_error("locking it")(errno.into())
            }
        })?;
        let metadata = file.metadata().map_err(io_error("looking at it"))?;
        let is_block_device = metadata.file_type().is_block_device();
        let bytes = if is_block_device {
            seek(&file, SeekFrom::End(0)).map_err(|errno| io_error("asking for its size")(errno.into()))?
        } else {
            fill_up(&file, metadata.len(), device.create_size)?
        };
        let blocks = bytes / BLOCK_BYTES as u64;
        if blocks < DEVICE_BLOCKS_MIN {
            return Err(DeviceError::TooSmall { bytes });
        }
        // The file system keeps places and sizes in a cache of its own: a write to a file that has completed is not
        // durable before a flush, whatever the disk below does.
        let detected = !is_block_device || has_volatile_cache(metadata.rdev());
        let write_cache = WriteCache {
            volatile: device.volatile_cache.unwrap_or(detected),
            by_operator: device.volatile_cache.is_some(),
            detected_volatile: detected,
        };
        let geometry = DiskGeometry {
            blocks,
            volatile_cache: write_cache.volatile,
        };
        Ok(DeviceFile {
            path: device.path.clone(),
            file,
            geometry,
            is_block_device,
            write_cache,
        })
    }

    /// What a store must know of it.
    pub fn geometry(&self) -> DiskGeometry {
        self.geometry
    }

    /// Its write cache.
    pub fn write_cache(&self) -> WriteCache {
        self.write_cache
    }

    /// Whether it is a raw block device, not a file.
    pub fn is_block_device(&self) -> bool {
        self.is_block_device
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is on it.
    ///
    /// # Errors
    /// It can't be read.
    pub fn probe(&self) -> Result<Probe, DeviceError> {
        probe_file(&self.file, self.geometry)
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// For the ring.
    pub(super) fn into_fd(self) -> OwnedFd {
        self.file.into()
    }
}

/// Looks before opening: some things block, or act, when they are opened.
pub(super) fn metadata_of(path: &Path) -> Result<Metadata, DeviceError> {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(DeviceError::Missing),
        Err(error) => return Err(io_error("looking at it")(error)),
    };
    let kind = metadata.file_type();
    if kind.is_dir() {
        return Err(DeviceError::Kind("a directory"));
    }
    if !kind.is_file() && !kind.is_block_device() {
        return Err(DeviceError::Kind("a pipe, a socket or a character device"));
    }
    Ok(metadata)
}

fn open_existing(path: &Path) -> Result<File, DeviceError> {
    let kind = metadata_of(path)?.file_type();
    // On a block device O_EXCL keeps off file systems that are mounted from it.
    let exclusive = if kind.is_block_device() {
        OFlags::EXCL
    } else {
        OFlags::empty()
    };
    open_direct(
        OpenOptions::new().write(true),
        path,
        exclusive,
        "opening it for reading and writing",
    )
}

fn open_direct(
    options: &mut OpenOptions,
    path: &Path,
    flags: OFlags,
    doing: &'static str,
) -> Result<File, DeviceError> {
    let flags = OFlags::DIRECT | flags;
    let opened = options.read(true).custom_flags(flags.bits() as i32).open(path);
    opened.map_err(|error| match rustix::io::Errno::from_io_error(&error) {
        Some(rustix::io::Errno::BUSY) => DeviceError::InUse,
        Some(rustix::io::Errno::INVAL) => DeviceError::NoDirectIo,
        _ => io_error(doing)(error),
    })
}

fn probe_file(file: &File, geometry: DiskGeometry) -> Result<Probe, DeviceError> {
    let mut first = BlockBuf::zeroed(PROBE_BLOCKS as usize);
    let mut last = BlockBuf::zeroed(1);
    let end = (geometry.blocks - 1) * BLOCK_BYTES as u64;
    let read = |buf: &mut BlockBuf, at| file.read_exact_at(buf, at);
    read(&mut first, 0)
        .and_then(|()| read(&mut last, end))
        .map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput => DeviceError::Sectors(error),
            _ => io_error("reading it")(error),
        })?;
    match probe(&first, &last, geometry) {
        Probe::Blank => {
            let blocks = EDGE_BLOCKS.min(geometry.blocks);
            let mut edges = [BlockBuf::zeroed(blocks as usize), BlockBuf::zeroed(blocks as usize)];
            read(&mut edges[0], 0)
                .and_then(|()| read(&mut edges[1], (geometry.blocks - blocks) * BLOCK_BYTES as u64))
                .map_err(io_error("reading it"))?;
            Ok(probe_edges(&edges[0], &edges[1]))
        }
        found => Ok(found),
    }
}

fn create(path: &Path, size: ByteSize) -> Result<File, DeviceError> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(io_error("making its directory"))?;
    }
    let blank = OpenOptions::new().write(true).create_new(true).open(path);
    let blank = blank.map_err(io_error("making it"))?;
    fill_up(&blank, 0, Some(size))?;
    // The name must be there after a loss of power too, or a device that was acknowledged on would be missing.
    blank.sync_all().map_err(io_error("making it"))?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))
        .and_then(|directory| directory.sync_all())
        .map_err(io_error("making it"))?;
    open_existing(path)
}

/// A file that was just made, or that was made and never got its size, gets it. Returns its bytes.
fn fill_up(file: &File, length: u64, size: Option<ByteSize>) -> Result<u64, DeviceError> {
    match size {
        Some(size) if length == 0 => {
            file.set_len(size.0).map_err(io_error("giving it its size"))?;
            file.sync_all().map_err(io_error("giving it its size"))?;
            Ok(size.0)
        }
        _ => Ok(length),
    }
}

/// As the kernel says of the disk (or of the disk that a partition is on). What it does not say is taken for volatile.
pub(super) fn has_volatile_cache(rdev: u64) -> bool {
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let device = format!("/sys/dev/block/{major}:{minor}");
    let read = |place: &str| std::fs::read_to_string(format!("{device}/{place}")).ok();
    let cache = read("queue/write_cache").or_else(|| read("../queue/write_cache"));
    cache.is_none_or(|cache| cache.trim() != "write through")
}

#[cfg(test)]
mod tests {
    use super::super::reader::DeviceReader;
    use super::*;
    use crate::store::inspect::BlockReader as _;

    fn path(dir: &tempfile::TempDir, name: &str, size: Option<u64>) -> DevicePath {
        DevicePath {
            path: dir.path().join(name),
            create_size: size.map(ByteSize),
            volatile_cache: None,
        }
    }

    #[test]
    fn a_new_file_is_made_sparse_and_blank() {
        let dir = tempfile::tempdir().unwrap();
        let device = DeviceFile::open(&path(&dir, "sub/device", Some(64 << 20))).unwrap();
        assert_eq!(device.geometry().blocks, 16384);
        assert!(device.geometry().volatile_cache);
        assert!(!device.is_block_device());
        assert_eq!(device.probe().unwrap(), Probe::Blank);
        let metadata = std::fs::metadata(device.path()).unwrap();
        assert!(metadata.blocks() < 100, "it takes no space yet");
    }

    #[test]
    fn a_device_belongs_to_one_process() {
        let dir = tempfile::tempdir().unwrap();
        let place = path(&dir, "device", Some(64 << 20));
        let first = DeviceFile::open(&place).unwrap();
        assert!(matches!(DeviceFile::open(&place), Err(DeviceError::InUse)));
        assert!(matches!(DeviceReader::open(&place.path), Err(DeviceError::InUse)));
        let geometry = first.geometry();
        drop(first);
        let readers = [(); 2].map(|()| DeviceReader::open(&place.path).unwrap());
        assert_eq!(readers[0].geometry(), geometry, "who only reads shares it");
        assert!(matches!(DeviceFile::open(&place), Err(DeviceError::InUse)));
        drop(readers);
        DeviceFile::open(&place).unwrap();
    }

    #[test]
    fn what_is_no_device_is_refused_with_words() {
        let dir = tempfile::tempdir().unwrap();
        let error = DeviceFile::open(&path(&dir, "none", None)).unwrap_err();
        assert!(error.to_string().contains("does not exist"), "{error}");
        let error = DeviceFile::open(&path(&dir, "", None)).unwrap_err();
        assert!(error.to_string().contains("a directory"), "{error}");
        for (name, expected) in [("none", "does not exist"), ("", "a directory")] {
            let error = DeviceReader::open(&dir.path().join(name)).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
        std::fs::write(dir.path().join("small"), [0; 100]).unwrap();
        let error = DeviceFile::open(&path(&dir, "small", None)).unwrap_err();
        assert!(error.to_string().contains("at least 1 MiB"), "{error}");
        let error = DeviceFile::open(&path(&dir, "tiny", Some(100))).unwrap_err();
        assert!(error.to_string().contains("at least 1 MiB"), "{error}");
        assert!(
            !dir.path().join("tiny").exists(),
            "it would be in the way of a better size"
        );
        let null = DevicePath {
            path: "/dev/null".into(),
            ..path(&dir, "", None)
        };
        let error = DeviceFile::open(&null).unwrap_err();
        assert!(error.to_string().contains("character device"), "{error}");
    }

    #[test]
    fn something_else_on_it_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let place = path(&dir, "device", Some(4 << 20));
        drop(DeviceFile::open(&place).unwrap());
        let file = OpenOptions::new().write(true).open(&place.path).unwrap();
        file.write_all_at(b"QFI\xfb", 0).unwrap();
        let device = DeviceFile::open(&place).unwrap();
        let Probe::Foreign { words } = device.probe().unwrap() else {
            panic!("a QCOW2 image is foreign")
        };
        assert!(words.contains("QCOW2"), "{words}");
        drop(device);
        // What does not begin at the start of a disk is seen too.
        for (at, magic, name) in [(64 << 10, b"x".as_slice(), "something"), (65_600, b"_BHRfS_M", "Btrfs")] {
            file.set_len(0).unwrap();
            file.set_len(4 << 20).unwrap();
            file.write_all_at(magic, at).unwrap();
            let Probe::Foreign { words } = DeviceFile::open(&place).unwrap().probe().unwrap() else {
                panic!("{name} is foreign")
            };
            assert!(words.contains(name), "{words}");
        }
        file.set_len(0).unwrap();
        file.set_len(4 << 20).unwrap();
        assert_eq!(DeviceFile::open(&place).unwrap().probe().unwrap(), Probe::Blank);
    }
}
