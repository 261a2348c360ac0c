//! The description of a guest: as little machine as libvirt allows, and its disks.
//!
//! A guest has no operating system, and its firmware ([`firmware`]) halts the processor at once, so
//! that a small machine can run many. Its disks are raw files, which nothing ever writes.

use std::fmt::Write;
use std::path::{Path, PathBuf};

/// How a guest uses a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    Exclusive,
    /// `<shareable/>`: several guests at once.
    Shareable,
}

/// What QEMU is told that a disk's file contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Raw,
    /// As the files are raw, QEMU refuses such a disk after libvirt has taken its lock.
    Qcow2,
}

/// A guest to be.
#[derive(Clone, Debug)]
pub struct Guest {
    pub name: String,
    disks: Vec<(PathBuf, Use)>,
    lease: Option<(PathBuf, String)>,
}

impl Guest {
    pub fn new(name: &str) -> Guest {
        Guest {
            name: name.to_owned(),
            disks: Vec::new(),
            lease: None,
        }
    }

    /// With this disk for itself alone.
    pub fn disk(mut self, path: &Path) -> Guest {
        self.disks.push((path.to_owned(), Use::Exclusive));
        self
    }

    /// With this disk, which others may use as well.
    pub fn shareable(mut self, path: &Path) -> Guest {
        self.disks.push((path.to_owned(), Use::Shareable));
        self
    }

    /// With a `<lease>` of this key. libvirt takes `directory` and the lockspace's name together
    /// as the lockspace's path.
    pub fn lease(mut self, lockspace: &Path, key: &str) -> Guest {
        self.lease = Some((lockspace.to_owned(), key.to_owned()));
        self
    }

    /// The domain, for the virtualization `kind` ("kvm" or "qemu"), with this emulator and a file
    /// that holds [`firmware`].
    pub fn xml(&self, kind: &str, emulator: &Path, firmware: &Path) -> String {
        let mut devices = format!("<emulator>{}</emulator>", text(emulator));
        for (index, (path, how)) in self.disks.iter().enumerate() {
            let letter = char::from(b'a' + u8::try_from(index).expect("few disks"));
            devices += &disk_xml(path, *how, Format::Raw, "virtio", &format!("vd{letter}"));
        }
        if let Some((lockspace, key)) = &self.lease {
            let directory = lockspace.parent().expect("a lockspace is in a directory");
            let name = lockspace.file_name().expect("a lockspace has a name");
            write!(
                devices,
                "<lease><lockspace>{}</lockspace><key>{key}</key><target path='{}'/></lease>",
                text(Path::new(name)),
                text(directory)
            )
            .expect("write to a string");
        }
        // Disks on this controller come and go without help from the guest.
        devices += "<controller type='scsi' model='virtio-scsi'/>";
        devices += "<controller type='usb' model='none'/><memballoon model='none'/>";
        devices += "<video><model type='none'/></video>";
        format!(
            "<domain type='{kind}'><name>{}</name><memory unit='MiB'>64</memory>\
             <os><type arch='x86_64' machine='pc'>hvm</type>\
             <loader readonly='yes' type='rom'>{}</loader></os>\
             <devices>{devices}</devices></domain>",
            self.name,
            text(firmware)
        )
    }
}

/// A firmware that does nothing. The processor begins 16 bytes before the end of it.
pub fn firmware() -> Vec<u8> {
    const START: &[u8] = &[
        0xfa, // cli: no interrupt shall wake it
        0xf4, // hlt
        0xeb, 0xfd, // jmp to the hlt
    ];
    let mut rom = vec![0; 64 << 10];
    let at = rom.len() - 16;
    rom[at..at + START.len()].copy_from_slice(START);
    rom
}

/// A disk that can be plugged into a running guest, as `sda` on its SCSI controller.
pub fn plugged_disk_xml(path: &Path, format: Format) -> String {
    disk_xml(path, Use::Exclusive, format, "scsi", "sda")
}

fn disk_xml(path: &Path, how: Use, format: Format, bus: &str, target: &str) -> String {
    let format = match format {
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
    };
    let shareable = match how {
        Use::Exclusive => "",
        Use::Shareable => "<shareable/>",
    };
    format!(
        "<disk type='file' device='disk'><driver name='qemu' type='{format}'/>\
         <source file='{}'/><target dev='{target}' bus='{bus}'/>{shareable}</disk>",
        text(path)
    )
}

/// A path as XML text. Tests make these paths, so no character needs an escape.
fn text(path: &Path) -> &str {
    let text = path.to_str().expect("a path in UTF-8");
    assert!(
        !text.contains(['<', '>', '&', '\'', '"']),
        "{text} needs an escape in XML"
    );
    text
}
