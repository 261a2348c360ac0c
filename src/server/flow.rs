//! Whether a connection goes on after a frame.

/// So many bytes of replies are sent before more are made: a client that reads nothing can make the
/// daemon hold this many bytes, those of one turn, which are as many at most, and one reply.
pub const ENOUGH_OUTPUT: usize = 64 * 1024;

/// What is to happen after a frame was worked on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// The next frame.
    Continue,
    /// Nothing more for now: the frames that follow wait.
    Pause,
    /// Not even this one, which has not been answered: it is worked on once more when what was ordered
    /// has been done.
    Again,
    /// The same, until something is done that others do.
    Wait,
    /// The end of the connection, once what was appended to the output has been sent.
    Close,
}

/// Whether to go on with the next frame at once.
pub fn flow(out: &[u8]) -> Flow {
    if out.len() >= ENOUGH_OUTPUT {
        Flow::Pause
    } else {
        Flow::Continue
    }
}
