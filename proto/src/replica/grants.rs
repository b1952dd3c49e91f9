//! Read grants: how long a holder may read without asking (rule 8).

use std::collections::BTreeMap;
use std::time::Duration;

use crate::ids::{Generation, VolumeId};
use crate::message::Holder;
use crate::time::Time;

/// The read grants that a device has given, at most one per volume: a generation is opened only when those of lower ones
/// have ended.
#[derive(Clone, Debug)]
pub struct ReadGrants {
    length: Duration,
    volumes: BTreeMap<VolumeId, Grant>,
}

#[derive(Clone, Copy, Debug)]
struct Grant {
    /// To whom; `None` for a grant that may have been given before the device started.
    to: Option<Generation>,
    until: Time,
    /// The holder said that it is done.
    released: bool,
}

impl ReadGrants {
    /// Grants of this length.
    pub fn new(length: Duration) -> ReadGrants {
        ReadGrants {
            length,
            volumes: BTreeMap::new(),
        }
    }

    /// A device that starts does not know what it has granted: at most one grant, to anybody, that began at `now`.
    pub fn assume(&mut self, now: Time, volume: VolumeId) {
        let (to, until) = (None, now + self.length);
        let released = false;
        self.volumes.insert(volume, Grant { to, until, released });
    }

    /// Until when this holder's seal must not be answered because of a grant to a lower generation.
    pub fn blocks_until(&self, now: Time, holder: Holder) -> Option<Time> {
        let grant = self.volumes.get(&holder.volume)?;
        let lower = grant.to.is_none_or(|to| to < holder.generation);
        (lower && !grant.released && grant.until > now).then_some(grant.until)
    }

    /// The volume is this holder's from now on.
    pub fn begin(&mut self, holder: Holder) {
        let grant = self.volumes.entry(holder.volume).or_insert(Grant {
            to: None,
            until: Time::ZERO,
            released: false,
        });
        if grant.to != Some(holder.generation) {
            *grant = Grant {
                to: Some(holder.generation),
                until: Time::ZERO,
                released: false,
            };
        }
        grant.released = false;
    }

    /// Grants from now on, if the holder may have it.
    pub fn extend(&mut self, now: Time, holder: Holder) -> bool {
        let until = now + self.length;
        match self.volumes.get_mut(&holder.volume) {
            Some(grant) if grant.to == Some(holder.generation) && !grant.released => {
                grant.until = grant.until.max(until);
                true
            }
            _ => false,
        }
    }

    /// The holder is done. Nothing happens unless the volume is this holder's: what a device granted before it started
    /// may have been somebody else's.
    pub fn release(&mut self, holder: Holder) {
        if let Some(grant) = self.volumes.get_mut(&holder.volume)
            && grant.to == Some(holder.generation)
        {
            grant.released = true;
        }
    }
}
