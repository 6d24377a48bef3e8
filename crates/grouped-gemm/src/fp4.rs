//! FP4 weights: four bits each in memory, widened to bf16 a stretch of K at a time.
//!
//! A byte of a checkpoint, two neighbours of K, is a K pair of a column, so a panel holds 64 of them side by side, and
//! the scales of a group lie likewise. Code and group scale multiply to a bf16 exactly: two significant bits, and
//! for NVFP4 the four of an E4M3 scale. What remains is one factor per column on the finished sum: the global scale
//! of NVFP4, and a power of two where MXFP4 scales reach an end of bf16's normal range.

use std::fmt;
use std::ops::RangeInclusive;

use quant::fp4::{E8M0_NAN, MX_GROUP, NV_GROUP};

use crate::aligned::Aligned;
use crate::kernel::Kernel;
use crate::panel::{Columns, PANEL, PackedShape, PanelPairs, for_each_column};
use crate::scale::{ColumnTerms, PackedScale, gate_up_shape};
use crate::tuning::WeightKind;
use crate::weights::{PackedWeight, row_of, sealed};
use crate::{Fp8Kind, GemmError};

/// E8M0 scales under which every code that is not zero is a normal bf16, which `vdpbf16ps` asks for.
const NORMAL_E8M0: RangeInclusive<u8> = 2..=252;

/// A row-major FP4 (E2M1) weight `[n, k]` with its scales.
#[derive(Clone, Copy, Debug)]
pub struct Fp4Weight<'a> {
    /// Pairs of codes, `[n, k / 2]`, the even column in the low half of a byte.
    pub codes: &'a [u8],
    /// Rows, which are output features.
    pub n: usize,
    /// Columns, which are input features: a multiple of the group of the scales.
    pub k: usize,
    /// Their scales.
    pub scale: Fp4Scale<'a>,
}

/// Scales of an FP4 weight `[n, k]`, row-major.
#[derive(Clone, Copy, Debug)]
pub enum Fp4Scale<'a> {
    /// MXFP4: `w = code · 2^(scale − 127)`, `[n, k / 32]` E8M0.
    Mx32(&'a [u8]),
    /// NVFP4: `w = code · scale · global`.
    Nv16 {
        /// `[n, k / 16]` E4M3 (OCP).
        blocks: &'a [u8],
        /// For the whole matrix.
        global: f32,
    },
}

impl Fp4Scale<'_> {
    fn kind(&self) -> Fp4Kind {
        match self {
            Fp4Scale::Mx32(_) => Fp4Kind::Mx32,
            Fp4Scale::Nv16 { .. } => Fp4Kind::Nv16,
        }
    }

    fn codes(&self) -> &[u8] {
        match self {
            Fp4Scale::Mx32(scales) => scales,
            Fp4Scale::Nv16 { blocks, .. } => blocks,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fp4Kind {
    Mx32,
    Nv16,
}

impl Fp4Kind {
    const fn group(self) -> usize {
        match self {
            Fp4Kind::Mx32 => MX_GROUP,
            Fp4Kind::Nv16 => NV_GROUP,
        }
    }
}

impl Fp4Weight<'_> {
    fn check(&self) -> Result<(), GemmError> {
        let &Fp4Weight { codes, n, k, ref scale } = self;
        if n == 0 || k == 0 {
            return Err(GemmError::EmptyWeight { n, k });
        }
        let group = scale.kind().group();
        if !k.is_multiple_of(group) {
            return Err(GemmError::RaggedGroup { k, group });
        }
        if n.checked_mul(k / 2) != Some(codes.len()) {
            return Err(GemmError::Fp4Length { n, k, found: codes.len() });
        }
        let (wanted, found) = (n * (k / group), scale.codes().len());
        if found != wanted {
            let what = if group == MX_GROUP { "1x32 weight scale" } else { "1x16 weight scale" };
            return Err(GemmError::ScaleLength { what, wanted, found });
        }
        let is_nan = |&code: &u8| match scale {
            Fp4Scale::Mx32(_) => code == E8M0_NAN,
            Fp4Scale::Nv16 { .. } => code & 0x7f == 0x7f,
        };
        match scale.codes().iter().position(is_nan) {
            Some(at) => {
                let (row, column) = (at / (k / group), at % (k / group) * group);
                Err(GemmError::NanScale { row, column, code: scale.codes()[at] })
            }
            None => Ok(()),
        }
    }

    /// The power of two that the codes of `row` leave to the finished sum, so that all of them are normal bf16 numbers.
    fn shift(&self, row: usize) -> Result<i8, GemmError> {
        let Fp4Scale::Mx32(scales) = self.scale else { return Ok(0) };
        let groups = self.k / MX_GROUP;
        let scales = &scales[row * groups..][..groups];
        let codes = self.codes[row * self.k / 2..][..self.k / 2].chunks(MX_GROUP / 2);
        // Zeros are zeros under every scale.
        let used = scales.iter().zip(codes).filter(|(_, codes)| codes.iter().any(|pair| pair & 0x77 != 0));
        let (start, end) = (i16::from(*NORMAL_E8M0.start()), i16::from(*NORMAL_E8M0.end()));
        let (least, most) = used.fold((end, start), |(least, most), (&scale, _)| {
            (least.min(i16::from(scale)), most.max(i16::from(scale)))
        });
        let shift = if least < start { least - start } else { (most - end).max(0) };
        if least - shift < start || most - shift > end {
            return Err(GemmError::Fp4Range { row, least: least as u8, most: most as u8 });
        }
        Ok(shift as i8)
    }
}

/// An FP4 weight in K-pair panels of 64 columns, four bits per weight, with its scales.
///
/// `[ceil(N / 64)][K / 2][64]` pairs of codes and `[ceil(N / 64)][K / 32 or K / 16][64]` scales.
pub struct PackedFp4 {
    shape: PackedShape,
    kind: Fp4Kind,
    codes: Aligned<u8>,
    scales: Aligned<u8>,
    /// `[panels][64]`, see [`Fp4Weight::shift`].
    shifts: Vec<i8>,
    terms: ColumnTerms,
}

impl PackedFp4 {
    /// Packs a weight `[N, K]`.
    ///
    /// # Errors
    /// An empty weight, K that is not whole groups, buffers of the wrong length, a scale that is NaN, or a row whose
    /// E8M0 scales lie so far apart that they share no factor under which all of them are normal bf16 numbers
    /// ([`GemmError::Fp4Range`]).
    pub fn pack(weight: Fp4Weight<'_>) -> Result<Self, GemmError> {
        weight.check()?;
        let shape = PackedShape { n: weight.n, k: weight.k, columns: Columns::Plain };
        Self::place(shape, &[weight])
    }

    /// Packs gate and up, both `[I, K]`, so that their product is formed on the tile. Each keeps its own scales.
    ///
    /// # Errors
    /// As [`pack`](Self::pack), or different shapes or kinds of scales.
    pub fn pack_gate_up(gate: Fp4Weight<'_>, up: Fp4Weight<'_>) -> Result<Self, GemmError> {
        gate.check()?;
        up.check()?;
        let describe = |w: &Fp4Weight<'_>| format!("[{}, {}] with {:?} scales", w.n, w.k, w.scale.kind());
        if describe(&gate) != describe(&up) {
            return Err(GemmError::GateUpMismatch { gate: describe(&gate), up: describe(&up) });
        }
        Self::place(gate_up_shape(gate.n, gate.k), &[gate, up])
    }

    /// The pairs of codes as they were packed, row-major `[N, K / 2]`; gate rows before up rows for a pair.
    pub fn unpack(&self) -> Vec<u8> {
        self.rows_of(&self.codes, self.shape.pairs())
    }

    /// The scales as they were packed, row-major `[N, K / 32]` (MXFP4) or `[N, K / 16]` (NVFP4).
    pub fn unpack_scales(&self) -> Vec<u8> {
        self.rows_of(&self.scales, self.groups())
    }

    fn groups(&self) -> usize {
        self.shape.k / self.kind.group()
    }

    /// Bytes `[panels][lines][64]` as rows `[N, lines]`.
    fn rows_of(&self, packed: &Aligned<u8>, lines: usize) -> Vec<u8> {
        let mut rows = vec![0; self.shape.n * lines];
        for_each_column(&self.shape, |row, panel, column| {
            let column = packed.as_slice()[panel * lines * PANEL + column..].iter().step_by(PANEL);
            rows[row * lines..][..lines].iter_mut().zip(column).for_each(|(to, from)| *to = *from);
        });
        rows
    }

    fn place(shape: PackedShape, parts: &[Fp4Weight<'_>]) -> Result<Self, GemmError> {
        let kind = parts[0].scale.kind();
        let part_rows = shape.n / parts.len();
        let mut row_shifts = Vec::with_capacity(shape.n);
        for part in parts {
            for row in 0..part_rows {
                row_shifts.push(part.shift(row)?);
            }
        }
        let factor = |row: usize| match parts[row / part_rows].scale {
            Fp4Scale::Mx32(_) => f32::from_bits(((127 + i32::from(row_shifts[row])) as u32) << 23),
            Fp4Scale::Nv16 { global, .. } => global,
        };
        let mut shifts = vec![0; shape.panels() * PANEL];
        for_each_column(&shape, |row, panel, column| shifts[panel * PANEL + column] = row_shifts[row]);
        let codes: Vec<_> = parts.iter().map(|part| part.codes).collect();
        let scales: Vec<_> = parts.iter().map(|part| part.scale.codes()).collect();
        Ok(PackedFp4 {
            shape,
            kind,
            codes: columns_of(&shape, &codes, shape.pairs()),
            scales: columns_of(&shape, &scales, shape.k / kind.group()),
            shifts,
            terms: ColumnTerms::scaled(PackedScale::per_column(&shape, factor)),
        })
    }
}

/// Rows `[N, lines]` of the parts, stacked on each other, as bytes `[panels][lines][64]`.
fn columns_of(shape: &PackedShape, parts: &[&[u8]], lines: usize) -> Aligned<u8> {
    let mut packed = Aligned::zeroed(shape.panels() * lines * PANEL);
    let places = packed.as_mut_slice();
    for_each_column(shape, |row, panel, column| {
        let places = places[panel * lines * PANEL + column..].iter_mut().step_by(PANEL);
        places.zip(row_of(parts, row, lines)).for_each(|(to, from)| *to = *from);
    });
    packed
}

impl PackedWeight for PackedFp4 {
    const KIND: WeightKind = WeightKind::Fp4;

    fn shape(&self) -> &PackedShape {
        &self.shape
    }
    fn bytes(&self) -> usize {
        self.codes.as_slice().len() + self.scales.as_slice().len() + self.shifts.len() + self.terms.bytes()
    }
}

impl sealed::Sealed for PackedFp4 {
    #[expect(private_interfaces, reason = "a sealed trait is not callable from outside")]
    fn panel(&self, panel: usize) -> PanelPairs<'_> {
        let of_panel = |len: usize| panel * len..(panel + 1) * len;
        PanelPairs::Fp4(Fp4Pairs {
            codes: &self.codes.as_slice()[of_panel(self.shape.pairs() * PANEL)],
            scales: &self.scales.as_slice()[of_panel(self.groups() * PANEL)],
            shifts: &self.shifts[of_panel(PANEL)],
            kind: self.kind,
        })
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

impl fmt::Debug for PackedFp4 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackedFp4({}, {:?})", self.shape, self.kind)
    }
}

/// A run of K pairs of an FP4 panel, of whole groups.
#[derive(Clone, Copy)]
pub(crate) struct Fp4Pairs<'a> {
    /// `[pairs][64]`, a byte per pair and column.
    codes: &'a [u8],
    /// `[groups][64]`.
    scales: &'a [u8],
    /// `[64]`.
    shifts: &'a [i8],
    kind: Fp4Kind,
}

impl Fp4Pairs<'_> {
    pub(crate) fn slice(self, pairs: std::ops::Range<usize>) -> Self {
        let per_group = self.kind.group() / 2;
        let groups = pairs.start / per_group..pairs.end / per_group;
        Fp4Pairs {
            codes: &self.codes[pairs.start * PANEL..pairs.end * PANEL],
            scales: &self.scales[groups.start * PANEL..groups.end * PANEL],
            ..self
        }
    }

    /// A byte per pair and column.
    pub(crate) fn codes(&self) -> &[u8] {
        self.codes
    }

    /// Number of operand words.
    pub(crate) fn words(&self) -> usize {
        self.codes.len()
    }

    /// Widens the run to the order of a bf16 panel, times the scales of the groups.
    #[inline(always)]
    pub(crate) fn decode(self, kernel: impl Kernel, words: &mut [u32]) {
        let step = self.kind.group() / 2 * PANEL;
        let groups = self.codes.chunks_exact(step).zip(words.chunks_exact_mut(step));
        for ((codes, words), scales) in groups.zip(self.scales.chunks_exact(PANEL)) {
            kernel.decode_fp4(codes, &self.group_scales(scales), words);
        }
    }

    #[inline(always)]
    fn group_scales(&self, codes: &[u8]) -> [f32; PANEL] {
        let mut scales = [0.0; PANEL];
        for ((scale, &code), &shift) in scales.iter_mut().zip(codes).zip(self.shifts) {
            *scale = match self.kind {
                Fp4Kind::Mx32 => {
                    // Only a group of zeros can have a scale outside the range; it must stay finite.
                    let (start, end) = (i32::from(*NORMAL_E8M0.start()), i32::from(*NORMAL_E8M0.end()));
                    let exponent = (i32::from(code) - i32::from(shift)).clamp(start, end);
                    f32::from_bits((exponent as u32) << 23)
                }
                Fp4Kind::Nv16 => Fp8Kind::E4M3Fn.to_bf16(code).to_f32(),
            };
        }
        scales
    }
}

#[cfg(test)]
mod tests {
    use quant::fp4::VALUES;
    use rand::{RngCore, SeedableRng};
    use rand_pcg::Pcg64Mcg;
    use rstest::rstest;

    use super::*;
    use crate::portable::Portable;

    fn random(rng: &mut Pcg64Mcg, len: usize, mask: u8) -> Vec<u8> {
        let mut bytes = vec![0; len];
        rng.fill_bytes(&mut bytes);
        bytes.iter().map(|byte| byte & mask).collect()
    }

    #[rstest]
    fn packing_loses_nothing(
        #[values(1, 31, 64, 100, 129)] n: usize,
        #[values(32, 96, 160)] k: usize,
        #[values(MX_GROUP, NV_GROUP)] group: usize,
    ) {
        let seed = rand::random();
        println!("seed {seed}");
        let mut rng = Pcg64Mcg::seed_from_u64(seed);
        let codes = random(&mut rng, n * k, 0xff);
        // Below 0x40 there are neither NaN scales nor, with the offset, any at an end of the range.
        let scales: Vec<u8> = random(&mut rng, 2 * n * k / group, 0x3f).iter().map(|code| code + 2).collect();
        let weight = |part: usize| {
            let (codes, scales) = (&codes[part * n * k / 2..][..n * k / 2], &scales[part * n * k / group..]);
            let scales = &scales[..n * k / group];
            let scale = match group {
                MX_GROUP => Fp4Scale::Mx32(scales),
                _ => Fp4Scale::Nv16 { blocks: scales, global: 0.25 },
            };
            Fp4Weight { codes, n, k, scale }
        };
        let plain = PackedFp4::pack(weight(0)).unwrap();
        assert_eq!(
            (plain.unpack(), plain.unpack_scales()),
            (codes[..n * k / 2].to_vec(), scales[..n * k / group].to_vec())
        );
        let pair = PackedFp4::pack_gate_up(weight(0), weight(1)).unwrap();
        assert_eq!((pair.unpack(), pair.unpack_scales()), (codes, scales));
    }

    /// Every byte of two codes under every scale that a group can have, bit for bit.
    #[rstest]
    fn every_kernel_decodes_every_pair_of_codes(#[values(Fp4Kind::Mx32, Fp4Kind::Nv16)] kind: Fp4Kind) {
        let codes: Vec<u8> = (0..=0xff).flat_map(|pair| [pair; PANEL]).collect();
        let scales: Vec<f32> = match kind {
            Fp4Kind::Mx32 => NORMAL_E8M0.map(|exponent| f32::from_bits(u32::from(exponent) << 23)).collect(),
            Fp4Kind::Nv16 => (0..=0xff)
                .filter(|code| code & 0x7f != 0x7f)
                .map(|code| Fp8Kind::E4M3Fn.to_bf16(code).to_f32())
                .collect(),
        };
        let check = |name: &str, decode: &dyn Fn(&[f32; PANEL], &mut [u32])| {
            for first in 0..scales.len() {
                let columns: [f32; PANEL] = std::array::from_fn(|i| scales[(first + i) % scales.len()]);
                let mut words = vec![0xa5a5_a5a5; codes.len()];
                decode(&columns, &mut words);
                for (i, (&word, &pair)) in words.iter().zip(&codes).enumerate() {
                    let scale = columns[i % PANEL];
                    for (code, half) in [(pair & 0xf, word << 16), (pair >> 4, word & 0xffff_0000)] {
                        let want = VALUES[usize::from(code)] * scale;
                        assert_eq!(
                            half,
                            want.to_bits(),
                            "{name}: code {code:#x} of {pair:#04x}, scale {scale:e}"
                        );
                    }
                }
            }
        };
        check("portable", &|scales, words| Portable.decode_fp4(&codes, scales, words));
        #[cfg(target_arch = "x86_64")]
        if let Some(kernel) = crate::avx2::Avx2::new() {
            check("avx2", &|scales, words| kernel.decode_fp4(&codes, scales, words));
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(kernel) = crate::avx512::Avx512::new() {
            check("avx512", &|scales, words| kernel.decode_fp4(&codes, scales, words));
        }
    }

    #[test]
    fn four_bits_stay_four_bits_in_memory() {
        let (n, k) = (256, 512);
        let (codes, scales) = (vec![0x21; n * k / 2], vec![127; n * k / 32]);
        let packed =
            PackedFp4::pack(Fp4Weight { codes: &codes, n, k, scale: Fp4Scale::Mx32(&scales) }).unwrap();
        let stored = codes.len() + scales.len();
        assert!(packed.bytes() <= stored + stored / 50, "{} bytes", packed.bytes());
    }

    /// The weight of one row and two groups of 32, zeros but for one code in each.
    fn two_groups([first, second]: [u8; 2], codes: [u8; 2]) -> Result<PackedFp4, GemmError> {
        let mut pairs = [0; 32];
        (pairs[0], pairs[16]) = (codes[0], codes[1]);
        PackedFp4::pack(Fp4Weight { codes: &pairs, n: 1, k: 64, scale: Fp4Scale::Mx32(&[first, second]) })
    }

    #[rstest]
    #[case([2, 252], 0)]
    #[case([0, 250], -2)]
    #[case([1, 251], -1)]
    #[case([254, 4], 2)]
    #[case([253, 3], 1)]
    #[case([0, 0], -2)]
    fn scales_share_a_shift(#[case] scales: [u8; 2], #[case] shift: i8) {
        let packed = two_groups(scales, [0x07, 0x10]).unwrap();
        assert_eq!((packed.shifts[0], packed.unpack_scales()), (shift, scales.to_vec()));
    }

    #[rstest]
    #[case([0, 251])]
    #[case([1, 252])]
    #[case([3, 254])]
    #[case([0, 254])]
    fn scales_too_far_apart_are_refused(#[case] scales: [u8; 2]) {
        let error = two_groups(scales, [0x07, 0x10]).unwrap_err();
        assert_eq!(error, GemmError::Fp4Range { row: 0, least: scales[0], most: scales[1] });
        // A group of zeros, of either sign, has no part in it.
        two_groups(scales, [0x88, 0x10]).unwrap();
        two_groups(scales, [0x20, 0x08]).unwrap();
    }

    #[test]
    fn wrong_weights_are_refused_with_their_values() {
        let (codes, scales) = ([0x11; 64], [127; 4]);
        let refused = |n, k, scale| PackedFp4::pack(Fp4Weight { codes: &codes, n, k, scale }).unwrap_err();
        let mx = |len| Fp4Scale::Mx32(&scales[..len]);
        let nv = |blocks| Fp4Scale::Nv16 { blocks, global: 1.0 };
        assert_eq!(refused(0, 32, mx(4)), GemmError::EmptyWeight { n: 0, k: 32 });
        assert_eq!(refused(4, 48, mx(4)), GemmError::RaggedGroup { k: 48, group: 32 });
        assert_eq!(refused(4, 40, nv(&scales)), GemmError::RaggedGroup { k: 40, group: 16 });
        assert_eq!(refused(4, 64, mx(4)), GemmError::Fp4Length { n: 4, k: 64, found: 64 });
        let what = "1x32 weight scale";
        assert_eq!(refused(2, 64, mx(3)), GemmError::ScaleLength { what, wanted: 4, found: 3 });
        let what = "1x16 weight scale";
        assert_eq!(refused(2, 64, nv(&scales)), GemmError::ScaleLength { what, wanted: 8, found: 4 });
        let nan = Fp4Scale::Mx32(&[1, 1, 1, 0xff]);
        assert_eq!(refused(2, 64, nan), GemmError::NanScale { row: 1, column: 32, code: 0xff });
        assert_eq!(
            refused(2, 64, nv(&[1, 1, 1, 1, 1, 0xff, 1, 1])),
            GemmError::NanScale { row: 1, column: 16, code: 0xff }
        );
        let weight = |scale| Fp4Weight { codes: &codes, n: 2, k: 64, scale };
        let pair = PackedFp4::pack_gate_up(weight(mx(4)), weight(nv(&[1; 8]))).unwrap_err();
        assert!(matches!(pair, GemmError::GateUpMismatch { .. }), "{pair}");
    }
}
