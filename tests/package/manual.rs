//! The manual pages say what the program does: options, keys, exit codes and paths are held against `--help`,
//! the sources and the default configuration, so that none can be forgotten or invented; and the programs
//! that show pages have nothing to complain of.

use crate::support::daemon::program;
use crate::support::{packages, skip};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const DAEMON: &str = include_str!("../../src/dist/man/virtlockd.8");
const VIRTLOCKCTL: &str = include_str!("../../src/dist/man/virtlockctl.1");
const CONFIGURATION: &str = include_str!("../../src/dist/man/virtlockd.conf.5");
const DIFFERENCES: &str = include_str!("../../src/dist/DIFFERENCES.md");

/// What `--help` prints, if the program under test is ours.
fn help() -> Option<String> {
    let output = Command::new(program()).arg("--help").output();
    let help = text(&output.expect("run the program").stderr);
    if !help.contains("Ways to end it") {
        skip("the program under test is not ours");
        return None;
    }
    Some(help)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The items of a page that begin with this, as they go on.
fn items<'a>(page: &'a str, begin: &'a str) -> impl Iterator<Item = &'a str> {
    page.lines()
        .filter_map(move |line| line.strip_prefix(begin))
}

/// The lines of one section.
fn section(page: &str, name: &str) -> String {
    let head = format!(".Sh {name}");
    let lines = page.lines().skip_while(|line| *line != head).skip(1);
    let lines: Vec<&str> = lines.take_while(|line| !line.starts_with(".Sh ")).collect();
    assert!(!lines.is_empty(), "there is no section {name}");
    lines.join("\n")
}

#[test]
fn the_manual_has_the_options_of_help_and_no_others() {
    let Some(help) = help() else { return };
    // "  -t | --timeout <secs>  End after ..."
    let of_help: BTreeSet<String> = help
        .lines()
        .filter_map(|line| {
            let (letter, rest) = line.strip_prefix("  -")?.split_once(" | --")?;
            let mut words = rest.split_whitespace();
            let name = words.next()?;
            let value = words.next().filter(|word| word.starts_with('<'));
            let value = value.unwrap_or_default().trim_matches(['<', '>']);
            Some(format!("-{letter} --{name} {value}"))
        })
        .collect();
    // ".It Fl t , Fl -timeout Ar secs"
    let of_page: BTreeSet<String> = items(&section(DAEMON, "OPTIONS"), ".It Fl ")
        .map(|item| {
            let (letter, rest) = item.split_once(" , Fl -").expect("a short and a long name");
            let (name, value) = rest.split_once(" Ar ").unwrap_or((rest, ""));
            format!("-{letter} --{name} {value}")
        })
        .collect();
    assert_eq!(of_page, of_help);
    assert_eq!(of_page.len(), 7);
    // And the synopsis has each letter.
    let synopsis = section(DAEMON, "SYNOPSIS");
    let letters: String = synopsis
        .split_whitespace()
        .skip_while(|word| *word != ".Nm")
        .filter(|word| !word.starts_with('.') && !["Fl", "Ar", "file", "secs", "|"].contains(word))
        .collect();
    let mut letters: Vec<char> = letters.chars().collect();
    letters.sort_unstable();
    assert_eq!(letters.iter().collect::<String>(), "Vdfhptv");
}

#[test]
fn the_manual_has_the_paths_and_the_signals_of_help() {
    let Some(help) = help() else { return };
    let files: Vec<String> = items(&section(DAEMON, "FILES"), ".It Pa ")
        .map(str::to_owned)
        .collect();
    let signals = section(DAEMON, "SIGNALS");
    let words = || help.split_whitespace();
    let paths: Vec<&str> = words().filter(|it| it.starts_with('/')).collect();
    let is_root = nix::unistd::geteuid().is_root();
    assert!(!is_root || paths.len() >= 3, "{paths:?}");
    for path in paths
        .iter()
        .filter(|path| **path != program().to_str().unwrap())
    {
        assert!(files.contains(&(*path).to_owned()), "{path} is not there");
    }
    let named: BTreeSet<&str> = words().filter(|it| it.starts_with("SIG")).collect();
    assert!(named.len() >= 3);
    for signal in named {
        assert!(signals.contains(signal), "{signal} is not there");
    }
}

#[test]
fn the_manual_has_the_exit_codes_of_the_program_and_no_others() {
    let source = include_str!("../../src/exit.rs");
    let (_, codes) = source.split_once("pub enum ExitCode {").expect("the codes");
    let (codes, _) = codes.split_once('}').expect("their end");
    let of_source: BTreeSet<String> = codes
        .lines()
        .filter_map(|line| line.trim().strip_suffix(',')?.split_once(" = "))
        .map(|(_, number)| number.to_owned())
        .collect();
    let of_page: BTreeSet<String> = items(&section(DAEMON, "EXIT STATUS"), ".It ")
        .map(str::to_owned)
        .collect();
    assert_eq!(of_page, of_source);
    assert!(of_page.contains("9"));
}

#[test]
fn the_manual_has_the_keys_of_the_configuration_and_no_others() {
    // ".It Ic log_level No = Ar number"
    let of_page: BTreeSet<String> = items(CONFIGURATION, ".It Ic ")
        .map(|item| item.split(' ').next().unwrap_or_default().to_owned())
        .collect();
    // `unsigned(&mut settings, "log_level")`
    let of_source: BTreeSet<String> = include_str!("../../src/config.rs")
        .split("(&mut settings, \"")
        .skip(1)
        .filter_map(|rest| Some(rest.split_once('"')?.0.to_owned()))
        .collect();
    // "#log_level = 3"
    let of_default: BTreeSet<String> = include_str!("../../src/dist/virtlockd.conf")
        .lines()
        .filter_map(|line| Some(line.strip_prefix('#')?.split_once(" = ")?.0.to_owned()))
        .collect();
    assert_eq!(of_page, of_source);
    assert_eq!(of_default, of_source);
    assert!(of_page.contains("max_clients"));
}

#[test]
fn the_manual_has_the_sections_of_its_field_and_this_version() {
    for name in [
        "SIGNALS",
        "FILES",
        "EXIT STATUS",
        "EXAMPLES",
        "SEE ALSO",
        "ENVIRONMENT",
    ] {
        section(DAEMON, name);
    }
    for name in ["FILES", "EXAMPLES", "SEE ALSO"] {
        section(CONFIGURATION, name);
        section(VIRTLOCKCTL, name);
    }
    let version = concat!("virtlockd (virtlockd-rs) ", env!("CARGO_PKG_VERSION"));
    assert!(DAEMON.lines().any(|line| line == version), "{version}");
}

/// The help of virtlockctl, or of one of its commands.
fn help_of(command: &[&str]) -> String {
    let output = Command::new(packages::virtlockctl())
        .args(command)
        .arg("--help")
        .output();
    text(&output.expect("run virtlockctl").stdout)
}

/// The commands that its help lists.
fn commands() -> Vec<String> {
    let help = help_of(&[]);
    let (_, list) = help.split_once("Commands:\n").expect("a list of commands");
    let lines = list.lines().take_while(|line| !line.is_empty());
    let first = lines.filter_map(|line| line.split_whitespace().next());
    first.map(str::to_owned).collect()
}

/// What the page has of each command, by its name: all up to the next one.
fn commands_of_page() -> Vec<(String, String)> {
    let all = section(VIRTLOCKCTL, "COMMANDS");
    let mut found: Vec<(String, String)> = Vec::new();
    for line in all.lines() {
        if let Some(item) = line.strip_prefix(".It Ic ") {
            let name = item.split(' ').next().unwrap_or_default();
            found.push((name.to_owned(), format!("{line}\n")));
        } else if let Some((_, text)) = found.last_mut() {
            text.push_str(line);
            text.push('\n');
        }
    }
    found
}

/// The long options in a text of help.
fn long_options(help: &str) -> BTreeSet<String> {
    let words = help.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '-');
    let options = words.filter_map(|word| word.strip_prefix("--"));
    let named = options.filter(|name| !name.is_empty());
    named.map(str::to_owned).collect()
}

/// Those that a piece of a page has as items.
fn long_options_of_page(page: &str) -> BTreeSet<String> {
    let options = items(page, ".It Fl -");
    let names = options.filter_map(|item| item.split(' ').next());
    names.map(str::to_owned).collect()
}

/// The numbers behind "Exit codes:", one a line, in a help.
fn exit_codes(help: &str) -> BTreeSet<String> {
    let (_, codes) = help.split_once("\nExit codes:").expect("exit codes");
    let lines = codes.lines().skip(1).take_while(|line| !line.is_empty());
    let numbers = lines.filter_map(|line| line.split_whitespace().next());
    numbers.map(str::to_owned).collect()
}

#[test]
fn the_manual_of_virtlockctl_has_its_commands_options_and_exit_codes_and_no_others() {
    let on_page = commands_of_page();
    let names: Vec<&String> = on_page.iter().map(|(name, _)| name).collect();
    assert_eq!(names, commands().iter().collect::<Vec<_>>());
    assert!(names.len() >= 7);
    let common = long_options(&help_of(&[]));
    assert_eq!(
        long_options_of_page(&section(VIRTLOCKCTL, "OPTIONS")),
        common
    );
    for (name, text) in &on_page {
        let help = help_of(&[name]);
        let (usage, _) = help.split_once("\n\n").expect("a usage and more");
        let of_help: BTreeSet<String> = &long_options(usage) - &common;
        assert_eq!(long_options_of_page(text), of_help, "{name}");
        let codes = items(text, ".It ").filter(|item| item.parse::<u8>().is_ok());
        let codes: BTreeSet<String> = codes.map(str::to_owned).collect();
        assert_eq!(codes, exit_codes(&help), "{name}");
    }
    // And the one of all commands.
    let everywhere = section(VIRTLOCKCTL, "EXIT STATUS");
    let (_, of_all) = help_of(&[]).split_once("Exit codes:").map_or_else(
        || panic!("no exit codes"),
        |(before, codes)| (before.to_owned(), codes.to_owned()),
    );
    for code in items(&everywhere, ".It ") {
        assert!(of_all.contains(code), "{code}");
    }
    assert_eq!(items(&everywhere, ".It ").count(), 1);
}

#[test]
fn the_manual_of_virtlockctl_has_the_kinds_of_events_and_the_outermost_names_of_json() {
    let help = help_of(&["events"]);
    let (_, kinds) = help.split_once("Kinds: ").expect("the kinds");
    let (kinds, _) = kinds.split_once('.').expect("their end");
    let of_help: BTreeSet<&str> = kinds.split(',').map(str::trim).collect();
    let all = commands_of_page();
    let (_, events) = all
        .iter()
        .find(|(name, _)| name == "events")
        .expect("events");
    let line = items(events, ".Cm ").next().expect("a line of kinds");
    let of_page = line.trim_end_matches('.').split(" , ").map(str::trim);
    assert_eq!(of_page.collect::<BTreeSet<_>>(), of_help);

    let schema = include_str!("../../src/dist/virtlockctl.schema.json");
    let schema: serde_json::Value = serde_json::from_str(schema).expect("the schema is JSON");
    let mut of_schema = BTreeSet::new();
    for document in schema["anyOf"].as_array().expect("a list") {
        let name = document["$ref"].as_str().expect("a reference");
        let name = name.rsplit('/').next().unwrap_or_default();
        let properties = schema["$defs"][name]["properties"].as_object();
        let names = properties.expect("its names").keys();
        of_schema.extend(names.filter(|name| !name.ends_with("_hex")).cloned());
    }
    let of_page: BTreeSet<String> = items(&section(VIRTLOCKCTL, "JSON"), ".Va ")
        .flat_map(|line| line.split([' ', ',', ';']))
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect();
    assert_eq!(of_page, of_schema);
}

/// The pages as they are installed: three are written by hand, one is made.
fn pages() -> Vec<(PathBuf, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/dist");
    let made = Command::new(folder.join("man/differences"))
        .arg(folder.join("DIFFERENCES.md"))
        .output();
    let made = made.expect("make the page of the differences");
    assert!(made.status.success(), "{}", text(&made.stderr));
    let written = ["virtlockd.8", "virtlockctl.1", "virtlockd.conf.5"]
        .map(|name| folder.join("man").join(name));
    let mut pages = written
        .map(|path| {
            let page = std::fs::read_to_string(&path).expect("read a page");
            (path, page)
        })
        .to_vec();
    pages.push((PathBuf::from("virtlockd-differences.7"), text(&made.stdout)));
    pages
}

/// How groff shows a page.
fn shown(page: &str) -> Option<Output> {
    if !Path::new("/usr/bin/groff").exists() {
        skip("needs groff (tests/run installs it)");
        return None;
    }
    let file = crate::support::TempDir::new();
    let path = file.path().join("page");
    std::fs::write(&path, page).expect("write the page");
    let groff = ["-mdoc", "-ww", "-Tutf8", "-P-cbou", "-rLL=100n"];
    let output = Command::new("groff").args(groff).arg(path).output();
    Some(output.expect("run groff"))
}

#[test]
fn every_page_is_shown_without_a_warning() {
    for (path, page) in pages() {
        let Some(output) = shown(&page) else { return };
        assert!(output.status.success());
        assert_eq!(text(&output.stderr), "", "{}", path.display());
        assert!(output.stdout.len() > 1000, "{}", path.display());
    }
}

/// mandoc knows more of what a page should be; how long its lines are is a matter of taste.
#[test]
fn no_page_has_what_mandoc_warns_of() {
    if !Path::new("/usr/bin/mandoc").exists() {
        return skip("needs mandoc (tests/run installs it)");
    }
    let folder = crate::support::TempDir::new();
    for (path, page) in pages() {
        let path = folder
            .path()
            .join(path.file_name().expect("a page has a name"));
        std::fs::write(&path, page).expect("write the page");
        let output = Command::new("mandoc")
            .args(["-Tlint", "-Wwarning"])
            .arg(&path)
            .output();
        let output = output.expect("run mandoc");
        assert!(output.status.success(), "{}", text(&output.stdout));
    }
}

/// A text of Markdown without what its links lead to.
fn without_targets(text: &str) -> String {
    let mut pieces = text.split("](");
    let first = pieces.next().unwrap_or_default().to_owned();
    pieces.fold(first, |text, piece| {
        text + piece.split_once(')').map_or("", |(_, rest)| rest)
    })
}

#[test]
fn every_difference_has_an_entry_of_its_own() {
    let (_, page) = pages().pop().expect("the page of the differences");
    let Some(output) = shown(&page) else { return };
    // Lines are broken, words hyphenated, quotes and dashes typographic.
    let letters = |text: &str| {
        text.chars()
            .filter(char::is_ascii_alphanumeric)
            .collect::<String>()
    };
    let page = letters(&text(&output.stdout));
    let rows = DIFFERENCES.lines().filter(|line| line.starts_with("| "));
    let mut count = 0;
    for row in rows.filter(|row| !row.starts_with("| what |")) {
        let cells: Vec<&str> = row.split('|').collect();
        for cell in &cells[1..5] {
            let cell = letters(&without_targets(cell));
            assert!(page.contains(&cell), "the page lacks: {cell}");
        }
        count += 1;
    }
    assert!(count > 50, "{count} rows");
}
