//! The error object: the bytes of a reply are those that the protocol says, whatever the text; a
//! client reads what was said; no part of it can be missing; and no bytes at all make the reading of
//! one fail otherwise than with an error.
//!
//! Input: a byte for the code, one for the domain, one for the shape, four for an errno, then the
//! text. The same bytes are also read as an error object.

use virtlockd::wire::error::{self, Code, Domain, Error, Received, Shape};
use virtlockd::wire::frame::{Header, Kind, STATUS_OK};

use super::reference::{self, ErrorObject};

const CODES: [(Code, i32, &str); 10] = [
    (Code::InternalError, 1, "internal error"),
    (Code::InvalidArgument, 8, "invalid argument"),
    (Code::OperationDenied, 29, "operation forbidden"),
    (Code::SystemError, 38, ""),
    (Code::Rpc, 39, ""),
    (
        Code::OperationInvalid,
        55,
        "Requested operation is not valid",
    ),
    (Code::ArgumentUnsupported, 74, "argument unsupported"),
    (Code::ResourceBusy, 87, "resource busy"),
    (Code::NoServer, 95, "Server not found"),
    (Code::NoClient, 96, "Client not found"),
];
const DOMAINS: [(Domain, i32); 4] = [
    (Domain::None, 0),
    (Domain::Rpc, 7),
    (Domain::Lockspace, 51),
    (Domain::Admin, 62),
];

const CALL: Header = Header {
    program: 1,
    version: 2,
    procedure: 3,
    kind: Kind::Call,
    serial: 4,
    status: STATUS_OK,
};

pub fn run(data: &[u8]) {
    // Any bytes are an error object or none.
    if let Ok(received) = error::decode(data) {
        let texts = [received.message, received.str1, received.str2];
        assert!(texts.into_iter().flatten().all(|text| !text.contains(&0)));
    }
    let Some(([code, domain, shape, errno @ ..], text)) = data.split_first_chunk::<7>() else {
        return;
    };
    let errno = i32::from_le_bytes(*errno);
    let (code, code_number, prefix) = CODES[usize::from(*code) % CODES.len()];
    let (domain, domain_number) = DOMAINS[usize::from(*domain) % DOMAINS.len()];
    let shape = match shape % 3 {
        0 => Shape::Plain,
        1 => Shape::System(errno),
        _ => Shape::Flags("function"),
    };
    let sent = Error {
        code,
        domain,
        detail: text.to_vec(),
        shape,
    };
    let mut reply = Vec::new();
    sent.encode_reply(&mut reply, CALL);

    let prefix = if shape == Shape::Plain { prefix } else { "" };
    let (message, str1) = if prefix.is_empty() {
        (text.to_vec(), "%s".to_owned())
    } else {
        let message = [prefix.as_bytes(), b": ", text].concat();
        (message, format!("{prefix}: %1$s"))
    };
    let (str1, str2, ints) = match shape {
        Shape::Plain => (str1.as_str(), text, [-1, -1]),
        Shape::System(errno) => ("%s", text, [errno, -1]),
        Shape::Flags(function) => (function, &b"flags"[..], [0, 0]),
    };
    assert_eq!(sent.message(), message);
    let expected = ErrorObject {
        code: code_number,
        domain: domain_number,
        message: &message,
        str1: str1.as_bytes(),
        str2,
        ints,
    };
    assert_eq!(
        reply,
        reference::error_reply([1, 2, 3, 0, 4, 0], &expected),
        "{sent:?}"
    );

    let payload = &reply[28..];
    let received = error::decode(payload).expect("an error object");
    compare(&expected, &received);
    let words_missing = 1 + errno.unsigned_abs() as usize % (payload.len() / 4);
    let cut = &payload[..payload.len() - 4 * words_missing];
    assert!(error::decode(cut).is_err(), "{words_missing} words missing");
}

fn compare(sent: &ErrorObject<'_>, received: &Received<'_>) {
    // Strings end at their first NUL, on both sides of the wire.
    let cut = |text: &[u8]| text.split(|byte| *byte == 0).next().unwrap().to_vec();
    let text = |text: Option<&[u8]>| text.map(<[u8]>::to_vec);
    assert_eq!(received.code, sent.code);
    assert_eq!(received.domain, sent.domain);
    assert_eq!(received.level, 2);
    assert_eq!(text(received.message), Some(cut(sent.message)));
    assert_eq!(text(received.str1), Some(cut(sent.str1)));
    assert_eq!(text(received.str2), Some(cut(sent.str2)));
    assert_eq!(received.str3, None);
    assert_eq!([received.int1, received.int2], sent.ints);
}
