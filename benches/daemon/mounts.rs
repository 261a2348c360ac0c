//! A share for a server: a helper that is a file system's server, mounted in the mount namespace that the
//! measured server has. Another host would be in its place, so it has real-time priority: what a call to it
//! takes shall not depend on what else runs here.
//!
//! The file system is that of the tests (`fuse`). What it stands on there is here as the bench has it: a
//! namespace that is there already, and what cannot be done is said and not measured.

use std::io::BufRead;
use std::time::{Duration, Instant};

use fuse::{Habits, Operation, Share, Trouble};
use namespace::Namespace;

use crate::helper::Helper;
use crate::measure::Outcome;
use crate::subject::Server;

// Shared with the tests, which use more of it.
#[path = "../../tests/support/fuse.rs"]
#[allow(dead_code)]
pub mod fuse;

/// The mount namespace of a server.
pub mod namespace {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use crate::subject::root_of;

    /// That of the server with this pid.
    pub struct Namespace {
        server: i32,
    }

    impl Namespace {
        pub fn of(server: i32) -> Self {
            Self { server }
        }

        /// A path of the namespace from here.
        pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
            let inside = inside.as_ref();
            root_of(self.server).join(inside.strip_prefix("/").unwrap_or(inside))
        }

        /// A program that is started in it.
        pub fn command(&self, program: impl AsRef<Path>) -> Command {
            let mut command = Command::new("nsenter");
            command.args(["-m", "-t", &self.server.to_string()]);
            command.arg(program.as_ref());
            command
        }
    }
}

/// The name of its directory in /run, and where that is.
const DIRECTORY: &str = "share";
const PLACE: &str = "/run/share";
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// All that a share is asked for.
const EVERYTHING: [Operation; 11] = [
    Operation::LookUp,
    Operation::GetAttributes,
    Operation::Open,
    Operation::Create,
    Operation::Lock,
    Operation::Unlock,
    Operation::GetLock,
    Operation::Unlink,
    Operation::Flush,
    Operation::Release,
    Operation::Write,
];

/// The share as the bench sees it. Whoever waits for a share cannot be killed, so it is to be dropped before
/// its server: all calls to it fail then.
pub struct Mounted {
    helper: Helper,
}

impl Mounted {
    /// One with an empty disk for each of so many guests. Nothing where FUSE cannot be used.
    pub fn start(server: &Server, guests: u32) -> Outcome<Option<Self>> {
        let arguments = [server.pid.to_string(), guests.to_string()];
        let mut helper = Helper::start_through(&["chrt", "--fifo", "1"], "share", &arguments)?;
        let ready = helper.hear_numbers("ready", ANSWER_LIMIT)?;
        Ok((ready == [1]).then_some(Self { helper }))
    }

    /// A guest's disk, as requests name it.
    pub fn disk(guest: u32) -> String {
        format!("{PLACE}/{guest}")
    }

    /// From now on no call to it ends.
    pub fn hang(&mut self) -> Outcome<()> {
        self.ask("hang").map(|_| ())
    }

    /// From now on each call to it takes so long.
    pub fn slow_down(&mut self, time: Duration) -> Outcome<()> {
        let order = format!("take {}", time.as_micros());
        self.ask(&order).map(|_| ())
    }

    /// What hangs goes on, and nothing hangs or takes its time any more.
    pub fn mend(&mut self) -> Outcome<()> {
        self.ask("mend").map(|_| ())
    }

    /// How often it was asked for anything.
    pub fn calls(&mut self) -> Outcome<u64> {
        self.ask("calls")
    }

    /// An error unless it has a lock for each of so many guests.
    pub fn check_all_locked(&mut self, guests: u32) -> Outcome<()> {
        match self.ask("locks")? {
            locks if locks == u64::from(guests) => Ok(()),
            locks => Err(format!("the share has {locks} locks for {guests} guests")),
        }
    }

    fn ask(&mut self, order: &str) -> Outcome<u64> {
        self.helper.say(order)?;
        let numbers = self.helper.hear_numbers("share", ANSWER_LIMIT)?;
        let number = numbers.first().copied();
        number.ok_or_else(|| format!("the share has no answer to '{order}'"))
    }
}

/// The helper's side.
pub fn serve(server: &str, guests: u32) -> Outcome<()> {
    let server = server.parse();
    let server = server.map_err(|e| format!("the pid of the share's server: {e}"))?;
    let Some(share) = Share::mount(&Namespace::of(server), DIRECTORY, Habits::tenacious()) else {
        println!("ready 0");
        return Ok(());
    };
    for guest in 0..guests {
        share.put(&guest.to_string());
    }
    println!("ready 1");
    let everywhere = |trouble| {
        let each = EVERYTHING.into_iter();
        each.for_each(|operation| share.trouble(operation, trouble, usize::MAX));
        0
    };
    for order in std::io::stdin().lock().lines() {
        let order = order.map_err(|e| format!("reading an order: {e}"))?;
        let number = match order.split_once(' ').unwrap_or((&order, "")) {
            ("hang", _) => everywhere(Trouble::Hangs),
            ("take", time) => {
                let time = time.parse().map_err(|e| format!("'{order}': {e}"))?;
                everywhere(Trouble::Takes(Duration::from_micros(time)))
            }
            ("mend", _) => {
                EVERYTHING.into_iter().for_each(|it| share.mend(it));
                0
            }
            ("calls", _) => EVERYTHING.into_iter().map(|it| share.calls(it)).sum(),
            ("locks", _) => share.locks().len(),
            _ => return Err(format!("nobody knows how to '{order}'")),
        };
        println!("share {number}");
    }
    Ok(())
}

/// What has not come by then does not come.
const DEADLINE: Duration = Duration::from_secs(20);

/// Says why there is no share. The report notes that there was none.
fn skip(reason: &str) {
    eprintln!("no share: {reason}");
}

/// Waits for a condition and panics without it.
fn wait_until(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !holds() {
        assert!(
            Instant::now() < end,
            "after {limit:?} still waiting for: {what}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}
