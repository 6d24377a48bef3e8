//! The fused router: ids and weights of the host's router, bit for bit, and pairs as a loop sorts them.

use fused_moe::router::HostRouter;
use fused_moe_core::{
    Arena, DType, ExecCx, ExpertGroups, Router, RoutingConfig, RoutingMethod, Stream, TensorView,
    TensorViewMut, TopKMut,
};
use half::bf16;
use moe_kernels::host_simt::{Schedule, run};
use moe_kernels::router::{FusedRouter, RouterBuffers, RouterError};
use moe_kernels::{Arch, Float};
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;
use rstest::rstest;

const UNWRITTEN: u32 = 0xdead_beef;

/// What a call writes, and what it should write.
#[derive(Debug, PartialEq)]
struct Routed {
    ids: Vec<i32>,
    /// As bits.
    weights: Vec<u32>,
    fault: u32,
    offsets: Vec<u32>,
    /// Rows of the pairs that there are.
    pair_rows: Vec<u32>,
    positions: Vec<i32>,
}

/// A routing, the logits of some rows, and which experts are here.
#[derive(Clone, Debug)]
struct Case {
    config: RoutingConfig,
    /// What bf16 can hold if `format` is that.
    logits: Vec<f32>,
    format: Float,
    map: Option<Vec<i32>>,
    experts: usize,
    /// Of the device.
    compute_units: u32,
}

/// What a router keeps from call to call.
struct Workspace(Vec<u32>);

impl Case {
    /// Any routing of `method` that the kernel has, which has a kernel for all that models use.
    fn random(random: &mut Pcg64, method: RoutingMethod, rows: usize) -> Self {
        let (takes_groups, takes_bias) = match method {
            RoutingMethod::GroupLimitedSigmoid => (true, false),
            RoutingMethod::GroupLimitedSoftmax | RoutingMethod::DeepSeekV3 => (true, true),
            RoutingMethod::MiniMax2 | RoutingMethod::BiasedSoftmax | RoutingMethod::SqrtSoftplus => {
                (false, true)
            }
            _ => (false, false),
        };
        let must_group = takes_groups && method != RoutingMethod::DeepSeekV3;
        let grouped = must_group || takes_groups && random.random();
        let n_group = if grouped { random.random_range(1..=8) } else { 1 };
        let size = match random.random_range(0..4) {
            0 => random.random_range(1..=8),
            1 => 16,
            2 => 32,
            _ => random.random_range(1..=if grouped { 40 } else { 400 }),
        };
        let num_experts = n_group * size;
        let topk_group = random.random_range(1..=n_group);
        let available = (topk_group * size).min(32);
        let top_k = match method {
            RoutingMethod::Llama4 => 1,
            _ if random.random_range(0..4) == 0 => available,
            _ => random.random_range(1..=available.min(10)),
        };
        let has_bias = takes_bias && random.random();
        let config = RoutingConfig {
            method,
            num_experts,
            top_k,
            groups: grouped.then_some(ExpertGroups { n_group, topk_group }),
            renormalize: random.random(),
            routed_scaling_factor: if random.random() { 2.5 } else { 1.0 },
            correction_bias: has_bias
                .then(|| (0..num_experts).map(|_| random.random_range(-1.0..1.0)).collect()),
        };
        let format = if random.random() { Float::Bf16 } else { Float::F32 };
        let mut logits: Vec<f32> = (0..rows).flat_map(|_| row(random, num_experts)).collect();
        if format == Float::Bf16 {
            logits.iter_mut().for_each(|l| *l = bf16::from_f32(*l).to_f32());
        }
        // Every other expert is here, in no order.
        let experts = num_experts.div_ceil(2);
        let map = random.random::<bool>().then(|| {
            let of = |id: usize| if id.is_multiple_of(2) { (experts - 1 - id / 2) as i32 } else { -1 };
            (0..num_experts).map(of).collect()
        });
        let experts = if map.is_some() { experts } else { num_experts };
        let case = Self { config, logits, format, map, experts, compute_units: 132 };
        match case.router() {
            Ok(_) => case,
            Err(RouterError::Groups { .. }) => Self::random(random, method, rows),
            Err(error) => panic!("{error}: {:?}", case.config),
        }
    }

    fn rows(&self) -> usize {
        self.logits.len() / self.config.num_experts
    }

    fn router(&self) -> Result<FusedRouter, RouterError> {
        FusedRouter::new(&self.config, self.format, self.experts, self.compute_units)
    }

    fn workspace(&self) -> Workspace {
        Workspace(vec![0; self.router().unwrap().workspace_bytes() / 4])
    }

    /// As `arch` does it, over poison.
    fn on_device(&self, arch: Arch, seed: u64, workspace: &mut Workspace) -> Routed {
        let slots = self.rows() * self.config.top_k;
        // Aligned to 16 bytes.
        let mut logits = vec![0u128; self.logits.len() / 4 + 1];
        // SAFETY: there is room for as many f32.
        let bytes = unsafe { std::slice::from_raw_parts_mut(logits.as_mut_ptr().cast(), logits.len() * 16) };
        match self.format {
            Float::F32 => fill(bytes, self.logits.iter().map(|l| l.to_le_bytes())),
            Float::Bf16 => fill(bytes, self.logits.iter().map(|l| bf16::from_f32(*l).to_le_bytes())),
        }
        let mut bias = vec![0u128; self.config.num_experts / 4 + 1];
        // SAFETY: there is room for as many f32.
        let bytes = unsafe { std::slice::from_raw_parts_mut(bias.as_mut_ptr().cast(), bias.len() * 16) };
        fill(bytes, self.config.correction_bias.iter().flatten().map(|b| b.to_le_bytes()));

        let mut ids = vec![UNWRITTEN as i32; slots];
        let mut weights = vec![UNWRITTEN; slots];
        let mut fault = [UNWRITTEN];
        let mut offsets = vec![UNWRITTEN; self.experts + 1];
        let mut pair_rows = vec![UNWRITTEN; slots];
        let mut positions = vec![UNWRITTEN as i32; slots];
        let launches = self.router().unwrap().launches(
            self.rows(),
            RouterBuffers {
                logits: logits.as_ptr() as u64,
                bias: bias.as_ptr() as u64,
                ids: ids.as_mut_ptr() as u64,
                weights: weights.as_mut_ptr() as u64,
                fault: fault.as_mut_ptr() as u64,
                workspace: workspace.0.as_mut_ptr() as u64,
                map: self.map.as_ref().map_or(0, |map| map.as_ptr() as u64),
                offsets: offsets.as_mut_ptr() as u64,
                pair_rows: pair_rows.as_mut_ptr() as u64,
                positions: positions.as_mut_ptr() as u64,
            },
        );
        let launches = launches.unwrap();
        let is_one = self.rows() <= self.router().unwrap().max_sorted_rows();
        assert_eq!(launches.sort.is_none(), is_one, "launches of {} rows", self.rows());
        // Blocks of a launch that sorts wait for each other.
        let all = Schedule { seed, resident: launches.route.grid };
        // SAFETY: the buffers are as large as the router says.
        unsafe { run(arch, &launches.route, if is_one { all } else { Schedule::of(seed) }) }.unwrap();
        for launch in launches.sort.iter().flat_map(|sort| sort.as_slice()) {
            // SAFETY: as above.
            unsafe { run(arch, launch, Schedule::of(seed)) }.unwrap();
        }
        let pairs = offsets[self.experts] as usize;
        let beyond = pair_rows.split_off(pairs);
        assert!(beyond.iter().all(|&row| row == UNWRITTEN), "written beyond the pairs");
        Routed { ids, weights, fault: fault[0], offsets, pair_rows, positions }
    }

    fn on_host(&self) -> Routed {
        let (experts, top_k) = (self.config.num_experts, self.config.top_k);
        let dims = [self.rows(), top_k];
        let (mut ids, mut weights) = (vec![-99; dims[0] * top_k], vec![f32::NAN; dims[0] * top_k]);
        let workspace = Arena::new(TensorViewMut::from_slice(&mut [0u8; 0], DType::U8, &[0]).unwrap());
        let mut cx = ExecCx { stream: Stream::Host, workspace };
        let out = TopKMut {
            ids: TensorViewMut::from_slice(&mut ids, DType::I32, &dims).unwrap(),
            weights: TensorViewMut::from_slice(&mut weights, DType::F32, &dims).unwrap(),
        };
        let logits = TensorView::from_slice(&self.logits, DType::F32, &[dims[0], experts]).unwrap();
        HostRouter::new(self.config.clone()).unwrap().route(&mut cx, logits, out).unwrap();
        let weights = weights.into_iter().map(f32::to_bits).collect();
        self.sorted(ids, weights, u32::MAX)
    }

    /// The pairs of `ids` by a loop.
    fn sorted(&self, ids: Vec<i32>, weights: Vec<u32>, fault: u32) -> Routed {
        let local = |id: i32| match &self.map {
            Some(map) if id >= 0 => map[id as usize],
            _ => id,
        };
        let (mut offsets, mut pair_rows) = (vec![0], Vec::new());
        let mut positions = vec![-1; ids.len()];
        for expert in 0..self.experts as i32 {
            for (slot, _) in ids.iter().enumerate().filter(|(_, id)| local(**id) == expert) {
                positions[slot] = pair_rows.len() as i32;
                pair_rows.push((slot / self.config.top_k) as u32);
            }
            offsets.push(pair_rows.len() as u32);
        }
        Routed { ids, weights, fault, offsets, pair_rows, positions }
    }
}

fn fill<const N: usize>(bytes: &mut [u8], values: impl Iterator<Item = [u8; N]>) {
    for (to, value) in bytes.chunks_exact_mut(N).zip(values) {
        to.copy_from_slice(&value);
    }
}

/// Logits of common size, of few values, so that many are equal, or far apart and with holes; at times nothing but holes.
fn row(random: &mut Pcg64, experts: usize) -> Vec<f32> {
    let kind = random.random_range(0..8);
    let mut logit = || match kind {
        0..3 => random.random_range(-8.0..8.0),
        3..5 => *[-2.0, -1.0, -0.0, 0.0, 1.0].choose(random).unwrap(),
        5 => random.random_range(-120.0..-20.0),
        6 if random.random_range(0..3) > 0 => random.random_range(-90.0..90.0),
        _ => f32::NEG_INFINITY,
    };
    (0..experts).map(|_| logit()).collect()
}

#[rstest]
fn routes_and_sorts_as_the_host(
    #[values(Arch::Sm90a, Arch::Gfx942, Arch::Gfx950)] arch: Arch,
    #[values(0, 1, 21, 70)] rows: usize,
) {
    for method in RoutingMethod::ALL {
        let seed = rand::random();
        let case = Case::random(&mut Pcg64::seed_from_u64(seed), method, rows);
        let got = case.on_device(arch, seed, &mut case.workspace());
        assert_eq!(got, case.on_host(), "seed {seed}, {:?}", case.config);
    }
}

/// The shapes that models have, all kernels among them.
#[rstest]
#[case::mixtral(RoutingMethod::RenormalizeNaive, 8, 2, None)]
#[case::qwen3(RoutingMethod::RenormalizeNaive, 128, 8, None)]
#[case::deepseek_v2(RoutingMethod::GroupLimitedSoftmax, 160, 6, Some((8, 3)))]
#[case::deepseek_v3(RoutingMethod::DeepSeekV3, 256, 8, Some((8, 4)))]
#[case::kimi_k2(RoutingMethod::DeepSeekV3, 384, 8, Some((1, 1)))]
#[case::qwen3_next(RoutingMethod::Renormalize, 512, 10, None)]
#[case::longcat(RoutingMethod::BiasedSoftmax, 768, 12, None)]
#[case::largest(RoutingMethod::SqrtSoftplus, 1024, 32, None)]
fn routes_what_models_do(
    #[case] method: RoutingMethod,
    #[case] num_experts: usize,
    #[case] top_k: usize,
    #[case] groups: Option<(usize, usize)>,
    #[values(Arch::Sm90a, Arch::Gfx942)] arch: Arch,
) {
    let seed = rand::random();
    let mut random = Pcg64::seed_from_u64(seed);
    let has_bias = matches!(
        method,
        RoutingMethod::DeepSeekV3 | RoutingMethod::BiasedSoftmax | RoutingMethod::SqrtSoftplus
    );
    let config = RoutingConfig {
        method,
        num_experts,
        top_k,
        groups: groups.map(|(n_group, topk_group)| ExpertGroups { n_group, topk_group }),
        renormalize: true,
        routed_scaling_factor: 2.5,
        correction_bias: has_bias.then(|| (0..num_experts).map(|_| random.random_range(-0.1..0.1)).collect()),
    };
    let logits = (0..19).flat_map(|_| row(&mut random, num_experts)).collect();
    let case =
        Case { config, logits, format: Float::F32, map: None, experts: num_experts, compute_units: 132 };
    assert_eq!(case.on_device(arch, seed, &mut case.workspace()), case.on_host(), "seed {seed}");
}

/// Blocks of many rows, several launches, and a workspace that goes from call to call.
#[rstest]
fn a_workspace_serves_calls_of_all_sizes(#[values(Arch::Sm90a, Arch::Gfx942)] arch: Arch) {
    let seed = rand::random();
    let mut random = Pcg64::seed_from_u64(seed);
    let whole = Case { compute_units: 3, ..Case::random(&mut random, RoutingMethod::DeepSeekV3, 110) };
    let mut workspace = whole.workspace();
    for rows in [90, 9, 110, 1, 96, 20, 97] {
        let logits = whole.logits[..rows * whole.config.num_experts].to_vec();
        let case = Case { logits, ..whole.clone() };
        let got = case.on_device(arch, random.random(), &mut workspace);
        assert_eq!(got, case.on_host(), "{rows} rows, seed {seed}, {:?}", whole.config);
    }
}

/// What the host refuses, a device leaves out and tells of.
#[rstest]
fn rows_with_logits_that_are_none_get_no_expert(
    #[values(f32::NAN, -f32::NAN, f32::INFINITY)] bad: f32,
    #[values(132, 1)] compute_units: u32,
    #[values(Arch::Sm90a, Arch::Gfx950)] arch: Arch,
) {
    let seed = rand::random();
    let mut random = Pcg64::seed_from_u64(seed);
    let mut case = Case::random(&mut random, RoutingMethod::RenormalizeNaive, 37);
    case.compute_units = compute_units;
    let (experts, top_k) = (case.config.num_experts, case.config.top_k);
    let Routed { mut ids, mut weights, .. } = case.on_host();
    let first = 4 * experts + random.random_range(0..experts);
    for at in [first, 5 * experts - 1, 30 * experts] {
        case.logits[at] = bad;
        let row = at / experts;
        ids[row * top_k..][..top_k].fill(-1);
        weights[row * top_k..][..top_k].fill(0);
    }
    let wanted = case.sorted(ids, weights, first as u32);
    let mut workspace = case.workspace();
    assert_eq!(case.on_device(arch, seed, &mut workspace), wanted, "seed {seed}, {:?}", case.config);
    // The next call knows nothing of it.
    case.logits.fill(0.5);
    assert_eq!(case.on_device(arch, seed, &mut workspace), case.on_host(), "seed {seed}, {:?}", case.config);
}

/// What a negative control needs: a router that gives ties to the higher id, made of the right one by turning rows around,
/// must not pass.
#[test]
fn ties_to_the_higher_id_are_found() {
    let mut random = Pcg64::seed_from_u64(rand::random());
    let mut case = Case::random(&mut random, RoutingMethod::Sigmoid, 0);
    (case.config.num_experts, case.config.top_k, case.experts, case.map) = (48, 4, 48, None);
    case.logits = (0..40 * 48).map(|_| *[-1.0, 0.0, 1.0].choose(&mut random).unwrap()).collect();
    let wanted = case.on_host();
    let turned = |values: &[f32]| values.chunks(48).flat_map(|row| row.iter().rev().copied()).collect();
    let broken = Case { logits: turned(&case.logits), ..case.clone() };
    let Routed { ids, weights, fault, .. } = broken.on_device(Arch::Sm90a, 1, &mut broken.workspace());
    let ids = ids.into_iter().map(|id| 47 - id).collect();
    let broken = case.sorted(ids, weights, fault);
    assert_eq!(broken.weights, wanted.weights);
    assert_ne!(broken.ids, wanted.ids);
    assert_ne!(broken.positions, wanted.positions);
}

#[test]
fn refuses_what_lanes_have_no_room_for() {
    let config = |num_experts, top_k, groups| RoutingConfig {
        method: RoutingMethod::DeepSeekV3,
        num_experts,
        top_k,
        groups,
        renormalize: true,
        routed_scaling_factor: 1.0,
        correction_bias: None,
    };
    let refused = |config: RoutingConfig, experts, units| {
        FusedRouter::new(&config, Float::F32, experts, units).unwrap_err().to_string()
    };
    assert_eq!(refused(config(8, 9, None), 8, 132), "top_k 9 is not in 1..=8 (num_experts)");
    assert_eq!(refused(config(1025, 8, None), 8, 132), "num_experts 1025 is not in 1..=1024 (router)");
    assert_eq!(refused(config(64, 8, None), 1025, 132), "local experts 1025 is not in 1..=1024 (router)");
    assert_eq!(refused(config(64, 33, None), 64, 132), "top_k 33 is more than 32 (router)");
    let groups = Some(ExpertGroups { n_group: 2, topk_group: 1 });
    let refusal = refused(config(74, 8, groups), 74, 132);
    assert_eq!(refusal, "2 groups of 37 experts do not divide into parts of lanes (router)");
    assert_eq!(refused(config(64, 8, None), 64, 0), "0 multiprocessors (router)");
    let router = FusedRouter::new(&config(256, 8, None), Float::F32, 256, 132).unwrap();
    let buffers = RouterBuffers {
        logits: 0,
        bias: 0,
        ids: 0,
        weights: 0,
        fault: 0,
        workspace: 0,
        map: 0,
        offsets: 0,
        pair_rows: 0,
        positions: 0,
    };
    let refusal = router.launches(1 << 24, buffers).unwrap_err().to_string();
    assert_eq!(refusal, "logits 4294967297 is more than 4294967295 (router_256)");
}
