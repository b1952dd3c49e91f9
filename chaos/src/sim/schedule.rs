//! Virtual time: what is to happen, in order of time and then of insertion.

use std::collections::BinaryHeap;

use cairn_proto::time::Time;

struct Entry<E> {
    at: Time,
    order: u64,
    event: E,
}

impl<E> PartialEq for Entry<E> {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}

impl<E> Eq for Entry<E> {}

impl<E> PartialOrd for Entry<E> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> Ord for Entry<E> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        // The heap gives the greatest first; the earliest is wanted.
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

/// The events to come. Time stands still between them.
pub struct Schedule<E> {
    now: Time,
    order: u64,
    heap: BinaryHeap<Entry<E>>,
}

impl<E> Default for Schedule<E> {
    fn default() -> Self {
        Schedule {
            now: Time::ZERO,
            order: 0,
            heap: BinaryHeap::new(),
        }
    }
}

impl<E> Schedule<E> {
    /// Virtual time.
    pub fn now(&self) -> Time {
        self.now
    }

    /// Lets `event` happen at `at`, or now if that has passed.
    pub fn at(&mut self, at: Time, event: E) {
        self.order += 1;
        self.heap.push(Entry {
            at: at.max(self.now),
            order: self.order,
            event,
        });
    }

    /// The next event; time goes on to it.
    pub fn next_event(&mut self) -> Option<E> {
        let entry = self.heap.pop()?;
        assert!(entry.at >= self.now, "time went back");
        self.now = entry.at;
        Some(entry.event)
    }

    /// Time goes on to `at`, if nothing is to happen before.
    pub fn advance_to(&mut self, at: Time) {
        if self.next_at().is_none_or(|next| next >= at) {
            self.now = self.now.max(at);
        }
    }

    /// When the next event is.
    pub fn next_at(&self) -> Option<Time> {
        self.heap.peek().map(|entry| entry.at)
    }

    /// How many are to come.
    pub fn len(&self) -> usize {
        self.heap.len()
    }

    /// Whether nothing is to come.
    pub fn is_empty(&self) -> bool {
        self.heap.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_by_time_and_then_in_the_order_they_were_made() {
        let mut schedule = Schedule::default();
        let ms = |ms: u64| Time::from_nanos(ms * 1_000_000);
        schedule.at(ms(2), "b");
        schedule.at(ms(1), "a");
        schedule.at(ms(2), "c");
        let mut seen = Vec::new();
        while let Some(event) = schedule.next_event() {
            seen.push((schedule.now(), event));
        }
        assert_eq!(seen, [(ms(1), "a"), (ms(2), "b"), (ms(2), "c")]);
        schedule.at(ms(1), "late");
        assert_eq!(schedule.next_event(), Some("late"));
        assert_eq!(schedule.now(), ms(2), "time never goes back");
    }
}
