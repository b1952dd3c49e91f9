//! Linearizability of each block as a register whose writes are all different.
//!
//! All operations with one value form a cluster. With `f` its first response and `s` its last invocation, the cluster
//! must be in force throughout `[f, s]` if `f < s` (forward), and at some moment of `[s, f]` otherwise. The history is
//! linearizable if no two forward zones overlap and no backward zone lies within a forward one (Gibbons and Korach 1997).

use std::collections::BTreeMap;

use crate::limits::BLOCKS_PER_CHUNK;

#[derive(Clone, Copy, Debug)]
struct Cluster {
    written_at: u64,
    first_response: u64,
    last_invocation: u64,
    /// Whether anybody knows that it took place.
    seen: bool,
    /// Whose write it is, counted from the first holder on.
    holder: usize,
}

#[derive(Default)]
pub(super) struct History {
    values: BTreeMap<(u64, u64), Cluster>,
    never: Vec<u64>,
    /// When each holder first completed something in a group.
    completed: BTreeMap<(u8, usize), u64>,
}

impl History {
    /// A holder has completed something: what older ones left open takes effect before that, or never.
    pub(super) fn completed(&mut self, group: u8, holder: usize, at: u64) {
        self.completed.entry((group, holder)).or_insert(at);
    }

    pub(super) fn invoke_write(&mut self, block: u64, value: u64, holder: usize, at: u64) {
        let cluster = Cluster {
            written_at: at,
            first_response: u64::MAX,
            last_invocation: at,
            seen: false,
            holder,
        };
        assert!(
            self.values.insert((block, value), cluster).is_none(),
            "values are written once"
        );
    }

    pub(super) fn write_done(&mut self, block: u64, value: u64, at: u64) {
        let cluster = self.values.get_mut(&(block, value)).unwrap();
        cluster.first_response = cluster.first_response.min(at);
        cluster.seen = true;
    }

    /// It failed in a way that promises that it shows nowhere.
    pub(super) fn write_undone(&mut self, value: u64) {
        self.never.push(value);
    }

    /// Whether anybody was told of a value.
    pub(super) fn is_known(&self, block: u64, value: u64) -> bool {
        self.values.get(&(block, value)).is_some_and(|cluster| cluster.seen)
    }

    pub(super) fn read(&mut self, block: u64, value: u64, invoked: u64, responded: u64) {
        let cluster = self.values.entry((block, value)).or_insert_with(|| {
            assert_eq!(value, 0, "block {block}: {value} was read and never written");
            Cluster {
                written_at: 0,
                first_response: 0,
                last_invocation: 0,
                seen: true,
                holder: 0,
            }
        });
        assert!(
            cluster.written_at < responded || value == 0,
            "block {block}: {value} was read before it was written"
        );
        cluster.first_response = cluster.first_response.min(responded);
        cluster.last_invocation = cluster.last_invocation.max(invoked);
        cluster.seen = true;
    }

    pub(super) fn check(&self) -> Result<(), String> {
        let mut by_block: BTreeMap<u64, Vec<(u64, Cluster)>> = BTreeMap::new();
        for ((block, value), cluster) in &self.values {
            if cluster.seen {
                if self.never.contains(value) {
                    return Err(format!(
                        "block {block}: {value} was read, and its write had failed for lack of space"
                    ));
                }
                let group = (block / u64::from(BLOCKS_PER_CHUNK) % u64::from(super::GROUPS)) as u8;
                let newer = self.completed.range((group, cluster.holder + 1)..=(group, usize::MAX));
                let closed = newer.map(|(_, at)| *at).min().unwrap_or(u64::MAX);
                let first_response = cluster.first_response.min(closed.max(cluster.written_at));
                let cluster = Cluster {
                    first_response,
                    ..*cluster
                };
                by_block.entry(*block).or_default().push((*value, cluster));
            }
        }
        for (block, clusters) in by_block {
            let zone = |c: &Cluster| {
                (
                    c.first_response.min(c.last_invocation),
                    c.first_response.max(c.last_invocation),
                )
            };
            for (i, (value, a)) in clusters.iter().enumerate() {
                if a.first_response >= a.last_invocation {
                    continue;
                }
                let (start, end) = zone(a);
                for (j, (other, b)) in clusters.iter().enumerate() {
                    let (from, until) = zone(b);
                    let forward = b.first_response < b.last_invocation;
                    if i != j && (forward && from < end && start < until || !forward && from > start && until < end) {
                        return Err(format!(
                            "block {block}: {value} was in force during {start}..{end}, and {other} in {from}..{until}"
                        ));
                    }
                }
            }
        }
        Ok(())
    }
}

#[test]
fn a_stale_read_is_found_and_concurrent_ones_are_allowed() {
    let mut history = History::default();
    history.invoke_write(0, 1, 0, 10);
    history.write_done(0, 1, 20);
    history.read(0, 0, 5, 15);
    history.read(0, 1, 12, 18);
    assert_eq!(history.check(), Ok(()));
    history.read(0, 0, 21, 22);
    assert!(history.check().is_err(), "the old value after the write had ended");
}

#[test]
fn a_value_that_was_read_and_is_gone_is_found() {
    let mut history = History::default();
    history.invoke_write(0, 1, 0, 10);
    history.read(0, 1, 11, 12);
    history.read(0, 0, 13, 14);
    history.read(0, 0, 1, 2);
    assert!(history.check().is_err());
}
