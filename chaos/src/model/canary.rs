//! For each rule a search that must find what goes wrong without it. A model that does not notice a missing rule proves
//! nothing about it.

use std::ops::ControlFlow;

use super::rules::{Rule, Rules};
use super::scope::{Reads, Scope};
use super::script::Script;
use super::search::{Bounds, Found, search};
use super::state::State;
use super::step::{Action, Model};

/// Device a, in scripts.
const A: u8 = 0;
/// Device b.
const B: u8 = 1;
/// Device c.
const C: u8 = 2;
/// Device d, the spare.
const D: u8 = 3;

/// How a rule's absence is found.
pub struct Canary {
    /// Which one is left out.
    pub rule: Rule,
    /// Where to look.
    pub scope: Scope,
    /// A beginning, from which all that can follow is searched.
    pub begin: Option<fn(&mut Script)>,
    /// It is found from the start as well, in a time that a person waits for.
    pub from_start: bool,
}

/// The canary of a rule.
pub fn of(rule: Rule) -> Canary {
    let scope = scope_of(rule);
    let begin = begin_of(rule);
    let too_deep = [
        Rule::KeepGeneration,
        Rule::EpochOrder,
        Rule::RefuseResyncs,
        Rule::ReadBoth,
        Rule::ConfirmQuorum,
    ];
    Canary {
        rule,
        scope,
        begin,
        from_start: !too_deep.contains(&rule),
    }
}

impl Canary {
    /// Where the search begins, under all rules but those left out, and what led there.
    pub fn start(&self, rules: Rules, from_start: bool) -> (Model, State, Vec<Action>) {
        let model = Model {
            rules,
            scope: self.scope,
        };
        let mut script = Script::new(model);
        if let Some(begin) = self.begin.filter(|_| !from_start) {
            begin(&mut script);
        }
        let (state, way) = script.end();
        (model, state, way)
    }

    /// Searches without the rule. A way that is found leads from the start of the scope.
    pub fn hunt(
        &self,
        from_start: bool,
        bounds: Bounds,
        tell: impl FnMut(u64, u32, usize) -> ControlFlow<()>,
    ) -> Found {
        let (model, state, mut way) = self.start(Rules::without(self.rule), from_start);
        let mut found = search(&model, &state, bounds, tell);
        if let Some((_, rest)) = &mut found.broken {
            way.append(rest);
            *rest = way;
        }
        found
    }
}

fn scope_of(rule: Rule) -> Scope {
    let plain = Scope::plain(rule.name());
    let ejecting = Scope {
        ejects: true,
        changes: 1,
        ..plain
    };
    let reading = Scope {
        reads: Reads::Confirmed,
        ..ejecting
    };
    let joining = Scope {
        joins: true,
        changes: 2,
        ..plain
    };
    let discarding = Scope {
        discards: true,
        writes: [2, 0, 0, 0],
        holders: 1,
        reads: Reads::Confirmed,
        ..plain
    };
    match rule {
        Rule::MapAfterGrant | Rule::SealDurable | Rule::LastGeneration => ejecting,
        Rule::CopyFirst | Rule::IgnoreEjected | Rule::BothQuorums | Rule::KnownOnNext => ejecting,
        Rule::AnswerDurable => plain,
        Rule::RefuseWrites | Rule::RefuseReads | Rule::ConfirmAfter => reading,
        Rule::RefusalKills | Rule::AllEqual | Rule::ReadNewest => Scope {
            reads: Reads::Confirmed,
            ..plain
        },
        Rule::SealQuorum | Rule::ProposeComplete => Scope {
            joins: true,
            ejects: true,
            changes: 3,
            ..plain
        },
        Rule::GrantsHold => Scope {
            reads: Reads::Granted,
            ..ejecting
        },
        Rule::ReleaseReconciles => Scope {
            releases: true,
            reads: Reads::Confirmed,
            ..plain
        },
        Rule::NonePending => Scope {
            writes: [1, 0, 0, 0],
            holders: 3,
            ..reading
        },
        Rule::JoiningUncounted | Rule::AdmitEqual => Scope { holders: 1, ..joining },
        Rule::OwnOutcome => Scope {
            writes: [1, 0, 0, 0],
            ..joining
        },
        Rule::EpochMatches => Scope {
            ejects: true,
            changes: 4,
            holders: 1,
            ..joining
        },
        Rule::JoinAdopts | Rule::ResyncGeneration | Rule::SettledBase => Scope {
            reads: Reads::Confirmed,
            writes: [1, 0, 0, 0],
            ..joining
        },
        Rule::RefuseResyncs => Scope {
            reads: Reads::Confirmed,
            writes: [1, 0, 0, 0],
            holders: 3,
            ..joining
        },
        Rule::ForgetEjected => Scope {
            ejects: true,
            forgets: true,
            changes: 3,
            holders: 1,
            ..joining
        },
        Rule::AllHoldTombstone => Scope {
            blocks: 2,
            ..discarding
        },
        Rule::Floor => discarding,
        Rule::AbsenceVersion => Scope {
            ejects: true,
            joins: true,
            changes: 3,
            ..discarding
        },
        Rule::ReadBoth | Rule::ConfirmQuorum => Scope {
            ejects: true,
            reads: Reads::Confirmed,
            writes: [0, 1, 0, 0],
            changes: 4,
            ..joining
        },
        Rule::EpochOrder => Scope {
            blocks: 2,
            ejects: true,
            joins: true,
            forgets: true,
            changes: 3,
            ..discarding
        },
        Rule::KeepGeneration => Scope {
            ejects: true,
            forgets: true,
            writes: [1, 0, 0, 0],
            changes: 4,
            ..joining
        },
    }
}

fn begin_of(rule: Rule) -> Option<fn(&mut Script)> {
    match rule {
        Rule::KeepGeneration => Some(two_members_are_replaced),
        Rule::RefuseResyncs => Some(a_resync_copy_of_an_older_base_is_under_way),
        Rule::ReadBoth => Some(|script| {
            script.act(Action::Eject { holder: 1, device: C }).commit(1, false);
            a_member_is_left_for_the_spare(script);
        }),
        Rule::ConfirmQuorum => Some(|script| {
            script.eject(1, C);
            a_member_is_left_for_the_spare(script);
        }),
        Rule::EpochOrder => Some(|script| {
            let discard = Action::Write {
                holder: 1,
                block: 1,
                discard: true,
            };
            script.write(1, 0, &[A, B, C]).act(discard).exchange(1, &[A, B, C]);
            script.act(Action::DropTombstones { holder: 1, block: 1 }).eject(1, C);
        }),
        Rule::AbsenceVersion => Some(|script| {
            script.write(1, 0, &[A, B]).eject(1, C);
        }),
        Rule::NonePending => Some(|script| {
            script.write(1, 0, &[B]);
            script.attach(2, &[A, C]);
        }),
        Rule::OwnOutcome | Rule::ResyncGeneration | Rule::JoinAdopts | Rule::SealQuorum => Some(|script| {
            script.invite(1, D).exchange(1, &[D]);
        }),
        Rule::SettledBase => Some(|script| {
            script.invite(1, D).exchange(1, &[D]).write(1, 0, &[C, D]);
            script.attach(2, &[A, B]);
        }),
        Rule::ProposeComplete => Some(|script| {
            script.invite(1, D).exchange(1, &[D]).admit(1, D);
        }),
        Rule::GrantsHold => Some(|script| {
            for device in [A, B, C] {
                script.act(Action::GiveGrant { holder: 1, device });
            }
        }),
        _ => None,
    }
}

/// h2 has sealed all, and ejected b and c, which h1 knows as members.
fn two_members_are_replaced(script: &mut Script) {
    script.attach(2, &[A, B, C]).eject(2, B);
    script.invite(2, D).exchange(2, &[D]).admit(2, D);
    script.eject(2, C);
}

/// Under I = {a,b}, h2 has sealed b only, and admits the spare in the place of a, which never hears of it.
fn a_member_is_left_for_the_spare(script: &mut Script) {
    script.attach(2, &[B]).invite(2, D);
    script.act(Action::Settle(2)).exchange(2, &[D]).admit(2, D);
}

/// A write of h1 is on c and on the joining d; h2 has not heard of it, and wants to take it from d.
fn a_resync_copy_of_an_older_base_is_under_way(script: &mut Script) {
    script.invite(1, D).exchange(1, &[D]).write(1, 0, &[C, D]);
    script.attach(2, &[A, B]).act(Action::Settle(2));
    let join = super::message::Message::Join {
        holder: 2,
        device: D,
        epoch: 1,
    };
    script.act(Action::Arrive(join, super::step::Fate::Heard));
    script.attach(3, &[A, B, C, D]);
}
