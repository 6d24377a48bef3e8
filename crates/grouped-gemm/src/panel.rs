//! The packed layout: K-pair panels of 64 columns.
//!
//! A weight `[N, K]` becomes `[ceil(N / 64)][ceil(K / 2)][64][2]`: a panel holds 64 output columns,
//! and inside a panel the two K neighbours of a column lie side by side, which is the operand order
//! of `vdpbf16ps`. Columns past N and the second half of an odd last pair are zero.
//!
//! Panels of fp8 codes use the same order of pairs with one permutation inside each 64-byte line,
//! so that interleaving the low and high result bytes of a table look-up inside 128-bit lanes gives
//! sixteen consecutive columns: see [`fp8_offset`].

use std::ops::Range;

use crate::fp4::Fp4Pairs;

/// Columns of a panel.
pub(crate) const PANEL: usize = 64;
/// Rows of K under one block scale.
pub(crate) const SCALE_BLOCK: usize = 128;
/// K pairs under one block scale.
pub(crate) const BLOCK_PAIRS: usize = SCALE_BLOCK / 2;

/// Which row of the unpacked weight a packed column is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Columns {
    /// Packed column `n` is row `n` of the weight.
    Plain,
    /// Each panel holds 32 gate columns followed by the 32 up columns of the same positions, so
    /// that `silu(gate) * up` needs only the columns of one panel.
    GateUp,
}

impl Columns {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Columns::Plain => "plain columns",
            Columns::GateUp => "gate/up pairs",
        }
    }

    /// Result columns that one panel yields.
    pub(crate) fn results_per_panel(self) -> usize {
        match self {
            Columns::Plain => PANEL,
            Columns::GateUp => PANEL / 2,
        }
    }
}

/// Shape of a packed weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedShape {
    /// Rows of the weight, which are columns of the product. Gate and up together for a pair.
    pub n: usize,
    /// Inner size.
    pub k: usize,
    /// Order of the columns inside panels.
    pub columns: Columns,
}

impl PackedShape {
    /// Columns of a result row: N, or half of it when the activation joins gate and up.
    pub fn result_columns(&self) -> usize {
        match self.columns {
            Columns::Plain => self.n,
            Columns::GateUp => self.n / 2,
        }
    }

    pub(crate) fn panels(&self) -> usize {
        self.result_columns().div_ceil(self.columns.results_per_panel())
    }

    pub(crate) fn pairs(&self) -> usize {
        self.k.div_ceil(2)
    }

    pub(crate) fn scale_blocks(&self) -> usize {
        self.k.div_ceil(SCALE_BLOCK)
    }

    /// The weight row behind a packed column, gate rows before up rows; `None` in the padding.
    pub(crate) fn weight_row(&self, panel: usize, column: usize) -> Option<usize> {
        match self.columns {
            Columns::Plain => Some(panel * PANEL + column).filter(|&row| row < self.n),
            Columns::GateUp => {
                let (half, size) = (PANEL / 2, self.n / 2);
                let row = panel * half + column % half;
                (row < size).then_some(if column < half { row } else { size + row })
            }
        }
    }
}

impl std::fmt::Display for PackedShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{}, {}] in {}", self.n, self.k, self.columns.name())
    }
}

/// Byte of the even K of `column` inside the 128 codes of one K pair; the odd K follows it. Lane `l` of
/// a line holds columns `4l..4l+4` in its lower half and `16+4l..20+4l` in its upper half.
pub(crate) const fn fp8_offset(column: usize) -> usize {
    let (line, column) = (column / 32, column % 32);
    let (half, column) = (column / 16, column % 16);
    line * 64 + (column / 4) * 16 + half * 8 + (column % 4) * 2
}

/// A run of K pairs of one panel, as the kernels read it.
#[derive(Clone, Copy)]
pub(crate) enum PanelPairs<'a> {
    /// `[pairs][64]` words, the even K in the low half.
    Bf16(&'a [u32]),
    /// `[k][64]` values of f32: what a row has of K is as many operand words, not half of it.
    F32(&'a [u32]),
    /// `[pairs][128]` codes in [`fp8_offset`] order.
    Fp8 { codes: &'a [u8], kind: crate::Fp8Kind },
    /// Pairs of codes with their group scales.
    Fp4(Fp4Pairs<'a>),
}

impl PanelPairs<'_> {
    pub(crate) fn pairs(&self) -> usize {
        match self {
            PanelPairs::Bf16(words) | PanelPairs::F32(words) => words.len() / PANEL,
            PanelPairs::Fp8 { codes, .. } => codes.len() / (2 * PANEL),
            PanelPairs::Fp4(run) => run.codes().len() / PANEL,
        }
    }

    pub(crate) fn slice(self, pairs: Range<usize>) -> Self {
        match self {
            PanelPairs::Bf16(words) => PanelPairs::Bf16(&words[pairs.start * PANEL..pairs.end * PANEL]),
            PanelPairs::F32(words) => PanelPairs::F32(&words[pairs.start * PANEL..pairs.end * PANEL]),
            PanelPairs::Fp8 { codes, kind } => {
                PanelPairs::Fp8 { codes: &codes[pairs.start * 2 * PANEL..pairs.end * 2 * PANEL], kind }
            }
            PanelPairs::Fp4(run) => PanelPairs::Fp4(run.slice(pairs)),
        }
    }
}

/// Calls `visit(weight row, panel, column)` for every packed column that holds a row of the weight.
pub(crate) fn for_each_column(shape: &PackedShape, mut visit: impl FnMut(usize, usize, usize)) {
    for panel in 0..shape.panels() {
        for column in 0..PANEL {
            if let Some(row) = shape.weight_row(panel, column) {
                visit(row, panel, column);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fp8_order_is_a_permutation() {
        let mut seen = [false; 128];
        for column in 0..PANEL {
            for parity in 0..2 {
                assert!(!std::mem::replace(&mut seen[fp8_offset(column) + parity], true));
            }
        }
    }

    #[test]
    fn every_weight_row_is_in_one_column() {
        for (n, columns) in [(1, Columns::Plain), (64, Columns::Plain), (130, Columns::Plain)]
            .into_iter()
            .chain([(2, Columns::GateUp), (64, Columns::GateUp), (150, Columns::GateUp)])
        {
            let shape = PackedShape { n, k: 3, columns };
            let mut rows = Vec::new();
            for_each_column(&shape, |row, _, _| rows.push(row));
            rows.sort_unstable();
            assert!(rows.into_iter().eq(0..n), "{shape}");
        }
    }
}
