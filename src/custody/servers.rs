//! The two servers: their numbers, which the admin socket shows and sets, and the sockets that clients
//! connect to.

use serde::{Deserialize, Serialize};

use super::descriptor::Descriptor;

/// How many clients that speak for owners that are known may be served beyond the limit.
const KNOWN_BEYOND_LIMIT: u32 = 64;

/// Which of the two servers: each has its sockets, its clients and its program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Service {
    /// The lock server, for libvirt's drivers.
    Lock,
    /// The admin server, for virt-admin.
    Admin,
}

impl Service {
    /// Both.
    pub const ALL: [Service; 2] = [Service::Lock, Service::Admin];

    /// The server's name, as the admin socket and the C daemon's state document give it.
    pub fn name(self) -> &'static str {
        match self {
            Service::Lock => "virtlockd",
            Service::Admin => "admin",
        }
    }
}

/// A value for each server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Both<T> {
    lock: T,
    admin: T,
}

impl<T> Both<T> {
    /// One for the lock server, one for the admin server.
    pub fn new(lock: T, admin: T) -> Both<T> {
        Both { lock, admin }
    }

    /// One server's.
    pub fn of(&self, service: Service) -> &T {
        match service {
            Service::Lock => &self.lock,
            Service::Admin => &self.admin,
        }
    }

    /// One server's, to change it.
    pub fn of_mut(&mut self, service: Service) -> &mut T {
        match service {
            Service::Lock => &mut self.lock,
            Service::Admin => &mut self.admin,
        }
    }
}

/// What limits the clients of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientLimit {
    /// What the configuration says.
    pub configured: Option<u32>,
    /// What counts if it says nothing.
    pub default: u32,
    /// What is shown then as the limit of clients that wait for authentication. It is libvirt's
    /// default: the admin socket refuses a limit below it, and takes one above.
    pub default_unauthenticated: u32,
}

/// A server's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Server {
    /// How many clients there may be. Whatever it says, one may always be served: a daemon that
    /// nobody can talk to helps nobody.
    pub limit: u32,
    /// How many may be waiting for authentication. None ever is; the number is only kept for the
    /// admin socket.
    pub unauthenticated_limit: u32,
    /// The limit that the configuration gave when it was last read; `None` if it gave none. As
    /// long as it gives the same, a limit that was set over the admin socket stays.
    pub configured: Option<u32>,
    /// The number of the next connection, refused ones counted as well.
    pub next_id: u64,
    /// Thread pool numbers, kept only for the admin socket to show: minimum, maximum, priority.
    /// There are no threads.
    pub workers: [u32; 3],
}

impl Default for Server {
    fn default() -> Self {
        Server {
            limit: 0,
            unauthenticated_limit: 0,
            configured: None,
            next_id: 1,
            workers: [0; 3],
        }
    }
}

impl Server {
    /// Whether one more may be served beside `count` others.
    pub fn has_room_beside(&self, count: usize) -> bool {
        u32::try_from(count).is_ok_and(|count| count < self.limit.max(1))
    }

    /// Whether one more may be served beside `count` others that speaks for an owner that is known.
    pub fn has_room_for_known_beside(&self, count: usize) -> bool {
        let most = self.limit.max(1).saturating_add(KNOWN_BEYOND_LIMIT);
        u32::try_from(count).is_ok_and(|count| count < most)
    }

    /// The numbers with the limit, for both kinds of client, that the configuration gives.
    #[must_use]
    pub fn configured(self, limit: ClientLimit) -> Server {
        Server {
            limit: limit.configured.unwrap_or(limit.default),
            unauthenticated_limit: limit.configured.unwrap_or(limit.default_unauthenticated),
            configured: limit.configured,
            ..self
        }
    }

    /// After an upgrade: a limit that the configuration gives now and did not give before is new;
    /// otherwise the limit stays, which may have been set over the admin socket.
    #[must_use]
    pub fn configured_if_changed(self, limit: ClientLimit) -> Server {
        if limit.configured.is_some() && limit.configured != self.configured {
            self.configured(limit)
        } else {
            Server {
                configured: limit.configured,
                ..self
            }
        }
    }
}

/// A socket that clients connect to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listening<D> {
    /// Which server's.
    pub server: Service,
    /// The socket.
    pub socket: D,
    /// Its file, if the daemon removes it at the end.
    pub path: Option<Vec<u8>>,
}

impl<D: Descriptor> Listening<D> {
    /// As the ledger has it.
    pub fn by_number(&self) -> Listening<super::descriptor::Number> {
        Listening {
            server: self.server,
            socket: self.socket.number(),
            path: self.path.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(configured: Option<u32>) -> ClientLimit {
        ClientLimit {
            configured,
            default: 9,
            default_unauthenticated: 9,
        }
    }

    #[test]
    fn a_limit_set_over_the_admin_socket_outlives_an_upgrade_unless_the_configuration_changed() {
        let mut server = Server::default().configured(limit(Some(5)));
        server.limit = 50;
        let server = server.configured_if_changed(limit(Some(5)));
        assert_eq!(server.limit, 50);
        let server = server.configured_if_changed(limit(None));
        assert_eq!(server.limit, 50);
        assert_eq!(server.configured_if_changed(limit(Some(6))).limit, 6);
    }

    #[test]
    fn owners_that_are_known_have_some_room_beyond_the_limit() {
        let server = Server::default();
        let most = KNOWN_BEYOND_LIMIT as usize;
        assert!(server.has_room_for_known_beside(most));
        assert!(!server.has_room_for_known_beside(most + 1));
    }

    #[test]
    fn a_limit_of_zero_still_lets_one_in() {
        let server = Server::default();
        assert!(server.has_room_beside(0));
        assert!(!server.has_room_beside(1));
        assert!(server.configured(limit(Some(2))).has_room_beside(1));
    }
}
