//! Which files are on a share, as the library finds out in a mount namespace of the test's own. Each decision is
//! made while nothing on the share is answered; none asks it anything.

use crate::support::DEADLINE;
use crate::support::fuse::{Habits, Operation, Share, Trouble};
use crate::support::namespace::Namespace;
use crate::support::{require_root, skip};
use nix::sched::{CloneFlags, setns, unshare};
use std::os::unix::ffi::OsStrExt;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;
use virtlockd::host::mount_table::Mounts;
use virtlockd::host::mounts::Mount;
use virtlockd::host::whereabouts::{self, Whereabouts};

/// Every time that this is asked for.
const FOR_EVER: usize = usize::MAX;

/// What a share could be asked by somebody who looks for a file.
const QUESTIONS: [Operation; 5] = [
    Operation::LookUp,
    Operation::GetAttributes,
    Operation::Open,
    Operation::Create,
    Operation::Release,
];

/// Somebody in the namespace who says where files are. Whoever does not answer within the deadline fails the test.
struct Guide {
    paths: mpsc::Sender<String>,
    answers: mpsc::Receiver<Found>,
}

/// Where a file is: on this host, or on what is mounted there.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Found {
    Here,
    On(String),
    Unknown,
}

fn on(place: &str) -> Found {
    Found::On(place.to_owned())
}

impl Guide {
    fn of(namespace: &Namespace) -> Guide {
        Guide::without(namespace, Vec::new())
    }

    /// One to whom these system calls are refused, each with this error.
    fn without(namespace: &Namespace, calls: Vec<(i64, i32)>) -> Guide {
        let (paths, asked) = mpsc::channel::<String>();
        let (answer, answers) = mpsc::channel();
        let holder = namespace.holder();
        std::thread::spawn(move || {
            enter(holder);
            calls.into_iter().for_each(refuse);
            let mut mounts = Mounts::open();
            for path in asked {
                let found = whereabouts::of_path(&mut mounts, path.as_bytes());
                let found = match found {
                    Whereabouts::Local => Found::Here,
                    Whereabouts::Share(None) => Found::Unknown,
                    Whereabouts::Share(Some(id)) => match mounts.get(id) {
                        Some(mount) => on(place(mount)),
                        None => Found::Unknown,
                    },
                };
                if answer.send(found).is_err() {
                    break;
                }
            }
        });
        Guide { paths, answers }
    }

    #[track_caller]
    fn of_path(&self, path: &str) -> Found {
        self.paths.send(path.to_owned()).expect("the guide lives");
        let answer = self.answers.recv_timeout(DEADLINE);
        answer.unwrap_or_else(|_| panic!("where is {path}? No answer"))
    }
}

fn place(mount: &Mount) -> &str {
    std::str::from_utf8(mount.place.as_os_str().as_bytes()).expect("a place of letters")
}

/// Puts this thread into the namespace.
fn enter(holder: i32) {
    let namespace = std::fs::File::open(format!("/proc/{holder}/ns/mnt")).expect("the namespace");
    unshare(CloneFlags::CLONE_FS).expect("a root of this thread's own");
    setns(namespace, CloneFlags::CLONE_NEWNS).expect("enter the namespace");
}

/// From now on this system call is refused to this thread.
#[allow(unsafe_code)]
fn refuse((number, errno): (i64, i32)) {
    let statement = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let number = u32::try_from(number).expect("the number of a call");
    let refusal = libc::SECCOMP_RET_ERRNO | errno as u32;
    let mut filter = [
        statement(0x20, 0, 0, 0),
        statement(0x15, 0, 1, number),
        statement(0x06, 0, 0, refusal),
        statement(0x06, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: 4,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the calls read the program, which lives over them.
    let result = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            | libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            )
    };
    assert_eq!(result, 0, "set a filter");
}

struct Scene {
    namespace: Namespace,
    share: Share,
    guide: Guide,
}

impl Scene {
    fn new() -> Option<Scene> {
        if !require_root() {
            return None;
        }
        let namespace = Namespace::new();
        let share = Share::mount(&namespace, "share", Habits::tenacious())?;
        for name in ["x", "there"] {
            share.put(name);
        }
        std::fs::create_dir(namespace.path("/run/own")).expect("a directory");
        std::fs::write(namespace.path("/run/own/there"), "").expect("a file");
        let guide = Guide::of(&namespace);
        Some(Scene {
            namespace,
            share,
            guide,
        })
    }

    fn run(&self, program: &str, arguments: &[&str]) {
        run(self.namespace.command(program).args(arguments));
    }

    fn link(&self, target: &str, link: &str) {
        std::os::unix::fs::symlink(target, self.namespace.path(link)).expect("a link");
    }

    /// From now on the share answers nothing.
    fn hang(&self) {
        for operation in QUESTIONS {
            self.share.trouble(operation, Trouble::Hangs, FOR_EVER);
        }
    }

    fn asked(&self) -> usize {
        QUESTIONS.iter().map(|it| self.share.calls(*it)).sum()
    }

    /// Checks where these are, of which the share is asked nothing.
    #[track_caller]
    fn check(&self, expected: &[(&str, Found)]) {
        let before = self.asked();
        for (path, found) in expected {
            assert_eq!(self.guide.of_path(path), *found, "{path}");
        }
        assert_eq!(self.asked(), before, "the share was asked");
    }
}

fn run(command: &mut Command) {
    let output = command.output().expect("run a program");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
}

#[test]
fn links_and_bind_mounts_lead_to_where_they_lead_while_a_share_hangs() {
    let Some(scene) = Scene::new() else {
        return;
    };
    scene.link("/run/share", "/run/to-share");
    scene.link("share/there", "/run/own/../file-on-share");
    scene.link("to-share", "/run/twice");
    scene.link("own", "/run/to-own");
    for directory in ["/run/bound", "/run/deep"] {
        std::fs::create_dir(scene.namespace.path(directory)).expect("a directory");
    }
    scene.run("mount", &["--bind", "/run/share", "/run/bound"]);
    scene.run("mount", &["--bind", "/run/own/there", "/run/share/x"]);
    scene.run("mount", &["-t", "tmpfs", "tmpfs", "/run/deep"]);
    std::fs::create_dir(scene.namespace.path("/run/deep/share")).expect("a directory");
    scene.run("mount", &["--bind", "/run/share", "/run/deep/share"]);
    scene.hang();
    scene.check(&[
        ("/run/own/there", Found::Here),
        ("/run/own/missing", Found::Here),
        ("/run/missing/deep", Found::Here),
        ("/run/to-own/there", Found::Here),
        ("/run/own/there/below", Found::Here),
        ("run/own/there", Found::Here),
        ("/usr/bin/env", Found::Here),
        ("/dev/null", Found::Here),
        ("/run/share", on("/run/share")),
        ("/run/share/", on("/run/share")),
        ("/run/share/.", on("/run/share")),
        ("/run/share/..", Found::Here),
        ("/run/share/../own/there", Found::Here),
        ("/run/share/there", on("/run/share")),
        ("/run//share/./missing", on("/run/share")),
        ("/run/share/missing/deep", on("/run/share")),
        ("/run/own/../share/there", on("/run/share")),
        ("run/share/there", on("/run/share")),
        ("/run/to-share/there", on("/run/share")),
        ("/run/to-share", on("/run/share")),
        ("/run/twice/there", on("/run/share")),
        ("/run/file-on-share", on("/run/share")),
        ("/run/bound/there", on("/run/bound")),
        ("/run/deep/there", Found::Here),
        ("/run/deep/share/there", on("/run/deep/share")),
        ("/run/deep/share", on("/run/deep/share")),
        // To open it asks the share whether it is there still.
        ("/run/share/x", on("/run/share")),
    ]);
}

/// As on Linux before 5.6, or under a security policy.
#[test]
fn without_the_calls_that_ask_for_what_is_remembered_the_share_is_not_asked_either() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.link("/run/share", "/run/to-share");
    std::fs::create_dir(scene.namespace.path("/run/bound")).expect("a directory");
    scene.run("mount", &["--bind", "/run/share", "/run/bound"]);
    scene.hang();
    let (openat2, statx) = (libc::SYS_openat2, libc::SYS_statx);
    for refused in [
        vec![(openat2, libc::ENOSYS)],
        vec![(openat2, libc::EPERM), (statx, libc::EPERM)],
        vec![(openat2, libc::EACCES), (statx, libc::ENOSYS)],
        // What it does not know yet: RESOLVE_CACHED.
        vec![(openat2, libc::EINVAL)],
    ] {
        scene.guide = Guide::without(&scene.namespace, refused);
        scene.check(&[
            ("/run/own/there", Found::Here),
            ("/run/own/missing/deep", Found::Here),
            ("/run/share/../own", on("/run/share")),
            ("/run/share/there", on("/run/share")),
            ("/run/to-share/there", on("/run/share")),
            ("run/to-share", on("/run/share")),
            ("/run/bound/there", on("/run/bound")),
            ("/dev/null", Found::Here),
        ]);
    }
}

#[test]
fn what_the_kernel_remembers_of_a_share_leads_through_it() {
    let Some(scene) = Scene::new() else {
        return;
    };
    scene
        .share
        .let_names_be_remembered(Duration::from_secs(600));
    scene.run("mount", &["--bind", "/run/own/there", "/run/share/x"]);
    // (It is looked for from the inside: from outside the namespace is entered by a link of /proc.)
    scene.run("cat", &["/run/share/x", "/run/share/there"]);
    scene.hang();
    scene.check(&[
        ("/run/share/x", Found::Here),
        ("/run/share/there", on("/run/share")),
        ("/run/share/missing", on("/run/share")),
    ]);
}

#[test]
fn what_is_mounted_and_unmounted_later_is_seen() {
    let Some(scene) = Scene::new() else {
        return;
    };
    let over = scene.namespace.path("/run/over");
    std::fs::create_dir(&over).expect("a directory");
    std::fs::write(over.join("there"), "").expect("a file");
    scene.hang();
    let here = [("/run/over/there", Found::Here), ("/run/over", Found::Here)];
    let there = [
        ("/run/over/there", on("/run/over")),
        ("/run/over", on("/run/over")),
    ];
    for _ in 0..3 {
        scene.check(&here);
        scene.run("mount", &["--bind", "/run/share", "/run/over"]);
        scene.check(&there);
        // One on the other.
        scene.run("mount", &["-t", "tmpfs", "tmpfs", "/run/over"]);
        scene.check(&here);
        scene.run("umount", &["/run/over"]);
        scene.check(&there);
        scene.run("umount", &["/run/over"]);
    }
    scene.check(&here);
}

#[test]
fn where_there_was_no_share_the_first_one_is_seen() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    std::fs::create_dir(namespace.path("/run/over")).expect("a directory");
    let guide = Guide::of(&namespace);
    assert_eq!(guide.of_path("/run/over/x"), Found::Here);
    assert_eq!(guide.of_path("/run/share/x"), Found::Here);
    let Some(share) = Share::mount(&namespace, "share", Habits::tenacious()) else {
        return;
    };
    assert_eq!(guide.of_path("/run/share/x"), on("/run/share"));
    assert_eq!(guide.of_path("/run/over/x"), Found::Here);
    run(namespace.command("umount").arg("/run/share"));
    assert_eq!(guide.of_path("/run/share/x"), Found::Here);
    drop(share);
}

/// Whoever opens a file there waits for the automount daemon, which is a script that reads nothing.
#[test]
fn an_automount_whose_daemon_does_not_answer_is_not_waited_for() {
    if !require_root() {
        return;
    }
    let has_automounts =
        std::fs::read_to_string("/proc/filesystems").is_ok_and(|text| text.contains("autofs"));
    if !has_automounts {
        return skip("needs a kernel with autofs");
    }
    let namespace = Namespace::new();
    for directory in ["/run/direct", "/run/indirect", "/run/expiring"] {
        std::fs::create_dir(namespace.path(directory)).expect("a directory");
    }
    // One of them has something mounted on it, and asks its daemon whether that may be unmounted.
    let script = "import fcntl, os, subprocess, sys, threading
reader, writer = os.pipe()
os.setpgid(0, 0)
for kind in ['direct', 'indirect', 'expiring']:
    options = f'fd={writer},pgrp={os.getpgrp()},minproto=5,maxproto=5,'
    options += 'indirect' if kind == 'indirect' else 'direct'
    command = ['mount', '-i', '-t', 'autofs', '-o', options, 'nobody', '/run/' + kind]
    subprocess.run(command, check=True, pass_fds=[writer])
trigger = os.open('/run/expiring', os.O_RDONLY)
subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', '/run/expiring'], check=True)
expire = lambda: fcntl.ioctl(trigger, 0x40049366, (1).to_bytes(4, sys.byteorder))
threading.Thread(target=expire, daemon=True).start()
assert os.read(reader, 4096)
print('mounted', flush=True)
sys.stdin.read()
os._exit(0)
";
    let mut automounter = namespace
        .command("python3")
        .args(["-c", script])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("python");
    let mut said = String::new();
    let output = automounter.stdout.take().expect("its output");
    std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut said).expect("its word");
    assert_eq!(said, "mounted\n");
    let guide = Guide::of(&namespace);
    for (path, place) in [
        ("/run/direct/x", "/run/direct"),
        ("/run/direct", "/run/direct"),
        ("/run/direct/", "/run/direct"),
        ("/run/indirect/x/y", "/run/indirect"),
        ("/run/indirect/x", "/run/indirect"),
        ("/run/expiring/x", "/run/expiring"),
        ("/run/expiring", "/run/expiring"),
    ] {
        assert_eq!(guide.of_path(path), on(place), "{path}");
    }
    assert_eq!(guide.of_path("/run/other"), Found::Here);
    drop(automounter.stdin.take());
    automounter.wait().expect("its end");
}
