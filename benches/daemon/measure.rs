//! Numbers: clock, percentiles, medians. A run yields samples, a scenario yields one number a run,
//! and the report shows the median of the runs.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// What every step of a bench returns; the error is a sentence for the person who runs it.
pub type Outcome<T> = Result<T, String>;

/// Nanoseconds of the monotonic clock. One clock for the whole host, so that times taken in
/// different processes can be compared.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("the monotonic clock always exists");
    u64::try_from(Duration::from(now).as_nanos()).expect("584 years of uptime")
}

/// The value below which `share` (0 to 1) of the samples lie. Sorts the samples.
pub fn percentile(samples: &mut [u64], share: f64) -> f64 {
    assert!(!samples.is_empty(), "a percentile of nothing");
    samples.sort_unstable();
    let last = samples.len() - 1;
    samples[(last as f64 * share).round() as usize] as f64
}

/// The median of the runs' numbers.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

/// Nanoseconds as microseconds.
pub fn microseconds(nanoseconds: f64) -> f64 {
    nanoseconds / 1e3
}

/// Nanoseconds as milliseconds.
pub fn milliseconds(nanoseconds: f64) -> f64 {
    nanoseconds / 1e6
}
