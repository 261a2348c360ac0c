//! Records as datagrams: to syslog in the old BSD layout, to the journal in its native protocol.
//! A datagram is sent whole or not at all, and sending never waits.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;

use super::line::{Record, cut, syslog_time};

/// The facility "daemon" of syslog(3).
const FACILITY_DAEMON: u32 = 3;

/// What speaks on the socket.
#[derive(Debug)]
enum Protocol {
    Syslog { ident: String },
    Journal,
}

/// A socket that sends to one path. The path is looked up for every datagram, so a log service
/// that restarts is found again.
#[derive(Debug)]
pub struct Datagram {
    socket: UnixDatagram,
    path: PathBuf,
    protocol: Protocol,
}

impl Datagram {
    /// To syslog's socket (`/dev/log`) under the name `ident`.
    ///
    /// # Errors
    /// Those of socket(2). That nobody listens is no error: lines are lost until somebody does.
    pub fn syslog(path: PathBuf, ident: &str) -> io::Result<Datagram> {
        let ident = ident.to_owned();
        Datagram::new(path, Protocol::Syslog { ident })
    }

    /// To the journal's socket (`/run/systemd/journal/socket`).
    ///
    /// # Errors
    /// As [`Datagram::syslog`].
    pub fn journal(path: PathBuf) -> io::Result<Datagram> {
        Datagram::new(path, Protocol::Journal)
    }

    fn new(path: PathBuf, protocol: Protocol) -> io::Result<Datagram> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Datagram {
            socket,
            path,
            protocol,
        })
    }

    /// Whether the record was taken.
    pub fn write(&self, record: &Record<'_>) -> bool {
        let bytes = match &self.protocol {
            Protocol::Syslog { ident } => syslog_datagram(record, ident).into_bytes(),
            Protocol::Journal => journal_datagram(record),
        };
        self.socket.send_to(&bytes, &self.path).is_ok()
    }
}

/// `<27>Nov 22 07:21:27 ident: body`. The time is local, as syslog(3) writes it. libvirt leaves
/// the facility out, which makes its lines look like the kernel's.
fn syslog_datagram(record: &Record<'_>, ident: &str) -> String {
    let priority = (FACILITY_DAEMON << 3) | record.level.syslog_priority();
    format!(
        "<{priority}>{} {ident}: {}",
        syslog_time(record.time),
        record.body()
    )
}

fn journal_datagram(record: &Record<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    push_field(&mut bytes, "MESSAGE", cut(record.text));
    let priority = record.level.syslog_priority().to_string();
    push_field(&mut bytes, "PRIORITY", &priority);
    let facility = FACILITY_DAEMON.to_string();
    push_field(&mut bytes, "SYSLOG_FACILITY", &facility);
    push_field(&mut bytes, "LIBVIRT_SOURCE", record.category);
    if let Some(place) = record.place {
        push_field(&mut bytes, "CODE_FILE", place.file);
        push_field(&mut bytes, "CODE_LINE", &place.line.to_string());
        push_field(&mut bytes, "CODE_FUNC", place.module);
    }
    if let Some(domain) = record.domain {
        push_field(&mut bytes, "LIBVIRT_DOMAIN", &domain.to_string());
    }
    if let Some(code) = record.code {
        push_field(&mut bytes, "LIBVIRT_CODE", &code.to_string());
    }
    bytes
}

/// A value with a line end must carry its length, or its second line would be a field of its own.
fn push_field(bytes: &mut Vec<u8>, name: &str, value: &str) {
    bytes.extend_from_slice(name.as_bytes());
    if value.contains('\n') {
        bytes.push(b'\n');
        let length = u64::try_from(value.len()).unwrap_or(u64::MAX);
        bytes.extend_from_slice(&length.to_le_bytes());
    } else {
        bytes.push(b'=');
    }
    bytes.extend_from_slice(value.as_bytes());
    bytes.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::super::level::Level;
    use super::super::line::{MAX_TEXT_BYTES, Place};
    use super::super::test_directory::TestDirectory;
    use super::*;
    use std::time::SystemTime;

    fn record(text: &str) -> Record<'_> {
        Record {
            time: SystemTime::now(),
            level: Level::Error,
            category: "rpc.server",
            place: Some(Place {
                module: "server::fence",
                file: "src/server/fence.rs",
                line: 7,
            }),
            text,
            domain: Some(7),
            code: Some(39),
        }
    }

    fn received(socket: &UnixDatagram) -> Vec<u8> {
        let mut bytes = vec![0; 1 << 20];
        let length = socket.recv(&mut bytes).expect("a datagram");
        bytes.truncate(length);
        bytes
    }

    #[test]
    fn the_journal_gets_libvirts_fields() {
        assert_eq!(
            String::from_utf8(journal_datagram(&record("no lease"))).expect("text"),
            "MESSAGE=no lease\nPRIORITY=3\nSYSLOG_FACILITY=3\nLIBVIRT_SOURCE=rpc.server\n\
             CODE_FILE=src/server/fence.rs\nCODE_LINE=7\nCODE_FUNC=server::fence\n\
             LIBVIRT_DOMAIN=7\nLIBVIRT_CODE=39\n"
        );
    }

    #[test]
    fn a_message_of_two_lines_cannot_forge_a_field_of_the_journal() {
        let bytes = journal_datagram(&record("a\nPRIORITY=0"));
        assert!(bytes.starts_with(b"MESSAGE\n\x0c\0\0\0\0\0\0\0a\nPRIORITY=0\nPRIORITY=3\n"));
    }

    #[test]
    fn syslog_gets_the_facility_daemon_and_the_ident() {
        let line = syslog_datagram(&record("no lease"), "my-id");
        let end = format!(
            " my-id: {}: error : server::fence:7 : no lease",
            std::process::id()
        );
        assert!(line.starts_with("<27>") && line.ends_with(&end), "{line}");
        assert_eq!(line.len(), "<27>Nov 22 07:21:27".len() + end.len());
    }

    #[test]
    fn the_longest_message_fits_in_a_datagram() {
        let directory = TestDirectory::new();
        let path = directory.join("journal");
        let socket = UnixDatagram::bind(&path).expect("bind");
        let journal = Datagram::journal(path).expect("socket");
        let long = "x".repeat(MAX_TEXT_BYTES * 4);
        assert!(journal.write(&record(&long)));
        assert!(received(&socket).len() > MAX_TEXT_BYTES);
    }

    #[test]
    fn a_socket_that_nobody_reads_refuses_records_without_waiting() {
        let directory = TestDirectory::new();
        let path = directory.join("journal");
        let socket = UnixDatagram::bind(&path).expect("bind");
        let journal = Datagram::journal(path).expect("socket");
        let mut taken = 0;
        while journal.write(&record("x")) {
            taken += 1;
            assert!(taken < 100_000, "the socket takes everything");
        }
        assert!(taken > 0);
        received(&socket);
        assert!(journal.write(&record("x")));
    }

    #[test]
    fn a_log_service_that_comes_back_is_found_again() {
        let directory = TestDirectory::new();
        let path = directory.join("log");
        let syslog = Datagram::syslog(path.clone(), "me").expect("socket");
        assert!(!syslog.write(&record("nobody")));
        let first = UnixDatagram::bind(&path).expect("bind");
        assert!(syslog.write(&record("first")));
        drop(first);
        assert!(!syslog.write(&record("gone")));
        std::fs::remove_file(&path).expect("remove");
        let second = UnixDatagram::bind(&path).expect("bind");
        assert!(syslog.write(&record("second")));
        assert!(received(&second).ends_with(b"second"));
    }
}
