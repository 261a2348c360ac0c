//! Who may have what, on two hosts.

use crate::pair::Kind;
use crate::story;

#[test]
fn what_one_host_has_alone_the_other_is_refused_and_what_is_shared_both_have() {
    story(|hosts| {
        let (a, b) = (&hosts.a, &hosts.b);
        for host in [a, b] {
            host.start_daemon(Kind::Ours);
        }
        for lease in [hosts.disk("disk")] {
            let (one, other) = (a.guest("one"), b.guest("other"));
            one.take(&lease).granted();
            other.take(&lease).held();
            one.give(&lease).granted();
            other.take(&lease).granted();
        }
    });
}
