//! An index that contradicts itself: two entries claim one block. It is reported and refused, and nothing panics.

use cairn_proto::block::Content;
use cairn_proto::ids::{ChunkIndex, Layer};

use super::rig::*;
use crate::store::api::{StoreError, StoreReply};
use crate::store::chunk::{ChunkKey, Page};
use crate::store::inspect::{DamageKind, InspectOptions, inspect};
use crate::store::{Inner, StoreLimits, StoreState};

/// A device whose index says, with all CRCs right, that blocks 0 and 1 of a chunk stand at the same place.
fn claimed_twice() -> Rig {
    let limits = StoreLimits {
        index_memory_max: 1 << 20,
        ..StoreLimits::tiny()
    };
    let mut rig = Rig::new(1000, limits, 1);
    rig.create();
    rig.write(0, 0, 40, 1);
    let Inner::Running(engine) = &mut rig.store.inner else {
        panic!("it is open")
    };
    let key = ChunkKey {
        group: GROUP,
        chunk: ChunkIndex(0),
        layer: Layer(0),
    };
    let chunk = engine.catalog.chunks.get_mut(&key).expect("it was written");
    let Some(Page::Resident(page)) = chunk.pages.get_mut(&0) else {
        panic!("its page is in memory")
    };
    page.entries[1].place = page.entries[0].place;
    let checkpoints = rig.store.counters().checkpoints + 2;
    for seq in 2.. {
        rig.write(0, 100, 1, seq);
        if rig.store.counters().checkpoints >= checkpoints {
            break;
        }
    }
    let mut rig = rig.reopen(false);
    rig.settle();
    assert_eq!(rig.store.state(), StoreState::Open);
    rig
}

#[test]
fn inspection_finds_a_block_that_two_entries_claim() {
    let mut rig = claimed_twice();
    let options = InspectOptions {
        verify: true,
        volume: None,
    };
    let found = inspect(&mut rig.device, options, &mut |_| {}).damage.listed;
    let kinds: Vec<DamageKind> = found.iter().map(|found| found.kind).collect();
    assert!(kinds.contains(&DamageKind::Double), "{found:?}");
    assert!(kinds.contains(&DamageKind::Leak), "{found:?}");
    assert!(kinds.contains(&DamageKind::Checksum), "{found:?}");
}

#[test]
fn a_block_that_two_entries_claim_is_not_given_back_twice() {
    let mut rig = claimed_twice();
    let StoreReply::Read { blocks, .. } = rig.read(0, 0, 3) else {
        panic!("it can be read")
    };
    assert!(matches!(blocks[0].content, Content::Data(_)));
    assert_eq!(blocks[1].content, Content::Damaged);
    // Both at once: the request itself shows it.
    let reply = rig.write(0, 0, 2, 100_000);
    assert!(
        matches!(reply, StoreReply::Failed(StoreError::IndexDamaged)),
        "{reply:?}"
    );
    // The first one gives the block back; the second has nothing to give.
    let reply = rig.write(0, 0, 1, 100_001);
    assert!(matches!(reply, StoreReply::Durable { .. }), "{reply:?}");
    let reply = rig.write(0, 1, 1, 100_002);
    assert!(
        matches!(reply, StoreReply::Failed(StoreError::IndexDamaged)),
        "{reply:?}"
    );
    let reply = rig.write(0, 2, 30, 100_003);
    assert!(
        matches!(reply, StoreReply::Durable { .. }),
        "the others can be written: {reply:?}"
    );
}

#[test]
fn a_batch_that_gives_a_block_back_twice_stops_the_store_and_is_refused_when_it_is_opened() {
    let mut rig = claimed_twice();
    let tickets = [(0, 100_000), (1, 100_001)].map(|(block, seq)| {
        rig.next_ticket += 1;
        let ticket = crate::store::Ticket(rig.next_ticket);
        rig.store.submit(rig.now, ticket, write_request(0, block, 1, seq));
        ticket.0
    });
    rig.take_actions();
    rig.settle();
    for ticket in tickets {
        let reply = rig.replies.remove(&ticket);
        assert!(matches!(reply, Some(StoreReply::Durable { .. })), "{reply:?}");
    }
    assert!(
        matches!(rig.store.state(), StoreState::Poisoned(_)),
        "{:?}",
        rig.store.state()
    );
    let reply = rig.write(0, 2, 1, 100_002);
    assert!(
        matches!(reply, StoreReply::Failed(StoreError::Poisoned(_))),
        "{reply:?}"
    );
    let mut rig = rig.reopen(false);
    rig.settle();
    let StoreState::Refused(error) = rig.store.state() else {
        panic!("{:?}", rig.store.state())
    };
    assert!(error.to_string().contains("twice"), "{error}");
}
