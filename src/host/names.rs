//! The names of users and groups, as the host's databases have them (getpwuid(3), getgrgid(3)).
//!
//! Asking may take as long as a directory server somewhere takes to answer, so each number is asked
//! for once. The usual ones stand in files of the host, which are asked first.

use foldhash::HashMap;
use nix::unistd::{Gid, Group, Uid, User};

/// How many names of each kind are kept. There are few users who may talk to the daemon at all;
/// the bound is for the groups that such a user can give itself.
const MOST: usize = 64;

/// The names that were asked for so far.
#[derive(Debug, Default)]
pub struct Names {
    users: HashMap<u32, Option<String>>,
    groups: HashMap<u32, Option<String>>,
}

impl Names {
    /// The name of a user; `None` if the host knows none, or could not say.
    pub fn user(&mut self, uid: u32) -> Option<&str> {
        remembered(&mut self.users, uid, || {
            let user = User::from_uid(Uid::from_raw(uid)).ok()??;
            Some(user.name)
        })
    }

    /// The name of a group; `None` if the host knows none, or could not say.
    pub fn group(&mut self, gid: u32) -> Option<&str> {
        remembered(&mut self.groups, gid, || {
            let group = Group::from_gid(Gid::from_raw(gid)).ok()??;
            Some(group.name)
        })
    }
}

fn remembered(
    names: &mut HashMap<u32, Option<String>>,
    id: u32,
    ask: impl FnOnce() -> Option<String>,
) -> Option<&str> {
    if names.len() >= MOST && !names.contains_key(&id) {
        names.clear();
    }
    names.entry(id).or_insert_with(ask).as_deref()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_root_is_root_and_a_number_of_nobody_has_none() {
        let mut names = Names::default();
        assert_eq!(names.user(0), Some("root"));
        assert_eq!(names.group(0), Some("root"));
        assert_eq!(names.group(4_000_000_001), None);
    }

    #[test]
    fn a_name_is_asked_for_once_and_only_so_many_are_kept() {
        let mut names = HashMap::default();
        assert_eq!(remembered(&mut names, 7, || None), None);
        let again = remembered(&mut names, 7, || panic!("asked again"));
        assert_eq!(again, None);
        for id in 100..1000 {
            remembered(&mut names, id, || Some("x".into()));
            assert!(names.len() <= MOST);
        }
    }
}
