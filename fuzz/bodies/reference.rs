//! The protocol a second time, written from its description and not from the code: frames, arguments,
//! results and error objects. The code under test must not vouch for itself. It is slow and copies
//! everything, but it is short enough to be checked by reading.

/// The six words of a header: program, version, procedure, type, serial, status.
pub type Words = [u32; 6];

/// What the front of a stream is.
pub enum Front<'a> {
    /// A frame: its header, what follows the header, the bytes of the whole.
    Frame(Words, &'a [u8], usize),
    Incomplete,
    Invalid,
}

/// The front of `stream`, where no frame is longer than `longest` bytes.
pub fn front(stream: &[u8], longest: usize) -> Front<'_> {
    let Some(length) = word(stream, 0) else {
        return Front::Incomplete;
    };
    let length = length as usize;
    if !(5..=longest).contains(&length) {
        return Front::Invalid;
    }
    if stream.len() < length {
        return Front::Incomplete;
    }
    if length < 28 {
        return Front::Invalid;
    }
    let words = [4, 8, 12, 16, 20, 24].map(|at| word(stream, at).unwrap());
    Front::Frame(words, &stream[28..length], length)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at + 4)?;
    Some(u32::from_be_bytes(word.try_into().unwrap()))
}

/// A frame with this header and payload.
pub fn frame(words: Words, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(28 + payload.len()).unwrap();
    let mut frame = length.to_be_bytes().to_vec();
    frame.extend(words.into_iter().flat_map(u32::to_be_bytes));
    frame.extend_from_slice(payload);
    frame
}

/// The error object with these fields, in their order.
pub struct ErrorObject<'a> {
    pub code: i32,
    pub domain: i32,
    pub message: &'a [u8],
    pub str1: &'a [u8],
    pub str2: &'a [u8],
    pub ints: [i32; 2],
}

/// The reply to a call with the header `call`.
pub fn error_reply(call: Words, error: &ErrorObject<'_>) -> Vec<u8> {
    let mut payload = Vec::new();
    let number = |payload: &mut Vec<u8>, number: i32| payload.extend(number.to_be_bytes());
    let text = |payload: &mut Vec<u8>, text: &[u8]| {
        payload.extend(1u32.to_be_bytes());
        put_text(payload, text);
    };
    number(&mut payload, error.code);
    number(&mut payload, error.domain);
    text(&mut payload, error.message);
    number(&mut payload, 2);
    number(&mut payload, 0);
    text(&mut payload, error.str1);
    text(&mut payload, error.str2);
    number(&mut payload, 0);
    number(&mut payload, error.ints[0]);
    number(&mut payload, error.ints[1]);
    number(&mut payload, 0);
    let [program, version, procedure, _, serial, _] = call;
    frame([program, version, procedure, 1, serial, 1], &payload)
}

fn put_text(out: &mut Vec<u8>, text: &[u8]) {
    out.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
    out.extend_from_slice(text);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// A part of a procedure's arguments or of its result.
#[derive(Clone, Copy)]
pub enum Item {
    /// A word.
    Word,
    /// A word that says yes or no: whatever is not 0 is yes.
    Truth,
    /// Two words.
    Hyper,
    /// 16 bytes.
    Uuid,
    /// As many bytes that nobody looks at.
    Ignored(usize),
    /// A string of at most so many bytes, up to its first NUL.
    Text(u32),
    /// Perhaps such a string.
    OptionalText(u32),
    /// Up to so many elements.
    Array(u32, &'static [Item]),
    /// A type and a value of that type.
    Value,
    /// A word, and these if it is not 0.
    Perhaps(&'static [Item]),
    /// These behind a word that is not 0, again and again; then a word that is.
    List(&'static [Item]),
}

const LOCK_TEXT: Item = Item::Text(65536);
const ADMIN_TEXT: Item = Item::Text(4_194_304);
const ADMIN_OPTIONAL: Item = Item::OptionalText(4_194_304);
/// A parameter list in a call.
const PARAMETERS: Item = Item::Array(32, &[ADMIN_TEXT, Item::Value]);

/// The arguments of a procedure of the lock program.
pub fn lock_arguments(procedure: i32) -> &'static [Item] {
    use Item::{Uuid, Word};
    match procedure {
        1 => &[Uuid, LOCK_TEXT, Word, Word, Word],
        2 => &[Word],
        3 => &[LOCK_TEXT, Word],
        4..=7 => &[LOCK_TEXT, LOCK_TEXT, Word],
        8 => &[LOCK_TEXT],
        _ => panic!("no procedure {procedure}"),
    }
}

/// The arguments of a procedure of the admin program.
pub fn admin_arguments(procedure: i32) -> &'static [Item] {
    use Item::{Hyper, Ignored, Truth, Word};
    match procedure {
        2 | 3 => &[],
        1 | 14 | 15 | 20 => &[Word],
        4 => &[Truth, Word],
        5 => &[ADMIN_TEXT, Ignored(4)],
        6 | 12 | 18 => &[ADMIN_TEXT, Word],
        7 | 13 => &[ADMIN_TEXT, PARAMETERS, Word],
        8 => &[ADMIN_TEXT, Truth, Word],
        9 => &[ADMIN_TEXT, Hyper, Word],
        10 | 11 => &[ADMIN_TEXT, Hyper, Ignored(12), Word],
        16 | 17 => &[ADMIN_OPTIONAL, Word],
        19 => &[Word, Word],
        _ => panic!("no procedure {procedure}"),
    }
}

/// The result of a procedure of the admin program.
pub fn admin_result(procedure: i32) -> &'static [Item] {
    use Item::{Array, Hyper, Value, Word};
    match procedure {
        3 => &[Hyper],
        4 => &[Array(16384, &[ADMIN_TEXT]), Word],
        5 => &[ADMIN_TEXT],
        6 | 12 => &[Array(32, &[ADMIN_TEXT, Value])],
        8 => &[Array(16384, &[ADMIN_TEXT, Hyper, Hyper, Word]), Word],
        9 => &[ADMIN_TEXT, Hyper, Hyper, Word],
        10 => &[Array(64, &[ADMIN_TEXT, Value])],
        14 => &[ADMIN_TEXT, Word],
        15 => &[ADMIN_OPTIONAL, Word],
        _ => &[],
    }
}

const STATUS_TEXT: Item = Item::Text(131_072);
const CURSOR: &[Item] = &[Item::Hyper, Item::Hyper];
const KEY: &[Item] = &[Item::Word, Item::Perhaps(&[Item::Uuid])];
/// A holder: key, id, name, since, held, standing; times.
const HOLDER: &[Item] = &[
    Item::Word,
    Item::Perhaps(&[Item::Uuid]),
    Item::Word,
    STATUS_TEXT,
    Item::Hyper,
    Item::Word,
    Item::Word,
    Item::Word,
];
const RESOURCE: Item = Item::List(&[
    STATUS_TEXT,
    STATUS_TEXT,
    Item::Hyper,
    Item::Hyper,
    Item::Truth,
    Item::Hyper,
    Item::Word,
    Item::List(HOLDER),
]);
const NEXT: Item = Item::Perhaps(CURSOR);

/// The arguments of a procedure of the status program.
pub fn status_arguments(procedure: i32) -> &'static [Item] {
    use Item::{Hyper, Perhaps, Word};
    match procedure {
        1 | 2 => &[Word],
        3 => &[Item::OptionalText(131_072), Word],
        4 | 5 => &[Hyper, Hyper, Word],
        6 => &[STATUS_TEXT, STATUS_TEXT, Perhaps(KEY), Word],
        7 => &[Hyper, Hyper, Word],
        8 => &[STATUS_TEXT, STATUS_TEXT, Word],
        9 => &[Word, Word],
        _ => panic!("no procedure {procedure}"),
    }
}

/// The result of a procedure of the status program.
pub fn status_result(procedure: i32) -> &'static [Item] {
    use Item::{Hyper, List, Truth, Word};
    match procedure {
        1 => &[
            STATUS_TEXT,
            Word,
            Hyper,
            Hyper,
            Hyper,
            Hyper,
            Word,
            Word,
            Word,
            Word,
        ],
        2 => &[List(&[STATUS_TEXT, Hyper])],
        3 => &[List(&[STATUS_TEXT]), Truth],
        4 => &[RESOURCE, NEXT],
        5 => &[
            List(&[
                Word,
                Item::Perhaps(&[Item::Uuid]),
                Word,
                STATUS_TEXT,
                Hyper,
                Word,
                Word,
            ]),
            NEXT,
        ],
        6 => &[List(HOLDER), Truth],
        7 | 8 => &[RESOURCE],
        _ => &[],
    }
}

/// What the daemon says that happened: kind, time, count, owner, lockspace, name, mode, text.
pub fn status_happened() -> &'static [Item] {
    use Item::{Hyper, Perhaps, Word};
    &[
        Word,
        Hyper,
        Hyper,
        Perhaps(&[Word, Perhaps(&[Item::Uuid]), Word, STATUS_TEXT]),
        STATUS_TEXT,
        STATUS_TEXT,
        Word,
        STATUS_TEXT,
    ]
}

/// The items at the front of `payload` as a client writes them: strings end where they are read to,
/// padding and what nobody looks at is 0, yes is 1. `None` if they do not decode.
pub fn canonical(items: &[Item], payload: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let mut rest = payload;
    take_items(items, &mut rest, &mut out)?;
    Some(out)
}

fn take_items(items: &[Item], rest: &mut &[u8], out: &mut Vec<u8>) -> Option<()> {
    for item in items {
        match *item {
            Item::Word => out.extend_from_slice(take(rest, 4)?),
            Item::Hyper => out.extend_from_slice(take(rest, 8)?),
            Item::Uuid => out.extend_from_slice(take(rest, 16)?),
            Item::Truth => out.extend(u32::from(take_word(rest)? != 0).to_be_bytes()),
            Item::Ignored(length) => {
                take(rest, length)?;
                out.resize(out.len() + length, 0);
            }
            Item::Text(limit) => {
                let length = take_word(rest)?;
                if length > limit {
                    return None;
                }
                let length = length as usize;
                let padded = take(rest, length.next_multiple_of(4))?;
                let text = padded[..length].split(|byte| *byte == 0).next();
                put_text(out, text.unwrap());
            }
            Item::OptionalText(limit) => {
                let present = take_word(rest)? != 0;
                out.extend(u32::from(present).to_be_bytes());
                if present {
                    take_items(&[Item::Text(limit)], rest, out)?;
                }
            }
            Item::Array(limit, element) => {
                let count = take_word(rest)?;
                if count > limit {
                    return None;
                }
                out.extend(count.to_be_bytes());
                for _ in 0..count {
                    take_items(element, rest, out)?;
                }
            }
            Item::Perhaps(items) => {
                let present = take_word(rest)? != 0;
                out.extend(u32::from(present).to_be_bytes());
                if present {
                    take_items(items, rest, out)?;
                }
            }
            Item::List(row) => {
                while take_word(rest)? != 0 {
                    out.extend(1u32.to_be_bytes());
                    take_items(row, rest, out)?;
                }
                out.extend([0; 4]);
            }
            Item::Value => {
                let kind = take_word(rest)?;
                out.extend(kind.to_be_bytes());
                let value = match kind {
                    1 | 2 => Item::Word,
                    3..=5 => Item::Hyper,
                    6 => Item::Truth,
                    7 => ADMIN_TEXT,
                    _ => return None,
                };
                take_items(&[value], rest, out)?;
            }
        }
    }
    Some(())
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(length)?;
    *rest = left;
    Some(taken)
}

fn take_word(rest: &mut &[u8]) -> Option<u32> {
    take(rest, 4).and_then(|bytes| word(bytes, 0))
}
