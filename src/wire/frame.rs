//! Frames: a length word, a header of six words, a payload.
//!
//! [`split`] says of the front of a byte stream whether it is a whole frame, not one yet, or one
//! that can only end the connection. It never looks at more than that one frame.

use super::xdr::{Decoder, Encoder};

/// Bytes of the length word.
pub const LENGTH_WORD: usize = 4;
/// Bytes of the length word and the header together: no frame is shorter.
pub const HEADER: usize = 28;
/// The longest frame that the protocol allows, length word included: 32 MiB of header and payload.
pub const LONGEST: usize = 4 + 32 * 1024 * 1024;
/// The most descriptors that a call may announce.
pub const MOST_DESCRIPTORS: u32 = 32;

/// What a frame is for (header field `type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// 0: a call, answered by one reply.
    Call,
    /// 1: a reply.
    Reply,
    /// 2: a message without an answer; here only keepalive uses it.
    Message,
    /// 4: a call whose payload begins with a descriptor count.
    CallWithDescriptors,
    /// Any other number. A daemon drops these without a word.
    Other(i32),
}

impl Kind {
    /// The kind with the wire's `number`.
    pub fn from_number(number: i32) -> Kind {
        match number {
            0 => Kind::Call,
            1 => Kind::Reply,
            2 => Kind::Message,
            4 => Kind::CallWithDescriptors,
            other => Kind::Other(other),
        }
    }

    /// The wire's number of this kind.
    pub fn number(self) -> i32 {
        match self {
            Kind::Call => 0,
            Kind::Reply => 1,
            Kind::Message => 2,
            Kind::CallWithDescriptors => 4,
            Kind::Other(number) => number,
        }
    }
}

/// Header field `status` of a call, and of the reply to a call that succeeded.
pub const STATUS_OK: i32 = 0;
/// Header field `status` of a reply that carries an error object.
pub const STATUS_ERROR: i32 = 1;

/// The header, without the length word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The program that the frame belongs to.
    pub program: u32,
    /// The program's version.
    pub version: u32,
    /// The program's procedure.
    pub procedure: i32,
    /// Call, reply or message.
    pub kind: Kind,
    /// Chosen by the caller, repeated in the reply.
    pub serial: u32,
    /// 0 in a call. Any number decodes; it is judged later.
    pub status: i32,
}

impl Header {
    /// From the front of a frame, length word and all.
    fn decode(front: &[u8; HEADER]) -> Option<Header> {
        let (words, _) = front.as_chunks::<LENGTH_WORD>();
        let [_, program, version, procedure, kind, serial, status] = *words else {
            return None;
        };
        let word = u32::from_be_bytes;
        Some(Header {
            program: word(program),
            version: word(version),
            procedure: word(procedure).cast_signed(),
            kind: Kind::from_number(word(kind).cast_signed()),
            serial: word(serial),
            status: word(status).cast_signed(),
        })
    }

    /// The header of the reply to a call with this header.
    pub fn reply(self, status: i32) -> Header {
        Header {
            kind: Kind::Reply,
            status,
            ..self
        }
    }
}

/// A whole frame at the front of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Its header.
    pub header: Header,
    /// What follows the header.
    pub payload: &'a [u8],
    /// Bytes of the whole frame, length word included.
    pub length: usize,
}

/// What the front of a stream is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Split<'a> {
    /// A whole frame; the stream goes on after `length` bytes.
    Frame(Frame<'a>),
    /// Not a whole frame yet. `length` is that of the whole frame, once the length word is there.
    Incomplete {
        /// Bytes of the whole frame, if known.
        length: Option<usize>,
    },
    /// A length that no frame can have: the connection ends, without a reply.
    Invalid,
}

/// Looks at the front of `stream`. A frame longer than `longest` bytes is invalid as soon as its
/// length word is there.
pub fn split(stream: &[u8], longest: usize) -> Split<'_> {
    let Some((word, _)) = stream.split_first_chunk::<LENGTH_WORD>() else {
        return Split::Incomplete { length: None };
    };
    let Ok(length) = usize::try_from(u32::from_be_bytes(*word)) else {
        return Split::Invalid;
    };
    if length <= LENGTH_WORD || length > longest {
        return Split::Invalid;
    }
    let Some(frame) = stream.get(..length) else {
        return Split::Incomplete {
            length: Some(length),
        };
    };
    // A length below that of a header ends here: the reference daemon, too, reads such a frame
    // whole before it gives up.
    let Some((front, payload)) = frame.split_first_chunk() else {
        return Split::Invalid;
    };
    let Some(header) = Header::decode(front) else {
        return Split::Invalid;
    };
    Split::Frame(Frame {
        header,
        payload,
        length,
    })
}

/// The payload of a call with descriptors, parted into their number and the arguments. `None` if
/// the count is missing or above [`MOST_DESCRIPTORS`]: the connection ends.
pub fn descriptors(payload: &[u8]) -> Option<(u32, &[u8])> {
    let mut decoder = Decoder::new(payload);
    let count = decoder.u32().ok()?;
    (count <= MOST_DESCRIPTORS).then(|| (count, decoder.rest()))
}

/// Appends a frame to `out`: header, then whatever `payload` appends; the length word is filled in
/// afterwards.
pub fn encode(out: &mut Vec<u8>, header: Header, payload: impl FnOnce(&mut Encoder<'_>)) {
    let start = out.len();
    // In one piece: every call is answered with one.
    let mut head = [0; HEADER];
    let words = [
        0,
        header.program,
        header.version,
        header.procedure.cast_unsigned(),
        header.kind.number().cast_unsigned(),
        header.serial,
        header.status.cast_unsigned(),
    ];
    let (places, _) = head.as_chunks_mut();
    for (place, word) in places.iter_mut().zip(words) {
        *place = word.to_be_bytes();
    }
    let mut encoder = Encoder::new(out);
    encoder.fixed(&head);
    payload(&mut encoder);
    let length = u32::try_from(out.len().saturating_sub(start)).unwrap_or(u32::MAX);
    if let Some(word) = out
        .get_mut(start..)
        .and_then(|frame| frame.first_chunk_mut())
    {
        *word = length.to_be_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER_OF_A_CALL: Header = Header {
        program: 0x0EA7_BEEF,
        version: 1,
        procedure: 2,
        kind: Kind::Call,
        serial: 9,
        status: STATUS_OK,
    };

    #[test]
    fn what_was_encoded_is_split_off_again_and_the_rest_is_not_touched() {
        let mut out = Vec::new();
        encode(&mut out, HEADER_OF_A_CALL, |payload| {
            payload.u32(5);
        });
        let length = out.len();
        out.extend_from_slice(b"next");
        let Split::Frame(frame) = split(&out, LONGEST) else {
            panic!("no frame")
        };
        assert_eq!(frame.header, HEADER_OF_A_CALL);
        assert_eq!(frame.payload, 5u32.to_be_bytes());
        assert_eq!(frame.length, length);
    }

    #[test]
    fn every_cut_of_a_frame_is_incomplete() {
        let mut out = Vec::new();
        encode(&mut out, HEADER_OF_A_CALL, |_| ());
        for cut in 0..out.len() {
            let length = (cut >= LENGTH_WORD).then_some(out.len());
            assert_eq!(split(&out[..cut], LONGEST), Split::Incomplete { length });
        }
    }

    #[test]
    fn lengths_that_no_frame_can_have_are_invalid() {
        for word in [0u32, 1, 3, 4, 33_554_437, u32::MAX] {
            assert_eq!(
                split(&word.to_be_bytes(), LONGEST),
                Split::Invalid,
                "{word}"
            );
        }
        let longest = 33_554_436u32;
        let incomplete = Split::Incomplete {
            length: Some(LONGEST),
        };
        assert_eq!(split(&longest.to_be_bytes(), LONGEST), incomplete);
        assert_eq!(split(&longest.to_be_bytes(), LONGEST - 1), Split::Invalid);
    }

    #[test]
    fn a_header_cut_short_by_its_own_length_word_is_read_whole_and_then_invalid() {
        let word = 27u32.to_be_bytes();
        assert_eq!(
            split(&word, LONGEST),
            Split::Incomplete { length: Some(27) }
        );
        let mut whole = word.to_vec();
        whole.resize(27, 0);
        assert_eq!(split(&whole, LONGEST), Split::Invalid);
    }

    #[test]
    fn the_descriptor_count_is_no_argument() {
        assert_eq!(descriptors(b"\0\0\0\x20rest"), Some((32, &b"rest"[..])));
        assert_eq!(descriptors(b"\0\0\0\x21rest"), None);
        assert_eq!(descriptors(b"\0\0"), None);
    }
}
