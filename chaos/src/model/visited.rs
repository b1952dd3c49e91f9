//! The states that a search has met: of each a 64-bit fingerprint, and that of the state it was first reached from.

use std::sync::{Mutex, PoisonError};

/// Parts with a lock of their own.
const SHARDS: usize = 256;
/// Places of an empty part.
const FIRST_PLACES: usize = 64;

/// Fingerprints and where they came from. 16 bytes for each place; at most three places of four are taken.
pub struct Visited {
    shards: Vec<Mutex<Shard>>,
}

struct Shard {
    /// Fingerprint and parent; a fingerprint of zero is a free place.
    places: Vec<(u64, u64)>,
    taken: usize,
}

impl Visited {
    /// Nothing met yet.
    pub fn new() -> Visited {
        let shard = || {
            Mutex::new(Shard {
                places: vec![(0, 0); FIRST_PLACES],
                taken: 0,
            })
        };
        Visited {
            shards: (0..SHARDS).map(|_| shard()).collect(),
        }
    }

    fn shard(&self, fingerprint: u64) -> &Mutex<Shard> {
        &self.shards[(fingerprint >> 56) as usize % SHARDS]
    }

    /// Notes a state; whether it is new.
    pub fn insert(&self, fingerprint: u64, parent: u64) -> bool {
        let fingerprint = fingerprint.max(1);
        let mut shard = self.shard(fingerprint).lock().unwrap_or_else(PoisonError::into_inner);
        if shard.taken * 4 >= shard.places.len() * 3 {
            shard.grow();
        }
        shard.insert(fingerprint, parent)
    }

    /// From which state it was first reached.
    pub fn parent(&self, fingerprint: u64) -> Option<u64> {
        let fingerprint = fingerprint.max(1);
        let shard = self.shard(fingerprint).lock().unwrap_or_else(PoisonError::into_inner);
        let place = shard.find(fingerprint);
        (shard.places[place].0 == fingerprint).then(|| shard.places[place].1)
    }

    /// How many there are.
    pub fn len(&self) -> u64 {
        self.sum(|shard| shard.taken)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Memory that they take.
    pub fn bytes(&self) -> u64 {
        self.sum(|shard| shard.places.len()) * 16
    }

    fn sum(&self, of: impl Fn(&Shard) -> usize) -> u64 {
        let shards = self.shards.iter();
        shards
            .map(|shard| of(&shard.lock().unwrap_or_else(PoisonError::into_inner)) as u64)
            .sum()
    }
}

impl Default for Visited {
    fn default() -> Visited {
        Visited::new()
    }
}

impl Shard {
    /// Its place, or the free one where it would go.
    fn find(&self, fingerprint: u64) -> usize {
        let mask = self.places.len() - 1;
        let mut place = fingerprint as usize & mask;
        while self.places[place].0 != 0 && self.places[place].0 != fingerprint {
            place = (place + 1) & mask;
        }
        place
    }

    fn insert(&mut self, fingerprint: u64, parent: u64) -> bool {
        let place = self.find(fingerprint);
        if self.places[place].0 == fingerprint {
            return false;
        }
        self.places[place] = (fingerprint, parent);
        self.taken += 1;
        true
    }

    fn grow(&mut self) {
        let places = self.places.len() * 2;
        let old = std::mem::replace(&mut self.places, vec![(0, 0); places]);
        self.taken = 0;
        for (fingerprint, parent) in old {
            if fingerprint != 0 {
                self.insert(fingerprint, parent);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::mix;

    #[test]
    fn what_was_met_stays_met_with_its_parent_while_the_table_grows() {
        let visited = Visited::new();
        for n in 0..100_000 {
            assert!(visited.insert(mix(n), n));
        }
        for n in 0..100_000 {
            assert!(!visited.insert(mix(n), 7));
            assert_eq!(visited.parent(mix(n)), Some(n));
        }
        assert_eq!(visited.parent(mix(100_000)), None);
        assert_eq!(visited.len(), 100_000);
        assert!(visited.bytes() < 100_000 * 16 * 4, "{}", visited.bytes());
    }
}
