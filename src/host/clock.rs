//! The monotonic clock, as a number that keeps its meaning in the next image of the process.

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds of CLOCK_MONOTONIC: they do not jump when somebody sets the time, and mean the same
/// before and after an exec.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub struct Moment(pub u64);

impl Moment {
    /// Now.
    pub fn now() -> Moment {
        // CLOCK_MONOTONIC cannot fail with a valid clock id; a clock that stands still would only
        // make deadlines late.
        let time =
            clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap_or(nix::sys::time::TimeSpec::new(0, 0));
        let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
        let nanoseconds = u64::try_from(time.tv_nsec()).unwrap_or(0);
        Moment(
            seconds
                .saturating_mul(1_000_000_000)
                .saturating_add(nanoseconds),
        )
    }

    /// This many milliseconds later.
    pub fn plus_ms(self, milliseconds: u64) -> Moment {
        Moment(
            self.0
                .saturating_add(milliseconds.saturating_mul(1_000_000)),
        )
    }

    /// This many microseconds later.
    pub fn plus_us(self, microseconds: u64) -> Moment {
        Moment(self.0.saturating_add(microseconds.saturating_mul(1000)))
    }

    /// Milliseconds since `earlier`, 0 if that is later.
    pub fn ms_since(self, earlier: Moment) -> u64 {
        self.0.saturating_sub(earlier.0) / 1_000_000
    }
}
