//! The coordinator side of replication: DESIGN.md, "Replication", has the rules and why each of them is there.
//!
//! Reading order: [`api`] and [`config`], then this file (what is owned and where events go), `attach` (seal and join),
//! `reconcile`, `write`, `read` with `grants`, `catch_up`, `fetch`, `damage`, `no_space`, `change` and `health` (who is a member); `group`,
//! `member`, `bitmap` and `mask` hold state.

pub mod api;
mod attach;
mod bitmap;
mod catch_up;
mod change;
pub mod config;
mod damage;
mod failure;
mod fetch;
mod grants;
mod group;
mod health;
mod holes;
pub mod limits;
mod mask;
mod member;
mod no_space;
pub mod pace;
mod read;
mod reconcile;
mod stand_in;
mod status;
mod write;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

pub use api::{
    Action, ChangeOutcome, ConfigChange, Event, GroupPhase, GroupStatus, MemberRole, MemberStatus, MetaAsk, MetaTold,
    Notice, OpError, OpToken, Operation, Outcome, ReadOutcome, RequestId,
};
pub use config::{Grant, GroupConfig, Move, VolumeSettings};
pub use limits::ReplicationLimits;
pub use pace::{GuestLoad, Pace};

use self::change::MetaCall;
use self::group::{Group, Role};
use self::mask::Mask;
use self::member::Member;
use self::pace::Bucket;
use self::read::ReadFailure;
use crate::collections::Map;
use crate::frame::Class;
use crate::ids::{DeviceId, Generation, GroupIndex, Version};
use crate::message::{Holder, Message};
use crate::time::Time;

/// One attachment of one volume: the state machine of its only writer.
///
/// Made anew for each grant (rule 1), with the group map read at or after the grant's commit (rule 2).
pub struct Coordinator {
    settings: VolumeSettings,
    limits: ReplicationLimits,
    grant: Grant,
    holder: Holder,
    now: Time,
    members: Vec<Member>,
    member_of: BTreeMap<DeviceId, usize>,
    groups: Vec<Group>,
    next_request: u64,
    sent: Map<RequestId, Sent>,
    timers: BTreeSet<(Time, Timer)>,
    actions: VecDeque<Action>,
    /// The generation that took the volume over, once one was seen.
    fenced: Option<Generation>,
    release: ReleaseState,
    /// Groups in which something happened that may let a catch-up go on.
    touched: BTreeSet<usize>,
    /// When the first event came.
    began: Option<Time>,
    /// Devices were added to those it needs connections to.
    devices_changed: bool,
    health_armed: bool,
    /// What meta was asked and has not answered.
    meta_call: Option<MetaCall>,
    /// Whether it is to be asked how configurations are.
    look_wanted: bool,
    /// When it answered last; unknown after an attempt in vain.
    meta_seen: Option<Time>,
    meta_retry_at: Time,
    meta_pause: Duration,
    /// How fast copies may be.
    bucket: Bucket,
    /// Groups with copies that wait for their turn.
    paced: BTreeSet<usize>,
    pace_timer: Option<Time>,
    /// Of which two members (by whom it is read first) the second can't read from the first, and until when it is not tried.
    cut_pairs: BTreeMap<(usize, usize), Time>,
    /// What guests felt, until somebody asks.
    load: GuestLoad,
    /// Whether somebody knows that there are copies.
    told_copying: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum ReleaseState {
    No,
    Draining,
    Asked,
    Done,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Timer {
    /// A read of a group may be asked of another member.
    Hedge(usize, u64),
    /// What a member refused is tried again.
    Member(usize),
    /// What members of a group refused is tried again.
    Group(usize),
    /// A group has waited long enough for members that are missing at attach, or that hold up the comparison.
    Patience(usize),
    /// Members are looked at.
    Health,
    /// Meta is asked again.
    Meta,
    /// Copies that had to wait may begin.
    Pace,
}

/// A request without all of its answers.
struct Sent {
    what: What,
    at: Time,
    /// Whose answer is missing: places in the group, or place 0 for who is asked alone.
    to: Mask,
}

/// What a request is for, and so where its answer goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum What {
    Seal { member: usize },
    Confirm { member: usize },
    Release { member: usize },
    Join { group: usize },
    Write { group: usize, seq: u64, bytes: u64 },
    UndoRead { group: usize, seq: u64 },
    Read { group: usize, read: u64 },
    Reconcile { group: usize, id: u64 },
    Compare { group: usize, target: usize, id: u64 },
    Survey { group: usize, target: usize, job: u64 },
    CopyRead { group: usize, target: usize, job: u64 },
    CopyFetch { group: usize, target: usize, job: u64 },
    CopyWrite { group: usize, target: usize, job: u64 },
}

impl What {
    /// `None` for what is asked of a device as a whole.
    fn group(self) -> Option<usize> {
        match self {
            What::Seal { .. } | What::Confirm { .. } | What::Release { .. } => None,
            What::Join { group }
            | What::Write { group, .. }
            | What::UndoRead { group, .. }
            | What::Read { group, .. }
            | What::Reconcile { group, .. }
            | What::Compare { group, .. }
            | What::Survey { group, .. }
            | What::CopyRead { group, .. }
            | What::CopyFetch { group, .. }
            | What::CopyWrite { group, .. } => Some(group),
        }
    }
}

impl Coordinator {
    /// A coordinator for this grant. `groups` are the configurations in order of the group index, one for each group of
    /// the volume. Errors: why a configuration can't be served.
    pub fn new(
        settings: VolumeSettings,
        grant: Grant,
        groups: Vec<GroupConfig>,
        limits: ReplicationLimits,
    ) -> Result<Coordinator, &'static str> {
        if groups.len() != usize::from(settings.groups.get()) {
            return Err("there is not one configuration for each group");
        }
        if let Some(problem) = groups.iter().find_map(GroupConfig::problem) {
            return Err(problem);
        }
        if settings.write_quorum == 0 || grant.capability.generation != grant.generation {
            return Err("the grant or the write quorum is not valid");
        }
        let mut coordinator = Coordinator {
            settings,
            limits,
            grant,
            holder: Holder {
                volume: settings.id,
                generation: grant.generation,
            },
            now: Time::ZERO,
            members: Vec::new(),
            member_of: BTreeMap::new(),
            groups: Vec::new(),
            next_request: 1,
            sent: Map::default(),
            timers: BTreeSet::new(),
            actions: VecDeque::new(),
            fenced: None,
            release: ReleaseState::No,
            touched: BTreeSet::new(),
            began: None,
            devices_changed: false,
            health_armed: false,
            meta_call: None,
            look_wanted: false,
            meta_seen: None,
            meta_retry_at: Time::ZERO,
            meta_pause: Duration::ZERO,
            bucket: Bucket::default(),
            paced: BTreeSet::new(),
            pace_timer: None,
            cut_pairs: BTreeMap::new(),
            load: GuestLoad::default(),
            told_copying: false,
        };
        for (config, index) in groups.into_iter().zip(0..) {
            coordinator.add_group(GroupIndex(index), config);
        }
        coordinator.devices_changed = false;
        Ok(coordinator)
    }

    fn add_group(&mut self, index: GroupIndex, config: GroupConfig) {
        let g = self.groups.len();
        let sets = [
            (config.in_sync.clone(), Role::InSync),
            (config.joining.clone(), Role::Joining),
            (config.stale.clone(), Role::Out),
        ];
        self.groups.push(Group::new(index, config.clone()));
        for (devices, role) in sets {
            for device in devices {
                let place = self.groups[g].replicas.len();
                self.place_device(g, device, &config);
                if self.groups[g].replicas.len() == place {
                    continue;
                }
                let group = &mut self.groups[g];
                group.replicas[place].reset(role, &self.limits);
                match role {
                    Role::InSync => group.in_sync.insert(place),
                    Role::Joining => group.joining.insert(place),
                    Role::Out => {}
                }
            }
        }
    }

    /// The attachment's number.
    pub fn generation(&self) -> Generation {
        self.grant.generation
    }

    /// The devices it needs connections to.
    pub fn devices(&self) -> impl Iterator<Item = DeviceId> {
        self.members.iter().map(|member| member.device)
    }

    /// Whether a newer attachment has taken the volume over.
    pub fn is_fenced(&self) -> bool {
        self.fenced.is_some()
    }

    /// Takes an event.
    pub fn handle(&mut self, now: Time, event: Event) {
        self.advance(now);
        match event {
            Event::Connected {
                device,
                commit,
                recovered,
            } => self.connected(device, commit, recovered),
            Event::Disconnected { device } => self.disconnected(device),
            Event::Answer {
                device,
                request,
                grant,
                message,
            } => self.answered(device, request, grant, message),
            Event::Unreachable { device } => self.unreachable(device),
            Event::Damaged { device, group, runs } if self.fenced.is_none() => self.told_damaged(device, group, &runs),
            Event::Damaged { .. } => {}
            Event::Located {
                device,
                address,
                can_fetch,
            } => self.located(device, address, can_fetch),
            Event::Look => self.look_wanted = true,
            Event::Pace(pace) => self.set_pace(pace),
            Event::Meta(told) => self.meta_told(told),
            Event::Submit { op, operation } => self.submit(op, operation),
            Event::Release => self.start_release(),
        }
        self.settle();
    }

    /// Does what was to be done by now.
    pub fn handle_timeout(&mut self, now: Time) {
        self.advance(now);
        while let Some((_, timer)) = self.timers.first().copied().filter(|(at, _)| *at <= now) {
            self.timers.pop_first();
            match timer {
                Timer::Hedge(g, read) => self.hedge_read(g, read),
                Timer::Member(m) => self.retry_member(m),
                Timer::Group(g) => self.retry_group(g),
                Timer::Patience(g) => self.patience_over(g),
                Timer::Health => self.health_tick(),
                Timer::Meta => {}
                Timer::Pace => self.pace_changed(),
            }
        }
        self.settle();
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`handle_timeout`](Self::handle_timeout) wants to be called.
    pub fn poll_timeout(&self) -> Option<Time> {
        self.timers.first().map(|(at, _)| *at)
    }

    fn advance(&mut self, now: Time) {
        assert!(now >= self.now, "time went back from {:?} to {now:?}", self.now);
        self.now = now;
        self.began.get_or_insert(now);
    }

    fn settle(&mut self) {
        while let Some(g) = self.touched.pop_first() {
            self.catch_up(g);
        }
        self.pump_meta();
        if std::mem::take(&mut self.devices_changed) {
            self.actions.push_back(Action::Devices);
        }
        self.check_release();
        self.check_invariants();
    }

    fn submit(&mut self, op: OpToken, operation: Operation) {
        assert_eq!(self.release, ReleaseState::No, "submitted after the release");
        if self.fenced.is_some() && !self.limits.ignore_fenced() {
            return self.done(op, Err(OpError::Fenced));
        }
        let g = usize::from(self.settings.groups.group_of(operation.range().chunk()).0);
        let group = &mut self.groups[g];
        if group.phase != GroupPhase::Serving || group.draining {
            assert!(
                group.queued.len() < self.limits.queued_max,
                "more operations are queued than are ever admitted"
            );
            group.queued.push_back((op, operation));
            return;
        }
        self.start(g, op, operation);
    }

    fn start(&mut self, g: usize, op: OpToken, operation: Operation) {
        if operation.is_read() {
            self.start_read(g, op, &operation);
        } else {
            self.start_operation_write(g, op, operation);
        }
    }

    fn done(&mut self, op: OpToken, result: Result<Outcome, OpError>) {
        self.actions.push_back(Action::Done { op, result });
    }

    /// Sends one message to members of a group.
    fn send(&mut self, g: usize, to: Mask, class: Class, message: Message, what: What) -> RequestId {
        let group = &self.groups[g];
        let devices = to.iter().map(|place| self.members[group.replicas[place].member].device);
        let devices = devices.collect();
        self.send_to(devices, to, class, message, what)
    }

    /// Sends one message to a device as a whole.
    fn send_to_member(&mut self, m: usize, message: Message, what: What) -> RequestId {
        let devices = vec![self.members[m].device];
        self.send_to(devices, Mask::one(0), Class::Guest, message, what)
    }

    fn send_to(&mut self, to: Vec<DeviceId>, mask: Mask, class: Class, message: Message, what: What) -> RequestId {
        let request = RequestId(self.next_request);
        self.next_request += 1;
        let sent = Sent {
            what,
            at: self.now,
            to: mask,
        };
        self.sent.insert(request, sent);
        self.actions.push_back(Action::Send {
            to,
            request,
            class,
            message,
        });
        request
    }

    /// A member's place in the group that a request is about; 0 for one that was asked alone.
    fn place_of(&self, what: What, m: usize) -> Option<usize> {
        match what.group() {
            None => Some(0),
            Some(g) => self.groups[g].replicas.iter().position(|replica| replica.member == m),
        }
    }

    fn answered(&mut self, device: DeviceId, request: RequestId, grant: bool, message: Message) {
        let Some(m) = self.member_of.get(&device).copied() else {
            return;
        };
        let Some((what, at)) = self.sent.get(&request).map(|sent| (sent.what, sent.at)) else {
            return;
        };
        let Some(place) = self.place_of(what, m) else { return };
        let sent = self.sent.get_mut(&request).expect("it was there");
        if !sent.to.remove(place) {
            return;
        }
        if sent.to.is_empty() {
            self.sent.remove(&request);
        }
        match message {
            Message::Failed(failed) => self.request_failed(m, place, what, &failed),
            message => {
                let member = &mut self.members[m];
                member.confirmed = member.confirmed.max(Some(request));
                if grant {
                    // Counted from the sending of the request: the member can't have begun to count earlier.
                    member.grant_until = member.grant_until.max(at + self.limits.grant_trusted);
                }
                if let Some(g) = what.group() {
                    self.heard_again(g, place);
                }
                self.dispatch(m, place, what, at, message);
                self.member_vouched(m);
            }
        }
    }

    fn dispatch(&mut self, m: usize, place: usize, what: What, at: Time, message: Message) {
        match (what, message) {
            (What::Seal { .. }, Message::Sealed(sealed)) if sealed.holder == self.holder => self.sealed(m),
            (What::Confirm { .. }, Message::Confirmed(_)) => self.members[m].confirming = None,
            (What::Release { .. }, Message::Released(_)) => {}
            (What::Join { group }, Message::Joined(joined)) => self.joined(group, place, joined.created),
            (What::Write { group, seq, .. }, Message::Durable(durable)) => {
                let member = &mut self.members[m];
                member.saw_commit(durable.commit);
                member.write_latency.sample(self.now.saturating_since(at));
                member.write_sampled = Some(self.now);
                self.write_durable(group, seq, place);
            }
            (What::CopyWrite { group, target, job }, Message::Durable(durable)) => {
                self.members[m].saw_commit(durable.commit);
                self.copy_done(group, target, job);
            }
            (What::CopyFetch { group, target, job }, Message::Durable(durable)) => {
                self.members[m].saw_commit(durable.commit);
                self.fetch_done(group, target, job);
            }
            (what, Message::ReadAnswer(answer)) => {
                self.members[m].saw_commit(answer.commit);
                if let Some(newer) = self.newer_than_us(answer.blocks.iter().map(|block| block.version)) {
                    return self.become_fenced(newer);
                }
                match what {
                    What::Read { group, read } => {
                        self.members[m].latency.sample(self.now.saturating_since(at));
                        self.read_answered(group, read, place, answer);
                    }
                    What::UndoRead { group, seq } => self.undo_read(group, seq, Some(answer)),
                    What::CopyRead { group, target, job } => self.copy_read(group, target, job, answer),
                    _ => self.request_lost(m, place, what, ReadFailure::Later),
                }
            }
            (what, Message::Collected(page)) => {
                self.members[m].saw_commit(page.commit);
                if let Some(newer) = self.newer_than_us(page.runs.iter().map(|run| run.state.version)) {
                    return self.become_fenced(newer);
                }
                match what {
                    What::Read { group, read } => self.status_answered(group, read, place, &page),
                    What::Reconcile { group, id } => self.reconcile_page(group, id, place, page),
                    What::Compare { group, target, id } => self.compare_page(group, target, id, place, page),
                    What::Survey { group, target, job } => self.surveyed(group, target, job, &page),
                    _ => self.request_lost(m, place, what, ReadFailure::Later),
                }
            }
            (what, message) => {
                let words = format!("it answered {what:?} with {}", message.name());
                self.refused(m, words);
                self.request_lost(m, place, what, ReadFailure::Later);
            }
        }
    }

    /// Versions of a later attachment are as good as its refusal.
    fn newer_than_us(&self, mut versions: impl Iterator<Item = Version>) -> Option<Generation> {
        let ours = self.holder.generation;
        versions
            .find(|version| version.generation() > ours)
            .map(|version| version.generation())
    }

    fn refused(&mut self, m: usize, words: String) {
        let device = self.members[m].device;
        self.actions
            .push_back(Action::Notice(Notice::Refused { device, words }));
    }
}

#[cfg(test)]
mod tests;
