//! What a daemon says that it holds, gathered page by page into rows of our own.

use std::collections::BTreeMap;

use super::ask::{Link, Trouble};
use crate::wire::lock::Target;
use crate::wire::status::{self, Call, Cursor, Daemon, Key, STRING_LIMIT};
use crate::wire::xdr::{DecodeError, Decoder};

/// How often a list is begun anew that a replaced daemon does not go on with.
const ATTEMPTS: usize = 5;

/// An owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// What tells it from every other.
    pub key: Key,
    /// The domain's id.
    pub id: u32,
    /// The domain's name.
    pub name: Vec<u8>,
    /// When it registered, or else was granted the first of what it holds; 0 if nobody knows.
    pub since: u64,
    /// How many resources it holds.
    pub held: u32,
    /// How it stands, in bits.
    pub standing: u32,
}

/// A resource that is held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// The lockspace's directory; empty for the default one.
    pub lockspace: Vec<u8>,
    /// The name there.
    pub name: Vec<u8>,
    /// Device and inode of the file.
    pub file: (u64, u64),
    /// Whether others may hold it, too.
    pub is_shared: bool,
    /// Since when; 0 if nobody knows.
    pub since: u64,
    /// Who holds it, how often.
    pub holders: Vec<(Owner, u32)>,
}

impl Resource {
    /// The path of its file.
    pub fn path(&self) -> Vec<u8> {
        if self.lockspace.is_empty() {
            self.name.clone()
        } else {
            [&*self.lockspace, b"/", &*self.name].concat()
        }
    }
}

/// What the daemon is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// Its version.
    pub version: Vec<u8>,
    /// The process that was started.
    pub pid: i32,
    /// What time it is there.
    pub now: u64,
    /// Since when the process that serves does.
    pub serves_since: u64,
    /// Resources that are held.
    pub resources: u64,
    /// Files of dead owners that are being freed.
    pub left: u64,
    /// Owners that are being fenced.
    pub fenced: u32,
    /// Lockspaces, the default one not among them.
    pub lockspaces: u32,
    /// Clients of the lock socket.
    pub lock_clients: u32,
    /// Clients of the admin socket.
    pub admin_clients: u32,
}

/// All that is held.
#[derive(Clone, Debug)]
pub struct View {
    /// By whom.
    pub about: About,
    /// What.
    pub resources: Vec<Resource>,
    /// For whom; those with a connection of their own also if they hold nothing.
    pub owners: Vec<Owner>,
    /// The lockspaces, the default one not among them.
    pub lockspaces: Vec<Vec<u8>>,
}

impl From<status::Owner<'_>> for Owner {
    fn from(owner: status::Owner<'_>) -> Owner {
        Owner {
            key: owner.key,
            id: owner.id,
            name: owner.name.to_vec(),
            since: owner.since,
            held: owner.held,
            standing: owner.standing,
        }
    }
}

/// What the daemon is.
///
/// # Errors
/// Why it cannot be asked.
pub fn about(link: &mut Link) -> Result<About, Trouble> {
    let payload = link.call(&Call::Daemon)?;
    let daemon = Daemon::decode(&payload)?;
    Ok(About {
        version: daemon.version.to_vec(),
        pid: daemon.pid,
        now: daemon.now,
        serves_since: daemon.serves_since,
        resources: daemon.resources,
        left: daemon.left,
        fenced: daemon.fenced,
        lockspaces: daemon.lockspaces,
        lock_clients: daemon.lock_clients,
        admin_clients: daemon.admin_clients,
    })
}

/// How often what happened.
///
/// # Errors
/// Why it cannot be asked.
pub fn counters(link: &mut Link) -> Result<Vec<(Vec<u8>, u64)>, Trouble> {
    let payload = link.call(&Call::Counters)?;
    let rows = status::decode_list(&mut Decoder::new(&payload), status::Counted::decode)?;
    Ok(rows
        .into_iter()
        .map(|row| (row.name.to_vec(), row.count))
        .collect())
}

/// All of it.
///
/// # Errors
/// Why it cannot be asked.
pub fn all(link: &mut Link) -> Result<View, Trouble> {
    for _ in 0..ATTEMPTS {
        match once(link) {
            Err(Trouble::Replaced) => (),
            result => return result,
        }
    }
    Err(Trouble::Replaced)
}

fn once(link: &mut Link) -> Result<View, Trouble> {
    let about = about(link)?;
    let mut resources = pages(link, Call::Resources, resource)?;
    complete_all(link, &mut resources)?;
    let connected = pages(link, Call::Owners, |from| {
        status::Owner::decode(from).map(Owner::from)
    })?;
    let mut owners: BTreeMap<Key, Owner> = BTreeMap::new();
    for (held, owner) in resources
        .iter()
        .flat_map(|it| it.holders.iter().map(move |(owner, _)| (it, owner)))
    {
        let known = owners.entry(owner.key).or_insert_with(|| owner.clone());
        if known.since == 0 || (held.since != 0 && held.since < known.since) {
            known.since = held.since;
        }
    }
    for owner in connected {
        owners.insert(owner.key, owner);
    }
    let mut owners: Vec<Owner> = owners.into_values().collect();
    owners.sort_by(|one, other| (&one.name, one.key).cmp(&(&other.name, other.key)));
    resources.sort_by_key(Resource::path);
    Ok(View {
        about,
        resources,
        owners,
        lockspaces: lockspaces(link)?,
    })
}

fn pages<'c, T>(
    link: &mut Link,
    call: impl Fn(Cursor) -> Call<'c>,
    row: impl Fn(&mut Decoder<'_>) -> Result<T, DecodeError>,
) -> Result<Vec<T>, Trouble> {
    let mut rows = Vec::new();
    let mut next = Some(Cursor::START);
    while let Some(from) = next {
        let payload = link.call(&call(from))?;
        let decoder = &mut Decoder::new(&payload);
        rows.extend(status::decode_list(decoder, &row)?);
        next = status::decode_next(decoder)?;
    }
    Ok(rows)
}

fn resource(from: &mut Decoder<'_>) -> Result<Resource, DecodeError> {
    let row = status::Resource::decode(from)?;
    let holders = status::decode_list(from, holder)?;
    Ok(Resource {
        lockspace: row.lockspace.to_vec(),
        name: row.name.to_vec(),
        file: (row.device, row.inode),
        is_shared: row.is_shared,
        since: row.since,
        // The others are asked for.
        holders: if holders.len() == row.holders as usize {
            holders
        } else {
            Vec::new()
        },
    })
}

fn holder(from: &mut Decoder<'_>) -> Result<(Owner, u32), DecodeError> {
    let holder = status::Holder::decode(from)?;
    Ok((holder.owner.into(), holder.times))
}

/// Asks for all who hold these. What has been given back since it was listed is held by nobody, and goes.
fn complete_all(link: &mut Link, resources: &mut Vec<Resource>) -> Result<(), Trouble> {
    for resource in &mut *resources {
        complete(link, resource)?;
    }
    resources.retain(|resource| !resource.holders.is_empty());
    Ok(())
}

/// Asks for all who hold a resource, if not all of them stood with it.
fn complete(link: &mut Link, resource: &mut Resource) -> Result<(), Trouble> {
    if !resource.holders.is_empty() {
        return Ok(());
    }
    let mut after = None;
    loop {
        let target = Target {
            lockspace: &resource.lockspace,
            name: &resource.name,
        };
        let payload = link.call(&Call::Holders(target, after))?;
        let decoder = &mut Decoder::new(&payload);
        resource
            .holders
            .extend(status::decode_list(decoder, holder)?);
        after = resource.holders.last().map(|(owner, _)| owner.key);
        if decoder.u32()? == 0 {
            return Ok(());
        }
    }
}

fn lockspaces(link: &mut Link) -> Result<Vec<Vec<u8>>, Trouble> {
    let mut all: Vec<Vec<u8>> = Vec::new();
    loop {
        let after = all.last().cloned();
        let payload = link.call(&Call::Lockspaces(after.as_deref()))?;
        let decoder = &mut Decoder::new(&payload);
        let rows = status::decode_list(decoder, |from| from.string(STRING_LIMIT))?;
        all.extend(rows.into_iter().map(<[u8]>::to_vec));
        if decoder.u32()? == 0 {
            return Ok(all);
        }
    }
}

/// What is held of a file, or under a name.
///
/// # Errors
/// Why it cannot be asked.
pub fn held(link: &mut Link, call: &Call<'_>) -> Result<Vec<Resource>, Trouble> {
    let payload = link.call(call)?;
    let mut rows = status::decode_list(&mut Decoder::new(&payload), resource)?;
    complete_all(link, &mut rows)?;
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::{self, Split};
    use crate::wire::xdr::Encoder;
    use std::io::{Read, Write};

    /// Answers one call after the other with these payloads.
    fn answer(mut stream: std::os::unix::net::UnixStream, payloads: &[&dyn Fn(&mut Encoder<'_>)]) {
        for payload in payloads {
            let mut received = Vec::new();
            let header = loop {
                if let Split::Frame(found) = frame::split(&received, frame::LONGEST) {
                    break found.header;
                }
                let mut buffer = [0; 4096];
                let count = stream.read(&mut buffer).unwrap();
                received.extend_from_slice(&buffer[..count]);
            };
            let mut out = Vec::new();
            frame::encode(&mut out, header.reply(frame::STATUS_OK), payload);
            stream.write_all(&out).unwrap();
        }
    }

    #[test]
    fn a_resource_given_back_between_two_calls_is_not_held() {
        let path = std::env::temp_dir().join(format!("virtlockctl-view-{}", std::process::id()));
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let link = Link::open(&path);
        std::fs::remove_file(&path).unwrap();
        let (stream, _) = listener.accept().unwrap();
        let daemon = std::thread::spawn(move || {
            let row = status::Resource {
                lockspace: b"",
                name: b"/disk",
                device: 1,
                inode: 2,
                is_shared: true,
                since: 0,
                holders: 9,
            };
            let rows = |out: &mut Encoder<'_>| {
                out.u32(1);
                row.encode(out, std::iter::empty());
                out.u32(0);
            };
            let nobody = |out: &mut Encoder<'_>| _ = out.u32(0).u32(0);
            answer(stream, &[&rows, &nobody]);
        });
        let (device, inode) = (1, 2);
        let held = held(&mut link.unwrap(), &Call::File { device, inode }).unwrap();
        daemon.join().unwrap();
        assert_eq!(held, []);
    }
}
