//! Every call of the admin program: it decodes if and only if the protocol says so, what decodes is
//! encoded to the frame that a client would send, and that frame means the same.
//!
//! Input: a byte that chooses the procedure, then its arguments.

use virtlockd::wire::admin::{self, PROGRAM, Procedure};

use super::reference;

pub fn run(data: &[u8]) {
    let Some((choice, arguments)) = data.split_first() else {
        return;
    };
    let number = i32::from(*choice);
    let Some(procedure) = Procedure::from_number(number) else {
        assert!(number == 0 || number > 20);
        return;
    };
    let expected = reference::canonical(reference::admin_arguments(number), arguments);
    let decoded = admin::decode(procedure, arguments);
    assert_eq!(decoded.is_ok(), expected.is_some());
    let (Ok(call), Some(expected)) = (decoded, expected) else {
        return;
    };
    assert_eq!(call.procedure(), procedure);
    // Bytes are compared: a double may be no number, which is not even equal to itself.
    let words = [PROGRAM, 1, number.cast_unsigned(), 0, 7, 0];
    let frame = reference::frame(words, &expected);
    let encode = |call: admin::Call<'_>| {
        let mut encoded = Vec::new();
        call.encode(&mut encoded, 7);
        encoded
    };
    assert_eq!(encode(call), frame);
    let again = admin::decode(procedure, &expected).expect("our own encoding decodes");
    assert_eq!(encode(again), frame);
    if !expected.is_empty() {
        // Nothing of them can be missing.
        let cut = &expected[..expected.len() - 4 * (1 + arguments.len() % (expected.len() / 4))];
        assert!(admin::decode(procedure, cut).is_err());
    }
}
