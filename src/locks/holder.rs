//! Who has it: an owner, or somebody outside of the daemon, in the words of a refusal or of the log.
//!
//! Libvirt's words end where these begin, so that programs which look for those still find them. A
//! domain's name may be any bytes: it is repeated as it came, as libvirt does, and the log escapes it.

use super::lease::Stranger;
use super::place::Place;
use super::table::{Mode, OwnerKey, Pid, ResourceId, Table};
use crate::host::process;
use crate::log::Printable;

/// So much of a domain's name is repeated, bytes: it may be 64 KiB long, and each word of an error goes
/// out twice.
const LONGEST_NAME: usize = 256;

/// So many domains of a process are named in one line of the log.
const MOST_NAMED: usize = 4;

/// A uuid as libvirt writes it.
pub fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (position, byte) in uuid.iter().enumerate() {
        if matches!(position, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// A process that holds something as an operator reads it at the start of a sentence: its domains.
pub fn process_text<L>(table: &Table<L>, pid: Pid) -> String {
    let named = table
        .owners_of(pid)
        .filter(|owner| owner.key().uuid.is_some());
    let count = named.clone().count();
    if let (1, Some(owner)) = (count, named.clone().next()) {
        return domain_text(table, owner.key());
    }
    let named = named
        .take(MOST_NAMED)
        .map(|one| Printable(&owner(table, one.key())).to_string());
    let named: Vec<String> = named.collect();
    match (named.is_empty(), count.saturating_sub(MOST_NAMED)) {
        (true, _) => format!("Process {pid}"),
        (false, 0) => format!("Process {pid} of {}", named.join(", ")),
        (false, others) => format!("Process {pid} of {} and {others} more", named.join(", ")),
    }
}

/// An owner as an operator reads it, at the start of a sentence.
pub fn domain_text<L>(table: &Table<L>, key: OwnerKey) -> String {
    let text = owner(table, key);
    let mut text = Printable(&text).to_string();
    if let Some(first) = text.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    text
}

/// The front of a name that is too long; between two characters, if it is UTF-8.
fn cut(name: &[u8]) -> (&[u8], &'static str) {
    let Some(front) = name.get(..LONGEST_NAME) else {
        return (name, "");
    };
    if name.len() == LONGEST_NAME {
        return (name, "");
    }
    let is_inside = |at: &usize| name.get(*at).is_some_and(|byte| byte & 0xc0 == 0x80);
    let end = (LONGEST_NAME.saturating_sub(3)..=LONGEST_NAME)
        .rev()
        .find(|at| !is_inside(at));
    let front = end.and_then(|end| name.get(..end)).unwrap_or(front);
    (front, "...")
}

/// An owner with all that it is known by.
pub fn owner<L>(table: &Table<L>, key: OwnerKey) -> Vec<u8> {
    let (Some(uuid), Some(owner)) = (key.uuid, table.owner(key)) else {
        return format!("a domain of process {}", key.pid).into_bytes();
    };
    let (name, dots) = cut(&owner.name);
    let rest = format!("{dots}' (uuid {}, pid {})", uuid_text(&uuid), key.pid);
    [b"domain '", name, rest.as_bytes()].concat()
}

/// One of the owners of a resource, how many others there are, and in which mode they have it.
pub fn of_resource<L>(table: &Table<L>, id: ResourceId) -> Vec<u8> {
    let Some(resource) = table.get(id) else {
        return Vec::new();
    };
    let Some(one) = resource.any_holder() else {
        return Vec::new();
    };
    let mut text = [&b": by "[..], &owner(table, one)].concat();
    let others = resource.holder_count().saturating_sub(1);
    if others > 0 {
        text.extend_from_slice(format!(" and {others} more").as_bytes());
    }
    text.extend_from_slice(match resource.mode {
        Mode::Exclusive => b", exclusive",
        Mode::Shared => b", shared",
    });
    text
}

/// One of the owners of a file that was asked for under another name, and under which they have it.
pub fn of_other_name<L>(table: &Table<L>, id: ResourceId) -> Vec<u8> {
    let mut text = of_resource(table, id);
    if let Some(resource) = table.get(id) {
        let place = Place {
            lockspace: resource.lockspace(),
            name: resource.name(),
        };
        text.extend_from_slice(b", under another name of the same file: '");
        text.extend_from_slice(&place.path());
        text.push(b'\'');
    }
    text
}

/// Who has a lock that is not in the table.
pub fn of_stranger(stranger: &Stranger) -> Vec<u8> {
    match stranger {
        Stranger::Process(pid) => {
            let pid = *pid;
            let name = process::name(pid).unwrap_or_default();
            if name == b"virtlockd" {
                format!(": by another virtlockd, pid {pid}").into_bytes()
            } else if name.is_empty() {
                format!(": by a process that is not virtlockd, pid {pid}").into_bytes()
            } else {
                let start = format!(": by a process that is not virtlockd, pid {pid} (");
                [start.as_bytes(), name.as_slice(), b")"].concat()
            }
        }
        Stranger::ThisHost => b": by a process of this host that is not this virtlockd".to_vec(),
        Stranger::Elsewhere(None) => b": probably from another host".to_vec(),
        Stranger::Elsewhere(Some(note)) => format!(
            ": from another host, as its lease file says: {}",
            note.text()
        )
        .into_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::file::FileIdentity;
    use crate::locks::table::{Granted, Owner};

    fn domain(name: &[u8], number: u8) -> Owner {
        Owner {
            pid: 7,
            id: 1,
            name: name.into(),
            uuid: [number; 16],
        }
    }

    fn held_by(owners: &[Owner]) -> String {
        let mut table = Table::new();
        let granted = Granted {
            lockspace: b"",
            name: b"/disk",
            identity: FileIdentity {
                device: 1,
                inode: 1,
            },
            mode: Mode::Shared,
            autocreate: false,
            since: 0,
            lease: (),
        };
        let vacant = table.vacant(granted.lockspace, granted.name).unwrap();
        let id = table.enter(vacant, &owners[0], granted);
        owners[1..].iter().for_each(|owner| table.join(id, owner));
        String::from_utf8_lossy(&of_resource(&table, id)).into_owned()
    }

    #[test]
    fn a_uuid_is_written_in_five_groups() {
        let uuid: [u8; 16] = std::array::from_fn(|position| 0x10 + position as u8);
        assert_eq!(uuid_text(&uuid), "10111213-1415-1617-1819-1a1b1c1d1e1f");
    }

    #[test]
    fn one_holder_is_named_with_its_mode_and_the_others_are_counted() {
        let uuid = "01010101-0101-0101-0101-010101010101";
        let [a, b, c] = [domain(b"a", 1), domain(b"b", 2), domain(b"c", 3)];
        let named = format!(": by domain 'a' (uuid {uuid}, pid 7)");
        let alone = held_by(std::slice::from_ref(&a));
        assert_eq!(alone, format!("{named}, shared"));
        assert_eq!(held_by(&[c, b, a]), format!("{named} and 2 more, shared"));
    }

    #[test]
    fn a_holder_of_whom_only_the_process_is_known_is_not_given_a_name() {
        assert_eq!(
            held_by(&[Owner::unknown(7)]),
            ": by a domain of process 7, shared"
        );
    }

    #[test]
    fn a_long_name_is_cut_between_two_characters() {
        let text = held_by(&[domain("\u{e9}".repeat(30_000).as_bytes(), 1)]);
        assert!(text.contains(&format!("'{}...'", "\u{e9}".repeat(128))));
        let text = held_by(&[domain(format!("x{}", "\u{20ac}".repeat(200)).as_bytes(), 1)]);
        assert!(text.contains(&format!("'x{}...'", "\u{20ac}".repeat(85))));
        let whole = "y".repeat(LONGEST_NAME);
        assert!(held_by(&[domain(whole.as_bytes(), 1)]).contains(&format!("'{whole}'")));
        // No character at all: it is cut all the same.
        assert!(held_by(&[domain(&[0x80; 300], 1)]).contains("...'"));
    }
}
