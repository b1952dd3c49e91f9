//! Which volumes a caretaker takes, and when: without I/O.

use std::collections::BTreeMap;

use cairn_proto::ids::{Generation, VolumeId};
use cairn_proto::time::Time;

use super::Task;
use super::limits::{HELD_MAX, RETRY_PAUSE, TASKS_MAX};

/// How it stands with one task.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    /// It is to be begun from then on.
    Due(Time),
    /// The volume was asked for, and perhaps is held.
    Working,
    /// It has ended under this grant: a task that knows of no later one is the same task, told again.
    Done(Generation),
}

/// What became of the tasks that meta has given. When a volume is released is decided where it is held: when it is whole,
/// when meta says so, and when somebody else has taken it.
#[derive(Debug, Default)]
pub struct Plan {
    tasks: BTreeMap<VolumeId, (Generation, Step)>,
}

impl Plan {
    /// All tasks, as meta has them now. One that is missing and under way goes on: a new leader learns of it from its
    /// reports, and says whether it is wanted still.
    pub fn told(&mut self, now: Time, tasks: &[Task]) {
        let tasks = &tasks[..tasks.len().min(TASKS_MAX)];
        self.tasks
            .retain(|volume, (_, step)| *step == Step::Working || tasks.iter().any(|task| task.volume == *volume));
        for task in tasks {
            let seen = task.generation_seen;
            let (known, step) = self.tasks.entry(task.volume).or_insert((seen, Step::Due(now)));
            *known = seen.max(*known);
            if let Step::Done(granted) = step
                && seen >= *granted
            {
                *step = Step::Due(now);
            }
        }
    }

    /// The next volume to take care of, if there is one; it is being worked on from then on.
    pub fn begin(&mut self, now: Time) -> Option<VolumeId> {
        let working = self.tasks.values().filter(|(_, step)| *step == Step::Working);
        if working.count() >= HELD_MAX {
            return None;
        }
        let mut due = self.tasks.iter_mut();
        let (volume, (_, step)) = due.find(|(_, (_, step))| matches!(step, Step::Due(at) if *at <= now))?;
        *step = Step::Working;
        Some(*volume)
    }

    /// A volume is not held any more. It was granted under this generation, or never. When meta has meanwhile told of a later one, that was
    /// another task: a guest took the volume, and gave it back before this had ended here. Meta will not tell of it again.
    pub fn ended(&mut self, now: Time, volume: VolumeId, granted: Option<Generation>) {
        if let Some((seen, step)) = self.tasks.get_mut(&volume) {
            *step = match granted {
                Some(generation) if *seen >= generation => Step::Due(now),
                Some(generation) => Step::Done(generation),
                None => Step::Due(now + RETRY_PAUSE),
            };
        }
    }

    /// When something is to be begun next.
    pub fn wake(&self) -> Option<Time> {
        let due = self.tasks.values().filter_map(|(_, step)| match step {
            Step::Due(at) => Some(*at),
            Step::Working | Step::Done(_) => None,
        });
        due.min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Time {
        Time::from_nanos(seconds * 1_000_000_000)
    }

    fn generation(number: u32) -> Generation {
        Generation::new(number).unwrap()
    }

    fn task(volume: u64, seen: u32) -> Task {
        Task {
            volume: VolumeId(volume),
            generation_seen: generation(seen),
        }
    }

    #[test]
    fn a_task_is_begun_once_however_often_it_is_told_and_again_when_it_is_given_anew() {
        let mut plan = Plan::default();
        for second in 0..3 {
            plan.told(at(second), &[task(7, 4)]);
            assert_eq!(plan.begin(at(second)), (second == 0).then_some(VolumeId(7)));
        }
        plan.ended(at(3), VolumeId(7), Some(generation(5)));
        plan.told(at(4), &[task(7, 4)]);
        assert_eq!(plan.begin(at(4)), None, "meta has not heard yet that it is done");
        plan.told(at(5), &[]);
        plan.told(at(6), &[task(7, 5)]);
        assert_eq!(plan.begin(at(6)), Some(VolumeId(7)));
        plan.ended(at(7), VolumeId(7), Some(generation(6)));
        plan.told(at(8), &[task(7, 9)]);
        assert_eq!(plan.begin(at(8)), Some(VolumeId(7)), "a guest had it in between");
    }

    #[test]
    fn a_task_that_is_given_anew_before_the_one_before_has_ended_is_begun_then() {
        let mut plan = Plan::default();
        plan.told(at(0), &[task(7, 3)]);
        plan.begin(at(0)).unwrap();
        // It was granted generation 4; a guest took the volume with 5, and has given it back.
        plan.told(at(1), &[task(7, 5)]);
        plan.told(at(1), &[task(7, 5)]);
        assert_eq!(plan.begin(at(1)), None, "it is under way");
        plan.ended(at(2), VolumeId(7), Some(generation(4)));
        assert_eq!(plan.begin(at(2)), Some(VolumeId(7)));
        plan.ended(at(3), VolumeId(7), Some(generation(6)));
        assert_eq!((plan.begin(at(3)), plan.wake()), (None, None));
    }

    #[test]
    fn what_can_not_be_had_is_tried_again_after_a_while_for_as_long_as_it_is_wanted() {
        let mut plan = Plan::default();
        plan.told(at(0), &[task(7, 4)]);
        plan.begin(at(0)).unwrap();
        plan.ended(at(1), VolumeId(7), None);
        plan.told(at(2), &[task(7, 4)]);
        assert_eq!(plan.begin(at(2)), None);
        assert_eq!(plan.wake(), Some(at(1) + RETRY_PAUSE));
        assert_eq!(plan.begin(at(1) + RETRY_PAUSE), Some(VolumeId(7)));
        plan.ended(at(20), VolumeId(7), None);
        plan.told(at(21), &[]);
        assert_eq!((plan.begin(at(100)), plan.wake()), (None, None));
    }

    #[test]
    fn a_volume_that_is_held_stays_so_when_a_new_leader_does_not_know_of_it_and_few_are_held_at_a_time() {
        let mut plan = Plan::default();
        let tasks: Vec<Task> = (1..=4).map(|volume| task(volume, 1)).collect();
        plan.told(at(0), &tasks);
        let begun: Vec<_> = std::iter::from_fn(|| plan.begin(at(0))).collect();
        assert_eq!(begun.len(), HELD_MAX);
        plan.told(at(1), &[]);
        plan.told(at(2), &tasks[..1]);
        assert_eq!(plan.begin(at(2)), None, "it is under way");
        plan.ended(at(3), begun[0], Some(generation(2)));
        plan.told(at(4), &tasks);
        assert!(plan.begin(at(4)).is_some_and(|next| !begun.contains(&next)));
    }
}
