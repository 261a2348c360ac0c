//! The C daemon's state document: any bytes give a state or a reason; a state that was read and
//! can be written is read again as the same.

use virtlockd::custody::descriptor::Saved;
use virtlockd::custody::servers::Service;
use virtlockd::custody::state::State;
use virtlockd::restart::libvirt_json;

/// The process that the document must be for.
const PID: u32 = 1;

fn read(document: &[u8]) -> Option<State<Saved>> {
    let socket = |service: Service| service.name().as_bytes().to_vec();
    libvirt_json::read(document, PID, socket).ok()
}

pub fn run(data: &[u8]) {
    let Some(state) = read(data) else { return };
    let Ok(written) = libvirt_json::write(&state, PID) else {
        return;
    };
    let again = read(&written).expect("our own document is read");
    let written_again = libvirt_json::write(&again, PID).expect("what was written is written");
    assert!(written == written_again, "{again:?} is not {state:?}");
}
