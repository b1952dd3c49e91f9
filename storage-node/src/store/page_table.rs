//! The pages of a chunk: sixteen bytes each, found by a bit mask.

use super::chunk::Page;
use super::limits::PAGES_PER_CHUNK;

/// Pages by number, ascending. Those that are missing are uniform at the chunk's floor.
#[derive(Clone, Debug, Default)]
pub(super) struct PageTable {
    mask: u64,
    pages: Vec<Page>,
}

impl PageTable {
    pub(super) const EMPTY: PageTable = PageTable {
        mask: 0,
        pages: Vec::new(),
    };

    /// A bit for each page that is listed.
    pub(super) fn mask(&self) -> u64 {
        self.mask
    }

    /// From a mask and as many pages.
    pub(super) fn of(mask: u64, pages: Vec<Page>) -> PageTable {
        assert_eq!(mask.count_ones() as usize, pages.len(), "pages of a chunk");
        PageTable { mask, pages }
    }

    pub(super) fn len(&self) -> usize {
        self.pages.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.mask == 0
    }

    /// Where a page stands, or would stand.
    fn index(&self, number: u8) -> (usize, bool) {
        assert!(u32::from(number) < PAGES_PER_CHUNK, "page {number} of a chunk");
        let bit = 1u64 << number;
        ((self.mask & (bit - 1)).count_ones() as usize, self.mask & bit != 0)
    }

    pub(super) fn get(&self, number: &u8) -> Option<&Page> {
        let (index, there) = self.index(*number);
        there.then(|| &self.pages[index])
    }

    pub(super) fn get_mut(&mut self, number: &u8) -> Option<&mut Page> {
        let (index, there) = self.index(*number);
        there.then(|| &mut self.pages[index])
    }

    /// The page; `page` if there is none yet.
    pub(super) fn get_or_insert(&mut self, number: u8, page: Page) -> &mut Page {
        let (index, there) = self.index(number);
        if !there {
            self.mask |= 1 << number;
            self.pages.insert(index, page);
        }
        &mut self.pages[index]
    }

    pub(super) fn remove(&mut self, number: u8) -> Option<Page> {
        let (index, there) = self.index(number);
        there.then(|| {
            self.mask &= !(1 << number);
            self.pages.remove(index)
        })
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = u8> + use<> {
        let mask = self.mask;
        (0..PAGES_PER_CHUNK as u8).filter(move |number| mask >> number & 1 == 1)
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &Page> {
        self.pages.iter()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u8, &Page)> {
        self.keys().zip(&self.pages)
    }

    /// The listed pages of a range of numbers.
    pub(super) fn range(&self, numbers: std::ops::RangeInclusive<u8>) -> impl Iterator<Item = (u8, &Page)> {
        let skip = self.index(*numbers.start()).0;
        let end = *numbers.end();
        let numbers = self.keys().skip(skip);
        numbers
            .zip(&self.pages[skip..])
            .take_while(move |(number, _)| *number <= end)
    }

    /// Bytes of memory that it takes beside itself.
    pub(super) fn memory(&self) -> usize {
        self.pages.capacity() * size_of::<Page>()
    }

    /// Gives back memory that is much more than it needs.
    pub(super) fn shrink(&mut self) {
        if self.pages.capacity() > self.pages.len() + 4 {
            self.pages.shrink_to_fit();
        }
    }
}

const _: () = assert!(size_of::<Page>() == 16);
const _: () = assert!(PAGES_PER_CHUNK == u64::BITS);

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::store::chunk::Home;

    fn place(page: &Page) -> u32 {
        match page {
            Page::OnDisk(home) => home.place,
            other => panic!("{other:?}"),
        }
    }

    fn page(place: u32) -> Page {
        Page::OnDisk(Home { place, crc: 0 })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn it_is_a_map(ops in prop::collection::vec((0..64u8, any::<u32>(), any::<bool>()), 0..200), from in 0..64u8, to in 0..64u8) {
            let mut table = PageTable::default();
            let mut model = BTreeMap::new();
            for (number, value, insert) in ops {
                if insert {
                    *table.get_or_insert(number, page(0)) = page(value);
                    model.insert(number, value);
                } else {
                    prop_assert_eq!(table.remove(number).as_ref().map(place), model.remove(&number));
                }
                prop_assert_eq!(table.len(), model.len());
                prop_assert_eq!(table.is_empty(), model.is_empty());
                prop_assert_eq!(table.get(&number).map(place), model.get(&number).copied());
            }
            let all: Vec<(u8, u32)> = table.iter().map(|(number, page)| (number, place(page))).collect();
            prop_assert_eq!(all, model.iter().map(|(number, value)| (*number, *value)).collect::<Vec<_>>());
            if from <= to {
                let some: Vec<u8> = table.range(from..=to).map(|(number, _)| number).collect();
                prop_assert_eq!(some, model.range(from..=to).map(|(number, _)| *number).collect::<Vec<_>>());
            }
        }
    }
}
