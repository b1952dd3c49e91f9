//! What an I/O costs: busy time of the machine and of each process, and where its time goes.

use std::collections::BTreeMap;
use std::fs;
use std::time::Instant;

use cairn_chaos::live::scrape;

/// Ticks a second of the times in `/proc/PID/stat`: the same on every Linux.
const TICKS_PER_S: f64 = 100.0;

/// A process that is looked at, with the name under which its time is added to others'.
pub type Role = (&'static str, i32);

/// Processor time up to a moment.
#[derive(Debug)]
pub struct Cpu {
    machine: Machine,
    roles: BTreeMap<&'static str, f64>,
    /// Of children of this process that have ended: the load.
    load: f64,
}

/// Processor time in microseconds per I/O.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct CpuPerIo {
    /// Of the whole machine, whatever ran.
    pub machine_us: f64,
    /// Of the program that makes the load.
    pub load_us: f64,
    /// Of the target's processes, added up by name.
    pub roles_us: BTreeMap<&'static str, f64>,
}

impl Cpu {
    /// Up to now, of these processes; one that is not there any more counts nothing.
    pub fn now(roles: &[Role]) -> Cpu {
        let mut sums = BTreeMap::new();
        for (role, pid) in roles {
            *sums.entry(*role).or_default() += process_us(&format!("/proc/{pid}/stat"), 0);
        }
        Cpu {
            machine: Machine::now(),
            roles: sums,
            load: process_us("/proc/self/stat", 2),
        }
    }

    /// From then until now, per I/O.
    pub fn per_io(&self, roles: &[Role], ios: u64) -> CpuPerIo {
        let now = Cpu::now(roles);
        let ios = ios.max(1) as f64;
        let since = |role: &&'static str| (now.roles[*role] - self.roles.get(*role).copied().unwrap_or(0.0)) / ios;
        CpuPerIo {
            machine_us: self.machine.busy_us_until(&now.machine) / ios,
            load_us: (now.load - self.load) / ios,
            roles_us: now.roles.keys().map(|role| (*role, since(role))).collect(),
        }
    }

    /// Share of one processor that each role has used since then, in hundredths.
    pub fn percent_of_one(&self, roles: &[Role]) -> BTreeMap<&'static str, f64> {
        let now = Cpu::now(roles);
        let us = (now.machine.at - self.machine.at).as_secs_f64() * 1e6;
        let since = |role: &&'static str| now.roles[*role] - self.roles.get(*role).copied().unwrap_or(0.0);
        now.roles.keys().map(|role| (*role, since(role) / us * 100.0)).collect()
    }
}

/// User and system time of a process in microseconds; `skip` two for that of its children that have ended.
fn process_us(path: &str, skip: usize) -> f64 {
    let stat = fs::read_to_string(path).unwrap_or_default();
    // Behind the name, which may itself hold spaces and parentheses: state, then twelve fields up to utime and stime.
    let fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let ticks = fields.split_whitespace().skip(11 + skip).take(2);
    ticks.filter_map(|field| field.parse::<f64>().ok()).sum::<f64>() * 1e6 / TICKS_PER_S
}

/// The machine's time as `/proc/stat` counts it: busy and all of it, in ticks of all processors.
#[derive(Debug)]
struct Machine {
    busy: f64,
    all: f64,
    at: Instant,
}

impl Machine {
    fn now() -> Machine {
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        let first = stat.lines().next().unwrap_or_default();
        let words = first.split_whitespace().skip(1);
        let ticks: Vec<f64> = words.filter_map(|word| word.parse().ok()).collect();
        // user nice system idle iowait irq softirq steal; guest time is part of user time.
        let all: f64 = ticks.iter().take(8).sum();
        let idle: f64 = ticks.iter().skip(3).take(2).sum();
        Machine {
            busy: all - idle,
            all,
            at: Instant::now(),
        }
    }

    fn busy_us_until(&self, now: &Machine) -> f64 {
        let processors = std::thread::available_parallelism().map_or(1.0, |count| count.get() as f64);
        let share = (now.busy - self.busy) / (now.all - self.all).max(1.0);
        share * processors * (now.at - self.at).as_secs_f64() * 1e6
    }
}

/// Sums and counts of the export's histograms at a moment.
#[derive(Clone, Debug)]
pub struct Counted(BTreeMap<&'static str, (f64, f64)>);

/// What the export measures of one I/O, with the name and the label of its histogram.
const HISTOGRAMS: [(&str, &str, &str); 7] = [
    ("operation", "cairn_client_operation_seconds", "op=\"read\""),
    ("operation-write", "cairn_client_operation_seconds", "op=\"write\""),
    ("round-trip", "cairn_client_device_round_trip_seconds", ""),
    ("queue", "cairn_client_device_stage_seconds", "stage=\"queue\""),
    ("read", "cairn_client_device_stage_seconds", "stage=\"read\""),
    ("write", "cairn_client_device_stage_seconds", "stage=\"write\""),
    ("flush", "cairn_client_device_stage_seconds", "stage=\"flush\""),
];

/// Mean microseconds that an I/O spends in each part of its way, all parts together as long as the load saw it take.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Stages {
    /// The load's own, its socket, and the export's decoding and encoding.
    pub front_us: f64,
    /// From the decoded request to the complete answer, without the devices' answers: order, split, encode, wake-ups. Less than
    /// nothing when the answer that completes an I/O comes earlier than answers do on the average.
    pub client_us: f64,
    /// Both ways over the network, with the node's decoding, encoding and wake-ups.
    pub network_us: f64,
    /// In the node's queue, until its device is given the operation.
    pub queue_us: f64,
    /// Reading or writing on the device.
    pub device_us: f64,
    /// The device's flush.
    pub flush_us: f64,
}

impl Counted {
    /// From the text of the export's metrics.
    pub fn of(metrics: &str) -> Counted {
        let one = |(key, name, label): (&'static str, &str, &str)| {
            let part = |suffix: &str| scrape::sum(metrics, &format!("{name}_{suffix}"), label);
            (key, (part("sum"), part("count")))
        };
        Counted(HISTOGRAMS.into_iter().map(one).collect())
    }

    /// Where the time of the I/O between the two went, which took `mean_us` for the load. `None` when nothing was counted.
    pub fn until(&self, after: &Counted, mean_us: f64, is_read: bool) -> Option<Stages> {
        let mean = |key: &str| {
            let ((sum, count), (sum_after, count_after)) = (self.0[key], after.0[key]);
            let counted = count_after - count;
            if counted > 0.0 {
                (sum_after - sum) / counted * 1e6
            } else {
                0.0
            }
        };
        let operation = mean(if is_read { "operation" } else { "operation-write" });
        let (round_trip, queue, flush) = (mean("round-trip"), mean("queue"), mean("flush"));
        let device = mean(if is_read { "read" } else { "write" });
        (operation > 0.0).then_some(Stages {
            front_us: mean_us - operation,
            client_us: operation - round_trip,
            network_us: round_trip - queue - device - flush,
            queue_us: queue,
            device_us: device,
            flush_us: flush,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_add_up_to_what_the_load_saw() {
        let text = |n: f64| {
            let line = |name: &str, label: &str, us: f64| {
                format!("{name}_sum{{{label}}} {}\n{name}_count{{{label}}} {n}\n", us * n / 1e6)
            };
            let stage = |name: &str, us| line("cairn_client_device_stage_seconds", &format!("stage=\"{name}\""), us);
            line("cairn_client_operation_seconds", "op=\"write\"", 200.0)
                + &line("cairn_client_device_round_trip_seconds", "x=\"y\"", 180.0)
                + &stage("queue", 10.0)
                + &stage("write", 60.0)
                + &stage("flush", 70.0)
        };
        let (before, after) = (Counted::of(&text(10.0)), Counted::of(&text(30.0)));
        let stages = before.until(&after, 250.0, false).unwrap();
        let parts = [
            stages.front_us,
            stages.client_us,
            stages.network_us,
            stages.queue_us,
            stages.device_us,
            stages.flush_us,
        ];
        let rounded = parts.map(|part| part.round());
        assert_eq!(rounded, [50.0, 20.0, 40.0, 10.0, 60.0, 70.0]);
        assert_eq!(before.until(&before, 250.0, false), None);
    }

    #[test]
    fn the_time_of_a_busy_process_and_of_ended_children_is_seen() {
        let roles = [("self", std::process::id() as i32)];
        let before = Cpu::now(&roles);
        let busy = std::process::Command::new("sh")
            .args(["-c", "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done"])
            .status();
        assert!(busy.unwrap().success());
        let cpu = before.per_io(&roles, 10);
        assert!(cpu.load_us > 0.0, "{cpu:?}");
        assert!(cpu.machine_us > 0.0, "{cpu:?}");
        assert!(cpu.roles_us["self"] < cpu.load_us, "{cpu:?}");
    }
}
