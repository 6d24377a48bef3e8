//! Copies that leave the caches alone.

/// A cache line, in bytes.
const LINE: usize = 64;

/// Copies `from` to `to` past the caches (by non-temporal stores, where there are any): faster than a plain copy if
/// the lines of `to` are in no cache and will have left it before they are read, and slower otherwise. An ordinary
/// store reads a line before it writes it; this does not.
///
/// Whoever is handed the memory by a signal of a [`Heap`](crate::Heap) sees what was copied; without one, other
/// threads may not.
///
/// # Panics
/// If `from` and `to` differ in length.
pub fn copy_streaming(to: &mut [u8], from: &[u8]) {
    assert_eq!(from.len(), to.len(), "a copy has the length of its source");
    // Streaming a part of a line costs more than a plain store of it.
    let head = to.as_ptr().align_offset(LINE).min(to.len());
    let (to_head, to) = to.split_at_mut(head);
    let (from_head, from) = from.split_at(head);
    to_head.copy_from_slice(from_head);
    let (lines, to_tail) = to.as_chunks_mut::<LINE>();
    let (from_lines, from_tail) = from.as_chunks::<LINE>();
    for (to, from) in lines.iter_mut().zip(from_lines) {
        copy_line(to, from);
    }
    to_tail.copy_from_slice(from_tail);
}

/// Copies a line to `to`, which starts at one.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn copy_line(to: &mut [u8; LINE], from: &[u8; LINE]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};

    let (to, from) = (to.as_mut_ptr().cast::<__m128i>(), from.as_ptr().cast::<__m128i>());
    // SAFETY: the instructions are part of SSE2, which every x86-64 has; the four vectors are those of the two arrays,
    // and `to` is aligned to a line. What non-temporal stores leave open is their order, which `handshake::set`
    // settles before another thread is told of them.
    unsafe {
        let line = [0, 1, 2, 3].map(|i| _mm_loadu_si128(from.add(i)));
        for (i, vector) in line.into_iter().enumerate() {
            _mm_stream_si128(to.add(i), vector);
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn copy_line(to: &mut [u8; LINE], from: &[u8; LINE]) {
    *to = *from;
}

#[cfg(test)]
mod tests {
    use rand::Rng;

    use super::*;

    #[test]
    fn it_copies_every_byte_and_no_more() {
        let seed: u64 = rand::random();
        println!("seed {seed}");
        let mut rng = rand_pcg::Pcg64::new(seed.into(), 1);
        let source: Vec<u8> = (0..1000).map(|_| rng.random_range(0..128)).collect();
        for _ in 0..2000 {
            let len = rng.random_range(0..=400);
            let (from, at) = (rng.random_range(0..500), rng.random_range(0..100));
            let mut target = vec![0xff; 600];
            copy_streaming(&mut target[at..at + len], &source[from..from + len]);
            assert_eq!(target[at..at + len], source[from..from + len], "{len} bytes at {at}");
            let untouched = target[..at].iter().chain(&target[at + len..]);
            assert!(untouched.into_iter().all(|&b| b == 0xff), "{len} bytes at {at}");
        }
    }
}
