//! The files of the world as the reference knows them: names, and what stands behind each. Nothing
//! here looks at the real ones; that is what they are compared with.

use std::collections::BTreeMap;

/// The directory that holds the world, inside the daemon's namespace.
pub const ROOT: &str = "/run/w";

/// Second names of directories: a bind mount or a symbolic link, and what it leads to.
pub const BOUND: [(&str, &str); 2] = [("bind", "d"), ("ls1bind", "ls1")];
pub const LINKED: [(&str, &str); 2] = [("dsym", "d"), ("ls1sym", "ls1")];
/// Files that are mounted on another name, and which. Such a name cannot be removed.
pub const MOUNTED: [(&str, &str); 2] = [("filebind", "d/c"), ("ls1/mnt", "d/b")];

pub const DIRECTORIES: [&str; 3] = ["d", "ls1", "ls1/sub"];
pub const FILES: [&str; 5] = ["d/a", "d/b", "d/c", "ls1/x", "ls1/sub/y"];
pub const HARD_LINKS: [(&str, &str); 2] = [("d/a.hard", "d/a"), ("ls1/x.hard", "ls1/x")];
pub const SYMBOLIC_LINKS: [(&str, &str); 4] = [
    ("d/b.sym", "b"),
    ("d/dangling", "made"),
    ("ls1/x.sym", "x"),
    ("ls1/out", "../d/a"),
];

/// Names that strangers remove and make.
pub const LOOSE_NAMES: [&str; 8] = [
    "d/a",
    "d/a.hard",
    "d/b",
    "d/new",
    "d/made",
    "ls1/x",
    "ls1/x.sym",
    "ls1/new",
];

/// The default lockspace.
pub const DEFAULT: &str = "";
/// Lockspaces that calls name. Three are the same directory, one is missing at first, one is a file.
pub const LOCKSPACES: [&str; 7] = [
    DEFAULT,
    "/run/w/ls1",
    "/run/w/ls1/",
    "/run/w/ls1bind",
    "/run/w/ls1sym",
    "/run/w/ls2",
    "/run/w/d/a",
];

/// A resource as a call names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub lockspace: &'static str,
    pub name: &'static str,
}

const fn disk(name: &'static str) -> Place {
    in_lockspace(DEFAULT, name)
}

const fn in_lockspace(lockspace: &'static str, name: &'static str) -> Place {
    Place { lockspace, name }
}

/// The names under which most steps meet each other: four of each of two files.
pub const BUSY_PLACES: [Place; 8] = [
    disk("/run/w/d/a"),
    disk("/run/w/d/a.hard"),
    disk("/run/w/bind/a"),
    disk("/run/w/ls1/x"),
    in_lockspace("/run/w/ls1", "x"),
    in_lockspace("/run/w/ls1", "x.sym"),
    in_lockspace("/run/w/ls1bind", "x.hard"),
    disk("/run/w/dsym/a"),
];

pub const PLACES: [Place; 42] = [
    disk("/run/w/d/b"),
    disk("/run/w/d/b.sym"),
    disk("/run/w/bind/b"),
    disk("/run/w/ls1/mnt"),
    disk("/run/w/d/c"),
    disk("/run/w/filebind"),
    disk("/run/w/bind/a.hard"),
    disk("/run/w/dsym/b.sym"),
    disk("/run/w//d/./a"),
    disk("/run/w/d/../bind/../dsym/a"),
    disk("run/w/d/a"),
    disk("/run/w/d/new"),
    disk("/run/w/bind/new"),
    disk("/run/w/dsym/new"),
    disk("/run/w/d/dangling"),
    disk("/run/w/d/made"),
    disk("/run/w/d"),
    disk("/run/w/bind"),
    disk("/run/w/nowhere/x"),
    disk("/run/w/ls1/new"),
    disk("/run/w/ls1bind/x"),
    disk("/run/w/ls1/sub/y"),
    disk(""),
    in_lockspace("/run/w/ls1", "./x"),
    in_lockspace("/run/w/ls1", "/x"),
    in_lockspace("/run/w/ls1", "sub/../x"),
    in_lockspace("/run/w/ls1", "x.hard"),
    in_lockspace("/run/w/ls1", "new"),
    in_lockspace("/run/w/ls1", "sub/y"),
    in_lockspace("/run/w/ls1", "sub"),
    in_lockspace("/run/w/ls1", "sub/none/z"),
    in_lockspace("/run/w/ls1", ""),
    in_lockspace("/run/w/ls1", "out"),
    in_lockspace("/run/w/ls1", "../d/a"),
    in_lockspace("/run/w/ls1", "mnt"),
    in_lockspace("/run/w/ls1/", "x"),
    in_lockspace("/run/w/ls1/", "mnt"),
    in_lockspace("/run/w/ls1bind", "new"),
    in_lockspace("/run/w/ls1sym", "x"),
    in_lockspace("/run/w/ls1sym", "sub/y"),
    in_lockspace("/run/w/ls2", "new"),
    in_lockspace("/run/w/d/a", "x"),
];

/// Which file it is, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileId {
    pub device: u64,
    pub inode: u64,
}

/// What a name is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    Directory,
    File(FileId),
    Link(String),
}

/// What a call finds behind the name it gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behind {
    File(FileId),
    Directory,
    Nothing,
    /// A symbolic link to nothing.
    DanglingLink,
    NoParent,
    /// The name, or the link it names, leads out of the lockspace.
    Outside,
}

/// All names below [`ROOT`], each once: not again as a bind mount shows them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Files {
    pub nodes: BTreeMap<String, Node>,
}

impl Files {
    /// What a call finds behind a place.
    pub fn behind(&self, place: Place) -> Behind {
        if place.name.is_empty() && place.lockspace == DEFAULT {
            return Behind::NoParent;
        }
        let Some(name) = path_of(place) else {
            return Behind::Outside;
        };
        match self.nodes.get(&name) {
            Some(Node::File(file)) => Behind::File(*file),
            Some(Node::Directory) => Behind::Directory,
            Some(Node::Link(_)) => {
                let target = self.target(&name);
                if place.lockspace != DEFAULT && !is_below(&target, &plain(place.lockspace)) {
                    return Behind::Outside;
                }
                match self.nodes.get(&target) {
                    Some(Node::File(file)) => Behind::File(*file),
                    Some(other) => panic!("{target}: a link to {other:?}"),
                    None => Behind::DanglingLink,
                }
            }
            None if self.is_directory(parent(&name)) => Behind::Nothing,
            None => Behind::NoParent,
        }
    }

    /// Where a file would be made, or is: behind the symbolic link, if the name is one.
    pub fn target(&self, name: &str) -> String {
        match self.nodes.get(name) {
            Some(Node::Link(target)) => plain(&format!("{ROOT}/{}/{target}", parent(name))),
            _ => name.to_owned(),
        }
    }

    pub fn is_directory(&self, name: &str) -> bool {
        self.nodes.get(name) == Some(&Node::Directory)
    }
}

/// The name below [`ROOT`] that a place is; `None` if its text climbs out of its lockspace.
pub fn path_of(place: Place) -> Option<String> {
    if place.lockspace == DEFAULT {
        return Some(plain(place.name));
    }
    let whole = plain(&format!("{}/{}", place.lockspace, place.name));
    let directory = plain(place.lockspace);
    (whole == directory || is_below(&whole, &directory)).then_some(whole)
}

/// A path below [`ROOT`] without dots, doubled slashes, and second names of directories.
pub fn plain(path: &str) -> String {
    let mut components: Vec<&str> = Vec::new();
    for component in path.split('/') {
        match component {
            "" | "." => {}
            ".." => {
                components.pop();
            }
            // Only directly below the root there are directories with two names.
            _ if components.len() == 2 => {
                let mut aliases = BOUND.iter().chain(&LINKED);
                let alias = aliases.find(|(alias, _)| *alias == component);
                components.push(alias.map_or(component, |(_, directory)| directory));
            }
            _ => components.push(component),
        }
    }
    assert_eq!(components[..2], ["run", "w"], "{path} is in the world");
    components[2..].join("/")
}

pub fn parent(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(parent, _)| parent)
}

fn is_below(name: &str, directory: &str) -> bool {
    name.strip_prefix(directory)
        .is_some_and(|rest| rest.starts_with('/'))
}

pub fn is_mounted(name: &str) -> bool {
    MOUNTED.iter().any(|(mounted, _)| *mounted == name)
}
