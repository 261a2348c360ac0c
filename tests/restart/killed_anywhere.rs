//! The daemon's processes are killed, wherever they are: at any system call of a story, of a recovery and of the
//! end, and at any instruction of a turn; and a recovery is refused what it needs, or told to do something else.
//! Each call has its one right answer, each connection goes on, and no lock is ever free, unless all processes are
//! dead: then the next start has the locks.
//!
//! Of all places a sample is tried; the README says how to try all of them.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::story::{Asked, Story};
use crate::support::client::{
    AUTOCREATE, Call, Client, Reply, SHARED, acquire, create_lockspace, create_resource,
    delete_resource, new_lockspace, register_as, release,
};
use crate::support::company::{Act, At, Company, Counts, Role};
use crate::support::daemon::{c_daemon, program, reactor_of};
use crate::support::owner::{OnTerm, Owner, runs};
use crate::support::random::Random;
use crate::support::tracer::{Seen, Tracer};
use crate::support::upgrade::{helper_client, image};
use crate::support::{DEADLINE, require_root, skip, wait_until};

fn number_from(variable: &str, otherwise: usize) -> usize {
    let text = std::env::var(variable).ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// Every how many system calls there is a try: all of them with `VIRTLOCKD_EVERY_CALL=1`.
pub fn step(otherwise: usize) -> usize {
    number_from("VIRTLOCKD_EVERY_CALL", otherwise)
}

/// How many calls each role makes in a part of the story.
fn count(part: impl Fn(&mut Story)) -> Counts {
    let mut story = Story::begin();
    let company = Company::of(story.daemon.pid(), |_| Act::GoOn);
    part(&mut story);
    company.leave().counts
}

/// Has a try for every `step`th of so many places, two at a time. Fails with all that failed.
#[track_caller]
pub fn at_each(what: &str, places: usize, step: usize, a_try: impl Fn(usize) + Sync) {
    let start = std::time::Instant::now();
    let next = AtomicUsize::new(1);
    let failures = Mutex::new(Vec::new());
    let tries = AtomicUsize::new(0);
    let work = || {
        loop {
            let place = next.fetch_add(step, Ordering::Relaxed);
            if place > places {
                return;
            }
            tries.fetch_add(1, Ordering::Relaxed);
            let begun = Instant::now();
            if catch_unwind(AssertUnwindSafe(|| a_try(place))).is_err() {
                eprintln!("{what}: FAILED at {place}");
                failures.lock().expect("the failures").push(place);
            }
            if begun.elapsed() > Duration::from_secs(5) {
                eprintln!("{what}: {place} took {:?}", begun.elapsed());
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        scope.spawn(work);
    });
    let mut failures = failures.into_inner().expect("the failures");
    failures.sort_unstable();
    eprintln!(
        "{what}: {} of {places} places, {} failures, {:?}",
        tries.into_inner(),
        failures.len(),
        start.elapsed()
    );
    assert!(failures.is_empty(), "{what}: it failed at {failures:?}");
}

/// Kills whoever makes the nth call in this role.
pub fn at_nth(role: Role, nth: usize) -> impl FnMut(&At) -> Act + Send + 'static {
    move |at| match at.role == role && at.nth == nth {
        true => Act::KillAndLeave,
        false => Act::GoOn,
    }
}

fn killed_in_the_story(role: Role, otherwise: usize) {
    if !require_root() {
        return;
    }
    let counts = count(|story| assert_eq!(story.tell(), Asked::Done));
    let places = counts[&role];
    assert!(places > 20, "{counts:?}");
    let cold = AtomicUsize::new(0);
    let what = format!("{role:?} killed");
    at_each(&what, places, step(otherwise), |nth| {
        let mut story = Story::begin();
        let company = Company::of(story.daemon.pid(), at_nth(role, nth));
        let told = catch_unwind(AssertUnwindSafe(|| story.tell()));
        let seen = company.leave();
        let asked = match told {
            Ok(asked) => asked,
            // Between the end of one process and the beginning of another there may be a single one.
            Err(_) if role == Role::Guardian && story.is_nobody_left_soon() => Asked::Nobody,
            Err(panic) => {
                eprintln!("{what}: {nth}, {:?}", seen.last);
                resume_unwind(panic)
            }
        };
        match asked {
            Asked::Done => (),
            Asked::Nobody if role == Role::Guardian => {
                eprintln!("{what}: all are dead at {nth}, {:?}", seen.last);
                cold.fetch_add(1, Ordering::Relaxed);
                story.start_again();
            }
            Asked::Lost if role != Role::Guardian => panic!("lost"),
            _ => {
                assert_eq!(story.upgrade(), Asked::Done, "after {asked:?}");
                story.holds();
            }
        }
    });
    let cold = cold.into_inner();
    eprintln!("{what}: {cold} times all were dead");
    // Five calls between a reactor's end and the understudy, and what a guardian does in the millisecond between
    // the understudy's end and the moment that the reactor knows of it.
    assert!(cold <= 16, "{cold} times all were dead");
}

#[test]
fn a_reactor_that_is_killed_at_any_system_call_of_a_story_answers_each_call_once_and_frees_no_lock()
{
    killed_in_the_story(Role::Reactor, 20);
}

#[test]
fn a_guardian_that_is_killed_at_any_of_its_system_calls_is_not_missed() {
    killed_in_the_story(Role::Guardian, 10);
}

#[test]
fn a_check_that_is_killed_at_any_of_its_system_calls_costs_only_the_upgrade() {
    killed_in_the_story(Role::Check, 40);
}

#[test]
fn an_understudy_that_is_killed_at_any_of_its_system_calls_costs_at_most_the_upgrade() {
    killed_in_the_story(Role::Understudy, 20);
}

#[test]
fn a_scribe_that_is_killed_at_any_of_its_system_calls_costs_at_most_a_note() {
    killed_in_the_story(Role::Scribe, 10);
}

fn killed_in_the_end(role: Role, otherwise: usize) {
    if !require_root() {
        return;
    }
    let counts = count(Story::stop);
    let what = format!("{role:?} killed at the end");
    at_each(&what, counts[&role], step(otherwise), |nth| {
        let mut story = Story::begin();
        let company = Company::of(story.daemon.pid(), at_nth(role, nth));
        let told = catch_unwind(AssertUnwindSafe(|| story.stop()));
        let seen = company.leave();
        if let Err(panic) = told {
            eprintln!("{what}: {nth}, {:?}", seen.last);
            resume_unwind(panic);
        }
    });
}

#[test]
fn a_reactor_that_is_killed_at_any_system_call_of_a_fence_and_of_the_end_is_followed_by_one_that_goes_on()
 {
    killed_in_the_end(Role::Reactor, 25);
}

#[test]
fn a_guardian_that_is_killed_during_the_end_is_not_missed() {
    killed_in_the_end(Role::Guardian, 2);
}

/// How a recovery is disturbed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// The reactor that recovers is killed.
    Killed,
    /// It is refused memory, or a descriptor, once.
    Refused,
    /// It is refused all memory and descriptors from there on.
    RefusedAll,
    /// The guardian is told to end.
    Term,
    /// The guardian is told to replace itself.
    Usr1,
}

const SENDMMSG: u64 = libc::SYS_sendmmsg as u64;
const RECVMMSG: u64 = libc::SYS_recvmmsg as u64;
const EPOLL_WAIT: u64 = libc::SYS_epoll_wait as u64;
const FCNTL: u64 = libc::SYS_fcntl as u64;

/// The calls that a reactor dies at first, of the turn in which somebody takes a lock.
const FIRST: [u64; 3] = [SENDMMSG, RECVMMSG, FCNTL];

/// The error of a call that asks for memory or for a descriptor, should there be none. brk says no in a way
/// of its own.
fn want(at: &At) -> Option<i32> {
    let call = i64::try_from(at.call).ok()?;
    let is_copy = at.arguments[1] == libc::F_DUPFD_CLOEXEC as u64;
    match call {
        libc::SYS_mmap | libc::SYS_mremap => Some(libc::ENOMEM),
        libc::SYS_openat
        | libc::SYS_openat2
        | libc::SYS_epoll_create1
        | libc::SYS_pidfd_open
        | libc::SYS_memfd_create
        | libc::SYS_signalfd4
        | libc::SYS_timerfd_create
        | libc::SYS_socket
        | libc::SYS_socketpair
        | libc::SYS_pipe2 => Some(libc::EMFILE),
        libc::SYS_fcntl if is_copy => Some(libc::EMFILE),
        libc::SYS_epoll_ctl | libc::SYS_ftruncate | libc::SYS_fallocate => Some(libc::ENOMEM),
        _ => None,
    }
}

/// The reactor is killed in the middle of a turn, and what follows is disturbed at its nth system call. How
/// many calls that took until somebody waited for work.
fn disturbed(trouble: Option<Trouble>, nth: usize) -> usize {
    let mut story = Story::begin();
    let (host, pid) = (&story.host, story.guest.pid());
    let mut helper = helper_client(&story.daemon, "guest", pid);
    let mut half = helper_client(&story.daemon, "half", pid);
    let disk = host.disk("half");
    let call = acquire("", &disk, 0).frame(4711);
    half.send(&call[..17]);
    helper.ping();
    let mut leaves = Owner::register(story.daemon.lock_socket(), "leaves", OnTerm::Die);
    leaves
        .call(&acquire("", "/run/new", AUTOCREATE))
        .expect_ok();
    let first = FIRST[nth % FIRST.len()];
    let calls = Arc::new(AtomicUsize::new(0));
    let company = Company::of(story.daemon.pid(), {
        let (calls, mut is_dead, mut is_told) = (calls.clone(), false, false);
        move |at| {
            if at.role != Role::Reactor {
                return Act::GoOn;
            }
            if at.before == 0 {
                let kill = !is_dead && at.call == first && at.of_process > 2;
                is_dead |= kill;
                return if kill { Act::Kill } else { Act::GoOn };
            }
            if at.before > 1 {
                return Act::GoOn;
            }
            if at.call == EPOLL_WAIT && calls.load(Ordering::Relaxed) == 0 {
                calls.store(at.of_process, Ordering::Relaxed);
            }
            // The last ones may not come to it.
            let is_there = at.of_process == nth || (at.call == EPOLL_WAIT && at.of_process < nth);
            let is_there = is_there && !std::mem::replace(&mut is_told, is_there);
            match trouble {
                Some(Trouble::Killed) if is_there => Act::KillAndLeave,
                Some(Trouble::Refused) if is_there => want(at).map_or(Act::GoOn, Act::Refuse),
                Some(Trouble::RefusedAll)
                    if at.of_process >= nth && calls.load(Ordering::Relaxed) == 0 =>
                {
                    want(at).map_or(Act::GoOn, Act::Refuse)
                }
                Some(Trouble::Term) if is_there => Act::TellAndLeave(Signal::SIGTERM),
                Some(Trouble::Usr1) if is_there => Act::TellAndLeave(Signal::SIGUSR1),
                _ => Act::GoOn,
            }
        }
    });
    let main = story.main();
    let (image, refusals) = (image(main), story.refusals());
    if trouble == Some(Trouble::Term) {
        story.may_end();
        helper.post(&acquire("", "/run/taken", 0));
        drop((helper, half));
        story.await_end(main);
        company.leave();
        return 0;
    }
    leaves.close_connection();
    helper.call(&acquire("", "/run/taken", 0)).expect_ok();
    host.assert_held("/run/taken");
    helper.call(&release("", "/run/taken")).expect_ok();
    half.send(&call[17..]);
    Reply::parse(&half.receive()).expect_ok();
    host.assert_held(&disk);
    half.call(&release("", &disk)).expect_ok();
    assert_eq!(leaves.wait_signal(), Some(Signal::SIGTERM as i32));
    wait_until(DEADLINE, "what was made to be removed", || {
        !host.path("/run/new").exists()
    });
    if trouble == Some(Trouble::Usr1) {
        let asked = story.await_upgrade(main, &image, refusals);
        assert_eq!(asked, Asked::Done);
    }
    story.holds();
    company.leave();
    calls.load(Ordering::Relaxed)
}

fn disturbed_everywhere(trouble: Trouble, otherwise: usize) {
    if !require_root() {
        return;
    }
    let places = (0..FIRST.len()).map(|first| disturbed(None, first)).max();
    let places = places.unwrap_or(0);
    assert!(places > 60, "a recovery takes {places} calls");
    at_each(
        &format!("recovery, {trouble:?}"),
        places,
        step(otherwise),
        |nth| {
            disturbed(Some(trouble), nth);
        },
    );
}

#[test]
fn a_reactor_that_is_killed_again_at_any_system_call_of_its_recovery_is_recovered_all_the_same() {
    disturbed_everywhere(Trouble::Killed, 12);
}

#[test]
fn a_recovery_that_is_refused_memory_or_a_descriptor_costs_nothing() {
    disturbed_everywhere(Trouble::Refused, 8);
}

#[test]
fn a_recovery_without_memory_and_descriptors_costs_nothing_but_time() {
    disturbed_everywhere(Trouble::RefusedAll, 24);
}

#[test]
fn an_end_that_is_asked_for_anywhere_in_a_recovery_comes() {
    disturbed_everywhere(Trouble::Term, 24);
}

#[test]
fn an_upgrade_that_is_asked_for_anywhere_in_a_recovery_comes() {
    disturbed_everywhere(Trouble::Usr1, 24);
}

/// Guardian and reactor are killed, one first, and then whoever is the guardian at its nth system call from then
/// on. Whether nobody was left.
fn both_killed(first: Role, nth: usize) -> bool {
    let mut story = Story::begin();
    let mut helper = helper_client(&story.daemon, "guest", story.guest.pid());
    let mut is_first_dead = false;
    let mut calls = 0;
    let company = Company::of(story.daemon.pid(), move |at| {
        if at.before == 0 && at.role == first && !is_first_dead {
            let is_time = match first {
                // It wakes up for a signal.
                Role::Guardian => true,
                _ => at.call == SENDMMSG,
            };
            is_first_dead |= is_time;
            return if is_time { Act::Kill } else { Act::GoOn };
        }
        if !is_first_dead || at.role != Role::Guardian {
            return Act::GoOn;
        }
        calls += 1;
        if calls == nth {
            Act::KillAndLeave
        } else {
            Act::GoOn
        }
    });
    if first == Role::Guardian {
        story.signal(Signal::SIGHUP);
    }
    let told = catch_unwind(AssertUnwindSafe(|| {
        helper.call(&acquire("", "/run/taken", 0)).expect_ok();
        helper.call(&release("", "/run/taken")).expect_ok();
        story.holds();
    }));
    let seen = company.leave();
    match told {
        Ok(()) => {
            // Its reactor may have answered before it took the place of a guardian that was killed.
            wait_until(DEADLINE, "somebody to be the guardian", || {
                runs(story.main())
            });
            let asked = match story.upgrade() {
                // Whoever was asked had been killed, and was not dead yet.
                Asked::Lost => story.upgrade(),
                asked => asked,
            };
            assert_eq!(asked, Asked::Done);
            story.holds();
            false
        }
        Err(_) if story.is_nobody_left_soon() => {
            eprintln!("{first:?} first: all are dead at {nth}: {:?}", seen.last);
            story.start_again();
            true
        }
        Err(panic) => resume_unwind(panic),
    }
}

#[test]
fn guardian_and_reactor_can_be_killed_in_either_order() {
    if !require_root() {
        return;
    }
    for (first, places) in [(Role::Reactor, 10), (Role::Guardian, 60)] {
        let step = step(places / 10);
        let cold = AtomicUsize::new(0);
        at_each(&format!("{first:?} first"), places, step, |nth| {
            cold.fetch_add(usize::from(both_killed(first, nth)), Ordering::Relaxed);
        });
        eprintln!("{first:?} first: {} times all were dead", cold.into_inner());
    }
}

/// The calls that are made while the reactor is looked at instruction by instruction, one after the other: what
/// is to be true of each answer.
fn calls_of(pid: i32) -> [(Call, bool); 12] {
    [
        (acquire("", "/run/taken", 0), true),
        (acquire("", "/run/taken", 0), false),
        (release("", "/run/taken"), true),
        (acquire("", "/run/held", 0), false),
        (acquire("/run/leases", "lease", AUTOCREATE | SHARED), true),
        (release("/run/leases", "lease"), true),
        (acquire("", "/run/new", AUTOCREATE), true),
        (release("", "/run/new"), true),
        (register_as("guest", pid), true),
        (create_resource("/run/leases", "made"), true),
        (delete_resource("/run/leases", "made"), true),
        (create_lockspace("/run/more"), true),
    ]
}

/// A daemon that is killed in its turns.
struct Stepped {
    story: Story,
    client: Client,
    calls: [(Call, bool); 12],
    next: usize,
    /// When its reactor was killed last.
    killed: Option<Instant>,
}

impl Stepped {
    fn begin() -> Stepped {
        let story = Story::begin();
        let mut client = helper_client(&story.daemon, "guest", story.guest.pid());
        client.call(&new_lockspace("/run/leases")).expect_ok();
        let calls = calls_of(story.guest.pid());
        Stepped {
            story,
            client,
            calls,
            next: 0,
            killed: None,
        }
    }

    /// One call, and so many instructions from the moment that it has been received, at most to the end of
    /// its turn; then the reactor is killed, unless it is `spared`. How many instructions it made, and
    /// whether the turn was not over.
    fn round(&mut self, most: usize, is_spared: bool) -> (usize, bool) {
        // One that dies so soon is followed more slowly.
        if let Some(killed) = self.killed {
            let soon = Duration::from_millis(1050).saturating_sub(killed.elapsed());
            std::thread::sleep(soon);
        }
        let (call, is_granted) = &self.calls[self.next];
        self.next = (self.next + 1) % self.calls.len();
        let reactor = Tracer::seize(self.story.daemon.reactor(), false).expect("the reactor");
        let serial = self.client.post(call);
        loop {
            assert_eq!(reactor.to_next_call(), Seen::Stopped);
            if matches!(reactor.call(), Some((RECVMMSG, 1..))) {
                break;
            }
        }
        let mut steps = 0;
        let mut is_inside = true;
        while is_inside && steps < most {
            assert_eq!(reactor.step(), Seen::Stopped);
            steps += 1;
            is_inside = reactor.next_call() != Some(EPOLL_WAIT);
        }
        if is_spared {
            reactor.release();
        } else {
            reactor.kill();
            self.killed = Some(Instant::now());
        }
        let reply = self.client.receive();
        assert_eq!(reply[20..24], serial.to_be_bytes(), "{call:?}");
        let reply = Reply::parse(&reply);
        assert_eq!(reply.is_ok(), *is_granted, "{call:?}: {reply:?}");
        (steps, is_inside)
    }
}

#[test]
fn a_reactor_that_is_killed_at_any_instruction_of_a_turn_answers_each_call_once() {
    if !require_root() {
        return;
    }
    const THREADS: usize = 2;
    let rounds = number_from("VIRTLOCKD_INSTRUCTIONS", 24) / THREADS;
    let daemons = (rounds / 3).clamp(1, 16);
    let seed = Random::seed_from("VIRTLOCKD_SEED");
    let start = Instant::now();
    let mut measured = Stepped::begin();
    let lengths = [(); 12].map(|()| measured.round(usize::MAX, true).0);
    let inside = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (inside, lengths) = (&inside, &lengths);
            scope.spawn(move || {
                let mut random = Random::new(seed.wrapping_add(thread as u64));
                let mut all: Vec<Stepped> = (0..daemons).map(|_| Stepped::begin()).collect();
                for round in 0..rounds {
                    let one = &mut all[round % daemons];
                    let most = random.below(lengths[one.next]);
                    let (_, is_inside) = one.round(most, false);
                    inside.fetch_add(usize::from(is_inside), Ordering::Relaxed);
                }
                for one in &mut all {
                    // No answer too many.
                    one.client.ping();
                    one.story.holds_but_for_taken();
                }
            });
        }
    });
    let inside = inside.into_inner();
    eprintln!(
        "seed {seed}: {} kills, {inside} of them inside a turn; turns take {lengths:?} instructions; {:?}",
        rounds * THREADS,
        start.elapsed()
    );
    assert!(inside >= rounds * THREADS * 8 / 10);
}

/// From libvirt's daemon with its locks of the process, through a crash and an upgrade, and back.
fn there_and_back(story: &mut Story, c_daemon: &Path) {
    let settled = |story: &mut Story, done: &str| {
        for _ in 0..5 {
            if story.upgrade() == Asked::Done {
                return;
            }
        }
        panic!("{done} does not come");
    };
    story.host.install(&program());
    settled(story, "the take-over");
    story.holds();
    let reactor = reactor_of(story.main());
    let _ = kill(Pid::from_raw(reactor), Signal::SIGKILL);
    story.holds();
    settled(story, "the upgrade");
    story.holds();
    story.host.install(c_daemon);
    settled(story, "the way back");
    story.host.assert_held("/run/held");
    let busy = story.guest.call(&acquire("", "/run/held", 0));
    assert!(!busy.is_ok());
    story.host.assert_held("/run/held");
    story.never_robbed();
}

#[test]
fn the_way_from_libvirts_daemon_and_back_can_be_disturbed_anywhere() {
    if !require_root() {
        return;
    }
    let Some(c_daemon) = c_daemon() else {
        return skip("needs libvirt's virtlockd");
    };
    let mut story = Story::of(&c_daemon);
    let company = Company::of(story.daemon.pid(), |_| Act::GoOn);
    there_and_back(&mut story, &c_daemon);
    let counts = company.leave().counts;
    drop(story);
    for (role, step_of_role) in [
        (Role::Reactor, 80),
        (Role::Check, 200),
        (Role::Understudy, 80),
    ] {
        let what = format!("there and back, {role:?} killed");
        at_each(&what, counts[&role], step(step_of_role), |nth| {
            let mut story = Story::of(&c_daemon);
            let company = Company::of(story.daemon.pid(), at_nth(role, nth));
            let told = catch_unwind(AssertUnwindSafe(|| there_and_back(&mut story, &c_daemon)));
            let seen = company.leave();
            if let Err(panic) = told {
                eprintln!("{what}: {nth}, {:?}", seen.last);
                resume_unwind(panic);
            }
        });
    }
}

#[test]
fn a_daemon_at_its_limit_of_descriptors_is_recovered() {
    if !require_root() {
        return;
    }
    let mut story = Story::begin();
    let mut helper = helper_client(&story.daemon, "guest", story.guest.pid());
    story.daemon.wait_until_asleep();
    let open = std::fs::read_dir(format!("/proc/{}/fd", story.daemon.reactor()));
    let numbers: Vec<usize> = open
        .expect("its descriptors")
        .filter_map(|it| it.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    let limit = (0..)
        .find(|number| !numbers.contains(number))
        .expect("a free number");
    story.daemon.limit(&format!("--nofile={limit}"));
    let _ = kill(Pid::from_raw(story.daemon.reactor()), Signal::SIGKILL);
    assert!(!helper.call(&acquire("", "/run/held", 0)).is_ok());
    story
        .guest
        .call(&acquire("", "/run/held", 0))
        .expect_error(87, 51);
    story.never_robbed();
}

#[test]
fn a_guardian_that_cannot_be_copied_for_a_while_tries_again_soon() {
    if !require_root() {
        return;
    }
    let mut story = Story::begin();
    let mut refused = 0;
    let company = Company::of(story.daemon.pid(), move |at| {
        let is_copy = at.role == Role::Guardian && at.call == libc::SYS_clone as u64;
        refused += usize::from(is_copy);
        match is_copy && refused <= 5 {
            true => Act::Refuse([libc::ENOMEM, libc::EAGAIN][refused % 2]),
            false => Act::GoOn,
        }
    });
    let start = Instant::now();
    let _ = kill(Pid::from_raw(story.daemon.reactor()), Signal::SIGKILL);
    story.holds();
    assert!(
        start.elapsed() < Duration::from_secs(8),
        "{:?}",
        start.elapsed()
    );
    assert!(company.leave().last.is_some());
}
