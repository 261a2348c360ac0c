//! The processes that work on shares for the daemon: several at a time, not too many, not for ever, and with
//! nothing that is not theirs.

use crate::scene::{STEPS, Scene, VARIANTS};
use crate::support::client::{Reply, acquire, register_as, release};
use crate::support::daemon::helpers_of;
use crate::support::scene::NOBODY;
use crate::support::{is_sanitized, wait_for, wait_until};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// What is not begun at once is: as many at a time.
const MOST: usize = 8;

#[test]
fn calls_on_a_slow_share_are_worked_on_together() {
    let Some(scene) = Scene::new(VARIANTS[0]) else {
        return;
    };
    let mut clients: Vec<_> = (0..64)
        .map(|number| {
            let name = format!("disk{number}");
            scene.share.put(&name);
            let mut client = scene.daemon.client();
            let register = register_as(&format!("guest{number}"), NOBODY + 1 + number);
            client.call(&register).expect_ok();
            (client, scene.share.path(&name))
        })
        .collect();
    scene.share.slow_down(Duration::from_millis(2));
    for (client, path) in &mut clients {
        client.post(&acquire("", path, 0));
    }
    for (client, _) in &mut clients {
        Reply::parse(&client.receive()).expect_ok();
    }
    assert_eq!(scene.share.locks().len(), clients.len());
    let most = scene.share.most_at_once();
    assert!((4..=MOST).contains(&most), "{most} at the same time");
    for (client, path) in &mut clients {
        client.post(&release("", path));
    }
    for (client, _) in &mut clients {
        Reply::parse(&client.receive()).expect_ok();
    }
    scene.share.wait_locks(&[], "given back");
    scene.share.wait_closed("given back");
}

#[test]
fn no_more_than_a_few_processes_hang_in_a_share_that_does_not_answer() {
    let Some(mut scene) = Scene::new(VARIANTS[0]) else {
        return;
    };
    let operation = STEPS[1].operation;
    scene.share.hang(operation);
    let mut clients: Vec<_> = (0..3 * MOST as i32)
        .map(|number| {
            let name = format!("disk{number}");
            scene.share.put(&name);
            let mut client = scene.daemon.client();
            let register = register_as(&format!("guest{number}"), NOBODY + 1 + number);
            client.call(&register).expect_ok();
            client.post(&acquire("", &scene.share.path(&name), 0));
            client
        })
        .collect();
    wait_until(Duration::from_secs(20), "as many as may to hang", || {
        scene.share.hanging(operation) == MOST
    });
    scene.others_are_served();
    let helpers = helpers_of(scene.daemon.pid());
    // Those of the other share have nothing to do.
    assert!(helpers.len() <= 2 * MOST, "{helpers:?}");
    assert_eq!(scene.share.hanging(operation), MOST);
    scene.share.mend_all();
    for client in &mut clients {
        Reply::parse(&client.receive()).expect_ok();
    }
    assert_eq!(scene.share.locks().len(), clients.len());
}

/// The first place in the private memory of a process where this stands.
fn find_in_memory(pid: i32, text: &[u8]) -> Option<String> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    let memory = File::open(format!("/proc/{pid}/mem")).ok()?;
    maps.lines()
        .find(|line| {
            let mut words = line.split_ascii_whitespace();
            let range = words.next().expect("a range");
            if !words.next().is_some_and(|rights| rights.starts_with("rw")) {
                return false;
            }
            let (start, end) = range.split_once('-').expect("a range");
            let number = |text| u64::from_str_radix(text, 16).expect("an address");
            let (start, end) = (number(start), number(end));
            let mut bytes = vec![0; (end - start) as usize];
            // What cannot be read is not there.
            let count = memory.read_at(&mut bytes, start).unwrap_or(0);
            bytes[..count].windows(text.len()).any(|it| it == text)
        })
        .map(str::to_owned)
}

#[test]
fn a_helper_has_nothing_of_the_daemons_and_ends_when_it_has_nothing_to_do() {
    let Some(mut scene) = Scene::new(VARIANTS[0]) else {
        return;
    };
    // Another guest's name, a disk's and what is only in a message.
    let secrets = ["guest", "disk", "path"].map(|what| format!("sec-{what}-ret"));
    let disk = scene.host.disk(&secrets[1]);
    let mut client = scene.daemon.client();
    client
        .call(&register_as(&secrets[0], NOBODY + 1))
        .expect_ok();
    client.call(&acquire("", &disk, 0)).expect_ok();
    let missing = client.call(&acquire("", &format!("/run/{}", secrets[2]), 0));
    assert!(!missing.is_ok());
    let step = STEPS[1];
    scene.share.put("x");
    scene.guest.call(&step.take(&scene.share)).expect_ok();
    scene.share.wait_locks(&["x write"], "granted");
    let pid = scene.daemon.pid();
    let helpers = wait_for(Duration::from_secs(5), "a helper", || {
        let helpers = helpers_of(pid);
        (!helpers.is_empty()).then_some(helpers)
    });
    scene.share.wait_quiet();
    // The daemon has what is looked for.
    assert!(find_in_memory(scene.daemon.reactor(), secrets[0].as_bytes()).is_some());
    for helper in helpers {
        let numbers = std::fs::read_dir(format!("/proc/{helper}/fd")).expect("its descriptors");
        let what = numbers.map(|it| std::fs::read_link(it.expect("a descriptor").path()));
        let what: Vec<String> = what
            .map(|it| it.expect("what it is").to_string_lossy().into_owned())
            .collect();
        // Standard input, output and error, and the socket.
        assert!(what.len() <= 4, "{what:?}");
        assert!(!what.iter().any(|it| it.contains("/run/")), "{what:?}");
        let maps = std::fs::read_to_string(format!("/proc/{helper}/maps")).expect("its memory");
        let is_shared = |line: &str| {
            let rights = line.split_ascii_whitespace().nth(1);
            rights.is_some_and(|rights| rights.ends_with('s'))
        };
        assert!(!maps.lines().any(is_shared), "{maps}");
        for secret in &secrets {
            // A sanitizer keeps what was freed.
            let found = find_in_memory(helper, secret.as_bytes()).filter(|_| !is_sanitized());
            assert_eq!(found, None, "{secret} in a helper's memory");
        }
    }
    wait_until(Duration::from_secs(90), "the idle helpers to end", || {
        helpers_of(pid).is_empty()
    });
    scene.share.wait_locks(&["x write"], "the helpers are gone");
    // They come back when they are needed.
    scene.guest.call(&step.give(&scene.share)).expect_ok();
    scene.nothing_is_left(&step, "given back");
}
