//! libFuzzer's way into [`bodies::status`], which says what is checked.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bodies::status::run(data));
