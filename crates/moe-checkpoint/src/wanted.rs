//! Where a projection should be, and what it should look like.

use safetensors::tensor::Dtype;

use crate::error::{CheckpointError, Result};
use crate::files::Stored;
use crate::projection::MX_GROUP;

/// Where a projection should be and what it should look like.
pub(crate) struct Wanted {
    /// Name of the weight.
    pub(crate) tensor: String,
    /// Names that a block scale may have.
    pub(crate) scale_inv: Vec<String>,
    /// Names that any other scale may have.
    pub(crate) scale: Vec<String>,
    /// Name of the second level of an NVFP4 scale.
    pub(crate) global_scale: Option<String>,
    /// Names that a static activation scale may have.
    pub(crate) input_scale: Vec<String>,
    /// Name of the bias, if there must be one.
    pub(crate) bias: Option<String>,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Set if the projection is part of a packed tensor.
    pub(crate) packed: Option<PackedPart>,
    pub(crate) form: Form,
}

/// How the stored tensor lies.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// `[out, in]`, or `[experts, out, in]` where experts are packed.
    OutIn,
    /// `[experts, in, out]`, because the family's modelling code multiplies from the left: bf16 gpt-oss.
    InOut,
    /// `[experts, out, in / 32, 16]` pairs of FP4 codes: MXFP4 gpt-oss.
    Mxfp4Blocks,
}

/// One expert's rows of a packed tensor of `num_experts` matrices with `total_rows` rows each.
#[derive(Clone, Copy)]
pub(crate) struct PackedPart {
    pub(crate) expert: usize,
    pub(crate) num_experts: usize,
    pub(crate) first_row: usize,
    /// From one row of the projection to the next: 2 where gate and up alternate.
    pub(crate) row_step: usize,
    pub(crate) total_rows: usize,
}

impl Wanted {
    /// A projection in a tensor of its own, `<base>.weight`.
    pub(crate) fn own(base: &str, rows: usize, cols: usize) -> Self {
        Self {
            tensor: format!("{base}.weight"),
            scale_inv: vec![format!("{base}.weight_scale_inv")],
            scale: vec![format!("{base}.weight_scale")],
            global_scale: Some(format!("{base}.weight_scale_2")),
            input_scale: vec![format!("{base}.input_scale")],
            bias: None,
            rows,
            cols,
            packed: None,
            form: Form::OutIn,
        }
    }

    /// `part` of the packed tensor `base`, which has no `.weight` behind its name.
    pub(crate) fn packed(base: &str, rows: usize, cols: usize, part: PackedPart) -> Self {
        Self {
            tensor: base.to_owned(),
            // The name transformers 5 gives the scale, and the name beside a module's weight.
            scale_inv: vec![format!("{base}_scale_inv"), format!("{base}.weight_scale_inv")],
            scale: vec![format!("{base}_scale"), format!("{base}.weight_scale")],
            input_scale: vec![format!("{base}_input_scale"), format!("{base}.input_scale")],
            global_scale: None,
            packed: Some(part),
            ..Self::own(base, rows, cols)
        }
    }

    /// `part` of gpt-oss's packed tensor `base`, which has a bias; `blocks` if it is MXFP4.
    pub(crate) fn gpt_oss(base: &str, [rows, cols]: [usize; 2], part: PackedPart, blocks: bool) -> Self {
        let wanted = Self { bias: Some(format!("{base}_bias")), ..Self::packed(base, rows, cols, part) };
        if !blocks {
            return Self { form: Form::InOut, ..wanted };
        }
        Self {
            tensor: format!("{base}_blocks"),
            scale_inv: Vec::new(),
            scale: vec![format!("{base}_scales")],
            input_scale: Vec::new(),
            form: Form::Mxfp4Blocks,
            ..wanted
        }
    }

    /// Rows of one expert's matrix in the stored tensor.
    pub(crate) fn total_rows(&self) -> usize {
        self.packed.map_or(self.rows, |part| part.total_rows)
    }

    /// Whether `values` has the shape of the whole tensor.
    ///
    /// The rows and columns of a packed tensor come from `config.json`; which is which is read off its shape, for
    /// both orders are about: transformers 5 writes `[experts, out, in]`, code that multiplies from the left writes
    /// `[experts, in, out]`. Equal numbers of both therefore say nothing, whatever the family, except in gpt-oss:
    /// that has one layout, which the form fixes, and at every published size of it the down projection is square.
    pub(crate) fn check_shape(&self, values: &Stored<'_>) -> Result<()> {
        let cols = if values.dtype == Dtype::U8 { self.cols / 2 } else { self.cols };
        let total = self.total_rows();
        let shape = match (self.form, self.packed) {
            (_, None) => vec![self.rows, cols],
            (Form::OutIn, Some(part)) => vec![part.num_experts, total, cols],
            (Form::InOut, Some(part)) => vec![part.num_experts, cols, total],
            (Form::Mxfp4Blocks, Some(part)) => {
                if !self.cols.is_multiple_of(MX_GROUP) {
                    return Err(self.uneven(values, MX_GROUP));
                }
                vec![part.num_experts, total, self.cols / MX_GROUP, MX_GROUP / 2]
            }
        };
        let bad_shape = || {
            let pairs = if values.dtype == Dtype::U8 { " (pairs of FP4 codes)" } else { "" };
            bad_shape(&self.tensor, values, format!("{shape:?}{pairs}"))
        };
        let Some(part) = self.packed.filter(|_| self.form == Form::OutIn) else {
            return if values.shape == shape { Ok(()) } else { Err(bad_shape()) };
        };
        let transposed = [part.num_experts, cols, total];
        if values.shape == shape {
            // A square down projection is no matter: the layout of gate and up, found before it, is that of both.
            if total != self.rows && total == cols {
                return Err(CheckpointError::Ambiguous {
                    what: format!("the layout of packed tensor {} {:?}", self.tensor, values.shape),
                    why: format!(
                        "hidden size {cols} is twice the intermediate size {}, so it may be [experts, out, in] or \
                         [experts, in, out]",
                        self.rows
                    ),
                });
            }
            Ok(())
        } else if values.shape == transposed {
            Err(CheckpointError::Unsupported {
                what: format!("packed tensor {} {:?}, [experts, in, out]", self.tensor, values.shape),
                why: format!("wanted [experts, out, in] = {shape:?}"),
            })
        } else {
            Err(bad_shape())
        }
    }

    /// The error of a matrix whose columns are no multiple of `group`.
    pub(crate) fn uneven(&self, values: &Stored<'_>, group: usize) -> CheckpointError {
        CheckpointError::UnevenGroups {
            tensor: self.tensor.clone(),
            path: values.path.to_owned(),
            cols: self.cols,
            group,
        }
    }
}

/// The error of a tensor whose shape is not `wanted`.
pub(crate) fn bad_shape(tensor: &str, stored: &Stored<'_>, wanted: String) -> CheckpointError {
    let (tensor, path) = (tensor.to_owned(), stored.path.to_owned());
    CheckpointError::BadShape { tensor, path, wanted, found: stored.shape.to_vec() }
}
