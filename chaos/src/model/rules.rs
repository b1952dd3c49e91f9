//! The rules of the protocol as switches. With all of them the promises hold; each can be left out, to see what it is for.

use std::fmt;

macro_rules! rules {
    ($($(#[$doc:meta])* $rule:ident = ($name:literal, $left_out:literal),)*) => {
        /// A rule that can be left out. Numbers are those of the protocol's text.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        #[repr(u8)]
        pub enum Rule {
            $($(#[$doc])* $rule,)*
        }

        impl Rule {
            /// Every one, in the order of the protocol's text.
            pub const ALL: &'static [Rule] = &[$(Rule::$rule,)*];

            /// What the command calls it.
            pub fn name(self) -> &'static str {
                match self { $(Rule::$rule => $name,)* }
            }

            /// What happens where it is left out.
            pub fn left_out(self) -> &'static str {
                match self { $(Rule::$rule => $left_out,)* }
            }
        }
    };
}

rules! {
    /// A device keeps the volume's generation when it drops its replica.
    KeepGeneration = ("state", "a device that drops its replica forgets the generation it has seen, too"),
    /// Rule 2: the group map is read at or after the grant's commit.
    MapAfterGrant = ("2", "the group map may be read before the grant"),
    /// Rule 3: a generation is durable before it is answered.
    SealDurable = ("3-durable", "a crash makes a device forget the generation it has answered"),
    /// Rule 3: lower generations' writes and repair copies are refused.
    RefuseWrites = ("3-writes", "writes and repair copies of lower generations are applied"),
    /// Rule 3: and their reads.
    RefuseReads = ("3-reads", "reads of lower generations are answered, and count as who answers them"),
    /// Rule 3: and their joins and resync copies.
    RefuseResyncs = ("3-resyncs", "resync copies of lower generations are applied"),
    /// Rules 4 and 24: a device obeys no join, and drops no tombstones, for a configuration older than one it has seen.
    EpochOrder = ("4-epoch", "a device obeys joins, and drops tombstones, for configurations older than one it has seen"),
    /// Rule 5: the first refusal kills the whole attachment.
    RefusalKills = ("5", "a refused write fails alone, and the attachment goes on"),
    /// Rule 6: `S(I)` members are sealed before an attachment is complete.
    SealQuorum = ("6", "one member fewer than S(I) completes an attachment"),
    /// Rule 7: nothing is proposed before the attachment is complete.
    ProposeComplete = ("7", "changes are proposed before the attachment is complete"),
    /// Rule 8: a member that has granted reads answers no higher generation meanwhile.
    GrantsHold = ("8-grants", "a member that has granted reads answers a higher generation meanwhile"),
    /// Rule 8: also after an orderly release the next holder reconciles.
    ReleaseReconciles = ("8-release", "after an orderly release the next holder takes all members for equal"),
    /// Rule 10: copies are durable before an ejection is proposed.
    CopyFirst = ("10-copies", "while reconciling, members are ejected before the others have the base"),
    /// Rule 10: what a member answers counts no more once its ejection is proposed.
    IgnoreEjected = ("10-ignore", "an answer of a member whose ejection is proposed makes the proposal void in the holder's eyes"),
    /// Rule 11: every member of `I` is equal to the base before I/O is served.
    AllEqual = ("11-all", "I/O is served as soon as the attachment is complete"),
    /// Rule 11: and no change is pending.
    NonePending = ("11-pending", "I/O is served on I′ before its commit is known"),
    /// Rule 12: joining members do not count.
    JoiningUncounted = ("12-joining", "answers of joining members count for the quorum"),
    /// Rule 12: while a change is pending, both quorums are needed.
    BothQuorums = ("12-both", "while a change is pending, the quorum of I is enough"),
    /// Rule 13: what is answered is durable.
    AnswerDurable = ("13", "a device answers before what it answers for is durable"),
    /// Rule 16: who is read holds the newest acknowledged version.
    ReadNewest = ("16-newest", "any member of I is read"),
    /// Rule 16: while a change is pending, members of `I ∩ I′` are read and both sets confirm.
    ReadBoth = ("16-both", "while a change is pending, reads go by I alone"),
    /// Rule 17: `C(I)` members confirm.
    ConfirmQuorum = ("17-members", "S(I) members confirm a read instead of C(I)"),
    /// Rule 17: after the read began.
    ConfirmAfter = ("17-after", "confirmations from before a read count for it"),
    /// Rule 18: meta commits only what the last generation proposes.
    LastGeneration = ("18-generation", "meta commits changes that older generations propose"),
    /// Rule 18: and only if the epoch matches.
    EpochMatches = ("18-epoch", "meta commits changes that follow another epoch"),
    /// Rules 12 and 18: the outcome of a proposal is known by who made the configuration, not by what it says.
    OwnOutcome = ("18-outcome", "a holder takes a newer holder's change for its own, if it says the same"),
    /// Rule 19: what was acknowledged is known durable on `I′`.
    KnownOnNext = ("19", "members are ejected without a look at who has what was acknowledged"),
    /// Rule 21: a joiner adopts the generation before its versions are collected.
    JoinAdopts = ("21-adopt", "a joiner's versions are collected before it adopts the generation"),
    /// Rule 21: resync copies go by generation first.
    ResyncGeneration = ("21-generation", "resync copies are applied only where they are newer, and at least the base is enough to be admitted"),
    /// Rules 9 and 21: the base is settled before resync copies of it are sent.
    SettledBase = ("21-settled", "resync copies are sent while members that may raise the base are still listened to"),
    /// Rule 22: who is admitted is equal to the base.
    AdmitEqual = ("22", "a joiner is admitted before it has everything"),
    /// Rule 23: what was known of an ejected member is forgotten.
    ForgetEjected = ("23", "what was known of an ejected member is believed when it joins again"),
    /// Rule 24: a tombstone is dropped only when all members hold it.
    AllHoldTombstone = ("24-all", "a tombstone is dropped when a write quorum holds it"),
    /// Rule 24: dropped tombstones leave a floor.
    Floor = ("24-floor", "a dropped tombstone leaves no floor"),
    /// Rule 24: absence is copied with the floor as its version.
    AbsenceVersion = ("24-absence", "absence is copied and compared as version zero"),
}

impl Rule {
    /// The rule of that name.
    pub fn named(name: &str) -> Option<Rule> {
        Rule::ALL.iter().copied().find(|rule| rule.name() == name)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The rules that are obeyed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rules {
    left_out: Option<Rule>,
}

impl Rules {
    /// All of them.
    pub const ALL: Rules = Rules { left_out: None };

    /// All but one.
    pub fn without(rule: Rule) -> Rules {
        Rules { left_out: Some(rule) }
    }

    /// Whether it is obeyed.
    pub fn has(self, rule: Rule) -> bool {
        self.left_out != Some(rule)
    }

    /// Which one is not obeyed.
    pub fn left_out(self) -> Option<Rule> {
        self.left_out
    }
}
