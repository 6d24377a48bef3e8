//! A matrix in one of the orders.

use std::borrow::Cow;

use fused_moe_core::QuantScheme;

use super::rows::{RowOrder, ShuffleBlock};
use super::{LayoutError, check_len, check_multiple};

/// The order of columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KOrder {
    /// Row after row.
    MajorK,
    /// `[columns / run, rows, run]`: runs of columns, those of all rows together. FlashInfer's runs have 128 bytes.
    BlockMajorK {
        /// Columns (elements) of a run.
        run: usize,
    },
}

/// The order of rows and columns of one weight of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TrtllmLayout {
    /// Of rows.
    pub rows: RowOrder,
    /// Of columns.
    pub k: KOrder,
}

/// The layouts of the two weights of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SchemeLayouts {
    /// Of `[up; gate]`, `[2 · intermediate, hidden]`.
    pub w13: TrtllmLayout,
    /// Of down, `[hidden, intermediate]`.
    pub w2: TrtllmLayout,
}

impl SchemeLayouts {
    /// The layouts that vLLM uses for `quant`, where columns are values, codes, or pairs of FP4 codes; `None` for a
    /// scheme that the kernels do not have.
    pub const fn of(quant: QuantScheme) -> Option<Self> {
        let (interleave, block, k) = match quant {
            QuantScheme::Unquantized => (true, ShuffleBlock::Rows32, KOrder::BlockMajorK { run: 64 }),
            // Its gemm1 stores both halves, and a kernel of its own applies the activation.
            QuantScheme::Fp8Block(_) => (false, ShuffleBlock::Rows16, KOrder::BlockMajorK { run: 128 }),
            QuantScheme::Fp8PerTensorStatic(_) | QuantScheme::Nvfp4 => {
                (true, ShuffleBlock::Rows32, KOrder::MajorK)
            }
            _ => return None,
        };
        let w13 = RowOrder { interleaved: interleave, shuffled: Some(block) };
        let w2 = RowOrder::plain(Some(block));
        Some(Self { w13: TrtllmLayout { rows: w13, k }, w2: TrtllmLayout { rows: w2, k } })
    }
}

/// A matrix `[rows, columns]` whose elements lie in a [`TrtllmLayout`], lent or owned.
#[derive(Clone, Debug, PartialEq)]
pub struct TrtllmMatrix<'a, T: Clone> {
    values: Cow<'a, [T]>,
    rows: usize,
    columns: usize,
    layout: TrtllmLayout,
}

impl<'a, T: Copy> TrtllmMatrix<'a, T> {
    /// Takes `values` that are in `layout` already.
    ///
    /// # Errors
    /// [`LayoutError`] for sizes that the layout does not fill.
    pub fn new(
        values: impl Into<Cow<'a, [T]>>,
        [rows, columns]: [usize; 2],
        layout: TrtllmLayout,
    ) -> Result<Self, LayoutError> {
        let values = values.into();
        check_len("the matrix", values.len(), rows * columns)?;
        layout.rows.check(rows)?;
        if let KOrder::BlockMajorK { run } = layout.k {
            check_multiple("number of columns", columns, run.max(1))?;
        }
        Ok(Self { values, rows, columns, layout })
    }

    /// Brings rows of `columns` elements into `layout`.
    ///
    /// # Errors
    /// As [`TrtllmMatrix::new`].
    pub fn from_rows(values: &[T], columns: usize, layout: TrtllmLayout) -> Result<Self, LayoutError> {
        Self::from_parts(&[values], columns, layout)
    }

    /// Brings gate and up, rows of `columns` elements each, into `layout` as `[up; gate]`.
    ///
    /// # Errors
    /// As [`TrtllmMatrix::new`]; gate and up of different lengths.
    pub fn from_gate_up(
        gate: &[T],
        up: &[T],
        columns: usize,
        layout: TrtllmLayout,
    ) -> Result<Self, LayoutError> {
        check_len("the rows of up", up.len(), gate.len())?;
        Self::from_parts(&[up, gate], columns, layout)
    }

    /// The rows of equally long `parts` on top of each other.
    fn from_parts(parts: &[&[T]], columns: usize, layout: TrtllmLayout) -> Result<Self, LayoutError> {
        let part = parts[0];
        check_multiple("length of the rows", part.len(), columns.max(1))?;
        let part_rows = part.len() / columns.max(1);
        let rows = parts.len() * part_rows;
        // Any values have the right length, and every one of them is replaced.
        let mut matrix = Self::new(parts.concat(), [rows, columns], layout)?;
        let (order, k) = (layout.rows, layout.k);
        let values = matrix.values.to_mut();
        for row in 0..rows {
            let source = &parts[row / part_rows.max(1)][row % part_rows.max(1) * columns..][..columns];
            let place = order.place(row, rows);
            match k {
                KOrder::MajorK => values[place * columns..][..columns].copy_from_slice(source),
                KOrder::BlockMajorK { run } => {
                    for (block, source) in source.chunks_exact(run).enumerate() {
                        values[(block * rows + place) * run..][..run].copy_from_slice(source);
                    }
                }
            }
        }
        Ok(matrix)
    }

    /// The elements in the order of the layout.
    pub fn values(&self) -> &[T] {
        &self.values
    }

    /// Rows and columns.
    pub fn dims(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// Index in [`TrtllmMatrix::values`] of the element that stands at `row` and `column` of the matrix.
    pub fn offset(&self, row: usize, column: usize) -> usize {
        let place = self.layout.rows.place(row, self.rows);
        match self.layout.k {
            KOrder::MajorK => place * self.columns + column,
            KOrder::BlockMajorK { run } => (column / run * self.rows + place) * run + column % run,
        }
    }

    /// The matrix row after row: what [`TrtllmMatrix::from_rows`] was given.
    pub fn to_rows(&self) -> Vec<T> {
        let mut rows = Vec::with_capacity(self.values.len());
        let run = match self.layout.k {
            KOrder::MajorK => self.columns,
            KOrder::BlockMajorK { run } => run,
        };
        for row in 0..self.rows {
            for column in (0..self.columns).step_by(run.max(1)) {
                rows.extend_from_slice(&self.values[self.offset(row, column)..][..run]);
            }
        }
        rows
    }

    /// Gate and up: what [`TrtllmMatrix::from_gate_up`] was given.
    pub fn to_gate_up(&self) -> (Vec<T>, Vec<T>) {
        let mut up = self.to_rows();
        let gate = up.split_off(self.rows / 2 * self.columns);
        (gate, up)
    }
}

/// The transpose of a matrix of rows of `columns` elements: FlashInfer reads the scales of block FP8 activations as
/// `[hidden / 128, rows]`, where dispatch carries `[rows, hidden / 128]`.
pub fn transposed<T: Copy>(values: &[T], columns: usize) -> Vec<T> {
    (0..columns).flat_map(|column| values.iter().skip(column).step_by(columns.max(1)).copied()).collect()
}
