//! A volatile write cache: writes are in memory until a flush, reads see them, and a power cut loses of them what it likes.

use std::collections::BTreeMap;
use std::io;

use super::super::limits::{SHIM_CACHE_SECTORS, SHIM_VERSIONS};
use super::media::Media;
use crate::rng::Rng;

/// Bytes that a device writes wholly or not at all.
pub const SECTOR: usize = 512;
/// Sectors written in one go when the cache is flushed.
const RUN_SECTORS: usize = 2048;

/// What a power cut did to sectors that were not flushed.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Cut {
    /// Sectors that have what was written to them last.
    pub kept: u64,
    /// Sectors that have something older: what was flushed, or a write in between.
    pub lost: u64,
}

/// What a power cut does to what is not flushed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Taste {
    /// All of it is lost.
    LoseAll,
    /// All of it is kept.
    KeepAll,
    /// Each sector keeps one of all that were written to it, or none.
    Any,
    /// Each sector is kept whole in so many of a thousand cases.
    Some(u32),
}

impl Taste {
    /// One at random.
    pub fn draw(rng: &mut Rng) -> Taste {
        match rng.weighted(&[25, 10, 40, 25]) {
            0 => Taste::LoseAll,
            1 => Taste::KeepAll,
            2 => Taste::Any,
            _ => Taste::Some(rng.within(1, 999) as u32),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Cache<M> {
    media: M,
    /// What was written to each sector since it was last flushed, the newest last.
    sectors: BTreeMap<u64, Vec<[u8; SECTOR]>>,
    /// Versions in `sectors`.
    held: usize,
    /// The most that are held.
    limit: usize,
    /// Where it goes on when it makes room.
    hand: u64,
}

impl<M: Media> Cache<M> {
    /// Over this.
    pub fn new(media: M) -> Cache<M> {
        Cache::with_limit(media, SHIM_CACHE_SECTORS)
    }

    /// Holding at most so many sectors, at least 1.
    pub fn with_limit(media: M, limit: usize) -> Cache<M> {
        Cache {
            media,
            sectors: BTreeMap::new(),
            held: 0,
            limit: limit.max(1),
            hand: 0,
        }
    }

    /// What is below.
    pub fn media(&self) -> &M {
        &self.media
    }

    /// What is below, to do harm to it.
    pub fn media_mut(&mut self) -> &mut M {
        &mut self.media
    }

    /// Sectors that are not flushed.
    pub fn unflushed(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// What was written last, flushed or not.
    ///
    /// # Errors
    /// Of the media.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        if into.is_empty() {
            return Ok(());
        }
        self.media.read(offset, into)?;
        let end = offset + into.len() as u64;
        let sectors = offset / SECTOR as u64..end.div_ceil(SECTOR as u64);
        for (sector, versions) in self.sectors.range(sectors) {
            let newest = versions.last().expect("a sector without versions is not kept");
            let start = sector * SECTOR as u64;
            let from = start.max(offset);
            let to = (start + SECTOR as u64).min(end);
            into[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&newest[(from - start) as usize..(to - start) as usize]);
        }
        Ok(())
    }

    /// Takes a write. Parts of sectors are filled up with what is there.
    ///
    /// # Errors
    /// Of the media, when it has to make room or to fill up.
    pub fn write(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        let end = offset + from.len() as u64;
        let mut at = offset;
        while at < end {
            let sector = at / SECTOR as u64;
            let start = sector * SECTOR as u64;
            let to = (start + SECTOR as u64).min(end);
            let mut bytes = [0; SECTOR];
            if to - at < SECTOR as u64 {
                self.read(start, &mut bytes)?;
            }
            bytes[(at - start) as usize..(to - start) as usize]
                .copy_from_slice(&from[(at - offset) as usize..(to - offset) as usize]);
            self.hold(sector, bytes)?;
            at = to;
        }
        Ok(())
    }

    fn hold(&mut self, sector: u64, bytes: [u8; SECTOR]) -> io::Result<()> {
        // Most sectors are written once between two flushes, and most of the memory is these.
        let versions = self.sectors.entry(sector).or_insert_with(|| Vec::with_capacity(1));
        versions.push(bytes);
        self.held += 1;
        if versions.len() > SHIM_VERSIONS {
            // A power cut may leave any of them, so it may as well never leave this one.
            versions.remove(0);
            self.held -= 1;
        }
        while self.held > self.limit {
            self.make_room()?;
        }
        Ok(())
    }

    /// Writes one sector back, as devices do when they please.
    fn make_room(&mut self) -> io::Result<()> {
        let next = self
            .sectors
            .range(self.hand..)
            .next()
            .or_else(|| self.sectors.iter().next());
        let (&sector, versions) = next.expect("it holds something");
        self.media
            .write(sector * SECTOR as u64, &versions.last().expect("never empty")[..])?;
        self.held -= versions.len();
        self.sectors.remove(&sector);
        self.hand = sector + 1;
        Ok(())
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// Of the media; then nothing is forgotten.
    pub fn flush(&mut self) -> io::Result<()> {
        let mut run: Vec<u8> = Vec::new();
        let mut start = 0;
        for (sector, versions) in &self.sectors {
            let next = start + (run.len() / SECTOR) as u64;
            if *sector != next || run.len() >= RUN_SECTORS * SECTOR {
                self.media.write(start * SECTOR as u64, &run)?;
                run.clear();
                start = *sector;
            }
            run.extend_from_slice(&versions.last().expect("never empty")[..]);
        }
        self.media.write(start * SECTOR as u64, &run)?;
        self.forget();
        Ok(())
    }

    /// Cuts the power: of each sector that is not flushed one of its versions stays, or what was flushed before.
    ///
    /// # Errors
    /// Of the media.
    pub fn cut(&mut self, taste: Taste, rng: &mut Rng) -> io::Result<Cut> {
        let mut cut = Cut::default();
        for (sector, versions) in &self.sectors {
            let newest = versions.len() - 1;
            let stays = match taste {
                Taste::LoseAll => None,
                Taste::KeepAll => Some(newest),
                Taste::Any => rng.index(versions.len() + 1).checked_sub(1),
                Taste::Some(permille) => rng.permille(permille).then_some(newest),
            };
            if stays == Some(newest) {
                cut.kept += 1;
            } else {
                cut.lost += 1;
            }
            if let Some(version) = stays {
                self.media.write(sector * SECTOR as u64, &versions[version][..])?;
            }
        }
        self.forget();
        Ok(cut)
    }

    /// Forgets what was written to this sector and is not flushed.
    pub fn drop_sector(&mut self, sector: u64) {
        if let Some(versions) = self.sectors.remove(&sector) {
            self.held -= versions.len();
        }
    }

    /// Forgets what is not flushed.
    pub fn forget(&mut self) {
        self.sectors.clear();
        self.held = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECTORS: u64 = 16;

    /// What a device may do, told in the simplest way: all that was ever written to a sector since it was flushed.
    struct Model {
        flushed: Vec<Vec<u8>>,
        written: Vec<Vec<Vec<u8>>>,
    }

    impl Model {
        fn newest(&self, sector: usize) -> &Vec<u8> {
            self.written[sector].last().unwrap_or(&self.flushed[sector])
        }
    }

    fn contents(cache: &Cache<Vec<u8>>) -> Vec<Vec<u8>> {
        let mut bytes = vec![0; SECTORS as usize * SECTOR];
        cache.read(0, &mut bytes).unwrap();
        bytes.chunks(SECTOR).map(<[u8]>::to_vec).collect()
    }

    /// Random writes, flushes and cuts. Gives how often a cut left the newest, what was flushed, and something in between.
    fn run(seed: u64, limit: usize) -> [u64; 3] {
        let mut rng = Rng::new(seed);
        let mut cache = Cache::with_limit(vec![0; SECTORS as usize * SECTOR], limit);
        let mut model = Model {
            flushed: vec![vec![0; SECTOR]; SECTORS as usize],
            written: vec![Vec::new(); SECTORS as usize],
        };
        let mut left = [0; 3];
        for step in 1..200u64 {
            match rng.below(10) {
                0 => {
                    cache.flush().unwrap();
                    assert_eq!(cache.unflushed(), 0);
                    for sector in 0..SECTORS as usize {
                        model.flushed[sector] = model.newest(sector).clone();
                        model.written[sector].clear();
                    }
                }
                1 => {
                    let taste = Taste::draw(&mut rng);
                    let cut = cache.cut(taste, &mut rng).unwrap();
                    let dirty = model.written.iter().filter(|written| !written.is_empty()).count() as u64;
                    assert!(cut.kept + cut.lost <= dirty, "{cut:?} of {dirty}");
                    for (sector, found) in contents(&cache).into_iter().enumerate() {
                        let written = &model.written[sector];
                        if written.is_empty() {
                            assert_eq!(found, model.flushed[sector], "seed {seed}: flushed, and lost");
                        } else if found == *written.last().unwrap() {
                            left[0] += 1;
                        } else if found == model.flushed[sector] {
                            left[1] += 1;
                        } else {
                            assert!(written.contains(&found), "seed {seed}: nobody wrote this");
                            left[2] += 1;
                        }
                        model.flushed[sector] = found;
                        model.written[sector].clear();
                    }
                }
                _ => {
                    let start = rng.below(SECTORS * SECTOR as u64);
                    let length = rng.within(1, 4 * SECTOR as u64).min(SECTORS * SECTOR as u64 - start);
                    let bytes: Vec<u8> = (0..length).map(|i| (step * 7 + i) as u8).collect();
                    cache.write(start, &bytes).unwrap();
                    for (i, byte) in bytes.into_iter().enumerate() {
                        let at = start as usize + i;
                        let (sector, within) = (at / SECTOR, at % SECTOR);
                        if i == 0 || within == 0 {
                            let newest = model.newest(sector).clone();
                            model.written[sector].push(newest);
                        }
                        model.written[sector].last_mut().unwrap()[within] = byte;
                    }
                    let newest: Vec<Vec<u8>> = (0..SECTORS as usize).map(|i| model.newest(i).clone()).collect();
                    assert_eq!(contents(&cache), newest, "seed {seed}: reads see what was written");
                }
            }
            assert!(cache.held <= limit);
        }
        left
    }

    #[test]
    fn it_behaves_as_a_device_with_a_volatile_cache_may() {
        let mut left = [0; 3];
        for seed in 0..60 {
            for limit in [SHIM_CACHE_SECTORS, 5, 1] {
                let more = run(seed, limit);
                left.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
            }
        }
        let [newest, flushed, between] = left;
        assert!(
            newest > 500 && flushed > 500 && between > 50,
            "cuts are of all kinds: {left:?}"
        );
    }

    #[test]
    fn one_write_is_torn_by_some_seed_and_which_sectors_stay_depends_on_it_alone() {
        let cut = |seed| {
            let mut cache = Cache::new(vec![0u8; 8 * SECTOR]);
            cache.write(0, &[1; 8 * SECTOR]).unwrap();
            let mut rng = Rng::new(seed);
            cache.cut(Taste::draw(&mut rng), &mut rng).unwrap();
            contents_of(cache.media())
        };
        fn contents_of(media: &[u8]) -> Vec<u8> {
            media.chunks(SECTOR).map(|sector| sector[0]).collect()
        }
        let torn = (0..20)
            .map(cut)
            .filter(|left| left.contains(&0) && left.contains(&1))
            .count();
        assert!(torn >= 5, "{torn}");
        assert!((0..20).all(|seed| cut(seed) == cut(seed)));
    }
}
