//! Keepalive, as a daemon serves it on both sockets: a PING is answered by the one PONG, whatever it
//! carries and however the network cuts it; a PONG and whatever else is a message without an answer
//! has none; a call is a call, even if it calls itself a PING. A client that never reads makes the
//! daemon hold no more than 64 KiB and one reply.
//!
//! Calls of the daemon's own programs are not made: what they may do is the target `connection`'s.
//!
//! Input: a byte whose bits 0 and 1 choose the connection; if bit 7 is set, earlier replies are not
//! sent yet, and bits 2 to 6 say how many. Then a plan of pieces as of the target `frame`; then the
//! stream, in steps. A step begins with a byte. If its bit 0 is set, a byte with a length follows
//! and so many bytes of the stream. Otherwise four bytes follow that choose a frame (see [`chosen`]).

use std::cell::RefCell;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use virtlockd::custody::Custody;
use virtlockd::custody::clients::{Arrival, ClientId};
use virtlockd::custody::ledger::Ledger;
use virtlockd::custody::own_connections::Seen;
use virtlockd::custody::servers::Service;
use virtlockd::desk::{Desk, turn};
use virtlockd::host::names::Names;
use virtlockd::host::stream::Peer;
use virtlockd::locks::table::Owner;
use virtlockd::server::clients::conversation::{Conversation, Taken};
use virtlockd::server::deadlines::Deadlines;
use virtlockd::server::flow::Flow;
use virtlockd::server::ground::Ground;
use virtlockd::server::hall::Hall;
use virtlockd::server::reserve::Reserve;
use virtlockd::server::services::dispatch;
use virtlockd::server::shares::Shares;
use virtlockd::server::waiting_room::WaitingRoom;
use virtlockd::wire::frame::{Header, Kind, LONGEST};
use virtlockd::wire::keepalive;
use virtlockd::wire::lock::LONGEST_FRAME;

use super::frame::{self, Piece};
use super::log_reader;
use super::reference::{self, ErrorObject, Words};

/// The program number, ASCII `keep`.
const KEEP: u32 = u32::from_be_bytes(*b"keep");
const LOCK: u32 = 0x0EA7_BEEF;
const ADMIN: u32 = 0x0690_0690;
const PONG: &[u8] = b"\0\0\0\x1ckeep\0\0\0\x01\0\0\0\x02\0\0\0\x02\0\0\0\0\0\0\0\0";
/// After so many bytes of replies nothing more is worked on until they are sent.
const ENOUGH_OUTPUT: usize = 64 * 1024;

thread_local! {
    /// A daemon with a connection of each kind. Nothing that is done here changes it.
    static DAEMON: RefCell<Daemon> = RefCell::new(Daemon::new());
}

struct Daemon {
    custody: Custody,
    waiting: WaitingRoom,
    deadlines: Deadlines,
    reserve: Reserve,
    names: Names,
    shares: Shares,
    ground: Ground,
    clients: Vec<ClientId>,
}

impl Daemon {
    fn new() -> Daemon {
        log_reader::install();
        let mut custody = Custody::new(Ledger::new().expect("a ledger"));
        let owner = Owner {
            pid: 7,
            id: 7,
            name: (*b"guest").into(),
            uuid: [7; 16],
        };
        // Whether it has registered, and is restricted.
        let kinds = [
            (Service::Lock, false, false),
            (Service::Lock, true, false),
            (Service::Lock, true, true),
            (Service::Admin, false, false),
        ];
        let clients = kinds.map(|(server, registered, restricted)| {
            let (socket, _) = UnixStream::pair().expect("a pair of sockets");
            let client = ClientId(socket.as_raw_fd());
            let peer = Peer {
                pid: 0,
                uid: 0,
                gid: 0,
            };
            let arrival = Arrival {
                server,
                id: custody.take_id(server),
                peer: Some(peer),
                start_time: None,
                connected_at: 0,
                refused: false,
            };
            custody.connected(OwnedFd::from(socket), arrival);
            if registered {
                custody.registers(client, &owner);
            }
            if restricted {
                custody.restricts(client);
            }
            client
        });
        Daemon {
            custody,
            waiting: WaitingRoom::new(true),
            deadlines: Deadlines::default(),
            reserve: Reserve::default(),
            names: Names::default(),
            shares: Shares::default(),
            ground: Ground::default(),
            clients: clients.to_vec(),
        }
    }

    fn dispatch(
        &mut self,
        client: ClientId,
        header: Header,
        payload: &[u8],
        out: &mut Vec<u8>,
    ) -> Flow {
        let mut orders = Vec::new();
        let desk = Desk::private().expect("memory");
        let mut hall = Hall {
            custody: &mut self.custody,
            waiting: &mut self.waiting,
            deadlines: &mut self.deadlines,
            reserve: &self.reserve,
            names: &mut self.names,
            ground: &mut self.ground,
            orders: &mut orders,
            leases: &mut Vec::new(),
            shares: &mut self.shares,
            making: turn::making(desk.memory()),
            own_seen: Seen::default(),
        };
        let flow = dispatch::dispatch(&mut hall, client, header, payload, out);
        assert_eq!(orders, []);
        flow
    }
}

pub fn run(data: &[u8]) {
    let Some((choice, rest)) = data.split_first() else {
        return;
    };
    let Some((plan, steps)) = frame::plan(rest) else {
        return;
    };
    let stream = stream(steps);
    let pieces = frame::pieces(plan, &stream);
    DAEMON.with_borrow_mut(|daemon| {
        let client = daemon.clients[usize::from(*choice) % daemon.clients.len()];
        let known = daemon.custody.state().client(client);
        let service = known.expect("it is connected").arrival.server;
        let (longest, own) = match service {
            Service::Lock => (LONGEST_FRAME, LOCK),
            Service::Admin => (LONGEST, ADMIN),
        };
        let (frames, expected_end) = frame::expected(&stream, &pieces, longest);
        let expected: Vec<u8> = frames
            .into_iter()
            .flat_map(|(words, _)| answer(own, words))
            .collect();
        let unsent = match choice & 128 {
            0 => 0,
            _ => ENOUGH_OUTPUT - 1 - 16 * usize::from((choice >> 2) & 31),
        };
        let (out, end) = converse(daemon, client, longest, own, &pieces, vec![0; unsent]);
        assert_eq!(end, expected_end);
        assert_eq!(out[unsent..], expected);
    });
}

/// Gives the pieces to the daemon, which still has `out` to send. What it has answered in the end,
/// and how it ended.
fn converse(
    daemon: &mut Daemon,
    client: ClientId,
    longest: usize,
    own: u32,
    pieces: &[Piece<'_>],
    mut out: Vec<u8>,
) -> (Vec<u8>, Taken) {
    let mut conversation = Conversation::default();
    let mut sent = Vec::new();
    for piece in pieces {
        let mut bytes = piece.bytes;
        loop {
            let taken = conversation.take_in(
                bytes,
                piece.descriptors && !bytes.is_empty(),
                longest,
                |header, payload, _| {
                    assert!(out.len() < ENOUGH_OUTPUT, "worked on before it was sent");
                    check_is_ours(header);
                    if is_own_call(own, frame::words(header)) {
                        return Flow::Continue;
                    }
                    let before = out.len();
                    let flow = daemon.dispatch(client, header, payload, &mut out);
                    assert!(out.len() - before < 1024);
                    flow
                },
            );
            match taken {
                Taken::All => break,
                Taken::Paused => {
                    assert!(out.len() >= ENOUGH_OUTPUT, "a pause for nothing");
                    sent.append(&mut out);
                    bytes = &[];
                }
                Taken::Again | Taken::Waits => panic!("nothing was asked for again"),
                Taken::Close => {
                    assert!(conversation.is_empty());
                    sent.append(&mut out);
                    return (sent, Taken::Close);
                }
            }
        }
        if piece.handover {
            let pending = conversation.pending();
            conversation = pending.map(Conversation::resume).unwrap_or_default();
        }
    }
    sent.append(&mut out);
    (sent, Taken::All)
}

fn check_is_ours(header: Header) {
    let expected = header.program == KEEP && header.version == 1 && header.kind == Kind::Message;
    assert_eq!(keepalive::is_ours(&header), expected);
}

fn is_call(words: Words) -> bool {
    matches!(words[3], 0 | 4)
}

fn is_own_call(own: u32, words: Words) -> bool {
    is_call(words) && words[..2] == [own, 1]
}

/// What the daemon must answer to a frame.
fn answer(own: u32, words: Words) -> Vec<u8> {
    let [program, version, procedure, kind, ..] = words;
    if (program, version, kind) == (KEEP, 1, 2) {
        return if procedure == 1 { PONG } else { &[] }.to_vec();
    }
    if !is_call(words) || is_own_call(own, words) {
        return Vec::new();
    }
    let message = format!(
        "Cannot find program {} version {}",
        program.cast_signed(),
        version.cast_signed()
    );
    let error = ErrorObject {
        code: 39,
        domain: 7,
        message: message.as_bytes(),
        str1: b"%s",
        str2: message.as_bytes(),
        ints: [-1, -1],
    };
    reference::error_reply(words, &error)
}

fn stream(mut steps: &[u8]) -> Vec<u8> {
    let mut stream = Vec::new();
    while let Some((&what, rest)) = steps.split_first() {
        if what & 1 != 0 {
            let Some((&length, rest)) = rest.split_first() else {
                break;
            };
            let (bytes, rest) = rest.split_at(usize::from(length).min(rest.len()));
            stream.extend_from_slice(bytes);
            steps = rest;
        } else {
            let Some((choices, rest)) = rest.split_first_chunk() else {
                break;
            };
            steps = rest;
            stream.extend_from_slice(&chosen(*choices));
        }
    }
    stream
}

/// A frame that is a PING, or is nearly one.
fn chosen([program, rest, filling, payload]: [u8; 4]) -> Vec<u8> {
    let filled = u32::from_be_bytes([filling; 4]);
    let words = [
        match program {
            0..192 => KEEP,
            192..224 => KEEP ^ (1 << (program % 32)),
            224..240 => LOCK,
            _ => ADMIN,
        },
        [1, 1, 1, filled][usize::from(rest & 3)],
        [1, 1, 2, filled][usize::from((rest >> 2) & 3)],
        [2, 2, 2, 2, 0, 0, 4, filled][usize::from((rest >> 4) & 7)],
        filled,
        if rest & 128 == 0 { 0 } else { filled },
    ];
    reference::frame(words, &vec![filling; usize::from(payload / 4)])
}
