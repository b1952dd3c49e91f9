//! Hash maps whose iteration order is the same in every run.

use std::hash::{BuildHasherDefault, DefaultHasher};

/// A hash map with a fixed hasher. Not for keys that a stranger may choose: those go into a `BTreeMap`.
#[expect(
    clippy::disallowed_types,
    reason = "with a fixed hasher its order is the same in every run"
)]
pub type Map<K, V> = std::collections::HashMap<K, V, BuildHasherDefault<DefaultHasher>>;

/// A hash set with a fixed hasher.
#[expect(
    clippy::disallowed_types,
    reason = "with a fixed hasher its order is the same in every run"
)]
pub type Set<K> = std::collections::HashSet<K, BuildHasherDefault<DefaultHasher>>;
