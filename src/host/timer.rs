//! One timerfd, set to the earliest deadline that anybody waits for.

use std::os::fd::{AsFd, AsRawFd, RawFd};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::clock::Moment;
use super::errno::Errno;

/// The timer.
#[derive(Debug)]
pub struct Timer {
    descriptor: TimerFd,
    set_to: Option<Moment>,
}

impl Timer {
    /// Makes the timer, unset.
    pub fn new() -> Result<Timer, Errno> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let descriptor = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        Ok(Timer {
            descriptor,
            set_to: None,
        })
    }

    /// Sets the timer to `deadline`, or unsets it. Costs nothing if it is set so already.
    pub fn set(&mut self, deadline: Option<Moment>) -> Result<(), Errno> {
        if self.set_to == deadline {
            return Ok(());
        }
        match deadline {
            None => self.descriptor.unset()?,
            Some(Moment(nanoseconds)) => {
                // All zero would mean "unset"; the moment of boot is long past anyway.
                let nanoseconds = nanoseconds.max(1);
                let at = TimeSpec::new(
                    i64::try_from(nanoseconds / 1_000_000_000).unwrap_or(i64::MAX),
                    i64::try_from(nanoseconds % 1_000_000_000).unwrap_or(0),
                );
                self.descriptor.set(
                    Expiration::OneShot(at),
                    TimerSetTimeFlags::TFD_TIMER_ABSTIME,
                )?;
            }
        }
        self.set_to = deadline;
        Ok(())
    }

    /// Takes note that the timer went off.
    pub fn clear(&mut self) {
        let mut expirations = [0u8; 8];
        // It says how often the timer went off; nobody asks.
        let _ = nix::unistd::read(self.descriptor.as_fd(), &mut expirations);
        self.set_to = None;
    }

    /// For the reactor.
    pub fn as_raw_fd(&self) -> RawFd {
        self.descriptor.as_fd().as_raw_fd()
    }
}
