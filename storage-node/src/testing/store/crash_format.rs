//! Power cuts while a device is being formatted: at every operation, with what was not flushed lost, torn and reordered.
//! Afterwards it is well formatted, or as it was before anything counted, or formatting can begin anew without anybody
//! being asked again.

use cairn_proto::disk::{DeviceBlock, DiskGeometry};
use cairn_proto::ids::Incarnation;
use cairn_proto::limits::BLOCK_BYTES;

use super::content::params;
use super::rig::{Rig, formatted, token};
use crate::store::inspect::{InspectOptions, inspect};
use crate::store::superblock::Probe;
use crate::store::{Formatter, Identity, Store, StoreLimits, StoreState};
use crate::testing::store::workload::Workload;
use crate::testing::{Cut, MemoryDevice, Prng};

/// What stood on the device before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Before {
    /// Nothing.
    Blank,
    /// A device of Cairn with data; it is formatted with the same UUID and another incarnation.
    Cairn,
    /// Something else's data in every block.
    Foreign,
}

/// Formats a device of so many blocks and cuts power at every operation of it. Returns how many outcomes were looked at.
///
/// # Errors
/// What was found, in words.
pub fn cut_formatting(geometry: DiskGeometry, before: Before, seed: u64) -> Result<u64, String> {
    let mut prng = Prng::new(seed);
    let (mut device, former) = prepared(geometry, before, &mut prng);
    let mut formatter = reformat(geometry);
    let mut outcomes = 0;
    let mut look = |device: &MemoryDevice, prng: &mut Prng| {
        let mut cuts = vec![Cut::AllLost, Cut::AllKept];
        cuts.extend((0..1u64 << device.blocks_at_risk().min(4)).map(Cut::Blocks));
        cuts.extend([Cut::Torn; 8]);
        for cut in cuts {
            let mut device = device.clone();
            device.power_cut_as(cut, prng);
            outcomes += 1;
            after_cut(device, before, former, prng).map_err(|words| format!("{before:?}, {cut:?}: {words}"))?;
        }
        Ok::<(), String>(())
    };
    loop {
        while let Some(op) = formatter.poll_op() {
            device.submit(op);
            look(&device, &mut prng)?;
        }
        let in_flight: Vec<_> = device.in_flight().map(token).collect();
        if in_flight.is_empty() {
            break;
        }
        let chosen = in_flight[prng.below(in_flight.len() as u64) as usize];
        let done = device.complete(chosen);
        look(&device, &mut prng)?;
        formatter.handle_disk(done);
    }
    let identity = formatter.result().ok_or("formatting does not end")?;
    let identity = identity.map_err(|error| error.to_string())?;
    device.power_cut_as(Cut::AllLost, &mut prng);
    let found = opened(device, &mut prng)?;
    if found != Some(identity) {
        return Err(format!("{identity:?} was formatted, and {found:?} is there"));
    }
    Ok(outcomes)
}

fn prepared(geometry: DiskGeometry, before: Before, prng: &mut Prng) -> (MemoryDevice, Option<Identity>) {
    match before {
        Before::Blank => (MemoryDevice::new(geometry), None),
        Before::Foreign => {
            let mut device = MemoryDevice::new(geometry);
            for place in 0..geometry.blocks {
                let word = prng.next_u64().to_le_bytes();
                let mut block = [0; BLOCK_BYTES];
                block.chunks_exact_mut(8).for_each(|bytes| bytes.copy_from_slice(&word));
                device.poke(DeviceBlock(place), &block);
            }
            (device, None)
        }
        Before::Cairn => {
            let mut rig = Rig::opening(formatted(geometry), StoreLimits::tiny(), prng.next_u64());
            rig.settle();
            let mut workload = Workload::new(64, 8);
            for _ in 0..40 {
                let request = workload.request(prng, true);
                rig.call(request);
            }
            let identity = rig.store.identity();
            rig.device.power_cut_as(Cut::AllKept, prng);
            (rig.device, identity)
        }
    }
}

fn reformat(geometry: DiskGeometry) -> Formatter {
    let params = crate::store::FormatParams {
        incarnation: Incarnation(99),
        ..params()
    };
    Store::format(params, geometry).expect("the device is long enough")
}

fn after_cut(
    mut device: MemoryDevice,
    before: Before,
    former: Option<Identity>,
    prng: &mut Prng,
) -> Result<(), String> {
    let inspection = inspect(&mut device, InspectOptions::default(), &mut |_| {});
    match inspection.probe {
        Probe::Cairn(superblock) => {
            let found = opened(device, prng)?;
            let identity = superblock.identity;
            if found != Some(identity) || (identity.device.incarnation != Incarnation(99) && Some(identity) != former) {
                return Err(format!("{found:?} is there"));
            }
            Ok(())
        }
        // Nothing of it counted yet.
        Probe::Foreign { .. } if before == Before::Foreign => Ok(()),
        Probe::Blank | Probe::Unfinished => {
            let geometry = device.geometry();
            let mut formatter = reformat(geometry);
            while formatter.result().is_none() {
                while let Some(op) = formatter.poll_op() {
                    device.submit(op);
                }
                let next = device.in_flight().map(token).next();
                let next = next.ok_or("formatting again does not end")?;
                let done = device.complete(next);
                formatter.handle_disk(done);
            }
            match opened(device, prng)? {
                Some(identity) if identity.device.incarnation == Incarnation(99) => Ok(()),
                other => Err(format!("formatted again it is {other:?}")),
            }
        }
        other => Err(format!("it is taken for {other:?}")),
    }
}

/// Who the device is when it is opened; it must open, and all superblocks must be whole then.
fn opened(device: MemoryDevice, prng: &mut Prng) -> Result<Option<Identity>, String> {
    let mut rig = Rig::opening(device, StoreLimits::tiny(), prng.next_u64());
    rig.settle();
    if rig.store.state() != StoreState::Open {
        return Err(format!("it is {:?}", rig.store.state()));
    }
    rig.store.check_invariants();
    let identity = rig.store.identity();
    let inspection = inspect(&mut rig.device, InspectOptions::default(), &mut |_| {});
    match inspection.damage.listed.first() {
        None => Ok(identity),
        Some(found) => Err(format!("once open, {found:?}")),
    }
}
