//! Every call of the lock program: what decodes is encoded to a frame that means the same.
//!
//! Input: a byte that chooses the procedure, then its arguments.

use virtlockd::wire::frame::{self, Split};
use virtlockd::wire::lock::{self, LONGEST_FRAME, Procedure};

pub fn run(data: &[u8]) {
    let Some((choice, arguments)) = data.split_first() else {
        return;
    };
    let procedure = Procedure::ALL[usize::from(*choice) % Procedure::ALL.len()];
    assert_eq!(Procedure::from_number(procedure as i32), Some(procedure));
    let Ok(call) = lock::decode(procedure, arguments) else {
        return;
    };
    assert_eq!(call.procedure(), procedure);
    let mut encoded = Vec::new();
    call.encode(&mut encoded, 7);
    let Split::Frame(frame) = frame::split(&encoded, LONGEST_FRAME) else {
        panic!("{call:?} makes no frame");
    };
    assert_eq!(frame.length, encoded.len());
    assert_eq!(
        (frame.header.procedure, frame.header.serial),
        (procedure as i32, 7)
    );
    assert_eq!(lock::decode(procedure, frame.payload), Ok(call));
}
