//! The status program, which is this daemon's own: what is held and by whom, what happened how often, and
//! what happens. It is spoken on the admin socket, and `src/dist/status-protocol.md` describes it.

mod answer;
mod call;
mod happened;
mod program;

pub use answer::{
    CONNECTED, Counted, Daemon, FENCED, Holder, Owner, Resource, UNREACHABLE, UNSEEN, WATCHED,
    decode_list, decode_next, encode_next,
};
pub use call::{Call, Cursor, Key, decode};
pub use happened::{Happened, Kind};
pub use program::{HAPPENED, PROGRAM, Procedure, STRING_LIMIT, VERSION};
