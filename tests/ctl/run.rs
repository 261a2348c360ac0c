//! One run of the program, and what came of it.

use crate::schema;
use crate::support::namespace::Namespace;
use serde_json::Value;
use std::ffi::OsStr;
use std::process::{Child, Command, Stdio};

pub fn program() -> &'static str {
    env!("CARGO_BIN_EXE_virtlockctl")
}

#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    #[track_caller]
    pub fn expect(self, code: i32) -> String {
        assert_eq!(self.code, code, "{self:?}");
        self.stdout
    }

    /// The JSON that it printed, which is as the schema says.
    #[track_caller]
    pub fn json(self, code: i32) -> Value {
        let text = self.expect(code);
        schema::check(&text)
    }
}

pub fn of(command: &mut Command) -> Ran {
    let output = command.stdin(Stdio::null()).output().expect("run it");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("it prints text");
    Ran {
        code: output.status.code().expect("it ends by itself"),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    }
}

/// Runs it in a namespace.
pub fn ctl<S: AsRef<OsStr>>(namespace: &Namespace, words: &[S]) -> Ran {
    of(namespace.command(program()).args(words))
}

/// A run that goes on, killed when dropped.
pub struct Running(pub Child);

impl Running {
    pub fn start(namespace: &Namespace, words: &[&str]) -> Running {
        let child = namespace
            .command(program())
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        Running(child.expect("start it"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
