//! The scrub: what it finds, and how a pass goes on after a restart.

use cairn_proto::block::Cursor;
use cairn_proto::ids::{ChunkIndex, Layer};

use super::rig::*;
use crate::store::api::{StoreReply, StoreRequest};
use crate::store::{ScrubCursor, ScrubState, StoreLimits};

fn state(pass: u64, block: u32) -> ScrubState {
    let at = Cursor {
        chunk: ChunkIndex(3),
        layer: Layer(1),
        block,
    };
    ScrubState {
        pass,
        cursor: Some(ScrubCursor { group: GROUP, at }),
        begun_s: 1_700_000_000,
        checked: 55,
        damaged: 2,
        finished_pass: pass - 1,
        ..ScrubState::default()
    }
}

#[test]
fn how_far_a_pass_is_survives_power_cuts_and_checkpoints() {
    let mut rig = Rig::new(1024, StoreLimits::tiny(), 1);
    assert_eq!(rig.store.scrub_state(), ScrubState::default());
    rig.create();
    for (block, writes) in [(77, 0), (99, 200)] {
        let reply = rig.call(StoreRequest::SaveScrub { state: state(4, block) });
        assert!(matches!(reply, StoreReply::Durable { .. }), "{reply:?}");
        // Without writes it is in the log, with many of them in a checkpoint.
        let checkpoints = rig.store.counters().checkpoints;
        (0..writes).for_each(|i| drop(rig.write(0, i % 64, 1, 1 + u64::from(i))));
        assert_eq!(rig.store.counters().checkpoints > checkpoints + 2, writes > 0);
        rig = rig.reopen(true);
        rig.settle();
        assert_eq!(rig.store.scrub_state(), state(4, block));
    }
}
