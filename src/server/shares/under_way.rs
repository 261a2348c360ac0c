//! Calls under way: what became of the errands of each, which resource it is about, and who waits for its outcome.
//! A resource is busy with a call until that is answered; if its client is gone, until what was begun is undone.

use std::collections::BTreeMap;
use std::os::fd::RawFd;

use super::purpose::{Finding, ShareId};
use crate::custody::clients::ClientId;
use crate::locks::errand::{Kind, Outcome};
use crate::locks::place::Place;

/// A resource, by its lockspace and name.
type Key = (Vec<u8>, Vec<u8>);

fn key(place: Place<'_>) -> Key {
    (place.lockspace.to_vec(), place.name.to_vec())
}

/// An errand of a call: what became of it, if it is done. A call has one of each kind at most, and may not come to
/// one again that it came to before.
#[derive(Debug)]
struct Step {
    kind: Kind,
    /// The file that went with it.
    number: Option<RawFd>,
    finding: Option<Finding>,
}

/// What is under way with a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Who {
    /// A client's call.
    Client(ClientId),
    /// An errand whose client is gone, by its serial number.
    Nobody(u64),
    /// A lock is let go of, on the file that is open under this number.
    LetGo(RawFd),
    /// The same, of a dead owner, on this share.
    Left(RawFd, ShareId),
}

/// What a call leaves behind.
#[derive(Debug, Default)]
pub(super) struct Left {
    /// Locks that it did not take.
    pub(super) findings: Vec<Finding>,
    /// Files whose locks were let go of for it.
    pub(super) let_go: Vec<RawFd>,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Calls {
    calls: BTreeMap<ClientId, Vec<Step>>,
    resources: BTreeMap<Key, Who>,
    waiting: Vec<ClientId>,
}

impl Calls {
    /// Whether a call on a resource has to wait for something else that is under way with it.
    pub(super) fn has_to_wait(&mut self, id: ClientId, place: Place<'_>) -> bool {
        if self.resources.is_empty() {
            return false;
        }
        let who = self.resources.get(&key(place));
        let waits = who.is_some_and(|who| *who != Who::Client(id));
        if waits {
            self.waits(id);
        }
        waits
    }

    pub(super) fn waits(&mut self, id: ClientId) {
        if !self.waiting.contains(&id) {
            self.waiting.push(id);
        }
    }

    pub(super) fn left_on(&self, place: Place<'_>) -> Option<ShareId> {
        if self.resources.is_empty() {
            return None;
        }
        match self.resources.get(&key(place)) {
            Some(Who::Left(_, share)) => Some(*share),
            _ => None,
        }
    }

    /// What became of an errand of a call; that it is not done; or that it was not asked for.
    pub(super) fn step(&mut self, id: ClientId, kind: Kind) -> Option<Option<Finding>> {
        let steps = self.calls.get_mut(&id)?;
        let step = steps.iter_mut().find(|step| step.kind == kind)?;
        Some(step.finding.as_mut().map(|finding| Finding {
            asked: finding.asked.clone(),
            outcome: finding.outcome.clone(),
            file: finding.file.take(),
        }))
    }

    /// Whether a call has come to an errand of this kind.
    pub(super) fn has_step(&self, id: ClientId, kind: Kind) -> bool {
        let steps = self.calls.get(&id);
        steps.is_some_and(|steps| steps.iter().any(|step| step.kind == kind))
    }

    pub(super) fn asks(
        &mut self,
        id: ClientId,
        (kind, number): (Kind, Option<RawFd>),
        place: Place<'_>,
    ) {
        let step = Step {
            kind,
            number,
            finding: None,
        };
        self.calls.entry(id).or_default().push(step);
        self.resources.entry(key(place)).or_insert(Who::Client(id));
    }

    /// What a call waits for is done; given back if there is no such call.
    pub(super) fn is_done(&mut self, id: ClientId, finding: Finding) -> Option<Finding> {
        let steps = self.calls.get_mut(&id);
        match steps.and_then(|steps| steps.last_mut()) {
            Some(step) if step.finding.is_none() => {
                step.finding = Some(finding);
                None
            }
            _ => Some(finding),
        }
    }

    /// A call of an earlier reactor that waits here may have begun to let go of the lock on this resource.
    pub(super) fn may_let_go(&mut self, id: ClientId, place: Place<'_>) {
        self.calls.entry(id).or_default();
        self.resources.entry(key(place)).or_insert(Who::Client(id));
    }

    /// A call is over, if there is one. What it did not take, and the files whose locks were let go of for it; `then`
    /// is what is under way with its resource from now on.
    pub(super) fn ends(&mut self, id: ClientId, then: Option<Who>) -> Option<Left> {
        let steps = self.calls.remove(&id)?;
        match then {
            None => self.resources.retain(|_, who| *who != Who::Client(id)),
            Some(then) => {
                let all = self.resources.values_mut();
                all.filter(|who| **who == Who::Client(id))
                    .for_each(|who| *who = then);
            }
        }
        let mut left = Left::default();
        for Step {
            number, finding, ..
        } in steps
        {
            let Some(finding) = finding else {
                continue;
            };
            if matches!(finding.outcome, Outcome::Locked(..)) && finding.file.is_some() {
                left.findings.push(finding);
            } else {
                left.let_go.extend(number);
            }
        }
        Some(left)
    }

    /// An errand is over whose client is gone.
    pub(super) fn nobodys_ends(&mut self, serial: u64) {
        self.resources.retain(|_, who| *who != Who::Nobody(serial));
    }

    /// The lock on the file that is open under this number is let go of; of what a dead owner left, on this share.
    pub(super) fn let_go_begins(
        &mut self,
        number: RawFd,
        place: Place<'_>,
        left_on: Option<ShareId>,
    ) {
        let who = left_on.map_or(Who::LetGo(number), |share| Who::Left(number, share));
        self.resources.entry(key(place)).or_insert(who);
    }

    pub(super) fn let_go_ends(&mut self, number: RawFd) {
        self.resources.retain(|_, who| match who {
            Who::LetGo(other) | Who::Left(other, _) => *other != number,
            Who::Client(_) | Who::Nobody(_) => true,
        });
    }

    /// Whoever waits looks again.
    pub(super) fn wake_all(&mut self, woken: &mut Vec<ClientId>) {
        woken.extend(std::mem::take(&mut self.waiting));
    }
}
