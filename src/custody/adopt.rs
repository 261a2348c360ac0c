//! Numbers become descriptors: a state that was read is taken over, by a process that has what an
//! earlier image left open. Nothing is changed here that the earlier program, started once more on the
//! same state, could not find as it was, but for the kind of libvirt's shared locks, which comes last.

use std::num::NonZeroU64;
use std::os::fd::OwnedFd;

use foldhash::HashMap;

use super::clients::{Arrival, Client};
use super::descriptor::{Number, Open, Saved};
use super::fences::{Fence, Watched};
use super::servers::Listening;
use super::state::{Estate, State};
use crate::host::descriptors::Inherited;
use crate::host::errno;
use crate::host::file::{self, FileIdentity, Lockable};
use crate::host::{process, stream};
use crate::locks::lease::{self, Found, Lease, LockKind};
use crate::locks::table::{Mode, Unmapped};
use crate::log::Printable;

/// The files of libvirt's daemon, opened by it, and which they are.
type Foreign = HashMap<Number, (OwnedFd, FileIdentity)>;

impl State<Saved> {
    /// The same state with the open descriptors.
    ///
    /// # Errors
    /// A sentence that says which descriptor is not open, or which client cannot be told.
    pub fn adopt(self, inherited: &mut Inherited) -> Result<State<Open>, String> {
        let mut foreign = self.foreign(inherited)?;
        // How many of libvirt's resources are one file: a POSIX lock of one goes with the others'.
        let mut names: HashMap<FileIdentity, u32> = HashMap::default();
        for (_, identity) in foreign.values() {
            let count = names.entry(*identity).or_insert(0);
            *count = count.saturating_add(1);
        }
        let all_known = foreign.values().all(|(_, identity)| identity.is_known());
        let is_alone = |identity| all_known && names.get(&identity).is_none_or(|count| *count == 1);
        let names_processes = stream::peer_process_is_known();
        let listeners: Result<_, String> = self
            .listeners
            .into_iter()
            .map(|listening| adopt_listening(listening, inherited))
            .collect();
        let clients = self
            .clients
            .try_map(|_, client| adopt_client(client, names_processes, inherited))?;
        let fences: Result<_, String> = self
            .fences
            .into_iter()
            .map(|(pid, fence)| Ok((pid, adopt_fence(fence, inherited)?)))
            .collect();
        let watched: Result<_, String> = self
            .watched
            .into_iter()
            .map(|(pid, watched)| Ok((pid, adopt_watched(watched, inherited)?)))
            .collect();
        let estates: Result<_, String> = self
            .estates
            .into_iter()
            .map(|estate| adopt_estate(estate, inherited))
            .collect();
        let mut state = State {
            servers: self.servers,
            listeners: listeners?,
            clients,
            served: self.served,
            traffic: self.traffic,
            subscribers: self.subscribers,
            lockspaces: self.lockspaces,
            estates: estates?,
            fences: fences?,
            watched: watched?,
            lives: self.lives,
            here: self.here,
            unreachable: self.unreachable,
            settings: self.settings,
            poll: self.poll,
            old_poll: self.old_poll,
            ..State::default()
        };
        state.table =
            self.table
                .try_map(|known, lease| match foreign.remove(&lease.descriptor) {
                    Some((descriptor, identity)) => {
                        let lease = adopt_foreign(known, descriptor, is_alone(identity));
                        Ok::<_, String>((identity, lease))
                    }
                    None => Ok((known.identity, adopt_lease(known.name, lease, inherited)?)),
                })?;
        let held = state.table.iter().map(|(_, resource)| resource);
        let left = state.estates.iter().flat_map(|estate| &estate.resources);
        state.avoid = held
            .chain(left)
            .filter(|resource| matches!(resource.lease.kind, LockKind::Process { .. }))
            .map(|resource| resource.identity)
            .collect();
        state.count_own_connections();
        Ok(state)
    }

    /// The files that libvirt's daemon locked: nobody has said yet which they are.
    fn foreign(&self, inherited: &mut Inherited) -> Result<Foreign, String> {
        let mut foreign = Foreign::default();
        for (_, resource) in self.table().iter() {
            if !matches!(resource.lease.kind, LockKind::Unknown) {
                continue;
            }
            let number = resource.lease.descriptor;
            let descriptor = take(number, &file_of(resource.name()), inherited)?;
            let identity = file::identity(&descriptor).unwrap_or_else(|reason| {
                // One stale file of a network must not cost the locks of all others.
                tracing::error!(
                    target: "locking.lock_daemon",
                    "{} stays locked, but other names of it are not recognized: {}",
                    file_of(resource.name()),
                    errno::text(reason)
                );
                FileIdentity::unknown(&descriptor)
            });
            foreign.insert(number, (descriptor, identity));
        }
        Ok(foreign)
    }
}

fn file_of(name: &[u8]) -> String {
    format!("the file of resource '{}'", Printable(name))
}

fn take(number: Number, what: &str, inherited: &mut Inherited) -> Result<OwnedFd, String> {
    inherited.take(number.0).map_err(|reason| {
        format!(
            "descriptor {}, which should be {what}, is not open: {}",
            number.0,
            errno::text(reason)
        )
    })
}

fn adopt_listening(
    listening: Listening<Number>,
    inherited: &mut Inherited,
) -> Result<Listening<OwnedFd>, String> {
    Ok(Listening {
        server: listening.server,
        socket: take(listening.socket, "a listening socket", inherited)?,
        path: listening.path,
    })
}

fn adopt_client(
    client: Client<Number>,
    names_processes: bool,
    inherited: &mut Inherited,
) -> Result<Client<OwnedFd>, String> {
    let Arrival { id, server, .. } = client.arrival;
    let what = || format!("client {id} of the {} server", server.name());
    let socket = take(client.socket, &what(), inherited)?;
    let peer = client.arrival.peer.unwrap_or_else(|| {
        stream::peer(&socket).unwrap_or_else(|reason| {
            tracing::error!(
                target: "rpc.netdaemon",
                "Who {} is cannot be asked (getsockopt): {}. It is served, and cannot be killed \
                 should it leave with locks",
                what(),
                errno::text(reason)
            );
            stream::UNKNOWN_PEER
        })
    });
    let mut start_time = client.arrival.start_time;
    if !names_processes && start_time.is_none() {
        start_time = process::start_time(peer.pid).ok().and_then(NonZeroU64::new);
    }
    Ok(Client {
        socket,
        arrival: Arrival {
            peer: Some(peer),
            start_time,
            ..client.arrival
        },
        standing: client.standing,
        has_called: client.has_called,
        restricted: client.restricted,
        owner: client.owner,
        registered_at: client.registered_at,
        wanted: client.wanted,
        life: client.life,
    })
}

fn adopt_fence(fence: Fence<Number>, inherited: &mut Inherited) -> Result<Fence<OwnedFd>, String> {
    Ok(Fence {
        pid: fence.pid,
        process: take(fence.process, "a fenced process", inherited)?,
        stage: fence.stage,
        next_step: fence.next_step,
    })
}

fn adopt_watched(
    watched: Watched<Number>,
    inherited: &mut Inherited,
) -> Result<Watched<OwnedFd>, String> {
    let process = watched.process;
    let process = process.map(|number| take(number, "a watched process", inherited));
    Ok(Watched {
        pid: watched.pid,
        process: process.transpose()?,
    })
}

fn adopt_estate(
    estate: Estate<Number>,
    inherited: &mut Inherited,
) -> Result<Estate<Lockable>, String> {
    let resources: Result<_, String> = estate
        .resources
        .into_iter()
        .map(|resource| {
            resource.try_map(|known, lease| {
                Ok((known.identity, adopt_lease(known.name, lease, inherited)?))
            })
        })
        .collect();
    Ok(Estate {
        pid: estate.pid,
        resources: resources?,
    })
}

fn adopt_lease(
    name: &[u8],
    lease: Lease<Number>,
    inherited: &mut Inherited,
) -> Result<Lease, String> {
    let descriptor = take(lease.descriptor, &file_of(name), inherited)?;
    let kind = match lease.kind {
        LockKind::OpenFile => LockKind::OpenFile,
        LockKind::Process { parked } => {
            let parked: Result<_, String> = parked
                .into_iter()
                .map(|number| take(number, &file_of(name), inherited).map(Lockable::from))
                .collect();
            LockKind::Process { parked: parked? }
        }
        // Of a dead owner's, which goes at once: with the most care.
        LockKind::Unknown => LockKind::Process { parked: Vec::new() },
    };
    let descriptor = Lockable::inherited(descriptor);
    Ok(Lease::resumed(descriptor, kind, lease.created))
}

/// A lease of libvirt's daemon: the kernel is asked how the file is locked.
fn adopt_foreign(known: Unmapped<'_>, descriptor: OwnedFd, is_alone: bool) -> Lease {
    let mut descriptor = Lockable::inherited(descriptor);
    let kind = kind_of(known.name, known.mode, &mut descriptor, is_alone);
    Lease::resumed(descriptor, kind, false)
}

fn kind_of(name: &[u8], mode: Mode, descriptor: &mut Lockable, is_alone: bool) -> LockKind {
    let found = lease::adopt(descriptor, mode, is_alone).unwrap_or_else(|reason| {
        // What the C daemon takes, and what needs most care: nothing is lost if it is wrong.
        tracing::error!(
            target: "locking.lock_daemon",
            "The lock on '{}' cannot be looked at, and is kept as it is: {}",
            Printable(name), errno::text(reason)
        );
        Found::Process
    });
    match found {
        Found::OpenFile => LockKind::OpenFile,
        Found::Process => LockKind::Process { parked: Vec::new() },
        Found::Lost => {
            tracing::error!(
                target: "locking.lock_daemon",
                "The lock on '{}' was lost by the program that ran before: another process has it \
                 now. Its owner and the other process may both write the file: stop one of them",
                Printable(name)
            );
            LockKind::OpenFile
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_whose_lock_cannot_be_looked_at_is_kept_with_the_care_of_a_posix_lock() {
        // The kernel answers no question about locks on such a descriptor.
        let mut descriptor = Lockable::inherited(file::open_directory(b"/").unwrap());
        let kind = kind_of(b"/stale", Mode::Exclusive, &mut descriptor, true);
        assert!(matches!(kind, LockKind::Process { .. }));
    }
}
