//! Those who lock the contended files without the daemon: a rival, who only tries whether a lock can
//! be had, and another host, which takes and keeps leases by the rules that all daemons follow.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::record::{Entry, Mode, Moment, OwnerId, What};
use super::{DISKS, FILES, LEASE, LOCKSPACE, Run};
use crate::support::random::Random;
use crate::support::{drop_lock, set_lock};

/// How many times the rival leaves a file alone that it got, so that others get it, too.
const MANNERS: u32 = 200;
/// All owners of the other host are one to the judge.
const OTHER_HOST: OwnerId = OwnerId::MAX;

impl Run<'_> {
    /// Tries to lock the files, until it is told to stop, and counts how often it tried.
    pub fn rob(&self, tries: &AtomicU64) -> Vec<Entry> {
        let paths: Vec<PathBuf> = (0..DISKS)
            .map(|disk| self.host.path(format!("/run/h/disks/{disk}")))
            .collect();
        let open = |path: &PathBuf| {
            let mut options = File::options();
            options.read(true).write(true).open(path)
        };
        let disks: Vec<File> = paths
            .iter()
            .map(|path| open(path).expect("open a disk"))
            .collect();
        let lease = self.lease();
        let mut entries = Vec::new();
        let mut left_alone = [0u32; FILES];
        let mut mode = Mode::Exclusive;
        while !self.stop.load(Ordering::Relaxed) {
            mode = match mode {
                Mode::Exclusive => Mode::Shared,
                Mode::Shared => Mode::Exclusive,
            };
            let _daemon = self.gate.read().expect("the gate");
            for (file, left_alone) in left_alone.iter_mut().enumerate() {
                if *left_alone > 0 {
                    *left_alone -= 1;
                    continue;
                }
                tries.fetch_add(1, Ordering::Relaxed);
                let got = match disks.get(file) {
                    Some(disk) => self.rob_file(disk, mode),
                    // It is there only while somebody has it.
                    None => open(&lease).ok().and_then(|opened| {
                        let got = self.rob_file(&opened, mode)?;
                        // Between the opening and the locking it may have been removed: then
                        // nobody else will ever ask for this file.
                        is_at(&opened, &lease).then_some(got)
                    }),
                };
                if let Some((before, after)) = got {
                    entries.push(Entry {
                        before,
                        after,
                        what: What::Robbed(file, mode),
                    });
                    *left_alone = MANNERS;
                }
            }
        }
        entries
    }

    /// Takes the lease and gives it back as the daemon of another host would: makes the file, locks
    /// it, looks whether it is still there, and removes it in the end if nobody shares it.
    pub fn be_another_host(&self, mut random: Random) -> Vec<Entry> {
        let lease = self.lease();
        let mut entries = Vec::new();
        let mut options = File::options();
        options.read(true).write(true).create(true);
        while !self.stop.load(Ordering::Relaxed) {
            let _daemon = self.gate.read().expect("the gate");
            let mode = *random.pick(&[Mode::Exclusive, Mode::Shared]);
            let before = self.now();
            let file = options.open(&lease).expect("open or make the lease");
            if set_lock(&file, mode == Mode::Exclusive) && is_at(&file, &lease) {
                entries.push(Entry {
                    before,
                    after: self.now(),
                    what: What::Granted(OTHER_HOST, LEASE, mode),
                });
                std::thread::sleep(Duration::from_micros(random.below(1500) as u64));
                let before = self.now();
                if set_lock(&file, true) && is_at(&file, &lease) {
                    std::fs::remove_file(&lease).expect("remove the lease");
                }
                drop_lock(&file);
                entries.push(Entry {
                    before,
                    after: self.now(),
                    what: What::Released(OTHER_HOST, LEASE),
                });
            }
            drop(file);
            std::thread::sleep(Duration::from_micros(random.below(1500) as u64));
        }
        entries
    }

    fn lease(&self) -> PathBuf {
        self.host.path(LOCKSPACE).join("lease")
    }

    /// Before and after it had the lock, if it had.
    fn rob_file(&self, file: &File, mode: Mode) -> Option<(Moment, Moment)> {
        let exclusive = mode == Mode::Exclusive;
        let (before, got, after) = self.timed(|| set_lock(file, exclusive));
        if got {
            drop_lock(file);
        }
        got.then_some((before, after))
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    let (Ok(opened), Ok(found)) = (file.metadata(), path.metadata()) else {
        return false;
    };
    (opened.dev(), opened.ino()) == (found.dev(), found.ino())
}
