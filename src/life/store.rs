//! The service manager's store: what it keeps for a service that does not run. A bag is put there when the
//! daemon starts, empty, and filled when it ends: so nobody has to be asked then, and whether it is there is
//! known before. The guardian sees to it that there is one, and that none is left that nobody needs.

use std::os::fd::IntoRawFd;

use crate::desk::Desk;
use crate::host::clock::Moment;
use crate::host::descriptors;
use crate::host::errno::Errno;
use crate::host::listen::STORED;
use crate::host::notify::{self, Herald};
use crate::restart::bag::Bag;

/// What the guardian knows of the store.
#[derive(Debug)]
pub struct Store {
    /// What the bag is called that is there for this daemon, if there is one.
    name: Option<String>,
    /// What is there from before, and is to go when this daemon serves.
    given: Vec<String>,
}

impl Store {
    /// With these bags from before in it.
    pub fn of(given: Vec<String>) -> Store {
        Store { name: None, given }
    }

    /// Puts an empty bag there, if there is none of this daemon's, and a store that outlives its end.
    pub fn prepare(&mut self, desk: &Desk, herald: Option<&Herald>) {
        let Some(herald) = herald.filter(|_| notify::has_lasting_store()) else {
            return;
        };
        if let Some(mouth) = desk.mouth() {
            // Of one that is not there any more. Nobody else uses it at this moment.
            desk.set_mouth(None);
            drop(descriptors::adopt(mouth));
        }
        match self.put(herald) {
            Ok(mouth) => desk.set_mouth(Some(mouth)),
            Err(reason) => tracing::debug!("the service manager is not given a bag: {reason:?}"),
        }
    }

    fn put(&mut self, herald: &Herald) -> Result<i32, Errno> {
        let bag = Bag::new()?;
        // Each has a name that no other ever had.
        let name = format!("{STORED}{}", Moment::now().0);
        herald.store(&name, &bag.whole)?;
        self.name = Some(name);
        Ok(bag.mouth.into_raw_fd())
    }

    /// The bag of this daemon is not needed: it is empty, and stays so.
    pub fn give_up(&self, herald: Option<&Herald>) {
        if let (Some(herald), Some(name)) = (herald, &self.name) {
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
