//! The rules that a device obeys for each volume, whoever asks: which generation it serves (rules 3 and 5), how long an
//! older holder may still read by itself (rule 8), and when a new one may be told that the volume is its own.
//!
//! A generation goes through three steps on a device:
//!
//! 1. **seen**: a seal with a valid capability has come. From here on every lower generation is refused.
//! 2. **durable**: the device remembers that across a loss of power.
//! 3. **open**: every read grant of lower generations has run out or was given back, and every write that was accepted
//!    under one has ended. Only now the seal is answered, and requests of the generation are served.
//!
//! Why writes that were accepted must have ended before the seal is answered:
//!
//! 1. H1 (generation 1) sends `v`; a and b accept it, and neither has made it durable.
//! 2. H2 (generation 2) seals a and b. Both seals are durable and answered before `v` is.
//! 3. H2 collects: neither a nor b says `v`, so the base is the old value, and H2 serves it to its guest.
//! 4. `v` becomes durable on a and b. Both answer H1 (or are found holding `v` by H3): a value that H2 has read over is
//!    back, and a write is acknowledged to an older holder after H2's first operation.
//!
//! With the wait, whatever a device answers to H1 as durable was durable before the answer to H2's seal, so H2's collect
//! finds it, and the acknowledgement (even if it travels for long) is of a write that H2's history begins with.

mod fence;
mod grants;

use std::collections::BTreeMap;
use std::time::Duration;

pub use fence::{Fence, Refusal, SealStep};
pub use grants::ReadGrants;

use crate::ids::{Generation, VolumeId};
use crate::message::Holder;
use crate::time::Time;

/// What still keeps a seal from being answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Opening {
    /// Nothing: it is to be answered, and its requests are served from now on.
    Open,
    /// It is not durable yet.
    NotDurable,
    /// So many requests that were accepted under a lower generation have not ended.
    InFlight(u32),
    /// An older holder may read by itself until then.
    Granted(Time),
    /// A higher generation has been seen.
    Fenced(Generation),
}

/// What the answer to a seal waits for.
#[derive(Clone, Copy)]
enum Wait {
    Durable,
    Writes,
    Grants,
}

/// Planted bugs that sit in the rules.
#[cfg(feature = "canary")]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RuleCanaries {
    /// Read grants do not hold back a seal.
    pub grant_ignored: bool,
    /// A seal is answered before it is durable.
    pub seal_not_durable: bool,
    /// Accepted writes do not hold back a seal.
    pub writes_overtake_seal: bool,
}

/// The rules of one device, for all volumes that it has ever heard of.
#[derive(Clone, Debug)]
pub struct ReplicaRules {
    grants: ReadGrants,
    volumes: BTreeMap<VolumeId, VolumeRules>,
    #[cfg(feature = "canary")]
    canaries: RuleCanaries,
}

#[derive(Clone, Debug, Default)]
struct VolumeRules {
    fence: Fence,
    /// Requests that were accepted and have not ended, all of them under the generation of the second part.
    accepted: (u32, Generation),
}

impl ReplicaRules {
    /// For a device that starts at `now`, with the seals that it remembers. It answers no seal of these volumes for the
    /// time of a read grant: whom it had granted one before it stopped it can't know. A volume that it has never sealed
    /// was never granted, so that one need not wait.
    pub fn new(
        now: Time,
        grant: Duration,
        recovered: impl IntoIterator<Item = (VolumeId, Generation)>,
    ) -> ReplicaRules {
        let mut rules = ReplicaRules {
            grants: ReadGrants::new(grant),
            volumes: BTreeMap::new(),
            #[cfg(feature = "canary")]
            canaries: RuleCanaries::default(),
        };
        for (volume, generation) in recovered {
            let fence = Fence::recovered(generation);
            let accepted = (0, Generation::NONE);
            rules.volumes.insert(volume, VolumeRules { fence, accepted });
            rules.grants.assume(now, volume);
        }
        rules
    }

    /// With planted bugs.
    #[cfg(feature = "canary")]
    pub fn set_canaries(&mut self, canaries: RuleCanaries) {
        self.canaries = canaries;
    }

    /// Whether a request of this holder is served: only at exactly the generation that is open (rules 3 and 5).
    ///
    /// # Errors
    /// Why it is refused.
    pub fn admit(&self, holder: Holder) -> Result<(), Refusal> {
        match self.volumes.get(&holder.volume) {
            Some(rules) => rules.fence.admit(holder.generation),
            None => Err(Refusal::NotSealed),
        }
    }

    /// The highest generation of the volume that was seen.
    pub fn seen(&self, volume: VolumeId) -> Generation {
        self.volumes
            .get(&volume)
            .map_or(Generation::NONE, |rules| rules.fence.seen())
    }

    /// A seal with a valid capability has come.
    pub fn seal(&mut self, holder: Holder) -> SealStep {
        self.volumes
            .entry(holder.volume)
            .or_default()
            .fence
            .seal(holder.generation)
    }

    /// The device will remember this seal.
    pub fn made_durable(&mut self, holder: Holder) {
        let rules = self.volumes.get_mut(&holder.volume).expect("it was sealed before");
        rules.fence.made_durable(holder.generation);
    }

    /// A request of this holder that changes something was admitted. Ends with [`ended`](Self::ended).
    pub fn accepted(&mut self, holder: Holder) {
        let rules = self.volumes.get_mut(&holder.volume).expect("it was admitted");
        let (count, generation) = &mut rules.accepted;
        // A generation is open only when nothing of a lower one is under way, so there is never a second one to count.
        assert!(
            *count == 0 || *generation == holder.generation || cfg!(feature = "canary"),
            "{count} requests of generation {generation} are under way, one of {} was accepted",
            holder.generation
        );
        *count += 1;
        *generation = holder.generation;
    }

    /// It has ended, one way or the other: nothing of it will show later that does not show now.
    pub fn ended(&mut self, holder: Holder) {
        let rules = self.volumes.get_mut(&holder.volume).expect("it was accepted");
        rules.accepted.0 = rules.accepted.0.checked_sub(1).expect("it was accepted");
    }

    /// Whether the seal of this holder can be answered now. If so, it is open from now on.
    pub fn open(&mut self, now: Time, holder: Holder) -> Opening {
        let opening = self.opening(now, holder);
        if opening == Opening::Open {
            let rules = self.volumes.get_mut(&holder.volume).expect("it was sealed before");
            rules.fence.open(holder.generation);
            self.grants.begin(holder);
        }
        opening
    }

    fn opening(&self, now: Time, holder: Holder) -> Opening {
        let Some(rules) = self.volumes.get(&holder.volume) else {
            return Opening::NotDurable;
        };
        let (seen, (accepted, accepted_under)) = (rules.fence.seen(), rules.accepted);
        if holder.generation < seen {
            return Opening::Fenced(seen);
        }
        if rules.fence.durable() < holder.generation && !self.skips(Wait::Durable) {
            return Opening::NotDurable;
        }
        if accepted > 0 && accepted_under < holder.generation && !self.skips(Wait::Writes) {
            return Opening::InFlight(accepted);
        }
        match self.grants.blocks_until(now, holder) {
            Some(until) if !self.skips(Wait::Grants) => Opening::Granted(until),
            _ => Opening::Open,
        }
    }

    #[cfg(feature = "canary")]
    fn skips(&self, wait: Wait) -> bool {
        match wait {
            Wait::Durable => self.canaries.seal_not_durable,
            Wait::Writes => self.canaries.writes_overtake_seal,
            Wait::Grants => self.canaries.grant_ignored,
        }
    }

    #[cfg(not(feature = "canary"))]
    fn skips(&self, _wait: Wait) -> bool {
        false
    }

    /// An answer goes to this holder: may it carry a read grant? If so, it lasts from now on (rule 8).
    pub fn grant(&mut self, now: Time, holder: Holder) -> bool {
        self.admit(holder).is_ok() && self.grants.extend(now, holder)
    }

    /// The holder will use no read grant of its generation any more, and gets none.
    pub fn release(&mut self, holder: Holder) {
        self.grants.release(holder);
    }
}

#[cfg(test)]
mod tests;
