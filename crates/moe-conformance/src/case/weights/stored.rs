//! One matrix in the form of a checkpoint.

use fused_moe_core::{BLOCK, DType, Fp8Format, QuantScheme, TensorView, WeightMatrix, WeightScale};
use half::bf16;

use crate::oracle::{Codec, fp4};
use crate::seed::{Seed, normal};
use crate::stored::{Scale, Values};

/// What a matrix is drawn for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Drawn {
    /// Rows and columns.
    pub(super) dims: [usize; 2],
    /// Rows and columns that are not padding.
    pub(super) used: [usize; 2],
    pub(super) quant: QuantScheme,
    /// Standard deviation of the bias, if there is one.
    pub(super) bias: Option<f32>,
    pub(super) input_scale: Option<f32>,
}

/// One matrix in the form of a checkpoint.
#[derive(Clone, Debug)]
pub(super) struct StoredMatrix {
    dims: [usize; 2],
    values: Values,
    scale: Scale,
    bias: Option<Vec<bf16>>,
    input_scale: Option<f32>,
}

impl StoredMatrix {
    pub(super) fn random(drawn: Drawn, seed: Seed) -> Self {
        let Drawn { dims: dims @ [rows, cols], quant, .. } = drawn;
        let mut rng = seed.rng();
        let deviation = 1.0 / (cols as f32).sqrt();
        let values: Vec<bf16> =
            (0..rows * cols).map(|_| bf16::from_f32(deviation * normal(&mut rng))).collect();
        let (values, scale) = match quant {
            QuantScheme::Mxfp4 | QuantScheme::Nvfp4 => fp4_codes(&values, cols, quant),
            _ => match quant.fp8() {
                Some(format) => fp8_codes(&values, dims, quant, format),
                None => (Values::Bf16(values), Scale::None),
            },
        };
        let bias = drawn
            .bias
            .map(|deviation| (0..rows).map(|_| bf16::from_f32(deviation * normal(&mut rng))).collect());
        let mut stored = Self { dims, values, scale, bias, input_scale: drawn.input_scale };
        stored.fill_padding(drawn.used);
        stored
    }

    /// Puts NaN, or the largest code where there is none, wherever nobody may read.
    fn fill_padding(&mut self, used: [usize; 2]) {
        let [rows, cols] = self.dims;
        let is_padding = |i: usize| i / cols >= used[0] || i % cols >= used[1];
        match &mut self.values {
            Values::Bf16(values) => garble(values, is_padding, bf16::NAN),
            Values::Fp8(codes, format) => {
                garble(codes, is_padding, if *format == Fp8Format::E4M3Fn { 0x7f } else { 0x80 });
            }
            Values::Fp4(codes) => {
                for i in (0..rows * cols).filter(|&i| is_padding(i)) {
                    fp4::pack(&mut codes[i / cols * (cols / 2)..][..cols / 2], i % cols, 7);
                }
            }
        }
        // A scale is padding where all that it scales is.
        let tiles = |[height, width]: [usize; 2]| {
            let per_row = cols.div_ceil(width);
            move |i: usize| i / per_row * height >= used[0] || i % per_row * width >= used[1]
        };
        match &mut self.scale {
            Scale::None | Scale::Tensor(_) => {}
            Scale::Channel(scales) => garble(scales, tiles([1, cols]), f32::NAN),
            Scale::Block(scales) => garble(scales, tiles([BLOCK, BLOCK]), f32::NAN),
            Scale::Mx(scales) => garble(scales, tiles([1, fp4::MX_GROUP]), 0xff),
            Scale::Nv(scales, _) => garble(scales, tiles([1, fp4::NV_GROUP]), 0x7f),
        }
        if let Some(bias) = &mut self.bias {
            bias[used[0]..].fill(bf16::NAN);
        }
    }

    pub(super) fn rescale_input(&mut self) {
        self.input_scale = self.input_scale.map(|scale| 1.5 * scale);
    }

    pub(super) fn view(&self) -> WeightMatrix<'_> {
        const FITS: &str = "the vector was made for these dimensions";
        let [rows, cols] = self.dims;
        let values = match &self.values {
            Values::Bf16(values) => TensorView::from_slice(values, DType::Bf16, &self.dims),
            Values::Fp8(codes, format) => TensorView::from_slice(codes, format.dtype(), &self.dims),
            Values::Fp4(codes) => TensorView::from_slice(codes, DType::Fp4E2M1x2, &[rows, cols / 2]),
        };
        let floats = |scales, dims: &[usize]| TensorView::from_slice(scales, DType::F32, dims).expect(FITS);
        let bytes = |scales, dtype, dims: &[usize]| TensorView::from_slice(scales, dtype, dims).expect(FITS);
        let scale = match &self.scale {
            Scale::None => None,
            Scale::Tensor(scale) => Some(WeightScale::Tensor(*scale)),
            Scale::Channel(scales) => Some(WeightScale::Channel(floats(scales, &[rows]))),
            Scale::Block(scales) => {
                Some(WeightScale::Block128(floats(scales, &[rows.div_ceil(BLOCK), cols.div_ceil(BLOCK)])))
            }
            Scale::Mx(scales) => {
                Some(WeightScale::Mx32(bytes(scales, DType::E8M0, &[rows, cols / fp4::MX_GROUP])))
            }
            Scale::Nv(blocks, global) => {
                let blocks = bytes(blocks, DType::Fp8E4M3Fn, &[rows, cols / fp4::NV_GROUP]);
                Some(WeightScale::Nv16 { blocks, global: *global })
            }
        };
        let bias = self.bias.as_ref().map(|bias| TensorView::from_slice(bias, DType::Bf16, &[rows]));
        WeightMatrix {
            values: values.expect(FITS),
            scale,
            bias: bias.map(|bias| bias.expect(FITS)),
            input_scale: self.input_scale,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.values.bytes() + self.scale.bytes()
    }
}

fn garble<T: Copy>(values: &mut [T], is_padding: impl Fn(usize) -> bool, garbage: T) {
    values.iter_mut().enumerate().filter(|(i, _)| is_padding(*i)).for_each(|(_, value)| *value = garbage);
}

fn largest(values: &[bf16]) -> f32 {
    values.iter().fold(0f32, |m, x| m.max(x.to_f32().abs()))
}

fn fp8_codes(
    values: &[bf16],
    [rows, cols]: [usize; 2],
    quant: QuantScheme,
    format: Fp8Format,
) -> (Values, Scale) {
    let (tile_rows, tile_cols) = match quant {
        QuantScheme::Fp8Block(_) => (BLOCK, BLOCK),
        QuantScheme::Fp8Ptpc(_) => (1, cols),
        _ => (rows, cols),
    };
    let scale_cols = cols.div_ceil(tile_cols);
    let scale_at = |i: usize| i / cols / tile_rows * scale_cols + i % cols / tile_cols;
    let mut amax = vec![0f32; rows.div_ceil(tile_rows) * scale_cols];
    for (i, x) in values.iter().enumerate() {
        let amax = &mut amax[scale_at(i)];
        *amax = amax.max(x.to_f32().abs());
    }
    let codec = Codec::new(format);
    let scales: Vec<f32> = amax.into_iter().map(|amax| codec.scale(amax)).collect();
    let codes = values.iter().enumerate().map(|(i, x)| codec.quantize(x.to_f32(), scales[scale_at(i)]));
    let codes = Values::Fp8(codes.collect(), format);
    match quant {
        QuantScheme::Fp8Block(_) => (codes, Scale::Block(scales)),
        QuantScheme::Fp8Ptpc(_) => (codes, Scale::Channel(scales)),
        _ => (codes, Scale::Tensor(scales[0])),
    }
}

/// Codes of rows whose length is a multiple of the group.
fn fp4_codes(values: &[bf16], cols: usize, quant: QuantScheme) -> (Values, Scale) {
    let mut codes = vec![0; values.len() / 2];
    let mut scales = Vec::new();
    let codec = Codec::new(Fp8Format::E4M3Fn);
    let global = largest(values).max(1e-10) / (fp4::MAX * 448.0);
    let group_size = if quant == QuantScheme::Mxfp4 { fp4::MX_GROUP } else { fp4::NV_GROUP };
    for (row, codes) in values.chunks_exact(cols).zip(codes.chunks_exact_mut(cols / 2)) {
        for (index, group) in row.chunks(group_size).enumerate() {
            let amax = largest(group);
            let scale = match quant {
                QuantScheme::Mxfp4 => fp4::mx_scale(amax),
                _ => fp4::nv_scale(&codec, amax, global),
            };
            scales.push(scale);
            for (column, x) in group.iter().enumerate() {
                let code = match quant {
                    QuantScheme::Mxfp4 => fp4::encode((x.to_f64() / fp4::decode_e8m0(scale)) as f32),
                    _ => fp4::nv_code(x.to_f32(), codec.decode(scale), global),
                };
                fp4::pack(codes, index * group_size + column, code);
            }
        }
    }
    let scale = match quant {
        QuantScheme::Mxfp4 => Scale::Mx(scales),
        _ => Scale::Nv(scales, global),
    };
    (Values::Fp4(codes), scale)
}
