//! `virtlockctl exec`: a command that has locks as a guest has them.
//!
//! The owner is a process of its own, the inner one ([`keeper`]): it has the connection, and the command is its
//! child, which gets nothing of it. The locks are given back when the command and all that it has started have
//! ended; should the connection end before, nobody knows whether they are still there, and all that is ended.

use std::io::IsTerminal;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use super::ask::{Link, Trouble};
use super::exit::{Exit, complain};
use super::keeper::{self, Part, Post};
use super::leases;
use super::look;
use super::options::{Common, Wish};
use super::text::safe;
use crate::host::{child, errno, process};
use crate::wire::lock::{AUTOCREATE, Call, SHARED, Target};
use crate::wire::status::{self, Happened, Kind};

/// A lock that is held may be free so much later without a word: a stranger's.
const STRANGERS: Duration = Duration::from_secs(2);
/// Of a guest's the daemon tells; only if it was replaced by libvirt's meanwhile it does not.
const GUESTS: Duration = Duration::from_secs(60);
/// The rest of a message comes as soon as that.
const MESSAGE: Duration = Duration::from_millis(100);
/// The words of a refusal behind which a guest is named.
const BY_GUEST: &[u8] = b"is locked: by domain '";

/// Runs the command.
pub fn run(common: &Common, wish: &Wish) -> Exit {
    let targets = match targets(wish) {
        Ok(targets) => targets,
        Err(reason) => {
            complain(&reason);
            return Exit::Unavailable;
        }
    };
    match keeper::part() {
        Ok(Part::Outer(post, inner)) => keeper::stand_by(&post, inner),
        Ok(Part::Inner(post)) => own(common, wish, &targets, &post),
        Err(reason) => {
            complain(&format!(
                "the process that is to have the locks cannot be made: {}",
                errno::text(reason)
            ));
            Exit::Unavailable
        }
    }
}

/// Takes the locks, and runs the command.
fn own(common: &Common, wish: &Wish, targets: &[Wanted], post: &Post) -> Exit {
    let mut link = match Link::open(&common.lock_socket).and_then(|link| registered(link, wish)) {
        Ok(link) => link,
        Err(trouble) => {
            complain(&trouble.to_string());
            return Exit::Unavailable;
        }
    };
    match take(common, wish, targets, &mut link, post) {
        Ok(Taken::All) => (),
        Ok(Taken::None(text)) => {
            complain(&safe(&text));
            return Exit::Held;
        }
        Ok(Taken::Ended(exit)) => return exit,
        Err(trouble) => {
            complain(&trouble.to_string());
            return Exit::Unavailable;
        }
    }
    let Some((program, words)) = wish.command.split_first() else {
        return Exit::Usage;
    };
    let mut command = Command::new(program);
    command.args(words);
    child::dies_with_parent(&mut command);
    let exit = match command.spawn() {
        Ok(started) => match i32::try_from(started.id()) {
            Ok(started) => keeper::attend(started, &link, post),
            Err(_) => Exit::NotRun,
        },
        Err(error) => {
            complain(&format!(
                "{} cannot be run: {error}",
                safe(program.as_bytes())
            ));
            Exit::NotRun
        }
    };
    give_back(targets, &mut link);
    exit
}

/// A lockspace, and a name there.
type Wanted = (Vec<u8>, Vec<u8>);

/// What is asked for: each file once, whatever it is called.
fn targets(wish: &Wish) -> Result<Vec<Wanted>, String> {
    let target = |file: &PathBuf| -> Result<Wanted, String> {
        let path = std::path::absolute(file).map_err(|error| error.to_string())?;
        Ok(match &wish.lease {
            None => (Vec::new(), path.as_os_str().as_bytes().to_vec()),
            Some(directory) => {
                let directory = std::path::absolute(directory).map_err(|it| it.to_string())?;
                let name = leases::name(&path).into_bytes();
                (directory.as_os_str().as_bytes().to_vec(), name)
            }
        })
    };
    let mut wanted: Vec<Wanted> = Vec::new();
    let mut files = Vec::new();
    for file in &wish.files {
        let target = target(file)?;
        // This process has no locks yet, and one that hangs in a look is no child of the one that will.
        let is_alone = wish.files.len() == 1 || wish.lease.is_some();
        let seen = if is_alone { None } else { look::at(file).ok() };
        // What cannot be looked at the daemon will tell of.
        let is_known = seen.is_some_and(|seen| {
            let is_known = files.contains(&seen.file);
            files.push(seen.file);
            is_known
        });
        if !is_known && !wanted.contains(&target) {
            wanted.push(target);
        }
    }
    Ok(wanted)
}

/// As an owner of its own, which no guest is.
fn registered(mut link: Link, wish: &Wish) -> Result<Link, Trouble> {
    let own = process::own_number();
    let mut uuid = [0; 16];
    // The version and the variant of a random one.
    (uuid[6], uuid[8]) = (0x40, 0x80);
    for (place, byte) in uuid.iter_mut().rev().zip(own.to_le_bytes()) {
        *place = byte;
    }
    let command = wish.command.first().map(|word| word.as_bytes());
    let name = [b"virtlockctl exec ", command.unwrap_or_default()].concat();
    link.call_lock(&Call::Register {
        uuid: &uuid,
        name: &name,
        id: 1,
        pid: own,
        flags: 0,
    })?;
    if let Some(directory) = &wish.lease {
        let path = std::path::absolute(directory).unwrap_or_else(|_| directory.clone());
        link.call_lock(&Call::CreateLockspace {
            path: path.as_os_str().as_bytes(),
        })?;
    }
    Ok(link)
}

/// What came of it.
enum Taken {
    All,
    /// The words of the refusal.
    None(Vec<u8>),
    /// It is not wanted any more, and nothing is held.
    Ended(Exit),
}

/// Takes all locks, or none.
fn take(
    common: &Common,
    wish: &Wish,
    targets: &[Wanted],
    link: &mut Link,
    post: &Post,
) -> Result<Taken, Trouble> {
    let end = Instant::now().checked_add(Duration::from_secs(wish.wait_s));
    // Before it is tried: what is freed in between must not be missed.
    let mut news = (wish.wait_s > 0).then(|| listen(common)).flatten();
    let mut has_said = false;
    loop {
        let refused = try_all(wish, targets, link)?;
        if let Some(exit) = post.end() {
            if refused.is_none() {
                give_back(targets, link);
            }
            return Ok(Taken::Ended(exit));
        }
        let Some((at, text)) = refused else {
            return Ok(Taken::All);
        };
        let rest = end.map_or(STRANGERS, |end| {
            end.saturating_duration_since(Instant::now())
        });
        if rest.is_zero() {
            return Ok(Taken::None(text));
        }
        if !has_said && std::io::stderr().is_terminal() {
            complain(&format!("waiting: {}", safe(&text)));
            has_said = true;
        }
        let is_guests = text.windows(BY_GUEST.len()).any(|it| it == BY_GUEST);
        let most = if is_guests && news.is_some() {
            GUESTS
        } else {
            STRANGERS
        };
        if let Some(exit) = wait(news.as_mut(), targets.get(at), rest.min(most), post) {
            return Ok(Taken::Ended(exit));
        }
    }
}

/// Tries to take all of them; which one is another's, and its refusal.
fn try_all(
    wish: &Wish,
    targets: &[Wanted],
    link: &mut Link,
) -> Result<Option<(usize, Vec<u8>)>, Trouble> {
    let shared = if wish.shared { SHARED } else { 0 };
    let autocreate = if wish.lease.is_some() { AUTOCREATE } else { 0 };
    for (at, (lockspace, name)) in targets.iter().enumerate() {
        let call = Call::AcquireResource {
            target: Target { lockspace, name },
            flags: shared | autocreate,
        };
        match link.call_lock(&call) {
            Ok(()) => (),
            Err(Trouble::Refused(text)) if text.starts_with(b"resource busy") => {
                give_back(targets.get(..at).unwrap_or_default(), link);
                return Ok(Some((at, text)));
            }
            Err(trouble) => return Err(trouble),
        }
    }
    Ok(None)
}

fn give_back(targets: &[Wanted], link: &mut Link) {
    for (lockspace, name) in targets {
        let target = Target { lockspace, name };
        // What is not given back is freed when this process ends.
        let _ = link.call_lock(&Call::ReleaseResource { target, flags: 0 });
    }
}

/// Who is told when something becomes free; nobody, beside libvirt's daemon.
fn listen(common: &Common) -> Option<Link> {
    let mut link = Link::open(&common.socket).ok()?;
    let kinds = Kind::Released.bit() | Kind::Died.bit();
    link.call(&status::Call::Subscribe(kinds)).ok()?;
    Some(link)
}

/// Waits until a lock may be free, or so long; or until there is to be an end.
fn wait(
    mut news: Option<&mut Link>,
    target: Option<&Wanted>,
    most: Duration,
    post: &Post,
) -> Option<Exit> {
    let end = Instant::now().checked_add(most);
    // What is there already may have been read with something else, and nothing more comes then.
    let mut patience = Duration::ZERO;
    loop {
        match news.as_deref_mut().map(|link| link.message(patience)) {
            Some(Ok(Some(payload))) if may_free(&payload, target) => return None,
            Some(Ok(Some(_))) => continue,
            Some(Ok(None)) | None => (),
            Some(Err(_)) => news = None,
        }
        let rest = end.map_or(most, |end| end.saturating_duration_since(Instant::now()));
        if rest.is_zero() {
            return None;
        }
        let is_some = post.wait(news.as_deref(), Some(rest));
        patience = if is_some { MESSAGE } else { Duration::ZERO };
        if let Some(exit) = post.end() {
            return Some(exit);
        }
    }
}

/// Whether a message tells of something after which this may be free.
fn may_free(payload: &[u8], target: Option<&Wanted>) -> bool {
    Happened::decode(payload).is_ok_and(|happened| {
        let is_it = target.is_some_and(|(lockspace, name)| {
            happened.lockspace == lockspace.as_slice() && happened.name == name.as_slice()
        });
        is_it || happened.kind != Kind::Released
    })
}
