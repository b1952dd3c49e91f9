//! Configuration changes (rules 10, 12, 16 to 20): what is wanted, when it may be proposed, and what follows when meta has
//! answered.
//!
//! A change goes through these steps:
//!
//! 1. It is **wanted**. From here on writes need the quorum of both in-sync sets, and reads come from members of both
//!    only. Nothing is wanted before meta has just answered something: a proposal whose outcome is not known costs
//!    availability for as long as meta is away. What is only wanted can be given up.
//! 2. What is acknowledged is known to be durable on enough members of the new in-sync set (rule 19), and where it loses a
//!    member, enough of those that are left have answered something that was sent after it was wanted: it is **asked** for.
//! 3. Meta answers, and the configuration that it names is adopted; or nobody answers, and the same is asked for again
//!    until the outcome is known. Asking twice is harmless: meta tells a repetition by epoch, generation and sets.

use super::api::{Action, ChangeOutcome, ConfigChange, GroupPhase, MetaAsk, MetaTold, Notice, RequestId};
use super::config::GroupConfig;
use super::group::{Change, Role, Step};
use super::mask::Mask;
use super::member::Member;
use super::read::ReadFailure;
use super::{Coordinator, ReleaseState, Timer};
use crate::ids::{DeviceId, Generation};
use crate::time::Time;

/// What meta was asked and has not answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum MetaCall {
    /// How the configurations are.
    Look,
    /// For the changes of these groups.
    Change(Vec<usize>),
}

impl Coordinator {
    /// Whether meta has answered a moment ago.
    pub(super) fn is_meta_fresh(&self) -> bool {
        let fresh = |at: Time| self.now.saturating_since(at) < self.limits.meta_fresh;
        self.meta_seen.is_some_and(fresh)
    }

    /// Looks whether another configuration of a group would be better, or is not any more.
    pub(super) fn reconsider(&mut self, g: usize) {
        let group = &self.groups[g];
        let settled = group.change.is_some_and(|change| change.step != Step::Wanted);
        if self.fenced.is_some() || self.release != ReleaseState::No || settled || self.now < group.change_paused {
            return;
        }
        let wish = self.wish(g);
        let wanted = self.groups[g].change.map(|change| (change.in_sync, change.joining));
        if wish == wanted {
            return;
        }
        self.give_change_up(g);
        let Some((in_sync, joining)) = wish else { return };
        if self.limits.eject_without_commit() {
            return self.adopt_unasked(g, in_sync, joining);
        }
        if !self.is_meta_fresh() {
            self.look_wanted = true;
            return;
        }
        self.groups[g].change = Some(Change {
            in_sync,
            joining,
            step: Step::Wanted,
            since: RequestId(self.next_request),
        });
    }

    /// The planted bug: what is wanted is taken for committed.
    fn adopt_unasked(&mut self, g: usize, in_sync: Mask, joining: Mask) {
        let group = &self.groups[g];
        let devices = |mask: Mask| self.devices_at(g, mask);
        let config = GroupConfig {
            in_sync: devices(in_sync),
            joining: devices(joining),
            stale: devices(group.places(|_| true).minus(in_sync).minus(joining)),
            ..group.config.clone()
        };
        self.adopt(g, config);
    }

    /// What is only wanted is not wanted any more.
    pub(super) fn give_change_up(&mut self, g: usize) {
        let group = &mut self.groups[g];
        if group.change.is_some_and(|change| change.step == Step::Wanted) {
            group.change = None;
            self.requorum(g);
        }
    }

    /// The `I` and `J` that would be better than those that are.
    fn wish(&self, g: usize) -> Option<(Mask, Mask)> {
        let group = &self.groups[g];
        match group.phase {
            GroupPhase::Reconciling => match self.reconciled_in_sync(g) {
                Some(in_sync) => Some((in_sync, group.joining)),
                None => self.wish_for_stand_in(g),
            },
            GroupPhase::Serving if !group.draining => self.wish_while_serving(g),
            _ => None,
        }
    }

    /// Whether what is acknowledged is known to be durable on enough members of the wanted in-sync set (rule 19).
    fn is_ready(&self, g: usize) -> bool {
        let group = &self.groups[g];
        let Some(change) = group.change.filter(|change| change.step == Step::Wanted) else {
            return false;
        };
        if change.in_sync == group.in_sync {
            return true;
        }
        if !self.is_left_alive(g, change) {
            return false;
        }
        let needed = self.settings.proposal_quorum(change.in_sync.len());
        if group.phase == GroupPhase::Reconciling {
            let stands_in = self.level(g).is_some_and(|level| {
                let joiners = change.in_sync.minus(group.in_sync);
                level.len() + joiners.iter().filter(|place| self.is_equal_joiner(g, *place)).count() >= needed
            });
            return stands_in || self.reconciled_in_sync(g) == Some(change.in_sync);
        }
        let sound: Mask = change
            .in_sync
            .iter()
            .filter(|place| group.replicas[*place].is_complete())
            .collect();
        let mut acknowledged = group.writes.values().filter(|write| write.acknowledged);
        sound.len() >= needed && acknowledged.all(|write| write.durable.and(sound).len() >= needed)
    }

    /// Whether enough of those that an ejection leaves have answered since it was wanted. A member that has just been lost is
    /// not known to be so: without another one nobody could serve the group any more, not even when who is ejected comes back.
    fn is_left_alive(&self, g: usize, change: Change) -> bool {
        let group = &self.groups[g];
        if change.in_sync.len() > group.in_sync.len() {
            return true;
        }
        let confirmed = |place: &usize| self.members[group.replicas[*place].member].confirmed >= Some(change.since);
        change.in_sync.iter().filter(confirmed).count() >= self.settings.in_sync_min()
    }

    /// Asks those that an ejection leaves for a sign of life, if one is wanted and they have given none.
    fn ask_left(&mut self, g: usize) {
        let Some(change) = self.groups[g].change else {
            return;
        };
        if self.is_left_alive(g, change) {
            return;
        }
        for place in change.in_sync.iter() {
            let m = self.groups[g].replicas[place].member;
            let member = &self.members[m];
            if member.sealed && member.confirming.is_none() && member.confirmed < Some(change.since) {
                self.confirm(m);
            }
        }
    }

    /// Asks meta what is to be asked, one thing at a time.
    pub(super) fn pump_meta(&mut self) {
        let idle = self.meta_call.is_none() && self.fenced.is_none() && self.release == ReleaseState::No;
        if !idle || self.now < self.meta_retry_at {
            return;
        }
        let at_step = |groups: &[super::group::Group], step: Step| -> Vec<usize> {
            let is_there = |g: &usize| groups[*g].change.is_some_and(|change| change.step == step);
            (0..groups.len()).filter(is_there).collect()
        };
        let mut asked = at_step(&self.groups, Step::Unknown);
        if asked.is_empty() {
            asked = at_step(&self.groups, Step::Wanted);
            asked.iter().for_each(|g| self.ask_left(*g));
            asked.retain(|g| self.is_ready(*g));
        }
        if !asked.is_empty() {
            self.propose(asked);
        } else if std::mem::take(&mut self.look_wanted) {
            self.meta_call = Some(MetaCall::Look);
            self.actions.push_back(Action::Meta(MetaAsk::Look));
        }
    }

    fn propose(&mut self, asked: Vec<usize>) {
        let mut changes = Vec::with_capacity(asked.len());
        for g in &asked {
            let change = self.groups[*g].change.as_mut().expect("the caller looked");
            change.step = Step::Asked;
            let change = *change;
            let group = &self.groups[*g];
            // Rule 20, whatever led here.
            let shrinks = change.in_sync.len() < group.in_sync.len();
            assert!(
                !shrinks || change.in_sync.len() >= self.settings.in_sync_min(),
                "group {}: {:?} is fewer than may be left",
                group.index,
                change.in_sync
            );
            changes.push(ConfigChange {
                group: group.index,
                epoch: group.config.epoch,
                in_sync: self.devices_at(*g, change.in_sync),
                joining: self.devices_at(*g, change.joining),
            });
        }
        self.meta_call = Some(MetaCall::Change(asked));
        self.actions.push_back(Action::Meta(MetaAsk::Change(changes)));
    }

    fn devices_at(&self, g: usize, places: Mask) -> Vec<DeviceId> {
        let member = |place: usize| self.members[self.groups[g].replicas[place].member].device;
        places.iter().map(member).collect()
    }

    /// Meta has answered, or nobody has.
    pub(super) fn meta_told(&mut self, told: MetaTold) {
        let Some(call) = self.meta_call.take() else { return };
        if self.fenced.is_some() {
            return;
        }
        match told {
            MetaTold::Unreachable => return self.meta_unreachable(call),
            MetaTold::Superseded(seen) => return self.superseded(seen),
            MetaTold::Looked { generation, .. } if generation > self.holder.generation => {
                return self.superseded(generation);
            }
            MetaTold::Looked { groups, .. } => {
                self.meta_answered();
                for (g, config) in groups.into_iter().enumerate().take(self.groups.len()) {
                    if config.epoch > self.groups[g].config.epoch && config.problem().is_none() {
                        self.adopt(g, config);
                    }
                }
            }
            MetaTold::Changed(outcomes) => {
                self.meta_answered();
                let MetaCall::Change(asked) = call else { return };
                if asked.len() != outcomes.len() {
                    return self.meta_unreachable(MetaCall::Change(asked));
                }
                for (g, outcome) in asked.into_iter().zip(outcomes) {
                    self.change_answered(g, outcome);
                }
            }
        }
        for g in 0..self.groups.len() {
            self.reconsider(g);
            if self.groups[g].phase == GroupPhase::Reconciling {
                self.touch_catch_up(g);
            }
        }
    }

    fn meta_answered(&mut self) {
        self.meta_seen = Some(self.now);
        self.meta_pause = std::time::Duration::ZERO;
    }

    fn meta_unreachable(&mut self, call: MetaCall) {
        let limits = &self.limits;
        self.meta_pause = (self.meta_pause * 2).clamp(limits.meta_retry_min, limits.meta_retry_max);
        self.meta_retry_at = self.now + self.meta_pause;
        self.meta_seen = None;
        self.timers.insert((self.meta_retry_at, Timer::Meta));
        match call {
            MetaCall::Look => self.look_wanted = true,
            MetaCall::Change(asked) => {
                for g in asked {
                    let change = self.groups[g].change.as_mut().expect("it was asked for");
                    change.step = Step::Unknown;
                }
            }
        }
        for g in 0..self.groups.len() {
            // What was not asked for yet is not worth its price any more.
            self.give_change_up(g);
        }
    }

    /// A newer attachment was granted. Whether its holder is alive or not: nothing can be settled for this one any more.
    fn superseded(&mut self, seen: Generation) {
        self.become_fenced(seen.max(self.holder.generation));
    }

    fn change_answered(&mut self, g: usize, outcome: ChangeOutcome) {
        match outcome {
            ChangeOutcome::Committed(config) => self.adopt(g, config),
            ChangeOutcome::Refused { config, words } => {
                let group = &mut self.groups[g];
                let notice = Notice::ChangeRefused {
                    group: group.index,
                    words,
                };
                self.actions.push_back(Action::Notice(notice));
                if config.epoch > group.config.epoch && config.problem().is_none() {
                    return self.adopt(g, config);
                }
                group.change = None;
                group.change_paused = self.now + self.limits.meta_retry_max;
                self.requorum(g);
                self.update_phase(g);
            }
        }
    }

    /// A configuration is committed: from now on it is the one that counts.
    fn adopt(&mut self, g: usize, config: GroupConfig) {
        for device in config.named() {
            self.place_device(g, device, &config);
        }
        let members = config.in_sync.iter().chain(&config.joining);
        for device in members {
            let placed = self.groups[g]
                .replicas
                .iter()
                .any(|replica| self.members[replica.member].device == *device);
            assert!(
                placed,
                "group {}: no place is left for member {device}",
                self.groups[g].index
            );
        }
        let group = &mut self.groups[g];
        let at = |devices: &[DeviceId]| -> Mask {
            let member_of = &self.member_of;
            group.places(|replica| {
                devices
                    .iter()
                    .any(|device| member_of.get(device) == Some(&replica.member))
            })
        };
        let (in_sync, joining) = (at(&config.in_sync), at(&config.joining));
        let (was_in_sync, was_writers) = (group.in_sync, group.writers());
        group.change = None;
        group.config = config;
        (group.in_sync, group.joining) = (in_sync, joining);
        group.ignored = group.ignored.and(in_sync);
        let writers = group.writers();
        for place in was_writers.minus(writers).iter() {
            self.leave(g, place);
        }
        for place in writers.minus(was_writers).iter() {
            self.enter(g, place);
        }
        for place in in_sync.minus(was_in_sync).iter() {
            let replica = &mut self.groups[g].replicas[place];
            replica.role = Role::InSync;
            replica.health.admitted_at = Some(self.now);
            // It may have what all others have lost: a comparison of all members shows that.
            let group = &mut self.groups[g];
            group.draining |= !group.lost.is_empty() && group.phase == GroupPhase::Serving;
        }
        self.tell_config(g);
        if let Some(reconcile) = &self.groups[g].reconcile
            && !reconcile.participants().minus(in_sync).is_empty()
        {
            self.reconcile_lost(g);
        }
        self.requorum(g);
        self.update_phase(g);
        self.touch_catch_up(g);
        self.arm_health();
    }

    /// A place for a device of a group whose configuration is, or is about to be, `config`; and a member for a device that is
    /// new. When all places are taken, one of a device that the configuration does not name is given away. Only a stale
    /// device may get none.
    pub(super) fn place_device(&mut self, g: usize, device: DeviceId, config: &GroupConfig) {
        let m = match self.member_of.get(&device) {
            Some(m) => *m,
            None => {
                let m = self.members.len();
                self.member_of.insert(device, m);
                self.members.push(Member::new(device, self.now));
                self.devices_changed = true;
                m
            }
        };
        let group = &mut self.groups[g];
        if group.replicas.iter().any(|replica| replica.member == m) {
            return;
        }
        let place = if group.replicas.len() < super::limits::PLACES_MAX {
            group.place(m, Role::Out, &self.limits)
        } else {
            let members = &self.members;
            let is_free = |replica: &super::group::Replica| {
                replica.role == Role::Out && !config.names(members[replica.member].device)
            };
            let Some(place) = group.replicas.iter().position(is_free) else {
                return;
            };
            let former = group.give_place(place, m, &self.limits);
            self.members[former].groups.retain(|part| *part != (g, place));
            place
        };
        self.members[m].groups.push((g, place));
    }

    /// A device is a member no more: nothing is awaited of it, and what was known of it is forgotten (rule 23).
    fn leave(&mut self, g: usize, place: usize) {
        let m = self.groups[g].replicas[place].member;
        self.give_up_fetches_from(g, place);
        let mut lost = Vec::new();
        for (request, sent) in &mut self.sent {
            if sent.what.group() == Some(g) && sent.to.remove(place) {
                lost.push((*request, sent.what));
            }
        }
        lost.sort_unstable_by_key(|(request, _)| *request);
        self.sent.retain(|_, sent| !sent.to.is_empty());
        for (_, what) in lost {
            self.request_lost(m, place, what, ReadFailure::Lost);
        }
        let group = &mut self.groups[g];
        for write in group.writes.values_mut() {
            write.left_with |= [write.pending, write.durable, write.doubtful]
                .iter()
                .any(|mask| mask.contains(place));
            for mask in [
                &mut write.pending,
                &mut write.owed,
                &mut write.durable,
                &mut write.refused,
                &mut write.doubtful,
            ] {
                mask.remove(place);
            }
        }
        let open = group.writes.values().filter(|write| !write.is_over()).count();
        if open < group.writes.len() {
            group.writes.retain(|_, write| !write.is_over());
        }
        for read in group.reads.values_mut() {
            read.tried.remove(place);
            read.damaged.remove(place);
        }
        for replica in &mut group.replicas {
            // Its place may be another device's when the comparison goes on.
            replica.compare.take_if(|compare| compare.source() == place);
        }
        let replica = &mut group.replicas[place];
        replica.reset(Role::Out, &self.limits);
        let health = &mut replica.health;
        let stayed = health.admitted_at.map(|at| self.now.saturating_since(at));
        let pause = match stayed {
            Some(stayed) if stayed > self.limits.rejoin_max => self.limits.rejoin_min,
            _ => (health.rejoin_pause * 2).clamp(self.limits.rejoin_min, self.limits.rejoin_max),
        };
        (health.rejoin_pause, health.rejoin_at) = (pause, self.now + pause);
        (health.troubled_since, health.well_since, health.admitted_at) = (None, None, None);
    }

    /// A device joins (rule 21): it gets every write from now on, and what it missed is compared and copied.
    fn enter(&mut self, g: usize, place: usize) {
        let group = &mut self.groups[g];
        let role = if group.in_sync.contains(place) {
            Role::InSync
        } else {
            Role::Joining
        };
        let replica = &mut group.replicas[place];
        replica.reset(role, &self.limits);
        replica.distrust();
        (replica.health.troubled_since, replica.health.well_since) = (None, None);
        for write in group.writes.values_mut() {
            if write.acknowledged {
                // Its payload is gone, and whom it is compared with may not have it yet.
                group.replicas[place].lack.insert(write.layer, write.range);
            } else {
                write.owed.insert(place);
            }
        }
        self.join(g, place);
    }

    /// The quorums of a group are others than before.
    fn requorum(&mut self, g: usize) {
        if self.groups[g].phase != GroupPhase::Serving || self.fenced.is_some() {
            return;
        }
        let writes: Vec<u64> = self.groups[g].writes.keys().copied().collect();
        for seq in writes {
            self.settle_write(g, seq);
        }
        self.send_open_writes(g);
        self.ask_idle_reads(g);
    }

    fn tell_config(&mut self, g: usize) {
        let group = &self.groups[g];
        let notice = Notice::Configured {
            group: group.index,
            epoch: group.config.epoch,
            in_sync: group.config.in_sync.clone(),
            joining: group.config.joining.clone(),
        };
        self.actions.push_back(Action::Notice(notice));
    }
}
