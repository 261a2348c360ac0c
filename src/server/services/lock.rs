//! The lock program: a decoded call is checked, carried out, and answered with nothing or an error.
//! The checks come in libvirt's order: flags, then whether the connection is restricted, then whether it
//! has registered, then what the call itself wants.

use std::os::fd::{AsRawFd, RawFd};

use crate::custody::Custody;
use crate::custody::clients::{Client, ClientId};
use crate::custody::locking::{Acquired, At, Decided, Refusal};
use crate::custody::own_connections::Seen;
use crate::host::errno::Errno;
use crate::host::file::{FileIdentity, Lockable};
use crate::host::process;
use crate::locks::errand::{Errand, Outcome};
use crate::locks::holder;
use crate::locks::job::End;
use crate::locks::lease::{Lease, LockKind, NotLocked, Refused};
use crate::locks::lockspace::{self, NotMade};
use crate::locks::place::Place;
use crate::locks::table::{Mode, NotReleased, Owner, Pid};
use crate::log::Printable;
use crate::server::hall::{Hall, Order};
use crate::server::shares::{Finding, ShareId};
use crate::wire::error::{Code, Domain, Error, Shape};
use crate::wire::lock::{AUTOCREATE, Call, Procedure, SHARED, Target};

/// How a call that is not refused ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Called {
    /// It is done: the kernel and the ledger have what the answer says.
    Done,
    /// Something was ordered that has to be done first.
    Again,
    /// It waits for what others do with a file on a share. It is worked on once more when that is done.
    Waits,
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
            return new_lockspace(hall, id, path);
        }
        Call::CreateLockspace { path } => {
            if !custody.state().has_lockspace(path) {
                return make_lockspace(hall, id, path);
            }
            if !path.is_empty() {
                is_opened(hall, path, false);
            }
        }
        Call::CreateResource { target, .. } => {
            registered(owner.as_ref())?;
            let place = place(target);
            match create(hall, id, place) {
                Ok(called) => return Ok(called),
                Err(refusal) => {
                    let what = [b"cannot create file '", place.path().as_slice(), b"'"].concat();
                    return Err(refused(hall.custody, place, refusal, Domain::None, &what));
                }
            }
        }
        Call::DeleteResource { target, .. } => {
            registered(owner.as_ref())?;
            let place = place(target);
            match delete(hall, id, place) {
                Ok(called) => return Ok(called),
                Err(refusal) => {
                    let what = [
                        b"Unable to delete lockspace resource ",
                        place.path().as_slice(),
                    ]
                    .concat();
                    return Err(refused(
                        hall.custody,
                        place,
                        refusal,
                        Domain::Lockspace,
                        &what,
                    ));
                }
            }
        }
        Call::AcquireResource { target, flags } => {
            let owner = registered(owner.as_ref())?;
            if is_lent && is_of_a_dead_one(custody, owner.pid) {
                hall.orders.push(Order::Settle(owner.pid));
                return Ok(Called::Again);
            }
            match acquire(owner, hall, id, place(target), flags) {
                Ok(None) => return Ok(Called::Waits),
                Ok(Some(Acquired::Granted)) => is_granted(hall, place(target), flags),
                Ok(Some(_)) => (),
                Err(error) => {
                    let (place, message) = (place(target), error.message());
                    hall.custody
                        .was_refused(owner, place, mode(flags), &message);
                    return Err(error);
                }
            }
            if is_lent && is_to_be_watched(hall.custody, owner, &mut hall.own_seen) {
                hall.orders.push(Order::Watch(id));
            }
        }
        Call::ReleaseResource { target, .. } => {
            return release(registered(owner.as_ref())?, hall, id, place(target));
        }
    }
    Ok(Called::Done)
}

/// A file was locked.
fn is_granted(hall: &mut Hall<'_>, place: Place<'_>, flags: u32) {
    if place.is_default() && !hall.shares.has_any() {
        return;
    }
    let Some(id) = hall.custody.find(place.lockspace, place.name) else {
        return;
    };
    if flags & AUTOCREATE != 0 && !place.is_default() {
        hall.leases.push(id);
    }
    let state = hall.custody.state();
    if let Some(resource) = state.table().get(id) {
        let what = (place, resource.identity);
        let file = &resource.lease.descriptor;
        hall.ground
            .is_locked(hall.shares.mounts(), state, what, file);
    }
}

/// What a call does on a share, as an operator reads it.
fn what_is_done(hall: &Hall<'_>, id: ClientId, what: &str, place: Place<'_>) -> String {
    let client = hall.custody.state().client(id);
    let who = client.map_or_else(|| "a client that is gone".to_owned(), Client::text);
    format!("{what} of '{}' for {who}", Printable(&place.path()))
}

/// The next errand of a call: `None` if it has to be waited for.
fn errand(
    hall: &mut Hall<'_>,
    id: ClientId,
    share: ShareId,
    (what, place, errand): (&str, Place<'_>, &Errand<'_>),
    file: Option<RawFd>,
) -> Option<Finding> {
    let text = what_is_done(hall, id, what, place);
    hall.shares
        .errand(id, share, (place, errand), file, || text)
}

fn create(hall: &mut Hall<'_>, id: ClientId, place: Place<'_>) -> Result<Called, Refusal> {
    let Some(share) = hall.shares.of_place(place) else {
        hall.custody.create(place)?;
        return Ok(Called::Done);
    };
    hall.custody.known_and_free(place)?;
    let work = ("create", place, &Errand::Create(place));
    match errand(hall, id, share, work, None).map(|it| it.outcome) {
        None => Ok(Called::Waits),
        Some(Outcome::Created(result)) => Ok(result.map(|()| Called::Done)?),
        Some(other) => Err(Refusal::File(reason_of(&other))),
    }
}

fn delete(hall: &mut Hall<'_>, id: ClientId, place: Place<'_>) -> Result<Called, Refusal> {
    let Some(share) = hall.shares.of_place(place) else {
        hall.custody.delete(place)?;
        return Ok(Called::Done);
    };
    hall.custody.may_delete(place)?;
    let work = ("delete", place, &Errand::Find(place));
    match errand(hall, id, share, work, None).map(|it| it.outcome) {
        None => return Ok(Called::Waits),
        Some(Outcome::Found(found)) => hall.custody.may_go(found?)?,
        Some(other) => return Err(Refusal::File(reason_of(&other))),
    }
    let work = ("delete", place, &Errand::Delete(place));
    match errand(hall, id, share, work, None).map(|it| it.outcome) {
        None => Ok(Called::Waits),
        Some(Outcome::Deleted(result)) => Ok(result.map(|()| Called::Done)?),
        Some(other) => Err(Refusal::File(reason_of(&other))),
    }
}

/// Why an errand has another outcome than it should.
fn reason_of(outcome: &Outcome) -> Errno {
    match outcome {
        Outcome::Failed(reason) => *reason,
        _ => Errno::EIO,
    }
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

fn new_lockspace(hall: &mut Hall<'_>, id: ClientId, path: &[u8]) -> Result<Called, Error> {
    if path.is_empty() {
        let detail = "the default lockspace already exists";
        return Err(Error::new(Code::OperationInvalid, Domain::Rpc, detail));
    }
    if hall.custody.state().has_lockspace(path) {
        let detail = [b"Lockspace for path ", path, b" already exists"].concat();
        return Err(Error::new(Code::InternalError, Domain::Rpc, detail));
    }
    make_lockspace(hall, id, path)
}

/// A lockspace was made or opened, perhaps once more.
fn is_opened(hall: &mut Hall<'_>, path: &[u8], is_new: bool) {
    let state = hall.custody.state();
    hall.ground
        .is_opened(hall.shares.mounts(), state, path, is_new);
}

/// A lockspace's directory, as the place of an errand.
fn directory(path: &[u8]) -> Place<'_> {
    Place {
        lockspace: b"",
        name: path,
    }
}

fn make_lockspace(hall: &mut Hall<'_>, id: ClientId, path: &[u8]) -> Result<Called, Error> {
    let made = match hall.shares.of_path(path) {
        None => hall.custody.make_lockspace(path),
        Some(share) => match hall.custody.may_make_lockspace() {
            Err(reason) => Err(reason),
            Ok(()) => {
                let asked = Errand::MakeDirectory(path);
                let work = ("create", directory(path), &asked);
                match errand(hall, id, share, work, None).map(|it| it.outcome) {
                    None => return Ok(Called::Waits),
                    Some(Outcome::MadeDirectory(Ok(is_new))) => {
                        hall.custody.has_directory(path);
                        Ok(is_new)
                    }
                    Some(Outcome::MadeDirectory(made)) => made,
                    Some(other) => Err(NotMade::System(reason_of(&other))),
                }
            }
        },
    };
    if let Ok(is_new) = made
        && !path.is_empty()
    {
        is_opened(hall, path, is_new);
    }
    made.map(|_| Called::Done).map_err(|reason| match reason {
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

/// Takes a resource for an owner; `None` if that has to wait.
fn acquire(
    owner: &Owner,
    hall: &mut Hall<'_>,
    id: ClientId,
    place: Place<'_>,
    flags: u32,
) -> Result<Option<Acquired>, Error> {
    let mode = mode(flags);
    let autocreate = flags & AUTOCREATE != 0;
    if hall.custody.wants_lockspace(place.lockspace) {
        match is_directory(hall, id, place.lockspace) {
            None => return Ok(None),
            Some(false) => (),
            Some(true) => {
                hall.custody.has_directory(place.lockspace);
                tracing::info!(
                    target: "locking.lock_daemon",
                    "Lockspace {} is opened on its first use: it was not made on this daemon",
                    Printable(place.lockspace)
                );
                is_opened(hall, place.lockspace, false);
            }
        }
    }
    if let Some(share) = hall.shares.is_left_on_hung(place) {
        let by = format!(
            ": its last owner is dead, and {} does not answer, so nobody can let go of the lock",
            hall.shares.text(share)
        );
        return Err(is_locked(place, by.as_bytes()));
    }
    if hall.shares.has_to_wait(id, place) {
        return Ok(None);
    }
    if hall.custody.is_being_let_go(place) {
        hall.shares.waits(id);
        return Ok(None);
    }
    let decided = hall.custody.decide(owner, place, mode, autocreate);
    let acquisition = match decided {
        Ok(Decided::Done) => return Ok(Some(Acquired::Joined)),
        Ok(Decided::Work(acquisition)) => acquisition,
        Err(refusal) => return Err(not_acquired(hall, place, autocreate, refusal, None)),
    };
    let mut share = hall.shares.of_place(place);
    if share.is_none() && hall.shares.waits_for_lessee(id) {
        share = Some(ShareId::Lessee);
    }
    let here = match share {
        None => Some(acquisition.run(Some(hall.making))),
        Some(_) => None,
    };
    if here.as_ref().is_some_and(is_leased) {
        share = Some(ShareId::Lessee);
    }
    let (done, at) = match (here, share) {
        (Some(done), None) => (done, At::Here),
        (_, share) => {
            let share = share.unwrap_or(ShareId::Unknown);
            let asked = Errand::Acquire {
                place,
                mode,
                autocreate,
                avoid: acquisition.avoid.to_vec(),
                is_patient: hall.shares.is_patient(),
            };
            match errand(hall, id, share, ("acquire", place, &asked), None) {
                None => return Ok(None),
                Some(finding) => (locked(finding), At::Elsewhere),
            }
        }
    };
    hall.custody
        .conclude(owner, (place, mode, autocreate), done, at)
        .map(|()| Some(Acquired::Granted))
        .map_err(|refusal| not_acquired(hall, place, autocreate, refusal, share))
}

/// Whether a file could not be opened because somebody has a lease on it, who has been asked to give it back by now.
fn is_leased(done: &Result<(Lease, FileIdentity), NotLocked>) -> bool {
    matches!(
        done,
        Err(NotLocked {
            reason: Refused::Open(Errno::EAGAIN),
            ..
        })
    )
}

/// What a helper locked.
fn locked(finding: Finding) -> Result<(Lease, FileIdentity), NotLocked> {
    match (finding.outcome, finding.file) {
        (Outcome::Locked(identity, created), Some(file)) => Ok((
            Lease {
                descriptor: Lockable::locked_elsewhere(file),
                kind: LockKind::OpenFile,
                created,
            },
            identity,
        )),
        (Outcome::NotLocked(refused), _) => Err(refused),
        (other, _) => Err(Refused::Open(reason_of(&other)).into()),
    }
}

/// Whether there is a directory; `None` if that has to be waited for.
fn is_directory(hall: &mut Hall<'_>, id: ClientId, path: &[u8]) -> Option<bool> {
    let Some(share) = hall.shares.of_path(path) else {
        return Some(lockspace::is_directory(path));
    };
    let asked = Errand::IsDirectory(path);
    let work = ("open", directory(path), &asked);
    let finding = errand(hall, id, share, work, None)?;
    Some(finding.outcome == Outcome::IsDirectory(true))
}

fn not_acquired(
    hall: &Hall<'_>,
    place: Place<'_>,
    autocreate: bool,
    refusal: Refusal,
    share: Option<ShareId>,
) -> Error {
    let verb = if autocreate { "open/create" } else { "open" };
    let what = [
        format!("Unable to {verb} resource ").as_bytes(),
        &place.path(),
    ]
    .concat();
    let mut error = refused(hall.custody, place, refusal, Domain::Lockspace, &what);
    // Libvirt's words are in front.
    if let (Shape::System(_), Some(share)) = (error.shape, share) {
        let on = format!(" (on {})", hall.shares.text(share));
        error.detail.extend_from_slice(on.as_bytes());
    }
    error
}

fn release(
    owner: &Owner,
    hall: &mut Hall<'_>,
    id: ClientId,
    place: Place<'_>,
) -> Result<Called, Error> {
    if !hall.custody.state().has_lockspace(place.lockspace) {
        return Err(no_lockspace(place));
    }
    let released = match let_go_elsewhere(owner, hall, id, place) {
        LetGo::Here => hall.custody.release(place, owner),
        LetGo::Waits => return Ok(Called::Waits),
        LetGo::Done => hall.custody.release_let_go(place, owner).map(|file| {
            if let Some(file) = file {
                hall.shares.close(file);
            }
        }),
    };
    released
        .map(|()| Called::Done)
        .map_err(|reason| match reason {
            NotReleased::NotHeld => resource_error(place, b"' is not locked"),
            NotReleased::NotYours => {
                let detail = format!("owner {} does not hold the resource lock", owner.pid);
                Error::new(Code::InternalError, Domain::Lockspace, detail)
            }
        })
}

/// Where a lock is let go of.
enum LetGo {
    /// In this process.
    Here,
    /// Elsewhere, and it is to be waited for.
    Waits,
    /// It is done.
    Done,
}

/// What is given back is let go of elsewhere if it is the last holding of a file on a share.
fn let_go_elsewhere(owner: &Owner, hall: &mut Hall<'_>, id: ClientId, place: Place<'_>) -> LetGo {
    if hall.shares.lets_go(id) {
        // Whatever has been mounted or unmounted since.
        let asked = Errand::End {
            place,
            identity: FileIdentity {
                device: 0,
                inode: 0,
            },
            removes: None,
        };
        let work = ("release", place, &asked);
        return match errand(hall, id, ShareId::Unknown, work, None) {
            None => LetGo::Waits,
            Some(_) => LetGo::Done,
        };
    }
    if !hall.shares.may_have_files() {
        return LetGo::Here;
    }
    let Some(resource) = hall.custody.last_of(place, owner) else {
        return LetGo::Here;
    };
    let Some(share) = hall.shares.of_lock(resource) else {
        return LetGo::Here;
    };
    let (end, number) = (End::of(resource), resource.lease.descriptor.as_raw_fd());
    let asked = Errand::End {
        place,
        identity: end.identity,
        removes: end.removes,
    };
    if hall.shares.has_to_wait(id, place) || hall.shares.waits_for_unknown(id, share) {
        return LetGo::Waits;
    }
    hall.custody.goes_elsewhere(number);
    match errand(hall, id, share, ("release", place, &asked), Some(number)) {
        None => LetGo::Waits,
        Some(_) => LetGo::Done,
    }
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
    use crate::host::names::Names;
    use crate::server::deadlines::Deadlines;
    use crate::server::ground::Ground;
    use crate::server::reserve::Reserve;
    use crate::server::shares::Shares;
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
                ground: &mut Ground::default(),
                orders: &mut Vec::new(),
                leases: &mut Vec::new(),
                shares: &mut Shares::default(),
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
