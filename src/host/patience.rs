//! What fails may succeed a moment later: memory and descriptors come back. Tried again where nothing
//! else can be done meanwhile, above all in a program that takes over, whose end would cost all locks
//! of the host.

use std::time::Duration;

use super::errno;
use super::refusal::Refusal;

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

/// As [`patiently`], but what is refused for a reason that does not pass is not asked for again.
pub fn while_it_may_pass<T>(mut attempt: impl FnMut() -> Result<T, Refusal>) -> Result<T, Refusal> {
    patiently(|| match attempt() {
        Err(refusal) if errno::may_pass(refusal.reason) => Err(refusal),
        settled => Ok(settled),
    })
    .unwrap_or_else(Err)
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
