//! A rank's experts as the kernels read them, in the memory of the device.

use device_runtime::DeviceBuffer;
use fused_moe_core::{
    BLOCK, DType, DeviceKind, ExpertMap, ExpertMatrices, ExpertWeights, MoeConfig, Rank, TensorView,
    WeightMatrix, WeightScale,
};
use half::bf16;
use moe_kernels::experts::{ExpertsShape, ExpertsWeights};
use moe_kernels::grouped_gemm::GemmScheme;
use moe_kernels::{Gpu, pack};

use crate::error::GpuExpertsError;
use crate::{NAME, limits};

/// What packed weights are for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) scheme: GemmScheme,
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    /// Local of global experts, −1 where they are elsewhere.
    map: Vec<i32>,
}

impl Layout {
    pub(crate) fn new(config: &MoeConfig, rank: Rank, shape: &ExpertsShape) -> Self {
        let ExpertsShape { scheme, hidden, intermediate, .. } = *shape;
        let map = ExpertMap::new(&config.placement, rank).as_slice().to_vec();
        Self { scheme, hidden, intermediate, map }
    }
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { scheme, hidden, intermediate, map } = self;
        let local = map.iter().filter(|&&local| local >= 0).count();
        write!(f, "{scheme:?} [{intermediate}, {hidden}] of {local} of {} experts", map.len())
    }
}

/// Packed experts.
#[derive(Debug)]
pub(crate) struct PackedExperts {
    layout: Layout,
    gate_up: DeviceBuffer,
    gate_up_map: DeviceBuffer,
    gate_up_scales: DeviceBuffer,
    down: DeviceBuffer,
    down_map: DeviceBuffer,
    down_scales: DeviceBuffer,
    /// [`Layout::map`], unless every expert is here and has its own number.
    map: Option<DeviceBuffer>,
}

/// One expert, packed.
struct Packed {
    gate_up: Vec<u8>,
    down: Vec<u8>,
    gate_up_scales: Vec<f32>,
    down_scales: Vec<f32>,
}

/// One matrix as a checkpoint has it: bytes row by row, and its scales.
struct Matrix {
    bytes: Vec<u8>,
    scales: Vec<f32>,
}

impl PackedExperts {
    /// Packs the experts of `rank` one by one and uploads each.
    pub(crate) fn pack(
        gpu: &Gpu,
        (config, rank): (&MoeConfig, Rank),
        experts: &[ExpertMatrices<'_>],
    ) -> Result<Self, GpuExpertsError> {
        let shape = limits::shape(config, rank, gpu.compute_units())
            .ok_or_else(|| GpuExpertsError::Refused(limits::reasons(config)))?;
        let layout = Layout::new(config, rank, &shape);
        let (runtime, count) = (gpu.runtime(), experts.len());
        let ExpertsShape { scheme, hidden, intermediate, .. } = shape;
        let matrix = intermediate * hidden * scheme.bytes();
        let blocks = 4 * intermediate.div_ceil(BLOCK) * hidden.div_ceil(BLOCK);
        let (gate_up_scales, down_scales) = match scheme {
            GemmScheme::Bf16 => (0, 0),
            GemmScheme::Fp8Block => (blocks, blocks / 2),
            GemmScheme::Fp8Row => (2 * intermediate, hidden),
        };
        let (gate_up, down) = (runtime.alloc(count * 2 * matrix)?, runtime.alloc(count * matrix)?);
        let mut this = Self {
            gate_up_map: pack::map(runtime, &gate_up)?,
            gate_up,
            gate_up_scales: runtime.alloc(count * gate_up_scales * 4)?,
            down_map: pack::map(runtime, &down)?,
            down,
            down_scales: runtime.alloc(count * down_scales * 4)?,
            map: None,
            layout,
        };
        for (index, expert) in experts.iter().enumerate() {
            let packed = Packed::new(&shape, index, expert)?;
            this.gate_up.write_at(index * 2 * matrix, &packed.gate_up)?;
            this.down.write_at(index * matrix, &packed.down)?;
            let bytes = |values: &[f32]| values.iter().flat_map(|x| x.to_ne_bytes()).collect::<Vec<_>>();
            this.gate_up_scales.write_at(index * gate_up_scales * 4, &bytes(&packed.gate_up_scales))?;
            this.down_scales.write_at(index * down_scales * 4, &bytes(&packed.down_scales))?;
        }
        let is_identity = this.layout.map.iter().enumerate().all(|(id, &local)| id as i32 == local);
        if !is_identity {
            let map: Vec<u8> = this.layout.map.iter().flat_map(|local| local.to_ne_bytes()).collect();
            let mut buffer = runtime.alloc(map.len())?;
            buffer.write(&map)?;
            this.map = Some(buffer);
        }
        Ok(this)
    }

    pub(crate) fn into_weights(self) -> ExpertWeights {
        let weights = [&self.gate_up, &self.gate_up_map, &self.down, &self.down_map];
        let bytes = weights
            .into_iter()
            .chain([&self.gate_up_scales, &self.down_scales])
            .chain(&self.map)
            .map(DeviceBuffer::bytes)
            .sum();
        ExpertWeights::new(NAME, self, bytes)
    }

    /// What this backend packed into `weights`, for a layer of this layout on the device of `gpu`.
    pub(crate) fn of<'w>(
        weights: &'w ExpertWeights,
        gpu: &Gpu,
        layout: &Layout,
    ) -> Result<&'w Self, GpuExpertsError> {
        let foreign = |found: String| GpuExpertsError::Foreign {
            found,
            wanted: format!("those of {NAME} on {}, {layout}", gpu.device()),
        };
        let packed = weights.packed::<Self>().filter(|_| weights.backend() == NAME);
        let packed = packed.ok_or_else(|| foreign(format!("those of {}", weights.backend())))?;
        let device = packed.gate_up.device();
        if packed.layout != *layout || device != gpu.device() {
            return Err(foreign(format!("those of {NAME} on {device}, {}", packed.layout)));
        }
        Ok(packed)
    }

    pub(crate) fn addresses(&self) -> ExpertsWeights {
        ExpertsWeights {
            gate_up: self.gate_up.address(),
            gate_up_map: self.gate_up_map.address(),
            gate_up_scales: self.gate_up_scales.address(),
            down: self.down.address(),
            down_map: self.down_map.address(),
            down_scales: self.down_scales.address(),
        }
    }

    pub(crate) fn map(&self) -> u64 {
        self.map.as_ref().map_or(0, DeviceBuffer::address)
    }
}

impl Packed {
    fn new(shape: &ExpertsShape, index: usize, expert: &ExpertMatrices<'_>) -> Result<Self, GpuExpertsError> {
        let ExpertsShape { arch, scheme, hidden, intermediate, .. } = *shape;
        let read = |names, lent, dims| Matrix::read(scheme, (index, names), lent, dims);
        let gate = read(["gate", "gate scale", "gate bias"], expert.gate, [intermediate, hidden])?;
        let up = read(["up", "up scale", "up bias"], expert.up, [intermediate, hidden])?;
        let down = read(["down", "down scale", "down bias"], expert.down, [hidden, intermediate])?;
        let (gate_up_scales, down_scales) = match scheme {
            GemmScheme::Bf16 => (Vec::new(), Vec::new()),
            GemmScheme::Fp8Block => (
                pack::gate_up_block_scales(&gate.scales, &up.scales, intermediate, hidden.div_ceil(BLOCK)),
                pack::down_block_scales(&down.scales),
            ),
            GemmScheme::Fp8Row => (pack::gate_up_row_scales(&gate.scales, &up.scales), down.scales),
        };
        let (hidden_bytes, intermediate_bytes) = (hidden * scheme.bytes(), intermediate * scheme.bytes());
        Ok(Self {
            gate_up: pack::gate_up(arch, &gate.bytes, &up.bytes, intermediate, hidden_bytes)?,
            down: pack::down(arch, &down.bytes, hidden, intermediate_bytes)?,
            gate_up_scales,
            down_scales,
        })
    }
}

impl Matrix {
    fn read(
        scheme: GemmScheme,
        (expert, [values, scale, bias]): (usize, [&'static str; 3]),
        lent: WeightMatrix<'_>,
        dims: [usize; 2],
    ) -> Result<Self, GpuExpertsError> {
        let wrong = |tensor, wanted: String, found: String| {
            Err(GpuExpertsError::Weight { expert, tensor, wanted, found })
        };
        let view = lent.values;
        let dtype_fits = match scheme {
            GemmScheme::Bf16 => matches!(view.dtype(), DType::Bf16 | DType::F32),
            GemmScheme::Fp8Block | GemmScheme::Fp8Row => view.dtype() == DType::Fp8E4M3Fn,
        };
        if view.dims() != dims || !dtype_fits || view.device().kind != DeviceKind::Host {
            let of = if scheme == GemmScheme::Bf16 { "bf16 or f32" } else { "fp8_e4m3fn" };
            let found = format!("{:?} of {} on {}", view.dims(), view.dtype(), view.device());
            return wrong(values, format!("{dims:?} of {of} on the host"), found);
        }
        if let Some(found) = lent.bias {
            return wrong(bias, "no bias".into(), format!("{:?}", found.dims()));
        }
        let [rows, columns] = dims;
        let (wanted, scales) = match (scheme, lent.scale) {
            (GemmScheme::Bf16, None) => (None, None),
            (GemmScheme::Bf16, Some(_)) => return wrong(scale, "no scale".into(), "one".into()),
            (GemmScheme::Fp8Row, Some(WeightScale::Channel(view))) => (Some(vec![rows]), Some(view)),
            (GemmScheme::Fp8Block, Some(WeightScale::Block128(view))) => {
                (Some(vec![rows.div_ceil(BLOCK), columns.div_ceil(BLOCK)]), Some(view))
            }
            (GemmScheme::Fp8Row, other) => {
                return wrong(scale, "a scale per output channel".into(), describe(other));
            }
            (GemmScheme::Fp8Block, other) => {
                return wrong(scale, "a scale per 128x128 block".into(), describe(other));
            }
        };
        let scales = match (wanted, scales) {
            (Some(wanted), Some(view)) if view.dims() != wanted || view.dtype() != DType::F32 => {
                let found = format!("{:?} of {}", view.dims(), view.dtype());
                return wrong(scale, format!("{wanted:?} of f32"), found);
            }
            (_, Some(view)) => floats(view)?,
            _ => Vec::new(),
        };
        if let Some(at) = scales.iter().position(|scale| !scale.is_finite()) {
            return wrong(scale, "finite scales".into(), format!("{} at {at}", scales[at]));
        }
        let mut bytes = Vec::with_capacity(rows * columns * scheme.bytes());
        for row in 0..rows {
            match view.dtype() {
                DType::F32 => {
                    bytes.extend(view.row::<f32>(row)?.iter().flat_map(|&x| bf16::from_f32(x).to_ne_bytes()))
                }
                _ => bytes.extend_from_slice(view.row_bytes(row)?),
            }
        }
        Ok(Self { bytes, scales })
    }
}

/// All elements of a host tensor of one or two dimensions.
fn floats(view: TensorView<'_>) -> Result<Vec<f32>, GpuExpertsError> {
    if view.dims().len() != 2 {
        return Ok(view.as_slice::<f32>()?.to_vec());
    }
    let mut values = Vec::with_capacity(view.layout().num_elements());
    for row in 0..view.dims()[0] {
        values.extend_from_slice(view.row::<f32>(row)?);
    }
    Ok(values)
}

fn describe(scale: Option<WeightScale<'_>>) -> String {
    match scale {
        None => "no scale".into(),
        Some(WeightScale::Tensor(scale)) => format!("one scale ({scale})"),
        Some(WeightScale::Channel(view)) => format!("a scale per output channel, {:?}", view.dims()),
        Some(WeightScale::Block128(view)) => format!("a scale per 128x128 block, {:?}", view.dims()),
        Some(_) => "another kind of scale".into(),
    }
}
