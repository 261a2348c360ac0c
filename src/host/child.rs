//! A child that ends with this process.

use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::signal::SigSet;
use nix::unistd::getppid;

/// The program that is started so is killed when the thread that starts it ends, whatever that dies of. It gets
/// all signals, which may be blocked here.
pub fn dies_with_parent(command: &mut Command) {
    let parent = super::process::started();
    // SAFETY: between fork and exec only calls are made that may be made there: prctl, getppid and
    // pthread_sigmask, which allocate nothing.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            SigSet::empty().thread_set_mask()?;
            // It may have died before it was asked for.
            if getppid().as_raw().cast_unsigned() != parent {
                return Err(std::io::ErrorKind::BrokenPipe.into());
            }
            Ok(())
        });
    }
}
