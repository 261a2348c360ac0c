//! What a readiness event is about: a token's low bits say which kind of thing, the rest which one.
//! The tokens of connections outlive the program: the poll is handed to its successor as it is, so to
//! number them in another way takes a new version of the ledger's format.

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};

/// The things that can wake the reactor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A signal is pending.
    Signals,
    /// A deadline has passed.
    Timer,
    /// A listening socket, by its place in the daemon's list.
    Listener(usize),
    /// A connection, by its place in the slab.
    Connection(usize),
    /// A process that is being fenced, by its place in the slab of fences.
    Fence(usize),
    /// The program that is being checked before it takes over.
    Successor,
    /// The process of an owner without a connection of its own, by its place in the slab of those.
    Watched(usize),
}

const KINDS: usize = 8;

impl Source {
    /// The token to register this source with.
    pub fn token(self) -> Token {
        let (kind, number) = match self {
            Source::Signals => (0, 0),
            Source::Timer => (1, 0),
            Source::Listener(number) => (2, number),
            Source::Connection(number) => (3, number),
            Source::Fence(number) => (4, number),
            Source::Successor => (5, 0),
            Source::Watched(number) => (6, number),
        };
        // Numbers are places in slabs of descriptors: they never come near the word's size.
        Token(number.wrapping_mul(KINDS).wrapping_add(kind))
    }

    /// Asks to be woken by what can be read from a descriptor. One that is watched already, by an
    /// earlier program perhaps, is looked at anew: what it has to say is said once more.
    pub fn watch(self, registry: &Registry, descriptor: i32) -> std::io::Result<()> {
        let (token, interest) = (self.token(), Interest::READABLE);
        match registry.register(&mut SourceFd(&descriptor), token, interest) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                registry.reregister(&mut SourceFd(&descriptor), token, interest)
            }
            result => result,
        }
    }

    /// The source of a token.
    pub fn of(token: Token) -> Option<Source> {
        let number = token.0 / KINDS;
        match token.0 % KINDS {
            0 => Some(Source::Signals),
            1 => Some(Source::Timer),
            2 => Some(Source::Listener(number)),
            3 => Some(Source::Connection(number)),
            4 => Some(Source::Fence(number)),
            5 => Some(Source::Successor),
            6 => Some(Source::Watched(number)),
            _ => None,
        }
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
            Source::Connection(0),
            Source::Connection(19_999),
            Source::Fence(3),
            Source::Successor,
            Source::Watched(2),
        ] {
            assert_eq!(Source::of(source.token()), Some(source));
        }
    }
}
