//! POSIX locks end with the process that has them, whoever has their files open: those that came from libvirt's
//! daemon. Whoever goes on takes them again.

use crate::custody::descriptor::Saved;
use crate::custody::state::State;
use crate::host::errno;
use crate::host::patience::patiently;
use crate::locks::lease::{self, LockKind};
use crate::log::Printable;

/// After a successor that died, or a stop, the POSIX locks were another process's: this process has the files,
/// and has to have the locks. Asked for a second time they stay as they are.
pub fn lock_again(state: &State<Saved>) {
    for (_, resource) in state.table().iter() {
        if !matches!(resource.lease.kind, LockKind::Process { .. }) {
            continue;
        }
        let number = resource.lease.descriptor.0;
        // The last of the dead may not be over yet.
        let again = patiently(|| lease::lock_again(number, resource.mode));
        if let Err(reason) = again {
            tracing::error!(
                "The lock on '{}' was lost with a process of the daemon that died: {}. Its owner and another \
                 process may both write the file: stop one of them",
                Printable(resource.name()),
                errno::text(reason)
            );
        }
    }
}
