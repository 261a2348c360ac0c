//! A small world and the whole daemon in it: owners that are real processes with several
//! connections each, files with second names of every sort, strangers who lock, remove and make
//! files, deaths, upgrades, SIGHUP, and calls that mean nothing, all in random order.
//!
//! A list of rows says what must come of each step ([`model`]). After each step the kernel is asked
//! from outside what is locked, exactly; the names are listed, and the contents read. What an owner
//! that is made to die holds must be locked for as long as its process runs. Some worlds are begun by
//! libvirt's daemon, whose POSIX locks ours then has to keep.
//!
//! `VIRTLOCKD_WORLD_SEED` repeats the world whose seed was printed, `VIRTLOCKD_WORLD_STEPS` goes on
//! for longer: world after world, each with the next seed.

mod actor;
mod files;
mod model;
mod outside;
mod strangers;

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use crate::support::client::{
    CALL, Client, DOMAIN_RPC, LOCK_PROGRAM, RESOURCE_BUSY, RPC_ERROR, Reply, frame, register_as,
    release,
};
use crate::support::daemon::{self, Daemon};
use crate::support::owner::{OnTerm, Owner, runs};
use crate::support::random::Random;
use crate::support::upgrade::{image, upgrade, wait_for_successor};
use crate::support::{DEADLINE, require_root, skip, wait_for, wait_until};
use actor::{Actor, Leaving, Loan};
use files::{BUSY_PLACES, FileId, Files, LOCKSPACES, LOOSE_NAMES, Node, PLACES, Place};
use model::{Ask, Effect, Mode, Model, Program, Refusal, Request, Session};
use nix::sys::signal::Signal;
use outside::{On, Outside, id_of, open_devices};
use strangers::Stranger;

/// How many steps are made without being asked for more.
const STEPS: usize = 3000;
/// How many steps a world lasts.
const STEPS_OF_A_WORLD: usize = 400;
/// How many steps are made behind libvirt's daemon.
const STEPS_BEHIND_LIBVIRTS: usize = 1200;
/// So many on a share.
const STEPS_ON_SHARE: usize = 800;
/// How many calls libvirt's daemon may get before ours takes over.
const CALLS_BEFORE: usize = 25;
const OWNERS: usize = 5;
const CONNECTIONS: usize = 3;
/// The first half lock open files, the others are processes of their own with POSIX locks.
const STRANGERS: usize = 4;
/// A number that is no process.
const NOBODY: i32 = i32::MAX;
/// How many steps an owner that ignores SIGTERM is seen to hold what it holds.
const STEPS_OF_GRACE: usize = 12;
/// After that much of the 1.6 s nothing more is asked of it: it might be killed in the midst.
const SAFE_GRACE: Duration = Duration::from_millis(600);
/// How many owners that ignore SIGTERM close their connection in a world: each takes 1.6 s.
const STUBBORN_LEAVERS: usize = 1;
/// How long a torn look at `/proc/locks` may differ.
const TORN: Duration = Duration::from_secs(2);

struct World {
    seed: u64,
    on: On,
    step: usize,
    /// What was done, for the text of a failure.
    told: Vec<String>,
    random: Random,
    // Before the daemon and its namespace: owners die first.
    actors: Vec<Option<Actor>>,
    /// Their numbers must not be used again while rows name them.
    dead: Vec<Owner>,
    loans: Vec<Loan>,
    /// How often the daemon freed the locks of a process, and said so.
    freed: BTreeMap<i32, usize>,
    strangers: Vec<Stranger>,
    stubborn_leavers: usize,
    /// The image of the daemon when it was told to replace itself, until it has.
    replacing: Option<Vec<u8>>,
    /// How often what happened.
    counts: BTreeMap<&'static str, usize>,
    /// Somebody whose PINGs tell that the daemon has done what came before.
    bystander: Client,
    model: Model,
    daemon: Daemon,
    outside: Outside,
}

impl World {
    fn new(seed: u64, program: Program, on: On) -> World {
        let path = match program {
            Program::Ours => daemon::program(),
            Program::Libvirts => daemon::c_daemon().expect("libvirt's daemon is there"),
        };
        let outside = Outside::new(&path, on);
        let daemon = outside.host.start_configured("");
        // Registered, because libvirt's daemon cannot be replaced under one that is not.
        let mut bystander = daemon.client();
        bystander
            .call(&register_as("bystander", NOBODY))
            .expect_ok();
        let mut world = World {
            seed,
            on,
            step: 0,
            told: Vec::new(),
            random: Random::new(seed),
            actors: (0..OWNERS).map(|_| None).collect(),
            dead: Vec::new(),
            loans: Vec::new(),
            freed: BTreeMap::new(),
            strangers: (0..STRANGERS).map(Stranger::new).collect(),
            stubborn_leavers: 0,
            replacing: None,
            counts: BTreeMap::new(),
            bystander,
            model: Model::new(Files::default(), program),
            daemon,
            outside,
        };
        world.model.files.nodes = world.outside.list();
        for file in world.listed_files() {
            world.outside.keep_handle(file.0, &file.1);
        }
        world
    }

    fn tell(&mut self, what: String) {
        self.told.push(format!("step {}: {what}", self.step));
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn listed_files(&self) -> Vec<(FileId, String)> {
        let nodes = self.model.files.nodes.iter();
        nodes
            .filter_map(|(name, node)| match node {
                Node::File(file) => Some((*file, name.clone())),
                Node::Directory | Node::Link(_) => None,
            })
            .collect()
    }

    // ---- what is looked at after each step ----

    fn check(&mut self) {
        let begun = Instant::now();
        while let Some((wrong, may_be_torn)) = self.what_is_wrong() {
            // An owner that was made to die may have done so a moment ago, also between two of the
            // things that are looked at.
            if !self.bury_those_that_left() {
                assert!(may_be_torn && begun.elapsed() < TORN, "{wrong}");
            }
        }
        self.outside.check_contents();
    }

    /// What is not as the model says, and whether it may look so because it was read in pieces.
    fn what_is_wrong(&self) -> Option<(String, bool)> {
        if let Some(wrong) = self.wrongly_locked() {
            return Some((format!("the kernel's view of a file: {wrong:?}"), false));
        }
        // Others lock and unlock files of theirs while the list in /proc is read.
        let (seen, expected) = (self.outside.kernel_locks(), self.model.kernel_locks());
        if seen != expected {
            return Some((format!("locks: {seen:?}, not {expected:?}"), true));
        }
        let (seen, expected) = (self.outside.list(), &self.model.files.nodes);
        let only_in = |these: &BTreeMap<String, Node>, those: &BTreeMap<String, Node>| {
            let mut names: Vec<_> = these.clone().into_iter().collect();
            names.retain(|(name, node)| those.get(name) != Some(node));
            names
        };
        let (more, less) = (only_in(&seen, expected), only_in(expected, &seen));
        let is_right = more.is_empty() && less.is_empty();
        (!is_right).then(|| {
            (
                format!("names there: {more:?}, names missing: {less:?}"),
                false,
            )
        })
    }

    /// A file that is not locked as it should be, how it is, and how it should be.
    fn wrongly_locked(&self) -> Option<(FileId, Option<Mode>, Option<Mode>)> {
        self.outside.files().find_map(|file| {
            let expected = self.model.modes(file).first().copied();
            let seen = self.outside.seen(file);
            (seen != expected).then_some((file, seen, expected))
        })
    }

    // ---- the end of an owner ----

    /// Owners that ignored SIGTERM and are dead by now: their locks go. Whether there was one.
    fn bury_those_that_left(&mut self) -> bool {
        let dead = |actor: &Option<Actor>| {
            let actor = actor.as_ref();
            actor.is_some_and(|actor| actor.leaving.is_some() && !runs(actor.pid()))
        };
        let slots: Vec<usize> = (0..OWNERS)
            .filter(|slot| dead(&self.actors[*slot]))
            .collect();
        for slot in &slots {
            self.bury(*slot);
        }
        !slots.is_empty()
    }

    /// Waits for the death of an owner that was made to die, and for what the daemon makes of it.
    /// What only it holds stays locked until it is dead.
    fn bury(&mut self, slot: usize) {
        let actor = self.actors[slot].take().expect("somebody to bury");
        let pid = actor.pid();
        let its_own = self.model.held_alone_by(pid);
        let begun = Instant::now();
        loop {
            let free = its_own
                .iter()
                .find(|file| self.outside.seen(**file).is_none());
            if !runs(pid) {
                break;
            }
            assert_eq!(free, None, "free although its owner {pid} runs");
            assert!(begun.elapsed() < DEADLINE, "owner {pid} does not die");
        }
        let mut sessions = actor.sessions.iter();
        let mut is_missed = actor.leaving.is_some()
            || self.model.holds(pid) && sessions.any(|session| actor.stands_for_it(*session));
        if !is_missed && self.model.holds(pid) {
            // Without a connection of its own it is watched; with one that somebody else still has, it
            // is if that began before.
            self.settle();
            is_missed = !self.is_own_lent(pid) || self.is_said_to_be_dead(pid);
        }
        if is_missed {
            self.locks_are_freed(pid);
        }
        for loan in &mut self.loans {
            loan.lender_has_it &= loan.lender != pid;
        }
        self.settle();
        self.dead.push(actor.owner);
    }

    /// Whether a connection that stands for this process is open in another one.
    fn is_own_lent(&self, pid: i32) -> bool {
        let mut loans = self.loans.iter();
        loans.any(|loan| loan.lender == pid && loan.session.pid == Some(pid))
    }

    /// Whether the log says of one more death of this owner than is known.
    fn is_said_to_be_dead(&self, pid: i32) -> bool {
        let log = self.daemon.stderr();
        let said = log.lines().filter(|line| {
            let texts = [
                format!("pid {pid}) is dead: "),
                format!("Process {pid} is dead: "),
            ];
            texts.iter().any(|text| line.contains(text))
        });
        said.count() > self.freed.get(&pid).copied().unwrap_or_default()
    }

    /// Waits until the daemon has freed the locks of a dead owner, and says how many.
    fn locks_are_freed(&mut self, pid: i32) {
        self.count("deaths of holders");
        let count = self.model.end_owner(pid);
        let times = self.freed.entry(pid).or_default();
        *times += 1;
        let ends = [
            format!("pid {pid}) is dead: {count} of its locks"),
            format!("Process {pid} is dead: {count} of its locks"),
            format!("pid {pid}) is dead: "),
            format!("Process {pid} is dead: "),
        ];
        let said = wait_for(DEADLINE, "the daemon to free a dead owner's locks", || {
            let log = self.daemon.stderr();
            let mut lines = log.lines().filter_map(|line| {
                let end = ends.iter().position(|end| line.contains(end))?;
                Some((end, line.to_owned()))
            });
            lines.nth(*times - 1)
        });
        assert!(said.0 < 2, "{count} locks of owner {pid}: {}", said.1);
    }

    /// When this returns, the daemon has seen every connection that was closed before, and every death.
    /// An image may answer the first PING that it gets before it clears away what ended, but not the
    /// second: while one is replaced, its successor may have got no more than one of two.
    fn settle(&mut self) {
        let images = 1 + usize::from(self.replacing.is_some());
        for _ in 0..2 * images {
            self.bystander.ping();
        }
    }

    /// A connection is over, which its owner or the daemon closed.
    fn connection_ended(&mut self, slot: usize, connection: usize) {
        let actor = self.actors[slot].as_mut().expect("an owner");
        let session = actor.sessions[connection].take();
        self.session_ended(slot, session);
    }

    /// The same, of an owner that lives. It has left with the last connection that stands for it.
    fn session_ended(&mut self, slot: usize, session: Option<Session>) {
        let actor = self.actors[slot].as_ref().expect("an owner");
        let pid = actor.pid();
        let is_its_end = actor.stands_for_it(session) && self.model.holds(pid);
        let mut others = actor.sessions.iter();
        let is_last = !others.any(|other| actor.stands_for_it(*other));
        if !is_its_end || actor.leaving.is_some() || !is_last || self.is_own_lent(pid) {
            self.settle();
            return;
        }
        let actor = self.actors[slot].as_mut().expect("an owner");
        actor.leaving = Some(Leaving {
            since: Instant::now(),
            at_step: self.step,
        });
        match actor.on_term {
            OnTerm::Die => self.bury(slot),
            OnTerm::Ignore => {
                self.stubborn_leavers += 1;
                self.settle();
            }
        }
    }

    // ---- the steps ----

    /// Libvirt's daemon grants some locks, of its own kind, and ours takes over. Nothing is asked to
    /// which the two have other answers, but for two names of one file that are both shared.
    fn begin_with_libvirts(&mut self) {
        for slot in 0..OWNERS {
            self.actor(slot);
        }
        for lockspace in LOCKSPACES
            .iter()
            .filter(|path| path.starts_with("/run/w/ls1"))
        {
            self.call(0, 0, plain(Ask::CreateLockspace(lockspace)));
        }
        for _ in 0..CALLS_BEFORE {
            let slot = self.random.below(OWNERS);
            let request = plain(Ask::Acquire {
                place: self.choose_place_or_held(),
                mode: *self
                    .random
                    .pick(&[Mode::Exclusive, Mode::Shared, Mode::Shared]),
                make: self.random.percent(40),
            });
            let pid = self.actor(slot).pid();
            let session = Session {
                pid: Some(pid),
                is_restricted: false,
            };
            let verdict = self.model.judge(session, request);
            if verdict.opens.is_none() && verdict.outcome.is_ok() {
                self.call(slot, 0, request);
                self.check();
            }
        }
        self.tell("our daemon takes over".into());
        self.outside.host.install(&daemon::program());
        upgrade(&self.daemon);
        self.model.take_over();
        self.check();
    }

    fn make_step(&mut self) {
        let slot = self.random.below(OWNERS);
        let chance = self.random.below(100);
        // Whatever a step draws, the next one does not depend on it.
        let next = self.random.next();
        match chance {
            0..77 => self.owner_calls(slot),
            77..80 => self.owner_connects(slot),
            80..83 => self.owner_leaves(slot),
            83..85 => self.owner_is_killed(slot),
            85..88 => self.connection_is_lent(slot),
            88..95 => self.stranger_acts(),
            95..96 => self.names_change(),
            96..98 => self.daemon_replaces_itself(),
            _ => {
                self.tell("SIGHUP".into());
                self.count("SIGHUPs");
                self.daemon.signal(Signal::SIGHUP);
            }
        }
        // What this draws depends on the clock, too.
        self.end_graces();
        self.random = Random::new(next);
        self.check();
    }

    /// Owners that ignore SIGTERM have been looked at for long enough: some are killed, for some
    /// the daemon has to.
    fn end_graces(&mut self) {
        for slot in 0..OWNERS {
            let Some(actor) = &self.actors[slot] else {
                continue;
            };
            let Some(leaving) = actor.leaving else {
                continue;
            };
            let is_late = leaving.since.elapsed() >= SAFE_GRACE;
            if self.step < leaving.at_step + STEPS_OF_GRACE && !is_late {
                continue;
            }
            let pid = actor.pid();
            // Whoever runs then has to know of it.
            if self.random.percent(50) {
                self.daemon_replaces_itself();
            }
            let is_killed = self.random.percent(40);
            let how = if is_killed { "kill -9 of" } else { "await" };
            self.tell(format!("{how} the leaving owner {slot} (pid {pid})"));
            if is_killed && let Some(actor) = &self.actors[slot] {
                actor.owner.kill();
            }
            self.bury(slot);
        }
    }

    /// An owner that is there; a new one takes the place of one that is not.
    fn actor(&mut self, slot: usize) -> &mut Actor {
        if self.actors[slot].is_none() {
            let on_term = if self.stubborn_leavers < STUBBORN_LEAVERS && self.random.percent(50) {
                OnTerm::Ignore
            } else {
                OnTerm::Die
            };
            let owner = Owner::connect(self.daemon.lock_socket(), on_term);
            self.tell(format!(
                "owner {slot} starts: pid {}, {on_term:?}",
                owner.pid()
            ));
            let sessions = vec![Some(Session::default())];
            self.actors[slot] = Some(Actor {
                owner,
                on_term,
                sessions,
                leaving: None,
            });
            let pid = self.actors[slot].as_ref().map_or(0, Actor::pid);
            if self.model.program == Program::Libvirts || self.random.percent(90) {
                self.call(slot, 0, plain(Ask::Register { pid, id: 7 }));
            }
        }
        self.actors[slot].as_mut().expect("an owner")
    }

    /// Connections of an owner, all or only those that may do something.
    fn open_connections(&mut self, slot: usize, only_able: bool) -> Vec<usize> {
        let is_able = |session: Session| session.pid.is_some() && !session.is_restricted;
        let sessions = self.actor(slot).sessions.iter().enumerate();
        sessions
            .filter(|(_, session)| session.is_some_and(|session| !only_able || is_able(session)))
            .map(|(number, _)| number)
            .collect()
    }

    /// Mostly one that may do something, which is made if there is none.
    fn a_connection(&mut self, slot: usize) -> Option<usize> {
        let only_able = self.random.percent(90);
        if only_able && self.open_connections(slot, true).is_empty() {
            self.owner_connects(slot);
        }
        let able = self.open_connections(slot, only_able);
        let choices = if able.is_empty() {
            self.open_connections(slot, false)
        } else {
            able
        };
        (!choices.is_empty()).then(|| *self.random.pick(&choices))
    }

    fn owner_connects(&mut self, slot: usize) {
        let actor = self.actor(slot);
        if actor.sessions.iter().flatten().count() >= CONNECTIONS {
            return;
        }
        actor.owner.connect_again();
        actor.sessions.push(Some(Session::default()));
        let (connection, pid) = (actor.sessions.len() - 1, actor.pid());
        self.tell(format!("owner {slot} makes connection {connection}"));
        if self.random.percent(80) {
            self.call(slot, connection, plain(Ask::Register { pid, id: 7 }));
        }
    }

    fn owner_leaves(&mut self, slot: usize) {
        let Some(connection) = self.a_connection(slot) else {
            return;
        };
        let stubborn_leavers = self.stubborn_leavers;
        let actor = self.actor(slot);
        if actor.on_term == OnTerm::Ignore
            && actor.leaving.is_none()
            && stubborn_leavers >= STUBBORN_LEAVERS
        {
            return;
        }
        actor.owner.use_connection(connection);
        let how = if self.random.percent(30) {
            // A length word beyond every limit.
            let bytes = [0x7f, 0xff, 0xff, 0xff];
            self.actor(slot).owner.spoil_connection(&bytes);
            "spoils"
        } else {
            self.actor(slot).owner.close_connection();
            "closes"
        };
        self.tell(format!("owner {slot} {how} connection {connection}"));
        self.connection_ended(slot, connection);
    }

    /// A child of the owner gets a connection of it; or such a child ends.
    fn connection_is_lent(&mut self, slot: usize) {
        if !self.loans.is_empty() && self.random.percent(60) {
            let loan = self.random.below(self.loans.len());
            return self.loan_ends(loan);
        }
        let Some(connection) = self.a_connection(slot) else {
            return;
        };
        let lender_has_it = self.random.percent(50);
        let actor = self.actor(slot);
        actor.owner.use_connection(connection);
        let borrower = actor.owner.lend_connection();
        if !lender_has_it {
            actor.owner.close_connection();
        }
        // Whatever comes over it now may be read by either.
        let session = actor.sessions[connection].take();
        let lender = actor.pid();
        self.loans.push(Loan {
            lender,
            connection,
            lender_has_it,
            borrower,
            session: session.expect("an open connection"),
        });
        self.tell(format!(
            "owner {slot} lends connection {connection} to {borrower}, has it too: {lender_has_it}"
        ));
    }

    fn loan_ends(&mut self, number: usize) {
        let loan = self.loans.swap_remove(number);
        self.tell(format!("kill -9 of borrower {}", loan.borrower));
        self.count("loans");
        let pid = nix::unistd::Pid::from_raw(loan.borrower);
        nix::sys::signal::kill(pid, Signal::SIGKILL).expect("kill a borrower");
        wait_until(DEADLINE, "the end of a borrower", || !runs(loan.borrower));
        let is_lender = |actor: &Option<Actor>| {
            let actor = actor.as_ref();
            actor.is_some_and(|actor| actor.pid() == loan.lender)
        };
        let slot = self.actors.iter().position(is_lender);
        match slot {
            Some(slot) if loan.lender_has_it => {
                let actor = self.actors[slot].as_mut().expect("the lender");
                actor.sessions[loan.connection] = Some(loan.session);
            }
            Some(slot) => self.session_ended(slot, Some(loan.session)),
            None => {
                // Its maker is dead for long: only now the daemon learns of it.
                if loan.session.pid == Some(loan.lender) && self.model.holds(loan.lender) {
                    self.locks_are_freed(loan.lender);
                }
                self.settle();
            }
        }
    }

    fn owner_is_killed(&mut self, slot: usize) {
        let Some(actor) = &self.actors[slot] else {
            return;
        };
        actor.owner.kill();
        self.tell(format!("kill -9 of owner {slot}"));
        self.bury(slot);
    }

    fn owner_calls(&mut self, slot: usize) {
        let Some(connection) = self.a_connection(slot) else {
            return;
        };
        if self.random.percent(3) {
            return self.nonsense(slot, connection);
        }
        let session = self.actor(slot).sessions[connection].expect("an open connection");
        let ask = self.choose_ask(slot, session);
        let has_unknown_flag = self.random.percent(2);
        let request = Request {
            ask,
            has_unknown_flag,
        };
        self.call(slot, connection, request);
    }

    fn choose_ask(&mut self, slot: usize, session: Session) -> Ask {
        let chance = self.random.below(100);
        match chance {
            0..50 => Ask::Acquire {
                place: self.choose_place_or_held(),
                mode: *self.random.pick(&[Mode::Exclusive, Mode::Shared]),
                make: self.random.percent(40),
            },
            50..84 => {
                let rows = self.model.rows.iter();
                let mine: Vec<Place> = rows
                    .filter(|row| session.pid == Some(row.pid))
                    .map(|row| row.place)
                    .collect();
                if mine.is_empty() || self.random.percent(10) {
                    Ask::Release(self.choose_place())
                } else {
                    Ask::Release(*self.random.pick(&mine))
                }
            }
            84..87 => Ask::Create(self.choose_place()),
            87..91 => Ask::Delete(self.choose_place()),
            91..93 => Ask::New(self.random.pick::<&'static str>(&LOCKSPACES)),
            93..95 => Ask::CreateLockspace(self.random.pick::<&'static str>(&LOCKSPACES)),
            95..99 => Ask::Register {
                pid: self.choose_pid(slot),
                id: if self.random.percent(10) { 0 } else { 7 },
            },
            _ => Ask::Restrict,
        }
    }

    fn choose_place(&mut self) -> Place {
        if self.random.percent(40) {
            *self.random.pick(&BUSY_PLACES)
        } else {
            *self.random.pick(&PLACES)
        }
    }

    /// Sometimes one that is held under this very name: it may be shared.
    fn choose_place_or_held(&mut self) -> Place {
        if self.model.rows.is_empty() || self.random.percent(80) {
            return self.choose_place();
        }
        self.random.pick(&self.model.rows).place
    }

    /// Mostly its own; else another owner's, as libvirtd does, a dead one's that holds something,
    /// or no process's at all.
    fn choose_pid(&mut self, slot: usize) -> i32 {
        let living: Vec<i32> = self.actors.iter().flatten().map(Actor::pid).collect();
        let held = self.model.rows.iter().map(|row| row.pid);
        let left: Vec<i32> = held.filter(|pid| !living.contains(pid)).collect();
        match self.random.below(10) {
            0..5 => self.actor(slot).pid(),
            5..7 => *self.random.pick(&living),
            7..9 if !left.is_empty() => *self.random.pick(&left),
            7..9 => self.actor(slot).pid(),
            _ => *self.random.pick(&[0, NOBODY]),
        }
    }

    /// Makes a call and compares the reply with the reference's.
    fn call(&mut self, slot: usize, connection: usize, request: Request) {
        let Some(actor) = &mut self.actors[slot] else {
            return;
        };
        let session = actor.sessions[connection].expect("an open connection");
        actor.owner.use_connection(connection);
        let verdict = self.model.judge(session, request);
        let call = request.call();
        let reply = actor.owner.call(&call);
        let said = brief(&reply);
        self.tell(format!("owner {slot} on {connection} {call:?}: {said}"));
        let outcome = &verdict.outcome;
        compare(
            &reply,
            outcome.as_ref().err(),
            &format!("{call:?}, which is {outcome:?}"),
        );
        self.model.lockspaces.extend(verdict.opens);
        self.count(match outcome {
            Ok(Effect::Grant { .. }) => "granted",
            Ok(Effect::Join(_)) => "joined",
            Ok(Effect::End(_)) => "released",
            Ok(_) => "other calls",
            Err(refusal) if !refusal.holders.is_empty() => "busy under another name",
            Err(refusal) if refusal.code == RESOURCE_BUSY => "busy",
            Err(_) => "refused",
        });
        let Ok(effect) = verdict.outcome else {
            return;
        };
        let is_lock = matches!(effect, Effect::Grant { .. } | Effect::Join(_));
        let holder = session.pid.filter(|_| is_lock);
        // One that is dead already and not reaped: it is watched, and freed at once, which takes away what
        // was made for it.
        let freed_at_once = holder.filter(|pid| {
            self.dead.iter().any(|owner| owner.pid() == *pid) && !self.is_own_lent(*pid)
        });
        let session = self.actors[slot]
            .as_mut()
            .and_then(|actor| actor.sessions[connection].as_mut())
            .expect("an open connection");
        let mut made = None;
        match &effect {
            Effect::Register(pid) => session.pid = Some(*pid),
            Effect::Restrict => session.is_restricted = true,
            Effect::Make(name) | Effect::Grant { target: name, .. } => made = Some(name.clone()),
            _ => {}
        }
        let root = self.outside.path("");
        self.model
            .apply(effect, |name| match fs::symlink_metadata(root.join(name)) {
                Ok(status) => id_of(&status),
                Err(_) if freed_at_once.is_some() => FileId {
                    device: 0,
                    inode: 0,
                },
                Err(error) => panic!("{name} should be there: {error}"),
            });
        if let Some(name) = made
            && freed_at_once.is_none()
            && let Some(Node::File(file)) = self.model.files.nodes.get(&name)
        {
            self.outside.keep_handle(*file, &name);
        }
        if let Some(pid) = freed_at_once {
            self.locks_are_freed(pid);
        }
    }

    /// Messages that are no call of the lock program; they change nothing.
    fn nonsense(&mut self, slot: usize, connection: usize) {
        let message = match self.random.below(4) {
            0 => frame(LOCK_PROGRAM, 1, 99, CALL, 0, 0, &[]),
            1 => frame(LOCK_PROGRAM, 7, 1, CALL, 0, 0, &[0; 12]),
            2 => frame(0x0bad_cafe, 1, 1, CALL, 0, 0, &[0; 12]),
            _ => frame(LOCK_PROGRAM, 1, 6, CALL, 0, 0, &[0xff; 40]),
        };
        let actor = self.actor(slot);
        actor.owner.use_connection(connection);
        let reply = actor.owner.exchange(&message);
        self.tell(format!(
            "owner {slot} on {connection} talks nonsense: {}",
            brief(&reply)
        ));
        reply.expect_error(RPC_ERROR, DOMAIN_RPC);
    }

    fn stranger_acts(&mut self) {
        let number = self.random.below(STRANGERS);
        let held = self
            .model
            .strangers
            .iter()
            .position(|lock| lock.number == number);
        if let Some(held) = held {
            if number >= STRANGERS / 2 && self.random.percent(30) {
                self.tell(format!("stranger {number} is killed"));
                self.strangers[number].kill();
            } else {
                self.tell(format!("stranger {number} drops its lock"));
                self.strangers[number].unlock();
            }
            self.model.strangers.remove(held);
            return;
        }
        let files = self.listed_files();
        let (file, name) = self.random.pick(&files).clone();
        let mode = *self.random.pick(&[Mode::Exclusive, Mode::Shared]);
        let has_room = self.model.has_room(file, mode);
        let path = self.outside.path(&name);
        let got = self.strangers[number].lock(&path, mode);
        self.count(if got {
            "strangers' locks"
        } else {
            "strangers refused"
        });
        self.tell(format!("stranger {number} wants {name} {mode:?}: {got}"));
        // An owner that was made to die may have done so a moment ago.
        if got && !has_room && self.bury_those_that_left() {
            assert!(self.model.has_room(file, mode), "{name} was held");
        } else {
            assert_eq!(got, has_room, "{name} for a stranger, {mode:?}");
        }
        if got {
            let kind = self.strangers[number].kind();
            self.model.strangers.push(model::Stranger {
                number,
                kind,
                mode,
                file,
            });
        }
    }

    /// A stranger removes a name or makes a file.
    fn names_change(&mut self) {
        let name = *self.random.pick(&LOOSE_NAMES);
        let path = self.outside.path(name);
        match self.model.files.nodes.get(name) {
            Some(Node::Directory) => {}
            Some(Node::File(_) | Node::Link(_)) => {
                self.tell(format!("a stranger removes {name}"));
                fs::remove_file(path).expect("remove a name");
                self.model.files.nodes.remove(name);
            }
            None => {
                self.tell(format!("a stranger makes {name}"));
                fs::write(&path, format!("made as {name}")).expect("make a file");
                let file = id_of(&path.metadata().expect("look at a new file"));
                self.model
                    .files
                    .nodes
                    .insert(name.to_owned(), Node::File(file));
                self.outside.keep_handle(file, name);
            }
        }
    }

    /// The share is slow from now on, or not any more.
    fn share_changes(&mut self) {
        if self.on == On::Share && self.random.percent(5) {
            let time = Duration::from_millis(self.random.below(20) as u64);
            self.outside
                .slow_down(Some(time).filter(|time| !time.is_zero()));
        }
    }

    /// Sometimes the next steps do not wait for it.
    fn daemon_replaces_itself(&mut self) {
        self.await_successor();
        self.count("upgrades");
        if self.random.percent(50) {
            self.tell("SIGUSR1".into());
            return upgrade(&self.daemon);
        }
        self.tell("SIGUSR1, not waited for".into());
        self.replacing = Some(image(self.daemon.pid()));
        self.daemon.signal(Signal::SIGUSR1);
    }

    fn await_successor(&mut self) {
        if let Some(before) = self.replacing.take() {
            wait_for_successor(self.daemon.pid(), &before);
        }
    }

    /// Everybody dies, what is left under dead numbers is given back: nothing is locked any more.
    /// How often what happened.
    fn end(mut self) -> BTreeMap<&'static str, usize> {
        for slot in 0..OWNERS {
            self.owner_is_killed(slot);
        }
        self.check();
        while !self.loans.is_empty() {
            self.loan_ends(0);
            self.check();
        }
        self.await_successor();
        let rows = self.model.rows.clone();
        for row in rows {
            let mut client = self.daemon.client();
            client.call(&register_as("heir", row.pid)).expect_ok();
            let Place { lockspace, name } = row.place;
            client.call(&release(lockspace, name)).expect_ok();
            let holding = self
                .model
                .rows
                .iter()
                .position(|other| (other.place, other.pid) == (row.place, row.pid));
            let holding = holding.expect("a row that is given back once");
            self.model.apply(Effect::End(holding), |_| unreachable!());
            self.check();
        }
        self.model.strangers.clear();
        self.strangers.clear();
        self.check();
        assert_eq!(self.daemon.ended(), None);
        let device = self.outside.device_of_files();
        wait_until(
            DEADLINE,
            "the daemon to have no file of the world open",
            || !open_devices(self.daemon.pid()).any(|open| open == device),
        );
        std::mem::take(&mut self.counts)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for loan in &self.loans {
            let borrower = nix::unistd::Pid::from_raw(loan.borrower);
            let _ = nix::sys::signal::kill(borrower, Signal::SIGKILL);
        }
        if std::thread::panicking() {
            let first = self.told.len().saturating_sub(60);
            eprintln!("the last steps of the world with seed {}:", self.seed);
            for step in &self.told[first..] {
                eprintln!("  {step:.400}");
            }
            eprintln!("what should be held:");
            for row in &self.model.rows {
                eprintln!("  {row:?}");
            }
            for lock in &self.model.strangers {
                eprintln!("  {lock:?}");
            }
            eprintln!("VIRTLOCKD_WORLD_SEED={} repeats it", self.seed);
        }
    }
}

fn plain(ask: Ask) -> Request {
    Request {
        ask,
        has_unknown_flag: false,
    }
}

/// A reply in the list of steps.
fn brief(reply: &Reply) -> String {
    match reply {
        Reply::Ok { .. } => "ok".into(),
        Reply::Error(error) => format!("{} ({}) {}", error.code, error.domain, error.message),
    }
}

#[track_caller]
fn compare(reply: &Reply, refusal: Option<&Refusal>, what: &str) {
    match (reply, refusal) {
        (Reply::Ok { .. }, None) => {}
        (Reply::Error(error), Some(refusal)) => {
            let (seen, due) = ((error.code, error.domain), (refusal.code, refusal.domain));
            assert_eq!(seen, due, "{what}: {error:?}");
            let names = |pid: &i32| error.message.contains(&format!("pid {pid})"));
            let named = refusal.holders.is_empty() || refusal.holders.iter().any(names);
            assert!(named, "{what}: a holder is named: {error:?}");
        }
        _ => panic!("{what}: {reply:?}"),
    }
}

fn can_run() -> bool {
    if daemon::c_daemon().is_some_and(|path| path == daemon::program()) {
        skip("libvirt's own daemon has other rules");
        return false;
    }
    require_root()
}

/// World after world, until so many steps are made.
fn make_worlds(program: Program, on: On, default_steps: usize) {
    let first = Random::seed_from("VIRTLOCKD_WORLD_SEED");
    let steps = match std::env::var("VIRTLOCKD_WORLD_STEPS") {
        Ok(text) => text.parse().expect("VIRTLOCKD_WORLD_STEPS is a number"),
        Err(_) => default_steps,
    };
    let mut made = 0;
    let mut counts = BTreeMap::<_, usize>::new();
    for seed in first.. {
        let in_this_world = STEPS_OF_A_WORLD.min(steps - made);
        if in_this_world == 0 {
            break;
        }
        eprintln!(
            "VIRTLOCKD_WORLD_SEED={seed}, begun by {program:?}, on {on:?}: {in_this_world} steps"
        );
        let mut world = World::new(seed, program, on);
        world.check();
        if program == Program::Libvirts {
            world.begin_with_libvirts();
        }
        for step in 1..=in_this_world {
            world.step = step;
            world.share_changes();
            world.make_step();
        }
        made += in_this_world;
        for (what, count) in world.end() {
            *counts.entry(what).or_default() += count;
        }
    }
    eprintln!("{made} steps: {counts:?}");
}

#[test]
fn in_a_random_world_every_reply_and_every_lock_is_what_the_rules_say() {
    if can_run() {
        make_worlds(Program::Ours, On::ThisHost, STEPS);
    }
}

#[test]
fn and_so_it_is_in_a_world_that_libvirts_daemon_began() {
    if !can_run() {
        return;
    }
    if daemon::c_daemon().is_none() {
        return skip("needs libvirt's virtlockd");
    }
    make_worlds(Program::Libvirts, On::ThisHost, STEPS_BEHIND_LIBVIRTS);
}

#[test]
fn and_so_it_is_where_every_file_is_on_a_share_that_is_slow_now_and_then() {
    if can_run() {
        make_worlds(Program::Ours, On::Share, STEPS_ON_SHARE);
    }
}
