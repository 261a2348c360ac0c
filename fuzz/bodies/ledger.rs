//! The ledger: any bytes give a state or a reason; a state that was read is written anew and read
//! again as the same, also in a ledger that said something else before.
//!
//! Input: the events. They are read as they are and behind a right header, of this format and of the
//! ones before.

use virtlockd::custody::descriptor::Saved;
use virtlockd::custody::event::Event;
use virtlockd::custody::ledger::{self, Ledger};
use virtlockd::custody::state::State;

/// Where the header says in which format it is.
const VERSION: std::ops::Range<usize> = 8..12;
/// Where the header says how many bytes of events follow; up to format 2, when it was shorter.
const LENGTH: std::ops::Range<usize> = 40..48;
const OLD_LENGTH: std::ops::Range<usize> = 16..24;
const OLD_HEADER: usize = 32;
/// Format 3 had no counts in its header, and says itself where its events begin.
const HEADER_OF_3: usize = 64;
const START: std::ops::Range<usize> = 32..40;

pub fn run(data: &[u8]) {
    replay(data);
    let empty = Ledger::new().expect("a ledger");
    let length = (data.len() as u64).to_le_bytes();
    let mut content = empty.content().to_vec();
    content[LENGTH].copy_from_slice(&length);
    content.extend_from_slice(data);
    replay(&content);
    for version in 1..ledger::VERSION {
        let is_old = version < 3;
        let header = if is_old { OLD_HEADER } else { HEADER_OF_3 };
        let mut content = empty.content()[..header].to_vec();
        content[VERSION].copy_from_slice(&version.to_le_bytes());
        if !is_old {
            content[START].copy_from_slice(&(header as u64).to_le_bytes());
        }
        content[if is_old { OLD_LENGTH } else { LENGTH }].copy_from_slice(&length);
        content.extend_from_slice(data);
        replay(&content);
    }
}

fn replay(content: &[u8]) {
    match ledger::replay(content) {
        Ok(state) => {
            let mut anew = Ledger::new().expect("a ledger");
            let said = lines(&state);
            anew.rewrite(state.entries()).expect("room in the ledger");
            let again = ledger::replay(anew.content()).expect("our own ledger replays");
            assert_eq!(lines(&again), said);
            // In front of itself or behind, and with something more to say in between.
            anew.append(&Event::Lockspace(b"/in/between"))
                .expect("room in the ledger");
            anew.rewrite(again.entries()).expect("room in the ledger");
            anew.close();
            let loaded = ledger::load(anew.descriptor().expect("a memory file"))
                .expect("our own ledger loads");
            assert_eq!(lines(&loaded), said);
        }
        Err(reason) => assert!(!reason.to_string().is_empty()),
    }
}

/// All that a state says. It says nothing by the order of what it lists.
fn lines(state: &State<Saved>) -> Vec<String> {
    let mut lines: Vec<String> = state.entries().map(|event| format!("{event:?}")).collect();
    lines.sort_unstable();
    lines
}
