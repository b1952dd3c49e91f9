//! Meta as a coordinator sees it: generations, and configurations by compare-and-set.

use crate::ids::*;
use crate::replication::{ChangeOutcome, ConfigChange, GroupConfig, MetaAsk, MetaTold};

pub(super) struct Meta {
    pub(super) generation: Generation,
    pub(super) configs: Vec<GroupConfig>,
    /// Who asks is not answered, and nothing is done.
    pub(super) down: bool,
}

impl Meta {
    pub(super) fn new(groups: u8, members: Vec<DeviceId>) -> Meta {
        let config = GroupConfig {
            epoch: Epoch(1),
            in_sync: members,
            ..GroupConfig::default()
        };
        Meta {
            generation: Generation::NONE,
            configs: vec![config; usize::from(groups)],
            down: false,
        }
    }

    pub(super) fn grant(&mut self) -> Generation {
        self.generation = self.generation.next().unwrap();
        self.generation
    }

    pub(super) fn answer(&mut self, generation: Generation, ask: &MetaAsk) -> MetaTold {
        match ask {
            MetaAsk::Look => MetaTold::Looked {
                generation: self.generation,
                groups: self.configs.clone(),
            },
            MetaAsk::Change(_) if generation != self.generation => MetaTold::Superseded(self.generation),
            MetaAsk::Change(changes) => MetaTold::Changed(changes.iter().map(|change| self.change(change)).collect()),
        }
    }

    fn change(&mut self, change: &ConfigChange) -> ChangeOutcome {
        let now = &mut self.configs[usize::from(change.group.0)];
        let sorted = |devices: &[DeviceId]| {
            let mut devices = devices.to_vec();
            devices.sort_unstable();
            devices
        };
        let (in_sync, joining) = (sorted(&change.in_sync), sorted(&change.joining));
        if now.epoch != change.epoch {
            let repeated =
                change.epoch.0 + 1 == now.epoch.0 && sorted(&now.in_sync) == in_sync && now.joining == joining;
            return match repeated {
                true => ChangeOutcome::Committed(now.clone()),
                false => ChangeOutcome::Refused {
                    config: now.clone(),
                    words: "another epoch".to_string(),
                },
            };
        }
        assert!(in_sync.len() >= 2, "never fewer than the quorum: {change:?}");
        let was_member = |device: &DeviceId| now.in_sync.contains(device) || now.joining.contains(device);
        assert!(in_sync.iter().all(was_member), "only members get in sync: {change:?}");
        let mut stale = now.stale.clone();
        stale.extend(now.in_sync.iter().chain(&now.joining).copied());
        stale.retain(|device| !in_sync.contains(device) && !joining.contains(device));
        stale.sort_unstable();
        stale.dedup();
        *now = GroupConfig {
            epoch: Epoch(now.epoch.0 + 1),
            in_sync,
            joining,
            stale,
            rescue: Vec::new(),
            moving: None,
        };
        ChangeOutcome::Committed(now.clone())
    }
}
