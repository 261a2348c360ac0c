//! A frame of which reactors died again and again. Whoever sends it would take the daemon from everybody
//! else: the third time it is answered with an error without being worked on, and the log has its bytes, so
//! that the fault can be found.

use std::fmt::Write;

use crate::custody::clients::{Client, ClientId};
use crate::server::flow::{Flow, flow};
use crate::server::hall::Hall;
use crate::wire::error::{Code, Domain, Error};
use crate::wire::frame::{Header, Kind};

/// How many reactors may die of a frame.
pub const DEADLY: u8 = 2;
/// How many bytes of a frame the log has. A lock client's call has at most as many, most often far fewer.
const LOGGED: usize = 4096;

/// Whether so many deaths are enough.
pub fn is_deadly(deaths: u8) -> bool {
    deaths >= DEADLY
}

/// Answers such a frame.
pub fn refuse(
    hall: &Hall<'_>,
    id: ClientId,
    header: Header,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Flow {
    let client = hall.custody.state().client(id);
    tracing::error!(
        target: "rpc.netserverclient",
        "The daemon died {DEADLY} times of a message and refuses it: this is a fault of the program; please \
         report it with this line. It came from {}: program {:#x}, version {}, procedure {}, {:?}, serial {}, \
         status {}, and {} bytes: {}",
        client.map_or_else(|| "a client that is gone".to_owned(), Client::text),
        header.program, header.version, header.procedure, header.kind, header.serial, header.status,
        payload.len(), hexadecimal(payload)
    );
    if matches!(header.kind, Kind::Call | Kind::CallWithDescriptors) {
        let detail = format!("the lock daemon failed {DEADLY} times to carry out this call");
        Error::new(Code::InternalError, Domain::Rpc, detail).encode_reply(out, header);
    }
    flow(out)
}

fn hexadecimal(bytes: &[u8]) -> String {
    let shown = bytes.get(..LOGGED).unwrap_or(bytes);
    let mut text = String::with_capacity(shown.len().saturating_mul(2));
    for byte in shown {
        // Nothing is refused by a string.
        let _ = write!(text, "{byte:02x}");
    }
    if shown.len() < bytes.len() {
        text.push_str("...");
    }
    text
}
