//! Attachments that end with copies that are not equal.

use super::*;

const PAUSE: u64 = UNSETTLED_PAUSE_MS / 1000;

#[test]
fn a_volume_that_was_given_back_with_unequal_copies_is_cared_for_after_a_moment() {
    let mut story = Story::new();
    story.attach(1, false);
    story.pass_with(None, 20);
    story.detach(true);
    story.pass(200);
    assert_eq!(story.keeper(), None, "its copies are equal");

    story.attach(1, false);
    story.detach(false);
    story.pass(PAUSE - 1);
    assert_eq!(story.keeper(), None, "somebody may attach it at once");
    story.pass(2);
    assert_eq!(story.keeper(), Some(NodeId(1)));
    story.attach(8, true);
    story.pass_with(Some(1), 3);
    assert_eq!(story.keeper(), Some(NodeId(1)), "it is at work");
    story.detach(true);
    story.pass(1);
    assert_eq!(story.keeper(), None, "it has made them equal");
    story.pass(CARE_STUCK_MS.0 / 1000 + CARE_PAUSE_MS.0 / 1000);
    assert_eq!(story.keeper(), None);
}

#[test]
fn a_caretaker_that_ends_before_the_copies_are_equal_is_followed_by_another() {
    let mut story = Story::new();
    story.attach(1, false);
    story.detach(false);
    story.pass(PAUSE + 1);
    story.attach(8, true);
    story.pass_with(Some(1), 3);
    story.detach(false);
    story.pass(PAUSE + 1);
    assert!(story.keeper().is_some());
    story.attach(8, true);
    story.pass_with(Some(1), 2);
    // It dies without a word.
    story.dies(1);
    story.pass(8);
    story.alive.push(1);
    story.pass(CARETAKER_SILENCE_MS / 1000 + 1);
    assert!(story.keeper().is_some());
}

#[test]
fn a_holder_that_dies_leaves_a_volume_that_is_cared_for_and_a_living_one_does_not() {
    let mut story = Story::new();
    let generation = story.attach(1, false);
    for _ in 0..300 {
        let held = [(VolumeId(1), generation)];
        story
            .view
            .heard_volumes(NodeId(2), held, [], &story.fixture.0, story.now);
        story.pass(1);
        assert_eq!(story.keeper(), None, "its connections live");
    }
    story.pass(HOLDER_SILENCE_MS / 1000 - 2);
    assert_eq!(story.keeper(), None, "it may be alive");
    story.pass(3);
    assert_eq!(story.keeper(), Some(NodeId(1)));
    // The guest comes back before the caretaker has attached.
    story.attach(1, false);
    story.pass(1);
    assert_eq!(story.keeper(), None);
    story.pass_with(None, 200);
    assert_eq!(story.keeper(), None);
}

#[test]
fn a_member_that_is_away_is_waited_for_before_copies_are_made_equal() {
    let mut story = Story::new();
    story.attach(1, false);
    story.dies(2);
    story.pass_with(None, 10);
    story.detach(false);
    story.pass(30);
    assert_eq!(story.keeper(), None, "a caretaker would eject it");
    story.alive.push(2);
    story.pass(2);
    assert!(story.keeper().is_some());
}

#[test]
fn a_new_leader_knows_of_it_too() {
    let mut story = Story::new();
    story.attach(1, false);
    story.detach(false);
    story.view.reset(story.now);
    story.pass(1);
    assert_eq!(story.keeper(), None);
    story.pass(PAUSE + 1);
    assert!(story.keeper().is_some());
}
