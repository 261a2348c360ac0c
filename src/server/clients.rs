//! The clients of one server (the lock server or the admin server): numbers, order, and how many
//! there may be.

use std::collections::BTreeMap;

/// How many clients that speak for owners that are known may be served beyond the limit.
const KNOWN_BEYOND_LIMIT: u32 = 64;

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

/// Limits and clients of a server.
#[derive(Debug)]
pub struct Clients {
    /// The places of the clients that are served, by their numbers: in the order of connecting.
    pub by_id: BTreeMap<u64, usize>,
    /// How many there may be. Never below one: a daemon that nobody can talk to helps nobody.
    pub limit: u32,
    /// How many may be waiting for authentication. None ever is; the number is only kept for the
    /// admin socket.
    pub unauthenticated_limit: u32,
    /// The limit that the configuration gave when it was last read.
    pub configured: Option<u32>,
    /// Thread pool numbers, kept only for the admin socket to show: minimum, maximum, priority.
    /// There are no threads.
    pub workers: [u32; 3],
    /// The number of the next connection, refused ones counted as well.
    pub next_id: u64,
}

impl Clients {
    /// A server without clients.
    pub fn new(limit: u32) -> Clients {
        Clients {
            by_id: BTreeMap::new(),
            limit,
            unauthenticated_limit: limit,
            configured: None,
            workers: [0; 3],
            next_id: 1,
        }
    }

    /// Whether one more may be served.
    pub fn has_room(&self) -> bool {
        u32::try_from(self.by_id.len()).is_ok_and(|count| count < self.limit.max(1))
    }

    /// Whether one more may be served that speaks for an owner that is known.
    pub fn has_room_for_known(&self) -> bool {
        let most = self.limit.max(1).saturating_add(KNOWN_BEYOND_LIMIT);
        u32::try_from(self.by_id.len()).is_ok_and(|count| count < most)
    }

    /// The number for a new connection.
    pub fn take_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id = id.saturating_add(1);
        id
    }

    /// Sets the limit, for both kinds of client, to what the configuration says.
    pub fn configure(&mut self, limit: ClientLimit) {
        self.limit = limit.configured.unwrap_or(limit.default);
        self.unauthenticated_limit = limit.configured.unwrap_or(limit.default_unauthenticated);
        self.configured = limit.configured;
    }

    /// After an upgrade: a limit that the configuration gives now and did not give before is new;
    /// otherwise the limit stays, which may have been set over the admin socket.
    pub fn configure_if_changed(&mut self, limit: ClientLimit) {
        if limit.configured.is_some() && limit.configured != self.configured {
            self.configure(limit);
        }
        self.configured = limit.configured;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_set_over_the_admin_socket_outlives_an_upgrade_unless_the_configuration_changed() {
        let limit = |configured| ClientLimit {
            configured,
            default: 9,
            default_unauthenticated: 9,
        };
        let mut clients = Clients::new(1);
        clients.configure(limit(Some(5)));
        clients.limit = 50;
        clients.configure_if_changed(limit(Some(5)));
        assert_eq!(clients.limit, 50);
        clients.configure_if_changed(limit(None));
        assert_eq!(clients.limit, 50);
        clients.configure_if_changed(limit(Some(6)));
        assert_eq!(clients.limit, 6);
    }

    #[test]
    fn owners_that_are_known_have_some_room_beyond_the_limit() {
        let mut clients = Clients::new(1);
        for number in 0..=u64::from(KNOWN_BEYOND_LIMIT) {
            assert!(clients.has_room_for_known());
            assert_eq!(clients.has_room(), number == 0);
            clients.by_id.insert(number, 0);
        }
        assert!(!clients.has_room_for_known());
    }

    #[test]
    fn a_limit_of_zero_still_lets_one_in() {
        let mut clients = Clients::new(0);
        assert!(clients.has_room());
        clients.by_id.insert(1, 0);
        assert!(!clients.has_room());
        clients.configure(ClientLimit {
            configured: Some(2),
            default: 9,
            default_unauthenticated: 9,
        });
        assert!(clients.has_room());
    }
}
