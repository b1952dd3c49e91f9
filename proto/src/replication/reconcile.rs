//! Reconcile (rules 9 to 11): before a group's first I/O its members are compared block by block, and whoever lacks the
//! highest version of a block gets a copy.
//!
//! Members list what they hold in pages, in order; one page of each is held at a time. What a member lacks goes into its
//! bitmap, and comparing pauses while that is full, so memory is bounded whatever the size of the group.

use std::collections::VecDeque;

use super::api::{Action, GroupPhase, Notice};
use super::group::{Role, Step};
use super::mask::Mask;
use super::{Coordinator, Timer, What};
use crate::block::{BlockState, Content, Cursor, Run};
use crate::frame::Class;
use crate::ids::{Layer, Version};
use crate::limits::MEMBERS_MAX;
use crate::message::{Collect, Collected, Message};
use crate::time::Time;
use crate::units::BlockRange;

/// The comparison of the sealed members of a group.
pub(super) struct Reconcile {
    /// Tells answers to this comparison from answers to an earlier one.
    pub(super) id: u64,
    /// Who is compared: at least `S(I)` members of `I`.
    places: Vec<usize>,
    /// In the order of `places`.
    streams: Vec<Stream>,
    merged: bool,
    /// When it is looked next whether somebody holds it up.
    look_at: Time,
}

impl Reconcile {
    /// Whether all that its members hold has been looked at.
    pub(super) fn is_merged(&self) -> bool {
        self.merged
    }

    /// Who is compared.
    pub(super) fn participants(&self) -> Mask {
        self.places.iter().copied().collect()
    }
}

/// What one member holds, page by page.
pub(super) struct Stream {
    runs: VecDeque<Run>,
    /// Where the next page starts; `None` after the last.
    from: Option<Cursor>,
    asked: bool,
}

impl Stream {
    pub(super) fn new() -> Stream {
        Stream {
            runs: VecDeque::new(),
            from: Some(Cursor::default()),
            asked: false,
        }
    }

    fn is_starved(&self) -> bool {
        self.runs.is_empty() && self.from.is_some()
    }

    /// Where to ask from, if a page is needed and not on its way.
    pub(super) fn ask(&mut self) -> Option<Cursor> {
        if !self.is_starved() || self.asked {
            return None;
        }
        self.asked = true;
        self.from
    }

    /// Takes a page. False if it is not in order, or does not get on.
    pub(super) fn take(&mut self, page: Collected) -> bool {
        let Some(from) = self.from else { return false };
        self.asked = false;
        let mut at = from;
        for run in &page.runs {
            let start = Cursor {
                chunk: run.range.chunk(),
                layer: run.layer,
                block: run.range.start(),
            };
            // A run that began before the place that was asked for may be given whole.
            let same_chunk = (start.chunk, start.layer) == (at.chunk, at.layer);
            if start < at && !(same_chunk && run.range.end() > at.block) {
                return false;
            }
            at = Cursor {
                block: run.range.end(),
                ..start
            };
        }
        if page.next.is_some_and(|next| next <= from) {
            return false;
        }
        self.from = page.next;
        self.runs.extend(page.runs);
        true
    }

    fn front(&self) -> Option<(Cursor, Run)> {
        let run = *self.runs.front()?;
        let cursor = Cursor {
            chunk: run.range.chunk(),
            layer: run.layer,
            block: run.range.start(),
        };
        Some((cursor, run))
    }

    /// Drops what lies before the end of a range.
    fn advance(&mut self, layer: Layer, range: BlockRange) {
        let Some(run) = self.runs.front_mut() else { return };
        if run.layer != layer || run.range.chunk() != range.chunk() || run.range.start() >= range.end() {
            return;
        }
        let left = run.range.end().saturating_sub(range.end());
        match BlockRange::new(range.chunk(), range.end(), left) {
            Some(rest) => run.range = rest,
            None => {
                self.runs.pop_front();
            }
        }
    }
}

/// Blocks in which each member holds one state throughout.
pub(super) struct Segment {
    pub(super) layer: Layer,
    pub(super) range: BlockRange,
    pub(super) states: [BlockState; MEMBERS_MAX],
}

/// The next segment; `None` when a page is needed first, or at the end.
pub(super) fn next_segment(streams: &mut [Stream]) -> Option<Segment> {
    if streams.iter().any(Stream::is_starved) {
        return None;
    }
    let (start, _) = streams
        .iter()
        .filter_map(Stream::front)
        .min_by_key(|(cursor, _)| *cursor)?;
    let mut end = u32::MAX;
    let mut states = [BlockState::ABSENT; MEMBERS_MAX];
    for (stream, state) in streams.iter().zip(&mut states) {
        let Some((cursor, run)) = stream.front() else { continue };
        if (cursor.chunk, cursor.layer) != (start.chunk, start.layer) {
            continue;
        }
        if cursor.block > start.block {
            end = end.min(cursor.block);
        } else {
            *state = run.state;
            end = end.min(run.range.end());
        }
    }
    let range = BlockRange::new(start.chunk, start.block, end - start.block).expect("runs are not empty");
    for stream in streams {
        stream.advance(start.layer, range);
    }
    Some(Segment {
        layer: start.layer,
        range,
        states,
    })
}

/// Whether the comparison of this number can't end before this request is answered.
fn holds_up(what: What, g: usize, comparison: u64) -> bool {
    match what {
        What::Reconcile { group, id } => (group, id) == (g, comparison),
        What::Survey { group, .. } | What::CopyRead { group, .. } | What::CopyWrite { group, .. } => group == g,
        _ => false,
    }
}

pub(super) fn is_ended(streams: &[Stream]) -> bool {
    streams
        .iter()
        .all(|stream| stream.runs.is_empty() && stream.from.is_none())
}

impl Coordinator {
    /// Enough members are sealed and joined: compare these.
    pub(super) fn start_reconcile(&mut self, g: usize, participants: Mask) {
        let group = &mut self.groups[g];
        let joined = group.joined().and(group.in_sync);
        assert_eq!(
            participants.minus(joined),
            Mask::NONE,
            "only who has joined is compared"
        );
        assert!(
            participants.len() >= self.settings.seal_quorum(group.in_sync.len()),
            "an acknowledged version may be on none of {participants:?}"
        );
        assert!(
            group.writes.is_empty() && group.reads.is_empty(),
            "nothing is in flight meanwhile"
        );
        assert!(group.change.is_none(), "the configuration is known meanwhile");
        group.phase = GroupPhase::Reconciling;
        group.draining = false;
        group.lost.clear();
        for replica in &mut group.replicas {
            replica.lack.clear();
            replica.jobs.clear();
            replica.damaged = Default::default();
            (replica.stale, replica.resync, replica.higher, replica.compare) = (false, false, false, None);
            (replica.behind, replica.copy_paused) = (false, None);
            if replica.role == Role::Joining {
                replica.distrust();
            }
        }
        let id = group.next_job;
        group.next_job += 1;
        group.reconcile = Some(Reconcile {
            id,
            places: participants.iter().collect(),
            streams: participants.iter().map(|_| Stream::new()).collect(),
            merged: false,
            look_at: self.now,
        });
        self.tell_phase(g);
        self.ask_pages(g);
        self.arm_patience(g);
    }

    fn arm_patience(&mut self, g: usize) {
        let at = self.now + self.limits.reconcile_patience / 2;
        if let Some(reconcile) = &mut self.groups[g].reconcile {
            reconcile.look_at = at;
            self.timers.insert((at, Timer::Patience(g)));
        }
    }

    /// Goes on without members whose answers have not come for long, where all others' have: a device that is stuck, or a
    /// host that is frozen, must not hold up the volume (promise 4), and nobody knows yet that its connection is dead.
    pub(super) fn pass_over_stalled(&mut self, g: usize) {
        let group = &self.groups[g];
        let due = |reconcile: &&Reconcile| reconcile.look_at <= self.now;
        let Some(reconcile) = group.reconcile.as_ref().filter(due) else {
            return;
        };
        let participants = reconcile.participants();
        let patience = self.limits.reconcile_patience;
        let (mut stalled, mut late) = (Mask::NONE, Mask::NONE);
        for sent in self.sent.values().filter(|sent| holds_up(sent.what, g, reconcile.id)) {
            let waited = self.now.saturating_since(sent.at);
            if waited >= patience {
                stalled = stalled.or(sent.to.and(participants));
            } else if waited * 2 >= patience {
                late = late.or(sent.to.and(participants));
            }
        }
        let enough = self.compared_min(g);
        let rest = participants.minus(stalled);
        let fresh = self.is_meta_fresh();
        // Without meta nobody can be ejected, so it is no use to go on without anybody.
        self.look_wanted |= !fresh && !stalled.or(late).is_empty();
        if stalled.is_empty() || !late.minus(stalled).is_empty() || rest.len() < enough || !fresh {
            return self.arm_patience(g);
        }
        for place in stalled.iter() {
            self.pass_over(g, place);
        }
        let since = self.groups[g].enough_since;
        self.reconcile_lost(g);
        self.groups[g].enough_since = since;
    }

    /// How many members must be compared at the least, for the others to be ejected.
    pub(super) fn compared_min(&self, g: usize) -> usize {
        let (settings, in_sync) = (&self.settings, self.groups[g].in_sync.len());
        settings.seal_quorum(in_sync).max(settings.in_sync_min().min(in_sync))
    }

    /// The next comparison begins without this member.
    pub(super) fn pass_over(&mut self, g: usize, place: usize) {
        let group = &mut self.groups[g];
        let replica = &mut group.replicas[place];
        replica.passed_over = true;
        let (group, device) = (group.index, self.members[replica.member].device);
        self.actions
            .push_back(Action::Notice(Notice::PassedOver { group, device }));
    }

    /// A member that was passed over has answered something of a group.
    pub(super) fn heard_again(&mut self, g: usize, place: usize) {
        if std::mem::take(&mut self.groups[g].replicas[place].passed_over) {
            self.take_late(g, place);
            self.update_phase(g);
        }
    }

    fn ask_pages(&mut self, g: usize) {
        for i in 0..self.groups[g].replicas.len() {
            let Some(reconcile) = &mut self.groups[g].reconcile else {
                return;
            };
            let (id, Some(place)) = (reconcile.id, reconcile.places.get(i).copied()) else {
                return;
            };
            if let Some(from) = reconcile.streams[i].ask() {
                self.collect(g, place, (from, Cursor::END), What::Reconcile { group: g, id });
            }
        }
    }

    pub(super) fn collect(&mut self, g: usize, place: usize, (from, to): (Cursor, Cursor), what: What) {
        let collect = Message::Collect(Collect {
            holder: self.holder,
            group: self.groups[g].index,
            from,
            to,
            above: Version::ZERO,
        });
        self.send(g, Mask::one(place), Class::Guest, collect, what);
    }

    /// A page of what a member holds.
    pub(super) fn reconcile_page(&mut self, g: usize, id: u64, place: usize, page: Collected) {
        let reconcile = self.groups[g].reconcile.as_mut();
        let Some(reconcile) = reconcile.filter(|reconcile| reconcile.id == id) else {
            return;
        };
        let i = reconcile.places.iter().position(|other| *other == place);
        let i = i.expect("only who is compared was asked");
        if !reconcile.streams[i].take(page) {
            let m = self.groups[g].replicas[place].member;
            self.refused(m, "it listed its blocks out of order".to_string());
            return self.reconcile_lost(g);
        }
        self.touch_catch_up(g);
    }

    /// Goes on comparing, unless the bitmaps are full: then copies go first. Ends in serving, or in wanting the others
    /// out.
    pub(super) fn go_on_reconcile(&mut self, g: usize) {
        let room = self.limits.lack_chunks_exact_max.max(2) - 1;
        let lost_too_early = self.limits.lost_too_early();
        let group = &mut self.groups[g];
        let Some(reconcile) = &mut group.reconcile else { return };
        let mut rotten = Vec::new();
        while !reconcile.merged && group.replicas.iter().all(|replica| replica.lack.exact_chunks() < room) {
            let Some(segment) = next_segment(&mut reconcile.streams) else {
                reconcile.merged = is_ended(&reconcile.streams);
                break;
            };
            let states = &segment.states[..reconcile.places.len()];
            let base = states
                .iter()
                .map(|state| state.version)
                .max()
                .expect("somebody is compared");
            let is_base = |state: &BlockState| state.version == base && state.content != Content::Damaged;
            for (place, state) in reconcile.places.iter().zip(states) {
                if state.content == Content::Damaged {
                    rotten.push((*place, [(segment.layer, segment.range)]));
                }
            }
            let damaged = |state: &BlockState| state.content == Content::Damaged;
            if !states.iter().any(is_base) || (lost_too_early && states.iter().any(damaged)) {
                group.lost.insert(segment.layer, segment.range);
                continue;
            }
            for (place, state) in reconcile.places.iter().zip(states) {
                if !is_base(state) {
                    group.replicas[*place].lack.insert(segment.layer, segment.range);
                }
            }
        }
        let (merged, participants) = (reconcile.merged, reconcile.participants());
        for (place, found) in rotten {
            self.tell_damages(g, place, &found);
        }
        if !merged {
            return self.ask_pages(g);
        }
        let group = &mut self.groups[g];
        let mut equal = participants.iter().map(|place| &group.replicas[place]);
        if equal.all(super::group::Replica::is_complete) {
            self.reconciled(g, participants);
            self.settle_for_stand_ins(g);
        } else if self.limits.propose_before_repair() {
            self.reconsider(g);
        }
    }

    /// These members are equal now.
    fn reconciled(&mut self, g: usize, participants: Mask) {
        let group = &mut self.groups[g];
        if group.in_sync == participants {
            if group.change.is_none() {
                group.reconcile = None;
                self.serve(g);
            }
            return;
        }
        let came = group.present().minus(participants);
        let settled = group.change.is_some_and(|change| change.step != Step::Wanted);
        let few = participants.len() < self.compared_min(g);
        let group = &self.groups[g];
        if settled || came.is_empty() || !few && group.restarts >= self.limits.reconcile_restarts_max {
            return self.reconsider(g);
        }
        let group = &mut self.groups[g];
        // Who has come meanwhile is compared too, rather than ejected.
        group.restarts += 1;
        (group.change, group.reconcile) = (None, None);
        group.phase = GroupPhase::Waiting;
        self.update_phase(g);
    }

    /// The ejection of the members that are not equal is wanted, once the repairs among the others are durable (rule 10).
    pub(super) fn reconciled_in_sync(&self, g: usize) -> Option<Mask> {
        let group = &self.groups[g];
        let reconcile = group.reconcile.as_ref().filter(|reconcile| reconcile.merged)?;
        let participants = reconcile.participants();
        let mut equal = participants.iter().map(|place| &group.replicas[place]);
        let equal = equal.all(super::group::Replica::is_complete) || self.limits.propose_before_repair();
        let enough = participants.len() >= self.compared_min(g);
        (equal && enough && participants != group.in_sync).then_some(participants)
    }

    /// A member was lost, or an answer: the comparison starts anew when enough members are there.
    pub(super) fn reconcile_lost(&mut self, g: usize) {
        let group = &mut self.groups[g];
        if group.phase != GroupPhase::Reconciling {
            return;
        }
        group.reconcile = None;
        group.phase = GroupPhase::Waiting;
        group.enough_since = None;
        if group.change.is_some_and(|change| change.step == Step::Wanted) {
            group.change = None;
        }
        for replica in &mut group.replicas {
            replica.lack.clear();
            replica.jobs.clear();
        }
        self.arm_retry(g);
        self.tell_phase(g);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{ChunkIndex, Generation, Seq};

    fn run(chunk: u32, start: u32, count: u32, seq: u64) -> Run {
        Run {
            layer: Layer(0),
            range: BlockRange::new(ChunkIndex(chunk), start, count).unwrap(),
            state: BlockState {
                content: Content::Zero,
                version: Version::new(Generation::new(1).unwrap(), Seq::new(seq).unwrap()),
            },
        }
    }

    fn page(runs: Vec<Run>) -> Collected {
        Collected {
            runs,
            ..Collected::default()
        }
    }

    #[test]
    fn members_are_compared_in_segments_in_which_each_holds_one_state() {
        let mut streams = [Stream::new(), Stream::new()];
        assert!(next_segment(&mut streams).is_none(), "pages are needed first");
        assert!(streams[0].take(page(vec![run(0, 0, 10, 1), run(2, 5, 1, 4)])));
        assert!(streams[1].take(page(vec![run(0, 4, 2, 2), run(1, 0, 1, 3)])));
        let mut seen = Vec::new();
        while let Some(segment) = next_segment(&mut streams) {
            let seq = |i: usize| segment.states[i].version.seq().get();
            seen.push((segment.range.to_string(), seq(0), seq(1)));
        }
        let expected = [
            ("0:0+4", 1, 0),
            ("0:4+2", 1, 2),
            ("0:6+4", 1, 0),
            ("1:0+1", 0, 3),
            ("2:5+1", 4, 0),
        ];
        assert_eq!(seen, expected.map(|(range, a, b)| (range.to_string(), a, b)));
        assert!(is_ended(&streams));
    }

    #[test]
    fn a_list_out_of_order_is_not_believed() {
        assert!(!Stream::new().take(page(vec![run(1, 0, 2, 1), run(0, 0, 1, 1)])));
        assert!(!Stream::new().take(page(vec![run(1, 0, 2, 1), run(1, 0, 1, 1)])));
        let endless = Collected {
            next: Some(Cursor::default()),
            ..Collected::default()
        };
        assert!(!Stream::new().take(endless));
    }
}
