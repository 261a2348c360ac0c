//! What the C library makes of texts.

use std::ffi::CString;

/// Whether a text matches a pattern, as fnmatch(3) takes it. Nothing with a zero byte does.
pub fn matches(pattern: &str, text: &str) -> bool {
    let (Ok(pattern), Ok(text)) = (CString::new(pattern), CString::new(text)) else {
        return false;
    };
    // SAFETY: both are strings that end with a zero byte and live through the call.
    unsafe { libc::fnmatch(pattern.as_ptr(), text.as_ptr(), 0) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_fnmatch_does() {
        for (pattern, category, expected) in [
            ("*locking*", "locking.lock_daemon", true),
            ("*lock_d*", "locking.lock_daemon", true),
            ("*rpc*", "locking.lock_daemon", false),
            ("*x*[a-c]*", "rpc.xy.b", true),
            ("*n?t*", "rpc.netserver", true),
            ("*[*", "a[b", true),
            ("*+*", "a", false),
        ] {
            assert_eq!(matches(pattern, category), expected, "{pattern} {category}");
        }
    }
}
