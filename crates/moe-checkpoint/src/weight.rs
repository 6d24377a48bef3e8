//! Finding a projection and its scale, and telling its scheme from them.
//!
//! Finding reads headers only; [`Found::read`] is what touches the weights' own bytes.

use fused_moe_core::{BLOCK, DType, Fp8Format, QuantScheme};
use safetensors::tensor::Dtype;

use crate::error::{CheckpointError, Result};
use crate::files::{Stored, TensorFiles};
use crate::matrix::{Allowed, Columns, Matrix, SmallTensor};
use crate::projection::{MX_GROUP, NV_GROUP, WeightMatrix, WeightScale, e4m3, e8m0};
use crate::wanted::{Form, Wanted, bad_shape};

/// A projection that is there and fits.
pub(crate) struct Found<'c> {
    wanted: Wanted,
    values: Stored<'c>,
    dtype: DType,
    scale: Option<FoundScale<'c>>,
    input_scale: Option<Named<'c>>,
    bias: Option<Named<'c>>,
}

/// A stored tensor and its name.
struct Named<'c> {
    name: String,
    stored: Stored<'c>,
}

struct FoundScale<'c> {
    name: String,
    stored: Stored<'c>,
    kind: ScaleKind,
    /// The second level of an NVFP4 scale.
    global: Option<Named<'c>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ScaleKind {
    Block,
    Channel,
    Tensor,
    Mx32,
    Nv16,
}

/// Looks `wanted` up. `declared` decides between schemes where a scale's shape fits two.
pub(crate) fn find(files: &TensorFiles, wanted: Wanted, declared: QuantScheme) -> Result<Found<'_>> {
    let values = files.get(&wanted.tensor)?;
    let dtype = element_type(&wanted, &values)?;
    wanted.check_shape(&values)?;
    let weight = Weight { wanted: &wanted, values: &values, dtype };
    let scale = find_scale(files, weight, declared)?;
    let input_scale = find_input_scale(files, &wanted, scale.as_ref())?;
    if input_scale.is_none() && scale.as_ref().is_some_and(|scale| scale.kind == ScaleKind::Nv16) {
        return Err(weight.missing_scale(&wanted.input_scale));
    }
    let bias = match &wanted.bias {
        None => None,
        Some(name) => {
            let stored = files.get(name)?;
            let lead = wanted.packed.map(|part| part.num_experts);
            let shape: Vec<usize> = lead.into_iter().chain([wanted.total_rows()]).collect();
            if stored.shape != shape {
                return Err(bad_shape(name, &stored, format!("{shape:?}")));
            }
            Some(Named { name: name.clone(), stored })
        }
    };
    Ok(Found { wanted, values, dtype, scale, input_scale, bias })
}

fn element_type(wanted: &Wanted, values: &Stored<'_>) -> Result<DType> {
    let (dtype, allowed) = match (wanted.form, values.dtype) {
        (Form::OutIn | Form::InOut, Dtype::BF16) => (Some(DType::Bf16), ""),
        (Form::OutIn | Form::InOut, Dtype::F16) => (Some(DType::F16), ""),
        (Form::OutIn | Form::InOut, Dtype::F32) => (Some(DType::F32), ""),
        (Form::InOut, _) => (None, "BF16, F16 or F32"),
        (Form::OutIn, Dtype::F8_E4M3) => (Some(DType::Fp8E4M3Fn), ""),
        (Form::OutIn, Dtype::U8) if wanted.packed.is_none() => (Some(DType::Fp4E2M1x2), ""),
        (Form::OutIn, _) if wanted.packed.is_none() => (None, "BF16, F16, F32, F8_E4M3 or U8"),
        (Form::OutIn, _) => (None, "BF16, F16, F32 or F8_E4M3"),
        (Form::Mxfp4Blocks, Dtype::U8) => (Some(DType::Fp4E2M1x2), ""),
        (Form::Mxfp4Blocks, _) => (None, "U8"),
    };
    dtype.ok_or_else(|| bad_dtype(&wanted.tensor, values, allowed))
}

fn bad_dtype(tensor: &str, stored: &Stored<'_>, wanted: &'static str) -> CheckpointError {
    let (tensor, path) = (tensor.to_owned(), stored.path.to_owned());
    CheckpointError::BadDType { tensor, path, wanted, found: format!("{:?}", stored.dtype) }
}

/// A weight whose scale is looked for.
#[derive(Clone, Copy)]
struct Weight<'a> {
    wanted: &'a Wanted,
    values: &'a Stored<'a>,
    dtype: DType,
}

impl Weight<'_> {
    fn missing_scale(&self, names: &[String]) -> CheckpointError {
        CheckpointError::MissingScale {
            tensor: self.wanted.tensor.clone(),
            dtype: if self.dtype == DType::Fp4E2M1x2 { "FP4" } else { "FP8" },
            path: self.values.path.to_owned(),
            wanted: names.join(", "),
        }
    }
}

fn find_scale<'c>(
    files: &'c TensorFiles,
    weight: Weight<'_>,
    declared: QuantScheme,
) -> Result<Option<FoundScale<'c>>> {
    let Weight { wanted, values, dtype } = weight;
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
    let is_fp4 = dtype == DType::Fp4E2M1x2;
    let global = match &wanted.global_scale {
        Some(name) => files.find(name)?.map(|stored| Named { name: name.clone(), stored }),
        None => None,
    };
    if let Some(global) = global.as_ref().filter(|_| !is_fp4) {
        let (tensor, scale) = (wanted.tensor.clone(), global.name.clone());
        return Err(CheckpointError::UnexpectedScale { tensor, dtype: dtype.to_string(), scale });
    }
    match scales.pop() {
        None if is_fp4 => Err(weight.missing_scale(&wanted.scale)),
        None if dtype.is_fp8() => {
            let names = [wanted.scale_inv.as_slice(), &wanted.scale].concat();
            Err(weight.missing_scale(&names))
        }
        None => Ok(None),
        Some((name, stored, _)) if is_fp4 => {
            let kind = fp4_scale(wanted, values, &name, &stored)?;
            if let (ScaleKind::Nv16, None) = (kind, &global) {
                return Err(weight.missing_scale(wanted.global_scale.as_slice()));
            }
            if let Some(global) = &global {
                check_scalar(global, None)?;
            }
            Ok(Some(FoundScale { name, stored, kind, global }))
        }
        Some((name, stored, inverse)) if dtype.is_fp8() => {
            let kind = scale_kind(wanted, &stored, declared, inverse)
                .map_err(|wanted| bad_shape(&name, &stored, wanted))?;
            if kind == ScaleKind::Block {
                check_blocks_are_whole(wanted, &name)?;
            }
            Ok(Some(FoundScale { name, stored, kind, global: None }))
        }
        Some((scale, ..)) => {
            let (tensor, dtype) = (wanted.tensor.clone(), dtype.to_string());
            Err(CheckpointError::UnexpectedScale { tensor, dtype, scale })
        }
    }
}

/// Checks the first-level scale `name` of FP4 codes.
fn fp4_scale(wanted: &Wanted, values: &Stored<'_>, name: &str, scale: &Stored<'_>) -> Result<ScaleKind> {
    let (kind, group) = match wanted.form {
        Form::Mxfp4Blocks => (ScaleKind::Mx32, MX_GROUP),
        _ => (ScaleKind::Nv16, NV_GROUP),
    };
    if !wanted.cols.is_multiple_of(group) {
        return Err(wanted.uneven(values, group));
    }
    let lead = wanted.packed.map(|part| part.num_experts);
    let shape: Vec<usize> = lead.into_iter().chain([wanted.total_rows(), wanted.cols / group]).collect();
    if scale.shape != shape {
        return Err(bad_shape(name, scale, format!("{shape:?} (one per {group} columns)")));
    }
    match (kind, scale.dtype) {
        (ScaleKind::Mx32, Dtype::U8 | Dtype::F8_E8M0) | (ScaleKind::Nv16, Dtype::F8_E4M3) => Ok(kind),
        (ScaleKind::Mx32, _) => Err(bad_dtype(name, scale, "U8 or F8_E8M0")),
        _ => Err(bad_dtype(name, scale, "F8_E4M3")),
    }
}

/// A scalar, or one value for each of `experts`.
fn check_scalar(named: &Named<'_>, experts: Option<usize>) -> Result<()> {
    match (named.stored.shape, experts) {
        ([] | [1] | [1, 1], None) => Ok(()),
        ([] | [1], Some(_)) => Ok(()),
        (&[count], Some(experts)) if count == experts => Ok(()),
        (_, None) => Err(bad_shape(&named.name, &named.stored, "[] (one per matrix)".to_owned())),
        (_, Some(experts)) => {
            Err(bad_shape(&named.name, &named.stored, format!("[] or [{experts}] (one per expert)")))
        }
    }
}

fn find_input_scale<'c>(
    files: &'c TensorFiles,
    wanted: &Wanted,
    scale: Option<&FoundScale<'_>>,
) -> Result<Option<Named<'c>>> {
    let Some(name) = wanted.input_scale.iter().find(|name| files.contains(name)) else { return Ok(None) };
    if !scale.is_some_and(|scale| matches!(scale.kind, ScaleKind::Tensor | ScaleKind::Nv16)) {
        return Err(CheckpointError::StaticActivationScale { what: format!("tensor {name}") });
    }
    let named = Named { name: name.clone(), stored: files.get(name)? };
    check_scalar(&named, wanted.packed.map(|part| part.num_experts))?;
    Ok(Some(named))
}

/// What the shape of `scale` says; `Err` lists the shapes that would fit.
fn scale_kind(
    wanted: &Wanted,
    scale: &Stored<'_>,
    declared: QuantScheme,
    inverse: bool,
) -> Result<ScaleKind, String> {
    let rows = wanted.total_rows();
    let blocks = [rows.div_ceil(BLOCK), wanted.cols.div_ceil(BLOCK)];
    let per_tensor = matches!(declared, QuantScheme::Fp8PerTensor(_) | QuantScheme::Fp8PerTensorStatic(_));
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
        match (self.scale.as_ref().map(|scale| scale.kind), &self.input_scale) {
            (None, _) => QuantScheme::Unquantized,
            (Some(ScaleKind::Block), _) => QuantScheme::Fp8Block(Fp8Format::E4M3Fn),
            (Some(ScaleKind::Channel), _) => QuantScheme::Fp8Ptpc(Fp8Format::E4M3Fn),
            (Some(ScaleKind::Tensor), None) => QuantScheme::Fp8PerTensor(Fp8Format::E4M3Fn),
            (Some(ScaleKind::Tensor), Some(_)) => QuantScheme::Fp8PerTensorStatic(Fp8Format::E4M3Fn),
            (Some(ScaleKind::Mx32), _) => QuantScheme::Mxfp4,
            (Some(ScaleKind::Nv16), _) => QuantScheme::Nvfp4,
        }
    }

    /// Bytes of the values, the scales and the bias.
    pub(crate) fn bytes(&self) -> u64 {
        let scales = self.scale.as_ref().map_or(0, |scale| {
            let groups = match scale.kind {
                ScaleKind::Mx32 => self.wanted.rows * (self.wanted.cols / MX_GROUP),
                _ => self.scale_bytes(scale).len(),
            };
            groups + scale.global.as_ref().map_or(0, |global| global.stored.bytes.len())
        });
        let bias = self.bias.as_ref().map_or(0, |bias| self.wanted.rows * bias.stored.dtype.bitsize() / 8);
        (self.wanted.rows * self.row_bytes() + scales + bias) as u64
    }

    /// Bytes of one row of values.
    fn row_bytes(&self) -> usize {
        let cols = self.wanted.cols;
        if self.dtype == DType::Fp4E2M1x2 { cols / 2 } else { cols * self.dtype.size_bytes() }
    }

    /// The static scale of the activations that this matrix meets.
    pub(crate) fn input_scale(&self) -> Result<Option<f32>> {
        let Some(named) = &self.input_scale else { return Ok(None) };
        let values = small(named).to_f32(Allowed::Divisor)?;
        let expert = self.wanted.packed.map_or(0, |part| part.expert);
        Ok(Some(values[expert.min(values.len() - 1)]))
    }

    /// Maps the values and reads the scales; `input_scale` is the layer's.
    pub(crate) fn read(self, input_scale: Option<f32>) -> Result<WeightMatrix<'c>> {
        let scale = self.scale.as_ref().map(|scale| self.read_scale(scale)).transpose()?;
        let bias = match (&self.bias, self.wanted.packed) {
            (Some(bias), Some(part)) => {
                let values = small(bias).to_f32(Allowed::Finite)?;
                let rows = values[part.expert * part.total_rows..][..part.total_rows].iter();
                Some(
                    rows.skip(part.first_row)
                        .step_by(part.row_step)
                        .take(self.wanted.rows)
                        .copied()
                        .collect(),
                )
            }
            _ => None,
        };
        let values = self.read_values();
        Ok(WeightMatrix { name: self.wanted.tensor, values, scale, bias, input_scale })
    }

    fn read_values(&self) -> Matrix<'c> {
        let (rows, cols, dtype) = (self.wanted.rows, self.wanted.cols, self.dtype);
        let bytes = self.values.bytes;
        match self.wanted.packed {
            Some(part) if self.wanted.form == Form::InOut => {
                let per_expert = bytes.len() / part.num_experts;
                let columns = Columns {
                    bytes: &bytes[part.expert * per_expert..][..per_expert],
                    columns: part.total_rows,
                    first: part.first_row,
                    step: part.row_step,
                };
                Matrix::transposed([rows, cols], dtype, columns)
            }
            _ => self.strided(bytes, dtype, self.row_bytes()),
        }
    }

    /// The rows of this projection in a stored tensor whose rows have `row_bytes` bytes.
    fn strided(&self, bytes: &'c [u8], dtype: DType, row_bytes: usize) -> Matrix<'c> {
        let rows = self.wanted.rows;
        let (first, step) =
            self.wanted.packed.map_or((0, 1), |p| (p.expert * p.total_rows + p.first_row, p.row_step));
        let span = (rows - 1) * step + 1;
        let cols = row_bytes / dtype.size_bytes();
        Matrix::strided([rows, cols], step * cols, dtype, &bytes[first * row_bytes..][..span * row_bytes])
    }

    fn read_scale(&self, scale: &FoundScale<'c>) -> Result<WeightScale<'c>> {
        let cols = self.wanted.cols;
        match scale.kind {
            ScaleKind::Mx32 => {
                let codes = self.strided(scale.stored.bytes, DType::E8M0, cols / MX_GROUP);
                check_codes(&codes, scale, e8m0, "finite")?;
                return Ok(WeightScale::Mx32(codes));
            }
            ScaleKind::Nv16 => {
                let blocks = self.strided(scale.stored.bytes, DType::Fp8E4M3Fn, cols / NV_GROUP);
                check_codes(&blocks, scale, e4m3, "finite and not negative")?;
                let global = match &scale.global {
                    Some(global) => small(global).to_f32(Allowed::SecondLevel)?[0],
                    None => 1.0,
                };
                return Ok(WeightScale::Nv16 { blocks, global });
            }
            _ => {}
        }
        let named = SmallTensor {
            name: &scale.name,
            path: scale.stored.path,
            dtype: scale.stored.dtype,
            bytes: self.scale_bytes(scale),
        };
        let values = named.to_f32(Allowed::NotNegative)?;
        Ok(match scale.kind {
            ScaleKind::Block => WeightScale::Block128(values),
            ScaleKind::Channel => WeightScale::PerChannel(values),
            _ => WeightScale::PerTensor(values[0]),
        })
    }

    /// The bytes of this projection's FP8 scales inside the stored tensor.
    fn scale_bytes(&self, scale: &FoundScale<'c>) -> &'c [u8] {
        let bytes = scale.stored.bytes;
        let Some(part) = self.wanted.packed else { return bytes };
        let per_expert = bytes.len() / part.num_experts;
        let bytes = &bytes[part.expert * per_expert..(part.expert + 1) * per_expert];
        // What one row of scales covers, and so where this projection's rows of them start and end.
        let unit = match scale.kind {
            ScaleKind::Block => BLOCK,
            ScaleKind::Channel => 1,
            _ => return bytes,
        };
        let per_row = bytes.len() / part.total_rows.div_ceil(unit);
        let first = part.first_row / unit;
        let count = self.wanted.rows.div_ceil(unit);
        &bytes[first * per_row..(first + count) * per_row]
    }
}

fn small<'a>(named: &'a Named<'_>) -> SmallTensor<'a> {
    let Stored { path, dtype, bytes, .. } = named.stored;
    SmallTensor { name: &named.name, path, dtype, bytes }
}

/// Refuses one-byte scales that are NaN or negative; the index is that inside the matrix.
fn check_codes(
    codes: &Matrix<'_>,
    scale: &FoundScale<'_>,
    decode: fn(u8) -> f32,
    wanted: &'static str,
) -> Result<()> {
    let cols = codes.cols();
    let fine: [bool; 256] = std::array::from_fn(|code| decode(code as u8) >= 0.0);
    for row in 0..codes.rows() {
        let bad = |&col: &usize| !fine[usize::from(codes.byte(row, col))];
        if let Some(col) = (0..cols).find(bad) {
            return Err(CheckpointError::BadValue {
                tensor: scale.name.clone(),
                path: scale.stored.path.to_owned(),
                index: row * cols + col,
                value: decode(codes.byte(row, col)),
                wanted,
            });
        }
    }
    Ok(())
}
