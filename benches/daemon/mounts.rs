//! A share for a server: the FUSE server of the tests (`fuse`), mounted in the mount namespace that the
//! measured server has. What it stands on in the tests is here as the bench has it: a namespace that is
//! there already, and what cannot be done is said and not measured.

use std::time::{Duration, Instant};

// Shared with the tests, which use more of it.
#[path = "../../tests/support/fuse.rs"]
#[allow(dead_code)]
pub mod fuse;

/// The mount namespace of a server.
pub mod namespace {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use crate::subject::{Server, root_of};

    pub struct Namespace {
        server: i32,
    }

    impl Namespace {
        pub fn of(server: &Server) -> Self {
            Self { server: server.pid }
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
