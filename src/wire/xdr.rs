//! XDR (RFC 4506) as the reference daemon reads it: big-endian words, everything padded to four
//! bytes, padding not looked at, any presence word but 0 counting as present.

use std::ffi::CStr;

/// Why a payload could not be decoded. The peer is told only that it could not; the variants are
/// for tests and for a reader of the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// The payload ended inside an item.
    Truncated,
    /// A string or array count is above the limit of its field.
    OverLimit,
    /// A union's discriminant is none of those listed.
    UnknownVariant,
}

/// Reads items from the front of a payload, borrowing from it.
#[derive(Clone, Debug)]
pub struct Decoder<'a> {
    rest: &'a [u8],
}

impl<'a> Decoder<'a> {
    /// A decoder at the first byte of `payload`.
    pub fn new(payload: &'a [u8]) -> Self {
        Decoder { rest: payload }
    }

    /// The bytes not read yet.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// The next `N` bytes, which must be a multiple of four (an opaque of fixed size).
    pub fn fixed<const N: usize>(&mut self) -> Result<&'a [u8; N], DecodeError> {
        let (head, tail) = self
            .rest
            .split_first_chunk()
            .ok_or(DecodeError::Truncated)?;
        self.rest = tail;
        Ok(head)
    }

    /// An unsigned 32-bit integer, also an enum or a presence word.
    pub fn u32(&mut self) -> Result<u32, DecodeError> {
        self.fixed().map(|bytes| u32::from_be_bytes(*bytes))
    }

    /// A signed 32-bit integer.
    pub fn i32(&mut self) -> Result<i32, DecodeError> {
        self.fixed().map(|bytes| i32::from_be_bytes(*bytes))
    }

    /// An unsigned hyper.
    pub fn u64(&mut self) -> Result<u64, DecodeError> {
        self.fixed().map(|bytes| u64::from_be_bytes(*bytes))
    }

    /// A signed hyper.
    pub fn i64(&mut self) -> Result<i64, DecodeError> {
        self.fixed().map(|bytes| i64::from_be_bytes(*bytes))
    }

    /// A double.
    pub fn f64(&mut self) -> Result<f64, DecodeError> {
        self.u64().map(f64::from_bits)
    }

    /// A string of at most `limit` bytes, cut at its first NUL: the reference daemon hands strings
    /// on as C strings, so nothing after a NUL was ever seen by anybody.
    pub fn string(&mut self, limit: u32) -> Result<&'a [u8], DecodeError> {
        let count = self.count(limit)?;
        let text = self.rest.get(..count).ok_or(DecodeError::Truncated)?;
        // A string whose padding is cut off by the end of the message does not decode.
        let padded = count
            .checked_next_multiple_of(4)
            .ok_or(DecodeError::Truncated)?;
        self.rest = self.rest.get(padded..).ok_or(DecodeError::Truncated)?;
        Ok(CStr::from_bytes_until_nul(text).map_or(text, CStr::to_bytes))
    }

    /// An optional string: a presence word, then perhaps the string.
    pub fn optional_string(&mut self, limit: u32) -> Result<Option<&'a [u8]>, DecodeError> {
        if self.u32()? == 0 {
            Ok(None)
        } else {
            self.string(limit).map(Some)
        }
    }

    /// The element count of an array of at most `limit` elements (or the byte count of a string).
    pub fn count(&mut self, limit: u32) -> Result<usize, DecodeError> {
        let count = self.u32()?;
        if count > limit {
            return Err(DecodeError::OverLimit);
        }
        usize::try_from(count).map_err(|_| DecodeError::OverLimit)
    }
}

/// Appends items to a buffer.
#[derive(Debug)]
pub struct Encoder<'a> {
    out: &'a mut Vec<u8>,
}

impl<'a> Encoder<'a> {
    /// An encoder that appends to `out`.
    pub fn new(out: &'a mut Vec<u8>) -> Self {
        Encoder { out }
    }

    /// Bytes of a fixed-size opaque; their number must be a multiple of four.
    pub fn fixed(&mut self, bytes: &[u8]) -> &mut Self {
        debug_assert!(bytes.len().is_multiple_of(4));
        self.out.extend_from_slice(bytes);
        self
    }

    /// An unsigned 32-bit integer.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.fixed(&value.to_be_bytes())
    }

    /// A signed 32-bit integer.
    pub fn i32(&mut self, value: i32) -> &mut Self {
        self.fixed(&value.to_be_bytes())
    }

    /// An unsigned hyper.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.fixed(&value.to_be_bytes())
    }

    /// A signed hyper.
    pub fn i64(&mut self, value: i64) -> &mut Self {
        self.fixed(&value.to_be_bytes())
    }

    /// A double.
    pub fn f64(&mut self, value: f64) -> &mut Self {
        self.u64(value.to_bits())
    }

    /// A string made of `parts`, one after the other.
    pub fn string_of(&mut self, parts: &[&[u8]]) -> &mut Self {
        let length = parts
            .iter()
            .map(|part| part.len())
            .fold(0usize, usize::saturating_add);
        // No string of ours comes near 4 GiB; a longer one would be cut, not wrapped.
        self.u32(u32::try_from(length).unwrap_or(u32::MAX));
        for part in parts {
            self.out.extend_from_slice(part);
        }
        let padding: &[u8] = match length % 4 {
            0 => &[],
            1 => &[0; 3],
            2 => &[0; 2],
            _ => &[0; 1],
        };
        self.out.extend_from_slice(padding);
        self
    }

    /// A string.
    pub fn string(&mut self, text: &[u8]) -> &mut Self {
        self.string_of(&[text])
    }

    /// An optional string.
    pub fn optional_string(&mut self, text: Option<&[u8]>) -> &mut Self {
        match text {
            None => self.u32(0),
            Some(text) => self.u32(1).string(text),
        }
    }

    /// How many bytes there are by now, with those that were there before.
    pub fn length(&self) -> usize {
        self.out.len()
    }

    /// The number of elements that follow. Lists of ours are far shorter than 2^32 elements.
    pub fn count(&mut self, count: usize) -> &mut Self {
        self.u32(u32::try_from(count).unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_string_is_padded_and_read_back() {
        for length in 0..9usize {
            let text = vec![b'x'; length];
            let mut out = Vec::new();
            Encoder::new(&mut out).string(&text).u32(7);
            assert_eq!(out.len() % 4, 0);
            let mut decoder = Decoder::new(&out);
            assert_eq!(decoder.string(16), Ok(&text[..]));
            assert_eq!(decoder.u32(), Ok(7));
            assert!(decoder.rest().is_empty());
        }
    }

    #[test]
    fn padding_is_not_looked_at_but_must_be_there() {
        assert_eq!(
            Decoder::new(b"\0\0\0\x01x\xff\xff\xff").string(4),
            Ok(&b"x"[..])
        );
        assert_eq!(
            Decoder::new(b"\0\0\0\x01x\xff\xff").string(4),
            Err(DecodeError::Truncated)
        );
    }

    #[test]
    fn a_string_ends_at_its_first_nul() {
        assert_eq!(Decoder::new(b"\0\0\0\x03r\0z\0").string(4), Ok(&b"r"[..]));
        assert_eq!(Decoder::new(b"\0\0\0\x01\0\0\0\0").string(4), Ok(&b""[..]));
    }

    #[test]
    fn a_count_above_its_limit_is_refused_before_the_bytes_are_looked_for() {
        assert_eq!(
            Decoder::new(b"\xff\xff\xff\xff").string(65536),
            Err(DecodeError::OverLimit)
        );
        assert_eq!(
            Decoder::new(b"\0\0\x03\xe8abcd").string(65536),
            Err(DecodeError::Truncated)
        );
    }

    #[test]
    fn any_presence_word_but_zero_is_present() {
        assert_eq!(
            Decoder::new(b"\0\0\0\x02\0\0\0\x01a\0\0\0").optional_string(4),
            Ok(Some(&b"a"[..]))
        );
        assert_eq!(Decoder::new(b"\0\0\0\0").optional_string(4), Ok(None));
    }
}
