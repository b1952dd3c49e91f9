//! How volumes are, and what is being done about them: derived from the state and from what the leader has heard, with no
//! records of its own.

use cairn_proto::ids::{DeviceId, GroupIndex, VolumeId};
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::time::Time;

use super::decide::{HealSettings, Standing, Standings};
use super::view::{GroupReport, Phase, View};
use crate::limits::SPARE_LOOKS_MAX;
use crate::state::model::{Group, State, Volume};
use crate::state::placement::Spares;

/// How one group is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GroupCondition {
    /// Which one.
    pub index: GroupIndex,
    /// Copies that it should have.
    pub wanted: usize,
    /// Members in sync.
    pub in_sync: usize,
    /// Members in sync that can be reached, as far as the leader knows.
    pub reachable: usize,
    /// Members that are being filled.
    pub joining: usize,
    /// Members that must be filled again, or for the first time.
    pub stale: usize,
    /// Fewer can be reached than acknowledge a write.
    pub below_quorum: bool,
    /// Its coordinator's word, if it has spoken.
    pub phase: Option<Phase>,
}

impl GroupCondition {
    /// Whether it has fewer copies in sync and within reach than it should.
    pub fn is_degraded(&self) -> bool {
        self.reachable < self.wanted
    }

    /// Whether it has all its copies, and nobody is to be filled.
    pub fn is_whole(&self) -> bool {
        !self.is_degraded() && self.joining == 0 && self.stale == 0
    }
}

/// How far a repair is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum RepairState {
    /// The device is silent and has time to come back.
    AwaitingReturn,
    /// There is no device that could take the copy.
    NoSpare,
    /// It waits for a holder, for its turn, or for a device that does not answer.
    Waiting,
    /// Copies are compared; what differs is copied on the way.
    Comparing,
    /// What is known to differ is copied.
    Copying,
}

/// A copy that is not as it should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Repair {
    /// Of which group.
    pub index: GroupIndex,
    /// On which device.
    pub device: DeviceId,
    /// How far it is.
    pub state: RepairState,
    /// Whether the device has taken the place of one that was lost.
    pub rebuild: bool,
    /// Blocks copied so far.
    pub copied_blocks: u64,
    /// Blocks known to be lacking; an upper bound.
    pub lacking_blocks: u64,
    /// As measured; `None` while it is not known.
    pub bytes_per_second: Option<u64>,
    /// About how long it will take, or how long the device is still waited for; `None` while it is not known.
    pub remaining_ms: Option<u64>,
}

/// How a volume is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeCondition {
    /// Which one.
    pub volume: VolumeId,
    /// In order of their index.
    pub groups: Vec<GroupCondition>,
    /// In order of groups and devices.
    pub repairs: Vec<Repair>,
    /// Whether a device knows of damaged blocks that are not repaired.
    pub damaged: bool,
    /// Whether a caretaker holds it.
    pub caretaker: bool,
    /// Blocks found to be damaged under the attachment of now, and how many of them were repaired.
    pub damaged_blocks: (u64, u64),
}

impl VolumeCondition {
    /// Whether there is anything that an operator may want to know.
    pub fn is_well(&self) -> bool {
        !self.damaged && self.groups.iter().all(GroupCondition::is_whole)
    }

    /// Copies in sync and within reach of the group that has the fewest.
    pub fn fewest_copies(&self) -> usize {
        self.groups.iter().map(|group| group.reachable).min().unwrap_or(0)
    }
}

/// A look at the cluster at one moment.
pub struct Look<'a> {
    state: &'a State,
    view: &'a View,
    now: Time,
    settings: &'a HealSettings,
    standings: Standings,
    spares: Option<Spares<'a>>,
    /// For how many copies more it is looked whether there is a spare.
    spare_looks: usize,
}

impl<'a> Look<'a> {
    /// At this moment.
    pub fn new(state: &'a State, view: &'a View, now: Time, settings: &'a HealSettings) -> Look<'a> {
        Look {
            state,
            view,
            now,
            settings,
            standings: Standings::new(state, view, now, settings),
            spares: None,
            spare_looks: SPARE_LOOKS_MAX,
        }
    }

    /// How a volume is; `None` if there is none with this id.
    pub fn volume(&mut self, id: VolumeId) -> Option<VolumeCondition> {
        let state = self.state;
        let volume = state.volumes().get(&id)?;
        let report = self.view.attachment(id);
        let mut condition = VolumeCondition {
            volume: id,
            groups: vec![],
            repairs: vec![],
            damaged: self.view.is_damaged(id),
            caretaker: volume.holder.as_ref().is_some_and(|holder| holder.caretaker),
            damaged_blocks: report.map_or((0, 0), |report| (report.damaged_blocks, report.repaired_blocks)),
        };
        for (index, group) in state.groups_of(id) {
            let said = report.and_then(|report| report.groups.get(&index));
            condition.groups.push(self.group(volume, index, group, said));
            self.repairs((id, volume), index, group, said, &mut condition.repairs);
        }
        Some(condition)
    }

    fn group(&self, volume: &Volume, index: GroupIndex, group: &Group, said: Option<&GroupReport>) -> GroupCondition {
        let in_sync = group.in_sync.len();
        let members = group.in_sync.iter();
        let reachable = members.filter(|device| self.standings.is_well(device)).count();
        let write_quorum = usize::from(volume.write_quorum);
        let quorum = if volume.min_copies_one {
            write_quorum.min(in_sync)
        } else {
            write_quorum
        };
        GroupCondition {
            index,
            wanted: volume.replicas.into(),
            in_sync,
            reachable,
            joining: group.joining.len(),
            stale: group.stale.len(),
            below_quorum: reachable < quorum,
            phase: said.map(|said| said.phase),
        }
    }

    fn repairs(
        &mut self,
        (id, volume): (VolumeId, &Volume),
        index: GroupIndex,
        group: &Group,
        said: Option<&GroupReport>,
        repairs: &mut Vec<Repair>,
    ) {
        for device in group.in_sync.iter().chain(&group.joining).chain(&group.stale) {
            let is_in_sync = group.in_sync.contains(device);
            let progress = said.and_then(|said| said.members.get(device)).copied();
            let progress = progress.unwrap_or_default();
            let is_filled = progress.connected && (progress.lacking_blocks > 0 || !is_in_sync);
            let state = match self.standings.of(device) {
                Standing::Away => RepairState::AwaitingReturn,
                Standing::Lost if !is_in_sync && !self.has_spare(volume, group, device) => RepairState::NoSpare,
                Standing::Lost => RepairState::Waiting,
                Standing::Well if is_filled && progress.comparing => RepairState::Comparing,
                Standing::Well if is_filled && (is_in_sync || group.joining.contains(device)) => RepairState::Copying,
                Standing::Well if is_in_sync => continue,
                Standing::Well => RepairState::Waiting,
            };
            let rate = self.view.rate(id, index, *device);
            let rate = rate.filter(|_| matches!(state, RepairState::Copying | RepairState::Comparing));
            let remaining_ms = match state {
                RepairState::AwaitingReturn => {
                    let silence = self.view.silence(device, self.now);
                    let left = self.settings.patience().saturating_sub(silence);
                    Some(u64::try_from(left.as_millis()).unwrap_or(u64::MAX))
                }
                RepairState::Copying => rate.and_then(|rate| time_for(progress.lacking_blocks, rate)),
                _ => None,
            };
            repairs.push(Repair {
                index,
                device: *device,
                state,
                rebuild: group.rebuilding.contains(device),
                copied_blocks: progress.copied_blocks,
                lacking_blocks: progress.lacking_blocks,
                bytes_per_second: rate.map(|rate| rate.saturating_mul(BLOCK_BYTES as u64)),
                remaining_ms,
            });
        }
    }

    /// Whether there is a device that could take this one's place in the group, as far as it is looked.
    pub fn has_spare(&mut self, volume: &Volume, group: &Group, lost: &DeviceId) -> bool {
        // Beyond the bound it is said to wait, which is true as well.
        let Some(left) = self.spare_looks.checked_sub(1) else {
            return true;
        };
        self.spare_looks = left;
        let (state, view, now) = (self.state, self.view, self.now);
        let spares = self
            .spares
            .get_or_insert_with(|| Spares::new(state, |device| view.served_for(device, now).is_none()));
        spares.has(volume, group, *lost)
    }
}

/// Milliseconds for so many blocks at so many a second; `None` if it would never end.
fn time_for(blocks: u64, blocks_per_second: u64) -> Option<u64> {
    let ms = (u128::from(blocks) * 1000).checked_div(u128::from(blocks_per_second))?;
    u64::try_from(ms).ok()
}

/// Sums over the volumes of a cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// Groups.
    pub groups: u64,
    /// Those with fewer copies in sync and within reach than they should have.
    pub degraded: u64,
    /// Those in which writes wait.
    pub below_quorum: u64,
    /// Degraded groups of which a copy is being filled.
    pub filling: u64,
    /// Copies that are not as they should be.
    pub repairs: u64,
    /// Copies that are lost, and for which there is no place.
    pub no_spare: u64,
    /// Volumes with damage that is known and not repaired.
    pub damaged_volumes: u64,
    /// Volumes that a caretaker holds.
    pub caretakers: u64,
}

impl Totals {
    /// Adds a volume.
    pub fn add(&mut self, condition: &VolumeCondition) {
        let count = |filter: fn(&&GroupCondition) -> bool| condition.groups.iter().filter(filter).count() as u64;
        self.groups += condition.groups.len() as u64;
        self.degraded += count(|group| group.is_degraded());
        self.below_quorum += count(|group| group.below_quorum);
        self.filling += count(|group| group.is_degraded() && group.joining > 0);
        self.repairs += condition.repairs.len() as u64;
        let no_spare = |repair: &&Repair| repair.state == RepairState::NoSpare;
        self.no_spare += condition.repairs.iter().filter(no_spare).count() as u64;
        self.damaged_volumes += u64::from(condition.damaged);
        self.caretakers += u64::from(condition.caretaker);
    }
}
