//! Two hosts and the share that both have: locks that exclude across hosts, which is what lockspaces are for.

#[path = "../support/mod.rs"]
mod support;

mod agent;
mod daemons;
mod exclusion;
mod image;
mod machine;
mod migration;
mod outages;
mod pair;

use pair::Pair;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// The hosts, which are switched on once and stay so from one story to the next. (When this program ends, whatever
/// keeps them on notices.)
static HOSTS: Mutex<Option<Pair>> = Mutex::new(None);

/// True where the daemon under test is ours. A skip and false elsewhere.
fn require_ours() -> bool {
    let is_ours = !support::daemon::program().starts_with("/usr");
    if !is_ours {
        support::skip("libvirt's daemon does not survive that");
    }
    is_ours
}

/// Tells a story that libvirt's daemon does not survive.
fn story_of_ours(tell: impl FnOnce(&Pair)) {
    if require_ours() {
        story(tell);
    }
}

/// Tells a story of the two hosts, one at a time. If it fails, the next one has others.
fn story(tell: impl FnOnce(&Pair)) {
    if !support::require_strace() {
        return;
    }
    for (what, is_there) in [
        (machine::QEMU, Path::new(machine::QEMU).exists()),
        (
            "the packages that tests/hosts/fetch fetches",
            image::can_be_made(),
        ),
    ] {
        if !is_there {
            return support::skip(&format!("needs {what} (tests/run installs it)"));
        }
    }
    let mut hosts = HOSTS.lock().unwrap_or_else(PoisonError::into_inner);
    let begun = Instant::now();
    let pair = hosts.take().unwrap_or_else(Pair::start);
    pair.forget();
    let ready = begun.elapsed();
    tell(&pair);
    let told = begun.elapsed() - ready;
    eprintln!(
        "    told in {:.1} s, prepared in {:.1} s",
        told.as_secs_f32(),
        ready.as_secs_f32()
    );
    *hosts = Some(pair);
}
