//! A set of devices of one group, by their place in its coordinator's list.

use super::limits::PLACES_MAX;

/// A set of places.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Mask(u32);

const _: () = assert!(PLACES_MAX <= 32);

impl Mask {
    pub(super) const NONE: Mask = Mask(0);

    pub(super) fn one(place: usize) -> Mask {
        debug_assert!(place < PLACES_MAX);
        Mask(1 << place)
    }

    pub(super) fn contains(self, place: usize) -> bool {
        self.0 & (1 << place) != 0
    }

    pub(super) fn insert(&mut self, place: usize) {
        self.0 |= Mask::one(place).0;
    }

    /// Whether it was in.
    pub(super) fn remove(&mut self, place: usize) -> bool {
        let was = self.contains(place);
        self.0 &= !Mask::one(place).0;
        was
    }

    pub(super) fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(super) fn and(self, other: Mask) -> Mask {
        Mask(self.0 & other.0)
    }

    pub(super) fn or(self, other: Mask) -> Mask {
        Mask(self.0 | other.0)
    }

    pub(super) fn minus(self, other: Mask) -> Mask {
        Mask(self.0 & !other.0)
    }

    pub(super) fn iter(self) -> impl Iterator<Item = usize> {
        (0..PLACES_MAX).filter(move |place| self.contains(*place))
    }
}

impl std::fmt::Debug for Mask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl FromIterator<usize> for Mask {
    fn from_iter<I: IntoIterator<Item = usize>>(places: I) -> Mask {
        let mut mask = Mask::NONE;
        places.into_iter().for_each(|place| mask.insert(place));
        mask
    }
}
