//! A device that is only looked at: opened for reading, locked against those who would write.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::disk::{DeviceBlock, DiskError, DiskGeometry};
use cairn_proto::limits::BLOCK_BYTES;
use rustix::fs::{FlockOperation, OFlags, SeekFrom, flock, seek};

use super::device::{DeviceError, has_volatile_cache, io_error, metadata_of};
use super::limits::READ_THREADS;
use crate::store::inspect::BlockReader;

const EIO: i32 = 5;

/// A device, or a copy of one, opened for reading. While it is open no node can serve it, and none is when it opens.
#[derive(Debug)]
pub struct DeviceReader {
    file: File,
    bytes: u64,
    is_block_device: bool,
    volatile_cache: bool,
}

impl DeviceReader {
    /// Opens it and takes the shared lock.
    ///
    /// # Errors
    /// In words that say what to do; [`DeviceError::InUse`] while a node serves it.
    pub fn open(path: &Path) -> Result<DeviceReader, DeviceError> {
        let metadata = metadata_of(path)?;
        let open = |flags: OFlags| {
            OpenOptions::new()
                .read(true)
                .custom_flags(flags.bits() as i32)
                .open(path)
        };
        // Past the page cache, to see what the device has. A copy may lie where only the page cache is to be had.
        let opened = open(OFlags::DIRECT).or_else(|error| match rustix::io::Errno::from_io_error(&error) {
            Some(rustix::io::Errno::INVAL) => open(OFlags::empty()),
            _ => Err(error),
        });
        let file = opened.map_err(io_error("opening it for reading"))?;
        flock(&file, FlockOperation::NonBlockingLockShared).map_err(|errno| match errno {
            rustix::io::Errno::WOULDBLOCK => DeviceError::InUse,
            errno => io_error("locking it")(errno.into()),
        })?;
        let bytes = seek(&file, SeekFrom::End(0)).map_err(|errno| io_error("asking for its size")(errno.into()))?;
        let is_block_device = metadata.file_type().is_block_device();
        Ok(DeviceReader {
            file,
            bytes,
            is_block_device,
            volatile_cache: !is_block_device || has_volatile_cache(metadata.rdev()),
        })
    }

    /// Its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether it is a raw block device, not a file.
    pub fn is_block_device(&self) -> bool {
        self.is_block_device
    }

    /// The first bytes, for a person who wonders what it is; fewer when there are no more.
    pub fn first_bytes(&self) -> Vec<u8> {
        let mut block = BlockBuf::zeroed(1);
        let count = self.file.read_at(&mut block, 0).unwrap_or(0);
        block[..count.min(16)].to_vec()
    }

    fn read_one(&self, at: DeviceBlock, blocks: u32) -> Result<Bytes, DiskError> {
        let mut buf = BlockBuf::zeroed(blocks as usize);
        let read = self.file.read_exact_at(&mut buf, at.0 * BLOCK_BYTES as u64);
        read.map_err(|error: io::Error| DiskError {
            errno: error.raw_os_error().unwrap_or(EIO),
        })?;
        Ok(buf.freeze())
    }
}

impl BlockReader for DeviceReader {
    fn geometry(&self) -> DiskGeometry {
        DiskGeometry {
            blocks: self.bytes / BLOCK_BYTES as u64,
            volatile_cache: self.volatile_cache,
        }
    }

    fn read(&mut self, wanted: &[(DeviceBlock, u32)]) -> Vec<Result<Bytes, DiskError>> {
        let this = &*self;
        let threads = READ_THREADS.min(wanted.len() / 2);
        if threads < 2 {
            return wanted.iter().map(|(at, blocks)| this.read_one(*at, *blocks)).collect();
        }
        let next = AtomicUsize::new(0);
        let (sender, receiver) = mpsc::channel();
        std::thread::scope(|scope| {
            for _ in 0..threads {
                let (next, sender) = (&next, sender.clone());
                scope.spawn(move || {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some((at, blocks)) = wanted.get(index) else {
                            return;
                        };
                        // The receiver outlives the threads.
                        let _ = sender.send((index, this.read_one(*at, *blocks)));
                    }
                });
            }
        });
        drop(sender);
        let mut results: Vec<Result<Bytes, DiskError>> = vec![Err(DiskError { errno: EIO }); wanted.len()];
        receiver.into_iter().for_each(|(index, result)| results[index] = result);
        results
    }
}
