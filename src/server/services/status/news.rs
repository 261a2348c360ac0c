//! What happened, as messages to one who subscribed.

use crate::custody::news::{News, Notice, What};
use crate::host::clock;
use crate::locks::table::Mode;
use crate::wire::status::{Happened, Key, Kind};

/// So many notices are looked at at a time,
const MOST_AT_A_TIME: u64 = 256;
/// and when the messages have so many bytes there is no further one.
const ENOUGH: usize = 16 * 1024;

/// Appends messages about what happened from number `from` on, of the kinds whose bits are in `wanted`; how
/// many happened of which nothing is known any more, and the number to go on from.
pub fn tell(news: &News, from: u64, wanted: u32, out: &mut Vec<u8>) -> (u64, u64) {
    let missed = news.first().saturating_sub(from);
    if missed > 0 {
        let missing = Happened {
            kind: Kind::Missed,
            at: clock::wall_ms(),
            count: missed,
            owner: None,
            lockspace: b"",
            name: b"",
            mode: 0,
            text: b"",
        };
        missing.encode(out);
    }
    let mut next = from.max(news.first());
    let end = news.next().min(next.saturating_add(MOST_AT_A_TIME));
    while next < end && out.len() < ENOUGH {
        if let Some(notice) = news.get(next)
            && wanted & kind(notice.what).bit() != 0
        {
            happened(notice).encode(out);
        }
        next = next.saturating_add(1);
    }
    (missed, next)
}

fn kind(what: What) -> Kind {
    match what {
        What::Registered => Kind::Registered,
        What::Granted => Kind::Granted,
        What::Released => Kind::Released,
        What::Refused => Kind::Refused,
        What::Fenced => Kind::Fenced,
        What::Killed => Kind::Killed,
        What::Died => Kind::Died,
        What::Upgraded => Kind::Upgraded,
        What::Recovered => Kind::Recovered,
    }
}

fn happened(notice: &Notice) -> Happened<'_> {
    let owner = notice.owner.as_ref().map(|owner| {
        let key = owner.key();
        let key = Key {
            pid: key.pid,
            uuid: key.uuid,
        };
        (key, owner.id, &*owner.name)
    });
    Happened {
        kind: kind(notice.what),
        at: notice.at,
        count: 1,
        owner,
        lockspace: &notice.lockspace,
        name: &notice.name,
        mode: match notice.mode {
            None => 0,
            Some(Mode::Exclusive) => 1,
            Some(Mode::Shared) => 2,
        },
        text: &notice.text,
    }
}
