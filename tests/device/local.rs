//! Dispatch and combine on the device: the rows that arrive have the bits of the host's quantisers, outputs come back exactly,
//! faults are told, and the next round is right.

use fused_moe_core::{
    Arrived, DType, DeviceKind, ErrorKind, ExecCx, ExpertOut, ExpertsProvider, Fault, Granularity, Layout,
    MoeConfig, PrepareAndFinalizeModular, PrepareFinalize, PrepareInput, QuantScheme, SingleRank, Source,
    Stage, Support, TensorView, TensorViewMut, TopK, Workspace, maybe_make_prepare_finalize,
};
use gpu_experts::GpuExperts;
use half::bf16;
use libtest_mimic::Failed;
use moe_conformance::{Case, SCHEMES, Seed, TestDevice};
use moe_kernels::Gpu as Open;
use naive_comm::DeviceLocal;
use quant::RowQuantizer;

use crate::conformance::OnStream;
use crate::{FIRST, Gpu, OnGpu};

pub const TESTS: [(&str, OnGpu); 2] = [("local_rows", rows), ("local_faults", faults)];

/// Elements between rows of the caller's hidden states.
const GAP: usize = 16;

/// A handle and a round's tensors on the device.
struct Rig {
    device: &'static OnStream,
    comm: Box<dyn PrepareAndFinalizeModular>,
    config: MoeConfig,
    hidden: Vec<bf16>,
    tokens: usize,
    memory: [Workspace; 3],
    ids: Vec<i32>,
}

fn bytes<T: Copy, const N: usize>(values: &[T], to: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|&x| to(x)).collect()
}

impl Rig {
    fn new(quant: QuantScheme) -> Result<Self, Failed> {
        let open = Open::open(FIRST)?;
        let device = OnStream::new(&open)?;
        let case = Case::plain(quant, 1, Seed::fresh()).on(DeviceKind::Cuda);
        println!("{case}");
        let config = case.config();
        let Support::Supported(caps) = GpuExperts::new(open.clone()).supports(&config) else {
            return Err("the experts refuse".into());
        };
        let local = DeviceLocal::new(open);
        let (plan, built) = maybe_make_prepare_finalize(&[&local], &config, &caps, &SingleRank)?;
        let PrepareFinalize::Modular(comm) = built else { return Err("not modular".into()) };
        let wanted = fused_moe_core::PrepareFinalizeProvider::required_bytes(&local, &config, &plan);
        if comm.allocated_bytes() != wanted {
            return Err(format!("holds {} bytes, announced {wanted}", comm.allocated_bytes()).into());
        }
        let input = case.inputs(0).remove(0);
        let (tokens, width) = (input.num_tokens, config.hidden);
        // With gaps that nobody may read.
        let mut gapped = Vec::new();
        for row in input.hidden.chunks(width) {
            gapped.extend_from_slice(row);
            gapped.extend([bf16::NAN; GAP]);
        }
        let contents = [
            bytes(&gapped, bf16::to_ne_bytes),
            bytes(&input.ids, i32::to_ne_bytes),
            bytes(&input.weights, f32::to_ne_bytes),
        ];
        let mut memory = Vec::new();
        for bytes in contents {
            let mut workspace = Workspace::on(device.memory(), bytes.len())?;
            device.write(&mut workspace, &bytes)?;
            memory.push(workspace);
        }
        let memory = memory.try_into().map_err(|_| "three tensors")?;
        Ok(Self { device, comm, config, hidden: input.hidden, tokens, memory, ids: input.ids })
    }

    fn row(&self, row: usize) -> &[bf16] {
        &self.hidden[row * self.config.hidden..][..self.config.hidden]
    }

    /// What a row is on the wire, by the quantisers of the host.
    fn encoded(&self, row: usize) -> Result<(Vec<u8>, Vec<u8>), Failed> {
        let row = self.row(row);
        let Some(granularity) = self.config.quant.activation_granularity() else {
            return Ok((bytes(row, bf16::to_ne_bytes), Vec::new()));
        };
        let quantizer = RowQuantizer::new(self.config.quant.fp8().ok_or("no FP8")?);
        let mut codes = vec![0; row.len()];
        let mut scales = vec![0.0; granularity.scales_per_token(row.len())];
        match granularity {
            Granularity::Token => scales[0] = quantizer.quantize_per_token(row, &mut codes)?,
            _ => quantizer.quantize_per_group(row, granularity, &mut codes, &mut scales)?,
        }
        Ok((codes, bytes(&scales, f32::to_ne_bytes)))
    }

    /// A round whose experts return the caller's own rows, lent or in place, into `out`.
    fn round(&mut self, out_dtype: DType, in_place: bool) -> Result<Vec<f32>, Failed> {
        let mut none = Workspace::on(self.device.memory(), 0)?;
        let mut cx = ExecCx { stream: self.device.stream(), workspace: none.arena() };
        let (width, tokens, top_k) = (self.config.hidden, self.tokens, self.config.top_k);
        let layout = Layout::contiguous(&[tokens, width]).strided(&[width + GAP, 1], 0);
        let whole = self.memory[0].tensor(DType::Bf16, &[tokens * (width + GAP)])?;
        let allocation = fused_moe_core::Allocation {
            base: std::ptr::without_provenance_mut(whole.address()),
            bytes: tokens * (width + GAP) * 2,
            dtype: DType::Bf16,
            device: whole.device(),
        };
        // SAFETY: it is the memory of `whole`, which is borrowed until the round has been waited for.
        let hidden = unsafe { TensorView::from_allocation(allocation, layout)? };
        let topk = TopK {
            ids: self.memory[1].tensor(DType::I32, &[tokens, top_k])?,
            weights: self.memory[2].tensor(DType::F32, &[tokens, top_k])?,
        };
        let input = PrepareInput { hidden, topk, input_scale: None, fault: None };
        let (mut arrived, routed) = self.comm.prepare(&mut cx, input)?;
        let codes = self.device.bytes_of(arrived.hidden)?;
        let scales = arrived.scale.map(|scale| self.device.bytes_of(scale)).transpose()?.unwrap_or_default();
        let Arrived::Standard { topk, rows } = arrived.arrived else { return Err("batched".into()) };
        let found = self.device.bytes_of(topk.ids)?;
        if rows.on_host()? != tokens || found[..tokens * top_k * 4] != bytes(&self.ids, i32::to_ne_bytes) {
            return Err(format!("{} rows with other ids, sent {tokens}", rows.on_host()?).into());
        }
        let output = arrived.output.take().ok_or("no buffer for outputs")?.into_view();
        let mut own = Workspace::on(self.device.memory(), tokens * width * 2)?;
        self.device.write(&mut own, &bytes(&self.hidden, bf16::to_ne_bytes))?;
        let own = own.tensor(DType::Bf16, &[tokens, width])?;
        if in_place {
            self.device.copy(output, own)?;
        }
        let out = if in_place { ExpertOut::InPlace } else { ExpertOut::Lent(own) };
        let mut sums = Workspace::on(self.device.memory(), tokens * width * out_dtype.size_bytes())?;
        let poison = vec![0xff; sums.bytes()];
        self.device.write(&mut sums, &poison)?;
        self.comm.finalize(&mut cx, routed, out, sums.tensor_mut(out_dtype, &[tokens, width])?)?;
        let sums = self.device.bytes_of(sums.tensor(out_dtype, &[tokens, width])?)?;
        for row in 0..tokens {
            let (wanted, wanted_scales) = self.encoded(row)?;
            let (codes, scales) = (&codes[row * wanted.len()..], &scales[row * wanted_scales.len()..]);
            if codes[..wanted.len()] != wanted || scales[..wanted_scales.len()] != wanted_scales {
                return Err(format!("row {row} arrived with other bits").into());
            }
        }
        Ok(match out_dtype {
            DType::F32 => sums.as_chunks().0.iter().map(|&x| f32::from_ne_bytes(x)).collect(),
            _ => sums.as_chunks().0.iter().map(|&x| bf16::from_ne_bytes(x).to_f32()).collect(),
        })
    }
}

fn rows(_: &Gpu) -> Result<(), Failed> {
    for (name, quant) in &SCHEMES[..3] {
        let mut rig = Rig::new(*quant)?;
        let wanted: Vec<f32> = rig.hidden.iter().map(|x| x.to_f32()).collect();
        for (dtype, in_place) in
            [(DType::F32, true), (DType::Bf16, false), (DType::F32, false), (DType::Bf16, true)]
        {
            if rig.round(dtype, in_place)? != wanted {
                return Err(format!("{name}: outputs as {dtype}, in place: {in_place}, are others").into());
            }
        }
    }
    Ok(())
}

/// Tensors elsewhere, a fault of the caller's own, experts that fail, a dropped ticket: an error or none, and a right round.
fn faults(_: &Gpu) -> Result<(), Failed> {
    let mut rig = Rig::new(SCHEMES[1].1)?;
    let wanted: Vec<f32> = rig.hidden.iter().map(|x| x.to_f32()).collect();
    for what in ["host", "reported", "experts", "dropped", "host stream"] {
        let outcome = rig.fail(what)?;
        let told = match what {
            "reported" => outcome == Some((Fault::Unknown { code: 7 }, Stage::QuantizeDispatch)),
            "experts" => outcome == Some((Fault::ExpertsFailed, Stage::Experts)),
            "dropped" => outcome.is_none(),
            _ => outcome == Some((Fault::BadTensor, Stage::QuantizeDispatch)),
        };
        if !told {
            return Err(format!("{what}: {outcome:?}").into());
        }
        if rig.round(DType::F32, true)? != wanted {
            return Err(format!("the round after {what} is wrong").into());
        }
    }
    Ok(())
}

impl Rig {
    /// A round with one token that goes wrong; what it says.
    fn fail(&mut self, what: &str) -> Result<Option<(Fault, Stage)>, Failed> {
        let mut none = Workspace::on(self.device.memory(), 0)?;
        let stream = if what == "host stream" { fused_moe_core::Stream::Host } else { self.device.stream() };
        let mut cx = ExecCx { stream, workspace: none.arena() };
        let (width, top_k) = (self.config.hidden, self.config.top_k);
        let on_host = vec![bf16::ONE; width];
        let hidden = match what {
            "host" => TensorView::from_slice(&on_host, DType::Bf16, &[1, width])?,
            _ => self.memory[0].tensor(DType::Bf16, &[1, width])?,
        };
        let topk = TopK {
            ids: self.memory[1].tensor(DType::I32, &[1, top_k])?,
            weights: self.memory[2].tensor(DType::F32, &[1, top_k])?,
        };
        let fault = (what == "reported").then_some(Fault::Unknown { code: 7 });
        let input = PrepareInput { hidden, topk, input_scale: None, fault };
        let told = |error: fused_moe_core::Error| match error.kind {
            ErrorKind::RankFailed { fault, .. } => Ok(Some((fault, error.stage))),
            _ => Err(Failed::from(Source::from(error).to_string())),
        };
        let sent = self.comm.prepare_send(&mut cx, input)?;
        let routed = match self.comm.prepare_recv(&mut cx, sent) {
            Err(error) => return told(error),
            Ok((_, routed)) => routed,
        };
        if what == "dropped" {
            return Ok(None);
        }
        let sent = self.comm.finalize_send(&mut cx, routed, ExpertOut::Failed(Fault::ExpertsFailed))?;
        let mut out = Workspace::on(self.device.memory(), width * 4)?;
        let out: TensorViewMut<'_> = out.tensor_mut(DType::F32, &[1, width])?;
        self.comm.finalize_recv(&mut cx, sent, out).err().map_or(Ok(None), told)
    }
}
