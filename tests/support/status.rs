//! The status program as its description says it (`src/dist/status-protocol.md`), without the crate's code.

use super::client::{CALL, Client, MESSAGE, Received, Reply, frame, put_string, put_u32};
pub use super::protocol::{OWNERS, RESOURCES, STATUS_PROGRAM as PROGRAM};
use super::protocol::{STATUS_OK, at, word};
use std::collections::BTreeMap;
use std::time::Duration;

const DAEMON: i32 = 1;
const COUNTERS: i32 = 2;
const LOCKSPACES: i32 = 3;
const HOLDERS: i32 = 6;
const FILE: i32 = 7;
const RESOURCE: i32 = 8;
pub const SUBSCRIBE: i32 = 9;
const HAPPENED: u32 = 10;

/// Kinds of what happens.
pub const MISSED: u32 = 0;
pub const REGISTERED: u32 = 1;
pub const GRANTED: u32 = 2;
pub const RELEASED: u32 = 3;
pub const REFUSED: u32 = 4;
pub const FENCED: u32 = 5;
pub const KILLED: u32 = 6;
pub const DIED: u32 = 7;
pub const UPGRADED: u32 = 8;
pub const RECOVERED: u32 = 9;
pub const ALL: u32 = 0x3ff;

/// How an owner stands.
pub const CONNECTED: u32 = 1;
pub const WATCHED: u32 = 2;

pub type Cursor = Option<(u64, u64)>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    pub pid: i32,
    pub uuid: Option<[u8; 16]>,
    pub id: u32,
    pub name: String,
    pub since: u64,
    pub held: u32,
    pub standing: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    pub lockspace: String,
    pub name: String,
    pub device: u64,
    pub inode: u64,
    pub shared: bool,
    pub since: u64,
    pub count: u32,
    /// The first few, each with how often.
    pub holders: Vec<(Owner, u32)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Happened {
    pub kind: u32,
    pub at: u64,
    pub count: u64,
    pub owner: Option<(i32, String)>,
    pub lockspace: String,
    pub name: String,
    pub mode: u32,
    pub text: String,
}

#[derive(Debug)]
pub struct Daemon {
    pub version: String,
    pub pid: i32,
    pub now: u64,
    pub serves_since: u64,
    pub resources: u64,
    pub lockspaces: u32,
    pub lock_clients: u32,
    pub admin_clients: u32,
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn u32(&mut self) -> u32 {
        let (head, rest) = self.0.split_at(4);
        self.0 = rest;
        u32::from_be_bytes(head.try_into().unwrap())
    }

    fn u64(&mut self) -> u64 {
        u64::from(self.u32()) << 32 | u64::from(self.u32())
    }

    fn string(&mut self) -> String {
        let length = self.u32() as usize;
        let text = String::from_utf8_lossy(&self.0[..length]).into_owned();
        self.0 = &self.0[length.next_multiple_of(4)..];
        text
    }

    fn key(&mut self) -> (i32, Option<[u8; 16]>) {
        let pid = self.u32().cast_signed();
        let uuid = (self.u32() != 0).then(|| {
            let (uuid, rest) = self.0.split_at(16);
            self.0 = rest;
            uuid.try_into().unwrap()
        });
        (pid, uuid)
    }

    fn owner(&mut self) -> Owner {
        let (pid, uuid) = self.key();
        Owner {
            pid,
            uuid,
            id: self.u32(),
            name: self.string(),
            since: self.u64(),
            held: self.u32(),
            standing: self.u32(),
        }
    }

    fn list<T>(&mut self, mut row: impl FnMut(&mut Self) -> T) -> Vec<T> {
        let mut rows = Vec::new();
        while self.u32() != 0 {
            rows.push(row(self));
        }
        rows
    }

    fn holder(&mut self) -> (Owner, u32) {
        (self.owner(), self.u32())
    }

    fn resource(&mut self) -> Resource {
        Resource {
            lockspace: self.string(),
            name: self.string(),
            device: self.u64(),
            inode: self.u64(),
            shared: self.u32() != 0,
            since: self.u64(),
            count: self.u32(),
            holders: self.list(Reader::holder),
        }
    }

    fn next(&mut self) -> Cursor {
        (self.u32() != 0).then(|| (self.u64(), self.u64()))
    }

    fn end(self) {
        assert_eq!(self.0, b"", "more than was due");
    }
}

/// A client of the status program.
pub struct Status {
    pub client: Client,
    happened: Vec<Happened>,
}

impl Status {
    pub fn of(daemon: &super::daemon::Daemon) -> Status {
        Status::over(daemon.admin_client())
    }

    pub fn over(client: Client) -> Status {
        Status {
            client,
            happened: Vec::new(),
        }
    }

    pub fn post(&mut self, procedure: i32, arguments: &[u8], flags: u32) {
        let mut payload = arguments.to_vec();
        put_u32(&mut payload, flags);
        let call = frame(PROGRAM, 1, procedure, CALL, 7, STATUS_OK, &payload);
        self.client.send(&call);
    }

    /// The reply to a call; what happened meanwhile is kept.
    #[track_caller]
    pub fn call(&mut self, procedure: i32, arguments: &[u8], flags: u32) -> Reply {
        Reply::parse(&self.reply(procedure, arguments, flags))
    }

    #[track_caller]
    fn reply(&mut self, procedure: i32, arguments: &[u8], flags: u32) -> Vec<u8> {
        self.post(procedure, arguments, flags);
        loop {
            let frame = self.client.receive();
            if word(&frame, at::TYPE) == MESSAGE as u32 {
                self.happened.push(happened(&frame));
            } else {
                assert_eq!(word(&frame, at::PROCEDURE), procedure.cast_unsigned());
                return frame;
            }
        }
    }

    #[track_caller]
    fn payload(&mut self, procedure: i32, arguments: &[u8]) -> Vec<u8> {
        let reply = self.reply(procedure, arguments, 0);
        Reply::parse(&reply).expect_ok();
        reply[28..].to_vec()
    }

    #[track_caller]
    pub fn daemon(&mut self) -> Daemon {
        let payload = self.payload(DAEMON, &[]);
        let from = &mut Reader(&payload);
        let version = from.string();
        let (pid, now, serves_since) = (from.u32().cast_signed(), from.u64(), from.u64());
        let (resources, _left, _fenced) = (from.u64(), from.u64(), from.u32());
        Daemon {
            version,
            pid,
            now,
            serves_since,
            resources,
            lockspaces: from.u32(),
            lock_clients: from.u32(),
            admin_clients: from.u32(),
        }
    }

    #[track_caller]
    pub fn counters(&mut self) -> BTreeMap<String, u64> {
        let payload = self.payload(COUNTERS, &[]);
        let mut from = Reader(&payload);
        let rows = from.list(|from| (from.string(), from.u64()));
        from.end();
        rows.into_iter().collect()
    }

    #[track_caller]
    pub fn lockspaces(&mut self) -> Vec<String> {
        let mut all: Vec<String> = Vec::new();
        loop {
            let mut arguments = Vec::new();
            put_u32(&mut arguments, u32::from(!all.is_empty()));
            if let Some(last) = all.last() {
                put_string(&mut arguments, last.as_bytes());
            }
            let payload = self.payload(LOCKSPACES, &arguments);
            let mut from = Reader(&payload);
            all.extend(from.list(Reader::string));
            if from.u32() == 0 {
                from.end();
                return all;
            }
        }
    }

    #[track_caller]
    pub fn resources_page(&mut self, cursor: Cursor) -> (Vec<Resource>, Cursor) {
        let payload = self.payload(RESOURCES, &cursor_bytes(cursor));
        let mut from = Reader(&payload);
        let page = (from.list(Reader::resource), from.next());
        from.end();
        page
    }

    #[track_caller]
    pub fn resources(&mut self) -> Vec<Resource> {
        let (mut all, mut next) = self.resources_page(None);
        while next.is_some() {
            let (more, behind) = self.resources_page(next);
            all.extend(more);
            next = behind;
        }
        all
    }

    #[track_caller]
    pub fn owners(&mut self) -> Vec<Owner> {
        let (mut all, mut next) = (Vec::new(), None);
        loop {
            let payload = self.payload(OWNERS, &cursor_bytes(next));
            let mut from = Reader(&payload);
            all.extend(from.list(Reader::owner));
            next = from.next();
            from.end();
            if next.is_none() {
                return all;
            }
        }
    }

    /// All who hold a resource, and how many pages that took.
    #[track_caller]
    pub fn holders(&mut self, lockspace: &str, name: &str) -> (Vec<(Owner, u32)>, usize) {
        let mut all: Vec<(Owner, u32)> = Vec::new();
        for pages in 1.. {
            let mut arguments = target(lockspace, name);
            put_u32(&mut arguments, u32::from(!all.is_empty()));
            if let Some((last, _)) = all.last() {
                put_u32(&mut arguments, last.pid.cast_unsigned());
                put_u32(&mut arguments, u32::from(last.uuid.is_some()));
                arguments.extend(last.uuid.unwrap_or_default());
            }
            let payload = self.payload(HOLDERS, &arguments);
            let mut from = Reader(&payload);
            all.extend(from.list(Reader::holder));
            if from.u32() == 0 {
                from.end();
                return (all, pages);
            }
        }
        unreachable!()
    }

    #[track_caller]
    pub fn file(&mut self, device: u64, inode: u64) -> Vec<Resource> {
        let arguments = [device.to_be_bytes(), inode.to_be_bytes()].concat();
        let payload = self.payload(FILE, &arguments);
        let mut from = Reader(&payload);
        let rows = from.list(Reader::resource);
        from.end();
        rows
    }

    #[track_caller]
    pub fn resource(&mut self, lockspace: &str, name: &str) -> Option<Resource> {
        let payload = self.payload(RESOURCE, &target(lockspace, name));
        let mut from = Reader(&payload);
        let mut rows = from.list(Reader::resource);
        from.end();
        assert!(rows.len() < 2);
        rows.pop()
    }

    #[track_caller]
    pub fn subscribe(&mut self, kinds: u32) {
        let payload = self.payload(SUBSCRIBE, &kinds.to_be_bytes());
        assert_eq!(payload, b"");
    }

    /// The next thing that happened.
    #[track_caller]
    pub fn next(&mut self) -> Happened {
        if self.happened.is_empty() {
            let frame = self.client.receive();
            return happened(&frame);
        }
        self.happened.remove(0)
    }

    /// Nothing happens for a while.
    #[track_caller]
    pub fn expect_silence(&mut self) {
        assert_eq!(self.happened, []);
        match self.client.receive_within(Duration::from_millis(100)) {
            Received::Silence { .. } => (),
            other => panic!("nothing was due: {other:?}"),
        }
    }
}

fn cursor_bytes(cursor: Cursor) -> Vec<u8> {
    let (list, place) = cursor.unwrap_or_default();
    [list.to_be_bytes(), place.to_be_bytes()].concat()
}

fn target(lockspace: &str, name: &str) -> Vec<u8> {
    let mut target = Vec::new();
    put_string(&mut target, lockspace.as_bytes());
    put_string(&mut target, name.as_bytes());
    target
}

#[track_caller]
fn happened(frame: &[u8]) -> Happened {
    assert_eq!(word(frame, at::PROGRAM), PROGRAM);
    assert_eq!(word(frame, at::PROCEDURE), HAPPENED);
    assert_eq!(word(frame, at::TYPE), MESSAGE as u32);
    let mut from = Reader(&frame[28..]);
    let (kind, at, count) = (from.u32(), from.u64(), from.u64());
    let owner = (from.u32() != 0).then(|| {
        let (pid, _) = from.key();
        let _id = from.u32();
        (pid, from.string())
    });
    let happened = Happened {
        kind,
        at,
        count,
        owner,
        lockspace: from.string(),
        name: from.string(),
        mode: from.u32(),
        text: from.string(),
    };
    from.end();
    happened
}

/// The time of day, milliseconds.
pub fn now_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    u64::try_from(now.unwrap().as_millis()).unwrap()
}
