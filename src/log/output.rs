//! One open output: it introduces itself with two lines, and counts what it could not pass on.

use std::io;
use std::path::PathBuf;
use std::time::SystemTime;

use super::datagram::Datagram;
use super::level::Level;
use super::line::Record;
use super::settings::{OutputSetting, SettingError, Target};
use super::stream::Stream;
use crate::host::errno::Errno;

/// The sockets of the host's log services.
#[derive(Clone, Debug)]
pub struct Services {
    /// Where syslog listens.
    pub syslog: PathBuf,
    /// Where the journal listens.
    pub journal: PathBuf,
}

impl Default for Services {
    fn default() -> Services {
        Services {
            syslog: PathBuf::from("/dev/log"),
            journal: PathBuf::from("/run/systemd/journal/socket"),
        }
    }
}

#[derive(Debug)]
enum Destination {
    Stream(Stream),
    Datagram(Datagram),
}

/// An output that is open.
#[derive(Debug)]
pub struct Output {
    setting: OutputSetting,
    destination: Destination,
    introduced: bool,
    /// Lines that the destination has not taken and that no line has told of yet.
    lost: u64,
}

impl Output {
    /// Opens what the setting names.
    ///
    /// # Errors
    /// [`SettingError::Open`] if the file or a socket cannot be opened.
    pub fn open(setting: OutputSetting, services: &Services) -> Result<Output, SettingError> {
        let destination = match &setting.target {
            Target::Stderr => Ok(Destination::Stream(Stream::stderr())),
            Target::File(path) => Stream::file(path).map(Destination::Stream),
            Target::Syslog(ident) => {
                Datagram::syslog(services.syslog.clone(), ident).map(Destination::Datagram)
            }
            Target::Journald => {
                Datagram::journal(services.journal.clone()).map(Destination::Datagram)
            }
        };
        let destination = destination.map_err(|error| open_error(&setting, &error))?;
        Ok(Output {
            setting,
            destination,
            introduced: false,
            lost: 0,
        })
    }

    /// What was asked for.
    pub fn setting(&self) -> &OutputSetting {
        &self.setting
    }

    /// Takes over from the output of the same target that this one replaces: what it still had to
    /// tell, and the rest of a line that its reader has seen only the beginning of.
    pub fn succeed(&mut self, old: &mut [Output]) {
        let same = old
            .iter_mut()
            .find(|output| output.setting.target == self.setting.target);
        if let Some(output) = same {
            self.lost = output.lost;
            if let (Destination::Stream(new), Destination::Stream(old)) =
                (&mut self.destination, &mut output.destination)
            {
                new.finish_line_of(old);
            }
        }
    }

    /// Descriptor 2 has become another file.
    pub fn reopen_stderr(&mut self) {
        if self.setting.target == Target::Stderr {
            self.destination = Destination::Stream(Stream::stderr());
        }
    }

    /// Passes the record on if it is grave enough. A record that is not taken is counted, and the
    /// next one that is taken comes after a line that tells the count.
    pub fn write(&mut self, record: &Record<'_>) {
        if record.level < self.setting.level {
            return;
        }
        if !(self.introduce(record.time) && self.tell_losses(record.time) && self.send(record)) {
            self.lost = self.lost.saturating_add(1);
        }
    }

    /// Two lines about the program and the host, whatever the level, so that a log says where it
    /// comes from.
    fn introduce(&mut self, time: SystemTime) -> bool {
        if !self.introduced {
            let host = nix::unistd::gethostname().unwrap_or_default();
            let version = format!("virtlockd-rs version: {}", env!("CARGO_PKG_VERSION"));
            let hostname = format!("hostname: {}", host.to_string_lossy());
            self.introduced = self.send(&own_record(time, Level::Info, &version))
                && self.send(&own_record(time, Level::Info, &hostname));
        }
        self.introduced
    }

    fn tell_losses(&mut self, time: SystemTime) -> bool {
        if self.lost > 0 {
            let text = format!(
                "{} log lines were lost: the output did not take them",
                self.lost
            );
            if !self.send(&own_record(time, Level::Warning, &text)) {
                return false;
            }
            self.lost = 0;
        }
        true
    }

    fn send(&mut self, record: &Record<'_>) -> bool {
        match &mut self.destination {
            Destination::Stream(stream) => stream.write_line(record.line().as_bytes()),
            Destination::Datagram(datagram) => datagram.write(record),
        }
    }
}

fn own_record(time: SystemTime, level: Level, text: &str) -> Record<'_> {
    Record {
        time,
        level,
        category: "util.log",
        place: None,
        text,
        domain: None,
        code: None,
    }
}

fn open_error(setting: &OutputSetting, error: &io::Error) -> SettingError {
    let what = match &setting.target {
        Target::File(path) => path.display().to_string(),
        _ => format!("the socket of log output '{setting}'"),
    };
    // A path with a zero byte is refused before the system is asked, hence without an errno.
    SettingError::Open(
        what,
        error.raw_os_error().map_or(Errno::EINVAL, Errno::from_raw),
    )
}

#[cfg(test)]
mod tests {
    use super::super::test_directory::TestDirectory;
    use super::*;
    use std::os::unix::net::UnixDatagram;

    fn texts(socket: &UnixDatagram) -> Vec<String> {
        socket.set_nonblocking(true).expect("flag");
        let mut texts = Vec::new();
        let mut bytes = vec![0; 4096];
        while let Ok(length) = socket.recv(&mut bytes) {
            let datagram = String::from_utf8(bytes[..length].to_vec()).expect("text");
            let message = datagram.lines().next().expect("a field");
            texts.push(message.trim_start_matches("MESSAGE=").to_owned());
        }
        texts
    }

    fn journal(directory: &TestDirectory) -> (UnixDatagram, Output) {
        let services = Services {
            journal: directory.join("journal"),
            ..Services::default()
        };
        let socket = UnixDatagram::bind(&services.journal).expect("bind");
        let setting = OutputSetting {
            level: Level::Warning,
            target: Target::Journald,
        };
        (socket, Output::open(setting, &services).expect("open"))
    }

    fn line(level: Level, text: &str) -> Record<'_> {
        own_record(SystemTime::now(), level, text)
    }

    #[test]
    fn an_output_introduces_itself_before_its_first_line_whatever_its_level() {
        let directory = TestDirectory::new();
        let (socket, mut output) = journal(&directory);
        output.write(&line(Level::Info, "too small"));
        assert!(texts(&socket).is_empty());
        output.write(&line(Level::Error, "first"));
        output.write(&line(Level::Warning, "second"));
        let texts = texts(&socket);
        assert_eq!(texts.len(), 4);
        assert_eq!(
            texts[0],
            format!("virtlockd-rs version: {}", env!("CARGO_PKG_VERSION"))
        );
        assert!(texts[1].starts_with("hostname: "));
        assert_eq!(texts[2..], ["first", "second"]);
    }

    #[test]
    fn lost_lines_are_counted_and_told_of_when_writing_works_again() {
        let directory = TestDirectory::new();
        let (socket, mut output) = journal(&directory);
        while output.lost == 0 {
            output.write(&line(Level::Error, "x"));
        }
        for _ in 1..5 {
            output.write(&line(Level::Error, "x"));
        }
        assert!(!texts(&socket).is_empty());
        output.write(&line(Level::Error, "again"));
        assert_eq!(
            texts(&socket),
            [
                "5 log lines were lost: the output did not take them",
                "again"
            ]
        );
    }

    #[test]
    fn a_file_that_cannot_be_opened_is_named_with_the_reason() {
        let setting = OutputSetting {
            level: Level::Debug,
            target: Target::File(PathBuf::from("/nonexist/x")),
        };
        let error = Output::open(setting, &Services::default()).expect_err("open");
        assert_eq!(
            error.to_string(),
            "failed to open /nonexist/x: No such file or directory"
        );
        assert_eq!(error.errno(), Some(Errno::ENOENT));
    }
}
