//! The service manager's store: what it keeps for a service that does not run. A bag is put there when the
//! daemon starts, empty, and filled when it ends: so nobody has to be asked then, and whether it is there is
//! known before. The guardian sees to it that there is one, and that none is left that nobody needs.

use std::os::fd::{IntoRawFd, OwnedFd};

use crate::desk::Desk;
use crate::host::descriptors;
use crate::host::errno::{self, Errno};
use crate::host::notify::{self, Herald};
use crate::host::patience::patiently;
use crate::restart::bag::Bag;

/// What bags are called there. One is full while the next daemon starts, and that has another one.
const NAMES: [&str; 2] = ["virtlockd-bag-a", "virtlockd-bag-b"];

/// The bags that are there when a daemon starts: how each is called, and whether anything is in it.
pub type Given = Vec<(String, bool)>;

/// What the guardian knows of the store.
#[derive(Debug)]
pub struct Store {
    /// What the bag of this daemon is called; none if there is none.
    name: Option<&'static str>,
    /// Whether an empty bag of that name is there from before.
    is_there: bool,
    /// What is there from before, and is to go when this daemon serves.
    given: Vec<String>,
}

impl Store {
    /// With these bags from before in it, and whether anything is in them: that is all there is. Nothing is put
    /// in the place of what is not known to be empty.
    pub fn of(given: Given) -> Store {
        let is_full = |name: &&str| given.iter().any(|(known, full)| known == name && *full);
        let name = NAMES.into_iter().find(|name| !is_full(name));
        let given = given.into_iter().map(|(known, _)| known);
        let (own, given): (Vec<String>, Vec<String>) =
            given.partition(|known| Some(known.as_str()) == name);
        Store {
            name,
            is_there: !own.is_empty(),
            given,
        }
    }

    /// As the program left it that was executed in this process before: without anything in it.
    pub fn of_this_process() -> Store {
        let [name, _] = NAMES;
        Store {
            name: Some(name),
            is_there: true,
            given: Vec::new(),
        }
    }

    /// Of which this daemon makes no use: what is in it is another one's.
    pub fn of_another() -> Store {
        Store {
            name: None,
            is_there: false,
            given: Vec::new(),
        }
    }

    /// Puts an empty bag there, if there is a store that outlives the end of this daemon.
    pub fn prepare(&mut self, desk: &Desk, herald: Option<&Herald>) {
        if let Some(mouth) = self.try_put(herald) {
            desk.set_mouth(Some(mouth.into_raw_fd()));
        }
    }

    /// Puts another one there, in the place of one that was given up. Its mouth keeps the number: an understudy,
    /// whose table is another one, knows no other. There is no reactor at this moment.
    pub fn renew(&mut self, desk: &Desk, herald: Option<&Herald>) {
        if let Some(number) = desk.mouth()
            && let Some(mouth) = self.try_put(herald)
        {
            // Refused, a stop finds that nothing can be kept.
            let _ = patiently(|| descriptors::put_in_place(&mouth, number));
        }
    }

    fn try_put(&mut self, herald: Option<&Herald>) -> Option<OwnedFd> {
        let herald = herald.filter(|_| notify::has_lasting_store())?;
        let name = self.name?;
        let put = self.put(name, herald).inspect_err(|reason| {
            tracing::error!(
                "The service manager cannot be told to keep anything: {}. A stop would fence every owner of a \
                 lock",
                errno::text(*reason)
            );
        });
        put.ok()
    }

    fn put(&mut self, name: &str, herald: &Herald) -> Result<OwnedFd, Errno> {
        let bag = patiently(Bag::new)?;
        if self.is_there {
            herald.forget(name);
        }
        self.is_there = true;
        herald.store(name, &bag.whole)?;
        Ok(bag.mouth)
    }

    /// The bag of this daemon is not needed: it is empty, and stays so.
    pub fn give_up(&mut self, herald: Option<&Herald>) {
        if let Some(herald) = herald.filter(|_| notify::has_lasting_store())
            && let Some(name) = self.name
            && std::mem::take(&mut self.is_there)
        {
            herald.forget(name);
        }
    }

    /// What was there before has been taken.
    pub fn forget_given(&mut self, herald: Option<&Herald>) {
        for name in self.given.drain(..) {
            if let Some(herald) = herald {
                herald.forget(&name);
            }
        }
    }
}
