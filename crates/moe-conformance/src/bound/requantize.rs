//! The second quantisation of activations that are known up to an error: which of them can fall on either side of a
//! rounding boundary, and what that does to codes and scales.

use fused_moe_core::{CombineWire, Granularity, QuantScheme};
use half::bf16;

use super::rounding::{neighbours, to_bf16};
use super::sums::{Bounded, DEVIATIONS, U};
use crate::oracle::{Codec, Codes, fp4};

/// Largest activations of a group that are tried one by one. More are possible only where a group is noise.
const MOST_CANDIDATES: u16 = 8;

/// What gemm2 reads, and what it may read instead.
#[derive(Debug, Default)]
pub(crate) struct Requantized {
    /// `[rows, width]`.
    pub(crate) values: Vec<f64>,
    /// Of each row.
    pub(crate) moves: Vec<Moves>,
}

/// How the values of one row may move.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Moves {
    /// Columns of values that may move by themselves, and how far either way.
    elements: Vec<(usize, f64)>,
    /// Groups whose scale may be another one.
    scales: Vec<OtherScale>,
}

/// A group of columns under other scales than its own.
#[derive(Clone, Debug, PartialEq)]
struct OtherScale {
    /// First column.
    start: usize,
    /// For each other scale, by how much the values of the group move together.
    moves: Vec<Vec<f64>>,
}

impl Moves {
    /// How far the product of the row with `weights` may move: elements each by themselves, the values of a group
    /// together.
    pub(crate) fn reach(&self, weights: &[f64]) -> f64 {
        let (mut elements, mut squares) = (0.0, 0.0);
        for &(column, by) in &self.elements {
            let by = by * weights[column].abs();
            elements += by;
            squares += by * by;
        }
        // Many do not all move to the same side.
        let elements = elements.min(DEVIATIONS * f64::sqrt(squares));
        let scales = self.scales.iter().map(|group| {
            let weights = &weights[group.start..];
            let products =
                group.moves.iter().map(|by| by.iter().zip(weights).map(|(d, w)| d * w).sum::<f64>());
            products.fold(0.0, |most: f64, product| most.max(product.abs()))
        });
        elements + scales.sum::<f64>()
    }

    /// How far each value of the row may move.
    fn of_columns(&self, width: usize) -> Vec<f64> {
        let mut reach = vec![0.0; width];
        for &(column, by) in &self.elements {
            reach[column] += by;
        }
        for OtherScale { start, moves } in &self.scales {
            let columns = moves.iter().map(Vec::len).max().unwrap_or(0);
            for offset in 0..columns {
                let by = moves.iter().map(|by| by[offset].abs());
                reach[start + offset] += by.fold(0.0, f64::max);
            }
        }
        reach
    }
}

/// Rows `[rows, width]` as a combine carries them: rounded to bf16, and through FP8 if `wire` says so.
pub(crate) fn travelled(wire: CombineWire, rows: &[Bounded], width: usize) -> Vec<Bounded> {
    let CombineWire::Fp8Block(format) = wire else { return rows.iter().map(|&x| to_bf16(x)).collect() };
    let codes = Codes { quant: QuantScheme::Fp8Block(format), input_scale: None };
    let Requantized { values, moves } = requantized(&codes, rows, width);
    let errors = moves.iter().flat_map(|moves| moves.of_columns(width));
    // A code times its scale is rounded to f32.
    let bounded = |(value, error): (f64, f64)| Bounded { value, error: error + U * (value.abs() + error) };
    values.into_iter().zip(errors).map(bounded).collect()
}

/// An activation that may be rounded to bf16 in more than one way.
#[derive(Clone, Copy)]
struct Uncertain {
    /// Position in `[rows, width]`.
    at: usize,
    low: bf16,
    high: bf16,
}

impl Uncertain {
    fn magnitudes(&self) -> (f32, f32) {
        let (low, high) = (self.low.to_f32(), self.high.to_f32());
        let least = if low < 0.0 && high > 0.0 { 0.0 } else { low.abs().min(high.abs()) };
        (least, low.abs().max(high.abs()))
    }
}

/// The activations `[rows, width]`, rounded to bf16 and quantised by `codes`, with their moves.
pub(crate) fn requantized(codes: &Codes, activated: &[Bounded], width: usize) -> Requantized {
    let mut near = Vec::with_capacity(activated.len());
    let mut uncertain = Vec::new();
    for (at, &exact) in activated.iter().enumerate() {
        let (low, nearest, high) = neighbours(exact);
        near.push(nearest);
        if low != high {
            uncertain.push(Uncertain { at, low, high });
        }
    }
    let values = codes.through(&near, width);
    let moves = vec![Moves::default(); activated.len() / width];
    let mut requantized = Requantized { values, moves };
    let coder = Coder::new(codes);
    let group = coder.group(width).map_or(activated.len(), |columns| columns.min(width));
    let mut rest = uncertain.as_slice();
    while let Some(first) = rest.first() {
        // Groups do not cross rows, except that of a whole tensor.
        let start = match coder.group(width) {
            Some(columns) => first.at / width * width + first.at % width / columns * columns,
            None => 0,
        };
        let end = match coder.group(width) {
            Some(_) => (start + group).min(first.at / width * width + width),
            None => activated.len(),
        };
        let (mine, others) = rest.split_at(rest.partition_point(|u| u.at < end));
        rest = others;
        requantized.group_moves(&coder, (&near, width), (start, end), mine);
    }
    requantized
}

impl Requantized {
    /// Adds the moves of one group, `start..end` of all values.
    fn group_moves(
        &mut self,
        coder: &Coder,
        (near, width): (&[bf16], usize),
        (start, end): (usize, usize),
        uncertain: &[Uncertain],
    ) {
        let largest = |xs: &[bf16]| xs.iter().fold(0f32, |m, x| m.max(x.to_f32().abs()));
        let own = coder.scale(largest(&near[start..end]));
        let others = match coder.depends_on_values() {
            true => coder.other_scales(own, bounds_of_largest(&near[start..end], start, uncertain)),
            false => Some(Vec::new()),
        };
        let Some(others) = others else {
            // The largest value may be anything: so may all others, up to that.
            let most = uncertain.iter().fold(0f32, |m, u| m.max(u.magnitudes().1));
            for at in start..end {
                let by = 2.0 * f64::from(most) + 2.0 * self.values[at].abs();
                self.moves[at / width].elements.push((at % width, by));
            }
            return;
        };
        for u in uncertain {
            let by = others.iter().chain([&own]).fold(0.0, |most: f64, &scale| {
                let [low, middle, high] = [u.low, near[u.at], u.high].map(|x| coder.value(x.to_f32(), scale));
                most.max((high - middle).abs()).max((middle - low).abs())
            });
            if by > 0.0 {
                self.moves[u.at / width].elements.push((u.at % width, by));
            }
        }
        if others.is_empty() {
            return;
        }
        for row in start / width..end.div_ceil(width) {
            let (from, to) = (start.max(row * width), end.min((row + 1) * width));
            let under = |&scale: &f32| {
                (from..to).map(|at| coder.value(near[at].to_f32(), scale) - self.values[at]).collect()
            };
            let moves = others.iter().map(under).collect();
            self.moves[row].scales.push(OtherScale { start: from % width, moves });
        }
    }
}

/// The least and the largest that the largest magnitude of a group can be.
fn bounds_of_largest(near: &[bf16], start: usize, uncertain: &[Uncertain]) -> (f32, f32) {
    let mut uncertain = uncertain.iter().peekable();
    let (mut least, mut most) = (0f32, 0f32);
    for (offset, x) in near.iter().enumerate() {
        let (low, high) = match uncertain.next_if(|u| u.at == start + offset) {
            Some(u) => u.magnitudes(),
            None => (x.to_f32().abs(), x.to_f32().abs()),
        };
        (least, most) = (least.max(low), most.max(high));
    }
    (least, most)
}

/// The quantiser of a scheme, one value at a time.
struct Coder {
    codec: Option<Codec>,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Nothing is quantised.
    Exact,
    /// FP8 with a scale of the values.
    Dynamic(Granularity),
    /// FP8 with a scale that comes with the weights.
    Static(f32),
    /// NVFP4 with this global scale.
    Nv(f32),
}

impl Coder {
    fn new(codes: &Codes) -> Self {
        let kind = match (codes.quant, codes.quant.activation_granularity()) {
            (QuantScheme::Nvfp4, _) => Kind::Nv(codes.input_scale.unwrap_or(f32::NAN)),
            (_, None) => Kind::Exact,
            (_, Some(granularity)) => match codes.static_scale() {
                Some(scale) => Kind::Static(scale),
                None => Kind::Dynamic(granularity),
            },
        };
        let format = match kind {
            Kind::Nv(_) => Some(fused_moe_core::Fp8Format::E4M3Fn),
            _ => codes.quant.fp8(),
        };
        Self { codec: format.map(Codec::new), kind }
    }

    /// Columns that share a scale; `None` for all rows together.
    fn group(&self, width: usize) -> Option<usize> {
        match self.kind {
            Kind::Dynamic(Granularity::Group(columns)) => Some(columns.get()),
            Kind::Dynamic(Granularity::Tensor) => None,
            Kind::Nv(_) => Some(fp4::NV_GROUP),
            Kind::Exact | Kind::Static(_) | Kind::Dynamic(_) => Some(width),
        }
    }

    fn depends_on_values(&self) -> bool {
        matches!(self.kind, Kind::Dynamic(_) | Kind::Nv(_))
    }

    /// The scale of a group whose largest magnitude is `amax`; for NVFP4 the block scale.
    fn scale(&self, amax: f32) -> f32 {
        match (self.kind, &self.codec) {
            (Kind::Dynamic(_), Some(codec)) => codec.scale(amax),
            (Kind::Nv(global), Some(codec)) => codec.decode(fp4::nv_scale(codec, amax, global)) as f32,
            (Kind::Static(scale), _) => scale,
            _ => 1.0,
        }
    }

    /// Scales other than `own` for largest magnitudes between `least` and `most`; `None` if there are too many.
    fn other_scales(&self, own: f32, (least, most): (f32, f32)) -> Option<Vec<f32>> {
        let (least, most) = (bf16::from_f32(least).to_bits(), bf16::from_f32(most).to_bits());
        if most - least > MOST_CANDIDATES {
            return None;
        }
        let scales = (least..=most).map(|bits| self.scale(bf16::from_bits(bits).to_f32()));
        let mut others: Vec<f32> = scales.filter(|&scale| scale != own).collect();
        others.dedup();
        Some(others)
    }

    /// The value of `x` after the trip through its code.
    fn value(&self, x: f32, scale: f32) -> f64 {
        match (self.kind, &self.codec) {
            (Kind::Nv(global), Some(_)) => {
                let block = f64::from(scale);
                fp4::decode(fp4::nv_code(x, block, global)) * block * f64::from(global)
            }
            (_, Some(codec)) => codec.decode(codec.quantize(x, scale)) * f64::from(scale),
            (_, None) => f64::from(x),
        }
    }
}

#[cfg(test)]
mod tests {
    use fused_moe_core::Fp8Format;
    use rand::Rng;

    use super::*;
    use crate::bound::nearest;
    use crate::seed::{Seed, normal};

    const SCHEMES: [QuantScheme; 6] = [
        QuantScheme::Unquantized,
        QuantScheme::Fp8Block(Fp8Format::E4M3Fn),
        QuantScheme::Fp8Ptpc(Fp8Format::E4M3Fnuz),
        QuantScheme::Fp8PerTensor(Fp8Format::E4M3Fn),
        QuantScheme::Fp8PerTensorStatic(Fp8Format::E4M3Fn),
        QuantScheme::Nvfp4,
    ];

    /// Whatever values within the error are rounded and quantised, every product moves within the reach; and some
    /// move by most of it, without which the reach would be idle.
    #[test]
    fn values_within_the_error_stay_within_the_reach() {
        const WIDTH: usize = 200;
        let seed = Seed::fresh();
        println!("seed {seed}");
        let mut rng = seed.rng();
        for quant in SCHEMES {
            let codes = Codes { quant, input_scale: Some(0.01) };
            let (mut moved, mut used) = (0, 0f64);
            for _ in 0..300 {
                let exact: Vec<f64> = (0..3 * WIDTH).map(|_| f64::from(normal(&mut rng))).collect();
                // So large that boundaries are crossed all the time, amax included.
                let with_error = |&value: &f64| Bounded { value, error: 4e-4 * value.abs() };
                let activated: Vec<Bounded> = exact.iter().map(with_error).collect();
                let found = requantized(&codes, &activated, WIDTH);
                let rounded = |xs: &mut dyn Iterator<Item = f64>| xs.map(nearest).collect::<Vec<_>>();
                assert_eq!(found.values, codes.through(&rounded(&mut exact.iter().copied()), WIDTH));
                let mut other = exact.iter().map(|x| x * (1.0 + rng.random_range(-4e-4..4e-4)));
                let other = codes.through(&rounded(&mut other), WIDTH);
                let weights: Vec<f64> = (0..WIDTH).map(|_| f64::from(normal(&mut rng))).collect();
                let product = |row: &[f64]| row.iter().zip(&weights).map(|(x, w)| x * w).sum::<f64>();
                for (row, moves) in found.moves.iter().enumerate() {
                    let range = row * WIDTH..(row + 1) * WIDTH;
                    let by = (product(&other[range.clone()]) - product(&found.values[range])).abs();
                    let reach = moves.reach(&weights);
                    assert!(by <= reach * (1.0 + 1e-9), "{quant}: moved by {by}, reach {reach}");
                    if by > 0.0 {
                        moved += 1;
                        used = used.max(by / reach);
                    }
                }
            }
            assert!(moved > 30 && used > 0.3, "{quant}: {moved} rows moved, by {used} of the reach at most");
        }
    }

    #[test]
    fn certain_values_do_not_move() {
        for quant in SCHEMES {
            let codes = Codes { quant, input_scale: Some(0.01) };
            let activated: Vec<Bounded> =
                (1..=256).map(|i| Bounded { value: f64::from(i), error: 1e-3 }).collect();
            let found = requantized(&codes, &activated, 128);
            assert!(found.moves.iter().all(|moves| *moves == Moves::default()), "{quant}");
        }
        assert!(requantized(&Codes { quant: SCHEMES[1], input_scale: None }, &[], 128).values.is_empty());
    }
}
