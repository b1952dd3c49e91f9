//! A device and its ring without network or host: for benches and tools that drive a store, or the device itself, the way
//! the device's thread does.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use cairn_proto::disk::{DiskDone, DiskGeometry, DiskOp};

use super::control::ControlQueue;
use super::device::DeviceFile;
use super::open;
use super::ring::{Completion, Ring};
use super::thread::{DriverError, no_ring};
use crate::store::{FormatParams, Identity, OpenExpectation, Store, StoreLimits};

/// An open device with a ring of its own, used by one thread. What is in flight when it is dropped is given up.
pub struct BareDevice {
    ring: Ring,
    file: Rc<OwnedFd>,
    geometry: DiskGeometry,
}

impl BareDevice {
    /// Makes a ring for the device.
    ///
    /// # Errors
    /// No io_uring is to be had.
    pub fn new(device: DeviceFile) -> Result<BareDevice, DriverError> {
        let geometry = device.geometry();
        let file = Rc::new(device.into_fd());
        let ring = Ring::new().map_err(no_ring)?;
        Ok(BareDevice { ring, file, geometry })
    }

    /// What a store must know of the device.
    pub fn geometry(&self) -> DiskGeometry {
        self.geometry
    }

    /// Writes a fresh store. Nothing may be in flight.
    ///
    /// # Errors
    /// The device is too short, or fails.
    pub fn format(&mut self, params: FormatParams) -> Result<Identity, DriverError> {
        open::format(&mut self.ring, &self.file, params, self.geometry)
    }

    /// Opens the store on the device; returns when it is recovered. Nothing may be in flight. What the store wants done
    /// from then on is to be submitted here.
    ///
    /// # Errors
    /// There is no store, it is damaged, or the device fails.
    pub fn open(&mut self, limits: StoreLimits) -> Result<Store, DriverError> {
        let control = ControlQueue::new(1).map_err(|error| DriverError::Io {
            doing: "making an eventfd",
            error,
        })?;
        let expect = OpenExpectation::default();
        open::open(&mut self.ring, &self.file, expect, self.geometry, limits, &control)
    }

    /// Gives an operation to the ring; the kernel takes it at the next [`wait`](Self::wait).
    pub fn submit(&mut self, op: DiskOp) {
        self.ring.disk(&self.file, op);
    }

    /// The device's descriptor, to flush it past the ring.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn descriptor(&self) -> std::io::Result<OwnedFd> {
        self.file.try_clone()
    }

    /// Operations that have not ended.
    pub fn in_flight(&self) -> usize {
        self.ring.in_flight()
    }

    /// Hands over what is submitted, and waits until something has ended or so much time has passed.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn wait(&mut self, timeout: Duration) -> Result<(), DriverError> {
        self.ring.submit_and_wait(timeout).map_err(open::ring_error)
    }

    /// What has ended next.
    pub fn completion(&mut self) -> Option<DiskDone> {
        self.ring.completion().map(|completion| match completion {
            Completion::Disk(done) => done,
            _ => unreachable!("the ring serves the device alone"),
        })
    }
}
