//! All that this process has started, and what that has started: found in `/proc`, and signalled.
//!
//! A process whose parent ends is given to the next one above that has asked for orphans, so that nothing gets
//! lost on the way up: who has asked for them and has no children left has no descendants either. What has
//! another process start something (a service manager, say) is not the parent of that.

use std::collections::{BTreeMap, BTreeSet};

use nix::sys::signal::Signal;

use super::errno::{self, Errno};
use super::process::{self, Process};

/// From here on the orphans below this process are its children.
///
/// # Errors
/// What the host refuses.
pub fn adopt_orphans() -> Result<(), Errno> {
    Ok(nix::sys::prctl::set_child_subreaper(true)?)
}

/// Sends a signal to all descendants that there are now. What they start meanwhile may not get it.
///
/// # Errors
/// `/proc` cannot be read, or is that of another pid namespace: then nobody got it.
pub fn signal_all(signal: Signal) -> Result<(), Errno> {
    let all = all()?;
    for pid in &all {
        let Ok(process) = Process::open_any(*pid) else {
            continue;
        };
        // Asked behind the opening: should the number be another process's by now, it is not hit.
        let parent = process::parent_of(*pid);
        if parent.is_some_and(|it| it == process::own_number() || all.contains(&it)) {
            // It may have ended, or be of another user: the caller sees what is left.
            let _ = process.signal(signal);
        }
    }
    Ok(())
}

fn all() -> Result<BTreeSet<i32>, Errno> {
    let own = process::own_number();
    if !process::shares_numbers(own)? {
        return Err(Errno::ENOSYS);
    }
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").map_err(|error| errno::of(&error))? {
        let name = entry.map_err(|error| errno::of(&error))?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // It may have ended meanwhile.
        if let Some(parent) = process::parent_of(pid) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut all = BTreeSet::new();
    let mut parents = vec![own];
    while let Some(parent) = parents.pop() {
        for child in children.remove(&parent).unwrap_or_default() {
            if all.insert(child) {
                parents.push(child);
            }
        }
    }
    Ok(all)
}
