//! A service manager with a store for descriptors, as far as a daemon sees one: it takes what it is told to
//! keep, and gives it to the next start. It can do what systemd does only when something is wrong, and what
//! it keeps can be looked at and changed.

// A descriptor that came in a message has to be made one of ours.
#![allow(unsafe_code)]

use super::daemon::Daemon;
use super::upgrade::{Host, PROGRAM};
use super::{DEADLINE, wait_until};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

const SOCKET: &str = "/run/notify";
/// What it is sent to see that it has come so far.
const MARK: &str = "MARK=1";

/// What is kept, by its name.
type Store = Arc<Mutex<Vec<(String, OwnedFd)>>>;

pub struct Manager {
    pub host: Host,
    store: Store,
    heard: Arc<Mutex<Vec<String>>>,
    refuses: Arc<AtomicBool>,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Manager {
    pub fn new() -> Manager {
        let host = Host::new();
        let socket = UnixDatagram::bind(host.path(SOCKET)).expect("make a socket for words");
        let mut manager = Manager {
            host,
            store: Store::default(),
            heard: Arc::default(),
            refuses: Arc::default(),
            is_over: Arc::default(),
            thread: None,
        };
        let (store, heard) = (manager.store.clone(), manager.heard.clone());
        let (refuses, is_over) = (manager.refuses.clone(), manager.is_over.clone());
        let listen = move || {
            while !is_over.load(Ordering::Relaxed) {
                if let Some((words, descriptors)) = receive(&socket) {
                    let refuses = refuses.load(Ordering::Relaxed);
                    obey(&words, descriptors, refuses, &store);
                    heard.lock().expect("what was heard").push(words);
                }
            }
        };
        manager.thread = Some(std::thread::spawn(listen));
        manager
    }

    /// From now on nothing is stored, and nobody is told.
    pub fn refuse(&self) {
        self.refuses.store(true, Ordering::Relaxed);
    }

    /// What is stored is dropped.
    pub fn drop_all(&self) {
        self.store.lock().expect("the store").clear();
    }

    /// How many descriptors are stored.
    pub fn stored(&self) -> usize {
        self.store.lock().expect("the store").len()
    }

    /// What was sent to it has been dealt with.
    pub fn settle(&self) {
        let before = self.heard(MARK);
        let sender = UnixDatagram::unbound().expect("make a socket");
        let sent = sender.send_to(MARK.as_bytes(), self.host.path(SOCKET));
        sent.expect("send a mark");
        wait_until(DEADLINE, "the mark to be read", || {
            self.heard(MARK) > before
        });
    }

    /// One more descriptor of what was stored first. Daemons that did not get far have not left more than one
    /// thing beside it.
    pub fn first(&self) -> OwnedFd {
        self.settle();
        let store = self.store.lock().expect("the store");
        assert!(store.len() <= 2, "it piles up: {store:?}");
        store[0].1.try_clone().expect("copy a descriptor")
    }

    /// One more descriptor of everything that is stored.
    pub fn all(&self) -> Vec<OwnedFd> {
        let store = self.store.lock().expect("the store");
        let copy = |(_, descriptor): &(String, OwnedFd)| descriptor.try_clone();
        let copies: std::io::Result<Vec<OwnedFd>> = store.iter().map(copy).collect();
        copies.expect("copy descriptors")
    }

    /// One more descriptor of the one thing that is stored.
    #[track_caller]
    pub fn bag(&self) -> OwnedFd {
        self.settle();
        let store = self.store.lock().expect("the store");
        assert_eq!(store.len(), 1, "one thing is stored: {store:?}");
        store[0].1.try_clone().expect("copy a descriptor")
    }

    /// Stores this in the place of what is there. What was there.
    pub fn exchange(&self, bag: OwnedFd) -> OwnedFd {
        self.settle();
        let mut store = self.store.lock().expect("the store");
        assert_eq!(store.len(), 1, "one thing is stored: {store:?}");
        std::mem::replace(&mut store[0].1, bag)
    }

    /// How often it was told this.
    pub fn heard(&self, words: &str) -> usize {
        let heard = self.heard.lock().expect("what was heard");
        heard.iter().filter(|it| it.contains(words)).count()
    }

    /// Starts the daemon and waits until it serves.
    pub fn start(&self) -> Daemon {
        let before = self.heard("READY=1");
        let mut daemon = self.spawn(&[]);
        wait_until(DEADLINE, "the daemon to serve", || {
            if let Some(status) = daemon.ended() {
                panic!("the daemon ended ({status}):\n{}", daemon.stderr());
            }
            self.heard("READY=1") > before
        });
        daemon
    }

    /// Starts the daemon by this command, if there is one, and waits for nothing.
    pub fn spawn(&self, by: &[&str]) -> Daemon {
        self.spawn_with(by, "keep")
    }

    /// The same, with another word about stops.
    pub fn spawn_with(&self, by: &[&str], on_stop: &str) -> Daemon {
        let store = self.store.lock().expect("the store");
        let names: Vec<&str> = store.iter().map(|(name, _)| name.as_str()).collect();
        let mut given: Vec<Stdio> = store
            .iter()
            .map(|(_, descriptor)| descriptor.try_clone().expect("copy a descriptor").into())
            .collect();
        // Descriptors come as standard input and output, the only way that no other test's children get them.
        let count = given.len();
        let moves = ["", "3<&0", "3<&0 4<&1"].get(count).expect("two at most");
        let announced = match count {
            0 => String::new(),
            _ => format!(
                "export LISTEN_PID=$$ LISTEN_FDS={count} LISTEN_FDNAMES={}\n",
                names.join(":")
            ),
        };
        let script = format!(
            "export SYSTEMD_EXEC_PID=$$\n{announced}exec \"$@\" {moves} </dev/null >/dev/null"
        );
        let args = [&["-c", &script, "sh"], by, &[PROGRAM]].concat();
        let output = (count > 1).then(|| given.remove(1));
        let input = (count > 0).then(|| given.remove(0));
        Daemon::spawn_between(
            Path::new("/bin/sh"),
            &self.host.namespace,
            &args,
            &[
                ("LIBVIRT_DEBUG", "2"),
                ("LIBVIRT_LOG_OUTPUTS", "2:stderr"),
                ("NOTIFY_SOCKET", SOCKET),
                ("FDSTORE", "8"),
                ("VIRTLOCKD_ON_STOP", on_stop),
            ],
            (input, output),
        )
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A message, if one comes soon.
fn receive(socket: &UnixDatagram) -> Option<(String, Vec<OwnedFd>)> {
    socket
        .set_read_timeout(Some(Duration::from_millis(20)))
        .expect("wait for words for a while");
    let mut bytes = [0; 4096];
    let mut room = nix::cmsg_space!([RawFd; 8]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut room), flags).ok()?;
    let mut descriptors = Vec::new();
    for part in message.cmsgs().expect("what came with the words") {
        if let ControlMessageOwned::ScmRights(numbers) = part {
            // SAFETY: the kernel has just opened them for this process, and nobody else knows of them.
            let open = |number: RawFd| unsafe { OwnedFd::from_raw_fd(number) };
            descriptors.extend(numbers.into_iter().map(open));
        }
    }
    let length = message.bytes;
    Some((
        String::from_utf8_lossy(&bytes[..length]).into_owned(),
        descriptors,
    ))
}

fn obey(words: &str, descriptors: Vec<OwnedFd>, refuses: bool, store: &Store) {
    let name = words.lines().find_map(|line| line.strip_prefix("FDNAME="));
    let name = name.unwrap_or("stored");
    let mut store = store.lock().expect("the store");
    if words.lines().any(|line| line == "FDSTOREREMOVE=1") {
        store.retain(|(known, _)| known != name);
    } else if words.lines().any(|line| line == "FDSTORE=1") && !refuses {
        // Without this systemd would drop what nobody has the other end of.
        assert!(words.lines().any(|line| line == "FDPOLL=0"));
        store.extend(descriptors.into_iter().map(|it| (name.to_owned(), it)));
    }
}
