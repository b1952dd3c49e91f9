//! What stands on a device, broken one structure at a time. See [`cairn_storage_node::testing::store::image`].
//!
//! An input is a byte whose lowest bit says whether CRCs are made right, the number of an image, that of a structure of
//! it in two bytes, and what is put in the structure's place.

use std::sync::LazyLock;

use cairn_storage_node::testing::store::image::{Image, Kind, examine};

use super::Target;
use crate::rng::mix;

/// Devices that were in use in different ways.
static IMAGES: LazyLock<Vec<Image>> = LazyLock::new(|| (1..=4).map(Image::new).collect());

/// Bytes before the content.
const HEAD_BYTES: usize = 4;
/// Opening a device takes as long as decoding so many of the other inputs.
const COST: u64 = 100;

/// One target for each kind of structure: each is reached with all others being right.
pub(super) const TARGETS: [Target; 6] = [
    target(
        "store-superblock",
        "devices with a superblock that says something else",
        || corpus(Kind::Superblock),
    ),
    target(
        "store-checkpoint",
        "devices with a checkpoint header that says something else",
        || corpus(Kind::Checkpoint),
    ),
    target(
        "store-record",
        "devices with a record of the log that says something else",
        || corpus(Kind::Record),
    ),
    target(
        "store-directory",
        "devices with a directory block that says something else",
        || corpus(Kind::Directory),
    ),
    target(
        "store-page",
        "devices with a page of the index or the free-space map that says something else",
        || corpus(Kind::Page),
    ),
    Target {
        name: "store-nonsense",
        what: "devices with well-formed metadata that contradicts itself",
        cost: COST,
        corpus: || vec![vec![0; 9], vec![0x5a; 9]],
        mend: |_| (),
        run: run_nonsense,
    },
];

const fn target(name: &'static str, what: &'static str, corpus: fn() -> Vec<Vec<u8>>) -> Target {
    Target {
        name,
        what,
        cost: COST,
        corpus,
        mend: |input| input.iter_mut().take(1).for_each(|flags| *flags |= 1),
        run,
    }
}

fn corpus(kind: Kind) -> Vec<Vec<u8>> {
    let mut corpus = Vec::new();
    for (number, image) in (0..).zip(&*IMAGES) {
        for structure in image.all(kind) {
            let [low, high] = (structure as u16).to_le_bytes();
            corpus.push([&[1, number, low, high], image.content(structure)].concat());
        }
    }
    corpus
}

fn run(input: &[u8]) {
    let Some(([flags, image, low, high], content)) = input.split_first_chunk::<HEAD_BYTES>() else {
        return;
    };
    let image = &IMAGES[usize::from(*image) % IMAGES.len()];
    let structure = usize::from(u16::from_le_bytes([*low, *high])) % image.structures();
    examine(image.with(structure, content, flags & 1 == 1), 1);
}

/// An input is a seed: of the image, and of what is changed in it.
fn run_nonsense(input: &[u8]) {
    let seed = input.iter().fold(0, |seed, byte| mix(seed ^ u64::from(*byte)));
    let image = &IMAGES[seed as usize % IMAGES.len()];
    examine(image.nonsense(seed), 1);
}
