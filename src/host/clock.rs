//! The monotonic clock, as a number that keeps its meaning in the next image of the process; and the
//! calendar.

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

/// The time of day, milliseconds since the epoch: for people, not for deadlines. No system call.
#[inline]
pub fn wall_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| {
        let whole = since.as_secs().saturating_mul(1000);
        whole.saturating_add(u64::from(since.subsec_millis()))
    })
}

/// A time as RFC 3339 has it; `None` of 0, which means that nobody knows.
pub fn rfc3339(ms: u64) -> Option<String> {
    let seconds = i64::try_from(ms / 1000).ok().filter(|_| ms > 0)?;
    let date = utc(seconds);
    Some(format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z",
        date.tm_year.saturating_add(1900),
        date.tm_mon.saturating_add(1),
        date.tm_mday,
        date.tm_hour,
        date.tm_min,
        date.tm_sec,
        ms % 1000
    ))
}

/// The calendar date of a second since 1970, at Greenwich; the epoch's if the C library cannot tell.
pub fn utc(seconds: i64) -> libc::tm {
    broken_down(seconds, libc::gmtime_r)
}

/// As [`utc`], in the zone of the host.
pub fn local(seconds: i64) -> libc::tm {
    broken_down(seconds, libc::localtime_r)
}

type Convert = unsafe extern "C" fn(*const i64, *mut libc::tm) -> *mut libc::tm;

fn broken_down(seconds: i64, convert: Convert) -> libc::tm {
    // SAFETY: tm is plain data for which all zeros is a valid value (a null tm_zone included).
    let mut date: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are valid for the call, and the callers pass gmtime_r or localtime_r.
    if unsafe { convert(&seconds, &mut date) }.is_null() {
        date.tm_year = 70;
        date.tm_mday = 1;
    }
    date
}
