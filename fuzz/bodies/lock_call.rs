//! Every call of the lock program: it decodes if and only if the protocol says so, what decodes is
//! encoded to the frame that a client would send, and that frame means the same.
//!
//! Input: a byte that chooses the procedure, then its arguments.

use virtlockd::wire::lock::{self, PROGRAM, Procedure};

use super::reference;

pub fn run(data: &[u8]) {
    let Some((choice, arguments)) = data.split_first() else {
        return;
    };
    let procedure = Procedure::ALL[usize::from(*choice) % Procedure::ALL.len()];
    let number = procedure as i32;
    assert_eq!(Procedure::from_number(number), Some(procedure));
    let expected = reference::canonical(reference::lock_arguments(number), arguments);
    let decoded = lock::decode(procedure, arguments);
    assert_eq!(decoded.is_ok(), expected.is_some());
    let (Ok(call), Some(expected)) = (decoded, expected) else {
        return;
    };
    assert_eq!(call.procedure(), procedure);
    let mut encoded = Vec::new();
    call.encode(&mut encoded, 7);
    let words = [PROGRAM, 1, number.cast_unsigned(), 0, 7, 0];
    assert_eq!(encoded, reference::frame(words, &expected), "{call:?}");
    assert_eq!(lock::decode(procedure, &expected), Ok(call));
    // Nothing of them can be missing.
    let cut = &expected[..expected.len() - 4 * (1 + arguments.len() % (expected.len() / 4))];
    assert!(lock::decode(procedure, cut).is_err());
}
