//! The clients of one server (the lock server or the admin server): numbers, order, and how many
//! there may be.

use std::collections::BTreeMap;

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

    /// The number for a new connection.
    pub fn take_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id = id.saturating_add(1);
        id
    }

    /// Sets a configured limit for both kinds of client.
    pub fn set_limit(&mut self, limit: u32) {
        self.limit = limit;
        self.unauthenticated_limit = limit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_of_zero_still_lets_one_in() {
        let mut clients = Clients::new(0);
        assert!(clients.has_room());
        clients.by_id.insert(1, 0);
        assert!(!clients.has_room());
        clients.set_limit(2);
        assert!(clients.has_room());
    }
}
