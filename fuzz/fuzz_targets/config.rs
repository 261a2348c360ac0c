//! libFuzzer's way into [`bodies::config`], which says what is checked.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bodies::config::run(data));
