//! What Cairn aims at beside its peers, and whether a run of the fio matrix met it. An aim whose peer was not measured says so.

use std::fmt::Write as _;

use crate::matrix::Sample;
use crate::store::stats::Spread;
use crate::targets::Kind;

/// One aim.
struct Aim {
    case: &'static str,
    what: Figure,
    /// The figure's bound: a least ratio of rates, or a most of anything else.
    bound: f64,
}

enum Figure {
    /// Rate as a part of that of this peer, at least.
    Rate(Kind),
    /// Mean latency as a multiple of that of this peer, at most.
    Latency(Kind),
    /// Processor time of the whole machine per I/O in microseconds, at most.
    Processor,
    /// 99.9th percentile of the latency as a multiple of the median, at most.
    Tail,
}

const fn aim(case: &'static str, what: Figure, bound: f64) -> Aim {
    Aim { case, what, bound }
}

const AIMS: [Aim; 13] = [
    aim("randwrite-4k-qd1", Figure::Rate(Kind::Ceph), 5.0),
    aim("randwrite-4k-qd1", Figure::Latency(Kind::RawDsync3), 1.7),
    aim("randwrite-4k-qd1", Figure::Tail, 5.0),
    aim("randwrite-4k-qd64", Figure::Rate(Kind::Ceph), 10.0),
    aim("randwrite-4k-qd64", Figure::Rate(Kind::QemuNbd), 1.3),
    aim("randwrite-4k-qd64", Figure::Processor, 40.0),
    aim("randread-4k-qd1", Figure::Rate(Kind::QemuNbd), 0.8),
    aim("randread-4k-qd1", Figure::Rate(Kind::Ceph), 2.0),
    aim("randread-4k-qd64", Figure::Rate(Kind::QemuNbd), 1.0),
    aim("randread-4k-qd64", Figure::Rate(Kind::Ceph), 2.5),
    aim("randread-4k-qd64", Figure::Processor, 30.0),
    aim("seqwrite-1m-qd8", Figure::Rate(Kind::Ceph), 2.5),
    aim("seqread-1m-qd8", Figure::Rate(Kind::QemuNbd), 0.9),
];

/// The aims of the cases that were run, each with the median of the rounds and their lowest and highest.
pub fn table(samples: &[Sample]) -> String {
    let mut out = String::from("\nAims (median of the rounds, lowest–highest)\n");
    for aim in &AIMS {
        let mine = || samples.iter().filter(|s| s.case == aim.case && s.target == Kind::Cairn);
        if mine().next().is_none() {
            continue;
        }
        let beside = |peer: Kind, figure: fn(&Sample) -> f64| {
            Spread::of(mine().filter_map(|s| {
                let other = samples
                    .iter()
                    .find(|other| other.case == s.case && other.target == peer && other.round == s.round)?;
                (figure(other) > 0.0).then(|| figure(s) / figure(other))
            }))
        };
        let (words, is_least, found) = match aim.what {
            Figure::Rate(peer) => (
                format!("rate / {}", peer.name()),
                true,
                beside(peer, |s| s.figures.iops),
            ),
            Figure::Latency(peer) => (
                format!("mean latency / {}", peer.name()),
                false,
                beside(peer, |s| s.figures.mean_us),
            ),
            Figure::Processor => (
                "machine's CPU µs per I/O".to_string(),
                false,
                Spread::of(mine().map(|s| s.cpu.machine_us)),
            ),
            Figure::Tail => (
                "p99.9 / median".to_string(),
                false,
                Spread::of(
                    mine()
                        .filter(|s| s.figures.p50_us > 0.0)
                        .map(|s| s.figures.p999_us / s.figures.p50_us),
                ),
            ),
        };
        let verdict = match found.median {
            value if !value.is_finite() || value <= 0.0 => "not measured",
            value if (value >= aim.bound) == is_least || value == aim.bound => "met",
            _ => "MISSED",
        };
        let relation = if is_least { "at least" } else { "at most" };
        let _ = writeln!(
            out,
            "{:<18} {words:<26} {relation:<8} {:>5}  {:<24} {verdict}",
            aim.case,
            aim.bound,
            if found.median.is_finite() {
                found.to_string()
            } else {
                "-".to_string()
            }
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use cairn_chaos::live::fio::Figures;

    use super::*;
    use crate::calls::CallsPerIo;
    use crate::cost::CpuPerIo;

    fn sample(case: &'static str, target: Kind, iops: f64, machine_us: f64) -> Sample {
        Sample {
            case,
            target,
            round: 1,
            figures: Figures {
                iops,
                ..Figures::default()
            },
            cpu: CpuPerIo {
                machine_us,
                ..CpuPerIo::default()
            },
            calls: CallsPerIo::default(),
            stages: None,
        }
    }

    #[test]
    fn an_aim_is_met_missed_or_not_measured() {
        let case = "randwrite-4k-qd64";
        let samples = [
            sample(case, Kind::Cairn, 1200.0, 39.0),
            sample(case, Kind::QemuNbd, 1000.0, 10.0),
        ];
        let table = table(&samples);
        let line = |words: &str| table.lines().find(|line| line.contains(words)).unwrap_or_default();
        assert!(line("rate / qemu-nbd").ends_with("MISSED"), "{table}");
        assert!(line("CPU").ends_with(" met"), "{table}");
        assert!(line("rate / ceph").ends_with("not measured"), "{table}");
        assert!(!table.contains("randread"), "{table}");
    }
}
