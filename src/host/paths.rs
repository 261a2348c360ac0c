//! Where the daemon keeps its files: libvirt's default paths, for root and for an ordinary user, and
//! the directories that must exist before anything is put there.

use std::ffi::OsString;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, SFlag, stat, umask};
use nix::unistd::{Uid, User};

use super::errno::{self, Errno};

/// The default paths of one user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// The configuration file.
    pub config_file: PathBuf,
    /// The directory of the sockets.
    pub run_directory: PathBuf,
    /// Where lock clients connect.
    pub lock_socket: PathBuf,
    /// Where admin clients connect.
    pub admin_socket: PathBuf,
    /// The pid file, unless the command line names another one.
    pub pid_file: PathBuf,
    /// The state document of the C daemon's restart.
    pub restart_state: PathBuf,
    /// The log file of a daemon in the background on a host without a journal.
    pub log_file: PathBuf,
}

impl Paths {
    /// The paths of this process: root's when its effective uid is 0, otherwise the user's, which
    /// follow the XDG variables.
    pub fn of_this_process() -> Self {
        if Uid::effective().is_root() {
            Self::of_root()
        } else {
            Self::of_user(|name| std::env::var_os(name), home_of_this_user)
        }
    }

    /// The paths of the system's daemon, whoever asks.
    pub fn of_system() -> Self {
        Self::of_root()
    }

    /// The paths of a daemon of this user's session, also of root's.
    pub fn of_session() -> Self {
        Self::of_user(|name| std::env::var_os(name), home_of_this_user)
    }

    fn of_root() -> Self {
        Self {
            config_file: "/etc/libvirt/virtlockd.conf".into(),
            run_directory: "/run/libvirt".into(),
            lock_socket: "/run/libvirt/virtlockd-sock".into(),
            admin_socket: "/run/libvirt/virtlockd-admin-sock".into(),
            pid_file: "/run/virtlockd.pid".into(),
            restart_state: "/run/virtlockd-restart-exec.json".into(),
            log_file: "/var/log/libvirt/virtlockd.log".into(),
        }
    }

    /// An empty XDG variable counts as unset, as the XDG base directory specification says; a set
    /// but empty HOME leads to paths relative to the working directory, as in the C daemon.
    fn of_user(
        variable: impl Fn(&str) -> Option<OsString>,
        home_of_user: impl Fn() -> PathBuf,
    ) -> Self {
        let home = variable("HOME").map_or_else(home_of_user, PathBuf::from);
        let directory = |name: &str| {
            variable(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let config = directory("XDG_CONFIG_HOME").unwrap_or_else(|| home.join(".config"));
        let cache = directory("XDG_CACHE_HOME").unwrap_or_else(|| home.join(".cache"));
        let run_directory = directory("XDG_RUNTIME_DIR")
            .unwrap_or_else(|| cache.clone())
            .join("libvirt");
        Self {
            config_file: config.join("libvirt/virtlockd.conf"),
            lock_socket: run_directory.join("virtlockd-sock"),
            admin_socket: run_directory.join("virtlockd-admin-sock"),
            pid_file: run_directory.join("virtlockd.pid"),
            restart_state: run_directory.join("virtlockd-restart-exec.json"),
            log_file: cache.join("libvirt/virtlockd.log"),
            run_directory,
        }
    }
}

/// The home directory in the user database, for a process without HOME.
fn home_of_this_user() -> PathBuf {
    match User::from_uid(Uid::current()) {
        Ok(Some(user)) => user.dir,
        _ => PathBuf::from("/"),
    }
}

/// Makes the run directory, with its parents: root's is open to be looked into (0755), a user's is
/// not (0700). One that exists is taken as it is.
pub fn make_run_directory(directory: &Path) -> Result<(), Errno> {
    if Uid::effective().is_root() {
        make_directory(directory, 0o755)
    } else {
        make_private_directory(directory)
    }
}

/// Makes a directory that nobody else may look into (0700), with its parents.
pub fn make_private_directory(directory: &Path) -> Result<(), Errno> {
    make_directory(directory, 0o700)
}

fn make_directory(directory: &Path, mode: u32) -> Result<(), Errno> {
    // Asked for in the plainest way: a policy may refuse those that are newer.
    if is_directory(directory) {
        return Ok(());
    }
    // The mode shall be this one whatever umask the daemon was started with.
    let before = umask(Mode::from_bits_truncate(0o777 & !mode));
    let made = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(directory);
    umask(before);
    made.map_err(|error| match errno::of(&error) {
        // There is something of that name, but no directory: a file, or a link to nowhere.
        Errno::EEXIST => Errno::ENOTDIR,
        other => other,
    })
}

/// Whether there is a directory with this path.
pub fn is_directory(path: &Path) -> bool {
    stat(path).is_ok_and(|found| {
        SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_user(variables: &[(&str, &str)]) -> Paths {
        Paths::of_user(
            |name| {
                let found = variables.iter().find(|(variable, _)| *variable == name);
                found.map(|(_, value)| OsString::from(value))
            },
            || PathBuf::from("/home/database"),
        )
    }

    #[test]
    fn a_user_has_paths_below_the_xdg_directories() {
        let paths = of_user(&[
            ("HOME", "/h"),
            ("XDG_CONFIG_HOME", "/c"),
            ("XDG_RUNTIME_DIR", "/r"),
            ("XDG_CACHE_HOME", "/k"),
        ]);
        assert_eq!(
            paths,
            Paths {
                config_file: "/c/libvirt/virtlockd.conf".into(),
                run_directory: "/r/libvirt".into(),
                lock_socket: "/r/libvirt/virtlockd-sock".into(),
                admin_socket: "/r/libvirt/virtlockd-admin-sock".into(),
                pid_file: "/r/libvirt/virtlockd.pid".into(),
                restart_state: "/r/libvirt/virtlockd-restart-exec.json".into(),
                log_file: "/k/libvirt/virtlockd.log".into(),
            }
        );
    }

    #[test]
    fn unset_and_empty_xdg_variables_fall_back_to_the_home_directory() {
        for variables in [
            [("HOME", "/h")].as_slice(),
            &[
                ("HOME", "/h"),
                ("XDG_CONFIG_HOME", ""),
                ("XDG_RUNTIME_DIR", ""),
                ("XDG_CACHE_HOME", ""),
            ],
        ] {
            let paths = of_user(variables);
            assert_eq!(
                paths.config_file,
                Path::new("/h/.config/libvirt/virtlockd.conf")
            );
            assert_eq!(
                paths.lock_socket,
                Path::new("/h/.cache/libvirt/virtlockd-sock")
            );
            assert_eq!(paths.log_file, Path::new("/h/.cache/libvirt/virtlockd.log"));
        }
        assert_eq!(
            of_user(&[("XDG_CACHE_HOME", "/k")]).run_directory,
            Path::new("/k/libvirt")
        );
    }

    #[test]
    fn without_home_the_user_database_says_where() {
        assert_eq!(
            of_user(&[]).run_directory,
            Path::new("/home/database/.cache/libvirt")
        );
    }
}
