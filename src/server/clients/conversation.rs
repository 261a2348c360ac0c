//! One client's side of the conversation: bytes in, frames out, in whatever pieces they come.
//!
//! It keeps only what cannot be worked on yet: the beginning of a frame, a call whose descriptors
//! have not arrived, or frames that have to wait until earlier replies are sent. Between turns even
//! that lies elsewhere, if somebody keeps it: then it knows how much there is, and how long the frame
//! at the front will be, so that only a whole one is fetched. It knows no sockets, so that a fuzzer can
//! play the network.

use crate::server::flow::Flow;
use crate::wire::frame::{self, Frame, Header, Kind, Split};

/// What is left to do after bytes were taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// Every whole frame was worked on: more bytes are wanted.
    All,
    /// Frames may be waiting: take in nothing new before they were worked on.
    Paused,
    /// The same, and the first of them is one that could not be worked on yet.
    Again,
    /// The same, and it is not to be tried before somebody says so.
    Waits,
    /// The connection ends.
    Close,
}

/// For longer frames no room is made before their bytes are there. Only the admin program has them.
const MOST_ROOM: usize = 256 * 1024;

/// What a client has sent and nobody has worked on yet.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Conversation {
    /// What waits here, behind what lies elsewhere.
    pending: Vec<u8>,
    /// How many bytes lie elsewhere.
    elsewhere: usize,
    /// How many have to be there before any of those that lie elsewhere are wanted again.
    wanted: usize,
    /// Descriptors came with the last byte that waits.
    descriptors_at_end: bool,
    /// How many of the descriptors that belong to the call at the front have arrived.
    arrived: u32,
}

/// The parts of a [`Conversation`], to be passed on to the next image of the process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// Bytes that were read and not worked on.
    pub bytes: Vec<u8>,
    /// Descriptors came with the last of them.
    pub descriptors_at_end: bool,
    /// How many descriptors of the call at the front have arrived.
    pub arrived: u32,
}

impl Conversation {
    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.waiting() == 0
    }

    /// How many bytes wait.
    pub fn waiting(&self) -> usize {
        self.elsewhere.saturating_add(self.pending.len())
    }

    /// How many of them lie elsewhere.
    pub fn elsewhere(&self) -> usize {
        self.elsewhere
    }

    /// All that waits lies elsewhere by now, and need not be here, too.
    pub fn lies_elsewhere(&mut self) {
        if self.elsewhere == 0 {
            self.wanted = match frame::split(&self.pending, usize::MAX) {
                Split::Incomplete { length } => length.unwrap_or(0),
                Split::Frame(_) | Split::Invalid => 0,
            };
        }
        self.elsewhere = self.waiting();
        self.pending = Vec::new();
    }

    /// Whether what lies elsewhere is wanted before so many bytes more are taken in.
    pub fn wants_what_lies_elsewhere(&self, more: usize) -> bool {
        self.elsewhere > 0 && self.waiting().saturating_add(more) >= self.wanted
    }

    /// Here is what lay elsewhere.
    pub fn bring_back(&mut self, mut bytes: Vec<u8>) {
        bytes.extend_from_slice(&self.pending);
        (self.pending, self.elsewhere) = (bytes, 0);
    }

    /// Whether descriptors came with the last byte that waits, and how many of the call at the front have
    /// arrived.
    pub fn descriptors(&self) -> (bool, u32) {
        (self.descriptors_at_end, self.arrived)
    }

    /// What waits here, to be passed on.
    pub fn pending(&self) -> Option<Pending> {
        (!self.is_empty()).then(|| Pending {
            bytes: self.pending.clone(),
            descriptors_at_end: self.descriptors_at_end,
            arrived: self.arrived,
        })
    }

    /// A conversation that was passed on.
    pub fn resume(pending: Pending) -> Conversation {
        let Pending {
            bytes,
            descriptors_at_end,
            arrived,
        } = pending;
        Conversation {
            pending: bytes,
            descriptors_at_end,
            arrived,
            ..Conversation::default()
        }
    }

    /// Takes in bytes that follow those taken in before, of which the last may have had descriptors
    /// with it, and hands each whole frame to `work`: its header and arguments, and how many bytes of all
    /// that waited and came are done with behind it. A frame longer than `longest` bytes ends the connection.
    ///
    /// With no bytes, works on what has been waiting since a pause. What lies elsewhere was brought back
    /// before, if it is wanted.
    pub fn take_in(
        &mut self,
        bytes: &[u8],
        descriptors_at_end: bool,
        longest: usize,
        mut work: impl FnMut(Header, &[u8], usize) -> Flow,
    ) -> Taken {
        if self.elsewhere > 0 {
            // Part of a frame, and it stays one: what a descriptor came with is a byte like any other.
            self.pending.extend_from_slice(bytes);
            self.descriptors_at_end = false;
            return Taken::All;
        }
        if self.pending.is_empty() {
            self.descriptors_at_end = descriptors_at_end;
            let (left, taken) = self.advance(bytes, longest, &mut work);
            self.keep(left, longest);
            return taken;
        }
        if !bytes.is_empty() {
            self.keep(bytes, longest);
            self.descriptors_at_end = descriptors_at_end;
        }
        let pending = std::mem::take(&mut self.pending);
        let (left, taken) = self.advance(&pending, longest, &mut work);
        if left.len() == pending.len() {
            self.pending = pending;
        } else {
            // A copy of what is left: what a long frame needed is not kept for what follows it.
            self.keep(left, longest);
        }
        taken
    }

    /// Keeps bytes behind those that wait. Once an eighth of a frame is there, room is made for the
    /// whole: it need not be moved again and again, and nobody gets much memory for a few bytes.
    fn keep(&mut self, bytes: &[u8], longest: usize) {
        let waiting = self.pending.len().saturating_add(bytes.len());
        let first = if self.pending.is_empty() {
            bytes
        } else {
            &self.pending
        };
        if let Split::Incomplete {
            length: Some(length),
        } = frame::split(first, longest)
            && length <= MOST_ROOM
            && length / 8 <= waiting
        {
            let room = length.max(waiting).saturating_sub(self.pending.len());
            self.pending.reserve_exact(room);
        }
        self.pending.extend_from_slice(bytes);
    }

    /// Works on the frames at the front of `stream`. What is left to keep of it.
    fn advance<'a>(
        &mut self,
        mut stream: &'a [u8],
        longest: usize,
        work: &mut impl FnMut(Header, &[u8], usize) -> Flow,
    ) -> (&'a [u8], Taken) {
        let all = stream.len();
        loop {
            let (header, arguments, length, whole) = match self.next_call(stream, longest) {
                Next::Frame(header, arguments, length, whole) => (header, arguments, length, whole),
                Next::Incomplete { keep } => {
                    // Only the beginning of one frame is left: a descriptor that came with it was
                    // not due, and its byte is like any other.
                    self.descriptors_at_end = false;
                    return (stream.get(..keep).unwrap_or(stream), Taken::All);
                }
                Next::Invalid => return (&[], Taken::Close),
            };
            let done = all.saturating_sub(stream.len()).saturating_add(length);
            let flow = work(header, arguments, done);
            if matches!(flow, Flow::Again | Flow::Wait) {
                // Its descriptors have arrived and are counted; the byte of the last one is not kept.
                let end = if length > whole { whole } else { stream.len() };
                let taken = match flow {
                    Flow::Wait => Taken::Waits,
                    _ => Taken::Again,
                };
                return (stream.get(..end).unwrap_or(stream), taken);
            }
            stream = stream.get(length..).unwrap_or_default();
            self.arrived = 0;
            match flow {
                Flow::Continue => (),
                Flow::Pause | Flow::Again | Flow::Wait => return (stream, Taken::Paused),
                Flow::Close => return (&[], Taken::Close),
            }
        }
    }

    fn next_call<'a>(&mut self, rest: &'a [u8], longest: usize) -> Next<'a> {
        let Frame {
            header,
            payload,
            length,
        } = match frame::split(rest, longest) {
            Split::Frame(frame) => frame,
            Split::Incomplete { .. } => return Next::Incomplete { keep: rest.len() },
            Split::Invalid => return Next::Invalid,
        };
        if header.kind != Kind::CallWithDescriptors {
            return Next::Frame(header, payload, length, length);
        }
        let Some((count, arguments)) = frame::descriptors(payload) else {
            return Next::Invalid;
        };
        let behind = rest.len().saturating_sub(length);
        if self.arrived < count && behind > 0 {
            // Each descriptor comes with a byte of its own, and a read never goes past such a byte:
            // here it can only be the last one.
            if behind != 1 || !self.descriptors_at_end {
                return Next::Invalid;
            }
            self.descriptors_at_end = false;
            self.arrived = self.arrived.saturating_add(1);
            if self.arrived == count {
                return Next::Frame(header, arguments, rest.len(), length);
            }
        }
        if self.arrived < count {
            // The descriptors' bytes are counted, not kept.
            return Next::Incomplete { keep: length };
        }
        Next::Frame(header, arguments, length, length)
    }
}

enum Next<'a> {
    /// A frame that can be worked on: header, arguments, bytes of the stream it took, its own bytes.
    Frame(Header, &'a [u8], usize, usize),
    /// More must come after these bytes.
    Incomplete { keep: usize },
    /// The connection ends.
    Invalid,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::lock::{Call, LONGEST_FRAME};

    fn call(serial: u32) -> Vec<u8> {
        let mut out = Vec::new();
        Call::CreateLockspace { path: b"/ls" }.encode(&mut out, serial);
        out
    }

    fn call_with_descriptors(serial: u32, count: u32) -> Vec<u8> {
        let mut out = call(serial);
        out[19] = 4;
        let arguments = out.split_off(frame::HEADER);
        out.extend_from_slice(&count.to_be_bytes());
        out.extend_from_slice(&arguments);
        let length = u32::try_from(out.len()).unwrap();
        out[..4].copy_from_slice(&length.to_be_bytes());
        out
    }

    /// Feeds pieces and lists the serials of the frames that came out.
    fn feed(conversation: &mut Conversation, pieces: &[(&[u8], bool)]) -> (Vec<u32>, Taken) {
        let mut serials = Vec::new();
        let mut last = Taken::All;
        for (bytes, mark) in pieces {
            last = conversation.take_in(bytes, *mark, LONGEST_FRAME, |header, arguments, _| {
                assert_eq!(arguments, [0, 0, 0, 3, b'/', b'l', b's', 0]);
                serials.push(header.serial);
                Flow::Continue
            });
        }
        (serials, last)
    }

    #[test]
    fn frames_come_out_the_same_wherever_the_stream_is_cut() {
        let stream = [call(1), call(2), call(3)].concat();
        for cut in 0..stream.len() {
            let mut conversation = Conversation::default();
            let pieces = [(&stream[..cut], false), (&stream[cut..], false)];
            assert_eq!(
                feed(&mut conversation, &pieces),
                (vec![1, 2, 3], Taken::All),
                "{cut}"
            );
            assert!(conversation.is_empty());
        }
    }

    #[test]
    fn a_call_waits_for_its_descriptors_and_for_nothing_else() {
        let first = call_with_descriptors(1, 2);
        let second = call(2);
        let mut conversation = Conversation::default();
        assert!(
            feed(&mut conversation, &[(&first, false), (b"\0", true)])
                .0
                .is_empty()
        );
        let rest = [(&b"\0"[..], true), (&second, false)];
        assert_eq!(feed(&mut conversation, &rest), (vec![1, 2], Taken::All));
        assert!(conversation.is_empty());
    }

    #[test]
    fn a_descriptor_may_come_in_the_same_read_as_its_call() {
        let stream = [call_with_descriptors(1, 1), b"\0".to_vec()].concat();
        let mut conversation = Conversation::default();
        assert_eq!(
            feed(&mut conversation, &[(&stream, true)]),
            (vec![1], Taken::All)
        );
        assert!(conversation.is_empty());
    }

    #[test]
    fn a_byte_without_a_descriptor_where_one_is_due_ends_the_connection() {
        let first = call_with_descriptors(1, 1);
        for pieces in [
            vec![(&first[..], false), (b"\0", false)],
            vec![(&first, false), (b"\0\0", true)],
        ] {
            let mut conversation = Conversation::default();
            assert_eq!(feed(&mut conversation, &pieces), (vec![], Taken::Close));
        }
    }

    #[test]
    fn there_is_room_for_a_frame_once_an_eighth_of_it_is_there() {
        let mut frame = call(1);
        frame[..4].copy_from_slice(&80_000u32.to_be_bytes());
        frame.resize(80_000, 0);
        let mut conversation = Conversation::default();
        let mut take_in = |bytes: &[u8]| {
            let taken = conversation.take_in(bytes, false, LONGEST_FRAME, |_, _, _| Flow::Continue);
            assert_eq!(taken, Taken::All);
            conversation.pending.capacity()
        };
        assert!(take_in(&frame[..100]) < 1000);
        assert!(take_in(&frame[100..9999]) < 20_000);
        assert_eq!(take_in(&frame[9999..10_000]), 80_000);
        assert_eq!(take_in(&frame[10_000..79_999]), 80_000);
        assert_eq!(take_in(&frame[79_999..]), 0);
    }

    #[test]
    fn a_descriptor_that_is_not_due_changes_nothing() {
        let stream = call(1);
        let mut conversation = Conversation::default();
        let pieces = [(&stream[..9], true), (&stream[9..], true)];
        assert_eq!(feed(&mut conversation, &pieces), (vec![1], Taken::All));
    }

    #[test]
    fn what_follows_a_pause_waits_and_then_comes_in_order() {
        let stream = [call(1), call(2), call(3)].concat();
        let mut conversation = Conversation::default();
        let mut serials = Vec::new();
        for bytes in [&stream[..], b"", b""] {
            let taken = conversation.take_in(bytes, false, LONGEST_FRAME, |header, _, _| {
                serials.push(header.serial);
                Flow::Pause
            });
            assert_eq!(taken, Taken::Paused);
        }
        assert_eq!(serials, [1, 2, 3]);
        assert!(conversation.is_empty());
    }

    #[test]
    fn what_lies_elsewhere_is_wanted_when_a_frame_is_whole_and_no_earlier() {
        let mut with_text = Vec::new();
        let path = [b'/', b'l', b's'];
        Call::CreateLockspace { path: &path }.encode(&mut with_text, 3);
        let stream = [
            call(1),
            call_with_descriptors(2, 1),
            b"\0".to_vec(),
            with_text,
        ]
        .concat();
        let mark = call(1).len() + call_with_descriptors(2, 1).len() + 1;
        for size in 1..=stream.len() {
            let mut conversation = Conversation::default();
            let mut elsewhere = Vec::new();
            let mut serials = Vec::new();
            let mut at = 0;
            while at < stream.len() {
                // A read never goes past the byte of a descriptor.
                let to = (at + size).min(if at < mark { mark } else { stream.len() });
                let came = &stream[at..to];
                let is_wanted = conversation.wants_what_lies_elsewhere(came.len());
                let all = [&elsewhere[..], came].concat();
                let is_whole = matches!(frame::split(&all, LONGEST_FRAME), Split::Frame(_));
                let says_how_long = elsewhere.len() >= frame::LENGTH_WORD;
                if says_how_long {
                    assert_eq!(is_wanted, is_whole, "{size}: {at}");
                }
                if is_wanted {
                    conversation.bring_back(std::mem::take(&mut elsewhere));
                }
                let (more, taken) = feed(&mut conversation, &[(came, to == mark)]);
                assert_eq!(taken, Taken::All);
                serials.extend(more);
                elsewhere.extend(
                    conversation
                        .pending()
                        .map(|it| it.bytes)
                        .unwrap_or_default(),
                );
                conversation.lies_elsewhere();
                assert_eq!(conversation.waiting(), elsewhere.len(), "{size}: {at}");
                at = to;
            }
            assert_eq!(serials, [1, 2, 3], "{size}");
            assert!(conversation.is_empty());
        }
    }

    #[test]
    fn what_waits_can_be_passed_on_at_any_point() {
        let stream = [call_with_descriptors(1, 1), b"\0".to_vec(), call(2)].concat();
        let mark = stream.len() - call(2).len();
        for cut in 1..stream.len() {
            if cut > mark {
                continue;
            }
            let mut conversation = Conversation::default();
            let (mut serials, _) = feed(&mut conversation, &[(&stream[..cut], cut == mark)]);
            let mut next = match conversation.pending() {
                Some(pending) => Conversation::resume(pending),
                None => Conversation::default(),
            };
            let mut rest = vec![];
            if cut < mark {
                rest.push((&stream[cut..mark], true));
            }
            rest.push((&stream[mark..], false));
            serials.extend(feed(&mut next, &rest).0);
            assert_eq!(serials, [1, 2], "{cut}");
        }
    }
}
