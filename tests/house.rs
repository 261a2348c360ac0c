//! The rules of the house: what may know what in `src/`, and who alone may do what. They are read from
//! the text of the files, tests left out, and each says its reason when it is broken.
//!
//! An import is a path to another file: in a `use` or `pub use`, or in the code itself
//! (`crate::host::errno::text`). It leads to the file of the last module that it names, so an item of a
//! room's `mod.rs` is an import of `mod.rs`, also where that passes on what another file has. That a
//! `mod.rs` declares its children is none; where it uses their items, these must not use its own.
//! A method says nothing about where it comes from: it is known by its name alone. So is what a macro
//! makes, which these rules do not see.

#[path = "house/read.rs"]
mod read;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path as FilePath;

use read::{Path, Source, is, is_word};

/// The rooms from the top, what is in each, and the rooms that it may use.
const ROOMS: [Room; 14] = [
    Room(
        "main",
        &["main.rs"],
        &["life", "words", "restart", "log", "host"],
    ),
    Room("virtlockctl", &["virtlockctl.rs"], &["ctl"]),
    Room("lib", &["lib.rs"], &[]),
    // It speaks the wire like anybody, and knows nothing of the daemon's inside.
    Room("ctl", &["ctl/"], &["words", "wire", "log", "host"]),
    Room(
        "life",
        &["life/"],
        &[
            "words", "server", "restart", "custody", "desk", "locks", "wire", "log", "host",
        ],
    ),
    Room(
        "words",
        &["cli.rs", "config.rs", "exit.rs"],
        &["log", "host"],
    ),
    Room(
        "server",
        &["server/"],
        &["restart", "custody", "desk", "locks", "wire", "log", "host"],
    ),
    Room(
        "restart",
        &["restart/"],
        &["custody", "locks", "log", "host"],
    ),
    Room("custody", &["custody/"], &["locks", "log", "host"]),
    Room("wire", &["wire/"], &["log", "host"]),
    Room("desk", &["desk/"], &["log", "host"]),
    Room("locks", &["locks/"], &["log", "host"]),
    Room("log", &["log/"], &["host"]),
    Room("host", &["host/"], &[]),
];

struct Room(
    &'static str,
    &'static [&'static str],
    &'static [&'static str],
);

/// Something that must never be.
struct Rule {
    /// The rule as one says it.
    says: &'static str,
    because: &'static str,
    /// Where it holds: files and folders of `src/`.
    inside: &'static [&'static str],
    /// But not here.
    outside: &'static [&'static str],
    never: Never,
    /// What is right all the same: the file, what it names, and why.
    except: &'static [(&'static str, &'static str, &'static str)],
}

enum Never {
    /// An import of these files.
    Import(&'static [&'static str]),
    /// The use of one of these items, by its whole path.
    Use(&'static [&'static str]),
    /// The use of anything in a module but these items of it.
    UseOf(&'static str, &'static [&'static str]),
    /// A method or function of one of these names.
    Call(&'static [&'static str]),
    /// A keyword.
    Word(&'static str),
    /// An import of all that a module has.
    Star,
    /// `&mut` of this type, unless it is of this form.
    Borrow(&'static str, &'static str),
}

const ALL: &[&str] = &[""];

const RULES: [Rule; 13] = [
    Rule {
        says: "nothing in server/ imports the reactor",
        because: "who is turned does not know the wheel: pieces answer, or leave an order, and the \
                  reactor acts",
        inside: &["server/"],
        outside: &["server/reactor.rs"],
        never: Never::Import(&["server/reactor.rs"]),
        except: &[],
    },
    Rule {
        says: "services/ imports no clients/ and no owners/",
        because: "a service sees what lasts and its call; it answers with a value",
        inside: &["server/services/"],
        outside: &[],
        never: Never::Import(&["server/clients/", "server/owners/"]),
        except: &[],
    },
    Rule {
        says: "services/ has nothing to do with sockets",
        because: "reading and writing is the turn's business: a service gets a frame and leaves bytes",
        inside: &["server/services/"],
        outside: &[],
        never: Never::Use(&["crate::host::stream"]),
        except: &[(
            "server/services/admin/clients.rs",
            "crate::host::stream::selinux_context",
            "client-info says who the kernel says the peer is; nothing is read or written",
        )],
    },
    Rule {
        says: "owners/ imports no clients/ and no services/",
        because: "owners are told of and freed; whose connection or call that concerns the reactor knows",
        inside: &["server/owners/"],
        outside: &[],
        never: Never::Import(&["server/clients/", "server/services/"]),
        except: &[],
    },
    Rule {
        says: "the guardian imports no custody/, no server/ and no locks/",
        because: "what it does not know of cannot make it crash, and all locks are free when both die",
        inside: &["life/guardian.rs", "life/understudy.rs"],
        outside: &[],
        never: Never::Import(&["custody/", "server/", "locks/"]),
        except: &[],
    },
    Rule {
        says: "custody/ imports nothing of server/, wire/, restart/ and life/",
        because: "what lasts knows no frames, no poll, and not how it is handed over",
        inside: &["custody/"],
        outside: &[],
        never: Never::Import(&["server/", "wire/", "restart/", "life/"]),
        except: &[],
    },
    Rule {
        says: "only the door, custody/mod.rs, appends to the ledger",
        because: "a change and its being written down are one step, or an upgrade loses a lock",
        inside: ALL,
        outside: &["custody/mod.rs", "custody/ledger.rs"],
        never: Never::Call(&["append"]),
        except: &[(
            "log/stream.rs",
            "append",
            "OpenOptions::append, for a log file",
        )],
    },
    Rule {
        says: "nobody outside custody/ borrows the state to change it",
        because: "what is changed past the door is in no ledger",
        inside: ALL,
        outside: &["custody/"],
        // A saved state is a copy of numbers, which holds nothing: whoever takes it over may put it in
        // order before it lives.
        never: Never::Borrow("crate::custody::state::State", "Saved"),
        except: &[],
    },
    Rule {
        says: "only the work of locks/ opens, makes, locks and removes files of resources",
        because: "file work is a value that can be run elsewhere, and a descriptor closed in the wrong \
                  place drops a POSIX lock",
        inside: ALL,
        outside: &[
            "locks/again.rs",
            "locks/lease.rs",
            "locks/job.rs",
            "locks/place.rs",
            // A process that has no lock writes who has one.
            "locks/note.rs",
            "host/file.rs",
            // A process that has no lock asks who has one.
            "ctl/look.rs",
        ],
        // To look at a file that is open changes nothing.
        never: Never::UseOf(
            "crate::host::file",
            &[
                "FileIdentity",
                "Lockable",
                "identity",
                "known_here",
                "known_identity",
                "known_kind",
                "read_now",
            ],
        ),
        except: &[
            (
                "restart/handover.rs",
                "crate::host::file::read_only",
                "the trial run is shown the ledger, which is nobody's resource",
            ),
            (
                "restart/handover.rs",
                "crate::host::file::open_nothing",
                "the trial run's standard input, /dev/null",
            ),
            (
                "server/reserve.rs",
                "crate::host::file::open_directory",
                "a descriptor for nothing, to be given up when there are no others",
            ),
            (
                "host/descriptors.rs",
                "crate::host::file::open_nothing",
                "fills the numbers 0 to 2 with /dev/null",
            ),
        ],
    },
    Rule {
        says: "only the work of locks/ lets go of a kernel's lock",
        because: "a lock is let go of where its file is dealt with, behind what the ledger says",
        inside: ALL,
        outside: &["locks/lease.rs", "locks/job.rs", "host/file.rs"],
        never: Never::Call(&["unlock", "lock_process", "leave_process_lock"]),
        except: &[],
    },
    Rule {
        says: "only host/process.rs asks for the process's own number",
        because: "the number that counts is that of the process that was started, which a child of it \
                  does not have",
        inside: ALL,
        outside: &["host/process.rs"],
        never: Never::Use(&["std::process::id", "nix::unistd::getpid", "libc::getpid"]),
        except: &[],
    },
    Rule {
        says: "unsafe is in host/ alone",
        because: "what the compiler cannot check is to be read in one place",
        inside: ALL,
        outside: &["host/"],
        never: Never::Word("unsafe"),
        except: &[],
    },
    Rule {
        says: "nothing is imported by a star",
        because: "it hides from these rules, and from readers, what is used",
        inside: ALL,
        outside: &[],
        never: Never::Star,
        except: &[],
    },
];

/// All files of `src/` by their paths in it, tests left out.
struct House {
    files: BTreeMap<String, Source>,
    /// The file of each module.
    modules: BTreeMap<Vec<String>, String>,
}

/// What a file uses: the whole path of it.
struct Used {
    path: Vec<String>,
    line: usize,
}

impl Used {
    fn text(&self) -> String {
        self.path.join("::")
    }

    /// Whether it is this, or in it.
    fn is_in(&self, other: &str) -> bool {
        let text = self.text();
        text.strip_prefix(other)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
    }
}

impl House {
    fn of(texts: &[(&str, &str)]) -> House {
        let mut files = BTreeMap::new();
        for (name, text) in texts {
            let source = read::read(text).unwrap_or_else(|reason| panic!("src/{name}, {reason}"));
            files.insert((*name).to_owned(), source);
        }
        let test_modules: BTreeSet<Vec<String>> = files
            .iter()
            .flat_map(|(name, source)| {
                let child = |module: &String| [module_of(name), vec![module.clone()]].concat();
                source.test_modules.iter().map(child).collect::<Vec<_>>()
            })
            .collect();
        files.retain(|name, _| {
            !test_modules
                .iter()
                .any(|test| module_of(name).starts_with(test))
        });
        let modules = files
            .keys()
            .map(|name| (module_of(name), name.clone()))
            .collect();
        House { files, modules }
    }

    fn on_disk() -> House {
        let root = FilePath::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut texts = Vec::new();
        let mut folders = vec![root.clone()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|ending| ending == "rs") {
                    let name = path.strip_prefix(&root).unwrap().to_str().unwrap();
                    texts.push((name.to_owned(), std::fs::read_to_string(&path).unwrap()));
                }
            }
        }
        let texts: Vec<_> = texts
            .iter()
            .map(|(name, text)| (name.as_str(), text.as_str()))
            .collect();
        House::of(&texts)
    }

    /// The whole path of what is written in a file, from `crate` or the name of another crate.
    fn whole(&self, name: &str, path: &[String]) -> Vec<String> {
        let source = &self.files[name];
        let here = module_of(name);
        let of_crate =
            |module: &[String], rest: &[String]| [&["crate".to_owned()], module, rest].concat();
        let Some((first, rest)) = path.split_first() else {
            return Vec::new();
        };
        match first.as_str() {
            "crate" => path.to_vec(),
            "virtlockd" if matches!(name, "main.rs" | "virtlockctl.rs") => of_crate(&[], rest),
            "self" => of_crate(&here, rest),
            "super" => {
                let ups = path.iter().take_while(|word| *word == "super").count();
                of_crate(&here[..here.len().saturating_sub(ups)], &path[ups..])
            }
            first if source.modules.iter().any(|module| module == first) => of_crate(&here, path),
            first => {
                let named = |import: &&Path| {
                    import.alias.as_deref() == Some(first) && import.segments[0] != first
                };
                match source.imports.iter().find(named) {
                    Some(import) => [self.whole(name, &import.segments), rest.to_vec()].concat(),
                    None => path.to_vec(),
                }
            }
        }
    }

    /// All that a file uses by a path.
    fn used(&self, name: &str) -> Vec<Used> {
        let source = &self.files[name];
        let written = source.imports.iter().chain(&source.paths);
        written
            .map(|path| Used {
                path: self.whole(name, &path.segments),
                line: path.line,
            })
            .collect()
    }

    /// The file that a path leads to.
    fn target(&self, used: &Used) -> Option<&str> {
        let (first, rest) = used.path.split_first()?;
        if first != "crate" {
            return None;
        }
        (0..=rest.len())
            .rev()
            .find_map(|length| self.modules.get(&rest[..length]))
            .map(String::as_str)
    }

    /// The other files that a file imports, each with the first line that does.
    fn imports(&self, name: &str) -> BTreeMap<&str, usize> {
        let mut imports = BTreeMap::new();
        for used in self.used(name) {
            if let Some(target) = self.target(&used).filter(|target| *target != name) {
                imports.entry(target).or_insert(used.line);
            }
        }
        imports
    }

    /// The shortest circle through each file that is in one, each circle once.
    fn circles(&self) -> Vec<String> {
        let arrows: BTreeMap<&str, BTreeMap<&str, usize>> = self
            .files
            .keys()
            .map(|name| (name.as_str(), self.imports(name)))
            .collect();
        let mut found: BTreeMap<BTreeSet<&str>, String> = BTreeMap::new();
        for start in arrows.keys().copied() {
            let mut came_from: BTreeMap<&str, &str> = BTreeMap::new();
            let mut next = VecDeque::from([start]);
            while let Some(file) = next.pop_front() {
                for target in arrows[file].keys().copied() {
                    if !came_from.contains_key(target) {
                        came_from.insert(target, file);
                        next.push_back(target);
                    }
                }
            }
            if !came_from.contains_key(start) {
                continue;
            }
            let mut way = vec![start];
            let mut at = came_from[start];
            while at != start {
                way.push(at);
                at = came_from[at];
            }
            way.push(start);
            way.reverse();
            let text: Vec<String> = way
                .windows(2)
                .map(|pair| {
                    let line = arrows[pair[0]][pair[1]];
                    format!("src/{}:{line} imports {}", pair[0], pair[1])
                })
                .collect();
            let members = way.iter().copied().collect();
            found.entry(members).or_insert_with(|| text.join(", "));
        }
        found.into_values().collect()
    }

    /// Arrows between rooms that point to where none may.
    fn wrong_arrows(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for name in self.files.keys() {
            let Some(Room(room, _, may_use)) = room_of(name) else {
                wrong.push(format!("src/{name} is in no room of this test"));
                continue;
            };
            for (target, line) in self.imports(name) {
                let Some(Room(other, ..)) = room_of(target) else {
                    continue;
                };
                if room != other && !may_use.contains(other) {
                    wrong.push(format!(
                        "src/{name}:{line} imports {target}: {room} may use only {may_use:?}, because \
                         a room knows nothing of those above and beside it"
                    ));
                }
            }
        }
        wrong
    }

    /// What breaks these rules, and exceptions that nobody needs.
    fn broken(&self, rules: &[Rule]) -> Vec<String> {
        let mut broken = Vec::new();
        for rule in rules {
            let mut needed = BTreeSet::new();
            for name in self.files.keys() {
                let is_under = |places: &[&str]| places.iter().any(|place| name.starts_with(place));
                if !is_under(rule.inside) || is_under(rule.outside) {
                    continue;
                }
                for (what, line) in self.found(name, &rule.never) {
                    let excused = rule
                        .except
                        .iter()
                        .position(|(file, item, _)| file == name && *item == what);
                    match excused {
                        Some(index) => {
                            needed.insert(index);
                        }
                        None => broken.push(format!(
                            "src/{name}:{line} has `{what}`, but {}, because {}",
                            rule.says, rule.because
                        )),
                    }
                }
            }
            for (index, (file, item, why)) in rule.except.iter().enumerate() {
                if !needed.contains(&index) {
                    broken.push(format!(
                        "src/{file} has no `{item}` any more ({why}): take the exception away from \
                         the rule that {}",
                        rule.says
                    ));
                }
            }
        }
        broken
    }

    /// What a rule is about, in a file, with its lines.
    fn found(&self, name: &str, never: &Never) -> Vec<(String, usize)> {
        let source = &self.files[name];
        let tokens = &source.tokens;
        let used = self.used(name);
        let items = |is_meant: &dyn Fn(&Used) -> bool| -> Vec<(String, usize)> {
            let meant = used.iter().filter(|used| is_meant(used));
            meant.map(|used| (used.text(), used.line)).collect()
        };
        match never {
            Never::Import(places) => {
                let is_place = |target: &str| places.iter().any(|place| target.starts_with(place));
                let imports = self.imports(name).into_iter();
                imports
                    .filter(|(target, _)| is_place(target))
                    .map(|(target, line)| (target.to_owned(), line))
                    .collect()
            }
            Never::Use(paths) => items(&|used| paths.iter().any(|path| used.is_in(path))),
            Never::UseOf(module, allowed) => {
                let depth = module.split("::").count();
                items(&|used| {
                    used.is_in(module)
                        && used
                            .path
                            .get(depth)
                            .is_some_and(|item| !allowed.contains(&item.as_str()))
                })
            }
            Never::Call(names) => (1..tokens.len())
                .filter(|at| is(tokens, at - 1, ".") || is(tokens, at - 1, "::"))
                .filter(|at| names.contains(&tokens[*at].text.as_str()))
                .map(|at| (tokens[at].text.clone(), tokens[at].line))
                .collect(),
            Never::Star => {
                let imports = source.imports.iter();
                imports
                    .filter(|import| import.segments.last().is_some_and(|last| last == "*"))
                    .map(|import| (import.segments.join("::"), import.line))
                    .collect()
            }
            Never::Word(word) => tokens
                .iter()
                .filter(|token| token.text == *word)
                .map(|token| (token.text.clone(), token.line))
                .collect(),
            Never::Borrow(of, form) => self.borrows(name, of, form),
        }
    }

    /// `&mut Type`, `&'a mut crate::x::Type<D>`.
    fn borrows(&self, name: &str, of: &str, form: &str) -> Vec<(String, usize)> {
        let tokens = &self.files[name].tokens;
        let mut found = Vec::new();
        for (start, token) in tokens
            .iter()
            .enumerate()
            .filter(|(_, token)| token.text == "&")
        {
            let has_lifetime = tokens
                .get(start + 1)
                .is_some_and(|next| next.text.starts_with('\''));
            let at = start + 1 + usize::from(has_lifetime);
            let is_type = tokens.get(at + 1).is_some_and(|next| is_word(&next.text));
            if !is(tokens, at, "mut") || !is_type {
                continue;
            }
            let (segments, behind) = read::path(tokens, at + 1);
            if self.whole(name, &segments).join("::") != of {
                continue;
            }
            let is_of_form = is(tokens, behind, "<")
                && is(tokens, behind + 1, form)
                && is(tokens, behind + 2, ">");
            if !is_of_form {
                found.push((format!("&mut {}", segments.join("::")), token.line));
            }
        }
        found
    }
}

/// The module of a file, below the crate.
fn module_of(name: &str) -> Vec<String> {
    let name = name.strip_suffix(".rs").unwrap_or(name);
    let name = name.strip_suffix("/mod").unwrap_or(name);
    match name {
        "lib" => Vec::new(),
        name => name.split('/').map(str::to_owned).collect(),
    }
}

fn room_of(name: &str) -> Option<&'static Room> {
    let is_in = |Room(_, places, _): &&Room| places.iter().any(|place| name.starts_with(place));
    ROOMS.iter().find(is_in)
}

#[track_caller]
fn assert_none(broken: &[String], what: &str) {
    assert!(broken.is_empty(), "{what}:\n\n{}\n", broken.join("\n\n"));
}

#[test]
fn no_file_imports_one_that_imports_it_directly_or_through_others() {
    let circles = House::on_disk().circles();
    assert_none(
        &circles,
        "Of files in a circle none can be read, tested or changed alone. What both sides need belongs \
         in a file below them",
    );
}

#[test]
fn arrows_between_rooms_point_downwards() {
    assert_none(&House::on_disk().wrong_arrows(), "Rooms know too much");
}

#[test]
fn what_must_never_be_is_not() {
    assert_none(
        &House::on_disk().broken(&RULES),
        "Rules of the house are broken",
    );
}

/// The files that a map of indented lines names: a folder stands for its `mod.rs`.
fn named_in(map: &str) -> BTreeSet<String> {
    let mut folders: Vec<&str> = Vec::new();
    let mut named = BTreeSet::new();
    for line in map.lines() {
        let text = line.trim_start();
        let depth = (line.len() - text.len()) / 2;
        let (name, says) = text.split_once(' ').unwrap_or((text, ""));
        assert!(!says.trim().is_empty(), "the map says nothing of {name}");
        assert!(depth <= folders.len(), "the map has {name} in no folder");
        folders.truncate(depth);
        if name.ends_with('/') {
            folders.push(name);
            named.insert(format!("{}mod.rs", folders.concat()));
        } else {
            named.insert(format!("{}{name}", folders.concat()));
        }
    }
    named
}

#[test]
fn the_map_in_lib_rs_names_each_file_and_no_other() {
    let path = FilePath::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs");
    let text = std::fs::read_to_string(path).unwrap();
    let map: String = text
        .lines()
        .skip_while(|line| *line != "//! ```text")
        .skip(1)
        .take_while(|line| *line != "//! ```")
        .map(|line| format!("{}\n", line.strip_prefix("//! ").unwrap_or_default()))
        .collect();
    let named = named_in(&map);
    let files: BTreeSet<String> = House::on_disk().files.into_keys().collect();
    let missing: Vec<_> = files.difference(&named).cloned().collect();
    let gone: Vec<_> = named.difference(&files).cloned().collect();
    assert_none(&missing, "The map at the head of src/lib.rs lacks");
    assert_none(
        &gone,
        "The map at the head of src/lib.rs has what is not there",
    );
}

// The reader and the judge themselves, on small texts.

fn house(texts: &[(&str, &str)]) -> House {
    House::of(texts)
}

fn uses(house: &House, name: &str) -> Vec<String> {
    house.used(name).iter().map(Used::text).collect()
}

fn imports(house: &House, name: &str) -> Vec<String> {
    house.imports(name).into_keys().map(str::to_owned).collect()
}

#[test]
fn imports_are_read_in_all_their_forms() {
    let text = "use a::b;\npub use a::{c, d::{self, e as f}};\npub(crate) use super::{\n    g::h,\n    \
                i::*,\n};\nuse ::j::k as _;";
    let source = read::read(text).unwrap();
    let read: Vec<_> = source
        .imports
        .iter()
        .map(|path| {
            let alias = path.alias.as_deref().unwrap_or_default();
            (path.segments.join("::"), alias.to_owned(), path.line)
        })
        .collect();
    let expected = [
        ("a::b", "b", 1),
        ("a::c", "c", 2),
        ("a::d", "d", 2),
        ("a::d::e", "f", 2),
        ("super::g::h", "h", 4),
        ("super::i::*", "*", 5),
        ("j::k", "_", 7),
    ];
    let expected: Vec<_> = expected
        .map(|(path, alias, line)| (path.to_owned(), alias.to_owned(), line))
        .into();
    assert_eq!(read, expected);
    assert!(source.paths.is_empty());
}

#[test]
fn comments_strings_and_characters_are_no_code() {
    let text = r##"
        // use a::b;
        /* use a::b; /* unsafe */ crate::c::d */
        //! [`crate::c`]
        const X: &str = "use a::b; \" crate::c::d";
        const Y: &str = r#"use a::b; " crate::c::d"#;
        const Z: (u8, char, char) = (b'"', '"', '\'');
        fn f<'a>(x: &'a str) -> &'a str { crate::after::all(x) }
    "##;
    let source = read::read(text).unwrap();
    assert!(source.imports.is_empty());
    let paths: Vec<_> = source
        .paths
        .iter()
        .map(|path| path.segments.join("::"))
        .collect();
    assert_eq!(paths, ["crate::after::all"]);
    assert_eq!(source.paths[0].line, 8);
}

#[test]
fn what_is_for_tests_alone_is_left_out() {
    let text = "#[cfg(test)]\nmod helper;\n#[cfg(test)]\nuse a::{b, c};\nfn f() {}\n#[cfg(test)]\n\
                #[allow(unused)]\nmod tests {\n    use d::e;\n    fn g() { unsafe { h::i() } }\n}\nuse j::k;";
    let source = read::read(text).unwrap();
    assert_eq!(source.test_modules, ["helper"]);
    assert!(source.modules.is_empty() && source.paths.is_empty());
    assert_eq!(source.imports.len(), 1);
    assert_eq!(source.imports[0].line, 12);
    let house = house(&[
        ("lib.rs", "mod a;\n#[cfg(test)]\nmod helper;"),
        ("a.rs", ""),
        ("helper.rs", "use crate::a::A;"),
    ]);
    assert!(!house.files.contains_key("helper.rs"));
}

#[test]
fn a_module_inside_a_file_is_refused() {
    assert!(read::read("mod inner { use super::x; }").is_err());
}

#[test]
fn a_path_leads_to_the_file_of_its_last_module() {
    let house = house(&[
        ("lib.rs", "pub mod x; pub mod z;"),
        ("main.rs", "use virtlockd::x::{self, y};"),
        (
            "x/mod.rs",
            "pub mod y; pub use y::Y; pub(in crate::z) struct X;",
        ),
        (
            "x/y.rs",
            "use super::super::z; use crate::z::Z as Other;\nfn f(_: Other::A) -> std::io::Error { z::g(); \
             self::h::<u8>(); Vec::<z::Z>::new() }",
        ),
        ("z.rs", "fn g(x: &mut crate::x::X) {}"),
    ]);
    assert_eq!(
        uses(&house, "x/y.rs"),
        [
            "crate::z",
            "crate::z::Z",
            "crate::z::Z::A",
            "std::io::Error",
            "crate::z::g",
            "crate::x::y::h",
            "crate::z::Z"
        ]
    );
    assert_eq!(imports(&house, "main.rs"), ["x/mod.rs", "x/y.rs"]);
    assert_eq!(imports(&house, "x/mod.rs"), ["x/y.rs"]);
    assert_eq!(imports(&house, "x/y.rs"), ["z.rs"]);
    assert_eq!(imports(&house, "z.rs"), ["x/mod.rs"]);
    // x/mod.rs -> x/y.rs -> z.rs -> x/mod.rs
    assert_eq!(house.circles().len(), 1);
}

#[test]
fn a_room_that_only_declares_its_children_is_in_no_circle_with_them() {
    let declared = house(&[
        ("lib.rs", "pub mod x;"),
        ("x/mod.rs", "pub mod y; pub mod w; pub struct X;"),
        ("x/y.rs", "use super::X; use super::w;"),
        ("x/w.rs", ""),
    ]);
    assert!(declared.circles().is_empty());
    let used = house(&[
        ("lib.rs", "pub mod x;"),
        ("x/mod.rs", "pub mod y; pub struct X(y::Y);"),
        ("x/y.rs", "use super::X; pub struct Y;"),
    ]);
    assert_eq!(
        used.circles(),
        ["src/x/mod.rs:1 imports x/y.rs, src/x/y.rs:1 imports x/mod.rs"]
    );
}

#[test]
fn a_rule_is_broken_under_any_name_and_kept_by_its_exceptions() {
    let rule = |never, except| {
        [Rule {
            says: "s",
            because: "b",
            inside: ALL,
            outside: &["host/"],
            never,
            except,
        }]
    };
    let broken = |text: &str, never| {
        let texts = [
            ("lib.rs", "pub mod a; pub mod host;"),
            ("a.rs", text),
            ("host/mod.rs", ""),
        ];
        house(&texts).broken(&rule(never, &[])).len()
    };
    let id = || Never::Use(&["std::process::id"]);
    assert_eq!(broken("fn f() { std::process::id(); }", id()), 1);
    assert_eq!(
        broken("use std::process as p; fn f() { p::id(); }", id()),
        1
    );
    assert_eq!(
        broken("use std::process::{Command, id as number};", id()),
        1
    );
    assert_eq!(
        broken("use crate::host::process; fn f() { process::id(); }", id()),
        0
    );
    let file = || Never::UseOf("crate::host", &["look"]);
    assert_eq!(
        broken(
            "use crate::host; fn f() { host::look(); g(host::open); }",
            file()
        ),
        1
    );
    let append = || Never::Call(&["append"]);
    assert_eq!(
        broken(
            "fn f(l: L) { l.append(1); L::append(l, 1); let append = 1; }",
            append()
        ),
        2
    );
    let state = || Never::Borrow("crate::host::State", "Saved");
    let with = |signature: &str| format!("use crate::host::State; fn f({signature}) {{}}");
    assert_eq!(broken(&with("s: &mut State<Open>"), state()), 1);
    assert_eq!(broken(&with("s: &'a mut State"), state()), 1);
    assert_eq!(broken(&with("s: &mut crate::host::State<D>"), state()), 1);
    assert_eq!(
        broken(&with("s: &mut State<Saved>, t: &State<Open>"), state()),
        0
    );
    assert_eq!(broken("use x::State; fn f(s: &mut State) {}", state()), 0);
    assert_eq!(broken("use x::*;", Never::Star), 1);
    assert_eq!(
        broken(
            "#![forbid(unsafe_code)] fn f() { unsafe {} }",
            Never::Word("unsafe")
        ),
        1
    );

    let texts = [
        ("lib.rs", "pub mod a;"),
        ("a.rs", "fn f() { std::process::id(); }"),
    ];
    let excused = rule(id(), &[("a.rs", "std::process::id", "w")]);
    assert!(house(&texts).broken(&excused).is_empty());
    let needless = rule(
        id(),
        &[
            ("a.rs", "std::process::id", "w"),
            ("gone.rs", "std::process::id", "w"),
        ],
    );
    assert_eq!(house(&texts).broken(&needless).len(), 1);
}
