//! What an I/O asks of the kernel: how often threads are woken for it, and which system calls are made.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use cairn_chaos::live::dev::Dev;
use cairn_chaos::live::scrape;

use crate::cost::Role;

/// How late the processes tell what they count in plain integers: nodes every 500 ms, the export every 250 ms.
const TOLD_AFTER: Duration = Duration::from_millis(600);
/// The kernel's own threads for a process's ring are called so.
const WORKER: &str = "iou-";

/// Threads that slept and were woken, up to a moment: of each thread, with the name under which it is added to others.
#[derive(Debug)]
pub struct WakeUps(BTreeMap<(i32, i32), (String, u64)>);

impl WakeUps {
    /// Up to now, of these processes: their threads' voluntary context switches. Threads that the kernel has made for a ring stand for themselves.
    pub fn now(roles: &[Role]) -> WakeUps {
        let mut threads = BTreeMap::new();
        for (role, pid) in roles {
            let entries = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
            for entry in entries.flatten() {
                let tid = entry.file_name().to_str().and_then(|name| name.parse().ok());
                // It may have ended since it was listed.
                let Ok(status) = fs::read_to_string(entry.path().join("status")) else {
                    continue;
                };
                let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
                let count = field("voluntary_ctxt_switches:").and_then(|word| word.parse().ok());
                let is_worker = field("Name:").is_some_and(|name| name.starts_with(WORKER));
                let name = if is_worker {
                    format!("{role}' workers")
                } else {
                    role.to_string()
                };
                if let (Some(tid), Some(count)) = (tid, count) {
                    threads.insert((*pid, tid), (name, count));
                }
            }
        }
        WakeUps(threads)
    }

    /// From then until `now`, per I/O. What a thread did that has ended meanwhile is not known and not counted.
    pub fn per_io(&self, now: &WakeUps, ios: u64) -> BTreeMap<String, f64> {
        let mut sums = BTreeMap::new();
        for (thread, (name, count)) in &now.0 {
            let before = self.0.get(thread).map_or(0, |(_, count)| *count);
            *sums.entry(name.clone()).or_insert(0.0) += count.saturating_sub(before) as f64 / ios.max(1) as f64;
        }
        sums
    }
}

/// System calls of a cluster's threads that serve I/O, up to a moment, by process and call.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct SystemCalls(BTreeMap<String, f64>);

/// The calls that are counted: whose, which, and the name and label of the counter.
const COUNTERS: [(&str, &str, &str, &str); 5] = [
    (
        "node-",
        "nodes io_uring_enter",
        "cairn_node_system_calls_total",
        "call=\"io_uring_enter\"",
    ),
    (
        "node-",
        "nodes sendmsg",
        "cairn_node_system_calls_total",
        "call=\"sendmsg\"",
    ),
    (
        "export",
        "export epoll_wait",
        "cairn_client_system_calls_total",
        "call=\"epoll_wait\"",
    ),
    (
        "export",
        "export readv",
        "cairn_client_system_calls_total",
        "call=\"readv\"",
    ),
    (
        "export",
        "export writev",
        "cairn_client_system_calls_total",
        "call=\"writev\"",
    ),
];

impl SystemCalls {
    /// What the cluster's processes say of themselves; see [`settle`]. A process that says nothing counts nothing.
    pub fn now(cluster: &Dev) -> SystemCalls {
        let parts = cluster.pids();
        let texts = parts
            .keys()
            .filter_map(|part| Some((part.clone(), cluster.metrics(part).ok()?)));
        SystemCalls::of(&texts.collect())
    }

    /// From the metrics of each process.
    fn of(metrics: &BTreeMap<String, String>) -> SystemCalls {
        let mut sums = BTreeMap::new();
        for (process, call, name, label) in COUNTERS {
            let texts = metrics.iter().filter(|(part, _)| part.starts_with(process));
            let sum = texts.map(|(_, text)| scrape::sum(text, name, label)).sum();
            sums.insert(call.to_string(), sum);
        }
        SystemCalls(sums)
    }

    /// From then until `now`, per I/O.
    pub fn per_io(&self, now: &SystemCalls, ios: u64) -> BTreeMap<String, f64> {
        let since = |call: &String, count: f64| (count - self.0.get(call).unwrap_or(&0.0)) / ios.max(1) as f64;
        let calls = now.0.iter();
        calls.map(|(call, count)| (call.clone(), since(call, *count))).collect()
    }
}

/// Waits until a cluster that does nothing any more has told what it has counted.
pub fn settle() {
    std::thread::sleep(TOLD_AFTER);
}

/// What an I/O asks of the kernel, by process.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct CallsPerIo {
    /// Threads that slept and were woken.
    pub wake_ups: BTreeMap<String, f64>,
    /// System calls of the threads that serve I/O; of Cairn only.
    pub system_calls: BTreeMap<String, f64>,
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_thread_that_waits_for_another_is_woken_once_for_each_answer() {
        const ASKED: u64 = 200;
        let roles = [("self", std::process::id() as i32)];
        let (mut mine, mut others) = UnixStream::pair().unwrap();
        let other = std::thread::spawn(move || {
            let mut byte = [0];
            while others.read(&mut byte).unwrap() > 0 {
                others.write_all(&byte).unwrap();
            }
        });
        let before = WakeUps::now(&roles);
        for _ in 0..ASKED {
            mine.write_all(&[1]).unwrap();
            mine.read_exact(&mut [0]).unwrap();
        }
        let now = WakeUps::now(&roles);
        let found = before.per_io(&now, ASKED);
        drop(mine);
        other.join().unwrap();
        // Two each. Rarely an answer is there before it is waited for; other tests run beside and sleep too.
        assert!(found["self"] > 1.0, "{found:?}");
        assert_eq!(before.per_io(&before, 1)["self"], 0.0);
    }

    #[test]
    fn calls_of_all_nodes_are_added_up_and_kinds_told_apart() {
        let metrics = |n: u32| {
            let on_node = |call: &str, count: u32| {
                format!("cairn_node_system_calls_total{{device=\"a\",call=\"{call}\"}} {count}\n")
            };
            let node = on_node("io_uring_enter", 10 * n) + &on_node("sendmsg", 5 * n);
            let call = |call: &str, count| format!("cairn_client_system_calls_total{{call=\"{call}\"}} {count}\n");
            let export = call("epoll_wait", n) + &call("readv", 2 * n) + &call("writev", 3 * n);
            let named = |name: &str, text: &str| (name.to_string(), text.to_string());
            SystemCalls::of(&BTreeMap::from([
                named("node-1", &node),
                named("node-2", &node),
                named("export", &export),
                named("meta-1", &export),
            ]))
        };
        let found = metrics(1).per_io(&metrics(6), 5);
        let expected = [
            ("export epoll_wait", 1.0),
            ("export readv", 2.0),
            ("export writev", 3.0),
            ("nodes io_uring_enter", 20.0),
            ("nodes sendmsg", 10.0),
        ];
        assert_eq!(found, expected.map(|(call, count)| (call.to_string(), count)).into());
    }
}
