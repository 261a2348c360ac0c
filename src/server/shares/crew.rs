//! The helpers of one share, and what they are to do: each has one errand at a time, and one that hangs is left
//! with it while others go on, up to eight.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};

use super::purpose::{Finding, Purpose};
use crate::custody::clients::ClientId;
use crate::host::clock::Moment;
use crate::host::errno::{self, Errno};
use crate::host::helper::{Dismissed, Helper, LONGEST};
use crate::locks::errand::{self, Outcome};

/// So many helpers a share has at most: enough that one whose answers take two milliseconds serves a boot of
/// guests.
const MOST: usize = 8;
/// How long a helper without anything to do stays, milliseconds.
const IDLE_MS: u64 = 10_000;
/// How long an errand may take before that is said, milliseconds.
const SLOW_MS: u64 = 5_000;
/// How often an errand is given out whose helper ends over it.
const TRIES: u32 = 3;

/// Something to do.
#[derive(Debug)]
struct Errand {
    purpose: Purpose,
    bytes: Vec<u8>,
    file: Option<RawFd>,
    what: String,
    since: Moment,
    tries: u32,
    is_told: bool,
}

#[derive(Debug)]
struct Member {
    number: usize,
    helper: Helper,
    errand: Option<Errand>,
    idle_since: Moment,
}

/// An errand that is done.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) purpose: Purpose,
    pub(super) finding: Finding,
}

/// An errand that takes long.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) what: String,
    pub(super) seconds: u64,
    /// How many others wait.
    pub(super) others: usize,
}

/// The helpers of a share.
#[derive(Debug, Default)]
pub(super) struct Crew {
    members: Vec<Member>,
    queue: VecDeque<Errand>,
    /// The host would make no helper: it is tried again some time.
    is_refused: bool,
    /// The numbers of helpers that are over.
    over: Vec<usize>,
    /// Helpers that end, or have ended.
    dismissed: Vec<Dismissed>,
    /// Since when it has not answered, if that was said.
    slow_since: Option<Moment>,
}

impl Crew {
    pub(super) fn ask(
        &mut self,
        purpose: Purpose,
        bytes: Vec<u8>,
        file: Option<RawFd>,
        what: String,
    ) {
        self.queue.push_back(Errand {
            purpose,
            bytes,
            file,
            what,
            since: Moment::now(),
            tries: 0,
            is_told: false,
        });
    }

    /// Whether there is something to do for a helper that could be made.
    pub(super) fn wants_helper(&self) -> bool {
        !self.queue.is_empty() && self.members.len() < MOST && !self.is_refused
    }

    /// Gives out what is to be done; what cannot be. `new` gives a number to a helper that is new: one a turn, because
    /// each takes a moment.
    pub(super) fn give_out(
        &mut self,
        new: &mut impl FnMut(RawFd) -> Option<usize>,
    ) -> Vec<Finished> {
        let mut finished = Vec::new();
        let before = self.members.len();
        if self.is_refused {
            return finished;
        }
        while let Some(mut errand) = self.queue.pop_front() {
            let may_be_made = self.members.len() <= before;
            let at = match self.idle_member(may_be_made, new) {
                Ok(Some(at)) => at,
                Ok(None) => {
                    self.queue.push_front(errand);
                    break;
                }
                Err(reason) => {
                    // Those that there are do it some time; and what is locked must be let go of.
                    let may_wait = !self.members.is_empty() && errno::may_pass(reason);
                    if may_wait || errand.file.is_some() {
                        self.is_refused = true;
                        self.queue.push_front(errand);
                        break;
                    }
                    finished.push(cannot(errand, reason));
                    continue;
                }
            };
            let Some(member) = self.members.get_mut(at) else {
                break;
            };
            errand.tries = errand.tries.saturating_add(1);
            match member.helper.ask(&errand.bytes, errand.file) {
                Ok(()) => member.errand = Some(errand),
                Err(reason) => {
                    if reason == Errno::EPIPE {
                        // It is over, and another one does it.
                        self.dismiss(at);
                    }
                    if errand.file.is_none() && (reason != Errno::EPIPE || errand.tries > TRIES) {
                        finished.push(cannot(errand, reason));
                        continue;
                    }
                    self.is_refused = reason != Errno::EPIPE || errand.tries > TRIES;
                    self.queue.push_front(errand);
                    if self.is_refused {
                        break;
                    }
                }
            }
        }
        finished
    }

    fn idle_member(
        &mut self,
        may_be_made: bool,
        new: &mut impl FnMut(RawFd) -> Option<usize>,
    ) -> Result<Option<usize>, Errno> {
        if let Some(at) = self.members.iter().position(|it| it.errand.is_none()) {
            return Ok(Some(at));
        }
        if self.members.len() >= MOST || !may_be_made {
            return Ok(None);
        }
        let helper = Helper::start()?;
        let number = new(helper.as_raw_fd()).ok_or(Errno::ENOMEM)?;
        self.members.push(Member {
            number,
            helper,
            errand: None,
            idle_since: Moment::now(),
        });
        Ok(self.members.len().checked_sub(1))
    }

    /// What a helper has to say, and whether it is over.
    pub(super) fn hear(&mut self, number: usize) -> (Option<Finished>, bool) {
        let Some(at) = self.members.iter().position(|it| it.number == number) else {
            return (None, true);
        };
        let Some(member) = self.members.get_mut(at) else {
            return (None, true);
        };
        let mut buffer = vec![0; LONGEST];
        let message = match member.helper.answer(&mut buffer) {
            Ok(None) => return (None, false),
            Ok(Some(message)) => message,
            Err(reason) => {
                let errand = member.errand.take();
                self.dismiss(at);
                let finished = match errand {
                    Some(errand) if errand.tries < TRIES || errand.file.is_some() => {
                        self.is_refused = errand.tries >= TRIES;
                        self.queue.push_front(errand);
                        None
                    }
                    errand => errand.map(|it| cannot(it, reason)),
                };
                return (finished, true);
            }
        };
        let Some(errand) = member.errand.take() else {
            return (None, false);
        };
        member.idle_since = Moment::now();
        let bytes = buffer.get(..message.length).unwrap_or_default();
        let finding = match errand::outcome_of(bytes) {
            Ok((outcome, said)) => {
                said.iter().for_each(crate::log::Said::repeat);
                let file = message.descriptors.into_iter().next();
                // There was no room for its descriptor: it is undone there.
                let outcome = match (outcome, &file) {
                    (Outcome::Locked(..), None) => Outcome::Failed(Errno::EMFILE),
                    (outcome, _) => outcome,
                };
                Finding {
                    asked: errand.bytes,
                    outcome,
                    file,
                }
            }
            Err(reason) => Finding::failed(reason),
        };
        let finished = Finished {
            purpose: errand.purpose,
            finding,
        };
        (Some(finished), false)
    }

    /// A client is gone: what its errand is for from now on. One that was not begun with is left, unless it lets go
    /// of a lock. What one is for that is there yet.
    pub(super) fn leaves(
        &mut self,
        id: ClientId,
        now: impl Fn(Option<RawFd>) -> Purpose,
    ) -> Option<Purpose> {
        let mut is_there = None;
        self.queue.retain_mut(|errand| {
            if errand.purpose != Purpose::Call(id) {
                return true;
            }
            errand.purpose = now(errand.file);
            let stays = !matches!(errand.purpose, Purpose::Nobody(_));
            if stays {
                is_there = Some(errand.purpose.clone());
            }
            stays
        });
        let at_it = self.members.iter_mut();
        for errand in at_it.filter_map(|it| it.errand.as_mut()) {
            if errand.purpose == Purpose::Call(id) {
                errand.purpose = now(errand.file);
                is_there = Some(errand.purpose.clone());
            }
        }
        is_there
    }

    /// Whether it is known not to answer.
    pub(super) fn is_slow(&self) -> bool {
        self.slow_since.is_some()
    }

    /// It answered: for how long it had not, seconds, if that was said.
    pub(super) fn answers_again(&mut self) -> Option<f64> {
        let since = self.slow_since.take()?;
        let at_it = self.members.iter_mut().filter_map(|it| it.errand.as_mut());
        at_it
            .chain(&mut self.queue)
            .for_each(|errand| errand.is_told = false);
        Some(seconds(since, Moment::now()))
    }

    /// The errand that has taken longest, if that is long and has not been said.
    pub(super) fn tell(&mut self, now: Moment) -> Option<Told> {
        let waiting = self.queue.len();
        let at_it = self.members.iter_mut().filter_map(|it| it.errand.as_mut());
        let mut all: Vec<&mut Errand> = at_it.chain(&mut self.queue).collect();
        let others = all.len().saturating_sub(1);
        let first = all.iter_mut().min_by_key(|errand| errand.since)?;
        if now < first.since.plus_ms(SLOW_MS) || first.is_told {
            return None;
        }
        let since = first.since;
        let told = Told {
            what: first.what.clone(),
            seconds: now.ms_since(since) / 1000,
            others: others.max(waiting),
        };
        let is_first = self.slow_since.is_none();
        self.slow_since.get_or_insert(since);
        for errand in all {
            errand.is_told = true;
        }
        is_first.then_some(told)
    }

    fn dismiss(&mut self, at: usize) {
        let member = self.members.swap_remove(at);
        self.dismissed.push(member.helper.dismiss());
        self.over.push(member.number);
    }

    /// Ends helpers that have had nothing to do for long: their numbers.
    pub(super) fn end_idle(&mut self, now: Moment) -> Vec<usize> {
        self.is_refused = false;
        let is_idle = |it: &Member| it.errand.is_none() && now >= it.idle_since.plus_ms(IDLE_MS);
        while let Some(at) = self.members.iter().position(is_idle) {
            self.dismiss(at);
        }
        self.dismissed.retain(Dismissed::is_there);
        std::mem::take(&mut self.over)
    }

    /// Whether there is nobody, and nothing to do.
    pub(super) fn is_over(&self) -> bool {
        self.members.is_empty() && self.queue.is_empty() && self.dismissed.is_empty()
    }

    /// What is to be done yet.
    pub(super) fn under_way(&self) -> impl Iterator<Item = &str> {
        let at_it = self.members.iter().filter_map(|it| it.errand.as_ref());
        at_it.chain(&self.queue).map(|errand| errand.what.as_str())
    }
}

fn cannot(errand: Errand, reason: Errno) -> Finished {
    Finished {
        purpose: errand.purpose,
        finding: Finding::failed(reason),
    }
}

fn seconds(since: Moment, now: Moment) -> f64 {
    now.ms_since(since) as f64 / 1000.0
}
