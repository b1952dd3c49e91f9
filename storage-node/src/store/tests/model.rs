//! See [`crate::testing::store`].

pub(crate) use crate::testing::store::model::*;
pub(crate) use crate::testing::store::workload::*;
