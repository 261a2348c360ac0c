//! The daemon replaces itself by itself while it works: no reply is lost, no call is carried out
//! twice, no lock is dropped for even a moment, and everything that was set stays set.

use crate::support;
use crate::support::client::{
    Client, Reply, SHARED, acquire, look_up_server, register_as, release,
};
use crate::support::daemon::{ADMIN_SOCKET, Daemon, LOCK_SOCKET, WATCHED};
use crate::support::owner::{OnTerm, Owner};
use crate::support::upgrade::{
    ACTIVATED_ADMIN, ACTIVATED_LOCK, Background, CONFIG, Disturbed, Host, PROGRAM, Rival,
    helper_client, image, upgrade, wait_for_successor,
};
use crate::support::{DEADLINE, require_root, wait_until};
use nix::sys::signal::Signal;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Clients at work in threads of their own until they are told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<u64>>,
}

impl Load {
    fn new() -> Load {
        Load {
            stop: Arc::default(),
            threads: Vec::new(),
        }
    }

    /// Does something until the end, and counts how often.
    fn add(&mut self, mut work: impl FnMut() + Send + 'static) {
        let stop = self.stop.clone();
        self.threads.push(std::thread::spawn(move || {
            let mut rounds = 0;
            while !stop.load(Ordering::Relaxed) {
                work();
                rounds += 1;
            }
            rounds
        }));
    }

    /// A client that takes and gives back a disk of its own, many calls at a time: a call that was
    /// lost or carried out twice makes one behind it fail.
    fn add_busy_client(&mut self, host: &Host, daemon: &Daemon, pid: i32, number: usize) {
        let disk = host.disk(&format!("busy-{number}"));
        let mut client = helper_client(daemon, "guest", pid);
        let calls: Vec<_> = (0..8)
            .flat_map(|_| [acquire("", &disk, 0), release("", &disk)])
            .collect();
        let mut serial = 1000;
        self.add(move || {
            let bytes: Vec<u8> = (serial..)
                .zip(&calls)
                .flat_map(|(serial, call)| call.frame(serial))
                .collect();
            client.send(&bytes);
            for call in &calls {
                let reply = client.receive();
                assert_eq!(
                    reply[20..24],
                    u32::to_be_bytes(serial),
                    "serial of {call:?}"
                );
                Reply::parse(&reply).expect_ok();
                serial += 1;
            }
        });
    }

    /// Clients that come, make a call and go.
    fn add_passers_by(&mut self, daemon: &Daemon, pid: i32) {
        let socket = daemon.lock_socket().to_owned();
        self.add(move || {
            let mut client = Client::connect(&socket);
            client.ping();
            client.call(&register_as("passer-by", pid)).expect_ok();
        });
    }

    /// Owners that come, take a lock, and are killed or leave.
    fn add_mortals(&mut self, host: &Host, daemon: &Daemon) {
        let socket = daemon.lock_socket().to_owned();
        let disk = host.disk("mortal");
        let outside = host.path(&disk);
        let mut crash = false;
        self.add(move || {
            let mut owner = Owner::register(&socket, "mortal", OnTerm::Die);
            owner.call(&acquire("", &disk, 0)).expect_ok();
            crash = !crash;
            if crash {
                owner.kill();
            } else {
                owner.close_connection();
            }
            owner.wait_end();
            wait_until(DEADLINE, "the lock of a dead owner to be freed", || {
                support::lock_probe(&outside).is_none()
            });
        });
    }

    /// Watches the longest time that a PING takes, in microseconds.
    fn add_watch(&mut self, daemon: &Daemon) -> Arc<AtomicU64> {
        let longest = Arc::new(AtomicU64::new(0));
        let mut client = daemon.client();
        let seen = longest.clone();
        self.add(move || {
            let begun = Instant::now();
            client.ping();
            let took = begun.elapsed().as_micros() as u64;
            seen.fetch_max(took, Ordering::Relaxed);
        });
        longest
    }

    /// Ends all of it; everybody has done something.
    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            let rounds = thread.join().expect("a client at work");
            assert!(rounds > 0, "a client did nothing at all");
        }
    }
}

fn inode(path: &Path) -> u64 {
    std::fs::metadata(path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        .ino()
}

#[test]
fn ten_upgrades_under_load_lose_nothing_and_nobody_gets_a_lock_meanwhile() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let mut daemon = host.start(&[], &[]);
    let disk = host.disk("disk");
    let mut guest = host.guest(&daemon, "guest", &disk);
    let paths = [LOCK_SOCKET, ADMIN_SOCKET, "/run/virtlockd.pid"].map(|path| host.path(path));
    let inodes = paths.each_ref().map(|path| inode(path));
    let rival = Rival::of(vec![host.path(&disk), paths[2].clone()]);
    let mut load = Load::new();
    for number in 0..6 {
        load.add_busy_client(&host, &daemon, guest.pid(), number);
    }
    load.add_passers_by(&daemon, guest.pid());
    load.add_passers_by(&daemon, guest.pid());
    load.add_mortals(&host, &daemon);
    load.add({
        let paths = paths.clone();
        move || {
            for (path, inode) in paths.iter().zip(inodes) {
                assert_eq!(self::inode(path), inode, "{}", path.display());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    let longest = load.add_watch(&daemon);
    for _ in 0..10 {
        upgrade(&daemon);
        std::thread::sleep(Duration::from_millis(50));
    }
    load.end();
    rival.never_succeeded();
    eprintln!(
        "the longest that a client waited: {} us",
        longest.load(Ordering::Relaxed)
    );
    assert_eq!(daemon.ended(), None);
    guest.call(&release("", &disk)).expect_ok();
    host.assert_free(&disk);
}

#[test]
fn no_rival_gets_a_lock_although_every_fcntl_and_close_is_slow() {
    if !require_root() {
        return;
    }
    if !support::require_strace() {
        return;
    }
    let host = Host::new();
    let daemon = host.start(&[], &[WATCHED]);
    let disks: Vec<String> = (0..20)
        .map(|number| host.disk(&format!("d{number}")))
        .collect();
    let mut guest = host.guest(&daemon, "guest", &disks[0]);
    for disk in &disks[1..10] {
        guest.call(&acquire("", disk, SHARED)).expect_ok();
    }
    for disk in &disks[10..] {
        guest.call(&acquire("", disk, 0)).expect_ok();
    }
    let slowed = Disturbed::slow(&daemon);
    let rival = Rival::of(disks.iter().map(|disk| host.path(disk)).collect());
    for _ in 0..4 {
        upgrade(&daemon);
        guest.call(&register_as("guest", guest.pid())).expect_ok();
    }
    rival.never_succeeded();
    drop(slowed);
    for disk in &disks {
        guest.call(&release("", disk)).expect_ok();
    }
}

#[test]
fn a_fence_goes_on_and_the_lock_stays_until_the_owner_is_dead() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    let disk = host.disk("disk");
    let mut stubborn = Owner::register(daemon.lock_socket(), "stubborn", OnTerm::Ignore);
    stubborn.call(&acquire("", &disk, 0)).expect_ok();
    let begun = Instant::now();
    stubborn.close_connection();
    let mut upgrades = 0;
    while stubborn.is_alive() {
        let held = support::lock_probe(&host.path(&disk)).is_some();
        assert!(held || !stubborn.is_alive(), "free while the owner lives");
        if upgrades < 5 {
            upgrade(&daemon);
            upgrades += 1;
        }
        assert!(begun.elapsed() < DEADLINE, "the owner is not killed");
    }
    assert_eq!(stubborn.wait_signal(), Some(libc::SIGKILL));
    let took = begun.elapsed();
    assert!(upgrades >= 2, "only {upgrades} upgrades in {took:?}");
    // Not before its time; and the clock was not set back by an upgrade, of which the last came
    // when most of the time was over at the latest.
    assert!(took >= Duration::from_millis(1590), "killed after {took:?}");
    assert!(took < Duration::from_millis(2900), "killed after {took:?}");
    host.wait_free(&disk);
}

#[test]
fn an_owner_that_was_killed_already_is_waited_for_behind_the_upgrade() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    let disk = host.disk("disk");
    let mut owner = Owner::register(daemon.lock_socket(), "traced", OnTerm::Ignore);
    owner.call(&acquire("", &disk, 0)).expect_ok();
    owner.close_connection();
    upgrade(&daemon);
    owner.kill();
    assert_eq!(owner.wait_signal(), Some(libc::SIGKILL));
    host.wait_free(&disk);
    // The disk can be had again, by a new process.
    let mut next = host.guest(&daemon, "next", &disk);
    upgrade(&daemon);
    next.call(&release("", &disk)).expect_ok();
    host.assert_free(&disk);
}

#[test]
fn an_owner_that_dies_behind_the_upgrade_loses_its_locks_and_nobody_else_does() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    let [one, two, both] = ["one", "two", "both"].map(|name| host.disk(name));
    let mut dying = host.guest(&daemon, "dying", &one);
    let mut living = host.guest(&daemon, "living", &two);
    dying.call(&acquire("", &both, SHARED)).expect_ok();
    dying.call(&acquire("", &both, SHARED)).expect_ok();
    living.call(&acquire("", &both, SHARED)).expect_ok();
    upgrade(&daemon);
    dying.kill();
    dying.wait_end();
    host.wait_free(&one);
    host.assert_held(&two);
    assert!(support::lock_probe(&host.path(&both)).is_some());
    living.call(&release("", &both)).expect_ok();
    host.assert_free(&both);
}

#[test]
fn a_second_daemon_with_the_same_pid_file_is_refused_behind_an_upgrade() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    upgrade(&daemon);
    let pid = std::fs::read_to_string(host.path("/run/virtlockd.pid")).expect("the pid file");
    assert_eq!(pid.trim(), daemon.pid().to_string());
    let mut second = Daemon::spawn(Path::new(PROGRAM), &host.namespace, &[], &[]);
    assert!(!second.wait_end().success());
    daemon.client().ping();
    let after = std::fs::read_to_string(host.path("/run/virtlockd.pid")).expect("the pid file");
    assert_eq!(after, pid);
}

#[test]
fn the_idle_timeout_goes_on_behind_an_upgrade() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let mut daemon = host.start(&["-t", "1"], &[]);
    let disk = host.disk("disk");
    let mut guest = host.guest(&daemon, "guest", &disk);
    upgrade(&daemon);
    guest.call(&release("", &disk)).expect_ok();
    assert_eq!(daemon.ended(), None);
    drop(guest);
    assert_eq!(daemon.wait_end().code(), Some(0));
    assert!(!host.path(LOCK_SOCKET).exists(), "the sockets are removed");
}

#[test]
fn the_service_manager_hears_of_each_upgrade_that_happens() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let socket = UnixDatagram::bind(host.path("/run/notify")).expect("bind a notify socket");
    socket
        .set_read_timeout(Some(DEADLINE))
        .expect("set a deadline");
    let next = || {
        let mut buffer = [0; 1000];
        let length = socket.recv(&mut buffer).expect("a notification");
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    let mut daemon = host.start(&[], &[("NOTIFY_SOCKET", "/run/notify")]);
    assert_eq!(next(), "READY=1");
    for _ in 0..2 {
        upgrade(&daemon);
        let reloading = next();
        assert!(
            reloading.starts_with("RELOADING=1\nMONOTONIC_USEC="),
            "{reloading}"
        );
        assert_eq!(next(), "READY=1");
    }
    host.uninstall();
    support::upgrade::refused_upgrade(&daemon);
    daemon.stop();
    assert_eq!(next(), "STOPPING=1");
}

#[test]
fn activation_sockets_survive_and_are_left_in_place_at_the_end() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let (mut daemon, socket) = host.start_activated();
    let mut client = Client::connect(&socket);
    client.ping();
    for _ in 0..2 {
        upgrade(&daemon);
        client.ping();
        Client::connect(&socket).ping();
        Client::connect(&host.path(ACTIVATED_ADMIN)).ping();
    }
    drop(client);
    assert_eq!(daemon.stop().code(), Some(0));
    for path in [ACTIVATED_ADMIN, ACTIVATED_LOCK] {
        assert!(host.path(path).exists(), "{path} was removed");
    }
    assert!(!host.path(LOCK_SOCKET).exists());
}

fn virt_admin(host: &Host, words: &[&str]) -> String {
    let output = host
        .namespace
        .command("virt-admin")
        .args(["-c", "virtlockd:///system"])
        .args(words)
        .output()
        .expect("run virt-admin");
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn what_was_set_over_the_admin_socket_stays_set() {
    if !require_root() {
        return;
    }
    if !Path::new("/usr/bin/virt-admin").exists() {
        return support::skip("needs virt-admin");
    }
    let host = Host::new();
    let daemon = host.start_configured("max_clients = 500\nadmin_max_clients = 50\n");
    let disk = host.disk("disk");
    let _guest = host.guest(&daemon, "guest", &disk);
    for words in [
        &[
            "srv-clients-set",
            "virtlockd",
            "--max-unauth-clients",
            "123",
        ][..],
        &["srv-clients-set", "virtlockd", "--max-clients", "321"],
        &["srv-clients-set", "admin", "--max-unauth-clients", "40"],
        &["srv-clients-set", "admin", "--max-clients", "45"],
        &["srv-threadpool-set", "virtlockd", "--priority-workers", "3"],
        &["daemon-log-filters", "1:util 4:+rpc"],
        &["daemon-log-outputs", "2:stderr 3:file:/run/more.log"],
    ] {
        virt_admin(&host, words);
    }
    let seen = || {
        [
            &["srv-clients-info", "virtlockd"][..],
            &["srv-clients-info", "admin"],
            &["srv-threadpool-info", "virtlockd"],
            &["daemon-log-filters"],
            &["daemon-log-outputs"],
            &["client-list", "virtlockd"],
        ]
        .map(|words| virt_admin(&host, words))
    };
    let before = seen();
    assert!(before[0].contains("321"), "{before:?}");
    for _ in 0..2 {
        upgrade(&daemon);
        assert_eq!(seen(), before);
    }
    // A limit that the configuration gives anew counts again.
    std::fs::write(host.path(support::upgrade::CONFIG), "max_clients = 600\n")
        .expect("change the configuration");
    upgrade(&daemon);
    assert!(virt_admin(&host, &["srv-clients-info", "virtlockd"]).contains("600"));
}

#[test]
fn relative_log_files_stay_in_the_directory_of_the_start() {
    if !require_root() {
        return;
    }
    // From the root of the file system this path leads into the namespace's own /run, too.
    let config = "log_level = 2\nlog_outputs = \"2:file:run/relative.log\"\n";
    for background in [false, true] {
        let host = Host::new();
        std::fs::create_dir_all(host.path("/run/start/run")).expect("make the directories");
        std::fs::write(host.path(CONFIG), config).expect("write the configuration");
        let words = ["-C", "/run/start", PROGRAM, "-f", CONFIG, "-d"];
        let reloaded = |reload: &dyn Fn()| {
            let log = host.path("/run/start/run/relative.log");
            let count = || {
                let log = std::fs::read_to_string(&log).unwrap_or_default();
                log.matches("was read again").count()
            };
            let before = count();
            reload();
            wait_until(DEADLINE, "the configuration to be read", || {
                count() > before
            });
        };
        if background {
            let mut command = host.namespace.command("env");
            let daemon = Background::start(&host, command.args(words));
            for _ in 0..2 {
                daemon.upgrade();
                reloaded(&|| daemon.signal(Signal::SIGHUP));
            }
        } else {
            let words = &words[..5];
            let daemon = Daemon::start_program("env".as_ref(), &host.namespace, words, &[]);
            for _ in 0..2 {
                upgrade(&daemon);
                reloaded(&|| daemon.signal(Signal::SIGHUP));
            }
        }
        assert!(!host.path("/run/relative.log").exists());
    }
}

#[test]
fn log_settings_survive_a_directory_with_blanks_in_its_name() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let config = "log_level = 2\nlog_outputs = \"2:file:log\"\nlog_filters = \"4:hidden\"\n";
    std::fs::write(host.path(CONFIG), config).expect("write the configuration");
    let directory = host.path("/run/a dir: 1");
    std::fs::create_dir(&directory).expect("make the directory");
    let words = ["-C", "/run/a dir: 1", PROGRAM, "-f", CONFIG];
    let daemon = Daemon::start_program("env".as_ref(), &host.namespace, &words, &[]);
    // The settings in force count, not those of the file.
    std::fs::write(host.path(CONFIG), "").expect("empty the configuration");
    for count in 1..3 {
        upgrade(&daemon);
        daemon.client().ping();
        let log = std::fs::read_to_string(directory.join("log")).expect("read the log");
        assert_eq!(log.matches("Took over").count(), count, "{log}");
    }
    assert!(!daemon.stderr().contains("restored"), "{}", daemon.stderr());
}

#[test]
fn log_settings_that_cannot_be_restored_give_way_to_those_of_the_configuration() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let config = |path: &str| format!("log_level = 2\nlog_outputs = \"2:file:{path}\"\n");
    std::fs::create_dir(host.path("/run/logs")).expect("make the directory");
    std::fs::write(host.path(CONFIG), config("/run/logs/old")).expect("write the configuration");
    let words = ["-f", CONFIG];
    let daemon = Daemon::start_program(PROGRAM.as_ref(), &host.namespace, &words, &[]);
    std::fs::remove_dir_all(host.path("/run/logs")).expect("remove the directory");
    std::fs::write(host.path(CONFIG), config("/run/new")).expect("change the configuration");
    upgrade(&daemon);
    daemon.client().ping();
    let log = std::fs::read_to_string(host.path("/run/new")).expect("read the new log");
    let line = log.lines().find(|line| line.contains("restored"));
    let line = line.expect("a line that says so");
    for part in ["/run/logs/old", "No such file", "the configuration count"] {
        assert!(line.contains(part), "{line}");
    }
}

#[test]
fn client_numbers_go_on_and_admin_connections_stay() {
    if !require_root() {
        return;
    }
    if !Path::new("/usr/bin/virt-admin").exists() {
        return support::skip("needs virt-admin");
    }
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    let mut admin = daemon.admin_client();
    look_up_server(&mut admin, 1);
    let mut first = daemon.client();
    first.ping();
    // The probe of the start was client 1.
    let list = || virt_admin(&host, &["client-list", "virtlockd"]);
    let ids = |text: &str| -> Vec<u64> {
        text.lines()
            .filter_map(|line| line.split_whitespace().next()?.parse().ok())
            .collect()
    };
    let before = list();
    assert_eq!(ids(&before), [2]);
    upgrade(&daemon);
    look_up_server(&mut admin, 2);
    assert_eq!(list(), before, "times of connection and all");
    let mut second = daemon.client();
    second.ping();
    assert_eq!(ids(&list()), [2, 3]);
    drop(second);
    upgrade(&daemon);
    upgrade(&daemon);
    let mut third = daemon.client();
    third.ping();
    assert_eq!(ids(&list()), [2, 4], "numbers are not used again");
    look_up_server(&mut admin, 3);
}

#[test]
fn a_restricted_client_stays_restricted_and_a_registered_one_registered() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    let disk = host.disk("disk");
    let mut guest = host.guest(&daemon, "guest", &disk);
    guest.call(&support::client::restrict()).expect_ok();
    let refusal = format!("{:?}", guest.call(&release("", &disk)));
    upgrade(&daemon);
    assert_eq!(format!("{:?}", guest.call(&release("", &disk))), refusal);
    let mut helper = helper_client(&daemon, "guest", guest.pid());
    upgrade(&daemon);
    helper.call(&release("", &disk)).expect_ok();
    host.assert_free(&disk);
}

#[test]
fn connections_that_wait_in_the_backlog_are_served_by_the_successor() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    // Stopped, the daemon takes in nobody; what it finds when it goes on is SIGUSR1 and a crowd.
    daemon.signal(Signal::SIGSTOP);
    let before = image(daemon.pid());
    let mut crowd: Vec<Client> = (0..25).map(|_| daemon.client()).collect();
    for client in &mut crowd {
        client.post(&register_as("guest", 1));
    }
    daemon.signal(Signal::SIGUSR1);
    daemon.signal(Signal::SIGCONT);
    wait_for_successor(daemon.pid(), &before);
    for client in &mut crowd {
        Reply::parse(&client.receive()).expect_ok();
        client.ping();
    }
}

#[test]
fn sigterm_while_a_successor_is_looked_at_ends_the_daemon() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let mut daemon = host.start(&[], &[]);
    host.install_script("sleep 3; echo 'x (virtlockd-rs) 1'; echo 'ledger readable'");
    daemon.signal(Signal::SIGUSR1);
    wait_until(DEADLINE, "the successor to run", || {
        let pid = daemon.pid();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        !children.expect("the daemon's children").is_empty()
    });
    assert_eq!(daemon.stop().code(), Some(0));
}
