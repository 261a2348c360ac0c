//! What fails may succeed a moment later: memory and descriptors come back. Tried again where nothing
//! else can be done meanwhile, above all in a program that takes over, whose end would cost all locks
//! of the host.

use std::time::Duration;

const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(50);

/// Does `attempt` until it succeeds, for about a second; then its last error. Waits meanwhile, so it
/// is nothing for a daemon that serves.
pub fn patiently<T, E>(mut attempt: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    for _ in 1..TRIES {
        if let Ok(value) = attempt() {
            return Ok(value);
        }
        std::thread::sleep(PAUSE);
    }
    attempt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_succeeds_a_moment_later_is_no_failure() {
        let mut count = 0;
        let third_time = || {
            count += 1;
            if count < 3 { Err("not yet") } else { Ok(count) }
        };
        assert_eq!(patiently(third_time), Ok(3));
    }
}
