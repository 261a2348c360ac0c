//! What a reactor that died left of a client: the bytes that were on their way, and at most one call that it
//! was working on. Was that call done? If so it is answered, and not worked on again; if not it is, from the
//! start. The events behind the place where the ledger was before the call say which.
//!
//! | procedure | it is done if the ledger says behind the mark |
//! |---|---|
//! | ACQUIRE_RESOURCE | that the owner was granted this resource, or one more holding of it |
//! | RELEASE_RESOURCE | that the owner released it; then the file is let go, should it still be open |
//! | REGISTER | that this client registered; whom it spoke for before is seen to once more |
//! | RESTRICT | that this client was restricted |
//! | NEW, CREATE_LOCKSPACE | that this lockspace was made (an acquire opens one, too: that is nothing) |
//! | CREATE_RESOURCE, DELETE_RESOURCE | never: a file that is there or gone already is a success |
//! | admin CLIENT_CLOSE | that the connection of the client that was meant is over |
//! | admin CONNECT_DAEMON_SHUTDOWN | that nobody is let in any more, or that a connection is over: the end goes on |
//! | other admin calls that set something | never: to set it once more changes nothing, and orders what follows |
//! | what only asks, what is refused, PING | never: it changed nothing |
//!
//! Of what can be done once more it does not matter that it was done, as nobody else is served before. All of
//! this can be found out again, should this process die of it, too, until the client's slot has the result.

use super::poison;
use crate::custody::Custody;
use crate::custody::clients::{ClientId, Traffic};
use crate::custody::descriptor::Number;
use crate::custody::servers::Service;
use crate::custody::since::{Happened, Held, Since};
use crate::desk::turn::{self as step, Rest, Whose};
use crate::host::shared::Shared;
use crate::locks::lease::Lease;
use crate::locks::place::Place;
use crate::locks::table::{Owner, Resource};
use crate::server::hall::Order;
use crate::wire::frame::{self, Header, Kind, Split};
use crate::wire::{admin, lock};

/// How many reactors try to find out what became of a call. Many more than are killed in a row without a fault
/// of the program: one that is refused after it was done leaves its owner with a lock that nobody told it of.
const TRIES: u64 = 8;

/// What is left of a client.
#[derive(Debug)]
pub struct Recovered {
    /// What it has on its way.
    pub rest: Rest,
    /// Whether a call of it was being worked on.
    pub was_interrupted: bool,
    /// Where a file was being made for that call, which is not done.
    pub making: Option<Making>,
    /// What was given back, and was about to be let go of.
    pub released: Vec<Resource<Lease<Number>>>,
}

/// The place of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Making {
    lockspace: Vec<u8>,
    name: Vec<u8>,
}

impl Making {
    /// The place.
    pub fn place(&self) -> Place<'_> {
        Place {
            lockspace: &self.lockspace,
            name: &self.name,
        }
    }
}

/// What became of the call that was being worked on.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// It is to be worked on.
    Undone,
    /// It is done.
    Done,
    /// It is done, and its connection ends without an answer.
    Over,
}

/// What a dead reactor left of a client, if anything is known of it. What is still to be done before the
/// call that it was working on is answered is done, or ordered.
pub fn recover(
    memory: &Shared,
    whose: Whose,
    id: ClientId,
    custody: &mut Custody,
    since: &mut Since,
    orders: &mut Vec<Order>,
) -> Option<Recovered> {
    let (mut rest, interrupted) = step::rest(memory, whose)?;
    let mut recovered = Recovered {
        rest: Rest::default(),
        was_interrupted: interrupted.is_some(),
        making: None,
        released: Vec::new(),
    };
    if let Some(interrupted) = interrupted
        && let Some(client) = custody.state().client(id)
    {
        if step::is_tried(memory) >= TRIES {
            // Whoever looks at it dies of it.
            rest.deaths = poison::DEADLY;
            recovered.rest = rest;
            return Some(recovered);
        }
        let call = Call::at_front(&rest, client.arrival.server);
        let verdict = match &call {
            Some(call) => call.verdict(id, custody, since, orders),
            None => Verdict::Undone,
        };
        for happened in since.happened.drain(..) {
            if let Happened::Released(_, Some(resource)) = happened {
                recovered.released.push(*resource);
            }
        }
        match (verdict, call) {
            (Verdict::Undone, call) => {
                rest.deaths = rest.deaths.saturating_add(1);
                recovered.making = call
                    .filter(|_| interrupted.making)
                    .and_then(|call| call.making());
            }
            (Verdict::Done, Some(call)) => {
                if matches!(call.lock_call(), Some(lock::Call::Register { .. })) {
                    custody.note_registration(id);
                }
                let (header, length) = (call.header, call.length);
                lock::encode_success(&mut rest.unsent, header);
                rest.pending.drain(..length.min(rest.pending.len()));
                (rest.arrived, rest.deaths) = (0, 0);
            }
            (Verdict::Over | Verdict::Done, _) => {
                rest.pending.clear();
                rest.closing = true;
            }
        }
    }
    recovered.rest = rest;
    Some(recovered)
}

/// The resource that the call which a client waits with gives back, by its lockspace and name.
pub fn gives_back(rest: &Rest, service: Service) -> Option<(Vec<u8>, Vec<u8>)> {
    let call = Call::at_front(rest, service)?;
    match call.lock_call()? {
        lock::Call::ReleaseResource { target, .. } => {
            Some((target.lockspace.to_vec(), target.name.to_vec()))
        }
        _ => None,
    }
}

/// As the next image of the process, or a connection, takes it.
pub fn traffic(rest: &Rest) -> Traffic {
    Traffic {
        pending: rest.pending.clone(),
        descriptors_at_end: rest.descriptors_at_end,
        arrived: rest.arrived,
        unsent: rest.unsent.clone(),
        closing: rest.closing,
    }
}

/// What an earlier image passed on.
pub fn rest(traffic: &Traffic) -> Rest {
    Rest {
        pending: traffic.pending.clone(),
        descriptors_at_end: traffic.descriptors_at_end,
        arrived: traffic.arrived,
        deaths: 0,
        unsent: traffic.unsent.clone(),
        closing: traffic.closing,
    }
}

/// A call, cut out as the conversation does it.
struct Call {
    header: Header,
    arguments: Vec<u8>,
    /// How many bytes it takes of what waits.
    length: usize,
    service: Service,
}

impl Call {
    fn at_front(rest: &Rest, service: Service) -> Option<Call> {
        let Split::Frame(found) = frame::split(&rest.pending, frame::LONGEST) else {
            return None;
        };
        let (program, length) = (found.header.program, found.length);
        let (arguments, length) = match found.header.kind {
            Kind::Call => (found.payload, length),
            Kind::CallWithDescriptors => {
                let (count, arguments) = frame::descriptors(found.payload)?;
                // The byte of the last descriptor may have come with it.
                let with_byte = rest.arrived < count && rest.descriptors_at_end;
                let all = rest.pending.len();
                (arguments, if with_byte { all } else { length })
            }
            _ => return None,
        };
        let is_ours = match service {
            Service::Lock => program == lock::PROGRAM,
            Service::Admin => program == admin::PROGRAM,
        };
        is_ours.then(|| Call {
            header: found.header,
            arguments: arguments.to_vec(),
            length,
            service,
        })
    }

    fn lock_call(&self) -> Option<lock::Call<'_>> {
        let procedure = lock::Procedure::from_number(self.header.procedure)?;
        let call =
            (self.service == Service::Lock).then(|| lock::decode(procedure, &self.arguments));
        call?.ok()
    }

    fn admin_call(&self) -> Option<admin::Call<'_>> {
        let procedure = admin::Procedure::from_number(self.header.procedure)?;
        let call =
            (self.service == Service::Admin).then(|| admin::decode(procedure, &self.arguments));
        call?.ok()
    }

    /// The place of the file that an acquire was making.
    fn making(&self) -> Option<Making> {
        match self.lock_call()? {
            lock::Call::AcquireResource { target, .. } => Some(Making {
                lockspace: target.lockspace.to_vec(),
                name: target.name.to_vec(),
            }),
            _ => None,
        }
    }

    fn verdict(
        &self,
        id: ClientId,
        custody: &Custody,
        since: &Since,
        orders: &mut Vec<Order>,
    ) -> Verdict {
        let owner = custody
            .state()
            .client(id)
            .and_then(|it| it.owner.as_deref());
        let any = |is_it: &dyn Fn(&Happened) -> bool| since.happened.iter().any(is_it);
        let is_done = if let Some(call) = self.lock_call() {
            match call {
                lock::Call::AcquireResource { target, .. } => {
                    let held = held(owner, target);
                    any(&|it| matches!(it, Happened::Acquired(by) if Some(by) == held.as_ref()))
                }
                lock::Call::ReleaseResource { target, .. } => {
                    let held = held(owner, target);
                    any(&|it| matches!(it, Happened::Released(by, _) if Some(by) == held.as_ref()))
                }
                lock::Call::Register { .. } => {
                    let before = since.happened.iter().find_map(|it| match it {
                        Happened::Registered(Number(number), before) if *number == id.0 => {
                            Some(before)
                        }
                        _ => None,
                    });
                    if let Some(Some(before)) = before {
                        orders.push(Order::Spoke(id, (before.pid, before.uuid)));
                    }
                    before.is_some()
                }
                lock::Call::Restrict { .. } => {
                    any(&|it| matches!(it, Happened::Restricted(Number(it)) if *it == id.0))
                }
                lock::Call::New { path, .. } | lock::Call::CreateLockspace { path } => {
                    any(&|it| matches!(it, Happened::Lockspace(made) if made == path))
                }
                lock::Call::CreateResource { .. } | lock::Call::DeleteResource { .. } => false,
            }
        } else {
            match self.admin_call() {
                Some(admin::Call::ClientClose { client, .. }) => any(&|it| {
                    let Happened::Leaving(Number(number)) = it else {
                        return false;
                    };
                    let left = custody.state().client(ClientId(*number));
                    left.is_some_and(|left| {
                        let arrival = &left.arrival;
                        arrival.server.name().as_bytes() == client.server && arrival.id == client.id
                    })
                }),
                Some(admin::Call::ConnectDaemonShutdown { .. }) => {
                    if any(&|it| matches!(it, Happened::Deaf | Happened::Leaving(_))) {
                        orders.push(Order::Stop);
                        return Verdict::Over;
                    }
                    false
                }
                _ => false,
            }
        };
        if is_done {
            Verdict::Done
        } else {
            Verdict::Undone
        }
    }
}

fn held(owner: Option<&Owner>, target: lock::Target<'_>) -> Option<Held> {
    let owner = owner?;
    Some(Held {
        pid: owner.pid,
        uuid: owner.uuid,
        lockspace: target.lockspace.to_vec(),
        name: target.name.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::custody::clients::Arrival;
    use crate::custody::ledger::Ledger;
    use crate::desk::{self, Desk};
    use crate::host::names::Names;
    use crate::server::clients::turn::whose;
    use crate::server::deadlines::Deadlines;
    use crate::server::flow::Flow;
    use crate::server::ground::Ground;
    use crate::server::hall::Hall;
    use crate::server::reserve::Reserve;
    use crate::server::services::dispatch;
    use crate::server::shares::Shares;
    use crate::server::waiting_room::WaitingRoom;
    use crate::wire::lock::AUTOCREATE;

    /// A daemon that dies between a call and its answer.
    struct Fixture {
        custody: Custody,
        desk: Desk,
        lock: (ClientId, Whose),
        admin: (ClientId, Whose),
        _other_ends: Vec<UnixStream>,
        directory: std::path::PathBuf,
    }

    impl Fixture {
        fn new(name: &str) -> Fixture {
            let mut custody = Custody::new(Ledger::new().unwrap());
            let mut others = Vec::new();
            let mut connect = |service| {
                let (ours, theirs) = UnixStream::pair().unwrap();
                let id = ClientId(ours.as_raw_fd());
                let arrival = Arrival {
                    server: service,
                    id: custody.take_id(service),
                    peer: None,
                    start_time: None,
                    connected_at: 0,
                    refused: false,
                };
                custody.connected(OwnedFd::from(ours), arrival);
                others.push(theirs);
                (id, whose(id, service, arrival.id))
            };
            let (lock, admin) = (connect(Service::Lock), connect(Service::Admin));
            let name = format!("virtlockd-recovery-{name}-{}", std::process::id());
            let directory = std::env::temp_dir().join(name);
            std::fs::create_dir(&directory).unwrap();
            Fixture {
                custody,
                desk: Desk::new(desk::size(4096)).unwrap(),
                lock,
                admin,
                _other_ends: others,
                directory,
            }
        }

        /// Works on a frame, if `is_done`; what the next reactor finds of it, and what it orders.
        fn dies(
            &mut self,
            (id, whose): (ClientId, Whose),
            bytes: &[u8],
            is_done: bool,
        ) -> (Recovered, Vec<Order>) {
            let memory = self.desk.memory();
            let waiting = Rest {
                pending: bytes.to_vec(),
                ..Rest::default()
            };
            let mut places = desk::slot::Places::find(memory, None);
            assert!(step::settle(memory, &mut places, whose, &waiting));
            step::begin(memory, whose);
            step::frame_begins(memory, 0, self.custody.mark());
            if is_done {
                let Split::Frame(found) = frame::split(bytes, frame::LONGEST) else {
                    panic!("it is a frame");
                };
                let mut out = Vec::new();
                let mut hall = Hall {
                    custody: &mut self.custody,
                    waiting: &mut WaitingRoom::new(true),
                    deadlines: &mut Deadlines::default(),
                    reserve: &Reserve::default(),
                    names: &mut Names::default(),
                    ground: &mut Ground::default(),
                    orders: &mut Vec::new(),
                    leases: &mut Vec::new(),
                    shares: &mut Shares::default(),
                    own_seen: crate::custody::own_connections::Seen::default(),
                    making: step::making(memory),
                };
                let flow = dispatch::dispatch(&mut hall, id, found.header, found.payload, &mut out);
                assert_eq!(flow, Flow::Continue);
                assert_eq!(out.get(24..28), Some(&[0; 4][..]), "it succeeds");
            }
            let memory = self.desk.memory();
            let mark = step::ledger_before(memory);
            assert!(mark.is_some());
            let file = self.custody.ledger().unwrap().try_clone().unwrap();
            let (_, _, mut since) = Ledger::take_over_since(file, mark).unwrap();
            let mut orders = Vec::new();
            let custody = &mut self.custody;
            let found = recover(memory, whose, id, custody, &mut since, &mut orders);
            (found.unwrap(), orders)
        }

        fn lock_dies(&mut self, call: &lock::Call<'_>, is_done: bool) -> Recovered {
            let mut bytes = Vec::new();
            call.encode(&mut bytes, 7);
            self.dies(self.lock, &bytes, is_done).0
        }
    }

    impl Drop for Fixture {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.directory);
        }
    }

    #[track_caller]
    fn assert_done(recovered: &Recovered) {
        let rest = &recovered.rest;
        assert!(recovered.was_interrupted && rest.pending.is_empty());
        let Split::Frame(reply) = frame::split(&rest.unsent, frame::LONGEST) else {
            panic!("no answer: {rest:?}");
        };
        assert_eq!((reply.length, reply.header.serial), (rest.unsent.len(), 7));
        assert_eq!((reply.header.status, reply.payload), (0, &b""[..]));
    }

    #[track_caller]
    fn assert_undone(recovered: &Recovered) {
        let rest = &recovered.rest;
        assert!(recovered.was_interrupted && !rest.pending.is_empty() && rest.unsent.is_empty());
        assert_eq!(rest.deaths, 1);
    }

    #[test]
    fn a_lock_call_that_was_done_is_answered_and_one_that_was_not_waits_again() {
        let mut fixture = Fixture::new("lock");
        let disk = fixture.directory.join("disk");
        std::fs::write(&disk, "").unwrap();
        let disk = disk.as_os_str().as_bytes().to_vec();
        let space = fixture.directory.join("space");
        let space = space.as_os_str().as_bytes().to_vec();
        let on_disk = lock::Target {
            lockspace: b"",
            name: &disk,
        };
        let in_space = lock::Target {
            lockspace: &space,
            name: b"file",
        };
        let calls = [
            lock::Call::Register {
                uuid: &[1; 16],
                name: b"guest",
                id: 7,
                pid: 4_999_999,
                flags: 0,
            },
            lock::Call::New {
                path: &space,
                flags: 0,
            },
            lock::Call::AcquireResource {
                target: on_disk,
                flags: 0,
            },
            lock::Call::AcquireResource {
                target: in_space,
                flags: AUTOCREATE | lock::SHARED,
            },
            lock::Call::AcquireResource {
                target: in_space,
                flags: AUTOCREATE | lock::SHARED,
            },
            lock::Call::ReleaseResource {
                target: on_disk,
                flags: 0,
            },
            lock::Call::ReleaseResource {
                target: in_space,
                flags: 0,
            },
            lock::Call::Restrict { flags: 0 },
        ];
        for call in &calls {
            assert_undone(&fixture.lock_dies(call, false));
            assert_done(&fixture.lock_dies(call, true));
        }
    }

    #[test]
    fn a_call_of_which_reactors_die_as_they_look_at_it_is_refused_in_the_end() {
        let mut fixture = Fixture::new("looks");
        let recovered = fixture.lock_dies(&lock::Call::Restrict { flags: 0 }, false);
        assert_eq!(recovered.rest.deaths, 1);
        let (id, whose) = fixture.lock;
        let mut look = || {
            let file = fixture.custody.ledger().unwrap().try_clone().unwrap();
            let mark = step::ledger_before(fixture.desk.memory());
            let (_, _, mut since) = Ledger::take_over_since(file, mark).unwrap();
            let (memory, custody) = (fixture.desk.memory(), &mut fixture.custody);
            recover(memory, whose, id, custody, &mut since, &mut Vec::new()).unwrap()
        };
        for _ in 1..TRIES {
            assert_eq!(look().rest.deaths, 1);
        }
        let refused = look();
        assert!(poison::is_deadly(refused.rest.deaths) && refused.was_interrupted);
        assert_eq!(refused.rest.pending, recovered.rest.pending);
    }

    #[test]
    fn a_client_that_was_closed_on_demand_is_not_looked_for_again() {
        let mut fixture = Fixture::new("admin");
        let mut bytes = Vec::new();
        // Connections are numbered from 1.
        let meant = admin::ClientName {
            server: b"virtlockd",
            id: 1,
        };
        let call = admin::Call::ClientClose {
            client: meant,
            flags: 0,
        };
        call.encode(&mut bytes, 7);
        let admin = fixture.admin;
        assert_undone(&fixture.dies(admin, &bytes, false).0);
        let memory = fixture.desk.memory();
        let mark = step::ledger_before(memory);
        let lock = fixture.lock.0;
        assert!(fixture.custody.leaves(lock), "the order is carried out");
        let file = fixture.custody.ledger().unwrap().try_clone().unwrap();
        let (_, _, mut since) = Ledger::take_over_since(file, mark).unwrap();
        let mut orders = Vec::new();
        let custody = &mut fixture.custody;
        let found = recover(memory, admin.1, admin.0, custody, &mut since, &mut orders);
        assert_done(&found.unwrap());
        assert_eq!(orders, []);
    }
}
