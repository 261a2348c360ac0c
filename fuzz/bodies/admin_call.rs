//! Every call of the admin program: what decodes is encoded to a frame that means the same.
//!
//! Input: a byte that chooses the procedure, then its arguments.

use virtlockd::wire::admin::{self, Procedure};
use virtlockd::wire::frame::{self, LONGEST, Split};

pub fn run(data: &[u8]) {
    let Some((choice, arguments)) = data.split_first() else {
        return;
    };
    let Some(procedure) = Procedure::from_number(i32::from(*choice)) else {
        return;
    };
    let Ok(call) = admin::decode(procedure, arguments) else {
        return;
    };
    assert_eq!(call.procedure(), procedure);
    let mut encoded = Vec::new();
    call.encode(&mut encoded, 7);
    let Split::Frame(frame) = frame::split(&encoded, LONGEST) else {
        panic!("{call:?} makes no frame");
    };
    assert_eq!(frame.length, encoded.len());
    assert_eq!(
        (frame.header.procedure, frame.header.serial),
        (procedure as i32, 7)
    );
    let again = admin::decode(procedure, frame.payload).expect("our own encoding decodes");
    // Bytes are compared: a double may be no number, which is not even equal to itself.
    let mut encoded_again = Vec::new();
    again.encode(&mut encoded_again, 7);
    assert_eq!(encoded_again, encoded);
}
