//! libFuzzer's way into [`bodies::connection`], which says what is checked.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bodies::connection::run(data));
