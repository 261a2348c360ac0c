//! What happened just now, for those who asked to be told. It passes: nothing of it is in the ledger, and
//! while nobody listens nothing is kept. Who reads too slowly misses some, and is told how many.

use std::collections::VecDeque;

use super::descriptor::Open;
use super::event::{Event, ResourceName};
use super::fences::Stage;
use super::state::State;
use crate::host::clock;
use crate::locks::table::{Mode, Owner, OwnerKey, Pid};

/// So much is kept for those who read slowly: this many notices,
const MOST_KEPT: usize = 4096;
/// and at most so many bytes of names and texts. A domain's counts with each notice, though many may share it: it
/// is kept when the domain is gone.
const MOST_BYTES: usize = 512 * 1024;
/// So much of a name is told, bytes. No file's path is longer.
const LONGEST_NAME: usize = 4096;
/// So many of the domains that one process stands for are told of when it dies.
const MOST_DOMAINS: usize = 64;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// An owner registered over a connection of its own.
    Registered,
    /// An owner was granted a lock.
    Granted,
    /// An owner gave a lock back.
    Released,
    /// An owner was refused a lock.
    Refused,
    /// An owner left its locks: it was sent SIGTERM.
    Fenced,
    /// It was sent SIGKILL.
    Killed,
    /// An owner died, and what it held is free.
    Died,
    /// A new program took over.
    Upgraded,
    /// Another process went on for one that died.
    Recovered,
}

/// Something that happened.
#[derive(Clone, Debug)]
pub struct Notice {
    /// When, milliseconds since the epoch.
    pub at: u64,
    /// What.
    pub what: What,
    /// To whom; of the daemon itself to nobody.
    pub owner: Option<Owner>,
    /// The lockspace of a resource that it is about.
    pub lockspace: Box<[u8]>,
    /// Its name there; empty if it is about none.
    pub name: Box<[u8]>,
    /// How it was wanted.
    pub mode: Option<Mode>,
    /// The rest, in words: who has it, or how it came.
    pub text: Box<[u8]>,
}

impl Notice {
    fn of(what: What, owner: Option<Owner>) -> Notice {
        Notice {
            at: clock::wall_ms(),
            what,
            owner: owner.map(|owner| Owner {
                name: match owner.name.get(..LONGEST_NAME) {
                    Some(front) if front.len() < owner.name.len() => front.into(),
                    _ => owner.name,
                },
                ..owner
            }),
            lockspace: Box::default(),
            name: Box::default(),
            mode: None,
            text: Box::default(),
        }
    }

    fn about(mut self, resource: ResourceName<'_>) -> Notice {
        (self.lockspace, self.name) = (cut(resource.lockspace), cut(resource.name));
        self
    }

    fn size(&self) -> usize {
        let owner = self.owner.as_ref().map_or(0, |owner| owner.name.len());
        let names = self.lockspace.len().saturating_add(self.name.len());
        names.saturating_add(owner).saturating_add(self.text.len())
    }
}

fn cut(name: &[u8]) -> Box<[u8]> {
    name.get(..LONGEST_NAME).unwrap_or(name).into()
}

/// The last things that happened, each with its number.
#[derive(Debug, Default)]
pub struct News {
    /// The number of the first one that is kept.
    first: u64,
    kept: VecDeque<Notice>,
    bytes: usize,
}

impl News {
    /// The number of what happens next.
    pub fn next(&self) -> u64 {
        self.first.saturating_add(self.kept.len() as u64)
    }

    /// The number of the first one that is kept.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// What has this number, if it is kept.
    pub fn get(&self, number: u64) -> Option<&Notice> {
        let place = number.checked_sub(self.first)?;
        self.kept.get(usize::try_from(place).ok()?)
    }

    /// Nobody listens any more.
    pub(super) fn forget(&mut self) {
        (self.first, self.bytes) = (self.next(), 0);
        self.kept = VecDeque::new();
    }

    fn push(&mut self, notice: Notice) {
        self.bytes = self.bytes.saturating_add(notice.size());
        self.kept.push_back(notice);
        while self.kept.len() > MOST_KEPT || self.bytes > MOST_BYTES {
            let Some(oldest) = self.kept.pop_front() else {
                return;
            };
            self.bytes = self.bytes.saturating_sub(oldest.size());
            self.first = self.first.saturating_add(1);
        }
    }

    /// Something happened to the daemon itself.
    pub(super) fn tell_of_daemon(&mut self, what: What, text: &str) {
        let mut notice = Notice::of(what, None);
        notice.text = text.as_bytes().into();
        self.push(notice);
    }

    /// An owner did not get a resource, for this reason.
    pub(super) fn tell_of_refusal(
        &mut self,
        owner: &Owner,
        resource: ResourceName<'_>,
        mode: Mode,
        text: &[u8],
    ) {
        self.push(Notice {
            mode: Some(mode),
            text: cut(text),
            ..Notice::of(What::Refused, Some(owner.clone())).about(resource)
        });
    }

    /// An event is about to be applied to this state.
    pub(super) fn tell(&mut self, event: &Event<'_>, state: &State<Open>) {
        match event {
            Event::Granted {
                owner,
                resource,
                mode,
                ..
            } => self.push(Notice {
                mode: Some(*mode),
                ..Notice::of(What::Granted, Some(owner.to_owner())).about(*resource)
            }),
            Event::Joined(owner, resource) => self.push(Notice {
                mode: Some(Mode::Shared),
                ..Notice::of(What::Granted, Some(owner.to_owner())).about(*resource)
            }),
            Event::ReleasedBy(pid, uuid, resource) => {
                let key = OwnerKey {
                    pid: *pid,
                    uuid: Some(*uuid),
                };
                let owner = state.table().owner(key).cloned();
                let owner = owner.unwrap_or_else(|| Owner::unknown(*pid));
                self.push(Notice::of(What::Released, Some(owner)).about(*resource));
            }
            Event::RegisteredAt(number, _) => {
                let client = state.clients.get(number.0);
                let owner = client.and_then(|client| client.owner.as_deref().cloned());
                self.push(Notice::of(What::Registered, owner));
            }
            Event::Fencing(fence) => {
                let before = state.fences().get(&fence.pid).map(|fence| fence.stage);
                match (fence.stage, before) {
                    (Stage::Asked, None) => self.tell_of_all(What::Fenced, fence.pid, state),
                    (Stage::Killed, None | Some(Stage::Asked)) => {
                        self.tell_of_all(What::Killed, fence.pid, state);
                    }
                    _ => (),
                }
            }
            Event::Died(pid) => self.tell_of_all(What::Died, *pid, state),
            _ => (),
        }
    }

    /// Of all that a process stands for.
    fn tell_of_all(&mut self, what: What, pid: Pid, state: &State<Open>) {
        let mut is_known = false;
        for owner in state.table().owners_of(pid).take(MOST_DOMAINS) {
            is_known = true;
            self.push(Notice::of(what, Some(owner.clone())));
        }
        if !is_known {
            self.push(Notice::of(what, Some(Owner::unknown(pid))));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_reads_is_forgotten_from_the_front_and_the_numbers_go_on() {
        let mut news = News::default();
        for number in 0..MOST_KEPT + 10 {
            news.tell_of_daemon(What::Upgraded, &number.to_string());
        }
        assert_eq!((news.first(), news.next()), (10, MOST_KEPT as u64 + 10));
        assert!(news.get(9).is_none());
        assert_eq!(&*news.get(10).unwrap().text, b"10");
        let text = "x".repeat(LONGEST_NAME);
        for _ in 0..MOST_BYTES / LONGEST_NAME + 10 {
            news.tell_of_daemon(What::Upgraded, &text);
        }
        assert!(news.bytes <= MOST_BYTES);
        let next = news.next();
        news.forget();
        assert_eq!((news.first(), news.next(), news.bytes), (next, next, 0));
    }

    #[test]
    fn names_of_domains_count_as_memory_too() {
        let mut news = News::default();
        for number in 0..MOST_KEPT {
            let owner = Owner {
                pid: 1,
                id: number as u32,
                name: vec![b'x'; 65_536].into(),
                uuid: [0; 16],
            };
            let resource = ResourceName {
                lockspace: b"",
                name: b"/d",
            };
            news.tell_of_refusal(&owner, resource, Mode::Exclusive, b"");
        }
        let names = news.kept.iter().filter_map(|it| it.owner.as_ref());
        let lengths: Vec<usize> = names.map(|owner| owner.name.len()).collect();
        assert!(lengths.iter().sum::<usize>() <= MOST_BYTES);
        // One of that length leaves room for others.
        assert!(lengths.len() > 100 && lengths.iter().all(|it| *it == LONGEST_NAME));
    }
}
