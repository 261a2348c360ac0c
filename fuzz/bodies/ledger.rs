//! The ledger: any bytes give a state or a reason; a state that was read is written anew and read
//! again as the same.
//!
//! Input: the events. They are read as they are and behind a right header.

use virtlockd::restart::ledger::{self, Ledger};
use virtlockd::restart::state::State;

/// Where the header says how many bytes of events follow.
const LENGTH: std::ops::Range<usize> = 16..24;

pub fn run(data: &[u8]) {
    replay(data);
    let empty = Ledger::new().expect("a ledger");
    let mut content = empty.content().to_vec();
    content[LENGTH].copy_from_slice(&(data.len() as u64).to_le_bytes());
    content.extend_from_slice(data);
    replay(&content);
}

fn replay(content: &[u8]) {
    match ledger::replay(content) {
        Ok(state) => {
            let mut anew = Ledger::of(&state).expect("a ledger");
            let state = in_order(state);
            let again = ledger::replay(anew.content()).expect("our own ledger replays");
            assert_eq!(in_order(again), state);
            anew.close();
            let loaded = ledger::load(anew.descriptor().expect("a memory file"))
                .expect("our own ledger loads");
            assert_eq!(in_order(loaded), state);
        }
        Err(reason) => assert!(!reason.to_string().is_empty()),
    }
}

/// A state says nothing by the order of what it lists.
fn in_order(mut state: State) -> State {
    state
        .resources
        .sort_by(|one, two| (&one.lockspace, &one.name).cmp(&(&two.lockspace, &two.name)));
    for resource in &mut state.resources {
        resource.holders.sort_by_key(|(owner, _)| owner.pid);
    }
    state.fences.sort_by_key(|fence| fence.pid);
    state.watches.sort_by_key(|watch| watch.pid);
    state.clients.sort_by_key(|client| client.descriptor);
    state
}
