//! What the tests have in common.

pub(crate) mod cpio;
pub(crate) mod guest;
pub(crate) mod nbd;
