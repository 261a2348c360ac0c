//! SHA-256 (FIPS 180-4), by which libvirt names the leases of disks.

/// The first 32 bits of the fractional parts of the cube roots of the first 64 primes.
const ROUNDS: [u32; 64] = [
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
];

/// The same of the square roots of the first 8 primes.
const START: [u32; 8] = [
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
];

/// The sum of these bytes.
pub fn sum(bytes: &[u8]) -> [u8; 32] {
    let mut padded = bytes.to_vec();
    padded.push(0x80);
    while padded.len() % 64 != 56 {
        padded.push(0);
    }
    let bits = (bytes.len() as u64).wrapping_mul(8);
    padded.extend(bits.to_be_bytes());
    let mut state = START;
    for block in padded.as_chunks::<64>().0 {
        state = after(state, block);
    }
    let mut sum = [0; 32];
    for (place, word) in sum.as_chunks_mut::<4>().0.iter_mut().zip(state) {
        *place = word.to_be_bytes();
    }
    sum
}

/// The state behind one more block.
fn after(before: [u32; 8], block: &[u8; 64]) -> [u32; 8] {
    let mut words: Vec<u32> = block
        .as_chunks()
        .0
        .iter()
        .map(|it| u32::from_be_bytes(*it))
        .collect();
    while words.len() < ROUNDS.len() {
        let at = |back: usize| {
            let place = words.len().checked_sub(back);
            place
                .and_then(|place| words.get(place))
                .copied()
                .unwrap_or(0)
        };
        let small = |word: u32, [one, two]: [u32; 2], shift: u32| {
            word.rotate_right(one) ^ word.rotate_right(two) ^ (word >> shift)
        };
        let next = at(16)
            .wrapping_add(small(at(15), [7, 18], 3))
            .wrapping_add(at(7))
            .wrapping_add(small(at(2), [17, 19], 10));
        words.push(next);
    }
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = before;
    let large = |word: u32, [one, two, three]: [u32; 3]| {
        word.rotate_right(one) ^ word.rotate_right(two) ^ word.rotate_right(three)
    };
    for (word, round) in words.iter().zip(ROUNDS) {
        let first = h
            .wrapping_add(large(e, [6, 11, 25]))
            .wrapping_add((e & f) ^ (!e & g))
            .wrapping_add(round)
            .wrapping_add(*word);
        let second = large(a, [2, 13, 22]).wrapping_add((a & b) ^ (a & c) ^ (b & c));
        (h, g, f, e) = (g, f, e, d.wrapping_add(first));
        (d, c, b, a) = (c, b, a, first.wrapping_add(second));
    }
    let worked = [a, b, c, d, e, f, g, h];
    let mut state = before;
    for (word, more) in state.iter_mut().zip(worked) {
        *word = word.wrapping_add(more);
    }
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hexadecimal(bytes: &[u8]) -> String {
        sum(bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    #[test]
    fn the_sums_are_those_of_the_standard() {
        for (text, expected) in [
            (
                &b""[..],
                "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            ),
            (
                b"abc",
                "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            ),
            (
                b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
                "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
            ),
        ] {
            assert_eq!(hexadecimal(text), expected);
        }
        let million = vec![b'a'; 1_000_000];
        let expected = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0";
        assert_eq!(hexadecimal(&million), expected);
    }
}
