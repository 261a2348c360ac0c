//! The frames that come out of a stream are the same however the network cuts it, through pauses
//! and through handovers to a next image of the process in the middle of it. Nothing more is kept
//! than was sent.
//!
//! Input: a byte with the number of pieces, two bytes a piece, then the stream. The first byte of a
//! piece is its length; of the second, bit 0 says that descriptors come with its last byte, bit 1
//! that a handover follows. When the pieces are used up they are used again.

use virtlockd::server::conversation::{Conversation, Flow, Taken};
use virtlockd::wire::frame::{self, Header, Kind, MOST_DESCRIPTORS, Split};
use virtlockd::wire::lock::LONGEST_FRAME;

/// A part of the stream as one read gets it.
struct Piece<'a> {
    bytes: &'a [u8],
    descriptors: bool,
    handover: bool,
}

fn pieces(data: &[u8]) -> Option<Vec<Piece<'_>>> {
    let (count, rest) = data.split_first()?;
    let (plan, mut stream) = rest.split_at_checked(usize::from(*count) * 2)?;
    let mut pieces = Vec::new();
    let mut plan = plan.as_chunks::<2>().0.iter().cycle();
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
    Some(pieces)
}

type Frames = Vec<(Header, Vec<u8>)>;

/// Takes in everything; every `pause`th frame is followed by a pause.
fn take_in(pieces: &[Piece<'_>], pause: usize) -> (Frames, Taken) {
    let mut conversation = Conversation::default();
    let mut frames = Frames::new();
    let mut sent = 0;
    for piece in pieces {
        sent += piece.bytes.len();
        let mut bytes = piece.bytes;
        loop {
            let taken = conversation.take_in(
                bytes,
                piece.descriptors && !bytes.is_empty(),
                LONGEST_FRAME,
                |header, payload| {
                    frames.push((header, payload.to_vec()));
                    if frames.len().is_multiple_of(pause) {
                        Flow::Pause
                    } else {
                        Flow::Continue
                    }
                },
            );
            assert!(conversation.waiting() <= sent.min(LONGEST_FRAME + piece.bytes.len()));
            match taken {
                Taken::Close => {
                    assert!(conversation.is_empty());
                    return (frames, Taken::Close);
                }
                Taken::All => break,
                Taken::Paused => bytes = &[],
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
fn reference(stream: &[u8], pieces: &[Piece<'_>]) -> (Frames, Taken) {
    let mut ends_with_descriptors = Vec::new();
    for piece in pieces {
        ends_with_descriptors.resize(ends_with_descriptors.len() + piece.bytes.len(), false);
        *ends_with_descriptors.last_mut().unwrap() = piece.descriptors;
    }
    let mut frames = Frames::new();
    let mut at = 0;
    loop {
        let (header, payload, length) = match frame::split(&stream[at..], LONGEST_FRAME) {
            Split::Incomplete { .. } => return (frames, Taken::All),
            Split::Invalid => return (frames, Taken::Close),
            Split::Frame(frame) => (frame.header, frame.payload, frame.length),
        };
        at += length;
        let mut arguments = payload;
        if header.kind == Kind::CallWithDescriptors {
            let Some((count, rest)) = payload
                .split_first_chunk()
                .filter(|(count, _)| u32::from_be_bytes(**count) <= MOST_DESCRIPTORS)
            else {
                return (frames, Taken::Close);
            };
            arguments = rest;
            for _ in 0..u32::from_be_bytes(*count) {
                match ends_with_descriptors.get(at) {
                    None => return (frames, Taken::All),
                    Some(false) => return (frames, Taken::Close),
                    Some(true) => at += 1,
                }
            }
        }
        frames.push((header, arguments.to_vec()));
    }
}

pub fn run(data: &[u8]) {
    let Some(pieces) = pieces(data) else { return };
    let length: usize = pieces.iter().map(|piece| piece.bytes.len()).sum();
    let stream = &data[data.len() - length..];
    let cut = take_in(&pieces, usize::MAX);
    assert_eq!(cut, reference(stream, &pieces));
    assert_eq!(cut, take_in(&joined(stream, &pieces), usize::MAX));
    assert_eq!(cut, take_in(&pieces, 1 + length % 3));
}
