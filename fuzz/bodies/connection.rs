//! A daemon with four connections, three to the lock socket and one to the admin socket: bytes in,
//! replies out. There is room for two on each socket. After each step every call has had its one
//! reply, the table is sound, the kernel has the locks that the table says, nobody waits where there
//! is room, and replaying the ledger gives the daemon's state.
//!
//! Nothing is killed: the peers cannot be seen, as those of another pid namespace (pid 0). The one
//! call that is left out is the daemon's shutdown, which may start a program.
//!
//! Input, again and again: a byte that says what to do, and what it is done with. Bits 0 and 1 of
//! that byte choose the connection. If bit 5 is set, four bytes follow that choose a lock call and
//! its arguments (see [`call`]), because long sequences of good calls do not come about by chance.
//! Otherwise two bytes with a length follow, low byte first, and as many bytes for the connection.
//! Bit 2: descriptors come with the last of them. Bit 3: the connection ends afterwards; bit 4: its
//! owner dies afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use virtlockd::host::file::{self, Conflict, LockType, Start};
use virtlockd::host::stream::Peer;
use virtlockd::locks::table::{Mode, Owner, OwnerKey};
use virtlockd::restart::event::Event;
use virtlockd::restart::ledger::{self, Ledger};
use virtlockd::restart::state::{ClientState, ResourceState, Service, State};
use virtlockd::server::connection::{Connection, NoRoom, Phase};
use virtlockd::server::conversation::{Flow, Taken};
use virtlockd::server::daemon::Daemon;
use virtlockd::server::dispatch;
use virtlockd::wire::error;
use virtlockd::wire::frame::{self, HEADER, Header, Kind, LONGEST, STATUS_ERROR, STATUS_OK, Split};
use virtlockd::wire::lock::{self, Call, LONGEST_FRAME, Procedure, Target};
use virtlockd::wire::{admin, keepalive};

use super::log_reader;
use super::reference;
use super::world::{self, World};

/// The answer to every PING, written out: the code under test must not vouch for itself.
const PONG: &[u8] = b"\0\0\0\x1ckeep\0\0\0\x01\0\0\0\x02\0\0\0\x02\0\0\0\0\0\0\0\0";

const SERVICES: [Service; 4] = [Service::Lock, Service::Lock, Service::Admin, Service::Lock];

struct Run<'a> {
    world: &'a World,
    daemon: Daemon,
    /// Where the connections are.
    places: [usize; SERVICES.len()],
    /// The clients' ends of the sockets.
    clients: Vec<UnixStream>,
    /// The ledger when it was last replayed, and what it said.
    replayed: (Vec<u8>, Lasting),
}

pub fn run(data: &[u8]) {
    log_reader::install();
    world::with(|world| {
        let poll = mio::Poll::new().expect("a poll");
        let registry = poll.registry().try_clone().expect("its registry");
        let mut daemon = Daemon::new(registry, Ledger::new().expect("a ledger"));
        for service in Service::ALL {
            // One of the three on the lock socket has to wait until another has ended.
            daemon.clients_mut(service).limit = 2;
            daemon.note_server(service);
        }
        let mut run = Run {
            world,
            daemon,
            places: [usize::MAX; SERVICES.len()],
            clients: Vec::new(),
            replayed: (Vec::new(), Lasting::of(State::default())),
        };
        run.connect_missing();
        run.check();
        run.steps(data);
        run.end();
    });
}

impl Run<'_> {
    fn connect_missing(&mut self) {
        for (number, service) in SERVICES.into_iter().enumerate() {
            if self.daemon.connections.contains(self.places[number]) {
                continue;
            }
            let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
            self.clients.push(theirs);
            let clients = self.daemon.clients_mut(service);
            let id = clients.take_id();
            let has_room = clients.has_room();
            let peer = Peer {
                pid: 0,
                uid: 0,
                gid: 0,
            };
            let phase = if has_room {
                Phase::Served
            } else {
                Phase::Refused(NoRoom::Limit)
            };
            let connection = Connection::new(OwnedFd::from(ours), service, id, peer, phase);
            let place = self.daemon.connections.insert(connection);
            self.daemon.note_connected(place);
            if has_room {
                self.daemon.clients_mut(service).by_id.insert(id, place);
            } else {
                self.daemon.wait_for_first_call(place, id);
            }
            self.places[number] = place;
        }
    }

    fn steps(&mut self, mut data: &[u8]) {
        while let Some((&what, rest)) = data.split_first() {
            let place = self.places[usize::from(what & 3)];
            if what & 32 != 0 {
                let Some((choices, rest)) = rest.split_first_chunk() else {
                    return;
                };
                data = rest;
                self.take_in(place, &call(choices), false);
            } else {
                let Some(([low, high], rest)) = rest.split_first_chunk() else {
                    return;
                };
                let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
                let (bytes, rest) = rest.split_at(length);
                data = rest;
                self.take_in(place, bytes, what & 4 != 0);
            }
            if what & 16 != 0 {
                self.owner_dies(place);
            }
            if what & 8 != 0 {
                self.daemon.end_connection(place);
            }
            while let Some(place) = self.daemon.ending.pop_front() {
                self.daemon.clear_away(place);
            }
            // Before anybody else can take the room.
            self.check_clients();
            self.connect_missing();
            self.check();
        }
    }

    fn take_in(&mut self, place: usize, mut bytes: &[u8], descriptors: bool) {
        let world = self.world;
        let daemon = &mut self.daemon;
        let connection = &mut daemon.connections[place];
        let service = connection.service;
        let longest = match service {
            Service::Lock => LONGEST_FRAME,
            Service::Admin => LONGEST,
        };
        let mut conversation = connection.take_conversation();
        loop {
            let mut out = Vec::new();
            let with_descriptors = descriptors && !bytes.is_empty();
            let taken =
                conversation.take_in(bytes, with_descriptors, longest, |header, payload| {
                    let Some(payload) = harmless(world, service, header, payload) else {
                        return Flow::Continue;
                    };
                    let before = out.len();
                    let flow = dispatch::dispatch(daemon, place, header, &payload, &mut out);
                    check_reply(service, header, flow, &out[before..]);
                    if daemon.connections[place].phase == Phase::Over {
                        return Flow::Close;
                    }
                    flow
                });
            match taken {
                Taken::All => break,
                Taken::Close => {
                    daemon.end_connection(place);
                    break;
                }
                Taken::Paused => bytes = &[],
            }
        }
        daemon.connections[place].keep_conversation(conversation);
    }

    /// The owner that this connection registered dies.
    fn owner_dies(&mut self, place: usize) {
        let Some(owner) = self.daemon.connections[place].session.owner() else {
            return;
        };
        let pid = owner.pid;
        self.daemon.keeper.end_owner(pid);
        self.daemon.ledger.note(&Event::OwnerEnded { pid });
        assert!(!self.daemon.keeper.table().holds(pid));
    }

    fn check(&mut self) {
        self.daemon.tend_ledger();
        self.check_table();
        self.check_clients();
        assert!(!self.daemon.ledger.is_stale());
        if self.replayed.0 != self.daemon.ledger.content() {
            let content = self.daemon.ledger.content();
            let state = ledger::replay(content).expect("the ledger replays");
            self.replayed = (content.to_vec(), Lasting::of(state));
        }
        assert_eq!(self.replayed.1, Lasting::of(self.daemon.state()));
    }

    fn check_table(&self) {
        let table = self.daemon.keeper.table();
        let mut files = BTreeSet::new();
        let mut held_by: BTreeMap<OwnerKey, usize> = BTreeMap::new();
        for (id, resource) in table.iter() {
            let identity = resource.identity;
            assert!(
                files.insert((identity.device, identity.inode)),
                "a file held twice"
            );
            assert_eq!(table.find_file(identity), Some(id));
            assert_eq!(file::identity(&resource.lease.descriptor), Ok(identity));
            let holders: Vec<(OwnerKey, u32)> = resource.holders().collect();
            assert!(!holders.is_empty() && holders.iter().all(|(_, times)| *times > 0));
            if resource.mode == Mode::Exclusive {
                assert_eq!(holders[0].1, 1);
                assert_eq!(holders.len(), 1);
            }
            for (owner, _) in holders {
                *held_by.entry(owner).or_default() += 1;
            }
            check_kernel(&resource.lease.descriptor, resource.mode);
        }
        let owners: BTreeSet<OwnerKey> = table.owners().map(Owner::key).collect();
        assert!(owners.iter().eq(held_by.keys()));
        for (owner, held) in held_by {
            assert_eq!(table.held_by(owner), held);
            assert!(table.holds(owner.pid));
        }
    }

    /// Whoever is served is counted, and nobody waits where there is room.
    fn check_clients(&self) {
        for service in Service::ALL {
            let mut served = BTreeMap::new();
            let clients = self.daemon.clients(service);
            for (place, connection) in &self.daemon.connections {
                if connection.service != service {
                    continue;
                }
                match connection.phase {
                    Phase::Served => assert_eq!(served.insert(connection.id, place), None),
                    Phase::Refused(_) => assert!(!clients.has_room(), "there is room for it"),
                    Phase::Closing | Phase::Over => panic!("{:?} is left", connection.phase),
                }
            }
            assert_eq!(clients.by_id, served);
        }
    }

    fn end(&mut self) {
        let processes: Vec<i32> = self.daemon.keeper.table().processes().collect();
        for pid in processes {
            self.daemon.keeper.end_owner(pid);
        }
        assert!(self.daemon.keeper.table().is_empty());
    }
}

/// A lock call, as the four bytes choose it: the procedure, the lockspace, the name, the flags. For
/// a registration the last three are the domain's id, the process, and the name.
fn call(&[procedure, lockspace, name, flags]: &[u8; 4]) -> Vec<u8> {
    const NAMES: [&[u8]; 12] = [
        b"x", b"./x", b"link", b"out", b"new", b"sub/y", b"sub", b"", b"up/x", b"../x", b"/x",
        b"a/../x",
    ];
    let name_in_directory = NAMES[usize::from(name) % NAMES.len()];
    let lockspace = &[lockspace][usize::from(lockspace % 3 == 0)..];
    let target = Target {
        lockspace,
        name: if lockspace.is_empty() {
            std::slice::from_ref(&name)
        } else {
            name_in_directory
        },
    };
    let flags_word = u32::from(flags);
    // Most calls are good ones, and most of those take and give back locks.
    let call = match procedure % 12 {
        0 => Call::Register {
            uuid: &[7; 16],
            name: &[flags],
            id: u32::from(lockspace.len() as u8),
            pid: i32::from(name % 3),
            flags: 0,
        },
        1 => Call::Restrict {
            flags: flags_word / 128,
        },
        2 => Call::New {
            path: lockspace,
            flags: flags_word / 128,
        },
        3 => Call::CreateResource {
            target,
            flags: flags_word / 128,
        },
        4 => Call::DeleteResource {
            target,
            flags: flags_word / 128,
        },
        5..=8 => Call::AcquireResource {
            target,
            flags: flags_word % 4,
        },
        9 | 10 => Call::ReleaseResource { target, flags: 0 },
        _ => Call::CreateLockspace { path: lockspace },
    };
    let mut frame = Vec::new();
    call.encode(&mut frame, 1);
    frame
}

/// A second open file of a locked file sees the lock.
fn check_kernel(descriptor: &impl AsRawFd, mode: Mode) {
    let path = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
    let second = file::open_existing(Start::Anywhere, path.as_bytes()).expect("a second open file");
    let sees = |kind| file::conflict(&second, kind).expect("ask for a lock");
    assert_eq!(sees(LockType::Write), Conflict::OpenFile);
    let read = match mode {
        Mode::Exclusive => Conflict::OpenFile,
        Mode::Shared => Conflict::None,
    };
    assert_eq!(sees(LockType::Read), read);
}

/// The arguments with harmless names. `None` for a call that is not to be made at all.
fn harmless(world: &World, service: Service, header: Header, payload: &[u8]) -> Option<Vec<u8>> {
    let unchanged = Some(payload.to_vec());
    match service {
        Service::Admin => {
            let shutdown = admin::Procedure::ConnectDaemonShutdown as i32;
            if header.procedure == shutdown {
                None
            } else {
                unchanged
            }
        }
        Service::Lock => {
            let Some(procedure) = Procedure::from_number(header.procedure) else {
                return unchanged;
            };
            match lock::decode(procedure, payload) {
                Ok(call) => Some(world.rename(call).split_off(HEADER)),
                Err(_) => unchanged,
            }
        }
    }
}

/// A call has one reply, a PING one PONG, anything else none.
fn check_reply(service: Service, header: Header, flow: Flow, reply: &[u8]) {
    let is_ping = keepalive::is_ours(&header) && header.procedure == keepalive::PING;
    if is_ping {
        assert_eq!(reply, PONG);
        return;
    }
    if !matches!(header.kind, Kind::Call | Kind::CallWithDescriptors) {
        assert!(reply.is_empty());
        return;
    }
    if reply.is_empty() {
        // Only an admin client may be closed without a word: the reply could not be read.
        assert_eq!((service, flow), (Service::Admin, Flow::Close));
        return;
    }
    let Split::Frame(frame) = frame::split(reply, LONGEST) else {
        panic!("the reply is no frame");
    };
    assert_eq!(frame.length, reply.len(), "more than one reply");
    assert_eq!(frame.header, header.reply(frame.header.status));
    match (frame.header.status, service) {
        (STATUS_OK, Service::Lock) => assert!(frame.payload.is_empty()),
        (STATUS_OK, Service::Admin) => {
            let items = reference::admin_result(header.procedure);
            let result = reference::canonical(items, frame.payload);
            assert_eq!(result.as_deref(), Some(frame.payload), "{header:?}");
        }
        (STATUS_ERROR, _) => {
            let error = error::decode(frame.payload).expect("an error object");
            assert!(error.message.is_some_and(|message| !message.is_empty()));
        }
        (status, _) => panic!("a reply with status {status}"),
    }
}

/// What of a state outlives the process, in an order that does not depend on its history. Bytes on
/// their way are written down at a handover only.
#[derive(Debug, PartialEq)]
struct Lasting {
    clients: BTreeMap<i32, ClientState>,
    lockspaces: BTreeSet<Vec<u8>>,
    resources: BTreeMap<(Vec<u8>, Vec<u8>), ResourceState>,
    fences: usize,
    limits: [u32; 2],
    idle_timeout_s: u32,
}

impl Lasting {
    fn of(state: State) -> Lasting {
        let resources = state.resources.into_iter().map(|mut resource| {
            resource.holders.sort_by_key(|(owner, _)| owner.pid);
            (
                (resource.lockspace.clone(), resource.name.clone()),
                resource,
            )
        });
        let clients = state.clients.into_iter().map(|mut client| {
            client.traffic = Default::default();
            (client.descriptor, client)
        });
        Lasting {
            clients: clients.collect(),
            lockspaces: state.lockspaces.into_iter().collect(),
            resources: resources.collect(),
            fences: state.fences.len(),
            limits: [state.lock_server.limit, state.admin_server.limit],
            idle_timeout_s: state.process.idle_timeout_s,
        }
    }
}
