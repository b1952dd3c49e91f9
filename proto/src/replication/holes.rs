//! Holes that a member lacks: a discarded chunk is one message, not a copy that lists its blocks.
//!
//! Before a run that is longer than a copy is read, the member that is to give it lists it. Each long hole of the list
//! becomes a [`CopyHole`] of its own, by the same rules as other copies; what else there is stays lacking and is read. One
//! member is asked for one list at a time.

use super::catch_up::Job;
use super::mask::Mask;
use super::{Coordinator, What};
use crate::block::{BlockState, Cursor};
use crate::frame::Class;
use crate::ids::{Layer, Version};
use crate::message::{Collect, Collected, CopyHole, Message};
use crate::units::BlockRange;

/// What the list of a range says of it.
#[derive(PartialEq, Eq, Debug)]
struct Survey {
    /// The holes in it, in order.
    holes: Vec<(BlockRange, BlockState)>,
    /// Up to which block it is known.
    end: u32,
}

impl Survey {
    /// `None` if the list is not in order, or says nothing.
    fn of(layer: Layer, range: BlockRange, page: &Collected) -> Option<Survey> {
        let at = |block| Cursor {
            chunk: range.chunk(),
            layer,
            block,
        };
        let end = match page.next {
            Some(next) if next <= at(range.start()) => return None,
            Some(next) if next < at(range.end()) => next.block,
            _ => range.end(),
        };
        let mut survey = Survey { holes: Vec::new(), end };
        let mut known = range.start();
        for run in &page.runs {
            if (run.range.chunk(), run.layer) != (range.chunk(), layer) || run.range.start() >= end {
                break;
            }
            if run.range.end() <= known {
                return None;
            }
            // A run that began before the place that was asked for may be given whole.
            if run.range.start() < known && known > range.start() {
                return None;
            }
            survey.add(range, (known, run.range.start()), BlockState::ABSENT);
            let start = run.range.start().max(known);
            known = run.range.end().min(end);
            if run.state.content.is_hole() {
                survey.add(range, (start, known), run.state);
            }
        }
        survey.add(range, (known, end), BlockState::ABSENT);
        Some(survey)
    }

    fn add(&mut self, range: BlockRange, (start, end): (u32, u32), state: BlockState) {
        let Some(hole) = BlockRange::new(range.chunk(), start, end.saturating_sub(start)) else {
            return;
        };
        match self.holes.last_mut() {
            Some((last, same)) if *same == state && last.end() == start => {
                let longer = BlockRange::new(range.chunk(), last.start(), end - last.start());
                *last = longer.expect("both lie in the chunk");
            }
            _ => self.holes.push((hole, state)),
        }
    }
}

impl Coordinator {
    /// Asks what of a long run that a member lacks is a hole.
    pub(super) fn start_survey(&mut self, g: usize, target: usize, source: usize, layer: Layer, range: BlockRange) {
        let collect = Collect {
            holder: self.holder,
            group: self.groups[g].index,
            from: Cursor {
                chunk: range.chunk(),
                layer,
                block: range.start(),
            },
            to: Cursor::behind(layer, &range),
            above: Version::ZERO,
        };
        let job = self.add_job(g, target, Job::new(layer, range, source));
        let replica = &mut self.groups[g].replicas[target];
        // From here on a bit that is set there is news, which the list may not have.
        replica.lack.remove(layer, range);
        replica.jobs.get_mut(&job).expect("it was just added").is_survey = true;
        let what = What::Survey { group: g, target, job };
        self.send(g, Mask::one(source), Class::Repair, Message::Collect(collect), what);
    }

    fn add_job(&mut self, g: usize, target: usize, state: Job) -> u64 {
        let group = &mut self.groups[g];
        let job = group.next_job;
        group.next_job += 1;
        group.replicas[target].jobs.insert(job, state);
        job
    }

    /// The list of a run is there: its long holes are sent, and the rest is lacking again.
    pub(super) fn surveyed(&mut self, g: usize, target: usize, job: u64, page: &Collected) {
        let limits = self.limits;
        let replica = &mut self.groups[g].replicas[target];
        let Some(asked) = replica.jobs.get(&job) else { return };
        let (layer, range, source) = (asked.layer, asked.range, asked.source);
        let survey = Survey::of(layer, range, page).filter(|_| replica.joined);
        let Some(Survey { holes, mut end }) = survey else {
            return self.copy_lost(g, target, job);
        };
        let asked = replica.jobs.remove(&job).expect("it was just there");
        let mut from = range.start();
        for (hole, state) in holes.into_iter().filter(|(hole, _)| hole.count() >= limits.copy_blocks) {
            if self.groups[g].replicas[target].jobs.len() >= limits.copies_in_flight {
                // It is asked for again.
                end = hole.start();
                break;
            }
            self.lacks_again(g, target, &asked, (from, hole.start()));
            from = hole.end();
            let mut copied = Job::new(layer, hole, source);
            asked
                .written(hole)
                .into_iter()
                .for_each(|run| copied.supersede(layer, run));
            let job = self.add_job(g, target, copied);
            self.note_copy(g, 1);
            let copy = Message::CopyHole(CopyHole {
                holder: self.holder,
                group: self.groups[g].index,
                layer,
                range: hole,
                source: self.copy_source(g, target),
                state,
            });
            let what = What::CopyWrite { group: g, target, job };
            self.send(g, Mask::one(target), Class::Repair, copy, what);
        }
        self.lacks_again(g, target, &asked, (from, range.end()));
        let replica = &mut self.groups[g].replicas[target];
        replica.copy_from = (range.chunk(), layer, range.start());
        replica.surveyed = Some((range.chunk(), layer, end));
        self.touch_catch_up(g);
    }

    fn lacks_again(&mut self, g: usize, target: usize, job: &Job, (start, end): (u32, u32)) {
        let Some(part) = BlockRange::new(job.range.chunk(), start, end - start) else {
            return;
        };
        let replica = &mut self.groups[g].replicas[target];
        for run in job.lacking(part) {
            replica.lack.put_back(job.layer, run);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{Content, Run};
    use crate::checksum::Checksum;
    use crate::ids::ChunkIndex;

    fn range(start: u32, count: u32) -> BlockRange {
        BlockRange::new(ChunkIndex(3), start, count).unwrap()
    }

    fn state(content: Content, version: u64) -> BlockState {
        let version = Version::from_bits(version);
        BlockState { content, version }
    }

    fn page(runs: &[(BlockRange, BlockState)], next: Option<u32>) -> Collected {
        let run = |(range, state): &(BlockRange, BlockState)| Run {
            layer: Layer(0),
            range: *range,
            state: *state,
        };
        Collected {
            runs: runs.iter().map(run).collect(),
            next: next.map(|block| Cursor {
                chunk: ChunkIndex(3),
                layer: Layer(0),
                block,
            }),
            ..Collected::default()
        }
    }

    #[test]
    fn a_list_tells_the_holes_of_a_range_and_what_it_leaves_out_was_never_written() {
        let (zero, data) = (state(Content::Zero, 7), state(Content::Data(Checksum(1)), 8));
        let runs = [
            (range(90, 20), zero),
            (range(110, 5), zero),
            (range(120, 10), data),
            (range(130, 4), state(Content::Damaged, 9)),
            (range(140, 100), zero),
        ];
        let survey = Survey::of(Layer(0), range(100, 100), &page(&runs, None)).unwrap();
        let expected = [
            (range(100, 15), zero),
            (range(115, 5), BlockState::ABSENT),
            (range(134, 6), BlockState::ABSENT),
            (range(140, 60), zero),
        ];
        assert_eq!((survey.holes.as_slice(), survey.end), (expected.as_slice(), 200));
        let part = Survey::of(Layer(0), range(100, 100), &page(&runs[..3], Some(130))).unwrap();
        assert_eq!(
            (part.holes.len(), part.end),
            (2, 130),
            "nothing is said of what follows"
        );
        let none = Survey::of(Layer(0), range(100, 100), &page(&[], None)).unwrap();
        assert_eq!(none.holes, [(range(100, 100), BlockState::ABSENT)]);
    }

    #[test]
    fn a_list_that_ends_before_the_last_block_of_a_range_says_nothing_of_it() {
        let data = state(Content::Data(Checksum(1)), 8);
        let page = page(&[(range(100, 10), data)], Some(199));
        let survey = Survey::of(Layer(0), range(100, 100), &page).unwrap();
        assert_eq!(
            (survey.holes.as_slice(), survey.end),
            ([(range(110, 89), BlockState::ABSENT)].as_slice(), 199)
        );
    }

    #[test]
    fn a_list_out_of_order_or_without_progress_is_not_believed() {
        let zero = state(Content::Zero, 7);
        let of = |runs: &[_], next| Survey::of(Layer(0), range(100, 100), &page(runs, next));
        assert_eq!(of(&[(range(120, 5), zero), (range(110, 5), zero)], None), None);
        assert_eq!(of(&[(range(120, 5), zero), (range(122, 5), zero)], None), None);
        assert_eq!(of(&[], Some(100)), None);
    }
}
