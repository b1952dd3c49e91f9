//! Formatting and opening a store on a device: nothing else happens on the ring meanwhile.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use cairn_proto::disk::DiskGeometry;

use super::clock;
use super::control::ControlQueue;
use super::ring::{Completion, Ring};
use super::thread::DriverError;
use crate::store::{FormatParams, Formatter, Identity, OpenExpectation, Store, StoreAction, StoreLimits, StoreState};

/// How long the ring is waited for before the control thread is looked at again.
const PATIENCE: Duration = Duration::from_millis(200);

/// How often a device that takes long to open says how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// Writes a fresh device.
pub(super) fn format(
    ring: &mut Ring,
    file: &Rc<OwnedFd>,
    params: FormatParams,
    geometry: DiskGeometry,
) -> Result<Identity, DriverError> {
    let mut formatter: Formatter = Store::format(params, geometry).map_err(DriverError::Store)?;
    loop {
        while let Some(op) = formatter.poll_op() {
            ring.disk(file, op);
        }
        if let Some(result) = formatter.result() {
            return result.map_err(DriverError::Store);
        }
        ring.submit_and_wait(PATIENCE).map_err(ring_error)?;
        while let Some(completion) = ring.completion() {
            match completion {
                Completion::Disk(done) => formatter.handle_disk(done),
                _ => unreachable!("the ring serves the device alone"),
            }
        }
    }
}

/// Opens the store. Recovery may take a while; the control thread can end it.
pub(super) fn open(
    ring: &mut Ring,
    file: &Rc<OwnedFd>,
    expect: OpenExpectation,
    geometry: DiskGeometry,
    limits: StoreLimits,
    control: &ControlQueue,
) -> Result<Store, DriverError> {
    let mut store = Store::open(expect, geometry, limits, clock::now());
    let mut tell_at = clock::now() + PROGRESS_INTERVAL;
    loop {
        while let Some(action) = store.poll_action() {
            match action {
                StoreAction::Disk(op) => ring.disk(file, op),
                StoreAction::Reply(ticket, _) => unreachable!("{ticket:?} was not asked"),
            }
        }
        match store.state() {
            StoreState::Open => {
                tell_damage(&store);
                return Ok(store);
            }
            StoreState::Refused(error) => return Err(DriverError::Store(error)),
            StoreState::Poisoned(error) => {
                return Err(DriverError::Io {
                    doing: "recovering the device",
                    error: io::Error::from_raw_os_error(error.errno),
                });
            }
            StoreState::Opening(_) if control.is_stopping() => return Err(DriverError::Stopped),
            StoreState::Opening(progress) if clock::now() >= tell_at => {
                tell_at = clock::now() + PROGRESS_INTERVAL;
                let device = store.identity().map(|identity| identity.device.uuid);
                tracing::info!(?device, "still opening: {progress}");
            }
            StoreState::Opening(_) => {}
        }
        let now = clock::now();
        let timer = store.poll_timeout().map_or(PATIENCE, |at| at.saturating_since(now));
        ring.submit_and_wait(timer.min(PATIENCE)).map_err(ring_error)?;
        let now = clock::now();
        while let Some(completion) = ring.completion() {
            match completion {
                Completion::Disk(done) => store.handle_disk(now, done),
                _ => unreachable!("the ring serves the device alone"),
            }
        }
        if store.poll_timeout().is_some_and(|at| at <= now) {
            store.handle_timeout(now);
        }
    }
}

/// What was found damaged, and did no harm because there are copies of it, is told all the same.
fn tell_damage(store: &Store) {
    let counters = store.counters();
    let (copies, checkpoints) = (counters.superblocks_damaged, counters.checkpoints_damaged);
    let map_pages = counters.map_copies_damaged;
    if let Some(lost) = store.lost_parts().filter(|lost| lost.count > 0) {
        let device = store.identity().map(|identity| identity.device.uuid);
        tracing::warn!(?device, "{lost}; check the disk");
    }
    if copies + checkpoints + map_pages > 0 {
        let device = store.identity().map(|identity| identity.device.uuid);
        tracing::warn!(
            ?device,
            "{copies} superblock copies, {checkpoints} checkpoints and {map_pages} copies of pages of the free-space map were \
             damaged; others were good, nothing is lost, and \
             the copies are written anew; check the disk"
        );
    }
}

pub(super) fn ring_error(error: io::Error) -> DriverError {
    DriverError::Io {
        doing: "waiting for the io_uring",
        error,
    }
}
