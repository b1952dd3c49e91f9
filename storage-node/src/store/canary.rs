//! Planted bugs: each must be caught by a test, or the tests prove nothing.

/// Which bugs are switched on. Without the feature `canary` it has no switches.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Canary {
    /// Answers when the batch is written, not when it is flushed.
    #[cfg(feature = "canary")]
    pub ack_before_flush: bool,
    /// Recovery believes the last record without looking at its data.
    #[cfg(feature = "canary")]
    pub skip_data_checksum_at_recovery: bool,
    /// Blocks are free for others as soon as a batch that supersedes them is being written.
    #[cfg(feature = "canary")]
    pub reuse_too_early: bool,
    /// A discard leaves no version behind.
    #[cfg(feature = "canary")]
    pub forget_tombstones: bool,
    /// A block is moved although it was written since it was read.
    #[cfg(feature = "canary")]
    pub move_unchecked: bool,
    /// A batch in one write takes care of itself alone, whatever else is not flushed.
    #[cfg(feature = "canary")]
    pub flush_nothing_else: bool,
}

macro_rules! switch {
    ($name:ident) => {
        #[cfg(feature = "canary")]
        pub(super) fn $name(&self) -> bool {
            self.$name
        }
        #[cfg(not(feature = "canary"))]
        pub(super) fn $name(&self) -> bool {
            false
        }
    };
}

impl Canary {
    switch!(ack_before_flush);
    switch!(skip_data_checksum_at_recovery);
    switch!(reuse_too_early);
    switch!(forget_tombstones);
    switch!(move_unchecked);
    switch!(flush_nothing_else);
}
