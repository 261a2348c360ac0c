//! The frames that come out of a stream are the same however the network cuts it, through pauses
//! and through handovers to a next image of the process in the middle of it. Nothing more is kept
//! than was sent.
//!
//! Input: a byte with the number of pieces, two bytes a piece, then the stream. The first byte of a
//! piece is its length; of the second, bit 0 says that descriptors come with its last byte, bit 1
//! that a handover follows. When the pieces are used up they are used again. Bit 2 of the first
//! piece says that it is the admin socket, where frames may be longer.

use virtlockd::server::clients::conversation::{Conversation, Taken};
use virtlockd::server::flow::Flow;
use virtlockd::wire::frame::{self, Header, LONGEST, Split};
use virtlockd::wire::lock::LONGEST_FRAME;

use super::reference::{self, Front, Words};

/// A part of the stream as one read gets it.
pub struct Piece<'a> {
    pub bytes: &'a [u8],
    pub descriptors: bool,
    pub handover: bool,
}

/// The plan at the front of an input, and what follows it.
pub fn plan(data: &[u8]) -> Option<(&[[u8; 2]], &[u8])> {
    let (count, rest) = data.split_first()?;
    let (plan, rest) = rest.split_at_checked(usize::from(*count) * 2)?;
    Some((plan.as_chunks().0, rest))
}

/// The stream in the pieces of the plan.
pub fn pieces<'a>(plan: &[[u8; 2]], mut stream: &'a [u8]) -> Vec<Piece<'a>> {
    let mut pieces = Vec::new();
    let mut plan = plan.iter().cycle();
    while !stream.is_empty() {
        let [length, what] = *plan.next().unwrap_or(&[255, 0]);
        let (bytes, rest) = stream.split_at(usize::from(length).clamp(1, stream.len()));
        stream = rest;
        pieces.push(Piece {
            bytes,
            descriptors: what & 1 != 0,
            handover: what & 2 != 0,
        });
    }
    pieces
}

/// Headers and arguments, and how it ended.
type Outcome = (Vec<(Words, Vec<u8>)>, Taken);

/// The words of a decoded header.
pub fn words(header: Header) -> Words {
    [
        header.program,
        header.version,
        header.procedure.cast_unsigned(),
        header.kind.number().cast_unsigned(),
        header.serial,
        header.status.cast_unsigned(),
    ]
}

/// Takes in everything; every `pause`th frame is followed by a pause.
fn take_in(pieces: &[Piece<'_>], longest: usize, pause: usize) -> Outcome {
    let mut conversation = Conversation::default();
    let mut frames = Vec::new();
    let mut sent = 0;
    for piece in pieces {
        sent += piece.bytes.len();
        let mut bytes = piece.bytes;
        loop {
            let taken = conversation.take_in(
                bytes,
                piece.descriptors && !bytes.is_empty(),
                longest,
                |header, payload, _| {
                    frames.push((words(header), payload.to_vec()));
                    if frames.len().is_multiple_of(pause) {
                        Flow::Pause
                    } else {
                        Flow::Continue
                    }
                },
            );
            assert!(conversation.waiting() <= sent.min(longest + piece.bytes.len()));
            match taken {
                Taken::Close => {
                    assert!(conversation.is_empty());
                    return (frames, Taken::Close);
                }
                Taken::All => break,
                Taken::Paused => bytes = &[],
                Taken::Again | Taken::Waits => panic!("nothing was asked for again"),
            }
        }
        if piece.handover {
            let pending = conversation.pending();
            conversation = pending.map(Conversation::resume).unwrap_or_default();
        }
    }
    (frames, Taken::All)
}

/// The same stream in the longest pieces there can be: a read ends where descriptors come.
fn joined<'a>(stream: &'a [u8], pieces: &[Piece<'_>]) -> Vec<Piece<'a>> {
    let mut joined = Vec::new();
    let (mut start, mut end) = (0, 0);
    for (number, piece) in pieces.iter().enumerate() {
        end += piece.bytes.len();
        if piece.descriptors || number + 1 == pieces.len() {
            joined.push(Piece {
                bytes: &stream[start..end],
                descriptors: piece.descriptors,
                handover: false,
            });
            start = end;
        }
    }
    joined
}

/// What should come out, found by one walk over the whole stream.
pub fn expected(stream: &[u8], pieces: &[Piece<'_>], longest: usize) -> Outcome {
    const CALL_WITH_DESCRIPTORS: u32 = 4;
    let mut ends_with_descriptors = Vec::new();
    for piece in pieces {
        ends_with_descriptors.resize(ends_with_descriptors.len() + piece.bytes.len(), false);
        *ends_with_descriptors.last_mut().unwrap() = piece.descriptors;
    }
    let mut frames = Vec::new();
    let mut at = 0;
    loop {
        let (words, payload, length) = match reference::front(&stream[at..], longest) {
            Front::Incomplete => return (frames, Taken::All),
            Front::Invalid => return (frames, Taken::Close),
            Front::Frame(words, payload, length) => (words, payload, length),
        };
        at += length;
        let mut arguments = payload;
        if words[3] == CALL_WITH_DESCRIPTORS {
            let Some((count, rest)) = payload
                .split_first_chunk()
                .map(|(count, rest)| (u32::from_be_bytes(*count), rest))
                .filter(|(count, _)| *count <= 32)
            else {
                return (frames, Taken::Close);
            };
            arguments = rest;
            for _ in 0..count {
                match ends_with_descriptors.get(at) {
                    None => return (frames, Taken::All),
                    Some(false) => return (frames, Taken::Close),
                    Some(true) => at += 1,
                }
            }
        }
        frames.push((words, arguments.to_vec()));
    }
}

/// The splitter alone, at the front of the stream.
fn check_front(stream: &[u8], longest: usize) {
    match (
        frame::split(stream, longest),
        reference::front(stream, longest),
    ) {
        (Split::Frame(frame), Front::Frame(header, payload, length)) => {
            assert_eq!(
                (words(frame.header), frame.payload, frame.length),
                (header, payload, length)
            );
            let mut encoded = Vec::new();
            frame::encode(&mut encoded, frame.header, |_| ());
            assert_eq!(encoded, reference::frame(header, b""));
        }
        (Split::Incomplete { length }, Front::Incomplete) => match length {
            None => assert!(stream.len() < 4),
            Some(length) => assert!(length > stream.len() && length <= longest),
        },
        (Split::Invalid, Front::Invalid) => (),
        (split, _) => panic!("the front is {split:?}"),
    }
}

pub fn run(data: &[u8]) {
    let Some((plan, stream)) = plan(data) else {
        return;
    };
    let is_admin = plan.first().is_some_and(|[_, what]| what & 4 != 0);
    let longest = if is_admin { LONGEST } else { LONGEST_FRAME };
    check_front(stream, longest);
    let pieces = pieces(plan, stream);
    let cut = take_in(&pieces, longest, usize::MAX);
    assert_eq!(cut, expected(stream, &pieces, longest));
    assert_eq!(cut, take_in(&joined(stream, &pieces), longest, usize::MAX));
    assert_eq!(cut, take_in(&pieces, longest, 1 + stream.len() % 3));
}
