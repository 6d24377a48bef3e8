//! Finding a projection and its scale, and telling its scheme from them.
//!
//! Finding reads headers only; [`Found::read`] is what touches the weights' own bytes.

use fused_moe_core::{BLOCK, DType, Fp8Format, QuantScheme};
use safetensors::tensor::Dtype;

use crate::error::{CheckpointError, Result};
use crate::files::{Stored, TensorFiles};
use crate::matrix::{Matrix, SmallTensor, WeightMatrix, WeightScale};

/// Where a projection should be and what it should look like.
pub(crate) struct Wanted {
    /// Name of the weight.
    pub(crate) tensor: String,
    /// Names that a block scale may have.
    pub(crate) scale_inv: Vec<String>,
    /// Names that any other scale may have.
    pub(crate) scale: Vec<String>,
    /// Names of a static activation scale, which is refused.
    pub(crate) input_scale: Vec<String>,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Set if the projection is part of a packed tensor.
    pub(crate) packed: Option<PackedPart>,
}

/// One expert's rows of a packed tensor `[num_experts, total_rows, cols]`.
#[derive(Clone, Copy)]
pub(crate) struct PackedPart {
    pub(crate) expert: usize,
    pub(crate) num_experts: usize,
    pub(crate) first_row: usize,
    pub(crate) total_rows: usize,
}

impl Wanted {
    /// A projection in a tensor of its own, `<base>.weight`.
    pub(crate) fn own(base: &str, rows: usize, cols: usize) -> Self {
        Self {
            tensor: format!("{base}.weight"),
            scale_inv: vec![format!("{base}.weight_scale_inv")],
            scale: vec![format!("{base}.weight_scale")],
            input_scale: vec![format!("{base}.input_scale")],
            rows,
            cols,
            packed: None,
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
            rows,
            cols,
            packed: Some(part),
        }
    }

    /// Shape of the whole tensor.
    fn shape(&self) -> Vec<usize> {
        match self.packed {
            None => vec![self.rows, self.cols],
            Some(part) => vec![part.num_experts, part.total_rows, self.cols],
        }
    }
}

/// A projection that is there and fits.
pub(crate) struct Found<'c> {
    wanted: Wanted,
    values: Stored<'c>,
    dtype: DType,
    scale: Option<FoundScale<'c>>,
}

struct FoundScale<'c> {
    name: String,
    stored: Stored<'c>,
    kind: ScaleKind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ScaleKind {
    Block,
    Channel,
    Tensor,
}

/// Looks `wanted` up. `declared` decides between schemes where a scale's shape fits two.
pub(crate) fn find(files: &TensorFiles, wanted: Wanted, declared: QuantScheme) -> Result<Found<'_>> {
    let values = files.get(&wanted.tensor)?;
    check_shape(&wanted, &values)?;
    let dtype = match values.dtype {
        Dtype::BF16 => DType::Bf16,
        Dtype::F16 => DType::F16,
        Dtype::F32 => DType::F32,
        Dtype::F8_E4M3 => DType::Fp8E4M3Fn,
        found => {
            return Err(CheckpointError::BadDType {
                tensor: wanted.tensor,
                path: values.path.to_owned(),
                wanted: "BF16, F16, F32 or F8_E4M3",
                found: format!("{found:?}"),
            });
        }
    };
    if let Some(name) = wanted.input_scale.iter().find(|name| files.contains(name)) {
        return Err(CheckpointError::StaticActivationScale { what: format!("tensor {name}") });
    }
    let mut scales = Vec::new();
    for (names, inverse) in [(&wanted.scale_inv, true), (&wanted.scale, false)] {
        for name in names {
            if let Some(stored) = files.find(name)? {
                scales.push((name.clone(), stored, inverse));
            }
        }
    }
    if scales.len() > 1 {
        return Err(CheckpointError::Ambiguous {
            what: format!("the scale of {}", wanted.tensor),
            why: format!("both {} and {} are there", scales[0].0, scales[1].0),
        });
    }
    let scale = match (scales.pop(), dtype.is_fp8()) {
        (None, false) => None,
        (None, true) => {
            return Err(CheckpointError::MissingScale {
                wanted: [wanted.scale_inv, wanted.scale].concat().join(", "),
                tensor: wanted.tensor,
                path: values.path.to_owned(),
            });
        }
        (Some((scale, ..)), false) => {
            let dtype = dtype.to_string();
            return Err(CheckpointError::UnexpectedScale { tensor: wanted.tensor, dtype, scale });
        }
        (Some((name, stored, inverse)), true) => {
            let kind = scale_kind(&wanted, &stored, declared, inverse)
                .map_err(|wanted| bad_shape(&name, &stored, wanted))?;
            if kind == ScaleKind::Block {
                check_blocks_are_whole(&wanted, &name)?;
            }
            Some(FoundScale { name, stored, kind })
        }
    };
    Ok(Found { wanted, values, dtype, scale })
}

fn bad_shape(tensor: &str, stored: &Stored<'_>, wanted: String) -> CheckpointError {
    let (tensor, path) = (tensor.to_owned(), stored.path.to_owned());
    CheckpointError::BadShape { tensor, path, wanted, found: stored.shape.to_vec() }
}

fn check_shape(wanted: &Wanted, values: &Stored<'_>) -> Result<()> {
    let shape = wanted.shape();
    let Some(part) = wanted.packed else {
        if values.shape != shape {
            return Err(bad_shape(&wanted.tensor, values, format!("{shape:?}")));
        }
        return Ok(());
    };
    let transposed = [part.num_experts, wanted.cols, part.total_rows];
    if values.shape == shape {
        // A square down projection is no matter: the layout of gate and up, found before it, is that of both.
        if part.total_rows != wanted.rows && part.total_rows == wanted.cols {
            return Err(CheckpointError::Ambiguous {
                what: format!("the layout of packed tensor {} {:?}", wanted.tensor, values.shape),
                why: "its rows and columns are equally many, so it may be transposed".to_owned(),
            });
        }
        Ok(())
    } else if values.shape == transposed {
        Err(CheckpointError::Unsupported {
            what: format!("packed tensor {} {:?}, [experts, in, out]", wanted.tensor, values.shape),
            why: format!("wanted [experts, out, in] = {shape:?}"),
        })
    } else {
        Err(bad_shape(&wanted.tensor, values, format!("{shape:?}")))
    }
}

/// What the shape of `scale` says; `Err` lists the shapes that would fit.
fn scale_kind(
    wanted: &Wanted,
    scale: &Stored<'_>,
    declared: QuantScheme,
    inverse: bool,
) -> Result<ScaleKind, String> {
    let rows = wanted.packed.map_or(wanted.rows, |part| part.total_rows);
    let blocks = [rows.div_ceil(BLOCK), wanted.cols.div_ceil(BLOCK)];
    let per_tensor = matches!(declared, QuantScheme::Fp8PerTensor(_));
    let per_block = matches!(declared, QuantScheme::Fp8Block(_));
    let per_channel = matches!(declared, QuantScheme::Fp8Ptpc(_));
    let own_shape = match wanted.packed {
        None => Some(scale.shape),
        Some(part) => scale.shape.split_first().filter(|(e, _)| **e == part.num_experts).map(|(_, s)| s),
    };
    if let Some(shape) = own_shape {
        let one = matches!(shape, [] | [1] | [1, 1]);
        let by_row = shape == [rows] || shape == [rows, 1];
        if shape == blocks && (inverse || per_block) {
            return Ok(ScaleKind::Block);
        }
        // The scale of a single row has the shape of the scale of a matrix.
        if one && (!inverse || per_tensor) && !(by_row && per_channel) {
            return Ok(ScaleKind::Tensor);
        }
        if by_row && !inverse {
            return Ok(ScaleKind::Channel);
        }
        if shape == blocks {
            return Ok(ScaleKind::Block);
        }
    }
    let [n, k] = blocks;
    let lead = wanted.packed.map_or(String::new(), |part| format!("{}, ", part.num_experts));
    let block = format!("[{lead}{n}, {k}] (one per {BLOCK}x{BLOCK} block)");
    if inverse {
        Err(block)
    } else {
        let one =
            if lead.is_empty() { "[]".to_owned() } else { format!("[{}]", lead.trim_end_matches(", ")) };
        Err(format!("[{lead}{rows}, 1] (one per row), {one} (one per matrix) or {block}"))
    }
}

/// Gate and up share the blocks of a packed tensor unless the boundary between them is one between blocks.
fn check_blocks_are_whole(wanted: &Wanted, scale: &str) -> Result<()> {
    match wanted.packed {
        Some(part) if part.total_rows != wanted.rows && !wanted.rows.is_multiple_of(BLOCK) => {
            Err(CheckpointError::Unsupported {
                what: format!("packed block scale {scale}"),
                why: format!(
                    "gate and up have {} rows each, which is no multiple of {BLOCK}, so they share blocks",
                    wanted.rows
                ),
            })
        }
        _ => Ok(()),
    }
}

impl<'c> Found<'c> {
    pub(crate) fn tensor(&self) -> &str {
        &self.wanted.tensor
    }

    pub(crate) fn scheme(&self) -> QuantScheme {
        match self.scale.as_ref().map(|scale| scale.kind) {
            None => QuantScheme::Unquantized,
            Some(ScaleKind::Block) => QuantScheme::Fp8Block(Fp8Format::E4M3Fn),
            Some(ScaleKind::Channel) => QuantScheme::Fp8Ptpc(Fp8Format::E4M3Fn),
            Some(ScaleKind::Tensor) => QuantScheme::Fp8PerTensor(Fp8Format::E4M3Fn),
        }
    }

    /// Bytes of the values and the scales.
    pub(crate) fn bytes(&self) -> u64 {
        let values = self.wanted.rows * self.wanted.cols * self.dtype.size_bytes();
        let scales = self.scale.as_ref().map_or(0, |scale| self.scale_bytes(scale).len());
        (values + scales) as u64
    }

    /// Maps the values and reads the scales.
    pub(crate) fn read(self) -> Result<WeightMatrix<'c>> {
        let (rows, cols) = (self.wanted.rows, self.wanted.cols);
        let row_bytes = cols * self.dtype.size_bytes();
        let first_row = self.wanted.packed.map_or(0, |p| p.expert * p.total_rows + p.first_row);
        let bytes = &self.values.bytes[first_row * row_bytes..(first_row + rows) * row_bytes];
        let scale = match &self.scale {
            None => None,
            Some(scale) => {
                let bytes = self.scale_bytes(scale);
                let small = SmallTensor {
                    name: &scale.name,
                    path: scale.stored.path,
                    dtype: scale.stored.dtype,
                    bytes,
                };
                let values = small.to_f32(true)?;
                Some(match scale.kind {
                    ScaleKind::Block => WeightScale::Block128(values),
                    ScaleKind::Channel => WeightScale::PerChannel(values),
                    ScaleKind::Tensor => WeightScale::PerTensor(values[0]),
                })
            }
        };
        let values = Matrix::new(rows, cols, self.dtype, bytes);
        Ok(WeightMatrix { name: self.wanted.tensor, values, scale })
    }

    /// The bytes of this projection's scales inside the stored tensor.
    fn scale_bytes(&self, scale: &FoundScale<'c>) -> &'c [u8] {
        let bytes = scale.stored.bytes;
        let Some(part) = self.wanted.packed else { return bytes };
        let per_expert = bytes.len() / part.num_experts;
        let bytes = &bytes[part.expert * per_expert..(part.expert + 1) * per_expert];
        // What one row of scales covers, and so where this projection's rows of them start and end.
        let unit = match scale.kind {
            ScaleKind::Tensor => return bytes,
            ScaleKind::Channel => 1,
            ScaleKind::Block => BLOCK,
        };
        let per_row = bytes.len() / part.total_rows.div_ceil(unit);
        let first = part.first_row / unit;
        let count = self.wanted.rows.div_ceil(unit);
        &bytes[first * per_row..(first + count) * per_row]
    }
}
