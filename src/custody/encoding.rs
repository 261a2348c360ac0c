//! An event of the ledger as bytes (bincode through serde), and back.
//!
//! What every lock and every guest brings is written and read field by field, as serde would have it (tests
//! compare the two): it takes each byte of a uuid for an element of a list, and so two to four times as long. Every lock pays for
//! the one, and everybody waits for the other when a reactor has died.

use bincode::error::{DecodeError, EncodeError};

use super::descriptor::Number;
use super::event::{Event, KindRecord, OwnerRecord, ResourceName};
use crate::host::errno::Errno;
use crate::host::file::FileIdentity;
use crate::locks::table::{Mode, Pid};

/// The limit of one event when it is read, bytes: bincode takes a length's word for it and asks for
/// as much memory. The longest event holds what a client sent and what it has not read, of which
/// the server keeps less than half as much.
const LONGEST_EVENT: usize = 128 * 1024 * 1024;

// The variants' places in [`Event`].
const REGISTERED: u8 = 2;
const GRANTED: u8 = 6;
const RELEASED_BY: u8 = 20;

/// The first format that says when a lock was granted.
const FIRST_WITH_TIMES: u32 = 5;

/// An [`OwnerRecord`]: the process, the domain's id, its name, its uuid.
type OwnerFields<'a> = (Pid, u32, &'a [u8], [u8; 16]);
/// [`Event::Registered`] behind its place: the client and the owner.
type RegisteredFields<'a> = (i32, OwnerFields<'a>);
/// [`Event::Granted`] behind its place: what it was before times were told, then since when.
type GrantedFields<'a> = (UntimedFields<'a>, u64);
/// Owner, lockspace, name, then descriptor, device and inode, then mode, autocreate, created and kind.
type UntimedFields<'a> = (
    OwnerFields<'a>,
    &'a [u8],
    &'a [u8],
    (i32, u64, u64),
    [u8; 4],
);
/// [`Event::ReleasedBy`] behind its place: process, domain, lockspace, name.
type ReleasedFields<'a> = (Pid, [u8; 16], &'a [u8], &'a [u8]);

/// Why an event was not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unwritten {
    /// It does not fit into the place.
    NoRoom,
    /// It cannot be written at all.
    Unfit,
}

impl From<EncodeError> for Unwritten {
    fn from(error: EncodeError) -> Unwritten {
        match error {
            EncodeError::UnexpectedEnd => Unwritten::NoRoom,
            _ => Unwritten::Unfit,
        }
    }
}

fn configuration() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<LONGEST_EVENT>()
}

/// Writes an event to the front of `place`, and says how many bytes that took.
#[inline]
pub(super) fn encode(event: &Event<'_>, place: &mut [u8]) -> Result<usize, Unwritten> {
    if let Some(fields) = granted_of(event) {
        let written = bincode::encode_into_slice((GRANTED, fields), place, configuration());
        return Ok(written?);
    }
    let written = match event {
        Event::ReleasedBy(pid, uuid, ResourceName { lockspace, name }) => {
            let fields: ReleasedFields<'_> = (*pid, *uuid, lockspace, name);
            bincode::encode_into_slice((RELEASED_BY, fields), place, configuration())?
        }
        Event::Registered(client, owner) => {
            let fields: RegisteredFields<'_> = (client.0, fields_of(owner));
            bincode::encode_into_slice((REGISTERED, fields), place, configuration())?
        }
        _ => encode_by_serde(event, place)?,
    };
    Ok(written)
}

fn encode_by_serde(event: &Event<'_>, place: &mut [u8]) -> Result<usize, Unwritten> {
    Ok(bincode::serde::encode_into_slice(
        event,
        place,
        configuration(),
    )?)
}

/// Writes an event behind what is there, as the formats before [`FIRST_WITH_TIMES`] had it.
pub(super) fn encode_untimed_behind(event: &Event<'_>, content: &mut Vec<u8>) -> Result<(), Errno> {
    let bytes = match granted_of(event) {
        Some((untimed, _)) => bincode::encode_to_vec((GRANTED, untimed), configuration()),
        None => bincode::serde::encode_to_vec(event, configuration()),
    };
    content.extend(bytes.map_err(|_| Errno::EINVAL)?);
    Ok(())
}

/// Reads the event at the front of these bytes of this format, and says how many of them it takes.
///
/// # Errors
/// What does not fit an event.
#[inline]
pub(super) fn decode(version: u32, bytes: &[u8]) -> Result<(Event<'_>, usize), DecodeError> {
    let by_fields = match bytes.split_first() {
        Some((&GRANTED, fields)) if version < FIRST_WITH_TIMES => return decode_untimed(fields),
        Some((&GRANTED, fields)) => decode_granted(fields),
        Some((&RELEASED_BY, fields)) => decode_released(fields),
        Some((&REGISTERED, fields)) => decode_registered(fields),
        _ => None,
    };
    match by_fields {
        Some((event, used)) => Ok((event, used.saturating_add(1))),
        // Also what is damaged: serde says how.
        None => decode_by_serde(bytes),
    }
}

fn decode_by_serde(bytes: &[u8]) -> Result<(Event<'_>, usize), DecodeError> {
    bincode::serde::borrow_decode_from_slice(bytes, configuration())
}

fn decode_granted(bytes: &[u8]) -> Option<(Event<'_>, usize)> {
    let ((untimed, since), used): (GrantedFields<'_>, usize) =
        bincode::borrow_decode_from_slice(bytes, configuration()).ok()?;
    Some((granted(untimed, since)?, used))
}

fn decode_untimed(bytes: &[u8]) -> Result<(Event<'_>, usize), DecodeError> {
    let (untimed, used): (UntimedFields<'_>, usize) =
        bincode::borrow_decode_from_slice(bytes, configuration())?;
    let granted = granted(untimed, 0).ok_or(DecodeError::Other("a lock of no known kind"))?;
    Ok((granted, used.saturating_add(1)))
}

fn decode_released(bytes: &[u8]) -> Option<(Event<'_>, usize)> {
    let (fields, used): (ReleasedFields<'_>, usize) =
        bincode::borrow_decode_from_slice(bytes, configuration()).ok()?;
    let (pid, uuid, lockspace, name) = fields;
    let resource = ResourceName { lockspace, name };
    Some((Event::ReleasedBy(pid, uuid, resource), used))
}

fn decode_registered(bytes: &[u8]) -> Option<(Event<'_>, usize)> {
    let (fields, used): (RegisteredFields<'_>, usize) =
        bincode::borrow_decode_from_slice(bytes, configuration()).ok()?;
    let (client, owner) = fields;
    Some((Event::Registered(Number(client), owner_of(owner)), used))
}

/// The fields of [`Event::Granted`].
#[inline]
fn granted_of<'a>(event: &Event<'a>) -> Option<GrantedFields<'a>> {
    let Event::Granted {
        owner,
        resource: ResourceName { lockspace, name },
        descriptor,
        identity: FileIdentity { device, inode },
        mode,
        autocreate,
        created,
        kind,
        since,
    } = event
    else {
        return None;
    };
    let flags = [
        *mode as u8,
        (*autocreate).into(),
        (*created).into(),
        *kind as u8,
    ];
    let file = (descriptor.0, *device, *inode);
    let untimed = (fields_of(owner), *lockspace, *name, file, flags);
    Some((untimed, *since))
}

fn granted(untimed: UntimedFields<'_>, since: u64) -> Option<Event<'_>> {
    let (owner, lockspace, name, (descriptor, device, inode), flags) = untimed;
    let [mode, autocreate, created, kind] = flags;
    Some(Event::Granted {
        owner: owner_of(owner),
        resource: ResourceName { lockspace, name },
        descriptor: Number(descriptor),
        identity: FileIdentity { device, inode },
        mode: mode_of(mode)?,
        autocreate: truth_of(autocreate)?,
        created: truth_of(created)?,
        kind: kind_of(kind)?,
        since,
    })
}

fn fields_of<'a>(owner: &OwnerRecord<'a>) -> OwnerFields<'a> {
    (owner.pid, owner.id, owner.name, owner.uuid)
}

fn owner_of((pid, id, name, uuid): OwnerFields<'_>) -> OwnerRecord<'_> {
    OwnerRecord {
        pid,
        id,
        name,
        uuid,
    }
}

fn truth_of(byte: u8) -> Option<bool> {
    (byte <= 1).then_some(byte == 1)
}

fn mode_of(byte: u8) -> Option<Mode> {
    [Mode::Exclusive, Mode::Shared]
        .into_iter()
        .find(|mode| *mode as u8 == byte)
}

fn kind_of(byte: u8) -> Option<KindRecord> {
    [
        KindRecord::OpenFile,
        KindRecord::Process,
        KindRecord::Unknown,
    ]
    .into_iter()
    .find(|kind| *kind as u8 == byte)
}

#[cfg(test)]
mod tests {
    use super::super::ledger::VERSION;
    use super::*;

    #[test]
    fn what_is_written_and_read_field_by_field_is_what_serde_writes() {
        for event in events() {
            let [mut one, mut other] = [[0; 1024]; 2];
            let length = encode(&event, &mut one).unwrap();
            assert_eq!(encode_by_serde(&event, &mut other).unwrap(), length);
            assert_eq!(one, other, "{event:?}");
            let cut = encode(&event, &mut one[..length - 1]);
            assert_eq!(cut, Err(Unwritten::NoRoom), "{event:?}");
            assert_eq!(decode(VERSION, &other).unwrap(), (event, length));
        }
    }

    #[test]
    fn a_format_before_times_says_the_same_without_them() {
        for event in events() {
            let mut bytes = Vec::new();
            encode_untimed_behind(&event, &mut bytes).unwrap();
            let mut untimed = event.clone();
            if let Event::Granted { since, .. } = &mut untimed {
                *since = 0;
            }
            let (read, used) = decode(FIRST_WITH_TIMES - 1, &bytes).unwrap();
            assert_eq!((read, used), (untimed, bytes.len()));
            let cut = &bytes[..bytes.len() - 1];
            assert!(decode(FIRST_WITH_TIMES - 1, cut).is_err());
            // The kind of lock is the last byte.
            if matches!(event, Event::Granted { .. }) {
                *bytes.last_mut().unwrap() = 9;
                assert!(decode(FIRST_WITH_TIMES - 1, &bytes).is_err());
            }
        }
    }

    #[test]
    fn what_is_damaged_is_read_as_serde_reads_it() {
        let text = |read: Result<(Event<'_>, usize), DecodeError>| format!("{read:?}");
        for event in events() {
            let mut bytes = [0; 1024];
            let length = encode(&event, &mut bytes).unwrap();
            for at in 0..length {
                assert!(decode(VERSION, &bytes[..at]).is_err());
                for value in [0, 1, 2, 3, 250, 251, 252, 253, 254, 255] {
                    let mut bytes = bytes;
                    bytes[at] = value;
                    let bytes = &bytes[..length];
                    assert_eq!(text(decode(VERSION, bytes)), text(decode_by_serde(bytes)));
                }
            }
        }
    }

    /// One of each that is written field by field, with every flag and with numbers of every length.
    fn events() -> Vec<Event<'static>> {
        let resource = ResourceName {
            lockspace: b"/var/lib/libvirt/lockd/files",
            name: &[b'n'; 300],
        };
        let numbers = [0, 1, -1, 250, 251, 65_535, 65_536, i32::MAX, i32::MIN];
        let modes = [Mode::Exclusive, Mode::Shared];
        let kinds = [
            KindRecord::OpenFile,
            KindRecord::Process,
            KindRecord::Unknown,
        ];
        let mut events = Vec::new();
        for (pid, mode, kind) in numbers
            .into_iter()
            .flat_map(|pid| modes.map(|mode| (pid, mode)))
            .flat_map(|(pid, mode)| kinds.map(|kind| (pid, mode, kind)))
        {
            let owner = OwnerRecord {
                pid,
                id: pid.cast_unsigned(),
                name: b"guest",
                uuid: [0xfe; 16],
            };
            events.push(Event::ReleasedBy(pid, owner.uuid, resource));
            events.push(Event::Registered(Number(pid), owner));
            events.push(Event::Granted {
                owner,
                resource,
                descriptor: Number(pid),
                identity: FileIdentity {
                    device: u64::MAX,
                    inode: u64::from(pid.cast_unsigned()),
                },
                mode,
                autocreate: pid > 0,
                created: pid < 0,
                kind,
                since: u64::from(pid.cast_unsigned()) << 20,
            });
        }
        events
    }
}
