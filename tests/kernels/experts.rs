//! Around the grouped GEMMs: sorting rows by expert, and the weighted sum, against the plain loops that they stand for.

use half::bf16;
use moe_kernels::host_simt::{Schedule, run};
use moe_kernels::sorting::{MoeSorting, SortPolicy, SortingBuffers};
use moe_kernels::weighted_sum::{SumBuffers, WeightedSum};
use moe_kernels::{Arch, Float};
use rand::seq::index::sample;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;
use rstest::rstest;

const UNWRITTEN: u32 = 0xdead_beef;

#[rstest]
fn sorting_is_that_of_a_loop(
    #[values(Arch::Sm90a, Arch::Gfx942)] arch: Arch,
    #[values(0, 1, 70, 300)] rows: usize,
    #[values(true, false)] has_map: bool,
    #[values(SortPolicy::SinglePass, SortPolicy::MultiPhase)] policy: SortPolicy,
) {
    let seed = rand::random();
    let mut random = Pcg64::seed_from_u64(seed);
    let (num_experts, top_k) = (12, 4);
    // Experts elsewhere, in no order; one of those here gets nothing.
    let map: Vec<i32> = vec![3, -1, 0, -1, 1, 5, -1, 2, -1, 4, -1, -1];
    let experts = if has_map { 6 } else { num_experts };
    let mut ids: Vec<i32> = (0..rows)
        .flat_map(|_| {
            sample(&mut random, num_experts - 1, top_k).into_iter().map(|id| id as i32).collect::<Vec<_>>()
        })
        .collect();
    for id in &mut ids {
        match random.random_range(0..20) {
            0 => *id = -1,
            1 => *id = num_experts as i32 + 7,
            _ => {}
        }
    }
    let mut offsets = vec![UNWRITTEN; experts + 1];
    let mut pair_rows = vec![UNWRITTEN; rows * top_k];
    let mut positions = vec![UNWRITTEN as i32; rows * top_k];
    let mut counts = vec![UNWRITTEN; MoeSorting::counts_bytes(experts) / 4];
    let job = MoeSorting { rows, top_k, experts, num_experts, policy };
    let launches = job.launches(SortingBuffers {
        ids: ids.as_ptr() as u64,
        map: if has_map { map.as_ptr() as u64 } else { 0 },
        offsets: offsets.as_mut_ptr() as u64,
        pair_rows: pair_rows.as_mut_ptr() as u64,
        positions: positions.as_mut_ptr() as u64,
        counts: counts.as_mut_ptr() as u64,
    });
    for launch in launches.unwrap().as_slice() {
        // SAFETY: the buffers are as large as the job says.
        unsafe { run(arch, launch, Schedule::of(seed)) }.unwrap();
    }

    let local = |id: i32| match usize::try_from(id).ok().filter(|&id| id < num_experts) {
        Some(id) if has_map => map[id],
        Some(id) => id as i32,
        None => -1,
    };
    let (mut wanted_offsets, mut wanted_rows) = (vec![0], Vec::new());
    let mut wanted_positions = vec![-1; ids.len()];
    for expert in 0..experts as i32 {
        for (slot, &id) in ids.iter().enumerate() {
            if local(id) == expert {
                wanted_positions[slot] = wanted_rows.len() as i32;
                wanted_rows.push((slot / top_k) as u32);
            }
        }
        wanted_offsets.push(wanted_rows.len() as u32);
    }
    assert_eq!(offsets, wanted_offsets, "seed {seed}");
    assert_eq!(positions, wanted_positions, "seed {seed}");
    let (pairs, rest) = pair_rows.split_at(wanted_rows.len());
    assert_eq!(pairs, wanted_rows, "seed {seed}");
    assert!(rest.iter().all(|&row| row == UNWRITTEN), "written beyond the pairs, seed {seed}");
}

#[rstest]
fn sums_are_in_the_order_of_slots(
    #[values(Arch::Sm90a, Arch::Gfx950)] arch: Arch,
    #[values(8, 520, 2048)] hidden: usize,
) {
    let seed = rand::random();
    let mut random = Pcg64::seed_from_u64(seed);
    let (rows, top_k, pairs) = (5, 3, 9);
    let products: Vec<f32> = (0..pairs * hidden).map(|_| random.random_range(-1e3..1e3)).collect();
    let weights: Vec<f32> = (0..rows * top_k).map(|_| random.random_range(0.0..1.0)).collect();
    // The last row has no expert here.
    let positions: Vec<i32> = (0..rows * top_k)
        .map(|slot| if slot / top_k == rows - 1 { -1 } else { random.random_range(-1..pairs as i32) })
        .collect();
    let mut out = vec![f32::NAN; rows * hidden];
    let launch =
        WeightedSum { rows, top_k, hidden, products: Float::F32, out: Float::F32 }.launch(SumBuffers {
            products: products.as_ptr() as u64,
            positions: positions.as_ptr() as u64,
            weights: weights.as_ptr() as u64,
            out: out.as_mut_ptr() as u64,
        });
    // SAFETY: the buffers are as large as the job says.
    unsafe { run(arch, &launch.unwrap(), Schedule::of(seed)) }.unwrap();
    for (index, &got) in out.iter().enumerate() {
        let (row, column) = (index / hidden, index % hidden);
        let mut wanted = 0f32;
        for slot in row * top_k..(row + 1) * top_k {
            if let Ok(pair) = usize::try_from(positions[slot]) {
                wanted += products[pair * hidden + column] * weights[slot];
            }
        }
        assert_eq!(got.to_bits(), wanted.to_bits(), "row {row}, column {column}, seed {seed}");
    }
}

#[test]
fn sums_round_once_to_bf16() {
    let mut random = Pcg64::seed_from_u64(rand::random());
    let (rows, top_k, hidden) = (3, 2, 24);
    let products: Vec<bf16> =
        (0..rows * top_k * hidden).map(|_| bf16::from_f32(random.random_range(-9.0..9.0))).collect();
    let positions: Vec<i32> = (0..(rows * top_k) as i32).rev().collect();
    let weights: Vec<f32> = positions.iter().map(|_| random.random_range(0.0..1.0)).collect();
    let mut out = vec![bf16::NAN; rows * hidden];
    let job = WeightedSum { rows, top_k, hidden, products: Float::Bf16, out: Float::Bf16 };
    let launch = job.launch(SumBuffers {
        products: products.as_ptr() as u64,
        positions: positions.as_ptr() as u64,
        weights: weights.as_ptr() as u64,
        out: out.as_mut_ptr() as u64,
    });
    // SAFETY: the buffers are as large as the job says.
    unsafe { run(Arch::Gfx942, &launch.unwrap(), Schedule::of(1)) }.unwrap();
    for (index, got) in out.iter().enumerate() {
        let (row, column) = (index / hidden, index % hidden);
        let term =
            |slot: usize| products[positions[slot] as usize * hidden + column].to_f32() * weights[slot];
        let wanted = bf16::from_f32((0.0 + term(row * top_k)) + term(row * top_k + 1));
        assert_eq!(got.to_bits(), wanted.to_bits(), "row {row}, column {column}");
    }
}
