//! The figures of the store as a table for people, and as JSON for programs.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::cases::Side;
use super::stats::Spread;
use super::work::Figures;

/// What one case gave on one side in one round.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sample {
    /// Which case.
    pub case: &'static str,
    /// On what.
    pub side: Side,
    /// In which round, from 1.
    pub round: u32,
    /// What was measured.
    pub figures: Figures,
}

/// A single figure of a round.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Fact {
    /// What, with its unit.
    pub name: &'static str,
    /// In which round, from 1.
    pub round: u32,
    /// How much.
    pub value: f64,
}

/// All that was found.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Outcome {
    /// Of cases.
    pub samples: Vec<Sample>,
    /// Of rounds.
    pub facts: Vec<Fact>,
}

/// One sample in one line.
pub fn line(sample: &Sample) -> String {
    let figures = &sample.figures;
    format!(
        "{:<30} {:<9} {:>8.0} IO/s {:>6.0} MiB/s  µs mean {:.0} p50 {:.0} p99 {:.0} p99.9 {:.0}  CPU µs/IO {:.1}  written/byte {:.2}",
        sample.case,
        sample.side.name(),
        figures.iops,
        figures.bytes_per_s / f64::from(1 << 20),
        figures.mean_us,
        figures.p50_us,
        figures.p99_us,
        figures.p999_us,
        figures.cpu_us_per_op,
        figures.amplification,
    )
}

impl Outcome {
    fn of(&self, case: &str, side: Side) -> impl Iterator<Item = &Sample> {
        self.samples.iter().filter(move |s| s.case == case && s.side == side)
    }

    /// The cases in the order in which they ran.
    fn cases(&self) -> Vec<&'static str> {
        let mut cases: Vec<&'static str> = Vec::new();
        for sample in &self.samples {
            if !cases.contains(&sample.case) {
                cases.push(sample.case);
            }
        }
        cases
    }

    /// Round by round, the store's figure as a part of another side's.
    pub fn ratio(&self, case: &str, other: Side, figure: fn(&Figures) -> f64) -> Spread {
        Spread::of(self.of(case, Side::Store).filter_map(|mine| {
            let peer = self.of(case, other).find(|peer| peer.round == mine.round)?;
            let peer = figure(&peer.figures);
            (peer > 0.0).then(|| figure(&mine.figures) / peer)
        }))
    }

    /// A figure of the store over the rounds.
    pub fn spread(&self, case: &str, side: Side, figure: fn(&Figures) -> f64) -> Spread {
        Spread::of(self.of(case, side).map(|sample| figure(&sample.figures)))
    }

    /// The table: medians of the rounds of each side, and the store's rate as a part of the others', round by round: the
    /// median of the rounds' ratios, the lowest and the highest. Then the facts, then the aims.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let header = format!(
            "{:<30} {:<9} {:>8} {:>6} {:>7} {:>7} {:>7} {:>8} {:>6} {:>6}  {:<20} {:<20}",
            "case",
            "",
            "IO/s",
            "MiB/s",
            "mean µs",
            "p50",
            "p99",
            "p99.9",
            "CPU µs",
            "w.amp",
            "store/this IO/s",
            "mean latency"
        );
        let _ = writeln!(out, "{header}\n{}", "-".repeat(header.chars().count()));
        for case in self.cases() {
            let mut name = case;
            for side in [Side::Store, Side::RawFlush, Side::Raw] {
                if self.of(case, side).next().is_none() {
                    continue;
                }
                let middle = |figure: fn(&Figures) -> f64| self.spread(case, side, figure).median;
                let _ = write!(
                    out,
                    "{name:<30} {:<9} {:>8.0} {:>6.0} {:>7.0} {:>7.0} {:>7.0} {:>8.0} {:>6.1} {:>6.2}",
                    side.name(),
                    middle(|f| f.iops),
                    middle(|f| f.bytes_per_s) / f64::from(1 << 20),
                    middle(|f| f.mean_us),
                    middle(|f| f.p50_us),
                    middle(|f| f.p99_us),
                    middle(|f| f.p999_us),
                    middle(|f| f.cpu_us_per_op),
                    middle(|f| f.amplification),
                );
                if side != Side::Store {
                    let rate = self.ratio(case, side, |f| f.iops);
                    let latency = self.ratio(case, side, |f| f.mean_us);
                    let _ = write!(out, "  {rate:<20} {latency:<20}");
                }
                name = "";
                out.truncate(out.trim_end().len());
                out.push('\n');
            }
        }
        out.push_str(
            "\nMedians of the rounds; ratios are taken round by round: median (lowest–highest). `store` answers a write when it is \
             durable;\n`raw-flush` too, with one flush for all writes in flight; `raw` does not flush. `w.amp`: bytes written to the \
             device per byte\nof the load. CPU: this process with the kernel's work for it.\n\n",
        );
        self.add_facts(&mut out);
        self.add_aims(&mut out);
        out
    }

    fn add_facts(&self, out: &mut String) {
        let mut names: Vec<&'static str> = Vec::new();
        for fact in &self.facts {
            if !names.contains(&fact.name) {
                names.push(fact.name);
            }
        }
        for name in names {
            let spread = Spread::of(self.facts.iter().filter(|f| f.name == name).map(|f| f.value));
            let _ = writeln!(out, "{name:<44} {spread}");
        }
    }

    fn add_aims(&self, out: &mut String) {
        let depth_1 = self.ratio("randwrite-4k-qd1", Side::RawFlush, |f| f.mean_us);
        let depth_64 = self.ratio("randwrite-4k-qd64", Side::Raw, |f| f.iops);
        let full = self.ratio("full90-randwrite-4k-qd64", Side::RawFlush, |f| f.iops);
        let written = self.spread("randwrite-4k-qd64", Side::Store, |f| f.amplification);
        let moved = self.ratio("rewritten-moved-seqread-1m", Side::Raw, |f| f.bytes_per_s);
        let moved_full = self.ratio("rewritten80-moved-seqread-1m", Side::Raw, |f| f.bytes_per_s);
        let aims = [
            (
                "depth 1: latency at most 1.25 of raw write and flush",
                depth_1,
                depth_1.median <= 1.25,
            ),
            (
                "depth 64: at least the rate of raw writes without flush",
                depth_64,
                depth_64.median >= 1.0,
            ),
            (
                "90 % full: at least 0.8 of raw writes, one flush per batch",
                full,
                full.median >= 0.8,
            ),
            (
                "depth 64: bytes written per byte below 1.3",
                written,
                written.median < 1.3,
            ),
            (
                "half full, moved: at least 0.8 of raw sequential reads",
                moved,
                moved.median >= 0.8,
            ),
            (
                "80 % full, moved: at least 0.8 of raw sequential reads",
                moved_full,
                moved_full.median >= 0.8,
            ),
        ];
        out.push('\n');
        for (words, found, met) in aims {
            if !found.median.is_nan() {
                let verdict = if met { "met" } else { "MISSED" };
                let _ = writeln!(out, "{words:<60} {found:<20} {verdict}");
            }
        }
        out.truncate(out.trim_end().len());
        out.push('\n');
    }

    /// Every sample.
    pub fn json(&self) -> Value {
        let samples = self.samples.iter().map(|sample| {
            let figures = &sample.figures;
            json!({
                "case": sample.case,
                "side": sample.side.name(),
                "round": sample.round,
                "ops": figures.ops,
                "iops": figures.iops,
                "bytes_per_s": figures.bytes_per_s,
                "mean_us": figures.mean_us,
                "p50_us": figures.p50_us,
                "p99_us": figures.p99_us,
                "p999_us": figures.p999_us,
                "max_us": figures.max_us,
                "cpu_us_per_op": figures.cpu_us_per_op,
                "write_amplification": figures.amplification,
            })
        });
        let facts = self
            .facts
            .iter()
            .map(|fact| json!({ "name": fact.name, "round": fact.round, "value": fact.value }));
        json!({
            "version": 1,
            "samples": samples.collect::<Vec<_>>(),
            "facts": facts.collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_round_by_round_and_aims_are_judged_by_their_median() {
        let mut outcome = Outcome::default();
        for (round, mine, raw) in [(1, 100.0, 200.0), (2, 300.0, 400.0), (3, 90.0, 100.0)] {
            for (side, iops) in [(Side::Store, mine), (Side::Raw, raw)] {
                let figures = Figures {
                    iops,
                    amplification: 1.1,
                    ..Figures::default()
                };
                let case = "randwrite-4k-qd64";
                outcome.samples.push(Sample {
                    case,
                    side,
                    round,
                    figures,
                });
            }
        }
        let table = outcome.table();
        assert!(table.contains("0.75 (0.50–0.90)"), "{table}");
        assert!(
            table.contains("MISSED") && table.contains("1.10 (1.10–1.10)     met"),
            "{table}"
        );
        assert_eq!(outcome.json()["samples"].as_array().unwrap().len(), 6);
    }
}
