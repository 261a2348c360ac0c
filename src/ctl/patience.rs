//! A process that is asked something and may never answer, because it waits for a file system or a device. It is
//! not waited for for ever.

use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// For so long it is waited for.
const PATIENCE: Duration = Duration::from_secs(3);

/// What a process says.
#[derive(Debug)]
pub struct Answer {
    /// What it printed.
    pub text: Vec<u8>,
    /// Whether it ended well.
    pub is_success: bool,
}

/// Runs a command; what it says.
///
/// # Errors
/// Why it says nothing, as the end of a sentence about what was asked.
pub fn answer(command: &mut Command) -> Result<Answer, String> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("no process can be started to look at it: {error}"))?;
    let mut text = Vec::new();
    if let Some(mut pipe) = child.stdout.take() {
        let end = Instant::now().checked_add(PATIENCE);
        let mut buffer = [0; 4096];
        loop {
            let rest = end.map_or(PATIENCE, |end| {
                end.saturating_duration_since(Instant::now())
            });
            let wait = PollTimeout::try_from(rest).unwrap_or(PollTimeout::MAX);
            let mut watched = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
            match poll(&mut watched, wait) {
                Ok(1..) => (),
                Err(nix::errno::Errno::EINTR) => continue,
                _ => {
                    // It ends when what it waits for answers, and nobody waits for that.
                    let _ = child.kill();
                    let seconds = PATIENCE.as_secs();
                    return Err(format!("its file system has not answered for {seconds} s"));
                }
            }
            match pipe.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => text.extend_from_slice(buffer.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == ErrorKind::Interrupted => (),
                Err(_) => break,
            }
        }
    }
    let is_success = child.wait().is_ok_and(|status| status.success());
    Ok(Answer { text, is_success })
}
