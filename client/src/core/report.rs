//! What meta is told of attached volumes, what it says to that, and when a caretaker is done.

use cairn_proto::replication;

use super::ClientCore;
use super::api::{Action, Advice, AttachmentReport, VolumeDescription, VolumeHandle};
use super::limits::REPORTS_MAX;
use super::volume::{Phase, Volume};

impl ClientCore {
    /// Takes a volume to repair it.
    pub(super) fn care_for(&mut self, handle: VolumeHandle, description: VolumeDescription) {
        let mut opened = Volume::new(description, &self.config.limits);
        opened.is_care = true;
        let before = self.volumes.insert(handle, opened);
        assert!(before.is_none(), "{handle:?} is open already");
        self.ask_attach(handle);
    }

    /// Looks at the volumes whose time has come; tells meta of those of which it should hear, all with one message.
    pub(super) fn report_due(&mut self) {
        let (now, limits) = (self.now, self.config.limits);
        let mut reports = Vec::new();
        let mut done = Vec::new();
        for (handle, volume) in &mut self.volumes {
            if volume.look_at.is_none_or(|at| at > now) {
                continue;
            }
            let Phase::Attached(coordinator) = &volume.phase else {
                volume.look_at = None;
                continue;
            };
            let (generation, groups) = (coordinator.generation(), coordinator.status());
            volume.look_at = Some(now + limits.report_interval);
            let is_whole = volume.is_whole();
            volume.whole_since = volume.whole_since.filter(|_| is_whole).or(is_whole.then_some(now));
            let whole_for = volume.whole_since.map(|since| now.saturating_since(since));
            if volume.is_care && whole_for.is_some_and(|span| span >= limits.care_whole_for) {
                done.push(*handle);
            }
            let quiet = |at| is_whole && now.saturating_since(at) < limits.report_interval_whole;
            // That a volume has become whole is news.
            if volume.reported_at.is_some_and(quiet) && whole_for.is_some_and(|span| !span.is_zero()) {
                continue;
            }
            volume.reported_at = Some(now);
            reports.push(AttachmentReport {
                id: volume.description.id,
                generation,
                is_caretaker: volume.is_care,
                groups,
            });
        }
        for reports in reports.chunks(REPORTS_MAX) {
            self.actions.push_back(Action::Report(reports.to_vec()));
        }
        for handle in done {
            self.close(handle);
        }
    }

    /// Meta has answered a report.
    pub(super) fn advised(&mut self, advice: &[Advice]) {
        let now = self.now;
        let mut give_way = Vec::new();
        for advice in advice {
            for (handle, volume) in &mut self.volumes {
                if volume.description.id != advice.id {
                    continue;
                }
                if advice.give_way && volume.is_care {
                    give_way.push(*handle);
                } else if let Some(coordinator) = volume.coordinator().filter(|_| advice.look) {
                    coordinator.handle(now, replication::Event::Look);
                    self.touched.insert(*handle);
                }
            }
        }
        for handle in give_way {
            self.close(handle);
        }
    }
}
