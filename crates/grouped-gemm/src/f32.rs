//! f32 weights: the same panels, with one value of K where a pair of bf16 values is.

use std::fmt;

use crate::aligned::Aligned;
use crate::panel::{Columns, PANEL, PackedShape, PanelPairs, for_each_column};
use crate::scale::{ColumnTerms, gate_up_shape};
use crate::tuning::WeightKind;
use crate::weights::{PackedWeight, check_pair, row_of, sealed};
use crate::{GemmError, Weight};

/// An f32 weight in panels of 64 columns, `[ceil(N / 64)][K][64]`. It is multiplied with
/// [`Activations::F32`](crate::Activations::F32) only, by fused multiply-adds where the machine has them.
pub struct PackedF32 {
    shape: PackedShape,
    /// The bits of the values.
    words: Aligned<u32>,
    terms: ColumnTerms,
}

impl PackedF32 {
    /// Packs a weight `[N, K]`.
    ///
    /// # Errors
    /// An empty weight, or a slice that is not `n * k` long.
    pub fn pack(weight: Weight<'_, f32>) -> Result<Self, GemmError> {
        weight.check()?;
        let shape = PackedShape { n: weight.n, k: weight.k, columns: Columns::Plain };
        Ok(Self::place(shape, &[weight.values]))
    }

    /// Packs gate and up, both `[I, K]`, so that their product is formed on the tile.
    ///
    /// # Errors
    /// As [`pack`](Self::pack), or two different shapes.
    pub fn pack_gate_up(gate: Weight<'_, f32>, up: Weight<'_, f32>) -> Result<Self, GemmError> {
        check_pair(&gate, &up)?;
        Ok(Self::place(gate_up_shape(gate.n, gate.k), &[gate.values, up.values]))
    }

    /// The weight as it was packed, row-major `[N, K]`; gate rows before up rows for a pair.
    pub fn unpack(&self) -> Vec<f32> {
        let k = self.shape.k;
        let mut values = vec![0.0; self.shape.n * k];
        let words = self.words.as_slice();
        for_each_column(&self.shape, |row, panel, column| {
            let column = words[panel * k * PANEL + column..].iter().step_by(PANEL);
            for (value, &word) in values[row * k..][..k].iter_mut().zip(column) {
                *value = f32::from_bits(word);
            }
        });
        values
    }

    fn place(shape: PackedShape, parts: &[&[f32]]) -> Self {
        let k = shape.k;
        let mut words = Aligned::zeroed(shape.panels() * k * PANEL);
        let places = words.as_mut_slice();
        for_each_column(&shape, |row, panel, column| {
            let places = places[panel * k * PANEL + column..].iter_mut().step_by(PANEL);
            for (place, value) in places.zip(row_of(parts, row, k)) {
                *place = value.to_bits();
            }
        });
        PackedF32 { shape, words, terms: ColumnTerms::default() }
    }
}

impl PackedWeight for PackedF32 {
    const KIND: WeightKind = WeightKind::F32;

    fn shape(&self) -> &PackedShape {
        &self.shape
    }
    fn bytes(&self) -> usize {
        size_of_val(self.words.as_slice()) + self.terms.bytes()
    }
}

impl sealed::Sealed for PackedF32 {
    #[expect(private_interfaces, reason = "a sealed trait is not callable from outside")]
    fn panel(&self, panel: usize) -> PanelPairs<'_> {
        let len = self.shape.k * PANEL;
        PanelPairs::F32(&self.words.as_slice()[panel * len..][..len])
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
        self.shape.k
    }
}

impl fmt::Debug for PackedF32 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackedF32({})", self.shape)
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_pcg::Pcg64Mcg;
    use rstest::rstest;

    use super::*;

    #[rstest]
    fn packing_loses_nothing(#[values(1, 32, 100, 129)] n: usize, #[values(1, 2, 7, 129)] k: usize) {
        let seed = rand::random();
        println!("seed {seed}");
        let mut rng = Pcg64Mcg::seed_from_u64(seed);
        let values: Vec<f32> = (0..2 * n * k).map(|_| f32::from_bits(rng.random())).collect();
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        let weight = |part: usize| Weight { values: &values[part * n * k..][..n * k], n, k };
        assert_eq!(bits(&PackedF32::pack(weight(0)).unwrap().unpack()), bits(&values[..n * k]));
        let pair = PackedF32::pack_gate_up(weight(0), weight(1)).unwrap();
        assert_eq!(bits(&pair.unpack()), bits(&values));
    }
}
