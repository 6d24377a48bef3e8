//! Addresses that mean the same on every rank, and the size of what they point into.

use std::ops::Add;

/// Alignment of every region that [`HeapLayout::region`] places, in bytes: a cache line and an AVX-512 vector.
pub const REGION_ALIGN: usize = 64;

/// Alignment of the start of a heap's payload, and unit in which heaps are allocated, in bytes.
pub const HEAP_ALIGN: usize = 4096;

/// A byte offset into the payload of a heap, the same on every rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SymOffset(pub usize);

/// Index of a 64-bit signal or counter of a heap, the same on every rank.
///
/// Words are apart from the payload, so nothing that reads or writes payload can race with a signal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SymWord(pub usize);

impl Add<usize> for SymOffset {
    type Output = Self;

    /// The offset `bytes` further on.
    fn add(self, bytes: usize) -> Self {
        Self(self.0 + bytes)
    }
}

impl Add<usize> for SymWord {
    type Output = Self;

    /// The word `words` further on.
    fn add(self, words: usize) -> Self {
        Self(self.0 + words)
    }
}

/// What one rank contributes to a heap. All ranks contribute the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct HeapSize {
    /// Bytes of payload.
    pub bytes: usize,
    /// Signals and counters, 8 bytes each.
    pub words: usize,
}

impl HeapSize {
    /// Bytes that each rank allocates: payload and words, each rounded up, in whole units of [`HEAP_ALIGN`] and
    /// at least one. Saturates at `usize::MAX`, which no allocator grants.
    pub fn required_bytes(self) -> usize {
        let words = self.words.checked_mul(size_of::<u64>());
        let total = self.words_start().zip(words).and_then(|(start, words)| start.checked_add(words));
        total.and_then(|total| total.max(1).checked_next_multiple_of(HEAP_ALIGN)).unwrap_or(usize::MAX)
    }

    /// Bytes between the start of the memory and the first word; `None` if the payload overflows.
    pub(crate) fn words_start(self) -> Option<usize> {
        self.bytes.checked_next_multiple_of(REGION_ALIGN)
    }
}

impl std::fmt::Display for HeapSize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes and {} words", self.bytes, self.words)
    }
}

/// Lays regions of payload and runs of words one after the other; the result is the size to allocate.
///
/// ```
/// use ep_transport::HeapLayout;
///
/// let mut layout = HeapLayout::default();
/// let rows = layout.region(100);
/// let scales = layout.region(8);
/// let arrived = layout.words(4);
/// assert_eq!((rows.0, scales.0, arrived.0), (0, 128, 0));
/// assert_eq!((layout.size().bytes, layout.size().words), (136, 4));
/// ```
#[derive(Clone, Debug, Default)]
pub struct HeapLayout {
    size: HeapSize,
}

impl HeapLayout {
    /// Reserves `bytes` of payload, aligned to [`REGION_ALIGN`]. A layout beyond the address space saturates and
    /// is refused when it is allocated.
    pub fn region(&mut self, bytes: usize) -> SymOffset {
        let start = self.size.bytes.checked_next_multiple_of(REGION_ALIGN).unwrap_or(usize::MAX);
        self.size.bytes = start.saturating_add(bytes);
        SymOffset(start)
    }

    /// Reserves `count` consecutive words.
    pub fn words(&mut self, count: usize) -> SymWord {
        let start = self.size.words;
        self.size.words = start.saturating_add(count);
        SymWord(start)
    }

    /// The size laid out so far.
    pub fn size(&self) -> HeapSize {
        self.size
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(0, 0, 4096)]
    #[case(1, 0, 4096)]
    #[case(4096, 0, 4096)]
    #[case(4096, 1, 8192)]
    #[case(4032, 8, 4096)]
    #[case(4033, 8, 8192)]
    #[case(usize::MAX, 0, usize::MAX)]
    #[case(0, usize::MAX, usize::MAX)]
    fn required_bytes(#[case] bytes: usize, #[case] words: usize, #[case] want: usize) {
        assert_eq!(HeapSize { bytes, words }.required_bytes(), want);
    }

    #[test]
    fn an_overflowing_layout_saturates() {
        let mut layout = HeapLayout::default();
        layout.region(usize::MAX - 3);
        layout.region(100);
        assert_eq!(layout.size().required_bytes(), usize::MAX);
    }
}
