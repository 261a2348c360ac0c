//! A program that is to be executed one day: its words and its environment are laid out beforehand, so that
//! nothing is allocated when the day comes.

use std::ffi::{CStr, CString};
use std::fmt::Arguments;
use std::io::Write;

use super::errno::Errno;

/// How many variables are filled in at the last moment.
pub const LATE: usize = 2;
/// The longest of them, with its name and the zero byte, bytes.
const LATE_SIZE: usize = 64;

/// Words and environment.
#[derive(Debug)]
pub struct Program {
    words: Vec<*const libc::c_char>,
    /// The plain ones, those for a successor of ours, the late ones, and room for the null behind them.
    environment: Vec<*const libc::c_char>,
    /// How many of the variables are plain.
    plain: usize,
    late: Box<[[u8; LATE_SIZE]; LATE]>,
    /// What the pointers point to.
    _texts: [Vec<CString>; 3],
}

/// Which variables a program gets.
#[derive(Debug)]
pub enum Environment<'a> {
    /// Those that everybody gets.
    Plain,
    /// Those of ours as well, and these.
    Ours([Option<Arguments<'a>>; LATE]),
}

impl Program {
    /// With these words, these variables, and these for a successor of ours alone.
    pub fn new(words: Vec<CString>, plain: Vec<CString>, ours: Vec<CString>) -> Program {
        let pointer = |text: &CString| text.as_ptr();
        let end = std::iter::once(std::ptr::null());
        let room = std::iter::repeat_n(std::ptr::null(), LATE.saturating_add(1));
        Program {
            words: words.iter().map(pointer).chain(end).collect(),
            environment: plain.iter().chain(&ours).map(pointer).chain(room).collect(),
            plain: plain.len(),
            late: Box::new([[0; LATE_SIZE]; LATE]),
            _texts: [words, plain, ours],
        }
    }

    /// Executes the program at this path. Comes back only with the reason why that could not be done.
    pub fn execute(&mut self, path: &CStr, environment: Environment<'_>) -> Errno {
        let ours = self
            .environment
            .len()
            .saturating_sub(LATE.saturating_add(1));
        let late = match environment {
            Environment::Plain => None,
            Environment::Ours(late) => Some(late),
        };
        let plain_end = self.environment.get(self.plain).copied();
        let mut end = if late.is_some() { ours } else { self.plain };
        for (variable, place) in late.into_iter().flatten().zip(self.late.iter_mut()) {
            let Some(variable) = variable else { continue };
            place.fill(0);
            // The zero byte behind it is there already.
            let room = place.split_last_mut().map(|(_, room)| room);
            let written = room.map(|mut room| room.write_fmt(variable));
            if !matches!(written, Some(Ok(()))) {
                return Errno::EINVAL;
            }
            if let Some(pointer) = self.environment.get_mut(end) {
                *pointer = place.as_ptr().cast();
            }
            end = end.saturating_add(1);
        }
        if let Some(pointer) = self.environment.get_mut(end) {
            *pointer = std::ptr::null();
        }
        // SAFETY: both lists end with a null pointer; what is in front of it points to texts that end with
        // a zero byte and live as long as `self`.
        let result = unsafe {
            libc::execve(
                path.as_ptr(),
                self.words.as_ptr(),
                self.environment.as_ptr(),
            )
        };
        let reason = Errno::result(result).err().unwrap_or(Errno::EIO);
        if let (Some(before), Some(pointer)) = (plain_end, self.environment.get_mut(self.plain)) {
            *pointer = before;
        }
        reason
    }
}
