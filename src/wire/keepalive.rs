//! Keepalive: a PING is answered by the same 28 bytes whatever it carries.
//! The daemon never sends a PING itself.

use super::frame::{self, Header, Kind};

/// The program number, ASCII `keep`.
pub const PROGRAM: u32 = 0x6b65_6570;
/// The program's version.
pub const VERSION: u32 = 1;
/// Asks for a [`PONG`].
pub const PING: i32 = 1;
/// The answer.
pub const PONG: i32 = 2;

/// Whether a frame belongs to this program: a call or another version does not.
pub fn is_ours(header: &Header) -> bool {
    header.program == PROGRAM && header.version == VERSION && header.kind == Kind::Message
}

/// Appends a PONG to `out`.
pub fn pong(out: &mut Vec<u8>) {
    let header = Header {
        program: PROGRAM,
        version: VERSION,
        procedure: PONG,
        kind: Kind::Message,
        serial: 0,
        status: frame::STATUS_OK,
    };
    frame::encode(out, header, |_| ());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pong_is_these_28_bytes() {
        let mut out = Vec::new();
        pong(&mut out);
        let expected = b"\0\0\0\x1ckeep\0\0\0\x01\0\0\0\x02\0\0\0\x02\0\0\0\0\0\0\0\0";
        assert_eq!(out, expected);
    }
}
