//! Bytes captured from libvirt's own daemon, replayed: every reply is the same to the byte, except
//! for the differences listed here, each of which has a test of its own.
//!
//! A vector (a line of `tests/protocol/vectors/*.jsonl`) meets a daemon of its own that was started
//! with the limits of the capture. It lists what was done before (`setup`), the bytes written
//! (`request_hex`, in `chunks` if they are given, then `pass_fds` descriptors, then a half-close if
//! `shutdown` is set), the bytes that came back (`reply_hex`) and whether the daemon then closed
//! (`closed`). `volatile` marks bytes that differ between runs, `alternatives_hex` equally right
//! replies.
//!
//! With `VIRTLOCKD_UNDER_TEST` naming libvirt's daemon nothing may differ at all.

use crate::support;
use crate::support::client::{Client, ErrorObject, PING, PONG, Reply};
use crate::support::daemon::{self, ADMIN_SOCKET, Daemon, LOCK_SOCKET};
use crate::support::namespace::Namespace;
use crate::support::owner::from_hex;
use serde_json::Value;
use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The limits that the capture ran with.
const CONFIG: &str = "max_clients = 1024\nadmin_max_clients = 5000\n";

/// How long a connection has to stay quiet to count as silent where a PING cannot show it.
const QUIET: Duration = Duration::from_millis(150);

/// How long a reply may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A vector that our daemon answers otherwise than libvirt's, on purpose.
struct Difference {
    vector: &'static str,
    why: &'static str,
    ours: Ours,
}

enum Ours {
    /// The connection closes without a reply.
    Closed,
    /// An error whose text starts with `start` and then mentions everything in `mentions`.
    Error {
        code: i32,
        domain: i32,
        start: &'static str,
        mentions: &'static [&'static str],
    },
    /// The bytes of libvirt's reply, with these behind its words, in the message and in the detail.
    Named { by: &'static str },
    /// A result that has all of this in it.
    Result { mentions: &'static [&'static str] },
}

/// Who a refusal names whose vector is of this owner or of the other one.
const BY_THIS: Ours = Ours::Named {
    by: ": by domain 'guest' (uuid 10111213-1415-1617-1819-1a1b1c1d1e1f, pid 4242), exclusive",
};
const BY_THIS_SHARED: Ours = Ours::Named {
    by: ": by domain 'guest' (uuid 10111213-1415-1617-1819-1a1b1c1d1e1f, pid 4242), shared",
};
const BY_OTHER: Ours = Ours::Named {
    by: ": by domain 'other' (uuid 10111213-1415-1617-1819-1a1b1c1d1e1f, pid 5555), exclusive",
};
const BY_OTHER_SHARED: Ours = Ours::Named {
    by: ": by domain 'other' (uuid 10111213-1415-1617-1819-1a1b1c1d1e1f, pid 5555), shared",
};
const BY_STRANGER: Ours = Ours::Named {
    by: ": by a process of this host that is not this virtlockd",
};

const fn refusal(vector: &'static str, ours: Ours) -> Difference {
    Difference {
        vector,
        why: "a refusal names the holder behind libvirt's words",
        ours,
    }
}

const DIFFERENCES: [Difference; 15] = [
    refusal("create_resource_locked", BY_THIS),
    refusal("delete_resource_locked", BY_THIS),
    refusal("acquire_busy_excl_excl", BY_OTHER),
    refusal("acquire_busy_excl_shared", BY_OTHER),
    refusal("acquire_busy_shared_excl", BY_OTHER_SHARED),
    refusal("acquire_busy_same_owner", BY_THIS),
    refusal("acquire_busy_upgrade", BY_THIS_SHARED),
    refusal("acquire_busy_dir", BY_OTHER),
    refusal("acquire_foreign_lock_excl", BY_STRANGER),
    refusal("acquire_foreign_lock_autocreate", BY_STRANGER),
    Difference {
        vector: "length_word_max_accepted",
        why: "the lock program's largest call fits in 132 KiB, so a longer frame ends at its length word",
        ours: Ours::Closed,
    },
    Difference {
        vector: "acquire_other_name_same_inode",
        why: "one file is one lock, whatever path names it",
        ours: Ours::Error {
            code: 87,
            domain: 51,
            start: "resource busy: Lockspace resource '/run/vec/./disk.img' is locked",
            mentions: &[
                "other",
                "10111213-1415-1617-1819-1a1b1c1d1e1f",
                "5555",
                "/run/vec/disk.img",
            ],
        },
    },
    Difference {
        vector: "new_on_plain_file",
        why: "NEW reports that the directory cannot be made instead of planting a broken lockspace",
        ours: Ours::Error {
            code: 1,
            domain: 51,
            start: "internal error: Lockspace location /run/vec/disk.img exists, but is not a directory",
            mentions: &[],
        },
    },
    Difference {
        vector: "acquire_trailing_slash_lockspace",
        why: "a lockspace nobody made is opened by an acquire if its directory is there",
        ours: Ours::Error {
            code: 38,
            domain: 51,
            start: "Unable to open resource /run/vec/ls//r: No such file or directory",
            mentions: &[],
        },
    },
    Difference {
        vector: "client_info_no_call_yet",
        why: "who a client is, is known from its connect() on, not from its first call",
        ours: Ours::Result {
            mentions: &[
                "readonly",
                "unix_user_id",
                "unix_user_name",
                "root",
                "unix_group_id",
                "unix_group_name",
                "unix_process_id",
            ],
        },
    },
];

#[test]
fn framing_is_byte_for_byte_that_of_libvirts_daemon() {
    replay_file("framing");
}

#[test]
fn keepalive_is_byte_for_byte_that_of_libvirts_daemon() {
    replay_file("keepalive");
}

#[test]
fn granted_lock_calls_are_byte_for_byte_those_of_libvirts_daemon() {
    replay_file("lock_success");
}

#[test]
fn refused_lock_calls_are_byte_for_byte_those_of_libvirts_daemon() {
    replay_file("lock_errors");
}

#[test]
fn calls_at_the_limits_are_byte_for_byte_those_of_libvirts_daemon() {
    replay_file("limits");
}

#[test]
fn the_admin_program_is_byte_for_byte_that_of_libvirts_daemon() {
    replay_file("admin");
}

#[test]
fn a_frame_longer_than_any_lock_call_ends_the_connection() {
    replay_difference("framing", "length_word_max_accepted");
}

#[test]
fn a_second_name_of_a_held_file_is_busy_and_the_holder_is_named() {
    replay_difference("lock_success", "acquire_other_name_same_inode");
}

#[test]
fn a_refusal_is_libvirts_to_the_byte_and_then_names_the_holder() {
    for difference in &DIFFERENCES {
        if let Ours::Named { .. } = difference.ours {
            replay_difference("lock_errors", difference.vector);
        }
    }
}

#[test]
fn new_on_a_plain_file_says_that_it_is_no_directory() {
    replay_difference("lock_success", "new_on_plain_file");
}

#[test]
fn an_acquire_in_an_unknown_lockspace_with_a_directory_opens_it() {
    replay_difference("lock_errors", "acquire_trailing_slash_lockspace");
}

#[test]
fn client_info_is_there_before_the_first_call() {
    replay_difference("admin", "client_info_no_call_yet");
}

#[test]
fn every_listed_difference_belongs_to_a_vector() {
    let groups = [
        "framing",
        "keepalive",
        "lock_success",
        "lock_errors",
        "limits",
        "admin",
    ];
    let names: Vec<String> = groups
        .iter()
        .flat_map(|group| load(group))
        .map(|v| v.name)
        .collect();
    for difference in &DIFFERENCES {
        assert!(
            names.iter().any(|name| name == difference.vector),
            "no vector is called {} ({})",
            difference.vector,
            difference.why
        );
    }
}

/// Replays every vector of a file that has no entry in [`DIFFERENCES`]; all failures are told at
/// once, because they usually have one cause.
fn replay_file(group: &str) {
    if !support::require_root() {
        return;
    }
    let namespace = Namespace::sealed();
    let exact = is_libvirts(&namespace);
    let mut wrong = Vec::new();
    for vector in load(group) {
        if !exact
            && DIFFERENCES
                .iter()
                .any(|difference| difference.vector == vector.name)
        {
            continue;
        }
        let answer = replay(&namespace, &vector);
        if !vector.matches(&answer) {
            wrong.push(vector.tell(&answer));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} vectors differ:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

/// Replays one vector and compares with what [`DIFFERENCES`] says of it.
fn replay_difference(group: &str, name: &str) {
    if !support::require_root() {
        return;
    }
    let namespace = Namespace::sealed();
    if is_libvirts(&namespace) {
        support::skip("libvirt's own daemon is under test: it has no differences from itself");
        return;
    }
    let difference = DIFFERENCES
        .iter()
        .find(|difference| difference.vector == name);
    let difference = difference.unwrap_or_else(|| panic!("{name} is not a listed difference"));
    let mut vector = load(group)
        .into_iter()
        .find(|vector| vector.name == name)
        .expect("a vector");
    vector.closed = matches!(difference.ours, Ours::Closed);
    let answer = replay(&namespace, &vector);
    match &difference.ours {
        Ours::Closed => {
            assert!(
                answer.closed && answer.bytes.is_empty(),
                "{}",
                vector.tell(&answer)
            );
        }
        Ours::Named { by } => {
            let due = Reply::with_holder(&vector.reply, by);
            assert_ne!(due, vector.reply, "{name} is a sentence that names nobody");
            vector.reply = due;
            assert!(vector.matches(&answer), "{}", vector.tell(&answer));
        }
        Ours::Result { mentions } => {
            assert!(!answer.closed, "{}", vector.tell(&answer));
            let Reply::Ok { payload } = Reply::parse(&answer.bytes) else {
                panic!("{name}: a result was due: {}", difference.why);
            };
            let text = String::from_utf8_lossy(&payload);
            for word in *mentions {
                assert!(text.contains(word), "{name}: no {word} in: {text}");
            }
        }
        Ours::Error {
            code,
            domain,
            start,
            mentions,
        } => {
            assert!(!answer.closed, "{}", vector.tell(&answer));
            let Reply::Error(error) = Reply::parse(&answer.bytes) else {
                panic!("{name}: an error was due: {}", difference.why);
            };
            let ErrorObject { message, .. } = &error;
            assert_eq!(
                (error.code, error.domain),
                (*code, *domain),
                "{name}: {error:?}"
            );
            assert!(message.starts_with(start), "{name}: {message}");
            let rest = &message[start.len()..];
            for word in *mentions {
                assert!(rest.contains(word), "{name}: no {word} in: {rest}");
            }
            if mentions.is_empty() {
                assert_eq!(rest, "", "{name}: nothing follows the C daemon's words");
            }
        }
    }
}

/// True if the daemon under test is libvirt's own, which has to reproduce its capture exactly.
fn is_libvirts(namespace: &Namespace) -> bool {
    let output = namespace
        .command(daemon::program())
        .arg("--version")
        .output()
        .expect("ask the daemon for its version");
    String::from_utf8_lossy(&output.stdout).contains("(libvirt)")
}

struct Vector {
    name: String,
    context: String,
    socket: String,
    setup: Vec<Value>,
    chunks: Vec<usize>,
    pass_fds: usize,
    shutdown: bool,
    request: Vec<u8>,
    reply: Vec<u8>,
    alternatives: Vec<Vec<u8>>,
    volatile: Vec<(usize, usize)>,
    closed: bool,
}

struct Answer {
    bytes: Vec<u8>,
    closed: bool,
}

fn load(group: &str) -> Vec<Vector> {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/protocol/vectors/{group}.jsonl"));
    let text = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("read the vectors of {}: {error}", path.display()));
    let vectors: Vec<Vector> = text.lines().map(Vector::parse).collect();
    assert!(!vectors.is_empty(), "{} has no vectors", path.display());
    vectors
}

impl Vector {
    fn parse(line: &str) -> Vector {
        let value: Value = serde_json::from_str(line).expect("a vector is a JSON object");
        let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
        let list = |key: &str| value[key].as_array().cloned().unwrap_or_default();
        let size = |value: &Value| value.as_u64().expect("a size") as usize;
        Vector {
            name: text("name"),
            context: text("context"),
            socket: text("socket"),
            setup: list("setup"),
            chunks: list("chunks").iter().map(size).collect(),
            pass_fds: value.get("pass_fds").map_or(0, size),
            shutdown: value["shutdown"].as_bool().unwrap_or(false),
            request: from_hex(&text("request_hex")),
            reply: from_hex(&text("reply_hex")),
            alternatives: list("alternatives_hex")
                .iter()
                .map(|hex| from_hex(hex.as_str().expect("hex text")))
                .collect(),
            volatile: list("volatile")
                .iter()
                .map(|spot| (size(&spot["offset"]), size(&spot["length"])))
                .collect(),
            closed: value["closed"].as_bool().unwrap_or(false),
        }
    }

    fn matches(&self, answer: &Answer) -> bool {
        let masked = |bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            for &(offset, length) in &self.volatile {
                if let Some(spot) = bytes.get_mut(offset..offset + length) {
                    spot.fill(0);
                }
            }
            bytes
        };
        let same = masked(&answer.bytes) == masked(&self.reply);
        answer.closed == self.closed && (same || self.alternatives.contains(&answer.bytes))
    }

    fn tell(&self, answer: &Answer) -> String {
        format!(
            "{} ({}):\n  due: {}\n  got: {}",
            self.name,
            self.context,
            readable(&self.reply, self.closed),
            readable(&answer.bytes, answer.closed),
        )
    }

    /// True if the request ends with a whole message, so that a PING can follow it.
    fn ends_whole(&self) -> bool {
        whole_messages(&self.request).1.is_empty()
    }
}

/// How many whole messages the bytes begin with, and what follows them.
fn whole_messages(bytes: &[u8]) -> (usize, &[u8]) {
    let (mut count, mut rest) = (0, bytes);
    while let Some(word) = rest.first_chunk::<4>() {
        match rest.get(u32::from_be_bytes(*word).max(4) as usize..) {
            Some(after) => (count, rest) = (count + 1, after),
            None => break,
        }
    }
    (count, rest)
}

fn readable(bytes: &[u8], closed: bool) -> String {
    let end = if closed {
        "then closed"
    } else {
        "and stays open"
    };
    let shown = &bytes[..bytes.len().min(400)];
    format!("{} bytes, {end}: {}", bytes.len(), shown.escape_ascii())
}

fn replay(namespace: &Namespace, vector: &Vector) -> Answer {
    let base = namespace.path("/run/vec");
    if base.exists() {
        std::fs::remove_dir_all(&base).expect("remove the files of the vector before");
    }
    // The daemon before was killed: the next one would go on for it. (And a process that it had just made may have its
    // sockets open yet.)
    for file in ["/run/libvirt/virtlockd-ledger", LOCK_SOCKET, ADMIN_SOCKET] {
        let _ = std::fs::remove_file(namespace.path(file));
    }
    let sockets: HashMap<&str, PathBuf> = [
        ("lock", namespace.path(LOCK_SOCKET)),
        ("admin", namespace.path(ADMIN_SOCKET)),
    ]
    .into();
    let config = "/run/vectors.conf";
    std::fs::write(namespace.path(config), CONFIG).expect("write the configuration");
    let mut daemon = Daemon::spawn(&daemon::program(), namespace, &["-f", config], &[]);
    // The probe is the first client of its socket; the capture probed the admin socket.
    daemon.wait_for_socket(&sockets[vector.socket.as_str()]);

    let mut connections: HashMap<String, Client> = HashMap::new();
    let mut foreign_locks = Vec::new();
    for step in &vector.setup {
        let text = |key: &str| step[key].as_str().unwrap_or_default().to_owned();
        let path = || namespace.path(text("path"));
        match text("fs").as_str() {
            "mkdir" => std::fs::create_dir_all(path()).expect("make a directory"),
            "touch" => std::fs::write(path(), "").expect("make a file"),
            "wrlock" => foreign_locks.push(support::foreign_lock(&path(), true)),
            _ if step.get("open").is_some() => {
                open(
                    &mut connections,
                    &text("open"),
                    &sockets[text("socket").as_str()],
                );
            }
            _ => {
                let socket = &sockets[vector.socket.as_str()];
                let connection = open(&mut connections, &text("conn"), socket);
                connection.send(&from_hex(&text("request_hex")));
                connection.receive();
            }
        }
    }
    let own = open(&mut connections, "self", &sockets[vector.socket.as_str()]);
    let sent = send_request(own, vector);
    // A daemon may close before it has read everything.
    let cut_short = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset];
    if let Err(error) = sent {
        assert!(
            cut_short.contains(&error.kind()),
            "{}: write: {error}",
            vector.name
        );
    }
    if vector.shutdown {
        own.stream()
            .shutdown(std::net::Shutdown::Write)
            .expect("close our half");
    }
    read_answer(own.stream(), vector)
}

/// The connection of that name, opened if it is new. The PING shows that the daemon has accepted
/// it, so that clients get their ids in the order of the vector.
fn open<'a>(
    connections: &'a mut HashMap<String, Client>,
    name: &str,
    socket: &Path,
) -> &'a mut Client {
    connections.entry(name.to_owned()).or_insert_with(|| {
        let mut client = Client::connect(socket);
        client.ping();
        client
    })
}

fn send_request(client: &mut Client, vector: &Vector) -> std::io::Result<()> {
    let mut rest = &vector.request[..];
    let mut sizes = vector.chunks.iter().copied();
    let mut size = usize::MAX;
    while !rest.is_empty() {
        size = sizes.next().unwrap_or(size);
        let (piece, after) = rest.split_at(size.min(rest.len()));
        client.try_send(piece)?;
        rest = after;
        if !rest.is_empty() {
            // Nothing tells when the daemon has read a piece: a moment lets it do so. If it has
            // not, it reads two pieces at once and the reply is the same.
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    let null = std::fs::File::open("/dev/null")?;
    client.send_descriptors(&vec![null.as_fd(); vector.pass_fds])
}

/// Reads what is due, and then enough to see that nothing else follows: the end of the connection,
/// the answer to a PING, or silence.
fn read_answer(stream: &UnixStream, vector: &Vector) -> Answer {
    let mut answer = Answer {
        bytes: Vec::new(),
        closed: false,
    };
    let due = whole_messages(&vector.reply).0;
    read_until(
        stream,
        &mut answer,
        if vector.closed { usize::MAX } else { due },
        PATIENCE,
    );
    if answer.closed || vector.closed {
        return answer;
    }
    if !vector.ends_whole() {
        read_until(stream, &mut answer, usize::MAX, QUIET);
        return answer;
    }
    let mut stream = stream;
    if stream.write_all(&PING).is_ok() {
        read_until(stream, &mut answer, due + 1, PATIENCE);
        if answer.bytes.ends_with(&PONG) {
            answer.bytes.truncate(answer.bytes.len() - PONG.len());
        }
    }
    answer
}

/// Reads until `due` whole messages are there, the connection ends or `limit` has passed.
fn read_until(mut stream: &UnixStream, answer: &mut Answer, due: usize, limit: Duration) {
    let end = Instant::now() + limit;
    let mut buffer = [0; 65536];
    while !answer.closed && whole_messages(&answer.bytes).0 < due {
        let Some(left) = end
            .checked_duration_since(Instant::now())
            .filter(|left| !left.is_zero())
        else {
            return;
        };
        stream
            .set_read_timeout(Some(left))
            .expect("set a read deadline");
        match stream.read(&mut buffer) {
            Ok(0) => answer.closed = true,
            Ok(count) => answer.bytes.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => answer.closed = true,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) => panic!("read from the daemon: {error}"),
        }
    }
}
