//! A daemon with four connections, three to the lock socket and one to the admin socket: bytes in,
//! replies out. There is room for two on each socket. After each step every call has had its one
//! reply, the table is sound, the kernel has the locks that the table says, and nobody waits where there
//! is room. After each call, and whatever else changes what lasts, the ledger, read, says what is.
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

use virtlockd::custody::Custody;
use virtlockd::custody::clients::{Arrival, ClientId, Standing};
use virtlockd::custody::ledger::Ledger;
use virtlockd::custody::own_connections::Seen;
use virtlockd::custody::servers::{Server, Service};
use virtlockd::desk::{Desk, turn};
use virtlockd::host::file::{self, Conflict, LockType, Start};
use virtlockd::host::names::Names;
use virtlockd::host::stream::Peer;
use virtlockd::locks::table::{Mode, Owner, OwnerKey};
use virtlockd::server::clients::connection::Connection;
use virtlockd::server::clients::conversation::Taken;
use virtlockd::server::deadlines::Deadlines;
use virtlockd::server::flow::Flow;
use virtlockd::server::ground::Ground;
use virtlockd::server::hall::{Hall, Order};
use virtlockd::server::lines::Lines;
use virtlockd::server::owners::fence::Left;
use virtlockd::server::owners::{Freeing, Owners, Wanted};
use virtlockd::server::reserve::Reserve;
use virtlockd::server::services::dispatch;
use virtlockd::server::shares::Shares;
use virtlockd::server::waiting_room::{NoRoom, WaitingRoom};
use virtlockd::server::watch::Watch;
use virtlockd::wire::error;
use virtlockd::wire::frame::{self, HEADER, Header, Kind, LONGEST, STATUS_ERROR, STATUS_OK, Split};
use virtlockd::wire::lock::{self, Call, LONGEST_FRAME, Procedure, Target};
use virtlockd::wire::{admin, keepalive, status};

use super::log_reader;
use super::reference;
use super::world::{self, World};

/// The answer to every PING, written out: the code under test must not vouch for itself.
const PONG: &[u8] = b"\0\0\0\x1ckeep\0\0\0\x01\0\0\0\x02\0\0\0\x02\0\0\0\0\0\0\0\0";

const SERVICES: [Service; 4] = [Service::Lock, Service::Lock, Service::Admin, Service::Lock];

/// What the reactor owns and lends.
struct Daemon {
    custody: Custody,
    waiting: WaitingRoom,
    lines: Lines,
    deadlines: Deadlines,
    reserve: Reserve,
    wanted: Wanted,
    freeing: Freeing,
    names: Names,
    shares: Shares,
    ground: Ground,
    watch: Watch,
    orders: Vec<Order>,
    desk: Desk,
}

struct Run<'a> {
    world: &'a World,
    daemon: Daemon,
    /// The connections, as long as they are there.
    connections: [Option<(ClientId, Connection)>; SERVICES.len()],
    /// The clients' ends of the sockets.
    clients: Vec<UnixStream>,
}

pub fn run(data: &[u8]) {
    log_reader::install();
    world::with(|world| {
        let poll = mio::Poll::new().expect("a poll");
        let registry = poll.registry().try_clone().expect("its registry");
        let mut daemon = Daemon {
            custody: Custody::new(Ledger::new().expect("a ledger")),
            waiting: WaitingRoom::new(true),
            lines: Lines::default(),
            deadlines: Deadlines::default(),
            reserve: Reserve::default(),
            wanted: Wanted::new(),
            freeing: Freeing::default(),
            names: Names::default(),
            shares: Shares::default(),
            ground: Ground::default(),
            watch: Watch::new(registry),
            orders: Vec::new(),
            desk: Desk::private().expect("memory"),
        };
        for service in Service::ALL {
            // One of the three on the lock socket has to wait until another has ended.
            let server = *daemon.custody.state().server(service);
            daemon
                .custody
                .set_server(service, Server { limit: 2, ..server });
        }
        let mut run = Run {
            world,
            daemon,
            connections: [const { None }; SERVICES.len()],
            clients: Vec::new(),
        };
        run.connect_missing();
        run.check();
        run.steps(data);
        run.end();
    });
}

impl Daemon {
    fn owners(&mut self) -> Owners<'_> {
        Owners {
            custody: &mut self.custody,
            deadlines: &mut self.deadlines,
            watch: &self.watch,
            reserve: &mut self.reserve,
            lines: &mut self.lines,
            wanted: &mut self.wanted,
            shares: &mut self.shares,
            freeing: &mut self.freeing,
            names_processes: true,
            is_ending: false,
        }
    }

    /// Works on one frame; nothing else may have changed than what the ledger says.
    fn dispatch(
        &mut self,
        client: ClientId,
        header: Header,
        payload: &[u8],
        out: &mut Vec<u8>,
    ) -> Flow {
        let mut hall = Hall {
            custody: &mut self.custody,
            waiting: &mut self.waiting,
            deadlines: &mut self.deadlines,
            reserve: &self.reserve,
            names: &mut self.names,
            ground: &mut self.ground,
            orders: &mut self.orders,
            leases: &mut Vec::new(),
            shares: &mut self.shares,
            making: turn::making(self.desk.memory()),
            own_seen: Seen::default(),
        };
        let flow = dispatch::dispatch(&mut hall, client, header, payload, out);
        self.check_ledger();
        flow
    }

    fn carry_out_orders(&mut self) {
        while let Some(order) = self.orders.pop() {
            match order {
                Order::Stop => panic!("the daemon was not told to end"),
                Order::End(client) => self.end_connection(client),
                Order::LetIn(service) => self.let_in(service),
                Order::Settle(pid) => self.owners().bury(pid),
                Order::Watch(client) => {
                    self.owners().watch_owner(client, false);
                }
                Order::Spoke(client, before) => self.owners().owner_changed(client, before),
            }
            self.check_ledger();
        }
    }

    fn end_connection(&mut self, client: ClientId) {
        if self.custody.leaves(client) {
            self.lines.endings.push_back(client);
        }
        self.check_ledger();
    }

    fn let_in(&mut self, service: Service) {
        self.waiting
            .let_in(service, &mut self.custody, &mut self.deadlines);
    }

    fn clear_away(&mut self, client: ClientId) {
        let left = self.owners().left_with(client);
        assert!(matches!(left, Left::Nothing), "it stood for nobody");
        let gone = self.custody.state().client(client).expect("it is there");
        let service = gone.arrival.server;
        let spoke_for = gone.owner.as_deref().map(|owner| owner.pid);
        if let Some(pid) = spoke_for {
            let mut owners = self.owners();
            if !owners.custody.state().table().holds(pid) {
                owners.custody.is_within_reach(pid);
            }
            owners.end_idle_watch(pid);
        }
        self.waiting.forget(client, &mut self.deadlines);
        drop(self.custody.gone(client));
        self.check_ledger();
        self.reserve.refill();
        self.let_in(service);
        self.check_ledger();
    }

    fn check_ledger(&self) {
        assert!(!self.custody.is_behind(), "the ledger lacks something");
        assert!(
            self.custody.is_written_down(),
            "the ledger does not say what is"
        );
    }
}

impl Run<'_> {
    fn connect_missing(&mut self) {
        for (place, server) in self.connections.iter_mut().zip(SERVICES) {
            if place.is_some() {
                continue;
            }
            let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
            self.clients.push(theirs);
            let daemon = &mut self.daemon;
            let id = daemon.custody.take_id(server);
            let has_room = daemon.custody.state().has_room(server);
            let peer = Peer {
                pid: 0,
                uid: 0,
                gid: 0,
            };
            let client = ClientId(ours.as_raw_fd());
            let arrival = Arrival {
                server,
                id,
                peer: Some(peer),
                start_time: None,
                connected_at: 0,
                refused: !has_room,
            };
            daemon.custody.connected(OwnedFd::from(ours), arrival);
            *place = Some((client, Connection::new()));
            if !has_room {
                let (waiting, deadlines) = (&mut daemon.waiting, &mut daemon.deadlines);
                let longest = waiting.enter(client, NoRoom::Limit, deadlines);
                assert_eq!(longest, None, "there are few");
            }
            daemon.check_ledger();
        }
    }

    fn steps(&mut self, mut data: &[u8]) {
        while let Some((&what, rest)) = data.split_first() {
            let place = usize::from(what & 3);
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
            if what & 8 != 0
                && let Some((client, _)) = &self.connections[place]
            {
                self.daemon.end_connection(*client);
            }
            while let Some(client) = self.daemon.lines.endings.pop_front() {
                self.daemon.clear_away(client);
                for place in &mut self.connections {
                    place.take_if(|(known, _)| *known == client);
                }
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
        let service = SERVICES[place];
        let (client, connection) = self.connections[place].as_mut().expect("it is connected");
        let longest = match service {
            Service::Lock => LONGEST_FRAME,
            Service::Admin => LONGEST,
        };
        let mut conversation = connection.take_conversation();
        let mut is_again = false;
        loop {
            let mut out = Vec::new();
            let with_descriptors = descriptors && !bytes.is_empty();
            let taken =
                conversation.take_in(bytes, with_descriptors, longest, |header, payload, _| {
                    let Some(payload) = harmless(world, service, header, payload) else {
                        return Flow::Continue;
                    };
                    let before = out.len();
                    let flow = daemon.dispatch(*client, header, &payload, &mut out);
                    assert!(!is_again || flow != Flow::Again, "again and again");
                    is_again = flow == Flow::Again;
                    check_reply(service, header, flow, &out[before..]);
                    flow
                });
            if taken == Taken::Close {
                daemon.end_connection(*client);
            }
            daemon.carry_out_orders();
            let client = daemon.custody.state().client(*client);
            if taken == Taken::All || client.is_none_or(|client| client.is_over()) {
                break;
            }
            bytes = &[];
        }
        connection.keep_conversation(conversation);
    }

    /// The owner that this connection registered dies.
    fn owner_dies(&mut self, place: usize) {
        let (client, _) = self.connections[place].as_ref().expect("it is connected");
        let state = self.daemon.custody.state();
        let owner = state
            .client(*client)
            .and_then(|client| client.owner.as_deref());
        let Some(pid) = owner.map(|owner| owner.pid) else {
            return;
        };
        self.free(pid);
        assert!(!self.daemon.custody.state().table().holds(pid));
    }

    /// Frees what an owner left, in pieces; the ledger has what is not freed yet.
    fn free(&mut self, pid: i32) {
        self.daemon.owners().free(pid);
        self.daemon.check_ledger();
        while self.daemon.owners().free_some() {
            self.daemon.check_ledger();
        }
        assert_eq!(self.daemon.custody.state().left_count(), 0);
    }

    fn check(&mut self) {
        if self.daemon.custody.wants_renewal() {
            self.daemon.custody.renew().expect("memory for the ledger");
        }
        self.daemon.check_ledger();
        self.check_table();
        self.check_clients();
    }

    fn check_table(&self) {
        let table = self.daemon.custody.state().table();
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
        let state = self.daemon.custody.state();
        for service in Service::ALL {
            let mut served = BTreeMap::new();
            for (id, client) in state.clients() {
                if client.arrival.server != service {
                    continue;
                }
                match client.standing {
                    Standing::Served => assert_eq!(served.insert(client.arrival.id, id), None),
                    Standing::Refused => assert!(!state.has_room(service), "there is room for it"),
                    Standing::Over => panic!("{client:?} is left"),
                }
            }
            let now = state
                .served(service)
                .map(|client| (client.arrival.id, client.id()));
            assert!(now.eq(served));
        }
        let connections = self.connections.iter().flatten();
        assert!(
            connections
                .clone()
                .all(|(id, _)| state.client(*id).is_some())
        );
        assert_eq!(state.client_count(), connections.count());
    }

    fn end(&mut self) {
        let processes: Vec<i32> = self.daemon.custody.state().table().processes().collect();
        for pid in processes {
            self.free(pid);
        }
        assert!(self.daemon.custody.state().table().is_empty());
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
            if header.program == admin::PROGRAM && header.procedure == shutdown {
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
    if flow == Flow::Again {
        assert!(reply.is_empty(), "an answer before the work");
        return;
    }
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
            let items = if header.program == status::PROGRAM {
                reference::status_result(header.procedure)
            } else {
                reference::admin_result(header.procedure)
            };
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
