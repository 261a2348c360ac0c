//! libFuzzer's way into [`bodies::libvirt_json`], which says what is checked.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bodies::libvirt_json::run(data));
