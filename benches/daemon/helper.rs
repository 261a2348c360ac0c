//! Helper processes: this program started again in another role. They talk in lines, end when the
//! bench ends, and never outlive it.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;

use crate::measure::Outcome;

/// The first argument of a helper starts with this.
pub const ROLE: &str = "role:";

/// A helper, its input and what it says.
pub struct Helper {
    name: &'static str,
    child: Child,
    input: Option<ChildStdin>,
    output: ChildStdout,
    heard: Vec<u8>,
}

impl Helper {
    pub fn start(name: &'static str, arguments: &[String]) -> Outcome<Self> {
        Self::start_through(&[], name, arguments)
    }

    /// Starts the helper through other programs (`chrt` and the like), given with their arguments.
    pub fn start_through(
        prefix: &[&str],
        name: &'static str,
        arguments: &[String],
    ) -> Outcome<Self> {
        let role = format!("{ROLE}{name}");
        let mut words: Vec<String> = prefix.iter().map(|&word| word.to_owned()).collect();
        words.push(own_program()?);
        words.push(role);
        words.extend_from_slice(arguments);
        let mut child = Command::new(&words[0])
            .args(&words[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| format!("starting the {name} ({}): {e}", words[0]))?;
        let input = child.stdin.take();
        let output = child.stdout.take().ok_or("a helper without output")?;
        Ok(Self {
            name,
            child,
            input,
            output,
            heard: Vec::new(),
        })
    }

    /// Sends one line.
    pub fn say(&mut self, line: &str) -> Outcome<()> {
        let input = self.input.as_mut().ok_or("a helper without input")?;
        writeln!(input, "{line}").map_err(|e| format!("telling the {} '{line}': {e}", self.name))
    }

    /// The next line, within the time given.
    pub fn hear(&mut self, limit: Duration) -> Outcome<String> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(end) = self.heard.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.heard.drain(..=end).collect();
                return Ok(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            let left = deadline
                .saturating_duration_since(Instant::now())
                .as_millis();
            let left = PollTimeout::try_from(left.min(1 << 30) as i32)
                .map_err(|e| format!("a poll timeout: {e}"))?;
            let mut interest = [PollFd::new(self.output.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut interest, left)
                .map_err(|e| format!("waiting for the {}: {e}", self.name))?;
            if ready == 0 {
                return Err(format!("the {} said nothing for {limit:?}", self.name));
            }
            let mut bytes = [0; 4096];
            let count = self.output.read(&mut bytes);
            let count = count.map_err(|e| format!("listening to the {}: {e}", self.name))?;
            if count == 0 {
                return Err(format!(
                    "the {} ended; its reason is printed above",
                    self.name
                ));
            }
            self.heard.extend_from_slice(&bytes[..count]);
        }
    }

    /// The next line without its first word, which must be this one, as numbers.
    pub fn hear_numbers(&mut self, word: &str, limit: Duration) -> Outcome<Vec<u64>> {
        let line = self.hear(limit)?;
        let mut words = line.split_whitespace();
        if words.next() != Some(word) {
            return Err(format!(
                "the {} said '{line}' instead of '{word}'",
                self.name
            ));
        }
        let numbers: Result<Vec<u64>, _> = words.map(str::parse).collect();
        numbers.map_err(|e| format!("the {} said '{line}': {e}", self.name))
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // The end of its input tells a helper to end; the kill is for one that hangs.
        self.input = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The path of this program.
pub fn own_program() -> Outcome<String> {
    let path = std::env::current_exe().map_err(|e| format!("finding the bench program: {e}"))?;
    path.into_os_string()
        .into_string()
        .map_err(|path| format!("{path:?} is not UTF-8"))
}

/// What each helper does first: end with its parent.
pub fn end_with_parent() -> Outcome<()> {
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(|e| format!("PR_SET_PDEATHSIG: {e}"))
}

/// Raises the descriptor limit to the hard limit.
pub fn raise_descriptor_limit() -> Outcome<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(|e| format!("getrlimit: {e}"))?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(|e| format!("setrlimit: {e}"))
}
