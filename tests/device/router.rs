//! The fused router on the device: ids and weights of the host's router, bit for bit, and pairs as a loop sorts them.

use fused_moe::router::HostRouter;
use fused_moe_core::{
    Arena, DType, ExecCx, ExpertGroups, Router, RoutingConfig, RoutingMethod, Stream, TensorView,
    TensorViewMut, TopKMut,
};
use half::bf16;
use libtest_mimic::Failed;
use moe_kernels::Float;
use moe_kernels::router::{FusedRouter, RouterBuffers};
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;

use crate::{Gpu, OnGpu};

pub const TESTS: [(&str, OnGpu); 3] = [
    ("router_has_the_bits_of_the_host", bits),
    ("router_serves_calls_of_all_sizes", sizes),
    ("router_tells_of_logits_that_are_none", faults),
];

const POISON: u8 = 0xa5;
const ROWS: [usize; 10] = [1, 8, 9, 64, 0, 1000, 1024, 4096, 5000, 17];

/// What a call writes; words as bytes.
#[derive(Clone, Debug, PartialEq)]
struct Routed {
    ids: Vec<i32>,
    weights: Vec<u32>,
    fault: u32,
    offsets: Vec<u32>,
    /// As many as there are pairs.
    pair_rows: Vec<u32>,
    positions: Vec<i32>,
}

struct Case {
    config: RoutingConfig,
    format: Float,
    /// Every other expert, the last first.
    map: Vec<i32>,
    experts: usize,
}

impl Case {
    fn new(random: &mut Pcg64, method: RoutingMethod) -> Self {
        let grouped = matches!(
            method,
            RoutingMethod::GroupLimitedSoftmax
                | RoutingMethod::GroupLimitedSigmoid
                | RoutingMethod::DeepSeekV3
        );
        let takes_bias = matches!(
            method,
            RoutingMethod::GroupLimitedSoftmax
                | RoutingMethod::DeepSeekV3
                | RoutingMethod::MiniMax2
                | RoutingMethod::BiasedSoftmax
                | RoutingMethod::SqrtSoftplus
        );
        let num_experts: usize = [8, 64, 100, 128, 160, 256, 256, 384, 512, 1000][random.random_range(0..10)];
        let num_experts = if grouped { [128, 160, 256, 512][random.random_range(0..4)] } else { num_experts };
        let top_k = if method == RoutingMethod::Llama4 { 1 } else { random.random_range(1..=8) };
        let experts = num_experts.div_ceil(2);
        let of = |id: usize| if id.is_multiple_of(2) { (experts - 1 - id / 2) as i32 } else { -1 };
        Self {
            config: RoutingConfig {
                method,
                num_experts,
                top_k,
                groups: grouped
                    .then_some(ExpertGroups { n_group: 8, topk_group: random.random_range(1..=8) }),
                renormalize: random.random(),
                routed_scaling_factor: 2.5,
                correction_bias: (takes_bias && random.random())
                    .then(|| (0..num_experts).map(|_| random.random_range(-0.5..0.5)).collect()),
            },
            format: if random.random() { Float::Bf16 } else { Float::F32 },
            map: (0..num_experts).map(of).collect(),
            experts,
        }
    }

    /// Rows of common size, and rows of few values, so that many are equal.
    fn logits(&self, random: &mut Pcg64, rows: usize) -> Vec<f32> {
        (0..rows * self.config.num_experts)
            .map(|at| {
                let value = if (at / self.config.num_experts).is_multiple_of(3) {
                    f32::from(random.random_range(-2i8..3))
                } else {
                    random.random_range(-9.0..9.0)
                };
                if self.format == Float::Bf16 { bf16::from_f32(value).to_f32() } else { value }
            })
            .collect()
    }

    /// The pairs of `ids` by a loop.
    fn sorted(&self, ids: Vec<i32>, weights: Vec<u32>, fault: u32) -> Routed {
        let mut of_expert = vec![Vec::new(); self.experts];
        for (slot, &id) in ids.iter().enumerate() {
            let local = usize::try_from(id).map_or(-1, |id| self.map[id]);
            if let Ok(local) = usize::try_from(local) {
                of_expert[local].push(slot);
            }
        }
        let (mut offsets, mut pair_rows) = (vec![0], Vec::new());
        let mut positions = vec![-1; ids.len()];
        for slots in of_expert {
            for slot in slots {
                positions[slot] = pair_rows.len() as i32;
                pair_rows.push((slot / self.config.top_k) as u32);
            }
            offsets.push(pair_rows.len() as u32);
        }
        Routed { ids, weights, fault, offsets, pair_rows, positions }
    }

    fn on_host(&self, logits: &[f32]) -> Result<Routed, Failed> {
        let (experts, top_k) = (self.config.num_experts, self.config.top_k);
        let dims = [logits.len() / experts, top_k];
        let (mut ids, mut weights) = (vec![-99; dims[0] * top_k], vec![f32::NAN; dims[0] * top_k]);
        let workspace = Arena::new(TensorViewMut::from_slice(&mut [0u8; 0], DType::U8, &[0])?);
        let mut cx = ExecCx { stream: Stream::Host, workspace };
        let out = TopKMut {
            ids: TensorViewMut::from_slice(&mut ids, DType::I32, &dims)?,
            weights: TensorViewMut::from_slice(&mut weights, DType::F32, &dims)?,
        };
        let logits = TensorView::from_slice(logits, DType::F32, &[dims[0], experts])?;
        HostRouter::new(self.config.clone())?.route(&mut cx, logits, out)?;
        Ok(self.sorted(ids, weights.into_iter().map(f32::to_bits).collect(), u32::MAX))
    }
}

/// A router on the device with room for as many rows.
struct OnDevice<'a> {
    gpu: &'a Gpu,
    case: &'a Case,
    router: FusedRouter,
    stream: device_runtime::Stream,
    /// In the order of [`RouterBuffers`].
    buffers: [device_runtime::DeviceBuffer; 10],
}

impl<'a> OnDevice<'a> {
    fn new(gpu: &'a Gpu, case: &'a Case, rows: usize) -> Result<Self, Failed> {
        let units = gpu.runtime.info()?.compute_units;
        let router = FusedRouter::new(&case.config, case.format, case.experts, units)?;
        let (experts, slots) = (case.config.num_experts, rows * case.config.top_k * 4);
        let bytes = [
            rows * experts * case.format.bytes(),
            experts * 4,
            slots,
            slots,
            4,
            router.workspace_bytes(),
            experts * 4,
            (case.experts + 1) * 4,
            slots,
            slots,
        ];
        let stream = gpu.runtime.stream()?;
        let buffers = bytes.map(|bytes| gpu.runtime.alloc(bytes.max(16)));
        let buffers = buffers.into_iter().collect::<Result<Vec<_>, _>>()?;
        let mut buffers: [_; 10] = buffers.try_into().map_err(|_| "ten buffers")?;
        let words = |values: Vec<u32>| values.into_iter().flat_map(u32::to_le_bytes).collect::<Vec<_>>();
        let bias = case.config.correction_bias.clone().unwrap_or_else(|| vec![f32::NAN; experts]);
        buffers[1].write(&padded(words(bias.into_iter().map(f32::to_bits).collect())))?;
        buffers[6].write(&padded(words(case.map.iter().map(|&id| id as u32).collect())))?;
        buffers[5].fill(0, &stream)?;
        Ok(Self { gpu, case, router, stream, buffers })
    }

    fn addresses(&self) -> RouterBuffers {
        let [logits, bias, ids, weights, fault, workspace, map, offsets, pair_rows, positions] =
            self.buffers.each_ref().map(device_runtime::DeviceBuffer::address);
        RouterBuffers { logits, bias, ids, weights, fault, workspace, map, offsets, pair_rows, positions }
    }

    /// What a call writes over poison: eager, and twice from one graph.
    fn route(&mut self, logits: &[f32]) -> Result<Vec<Routed>, Failed> {
        let rows = logits.len() / self.case.config.num_experts;
        let bytes: Vec<u8> = match self.case.format {
            Float::F32 => logits.iter().flat_map(|l| l.to_le_bytes()).collect(),
            Float::Bf16 => logits.iter().flat_map(|l| bf16::from_f32(*l).to_le_bytes()).collect(),
        };
        self.write_logits(bytes)?;
        let launches = self.router.launches(rows, self.addresses())?;
        let kernels = &self.gpu.kernels;
        // SAFETY: the buffers are as large as the router says, and live as long as the graph.
        let graph = self.stream.capture(|stream| unsafe { launches.enqueue(kernels, stream) })?;
        let mut routed = Vec::new();
        for from_graph in [false, true, true] {
            for written in [2, 3, 4, 7, 8, 9] {
                self.buffers[written].fill(POISON, &self.stream)?;
            }
            // SAFETY: as above.
            unsafe {
                if from_graph {
                    graph.replay(&self.stream)?
                } else {
                    launches.enqueue(kernels, &self.stream)?
                }
            }
            self.stream.wait()?;
            routed.push(self.read(rows)?);
        }
        Ok(routed)
    }

    fn write_logits(&mut self, mut bytes: Vec<u8>) -> Result<(), Failed> {
        bytes.resize(self.buffers[0].bytes(), 0);
        Ok(self.buffers[0].write(&bytes)?)
    }

    fn read(&self, rows: usize) -> Result<Routed, Failed> {
        let words = |buffer: usize, count: usize| -> Result<Vec<u32>, Failed> {
            let mut bytes = vec![0; self.buffers[buffer].bytes()];
            self.buffers[buffer].read(&mut bytes)?;
            Ok(bytes.as_chunks::<4>().0.iter().take(count).map(|&word| u32::from_le_bytes(word)).collect())
        };
        let integers = |words: Vec<u32>| words.into_iter().map(|word| word as i32).collect();
        let slots = rows * self.case.config.top_k;
        let offsets = words(7, self.case.experts + 1)?;
        let pairs = (offsets[self.case.experts] as usize).min(slots);
        let pair_rows = words(8, slots)?;
        let poison = u32::from_le_bytes([POISON; 4]);
        if pair_rows[pairs..].iter().any(|&row| row != poison) {
            return Err("written beyond the pairs".into());
        }
        Ok(Routed {
            ids: integers(words(2, slots)?),
            weights: words(3, slots)?,
            fault: words(4, 1)?[0],
            offsets,
            pair_rows: pair_rows[..pairs].to_vec(),
            positions: integers(words(9, slots)?),
        })
    }
}

fn padded(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(bytes.len().max(16), 0);
    bytes
}

fn compare(got: &[Routed], wanted: &Routed) -> Result<(), String> {
    for (run, got) in got.iter().enumerate() {
        let differs = [
            ("ids", got.ids != wanted.ids),
            ("weights", got.weights != wanted.weights),
            ("fault", got.fault != wanted.fault),
            ("offsets", got.offsets != wanted.offsets),
            ("pair rows", got.pair_rows != wanted.pair_rows),
            ("positions", got.positions != wanted.positions),
        ];
        if let Some((what, _)) = differs.into_iter().find(|(_, differs)| *differs) {
            return Err(format!("{what} differ in run {run}"));
        }
    }
    Ok(())
}

fn bits(gpu: &Gpu) -> Result<(), Failed> {
    for method in RoutingMethod::ALL.into_iter().flat_map(|method| [method; 4]) {
        let seed = rand::random();
        let mut random = Pcg64::seed_from_u64(seed);
        let case = Case::new(&mut random, method);
        let rows = ROWS[random.random_range(0..ROWS.len())];
        let logits = case.logits(&mut random, rows);
        let got = OnDevice::new(gpu, &case, rows)?.route(&logits)?;
        compare(&got, &case.on_host(&logits)?)
            .map_err(|error| format!("{error}: {rows} rows, seed {seed}, {:?}", case.config))?;
    }
    Ok(())
}

/// One workspace for calls of all sizes.
fn sizes(gpu: &Gpu) -> Result<(), Failed> {
    let seed = rand::random();
    let mut random = Pcg64::seed_from_u64(seed);
    let case = Case::new(&mut random, RoutingMethod::DeepSeekV3);
    let most = ROWS.into_iter().max().unwrap_or(0);
    let mut on_device = OnDevice::new(gpu, &case, most)?;
    for rows in ROWS {
        let logits = case.logits(&mut random, rows);
        let got = on_device.route(&logits)?;
        compare(&got, &case.on_host(&logits)?)
            .map_err(|error| format!("{error}: {rows} rows, seed {seed}, {:?}", case.config))?;
    }
    Ok(())
}

fn faults(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Pcg64::seed_from_u64(rand::random());
    let case = Case::new(&mut random, RoutingMethod::Renormalize);
    let (experts, top_k) = (case.config.num_experts, case.config.top_k);
    for rows in [300, 5000] {
        let mut logits = case.logits(&mut random, rows);
        let Routed { mut ids, mut weights, .. } = case.on_host(&logits)?;
        for (at, bad) in [(7 * experts + 5, f32::NAN), (200 * experts, f32::INFINITY)] {
            logits[at] = bad;
            ids[at / experts * top_k..][..top_k].fill(-1);
            weights[at / experts * top_k..][..top_k].fill(0);
        }
        let wanted = case.sorted(ids, weights, (7 * experts + 5) as u32);
        compare(&OnDevice::new(gpu, &case, rows)?.route(&logits)?, &wanted)?;
    }
    Ok(())
}
