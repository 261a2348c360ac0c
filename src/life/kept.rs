//! A start that finds everything in the service manager's store, where a stop has left it. All of it is looked
//! at, compared with the ledger, and gone on from as in an upgrade. The bag stays as it is until this daemon is
//! about to serve: whatever makes a start fail before that, the next one finds what this one found.

use std::ffi::OsString;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use foldhash::HashMap;

use super::guardian::Guarded;
use super::{cold_start, posix_locks};
use crate::custody::descriptor::{Number, Saved};
use crate::custody::event::Event;
use crate::custody::ledger::{self, OldFile};
use crate::custody::servers::{Listening, Service};
use crate::custody::since::Since;
use crate::custody::state::State;
use crate::desk::Desk;
use crate::exit::{ExitCode, StartError, refused, unusable};
use crate::host::descriptors::{self, Inherited};
use crate::host::errno::{self, Errno};
use crate::host::listen::{Listener, Listeners};
use crate::host::refusal::Refusal;
use crate::host::{file, stream};
use crate::log::Printable;
use crate::restart::bag::{self, Contents};
use crate::server::reactor::{GoesOn, Limits, Reactor};

/// What a stop has left.
pub struct Kept {
    bag: OwnedFd,
    ledger: OwnedFd,
    state: State<Saved>,
    descriptors: HashMap<RawFd, OwnedFd>,
}

/// Looks for what a stop has left. What does not fit its ledger is told and given up, if the ledger is in the
/// run directory: from it all locks are taken again.
///
/// # Errors
/// Why it cannot be gone on from. Everything is as it was.
pub fn find(
    stored: Vec<(String, OwnedFd)>,
    run_directory: &Path,
) -> Result<Option<Kept>, StartError> {
    let mut found = None;
    for (name, bag) in stored {
        let contents = bag::look(&bag).map_err(|reason| refuse(&name, &reason.to_string()))?;
        let Some(contents) = contents else {
            continue;
        };
        if found.is_some() {
            return Err(refuse(&name, "there is another one"));
        }
        let Contents {
            ledger,
            descriptors,
        } = contents;
        let state = ledger::load(&ledger);
        let mut state = state.map_err(|reason| refuse(&name, &format!("its ledger: {reason}")))?;
        // It ended with its process, and its number may be another descriptor's.
        state.forget_poll();
        let kept = Kept {
            bag,
            ledger,
            state,
            descriptors,
        };
        match kept.check() {
            Ok(()) => found = Some(kept),
            Err(reason) if ledger::is_in(run_directory, &kept.ledger) => {
                give_up(kept, &name, &reason)?;
            }
            Err(reason) => return Err(refuse(&name, &reason)),
        }
    }
    Ok(found)
}

fn refuse(name: &str, reason: &str) -> StartError {
    let message = format!(
        "What the daemon before left in the service manager's store as '{name}' cannot be gone on from: \
         {reason}. It stays there, and with it every lock. Start a daemon that can go on from it; or stop all \
         guests, and have it thrown away (systemctl clean --what=fdstore virtlockd.service)"
    );
    StartError::new(ExitCode::Initialisation, message)
}

/// Takes the way of a start after a death of all processes.
fn give_up(kept: Kept, name: &str, reason: &str) -> Result<(), StartError> {
    bag::empty(&kept.bag).map_err(|_| refuse(name, reason))?;
    // What is in it is closed with this: the locks are free for a moment.
    drop(kept);
    tracing::error!(
        "What the daemon before left in the service manager's store as '{name}' does not fit its ledger: \
         {reason}. Its locks are taken again by their names, and its connections are gone"
    );
    Ok(())
}

impl Kept {
    /// Whether everything is there that the ledger speaks of, nothing else, and each file is what it was.
    fn check(&self) -> Result<(), String> {
        let state = &self.state;
        if !ledger::is_closed(&self.ledger) {
            return Err("somebody has gone on from it since".into());
        }
        state.check_descriptors()?;
        let pid_file = state.settings().pid_file.as_ref();
        let pid_file = pid_file.map(|(number, _)| Number(*number));
        let expected = state.descriptors().filter(|it| Some(*it) != pid_file);
        let mut count = 0usize;
        for number in expected {
            count = count.saturating_add(1);
            if !self.descriptors.contains_key(&number.0) {
                let what = state.meaning(number);
                return Err(format!("descriptor {}, {what}, is not in it", number.0));
            }
        }
        if self.descriptors.len() != count {
            let there = self.descriptors.len();
            return Err(format!("it has {there} descriptors instead of {count}"));
        }
        let held = state.table().iter().map(|(_, resource)| resource);
        let left = state.estates().iter().flat_map(|estate| &estate.resources);
        for resource in held.chain(left) {
            let file = self.descriptors.get(&resource.lease.descriptor.0);
            let is_it = |file| file::known_identity(file) == Ok(resource.identity);
            if resource.identity.is_known() && !file.is_some_and(is_it) {
                let name = Printable(resource.name());
                return Err(format!("the file of resource '{name}' is another one"));
            }
        }
        Ok(())
    }

    /// Goes on from it. The reactor serves nobody yet, and must not be dropped from here on: the locks are the
    /// bag's as well.
    ///
    /// # Errors
    /// What the host refuses for which there is no other way.
    pub fn go_on(
        self,
        reactor: &mut Reactor,
        limits: Limits,
    ) -> Result<(Listeners, Left), StartError> {
        let Kept {
            bag,
            ledger,
            state,
            mut descriptors,
        } = self;
        let settings = reactor.custody().state().settings().clone();
        let damaged = |reason: String| unusable(&reason);
        let mut listeners = Listeners::default();
        for listening in state.listeners() {
            if let Some(socket) = descriptors.remove(&listening.socket.0) {
                let listener = listener(listening, socket);
                match listening.server {
                    Service::Lock => listeners.lock.push(listener),
                    Service::Admin => listeners.admin.push(listener),
                }
            }
        }
        let numbers: HashMap<RawFd, RawFd> = descriptors
            .into_iter()
            .map(|(before, descriptor)| (before, descriptor.into_raw_fd()))
            .collect();
        let state = state
            .with([Event::Deaf])
            .and_then(|state| state.renumbered(|before| numbers.get(&before).copied()))
            .map_err(damaged)?;
        let now: Vec<RawFd> = numbers.into_values().collect();
        // These ended with the process that had them.
        posix_locks::lock_again(&state);
        let mut inherited = Inherited::of(&now, &descriptors::open_numbers())
            .map_err(|number| damaged(format!("descriptor {number} is not open")))?;
        let state = state
            .with([Event::Process(Box::new(settings))])
            .and_then(|state| state.adopt(&mut inherited))
            .map_err(damaged)?;
        let (clients, locks) = (state.client_count(), state.table().len());
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
        if reactor.custody().is_behind() {
            // Whoever went on from a ledger that lacks something would not know what it has.
            return Err(refused(Refusal {
                what: "there is no memory for a ledger",
                reason: Errno::ENOMEM,
            }));
        }
        let custody = reactor.custody_mut();
        custody.count_more(&ledger::load_counts(&ledger));
        custody.was_upgraded();
        reactor.configure_if_changed(limits);
        tracing::info!(
            "Took over {clients} connections and {locks} locks from the service manager's store"
        );
        Ok((listeners, Left { bag, ledger }))
    }
}

fn listener(listening: &Listening<Number>, socket: OwnedFd) -> Listener {
    let path = listening.path.clone();
    Listener {
        socket,
        path: path.map(OsString::from_vec).map(PathBuf::from),
    }
}

/// What is left of the stop, until this daemon is about to serve.
pub struct Left {
    bag: OwnedFd,
    ledger: OwnedFd,
}

impl Left {
    /// This daemon serves from here on: from here on everything is its own, and its ledger says so. Clients that
    /// came to a socket that is not listened at any more are served.
    pub fn settle(
        self,
        reactor: &mut Reactor,
        sockets: Listeners,
        run_directory: &Path,
        desk: Guarded,
    ) {
        let Left { bag, ledger } = self;
        match desk {
            Ok(desk) => {
                desk.set_ledger(reactor.custody().ledger().ok().map(AsRawFd::as_raw_fd));
                desk.set_taken(Some(bag.into_raw_fd()));
                // From here on a reactor that dies is followed by one that does what is still to be done.
                desk.serves();
                empty(desk);
            }
            Err(_) => empty_bag(&bag),
        }
        let old = match ledger::is_in(run_directory, &ledger) {
            true => OldFile::IsReplaced,
            false => OldFile::IsKept,
        };
        // With it goes the lock of the file in the run directory.
        drop(ledger);
        let named = reactor.custody_mut().keep_in(run_directory, old);
        named.unwrap_or_else(cold_start::say_that_it_has_no_name);
        if let Ok(desk) = desk {
            forget(desk);
        }
        let lock = sockets.lock.into_iter().map(|it| (it, Service::Lock));
        let admin = sockets.admin.into_iter().map(|it| (it, Service::Admin));
        for (listener, service) in lock.chain(admin) {
            while let Ok(client) = stream::accept(listener.socket.as_fd()) {
                reactor.take_in(client, service);
            }
        }
    }
}

/// Empties the bag from which this daemon goes on, if a reactor before may not have done it. Whether there is
/// one: then the ledger of the daemon before has the name of this one's still, perhaps.
pub fn empty(desk: &Desk) -> bool {
    let bag = desk.taken().map(descriptors::adopt);
    let Some(Ok(bag)) = bag.map(|bag| bag.map(ManuallyDrop::new)) else {
        return false;
    };
    empty_bag(&bag);
    true
}

/// Nothing is left of it.
pub fn forget(desk: &Desk) {
    let bag = desk.taken();
    // Closed first it might be somebody else's number.
    desk.set_taken(None);
    drop(bag.map(descriptors::adopt));
}

fn empty_bag(bag: &OwnedFd) {
    if let Err(reason) = bag::empty(bag) {
        tracing::error!(
            "What the service manager keeps cannot be taken out of its store: {}. Should all processes of this \
             daemon be killed, the next start would go on from what was",
            errno::text(reason)
        );
    }
}
