//! The lock program: a decoded call is checked, carried out, and answered with nothing or an error.
//! The checks come in libvirt's order: flags, then whether the connection is restricted, then whether it
//! has registered, then what the call itself wants.

use crate::custody::Custody;
use crate::custody::clients::ClientId;
use crate::custody::locking::{Acquired, Decided, Refusal};
use crate::custody::own_connections::Seen;
use crate::host::errno::Errno;
use crate::host::process;
use crate::host::shared::Word;
use crate::locks::holder;
use crate::locks::lockspace::NotMade;
use crate::locks::place::Place;
use crate::locks::table::{Mode, NotReleased, Owner, Pid};
use crate::log::Printable;
use crate::server::hall::{Hall, Order};
use crate::wire::error::{Code, Domain, Error};
use crate::wire::lock::{AUTOCREATE, Call, Procedure, SHARED, Target};

/// How a call that is not refused ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Called {
    /// It is done: the kernel and the ledger have what the answer says.
    Done,
    /// Something was ordered that has to be done first.
    Again,
}

/// Carries out a call.
///
/// # Errors
/// The error to answer with.
pub fn call(hall: &mut Hall<'_>, id: ClientId, call: &Call<'_>) -> Result<Called, Error> {
    let procedure = call.procedure();
    check_flags(procedure, call)?;
    let Some(client) = hall.custody.state().client(id) else {
        return Err(not_registered());
    };
    if client.restricted {
        let detail = "lock manager connection has been restricted";
        return Err(Error::new(Code::OperationDenied, Domain::Rpc, detail));
    }
    // Cheap to copy: the name is shared.
    let owner = client.owner.as_deref().cloned();
    let is_lent = client.own_owner().is_none();
    let custody = &mut *hall.custody;
    // What only lets go is never refused for want of room.
    if !matches!(
        call,
        Call::ReleaseResource { .. } | Call::DeleteResource { .. }
    ) {
        custody.make_room().map_err(not_recorded)?;
    }
    match *call {
        Call::Register {
            uuid,
            name,
            id: domain_id,
            pid,
            ..
        } => {
            if domain_id == 0 {
                return Err(not_registered());
            }
            let now = Owner {
                pid,
                id: domain_id,
                name: name.into(),
                uuid: *uuid,
            };
            custody.registers(id, &now);
            hall.own_seen = Seen::default();
            if let Some(before) = owner.filter(|before| *before != now) {
                hall.orders
                    .push(Order::Spoke(id, (before.pid, before.uuid)));
            }
        }
        Call::Restrict { .. } => {
            registered(owner.as_ref())?;
            custody.restricts(id);
        }
        Call::New { path, .. } => {
            registered(owner.as_ref())?;
            let is_new = new_lockspace(custody, path)?;
            hall.ground
                .is_opened(hall.mounts, custody.state(), path, is_new);
        }
        Call::CreateLockspace { path } => {
            let is_new = !custody.state().has_lockspace(path) && make_lockspace(custody, path)?;
            if !path.is_empty() {
                hall.ground
                    .is_opened(hall.mounts, custody.state(), path, is_new);
            }
        }
        Call::CreateResource { target, .. } => {
            registered(owner.as_ref())?;
            let place = place(target);
            custody.create(place).map_err(|refusal| {
                let what = [b"cannot create file '", place.path().as_slice(), b"'"].concat();
                refused(custody, place, refusal, Domain::None, &what)
            })?;
        }
        Call::DeleteResource { target, .. } => {
            registered(owner.as_ref())?;
            let place = place(target);
            custody.delete(place).map_err(|refusal| {
                let what = [
                    b"Unable to delete lockspace resource ",
                    place.path().as_slice(),
                ]
                .concat();
                refused(custody, place, refusal, Domain::Lockspace, &what)
            })?;
        }
        Call::AcquireResource { target, flags } => {
            let owner = registered(owner.as_ref())?;
            if is_lent && is_of_a_dead_one(custody, owner.pid) {
                hall.orders.push(Order::Settle(owner.pid));
                return Ok(Called::Again);
            }
            let is_lease = flags & AUTOCREATE != 0 && !place(target).is_default();
            if custody.open_lockspace(target.lockspace) {
                tracing::info!(
                    target: "locking.lock_daemon",
                    "Lockspace {} is opened on its first use: it was not made on this daemon",
                    Printable(target.lockspace)
                );
                hall.ground
                    .is_opened(hall.mounts, custody.state(), target.lockspace, false);
            }
            match acquire(owner, custody, place(target), flags, hall.making) {
                Ok(Acquired::Granted)
                    if !place(target).is_default() || hall.mounts.has_shares() =>
                {
                    if let Some(id) = custody.find(target.lockspace, target.name) {
                        if is_lease {
                            hall.leases.push(id);
                        }
                        if let Some(resource) = custody.state().table().get(id) {
                            let what = (place(target), resource.identity);
                            let file = &resource.lease.descriptor;
                            hall.ground
                                .is_locked(hall.mounts, custody.state(), what, file);
                        }
                    }
                }
                Ok(_) => (),
                Err(error) => {
                    custody.was_refused(owner, place(target), mode(flags), &error.message());
                    return Err(error);
                }
            }
            if is_lent && is_to_be_watched(custody, owner, &mut hall.own_seen) {
                hall.orders.push(Order::Watch(id));
            }
        }
        Call::ReleaseResource { target, .. } => {
            release(registered(owner.as_ref())?, custody, place(target))?;
        }
    }
    Ok(Called::Done)
}

/// Whether an owner that was granted a lock over another's connection may have to be watched. One with a
/// connection of its own need not be, and of one that cannot be seen nothing more is to be found out.
fn is_to_be_watched(custody: &Custody, owner: &Owner, own_seen: &mut Seen) -> bool {
    let state = custody.state();
    if state.own_connections().are_all_there_since(*own_seen) {
        return false;
    }
    if state.has_own_connection(owner.pid, &owner.uuid) {
        *own_seen = state.own_connections().now();
        return false;
    }
    let is_unseen = state
        .watched()
        .get(&owner.pid)
        .is_some_and(|watched| watched.process.is_none());
    !is_unseen
}

/// A lock is about to be asked for on behalf of an owner. Should its number have belonged to another one
/// that is dead, its locks go before anybody mistakes the two for one.
fn is_of_a_dead_one(custody: &Custody, pid: Pid) -> bool {
    let state = custody.state();
    let fence = state.fences().get(&pid).map(|fence| &fence.process);
    let watched = state.watched().get(&pid);
    let watched = watched.and_then(|watched| watched.process.as_ref());
    fence.is_some_and(process::is_dead) || watched.is_some_and(process::is_dead)
}

fn place(target: Target<'_>) -> Place<'_> {
    Place {
        lockspace: target.lockspace,
        name: target.name,
    }
}

fn check_flags(procedure: Procedure, call: &Call<'_>) -> Result<(), Error> {
    let (flags, known) = match *call {
        Call::Register { flags, .. }
        | Call::Restrict { flags }
        | Call::New { flags, .. }
        | Call::CreateResource { flags, .. }
        | Call::DeleteResource { flags, .. }
        | Call::ReleaseResource { flags, .. } => (flags, 0),
        Call::AcquireResource { flags, .. } => (flags, SHARED | AUTOCREATE),
        Call::CreateLockspace { .. } => (0, 0),
    };
    match flags & !known {
        0 => Ok(()),
        unknown => Err(Error::flags(Domain::Rpc, procedure.function(), unknown)),
    }
}

fn not_recorded(reason: Errno) -> Error {
    Error::system(
        Domain::Lockspace,
        b"Unable to record what is asked for",
        reason,
    )
}

fn registered(owner: Option<&Owner>) -> Result<&Owner, Error> {
    owner.ok_or_else(not_registered)
}

fn not_registered() -> Error {
    let detail = "lock owner details have not been registered";
    Error::new(Code::OperationInvalid, Domain::Rpc, detail)
}

fn new_lockspace(custody: &mut Custody, path: &[u8]) -> Result<bool, Error> {
    if path.is_empty() {
        let detail = "the default lockspace already exists";
        return Err(Error::new(Code::OperationInvalid, Domain::Rpc, detail));
    }
    if custody.state().has_lockspace(path) {
        let detail = [b"Lockspace for path ", path, b" already exists"].concat();
        return Err(Error::new(Code::InternalError, Domain::Rpc, detail));
    }
    make_lockspace(custody, path)
}

/// Whether its directory was missing.
fn make_lockspace(custody: &mut Custody, path: &[u8]) -> Result<bool, Error> {
    custody.make_lockspace(path).map_err(|reason| match reason {
        NotMade::NotADirectory => {
            let detail = [
                b"Lockspace location ",
                path,
                b" exists, but is not a directory",
            ]
            .concat();
            Error::new(Code::InternalError, Domain::Lockspace, detail)
        }
        NotMade::TooMany => {
            let detail = [b"There are too many lockspaces for another one, ", path].concat();
            Error::new(Code::InternalError, Domain::Lockspace, detail)
        }
        NotMade::System(errno) => {
            let what = [b"Unable to create lockspace ", path].concat();
            Error::system(Domain::Lockspace, &what, errno)
        }
    })
}

fn mode(flags: u32) -> Mode {
    if flags & SHARED == 0 {
        Mode::Exclusive
    } else {
        Mode::Shared
    }
}

fn acquire(
    owner: &Owner,
    custody: &mut Custody,
    place: Place<'_>,
    flags: u32,
    making: Word<'_>,
) -> Result<Acquired, Error> {
    let mode = mode(flags);
    let autocreate = flags & AUTOCREATE != 0;
    let decided = custody.decide(owner, place, mode, autocreate);
    let done = match decided {
        Ok(Decided::Done) => return Ok(Acquired::Joined),
        Ok(Decided::Work(acquisition)) => acquisition.run(Some(making)),
        Err(refusal) => return Err(not_acquired(custody, place, autocreate, refusal)),
    };
    custody
        .conclude(owner, (place, mode, autocreate), done)
        .map(|()| Acquired::Granted)
        .map_err(|refusal| not_acquired(custody, place, autocreate, refusal))
}

fn not_acquired(custody: &Custody, place: Place<'_>, autocreate: bool, refusal: Refusal) -> Error {
    let verb = if autocreate { "open/create" } else { "open" };
    let what = [
        format!("Unable to {verb} resource ").as_bytes(),
        &place.path(),
    ]
    .concat();
    refused(custody, place, refusal, Domain::Lockspace, &what)
}

fn release(owner: &Owner, custody: &mut Custody, place: Place<'_>) -> Result<(), Error> {
    if !custody.state().has_lockspace(place.lockspace) {
        return Err(no_lockspace(place));
    }
    custody
        .release(place, owner)
        .map_err(|reason| match reason {
            NotReleased::NotHeld => resource_error(place, b"' is not locked"),
            NotReleased::NotYours => {
                let detail = format!("owner {} does not hold the resource lock", owner.pid);
                Error::new(Code::InternalError, Domain::Lockspace, detail)
            }
        })
}

fn no_lockspace(place: Place<'_>) -> Error {
    let detail = [b"Lockspace for path ", place.lockspace, b" does not exist"].concat();
    Error::new(Code::InternalError, Domain::Rpc, detail)
}

fn resource_error(place: Place<'_>, state: &[u8]) -> Error {
    let detail = [b"Lockspace resource '", place.name, state].concat();
    Error::new(Code::ResourceBusy, Domain::Lockspace, detail)
}

/// Libvirt's words, and by whom behind them.
fn is_locked(place: Place<'_>, by: &[u8]) -> Error {
    resource_error(place, &[b"' is locked", by].concat())
}

/// The error of a refused call; where a system call failed, `what` was attempted.
fn refused(
    custody: &Custody,
    place: Place<'_>,
    refusal: Refusal,
    domain: Domain,
    what: &[u8],
) -> Error {
    match refusal {
        Refusal::NoLockspace => no_lockspace(place),
        Refusal::Held(id) => is_locked(place, &holder::of_resource(custody.state().table(), id)),
        Refusal::HeldAs(id) => {
            is_locked(place, &holder::of_other_name(custody.state().table(), id))
        }
        Refusal::Own => is_locked(place, b": by virtlockd itself, whose pid file it is"),
        Refusal::Taken(stranger) => is_locked(place, &holder::of_stranger(&stranger)),
        Refusal::Unsteady => is_locked(place, b": its file is replaced again and again"),
        Refusal::Leaves => {
            let detail = [
                b"resource name '",
                place.name,
                b"' leaves lockspace directory '",
                place.lockspace,
                b"'",
            ];
            Error::new(Code::InvalidArgument, Domain::Lockspace, detail.concat())
        }
        Refusal::DefaultLockspace => {
            let detail = [
                b"resource '",
                place.name,
                b"' of the default lockspace is not deleted",
            ];
            Error::new(Code::OperationDenied, Domain::Lockspace, detail.concat())
        }
        Refusal::File(errno) => Error::system(domain, what, errno),
        Refusal::Unrecorded(errno) => {
            let what = [
                b"Unable to record the lock on '",
                place.path().as_slice(),
                b"'",
            ]
            .concat();
            Error::system(Domain::Lockspace, &what, errno)
        }
        Refusal::Lock(errno) => {
            let what = [
                b"Unable to acquire lock on '",
                place.path().as_slice(),
                b"'",
            ]
            .concat();
            Error::system(Domain::Lockspace, &what, errno)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::custody::clients::Arrival;
    use crate::custody::ledger::Ledger;
    use crate::custody::servers::Service;
    use crate::desk::{Desk, turn};
    use crate::host::memory::Memory;
    use crate::host::mount_table::Mounts;
    use crate::host::names::Names;
    use crate::server::deadlines::Deadlines;
    use crate::server::ground::Ground;
    use crate::server::reserve::Reserve;
    use crate::server::waiting_room::WaitingRoom;

    /// A daemon with one client, which may call.
    struct Fixture {
        custody: Custody,
        id: ClientId,
        _other_end: UnixStream,
    }

    impl Fixture {
        fn new() -> Fixture {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let id = ClientId(ours.as_raw_fd());
            let mut custody = Custody::new(Ledger::new().unwrap());
            let arrival = Arrival {
                server: Service::Lock,
                id: custody.take_id(Service::Lock),
                peer: None,
                start_time: None,
                connected_at: 0,
                refused: false,
            };
            custody.connected(OwnedFd::from(ours), arrival);
            Fixture {
                custody,
                id,
                _other_end: theirs,
            }
        }

        fn outcome(&mut self, asked: &Call<'_>) -> Result<(), Error> {
            let desk = Desk::private().unwrap();
            let mut hall = Hall {
                custody: &mut self.custody,
                waiting: &mut WaitingRoom::new(true),
                deadlines: &mut Deadlines::default(),
                reserve: &Reserve::default(),
                names: &mut Names::default(),
                mounts: &mut Mounts::open(),
                ground: &mut Ground::default(),
                orders: &mut Vec::new(),
                leases: &mut Vec::new(),
                making: turn::making(desk.memory()),
                own_seen: Seen::default(),
            };
            let called = call(&mut hall, self.id, asked)?;
            assert_eq!(called, Called::Done);
            Ok(())
        }

        fn error_of(&mut self, asked: &Call<'_>) -> Error {
            self.outcome(asked).unwrap_err()
        }

        /// Every byte of the ledger's file.
        fn ledger(&self) -> Vec<u8> {
            let descriptor = self.custody.ledger().unwrap().try_clone().unwrap();
            Memory::adopt(descriptor).unwrap().bytes().to_vec()
        }
    }

    fn register(id: u32) -> Call<'static> {
        Call::Register {
            uuid: &[1; 16],
            name: b"guest",
            id,
            pid: 4242,
            flags: 0,
        }
    }

    #[test]
    fn flags_are_checked_before_anything_else() {
        let target = Target {
            lockspace: b"",
            name: b"x",
        };
        let mut fixture = Fixture::new();
        let asked = Call::AcquireResource {
            target,
            flags: 0x13,
        };
        let error = fixture.error_of(&asked);
        assert!(
            error
                .message()
                .starts_with(b"unsupported flags (0x10) in function")
        );
        assert_eq!(
            fixture.error_of(&Call::Restrict { flags: 0 }),
            not_registered()
        );
        assert_eq!(fixture.error_of(&register(0)), not_registered());
    }

    #[test]
    fn who_registers_again_as_the_same_leaves_no_event() {
        let mut fixture = Fixture::new();
        let mut ledger_after = |asked: Call<'_>| {
            fixture.outcome(&asked).unwrap();
            fixture.ledger()
        };
        let once = ledger_after(register(7));
        assert_eq!(ledger_after(register(7)), once);
        assert_ne!(ledger_after(register(8)), once);
    }

    #[test]
    fn a_restricted_session_is_allowed_nothing_more_and_keeps_its_owner() {
        let mut fixture = Fixture::new();
        fixture.outcome(&register(7)).unwrap();
        fixture.outcome(&Call::Restrict { flags: 0 }).unwrap();
        let error = fixture.error_of(&register(7));
        let text = b"operation forbidden: lock manager connection has been restricted";
        assert_eq!(error.message(), text);
        let client = fixture.custody.state().client(fixture.id).unwrap();
        assert_eq!(client.owner.as_deref().unwrap().pid, 4242);
    }
}
