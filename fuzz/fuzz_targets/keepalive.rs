//! libFuzzer's way into [`bodies::keepalive`], which says what is checked.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bodies::keepalive::run(data));
