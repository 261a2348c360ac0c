//! libFuzzer's way into [`bodies::error_object`], which says what is checked.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bodies::error_object::run(data));
