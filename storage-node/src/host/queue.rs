//! Requests that wait for the store, in a queue per (volume, class): the seam where limits and fairness live.
//!
//! Queues take turns (deficit round robin). At its turn a queue passes at most its class's quantum of blocks; what it
//! does not use up it loses when it runs empty. So volumes of one class share the device evenly by blocks, whatever the
//! size of their requests, and repair and scrub go on beside guest I/O at a fixed part of it.

use std::collections::{BTreeMap, VecDeque};

use cairn_proto::frame::Class;
use cairn_proto::ids::VolumeId;

use super::limits::{GUEST_QUANTUM_BLOCKS, REPAIR_QUANTUM_BLOCKS, SCRUB_QUANTUM_BLOCKS};

/// Which queue.
pub(super) type QueueKey = (VolumeId, Class);

/// Queues of `T`. Bounded by what connections may have in flight.
pub(super) struct Queues<T> {
    queues: BTreeMap<QueueKey, Queue<T>>,
    /// Queues that are not empty, in the order of their turns.
    turns: VecDeque<QueueKey>,
    len: usize,
}

struct Queue<T> {
    items: VecDeque<(u32, T)>,
    /// Blocks that it may still pass at this turn; zero when its turn has not begun.
    credit: u32,
}

impl<T> Queues<T> {
    pub(super) fn new() -> Queues<T> {
        Queues {
            queues: BTreeMap::new(),
            turns: VecDeque::new(),
            len: 0,
        }
    }

    /// How many wait.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Adds one that costs so many blocks.
    pub(super) fn push(&mut self, key: QueueKey, blocks: u32, item: T) {
        let queue = self.queues.entry(key).or_insert_with(|| {
            self.turns.push_back(key);
            Queue {
                items: VecDeque::new(),
                credit: 0,
            }
        });
        queue.items.push_back((blocks, item));
        self.len += 1;
    }

    /// Takes the next one. A queue whose first one is `blocked` gives its turn away.
    pub(super) fn next(&mut self, blocked: impl Fn(&T) -> bool) -> Option<T> {
        // Two rounds: the first may do no more than end a turn that has no credit left.
        for _ in 0..2 * self.turns.len() {
            let key = *self.turns.front().expect("there is a turn");
            let queue = self.queues.get_mut(&key).expect("a queue with a turn exists");
            let (blocks, first) = queue.items.front().expect("a queue that exists is not empty");
            let cost = (*blocks).clamp(1, quantum(key.1));
            if blocked(first) {
                queue.credit = 0;
                self.turns.rotate_left(1);
                continue;
            }
            if queue.credit == 0 {
                queue.credit = quantum(key.1);
            }
            if queue.credit < cost {
                // What is left is carried over, so that large requests are not starved by small ones.
                queue.credit += quantum(key.1);
                self.turns.rotate_left(1);
                continue;
            }
            queue.credit -= cost;
            let turn_is_over = queue.credit == 0;
            let (_, item) = queue.items.pop_front().expect("it has a first one");
            self.len -= 1;
            if queue.items.is_empty() {
                self.queues.remove(&key);
                self.turns.pop_front();
            } else if turn_is_over {
                self.turns.rotate_left(1);
            }
            return Some(item);
        }
        None
    }

    /// Takes out all that match, of the queues that match.
    pub(super) fn take(&mut self, keys: impl Fn(QueueKey) -> bool, matches: impl Fn(&T) -> bool) -> Vec<T> {
        let mut taken = Vec::new();
        for (key, queue) in &mut self.queues {
            if keys(*key) {
                for (blocks, item) in std::mem::take(&mut queue.items) {
                    if matches(&item) {
                        taken.push(item);
                    } else {
                        queue.items.push_back((blocks, item));
                    }
                }
            }
        }
        self.queues.retain(|_, queue| !queue.items.is_empty());
        self.turns.retain(|key| self.queues.contains_key(key));
        self.len -= taken.len();
        taken
    }
}

fn quantum(class: Class) -> u32 {
    match class {
        Class::Guest => GUEST_QUANTUM_BLOCKS,
        Class::Repair => REPAIR_QUANTUM_BLOCKS,
        Class::Scrub => SCRUB_QUANTUM_BLOCKS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(queues: &mut Queues<(u64, Class)>, volume: u64, class: Class, blocks: u32, count: usize) {
        for _ in 0..count {
            queues.push((VolumeId(volume), class), blocks, (volume, class));
        }
    }

    #[test]
    fn volumes_share_by_blocks_whatever_the_size_of_their_requests() {
        let mut queues = Queues::new();
        fill(&mut queues, 1, Class::Guest, 256, 100);
        fill(&mut queues, 2, Class::Guest, 1, 25_600);
        let mut blocks = [0u32; 2];
        while blocks[0] + blocks[1] < 20_000 {
            match queues.next(|_| false) {
                Some((1, _)) => blocks[0] += 256,
                _ => blocks[1] += 1,
            }
        }
        assert!(blocks[0].abs_diff(blocks[1]) <= 2048, "{blocks:?}");
    }

    #[test]
    fn guests_come_first_and_nobody_starves() {
        let mut queues = Queues::new();
        for class in [Class::Guest, Class::Repair, Class::Scrub] {
            fill(&mut queues, 1, class, 16, 1000);
        }
        let mut counts = BTreeMap::new();
        for _ in 0..840 {
            let (_, class) = queues.next(|_| false).unwrap();
            *counts.entry(class).or_insert(0) += 1;
        }
        assert_eq!(counts[&Class::Guest], 640, "{counts:?}");
        assert_eq!(counts[&Class::Repair], 160, "{counts:?}");
        assert_eq!(counts[&Class::Scrub], 40, "{counts:?}");
    }

    #[test]
    fn a_request_larger_than_a_turn_gets_through() {
        let mut queues = Queues::new();
        fill(&mut queues, 1, Class::Scrub, 256, 2);
        fill(&mut queues, 1, Class::Guest, 16_384, 2);
        let got: Vec<_> = std::iter::from_fn(|| queues.next(|_| false)).collect();
        assert_eq!(got.len(), 4);
        assert_eq!(queues.len(), 0);
    }

    #[test]
    fn a_blocked_queue_gives_its_turn_away_and_order_within_a_queue_is_kept() {
        let mut queues = Queues::new();
        let key = |volume| (VolumeId(volume), Class::Guest);
        for i in 0..3 {
            queues.push(key(1), 1, (1, i));
            queues.push(key(2), 1, (2, i));
        }
        let blocked = |item: &(u64, i32)| item.0 == 1;
        let got: Vec<_> = std::iter::from_fn(|| queues.next(blocked)).collect();
        assert_eq!(got, [(2, 0), (2, 1), (2, 2)]);
        assert_eq!(queues.len(), 3);
        assert_eq!(queues.take(|k| k == key(1), |item| item.1 == 1), [(1, 1)]);
        let rest: Vec<_> = std::iter::from_fn(|| queues.next(|_| false)).collect();
        assert_eq!(rest, [(1, 0), (1, 2)]);
    }
}
