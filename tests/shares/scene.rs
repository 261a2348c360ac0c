//! A daemon with two shares, a guest whose call hangs in one of them at a step of one's choice, and others who
//! must not notice.

use crate::support::client::{
    ADMIN_PROGRAM, AUTOCREATE, CALL, Call, Client, DOMAIN_LOCKSPACE, LOOKUP_SERVER, PING, PONG,
    RESOURCE_BUSY, Received, Reply, acquire, create_lockspace, frame, put_string, put_u32,
    register_as, release,
};
use crate::support::daemon::Daemon;
use crate::support::fuse::{Habits, Operation, Share, Trouble};
use crate::support::owner::{OnTerm, Owner};
use crate::support::scene::NOBODY;
use crate::support::upgrade::Host;
use crate::support::{lock_probe, require_root, wait_until};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// How long anything may take that has nothing to do with a share that hangs.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// A disk that is on no share.
pub const LOCAL: &str = "/run/local";

/// What the guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asks {
    Take,
    Give,
}

/// Where a call hangs.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub operation: Operation,
    pub asks: Asks,
    /// A lease in a lockspace, whose file comes and goes; otherwise a disk.
    pub is_lease: bool,
}

/// Each operation that a share is asked for, in a call that asks for it.
pub const STEPS: [Step; 11] = [
    Step::of(Operation::LookUp, Asks::Take, false),
    Step::of(Operation::Open, Asks::Take, false),
    Step::of(Operation::GetAttributes, Asks::Take, false),
    Step::of(Operation::Lock, Asks::Take, false),
    Step::of(Operation::Create, Asks::Take, true),
    Step::of(Operation::LookUp, Asks::Take, true),
    Step::of(Operation::Lock, Asks::Take, true),
    Step::of(Operation::Unlock, Asks::Give, false),
    Step::of(Operation::Flush, Asks::Give, false),
    Step::of(Operation::Release, Asks::Give, false),
    Step::of(Operation::Unlink, Asks::Give, true),
];

impl Step {
    const fn of(operation: Operation, asks: Asks, is_lease: bool) -> Step {
        Step {
            operation,
            asks,
            is_lease,
        }
    }

    pub fn take(&self, share: &Share) -> Call {
        if self.is_lease {
            acquire(share.directory(), "x", AUTOCREATE)
        } else {
            acquire("", &share.path("x"), 0)
        }
    }

    pub fn give(&self, share: &Share) -> Call {
        if self.is_lease {
            release(share.directory(), "x")
        } else {
            release("", &share.path("x"))
        }
    }

    /// The files on the share when nobody holds anything.
    pub fn files_at_rest(&self) -> &'static [&'static str] {
        if self.is_lease { &[] } else { &["x"] }
    }
}

/// The three kinds of servers: a lock goes only when it is told to, when a file is closed by who locked it, or when
/// the open file is closed for good.
pub const VARIANTS: [Habits; 3] = [
    Habits {
        drops_on_flush: false,
        drops_on_release: false,
        names_processes: false,
    },
    Habits {
        drops_on_flush: true,
        drops_on_release: false,
        names_processes: true,
    },
    Habits {
        drops_on_flush: false,
        drops_on_release: true,
        names_processes: false,
    },
];

/// Whether everything is tried with everything, which takes minutes (`VIRTLOCKD_EVERY_CALL=1`).
pub fn is_thorough() -> bool {
    std::env::var_os("VIRTLOCKD_EVERY_CALL").is_some()
}

/// Does something with each of these, a few at a time, and fails with all that failed.
#[track_caller]
pub fn for_each<T: Sync + std::fmt::Debug>(all: &[T], act: impl Fn(&T) + Sync) {
    const AT_A_TIME: usize = 4;
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    let work = || {
        while let Some(one) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
            let done = catch_unwind(AssertUnwindSafe(|| act(one)));
            if let Err(reason) = done {
                let text = reason.downcast_ref::<String>().cloned();
                let text = text.or_else(|| reason.downcast_ref::<&str>().map(|it| it.to_string()));
                let text = format!("{one:?}: {}", text.unwrap_or_default());
                failed.lock().expect("what failed").push(text);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(work);
        }
    });
    let failed = failed.into_inner().expect("what failed");
    let (count, of) = (failed.len(), all.len());
    assert!(count == 0, "{count} of {of} failed:\n{}", failed.join("\n"));
}

/// Each step, with each kind of server when all is tried, and else with one.
#[track_caller]
pub fn for_each_step(first: usize, act: impl Fn(&Step, Habits) + Sync) {
    let mut all = Vec::new();
    for (number, step) in STEPS.into_iter().enumerate() {
        for (kind, habits) in VARIANTS.into_iter().enumerate() {
            if is_thorough() || kind == (first + number) % VARIANTS.len() {
                all.push((step, habits));
            }
        }
    }
    for_each(&all, |(step, habits)| act(step, *habits));
}

/// The daemon under test between two shares.
pub struct Scene {
    pub guest: Owner,
    pub bystander: Client,
    pub daemon: Daemon,
    pub share: Share,
    pub other: Share,
    pub host: Host,
}

impl Scene {
    pub fn new(habits: Habits) -> Option<Scene> {
        if !require_root() {
            return None;
        }
        let host = Host::new();
        host.disk("local");
        let share = Share::mount(&host.namespace, "share", habits)?;
        let other = Share::mount(&host.namespace, "other", Habits::tenacious())?;
        other.put("y");
        let daemon = host.start(&[], &[]);
        let guest = Owner::register(daemon.lock_socket(), "guest", OnTerm::Die);
        let mut bystander = daemon.client();
        bystander
            .call(&register_as("bystander", NOBODY))
            .expect_ok();
        for space in [share.directory(), other.directory()] {
            bystander.call(&create_lockspace(space)).expect_ok();
        }
        Some(Scene {
            guest,
            bystander,
            daemon,
            share,
            other,
            host,
        })
    }

    /// The guest's call is under way, and hangs in the share at this step.
    #[track_caller]
    pub fn hang_in(&mut self, step: &Step) {
        if !step.is_lease {
            self.share.put("x");
        }
        if step.asks == Asks::Give {
            self.guest.call(&step.take(&self.share)).expect_ok();
            self.share.wait_locks(&["x write"], "before the release");
        }
        self.share
            .trouble_with("x", step.operation, Trouble::Hangs, usize::MAX);
        self.guest.post(&match step.asks {
            Asks::Take => step.take(&self.share),
            Asks::Give => step.give(&self.share),
        });
        self.share.wait_hanging(step.operation);
    }

    /// Who wants nothing of the share is answered.
    #[track_caller]
    pub fn others_are_served(&mut self) {
        ping(&mut self.bystander);
        ping(&mut self.daemon.client());
        self.locks_are_given(LOCAL);
        assert_eq!(lock_probe(&self.host.path(LOCAL)), None);
        self.locks_are_given(&self.other.path("y"));
        self.other.wait_locks(&[], "given back on the other share");
        // As `virt-admin server-list` and its like do.
        let mut admin = self.daemon.admin_client();
        let mut payload = Vec::new();
        put_string(&mut payload, b"virtlockd");
        put_u32(&mut payload, 0);
        admin.send(&frame(
            ADMIN_PROGRAM,
            1,
            LOOKUP_SERVER,
            CALL,
            1,
            0,
            &payload,
        ));
        Reply::parse(&next(&mut admin, "an admin call")).expect_ok();
    }

    #[track_caller]
    fn locks_are_given(&mut self, disk: &str) {
        answer(&mut self.bystander, &acquire("", disk, 0)).expect_ok();
        answer(&mut self.bystander, &release("", disk)).expect_ok();
    }

    /// The guest, who lives, gets its answer now that the share is well again, and that is true.
    #[track_caller]
    pub fn guest_is_answered(&mut self, step: &Step) {
        self.guest.receive().expect_ok();
        if step.asks == Asks::Take {
            self.share.wait_locks(&["x write"], "granted");
            let reply = answer(&mut self.bystander, &step.take(&self.share));
            reply.expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
            self.guest.call(&step.give(&self.share)).expect_ok();
        }
    }

    /// Neither a lock nor a file nor an open file is left on the share.
    #[track_caller]
    pub fn nothing_is_left(&self, step: &Step, when: &str) {
        self.share.wait_locks(&[], when);
        wait_until(PATIENCE, &format!("{when}: the files as before"), || {
            self.share.files() == step.files_at_rest()
        });
        self.share.wait_closed(when);
    }

    /// Somebody else gets what the guest wanted or had, and gives it back.
    #[track_caller]
    pub fn is_had_by_another(&mut self, step: &Step) {
        answer(&mut self.bystander, &step.take(&self.share)).expect_ok();
        self.share.wait_locks(&["x write"], "another one's");
        answer(&mut self.bystander, &step.give(&self.share)).expect_ok();
        self.nothing_is_left(step, "another one gave it back");
        // Nor does anything come late.
        self.share.wait_quiet();
        assert_eq!(self.share.locks(), [""; 0]);
        assert_eq!(self.share.files(), step.files_at_rest());
        assert_eq!(self.share.open_files(), [""; 0]);
    }
}

impl Drop for Scene {
    /// Who still hangs could not be ended.
    fn drop(&mut self) {
        self.share.mend_all();
        self.other.mend_all();
    }
}

/// The next message that comes, soon.
#[track_caller]
pub fn next(client: &mut Client, what: &str) -> Vec<u8> {
    match client.receive_within(PATIENCE) {
        Received::Frame(frame) => frame,
        other => panic!("no answer within {PATIENCE:?} to {what}: {other:?}"),
    }
}

/// A call that is answered soon.
#[track_caller]
pub fn answer(client: &mut Client, call: &Call) -> Reply {
    client.post(call);
    Reply::parse(&next(client, &format!("{call:?}")))
}

/// A PING that is answered soon.
#[track_caller]
pub fn ping(client: &mut Client) {
    client.send(&PING);
    assert_eq!(next(client, "a PING"), PONG);
}
