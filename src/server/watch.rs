//! The poll, and what a readiness event is about: a token's low bits say which kind of thing, the rest
//! which one. The tokens of connections outlive the program: the poll is handed to its successor as it
//! is, so to number them in another way takes a new version of the ledger's format.

use std::os::fd::{AsRawFd, RawFd};

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};

use crate::custody::clients::ClientId;
use crate::locks::table::Pid;

/// The things that can wake the reactor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A signal is pending.
    Signals,
    /// A deadline has passed.
    Timer,
    /// A listening socket, by its place in the daemon's list.
    Listener(usize),
    /// A connection, by its descriptor.
    Connection(ClientId),
    /// A process that is being fenced.
    Fence(Pid),
    /// The program that is being checked before it takes over.
    Successor,
    /// An owner without a connection of its own.
    Watched(Pid),
    /// Whether the service manager has something to keep everything in.
    Store,
    /// A process that works on files of a share.
    Helper(usize),
    /// Something was mounted or unmounted.
    Mounts,
}

const KINDS: usize = 8;

impl Source {
    /// The token to register this source with.
    pub fn token(self) -> Token {
        // Descriptors and process ids are never negative here, and never near the word's size.
        let number = |number: i32| usize::try_from(number).unwrap_or(0);
        let (kind, number) = match self {
            Source::Signals => (0, 0),
            Source::Timer => (1, 0),
            Source::Listener(place) => (2, place),
            Source::Connection(id) => (3, number(id.0)),
            Source::Fence(pid) => (4, number(pid)),
            Source::Successor => (5, 0),
            Source::Watched(pid) => (6, number(pid)),
            Source::Store => (7, 0),
            // There is one source of the first kind.
            Source::Helper(number) => (0, number.wrapping_add(1)),
            // The other things of this kind are one.
            Source::Mounts => (7, 1),
        };
        Token(number.wrapping_mul(KINDS).wrapping_add(kind))
    }

    /// The source of a token.
    pub fn of(token: Token) -> Option<Source> {
        let place = token.0 / KINDS;
        let number = i32::try_from(place).ok()?;
        match token.0 % KINDS {
            0 => Some(match place.checked_sub(1) {
                None => Source::Signals,
                Some(helper) => Source::Helper(helper),
            }),
            1 => Some(Source::Timer),
            2 => Some(Source::Listener(place)),
            3 => Some(Source::Connection(ClientId(number))),
            4 => Some(Source::Fence(number)),
            5 => Some(Source::Successor),
            6 => Some(Source::Watched(number)),
            7 if place == 0 => Some(Source::Store),
            7 => Some(Source::Mounts),
            _ => None,
        }
    }
}

/// Where readiness is asked for.
#[derive(Debug)]
pub struct Watch {
    registry: Registry,
}

impl Watch {
    /// Asks this poll.
    pub fn new(registry: Registry) -> Watch {
        Watch { registry }
    }

    /// Asks to be woken by what can be read from a descriptor. One that is watched already, by an
    /// earlier program perhaps, is looked at anew: what it has to say is said once more.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn add(&self, source: Source, descriptor: RawFd) -> std::io::Result<()> {
        self.add_for(source, descriptor, Interest::READABLE)
    }

    /// Asks to be woken when something unusual is to be heard from a descriptor, which mountinfo says of every
    /// change (proc(5)).
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn add_unusual(&self, source: Source, descriptor: RawFd) -> std::io::Result<()> {
        self.add_for(source, descriptor, Interest::PRIORITY)
    }

    fn add_for(
        &self,
        source: Source,
        descriptor: RawFd,
        interest: Interest,
    ) -> std::io::Result<()> {
        let (token, mut file) = (source.token(), SourceFd(&descriptor));
        match self.registry.register(&mut file, token, interest) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                self.registry.reregister(&mut file, token, interest)
            }
            result => result,
        }
    }

    /// The same of one that most likely is watched already.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn add_again(&self, source: Source, descriptor: RawFd) -> std::io::Result<()> {
        match self.change(source, descriptor, false) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                self.add(source, descriptor)
            }
            result => result,
        }
    }

    /// Asks to be told, or no longer to be told, when a descriptor takes bytes.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn change(&self, source: Source, descriptor: RawFd, writable: bool) -> std::io::Result<()> {
        let mut interest = Interest::READABLE;
        if writable {
            interest |= Interest::WRITABLE;
        }
        self.registry
            .reregister(&mut SourceFd(&descriptor), source.token(), interest)
    }

    /// Asks no more. To be done before a descriptor is closed: a copy of it elsewhere would keep the
    /// registration.
    pub fn remove(&self, descriptor: RawFd) {
        // It may never have been watched.
        let _ = self.registry.deregister(&mut SourceFd(&descriptor));
    }

    /// The poll's descriptor, which a successor goes on with.
    pub fn descriptor(&self) -> RawFd {
        self.registry.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_source_is_found_again_by_its_token() {
        for source in [
            Source::Signals,
            Source::Timer,
            Source::Listener(1),
            Source::Connection(ClientId(0)),
            Source::Connection(ClientId(19_999)),
            Source::Fence(4_194_303),
            Source::Successor,
            Source::Watched(4_194_303),
            Source::Helper(0),
            Source::Helper(7),
            Source::Store,
            Source::Mounts,
        ] {
            assert_eq!(Source::of(source.token()), Some(source));
        }
    }
}
