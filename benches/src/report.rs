//! The figures as a table of ratios for people, and as JSON for programs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::cost::Stages;
use crate::matrix::{Case, Sample};
use crate::store::stats::Spread;
use crate::targets::Kind;

/// One sample in one line.
pub fn line(sample: &Sample) -> String {
    let figures = &sample.figures;
    format!(
        "{:<9} {:<17} {:>7.0} IO/s {:>6.0} MiB/s  latency µs mean {:.0} p50 {:.0} p99 {:.0} p99.9 {:.0} max {:.0}  CPU µs/IO {:.0}",
        sample.target.name(),
        sample.case,
        figures.iops,
        figures.bytes_per_s / f64::from(1 << 20),
        figures.mean_us,
        figures.p50_us,
        figures.p99_us,
        figures.p999_us,
        figures.max_us,
        sample.cpu.machine_us,
    )
}

/// The table: medians of each target, then the first target's rate as a part of each other's, round by round: the median
/// of the rounds' ratios, and the lowest and highest.
pub fn table(samples: &[Sample], targets: &[Kind], cases: &[Case]) -> String {
    let mut out = String::new();
    let mut header = format!("{:<18}", "case");
    for target in targets {
        let _ = write!(
            header,
            " {:>10} {:>8} {:>8} {:>8}",
            target.name(),
            "mean µs",
            "p99 µs",
            "CPU µs"
        );
    }
    for other in targets.iter().skip(1) {
        let _ = write!(header, "  {:>22}", format!("{}/{}", targets[0].name(), other.name()));
    }
    let _ = writeln!(out, "{header}\n{}", "-".repeat(header.chars().count()));
    for case in cases {
        let of = |target: Kind| {
            samples
                .iter()
                .filter(move |s| s.case == case.name && s.target == target)
        };
        let _ = write!(out, "{:<18}", case.name);
        for target in targets {
            let middle = |value: fn(&Sample) -> f64| Spread::of(of(*target).map(value)).median;
            let (iops, cpu) = (middle(|s| s.figures.iops), middle(|s| s.cpu.machine_us));
            let (mean, p99) = (middle(|s| s.figures.mean_us), middle(|s| s.figures.p99_us));
            let _ = write!(out, " {iops:>10.0} {mean:>8.0} {p99:>8.0} {cpu:>8.0}");
        }
        for other in targets.iter().skip(1) {
            let pairs = of(targets[0]).filter_map(|mine| {
                let peer = of(*other).find(|peer| peer.round == mine.round)?;
                (peer.figures.iops > 0.0).then(|| mine.figures.iops / peer.figures.iops)
            });
            let ratio = Spread::of(pairs);
            let _ = write!(out, "  {ratio:>22}");
        }
        out.push('\n');
    }
    out.push_str(
        "IO/s of each target (median of the rounds), mean and 99th percentile of latency, busy time of the whole machine per I/O with \
         the load's own;\nratios of IO/s: median (lowest–highest) of the rounds. Writes of raw and qemu-nbd are not durable when \
         answered, those of cairn, library and raw-dsync are.\n",
    );
    out
}

/// Processor time per I/O by process: medians of the rounds.
pub fn processors(samples: &[Sample], targets: &[Kind], cases: &[Case]) -> String {
    let mut out = String::from(
        "\nProcessor time per I/O, µs (median of the rounds): all of the machine = load + processes + the rest (kernel's own)\n",
    );
    for case in cases {
        for target in targets {
            let of = || samples.iter().filter(|s| s.case == case.name && s.target == *target);
            let Some(first) = of().next() else { continue };
            let middle = |value: &dyn Fn(&Sample) -> f64| Spread::of(of().map(value)).median;
            let (all, load) = (middle(&|s| s.cpu.machine_us), middle(&|s| s.cpu.load_us));
            let mut rest = all - load;
            let _ = write!(
                out,
                "{:<18} {:<9} {all:>7.1} = load {load:.1}",
                case.name,
                target.name()
            );
            for role in first.cpu.roles_us.keys() {
                let own = middle(&|s| s.cpu.roles_us[role]);
                rest -= own;
                let _ = write!(out, " + {role} {own:.1}");
            }
            let _ = writeln!(out, " + rest {rest:.1}");
        }
    }
    out
}

/// What an I/O asks of the kernel by process: medians of the rounds. Targets without processes are left out.
pub fn calls(samples: &[Sample], targets: &[Kind], cases: &[Case]) -> String {
    type Part = fn(&Sample) -> &BTreeMap<String, f64>;
    const PARTS: [(&str, Part); 2] = [
        ("wake-ups", |s| &s.calls.wake_ups),
        ("system calls", |s| &s.calls.system_calls),
    ];
    let mut out = String::from(
        "\nWake-ups of threads per I/O, and system calls of the threads that serve it (median of the rounds), all processes of a kind together\n",
    );
    for case in cases {
        for target in targets {
            for (name, part) in PARTS {
                let of = || samples.iter().filter(|s| s.case == case.name && s.target == *target);
                // Workers of the kernel come and go: not all rounds have them.
                let keys: BTreeSet<&String> = of().flat_map(|s| part(s).keys()).collect();
                if keys.is_empty() {
                    continue;
                }
                let middle = |key: &String| Spread::of(of().map(|s| part(s).get(key).copied().unwrap_or(0.0))).median;
                let all = Spread::of(of().map(|s| part(s).values().sum())).median;
                let _ = write!(out, "{:<18} {:<9} {name:<12} {all:>7.2} =", case.name, target.name());
                let parts: Vec<String> = keys.iter().map(|key| format!("{key} {:.2}", middle(key))).collect();
                let _ = writeln!(out, " {}", parts.join(" + "));
            }
        }
    }
    out
}

/// Where the time of Cairn's I/O goes: medians of the rounds. Empty when no sample says.
pub fn stages(samples: &[Sample], cases: &[Case]) -> String {
    type Part = (&'static str, fn(&Stages) -> f64);
    const PARTS: [Part; 6] = [
        ("load+socket", |s| s.front_us),
        ("client", |s| s.client_us),
        ("network", |s| s.network_us),
        ("node queue", |s| s.queue_us),
        ("device", |s| s.device_us),
        ("flush", |s| s.flush_us),
    ];
    let mut out = String::new();
    for case in cases {
        let of = || {
            samples
                .iter()
                .filter(|s| s.case == case.name)
                .filter_map(|s| Some((s, s.stages?)))
        };
        if of().next().is_none() {
            continue;
        }
        if out.is_empty() {
            out.push_str("\nWhere the time of an I/O of cairn goes, mean µs (median of the rounds); of writes the devices' parts are means of all copies\n");
            let _ = write!(out, "{:<18} {:>11}", "case", "I/O");
            for (name, _) in PARTS {
                let _ = write!(out, " {name:>11}");
            }
            out.push('\n');
        }
        let mean = Spread::of(of().map(|(s, _)| s.figures.mean_us)).median;
        let _ = write!(out, "{:<18} {mean:>11.0}", case.name);
        for (_, part) in PARTS {
            let _ = write!(
                out,
                " {:>11.0}",
                Spread::of(of().map(|(_, stages)| part(&stages))).median
            );
        }
        out.push('\n');
    }
    out
}

/// Every sample.
pub fn json(samples: &[Sample]) -> Value {
    let rows = samples.iter().map(|sample| {
        let figures = &sample.figures;
        json!({
            "case": sample.case,
            "target": sample.target.name(),
            "round": sample.round,
            "iops": figures.iops,
            "bytes_per_s": figures.bytes_per_s,
            "ios": figures.ios,
            "mean_us": figures.mean_us,
            "p50_us": figures.p50_us,
            "p99_us": figures.p99_us,
            "p999_us": figures.p999_us,
            "max_us": figures.max_us,
            "cpu_us_per_io": sample.cpu.machine_us,
            "cpu_us_per_io_of_load": sample.cpu.load_us,
            "cpu_us_per_io_of": sample.cpu.roles_us,
            "wake_ups_per_io_of": sample.calls.wake_ups,
            "system_calls_per_io_of": sample.calls.system_calls,
            "stages_us": sample.stages.map(|stages| json!({
                "front": stages.front_us,
                "client": stages.client_us,
                "network": stages.network_us,
                "queue": stages.queue_us,
                "device": stages.device_us,
                "flush": stages.flush_us,
            })),
        })
    });
    json!({ "version": 1, "samples": rows.collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use cairn_chaos::live::fio::Figures;

    use super::*;
    use crate::calls::CallsPerIo;
    use crate::cost::CpuPerIo;
    use crate::matrix::CASES;

    #[test]
    fn ratios_are_taken_round_by_round() {
        let sample = |target, round, iops| Sample {
            case: CASES[1].name,
            target,
            round,
            figures: Figures {
                iops,
                ..Figures::default()
            },
            cpu: CpuPerIo::default(),
            calls: CallsPerIo::default(),
            stages: None,
        };
        let samples = [
            sample(Kind::Cairn, 1, 100.0),
            sample(Kind::Raw, 1, 200.0),
            sample(Kind::Cairn, 2, 300.0),
            sample(Kind::Raw, 2, 400.0),
        ];
        let table = table(&samples, &[Kind::Cairn, Kind::Raw], &CASES[1..2]);
        assert!(table.contains("0.62 (0.50–0.75)"), "{table}");
        assert_eq!(json(&samples)["samples"].as_array().unwrap().len(), 4);
    }

    #[test]
    fn a_thread_that_is_not_there_in_each_round_counts_nothing_in_the_others() {
        let sample = |round, wake_ups: &[(&str, f64)]| Sample {
            case: CASES[1].name,
            target: Kind::Cairn,
            round,
            figures: Figures::default(),
            cpu: CpuPerIo::default(),
            calls: CallsPerIo {
                wake_ups: wake_ups
                    .iter()
                    .map(|(name, count)| (name.to_string(), *count))
                    .collect(),
                ..CallsPerIo::default()
            },
            stages: None,
        };
        let samples = [
            sample(1, &[("nodes", 6.0), ("nodes' workers", 1.0)]),
            sample(2, &[("nodes", 8.0)]),
        ];
        let table = calls(&samples, &[Kind::Cairn], &CASES);
        assert!(table.contains("7.50 = nodes 7.00 + nodes' workers 0.50"), "{table}");
        assert!(!table.contains("system calls   "), "none were counted: {table}");
    }
}
