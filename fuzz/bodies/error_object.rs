//! The error object: whatever its text, a client reads what was said; and no bytes at all make the
//! reading of one fail otherwise than with an error.
//!
//! Input: a byte for the code, one for the domain, one for the shape, four for an errno, then the
//! text. The same bytes are also read as an error object.

use virtlockd::wire::error::{self, Code, Domain, Error, Received, Shape};
use virtlockd::wire::frame::{self, Header, Kind, LONGEST, STATUS_ERROR, STATUS_OK, Split};

const CODES: [Code; 10] = [
    Code::InternalError,
    Code::InvalidArgument,
    Code::OperationDenied,
    Code::SystemError,
    Code::Rpc,
    Code::OperationInvalid,
    Code::ArgumentUnsupported,
    Code::ResourceBusy,
    Code::NoServer,
    Code::NoClient,
];
const DOMAINS: [Domain; 4] = [Domain::None, Domain::Rpc, Domain::Lockspace, Domain::Admin];

const CALL: Header = Header {
    program: 1,
    version: 2,
    procedure: 3,
    kind: Kind::Call,
    serial: 4,
    status: STATUS_OK,
};

pub fn run(data: &[u8]) {
    let _ = error::decode(data);
    let Some(([code, domain, shape, errno @ ..], text)) = data.split_first_chunk::<7>() else {
        return;
    };
    let errno = i32::from_le_bytes(*errno);
    let error = Error {
        code: CODES[usize::from(*code) % CODES.len()],
        domain: DOMAINS[usize::from(*domain) % DOMAINS.len()],
        detail: text.to_vec(),
        shape: match shape % 3 {
            0 => Shape::Plain,
            1 => Shape::System(errno),
            _ => Shape::Flags("function"),
        },
    };
    let mut reply = Vec::new();
    error.encode_reply(&mut reply, CALL);
    let Split::Frame(frame) = frame::split(&reply, LONGEST) else {
        panic!("the reply is no frame");
    };
    assert_eq!(frame.length, reply.len());
    assert_eq!(frame.header, CALL.reply(STATUS_ERROR));
    let received = error::decode(frame.payload).expect("an error object");
    compare(&error, &received);
}

fn compare(sent: &Error, received: &Received<'_>) {
    // Strings end at their first NUL, on both sides of the wire.
    let cut = |text: &[u8]| text.split(|byte| *byte == 0).next().unwrap().to_vec();
    let text = |text: Option<&[u8]>| text.map(<[u8]>::to_vec);
    assert_eq!(received.code, sent.code.number());
    assert_eq!(received.domain, sent.domain.number());
    assert_eq!(received.level, 2);
    assert_eq!(text(received.message), Some(cut(&sent.message())));
    assert_eq!(received.str3, None);
    if let Shape::Flags(function) = sent.shape {
        assert_eq!(received.str1, Some(function.as_bytes()));
        assert_eq!(received.str2, Some(&b"flags"[..]));
        assert_eq!((received.int1, received.int2), (0, 0));
        return;
    }
    assert_eq!(text(received.str2), Some(cut(&sent.detail)));
    let errno = match sent.shape {
        Shape::System(errno) => errno,
        Shape::Plain | Shape::Flags(_) => -1,
    };
    assert_eq!((received.int1, received.int2), (errno, -1));
}
