//! A start after the death of a whole daemon: all its processes were killed at once, and its ledger is in the
//! run directory. Every lock that it tells of is taken again, before anybody is served.
//!
//! The old file stays whole until a new one says everything: whoever kills this start in the middle finds
//! at the next one what this one found.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::custody::cold::{self, Loss, TakenAgain, Why};
use crate::custody::descriptor::Saved;
use crate::custody::ledger::{self, OldFile, Orphan, Unreadable};
use crate::custody::since::Since;
use crate::custody::state::State;
use crate::exit::{ExitCode, StartError, refused};
use crate::host::errno::{self, Errno};
use crate::host::patience;
use crate::host::refusal::Refusal;
use crate::locks::again::NotAgain;
use crate::locks::holder;
use crate::locks::table::Pid;
use crate::log::Printable;
use crate::server::reactor::{GoesOn, Limits, Reactor};

/// What a daemon that was killed has left, as far as it is to be settled when it is sure that this one serves.
#[derive(Debug)]
pub struct Left {
    run_directory: PathBuf,
    /// Its ledger. It says all until there is a new one.
    orphan: Option<Orphan>,
    /// Why nobody knows whether there is one.
    unknown: Option<Errno>,
    losses: Vec<Loss>,
    to_fence: Vec<(Pid, OwnedFd)>,
}

/// Goes on for a daemon that was killed, if its ledger is in the run directory. The reactor serves nobody yet. A
/// limit of clients that was set at run time stays, as in an upgrade.
///
/// # Errors
/// A ledger that cannot be read: what it says must not be granted to anybody else. And what the host refuses
/// for which there is no other way.
pub fn take_again(
    reactor: &mut Reactor,
    run_directory: &Path,
    limits: Limits,
) -> Result<Left, StartError> {
    let (orphan, unknown) = find(run_directory)?;
    let mut left = Left {
        run_directory: run_directory.to_owned(),
        orphan,
        unknown,
        losses: Vec::new(),
        to_fence: Vec::new(),
    };
    if let Some(orphan) = &left.orphan
        && let Ok(state) = &orphan.state
    {
        (left.losses, left.to_fence) = go_on(reactor, orphan, state, limits)?;
        let custody = reactor.custody_mut();
        custody.count_more(&orphan.counts);
        custody.was_recovered("after the death of all its processes");
    }
    Ok(left)
}

impl Left {
    /// Fences who must be, and says what is lost. From then on the ledger is in the run directory, if it can
    /// be: not before, so that who is killed up to there leaves what it found.
    pub fn settle(self, reactor: &mut Reactor) {
        if let Some(reason) = self.unknown {
            say_that_nobody_knows(&self.run_directory, reason);
        }
        for loss in self.losses {
            reactor.custody_mut().lost_a_lock();
            lose(reactor, loss);
        }
        for (pid, process) in self.to_fence {
            reactor.fence_who_left(pid, process);
        }
        // Open, it is somebody's, and no file is put in its place.
        drop(self.orphan);
        // One that could not be read is not this one's.
        let old = match self.unknown {
            None => OldFile::IsReplaced,
            Some(_) => OldFile::IsKept,
        };
        let kept = reactor.custody_mut().keep_in(&self.run_directory, old);
        kept.unwrap_or_else(say_that_it_has_no_name);
    }
}

/// Says that the ledger does not outlive the daemon.
pub fn say_that_it_has_no_name(refusal: Refusal) {
    tracing::warn!(
        target: "locking.lock_daemon",
        "{refusal}. The daemon serves with a ledger that has no name: should all its processes be \
         killed at once, the next start does not have the locks"
    );
}

/// Whether a daemon was killed with locks cannot be found out.
fn say_that_nobody_knows(run_directory: &Path, reason: Errno) {
    let path = ledger::file_in(run_directory);
    let path = path.display();
    if reason == Errno::EAGAIN {
        tracing::error!(
            target: "locking.lock_daemon",
            "The ledger '{path}' is another process's, which has it locked: this daemon does not know what \
             that one holds"
        );
    } else {
        tracing::error!(
            target: "locking.lock_daemon",
            "Whether an earlier daemon was killed with locks cannot be found out, because '{path}' cannot \
             be looked at: {}",
            errno::text(reason)
        );
    }
}

/// The ledger of a daemon that was killed; why nobody knows whether there is one.
///
/// # Errors
/// One that cannot be read stays where it is: another program may be able to, or the same one a moment later.
fn find(run_directory: &Path) -> Result<(Option<Orphan>, Option<Errno>), StartError> {
    // The kernel may still be closing the files of those that were killed; and memory comes back.
    let found = patience::patiently(|| match ledger::find_orphan(run_directory) {
        Ok(Some(Orphan {
            state: Err(Unreadable::System(reason)),
            ..
        })) if errno::may_pass(reason) => Err(reason),
        found => found,
    });
    let reason = match found {
        Ok(None) => return Ok((None, None)),
        Ok(Some(orphan)) => match &orphan.state {
            Ok(state) if cold::is_of_another_boot(state) => {
                tracing::info!(
                    target: "locking.lock_daemon",
                    "The ledger '{}' is of another boot of the host, of which nobody is left: it is removed",
                    orphan.path.display()
                );
                orphan.remove();
                return Ok((None, None));
            }
            Ok(_) => return Ok((Some(orphan), None)),
            Err(reason) => reason.to_string(),
        },
        Err(reason) if errno::may_pass(reason) => Unreadable::System(reason).to_string(),
        Err(reason) => return Ok((None, Some(reason))),
    };
    let path = ledger::file_in(run_directory);
    let path = path.display();
    let message = format!(
        "The ledger '{path}' of a daemon that was killed cannot be used: {reason}. It tells which locks running \
         guests had, so nobody is given one, and the daemon does not start. If an earlier or a later \
         version of it wrote the ledger, start that one. Otherwise find out which guests run, stop them, \
         and remove the file"
    );
    Err(StartError::new(ExitCode::Initialisation, message))
}

type ToSettle = (Vec<Loss>, Vec<(Pid, OwnedFd)>);

fn go_on(
    reactor: &mut Reactor,
    orphan: &Orphan,
    saved: &State<Saved>,
    limits: Limits,
) -> Result<ToSettle, StartError> {
    let settings = reactor.custody().state().settings().clone();
    let TakenAgain {
        state,
        freed,
        losses,
        to_fence,
        unseen,
        spared,
    } = cold::take_again(saved, orphan.is_stale, settings);
    let (owners, locks) = (state.table().processes().count(), state.table().len());
    reactor
        .go_on(GoesOn {
            state,
            ledger: None,
            since: Since::default(),
            poll: None,
            left: &mut Vec::new(),
            run_directory: None,
        })
        .map_err(refused)?;
    reactor.configure_if_changed(limits);
    if owners > 0 || freed > 0 || !losses.is_empty() {
        tracing::warn!(
            target: "locking.lock_daemon",
            "A daemon was killed with all its processes: by its ledger '{}' {locks} locks of {owners} owners \
             were taken again, {freed} of dead owners are free, and {} are lost. Connections are gone: the \
             owners are watched",
            orphan.path.display(),
            losses.len()
        );
    }
    if orphan.is_stale {
        tracing::warn!(
            target: "locking.lock_daemon",
            "The ledger could not be written for a while before the daemon was killed: locks that were given \
             back then are held again, until they are once more or their owners are dead, and nobody is \
             fenced for one that somebody else has by now"
        );
    }
    for owner in unseen {
        tracing::warn!(
            target: "locking.lock_daemon",
            "{owner} has its locks again, and its process cannot be told from another one of its number: its \
             death frees nothing. Its locks stay until they are released in its name or the daemon ends"
        );
    }
    for owner in spared {
        tracing::error!(
            target: "locking.lock_daemon",
            "{owner} was to be fenced when the daemon was killed, and it is not proved which process that is: \
             none is sent a signal. Its locks stay: stop it by hand"
        );
    }
    Ok((losses, to_fence))
}

/// Says what is lost. Whoever goes on writing what somebody else has by now is fenced: two writers are worse
/// than one dead guest.
fn lose(reactor: &mut Reactor, loss: Loss) {
    let Loss {
        owner,
        key,
        process,
        is_fenced,
        path,
        why,
    } = loss;
    let path = Printable(&path).to_string();
    let stays = "It runs on without: find out whether another may write the file, and restart it";
    let reason = match why {
        Why::NotLocked(NotAgain::Taken(stranger)) => {
            let by = holder::of_stranger(&stranger);
            let text = format!(
                "{owner} lost its lock on '{path}' while no daemon ran{}",
                Printable(&by)
            );
            match process {
                Some(process) => reactor.fence_the_robbed(key.pid, process, &text),
                None if is_fenced => tracing::error!(
                    target: "locking.lock_daemon",
                    "{text}. The owner is being fenced already"
                ),
                None => tracing::error!(
                    target: "locking.lock_daemon",
                    "{text}. Both may write it, and it cannot be fenced, because its process cannot be \
                     told, or stands for others, or had perhaps given it back: stop one of them by hand"
                ),
            }
            return;
        }
        Why::NotLocked(NotAgain::Gone) => "it is not there any more".to_owned(),
        Why::NotLocked(NotAgain::Replaced) => "another file has its name".to_owned(),
        Why::NotLocked(NotAgain::Open(reason)) => {
            format!("it cannot be opened: {}", errno::text(reason))
        }
        Why::NotLocked(NotAgain::Lock(reason)) => {
            format!("it cannot be locked: {}", errno::text(reason))
        }
        Why::SameFile => "it is held under another name".to_owned(),
    };
    tracing::error!(
        target: "locking.lock_daemon",
        "{owner} lost its lock on '{path}' with the daemon that was killed: {reason}. {stays}"
    );
}
