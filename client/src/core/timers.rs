//! When each volume wants to be told of the passing of time: so that a turn costs the same with one volume as with hundreds.

use std::collections::{BTreeMap, BTreeSet};

use cairn_proto::time::Time;

use super::api::VolumeHandle;

/// The next time of each volume that has one.
#[derive(Debug, Default)]
pub(super) struct Timers {
    by_time: BTreeSet<(Time, VolumeHandle)>,
    by_volume: BTreeMap<VolumeHandle, Time>,
}

impl Timers {
    /// This is now the time of a volume.
    pub(super) fn set(&mut self, volume: VolumeHandle, at: Option<Time>) {
        let before = match at {
            Some(at) => self.by_volume.insert(volume, at),
            None => self.by_volume.remove(&volume),
        };
        if before == at {
            return;
        }
        if let Some(before) = before {
            self.by_time.remove(&(before, volume));
        }
        self.by_time.extend(at.map(|at| (at, volume)));
    }

    /// The earliest of all.
    pub(super) fn first(&self) -> Option<Time> {
        self.by_time.first().map(|(at, _)| *at)
    }

    /// The volumes whose time has come, in the order of their handles.
    pub(super) fn due(&self, now: Time) -> BTreeSet<VolumeHandle> {
        let due = self.by_time.iter().take_while(|(at, _)| *at <= now);
        due.map(|(_, volume)| *volume).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earliest_time_follows_every_change() {
        let mut timers = Timers::default();
        let (at, volume) = (|ms| Time::ZERO + std::time::Duration::from_millis(ms), VolumeHandle);
        assert_eq!(timers.first(), None);
        timers.set(volume(2), Some(at(5)));
        timers.set(volume(1), Some(at(7)));
        timers.set(volume(3), Some(at(7)));
        timers.set(volume(3), Some(at(7)));
        assert_eq!(timers.first(), Some(at(5)));
        assert!(timers.due(at(4)).is_empty());
        assert_eq!(timers.due(at(7)), [1, 2, 3].map(volume).into());
        timers.set(volume(2), Some(at(9)));
        timers.set(volume(1), None);
        timers.set(volume(1), None);
        assert_eq!((timers.first(), timers.due(at(8))), (Some(at(7)), [volume(3)].into()));
        timers.set(volume(3), None);
        timers.set(volume(2), None);
        assert_eq!((timers.first(), timers.by_volume.len()), (None, 0));
    }
}
