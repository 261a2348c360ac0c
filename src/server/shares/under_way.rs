//! Calls under way: how far each has come, which resource it is about, and who waits for its outcome.

use std::collections::BTreeMap;
use std::os::fd::RawFd;

use super::{Finding, ShareId};
use crate::custody::clients::ClientId;
use crate::locks::errand::Outcome;
use crate::locks::place::Place;

/// A resource, by the text of its lockspace and name.
pub(super) type Key = (Vec<u8>, Vec<u8>);

fn key(place: Place<'_>) -> Key {
    (place.lockspace.to_vec(), place.name.to_vec())
}

/// An errand of a call.
#[derive(Debug)]
enum Step {
    Asked,
    Done(Finding),
}

/// A call.
#[derive(Debug, Default)]
struct Call {
    /// Its errands, in their order.
    steps: Vec<Step>,
    /// The next of them, since it was begun with.
    next: usize,
    key: Option<Key>,
}

/// Who has something under way with a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Client(ClientId),
    /// Nobody any more: a dead owner left it open under this number, on this share.
    Left(RawFd, ShareId),
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Calls {
    calls: BTreeMap<ClientId, Call>,
    resources: BTreeMap<Key, Who>,
    waiting: Vec<ClientId>,
}

impl Calls {
    pub(super) fn begins(&mut self, id: ClientId) {
        if self.calls.is_empty() {
            return;
        }
        if let Some(call) = self.calls.get_mut(&id) {
            call.next = 0;
        }
    }

    pub(super) fn has_to_wait(&mut self, id: ClientId, place: Place<'_>) -> bool {
        if self.resources.is_empty() {
            return false;
        }
        match self.resources.get(&key(place)) {
            None => false,
            Some(who) if *who == Who::Client(id) => false,
            Some(_) => {
                self.waits(id);
                true
            }
        }
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

    /// The step that a call comes to next, if it was there before: what became of it, or that it is not done.
    pub(super) fn next_step(&mut self, id: ClientId) -> Option<Option<Finding>> {
        let call = self.calls.get_mut(&id)?;
        let step = call.steps.get_mut(call.next)?;
        let Step::Done(finding) = step else {
            return Some(None);
        };
        call.next = call.next.saturating_add(1);
        Some(Some(Finding {
            asked: finding.asked.clone(),
            outcome: finding.outcome.clone(),
            file: finding.file.take(),
        }))
    }

    pub(super) fn asks(&mut self, id: ClientId, place: Place<'_>) {
        let call = self.calls.entry(id).or_default();
        call.steps.push(Step::Asked);
        if call.key.is_none() {
            let key = key(place);
            self.resources.insert(key.clone(), Who::Client(id));
            call.key = Some(key);
        }
    }

    /// What a call waits for is done; given back if there is no such call.
    pub(super) fn is_done(&mut self, id: ClientId, finding: Finding) -> Option<Finding> {
        let Some(Call { steps, .. }) = self.calls.get_mut(&id) else {
            return Some(finding);
        };
        match steps.last_mut() {
            Some(step @ Step::Asked) => {
                *step = Step::Done(finding);
                None
            }
            _ => Some(finding),
        }
    }

    /// A call is over: what it did not take, and who is to go on.
    pub(super) fn ends(&mut self, id: ClientId, woken: &mut Vec<ClientId>) -> Vec<Finding> {
        if self.calls.is_empty() {
            return Vec::new();
        }
        let Some(call) = self.calls.remove(&id) else {
            return Vec::new();
        };
        if let Some(key) = call.key {
            self.resources.remove(&key);
            woken.append(&mut self.waiting);
        }
        let done = call.steps.into_iter().filter_map(|step| match step {
            Step::Done(finding) => Some(finding),
            Step::Asked => None,
        });
        done.filter(|it| matches!(it.outcome, Outcome::Locked(..)) && it.file.is_some())
            .collect()
    }

    pub(super) fn left_begins(&mut self, number: RawFd, share: ShareId, place: Place<'_>) {
        self.resources
            .entry(key(place))
            .or_insert(Who::Left(number, share));
    }

    pub(super) fn left_ends(&mut self, number: RawFd, woken: &mut Vec<ClientId>) {
        self.resources
            .retain(|_, who| !matches!(who, Who::Left(left, _) if *left == number));
        woken.append(&mut self.waiting);
    }

    pub(super) fn wake_all(&mut self, woken: &mut Vec<ClientId>) {
        woken.append(&mut self.waiting);
    }
}
