//! libFuzzer's way into [`bodies::admin_call`], which says what is checked.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bodies::admin_call::run(data));
