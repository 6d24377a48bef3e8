//! Packed weights. Packing happens once, at load.

use std::fmt;

use half::bf16;

use crate::aligned::{Aligned, Slab};
use crate::panel::{Columns, PANEL, PackedShape, PanelPairs, for_each_column, fp8_offset};
use crate::scale::{ColumnTerms, PackedScale, gate_up_shape};
use crate::tuning::WeightKind;
use crate::{Fp8Kind, GemmError, WeightScale};

/// A row-major weight `[n, k]` as a checkpoint stores it: `y = x · Wᵀ`.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a, T> {
    /// `n * k` values.
    pub values: &'a [T],
    /// Rows, which are output features.
    pub n: usize,
    /// Columns, which are input features.
    pub k: usize,
}

impl<T> Weight<'_, T> {
    pub(crate) fn check(&self) -> Result<(), GemmError> {
        let &Weight { n, k, .. } = self;
        if n == 0 || k == 0 {
            return Err(GemmError::EmptyWeight { n, k });
        }
        // A product that overflows cannot be the length of a slice either.
        if n.checked_mul(k) != Some(self.values.len()) {
            return Err(GemmError::WeightLength { n, k, found: self.values.len() });
        }
        Ok(())
    }
}

/// A row-major fp8 weight `[n, k]` with its scales.
#[derive(Clone, Copy, Debug)]
pub struct Fp8Weight<'a> {
    /// The codes.
    pub codes: Weight<'a, u8>,
    /// The encoding of the codes.
    pub kind: Fp8Kind,
    /// `w = code * scale`.
    pub scale: &'a WeightScale,
}

/// The weights that [`GroupedGemm`](crate::GroupedGemm) multiplies with. The set is closed.
pub trait PackedWeight: Sync + sealed::Sealed {
    /// How it is stored.
    const KIND: WeightKind;

    /// Shape and column order.
    fn shape(&self) -> &PackedShape;
    /// Bytes of memory held: weights with their padding, scales, and bias.
    fn bytes(&self) -> usize;

    /// The same with a bias `[N]`, gate rows before up rows for a pair, added to the scaled sums.
    ///
    /// # Errors
    /// A bias that is not `N` long.
    fn with_bias(mut self, bias: &[f32]) -> Result<Self, GemmError>
    where
        Self: Sized,
    {
        let shape = *self.shape();
        self.terms_mut().set_bias(&shape, bias)?;
        Ok(self)
    }
}

pub(crate) mod sealed {
    use crate::panel::PanelPairs;
    use crate::scale::ColumnTerms;

    /// What the driver needs of a weight.
    pub trait Sealed {
        #[expect(private_interfaces, reason = "a sealed trait is not callable from outside")]
        fn panel(&self, panel: usize) -> PanelPairs<'_>;
        #[expect(private_interfaces, reason = "a sealed trait is not callable from outside")]
        fn terms(&self) -> &ColumnTerms;
        #[expect(private_interfaces, reason = "a sealed trait is not callable from outside")]
        fn terms_mut(&mut self) -> &mut ColumnTerms;
        /// Operand words of a row of activations for this weight.
        fn row_words(&self) -> usize;
    }
}

/// A bf16 weight in K-pair panels of 64 columns, `[ceil(N / 64)][ceil(K / 2)][64][2]`.
pub struct PackedBf16 {
    shape: PackedShape,
    words: Aligned<u32>,
    terms: ColumnTerms,
}

impl PackedBf16 {
    /// Packs a weight `[N, K]`.
    ///
    /// # Errors
    /// An empty weight, or a slice that is not `n * k` long.
    pub fn pack(weight: Weight<'_, bf16>) -> Result<Self, GemmError> {
        Self::pack_in(None, weight)
    }

    pub(crate) fn pack_in(slab: Option<&Slab>, weight: Weight<'_, bf16>) -> Result<Self, GemmError> {
        weight.check()?;
        let shape = PackedShape { n: weight.n, k: weight.k, columns: Columns::Plain };
        Ok(Self::place(slab, shape, &[weight.values]))
    }

    /// Packs gate and up, both `[I, K]`, so that their product is formed on the tile.
    ///
    /// # Errors
    /// As [`pack`](Self::pack), or two different shapes.
    pub fn pack_gate_up(gate: Weight<'_, bf16>, up: Weight<'_, bf16>) -> Result<Self, GemmError> {
        Self::pack_gate_up_in(None, [gate, up])
    }

    pub(crate) fn pack_gate_up_in(
        slab: Option<&Slab>,
        [gate, up]: [Weight<'_, bf16>; 2],
    ) -> Result<Self, GemmError> {
        check_pair(&gate, &up)?;
        Ok(Self::place(slab, gate_up_shape(gate.n, gate.k), &[gate.values, up.values]))
    }

    /// What a weight of that shape takes of a slab.
    pub(crate) fn slab_bytes(shape: &PackedShape) -> usize {
        Slab::bytes_for::<u32>(shape.panels() * shape.pairs() * PANEL)
    }

    /// The weight as it was packed, row-major `[N, K]`; gate rows before up rows for a pair.
    pub fn unpack(&self) -> Vec<bf16> {
        let mut values = vec![bf16::ZERO; self.shape.n * self.shape.k];
        let (words, k) = (self.words.as_slice(), self.shape.k);
        let panel_len = self.shape.pairs() * PANEL;
        for_each_column(&self.shape, |row, panel, column| {
            let column = words[panel * panel_len + column..].iter().step_by(PANEL);
            for (pair, &word) in values[row * k..][..k].chunks_mut(2).zip(column) {
                for (parity, value) in pair.iter_mut().enumerate() {
                    *value = bf16::from_bits((word >> (16 * parity)) as u16);
                }
            }
        });
        values
    }

    fn place(slab: Option<&Slab>, shape: PackedShape, parts: &[&[bf16]]) -> Self {
        let mut words = Aligned::zeroed_in(slab, shape.panels() * shape.pairs() * PANEL);
        let (places, panel_len) = (words.as_mut_slice(), shape.pairs() * PANEL);
        for_each_column(&shape, |row, panel, column| {
            let places = places[panel * panel_len + column..].iter_mut().step_by(PANEL);
            for (place, pair) in places.zip(row_of(parts, row, shape.k).chunks(2)) {
                *place = pair_word(pair);
            }
        });
        PackedBf16 { shape, words, terms: ColumnTerms::default() }
    }
}

/// An fp8 weight in the same panels, one byte per weight, with its scales.
///
/// Inside each 64-byte line the codes are permuted so that decoding in registers gives the pair
/// order of [`PackedBf16`]; [`unpack`](Self::unpack) undoes it.
pub struct PackedFp8 {
    shape: PackedShape,
    codes: Aligned<u8>,
    kind: Fp8Kind,
    terms: ColumnTerms,
}

impl PackedFp8 {
    /// Packs a weight `[N, K]`.
    ///
    /// # Errors
    /// An empty weight, codes that are not `n * k` long, or a scale of the wrong size.
    pub fn pack(weight: Fp8Weight<'_>) -> Result<Self, GemmError> {
        Self::pack_in(None, weight)
    }

    pub(crate) fn pack_in(slab: Option<&Slab>, weight: Fp8Weight<'_>) -> Result<Self, GemmError> {
        weight.check()?;
        let shape = PackedShape { n: weight.codes.n, k: weight.codes.k, columns: Columns::Plain };
        Ok(Self::place(slab, shape, &[&weight]))
    }

    /// Packs gate and up, both `[I, K]`, so that their product is formed on the tile. Each keeps its
    /// own scales, so I need not be a multiple of 128.
    ///
    /// # Errors
    /// As [`pack`](Self::pack), or different shapes, encodings or scale granularities.
    pub fn pack_gate_up(gate: Fp8Weight<'_>, up: Fp8Weight<'_>) -> Result<Self, GemmError> {
        Self::pack_gate_up_in(None, [gate, up])
    }

    pub(crate) fn pack_gate_up_in(
        slab: Option<&Slab>,
        [gate, up]: [Fp8Weight<'_>; 2],
    ) -> Result<Self, GemmError> {
        gate.check()?;
        up.check()?;
        check_pair(&gate.codes, &up.codes)?;
        let describe = |w: &Fp8Weight<'_>| format!("{:?} with {}", w.kind, w.scale.granularity());
        if describe(&gate) != describe(&up) {
            return Err(GemmError::GateUpMismatch { gate: describe(&gate), up: describe(&up) });
        }
        Ok(Self::place(slab, gate_up_shape(gate.codes.n, gate.codes.k), &[&gate, &up]))
    }

    /// What a weight of that shape takes of a slab.
    pub(crate) fn slab_bytes(shape: &PackedShape) -> usize {
        Slab::bytes_for::<u8>(shape.panels() * shape.pairs() * 2 * PANEL)
    }

    /// The codes as they were packed, row-major `[N, K]`; gate rows before up rows for a pair.
    pub fn unpack(&self) -> Vec<u8> {
        let mut codes = vec![0; self.shape.n * self.shape.k];
        let packed = self.codes.as_slice();
        let (k, panel_len) = (self.shape.k, self.shape.pairs() * 2 * PANEL);
        for_each_column(&self.shape, |row, panel, column| {
            let lines = packed[panel * panel_len..][..panel_len].chunks(2 * PANEL);
            for (pair, line) in codes[row * k..][..k].chunks_mut(2).zip(lines) {
                let len = pair.len();
                pair.copy_from_slice(&line[fp8_offset(column)..][..len]);
            }
        });
        codes
    }

    /// The encoding of the codes.
    pub fn kind(&self) -> Fp8Kind {
        self.kind
    }

    fn place(slab: Option<&Slab>, shape: PackedShape, parts: &[&Fp8Weight<'_>]) -> Self {
        let mut codes = Aligned::zeroed_in(slab, shape.panels() * shape.pairs() * 2 * PANEL);
        let (places, panel_len) = (codes.as_mut_slice(), shape.pairs() * 2 * PANEL);
        let rows: Vec<_> = parts.iter().map(|part| part.codes.values).collect();
        let scales: Vec<_> = parts.iter().map(|part| part.scale).collect();
        for_each_column(&shape, |row, panel, column| {
            let lines = places[panel * panel_len..][..panel_len].chunks_mut(2 * PANEL);
            for (line, pair) in lines.zip(row_of(&rows, row, shape.k).chunks(2)) {
                line[fp8_offset(column)..][..pair.len()].copy_from_slice(pair);
            }
        });
        let terms = ColumnTerms::scaled(PackedScale::pack(&shape, &scales));
        PackedFp8 { shape, codes, kind: parts[0].kind, terms }
    }
}

impl Fp8Weight<'_> {
    fn check(&self) -> Result<(), GemmError> {
        self.codes.check()?;
        self.scale.check(self.codes.n, self.codes.k)
    }
}

impl PackedWeight for PackedBf16 {
    const KIND: WeightKind = WeightKind::Bf16;

    fn shape(&self) -> &PackedShape {
        &self.shape
    }
    fn bytes(&self) -> usize {
        size_of_val(self.words.as_slice()) + self.terms.bytes()
    }
}

impl sealed::Sealed for PackedBf16 {
    #[expect(private_interfaces, reason = "a sealed trait is not callable from outside")]
    fn panel(&self, panel: usize) -> PanelPairs<'_> {
        let len = self.shape.pairs() * PANEL;
        PanelPairs::Bf16(&self.words.as_slice()[panel * len..][..len])
    }
    #[expect(private_interfaces, reason = "a sealed trait is not callable from outside")]
    fn terms(&self) -> &ColumnTerms {
        &self.terms
    }
    #[expect(private_interfaces, reason = "a sealed trait is not callable from outside")]
    fn terms_mut(&mut self) -> &mut ColumnTerms {
        &mut self.terms
    }
    fn row_words(&self) -> usize {
        self.shape.pairs()
    }
}

impl PackedWeight for PackedFp8 {
    const KIND: WeightKind = WeightKind::Fp8;

    fn shape(&self) -> &PackedShape {
        &self.shape
    }
    fn bytes(&self) -> usize {
        self.codes.as_slice().len() + self.terms.bytes()
    }
}

impl sealed::Sealed for PackedFp8 {
    #[expect(private_interfaces, reason = "a sealed trait is not callable from outside")]
    fn panel(&self, panel: usize) -> PanelPairs<'_> {
        let len = self.shape.pairs() * 2 * PANEL;
        PanelPairs::Fp8 { codes: &self.codes.as_slice()[panel * len..][..len], kind: self.kind }
    }
    #[expect(private_interfaces, reason = "a sealed trait is not callable from outside")]
    fn terms(&self) -> &ColumnTerms {
        &self.terms
    }
    #[expect(private_interfaces, reason = "a sealed trait is not callable from outside")]
    fn terms_mut(&mut self) -> &mut ColumnTerms {
        &mut self.terms
    }
    fn row_words(&self) -> usize {
        self.shape.pairs()
    }
}

impl fmt::Debug for PackedBf16 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackedBf16({})", self.shape)
    }
}

impl fmt::Debug for PackedFp8 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackedFp8({}, {:?})", self.shape, self.kind)
    }
}

/// Row `row` of the parts stacked on each other, which have equal sizes.
pub(crate) fn row_of<'a, T>(parts: &[&'a [T]], row: usize, k: usize) -> &'a [T] {
    let part_rows = parts[0].len() / k;
    &parts[row / part_rows][row % part_rows * k..][..k]
}

/// One or two neighbours of K as an operand word of the kernels, the even K in the low half.
pub(crate) fn pair_word(pair: &[bf16]) -> u32 {
    let odd = pair.get(1).map_or(0, |value| value.to_bits());
    u32::from(pair[0].to_bits()) | u32::from(odd) << 16
}

pub(crate) fn check_pair<T>(gate: &Weight<'_, T>, up: &Weight<'_, T>) -> Result<(), GemmError> {
    gate.check()?;
    up.check()?;
    if (gate.n, gate.k) == (up.n, up.k) {
        return Ok(());
    }
    let describe = |w: &Weight<'_, T>| format!("[{}, {}]", w.n, w.k);
    Err(GemmError::GateUpMismatch { gate: describe(gate), up: describe(up) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, RngCore, SeedableRng};
    use rand_pcg::Pcg64Mcg;
    use rstest::rstest;

    #[rstest]
    fn packing_loses_nothing(
        #[values(1, 31, 32, 64, 100, 129)] n: usize,
        #[values(1, 2, 7, 64, 129)] k: usize,
    ) {
        let seed = rand::random();
        println!("seed {seed}");
        let mut rng = Pcg64Mcg::seed_from_u64(seed);
        let mut codes = vec![0u8; 2 * n * k];
        rng.fill_bytes(&mut codes);
        let values: Vec<bf16> = codes.iter().map(|_| bf16::from_bits(rng.random())).collect();
        let bits = |values: &[bf16]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        let weight = |part: usize| Weight { values: &values[part * n * k..][..n * k], n, k };
        let plain = PackedBf16::pack(weight(0)).unwrap();
        assert_eq!(bits(&plain.unpack()), bits(&values[..n * k]));
        let pair = PackedBf16::pack_gate_up(weight(0), weight(1)).unwrap();
        assert_eq!(bits(&pair.unpack()), bits(&values));

        let scale = WeightScale::PerTensor(1.0);
        let weight = |part: usize| Fp8Weight {
            codes: Weight { values: &codes[part * n * k..][..n * k], n, k },
            kind: Fp8Kind::E4M3Fn,
            scale: &scale,
        };
        let plain = PackedFp8::pack(weight(0)).unwrap();
        assert_eq!(plain.unpack(), codes[..n * k]);
        let pair = PackedFp8::pack_gate_up(weight(0), weight(1)).unwrap();
        assert_eq!(pair.unpack(), codes);
    }

    #[test]
    fn fp8_stays_fp8_in_memory() {
        let (n, k) = (256, 512);
        let codes = vec![0u8; n * k];
        let scale = WeightScale::Block128 { scales: vec![1.0; 2 * 4] };
        let codes = Weight { values: &codes, n, k };
        let packed = PackedFp8::pack(Fp8Weight { codes, kind: Fp8Kind::E4M3Fn, scale: &scale }).unwrap();
        assert!(packed.bytes() <= n * k + n * k / 100, "{} bytes", packed.bytes());
    }

    #[test]
    fn wrong_sizes_are_refused_with_their_values() {
        let codes = [0u8; 12];
        let weight =
            |n, k, scale| Fp8Weight { codes: Weight { values: &codes, n, k }, kind: Fp8Kind::E4M3Fn, scale };
        let refused = |w| PackedFp8::pack(w).unwrap_err();
        let one = WeightScale::PerTensor(1.0);
        let channel = WeightScale::PerChannel(vec![1.0; 3]);
        let block = WeightScale::Block128 { scales: vec![1.0; 2] };
        assert_eq!(refused(weight(3, 5, &one)), GemmError::WeightLength { n: 3, k: 5, found: 12 });
        assert_eq!(
            refused(weight(usize::MAX, 2, &one)),
            GemmError::WeightLength { n: usize::MAX, k: 2, found: 12 }
        );
        assert_eq!(refused(weight(0, 5, &one)), GemmError::EmptyWeight { n: 0, k: 5 });
        let what = "per-channel weight scale";
        assert_eq!(refused(weight(4, 3, &channel)), GemmError::ScaleLength { what, wanted: 4, found: 3 });
        let bias = PackedFp8::pack(weight(4, 3, &one)).unwrap().with_bias(&[0.0; 3]).unwrap_err();
        assert_eq!(bias, GemmError::ScaleLength { what: "bias", wanted: 4, found: 3 });
        let what = "128x128 weight scale";
        assert_eq!(refused(weight(4, 3, &block)), GemmError::ScaleLength { what, wanted: 1, found: 2 });
        let pair = PackedFp8::pack_gate_up(weight(3, 4, &one), weight(3, 4, &channel)).unwrap_err();
        assert!(matches!(pair, GemmError::GateUpMismatch { .. }), "{pair}");
        let pair = PackedFp8::pack_gate_up(weight(3, 4, &one), weight(4, 3, &one)).unwrap_err();
        assert!(matches!(pair, GemmError::GateUpMismatch { .. }), "{pair}");
    }
}
