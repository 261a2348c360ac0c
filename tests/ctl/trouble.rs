//! What may be wrong: the words, the daemon, the file system.

use crate::commands::Scene;
use crate::run::{self, Running, program};
use crate::support::client::{acquire, frame};
use crate::support::fuse::{Habits, Operation, Share, Trouble};
use crate::support::{DEADLINE, TempDir, wait_until};
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::time::Instant;

#[test]
fn wrong_words_end_with_64_and_a_sentence_and_help_is_no_mistake() {
    let with = |words: &[&str]| run::of(Command::new(program()).args(words));
    for words in [&[][..], &["destroy"], &["status", "--frobnicate"], &["who"]] {
        let wrong = with(words);
        assert!(wrong.stderr.starts_with("virtlockctl: "), "{wrong:?}");
        assert_eq!(wrong.expect(64), "");
    }
    assert!(with(&["--help"]).expect(0).contains("Exit codes"));
    assert!(with(&["who", "--help"]).expect(0).contains("Example:"));
    let version = with(&["--version"]).expect(0);
    assert_eq!(
        version.trim(),
        format!("virtlockctl {}", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn where_no_daemon_is_everybody_says_so() {
    let directory = TempDir::new();
    let socket = directory.path().join("admin-sock");
    let disk = directory.path().join("disk");
    std::fs::write(&disk, b"").expect("make a disk");
    let with = |words: &[&str]| {
        let mut command = Command::new(program());
        run::of(command.arg("--socket").arg(&socket).args(words))
    };
    for words in [&["status"][..], &["events"], &["metrics"]] {
        let none = with(words);
        assert!(
            none.stderr.contains("no daemon can be asked at"),
            "{none:?}"
        );
        assert!(none.stderr.contains("Is virtlockd running"), "{none:?}");
        none.expect(2);
    }
    assert!(with(&["metrics"]).stdout.contains("virtlockd_up 0\n"));
    let free = with(&["who", disk.to_str().expect("a path of text")]);
    assert!(
        free.stderr.contains("Only the kernel was asked"),
        "{free:?}"
    );
    assert!(free.expect(1).ends_with(": free\n"));
}

/// A daemon that answers the first call with these bytes, and then closes the connection.
fn answered_with(answer: impl Fn(&[u8]) -> Vec<u8> + Send + 'static, words: &[&str]) -> run::Ran {
    let directory = TempDir::new();
    let socket = directory.path().join("admin-sock");
    let listener = UnixListener::bind(&socket).expect("listen");
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        let mut buffer = [0; 4096];
        let count = stream.read(&mut buffer).expect("a call");
        stream.write_all(&answer(&buffer[..count])).expect("answer");
    });
    let ran = run::of(
        Command::new(program())
            .arg("--socket")
            .arg(&socket)
            .args(words),
    );
    server.join().expect("the server");
    ran
}

#[test]
fn a_daemon_that_goes_away_in_the_middle_or_talks_nonsense_is_no_reason_to_hang_or_panic() {
    let reply = |call: &[u8], payload: &[u8]| {
        let word = |at: usize| u32::from_be_bytes(call[at..at + 4].try_into().unwrap());
        frame(
            word(4),
            word(8),
            word(12).cast_signed(),
            1,
            word(20),
            0,
            payload,
        )
    };
    for words in [
        &["status"][..],
        &["metrics"],
        &["events"],
        &["--json", "status"],
    ] {
        let gone = answered_with(|_| vec![], words);
        assert!(
            gone.stderr.contains("has closed the connection"),
            "{gone:?}"
        );
        gone.expect(2);
        // A part of an answer, an answer that is too short, and no frame at all.
        let part = answered_with(move |call| reply(call, &[0; 64])[..40].to_vec(), words);
        assert!(
            part.stderr.contains("has closed the connection"),
            "{part:?}"
        );
        part.expect(2);
        let nonsense = answered_with(|_| vec![0; 64], words);
        assert!(nonsense.stderr.contains("cannot be read"), "{nonsense:?}");
        nonsense.expect(2);
    }
    let short = answered_with(move |call| reply(call, &[0; 3]), &["status"]);
    assert!(short.stderr.contains("cannot be read"), "{short:?}");
    short.expect(2);
}

#[test]
fn who_and_status_answer_although_a_share_does_not() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let Some(share) = Share::mount(&scene.namespace, "share", Habits::tenacious()) else {
        return;
    };
    share.put("disk");
    share.put("other");
    scene
        .first
        .call(&acquire("", &share.path("disk"), 0))
        .expect_ok();
    share.trouble(Operation::LookUp, Trouble::Hangs, usize::MAX);
    share.trouble(Operation::GetAttributes, Trouble::Hangs, usize::MAX);
    let start = Instant::now();
    // By its name the daemon knows it.
    let held = scene.ctl(&["who", &share.path("disk")]).expect(0);
    assert!(held.contains("by domain 'first'"), "{held}");
    let other = scene.ctl(&["who", &share.path("other")]).expect(2);
    assert!(
        other.contains("nobody can tell: its file system has not answered"),
        "{other}"
    );
    let status = scene.ctl(&["status"]).expect(0);
    assert!(status.contains(&share.path("disk")), "{status}");
    assert!(start.elapsed() < DEADLINE);
    share.mend(Operation::LookUp);
    share.mend(Operation::GetAttributes);
    wait_until(DEADLINE, "the share to answer again", || {
        scene.ctl(&["who", &share.path("other")]).code == 1
    });
    // Another host has it.
    share.stranger_locks("other", true);
    let elsewhere = scene.ctl(&["--json", "who", &share.path("other")]).json(0);
    assert_eq!(elsewhere["files"][0]["held_by"], "another-host");
    assert_eq!(elsewhere["files"][0].get("note"), None);
    // And its file says who that is.
    let note = "virtlockd lease note 1\nhost: other\ndomain: its guest\npid: 7\nuuid: \x1b\n";
    share.fill("other", note.as_bytes());
    let elsewhere = scene.ctl(&["--json", "who", &share.path("other")]).json(0);
    let note = &elsewhere["files"][0]["note"];
    assert_eq!(note["host"], "other");
    assert_eq!(note["pid"], 7);
    assert!(note["uuid"].is_null());
    let said = scene.ctl(&["who", &share.path("other")]).expect(0);
    let by = "held from another host, as its lease file says: host 'other', domain 'its guest' (pid 7)\n";
    assert!(said.ends_with(by), "{said}");
}

#[test]
fn a_subscriber_is_told_when_its_daemon_ends() {
    let Some(scene) = Scene::new() else { return };
    let mut daemon = scene.daemon;
    let mut running = Running::start(&scene.namespace, &["events", "--only", "upgraded"]);
    let mut status = crate::support::status::Status::over(daemon.admin_client());
    wait_until(DEADLINE, "it to be connected", || {
        status.daemon().admin_clients > 1
    });
    daemon.stop();
    let ended = running.0.wait().expect("its end");
    assert_eq!(ended.code(), Some(2));
    let mut text = String::new();
    let stderr = running.0.stderr.as_mut().expect("its errors");
    stderr.read_to_string(&mut text).expect("read them");
    assert!(
        text.contains("the daemon has closed the connection"),
        "{text}"
    );
}
