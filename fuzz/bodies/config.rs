//! The configuration file: any bytes give settings or a sentence of one line.

use virtlockd::config;

pub fn run(data: &[u8]) {
    match config::parse("virtlockd.conf", data) {
        Ok(config) => assert_eq!(config::parse("virtlockd.conf", data), Ok(config)),
        Err(error) => {
            let sentence = error.to_string();
            assert!(sentence.contains("virtlockd.conf"), "{sentence:?}");
            assert!(!sentence.contains('\0'));
        }
    }
}
