//! The configuration file: any bytes give settings or a sentence of one line. A comment before them
//! changes nothing, nor does a line of spaces behind them; a setting before them counts.

use virtlockd::config::{self, Config};

pub fn run(data: &[u8]) {
    let settings = config::parse("virtlockd.conf", data);
    assert_eq!(config::parse("virtlockd.conf", data), settings);
    let between = |before: &[u8], behind: &[u8]| {
        let whole = [before, data, behind].concat();
        config::parse("virtlockd.conf", &whole).ok()
    };
    match settings {
        Ok(config) => {
            assert_eq!(between(b" # a = '\n", b"\n \t\n"), Some(config.clone()));
            let max_clients = Some(77);
            let with_ours = Config {
                max_clients,
                ..config
            };
            assert_eq!(between(b"max_clients = 77\n", b""), Some(with_ours));
        }
        Err(error) => {
            let sentence = error.to_string();
            assert!(sentence.contains("virtlockd.conf"), "{sentence:?}");
            assert!(!sentence.contains(char::is_control), "{sentence:?}");
            // As for libvirt, a file of nothing but blank lines is an error, unless a comment is
            // before them.
            if !data.trim_ascii().is_empty() {
                assert_eq!(between(b" # a = '\n", b""), None);
            }
        }
    }
}
