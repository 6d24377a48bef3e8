//! Every layout is undone exactly, multiplies to the same, and its values are where the formula says.

mod common;

use common::*;
use fused_moe_core::*;
use half::bf16;
use moe_conformance::Case;
use rand::{Rng, RngCore};
use rand_pcg::Pcg64Mcg;
use rstest::rstest;
use trtllm_experts::layout::*;

const SHUFFLES: [Option<ShuffleBlock>; 3] = [None, Some(ShuffleBlock::Rows16), Some(ShuffleBlock::Rows32)];

fn random(len: usize, rng: &mut Pcg64Mcg) -> Vec<u8> {
    let mut bytes = vec![0; len];
    rng.fill_bytes(&mut bytes);
    bytes
}

/// All orders, for shapes that fill them.
fn layouts() -> impl Iterator<Item = TrtllmLayout> {
    let rows = SHUFFLES
        .into_iter()
        .flat_map(|shuffled| [false, true].map(|interleaved| RowOrder { interleaved, shuffled }));
    rows.flat_map(|rows| [KOrder::MajorK, KOrder::BlockMajorK { run: 8 }].map(|k| TrtllmLayout { rows, k }))
}

/// The product of the matrix with `x`, read through the formula alone.
fn multiply(matrix: &TrtllmMatrix<'_, u8>, x: &[u8]) -> Vec<u64> {
    let [rows, columns] = matrix.dims();
    let product = |row: usize| {
        let terms = (0..columns).map(|c| u64::from(matrix.values()[matrix.offset(row, c)]) * u64::from(x[c]));
        terms.sum()
    };
    (0..rows).map(product).collect()
}

#[test]
fn conversions_are_exact_and_products_the_same() {
    let rng = &mut fresh_rng();
    for layout in layouts() {
        let (half, columns) = (16 * rng.random_range(1..5), 8 * rng.random_range(1..6));
        let (gate, up) = (random(half * columns, rng), random(half * columns, rng));
        let x = random(columns, rng);
        let w13 = TrtllmMatrix::from_gate_up(&gate, &up, columns, layout).unwrap();
        assert_eq!(w13.to_gate_up(), (gate.clone(), up.clone()), "{layout:?}");
        let stacked = [up.clone(), gate.clone()].concat();
        let plain = stacked.chunks(columns);
        let dot = |row: &[u8]| row.iter().zip(&x).map(|(a, b)| u64::from(*a) * u64::from(*b)).sum();
        let want: Vec<u64> = plain.map(dot).collect();
        assert_eq!(multiply(&w13, &x), want, "{layout:?}");

        let w2 = TrtllmMatrix::from_rows(&stacked, columns, layout).unwrap();
        assert_eq!((w2.values(), w2.to_rows()), (w13.values(), stacked), "{layout:?}");
        // What FlashInfer holds is adopted as it is.
        let lent = TrtllmMatrix::new(w2.values(), w2.dims(), layout).unwrap();
        assert_eq!(lent, w2);
    }
}

/// FlashInfer's own steps, one after the other, in its words.
#[rstest]
fn layouts_are_the_steps_of_flashinfer(#[values(16, 32)] block: usize) {
    let rng = &mut fresh_rng();
    let (rows, columns, run) = (2 * block * rng.random_range(1..4), 32, 8);
    let half = rows / 2 * columns;
    let (gate, up) = (random(half, rng), random(half, rng));
    let stacked = [up.clone(), gate.clone()].concat();
    let row = |matrix: &[u8], row: usize| matrix[row * columns..][..columns].to_vec();
    // reorder_rows_for_gated_act_gemm
    let interleaved: Vec<u8> =
        (0..rows / 2).flat_map(|i| [row(&stacked, i), row(&stacked, i + rows / 2)].concat()).collect();
    // shuffle_matrix_a: row `old` goes to `block_start + row_map[old % block]`
    let stride = block / 8;
    let mut shuffled = vec![0; rows * columns];
    for old in 0..rows {
        let new = old / block * block + old % block % stride * 8 + old % block / stride;
        shuffled[new * columns..][..columns].copy_from_slice(&row(&interleaved, old));
    }
    // convert_to_block_layout
    let blocks = (0..columns / run).flat_map(|b| (0..rows).map(move |r| (b, r)));
    let block_major: Vec<u8> =
        blocks.flat_map(|(b, r)| row(&shuffled, r)[b * run..][..run].to_vec()).collect();
    let shuffle = if block == 16 { ShuffleBlock::Rows16 } else { ShuffleBlock::Rows32 };
    let rows = RowOrder::interleaved(Some(shuffle));
    let layout = TrtllmLayout { rows, k: KOrder::BlockMajorK { run } };
    let matrix = TrtllmMatrix::from_gate_up(&gate, &up, columns, layout).unwrap();
    assert_eq!(matrix.values(), block_major);
}

#[test]
fn swizzled_scales_come_back() {
    let rng = &mut fresh_rng();
    for tile in [ScaleTile::Rows128x4, ScaleTile::Rows8x4] {
        for _ in 0..20 {
            let dims @ [rows, columns] = [rng.random_range(1..300), rng.random_range(1..20)];
            let scales: Vec<u8> = random(rows * columns, rng).iter().map(|s| s | 1).collect();
            let swizzled = SwizzledScales::from_rows(&scales, dims, tile).unwrap();
            assert_eq!(swizzled.to_rows(), scales, "{tile:?} {dims:?}");
            let filled = swizzled.bytes().iter().filter(|&&b| b != 0).count();
            assert_eq!((swizzled.bytes().len(), filled), (tile.bytes(rows, columns), rows * columns));
            let again = SwizzledScales::new(swizzled.bytes().to_vec(), dims, tile).unwrap();
            assert_eq!(again, swizzled);
        }
    }
}

#[test]
fn scales_of_activations_are_transposed() {
    let rng = &mut fresh_rng();
    let (rows, groups) = (rng.random_range(1..9), rng.random_range(1..9));
    let scales: Vec<f32> = (0..rows * groups).map(|_| rng.random()).collect();
    let columns = transposed(&scales, groups);
    assert_eq!((columns[rows - 1], transposed(&columns, rows)), (scales[(rows - 1) * groups], scales));
}

#[test]
fn sizes_that_do_not_fill_a_layout_are_refused() {
    let layout = SchemeLayouts::of(QuantScheme::Fp8Block(FN)).unwrap().w13;
    let refused = |rows: usize, columns: usize, len: usize| {
        TrtllmMatrix::new(vec![0u8; len], [rows, columns], layout).unwrap_err().to_string()
    };
    assert_eq!(refused(24, 128, 24 * 128), "number of rows 24 is no multiple of 16");
    assert_eq!(refused(32, 100, 3200), "number of columns 100 is no multiple of 128");
    assert_eq!(refused(32, 128, 1), "the matrix have 1 values, wanted 4096");
    let uneven = TrtllmMatrix::from_gate_up(&[0u8; 4], &[0; 8], 4, layout).unwrap_err().to_string();
    assert_eq!(uneven, "the rows of up have 8 values, wanted 4");
    let tiles = SwizzledScales::new(vec![0; 5], [1, 1], ScaleTile::Rows128x4).unwrap_err().to_string();
    assert_eq!(tiles, "the swizzled scales have 5 values, wanted 512");
    assert_eq!(SchemeLayouts::of(QuantScheme::Mxfp4), None);
}

/// All experts of a rank in FlashInfer's order, as an engine that feeds the device kernels would hold them.
#[derive(Default)]
struct Engine {
    bf16: [Vec<bf16>; 2],
    codes: [Vec<u8>; 2],
    scales: [Vec<f32>; 2],
    blocks: [Vec<u8>; 2],
    inputs: [f32; 2],
    quant: Option<QuantScheme>,
}

impl Engine {
    fn new(config: &MoeConfig, experts: &[ExpertMatrices<'_>]) -> Self {
        let layouts = SchemeLayouts::of(config.quant).unwrap();
        let mut engine = Self { quant: Some(config.quant), ..Self::default() };
        for ExpertMatrices { gate, up, down } in experts {
            let [columns, wide] = [gate, down].map(|matrix| matrix.values.dims()[1]);
            if config.quant == QuantScheme::Unquantized {
                let [g, u, d] = [gate, up, down].map(|m| m.values.as_slice::<bf16>().unwrap());
                let w13 = TrtllmMatrix::from_gate_up(g, u, columns, layouts.w13).unwrap();
                engine.bf16[0].extend(w13.values());
                engine.bf16[1].extend(TrtllmMatrix::from_rows(d, wide, layouts.w2).unwrap().values());
            } else {
                let [g, u, d] = [gate, up, down].map(|m| m.values.as_slice::<u8>().unwrap());
                let w13 = TrtllmMatrix::from_gate_up(g, u, columns, layouts.w13).unwrap();
                engine.codes[0].extend(w13.values());
                engine.codes[1].extend(TrtllmMatrix::from_rows(d, wide, layouts.w2).unwrap().values());
            }
            for (gemm, matrix) in [(0, gate), (0, up), (1, down)] {
                engine.inputs[gemm] = engine.inputs[gemm].max(matrix.input_scale.unwrap_or(0.0));
            }
            engine.add_scales(layouts, [gate, up, down].map(|matrix| matrix.scale));
        }
        engine
    }

    fn add_scales(&mut self, layouts: SchemeLayouts, scales: [Option<WeightScale<'_>>; 3]) {
        let swizzled = |blocks: TrtllmMatrix<'_, u8>| {
            SwizzledScales::from_rows(blocks.values(), blocks.dims(), ScaleTile::Rows128x4).unwrap()
        };
        let bytes = |blocks: TensorView<'_>| blocks.as_slice::<u8>().unwrap().to_vec();
        match scales {
            [Some(WeightScale::Tensor(gate)), _, Some(WeightScale::Tensor(down))] => {
                self.scales[0].push(gate);
                self.scales[1].push(down);
            }
            [
                Some(WeightScale::Block128(gate)),
                Some(WeightScale::Block128(up)),
                Some(WeightScale::Block128(down)),
            ] => {
                for (into, scales) in [(0, up), (0, gate), (1, down)] {
                    self.scales[into].extend(scales.as_slice::<f32>().unwrap());
                }
            }
            [
                Some(WeightScale::Nv16 { blocks: gate, global: first }),
                Some(WeightScale::Nv16 { blocks: up, .. }),
                Some(WeightScale::Nv16 { blocks: down, global: second }),
            ] => {
                let [k, n] = [gate, down].map(|blocks| blocks.dims()[1]);
                let w13 = TrtllmMatrix::from_gate_up(&bytes(gate), &bytes(up), k, layouts.w13).unwrap();
                let w2 = TrtllmMatrix::from_rows(&bytes(down), n, layouts.w2).unwrap();
                self.blocks[0].extend(swizzled(w13).bytes());
                self.blocks[1].extend(swizzled(w2).bytes());
                self.scales[0].push(first);
                self.scales[1].push(second);
            }
            _ => assert_eq!(self.quant, Some(QuantScheme::Unquantized)),
        }
    }

    fn lend(&self) -> TrtllmWeights<'_> {
        let [w13, w2] = [0, 1].map(|which| match self.quant {
            Some(QuantScheme::Unquantized) => TrtllmValues::Bf16(&self.bf16[which]),
            _ => TrtllmValues::Codes(&self.codes[which]),
        });
        let ([scale13, scale2], inputs) = (&self.scales, self.inputs);
        let scales = match self.quant {
            Some(QuantScheme::Fp8Block(_)) => TrtllmScales::Block128 { w13: scale13, w2: scale2 },
            Some(QuantScheme::Fp8PerTensorStatic(_)) => {
                TrtllmScales::Tensor { w13: scale13, w2: scale2, inputs }
            }
            Some(QuantScheme::Nvfp4) => TrtllmScales::Nv16 {
                w13: &self.blocks[0],
                w2: &self.blocks[1],
                w13_global: scale13,
                w2_global: scale2,
                inputs,
            },
            _ => TrtllmScales::None,
        };
        TrtllmWeights { w13, w2, scales }
    }
}

/// Gate and up under one scale per tensor, as FlashInfer has them.
fn share_scales(expert: &mut ExpertMatrices<'_>) {
    match (&expert.gate.scale, &mut expert.up.scale) {
        (Some(WeightScale::Tensor(gate)), Some(WeightScale::Tensor(up))) => *up = *gate,
        (Some(WeightScale::Nv16 { global: gate, .. }), Some(WeightScale::Nv16 { global: up, .. })) => {
            *up = *gate
        }
        _ => {}
    }
}

/// Weights that went through FlashInfer's order give the same bits.
#[rstest]
fn experts_come_back_from_flashinfer(#[values(0, 1, 2, 3)] scheme: usize, #[values(1, 2)] ep_size: usize) {
    let case: Case = case(SCHEMES[scheme], ep_size);
    let (config, batch, weights) = (case.config(), Batch::of(&case), case.weights());
    let mut all = weights.matrices();
    all.iter_mut().for_each(share_scales);
    let rank = Rank(ep_size as u32 - 1);
    let engine = Engine::new(&config, &local(&config, &all, rank));
    let owned = from_trtllm(&config, rank, engine.lend()).unwrap();
    let experts: Vec<_> = owned.iter().map(|expert| expert.matrices().unwrap()).collect();
    let mut built = Built::new(&monolithic(), &config, (&all, rank), batch.max_rows());
    let want = built.apply(&batch).unwrap();
    built.weights = monolithic().pack(&config, rank, &experts).unwrap();
    assert_eq!(bits(&built.apply(&batch).unwrap()), bits(&want));

    let mut wrong = engine.lend();
    wrong.scales = match config.quant {
        QuantScheme::Unquantized => TrtllmScales::Block128 { w13: &[], w2: &[] },
        _ => TrtllmScales::None,
    };
    assert!(matches!(from_trtllm(&config, rank, wrong), Err(LayoutError::Scheme { .. })));
    let fewer = MoeConfig { intermediate: 64, ..config };
    assert!(matches!(from_trtllm(&fewer, rank, engine.lend()), Err(LayoutError::Length { .. })));
}
