//! What a host boots from: the kernel of a distribution, and a file system in memory that has this test
//! program, the daemon under test, libvirt's where it is installed, an NFS server and client, and busybox. All of
//! it comes from this machine or from the packages that `fetch` has unpacked.

use crate::support::daemon::{c_daemon, program};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Modules of the kernel that are asked for by name; those that they need are found.
const MODULES: [&str; 5] = [
    "virtio_pci",
    "virtio_console",
    "virtio_net",
    "nfsd",
    "nfsv4",
];

/// The programs of the packages, and where a host has them.
const PROGRAMS: [&str; 5] = [
    "/sbin/mount.nfs4",
    "/usr/sbin/exportfs",
    "/usr/sbin/nfsdcld",
    "/usr/sbin/rpc.mountd",
    "/usr/sbin/rpc.nfsd",
];

/// Where the daemon under test is on a host.
pub const OURS: &str = "/usr/local/sbin/virtlockd";
/// Where libvirt's is, if it is there.
pub const LIBVIRTS: &str = "/usr/sbin/virtlockd";
/// This test program.
const AGENT: &str = "/agent";

/// The first program of a host: what every Linux needs, the network, and then busybox's init, which starts the
/// agent and reaps whatever is left to it.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /run /tmp /var/lib/nfs /etc /share /srv /root
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
for module in /modules/*; do insmod "$module"; done
eval "$(tr ' ' '\n' </proc/cmdline | grep '^host_')"
hostname "$host_name"
ip link set lo up
ip address add "$host_address" dev eth0
ip link set eth0 up
exec init
"#;

const INITTAB: &str = r#"::once:/bin/sh /start
"#;

/// Starts the agent on the port that QEMU has for it.
const START: &str = r#"export PATH=/usr/sbin:/usr/bin:/sbin:/bin VIRTLOCKD_UNDER_TEST=@OURS@
export VIRTLOCKD_TEST_AGENT_PORT=/dev/$(basename /sys/class/virtio-ports/*)
exec @AGENT@ --ignored --exact --nocapture --test-threads=1 agent::the_agent_of_a_host >/dev/console 2>&1
"#;

/// Files that some of the programs want to be there.
const ETC: [(&str, &str); 8] = [
    ("passwd", "root:x:0:0:root:/root:/bin/sh\n"),
    ("group", "root:x:0:\n"),
    ("hosts", "127.0.0.1 localhost\n10.0.0.1 a\n10.0.0.2 b\n"),
    (
        "nsswitch.conf",
        "passwd: files\ngroup: files\nhosts: files\nprotocols: files\nservices: files\n",
    ),
    ("protocols", "tcp 6 TCP\nudp 17 UDP\n"),
    ("services", "nfs 2049/tcp\nsunrpc 111/tcp\n"),
    (
        "netconfig",
        "udp tpi_clts v inet udp - -\ntcp tpi_cots_ord v inet tcp - -\nlocal tpi_cots_ord - loopback - - -\n",
    ),
    (
        "exports",
        "/srv *(rw,fsid=0,no_root_squash,no_subtree_check)\n",
    ),
];

/// A kernel and an archive of files.
pub struct Image {
    pub kernel: PathBuf,
    pub files: PathBuf,
    /// Whether libvirt's own daemon is among them.
    pub has_libvirts: bool,
}

/// Where `fetch` leaves what it has unpacked.
fn packages() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("hosts/packages")
}

/// Whether there is something to make an image of.
pub fn can_be_made() -> bool {
    packages().exists()
}

impl Image {
    /// Makes it in this directory.
    pub fn make(directory: &Path) -> Image {
        let packages = packages();
        let mut archive = Archive::default();
        archive.text("/init", INIT, 0o755);
        archive.text("/etc/inittab", INITTAB, 0o644);
        let start = START.replace("@OURS@", OURS).replace("@AGENT@", AGENT);
        archive.text("/start", &start, 0o644);
        for (name, text) in ETC {
            archive.text(&format!("/etc/{name}"), text, 0o644);
        }
        let busybox = packages.join("bin/busybox");
        archive.file("/bin/busybox", &busybox, 0o755);

        let modules = newest(&packages.join("lib/modules"));
        for (number, module) in in_order(&modules).iter().enumerate() {
            let name = module.file_name().expect("a module's file").display();
            archive.file(&format!("/modules/{number:02}-{name}"), module, 0o644);
        }

        let mut libraries = BTreeSet::new();
        for program in PROGRAMS {
            let file = packages.join(&program[1..]);
            libraries.extend(libraries_of(&file));
            archive.file(program, &file, 0o755);
        }
        let strace = PathBuf::from("/usr/bin/strace");
        libraries.extend(libraries_of(&strace));
        archive.file("/usr/bin/strace", &strace, 0o755);
        let this = std::env::current_exe().expect("the path of this test program");
        for (file, inside) in [(program(), OURS), (this, AGENT)] {
            libraries.extend(libraries_of(&file));
            let stripped = directory.join("stripped");
            strip(&file, &stripped);
            archive.file(inside, &stripped, 0o755);
        }
        let libvirts = c_daemon();
        if let Some(file) = &libvirts {
            libraries.extend(libraries_of(file));
            archive.file(LIBVIRTS, file, 0o755);
        }
        for library in libraries {
            let name = library.file_name().expect("a library's file").display();
            // The loader has its path written into each program.
            let directory = match library.starts_with("/lib64") {
                true => "/lib64",
                false => "/lib",
            };
            archive.file(&format!("{directory}/{name}"), &library, 0o755);
        }

        let files = directory.join("files.cpio");
        std::fs::write(&files, archive.end()).expect("write the hosts' files");
        Image {
            kernel: newest_kernel(&packages.join("boot")),
            files,
            has_libvirts: libvirts.is_some(),
        }
    }
}

/// The one directory in it; the last by name if there are more.
fn newest(directory: &Path) -> PathBuf {
    let mut all = listed(directory);
    all.sort();
    all.pop().expect("a directory of a kernel's modules")
}

fn newest_kernel(directory: &Path) -> PathBuf {
    let mut all = listed(directory);
    all.retain(|path| path.to_string_lossy().contains("/vmlinuz-"));
    all.sort();
    all.pop().expect("a kernel")
}

fn listed(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory)
        .unwrap_or_else(|error| panic!("list {}: {error}", directory.display()));
    let paths = entries.map(|entry| entry.expect("an entry").path());
    paths.collect()
}

/// The files of [`MODULES`] and of those that they need, those before them.
fn in_order(modules: &Path) -> Vec<PathBuf> {
    let mut known = Vec::new();
    let mut folders = vec![modules.join("kernel")];
    while let Some(folder) = folders.pop() {
        for path in listed(&folder) {
            match path.is_dir() {
                true => folders.push(path),
                false => known.push(path),
            }
        }
    }
    let mut ordered = Vec::new();
    for name in MODULES {
        add_module(name, &known, &mut ordered);
    }
    ordered
}

fn add_module(name: &str, known: &[PathBuf], ordered: &mut Vec<PathBuf>) {
    let is_it = |path: &&PathBuf| {
        let file = path.file_name().expect("a file").to_string_lossy();
        // A name has one sign for both.
        file.strip_suffix(".ko").map(|it| it.replace('-', "_")) == Some(name.replace('-', "_"))
    };
    // What is built in has no file.
    let Some(path) = known.iter().find(is_it) else {
        return;
    };
    if ordered.contains(path) {
        return;
    }
    let bytes = std::fs::read(path).expect("read a module of the kernel");
    for needed in needed_by(&bytes) {
        add_module(&needed, known, ordered);
    }
    ordered.push(path.clone());
}

/// The modules that this one says it needs: a text of its section `.modinfo`.
fn needed_by(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|it| it == KEY) else {
        return Vec::new();
    };
    let text = &module[at + KEY.len()..];
    let end = text.iter().position(|byte| *byte == 0);
    let text = String::from_utf8_lossy(&text[..end.unwrap_or(text.len())]).into_owned();
    let names = text.split(',').filter(|name| !name.is_empty());
    names.map(str::to_owned).collect()
}

/// The shared libraries of a program, the loader among them, of the packages or of this machine.
fn libraries_of(program: &Path) -> Vec<PathBuf> {
    let packages = packages();
    let places = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
    let places = places.map(|it| packages.join(it).display().to_string());
    let output = Command::new("ldd")
        .arg(program)
        .env("LD_LIBRARY_PATH", places.join(":"))
        .output()
        .expect("run ldd");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && !text.contains("not found"),
        "the libraries of {} (remove {} to have tests/install fetch them again): {text}{}",
        program.display(),
        packages.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    let words = text.lines().filter_map(|line| {
        let line = line.split_once("=> ").map_or(line, |(_, path)| path);
        let path = line.split_whitespace().next()?;
        path.starts_with('/').then(|| PathBuf::from(path))
    });
    words.collect()
}

/// Copies a program without what only a debugger wants: that is most of it.
fn strip(from: &Path, to: &Path) {
    let status = Command::new("strip").arg("-o").args([to, from]).status();
    assert!(
        status.expect("run strip").success(),
        "strip {}",
        from.display()
    );
}

/// Files in the one format that a kernel unpacks at its start (cpio, "newc").
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
    count: u32,
}

impl Archive {
    fn text(&mut self, inside: &str, text: &str, mode: u32) {
        self.add(inside, libc::S_IFREG | mode, text.as_bytes());
    }

    fn file(&mut self, inside: &str, path: &Path, mode: u32) {
        let bytes = std::fs::read(path)
            .unwrap_or_else(|error| panic!("read {} for a host: {error}", path.display()));
        self.add(inside, libc::S_IFREG | mode, &bytes);
    }

    /// Adds an entry, and before it the directories that it is in.
    fn add(&mut self, inside: &str, mode: u32, data: &[u8]) {
        let directories = inside
            .match_indices('/')
            .skip(1)
            .map(|(at, _)| &inside[..at]);
        for directory in directories {
            if self.directories.insert(directory.to_owned()) {
                self.entry(directory, libc::S_IFDIR | 0o755, &[]);
            }
        }
        self.entry(inside, mode, data);
    }

    fn entry(&mut self, inside: &str, mode: u32, data: &[u8]) {
        self.count += 1;
        let name = inside.trim_start_matches('/');
        let mut header = String::from("070701");
        let numbers = [self.count, mode, 0, 0, 1, 0, data.len() as u32];
        let devices = [0; 4];
        let last = [name.len() as u32 + 1, 0];
        for number in numbers.iter().chain(&devices).chain(&last) {
            header.push_str(&format!("{number:08x}"));
        }
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        let length = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(length, 0);
    }

    fn end(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}
