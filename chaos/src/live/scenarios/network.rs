//! Faults of connections.

use std::time::Duration;

use crate::live::cluster::Part;
use crate::live::inject::proxy;
use crate::live::report::{Failure, FailureKind};
use crate::live::run::Run;
use crate::live::steps::{Fault, PAUSE_MAX, before, fault};

/// Those of connections.
pub const FAULTS: &[Fault] = &[fault("reset", "reset", Some(PAUSE_MAX), reset)];

/// Sets a fault of the connections to a part.
pub fn set(run: &mut Run, part: Part, fault: proxy::Fault) -> Result<(), Failure> {
    run.timeline.note(format!("connections to {part}: {fault}"));
    let Some(proxy) = run.proxies.get(&part) else {
        return Err(Failure::new(
            FailureKind::Setup,
            format!("there is no proxy before {part}"),
        ));
    };
    proxy
        .set(fault)
        .map_err(|error| Failure::new(FailureKind::Setup, format!("the proxy before {part}: {error}")))
}

/// Connections to a node end in the middle of frames, again and again.
fn reset(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let nodes: Vec<Part> = run.cluster.nodes().collect();
    let node = *run.rng.pick(&nodes);
    let bytes = run.rng.within(1 << 10, 1 << 20);
    set(run, node, proxy::Fault::ResetAfter { bytes })?;
    run.load(Duration::from_secs(3))?;
    run.heal()
}
