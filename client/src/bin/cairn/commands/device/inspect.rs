//! `cairn node inspect`.

use cairn_proto::limits::BLOCK_BYTES;
use cairn_storage_node::driver::{DeviceError, DeviceReader};
use cairn_storage_node::store::inspect::{InspectOptions, Inspection, inspect};
use cairn_storage_node::store::{OpenError, Probe};

use super::progress::Progress;
use super::record::Record;
use super::{failure_of, patiently};
use crate::args::{Global, InspectDevice};
use crate::failure::{Failure, Kind};
use crate::output;

pub(crate) fn run(global: &Global, args: &InspectDevice) -> Result<(), Failure> {
    let in_use = |error: &DeviceError| matches!(error, DeviceError::InUse);
    let opened = patiently(|| DeviceReader::open(&args.path), in_use);
    let mut device = opened.map_err(|error| failure_of(&args.path, &error))?;
    let options = InspectOptions {
        verify: args.verify,
        volume: args.volume,
    };
    let mut progress = Progress::new();
    let found = inspect(&mut device, options, &mut |so_far| progress.tell(so_far));
    progress.end();
    let record = Record::new(args, &device, &found);
    output::show(global.json, &record, || super::text::describe(&record))?;
    verdict(args, &device, &found)
}

/// What it ends with.
fn verdict(args: &InspectDevice, device: &DeviceReader, found: &Inspection) -> Result<(), Failure> {
    let path = args.path.display();
    let start = || {
        let bytes = device.first_bytes();
        let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("it starts with the bytes {}", hex.join(" "))
    };
    match &found.contents {
        Ok(_) if found.damage.total == 0 => Ok(()),
        Ok(_) => {
            let number = output::count(found.damage.total, "damaged part");
            let failure = Failure::new(Kind::Damaged, format!("{path}: {number}"));
            Err(failure.hint("Copies of the blocks are on other devices: while they are, replace this one."))
        }
        // Too short for anything to have been looked for.
        Err(OpenError::Length { .. }) => {
            let bytes = device.bytes();
            let words = format!("{path} is no device of Cairn: it has {bytes} bytes; {}", start());
            Err(Failure::new(Kind::NotFound, words))
        }
        Err(_) if matches!(found.probe, Probe::Blank | Probe::Unfinished | Probe::Foreign { .. }) => {
            let what = match &found.probe {
                Probe::Foreign { words } => format!("it holds {words}; {}", start()),
                Probe::Unfinished => "its formatting did not end; format it again, or give it to a node".to_string(),
                _ => "it is blank".to_string(),
            };
            Err(Failure::new(
                Kind::NotFound,
                format!("{path} is no device of Cairn: {what}"),
            ))
        }
        Err(error @ (OpenError::Damaged { .. } | OpenError::Truncated { .. })) => {
            Err(Failure::new(Kind::Damaged, format!("{path}: {error}")))
        }
        Err(error) => Err(Failure::failed(format!("{path}: {error}"))),
    }
}

/// Blocks as bytes. What a damaged device counts may be any number.
pub(super) fn bytes(blocks: u64) -> u64 {
    blocks.saturating_mul(BLOCK_BYTES as u64)
}
