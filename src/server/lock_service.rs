//! The lock program: a decoded call is checked, carried out, and answered with nothing or an error.
//! The checks come in libvirt's order: flags, whether the connection is restricted, whether it has
//! registered, the lockspace, the resource.

use std::os::fd::AsRawFd;

use super::holder;
use crate::host::errno::Errno;
use crate::locks::keeper::{Acquired, Keeper, Refusal};
use crate::locks::lockspace::NotMade;
use crate::locks::place::Place;
use crate::locks::table::{Mode, NotReleased, Owner};
use crate::log::Printable;
use crate::restart::event::Event;
use crate::restart::ledger::Ledger;
use crate::restart::state::LockKindState;
use crate::wire::error::{Code, Domain, Error};
use crate::wire::lock::{AUTOCREATE, Call, Procedure, SHARED, Target};

/// What a connection to the lock socket may do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Session {
    /// It has not said who the owner is.
    #[default]
    Unregistered,
    /// Its calls are made for this owner.
    Registered(Box<Owner>),
    /// It asked to be allowed nothing more; its end is still the owner's end.
    Restricted(Box<Owner>),
}

impl Session {
    /// The registered owner.
    pub fn owner(&self) -> Option<&Owner> {
        match self {
            Session::Unregistered => None,
            Session::Registered(owner) | Session::Restricted(owner) => Some(owner),
        }
    }
}

/// What a call works on.
#[derive(Debug)]
pub struct Context<'a> {
    /// The connection's session.
    pub session: &'a mut Session,
    /// The connection's descriptor, which is its name in the ledger.
    pub descriptor: i32,
    /// Who holds what.
    pub keeper: &'a mut Keeper,
    /// Where every change is written down before it is answered.
    pub ledger: &'a mut Ledger,
}

/// Carries out a call. When this returns, the kernel and the ledger have what the answer says.
pub fn call(context: Context<'_>, call: &Call<'_>) -> Result<(), Error> {
    let Context {
        session,
        descriptor,
        keeper,
        ledger,
    } = context;
    let procedure = call.procedure();
    check_flags(procedure, call)?;
    if let Session::Restricted(_) = session {
        let detail = "lock manager connection has been restricted";
        return Err(Error::new(Code::OperationDenied, Domain::Rpc, detail));
    }
    match *call {
        Call::Register {
            uuid,
            name,
            id,
            pid,
            ..
        } => {
            if id == 0 {
                return Err(not_registered());
            }
            let owner = Owner {
                pid,
                id,
                name: name.into(),
                uuid: *uuid,
            };
            if session.owner() == Some(&owner) {
                return Ok(());
            }
            ledger.note(&Event::Registered {
                descriptor,
                owner: (&owner).into(),
            });
            *session = Session::Registered(Box::new(owner));
            Ok(())
        }
        Call::Restrict { .. } => {
            let owner = registered(session)?.clone();
            ledger.note(&Event::Restricted { descriptor });
            *session = Session::Restricted(Box::new(owner));
            Ok(())
        }
        Call::New { path, .. } => {
            registered(session)?;
            new_lockspace(keeper, ledger, path)
        }
        Call::CreateLockspace { path } => {
            if keeper.has_lockspace(path) {
                Ok(())
            } else {
                make_lockspace(keeper, ledger, path)
            }
        }
        Call::CreateResource { target, .. } => {
            registered(session)?;
            let place = place(target);
            keeper.create(place).map_err(|refusal| {
                let what = [b"cannot create file '", place.path().as_slice(), b"'"].concat();
                refused(keeper, place, refusal, Domain::None, &what)
            })
        }
        Call::DeleteResource { target, .. } => {
            registered(session)?;
            let place = place(target);
            keeper.delete(place).map_err(|refusal| {
                let what = [
                    b"Unable to delete lockspace resource ",
                    place.path().as_slice(),
                ]
                .concat();
                refused(keeper, place, refusal, Domain::Lockspace, &what)
            })
        }
        Call::AcquireResource { target, flags } => {
            acquire(registered(session)?, keeper, ledger, place(target), flags)
        }
        Call::ReleaseResource { target, .. } => {
            release(registered(session)?, keeper, ledger, place(target))
        }
    }
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

fn registered(session: &Session) -> Result<&Owner, Error> {
    session.owner().ok_or_else(not_registered)
}

fn not_registered() -> Error {
    let detail = "lock owner details have not been registered";
    Error::new(Code::OperationInvalid, Domain::Rpc, detail)
}

fn new_lockspace(keeper: &mut Keeper, ledger: &mut Ledger, path: &[u8]) -> Result<(), Error> {
    if path.is_empty() {
        let detail = "the default lockspace already exists";
        return Err(Error::new(Code::OperationInvalid, Domain::Rpc, detail));
    }
    if keeper.has_lockspace(path) {
        let detail = [b"Lockspace for path ", path, b" already exists"].concat();
        return Err(Error::new(Code::InternalError, Domain::Rpc, detail));
    }
    make_lockspace(keeper, ledger, path)
}

fn make_lockspace(keeper: &mut Keeper, ledger: &mut Ledger, path: &[u8]) -> Result<(), Error> {
    keeper.make_lockspace(path).map_err(|reason| match reason {
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
    })?;
    ledger.note(&Event::Lockspace { directory: path });
    Ok(())
}

fn acquire(
    owner: &Owner,
    keeper: &mut Keeper,
    ledger: &mut Ledger,
    place: Place<'_>,
    flags: u32,
) -> Result<(), Error> {
    let mode = if flags & SHARED == 0 {
        Mode::Exclusive
    } else {
        Mode::Shared
    };
    let autocreate = flags & AUTOCREATE != 0;
    if !keeper.has_lockspace(place.lockspace) && keeper.can_open_lockspace(place.lockspace) {
        keeper.add_lockspace(place.lockspace);
        ledger.note(&Event::Lockspace {
            directory: place.lockspace,
        });
        tracing::info!(
            target: "locking.lock_daemon",
            "Lockspace {} is opened on its first use: it was not made on this daemon",
            Printable(place.lockspace)
        );
    }
    let acquired = keeper
        .acquire(owner, place, mode, autocreate)
        .map_err(|refusal| {
            let verb = if autocreate { "open/create" } else { "open" };
            let what = [
                format!("Unable to {verb} resource ").as_bytes(),
                &place.path(),
            ]
            .concat();
            refused(keeper, place, refusal, Domain::Lockspace, &what)
        })?;
    // What is not written down would be lost in an upgrade: then it must not be granted.
    record(ledger, keeper, acquired, owner, place).map_err(|errno| {
        let _ = keeper.release(place, owner.key());
        let what = [
            b"Unable to record the lock on '",
            place.path().as_slice(),
            b"'",
        ]
        .concat();
        Error::system(Domain::Lockspace, &what, errno)
    })
}

fn record(
    ledger: &mut Ledger,
    keeper: &Keeper,
    acquired: Acquired,
    owner: &Owner,
    place: Place<'_>,
) -> Result<(), Errno> {
    let Place { lockspace, name } = place;
    match acquired {
        Acquired::Joined(_) => ledger.append(&Event::Joined {
            owner: owner.into(),
            lockspace,
            name,
        }),
        Acquired::Granted(id) => {
            let resource = keeper.table().get(id).ok_or(Errno::ENOENT)?;
            ledger.append(&Event::Granted {
                owner: owner.into(),
                lockspace,
                name,
                descriptor: resource.lease.descriptor.as_raw_fd(),
                identity: resource.identity,
                mode: resource.mode,
                autocreate: resource.autocreate,
                created: resource.lease.created,
                kind: LockKindState::OpenFile,
            })
        }
    }
}

fn release(
    owner: &Owner,
    keeper: &mut Keeper,
    ledger: &mut Ledger,
    place: Place<'_>,
) -> Result<(), Error> {
    if !keeper.has_lockspace(place.lockspace) {
        return Err(no_lockspace(place));
    }
    keeper
        .release(place, owner.key())
        .map_err(|reason| match reason {
            NotReleased::NotHeld => resource_error(place, b"' is not locked"),
            NotReleased::NotYours => {
                let detail = format!("owner {} does not hold the resource lock", owner.pid);
                Error::new(Code::InternalError, Domain::Lockspace, detail)
            }
        })?;
    let Place { lockspace, name } = place;
    ledger.note(&Event::ReleasedBy {
        pid: owner.pid,
        uuid: owner.uuid,
        lockspace,
        name,
    });
    Ok(())
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
    keeper: &Keeper,
    place: Place<'_>,
    refusal: Refusal,
    domain: Domain,
    what: &[u8],
) -> Error {
    match refusal {
        Refusal::NoLockspace => no_lockspace(place),
        Refusal::Held(id) => is_locked(place, &holder::of_resource(keeper.table(), id)),
        Refusal::HeldAs(id) => is_locked(place, &holder::of_other_name(keeper.table(), id)),
        Refusal::Own => is_locked(place, b": by virtlockd itself, whose pid file it is"),
        Refusal::Taken(stranger) => is_locked(place, &holder::of_stranger(stranger)),
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
    use super::*;

    fn outcome(session: &mut Session, asked: &Call<'_>) -> Result<(), Error> {
        let (mut keeper, mut ledger) = (Keeper::new(), Ledger::new().unwrap());
        let (keeper, ledger) = (&mut keeper, &mut ledger);
        call(
            Context {
                session,
                descriptor: 9,
                keeper,
                ledger,
            },
            asked,
        )
    }

    fn error_of(session: &mut Session, asked: &Call<'_>) -> Error {
        outcome(session, asked).unwrap_err()
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
        let mut session = Session::default();
        let asked = Call::AcquireResource {
            target,
            flags: 0x13,
        };
        let error = error_of(&mut session, &asked);
        assert!(
            error
                .message()
                .starts_with(b"unsupported flags (0x10) in function")
        );
        assert_eq!(
            error_of(&mut session, &Call::Restrict { flags: 0 }),
            not_registered()
        );
        assert_eq!(error_of(&mut session, &register(0)), not_registered());
    }

    #[test]
    fn who_registers_again_as_the_same_leaves_no_event() {
        let (mut keeper, mut ledger) = (Keeper::new(), Ledger::new().unwrap());
        let mut session = Session::default();
        let mut length_after = |asked: Call<'_>| {
            let context = Context {
                session: &mut session,
                descriptor: 9,
                keeper: &mut keeper,
                ledger: &mut ledger,
            };
            call(context, &asked).unwrap();
            ledger.content().len()
        };
        let once = length_after(register(7));
        assert_eq!(length_after(register(7)), once);
        assert!(length_after(register(8)) > once);
    }

    #[test]
    fn a_restricted_session_is_allowed_nothing_more_and_keeps_its_owner() {
        let mut session = Session::default();
        outcome(&mut session, &register(7)).unwrap();
        outcome(&mut session, &Call::Restrict { flags: 0 }).unwrap();
        let error = error_of(&mut session, &register(7));
        let text = b"operation forbidden: lock manager connection has been restricted";
        assert_eq!(error.message(), text);
        assert_eq!(session.owner().unwrap().pid, 4242);
    }
}
