//! One timerfd, set to the earliest deadline that anybody waits for. Where the host refuses timerfds,
//! the poll itself waits no longer than until then.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::clock::Moment;
use super::errno::Errno;
use super::refusal::Refusal;

/// The timer.
#[derive(Debug)]
pub struct Timer {
    way: Way,
    set_to: Option<Moment>,
}

#[derive(Debug)]
enum Way {
    /// The kernel tells the poll.
    Descriptor(TimerFd),
    /// The poll has to be told how long to wait, because of this.
    Poll(Refusal),
}

impl Timer {
    /// Makes the timer, unset.
    pub fn new() -> Result<Timer, Refusal> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let descriptor = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)
            .map_err(Refusal::of("a timer cannot be made (timerfd_create)"))?;
        Ok(Timer {
            way: Way::Descriptor(descriptor),
            set_to: None,
        })
    }

    /// A timer without a descriptor, because of this.
    pub fn without_descriptor(refusal: Refusal) -> Timer {
        Timer {
            way: Way::Poll(refusal),
            set_to: None,
        }
    }

    /// What the host refused, if it did.
    pub fn refusal(&self) -> Option<Refusal> {
        match self.way {
            Way::Descriptor(_) => None,
            Way::Poll(refusal) => Some(refusal),
        }
    }

    /// Sets the timer to `deadline`, or unsets it. Costs nothing if it is set so already. Where the host
    /// refuses that, which is told once, the poll has to be told from now on.
    pub fn set(&mut self, deadline: Option<Moment>) -> Result<(), Refusal> {
        if self.set_to == deadline {
            return Ok(());
        }
        self.set_to = deadline;
        if let Way::Descriptor(descriptor) = &mut self.way
            && let Err(reason) = set(descriptor, deadline)
        {
            let what = "a timer cannot be set (timerfd_settime)";
            let refusal = Refusal { what, reason };
            self.way = Way::Poll(refusal);
            return Err(refusal);
        }
        Ok(())
    }

    /// How long the poll may wait at most; `None` where the descriptor will wake it.
    pub fn longest_wait(&self) -> Option<Duration> {
        match (&self.way, self.set_to) {
            (Way::Poll(_), Some(deadline)) => {
                let left = deadline.0.saturating_sub(Moment::now().0);
                Some(Duration::from_nanos(left))
            }
            _ => None,
        }
    }

    /// Whether it went off and the poll was not told.
    pub fn went_off_unheard(&self) -> bool {
        match (&self.way, self.set_to) {
            (Way::Poll(_), Some(deadline)) => deadline <= Moment::now(),
            _ => false,
        }
    }

    /// Takes note that the timer went off.
    pub fn clear(&mut self) {
        if let Way::Descriptor(descriptor) = &self.way {
            let mut expirations = [0u8; 8];
            // It says how often the timer went off; nobody asks.
            let _ = nix::unistd::read(descriptor.as_fd(), &mut expirations);
        }
        self.set_to = None;
    }

    /// For the reactor; `None` where there is no descriptor.
    pub fn as_raw_fd(&self) -> Option<RawFd> {
        match &self.way {
            Way::Descriptor(descriptor) => Some(descriptor.as_fd().as_raw_fd()),
            Way::Poll(_) => None,
        }
    }
}

fn set(descriptor: &mut TimerFd, deadline: Option<Moment>) -> Result<(), Errno> {
    let Some(Moment(nanoseconds)) = deadline else {
        return Ok(descriptor.unset()?);
    };
    // All zero would mean "unset"; the moment of boot is long past anyway.
    let nanoseconds = nanoseconds.max(1);
    let at = TimeSpec::new(
        i64::try_from(nanoseconds / 1_000_000_000).unwrap_or(i64::MAX),
        i64::try_from(nanoseconds % 1_000_000_000).unwrap_or(0),
    );
    let flags = TimerSetTimeFlags::TFD_TIMER_ABSTIME;
    Ok(descriptor.set(Expiration::OneShot(at), flags)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_descriptor_the_poll_waits_until_the_deadline_and_no_longer() {
        let what = "a timer cannot be made (timerfd_create)";
        let reason = Errno::EACCES;
        let mut timer = Timer::without_descriptor(Refusal { what, reason });
        assert_eq!(
            (timer.longest_wait(), timer.went_off_unheard()),
            (None, false)
        );
        timer.set(Some(Moment::now().plus_ms(60_000))).unwrap();
        let wait = timer.longest_wait().unwrap();
        assert!(wait > Duration::from_secs(50) && wait <= Duration::from_secs(60));
        assert!(!timer.went_off_unheard());
        timer.set(Some(Moment::now())).unwrap();
        assert_eq!(timer.longest_wait(), Some(Duration::ZERO));
        assert!(timer.went_off_unheard());
        timer.clear();
        assert_eq!(
            (timer.longest_wait(), timer.went_off_unheard()),
            (None, false)
        );
    }
}
