//! Power is cut after every operation of the device, and what is recovered is compared with what must be there.

use cairn_proto::ids::{CommitSeq, Epoch};

use super::model::*;
use super::rig::*;
use crate::store::api::{StoreError, StoreReply, StoreRequest};
use crate::store::{StoreLimits, StoreState};
use crate::testing::store::crash::brief;
use crate::testing::{MemoryDevice, Prng};

/// What has been asked and answered.
#[derive(Clone, Default)]
struct History {
    acknowledged: Model,
    commit: u64,
    /// In flight, by ticket.
    open: Vec<(u64, StoreRequest)>,
}

impl History {
    fn take_replies(&mut self, rig: &mut Rig) -> Result<(), String> {
        let mut done = std::mem::take(&mut rig.replies);
        for (ticket, request) in std::mem::take(&mut self.open) {
            match done.remove(&ticket) {
                None => self.open.push((ticket, request)),
                Some(StoreReply::Durable { commit, .. }) => {
                    self.commit = self.commit.max(commit.0);
                    self.acknowledged.apply(&request);
                }
                Some(StoreReply::Failed(StoreError::NoSpace | StoreError::NoReplica)) => {}
                Some(other) => return Err(format!("{request:?} was answered {other:?}")),
            }
        }
        Ok(())
    }

    /// The state must be what was acknowledged, with any requests in flight done as a whole. Returns it.
    fn check(&self, found: &Model) -> Result<(), String> {
        for subset in 0..1u32 << self.open.len() {
            let mut expected = self.acknowledged.clone();
            let done = self.open.iter().enumerate().filter(|(i, _)| subset >> i & 1 == 1);
            done.for_each(|(_, (_, request))| expected.apply(request));
            if expected == *found {
                return Ok(());
            }
        }
        let words = difference(&self.acknowledged, found);
        Err(format!(
            "{words}; in flight: {:?}",
            self.open.iter().map(|(_, request)| brief(request)).collect::<Vec<_>>()
        ))
    }
}

/// Power fails; or the process is killed, and what the device has in its cache is there until power fails later.
fn cut(device: &mut MemoryDevice, prng: &mut Prng) {
    if prng.chance(1, 3) {
        device.process_killed(prng);
    } else {
        device.power_cut(prng);
    }
}

/// Recovers a device after a power cut or a kill, perhaps with further ones on the way.
fn recover(device: &MemoryDevice, limits: &StoreLimits, seed: u64) -> Result<Rig, String> {
    let mut prng = Prng::new(seed);
    let mut device = device.clone();
    cut(&mut device, &mut prng);
    while prng.chance(1, 4) {
        let mut rig = Rig::opening(device, limits.clone(), prng.below(u64::MAX));
        for _ in 0..prng.below(30) {
            rig.step();
        }
        device = rig.device;
        cut(&mut device, &mut prng);
    }
    let mut rig = Rig::opening(device, limits.clone(), prng.below(u64::MAX));
    rig.settle();
    match rig.store.state() {
        StoreState::Open => Ok(rig),
        other => Err(format!("after a power cut the store is {other:?}")),
    }
}

fn check_recovered(device: &MemoryDevice, limits: &StoreLimits, seed: u64, history: &History) -> Result<Rig, String> {
    let mut rig = recover(device, limits, seed)?;
    let recovered = rig.store.recovered_seq();
    if recovered < CommitSeq(history.commit) {
        return Err(format!("recovered commit {recovered}, acknowledged {}", history.commit));
    }
    let found = Model::observe(&mut rig)?;
    history.check(&found)?;
    rig.store.check_invariants();
    let data = rig.store.space().data;
    if data != found.data_blocks()
        || rig
            .store
            .replica_of(GROUP)
            .is_some_and(|replica| replica.blocks_used != data)
    {
        return Err(format!("{data} blocks hold data, {} are listed", found.data_blocks()));
    }
    Ok(rig)
}

/// One run: a workload on a small device, with a power cut after each operation. Returns how many cuts there were.
pub(crate) fn crash_run(blocks: u64, limits: &StoreLimits, seed: u64, operations: u64) -> Result<u64, String> {
    let mut prng = Prng::new(seed);
    let mut rig = Rig::on(blocks, seed % 4 != 3, limits.clone(), seed);
    rig.create();
    let mut history = History::default();
    history.acknowledged.replica = Some((Epoch(1), 1));
    let mut workload = Workload::new(330, 24);
    let in_flight_max = prng.between(1, 5);
    let mut cuts = 0;
    while cuts < operations {
        let alone = history.open.is_empty() && prng.chance(1, 8);
        let quiet = history.open.iter().all(|(_, request)| {
            !matches!(
                request,
                StoreRequest::CreateReplica { .. }
                    | StoreRequest::DropReplica { .. }
                    | StoreRequest::DeleteLayer { .. }
                    | StoreRequest::RaiseFloor { .. }
            ) && !matches!(
                request,
                StoreRequest::Copy {
                    apply: cairn_proto::block::Apply::Resync(_),
                    ..
                } | StoreRequest::CopyHole {
                    apply: cairn_proto::block::Apply::Resync(_),
                    ..
                }
            )
        });
        if (history.open.len() as u64) < in_flight_max && quiet && prng.chance(2, 3) {
            let request = workload.request(&mut prng, alone);
            let ticket = rig.submit(request.clone());
            history.open.push((ticket, request));
        } else if !rig.step() {
            rig.pass_time();
        }
        history.take_replies(&mut rig)?;
        cuts += 1;
        let words = |error| format!("seed {seed}, after cut {cuts}: {error}");
        let recovered = check_recovered(&rig.device, limits, prng.below(u64::MAX), &history).map_err(words)?;
        if prng.chance(1, 40) {
            rig = recovered;
            history.acknowledged = Model::observe(&mut rig).map_err(words)?;
            history.commit = rig.store.commit_seq().0;
            history.open.clear();
        }
    }
    Ok(cuts)
}

/// Limits that differ from seed to seed, all of them small.
fn small_limits(seed: u64) -> StoreLimits {
    let mut prng = Prng::new(seed);
    StoreLimits {
        batch_record_pages_max: prng.between(2, 16) as usize,
        run_blocks: prng.between(1, 40) as u32,
        checkpoint_log_pages: prng.between(2, 30),
        checkpoint_dirty_pages: prng.between(1, 10) as usize,
        checkpoint_writes_in_flight: prng.between(1, 4) as usize,
        checkpoint_step_blocks: prng.between(1, 6) as usize,
        leaf_bytes_max: prng.between(60, 400) as usize,
        index_memory_max: prng.between(1, 50) as usize * 1024,
        zero_ahead: prng.chance(1, 3),
        ..StoreLimits::tiny()
    }
}

#[test]
fn whatever_power_cut_all_that_was_acknowledged_is_there() {
    for seed in 0..5 {
        crash_run(1100, &small_limits(seed), seed, 100).unwrap();
    }
}

#[test]
fn the_same_on_a_device_that_is_full_most_of_the_time() {
    let limits = StoreLimits {
        overwrite_reserve_blocks: 64,
        ..StoreLimits::tiny()
    };
    for seed in 100..102 {
        crash_run(400, &limits, seed, 150).unwrap();
    }
}
