//! The admin program: what virt-admin asks and steers.

use super::conversation::Flow;
use super::daemon::Daemon;
use super::dispatch;
use crate::wire::frame::Header;

/// Carries out a call of the connection at `place`.
pub fn dispatch(
    _daemon: &mut Daemon,
    _place: usize,
    header: Header,
    _payload: &[u8],
    out: &mut Vec<u8>,
) -> Flow {
    dispatch::unknown_procedure(header.procedure).encode_reply(out, header);
    dispatch::flow(out)
}
