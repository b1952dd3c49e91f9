//! The file system with the one file: FUSE requests become requests to the disk, and its answers replies.

use std::ffi::{OsStr, OsString};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite,
    Request as FuseRequest, WriteFlags,
};

use rustix::fs::OFlags;

use super::disk::{Answer, Disk, Request, Trouble};
use super::media::Backing;
use crate::live::inject::limits::{SHIM_REQUEST_BYTES, SHIM_REQUESTS_MAX};

const DEVICE_INODE: INodeNo = INodeNo(2);
/// Whatever is known of the file may change by commands: nothing is cached.
const TTL: Duration = Duration::ZERO;

/// From the writing to the end of the flush of a write that is to be durable: as on a real device, the power can go between the two.
const FLUSH_TIME: Duration = Duration::from_millis(1);

/// Where an answer goes.
#[derive(Debug)]
pub(super) enum Ticket {
    Read(ReplyData),
    Write(ReplyWrite, u32),
    /// A write that is to be durable when it is answered: a flush comes before that.
    WriteThrough(ReplyWrite, u32),
    Flush(ReplyEmpty),
}

impl Ticket {
    fn answer(self, answer: Answer) {
        let errno = |trouble| match trouble {
            Trouble::Eio => Errno::EIO,
            Trouble::Enospc => Errno::ENOSPC,
            Trouble::Outside => Errno::EINVAL,
        };
        match (self, answer) {
            (Ticket::Read(reply), Ok(bytes)) => reply.data(&bytes),
            (Ticket::Read(reply), Err(trouble)) => reply.error(errno(trouble)),
            (Ticket::Write(reply, length) | Ticket::WriteThrough(reply, length), Ok(_)) => reply.written(length),
            (Ticket::Write(reply, _) | Ticket::WriteThrough(reply, _), Err(trouble)) => reply.error(errno(trouble)),
            (Ticket::Flush(reply), Ok(_)) => reply.ok(),
            (Ticket::Flush(reply), Err(trouble)) => reply.error(errno(trouble)),
        }
    }
}

pub(super) type ShimDisk = Disk<Backing, Ticket>;

/// What the file system, its worker and the commands share.
#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    disk: ShimDisk,
    ended: bool,
}

impl Shared {
    pub(super) fn new(disk: ShimDisk) -> Shared {
        Shared {
            state: Mutex::new(State { disk, ended: false }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of the lock panics")
    }

    /// Does something with the disk, and answers what became ready by it.
    pub(super) fn with<R>(&self, what: impl FnOnce(&mut ShimDisk) -> (R, Vec<(Ticket, Answer)>)) -> R {
        let mut state = self.lock();
        let (result, answers) = what(&mut state.disk);
        drop(state);
        self.changed.notify_all();
        self.answer(answers);
        result
    }

    fn answer(&self, answers: Vec<(Ticket, Answer)>) {
        for (ticket, answer) in answers {
            match (ticket, answer) {
                (Ticket::WriteThrough(reply, length), Ok(_)) => {
                    let (now, ticket) = (Instant::now(), Ticket::Write(reply, length));
                    self.with(|disk| {
                        (
                            (),
                            disk.submit_after(now, FLUSH_TIME, Request::Flush, ticket)
                                .into_iter()
                                .collect(),
                        )
                    });
                }
                (ticket, answer) => ticket.answer(answer),
            }
        }
    }

    /// Looks at the disk.
    pub(super) fn look<R>(&self, what: impl FnOnce(&ShimDisk) -> R) -> R {
        what(&self.lock().disk)
    }

    fn submit(&self, request: Request, ticket: Ticket) {
        self.with(|disk| ((), disk.submit(Instant::now(), request, ticket).into_iter().collect()));
    }

    /// Ends the worker.
    pub(super) fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// Answers what is delayed when its time has come, until the end.
    pub(super) fn work(&self) {
        let mut state = self.lock();
        while !state.ended {
            let now = Instant::now();
            let answers = state.disk.due(now);
            if !answers.is_empty() {
                drop(state);
                self.answer(answers);
                state = self.lock();
                continue;
            }
            let woken = "no holder of the lock panics";
            state = match state.disk.next_due() {
                Some(at) => {
                    self.changed
                        .wait_timeout(state, at.saturating_duration_since(now))
                        .expect(woken)
                        .0
                }
                None => self.changed.wait(state).expect(woken),
            };
        }
    }
}

/// See the module.
pub(super) struct ShimFs {
    pub(super) shared: Arc<Shared>,
    /// The file's.
    pub(super) name: OsString,
}

impl ShimFs {
    fn attr(&self, inode: INodeNo) -> Option<FileAttr> {
        let bytes = self.shared.look(Disk::bytes);
        let (kind, size, perm, nlink) = match inode {
            INodeNo::ROOT => (FileType::Directory, 0, 0o755, 2),
            DEVICE_INODE => (FileType::RegularFile, bytes, 0o600, 1),
            _ => return None,
        };
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size / 512,
            atime: SystemTime::UNIX_EPOCH,
            mtime: SystemTime::UNIX_EPOCH,
            ctime: SystemTime::UNIX_EPOCH,
            crtime: SystemTime::UNIX_EPOCH,
            kind,
            perm,
            nlink,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

impl Filesystem for ShimFs {
    fn init(&mut self, _: &FuseRequest, config: &mut KernelConfig) -> std::io::Result<()> {
        // Each gives back what it was; the kernel's own bounds lie above these.
        let _ = config.set_max_write(SHIM_REQUEST_BYTES);
        let _ = config.set_max_background(SHIM_REQUESTS_MAX);
        // Without it direct I/O through a ring is done one by one; a kernel that lacks it is slower, not wrong.
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        Ok(())
    }

    fn lookup(&self, _: &FuseRequest, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attr(DEVICE_INODE) {
            Some(attr) if parent == INodeNo::ROOT && name == self.name => reply.entry(&TTL, &attr, Generation(0)),
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &FuseRequest, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(inode) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &FuseRequest, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        if inode == DEVICE_INODE {
            let flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
            reply.opened(FileHandle(0), flags);
        } else {
            reply.error(Errno::EISDIR);
        }
    }

    fn read(
        &self,
        _: &FuseRequest,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let bytes = self.shared.look(Disk::bytes);
        // A file's end, not an error.
        let length = u64::from(size).min(bytes.saturating_sub(offset)) as usize;
        let offset = offset.min(bytes);
        self.shared
            .submit(Request::Read { offset, length }, Ticket::Read(reply));
    }

    fn write(
        &self,
        _: &FuseRequest,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let bytes = data.to_vec();
        let length = bytes.len() as u32;
        // The flags of the file, and of this one write.
        let is_durable = flags.0 as u32 & OFlags::DSYNC.bits() != 0;
        let ticket = if is_durable {
            Ticket::WriteThrough(reply, length)
        } else {
            Ticket::Write(reply, length)
        };
        self.shared.submit(Request::Write { offset, bytes }, ticket);
    }

    fn fsync(&self, _: &FuseRequest, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.shared.submit(Request::Flush, Ticket::Flush(reply));
    }

    /// A file was closed: that flushes nothing.
    fn flush(&self, _: &FuseRequest, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn readdir(&self, _: &FuseRequest, _: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let entries = [
            (INodeNo::ROOT, FileType::Directory, &OsString::from(".")),
            (INodeNo::ROOT, FileType::Directory, &OsString::from("..")),
            (DEVICE_INODE, FileType::RegularFile, &self.name),
        ];
        for (i, (inode, kind, name)) in entries.into_iter().enumerate().skip(offset as usize) {
            if reply.add(inode, i as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }
}
