//! libFuzzer's way into [`bodies::frame`], which says what is checked.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bodies::frame::run(data));
