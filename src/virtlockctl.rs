//! The other program, `virtlockctl`: it asks the daemon, the kernel and libvirt's configuration who has which
//! disk. What lies between its words and its exit code is told in [`virtlockd::ctl`].
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    virtlockd::ctl::run(std::env::args_os().skip(1).collect())
}
