//! Split holders: short plays in which an older and a newer holder of one group reach different members of it.
//!
//! Most rules about attachments and configurations are only needed when a write lies on one member, its holder ends, the
//! next one hears the others, and one after that hears other members again. Random faults seldom come in that order. A play
//! has a cast (one group, its members in a random order, and clients in the order in which they come to hold the volume) and
//! steps that are put together by the seed: who is cut off from whom, what the guests do, when the next holder comes, and
//! for what is waited in between. Whatever a play does can happen; it only makes it happen more often.

use std::collections::VecDeque;
use std::time::Duration;

use cairn_client::core::api::GroupPhase;
use cairn_proto::ids::{ChunkIndex, Epoch, GroupId};
use cairn_proto::limits::BLOCKS_PER_CHUNK;
use cairn_proto::time::Time;

use super::faulting::Strike;
use super::guest::Aim;
use super::process::Process;
use super::world::{Event, SessionPhase, World};
use crate::checker::history::Broken;
use crate::rng::Rng;

/// How often it is looked whether what a play waits for has come.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);

/// Members of the group, by their place in the cast, one bit each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Members(u8);

const NOBODY: Members = Members(0);
const A: Members = Members(1);
const B: Members = Members(2);
const C: Members = Members(4);
const A_AND_B: Members = Members(3);

/// Who holds the volume, in the order in which they come: 0 is the one who holds it when the play begins.
type Holder = usize;

/// Which direction is cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    /// Requests do not arrive.
    There,
    /// Answers do not arrive.
    Back,
    /// Neither.
    Both,
}

/// What guests do on the few blocks that a play is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Load {
    Reads,
    Writes,
    Both,
}

/// One step of a play.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The guest of a holder does this from now on.
    Aim(Holder, Load),
    /// A holder is cut off from members.
    Cut(Holder, Members, Way),
    /// Every way that the play has cut for this holder is open again.
    Open(Holder),
    /// The next holder comes; it does not reach these members.
    Take(Members),
    Freeze(Holder),
    Thaw(Holder),
    Kill(Holder),
    /// A holder gives the volume back in order.
    Release(Holder),
    /// A member's device is slow until the play ends.
    Slow(Members),
    /// What a member's device is doing now does not end before the play does, or [`Step::LetGo`].
    Hold(Members),
    LetGo,
    /// A member's host loses its power for a moment.
    Power(Members),
    Wait(Until, Duration),
}

/// What is waited for, at the most as long as the step says.
#[derive(Clone, Copy, Debug)]
enum Until {
    /// Nothing but time.
    Time,
    /// So many operations of this holder's guest are done, from now on.
    Done(Holder, u64),
    /// The group's configuration changes.
    Epoch,
    /// A holder compares the members.
    Reconciling(Holder),
    /// A holder has operations under way.
    Busy(Holder),
}

/// What a play is waiting for.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    until: Until,
    end: Time,
    epoch: Epoch,
    done: u64,
}

/// A play that is under way.
pub(super) struct Play {
    volume: usize,
    group: GroupId,
    /// First block and count.
    focus: (u64, u64),
    /// The nodes of the members.
    members: Vec<u8>,
    /// The sessions of the holders so far.
    holders: Vec<usize>,
    steps: VecDeque<Step>,
    waiting: Option<Waiting>,
    cuts: Vec<(Holder, Process, Process)>,
    frozen: Vec<Process>,
    slow: Vec<u8>,
    held: Vec<u8>,
}

impl Play {
    /// The volume that nobody else takes meanwhile.
    pub(super) fn volume(&self) -> usize {
        self.volume
    }
}

impl World {
    /// Begins a play, if none is under way and somebody holds a volume.
    pub(super) fn begin_play(&mut self) {
        let held: Vec<usize> = (0..self.sessions.len())
            .filter(|i| self.sessions[*i].phase == SessionPhase::Open && self.sessions[*i].generation.is_some())
            .collect();
        if self.faulting.play.is_some() || held.is_empty() {
            return;
        }
        let session = *self.faulting.rng.pick(&held);
        let volume = self.sessions[session].volume;
        let created = &self.volumes[volume].created;
        let (first, count) = *self.faulting.rng.pick(&self.options.volumes[volume].regions);
        let blocks = self.faulting.rng.within(1, count.min(3));
        let focus = (first + self.faulting.rng.below(count - blocks + 1), blocks);
        let chunk = ChunkIndex((focus.0 / u64::from(BLOCKS_PER_CHUNK)) as u32);
        let group = GroupId {
            volume: created.id,
            index: created.volume.group_count.group_of(chunk),
        };
        let Some(mut members) = self.in_sync_nodes(group) else {
            return;
        };
        for i in (1..members.len()).rev() {
            members.swap(i, self.faulting.rng.index(i + 1));
        }
        if members.len() < 3 {
            return;
        }
        let steps = steps(&mut self.faulting.rng);
        self.note_play(format_args!(
            "group {group} blocks {focus:?} members {members:?}: {steps:?}"
        ));
        self.faulting.play = Some(Play {
            volume,
            group,
            focus,
            members,
            holders: vec![session],
            steps: steps.into(),
            waiting: None,
            cuts: Vec::new(),
            frozen: Vec::new(),
            slow: Vec::new(),
            held: Vec::new(),
        });
        let now = self.now();
        self.schedule.at(now, Event::Nemesis(Strike::Play));
    }

    /// Goes on with the play that is under way.
    pub(super) fn go_on_playing(&mut self) -> Result<(), Broken> {
        let Some(mut play) = self.faulting.play.take() else {
            return Ok(());
        };
        loop {
            if let Some(waiting) = play.waiting {
                if !self.has_come(&play, &waiting) {
                    break;
                }
                play.waiting = None;
            }
            let Some(step) = play.steps.pop_front() else {
                return self.end_play(play);
            };
            self.note_play(format_args!("{step:?}"));
            if !self.act_out(&mut play, step)? {
                return self.end_play(play);
            }
            self.collect_network();
        }
        self.faulting.play = Some(play);
        let at = self.now() + LOOK_INTERVAL;
        self.schedule.at(at, Event::Nemesis(Strike::Play));
        Ok(())
    }

    /// One step. False if it can't be done, and the play ends.
    fn act_out(&mut self, play: &mut Play, step: Step) -> Result<bool, Broken> {
        match step {
            Step::Aim(holder, load) => self.aim(play, holder, load),
            Step::Cut(holder, members, way) => self.cut(play, holder, members, way),
            Step::Open(holder) => self.open_ways(play, |of| of == holder),
            Step::Take(cut) => return self.next_holder(play, cut),
            Step::Freeze(holder) => {
                let process = self.process_of(play, holder);
                if let Some(slot) = self.slots.get_mut(&process) {
                    slot.frozen += 1;
                    play.frozen.push(process);
                }
            }
            Step::Thaw(holder) => {
                let process = self.process_of(play, holder);
                if let Some(i) = play.frozen.iter().position(|frozen| *frozen == process) {
                    play.frozen.remove(i);
                    self.strike(Strike::Thaw(process))?;
                }
            }
            Step::Kill(holder) => {
                let process = self.process_of(play, holder);
                self.kill(process, false);
                let at = self.now() + Duration::from_millis(200);
                self.schedule.at(at, Event::Nemesis(Strike::Restart(process)));
            }
            Step::Release(holder) => self.close(play.holders[holder])?,
            Step::Slow(members) => {
                for node in nodes(play, members) {
                    self.disks[usize::from(node)].slow(true);
                    play.slow.push(node);
                }
            }
            Step::Hold(members) => {
                for node in nodes(play, members) {
                    self.disks[usize::from(node)].hold_in_flight();
                    play.held.push(node);
                }
            }
            Step::LetGo => self.let_go(play),
            Step::Power(members) => {
                for node in nodes(play, members) {
                    self.strike(Strike::Power(Process::Node(node)))?;
                }
            }
            Step::Wait(until, span) => {
                play.waiting = Some(Waiting {
                    until,
                    end: self.now() + span,
                    epoch: self.epoch_of(play.group),
                    done: match until {
                        Until::Done(holder, _) => self.done_by(play, holder),
                        _ => 0,
                    },
                });
            }
        }
        Ok(true)
    }

    fn has_come(&self, play: &Play, waiting: &Waiting) -> bool {
        if self.now() >= waiting.end {
            return true;
        }
        let phase_of = |holder: Holder| {
            let session = &self.sessions[*play.holders.get(holder)?];
            let status = self.client(session.client)?.status(session.handle)?;
            let group = status.groups.get(usize::from(play.group.index.0))?;
            Some(group.phase)
        };
        match waiting.until {
            Until::Time => false,
            Until::Done(holder, count) => self.done_by(play, holder) >= waiting.done + count,
            Until::Epoch => self.epoch_of(play.group) > waiting.epoch,
            Until::Reconciling(holder) => phase_of(holder) == Some(GroupPhase::Reconciling),
            Until::Busy(holder) => {
                let session = play.holders.get(holder).map(|i| &self.sessions[*i]);
                session.is_some_and(|session| !session.guest.in_flight.is_empty())
            }
        }
    }

    fn done_by(&self, play: &Play, holder: Holder) -> u64 {
        play.holders.get(holder).map_or(0, |i| self.sessions[*i].done)
    }

    fn epoch_of(&self, group: GroupId) -> Epoch {
        let groups = self.meta_states().filter_map(|(_, state)| state.groups().get(&group));
        groups.map(|group| group.epoch).max().unwrap_or_default()
    }

    fn process_of(&self, play: &Play, holder: Holder) -> Process {
        Process::Client(self.sessions[play.holders[holder]].client)
    }

    fn aim(&mut self, play: &Play, holder: Holder, load: Load) {
        let session = &mut self.sessions[play.holders[holder]];
        let mix = match load {
            Load::Reads => [1, 0, 0, 0, 0, 0, 0],
            Load::Writes => [0, 1, 0, 0, 0, 0, 0],
            Load::Both => [1, 1, 0, 0, 0, 0, 0],
        };
        session.guest.aim = Some(Aim { focus: play.focus, mix });
        let (client, handle) = (session.client, session.handle);
        self.wake_guest(Process::Client(client), handle);
    }

    fn cut(&mut self, play: &mut Play, holder: Holder, members: Members, way: Way) {
        let client = self.process_of(play, holder);
        let now = self.now();
        for node in nodes(play, members) {
            let node = Process::Node(node);
            if way != Way::Back {
                self.net.block(now, client, node, true);
                play.cuts.push((holder, client, node));
            }
            if way != Way::There {
                self.net.block(now, node, client, true);
                play.cuts.push((holder, node, client));
            }
        }
    }

    fn open_ways(&mut self, play: &mut Play, of: impl Fn(Holder) -> bool) {
        let now = self.now();
        let (open, cut) = std::mem::take(&mut play.cuts)
            .into_iter()
            .partition(|(holder, ..)| of(*holder));
        play.cuts = cut;
        let open: Vec<(Holder, Process, Process)> = open;
        for (_, from, to) in open {
            self.net.block(now, from, to, false);
        }
    }

    fn let_go(&mut self, play: &mut Play) {
        for node in std::mem::take(&mut play.held) {
            let tokens = self.disks[usize::from(node)].let_go();
            self.unstick(node, tokens);
        }
    }

    fn next_holder(&mut self, play: &mut Play, cut: Members) -> Result<bool, Broken> {
        let free = self.free_clients(play.volume);
        if free.is_empty() {
            return Ok(false);
        }
        let client = *self.faulting.rng.pick(&free);
        let session = self.sessions.len();
        let holder = play.holders.len();
        // Before it connects to anybody.
        let now = self.now();
        for node in nodes(play, cut) {
            for (from, to) in [
                (Process::Client(client), Process::Node(node)),
                (Process::Node(node), Process::Client(client)),
            ] {
                self.net.block(now, from, to, true);
                play.cuts.push((holder, from, to));
            }
        }
        self.open(client, play.volume)?;
        play.holders.push(session);
        Ok(true)
    }

    /// The play is over: what it has done ends.
    fn end_play(&mut self, mut play: Play) -> Result<(), Broken> {
        self.note_play(format_args!("ends"));
        self.open_ways(&mut play, |_| true);
        self.let_go(&mut play);
        for node in std::mem::take(&mut play.slow) {
            self.disks[usize::from(node)].slow(false);
        }
        for session in &play.holders {
            self.sessions[*session].guest.aim = None;
        }
        for process in std::mem::take(&mut play.frozen) {
            self.strike(Strike::Thaw(process))?;
        }
        self.collect_network();
        Ok(())
    }

    fn note_play(&mut self, words: std::fmt::Arguments<'_>) {
        let now = self.now();
        self.trace.note(now, format_args!("play: {words}"));
    }
}

fn nodes(play: &Play, members: Members) -> Vec<u8> {
    let chosen = play.members.iter().enumerate().filter(|(i, _)| members.0 >> i & 1 == 1);
    chosen.map(|(_, node)| *node).collect()
}

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// The steps of a play, by the seed.
fn steps(rng: &mut Rng) -> Vec<Step> {
    match rng.below(6) {
        0 => stale_reader(rng),
        1 | 2 => lone_write(rng),
        3 => missed_repair(rng),
        4 => frozen_writer(rng),
        _ => chain(rng),
    }
}

/// The older holder goes on reading from the one member that the newer one has not reached, and hears nothing from the
/// others.
fn stale_reader(rng: &mut Rng) -> Vec<Step> {
    vec![
        Step::Aim(0, Load::Reads),
        Step::Wait(Until::Done(0, rng.within(3, 20)), ms(300)),
        Step::Cut(0, A_AND_B, Way::Both),
        Step::Take(C),
        Step::Aim(1, Load::Writes),
        Step::Wait(Until::Done(1, 2), ms(2500)),
        Step::Wait(Until::Time, ms(rng.within(20, 600))),
        Step::Open(0),
        Step::Wait(Until::Time, ms(rng.within(0, 300))),
    ]
}

/// Writes reach one member alone. The next holder hears the others; then that member comes back, or somebody comes who
/// hears it.
fn lone_write(rng: &mut Rng) -> Vec<Step> {
    let mut steps = vec![
        Step::Aim(0, Load::Writes),
        Step::Wait(Until::Done(0, rng.within(1, 5)), ms(300)),
        Step::Cut(0, A_AND_B, *rng.pick(&[Way::There, Way::Both])),
        Step::Wait(Until::Time, ms(rng.within(2, 60))),
    ];
    steps.extend(end_of(rng, 0));
    steps.push(Step::Take(C));
    steps.push(Step::Aim(1, *rng.pick(&[Load::Reads, Load::Reads, Load::Both])));
    steps.push(Step::Wait(Until::Done(1, rng.within(1, 4)), ms(2500)));
    if rng.permille(500) {
        // It joins, is filled, and is admitted.
        steps.push(Step::Open(1));
        steps.push(Step::Wait(Until::Epoch, ms(6000)));
        steps.push(Step::Wait(Until::Epoch, ms(3000)));
        steps.push(Step::Wait(Until::Done(1, rng.within(5, 40)), ms(1000)));
    } else {
        steps.extend(end_of(rng, 1));
        steps.push(Step::Take(A));
        steps.push(Step::Aim(2, Load::Reads));
        steps.push(Step::Wait(Until::Done(2, 3), ms(2500)));
    }
    steps
}

/// What is acknowledged lies on two members. The next holder hears one of them and the third, and ends about when it has
/// the other ejected; who comes then hears the third.
fn missed_repair(rng: &mut Rng) -> Vec<Step> {
    let mut steps = vec![
        Step::Aim(0, Load::Writes),
        Step::Cut(0, C, *rng.pick(&[Way::There, Way::Both])),
        Step::Wait(Until::Done(0, rng.within(2, 8)), ms(500)),
    ];
    steps.extend(end_of(rng, 0));
    if rng.permille(700) {
        steps.push(Step::Slow(C));
    }
    steps.push(Step::Take(B));
    steps.push(Step::Aim(1, Load::Reads));
    steps.push(match rng.below(4) {
        0 => Step::Wait(Until::Reconciling(1), ms(2500)),
        _ => Step::Wait(Until::Epoch, ms(2500)),
    });
    if rng.permille(200) {
        steps.push(Step::Wait(Until::Time, ms(rng.within(1, 20))));
    }
    steps.push(Step::Kill(1));
    steps.push(Step::Take(if rng.permille(800) { A } else { A_AND_B }));
    steps.push(Step::Aim(2, Load::Reads));
    steps.push(Step::Wait(Until::Done(2, 3), ms(2500)));
    steps
}

/// The older holder's requests are under way, in its host or in devices, and come to their end after the take-over.
fn frozen_writer(rng: &mut Rng) -> Vec<Step> {
    let held = Members(rng.within(0, 7) as u8);
    let mut steps = vec![
        Step::Aim(0, Load::Writes),
        Step::Wait(Until::Done(0, rng.within(1, 6)), ms(300)),
        Step::Wait(Until::Busy(0), ms(100)),
        Step::Wait(Until::Time, ms(rng.within(0, 6))),
        Step::Hold(held),
        match rng.below(3) {
            0 => Step::Freeze(0),
            1 => Step::Kill(0),
            _ => Step::Cut(0, Members(rng.within(1, 7) as u8), Way::Back),
        },
        Step::Take(*rng.pick(&[NOBODY, NOBODY, A, B, C])),
        Step::Aim(1, *rng.pick(&[Load::Reads, Load::Both])),
        Step::Wait(Until::Done(1, rng.within(1, 6)), ms(2500)),
        Step::LetGo,
    ];
    if rng.permille(300) {
        steps.push(Step::Power(held));
    }
    steps.extend([
        Step::Wait(Until::Time, ms(rng.within(0, 100))),
        Step::Thaw(0),
        Step::Wait(Until::Done(1, rng.within(1, 20)), ms(500)),
    ]);
    steps
}

/// One holder after the other, each of which reaches only some members and ends in the middle of something.
fn chain(rng: &mut Rng) -> Vec<Step> {
    let mut steps = vec![Step::Aim(0, *rng.pick(&[Load::Writes, Load::Both]))];
    let turns = rng.within(2, 5) as usize;
    for turn in 0..turns {
        if rng.permille(600) {
            let way = *rng.pick(&[Way::There, Way::Back, Way::Both]);
            steps.push(Step::Wait(Until::Time, ms(rng.within(0, 30))));
            steps.push(Step::Cut(turn, Members(rng.within(1, 7) as u8), way));
        }
        let until = match rng.below(5) {
            0 => Until::Time,
            1 => Until::Done(turn, rng.within(1, 10)),
            2 => Until::Epoch,
            3 => Until::Reconciling(turn),
            _ => Until::Busy(turn),
        };
        let at_most = *rng.pick(&[20, 300, 1500]);
        steps.push(Step::Wait(until, ms(rng.within(at_most / 4, at_most))));
        if rng.permille(200) {
            let member = *rng.pick(&[A, B, C]);
            steps.push(if rng.permille(500) {
                Step::Power(member)
            } else {
                Step::Slow(member)
            });
        }
        steps.extend(end_of(rng, turn));
        steps.push(Step::Take(*rng.pick(&[NOBODY, A, B, C])));
        steps.push(Step::Aim(turn + 1, *rng.pick(&[Load::Reads, Load::Writes, Load::Both])));
    }
    steps.push(Step::Wait(Until::Done(turns, 3), ms(2500)));
    steps
}

/// How a holder ends, or does not.
fn end_of(rng: &mut Rng, holder: Holder) -> Option<Step> {
    match rng.below(6) {
        0..=2 => Some(Step::Kill(holder)),
        3 => Some(Step::Freeze(holder)),
        4 => Some(Step::Release(holder)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_about_holders_that_have_come() {
        let mut rng = Rng::new(1);
        for _ in 0..2000 {
            let mut holders = 1;
            for step in steps(&mut rng) {
                let holder = match step {
                    Step::Take(_) => {
                        holders += 1;
                        continue;
                    }
                    Step::Aim(holder, _)
                    | Step::Cut(holder, ..)
                    | Step::Open(holder)
                    | Step::Freeze(holder)
                    | Step::Thaw(holder)
                    | Step::Kill(holder)
                    | Step::Release(holder) => holder,
                    Step::Wait(Until::Done(holder, _) | Until::Reconciling(holder) | Until::Busy(holder), _) => holder,
                    Step::Slow(_) | Step::Hold(_) | Step::LetGo | Step::Power(_) | Step::Wait(..) => continue,
                };
                assert!(holder < holders, "{step:?} is about nobody");
            }
        }
    }
}
